"""What a run of each contender costs, measured side by side: the runs of a sweep disturb one another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

from flatmin.train.atomic_file import atomic_write
from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError
from flatmin.train.sweep.contenders import run_name
from flatmin.train.sweep.results import baseline_of
from flatmin.train.sweep.schedule import ContenderRuns, Schedule

__all__ = ["relative_run_times"]

SECONDS = 3.0  # of measuring, for each task


class Measure(Protocol):
    """A function that is called with configurations and seconds, as ``relative_step_times`` is."""

    def __call__(self, configs: Sequence[TrainConfig], seconds: float) -> list[float]: ...


def relative_run_times(schedule: Schedule, measure: Measure) -> dict[int, float]:
    """Return, by contender, the time of a run over that of the baseline of its task.

    The time of a step, measured in turns, times the number of epochs. Measurements are kept in ``costs.json``, so a
    finished sweep measures nothing.

    Args:
        schedule: The runs, all of which have ended.
        measure: Returns the time of a step of each configuration over that of the first.

    Returns:
        No entry for the contenders of a task of which the batch sizes differ, that has no baseline, or that could not
        be measured.
    """
    path = schedule.plan.directory / "costs.json"
    known: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}
    times: dict[int, float] = {}
    for task in dict.fromkeys(runs.contender.task for runs in schedule.contenders):
        rows = _with_baseline_first(schedule, task)
        configs = [_chosen_config(runs) for runs in rows]
        if len({config.batch_size for config in configs}) != 1:  # none at all, or steps that differ in size
            continue
        key = " ".join(run_name(config) for config in configs)
        if key not in known:
            try:
                known[key] = measure(configs, SECONDS)
            except TrainingError:
                continue
            atomic_write(path, json.dumps(known, indent=1) + "\n")
        for runs, config, step_time in zip(rows, configs, known[key], strict=True):
            times[runs.index] = step_time * config.epochs / configs[0].epochs
    return times


def _with_baseline_first(schedule: Schedule, task: object) -> list[ContenderRuns]:
    baseline = baseline_of(task, schedule)
    rows = [runs for runs in schedule.contenders if runs.contender.task == task and runs.chosen is not None]
    return [] if baseline is None else sorted(rows, key=lambda runs: runs is not baseline)


def _chosen_config(runs: ContenderRuns) -> TrainConfig:
    assert runs.chosen is not None
    return runs.contender.candidates[runs.chosen]
