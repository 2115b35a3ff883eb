"""The command ``flatmin``: a table of subcommands, each imported when it is used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from flatmin import __version__
from flatmin.arguments import check_choice
from flatmin.train.errors import TrainingError, UsageError

__all__ = ["COMMANDS", "main"]

# Command: what it does, and the function that does it, which is called with the list of the arguments that follow.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("Train a network by a recipe, or go on with an interrupted run.", "flatmin.train.commands:train_command"),
    "compare": ("Train with several methods from the same start, and report.", "flatmin.train.compare:compare_command"),
    "sweep": (
        "Choose settings on a grid, compare over seeds, on a cluster.",
        "flatmin.train.sweep.command:sweep_command",
    ),
    "evaluate": ("Print the loss and error of a trained network.", "flatmin.train.commands:evaluate_command"),
    "sharpness": (
        "Measure how sharp the minima of trained networks are.",
        "flatmin.train.measured.sharpness_command:sharpness_command",
    ),
    "landscape": (
        "Look at the loss around trained networks, and draw it.",
        "flatmin.train.measured.landscape_command:landscape_command",
    ),
    "report": (
        "Write one page about runs: results, curves, sharpness, landscapes.",
        "flatmin.train.report.command:report_command",
    ),
    "export": ("Write the weights of a run as a plain file.", "flatmin.train.export:export_command"),
    "relabel": ("Label training images by what a network says of them.", "flatmin.train.relabel:relabel_command"),
    "recipes": ("List the recipes: what each replicates and costs.", "flatmin.train.commands:recipes_command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 if it failed, 2 if the arguments are wrong.

    Errors that the user can act on, such as a missing data set, end in one line and no traceback.

    Args:
        argv: Arguments of ``flatmin``; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"flatmin {__version__}")
        return 0
    try:
        run_command(*arguments)
    except UsageError as error:
        return failed(str(error), code=2)
    except (TrainingError, OSError) as error:
        return failed(str(error), code=1)
    except KeyboardInterrupt:
        return failed("interrupted; the same command goes on from the last checkpoint", code=130)
    return 0


def run_command(name: str, *arguments: str) -> None:
    """Import the function of command ``name`` and call it.

    Raises:
        UsageError: If there is no such command, or it does not know an argument.
        TrainingError: If it cannot do its work.
    """
    check_choice("command", name, COMMANDS, UsageError)
    module, function = COMMANDS[name][1].split(":")
    try:
        command = getattr(import_module(module), function)
        command(list(arguments))  # it may import more on its way
    except ModuleNotFoundError as error:
        if (error.name or "flatmin").startswith("flatmin"):
            raise
        raise TrainingError(f"{name} needs the package {error.name}: pip install 'flatmin[train]'") from error


def failed(message: str, code: int) -> int:
    """Print ``message`` as an error and return ``code``."""
    print(f"flatmin: error: {message}", file=sys.stderr)
    return code


def usage() -> str:
    """Return the help of ``flatmin`` itself."""
    lines = [f"  {name:11}{summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: flatmin COMMAND [ARGUMENTS]",
            "",
            "Sharpness-Aware Minimization: train, compare, sweep, evaluate and report.",
            "",
            "commands:",
            *lines,
            "",
            "flatmin COMMAND --help explains a command; flatmin --version prints the version.",
        ]
    )
