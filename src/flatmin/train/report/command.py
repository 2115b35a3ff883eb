"""The command ``report``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from flatmin.train.atomic_file import atomic_write
from flatmin.train.errors import TrainingError, UsageError
from flatmin.train.report.document import Section
from flatmin.train.report.report_page import ReportContent, render_report
from flatmin.train.report.runs import RunRecord, read_run

__all__ = ["ReportArguments", "gathered_content", "report_command"]


@dataclass(frozen=True)
class ReportArguments:
    """Write one HTML page about runs: results, curves, sharpness, landscapes. It needs no network to be read.

    What is damaged or missing is left out, and the page says so.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Directories of runs, or directories that hold such, as flatmin compare and flatmin sweep leave them."""
    out: Path = Path("report.html")
    """File to write."""


def report_command(arguments: list[str]) -> None:
    """``flatmin report RUN ... [--out FILE]``: read the runs, write the page.

    Raises:
        UsageError: If no run is given.
        TrainingError: If no run could be read; the page is written and says why.
    """
    asked = tyro.cli(ReportArguments, prog="flatmin report", args=arguments)
    if not asked.runs:
        raise UsageError("runs must name one directory or more, got none")
    console = Console(stderr=True)
    with console.status("Drawing"):
        content = gathered_content(asked.runs, shlex.join(["flatmin", "report", *arguments]))
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(asked.out, render_report(content))
    for problem in [*content.problems, *(problem for run in content.runs for problem in run.problems)]:
        console.print(problem, highlight=False, soft_wrap=True, markup=False)
    Console().print(f"report in {asked.out}", highlight=False, soft_wrap=True)
    if not content.runs:
        raise TrainingError(f"no run could be read; {asked.out} says why")


def gathered_content(paths: Sequence[Path], command: str) -> ReportContent:
    """Read everything that the page is to show.

    Args:
        paths: Directories of runs, or that hold runs.
        command: Command line that makes the page again.
    """
    runs: dict[Path, RunRecord] = {}
    problems: list[str] = []
    sections: list[Section] = []
    for path in paths:
        if (path / "sweep.json").is_file():
            sections += _sweep_sections(path, problems)
        for directory in _run_directories(path):
            if directory.resolve() in runs:
                continue
            try:
                runs[directory.resolve()] = read_run(directory)
            except (TrainingError, OSError) as error:
                problems.append(str(error))
    return ReportContent(list(runs.values()), problems, sections, [command])


def _run_directories(path: Path) -> Iterator[Path]:
    """The runs at a path: itself, the final ones of a sweep, or those in the directories below."""
    if (path / "config.yaml").is_file() or not path.is_dir():
        yield path
        return
    if (path / "sweep.json").is_file():
        from flatmin.train.sweep.record import final_runs  # noqa: PLC0415 - only where there is a sweep

        yield from final_runs(path)
        return
    below = sorted(file.parent for pattern in ("*", "runs/*") for file in path.glob(f"{pattern}/config.yaml"))
    yield from below or [path]


def _sweep_sections(path: Path, problems: list[str]) -> list[Section]:
    from flatmin.train.sweep.page import sweep_sections  # noqa: PLC0415 - only where there is a sweep
    from flatmin.train.sweep.record import read_record  # noqa: PLC0415

    try:
        record = read_record(path)
    except ValueError as error:
        problems.append(str(error))
        return []
    return sweep_sections(record.result, record.command)
