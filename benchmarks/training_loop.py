"""How many images a second does SAM train on: ``flatmin train`` against the loop of two steps of the older ports?

Theirs as their pages show it: torch's ``DataLoader`` with torchvision's transforms in loader workers, float32, eager,
``first_step`` and ``second_step`` of pytorch_optimizer's SAM, and the loss read after each step. Ours is the loop of
``flatmin train`` on the same images and the same network, as it is and with ``--compile``. Each goes through the same
number of batches in turn. Noted is the part of our time in which no step of the optimizer runs, whose closure makes the
passes.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.augmentation import PerImage, smooth_images, torchvision_transform
from benchmarks.peers import port_of_sam, why_not
from benchmarks.record import Case, Options
from benchmarks.timing import Stopwatch, interleaved, timed, torch_threads
from flatmin.train.config import TrainConfig
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.models import build_model
from flatmin.train.state import TrainingState
from flatmin.train.step import take_step

NETWORKS = {"small-cnn": 24, "wrn-10-2": 6}  # and batches of a turn
BATCH_SIZE = 128


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Each network in turn."""
    networks = {"small-cnn": 1} if options.quick else NETWORKS
    with TemporaryDirectory() as directory, torch_threads(options.threads):
        images = smooth_images(4 * BATCH_SIZE if options.quick else max(NETWORKS.values()) * BATCH_SIZE)
        path = Path(directory) / "images.npz"
        labels = np.arange(len(images)) % 10
        train, test = (images.numpy(), labels), (images[:10].numpy(), labels[:10])
        np.savez(path, train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1])
        for name, num_batches in networks.items():
            yield name, case_of(config_of(name, path, options), images, num_batches, options)


def config_of(name: str, path: Path, options: Options) -> TrainConfig:
    """The run."""
    return TrainConfig(
        model=name,
        dataset="file",
        dataset_path=path,
        augmentation="basic",
        batch_size=BATCH_SIZE,
        epochs=1000,
        accelerator="cpu" if options.device == "cpu" else "cuda",
        output_dir=path.parent / "run",
        threads=options.threads,
    )


def case_of(config: TrainConfig, images: Tensor, num_batches: int, options: Options) -> Case:
    """One network."""
    ours = Ours(config, num_batches)
    contenders: dict[str, Stopwatch] = {"flatmin": timed(ours, options.device)}
    if not options.quick:
        contenders["flatmin_compiled"] = timed(Ours(replace(config, compile=True), num_batches), options.device)
    reason = why_not("pytorch_optimizer")
    if reason is None:
        contenders["two_steps"] = timed(two_steps(config.model, images, num_batches, options), options.device)
    seconds = interleaved(contenders, options.rounds(5))
    facts = {
        "threads": options.threads,
        "images": num_batches * BATCH_SIZE,
        "share_outside": ours.share_outside(options.device),
    }
    reference = "flatmin" if reason else "two_steps"
    return Case(seconds, reference, facts=facts, skipped={"two_steps": reason} if reason else {})


class Ours:
    """So many batches of ``flatmin train``."""

    def __init__(self, config: TrainConfig, num_batches: int) -> None:
        self.config, self.num_batches = config, num_batches
        self.fabric = make_fabric(config)
        self.loader = make_loaders(config, self.fabric).train
        self.state = TrainingState.initial(config, self.fabric, len(self.loader))
        self.epoch = 0

    def __call__(self) -> None:
        """Train on the first batches of the next epoch."""
        for batch in islice(self.loader.epoch(self.epoch), self.num_batches):
            take_step(self.config, self.fabric, self.state, batch)
        self.epoch += 1

    def share_outside(self, device: str) -> float:
        """The part of the time outside the optimizer's step, whose closure makes the passes: batches and metrics."""
        optimizer: Any = self.state.optimizer
        step: Callable[..., Any] = optimizer.step
        inside: list[float] = []

        def measured(*arguments: Any, **options: Any) -> Any:
            results: list[Any] = []
            inside.append(timed(lambda: results.append(step(*arguments, **options)), device)())
            return results[0]

        optimizer.step = measured
        whole = timed(self, device)()
        optimizer.step = step
        return 1 - sum(inside) / whole


def two_steps(name: str, images: Tensor, num_batches: int, options: Options) -> Callable[[], None]:
    """The loop of the older ports."""
    model: nn.Module = build_model(name, 10, 3).to(options.device)
    optimizer: Any = port_of_sam(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        PerImage(images[: num_batches * BATCH_SIZE], torchvision_transform("basic"), as_pil=True),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=0 if options.quick else options.threads,
        persistent_workers=not options.quick,
    )

    def epoch() -> None:
        total = 0.0
        for batch in loader:
            inputs, labels = (part.to(options.device) for part in batch)
            loss = cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.first_step(zero_grad=True)
            cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.second_step(zero_grad=True)
            total += loss.item()

    return epoch
