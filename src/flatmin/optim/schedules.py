"""Schedules of rho: functions of the step and of a parameter group, asked at the beginning of each step.

They keep nothing: a resumed run continues because the number of the step, the learning rate and ``initial_rho`` are
entries of the groups and saved with them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from flatmin.arguments import check_number

RhoSchedule = Callable[[int, Mapping[str, Any]], float]
"""Called with the number of the step and a group that has ``initial_rho`` and ``lr``; returns the group's rho."""


def set_radii(schedule: RhoSchedule | None, groups: list[dict[str, Any]]) -> None:
    """Give every group its rho for the step to come; ``initial_rho`` is the one that it had at first.

    Raises:
        ValueError: The schedule returns a radius below zero, infinite or NaN.
    """
    if schedule is None:
        return
    for group in groups:
        group.setdefault("initial_rho", group["rho"])
        rho = schedule(group["num_steps"], group)
        if not 0.0 <= rho < math.inf:
            raise ValueError(f"rho must be >= 0 and finite, got {rho} from rho_schedule")
        group["rho"] = rho


class ProportionalToLr:
    """From ``rho_max`` at the largest learning rate to ``rho_min`` at the smallest, linearly.

    ``rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)``

    Args:
        rho_max: Radius at ``lr_max``.
        rho_min: Radius at ``lr_min``.
        lr_max: Largest learning rate of the run.
        lr_min: Smallest one.

    References:
        Zhuang et al. (2022), arXiv:2203.08065 (GSAM), Section 4.2.
    """

    def __init__(self, rho_max: float, rho_min: float, lr_max: float, lr_min: float = 0.0) -> None:
        for name, value in (("rho_max", rho_max), ("rho_min", rho_min), ("lr_max", lr_max), ("lr_min", lr_min)):
            check_number(name, value, "finite")
        if not 0.0 <= rho_min <= rho_max < math.inf:
            raise ValueError(f"rho_min and rho_max must satisfy 0 <= rho_min <= rho_max, got {rho_min} and {rho_max}")
        if not 0.0 <= lr_min < lr_max:
            raise ValueError(f"lr_min and lr_max must satisfy 0 <= lr_min < lr_max, got {lr_min} and {lr_max}")
        self.rho_max = rho_max
        self.rho_min = rho_min
        self.lr_max = lr_max
        self.lr_min = lr_min

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """The radius at the group's present learning rate, which is limited to the range."""
        share = (float(group["lr"]) - self.lr_min) / (self.lr_max - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * min(max(share, 0.0), 1.0)


class WarmUp:
    """From 0 to the group's own rho, linearly over the first steps.

    Args:
        num_steps: Steps until the full radius, ``>= 1``.
    """

    def __init__(self, num_steps: int) -> None:
        check_number("num_steps", num_steps, ">= 1")
        self.num_steps = num_steps

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """``initial_rho * min(step / num_steps, 1)``."""
        initial: float = group["initial_rho"]
        return initial * min(step / self.num_steps, 1.0)


class CosineToZero:
    """From the group's own rho to 0 along half a cosine.

    Args:
        num_steps: Steps of the whole training, ``>= 1``.
    """

    def __init__(self, num_steps: int) -> None:
        check_number("num_steps", num_steps, ">= 1")
        self.num_steps = num_steps

    def __call__(self, step: int, group: Mapping[str, Any]) -> float:
        """``initial_rho (1 + cos(pi step / num_steps)) / 2``."""
        initial: float = group["initial_rho"]
        return initial * half_cosine(step / self.num_steps)


@overload
def half_cosine(share: float) -> float: ...


@overload
def half_cosine(share: Tensor) -> Tensor: ...


def half_cosine(share: float | Tensor) -> float | Tensor:
    """``(1 + cos(pi share)) / 2``, 1 below 0 and 0 beyond 1; of a tensor where a step is traced."""
    if isinstance(share, Tensor):
        return 0.5 * (1.0 + torch.cos(math.pi * share.clamp(0.0, 1.0)))
    return 0.5 * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0)))
