"""Which radius should the digits recipe use for SAM and for ASAM?

The one with the lowest mean error on the validation split: a tenth of the training images, which the runs do not train
on. Their labels are right, whereas 40 % of those trained on are wrong; the test images are never looked at. All else is
the recipe's, and each seed has its own weights, order of images and wrong labels, the same for every radius.

    python benchmarks/choose_digits_radius.py

takes about ten minutes on two cores and writes ``benchmarks/results/digits_radius.json``. An interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from flatmin.train.atomic_file import atomic_write
from flatmin.train.config import Method, TrainConfig
from flatmin.train.environment import software_versions
from flatmin.train.loop import train
from flatmin.train.recipes import recipe_config
from flatmin.train.report.statistics import estimate
from flatmin.train.summary import Summary
from flatmin.train.trials import num_cores, run_trials

GRID: Mapping[Method, tuple[float, ...]] = {
    "sgd": (0.0,),
    "sam": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0),
    "asam": (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0),
}


@dataclass(frozen=True)
class Arguments:
    """Choose the radii of the digits recipe on its validation split."""

    seeds: int = 5
    """Runs with each radius."""
    workers: int = num_cores()
    """Runs at a time."""
    runs: Path = Path("runs/choose-digits-radius")
    """Directory of the runs."""
    output: Path = Path(__file__).parent / "results" / "digits_radius.json"
    """Where the numbers go."""


def main() -> None:
    """Run the grid, print it and write it."""
    arguments = tyro.cli(Arguments)
    console = Console()
    configs = [
        trial(method, rho, seed, arguments.runs)
        for method, radii in GRID.items()
        for rho in radii
        for seed in range(arguments.seeds)
    ]
    summaries = run_trials(train, configs, arguments.workers, console)
    values = {
        method: {
            rho: [s for s, c in zip(summaries, configs, strict=True) if (c.method, c.rho) == (method, rho)]
            for rho in radii
        }
        for method, radii in GRID.items()
    }
    console.print(results_table(values))
    atomic_write(arguments.output, json.dumps(record(values, arguments.seeds), indent=1) + "\n")
    console.print(f"numbers in {arguments.output}", soft_wrap=True)


def trial(method: Method, rho: float, seed: int, runs: Path) -> TrainConfig:
    """Return the recipe with one radius, evaluated on the validation split."""
    return replace(
        recipe_config("digits", method),
        rho=rho,
        seed=seed,
        eval_on="validation",
        eval_every=5,
        threads=1,
        output_dir=runs / f"{method}-rho{rho:g}-seed{seed}",
    )


def best_radius(by_radius: Mapping[float, list[Summary]]) -> float:
    """Return the radius with the lowest mean validation error, the smaller one of equals."""
    return min(by_radius, key=lambda rho: (mean_error(by_radius[rho]), rho))


def mean_error(summaries: list[Summary]) -> float:
    """Return the mean validation error of some runs, in percent."""
    return estimate([summary.eval_error_percent for summary in summaries]).mean


def results_table(values: Mapping[Method, Mapping[float, list[Summary]]]) -> Table:
    """Return the grid as a table, the chosen radii marked."""
    table = Table("Method", "ρ", "Validation error (%)", "Training loss", "")
    for method, by_radius in values.items():
        for rho, summaries in by_radius.items():
            error = estimate([summary.eval_error_percent for summary in summaries]).text(1)
            loss = estimate([summary.train_loss for summary in summaries]).text(3)
            table.add_row(method, f"{rho:g}", error, loss, "chosen" if rho == best_radius(by_radius) else "")
    return table


def record(values: Mapping[Method, Mapping[float, list[Summary]]], num_seeds: int) -> dict[str, object]:
    """Return everything that was found and what is needed to find it again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": software_versions(),
        "seeds": list(range(num_seeds)),
        "chosen": {method: best_radius(by_radius) for method, by_radius in values.items() if method != "sgd"},
        "runs": [
            {
                "method": method,
                "rho": rho,
                "mean_validation_error_percent": mean_error(summaries),
                "validation_error_percents": [summary.eval_error_percent for summary in summaries],
                "train_losses": [summary.train_loss for summary in summaries],
            }
            for method, by_radius in values.items()
            for rho, summaries in by_radius.items()
        ],
    }


if __name__ == "__main__":
    main()
