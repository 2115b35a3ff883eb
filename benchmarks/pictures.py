"""The pictures of ``docs/performance.md``, drawn from the results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import read_result

OURS, THEIRS, PLAIN = "#2a6f97", "#e0702e", "#8a8a8a"
COLOURS = {
    **dict.fromkeys(("sam", "compiled_sam", "compiled_msam", "compiled_model_sam", "flatmin"), OURS),
    **dict.fromkeys(("pytorch_optimizer_sam", "optax_sam", "pytorch_optimizer"), THEIRS),
}
LABELS = {
    "sam": "SAM",
    "compiled_sam": "SAM, compile_step",
    "compiled_msam": "MSAM, compile_step",
    "compiled_model_sgd": "SGD, compiled model",
    "compiled_model_sam": "SAM, compiled model",
    "pytorch_optimizer_sam": "pytorch_optimizer SAM",
    "jax_sgd": "SGD in JAX",
    "optax_sam": "optax SAM in JAX",
    "fused_sgd": "fused SGD",
    "flatmin": "SAM: perturb and restore",
    "pytorch_optimizer": "pytorch_optimizer: the same",
    "sgd_momentum_fused": "fused SGD with momentum",
    "adamw": "AdamW",
    "sgd": "SGD",
}

Result = Mapping[str, Any]


def draw_pictures(results: Path, directory: Path) -> None:
    """Draw those whose results are there."""
    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "flatmin", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False}):
        for name, reference in {"compiled-step": "an eager SGD step", "optimizer-step": "a step of SGD"}.items():
            found = read_result(results, name)
            if found is not None:
                save(bars(found["cases"], reference), directory / f"{name.replace('-', '_')}.svg")
        found = read_result(results, "growth")
        if found is not None:
            save(curves(found["cases"]), directory / "growth.svg")


def bars(cases: Mapping[str, Result], reference: str) -> Figure:
    """A panel for each case: the ratios to the reference with their intervals."""
    figure = Figure(figsize=(8, 2.3 * ((len(cases) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(cases) + 1) // 2, 2, squeeze=False)
    for panel, (name, case) in zip(axes.flat, cases.items(), strict=False):
        contenders = sorted(case["ratios"], key=lambda each: float(case["ratios"][each]["median"]), reverse=True)
        found = [case["ratios"][each] for each in contenders]
        medians = [each["median"] for each in found]
        errors = [[each["median"] - each["low"] for each in found], [each["high"] - each["median"] for each in found]]
        colours = [COLOURS.get(each, PLAIN) for each in contenders]
        panel.barh([LABELS.get(each, each) for each in contenders], medians, xerr=errors, color=colours, capsize=2)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set_title(name)
        panel.set_xlabel(f"relative to {reference}")
        panel.spines["right"].set_visible(False)
    for panel in axes.flat[len(cases) :]:
        panel.set_axis_off()
    return figure


def curves(cases: Mapping[str, Result]) -> Figure:
    """A panel for each axis: seconds against size, both logarithmic."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, 3).flat
    axes = dict.fromkeys(case["facts"]["axis"] for case in cases.values())
    for panel, axis in zip(panels, axes, strict=False):
        draw_curve(panel, axis, [case for case in cases.values() if case["facts"]["axis"] == axis])
    for panel in list(figure.axes)[len(axes) :]:
        panel.set_axis_off()
    return figure


def draw_curve(panel: Axes, axis: str, cases: list[Result]) -> None:
    """One axis: what SAM takes, and what it is compared with."""
    sizes = [case["facts"]["size"] for case in cases]
    reference = {"micro-batches": "one gradient"}.get(axis, "SGD step")
    own = "perturb and restore" if axis in {"parameters", "tensors"} else "SAM step"
    for contender, label, colour in (("sam", own, OURS), ("sgd", reference, PLAIN)):
        panel.plot(sizes, [case["medians"][contender] for case in cases], "o-", label=label, color=colour, markersize=3)
    panel.set_xscale("log", base=2)
    if axis != "parameters":  # numbers that are read more easily than powers of 2
        shown = sizes if len(sizes) <= 3 else sizes[::2]
        panel.set_xticks(shown, [str(size) for size in shown])
        panel.minorticks_off()
    panel.set_yscale("log")
    panel.set_xlabel(axis)
    panel.set_ylabel("seconds")
    panel.legend(frameon=False, fontsize=8)
    panel.spines["right"].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a picture, the same bytes for the same numbers."""
    figure.savefig(path, metadata={"Date": None})
