"""Symmetric label noise, for the experiment of section 3.3 of the SAM paper."""

import torch
from torch import Tensor

from flatmin.train.data.image_set import check_labels
from flatmin.train.data.seeding import generator_from


def flip_labels(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """Give a random fraction of the labels another value, uniform over the other classes.

    Exactly ``round(rate * N)`` of N labels change, so ``rate`` is the fraction that is wrong. The paper says "uniform
    label flips" and no more; a convention that draws among all K classes, the true one included, gets only
    ``rate * (K - 1) / K`` of them wrong.

    Args:
        labels: int64 (N,), each in [0, num_classes).
        rate: Fraction to flip, in [0, 1]; 0 changes nothing.
        num_classes: Number of classes K, at least 2.
        seed: Equal seeds flip the same examples to the same labels.

    Returns:
        A new tensor like ``labels``, on its device.

    Raises:
        ValueError: An argument is outside its domain.

    References:
        Foret et al. (2021), arXiv:2010.01412, section 3.3 and appendix C.1: rates 0.2, 0.4, 0.6 and 0.8.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must be in [0, 1], got {rate}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    check_labels("labels", labels, len(labels), num_classes)
    generator = generator_from("label noise", seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
    shifts = torch.randint(1, num_classes, chosen.shape, generator=generator)
    flipped = labels.clone()
    chosen = chosen.to(labels.device)
    flipped[chosen] = (labels[chosen] + shifts.to(labels.device)) % num_classes
    return flipped
