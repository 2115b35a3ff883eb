"""The images of a configuration: which ones, with which labels, in which batches."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor

from flatmin.train.config import TrainConfig
from flatmin.train.data import (
    Augmentation,
    AugmentationOptions,
    EvalLoader,
    FileSet,
    ImageFiles,
    ImageSet,
    ImageStream,
    TrainLoader,
    flip_labels,
    flip_labels_to,
    load_files,
    load_images,
    mistaken_for,
    named_augmentation,
    read_array_file,
    split_validation,
)
from flatmin.train.data.load import in_random_order
from flatmin.train.data.seeding import generator_from
from flatmin.train.errors import TrainingError
from flatmin.train.facts import facts_of, is_file_set
from flatmin.train.label_file import read_labels

__all__ = [
    "Loaders",
    "Split",
    "batch_indices",
    "eval_loader",
    "images_of_split",
    "make_loaders",
    "read_images",
    "sample_of",
    "training_sample",
]

Split = Literal["train", "validation", "test"]

EVAL_BATCH_SIZE = 512  # per replica; without gradients this fits where a training batch does


class Loaders(NamedTuple):
    """Batches to train on, to evaluate on and to measure sharpness on; the last two are None unless asked for."""

    train: TrainLoader
    evaluation: EvalLoader
    train_evaluation: EvalLoader | None
    sharpness: EvalLoader | None


def make_loaders(config: TrainConfig, fabric: Fabric) -> Loaders:
    """Load the images once and put them on the device of this replica, or start to stream them there.

    Raises:
        TrainingError: If the batch size does not suit the images or the number of replicas.
    """
    with fabric.rank_zero_first():
        image_set = read_images(config)
    images, labels = images_of_split(config, image_set, "train")
    facts = facts_of(config)
    augmentation = named_augmentation(config.augmentation, facts, AugmentationOptions.of(config))
    try:
        train = TrainLoader(
            image_source(config, fabric, images, random_crop=augmentation.resized_crop),
            labels.to(fabric.device),
            batch_size=config.batch_size,
            normalization=facts.normalization,
            augmentation=augmentation,
            seed=config.seed,
            num_classes=facts.num_classes,
            rank=fabric.global_rank,
            num_replicas=fabric.world_size,
            resize_to=None if is_file_set(config) else config.image_size,
        )
    except ValueError as error:
        raise TrainingError(str(error)) from error
    train_evaluation = eval_loader(config, fabric, image_set, "train") if config.eval_train else None
    sample = None
    if config.sharpness_every:
        sample = training_sample(config, fabric, image_set, config.sharpness_images, config.batch_size)
    return Loaders(train, eval_loader(config, fabric, image_set, config.eval_on), train_evaluation, sample)


def batch_indices(loader: TrainLoader, epoch: int, batch: int) -> Tensor:
    """Return which of the run's training images, counted in their order, make up a batch over all replicas."""
    whole = copy(loader)
    whole.rank, whole.num_replicas, whole.augmentation = 0, 1, Augmentation()
    whole.labels = torch.arange(len(loader.labels), device=loader.labels.device)  # each image is its own class
    _, indices = next(whole.epoch(epoch, first_batch=batch))
    return indices.cpu()


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


def eval_loader(config: TrainConfig, fabric: Fabric, image_set: ImageSet | FileSet, split: Split) -> EvalLoader:
    """Batches of ``split`` for evaluation, this replica's part, on its device."""
    split_images = images_of_split(config, image_set, split)
    return plain_batches(config, fabric, split_images, EVAL_BATCH_SIZE * fabric.world_size)


def training_sample(
    config: TrainConfig, fabric: Fabric, image_set: ImageSet | FileSet, num_images: int, batch_size: int
) -> EvalLoader:
    """Batches of training images that were drawn once, not augmented, with the labels that training sees.

    The images depend on the data set alone, not on the seed, so that runs can be compared.

    Args:
        config: The run.
        fabric: Its processes; each gets its own part.
        image_set: Its images.
        num_images: How many over all processes; all of them if there are fewer.
        batch_size: Images in a batch over all processes.

    Raises:
        TrainingError: If ``num_images`` is smaller than the number of processes.
    """
    if num_images < fabric.world_size:
        raise TrainingError(f"sharpness_images must be >= {fabric.world_size}, one a process, got {num_images}")
    images, labels = images_of_split(config, image_set, "train")
    return plain_batches(config, fabric, sample_of(images, labels, num_images), batch_size)


def sample_of(images: Tensor | ImageFiles, labels: Tensor, num_images: int) -> tuple[Tensor | ImageFiles, Tensor]:
    """The images at which sharpness is measured, drawn once and the same for every run; all if there are fewer."""
    return drawn_once("sharpness sample", images, labels, num_images)


def drawn_once(
    purpose: str, images: Tensor | ImageFiles, labels: Tensor, num_images: int
) -> tuple[Tensor | ImageFiles, Tensor]:
    """Images drawn at random, in their order, whatever the seed of the run; all if there are fewer."""
    drawn = torch.randperm(len(labels), generator=generator_from(purpose))[:num_images].sort().values
    return images[drawn], labels[drawn]


def plain_batches(
    config: TrainConfig, fabric: Fabric, images_and_labels: tuple[Tensor | ImageFiles, Tensor], batch_size: int
) -> EvalLoader:
    """Batches of images, ``batch_size`` over all replicas, that are not augmented; this replica's part."""
    images, labels = images_and_labels
    return EvalLoader(
        image_source(config, fabric, images, random_crop=False),
        labels.to(fabric.device),
        batch_size=batch_size,
        normalization=facts_of(config).normalization,
        rank=fabric.global_rank,
        num_replicas=fabric.world_size,
        resize_to=None if is_file_set(config) else config.image_size,
    )


def image_source(
    config: TrainConfig, fabric: Fabric, images: Tensor | ImageFiles, *, random_crop: bool
) -> Tensor | ImageStream:
    """Images on the device of this replica, or a stream of them there."""
    if isinstance(images, Tensor):
        return images.to(fabric.device)
    return ImageStream(
        images,
        image_size=facts_of(config).image_shape[0],
        device=fabric.device,
        num_workers=config.num_workers,
        random_crop=random_crop,
    )


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
