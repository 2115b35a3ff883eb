"""Does m-sharpness tell which network generalises, and does it tell better as m falls?

The experiment of Foret et al. (2021), section 4.1 and Figure 3 (right), in small: a set of networks that differ in
architecture, learning rate, batch size, weight decay and method, with several seeds each; of every one the
generalisation gap, m-sharpness for m from 4 to 256, and the five largest eigenvalues of the Hessian of the training
loss. Beside it the recipe's own SGD and SAM networks. ``results_page.py`` makes the tables and pictures.

    python benchmarks/m_sharpness.py --task digits
    python benchmarks/m_sharpness.py --task fashion-mnist

Sharpness is that of the mean cross-entropy of 1024 training images, with the labels that training saw, in evaluation
mode: were batch norm to use the statistics of its batch, each m would have a loss of its own. The gap is the error
under the distribution that the training labels come from, minus the training error: with symmetric label noise the test
error is that with noisy test labels, in expectation.

An interrupted run goes on where it stopped, and more ``--seeds`` add what is missing.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from flatmin.sharpness import WorstCase, hessian_eigenvalues, worst_case
from flatmin.train.atomic_file import atomic_write
from flatmin.train.checkpoint import checkpoint_paths
from flatmin.train.config import Method, TrainConfig
from flatmin.train.data import ImageSet, load_images
from flatmin.train.data.image_file import write_image_file
from flatmin.train.environment import software_versions
from flatmin.train.images import read_images
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import training_sample
from flatmin.train.loop import train
from flatmin.train.recipes import recipe_config
from flatmin.train.summary import Summary
from flatmin.train.trained import load_run
from flatmin.train.trials import num_cores, run_trials

ROOT = Path(__file__).parents[1]

NUM_IMAGES = 1024
METHODS: tuple[Method, ...] = ("sgd", "sam")
MODELS = ("small-cnn", "wrn-10-1")
MS = (4, 16, 64, 256)
RHO, ADAPTIVE_RHO = 0.05, 0.5
TOLERANCE = 1e-2  # of an eigenvalue's residual; the eigenvalue itself is nearer by far
NUM_FASHION_IMAGES = 3000
NUM_AT_ONCE = 6


@dataclass(frozen=True)
class Arguments:
    """Train the networks of one task, measure them, and write every number."""

    task: Literal["digits", "fashion-mnist"] = "digits"
    """Recipe; of Fashion-MNIST the first 3000 training images."""
    seeds: int = 2
    """Networks with each setting."""
    method_seeds: int = 5
    """Networks of the recipe with SGD and with SAM."""
    workers: int = num_cores()
    """Runs at a time."""
    runs: Path = Path("runs/m-sharpness")
    """Directory of the runs."""
    data_dir: Path = Path("data")
    """Directory with the data sets."""
    results: Path = field(default=ROOT / "benchmarks" / "results")
    """Where the numbers go."""


def main() -> None:
    """Train, measure and write, after each few networks what there is by then."""
    own = tyro.cli(Arguments)
    console = Console()
    base = task_config(own)
    methods = [placed(own, recipe_methods(base, method), s) for s in range(own.method_seeds) for method in METHODS]
    networks = [
        placed(own, config, seed)
        for seed, model in product(range(own.seeds), MODELS)
        for config in in_random_order(settings(own, base, model))
    ]
    found: dict[str, list[dict[str, Any]]] = {"methods": [], "networks": []}
    found["methods"] = run_trials(measured_network, methods, own.workers, console)
    for first in range(0, len(networks), NUM_AT_ONCE):
        write(own, base, found, len(networks))
        found["networks"] += run_trials(measured_network, networks[first : first + NUM_AT_ONCE], own.workers, console)
    write(own, base, found, len(networks))


def in_random_order(configs: Iterable[TrainConfig]) -> list[TrainConfig]:
    """A fixed random order, so that an unfinished set is a fair part of the whole."""
    ordered = list(configs)
    random.Random(0).shuffle(ordered)
    return ordered


def task_config(own: Arguments) -> TrainConfig:
    """What all networks of the task share."""
    recipe = recipe_config(own.task, "sgd")
    if own.task == "fashion-mnist":
        subset = own.runs / f"fashion-mnist-{NUM_FASHION_IMAGES}.safetensors"
        if not subset.exists():
            write_image_file(subset, first_images(load_images("fashion-mnist", own.data_dir), NUM_FASHION_IMAGES))
        recipe = replace(recipe, dataset="file", dataset_path=subset, epochs=10)
    return replace(recipe, eval_every=recipe.epochs, eval_train=True, threads=1, data_dir=own.data_dir)


def first_images(images: ImageSet, num_images: int) -> ImageSet:
    """The same set with the first of the training images alone, which come in random order."""
    return replace(images, train_images=images.train_images[:num_images], train_labels=images.train_labels[:num_images])


def recipe_methods(base: TrainConfig, method: Method) -> TrainConfig:
    """The recipe with a method and the radius that the recipe has for it."""
    return replace(base, method=method, rho=recipe_config(base.recipe, method).rho)


def settings(own: Arguments, base: TrainConfig, model: str) -> Iterator[TrainConfig]:
    """The set of networks of one architecture: learning rates, batch sizes, decays and radii combined."""
    batch_sizes, decays = (32, 128), (0.0, 2e-3)
    lrs, radii = ((0.03, 0.1), (0.0, 0.2, 0.8)) if own.task == "digits" else ((0.1,), (0.0, 0.05, 0.2))
    for lr, batch_size, decay, rho in product(lrs, batch_sizes, decays, radii):
        method: Method = "sam" if rho else "sgd"
        yield replace(base, model=model, lr=lr, batch_size=batch_size, weight_decay=decay, method=method, rho=rho)


def placed(own: Arguments, config: TrainConfig, seed: int) -> TrainConfig:
    """The run with its seed and directory."""
    name = f"{config.model}-lr{config.lr:g}-batch{config.batch_size}-decay{config.weight_decay:g}-rho{config.rho:g}"
    directory = own.runs / f"{own.task}-{config.epochs}-epochs" / f"{name}-{config.method}-seed{seed}"
    return replace(config, seed=seed, output_dir=directory)


def measured_network(config: TrainConfig) -> dict[str, Any]:
    """Train a network and measure it, or read what an earlier call has measured; the checkpoints are deleted then."""
    path = config.run_dir / "m_sharpness.json"
    if not path.exists():
        summary = train(config)
        atomic_write(path, json.dumps(facts_of_run(config) | errors(config, summary) | sharpness(config)) + "\n")
        for checkpoint in checkpoint_paths(config.run_dir):
            checkpoint.unlink()
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def facts_of_run(config: TrainConfig) -> dict[str, Any]:
    """What tells this network from the others."""
    names = ("model", "method", "rho", "lr", "batch_size", "weight_decay", "seed")
    return {name: getattr(config, name) for name in names}


def errors(config: TrainConfig, summary: Summary) -> dict[str, float]:
    """Errors of the final weights in percent, and the generalisation gap.

    With a share q of wrong labels, uniform over the other K - 1 classes, a classifier with error e on right labels has
    ``(1 - e) q + e (1 - q / (K - 1))`` on such labels: the test error to compare the training error with.
    """
    assert summary.eval_train_error_percent is not None
    assert summary.eval_train_loss is not None
    error, noise = summary.eval_error_percent / 100, config.label_noise
    noisy_error = 100 * ((1 - error) * noise + error * (1 - noise / 9))
    return {
        "train_loss": summary.eval_train_loss,
        "train_error_percent": summary.eval_train_error_percent,
        "test_error_percent": summary.eval_error_percent,
        "gap_percent": noisy_error - summary.eval_train_error_percent,
    }


def sharpness(config: TrainConfig) -> dict[str, Any]:
    """Every measure of the trained network."""
    fabric = make_fabric(config)
    run = load_run(config.run_dir)
    batches = list(training_sample(config, fabric, read_images(config), NUM_IMAGES, batch_size=256))

    def rises(rho: float, m: int, *, adaptive: bool) -> WorstCase:
        return worst_case(run.model, loss, batches, rho, m=m, adaptive=adaptive, batch_norm="running")

    eigenvalues = hessian_eigenvalues(run.model, loss, batches, 5, tolerance=TOLERANCE, batch_norm="running")
    return {
        "m_sharpness": {str(m): value_and_error(rises(RHO, m, adaptive=False)) for m in MS},
        "adaptive_m_sharpness": {str(m): value_and_error(rises(ADAPTIVE_RHO, m, adaptive=True)) for m in MS},
        "eigenvalues": eigenvalues.eigenvalues,
        "residuals": eigenvalues.residuals,
        "all_converged": all(eigenvalues.converged),
    }


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def value_and_error(measure: WorstCase) -> dict[str, float]:
    """The value with half the length of its 95 % interval."""
    return {"value": measure.value, "error": measure.error}


def write(own: Arguments, base: TrainConfig, found: dict[str, Any], num_networks: int) -> None:
    """Everything that was found and what is needed to find it again."""
    task = {name: getattr(base, name) for name in ("recipe", "label_noise", "epochs")}
    images = {"train_images": NUM_FASHION_IMAGES} if own.task == "fashion-mnist" else {}
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": software_versions(),
        "threads": 1,
        "task": task | images,
        "measured_on": {"num_images": NUM_IMAGES, "rho": RHO, "adaptive_rho": ADAPTIVE_RHO, "batch_norm": "running"},
        "networks_wanted": num_networks,
        **found,
    }
    path = own.results / f"m_sharpness_{own.task.replace('-', '_')}.json"
    atomic_write(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
