"""The images of a configuration: which ones of the data set, with which labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from flatmin.train.config import TrainConfig
from flatmin.train.data import (
    FileSet,
    ImageFiles,
    ImageSet,
    flip_labels,
    flip_labels_to,
    load_files,
    load_images,
    mistaken_for,
    read_array_file,
    split_validation,
)
from flatmin.train.data.load import in_random_order
from flatmin.train.data.seeding import generator_from
from flatmin.train.errors import TrainingError
from flatmin.train.facts import facts_of, is_file_set
from flatmin.train.label_file import read_labels

__all__ = ["Split", "images_of_split", "read_images", "sample_of"]

Split = Literal["train", "validation", "test"]


def read_images(config: TrainConfig) -> ImageSet | FileSet:
    """Load the data set, or find its files.

    Raises:
        TrainingError: If it is damaged.
        FileNotFoundError: If it is not there and cannot be downloaded.
    """
    try:
        if config.dataset == "file":
            assert config.dataset_path is not None
            return in_random_order(read_array_file(config.dataset_path))
        if is_file_set(config):
            return checked_files(config)
        return load_images(config.dataset, config.data_dir)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def images_of_split(
    config: TrainConfig, image_set: ImageSet | FileSet, split: Split
) -> tuple[Tensor | ImageFiles, Tensor]:
    """Images and labels of one split as the run sees them: the training labels are those with noise.

    Raises:
        TrainingError: If the run held out no validation images, or there are too few to hold any out.
    """
    if split == "test":
        return image_set.test_images, image_set.test_labels
    images, labels = image_set.train_images, image_set.train_labels
    if config.eval_on == "validation":
        try:
            train, validation = split_validation(images, labels, facts_of(config).num_extra)
        except ValueError as error:
            raise TrainingError(f"eval_on must be test for so few images: {error}") from error
        if split == "validation":
            return validation
        images, labels = train
    elif split == "validation":
        raise TrainingError("this run trained on the validation images: it needs --eval-on validation")
    if config.num_train_images is not None:
        if not config.num_train_images <= len(labels):
            raise TrainingError(f"num_train_images must be <= {len(labels)}, got {config.num_train_images}")
        images, labels = drawn_once("training subset", images, labels, config.num_train_images)
    return images, training_labels(config, labels, image_set.classes)


def training_labels(config: TrainConfig, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Labels to train on: those of the data set, or with noise, or those of a file.

    Raises:
        TrainingError: If the file is missing or damaged, or does not belong to these images, or they have one class and
            are to get another.
    """
    if config.train_labels is not None:
        return read_labels(config, len(labels), len(classes))
    if config.label_noise == 0.0:  # of one class too
        return labels
    try:
        if config.label_noise_kind == "asymmetric":
            return flip_labels_to(labels, config.label_noise, mistaken_for(classes), config.seed)
        return flip_labels(labels, config.label_noise, len(classes), config.seed)
    except ValueError as error:
        raise TrainingError(f"label_noise must be 0 for these images, got {config.label_noise}: {error}") from error


def sample_of(images: Tensor | ImageFiles, labels: Tensor, num_images: int) -> tuple[Tensor | ImageFiles, Tensor]:
    """The images at which sharpness is measured, drawn once and the same for every run; all if there are fewer."""
    return drawn_once("sharpness sample", images, labels, num_images)


def drawn_once(
    purpose: str, images: Tensor | ImageFiles, labels: Tensor, num_images: int
) -> tuple[Tensor | ImageFiles, Tensor]:
    """Images drawn at random, in their order, whatever the seed of the run; all if there are fewer."""
    drawn = torch.randperm(len(labels), generator=generator_from(purpose))[:num_images].sort().values
    return images[drawn], labels[drawn]


def checked_files(config: TrainConfig) -> FileSet:
    """Find the files of a data set, and raise ``ValueError`` unless it has the classes that it should have."""
    own_directory = config.data_dir / config.dataset if config.dataset in {"imagenet", "birdsnap"} else config.data_dir
    directory = config.dataset_path or own_directory
    try:
        files = load_files(config.dataset, directory)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
    num_classes = facts_of(config).num_classes
    if files.num_classes != num_classes:
        raise ValueError(f"{directory} must have {num_classes} classes of {config.dataset}, got {files.num_classes}")
    return files
