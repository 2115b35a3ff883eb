"""Bootstrap labels: what a trained network says of the images that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor, nn

from flatmin.train.config import Accelerator, TrainConfig
from flatmin.train.data import EvalLoader
from flatmin.train.images import read_images
from flatmin.train.label_file import write_labels
from flatmin.train.launch import forward, make_fabric, on_one_device
from flatmin.train.loaders import eval_loader
from flatmin.train.trained import load_run

__all__ = ["RelabelArguments", "predicted_labels", "relabel_command", "relabelled"]


@dataclass(frozen=True)
class RelabelArguments:
    """Write what a trained network says of its training images, as labels for another run (--train-labels)."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    out: Path | None = None
    """File to write; None is train-labels.safetensors in that directory."""
    accelerator: Accelerator = "auto"
    """Kind of device."""
    data_dir: Path | None = None
    """Directory with the data sets; None is where the run had them."""


def relabel_command(arguments: list[str]) -> None:
    """``flatmin relabel RUN``: write the file and print how many labels changed."""
    asked = tyro.cli(RelabelArguments, prog="flatmin relabel", args=arguments)
    path = asked.out or asked.run / "train-labels.safetensors"
    config = load_run(asked.run).config
    config = replace(config, data_dir=asked.data_dir or config.data_dir, accelerator=asked.accelerator)
    labels, before = relabelled(asked.run, config)
    write_labels(path, config, labels)
    print(f"{(labels != before).sum().item()} of {len(labels)} labels changed; train on {path} with --train-labels")


def relabelled(run_dir: Path, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Return the labels that the network of a run gives to its training images, and those it was trained with.

    The images are not augmented. ``Bootstrap`` of the SAM paper trains another network, from scratch, on the former.

    Args:
        run_dir: Directory of the run.
        config: Its configuration, with the accelerator and the data directory of here.

    Returns:
        Two int64 tensors (N,), on the CPU, in the order of the run's training images.

    References:
        Foret et al. (2021), arXiv:2010.01412, section 3.3 and Table 4.
    """
    fabric = make_fabric(on_one_device(config))
    model = fabric.setup_module(load_run(run_dir).model)
    loader = eval_loader(config, fabric, read_images(config), "train")
    return predicted_labels(fabric, model, loader), loader.labels.cpu()


@torch.no_grad()
def predicted_labels(fabric: Fabric, model: nn.Module, batches: EvalLoader) -> Tensor:
    """Most likely class of every image of ``batches``, int64 (N,), on the CPU; ``model`` is in evaluation mode."""
    return torch.cat([forward(fabric, model, images).argmax(dim=1) for images, _ in batches]).cpu()
