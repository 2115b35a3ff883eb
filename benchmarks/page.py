"""Write what was measured into ``docs/performance.md``, and draw its pictures.

    python -m benchmarks.page

Every table and number of that page stands between markers and is written anew from ``benchmarks/results``; the text
around them is written by hand, without numbers that were measured. The cards of ``docs/methods.md`` follow.
"""

import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import methods_page
from benchmarks.pictures import draw_pictures
from benchmarks.record import RESULTS, ROOT, read_result

PAGE = ROOT / "docs" / "performance.md"

Result = Mapping[str, Any]
Lines = Iterator[str]


def main() -> None:
    """Write the pages and the pictures."""
    PAGE.write_text(filled(PAGE.read_text(), RESULTS))
    draw_pictures(RESULTS, ROOT / "docs" / "pictures")
    methods_page.main()


def filled(text: str, directory: Path) -> str:
    """The page with what stands between ``<!-- NAME -->`` and ``<!-- end -->`` written anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{chr(10).join(lines_about(match[1], directory))}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def lines_about(name: str, directory: Path) -> list[str]:
    """What a benchmark has found: how it was found, and a table."""
    found = read_result(directory, name)
    if found is None:
        return [f"Not measured yet: `python -m benchmarks {name}`."]
    picture = [f"![{PICTURES[name]}](pictures/{name.replace('-', '_')}.svg)", ""] if name in PICTURES else []
    return [provenance(found), "", *picture, *TABLES[name](found["cases"])]


def provenance(found: Result) -> str:
    """How to measure it again, and where it was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name in SHOWN)
    path = f"benchmarks/results/{found['benchmark'].replace('-', '_')}.json"
    command = f"`{found['command']}`"
    if not found["command"].startswith("python -m benchmarks"):  # a script that has no command of its own any more
        older = f"these numbers are of commit {found['commit'][:10]}, where it was {command},"
        command = f"`python -m benchmarks {found['benchmark']}`; {older}"
    return f"{command} on {found['device']}; {versions}; every value is in `{path}`."


PICTURES = {
    "compiled-step": "A whole step",
    "optimizer-step": "Perturb and restore",
    "growth": "How the cost grows",
}
SHOWN = ("torch", "pytorch_optimizer", "jax", "optax", "torchvision", "ray", "curvlinops-for-pytorch")


def table(head: list[str], rows: Iterator[list[str]]) -> Lines:
    """A table of Markdown."""
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def with_spread(case: Result, contender: str) -> str:
    """A ratio with its interval; a dash where the contender was not there."""
    found = case["ratios"].get(contender)
    return "–" if found is None else f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def duration(seconds: float) -> str:
    """A time of three digits."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def compared(contenders: Mapping[str, str], facts: Mapping[str, str]) -> Callable[[Mapping[str, Result]], Lines]:
    """A table with a row for each case: some facts, the time of the reference, and the others relative to it."""

    def lines(cases: Mapping[str, Result]) -> Lines:
        first = next(iter(cases.values()))
        head = ["", *facts.values(), contenders[first["reference"]]]
        others = [name for name in contenders if name != first["reference"]]

        def row(name: str, case: Result) -> list[str]:
            told = [f"{case['facts'][fact]:.4g}" if fact in case["facts"] else "–" for fact in facts]
            own = duration(case["medians"][case["reference"]])
            return [name, *told, own, *(with_spread(case, other) for other in others)]

        yield from table([*head, *(contenders[name] for name in others)], (row(*each) for each in cases.items()))

    return lines


def low_precision(cases: Mapping[str, Result]) -> Lines:
    """What survives of a perturbation."""
    columns = {
        "share_moved": "share moved",
        "length_over_rho": "length / rho",
        "cosine": "cosine",
        "along_over_rho": "along / rho",
    }

    def rows() -> Iterator[list[str]]:
        for case in cases.values():
            facts = case["facts"]
            for rounding in ("nearest", "stochastic"):
                numbers = [f"{facts[rounding][column]:.4f}" for column in columns]
                first = [f"{facts['num_weights'] / 1e6:g} million", facts["dtype"], rounding]
                yield [*first, *numbers, duration(case["medians"][rounding])]

    yield from table(["weights", "dtype", "rounding", *columns.values(), "perturb and restore"], rows())


def growth(cases: Mapping[str, Result]) -> Lines:
    """How fast it grows: slopes of log seconds against log size, between the largest half of the sizes."""

    def rows() -> Iterator[list[str]]:
        for axis, of_axis in by_axis(cases).items():
            sizes = [case["facts"]["size"] for case in of_axis]
            seconds = [[case["medians"][name] for case in of_axis] for name in ("sam", "sgd")]
            slopes = [f"{slope(sizes, each):.2f}" for each in seconds]
            ends = [f"{with_spread(of_axis[index], 'sam')} at {sizes[index]}" for index in (0, -1)]
            yield [axis, *slopes, *ends]

    yield from table(
        ["", "slope, SAM's part", "slope, its reference", "ratio at the smallest", "at the largest"], rows()
    )


def by_axis(cases: Mapping[str, Result]) -> dict[str, list[Result]]:
    """The cases of each axis, by size."""
    axes: dict[str, list[Result]] = {}
    for case in cases.values():
        axes.setdefault(case["facts"]["axis"], []).append(case)
    return {axis: sorted(of_axis, key=lambda case: case["facts"]["size"]) for axis, of_axis in axes.items()}


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Least-squares exponent of the power law, over the upper half of the sizes."""
    start = (len(sizes) - 1) // 2
    x, y = [math.log(size) for size in sizes[start:]], [math.log(value) for value in seconds[start:]]
    return statistics.linear_regression(x, y).slope


def lanczos(cases: Mapping[str, Result]) -> Lines:
    """Both ways to the same eigenvalues."""
    (case,) = cases.values()
    facts = case["facts"]

    def row(name: str, label: str) -> list[str]:
        found, difference = facts[name], facts["largest_relative_difference"][f"{name}_exact"]
        products = found.get("num_products", found.get("num_passes"))
        return [
            label,
            str(products),
            *(f"{found[f'{kind}_seconds']:.1f}" for kind in ("wall", "cpu")),
            f"{difference:.0e}",
        ]

    head = ["", "products of the Hessian", "seconds", "on the CPU", "largest relative difference from float64"]
    rows = [row("flatmin", "`hessian_eigenvalues`"), row("curvlinops", "curvlinops and `eigsh`")]
    yield from table(head, iter(rows))


def sweep_overhead(cases: Mapping[str, Result]) -> Lines:
    """What a sweep costs beside its training."""
    columns = {
        "trials": "trials",
        "start_seconds": "s to start",
        "wall_seconds": "s for all",
        "driver_cpu_ms_per_trial": "ms of the driver's processor time a trial",
        "longest_pause_seconds": "s, longest pause of the display",
    }
    rows = ([name, *(f"{case['facts'][key]:.3g}" for key in columns)] for name, case in cases.items())
    yield from table(["", *columns.values()], rows)


SETS = {"num_tensors": "tensors", "num_params_million": "million"}
STEPS = {
    "sgd": "plain SGD",
    "sam": "SAM",
    "compiled_sam": "SAM, `compile_step`",
    "compiled_msam": "MSAM, `compile_step`",
    "compiled_model_sgd": "SGD, compiled model",
    "compiled_model_sam": "SAM, compiled model",
    "pytorch_optimizer_sam": "pytorch_optimizer's SAM",
    "jax_sgd": "SGD in JAX",
    "optax_sam": "optax's SAM in JAX",
}
OPTIMIZERS = {
    "sgd_momentum": "SGD with momentum",
    "flatmin": "perturb and restore",
    "pytorch_optimizer": "pytorch_optimizer's",
    "sgd_momentum_fused": "fused SGD with momentum",
    "adamw": "AdamW",
}
LOADERS = {"flatmin": "flatmin, an epoch", "torchvision_pil": "torchvision, PIL", "torchvision_tensor": "on tensors"}
TABLES: dict[str, Callable[[Mapping[str, Result]], Lines]] = {
    "optimizer-step": compared(
        OPTIMIZERS, {**SETS, "copies_during": "copies in the second pass", "copies_after": "after"}
    ),
    "compiled-step": compared(
        STEPS, {"threads": "threads", "repeats": "steps a turn", "seconds_to_compile": "s to compile"}
    ),
    "micro-batches": compared(
        {"gradient": "one gradient", "loop": "loop", "compiled": "side by side, compiled"},
        {"threads": "threads", "micro_batches": "micro-batches"},
    ),
    "growth": growth,
    "training-loop": compared(
        {
            "two_steps": "loop of two steps",
            "flatmin": "`flatmin train`",
            "flatmin_compiled": "with `--compile`",
            "flatmin_bf16": "`--precision bf16-mixed`",
            "flatmin_bf16_compiled": "both",
        },
        {
            "images": "images",
            "share_outside": "share outside the optimizer's step",
            "images_per_second": "images a second of the fastest",
            "share_of_matrix_rate": "its share of the matrix rate",
        },
    ),
    "host-copy": compared(
        {"device": "a step", "host": "with the copy in host memory"},
        {
            "num_params_million": "million",
            "copies_device": "copies on the device at the peak",
            "copies_host": "and with it",
        },
    ),
    "low-precision": low_precision,
    "augmentation": compared(LOADERS, {"images": "images"}),
    "lanczos": lanczos,
    "sweep-overhead": sweep_overhead,
}


if __name__ == "__main__":
    main()
