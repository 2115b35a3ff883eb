"""Random flips, crops and cutouts of whole batches, with the random numbers held apart from the arithmetic."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PaddingMode = Literal["reflect", "zeros"]
CutoutScope = Literal["image", "batch"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image, in this order: flip, pad and crop, normalise, cut out.

    Args:
        flip: Mirror left and right with probability 1/2.
        crop_padding: Pad by this many pixels on each side and take a crop of the old size, uniform over all places.
        padding_mode: Pad by reflection about the border pixel, as the SAM authors' release does, or with black, as most
            other code does.
        cutout_length: Side in pixels of a square set to 0 after normalisation, its centre uniform over the image, so
            that a part may lie outside; 0 for none.
        cutout_per: A place for each image, as published, or one for the whole batch, as in the SAM authors' release.

    Raises:
        ValueError: A field is outside its domain.

    References:
        Crops: He et al. (2016), arXiv:1512.03385, section 4.2. Cutout: DeVries and Taylor (2017), arXiv:1708.04552.
        google-research/sam, ``sam_jax/datasets/augmentation.py``.
    """

    flip: bool = False
    crop_padding: int = 0
    padding_mode: PaddingMode = "reflect"
    cutout_length: int = 0
    cutout_per: CutoutScope = "image"

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout_length"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.padding_mode not in ("reflect", "zeros"):
            raise ValueError(f"padding_mode must be 'reflect' or 'zeros', got {self.padding_mode!r}")
        if self.cutout_per not in ("image", "batch"):
            raise ValueError(f"cutout_per must be 'image' or 'batch', got {self.cutout_per!r}")


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers that augment N images.

    Args:
        flips: bool (N,), whether the image is mirrored.
        shifts: int64 (N, 2), by how many rows and columns the crop lies below and to the right of the image.
        centres: int64 (N, 2), row and column of the centre of the cutout.
    """

    flips: Tensor
    shifts: Tensor
    centres: Tensor

    def __getitem__(self, images: slice) -> "Draws":
        return Draws(self.flips[images], self.shifts[images], self.centres[images])

    def to(self, device: torch.device) -> "Draws":
        """Return the same numbers on ``device``."""
        return Draws(self.flips.to(device), self.shifts.to(device), self.centres.to(device))


def random_draws(
    augmentation: Augmentation, num_images: int, side: tuple[int, int], generator: torch.Generator
) -> Draws:
    """Draw what ``augmentation`` needs for ``num_images`` images of ``side`` = (H, W) pixels.

    The numbers that are not needed are drawn too, so that adding a cutout leaves the flips and the crops as they were.
    """
    padding = augmentation.crop_padding
    flips = torch.rand(num_images, generator=generator) < 0.5
    shifts = torch.randint(-padding, padding + 1, (num_images, 2), generator=generator)
    rows, columns = (torch.randint(length, (num_images,), generator=generator) for length in side)
    return Draws(flips & augmentation.flip, shifts, torch.stack((rows, columns), dim=1))


def flipped_crops(images: Tensor, indices: Tensor, draws: Draws, padding_mode: PaddingMode) -> Tensor:
    """Select images, mirror those of ``draws.flips``, pad all, and crop each to its old size.

    One gather does it: the crop of image n has at (i, j) the pixel (i + shift, j + shift) of the padded image, whose
    place in the image itself is found by reflection, and by ``W - 1 - j`` where it is mirrored.

    Args:
        images: uint8 (N, H, W, C), contiguous.
        indices: int64 (B,), which images to take.
        draws: Random numbers for B images, shifts smaller than H and W.
        padding_mode: What lies outside the image.

    Returns:
        New uint8 tensor (B, H, W, C).
    """
    _, height, width, channels = images.shape
    rows = torch.arange(height, device=images.device) + draws.shifts[:, :1]
    columns = torch.arange(width, device=images.device) + draws.shifts[:, 1:]
    source_rows = reflected(rows, height)
    source_columns = reflected(columns, width)
    source_columns = torch.where(draws.flips[:, None], width - 1 - source_columns, source_columns)
    pixels = (indices[:, None, None] * height + source_rows[:, :, None]) * width + source_columns[:, None, :]
    # Three times as fast on a CPU as indexing with three tensors.
    crops = images.view(-1, channels).index_select(0, pixels.flatten()).view(*pixels.shape, channels)
    if padding_mode == "zeros":
        inside = inside_of(rows, height)[:, :, None] & inside_of(columns, width)[:, None, :]
        crops.mul_(inside[..., None])
    return crops


def inside_of(positions: Tensor, length: int) -> Tensor:
    """Return where ``positions`` lie in [0, length)."""
    return (positions >= 0) & (positions < length)


def reflected(positions: Tensor, length: int) -> Tensor:
    """Map positions in (-length, 2 length - 1) into [0, length) by reflection about the first and the last pixel."""
    last = length - 1
    return last - (last - positions.abs()).abs()


def cut_out_(images: Tensor, centres: Tensor, length: int) -> Tensor:
    """Set a square to 0 in each image, in place, clipped at the border.

    The square covers rows ``centre - length // 2`` to ``centre - length // 2 + length - 1``, and columns alike.

    Args:
        images: Any dtype, (B, H, W, C).
        centres: int64 (B, 2), row and column of each centre.
        length: Side of the square in pixels; 0 changes nothing.

    Returns:
        ``images``.
    """
    starts = centres - length // 2
    rows = torch.arange(images.shape[1], device=images.device) - starts[:, :1]
    columns = torch.arange(images.shape[2], device=images.device) - starts[:, 1:]
    square = inside_of(rows, length)[:, :, None] & inside_of(columns, length)[:, None, :]
    return images.masked_fill_(square[..., None], 0)
