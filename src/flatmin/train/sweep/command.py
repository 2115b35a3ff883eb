"""The command ``sweep``."""

from __future__ import annotations

import shlex
from functools import partial

import tyro
from rich.console import Console
from rich.table import Table

from flatmin.train.atomic_file import atomic_write
from flatmin.train.environment import software_versions
from flatmin.train.errors import TrainingError
from flatmin.train.images import read_images
from flatmin.train.run import locked
from flatmin.train.step_time import relative_step_times
from flatmin.train.sweep.arguments import SweepArguments, gpus_per_trial, made_plan
from flatmin.train.sweep.contenders import Plan
from flatmin.train.sweep.cost import relative_run_times
from flatmin.train.sweep.driver import drive
from flatmin.train.sweep.page import render_page
from flatmin.train.sweep.pool import RayPool
from flatmin.train.sweep.progress import live_progress
from flatmin.train.sweep.record import write_record
from flatmin.train.sweep.results import SweepResult, sweep_result
from flatmin.train.sweep.schedule import Schedule
from flatmin.train.sweep.table import render_table
from flatmin.train.sweep.worker import finished_run, run_trial

__all__ = ["sweep_command"]


def sweep_command(arguments: list[str]) -> None:
    """``flatmin sweep [RECIPE] --grid FIELD=VALUE,... [--seeds N] [--FIELD VALUE ...]``.

    Raises:
        UsageError: If the grid or an argument is wrong; nothing has been started then.
        TrainingError: If final runs have failed, after everything else has been run and written.
    """
    recipe = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    own, fields = tyro.cli(
        SweepArguments, prog="flatmin sweep", args=arguments[len(recipe) :], return_unknown_args=True
    )
    plan = made_plan(own, recipe, fields)
    console = Console()
    if own.plan:
        console.print(plan_table(plan))
        return
    (plan.directory / "runs").mkdir(parents=True, exist_ok=True)
    with locked(plan.directory):
        result = run_sweep(plan, own, shlex.join(["flatmin", "sweep", *arguments]), console)
    failed = sum(plan.num_seeds - len(contender.test_error_percents) for contender in result.contenders)
    if failed:
        raise TrainingError(f"{failed} final runs failed or had nothing to run; the same command tries them again")


def run_sweep(plan: Plan, own: SweepArguments, command: str, console: Console) -> SweepResult:
    """Run what is missing of ``plan``, print the table, write ``results.csv``, ``sweep.json`` and ``report.html``."""
    for config in {config.dataset: config for row in plan.contenders for config in row.candidates}.values():
        read_images(config)  # downloaded once, before many processes would do it at a time
    schedule = Schedule(plan)
    work = partial(run_trial, keep_checkpoints=own.keep_checkpoints)
    num_gpus = gpus_per_trial(own)
    versions = software_versions()
    with RayPool(work, address=own.address, num_cpus=own.cpus_per_trial, num_gpus=num_gpus) as pool:
        try:
            with live_progress(schedule, pool, console) as show:
                drive(schedule, pool, show, own.retries)
            with console.status("Timing the training steps"):
                times = relative_run_times(schedule, partial(pool.call, relative_step_times))
        except KeyboardInterrupt:
            write_record(schedule, sweep_result(schedule, own.claim), command, versions)
            raise
    result = sweep_result(schedule, own.claim, times)
    write_record(schedule, result, command, versions)
    atomic_write(plan.directory / "report.html", render_page(result, command, versions))
    console.print(*render_table(result), sep="\n")
    for line in result.failures:
        console.print(f"failed: {line}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"every value in {plan.directory / 'results.csv'}", highlight=False, soft_wrap=True)
    console.print(f"report in {plan.directory / 'report.html'}", highlight=False, soft_wrap=True)
    return result


def plan_table(plan: Plan) -> Table:
    """Return a table of the contenders with their runs; those of the finals are not known before the choice."""
    table = Table("Method", "Epochs", "Settings", "Search runs", "of them finished", "Final runs")
    for index, contender in enumerate(plan.contenders):
        candidates = range(len(contender.candidates)) if plan.needs_search(contender) else range(0)
        runs = [run for candidate in candidates for run in plan.search_runs(index, candidate)]
        finished = sum(finished_run(run.config) is not None for run in runs)
        epochs = sorted({config.epochs for config in contender.candidates})
        table.add_row(
            contender.full_name,
            ", ".join(map(str, epochs)),
            str(len(contender.candidates)),
            str(len(runs)),
            str(finished),
            str(plan.num_seeds),
        )
    return table
