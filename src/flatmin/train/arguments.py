"""From the arguments of a command to a complete configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

import tyro

from flatmin.train.config import Method, TrainConfig
from flatmin.train.config_file import load_config
from flatmin.train.errors import UsageError
from flatmin.train.recipes import RECIPES, recipe_card, recipe_config

__all__ = ["config_from_arguments"]

DEFAULT_RECIPE = "digits"


def config_from_arguments(arguments: Sequence[str], command: str = "train") -> TrainConfig:
    """Read ``[RECIPE] [--config FILE] [--method METHOD] [--FIELD VALUE ...]``.

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
    if chosen.method is not None and chosen.method not in get_args(Method):
        raise UsageError(f"method must be one of {', '.join(get_args(Method))}, got {chosen.method}")
    try:
        if chosen.config is not None:
            if recipe is not None:
                raise UsageError(f"give a recipe or --config, not both: got {recipe} and {chosen.config}")
            default = load_config(chosen.config)
            description = f"Settings of {chosen.config}."
            rest += [] if chosen.method is None else ["--method", chosen.method]
        else:
            recipe = recipe or DEFAULT_RECIPE
            default = recipe_config(recipe, chosen.method or "sam")
            description = recipe_help(recipe)
        prog = f"flatmin {command} {recipe or ''}".rstrip()
        return tyro.cli(TrainConfig, prog=prog, description=description, default=default, args=rest)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def recipe_help(recipe: str) -> str:
    """Describe ``recipe`` for the help text of a command."""
    card = recipe_card(recipe)
    others = ", ".join(name for name in RECIPES if name != recipe)
    return (
        f"{card.summary}\n\nReplicates: {card.replicates}\n\nExpects: {card.expects}\n\nCosts: {card.costs}\n\n"
        f"Other recipes: {others}. The defaults below are those of {recipe} with the method given. "
        f"--config FILE takes them from a file such as RUN/config.yaml instead."
    )


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
