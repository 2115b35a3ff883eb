"""The command ``compare``: the same network from the same start with several methods, one table and one report."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
import yaml
from rich.console import Console

from flatmin.train.arguments import config_from_arguments
from flatmin.train.atomic_file import atomic_write
from flatmin.train.comparison import TrialResult, make_comparison, passes_per_step
from flatmin.train.config import Method, TrainConfig
from flatmin.train.config_file import typed_options
from flatmin.train.errors import UsageError
from flatmin.train.loop import train
from flatmin.train.methods import canonical_options, option_flags
from flatmin.train.recipes import recipe_config
from flatmin.train.report import render_page, render_table
from flatmin.train.solution import measured_solution
from flatmin.train.step_time import relative_step_times
from flatmin.train.trials import num_cores, run_trials

__all__ = ["compare", "compare_command"]

PICTURE_POINTS = 21  # along either direction; odd, so that one of them is the solution

OWN_FLAGS = {
    "--method": "--methods",
    "--method.": "--options",
    "--rho": "--radius",
    "--seed": "--seeds",
    "--config": "a recipe",
}


@dataclass(frozen=True)
class CompareArguments:
    """Train the same network from the same start with several methods; print a table and write report.html.

    A recipe may come first (default: digits). Flags that flatmin train RECIPE --help lists may follow, such as --epochs
    20, and hold for every run; not those that the comparison sets itself (method, rho, seed) nor several devices. A
    comparison that is interrupted goes on where it stopped when it is started again.
    """

    methods: tuple[Method, ...] = ("sgd", "sam", "asam")
    """Methods to compare; times are relative to the first."""
    seeds: int = 3
    """Number of runs with each method, with the seeds 0, 1, 2 ..."""
    radius: tuple[str, ...] = field(default=())
    """Radii that replace the recipe's, such as: sam=0.3 asam=2"""
    options: tuple[str, ...] = field(default=())
    """Options of methods, such as: looksam.interval=10 gsam.alpha=0.1"""
    rise_radius: float | None = None
    """Radius at which the rise of the loss is measured after training, for all methods; None is SAM's of the recipe."""
    workers: int | None = None
    """Runs at a time; None is one for each core, or one on a GPU."""
    output_dir: Path | None = None
    """Directory of the report and of all runs; None is runs/compare-RECIPE."""
    dry_run: bool = False
    """Two steps of every run in a temporary directory."""


def compare_command(arguments: list[str]) -> None:
    """``flatmin compare [RECIPE] [--seeds N] [--FIELD VALUE ...]``."""
    recipe = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    own, fields = tyro.cli(
        CompareArguments, prog="flatmin compare", args=arguments[len(recipe) :], return_unknown_args=True
    )
    for flag in fields:
        name = "--method." if flag.startswith("--method.") else flag.split("=")[0]
        if name in OWN_FLAGS:
            raise UsageError(f"compare sets {flag} for each run: use {OWN_FLAGS[name]}")
    check_arguments(own)
    radii, options = parsed_radii(own), parsed_options(own)
    configs = [config_from_arguments([*recipe, "--method", method, *fields], "compare") for method in own.methods]
    if (configs[0].devices, configs[0].num_nodes, configs[0].strategy) != ("1", 1, "auto"):
        raise UsageError("compare trains each network on one device: leave out devices, num_nodes and strategy")
    configs = [
        replace(config, rho=radii.get(config.method, config.rho), method_options=options.get(config.method, ()))
        for config in configs
    ]
    if not on_gpu(configs[0]):
        configs = [replace(config, threads=config.threads or 1) for config in configs]
    commands = [["compare", *arguments], *(train_arguments(config, fields) for config in configs)]
    lines = [shlex.join(["flatmin", *command]) for command in commands]
    if own.dry_run:
        with TemporaryDirectory() as directory:
            configs = [replace(config, max_steps=2, max_eval_batches=1) for config in configs]
            compare(configs, replace(own, output_dir=Path(directory)), lines, Console())
    else:
        compare(configs, own, lines, Console())


def on_gpu(config: TrainConfig) -> bool:
    """Say whether a run trains on a GPU of this machine."""
    return config.accelerator in {"auto", "cuda"} and torch.cuda.is_available()


def train_arguments(config: TrainConfig, fields: Sequence[str]) -> list[str]:
    """Return the arguments of ``flatmin`` that repeat one run of the comparison."""
    chosen = [
        "--method",
        config.method,
        "--rho",
        f"{config.rho:g}",
        "--seed",
        "0",
        *option_flags(config.method_options),
    ]
    is_given = any(flag.split("=")[0] == "--threads" for flag in fields)
    threads = ["--threads", str(config.threads)] if config.threads and not is_given else []
    return ["train", config.recipe, *chosen, *fields, *threads]


def check_arguments(own: CompareArguments) -> None:
    """Raise ``UsageError`` for methods given twice and numbers outside their domain."""
    if len(own.methods) < 1 or len(set(own.methods)) < len(own.methods):
        raise UsageError(f"methods must be one or more different ones, got {' '.join(own.methods)}")
    for name, number in (("seeds", own.seeds), ("workers", own.workers)):
        if number is not None and number < 1:
            raise UsageError(f"{name} must be >= 1, got {number}")
    if own.rise_radius is not None and not own.rise_radius > 0.0:
        raise UsageError(f"rise_radius must be > 0, got {own.rise_radius}")


def parsed_radii(own: CompareArguments) -> dict[str, float]:
    """Read ``--radius METHOD=VALUE ...`` into the radius of each method.

    Raises:
        UsageError: If a method is not compared or has no radius, or the value is none.
    """
    radii = {}
    for item in own.radius:
        method, _, value = item.partition("=")
        try:
            radii[method] = float(value)
        except ValueError as error:
            raise UsageError(f"radius must look like sam=0.3, got {item}") from error
        if method not in own.methods or method == "sgd" or not radii[method] >= 0.0:
            raise UsageError(f"radius must name a compared method that has one and be >= 0, got {item}")
    return radii


def parsed_options(own: CompareArguments) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Read ``--options METHOD.NAME=VALUE ...`` into the options of each method.

    Raises:
        UsageError: If a method is not compared, or has no such option, or refuses the value.
    """
    texts: dict[str, dict[str, Any]] = {}
    for item in own.options:
        key, equals, text = item.partition("=")
        method, dot, name = key.partition(".")
        message = f"options must look like looksam.interval=10, for a compared method, got {item}"
        if not (dot and equals) or method not in own.methods:
            raise UsageError(message)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(message) from error
        texts.setdefault(method, {})[name.replace("-", "_")] = value
    try:
        return {method: canonical_options(method, typed_options(method, given)) for method, given in texts.items()}
    except ValueError as error:
        raise UsageError(f"options: {error}") from error


def compare(configs: Sequence[TrainConfig], own: CompareArguments, commands: Sequence[str], console: Console) -> None:
    """Run every configuration with every seed, measure the solutions, print the table and write the report.

    Args:
        configs: One per method, equal but for method and radius.
        own: The arguments of the command.
        commands: Command lines that repeat it, for the report.
        console: Where progress and table are shown.

    Raises:
        TrainingError: If a run fails.
    """
    directory = own.output_dir or Path("runs") / f"compare-{configs[0].recipe}"
    rise_radius = own.rise_radius or recipe_config(configs[0].recipe, "sam").rho
    trials = [
        replace(config, seed=seed, output_dir=directory / f"{config.method}-rho{config.rho:g}-seed{seed}")
        for config in sorted(configs, key=lambda config: config.method == "sgd")  # the short runs fill the gaps
        for seed in range(own.seeds)
    ]
    work = partial(
        train_and_measure,
        radii=[rise_radius * quarter / 4 for quarter in range(1, 9)],
        positions=np.linspace(-1.0, 1.0, 3 if own.dry_run else PICTURE_POINTS).tolist(),
    )
    results = run_trials(work, trials, own.workers or (1 if on_gpu(configs[0]) else num_cores()), console)
    with console.status("Timing the training steps"):
        passes = [passes_per_step([result for result in results if result.config.method == m]) for m in own.methods]
        times = relative_step_times(configs, seconds=0.0 if own.dry_run else 4.0, passes_per_step=passes)
    comparison = make_comparison(results, dict(zip(own.methods, times, strict=True)), rise_radius, commands)
    console.print(render_table(comparison))
    atomic_write(directory / "comparison.json", json.dumps(asdict(comparison), indent=1) + "\n")
    atomic_write(directory / "report.html", render_page(comparison))
    if not own.dry_run:
        console.print(f"report in {directory / 'report.html'}", soft_wrap=True)


def train_and_measure(config: TrainConfig, radii: Sequence[float], positions: Sequence[float]) -> TrialResult:
    """Train, unless that was done before, and measure the solution: its picture with the first seed alone."""
    summary = train(config)
    return TrialResult(config, summary, measured_solution(config, radii, positions if config.seed == 0 else []))
