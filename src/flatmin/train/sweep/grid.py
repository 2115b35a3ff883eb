"""From ``--grid FIELD=VALUE,VALUE`` to configurations, everything checked before anything starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, get_args, get_type_hints

import yaml

from flatmin.arguments import check_choice
from flatmin.train.config import Method, TrainConfig
from flatmin.train.config_difference import NEUTRAL_FIELDS
from flatmin.train.config_file import typed_value
from flatmin.train.errors import UsageError
from flatmin.train.methods import METHODS, option_types, reads_field

__all__ = ["Grid", "grid_points", "parsed_grid"]

Grid = Mapping[str, Sequence[Any]]

OPTION_TYPES = {f"method.{name}": hint for method in METHODS for name, hint in option_types(method).items()}

OWN_FIELDS = {
    "seed": "use --seeds and --search-seeds",
    "eval_on": "a sweep chooses on the validation split and reports on the test set",
    "recipe": "give it as the first argument",
    "method_options": "give one option, such as method.alpha=0.1,0.2",
    **dict.fromkeys(("devices", "num_nodes", "strategy"), "every run has one device"),
    **dict.fromkeys(NEUTRAL_FIELDS, "it leaves the numbers of a run as they are"),
}


def parsed_grid(items: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read ``FIELD=VALUE,VALUE,...`` items into the values of each field, with the type that the field declares.

    Raises:
        UsageError: If a field is unknown, set by the sweep itself or given twice, or if a value is missing, of another
            type or given twice.
    """
    hints = get_type_hints(TrainConfig) | OPTION_TYPES
    grid: dict[str, tuple[Any, ...]] = {}
    for item in items:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not text:
            raise UsageError(f"grid must look like rho=0.05,0.1, got {item}")
        check_field(name, hints)
        if name in grid:
            raise UsageError(f"grid must name each field once, got {name} twice")
        values = [_read_value(name, value, hints[name]) for value in text.split(",")]
        repeated = [value for index, value in enumerate(values) if value in values[:index]]
        if repeated:
            raise UsageError(f"grid {name} must have different values, got {repeated[0]} twice")
        grid[name] = tuple(values)
    return grid


def check_field(name: str, known: Mapping[str, Any]) -> None:
    """Make sure that ``name`` is a field that a sweep can vary.

    Raises:
        UsageError: If it is not.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"grid must name fields that flatmin train --help lists, got {name}{hint}")
    if name in OWN_FIELDS:
        raise UsageError(f"grid must leave out {name}: {OWN_FIELDS[name]}")


def grid_points(grid: Grid, bases: Mapping[Method, TrainConfig]) -> list[TrainConfig]:
    """Return the different points of the grid, each a checked configuration.

    A method takes the values of ``bases`` for fields that it does not read, so that plain SGD is one point however many
    radii there are, and leaves out options that it does not have.

    Args:
        grid: Values of each field.
        bases: For each method of the grid, the configuration that the values are put into.

    Raises:
        UsageError: If a point is outside the domain of its configuration; the message names point, rule and value.
    """
    axes = {name: values for name, values in grid.items() if name != "method"}
    for name in axes:
        if name in OPTION_TYPES and not any(reads_field(method, name) for method in bases):
            raise UsageError(f"grid {name} must be an option of a method of the grid, {', '.join(bases)}")
    points: dict[TrainConfig, None] = {}
    for method, base in bases.items():
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            try:
                config = with_values(base, point)
            except ValueError as error:
                place = ", ".join(f"{name}={value}" for name, value in {"method": method, **point}.items())
                raise UsageError(f"grid point {place}: {error}") from error
            unread = {n: getattr(base, n) for n in axes if n not in OPTION_TYPES and not reads_field(method, n)}
            points[replace(config, **unread)] = None
    return list(points)


def with_values(base: TrainConfig, point: Mapping[str, Any]) -> TrainConfig:
    """Put the values of a point into a configuration; options that its method does not have are left out."""
    fields = {name: value for name, value in point.items() if name not in OPTION_TYPES}
    options = {
        name.removeprefix("method."): value
        for name, value in point.items()
        if name in OPTION_TYPES and reads_field(base.method, name)
    }
    return replace(base, **fields, method_options=tuple({**dict(base.method_options), **options}.items()))


def _read_value(name: str, text: str, hint: Any) -> Any:
    try:
        value = typed_value(name, yaml.safe_load(text), hint)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"grid {name}: {error}") from error
    if name == "method":
        check_choice("grid method", value, get_args(Method), UsageError)
    return value
