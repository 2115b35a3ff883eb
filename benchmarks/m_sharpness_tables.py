"""Tables and pictures of what ``m_sharpness.py`` has measured."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from benchmarks.methods_page import table_line
from benchmarks.rank_correlation import Interval, tau_difference, tau_interval
from flatmin.train.report.statistics import estimate

Network = Mapping[str, Any]
Measure = Callable[[Network], float]

KINDS = {"m_sharpness": "m-sharpness", "adaptive_m_sharpness": "adaptive m-sharpness"}
COLOURS = {"m_sharpness": "#4c8bd0", "adaptive_m_sharpness": "#e0702e", "sgd": "#4c8bd0", "sam": "#e0702e"}
FEWEST = 8  # networks below which a rank correlation is not worth a line


def sharpness(kind: str, m: str) -> Measure:
    """The measure of one kind and m."""
    return lambda network: float(network[kind][m]["value"])


def eigenvalue_ratio(network: Network) -> float:
    """``lambda_1 / lambda_5``."""
    return float(network["eigenvalues"][0] / network["eigenvalues"][4])


def measures(network: Network) -> dict[str, Measure]:
    """Everything that may tell how large the gap is, by the name that the table gives it."""
    found = {f"{name}, m = {m}": sharpness(kind, m) for kind, name in KINDS.items() for m in network[kind]}
    others: dict[str, Measure] = {
        "λ1": lambda network: float(network["eigenvalues"][0]),
        "λ1/λ5": eigenvalue_ratio,
        "minus the training loss": lambda network: -float(network["train_loss"]),
    }
    return found | others


def setting_of(network: Network) -> Hashable:
    """What networks that differ in their seed alone have in common."""
    return tuple(network[name] for name in ("model", "rho", "lr", "batch_size", "weight_decay"))


def tau(networks: Sequence[Network], measure: Measure) -> Interval:
    """Kendall's tau of a measure and the gap."""
    return tau_interval([measure(n) for n in networks], gaps(networks), [setting_of(n) for n in networks])


def gaps(networks: Sequence[Network]) -> list[float]:
    """Generalisation gaps in percentage points."""
    return [network["gap_percent"] for network in networks]


def experiment_text(record: Mapping[str, Any], picture_path: str) -> str:
    """What was run, the table of correlations, the difference between small and large m, the picture."""
    networks = record["networks"]
    if not has_enough(record):
        return f"{len(networks)} of {record['networks_wanted']} networks have been trained, too few for a correlation."
    sgd = [network for network in networks if network["method"] == "sgd"]
    groups = {"all": networks, "SGD alone": sgd} if len(sgd) >= FEWEST else {"all": networks}
    heads = [f"{name} ({len(group)} networks)" for name, group in groups.items()]
    lines = [table_line("measure", *heads), "|---|" + "---:|" * len(heads)]
    for name, measure in measures(networks[0]).items():
        lines.append(table_line(name, *(tau(group, measure).text() for group in groups.values())))
    return "\n\n".join(
        [
            what_was_run(record),
            "\n".join(lines),
            *(difference_text(kind, groups) for kind in KINDS),
            f"![Rank correlation against m, and the gap against sharpness]({picture_path})",
        ]
    )


def has_enough(record: Mapping[str, Any]) -> bool:
    """Whether there are networks enough for a correlation."""
    return len(record["networks"]) >= FEWEST


def what_was_run(record: Mapping[str, Any]) -> str:
    """One paragraph."""
    networks, task, on = record["networks"], record["task"], record["measured_on"]
    models = sorted({network["model"] for network in networks})
    counts = {model: sum(network["model"] == model for network in networks) for model in models}
    wanted = record["networks_wanted"]
    so_far = "" if len(networks) == wanted else f", of {wanted} that the command trains"
    which = " and ".join(f"{count} {model}" for model, count in counts.items())
    images = f", {task['train_images']} training images" if "train_images" in task else ""
    noise = f", {100 * task['label_noise']:g} % of the training labels wrong" if task["label_noise"] else ""
    return (
        f"{len(networks)} networks{so_far}: {which}; {task['epochs']} epochs{images}{noise}. "
        f"{values_text(networks)} Radius {on['rho']:g}, adaptive {on['adaptive_rho']:g}, on {on['num_images']} "
        f"training images. `{record['command']}`."
    )


def values_text(networks: Sequence[Network]) -> str:
    """Which settings the networks differ in."""
    names = {"lr": "learning rate", "batch_size": "batch size", "weight_decay": "weight decay", "rho": "radius of SAM"}
    parts = []
    for key, name in names.items():
        values = sorted({network[key] for network in networks})
        if len(values) > 1:
            parts.append(f"{name} {', '.join(f'{value:g}' for value in values)}")
    seeds = len({network["seed"] for network in networks})
    return f"They differ in {'; '.join(parts)} (0 is SGD); {seeds} seed{'s' * (seeds > 1)}."


def difference_text(kind: str, groups: Mapping[str, Sequence[Network]]) -> str:
    """Whether the smallest m tells more than the largest, in a sentence."""
    parts = []
    for name, group in groups.items():
        small, large = min(group[0][kind], key=int), max(group[0][kind], key=int)
        values = [[sharpness(kind, m)(network) for network in group] for m in (small, large)]
        found = tau_difference(values[0], values[1], gaps(group), [setting_of(n) for n in group])
        verdict = "excludes zero" if found.low > 0.0 or found.high < 0.0 else "includes zero"
        parts.append(f"{found.text()} ({name}; the interval {verdict})")
    return f"Tau with m = {small} minus tau with m = {large}, {KINDS[kind]}: {' and '.join(parts)}."


def experiment_picture(record: Mapping[str, Any]) -> Figure:
    """Left the rank correlation against m, right the gap against the sharpness with the smallest m."""
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    networks = record["networks"]
    for shift, (kind, name) in enumerate(KINDS.items()):
        ms = sorted(networks[0][kind], key=int)
        found = [tau(networks, sharpness(kind, m)) for m in ms]
        errors = [[each.value - each.low for each in found], [each.high - each.value for each in found]]
        positions = [int(m) * (1.0 + 0.08 * shift) for m in ms]
        values = [each.value for each in found]
        left.errorbar(positions, values, errors, marker="o", capsize=3, color=COLOURS[kind], label=name)
    left.set_xscale("log", base=2)
    left.set_xticks([int(m) for m in ms], ms)
    left.set(xlabel="m", ylabel="Kendall's tau with the gap, 95 % interval")
    left.legend(frameon=False)
    scatter(right, networks)
    return figure


def scatter(axes: Axes, networks: Sequence[Network]) -> None:
    """The gap against the sharpness with the smallest m, by method."""
    smallest = min(networks[0]["m_sharpness"], key=int)
    for method, marker in (("sgd", "o"), ("sam", "^")):
        group = [network for network in networks if network["method"] == method]
        x = [sharpness("m_sharpness", smallest)(network) for network in group]
        axes.scatter(x, gaps(group), marker=marker, color=COLOURS[method], alpha=0.8, label=method.upper())
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=f"m-sharpness, m = {smallest}", ylabel="generalisation gap (percentage points)")
    axes.legend(frameon=False)


def methods_table(record: Mapping[str, Any]) -> str:
    """The recipe's SGD and SAM networks side by side."""
    networks = record["methods"]
    ms = sorted(networks[0]["m_sharpness"], key=int)
    columns: dict[str, Measure] = {
        "test error (%)": lambda network: float(network["test_error_percent"]),
        "gap (points)": lambda network: float(network["gap_percent"]),
        "λ1": lambda network: float(network["eigenvalues"][0]),
        "λ1/λ5": eigenvalue_ratio,
        **{f"m = {m}": sharpness("m_sharpness", m) for m in ms},
    }
    lines = [table_line("method", *columns), "|---|" + "---:|" * len(columns)]
    for method in ("sgd", "sam"):
        group = [network for network in networks if network["method"] == method]
        label = "SGD" if method == "sgd" else f"SAM, rho = {group[0]['rho']:g}"
        lines.append(table_line(label, *(mean_text([measure(n) for n in group]) for measure in columns.values())))
    seeds = len({network["seed"] for network in networks})
    unconverged = sum(not network["all_converged"] for network in networks)
    note = f" Of {unconverged} networks not all eigenvalues have converged." if unconverged else ""
    return "\n".join(lines) + f"\n\n{seeds} seeds, mean ± 95 % interval (Student's t).{note}"


def mean_text(values: Sequence[float]) -> str:
    """Mean and half-width with three digits of the mean."""
    found = estimate(values)
    return f"{found.mean:.3g} ± {found.half_width:.2g}"
