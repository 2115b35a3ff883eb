"""The batches of a run: to train on, to evaluate on and to measure sharpness on."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

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
    named_augmentation,
)
from flatmin.train.errors import TrainingError
from flatmin.train.facts import facts_of, is_file_set
from flatmin.train.images import Split, images_of_split, read_images, sample_of

__all__ = ["Loaders", "batch_indices", "eval_loader", "image_source", "make_loaders", "training_sample"]

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
