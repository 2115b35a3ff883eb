"""A training configuration as a YAML file."""

from __future__ import annotations

import types
from dataclasses import asdict
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError, one_line
from flatmin.train.methods import METHODS, option_types, resolved_options

__all__ = ["config_to_yaml", "load_config", "load_run_config", "typed_options", "typed_value"]


def config_to_yaml(config: TrainConfig) -> str:
    """Write every field of ``config``, one a line, in the order of the dataclass; options with their defaults too."""
    options = resolved_options(config.method, config.method_options)
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    values = {**asdict(config), "method_options": lists}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=10**6)


def load_run_config(path: Path) -> TrainConfig:
    """Read the configuration that a run has saved.

    Raises:
        TrainingError: If it is damaged, or another version of the package wrote fields that this one does not know.
    """
    try:
        return load_config(path)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def load_config(path: Path) -> TrainConfig:
    """Read a configuration; fields that the file leaves out keep their defaults.

    Args:
        path: A file such as the ``config.yaml`` of a run.

    Raises:
        ValueError: If the file is not a mapping of known fields to values in their domain.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must map field names to values, got {type(values).__name__}")
    hints = get_type_hints(TrainConfig)
    unknown = [str(name) for name in values if name not in hints]
    if unknown:
        raise ValueError(f"{path} has unknown fields: {', '.join(unknown)}")
    try:
        typed = {
            name: typed_value(name, each, hints[name]) for name, each in values.items() if name != "method_options"
        }
        options = typed_options(typed.get("method", TrainConfig.method), values.get("method_options") or {})
        return TrainConfig(**typed, method_options=options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def typed_options(method: object, options: Any) -> tuple[tuple[str, Any], ...]:
    """Give options the types that their method declares; an unknown method or option is left to the dataclass.

    Raises:
        ValueError: If there is no mapping, or a value has another type.
    """
    if not isinstance(options, dict):
        raise ValueError(f"method_options must map names to values, got {options!r}")
    hints = option_types(method) if isinstance(method, str) and method in METHODS else {}
    return tuple(
        (name, typed_value(f"method.{name}", value, hints[name]) if name in hints else value)
        for name, value in options.items()
    )


def typed_value(name: str, value: Any, hint: Any) -> Any:
    """Give ``value`` the type that the field ``name`` declares: YAML reads 1 as an int and 1e-3 as a string.

    Raises:
        ValueError: If it has another type.
    """
    if get_origin(hint) in {Union, types.UnionType}:
        if value is None:
            return None
        kinds = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(kinds) > 1:  # a number or one of several strings, which the dataclass checks
            return value
        hint = kinds[0]
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, got {value!r}")
        return tuple(typed_value(name, item, get_args(hint)[0]) for item in value)
    if hint not in {int, float, bool, str, Path}:  # one of several strings, which the dataclass checks
        return value
    try:
        converted = hint(value)
    except (TypeError, ValueError):
        converted = None
    if value is None or converted is None or isinstance(value, bool) != (hint is bool) or not _same(converted, value):
        raise ValueError(f"{name} must be of type {hint.__name__}, got {value!r}")
    return converted


def _same(converted: Any, value: Any) -> bool:
    """Whether nothing got lost: 1.5 is not an int, and a list is not a string."""
    return converted == value if isinstance(converted, int) else isinstance(value, str | int | float)
