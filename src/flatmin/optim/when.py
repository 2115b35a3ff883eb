"""Policies for when a step is perturbed."""

from typing import Protocol


class When(Protocol):
    """A rule that says of each step, from its number alone, whether it is sharpness-aware or plain."""

    def __call__(self, step: int) -> bool:
        """Whether the step, counted from 0, is perturbed."""


class Always:
    """Perturb every step."""

    def __call__(self, step: int) -> bool:
        """Always true."""
        return True
