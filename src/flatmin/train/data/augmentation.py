"""What is done to a training image, and the random numbers that it takes."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from flatmin.arguments import check_choice
from flatmin.train.data.autoaugment import AutoAugment, RandAugment
from flatmin.train.data.crops import Draws, PaddingMode

CutoutScope = Literal["image", "batch"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image.

    In this order: crop of the file, operations, flip, pad and crop, normalise, mix, cut out.

    Args:
        operations: The operations of AutoAugment or RandAugment.
        flip: Mirror left and right with probability 1/2.
        crop_padding: Pad by this many pixels on each side and take a crop of the old size, uniform over all places.
        padding_mode: Pad by reflection about the border pixel, as the SAM authors' release does, or with black, as most
            other code does.
        mixup_alpha: Mix each batch with itself in reverse order, with a weight from Beta(alpha, alpha); 0 for never.
        cutmix_alpha: Paste into each image a box of its partner, whose area is a share from Beta(alpha, alpha); 0 for
            never. With mixup too, each batch gets the one or the other, with probability 1/2.
        cutout_length: Side in pixels of a square set to 0 after normalisation, its centre uniform over the image, so
            that a part may lie outside; 0 for none.
        cutout_per: A place for each image, as published, or one for the whole batch, as in the SAM authors' release.
        resized_crop: Take a random part of an image file, of any size, and scale it to the size of the others.

    Raises:
        ValueError: A field is outside its domain.

    References:
        Crops: He et al. (2016), arXiv:1512.03385, section 4.2. Cutout: DeVries and Taylor (2017), arXiv:1708.04552.
        Mixup: Zhang et al. (2018), arXiv:1710.09412. CutMix: Yun et al. (2019), arXiv:1905.04899.
        google-research/sam, ``sam_jax/datasets/augmentation.py``.
    """

    operations: AutoAugment | RandAugment | None = None
    flip: bool = False
    crop_padding: int = 0
    padding_mode: PaddingMode = "reflect"
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    cutout_length: int = 0
    cutout_per: CutoutScope = "image"
    resized_crop: bool = False

    def __post_init__(self) -> None:
        for name in ("crop_padding", "mixup_alpha", "cutmix_alpha", "cutout_length"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        check_choice("padding_mode", self.padding_mode, get_args(PaddingMode))
        check_choice("cutout_per", self.cutout_per, get_args(CutoutScope))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and labels with them."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0


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
