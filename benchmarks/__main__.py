"""Run benchmarks: ``python -m benchmarks [NAME ...] [--quick] [--threads N] [--out DIR]``.

Without a name all of them, each in a process of its own. Each writes one JSON file when it is finished;
``python -m benchmarks.page`` makes ``docs/performance.md`` and its pictures of them.
"""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, Case, Options, commit, read_result, record, result_path, write_result

BENCHMARKS = (
    *("optimizer-step", "compiled-step", "micro-batches", "growth", "training-loop", "host-copy", "low-precision"),
    *("augmentation", "methods", "lanczos", "sweep-overhead"),
)
ON_A_CPU = ("methods", "lanczos", "sweep-overhead")  # whatever device is asked for


def main() -> int:
    """Run what is asked for; the number of those that failed."""
    arguments = parsed()
    names = arguments.names or list(BENCHMARKS)
    if arguments.missing:
        names = [name for name in names if not is_up_to_date(name, arguments.out)]
    if len(names) > 1:
        return sum(in_own_process(name, arguments) for name in names)
    for name in names:
        options = Options(arguments.threads, device_of(name, arguments), arguments.quick)
        found = run(name, options, command_of(name, arguments), is_shown=True)
        print(f"numbers in {write_result(arguments.out, found)}")
    return 0


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="only to see that they run: seconds, on what is small")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads at most")
    parser.add_argument("--device", default="cpu", help="where tensors live, cuda for instance")
    parser.add_argument("--out", type=Path, help=f"directory of the results, {RESULTS} by default")
    parser.add_argument("--missing", action="store_true", help="leave out those with a result of this commit")
    arguments = parser.parse_args()
    if not arguments.threads >= 1:
        parser.error(f"--threads must be >= 1, got {arguments.threads}")
    if arguments.out is None:
        arguments.out = Path("runs/quick-benchmarks") if arguments.quick else RESULTS
    return arguments


def run(name: str, options: Options, command: str, *, is_shown: bool = False) -> dict[str, Any]:
    """Run one benchmark and return its result, complete."""
    module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
    question = (module.__doc__ or "").strip().partition("\n")[0]
    if is_shown:
        print(f"{name}: {question}", flush=True)
    torch.manual_seed(0)
    cases: dict[str, Case] = {}
    for key, case in module.measure(options):
        cases[key] = case
        if is_shown:
            print(f"  {line_of(key, case)}", flush=True)
    return record(name, question, command, options, cases)


def line_of(key: str, case: Case) -> str:
    """A case in a line."""
    ratios = [f"{name} {each.median:.3g} [{each.low:.3g}, {each.high:.3g}]" for name, each in case.ratios().items()]
    facts = [f"{name} {value:.4g}" for name, value in case.facts.items() if isinstance(value, float)]
    relative = [f"relative to {case.reference}: {', '.join(ratios)}"] if ratios else []
    skipped = [f"without {name}: {reason}" for name, reason in case.skipped.items()]
    return f"{key}: {'; '.join([*relative, ', '.join(facts), *skipped])}"


def in_own_process(name: str, arguments: argparse.Namespace) -> int:
    """Run one benchmark apart from the others; 1 where it failed."""
    command = [sys.executable, *shlex.split(command_of(name, arguments))[1:], "--out", str(arguments.out)]
    start = time.monotonic()
    is_failed = subprocess.run(command, check=False).returncode != 0
    print(f"{name} {'failed' if is_failed else 'done'} after {time.monotonic() - start:.0f} s\n", flush=True)
    return int(is_failed)


def command_of(name: str, arguments: argparse.Namespace) -> str:
    """What measures the same again."""
    device = device_of(name, arguments)
    device = f" --device {device}" if device != "cpu" else ""
    return f"python -m benchmarks {name} --threads {arguments.threads}{device}{' --quick' * arguments.quick}"


def device_of(name: str, arguments: argparse.Namespace) -> str:
    """Where its tensors live."""
    return "cpu" if name in ON_A_CPU else str(arguments.device)


def is_up_to_date(name: str, directory: Path) -> bool:
    """Whether the result is of what is checked out."""
    found = read_result(directory, name) if result_path(directory, name).exists() else None
    return found is not None and found["commit"] == commit() and not found["commit"].endswith("+")


if __name__ == "__main__":
    sys.exit(main())
