"""Every row of the table of the release's flags says something that works."""

import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from flatmin.train.arguments import config_from_arguments
from flatmin.train.config import TrainConfig
from flatmin.train.loop import train
from flatmin.train.models import build_model

PAGE = Path(__file__).parents[2] / "docs" / "from-the-release.md"

# `git grep DEFINE -- sam_jax` in the release.
RELEASED = """
dataset model_name num_epochs batch_size output_dir image_level_augmentations batch_level_augmentations
gradient_clipping learning_rate use_learning_rate_schedule weight_decay run_seed use_rmsprop lr_schedule
save_progress_seconds additional_checkpoints_at_epochs also_eval_on_training_set compute_top_5_error_rate
label_smoothing ema_decay no_weight_decay_on_bn evaluate_every sam_rho sync_perturbations inner_group_size cutout_length
use_test_set randaug_num_layers randaug_magnitude imagenet_mixup_alpha from_pretrained_checkpoint
efficientnet_checkpoint_path use_additional_skip_connections
""".split()


class Row(NamedTuple):
    release: str
    here: str
    remark: str

    @property
    def arguments(self) -> list[str] | None:
        """The flags in the second column; None where it has words instead."""
        code = re.fullmatch(r"`(.*)`", self.here)
        return shlex.split(code[1]) if code else None


def rows() -> list[Row]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    table = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines]
    return [row for row in table if row.release != "release"]


WORKING = [row for row in rows() if row.arguments is not None]


def without_device_needs(config: TrainConfig) -> TrainConfig:
    return replace(config, accelerator="cpu", threads=1, max_eval_batches=1)


def test_every_flag_of_the_release_has_a_row() -> None:
    named = {match[1] for row in rows() if (match := re.match(r"`--(\w+)", row.release))}
    assert named == set(RELEASED)
    assert all(row.arguments for row in rows())
    assert len(WORKING) > 40


def given(arguments: list[str]) -> dict[str, list[str]]:
    """The values of each flag."""
    values: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            values[argument.removeprefix("--").replace("-", "_")] = name_values = []
        else:
            name_values.append(argument)
    return values


def test_the_reader_of_flags_reads_them() -> None:
    assert given(["--a-b", "1", "2", "--c"]) == {"a_b": ["1", "2"], "c": []}


@pytest.mark.parametrize("row", WORKING, ids=lambda row: row.release.strip("`-"))
def test_row_sets_what_it_names(row: Row) -> None:
    assert row.arguments is not None
    config = config_from_arguments(["cifar10", *row.arguments])
    for name, texts in given(row.arguments).items():
        value = getattr(config, name.removeprefix("no_"))
        if isinstance(value, bool):
            assert value is not name.startswith("no_")
        elif isinstance(value, float | int):
            assert [value] == [float(text) for text in texts]
        else:
            assert [str(item) for item in (value if isinstance(value, tuple) else (value,))] == texts


@pytest.mark.parametrize(
    "row", [row for row in WORKING if row.here.startswith("`--model ")], ids=lambda row: row.release.strip("`-")
)
def test_models_of_the_table_can_be_built(row: Row) -> None:
    config = config_from_arguments(row.arguments or [])
    with torch.device("meta"):
        model = build_model(config.model, 10, 3, config.model_options, image_size=32)
    assert sum(param.numel() for param in model.parameters()) > 1000


@pytest.mark.parametrize(
    "row",
    [row for row in WORKING if not re.match(r"`--(model|dataset|pretrained|weights)", row.here)],
    ids=lambda row: row.release.strip("`-"),
)
def test_what_a_row_says_trains(row: Row) -> None:
    config = without_device_needs(config_from_arguments(row.arguments or []))
    if config.devices == "1":
        assert train(replace(config, dry_run=True)).steps == 2
    else:  # starts the other processes with the command that started this one
        assert "after 2 steps" in output_of("train", *(row.arguments or []), "--dry-run")


def output_of(*arguments: str) -> str:
    """What ``flatmin`` prints on the CPU."""
    command = [sys.executable, "-m", "flatmin", *arguments, "--accelerator", "cpu", "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
