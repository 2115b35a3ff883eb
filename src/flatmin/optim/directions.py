"""Directions: which way the perturbation points."""

from typing import Protocol

from torch import Tensor

from flatmin.optim.groups import ActiveGroup


class Direction(Protocol):
    """A rule that gives one tensor per parameter; its length does not matter, the ball sets it."""

    def __call__(self, groups: list[ActiveGroup]) -> list[Tensor]:
        """The direction at the present parameters, in the order of the groups; never written into."""


class Gradient:
    """Steepest ascent: the gradient itself.

    References:
        Foret et al. (2021), arXiv:2010.01412, Eq. 2.
    """

    def __call__(self, groups: list[ActiveGroup]) -> list[Tensor]:
        """``g``, without a copy."""
        return [grad for group in groups for grad in group.grads]
