"""The arguments that the commands which look at networks share, and the networks that they name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from flatmin.train.config import Accelerator, TrainConfig
from flatmin.train.errors import UsageError, check_threads
from flatmin.train.images import Split
from flatmin.train.launch import make_fabric
from flatmin.train.measured.factory import subject_of_factory
from flatmin.train.measured.subject import ImageChoice, Subject, subject_of_run

__all__ = ["SubjectArguments", "asked_subjects"]


@dataclass(frozen=True)
class SubjectArguments:
    """Which networks, and on which images."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Directories of runs; the newest checkpoint of each is looked at, with averaged weights where it kept them."""
    factory: str | None = None
    """MODULE:FUNCTION for a network of your own: the function returns (model, loss_fn, data)."""
    checkpoint: Path | None = None
    """File with the weights of that network; None keeps those that the function gave it."""
    split: Split = "train"
    """Images of the runs; training images come without augmentation, with the labels that training saw."""
    num_images: int | None = 1000
    """How many; None takes all. Every run on the same data gets the same ones."""
    batch_size: int = 256
    """Images in a batch: less needs less memory."""
    seed: int = 0
    """Seed of everything that is drawn."""
    accelerator: Accelerator = "auto"
    """Kind of device."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""
    data_dir: Path | None = None
    """Directory with the data sets; None is where the runs had them."""
    output_dir: Path | None = None
    """Where results of --factory and pictures of several networks go; None is beside the checkpoint or the runs."""


def asked_subjects(asked: SubjectArguments) -> list[Subject]:
    """Load the networks that the arguments name.

    Raises:
        UsageError: They name none, or both runs and a function, or the same run twice.
        TrainingError: A run or a checkpoint is missing or damaged.
    """
    check_threads(asked.threads)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    if not asked.batch_size >= 1:
        raise UsageError(f"batch_size must be >= 1, got {asked.batch_size}")
    choice = ImageChoice(asked.split, asked.num_images, asked.data_dir)
    if asked.factory is not None:
        if asked.runs:
            raise UsageError(f"give runs or --factory, not both: got {asked.runs[0]} and {asked.factory}")
        device = make_fabric(TrainConfig(accelerator=asked.accelerator)).device
        return [subject_of_factory(asked.factory, asked.checkpoint, asked.num_images, device, asked.output_dir)]
    if asked.checkpoint is not None:
        raise UsageError(f"checkpoint needs --factory, the function that builds its network, got {asked.checkpoint}")
    if not asked.runs:
        raise UsageError("runs must name at least one directory, got none")
    if len({path.resolve() for path in asked.runs}) < len(asked.runs):
        raise UsageError("runs must differ, got one twice")
    return [subject_of_run(path, choice, asked.accelerator) for path in asked.runs]
