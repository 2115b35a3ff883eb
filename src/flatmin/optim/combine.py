"""Combinations: from the gradients found to the one that the base optimizer follows."""

from typing import Protocol

from torch import Tensor


class Combine(Protocol):
    """A rule that merges the clean gradient g and the perturbed gradient g_p.

    Attributes:
        needs_clean_gradient: Whether g is kept through the second pass; otherwise its memory is freed before.
    """

    needs_clean_gradient: bool

    def __call__(self, clean: list[Tensor | None], perturbed: list[Tensor]) -> list[Tensor]:
        """The gradient to follow.

        Args:
            clean: g at w; ``None`` where a parameter had no gradient in the first pass, or where g was not kept.
            perturbed: g_p at w + eps, one tensor per parameter; may be written into.
        """


class Perturbed:
    """Follow the gradient at the perturbed point and forget the other one.

    References:
        Foret et al. (2021), arXiv:2010.01412, Eq. 3 and Algorithm 1.
    """

    needs_clean_gradient = False

    def __call__(self, clean: list[Tensor | None], perturbed: list[Tensor]) -> list[Tensor]:
        """``g_p``, as it is."""
        return perturbed
