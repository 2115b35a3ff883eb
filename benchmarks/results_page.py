"""Write what the experiments have found into ``docs/results.md``, and their pictures into ``docs/images``.

    python -m benchmarks.results_page

The experiments are ``m_sharpness.py``, ``methods_evidence.py`` and ``studies.py``. Every table and picture stands
between two markers in the page; what has not been run says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.cost_of_accuracy import gains_picture, gains_text
from benchmarks.m_sharpness_tables import experiment_picture, experiment_text, has_enough, methods_table
from benchmarks.methods_page import between, table_line
from flatmin.train.report.statistics import Estimate, estimate
from flatmin.train.sweep.differences import paired_difference

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "results.md"
TIMED_STUDIES = ("methods", "cifar10")
TASKS = {"digits": "digits", "fashion_mnist": "fashion-mnist"}

Row = Mapping[str, Any]


def main() -> None:
    """Write the page and the pictures."""
    PAGE.write_text(page(PAGE.read_text()))
    for task in TASKS:
        record = found(f"m_sharpness_{task}")
        if record and has_enough(record):
            save(experiment_picture(record), f"m_sharpness_{task}")
        evidence = found(f"methods_evidence_{task}")
        if evidence:
            save(gains_picture(evidence), f"cost_{task}")
    for name in TIMED_STUDIES:
        study = found(f"study_{name}")
        if study:
            save(cost_picture(study), f"study_{name}_cost")
    radius = found("study_radius")
    if radius:
        save(radius_picture(radius), "study_radius")


def page(text: str) -> str:
    """Return the page with every part between markers written anew."""
    for task, name in TASKS.items():
        record = found(f"m_sharpness_{task}")
        pending = not_run(f"m_sharpness.py --task {name}")
        text = between(text, f"sgd and sam {task}", methods_table(record) if record else pending)
        picture = f"images/m_sharpness_{task}.svg"
        text = between(text, f"m {task}", experiment_text(record, picture) if record else pending)
        evidence = found(f"methods_evidence_{task}")
        pending = not_run(f"methods_evidence.py --task {name}")
        text = between(text, f"cost {task}", gains_text(evidence, f"images/cost_{task}.svg") if evidence else pending)
    timed = {name: partial(methods_study, picture=f"images/study_{name}_cost.svg") for name in TIMED_STUDIES}
    studies: dict[str, Callable[[Row], str]] = {**timed, "label-noise": label_noise_study}
    studies["radius"] = partial(radius_study, picture="images/study_radius.svg")
    for name, render in studies.items():
        study = found(f"study_{name.replace('-', '_')}")
        text = between(text, name, render(study) if study else not_run(f"studies.py {name}"))
    return text


def found(name: str) -> dict[str, Any] | None:
    """The numbers of a script, if there are any."""
    path = RESULTS / f"{name}.json"
    record: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return record


def not_run(arguments: str) -> str:
    """What stands in the place of a table that nobody has made yet."""
    return f"Not run yet: `python benchmarks/{arguments}` has not come to its end on any machine."


def save(figure: Figure, name: str) -> None:
    """Write a picture whose bytes depend on the numbers alone."""
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 10}):
        figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None, "Creator": None})


def contenders(record: Row) -> list[Row]:
    """The rows of every sweep of a study, with the sharpness of their networks; m-SAM is the second sweep's SAM."""
    rows: list[Row] = []
    for number, sweep in enumerate(record["sweeps"]):
        for row in sweep["contenders"]:
            if row["test_error_percents"]:
                full_name = f"{row['name']} ({row['task']})" if row["task"] else row["name"]
                name = row["name"] if number == 0 else f"m-{row['name']}"
                time = sweep.get("relative_times", {}).get(full_name)
                rows.append({**row, "name": name, "sharpness": sweep["sharpness"][full_name], "time": time})
    return rows


def baseline_among(rows: Sequence[Row]) -> Row:
    """The baseline that did best on the validation split."""
    baselines = [row for row in rows if row["is_baseline"] and row["name"].startswith("SGD")]
    return min(baselines, key=lambda row: row["validation_error_percent"] or 0.0)


def test_error(row: Row) -> Estimate:
    """Mean and interval over the seeds."""
    return estimate(list(row["test_error_percents"].values()))


def difference(row: Row, baseline: Row) -> Estimate:
    """Test error minus that of the baseline, seed by seed."""
    own, others = row["test_error_percents"], baseline["test_error_percents"]
    common = [seed for seed in own if seed in others]
    return paired_difference([own[seed] for seed in common], [others[seed] for seed in common]).estimate


def sharpness(row: Row, name: str) -> Estimate | None:
    """Mean and interval over the networks that have the value; ``None`` without one."""
    values = [v[f"sharpness_{name}"] for v in row["sharpness"].values() if v[f"sharpness_{name}"] is not None]
    return estimate(values) if values else None


def mean_sharpness(row: Row, name: str) -> str:
    """Mean and half-width as text."""
    numbers = sharpness(row, name)
    return "–" if numbers is None else f"{numbers.mean:.3g} ± {numbers.half_width:.2g}"


def commands_text(record: Row) -> str:
    """The command, and those of the sweeps that it runs."""
    sweeps = "\n".join(sweep["command"] for sweep in record["sweeps"])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"`{record['command']}` runs, on one thread each ({versions}):\n\n```\n{sweeps}\n```"


def methods_study(record: Row, picture: str) -> str:
    """SGD against the methods."""
    rows = contenders(record)
    baseline = baseline_among(rows)
    heads = ("method", "epochs", "rho", "test error (%)", "minus baseline", "m-sharpness, m = 16", "λ1", "time / SGD")
    lines = [table_line(*heads), "|---|---:|---:|" + "---:|" * 5]
    for row in sorted(rows, key=lambda row: test_error(row).mean):
        sharp = [mean_sharpness(row, name) for name in ("worst_case", "lambda_1")]
        radius = row["settings"].get("rho", "–") if not row["name"].startswith("SGD") else "–"
        less = "baseline" if row is baseline else difference(row, baseline).text(2)
        error, time = test_error(row).text(2), f"{row['time']:.2f}"
        lines.append(table_line(row["name"], str(row["epochs"]), str(radius), error, less, *sharp, time))
    gains = f"![Gain in accuracy against time]({picture})"
    return "\n\n".join(["\n".join(lines), gains, commands_text(record)])


def cost_picture(record: Row) -> Figure:
    """Accuracy gained over SGD against time, with the 95 % interval of the paired difference."""
    sgd, *rows = contenders(record)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        more = difference(row, sgd)
        axes.errorbar([row["time"]], [-more.mean], [more.half_width], marker="o", capsize=3)
        axes.annotate(row["name"], (row["time"], -more.mean), (6, 6), textcoords="offset points")
    axes.plot([1.0], [0.0], marker="*", color="#555555")
    axes.annotate("SGD", (1.0, 0.0), (-6, 6), textcoords="offset points", horizontalalignment="right")
    axes.axhline(0.0, color="#808080", linewidth=0.8)
    axes.margins(x=0.25)  # room for the names
    axes.set(xlabel="time relative to SGD", ylabel="accuracy minus SGD's, percentage points")
    return figure


def label_noise_study(record: Row) -> str:
    """SGD and SAM at each share of wrong labels."""
    lines = [table_line("wrong labels", "SGD", "SAM", "SAM minus SGD", "rho"), "|---|---:|---:|---:|---:|"]
    by_task: dict[str, dict[str, Row]] = {}
    for row in contenders(record):
        by_task.setdefault(row["task"], {})[row["name"]] = row
    for task, rows in by_task.items():
        sgd, sam = rows["SGD"], rows["SAM"]
        share = f"{100 * float(task.removeprefix('label_noise=')):g} %"
        errors = [test_error(row).text(2) for row in (sgd, sam)]
        lines.append(table_line(share, *errors, difference(sam, sgd).text(2), str(sam["settings"]["rho"])))
    return "\n\n".join(["\n".join(lines), commands_text(record)])


def radius_of(row: Row) -> str:
    """The radius that a row of the study of radii is about."""
    return f"{float(row['task'].removeprefix('rho=')):g}"


def radius_study(record: Row, picture: str) -> str:
    """SAM over its radius."""
    lines = [table_line("rho", "test error (%)", "m-sharpness, m = 16", "λ1"), "|---:|---:|---:|---:|"]
    for row in contenders(record):
        sharp = [mean_sharpness(row, name) for name in ("worst_case", "lambda_1")]
        lines.append(table_line(radius_of(row), test_error(row).text(2), *sharp))
    curves = f"![Test error and sharpness against the radius]({picture})"
    return "\n\n".join(["\n".join(lines), curves, commands_text(record)])


def radius_picture(record: Row) -> Figure:
    """Test error and two measures of sharpness against the radius, with 95 % intervals over seeds."""
    rows = contenders(record)
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    curves: dict[str, Callable[[Row], Estimate | None]] = {
        "test error (%)": test_error,
        "m-sharpness, m = 16": partial(sharpness, name="worst_case"),
        "λ1": partial(sharpness, name="lambda_1"),
    }
    for axes, (label, measure) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        points = [(place, found) for place, row in enumerate(rows) if (found := measure(row)) is not None]
        widths = [found.half_width for _, found in points]
        places, means = [place for place, _ in points], [found.mean for _, found in points]
        axes.errorbar(places, means, widths, marker="o", markersize=4, capsize=2)
        axes.set_xticks(range(len(rows)), [radius_of(row) for row in rows], rotation=60)
        axes.set(xlabel="rho", title=label)
        axes.set_ylim(bottom=0.0)
    return figure


if __name__ == "__main__":
    main()
