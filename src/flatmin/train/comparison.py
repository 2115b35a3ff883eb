"""From finished runs to the numbers of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import mean

from flatmin.train.config import Method, TrainConfig
from flatmin.train.config_difference import NEUTRAL_FIELDS
from flatmin.train.environment import software_versions
from flatmin.train.journal import read_metrics
from flatmin.train.methods import METHOD_NAMES
from flatmin.train.report import Comparison, Curve, MethodResult
from flatmin.train.solution import Solution
from flatmin.train.summary import Summary

__all__ = ["TrialResult", "make_comparison", "method_title", "passes_per_step"]

DRAWN_METRICS = ("eval_error_percent", "train_loss")


@dataclass(frozen=True)
class TrialResult:
    """One finished run and what was measured at its weights."""

    config: TrainConfig
    summary: Summary
    solution: Solution


def make_comparison(
    trials: Sequence[TrialResult],
    relative_step_times: Mapping[Method, float],
    rise_radius: float,
    commands: Sequence[str],
) -> Comparison:
    """Gather the runs of each method.

    Args:
        trials: All runs: every method with every seed.
        relative_step_times: Time of a step with each method, over that with the first.
        rise_radius: Which of the radii of the solutions the table shows.
        commands: Command lines that repeat it.
    """
    config = trials[0].config
    by_method = {method: [trial for trial in trials if trial.config.method == method] for method in relative_step_times}
    return Comparison(
        recipe=config.recipe,
        task=_task(config),
        split=config.eval_on.capitalize(),
        methods=[_method_result(by_method[name], rise_radius, time) for name, time in relative_step_times.items()],
        seeds=sorted({trial.config.seed for trial in trials}),
        rise_radius=rise_radius,
        commands=commands,
        config=_common_settings([trial.config for trial in trials]),
        versions=software_versions(),
    )


def _method_result(trials: Sequence[TrialResult], rise_radius: float, relative_step_time: float) -> MethodResult:
    trials = sorted(trials, key=lambda trial: trial.config.seed)
    config, first = trials[0].config, trials[0].solution
    assert first.picture is not None
    return MethodResult(
        name=method_title(config),
        rho=None if config.method == "sgd" else config.rho,
        eval_error_percents=[trial.summary.eval_error_percent for trial in trials],
        train_losses=[trial.summary.train_loss for trial in trials],
        rises=[trial.solution.rises[trial.solution.radii.index(rise_radius)] for trial in trials],
        relative_step_time=relative_step_time,
        curves={name: _curve(trials, name) for name in DRAWN_METRICS},
        rise_curve=Curve([0.0, *first.radii], [[0.0, *trial.solution.rises] for trial in trials]),
        picture=first.picture,
    )


def passes_per_step(trials: Sequence[TrialResult]) -> float:
    """Forward-backward passes per step, on average over all epochs of all trials."""
    records = [record for trial in trials for record in read_metrics(trial.config.run_dir)]
    return mean(record["passes_per_step"] or math.nan for record in records)


def method_title(config: TrainConfig) -> str:
    """Name of the method, with the options that differ from their defaults."""
    return ", ".join([METHOD_NAMES[config.method], *(f"{name}={value}" for name, value in config.method_options)])


def _curve(trials: Sequence[TrialResult], name: str) -> Curve:
    """Read the course of a metric; epochs without it (the evaluation need not take place after each) are left out."""
    runs = [
        {record["epoch"]: value for record in read_metrics(trial.config.run_dir) if (value := record[name]) is not None}
        for trial in trials
    ]
    epochs = [epoch for epoch in runs[0] if epoch is not None]
    return Curve(epochs, [[run[epoch] for epoch in epochs] for run in runs])


def _task(config: TrainConfig) -> str:
    noise = f" with {100 * config.label_noise:g} % of the training labels wrong" if config.label_noise else ""
    return (
        f"{config.dataset.capitalize()}{noise}: {config.model}, {config.epochs} epochs, batches of {config.batch_size}"
    )


def _common_settings(configs: Sequence[TrainConfig]) -> dict[str, str]:
    """Return what decides the numbers and is equal in all runs."""
    rows = [asdict(config) for config in configs]
    return {
        name: str(value)
        for name, value in rows[0].items()
        if name not in (*NEUTRAL_FIELDS, "method_options") and all(row[name] == value for row in rows)
    }
