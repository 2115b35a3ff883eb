"""Batches of images that never leave the device."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flatmin.train.data.augmentation import Augmentation, Draws, cut_out_, flipped_crops, random_draws
from flatmin.train.data.image_set import check_images
from flatmin.train.data.normalization import Normalization, normalized
from flatmin.train.data.seeding import generator_from


class TrainLoader:
    """Shuffled, augmented batches for training, made on the device that holds ``images``.

    Order and augmentation of a batch are a pure function of the seed, the epoch and the place in the epoch: to resume
    in the middle of an epoch takes its first missing batch and no generator state. They are the same on every device
    and for every number of replicas, and torch's global generator is not touched.

    ``batch_size`` counts the images of all replicas together. Each takes its own part of every batch; the parts in the
    order of the ranks are the batch that a single process would see. What does not fill a batch is left out, and is
    other images in each epoch.

    Args:
        images: uint8 (N, H, W, C), on any device.
        labels: int64 (N,), on the same device.
        batch_size: Images in a batch over all replicas, at most N and a multiple of ``num_replicas``.
        normalization: Mean and standard deviation of the channels.
        augmentation: What is done to the images.
        seed: Any integer.
        rank: Which replica this is, in [0, num_replicas).
        num_replicas: How many processes train together.

    Raises:
        ValueError: An argument is outside its domain.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        normalization: Normalization,
        augmentation: Augmentation,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        check_arguments(images, labels, batch_size, normalization, (rank, num_replicas))
        if batch_size > len(images):
            raise ValueError(f"batch_size must be at most the number of images, {len(images)}, got {batch_size}")
        if augmentation.crop_padding >= min(images.shape[1:3]):
            sides = tuple(images.shape[1:3])
            raise ValueError(f"crop_padding must be smaller than the image, {sides}, got {augmentation.crop_padding}")
        self.images = images.contiguous()
        self.labels = labels
        self.batch_size = batch_size
        self.coefficients = normalization.coefficients(images.device)
        self.augmentation = augmentation
        self.seed = seed
        self.rank = rank
        self.num_replicas = num_replicas

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of one epoch.

        Args:
            epoch: Number of the epoch.
            first_batch: Index of the batch to begin with, in [0, len(self)].

        Returns:
            Iterator over images, float32 (batch_size / num_replicas, C, H, W), channels last in memory, which makes
            convolutions on a CPU up to twice as fast; and labels, int64 (batch_size / num_replicas,).

        Raises:
            ValueError: There is no such batch.
        """
        if not 0 <= first_batch <= len(self):
            raise ValueError(f"first_batch must be in [0, {len(self)}], got {first_batch}")
        order, draws = self._plan(epoch)
        size = self.batch_size // self.num_replicas
        starts = range(first_batch * self.batch_size + self.rank * size, len(self) * self.batch_size, self.batch_size)
        return (self._batch(order[start : start + size], draws[start : start + size]) for start in starts)

    def _plan(self, epoch: int) -> tuple[Tensor, Draws]:
        """Return the order of the images and their random numbers, all drawn on the CPU and moved at once."""
        generator = generator_from("epoch", self.seed, epoch)
        order = torch.randperm(len(self.images), generator=generator)
        height, width = self.images.shape[1:3]
        draws = random_draws(self.augmentation, len(order), (height, width), generator)
        if self.augmentation.cutout_per == "batch":
            batch_of_image = torch.arange(len(order)) // self.batch_size
            draws = Draws(draws.flips, draws.shifts, draws.centres[batch_of_image])
        return order.to(self.images.device), draws.to(self.images.device)

    def _batch(self, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        crops = flipped_crops(self.images, indices, draws, self.augmentation.padding_mode)
        images = normalized(crops, self.coefficients)
        if self.augmentation.cutout_length:
            cut_out_(images, draws.centres, self.augmentation.cutout_length)
        return images.permute(0, 3, 1, 2), self.labels[indices]


class EvalLoader:
    """Batches for evaluation: every image once, in order, not augmented.

    With replicas, each takes one contiguous part of the images. The parts differ by one image at most, the numbers of
    batches by one batch at most: sum what you measure, and reduce it once after the loop.

    Args:
        images: uint8 (N, H, W, C), on any device.
        labels: int64 (N,), on the same device.
        batch_size: Images in a batch over all replicas, a multiple of ``num_replicas``; the last batch may be smaller.
        normalization: Mean and standard deviation of the channels.
        rank: Which replica this is, in [0, num_replicas).
        num_replicas: How many processes evaluate together.

    Raises:
        ValueError: An argument is outside its domain.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        normalization: Normalization,
        rank: int = 0,
        num_replicas: int = 1,
    ) -> None:
        check_arguments(images, labels, batch_size, normalization, (rank, num_replicas))
        part = slice(len(images) * rank // num_replicas, len(images) * (rank + 1) // num_replicas)
        self.images = images[part]
        self.labels = labels[part]
        self.batch_size = batch_size // num_replicas
        self.coefficients = normalization.coefficients(images.device)

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over images, float32 (B, C, H, W), channels last in memory, and labels, int64 (B,)."""
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield normalized(self.images[part], self.coefficients).permute(0, 3, 1, 2), self.labels[part]


def check_arguments(
    images: Tensor, labels: Tensor, batch_size: int, normalization: Normalization, replica: tuple[int, int]
) -> None:
    """Raise ``ValueError`` unless the arguments that both loaders take are inside their domains."""
    check_images("images", images)
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
    if labels.device != images.device:
        raise ValueError(f"labels must be on the device of images, {images.device}, got {labels.device}")
    if len(normalization.mean) != images.shape[3]:
        raise ValueError(f"normalization must have {images.shape[3]} channels, got {normalization}")
    rank, num_replicas = replica
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank must be in [0, num_replicas), got {rank} of {num_replicas}")
    if batch_size < 1 or batch_size % num_replicas:
        raise ValueError(f"batch_size must be a positive multiple of num_replicas, {num_replicas}, got {batch_size}")
