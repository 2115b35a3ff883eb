"""What does a sweep cost beside its training: how long does the driver work on a trial, and does it stay responsive?

A sweep of 5,000 trials whose work is to write an invented result, on the cores of this machine: what is left is the
sweep's own work and Ray's. Then the same command again, with everything finished.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from benchmarks.record import Case, Options
from flatmin.train.config import TrainConfig
from flatmin.train.run import write_summary
from flatmin.train.summary import Summary
from flatmin.train.sweep.arguments import SweepArguments, made_plan
from flatmin.train.sweep.contenders import Plan
from flatmin.train.sweep.driver import drive
from flatmin.train.sweep.pool import RayPool
from flatmin.train.sweep.progress import live_progress
from flatmin.train.sweep.record import results_csv
from flatmin.train.sweep.results import sweep_result
from flatmin.train.sweep.schedule import Schedule
from flatmin.train.trials import num_cores


@dataclass(frozen=True)
class Pass:
    """One pass over the sweep.

    ``start_seconds`` passed before the display first showed something, most of it for Ray to start;
    ``driver_cpu_seconds`` is the processor time of the driver's process, without Ray's own processes;
    ``longest_pause_seconds`` the longest time between two updates of the display, and ``record_seconds`` what it took
    to gather the results and write them as CSV at the end.
    """

    trials: int
    start_seconds: float
    wall_seconds: float
    driver_cpu_seconds: float
    longest_pause_seconds: float
    record_seconds: float

    @property
    def driver_cpu_ms_per_trial(self) -> float:
        """Processor time of the driver for one trial."""
        return 1000 * self.driver_cpu_seconds / self.trials


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Both passes."""
    with TemporaryDirectory() as directory:
        plan = many_trials(Path(directory), 4 if options.quick else 5000)
        for name in ("all trials to run", "all trials finished"):
            found = measured(plan)
            facts = {**asdict(found), "cores": num_cores(), "driver_cpu_ms_per_trial": found.driver_cpu_ms_per_trial}
            yield name, Case(facts=facts)


def many_trials(directory: Path, num_trials: int) -> Plan:
    """Return a sweep over so many radii."""
    radii = ",".join(f"{(index + 1) / num_trials:g}" for index in range(num_trials))
    (directory / "runs").mkdir()
    own = SweepArguments(grid=(f"rho={radii}",), output_dir=directory, gpus_per_trial=0.0)
    return made_plan(own, ["digits"], [])


def measured(plan: Plan) -> Pass:
    """Run what is missing of the sweep and time it."""
    schedule, shown_at = Schedule(plan), [time.monotonic()]
    cpu, started = cpu_seconds(), time.monotonic()
    console = Console(file=StringIO(), force_terminal=True)  # draws the table, and shows it to nobody
    with RayPool(invented, address=None, num_cpus=1.0, num_gpus=0.0) as pool:
        with live_progress(schedule, pool, console) as show:
            drive(schedule, pool, noting_time(show, shown_at), retries=2)
        wall, cpu = time.monotonic() - started, cpu_seconds() - cpu
    started = time.monotonic()
    sweep_result(schedule)
    lines = results_csv(schedule).splitlines()
    start, *pauses = [later - earlier for earlier, later in pairwise(shown_at)]
    return Pass(len(lines) - 1, start, wall, cpu, max(pauses), time.monotonic() - started)


def noting_time(show: Callable[[], None], shown_at: list[float]) -> Callable[[], None]:
    """Return ``show`` with a note of when it was called."""

    def noted() -> None:
        show()
        shown_at.append(time.monotonic())

    return noted


def invented(config: TrainConfig) -> Summary:
    """Write a result without training."""
    config.run_dir.mkdir(exist_ok=True)
    error = 2 + abs(config.rho - 0.3)
    summary = Summary(
        run_dir=config.run_dir,
        recipe=config.recipe,
        method=config.method,
        seed=config.seed,
        epochs=config.epochs,
        steps=100,
        complete=True,
        train_loss=0.1,
        train_error_percent=1.0,
        eval_on=config.eval_on,
        eval_loss=0.1,
        eval_error_percent=error,
        loss_rise=0.1,
        gradient_norm=1.0,
        wall_seconds=1.0,
    )
    write_summary(summary)
    return summary


def cpu_seconds() -> float:
    """Return the processor time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
