"""Write what ``methods.py`` and ``methods_evidence.py`` have measured into ``docs/methods.md`` and ``docs/pictures``.

    python benchmarks/methods_page.py

Tables stand between markers, and the lines of a card that begin with "- cost:" and "- own:" are written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatmin.train.methods import METHOD_NAMES, default_rho
from flatmin.train.report.statistics import Estimate, estimate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "methods.md"
TASKS = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}

GOLDEN_TESTS = {"msam": "one_pass", "adaptivemsam": "one_pass", "samon": "where", "bsam": "bsam"}

NOTHING_YET = "`python benchmarks/methods_evidence.py --task digits` has not been run to its end yet."

KINDS = {  # by what a method changes about SAM: colour and marker in the picture
    "plain": ("#555555", "*", ("sgd",)),
    "SAM": ("#e0702e", "o", ("sam",)),
    "ball": ("#2fa37c", "s", ("asam", "fishersam", "layersam", "usam", "lesam", "zsharp", "samon")),
    "direction": ("#c9a227", "D", ("friendlysam", "vasso")),
    "combination": ("#b565a7", "^", ("gsam", "wsam", "gnp", "stablesam")),
    "fewer passes": ("#4c8bd0", "v", ("msam", "adaptivemsam", "looksam", "aesam", "rst", "latesam")),
    "Bayesian": ("#8c8c8c", "P", ("bsam",)),
}

Rows = Mapping[str, dict[str, Any]]


def main() -> None:
    """Write the page and the pictures."""
    costs: Rows = json.loads((RESULTS / "methods.json").read_text())["cases"]["methods"]["facts"]["methods"]
    evidence = {task: json.loads(path.read_text()) for task in TASKS if (path := evidence_path(task)).exists()}
    PAGE.write_text(page(PAGE.read_text(), costs, evidence))
    for task, record in evidence.items():
        (ROOT / "docs" / "pictures").mkdir(exist_ok=True)
        with mpl.rc_context({"svg.hashsalt": task, "svg.fonttype": "none", "font.size": 10}):
            picture(record["methods"]).savefig(
                ROOT / "docs" / "pictures" / f"methods_{task}.svg", metadata={"Date": None, "Creator": None}
            )


def evidence_path(task: str) -> Path:
    """File of a task's numbers."""
    return RESULTS / f"methods_evidence_{task}.json"


def page(text: str, costs: Rows, evidence: Mapping[str, dict[str, Any]]) -> str:
    """Return the page with every measured part written anew."""
    text = between(text, "table", main_table(costs, evidence))
    found = [evidence_text(task, record) for task, record in evidence.items()]
    text = between(text, "evidence", "\n\n".join(found or [NOTHING_YET]))
    for method, row in costs.items():
        if method != "sgd":
            own = [own_line(TASKS[t], record["methods"].get(method)) for t, record in evidence.items()]
            head = rf"(### {METHOD_NAMES[method]}\n.*?\n- cost:)[^\n]*(.*?\n- own:)[^\n]*"
            new = rf"\1 {cost_line(row)}\2 {'; '.join(own) or 'not measured'}."
            text = re.sub(head, new, text, count=1, flags=re.DOTALL)
    return text


def between(text: str, name: str, content: str) -> str:
    """Replace what stands between the marker ``name`` and the next end."""
    return re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{content}\n{m[2]}", text, count=1, flags=re.DOTALL
    )


def main_table(costs: Rows, evidence: Mapping[str, dict[str, Any]]) -> str:
    """Every method in one line."""
    heads = [f"{TASKS[task]}: test error (%)" for task in evidence]
    lines = [table_line("method", "golden test", "passes", "copies, last pass", "between steps", "time / SGD", *heads)]
    lines.append("|---|---|" + "---:|" * (4 + len(heads)))
    for method, row in costs.items():
        found = [test_error(record["methods"].get(method)) for record in evidence.values()]
        name = METHOD_NAMES[method]
        link = "" if method == "sgd" else f"[yes](../tests/test_{GOLDEN_TESTS.get(method, 'golden')}.py)"
        label = name if method == "sgd" else f"[{name}](#{method})"
        lines.append(
            table_line(
                *(label, link, f"{row['passes_per_step']:.2f}"),
                *(copies(row["copies_during"]), copies(row["copies_between"]), f"{row['relative_time']:.2f}", *found),
            )
        )
    return "\n".join(lines)


def evidence_text(task: str, record: dict[str, Any]) -> str:
    """What was run, the picture and the table of one task."""
    rows: Rows = record["methods"]
    heads = ("method", "radius", "its default", "radii tried", "test error (%)", "passes", "cost / SGD")
    lines = [
        f"### {TASKS[task][0].upper()}{TASKS[task][1:]}\n",
        f"{what_was_run(record)} `{record['command']}`; every value is in "
        f"`benchmarks/results/{evidence_path(task).name}`.\n",
        f"![Test error against cost, {TASKS[task]}](pictures/methods_{task}.svg)\n",
        table_line(*heads),
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for method, row in sorted(rows.items(), key=lambda pair: estimate(pair[1]["test_error_percents"]).mean):
        radii = [f"{value:.3g}" for value in (row["radius"], *(each["radius"] for each in row["search"]))]
        default = f"{0.05 if method == 'lesam' else default_rho(method):g}"
        chosen = ("–", "–", "–") if method == "sgd" else (radii[0], default, ", ".join(radii[1:]))
        cost = (f"{row['passes_per_step']:.2f}", f"{row['relative_cost']:.2f}")
        lines.append(table_line(METHOD_NAMES[method], *chosen, test_error(row), *cost))
    return "\n".join(lines)


def what_was_run(record: dict[str, Any]) -> str:
    """One paragraph."""
    facts, num_search, num_seeds = record["task"], len(record["search_seeds"]), len(record["seeds"])
    noise = f", {100 * facts['label_noise']:g} % of the training labels wrong" if facts["label_noise"] else ""
    return (
        f"`{facts['model']}`, {facts['epochs']} epochs, batches of {facts['batch_size']}{noise}. Each radius: "
        f"{num_search} search seed{'s' * (num_search > 1)} on the validation split; the table: {num_seeds} other seeds "
        "on the test images, mean ± 95 % interval (Student's t). Radii are the default times powers of two, extended "
        "while the best is at an end (for LESAM it is sigma, below a cap of 5)."
    )


def own_line(task: str, row: dict[str, Any] | None) -> str:
    """What a card says about a task."""
    return f"{task} {test_error(row)} % at {row['radius']:.3g}" if row else f"{task} not run"


def cost_line(row: dict[str, Any]) -> str:
    """What a card says about the cost."""
    during, between_steps = copies(row["copies_during"]), copies(row["copies_between"])
    return (
        f"{row['passes_per_step']:.2f} passes, {row['relative_time']:.2f} × SGD; copies: {during} in the last pass, "
        f"{between_steps} between steps."
    )


def copies(number: float) -> str:
    """A number of copies, without zeros that say nothing."""
    return f"{number:.2f}" if 0.005 < number < 0.1 else f"{number:.1f}".removesuffix(".0")


def test_error(row: dict[str, Any] | None) -> str:
    """Mean and interval."""
    return "" if row is None else estimate(row["test_error_percents"]).text(2)


def table_line(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def picture(rows: Rows) -> Figure:
    """Test error with its interval over the cost."""
    points = {m: (row["relative_cost"], estimate(row["test_error_percents"])) for m, row in rows.items()}
    return picture_of(points, "Test error (%)")


def picture_of(points: Mapping[str, tuple[float, Estimate]], label: str) -> Figure:
    """A quantity of each method with its interval over the cost."""
    figure = Figure(figsize=(9.2, 5.2), layout="constrained")
    axes = figure.subplots()
    for kind, (colour, marker, methods) in KINDS.items():
        own = [points[method] for method in methods if method in points]
        if own:
            axes.errorbar(
                [cost for cost, _ in own],
                [error.mean for _, error in own],
                yerr=[error.half_width for _, error in own],
                fmt=marker,
                color=colour,
                label=kind,
                capsize=3,
                linewidth=1,
            )
    axes.set(xlabel="Cost of training / SGD (measured)", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#80808030")
    place_names(axes, points)
    axes.legend(frameon=False, title="What it changes", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def place_names(axes: Axes, points: Mapping[str, tuple[float, Estimate]]) -> None:
    """Write the names beside their points, moved apart where they would cover one another."""
    taken: list[tuple[float, float]] = []
    low, high = axes.get_ylim()
    line = (high - low) / 32
    for method, (cost, error) in sorted(points.items(), key=lambda pair: pair[1][1].mean):
        y = error.mean
        while any(abs(y - other) < line and abs(cost - near) < 0.22 for near, other in taken):
            y += line / 4
        taken.append((cost, y))
        axes.annotate(
            METHOD_NAMES[method],
            *((cost, error.mean), (cost + 0.03, y)),
            fontsize=8.5,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#80808080"} if y > error.mean else None,
        )


if __name__ == "__main__":
    main()
