"""Keywords that the named methods hand on to the engine."""

from typing import TypedDict

from torch import nn

from flatmin.optim.host_copies import SaveTo
from flatmin.optim.rounding import Rounding
from flatmin.optim.schedules import RhoSchedule
from flatmin.optim.sync import Sync
from flatmin.optim.when import GradientWhen, When


class FixedWhenOptions(TypedDict, total=False):
    """What a method takes that says itself which steps are perturbed; see ``SharpnessAware``."""

    ascent_steps: int
    model: nn.Module | None
    diagnostics: bool
    skip_nonfinite: bool
    sync: Sync | None
    rho_schedule: RhoSchedule | None
    rounding: Rounding
    save_to: SaveTo


class EngineOptions(FixedWhenOptions, total=False):
    """What every other method takes beside its own hyperparameters; see ``SharpnessAware``."""

    when: When | GradientWhen


class OnePassOptions(TypedDict, total=False):
    """What every one-pass method takes beside its own hyperparameters; see ``OnePass``."""

    when: When
    model: nn.Module | None
    skip_nonfinite: bool
    rho_schedule: RhoSchedule | None
    rounding: Rounding
