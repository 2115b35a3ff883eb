"""The arguments of the command ``sweep``, and the plan that they lay out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

from flatmin.train.arguments import config_from_arguments
from flatmin.train.config import Method, TrainConfig
from flatmin.train.errors import UsageError
from flatmin.train.sweep.contenders import Plan, made_contenders
from flatmin.train.sweep.grid import Grid, grid_points, parsed_grid

__all__ = ["SweepArguments", "gpus_per_trial", "made_plan"]

OWN_FLAGS = {
    "--method": "--grid method=sgd,sam",
    "--seed": "--seeds",
    "--eval-on": "nothing: candidates are chosen on the validation split and reported on the test set",
    "--max-epochs": "--asha",
    "--dry-run": "--plan",
    "--devices": "nothing: every run has one device",
    "--num-nodes": "--address",
    "--strategy": "nothing: every run has one device",
}


@dataclass(frozen=True)
class SweepArguments:
    """Choose settings on the validation split, then compare the methods on the test set over several seeds.

    A recipe may come first (default: digits). Flags that flatmin train RECIPE --help lists may follow, such as --epochs
    20, and hold for every run; those that the sweep sets itself are refused by name. The same command goes on where an
    interrupted sweep stopped, and a larger grid or more seeds add only the runs that are missing.
    """

    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default=())
    """Values of one field, such as rho=0.02,0.05,0.1 or method=sgd,sam,asam; once for each field."""
    seeds: int = 5
    """Final runs of each method with the settings chosen for it, with the seeds 0, 1, 2 ..."""
    search_seeds: int = 1
    """Runs with each setting in the search, with the seeds 1000, 1001 ..."""
    baseline: Method | None = None
    """Method that the others are compared with; None is sgd if it is in the grid, else the first."""
    baseline_epochs: str | None = None
    """Run the baseline with another number of epochs too, such as 2x or 400; the better one on validation counts."""
    each: tuple[str, ...] = ()
    """Fields of the grid to compare the methods at each value of, not to choose; always dataset and label_noise."""
    claim: float | None = None
    """Difference in percentage points whose needed seeds to tell; None is the difference found."""

    asha: bool = False
    """Stop hopeless settings early in the search (ASHA); the final runs always go to the end."""
    asha_epochs: int = 1
    """Epochs that every setting gets."""
    asha_reduction: int = 3
    """One of so many goes on, with so many times the epochs."""

    address: str | None = None
    """Address of a Ray cluster, such as auto or HOST:6379; None uses this machine alone."""
    cpus_per_trial: float = 1.0
    """CPUs of a run, in fractions too; on a CPU torch gets as many threads as whole ones."""
    gpus_per_trial: float | None = None
    """GPUs of a run, 0 to 1: with 0.25 four share one; None is 1 if this machine has a GPU, else 0."""
    retries: int = 2
    """How often a run that failed goes on from its checkpoint without having come further."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished search runs."""

    output_dir: Path | None = None
    """Directory of the sweep, seen by all nodes; None is runs/sweep-RECIPE."""
    plan: bool = False
    """Print which runs there are and how many are finished, and stop."""


def made_plan(own: SweepArguments, recipe: Sequence[str], fields: Sequence[str]) -> Plan:
    """Check every argument and lay out the runs; nothing is started and no directory made.

    Args:
        own: The arguments of the command.
        recipe: Name of the recipe, or nothing.
        fields: Flags of the configuration.

    Raises:
        UsageError: If an argument is outside its domain, or a point of the grid is no valid configuration.
    """
    check_numbers(own)
    grid = parsed_grid(own.grid)
    check_flags(fields, grid)
    default = config_from_arguments([*recipe, *fields], "sweep")
    methods: Sequence[Method] = grid.get("method", (default.method,))
    bases = {
        method: with_device(config_from_arguments([*recipe, "--method", method, *fields], "sweep"), own)
        for method in methods
    }
    baseline = own.baseline or ("sgd" if "sgd" in methods else methods[0])
    if baseline not in methods:
        raise UsageError(f"baseline must be a method of the grid, {', '.join(methods)}, got {baseline}")
    points = grid_points(grid, bases)
    return Plan(
        contenders=made_contenders(points, grid, own.each, baseline, own.baseline_epochs),
        swept=list(grid),
        directory=(own.output_dir or Path("runs") / f"sweep-{default.recipe}").absolute(),
        num_seeds=own.seeds,
        num_search_seeds=own.search_seeds,
        first_rung=own.asha_epochs if own.asha else None,
        reduction=own.asha_reduction,
    )


def with_device(config: TrainConfig, own: SweepArguments) -> TrainConfig:
    """Settle what depends on where the runs take place, so that every node does the same."""
    on_gpu = gpus_per_trial(own) > 0.0
    accelerator = config.accelerator if config.accelerator != "auto" else "cuda" if on_gpu else "cpu"
    threads = config.threads or (None if on_gpu else max(1, int(own.cpus_per_trial)))
    places = ("data_dir", "dataset_path", "train_labels", "weights")  # a worker may have another current directory
    found = {name: path.absolute() for name in places if (path := getattr(config, name)) is not None}
    return replace(config, accelerator=accelerator, threads=threads, **found)


def gpus_per_trial(own: SweepArguments) -> float:
    """Return the GPUs of a run: what was asked for, or one if this machine has any."""
    return float(torch.cuda.is_available()) if own.gpus_per_trial is None else own.gpus_per_trial


def check_numbers(own: SweepArguments) -> None:
    """Check the numbers among the arguments.

    Raises:
        UsageError: If one is outside its domain.
    """
    for name in ("seeds", "search_seeds", "asha_epochs"):
        if getattr(own, name) < 1:
            raise UsageError(f"{name} must be >= 1, got {getattr(own, name)}")
    if own.asha_reduction < 2:
        raise UsageError(f"asha_reduction must be >= 2, got {own.asha_reduction}")
    if own.retries < 0:
        raise UsageError(f"retries must be >= 0, got {own.retries}")
    if not own.cpus_per_trial > 0.0:
        raise UsageError(f"cpus_per_trial must be > 0, got {own.cpus_per_trial}")
    if own.gpus_per_trial is not None and not 0.0 <= own.gpus_per_trial <= 1.0:
        raise UsageError(f"gpus_per_trial must be >= 0 and <= 1, got {own.gpus_per_trial}")
    if own.claim is not None and not own.claim > 0.0:
        raise UsageError(f"claim must be > 0, got {own.claim}")


def check_flags(fields: Sequence[str], grid: Grid) -> None:
    """Make sure that no flag says what the sweep or its grid decides.

    Raises:
        UsageError: If one does; the message says what to use instead.
    """
    for argument in fields:
        flag = argument.split("=")[0].replace("_", "-")
        if flag in OWN_FLAGS:
            raise UsageError(f"a sweep sets {flag} for each run: use {OWN_FLAGS[flag]}")
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in grid:
            raise UsageError(f"{flag} must be left out where the grid has {name}")
