"""The rows of a sweep's table, and the runs that each needs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from flatmin.train.config import Method, TrainConfig
from flatmin.train.config_difference import NEUTRAL_FIELDS
from flatmin.train.errors import UsageError
from flatmin.train.methods import METHOD_NAMES, reads_field
from flatmin.train.sweep.grid import Grid

__all__ = ["FIRST_SEARCH_SEED", "Contender", "Plan", "Run", "made_contenders", "run_name"]

Phase = Literal["search", "final"]

FIRST_SEARCH_SEED = 1000  # so that no seed both chooses and reports, and more seeds of either kind add runs only
TASK_FIELDS = ("dataset", "label_noise")  # to choose the easiest of these would be no result


@dataclass(frozen=True)
class Contender:
    """One row of the table: a method, at a budget, on a task.

    Attributes:
        name: Name to print, such as ``SAM`` or ``SGD, 2x epochs``.
        task: Values of the fields that set its task; it is compared with contenders on the same task alone.
        candidates: Settings to choose from, without seed and directory, in the order of the grid.
        is_baseline: Whether the others are compared with it, or with the better of several such.
    """

    name: str
    task: tuple[tuple[str, Any], ...]
    candidates: tuple[TrainConfig, ...]
    is_baseline: bool

    @property
    def task_text(self) -> str:
        """The task in words; empty if the sweep has one task."""
        return ", ".join(f"{name}={value}" for name, value in self.task)

    @property
    def full_name(self) -> str:
        """The name with the task."""
        return f"{self.name} ({self.task_text})" if self.task else self.name

    def settings(self, candidate: TrainConfig, swept: Sequence[str]) -> dict[str, Any]:
        """Return what tells ``candidate`` from the contender's others: the ``swept`` fields that its method reads."""
        given = {"method", *dict(self.task)}
        return {
            name: candidate.value_of(name)
            for name in swept
            if name not in given and reads_field(candidate.method, name)
        }


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    ``config.max_epochs`` ends it early where candidates are compared on the way; None trains to the end.
    """

    contender: int
    phase: Phase
    candidate: int
    config: TrainConfig


@dataclass(frozen=True)
class Plan:
    """Everything that decides which runs a sweep has.

    Attributes:
        contenders: The rows of the table.
        swept: Names of the fields of the grid.
        directory: Directory of the sweep, absolute.
        num_seeds: Final runs of each contender, with the seeds 0, 1, 2 ...
        num_search_seeds: Runs of each candidate in the search.
        first_rung: Epochs after which hopeless candidates are stopped first; None trains all of them to the end.
        reduction: Of how many candidates one goes on.
    """

    contenders: Sequence[Contender]
    swept: Sequence[str]
    directory: Path
    num_seeds: int
    num_search_seeds: int
    first_rung: int | None
    reduction: int

    def needs_search(self, contender: Contender) -> bool:
        """Say whether there is anything to choose: among its candidates, or which baseline is the better one."""
        baselines = [other for other in self.contenders if other.is_baseline and other.task == contender.task]
        return len(contender.candidates) > 1 or (contender.is_baseline and len(baselines) > 1)

    def search_runs(self, contender: int, candidate: int, max_epochs: int | None = None) -> list[Run]:
        """Return the runs that tell how good a candidate is: on all but the validation images."""
        seeds = range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + self.num_search_seeds)
        config = replace(self.contenders[contender].candidates[candidate], eval_on="validation", max_epochs=max_epochs)
        return [Run(contender, "search", candidate, self._placed(config, seed)) for seed in seeds]

    def final_runs(self, contender: int, candidate: int) -> list[Run]:
        """Return the runs that the table reports: on all training images, always to the end."""
        config = replace(self.contenders[contender].candidates[candidate], eval_on="test")
        return [Run(contender, "final", candidate, self._placed(config, seed)) for seed in range(self.num_seeds)]

    def _placed(self, config: TrainConfig, seed: int) -> TrainConfig:
        config = replace(config, seed=seed)
        return replace(config, output_dir=self.directory / "runs" / run_name(config))


def made_contenders(
    points: Sequence[TrainConfig], grid: Grid, each: Sequence[str], baseline: Method, baseline_epochs: str | None
) -> list[Contender]:
    """Sort the points of the grid into contenders: by task, then by method, the baseline with two budgets if asked.

    Args:
        points: The points of ``grid``.
        grid: Values of each field.
        each: Fields of the grid that set a task, beside data set and label noise.
        baseline: Method that the others are compared with.
        baseline_epochs: Another budget of the baseline, such as ``2x``, or None.

    Raises:
        UsageError: If ``each`` names no field of the grid, or the budget is wrong.
    """
    for name in each:
        if name not in grid or name == "method":
            raise UsageError(f"each must name fields of the grid other than method, got {name}")
    tasks = [name for name in grid if name in (*TASK_FIELDS, *each)]
    if baseline_epochs is not None and "epochs" in grid:
        raise UsageError(f"baseline_epochs must be left out where the grid has epochs, got {baseline_epochs}")
    by_row: dict[tuple[tuple[tuple[str, Any], ...], Method], list[TrainConfig]] = {}
    for point in points:
        task = tuple((name, point.value_of(name)) for name in tasks)
        by_row.setdefault((task, point.method), []).append(point)
    contenders = []
    for (task, method), candidates in by_row.items():
        name = METHOD_NAMES.get(method, method.upper())
        contenders.append(Contender(name, task, tuple(candidates), method == baseline))
        if method == baseline and baseline_epochs is not None:
            longer = tuple(replace(point, epochs=_longer(point.epochs, baseline_epochs)) for point in candidates)
            contenders.append(Contender(f"{name}, {baseline_epochs} epochs", task, longer, is_baseline=True))
    return contenders


def run_name(config: TrainConfig) -> str:
    """Return a name that depends on everything that decides the numbers of a run, and on nothing else.

    A field with its default value leaves no trace in it, so the name outlives new fields of the configuration.
    """
    own: Mapping[str, str] = {
        field.name: str(getattr(config, field.name))
        for field in fields(TrainConfig)
        if field.name not in NEUTRAL_FIELDS and getattr(config, field.name) != field.default
    }
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
    return f"{config.method}-rho{config.rho:g}-{config.eval_on}-seed{config.seed}-{digest}"


def _longer(epochs: int, text: str) -> int:
    """Read ``2x`` as twice ``epochs`` and ``400`` as that many."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x|(\d+)", text)
    if match is None:
        raise UsageError(f"baseline_epochs must look like 2x or 400, got {text}")
    longer = epochs * float(match[1]) if match[1] else float(match[2])
    if not (longer > epochs and longer.is_integer()):
        raise UsageError(f"baseline_epochs must be a whole number of epochs above {epochs}, got {text}")
    return int(longer)
