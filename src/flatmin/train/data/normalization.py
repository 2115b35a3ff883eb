"""Bytes of an image to numbers of mean 0 and variance 1."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each colour channel over a training set, white being 1.

    Args:
        mean: One number per channel.
        std: One number per channel, each > 0.

    Raises:
        ValueError: The lengths differ or a standard deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have the same length, got {self.mean} and {self.std}")
        if not all(value > 0.0 for value in self.std):
            raise ValueError(f"std must be > 0, got {self.std}")

    def coefficients(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ``1 / (255 std)`` and ``-mean / std`` on ``device``, both float32 (C,), for `normalized`."""
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return (1 / (255 * std)).to(device, torch.float32), (-mean / std).to(device, torch.float32)


def normalized(images: Tensor, coefficients: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``(images / 255 - mean) / std``, computed as one product and one sum.

    Args:
        images: uint8 (..., C).
        coefficients: What `Normalization.coefficients` returns, on the device of ``images``.

    Returns:
        New float32 tensor of that shape.
    """
    scale, shift = coefficients
    return images.to(torch.float32).mul_(scale).add_(shift)
