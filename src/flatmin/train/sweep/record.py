"""The files that a sweep leaves: every single value as CSV, everything it found as JSON; and read again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flatmin.train.atomic_file import atomic_write
from flatmin.train.config import TrainConfig
from flatmin.train.report.statistics import Estimate
from flatmin.train.summary import Summary
from flatmin.train.sweep.contenders import Run
from flatmin.train.sweep.differences import PairedDifference
from flatmin.train.sweep.results import ContenderResult, RadiusPoint, SweepResult
from flatmin.train.sweep.schedule import ContenderRuns, Outcome, Schedule

__all__ = ["SweepRecord", "final_runs", "read_record", "results_csv", "write_record"]

MEASURED = ("epochs", "steps", "eval_on", *Summary.measured())


@dataclass(frozen=True)
class SweepRecord:
    """What ``sweep.json`` holds: what was found, by which command, with which versions."""

    result: SweepResult
    command: str
    versions: Mapping[str, str]


def write_record(schedule: Schedule, result: SweepResult, command: str, versions: Mapping[str, str]) -> None:
    """Write ``results.csv`` and ``sweep.json`` into the directory of the sweep."""
    directory = schedule.plan.directory
    content = {"command": command, "versions": dict(versions), **asdict(result)}
    atomic_write(directory / "results.csv", results_csv(schedule))
    atomic_write(directory / "sweep.json", json.dumps(content, indent=1, default=str) + "\n")


def read_record(directory: Path) -> SweepRecord:
    """Read the ``sweep.json`` that ``write_record`` wrote.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    path = directory / "sweep.json"
    try:
        values = json.loads(path.read_text())
        command, versions = values.pop("command"), values.pop("versions")
        contenders = [_contender(each) for each in values.pop("contenders")]
        return SweepRecord(SweepResult(contenders=contenders, **values), command, versions)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not the record of a sweep: {error}") from error


def final_runs(directory: Path) -> list[Path]:
    """Return the directories of the runs that a sweep's table reports, in the order of the table."""
    path = directory / "results.csv"
    with path.open(newline="") if path.exists() else io.StringIO() as file:
        rows = list(csv.DictReader(file))
    return [directory / row["run"] for row in rows if (row["phase"], row["status"]) == ("final", "finished")]


def results_csv(schedule: Schedule) -> str:
    """Return one line per run: what it was, how it ended, and every number that its summary holds."""
    swept = [name for name in schedule.plan.swept if name != "method"]
    columns = ["contender", "phase", "status", "method", *swept, "seed", *MEASURED, "wall_seconds", "error", "run"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for runs in schedule.contenders:
        for run, outcome in _ordered(runs):
            writer.writerow(_row(runs, run, outcome))
    return buffer.getvalue()


def _contender(values: dict[str, Any]) -> ContenderResult:
    difference, errors = values.pop("difference"), values.pop("test_error_percents")
    return ContenderResult(
        test_error_percents={int(seed): error for seed, error in errors.items()},  # JSON knows no keys but text
        radii=[RadiusPoint(**point) for point in values.pop("radii")],
        difference=difference and PairedDifference(**difference | {"estimate": Estimate(**difference["estimate"])}),
        **values,
    )


def _ordered(runs: ContenderRuns) -> Iterator[tuple[Run, Outcome]]:
    """All runs of a contender in the order of the grid, whatever the order in which they ended."""
    pairs = zip(runs.runs.values(), runs.outcomes.values(), strict=True)
    yield from sorted(pairs, key=lambda pair: (pair[0].phase == "final", pair[0].candidate, pair[0].config.seed))


def _row(runs: ContenderRuns, run: Run, outcome: Outcome) -> dict[str, Any]:
    config, summary = run.config, outcome.summary
    swept = {name: config.value_of(name) for name in runs.plan.swept}
    row = {
        "contender": runs.contender.full_name,
        "phase": run.phase,
        "method": config.method,
        **swept,
        "seed": config.seed,
        "status": _status(config, summary),
        "error": outcome.error or "",
        "run": config.run_dir.relative_to(runs.plan.directory),
    }
    if summary is not None:
        row |= {name: getattr(summary, name) for name in (*MEASURED, "wall_seconds")}
    return row


def _status(config: TrainConfig, summary: Summary | None) -> str:
    if summary is None:
        return "failed"
    return "finished" if config.max_epochs is None or summary.complete else "stopped early"
