"""Results of our own, each by the protocol of ``flatmin sweep``: a grid, seeds, a validation split.

    python benchmarks/studies.py methods       # Fashion-MNIST: SGD, also with twice the epochs, and five methods
    python benchmarks/studies.py cifar10       # the same on CIFAR-10
    python benchmarks/studies.py label-noise   # SGD and SAM with 20, 40, 60 and 80 % wrong labels, ResNet-20
    python benchmarks/studies.py radius        # SAM over its radius, ResNet-8

Each takes one to two hours of a CPU's core, trains a network on every core, and goes on where it was interrupted;
``--plan`` says what is missing. ``--epochs``, ``--seeds`` and ``--flags`` change the budget, in a directory of its own:
``cifar10 --epochs 60 --flags="--model wrn-16-8 --precision bf16-mixed --compile"`` suits a GPU.
Numbers go to ``benchmarks/results/study_<name>.json`` when a study is complete; ``results_page.py`` makes tables and
pictures of them.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import tyro

from flatmin.train.atomic_file import atomic_write
from flatmin.train.config_file import load_run_config
from flatmin.train.environment import software_versions
from flatmin.train.journal import read_metrics
from flatmin.train.step_time import relative_step_times
from flatmin.train.sweep.command import sweep_command

ROOT = Path(__file__).parents[1]

Name = Literal["methods", "cifar10", "label-noise", "radius"]


@dataclass(frozen=True)
class Study:
    """One question: the sweeps that answer it, their recipe, the epochs of a run and the final runs of each method.

    ``is_measured`` asks for the sharpness of the networks.
    ``is_timed`` asks for the time of a run of each contender of all sweeps over that of the first; they have one task.
    """

    sweeps: tuple[str, ...]
    epochs: int
    seeds: int
    recipe: str = "fashion-mnist"
    is_measured: bool = True
    is_timed: bool = False


METHODS = "--grid method=sgd,sam,asam,msam,latesam"
RADII = "--grid rho=0.05,0.1,0.2,0.5,1"
LENET = "--model lenet-5 --lr 0.03"  # the hundred runs of a network with more arithmetic are too many for two cores
BF16 = "--precision bf16-mixed"  # twice as fast where a CPU multiplies bfloat16
SMALL_CNN = f"--model small-cnn --batch-size 64 --augmentation basic {BF16}"

STUDIES: dict[Name, Study] = {
    "methods": Study(
        (
            f"{LENET} {METHODS} {RADII} --baseline-epochs 2x",
            f"{LENET} --grid method=sam {RADII} --micro-batch 16",  # m-SAM
        ),
        epochs=6,
        seeds=5,
        is_timed=True,
    ),
    "cifar10": Study(
        (f"{SMALL_CNN} {METHODS} --grid rho=0.05,0.1,0.2 --baseline-epochs 2x",),
        epochs=2,
        seeds=3,
        recipe="cifar10",
        is_timed=True,
    ),
    "label-noise": Study(
        (
            f"--model resnet-20 --num-train-images 3000 {BF16} --grid label_noise=0.2,0.4,0.6,0.8 "
            "--grid method=sgd,sam --grid rho=0.1",  # the paper's, appendix C.1
        ),
        epochs=10,
        seeds=3,
        is_measured=False,
    ),
    "radius": Study(
        (
            f"--model resnet-8 --num-train-images 6000 {BF16} --grid method=sam "
            "--grid rho=0,0.01,0.02,0.05,0.1,0.2,0.5,1 --each rho",
        ),
        epochs=5,
        seeds=5,
    ),
}


@dataclass(frozen=True)
class Arguments:
    """Run one study, or what is missing of it."""

    study: tyro.conf.Positional[Name]
    """The question."""
    epochs: int | None = None
    """Epochs of a run; None is the study's."""
    seeds: int | None = None
    """Final runs of each method; None is the study's."""
    flags: str = ""
    """More flags of flatmin sweep for every run, in one string: --flags="--model wrn-16-4"."""
    plan: bool = False
    """Say which runs there are and how many are finished, and stop."""
    runs: Path = Path("runs/studies")
    """Directory of the runs."""
    results: Path = field(default=ROOT / "benchmarks" / "results")
    """Where the numbers go."""


def main() -> None:
    """Run every sweep of the study, and write what they found once all are complete."""
    own = tyro.cli(Arguments)
    sweeps = []
    for directory, arguments in sweeps_of(own):
        sweep_command([*arguments, "--output-dir", str(directory), *(["--plan"] if own.plan else [])])
        if not own.plan:
            sweeps.append(json.loads((directory / "sweep.json").read_text()) | {"sharpness": sharpness_of(directory)})
    if not own.plan:
        if STUDIES[own.study].is_timed:
            times = iter(run_times([run for directory, _ in sweeps_of(own) for run in first_final_runs(directory)]))
            for sweep in sweeps:
                sweep["relative_times"] = {name: next(times) for name in sweep["sharpness"]}
        path = own.results / f"study_{own.study.replace('-', '_')}.json"
        atomic_write(path, json.dumps(record(own, sweeps), indent=1) + "\n")


def sweeps_of(own: Arguments) -> Iterator[tuple[Path, list[str]]]:
    """The directory of each sweep with the arguments of ``flatmin sweep``."""
    study = STUDIES[own.study]
    epochs, seeds = own.epochs or study.epochs, own.seeds or study.seeds
    budget = f"--epochs {epochs} --eval-every {epochs} --seeds {seeds} --threads 1 --cpus-per-trial 1"
    measures = f"--sharpness-every {epochs} --sharpness-measures worst-case eigenvalues"
    measured = f"{measures} --sharpness-m 16 --sharpness-budget inf" if study.is_measured else ""
    for number, sweep in enumerate(study.sweeps, start=1):
        suffix = "".join(character if character.isalnum() else "-" for character in own.flags)
        directory = own.runs / f"{own.study}-{epochs}-epochs{suffix}-{number}"
        yield directory, [study.recipe, *shlex.split(f"{sweep} {budget} {measured} {own.flags}")]


def sharpness_of(directory: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    """Sharpness of every final network, by contender and seed."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for row in final_runs(directory):
        last = read_metrics(directory / row["run"])[-1]
        values = {name: value for name, value in last.items() if name.startswith("sharpness_")}
        found.setdefault(row["contender"], {})[row["seed"]] = values
    return found


def final_runs(directory: Path) -> list[dict[str, str]]:
    """The lines of ``results.csv`` on runs that report."""
    with (directory / "results.csv").open() as file:
        rows = csv.DictReader(file)
        return [row for row in rows if row["phase"] == "final" and row["status"] == "finished"]


def first_final_runs(directory: Path) -> list[Path]:
    """The directory of one run of each contender."""
    first: dict[str, str] = {}
    for row in final_runs(directory):
        first.setdefault(row["contender"], row["run"])
    return [directory / run for run in first.values()]


def run_times(runs: Sequence[Path]) -> list[float]:
    """Processor time of each run over that of the first: steps in turns, times counted passes and epochs."""
    configs = [load_run_config(run / "config.yaml") for run in runs]
    passes = [mean(record["passes_per_step"] or math.nan for record in read_metrics(run)) for run in runs]
    steps = relative_step_times(configs, 60.0, passes)
    return [step * config.epochs / configs[0].epochs for step, config in zip(steps, configs, strict=True)]


def record(own: Arguments, sweeps: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found and what is needed to find it again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": software_versions(),
        "threads": 1,
        "sweeps": sweeps,
    }


if __name__ == "__main__":
    main()
