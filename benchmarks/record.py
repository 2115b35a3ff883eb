"""The one format of all results: what was asked, where and with what, every value, and what follows from them."""

import importlib.metadata
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import flatmin
from benchmarks.timing import Ratio, ratio
from flatmin.train.atomic_file import atomic_write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "numpy", "pytorch_optimizer", "jax", "optax", "ray", "curvlinops-for-pytorch")
INSTALL = "pip install 'flatmin[bench]'"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        threads: CPU threads at most.
        device: Where tensors live.
        quick: Only to see that it runs: a few rounds of what is small.
    """

    threads: int = 1
    device: str = "cpu"
    quick: bool = False

    def rounds(self, number: int) -> int:
        """So many rounds, or two in quick form."""
        return 2 if self.quick else number

    def all_threads(self) -> list[int]:
        """One thread and as many as there may be."""
        return sorted({1, self.threads})


@dataclass(frozen=True)
class Case:
    """Contenders compared on one thing.

    Attributes:
        values: What each contender took or did, round by round.
        reference: The contender that the others are relative to; ``None`` for no ratios.
        unit: Of the values.
        facts: What else was found, in names and numbers.
        skipped: Contenders that could not take part, and why.
    """

    values: Mapping[str, list[float]] = field(default_factory=dict)
    reference: str | None = None
    unit: str = "seconds"
    facts: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def ratios(self) -> dict[str, Ratio]:
        """Of every other contender to the reference."""
        if self.reference is None:
            return {}
        others = (name for name in self.values if name != self.reference)
        return {name: ratio(self.values[name], self.values[self.reference]) for name in others}

    def as_dict(self) -> dict[str, Any]:
        """The case as it is written."""
        return {
            "unit": self.unit,
            "reference": self.reference,
            "facts": dict(self.facts),
            "medians": {name: statistics.median(values) for name, values in self.values.items()},
            "ratios": {name: each._asdict() for name, each in self.ratios().items()},
            "skipped": dict(self.skipped),
            "values": dict(self.values),
        }


Measure = Callable[[Options], Mapping[str, Case]]


def record(name: str, question: str, command: str, options: Options, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Everything that was found, and what is needed to find it again.

    Raises:
        ValueError: Something is missing or not finite.
    """
    found = {
        "benchmark": name,
        "question": question,
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "device": device_name(options.device),
        "threads": options.threads,
        "seed": 0,
        "quick": options.quick,
        "cases": {key: case.as_dict() for key, case in cases.items()},
    }
    problems = list(problems_of(found))
    if problems:
        raise ValueError(f"the result of {name} must be complete, got: {'; '.join(problems)}")
    return found


def problems_of(found: Mapping[str, Any]) -> Iterator[str]:
    """What is missing in a result, or not a number."""
    for name in ("benchmark", "question", "command", "commit", "versions", "device", "threads", "seed", "cases"):
        if found.get(name) in (None, "", {}):
            yield f"no {name}"
    for name, case in found.get("cases", {}).items():
        if not case["values"] and not case["facts"] and not case["skipped"]:
            yield f"nothing in case {name}"
        for contender, values in case["values"].items():
            if not values:
                yield f"no value of {contender} in case {name}"
        for path in not_finite(case):
            yield f"{name}{path} is not finite"


def not_finite(thing: Any, path: str = "") -> Iterator[str]:
    """Where a number is not finite."""
    if isinstance(thing, Mapping):
        for name, value in thing.items():
            yield from not_finite(value, f"{path}.{name}")
    elif isinstance(thing, list | tuple):
        for index, value in enumerate(thing):
            yield from not_finite(value, f"{path}[{index}]")
    elif isinstance(thing, float) and not math.isfinite(thing):
        yield path


def result_path(directory: Path, name: str) -> Path:
    """Where the result of a benchmark is."""
    return directory / f"{name.replace('-', '_')}.json"


def read_result(directory: Path, name: str) -> dict[str, Any] | None:
    """The result of a benchmark, if it has been run."""
    path = result_path(directory, name)
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write_result(directory: Path, found: Mapping[str, Any]) -> Path:
    """Write a result, all at once."""
    path = result_path(directory, found["benchmark"])
    directory.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(found, indent=1) + "\n")
    return path


def commit() -> str:
    """The commit that is measured, with a plus sign where the package or the benchmarks differ from it."""
    run = ["git", "-C", str(ROOT)]
    head = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    what = ["src", "benchmarks/*.py"]
    changed = subprocess.run([*run, "diff", "--quiet", "HEAD", "--", *what], capture_output=True, check=False)
    return (head or "unknown") + ("+" if changed.returncode == 1 else "")


def versions() -> dict[str, str]:
    """Of Python and the packages that take part, where they are installed."""
    found = {"python": platform.python_version(), "flatmin": flatmin.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """What it ran on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {cpu_model()}"


def cpu_model() -> str:
    """The processor's name, as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
