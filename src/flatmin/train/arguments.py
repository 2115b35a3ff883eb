"""From the arguments of a command to a complete configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast, get_args

import tyro

from flatmin.arguments import check_choice
from flatmin.train.config import TrainConfig
from flatmin.train.config_file import load_config
from flatmin.train.errors import UsageError
from flatmin.train.methods import Method, canonical_options, option_types, options_class, resolved_options
from flatmin.train.recipes import find_recipe

__all__ = ["config_from_arguments"]

DEFAULT_RECIPE = "digits"


def config_from_arguments(arguments: Sequence[str], command: str = "train") -> TrainConfig:
    """Read ``[RECIPE] [--config FILE] [--method METHOD] [--FIELD VALUE ...] [--method.OPTION VALUE ...]``.

    The recipe, for the method asked for, or the file gives every field its default; the flags then change single
    fields. With ``--help`` prints those defaults and exits.

    Args:
        arguments: What follows the command.
        command: Its name, for the help text.

    Raises:
        UsageError: If there is no such recipe, method or file, or a value is outside its domain.
        SystemExit: With code 2, after a message, if a flag is not known or its value is of the wrong type.
    """
    rest = list(arguments)
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    parser = _OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--method")
    chosen, rest = parser.parse_known_args(rest)
    if chosen.method is not None:
        check_choice("method", chosen.method, get_args(Method), UsageError)
    try:
        if chosen.config is not None:
            if recipe is not None:
                raise UsageError(f"give a recipe or --config, not both: got {recipe} and {chosen.config}")
            default = load_config(chosen.config)
            description = f"Settings of {chosen.config}."
        else:
            recipe = recipe or DEFAULT_RECIPE
            default = find_recipe(recipe).config(chosen.method)
            description = recipe_help(recipe)
        prog = f"flatmin {command} {recipe or ''}".rstrip()
        return _parsed(default, chosen.method or default.method, rest, prog=prog, description=description)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def recipe_help(name: str) -> str:
    """Describe a recipe for the help text of a command."""
    recipe = find_recipe(name)
    return (
        f"{recipe.summary}\n\nReplicates: {recipe.replicates}\n\nExpects: {recipe.expects}\n\nCosts: {recipe.costs}\n\n"
        f"The defaults below are those of {name} with the method given; flatmin recipes lists the other recipes. "
        f"--config FILE takes them from a file such as RUN/config.yaml instead."
    )


def _parsed(default: TrainConfig, method: Method, arguments: list[str], *, prog: str, description: str) -> TrainConfig:
    """Read the flags: those of the fields, and ``--method.NAME`` for the options of ``method``.

    Raises:
        ValueError: A flag names an option that the method does not have.
    """
    Flags = make_dataclass(
        "Flags",
        [
            ("config", Annotated[TrainConfig, tyro.conf.arg(name="")]),
            ("options", Annotated[options_class(method), tyro.conf.arg(name="method")]),
        ],
    )
    _check_flags(method, arguments)
    kept = default.method_options if method == default.method else ()
    default = replace(default, method=method, method_options=kept)
    options = options_class(method)(**resolved_options(method, kept))
    flags: Any = tyro.cli(Flags, prog=prog, description=description, default=Flags(default, options), args=arguments)
    return replace(cast(TrainConfig, flags.config), method_options=vars(flags.options))


def _check_flags(method: Method, arguments: list[str]) -> None:
    """Refuse ``--method.NAME`` where the method has no such option; tyro would not say whose options there are."""
    for flag in arguments:
        name, _, value = flag.partition("=")
        name = name.removeprefix("--method.").removeprefix("no-").replace("-", "_")
        if flag.startswith("--method.") and name not in option_types(method):
            canonical_options(method, {name: value or flag})


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
