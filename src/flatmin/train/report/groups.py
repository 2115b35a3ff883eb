"""Runs that differ in nothing but their seed, under a name that tells them from the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, get_args

from flatmin.train.comparison import method_title
from flatmin.train.config import Method, TrainConfig
from flatmin.train.config_difference import NEUTRAL_FIELDS
from flatmin.train.pictures.landscape import Landscape
from flatmin.train.report.runs import RunRecord

__all__ = ["RunGroup", "common_settings", "differing_settings", "grouped", "planes_of"]

# Never part of a name: what tells nothing of the numbers, and what a name tells anyway or is averaged over.
UNNAMED = frozenset({*NEUTRAL_FIELDS, "recipe", "method", "method_options", "seed", "accelerator", "threads"})
TASK_FIELDS = ("dataset", "dataset_path", "label_noise", "train_labels", "model", "eval_on")


@dataclass(frozen=True)
class RunGroup:
    """Runs with the same settings.

    Attributes:
        name: To print.
        runs: Sorted by seed.
    """

    name: str
    runs: Sequence[RunRecord]

    @property
    def config(self) -> TrainConfig:
        """Settings of the first run."""
        return self.runs[0].config

    @cached_property
    def finished(self) -> list[RunRecord]:
        """The runs that have a result."""
        return [run for run in self.runs if run.summary is not None]


def grouped(runs: Iterable[RunRecord]) -> list[RunGroup]:
    """Put runs with equal settings together, in the order of the methods, then as they came.

    A group is named by its method, and where that is not enough by the settings in which the groups of this method
    differ; always by those that set its task, if there are several.
    """
    by_settings: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_settings.setdefault(repr(named_settings(run.config)), []).append(run)
    order = get_args(Method)
    groups = sorted(by_settings.values(), key=lambda group: order.index(group[0].config.method))
    names = _names([group[0].config for group in groups])
    return [
        RunGroup(name, sorted(group, key=lambda run: (run.config.seed, str(run.directory))))
        for name, group in zip(names, groups, strict=True)
    ]


def named_settings(config: TrainConfig) -> dict[str, Any]:
    """Return what tells one group from another."""
    return {"method": method_title(config)} | {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in UNNAMED
    }


def differing_settings(groups: Sequence[RunGroup]) -> dict[str, list[str]]:
    """Return the fields in which groups differ, each with its value in every group, as text."""
    rows = [named_settings(group.config) for group in groups]
    return {
        name: [str(row[name]) for row in rows]
        for name in (rows[0] if rows else {})
        if name != "method" and any(row[name] != rows[0][name] for row in rows)
    }


def common_settings(groups: Sequence[RunGroup]) -> Mapping[str, str]:
    """Return what is equal in all groups and decides the numbers."""
    differing = differing_settings(groups)
    rows = named_settings(groups[0].config) if groups else {}
    return {name: str(value) for name, value in rows.items() if name not in {"method", *differing}}


def planes_of(groups: Sequence[RunGroup]) -> dict[str, Landscape]:
    """Return the landscapes of planes by the name to print, those of the first run of each method first."""
    found = []
    for index, group in enumerate(groups):
        ranks: dict[str, int] = {}
        for run in group.runs:
            for landscape in run.landscapes.values():
                if landscape.y is not None:
                    rank = ranks[landscape.directions] = ranks.get(landscape.directions, -1) + 1
                    name = f"{group.name}, seed {run.config.seed}, {landscape.directions} directions"
                    found.append((rank, landscape.directions, index, name, landscape))
    return {name: landscape for *_, name, landscape in sorted(found, key=lambda each: each[:3])}


def _names(configs: Sequence[TrainConfig]) -> list[str]:
    rows = [named_settings(config) for config in configs]
    tasks = [name for name in TASK_FIELDS if len({repr(row[name]) for row in rows}) > 1]
    names = []
    for row in rows:
        same_method = [other for other in rows if other["method"] == row["method"]]
        telling = [name for name in row if name in tasks or any(other[name] != row[name] for other in same_method)]
        settings = " ".join(f"{name}={_plain(row[name])}" for name in telling)
        names.append(f"{row['method']} ({settings})" if settings else row["method"])
    return names


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
