"""What our entries in parameter groups say: who is perturbed and how far, and how many steps were taken."""

from collections.abc import Iterable, Mapping
from typing import Any


def is_perturbed(group: Mapping[str, Any]) -> bool:
    """Whether the group takes part in the perturbation, as it does unless its entry ``perturb`` is false."""
    return bool(group.get("perturb", True))


def radius_of(group: Mapping[str, Any]) -> float:
    """``rho``; 0 in a group that is not perturbed."""
    rho: float = group["rho"]
    return rho if is_perturbed(group) else 0.0


def has_radius(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a perturbation would move anything."""
    return any(radius_of(group) != 0.0 for group in groups)


def count_step(groups: Iterable[dict[str, Any]]) -> None:
    """A step was taken, or the device has skipped it where the host cannot know."""
    for group in groups:
        group["num_steps"] += 1
