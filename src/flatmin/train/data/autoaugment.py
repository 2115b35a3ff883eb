"""AutoAugment and RandAugment: which operations each image gets, and what their levels mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flatmin.arguments import check_choice
from flatmin.train.data.operations import KINDS, Operations
from flatmin.train.data.policies import POLICIES, PolicyName, SubPolicy

LevelScale = Literal["original", "release"]
Magnitude = Callable[[str, float], float]  # from an operation and its level

SIGNED = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # these go either way with probability 1/2

RANDAUGMENT = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness"),
    *("Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"),
)


@dataclass(frozen=True)
class AutoAugment:
    """One sub-policy, uniform over those of the policy, for each image; each of its operations with its probability.

    Args:
        policy: What the sub-policies were searched for.
        scale: What their levels mean. ``original``: what the authors of each policy meant. ``release``: as the SAM
            authors' release has it, which moves the images of CIFAR and SVHN, of 32 pixels, by 25 pixels a level and
            covers them with squares of 20 pixels a level, keeps other bits in Posterize, inverts the threshold of
            Solarize, and mistakes the number of pixels for their mean in Contrast.

    Raises:
        ValueError: There is no such policy or scale.

    References:
        Cubuk et al. (2019), arXiv:1805.09501; tensorflow/models, ``research/autoaugment`` for CIFAR and SVHN;
        tensorflow/tpu, ``efficientnet/autoaugment.py`` for ImageNet, from which google-research/sam copied.
    """

    policy: PolicyName = "cifar"
    scale: LevelScale = "original"

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, get_args(PolicyName))
        check_choice("scale", self.scale, get_args(LevelScale))

    def draw(self, num_images: int, side: tuple[int, int], generator: torch.Generator) -> Operations:
        """Draw the operations of ``num_images`` images of ``side`` = (H, W) pixels."""
        is_small = self.policy != "imagenet" and self.scale == "original"

        def magnitude(name: str, level: float) -> float:
            return small_magnitude(name, level) if is_small else large_magnitude(name, level, (250, 100))

        table = PolicyTable.of(POLICIES[self.policy], magnitude, faulty_contrast=self.scale == "release")
        return table.draw(num_images, side, generator)


@dataclass(frozen=True)
class RandAugment:
    """A few operations for each image, each uniform over all 16, all of one level.

    Lengths in pixels are meant for images of 224 pixels and shrink with the image.

    Args:
        num_ops: How many operations, one after another.
        level: Their level; 10 is the end of the scale, and more is allowed.
        scale: ``release`` mistakes the number of pixels for their mean in Contrast, as the SAM authors' release does.

    Raises:
        ValueError: A field is outside its domain.

    References:
        Cubuk et al. (2020), arXiv:1909.13719; google-research/sam, which took it from tensorflow/tpu, applies each
        operation always, though it draws a probability.
    """

    num_ops: int = 2
    level: float = 9.0
    scale: LevelScale = "original"

    def __post_init__(self) -> None:
        for name in ("num_ops", "level"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        check_choice("scale", self.scale, get_args(LevelScale))

    def draw(self, num_images: int, side: tuple[int, int], generator: torch.Generator) -> Operations:
        """Draw the operations of ``num_images`` images of ``side`` = (H, W) pixels."""
        share = min(side) / 224
        kinds, magnitudes = kinds_and_magnitudes(
            [(name, large_magnitude(name, self.level, (100 * share, 40 * share))) for name in RANDAUGMENT],
            faulty_contrast=self.scale == "release",
        )
        chosen = torch.randint(len(RANDAUGMENT), (num_images, self.num_ops), generator=generator)
        return with_signs_and_centres(kinds[chosen], magnitudes[chosen], side, generator)


def small_magnitude(name: str, level: float) -> float:
    """Return the magnitude of an operation for images of 32 pixels, level 10 being the end of the scale."""
    whole = {"TranslateX": 10, "TranslateY": 10, "Rotate": 30, "Cutout": 20}
    if name in whole:
        return int(level * whole[name] / 10)
    if name == "Posterize":
        return 4 - int(level * 4 / 10)
    if name == "Solarize":
        return 256 - int(level * 256 / 10)
    return shared_magnitude(name, level)


def large_magnitude(name: str, level: float, translation_and_cutout: tuple[float, float]) -> float:
    """Return the magnitude of an operation on the scale meant for ImageNet.

    Args:
        name: The operation.
        level: Its level, 10 being the end of the scale.
        translation_and_cutout: Pixels of a translation, and half the side of a Cutout, at level 10.
    """
    translation, half_side = translation_and_cutout
    if name in ("TranslateX", "TranslateY"):
        return level / 10 * translation
    if name == "Cutout":
        return 2 * int(level / 10 * half_side)
    if name == "Rotate":
        return level / 10 * 30
    if name in ("Posterize", "Solarize"):
        return int(level / 10 * {"Posterize": 4, "Solarize": 256}[name])
    return shared_magnitude(name, level)


def shared_magnitude(name: str, level: float) -> float:
    """Return the magnitude of an operation that means the same in both scales."""
    if name in ("ShearX", "ShearY"):
        return level / 10 * 0.3
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return level / 10 * 1.8 + 0.1
    return int(level / 10 * 110) if name == "SolarizeAdd" else 0.0


@dataclass(frozen=True, eq=False)
class PolicyTable:
    """P sub-policies of L operations as tensors (P, L): kinds, magnitudes before their sign, and probabilities."""

    kinds: Tensor
    magnitudes: Tensor
    probabilities: Tensor

    @classmethod
    def of(cls, policy: Sequence[SubPolicy], magnitude: Magnitude, *, faulty_contrast: bool = False) -> "PolicyTable":
        """Write ``policy`` with the magnitudes of a scale; all sub-policies have the same number of operations."""
        steps = [step for sub_policy in policy for step in sub_policy]
        pairs = [(step.name, magnitude(step.name, step.level)) for step in steps]
        kinds, magnitudes = kinds_and_magnitudes(pairs, faulty_contrast=faulty_contrast)
        shape = (len(policy), len(policy[0]))
        probabilities = torch.tensor([step.probability for step in steps], dtype=torch.float64)
        return cls(kinds.view(shape), magnitudes.view(shape), probabilities.view(shape))

    def draw(self, num_images: int, side: tuple[int, int], generator: torch.Generator) -> Operations:
        """Draw a sub-policy for each image, and which of its operations are applied."""
        chosen = torch.randint(len(self.kinds), (num_images,), generator=generator)
        drawn = torch.rand(num_images, self.kinds.shape[1], dtype=torch.float64, generator=generator)
        return self.drawn(chosen, drawn, side, generator)

    def drawn(self, chosen: Tensor, drawn: Tensor, side: tuple[int, int], generator: torch.Generator) -> Operations:
        """Return the operations of the ``chosen`` sub-policies, int64 (N,), with uniform numbers below their odds."""
        kinds = torch.where(drawn < self.probabilities[chosen], self.kinds[chosen], KINDS["Identity"])
        return with_signs_and_centres(kinds, self.magnitudes[chosen], side, generator)


def kinds_and_magnitudes(pairs: Sequence[tuple[str, float]], *, faulty_contrast: bool) -> tuple[Tensor, Tensor]:
    """Return the places in ``OPERATIONS`` of ``pairs`` of name and magnitude, and the magnitudes."""
    renamed = {"Contrast": "ReleaseContrast"} if faulty_contrast else {}
    kinds = torch.tensor([KINDS[renamed.get(name, name)] for name, _ in pairs])
    return kinds, torch.tensor([magnitude for _, magnitude in pairs])


def with_signs_and_centres(
    kinds: Tensor, magnitudes: Tensor, side: tuple[int, int], generator: torch.Generator
) -> Operations:
    """Draw the signs of operations (N, L) that go either way, and the centres of squares."""
    signs = torch.randint(2, kinds.shape, generator=generator) * 2 - 1
    is_signed = torch.isin(kinds, torch.tensor([KINDS[name] for name in SIGNED]))
    centres = torch.stack([torch.randint(length, kinds.shape, generator=generator) for length in side], dim=-1)
    return Operations(kinds, torch.where(is_signed, signs, 1) * magnitudes, centres)
