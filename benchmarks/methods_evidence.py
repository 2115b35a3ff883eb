"""Does a method of the family beat SAM, or plain SGD, and at which cost?

Every method is tuned over its own radius by one rule, on the validation split: the radii are its default times powers
of two, at first 1 to 16; while the lowest mean validation error lies at an end, that end is extended by one more. Then
it trains on all training images with other seeds and is evaluated on the test images, once. All else is the recipe's
and equal for all methods (bsam has a learning rate of its own). For lesam the radius is sigma, the rise it aims at;
its cap on the length of the perturbation is 5.

The cost is measured: forward-backward passes per step, counted in the runs, times the processor time of a pass, in
turns with SGD on the same batches.

    python benchmarks/methods_evidence.py --task digits --epochs 20 --search-seeds 2
    python benchmarks/methods_evidence.py --task fashion-mnist --model lenet-5 --lr 0.03 --epochs 2 --search-seeds 1

An interrupted run goes on where it stopped. Numbers go to ``benchmarks/results/methods_evidence_<task>.json``; the
table and the picture in ``docs`` are made from them (``--draw-only`` makes them again).
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, Literal, get_args

import tyro
from rich.console import Console

from flatmin.train.atomic_file import atomic_write
from flatmin.train.config import Method, TrainConfig
from flatmin.train.environment import software_versions
from flatmin.train.errors import TrainingError
from flatmin.train.journal import read_metrics
from flatmin.train.loop import train
from flatmin.train.methods import METHOD_NAMES, default_rho, resolved_options
from flatmin.train.recipes import recipe_config
from flatmin.train.step_time import relative_step_times
from flatmin.train.summary import Summary
from flatmin.train.trials import num_cores, run_trials

ROOT = Path(__file__).parents[1]

FIRST_POWERS = (0, 1, 2, 3, 4)
MAX_POWERS = 10  # a method whose best radius is still at an end by then keeps it
FIRST_SEARCH_SEED = 1000
LESAM_CAP = 5.0


@dataclass(frozen=True)
class Arguments:
    """Tune every method on the validation split and measure its test error and cost."""

    task: Literal["digits", "fashion-mnist"] = "digits"
    """Recipe; its label noise, network and budget are the recipe's unless epochs are given."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods to run; the others keep what an earlier call has found."""
    epochs: int | None = None
    """Epochs of every run; None is the recipe's."""
    model: str | None = None
    """Network; None is the recipe's."""
    lr: float | None = None
    """Learning rate of every method but bsam, which divides by a precision; None is the recipe's."""
    seeds: int = 5
    """Runs that the table reports, with each method."""
    search_seeds: int = 3
    """Runs with each radius."""
    workers: int = num_cores()
    """Runs at a time."""
    runs: Path = Path("runs/methods-evidence")
    """Directory of the runs."""
    data_dir: Path = Path("data")
    """Directory with the data sets."""
    results: Path = field(default=ROOT / "benchmarks" / "results")
    """Where the numbers go."""

    @cached_property
    def output(self) -> Path:
        """The file of this task."""
        return self.results / f"methods_evidence_{self.task.replace('-', '_')}.json"

    def runs_of(self, epochs: int) -> Path:
        """Directory of the runs with this budget."""
        choices = [self.model or "", "" if self.lr is None else f"lr-{self.lr:g}", f"{epochs}-epochs"]
        return self.runs / "-".join([self.task, *filter(None, choices)])


def main() -> None:
    """Search, run, measure, write."""
    own = tyro.cli(Arguments)
    console = Console()
    searches = {method: Search(method) for method in own.methods if suits(own, method)}
    while open_searches := [search for search in searches.values() if not search.is_done]:
        wanted = [trial(own, s.method, p, seed) for s in open_searches for p in s.wanted for seed in search_seeds(own)]
        errors = iter(run_trials(error_of, wanted, own.workers, console))
        for search in open_searches:
            for power in search.wanted:
                search.errors[power] = [next(errors) for _ in search_seeds(own)]
                console.print(f"{search.method} {radius(search.method, power):g}: {search.errors[power]}")
    finals = [
        trial(own, search.method, search.best, seed, eval_on="test")
        for search in searches.values()
        for seed in range(own.seeds)
    ]
    run_trials(error_of, finals, own.workers, console)
    rows = {s.method: row(s, finals[i * own.seeds : (i + 1) * own.seeds]) for i, s in enumerate(searches.values())}
    baseline = trial(own, "sgd", 0, 0, eval_on="test")
    chosen = [baseline, *(finals[i * own.seeds] for i in range(len(rows)))]
    passes = [1.0, *(entry["passes_per_step"] for entry in rows.values())]
    costs = relative_step_times(chosen, seconds=60.0, passes_per_step=passes)[1:]
    for entry, cost in zip(rows.values(), costs, strict=True):
        entry["relative_cost"] = cost
    atomic_write(own.output, json.dumps(record(own, rows, baseline), indent=1) + "\n")
    console.print(f"numbers in {own.output}", soft_wrap=True)


def suits(own: Arguments, method: Method) -> bool:
    """Whether the network has what the method perturbs: SAM-ON needs norm layers."""
    return method != "samon" or (own.model or recipe_config(own.task, method).model) != "lenet-5"


class Search:
    """The radii of one method that have been tried, as powers of two times its default, and what to try next."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.errors: dict[int, list[float]] = {}

    @property
    def wanted(self) -> list[int]:
        """Powers to try next; none once the best lies inside."""
        if self.method == "sgd":
            return [] if self.errors else [0]
        if not self.errors:
            return list(FIRST_POWERS)
        ends = {min(self.errors): -1, max(self.errors): 1}
        outward = ends.get(self.best)
        return [] if outward is None or len(self.errors) >= MAX_POWERS else [self.best + outward]

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to try."""
        return not self.wanted

    @property
    def best(self) -> int:
        """The power with the lowest mean error, the smaller of equals."""
        return min(self.errors, key=lambda power: (mean(self.errors[power]), power))


def radius(method: Method, power: int) -> float:
    """The method's default times a power of two."""
    default = resolved_options("lesam", ())["sigma"] if method == "lesam" else default_rho(method)
    return float(default) * 2.0**power


def trial(own: Arguments, method: Method, power: int, seed: int, eval_on: str = "validation") -> TrainConfig:
    """The recipe with one method and radius, evaluated once, at the end."""
    recipe = recipe_config(own.task, method)
    epochs = own.epochs or recipe.epochs
    value = radius(method, power)
    lesam = {"rho": LESAM_CAP, "method_options": {"sigma": value}}
    own_fields: dict[str, Any] = lesam if method == "lesam" else {"rho": value}
    return replace(
        recipe,
        **own_fields,
        model=own.model or recipe.model,
        lr=recipe.lr if own.lr is None or method == "bsam" else own.lr,
        epochs=epochs,
        eval_every=epochs,
        eval_on="test" if eval_on == "test" else "validation",
        seed=seed,
        threads=1,
        data_dir=own.data_dir,
        output_dir=own.runs_of(epochs) / f"{method}-{value:g}-{eval_on}-seed{seed}",
    )


def search_seeds(own: Arguments) -> range:
    """Seeds of the search, none of which reports."""
    return range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + own.search_seeds)


def error_of(config: TrainConfig) -> float:
    """Train and return the error; 100 where the loss was not finite."""
    try:
        return train(config).eval_error_percent
    except TrainingError as error:
        if "not finite" not in str(error):
            raise
        return 100.0


def row(search: Search, finals: Sequence[TrainConfig]) -> dict[str, Any]:
    """Every number of one method."""
    summaries = [Summary.from_json((config.run_dir / "summary.json").read_text()) for config in finals]
    return {
        "search": [
            {"radius": radius(search.method, power), "validation_error_percents": errors}
            for power, errors in sorted(search.errors.items())
        ],
        "radius": radius(search.method, search.best),
        "test_error_percents": [summary.eval_error_percent for summary in summaries],
        "train_losses": [summary.train_loss for summary in summaries],
        "passes_per_step": mean(r["passes_per_step"] or math.nan for c in finals for r in read_metrics(c.run_dir)),
    }


def record(own: Arguments, rows: dict[Method, dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    """Everything that was found and what is needed to find it again; methods of earlier calls are kept."""
    task = {name: getattr(config, name) for name in ("dataset", "model", "label_noise", "epochs", "batch_size", "lr")}
    earlier = json.loads(own.output.read_text()) if own.output.exists() else {}
    known = earlier["methods"] if earlier.get("task") == task else {}
    found = {**known, **rows}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "versions": software_versions(),
        "threads": 1,
        "task": task,
        "seeds": list(range(own.seeds)),
        "search_seeds": list(search_seeds(own)),
        "methods": {name: found[name] for name in METHOD_NAMES if name in found},
    }


if __name__ == "__main__":
    main()
