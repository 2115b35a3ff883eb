"""From finished runs to the numbers of a sweep's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from flatmin.train.methods import reads_field
from flatmin.train.report.statistics import Estimate, estimate
from flatmin.train.summary import Summary
from flatmin.train.sweep.contenders import Run
from flatmin.train.sweep.differences import PairedDifference, paired_difference
from flatmin.train.sweep.schedule import ContenderRuns, Schedule

__all__ = ["ContenderResult", "RadiusPoint", "SweepResult", "baseline_of", "run_label", "settings_text", "sweep_result"]


@dataclass(frozen=True)
class RadiusPoint:
    """The validation errors of the best candidate with one radius, one per search seed."""

    rho: float
    error_percents: Sequence[float]


@dataclass(frozen=True)
class ContenderResult:
    """What a sweep found about one contender.

    Attributes:
        name: Name to print.
        task: Its task in words; empty if the sweep has one task.
        epochs: Length of its runs; None if no candidate could be chosen.
        settings: The chosen values of the swept fields.
        num_candidates: How many there were to choose from.
        validation_error_percent: Mean of the chosen candidate; None without a search.
        test_error_percents: Test error of every final seed that did not fail, by seed.
        seconds: Median training time of the final runs; None if all failed.
        relative_time: Time of a run over one of the baseline, measured apart from the sweep or else the ratio of these
            seconds; None if neither is known.
        radii: Validation error over the radius; empty if it was not swept.
        is_baseline: Whether the others on its task are compared with it.
        difference: Its test error minus the baseline's in percentage points; None for the baseline, or without a seed
            in common.
    """

    name: str
    task: str
    epochs: int | None
    settings: Mapping[str, Any]
    num_candidates: int
    validation_error_percent: float | None
    test_error_percents: Mapping[int, float]
    seconds: float | None
    relative_time: float | None
    radii: Sequence[RadiusPoint]
    is_baseline: bool
    difference: PairedDifference | None

    @property
    def test_error(self) -> Estimate | None:
        """Mean test error over the seeds with its 95 % interval; None if all failed."""
        return estimate(list(self.test_error_percents.values())) if self.test_error_percents else None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        recipe: Name of the recipe.
        contenders: One per row of the table.
        num_seeds: Final runs that each was given.
        num_search_seeds: Runs of each candidate in the search.
        claim: Difference whose needed seeds are told; None is the one that was found.
        failures: A line on every run that failed, with its error.
    """

    recipe: str
    contenders: Sequence[ContenderResult]
    num_seeds: int
    num_search_seeds: int
    claim: float | None
    failures: Sequence[str]

    @property
    def tasks(self) -> list[str]:
        """The tasks in the order of the table."""
        return list(dict.fromkeys(contender.task for contender in self.contenders))


def sweep_result(
    schedule: Schedule, claim: float | None = None, relative_times: Mapping[int, float] | None = None
) -> SweepResult:
    """Gather what the runs of ``schedule`` gave; those that failed or were not run are left out.

    Args:
        schedule: The runs with their outcomes.
        claim: Difference in percentage points whose needed seeds to tell; None is the one found.
        relative_times: Measured time of a run over the baseline's, by contender; for one without an entry that of its
            final runs is taken.
    """
    plan = schedule.plan
    baselines = {runs.contender.task: baseline_of(runs.contender.task, schedule) for runs in schedule.contenders}
    return SweepResult(
        recipe=plan.contenders[0].candidates[0].recipe,
        contenders=[
            _result(runs, baselines[runs.contender.task], claim, (relative_times or {}).get(runs.index))
            for runs in schedule.contenders
        ],
        num_seeds=plan.num_seeds,
        num_search_seeds=plan.num_search_seeds,
        claim=claim,
        failures=failed_runs(schedule),
    )


def baseline_of(task: Any, schedule: Schedule) -> ContenderRuns | None:
    """Return the baseline of a task: of several budgets the one with the lower validation error, the first of equals.

    References:
        Foret et al. (2021), arXiv:2010.01412, section 3.1: the best score without SAM of the standard and the doubled
        number of epochs; here the test images do not take part in that choice.
    """
    baselines = [runs for runs in schedule.contenders if runs.contender.task == task and runs.contender.is_baseline]
    chosen = [runs for runs in baselines if runs.chosen is not None]

    def error(runs: ContenderRuns) -> float:
        found = _chosen_validation_error(runs)
        return math.inf if found is None else found  # no error at all is the best there is

    return min(chosen, key=error) if chosen else None


def failed_runs(schedule: Schedule) -> list[str]:
    """Return a line on every run that failed: which, with which seed, and why."""
    return [
        f"{run_label(runs, run)}: {outcome.error}"
        for runs in schedule.contenders
        for run, outcome in zip(runs.runs.values(), runs.outcomes.values(), strict=True)
        if outcome.error is not None
    ]


def run_label(runs: ContenderRuns, run: Run) -> str:
    """Return what tells a run from the others: contender, settings, seed."""
    settings = settings_text(runs.contender.settings(run.config, runs.plan.swept))
    return " ".join(part for part in (runs.contender.full_name, settings, f"seed {run.config.seed}") if part)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings as ``rho=0.05 lr=0.1``."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()
    )


def _result(
    runs: ContenderRuns, baseline: ContenderRuns | None, claim: float | None, relative_time: float | None
) -> ContenderResult:
    contender, summaries = runs.contender, _final_summaries(runs)
    errors = {seed: summary.eval_error_percent for seed, summary in summaries.items()}
    config = None if runs.chosen is None else contender.candidates[runs.chosen]
    seconds, baseline_seconds = _median_seconds(runs), None if baseline is None else _median_seconds(baseline)
    return ContenderResult(
        name=contender.name,
        task=contender.task_text,
        epochs=None if config is None else config.epochs,
        settings={} if config is None else contender.settings(config, runs.plan.swept),
        num_candidates=len(contender.candidates),
        validation_error_percent=_chosen_validation_error(runs),
        test_error_percents=errors,
        seconds=seconds,
        relative_time=relative_time or (seconds / baseline_seconds if seconds and baseline_seconds else None),
        radii=_radius_curve(runs),
        is_baseline=runs is baseline,
        difference=None if baseline is None or runs is baseline else _difference(errors, baseline, claim),
    )


def _difference(errors: Mapping[int, float], baseline: ContenderRuns, claim: float | None) -> PairedDifference | None:
    baseline_errors = {seed: summary.eval_error_percent for seed, summary in _final_summaries(baseline).items()}
    seeds = [seed for seed in errors if seed in baseline_errors]
    if not seeds:
        return None
    return paired_difference([errors[seed] for seed in seeds], [baseline_errors[seed] for seed in seeds], claim)


def _final_summaries(runs: ContenderRuns) -> dict[int, Summary]:
    final = runs.final_runs()
    pairs = zip(final, runs.outcomes_of(final), strict=True)
    return {run.config.seed: outcome.summary for run, outcome in pairs if outcome and outcome.summary}


def _median_seconds(runs: ContenderRuns) -> float | None:
    seconds = [summary.wall_seconds for summary in _final_summaries(runs).values()]
    return median(seconds) if seconds else None


def _chosen_validation_error(runs: ContenderRuns) -> float | None:
    return None if runs.chosen is None else runs.validation_error(runs.chosen)


def _radius_curve(runs: ContenderRuns) -> list[RadiusPoint]:
    """For every radius, take the candidate with the lowest validation error."""
    if "rho" not in runs.plan.swept or not reads_field(runs.contender.candidates[0].method, "rho"):
        return []
    best: dict[float, tuple[float, int]] = {}
    for index, config in enumerate(runs.contender.candidates):
        error = runs.validation_error(index)
        if error is not None:
            best[config.rho] = min(best.get(config.rho, (math.inf, index)), (error, index))
    points = []
    for rho, (_, index) in sorted(best.items()):
        outcomes = runs.outcomes_of(runs.plan.search_runs(runs.index, index))
        points.append(RadiusPoint(rho, [outcome.error_percent for outcome in outcomes if outcome]))
    return points
