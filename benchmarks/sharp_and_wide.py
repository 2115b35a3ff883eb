"""Is the minimum that SAM finds wider than the one of plain SGD?

Trains both on digits of whose training labels 40 % are wrong, measures both, and draws the two pictures of the first
figure of Foret et al. (2021) from our own networks: the loss around the sharp minimum next to that around the wide
one, on the same axes and scale. Beside them the spectra of the Hessian, and the way that training took.

    python benchmarks/sharp_and_wide.py

It goes on where it was interrupted. Everything but the pictures and the table of results stays in the working directory
``--work``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from PIL import Image
from rich.console import Console

from flatmin.train.atomic_file import atomic_write
from flatmin.train.cli import run_command
from flatmin.train.config import Accelerator, Method
from flatmin.train.environment import software_versions
from flatmin.train.loop import train
from flatmin.train.measured.table import rows_of
from flatmin.train.methods import METHOD_NAMES
from flatmin.train.recipes import recipe_config
from flatmin.train.summary import Summary

ROOT = Path(__file__).parents[1]
METHODS: tuple[Method, ...] = ("sgd", "sam")
NUM_IMAGES = 500  # of the pictures; the measures take the command's 1000
MARK = "<!-- sharp-and-wide -->"
KEPT_EPOCHS = (0, 1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 30, 35)

PICTURES = {
    "landscape-plane-random-surface.png": "sharp-and-wide.png",
    "landscape-plane-random-contour.png": "sharp-and-wide-contours.png",
    "landscape-plane-trajectory-contour.png": "trajectories.png",
    "spectrum.png": "spectra.png",
}


@dataclass(frozen=True)
class Arguments:
    """Train SGD and SAM on digits with wrong labels, measure both, and draw what the loss around them looks like."""

    seed: int = 0
    """Of both runs."""
    points: int = 25
    """Positions along each direction of the pictures."""
    work: Path = Path("runs/sharp-and-wide")
    """Directory of the runs."""
    pictures: Path = ROOT / "docs" / "pictures"
    """Where the pictures go."""
    out: Path = ROOT / "benchmarks" / "results" / "sharp_and_wide.json"
    """Where the measures go."""
    page: Path = ROOT / "docs" / "sharpness.md"
    """Where the table goes."""
    accelerator: Accelerator = "cpu"
    """Kind of device."""


def main() -> None:
    """Train, measure, draw."""
    asked = tyro.cli(Arguments)
    console = Console()
    runs = [asked.work / method for method in METHODS]
    summaries = [trained(method, run, asked, console) for method, run in zip(METHODS, runs, strict=True)]
    names, flags = [str(run) for run in runs], [f"--accelerator={asked.accelerator}"]
    if not (asked.work / "spectrum.png").exists():  # the last that the command writes
        run_command("sharpness", *names, *flags)
    for directions in ("random", "trajectory"):
        look = [f"--directions={directions}", f"--points={asked.points}", f"--num-images={NUM_IMAGES}"]
        run_command("landscape", *names, *flags, *look)
    asked.pictures.mkdir(parents=True, exist_ok=True)
    for drawn, name in PICTURES.items():
        with Image.open(asked.work / drawn) as picture:  # 256 colours are enough, and a third of the bytes
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(asked.pictures / name, optimize=True)
    found = results(asked, runs, summaries)
    atomic_write(asked.out, json.dumps(found, indent=1) + "\n")
    write_table(asked.page, found["networks"])
    console.print(f"pictures in {asked.pictures}, measures in {asked.out}", soft_wrap=True)


def trained(method: Method, run: Path, asked: Arguments, console: Console) -> Summary:
    """Train with the recipe's settings, unless that was done before."""
    config = recipe_config("digits", method)
    config = replace(config, seed=asked.seed, output_dir=run, keep_epochs=KEPT_EPOCHS, accelerator=asked.accelerator)
    return train(config, console)


def results(asked: Arguments, runs: list[Path], summaries: list[Summary]) -> dict[str, Any]:
    """Every measure but the density, which is in the picture, with what is needed to repeat it."""
    networks = {}
    for run, summary in zip(runs, summaries, strict=True):
        measured = json.loads((run / "sharpness.json").read_text())
        kept = [each for each in measured["measures"] if each["measure"] != "spectral_density"]
        planes = json.loads((run / "landscape-plane-random.json").read_text())
        networks[summary.method] = {
            "test_error_percent": summary.eval_error_percent,
            "highest_loss_on_plane": max(max(row) for row in planes["loss"]),
            "measures": kept,
        }
    return {
        "command": f"python benchmarks/sharp_and_wide.py --seed {asked.seed} --points {asked.points}",
        "versions": software_versions(),
        "seed": asked.seed,
        "networks": networks,
    }


def write_table(page: Path, networks: Mapping[str, Any]) -> None:
    """Put the measures, a column per network, between the marks of the page."""
    titles = [METHOD_NAMES[method] for method in networks]
    columns = [dict(row for each in found["measures"] for row in rows_of(each)) for found in networks.values()]
    errors = [f"{found['test_error_percent']:.2f} %" for found in networks.values()]
    rows = [["test error", *errors], *([label, *(column[label] for column in columns)] for label in columns[0])]
    lines = [f"| {' | '.join(row)} |" for row in (["", *titles], ["---"] * (1 + len(titles)), *rows)]
    text = page.read_text()
    start, end = text.index(MARK) + len(MARK), text.index("<!-- end -->", text.index(MARK))
    atomic_write(page, text[:start] + "\n" + "\n".join(lines) + "\n" + text[end:])


if __name__ == "__main__":
    main()
