"""What is measured: a trained network, the images at which its loss is looked at, and where results go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from flatmin.train.comparison import method_title
from flatmin.train.config import Accelerator, TrainConfig
from flatmin.train.data import EvalLoader
from flatmin.train.errors import UsageError
from flatmin.train.facts import facts_of, is_file_set
from flatmin.train.images import Split, images_of_split, read_images, sample_of
from flatmin.train.launch import make_fabric, on_one_device
from flatmin.train.loaders import image_source
from flatmin.train.trained import load_run

__all__ = ["ImageChoice", "Subject", "directory_of_all", "distinct_names", "subject_of_run"]

DESCRIBED = ("recipe", "method", "rho", "seed", "dataset", "model", "label_noise", "epochs", "batch_size")
READ_AT_ONCE = 512


@dataclass(frozen=True)
class ImageChoice:
    """Which images a network is looked at with.

    Attributes:
        split: Their split; training images come without augmentation and with the labels that training saw.
        num_images: How many, drawn once: the same for every run on the same data; None takes all.
        data_dir: Directory with the data sets; None is where the run had them.
    """

    split: Split = "train"
    num_images: int | None = 1000
    data_dir: Path | None = None

    def __post_init__(self) -> None:
        """Check the number.

        Raises:
            UsageError: It is not positive.
        """
        if self.num_images is not None and not self.num_images >= 1:
            raise UsageError(f"num_images must be >= 1, got {self.num_images}")


@dataclass(frozen=True, eq=False)
class Subject:
    """A network to be measured.

    Attributes:
        name: Its name in tables and pictures.
        directory: Where results go.
        run: What it is: the configuration of its run, in part.
        checkpoint: ``step`` and ``epoch`` that its weights are of.
        weights: ``"ema"`` for averaged weights, else ``"model"``.
        model: The network on its device, in float32 or float64.
        loss_fn: Its loss, as measures take it.
        batches: Gives the data in batches of about so many examples.
        split: Which data they are.
        num_images: How many examples.
        largest_m: The most examples that fit in one batch.
        config: Of its run; None for a network that flatmin did not train.
    """

    name: str
    directory: Path
    run: Mapping[str, Any]
    checkpoint: Mapping[str, Any]
    weights: str
    model: nn.Module
    loss_fn: Callable[..., Tensor]
    batches: Callable[[int], Iterable[Any]]
    split: str
    num_images: int
    largest_m: int
    config: TrainConfig | None = None


def subject_of_run(run_dir: Path, choice: ImageChoice, accelerator: Accelerator = "auto") -> Subject:
    """Load the network that a run evaluates, from its newest checkpoint, and its images.

    The loss is the mean cross-entropy, without label smoothing and weight decay.

    Args:
        run_dir: Directory of the run.
        choice: Which images.
        accelerator: Kind of device.

    Raises:
        TrainingError: There is no run, or no checkpoint of it, or it has no such split.
    """
    config, model, step = load_run(run_dir)
    data_dir = choice.data_dir or config.data_dir
    local = on_one_device(config, accelerator=accelerator, threads=None, data_dir=data_dir)
    fabric = make_fabric(local)
    images, labels, num_train = read_split(local, fabric, choice)
    # In half precision small steps round away.
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    images = images.to(dtype)

    def batches(size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))

    return Subject(
        name=method_title(config),
        directory=run_dir,
        run={name: getattr(config, name) for name in DESCRIBED} | {"method_options": dict(config.method_options)},
        checkpoint={"step": step, "epoch": step / (num_train // config.batch_size)},
        weights="ema" if config.ema_decay > 0.0 else "model",
        model=model.to(fabric.device, dtype),
        loss_fn=nn.functional.cross_entropy,
        batches=batches,
        split=choice.split,
        num_images=len(labels),
        largest_m=len(labels),
        config=config,
    )


def distinct_names(subjects: Sequence[Subject]) -> list[str]:
    """The name of each network, with its directory, from the one that holds all, where several have the same."""
    names = [subject.name for subject in subjects]
    if len(set(names)) == len(names):
        return names
    places = [subject.directory.resolve().relative_to(directory_of_all(subjects)) for subject in subjects]
    return [f"{name} ({place})" if names.count(name) > 1 else name for name, place in zip(names, places, strict=True)]


def directory_of_all(subjects: Sequence[Subject]) -> Path:
    """Where what shows all networks goes: the directory of the only one, or the innermost that holds all of theirs."""
    if len(subjects) == 1:
        return subjects[0].directory
    return Path(os.path.commonpath([subject.directory.resolve() for subject in subjects]))


def read_split(config: TrainConfig, fabric: Fabric, choice: ImageChoice) -> tuple[Tensor, Tensor, int]:
    """Images as the network takes them and their labels, on the device; and how many images the run trained on."""
    image_set = read_images(config)
    images, labels = images_of_split(config, image_set, choice.split)
    num_train = len(images_of_split(config, image_set, "train")[1])
    if choice.num_images is not None:
        images, labels = sample_of(images, labels, choice.num_images)
    loader = EvalLoader(
        image_source(config, fabric, images, random_crop=False),
        labels.to(fabric.device),
        batch_size=READ_AT_ONCE,
        normalization=facts_of(config).normalization,
        resize_to=None if is_file_set(config) else config.image_size,
    )
    parts = list(loader)
    return torch.cat([part for part, _ in parts]), torch.cat([part for _, part in parts]), num_train
