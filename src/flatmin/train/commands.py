"""The commands ``train``, ``evaluate`` and ``recipes``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from lightning_fabric.utilities.rank_zero import rank_zero_only
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatmin.train.arguments import config_from_arguments
from flatmin.train.config import Accelerator, Method
from flatmin.train.config_file import config_to_yaml
from flatmin.train.errors import UsageError, check_threads
from flatmin.train.evaluate import evaluate
from flatmin.train.images import Split, read_images
from flatmin.train.launch import make_fabric, on_one_device
from flatmin.train.loaders import eval_loader
from flatmin.train.loop import train
from flatmin.train.recipes import RECIPES, Recipe, find_recipe
from flatmin.train.trained import load_run

__all__ = ["EvaluateArguments", "RecipesArguments", "evaluate_command", "recipes_command", "train_command"]


def train_command(arguments: list[str]) -> None:
    """``flatmin train [RECIPE] [--FIELD VALUE ...]``: print the configuration, train, print the result."""
    config = config_from_arguments(arguments)
    console = Console(quiet=getattr(rank_zero_only, "rank", 0) > 0)  # of several processes one talks
    lines = [Text(line) for line in config_to_yaml(config).splitlines()]  # of a str, [words] would be markup
    console.print(Columns(lines, column_first=True, padding=(0, 3)), highlight=False)
    summary = train(config, console)
    rise = "" if summary.loss_rise is None else f", loss rise {summary.loss_rise:.3f}"
    console.print(
        f"{summary.eval_on} error {summary.eval_error_percent:.2f} %{rise} "
        f"after {summary.steps} steps in {summary.wall_seconds:.0f} s",
        highlight=False,
    )
    if not config.dry_run:
        console.print(f"results in {summary.run_dir}", highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class EvaluateArguments:
    """Print the loss and error of a trained network."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    split: Split = "test"
    """Images to evaluate on; the training labels are the noisy ones, as trained on."""
    accelerator: Accelerator = "auto"
    """Kind of device."""
    data_dir: Path | None = None
    """Directory with the data sets; None is where the run had them."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""


def evaluate_command(arguments: list[str]) -> None:
    """``flatmin evaluate RUN [--split SPLIT]``: load the newest checkpoint and print a table."""
    asked = tyro.cli(EvaluateArguments, prog="flatmin evaluate", args=arguments)
    check_threads(asked.threads)
    config, model, step = load_run(asked.run)
    config = replace(config, data_dir=asked.data_dir or config.data_dir)
    fabric = make_fabric(on_one_device(config, accelerator=asked.accelerator, threads=asked.threads))
    batches = eval_loader(config, fabric, read_images(config), asked.split)
    evaluation = evaluate(fabric, fabric.setup_module(model), batches)
    table = Table("split", "images", "loss", "error", "top-5 error", title=f"{asked.run} after {step} steps")
    errors = (f"{percent:.2f} %" for percent in (evaluation.error_percent, evaluation.top5_error_percent))
    table.add_row(asked.split, str(evaluation.num_images), f"{evaluation.loss:.4f}", *errors)
    Console().print(table)


@dataclass(frozen=True)
class RecipesArguments:
    """List the recipes: what each replicates, the result to expect, and its cost; or show one with its settings."""

    name: tyro.conf.Positional[str | None] = None
    """Recipe to show."""
    method: Method | None = None
    """Method whose settings to show; None is the recipe's own."""


def recipes_command(arguments: list[str]) -> None:
    """``flatmin recipes [NAME]``: print a table of all recipes, or one with its settings."""
    asked = tyro.cli(RecipesArguments, prog="flatmin recipes", args=arguments)
    console = Console()
    if asked.name is None:
        table = Table("recipe", "replicates", "expected result", "cost", show_lines=True)
        for recipe in RECIPES.values():
            table.add_row(recipe.name, recipe.replicates, recipe.expects, recipe.costs)
        console.print(table)
        return
    try:
        recipe = find_recipe(asked.name)
        settings = config_to_yaml(recipe.config(asked.method))
    except ValueError as error:
        raise UsageError(str(error)) from error
    console.print(recipe_text(recipe), highlight=False, markup=False)
    console.print(settings, highlight=False, markup=False, soft_wrap=True)


def recipe_text(recipe: Recipe) -> str:
    """Everything that is known of a recipe but its settings, a paragraph for each part."""
    commands = recipe.commands or (f"flatmin train {recipe.name}",)
    parts = {
        "Replicates": recipe.replicates,
        "Expects": recipe.expects,
        "Costs": recipe.costs,
        "Remark": recipe.remark,
        "Commands": "".join(f"\n  {command}" for command in commands),
    }
    return "\n".join([f"{recipe.name}: {recipe.summary}", *(f"{name}: {text}" for name, text in parts.items() if text)])
