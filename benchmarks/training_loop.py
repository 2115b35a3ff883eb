"""How many images a second does SAM train on: ``flatmin train`` against the loop of two steps of the older ports?

Theirs as their pages show it: torch's ``DataLoader`` with torchvision's transforms in loader workers, float32, eager,
``first_step`` and ``second_step`` of pytorch_optimizer's SAM, and the loss read after each step. Ours is the loop of
``flatmin train`` on the same images and the same network: as it is, with ``--compile``, with ``--precision
bf16-mixed``, and with both. Each goes through the same number of batches in turn. Noted are the part of our time in
which no step of the optimizer runs, whose closure makes the passes, and the arithmetic of our fastest as a share of
what the device does in products of large matrices of the same precision.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from benchmarks.arithmetic import matrix_rate, operations
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


class Size(NamedTuple):
    """How much of a network's training is timed."""

    num_batches: int
    batch_size: int = 128
    rounds: int = 5


NETWORKS = {"small-cnn": Size(24), "wrn-10-2": Size(6), "wrn-28-10": Size(1, batch_size=32, rounds=3)}
ON_GPU = {"small-cnn": Size(200), "wrn-28-10": Size(40)}
IMAGE_SIZE = 32
BF16 = {"precision": "bf16-mixed"}
VARIANTS: dict[str, dict[str, Any]] = {
    "flatmin": {},
    "flatmin_compiled": {"compile": True},
    "flatmin_bf16": BF16,
    "flatmin_bf16_compiled": {**BF16, "compile": True},
}


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Each network in turn."""
    networks = {"small-cnn": Size(1)} if options.quick else NETWORKS if options.device == "cpu" else ON_GPU
    with TemporaryDirectory() as directory, torch_threads(options.threads):
        num_images = max(size.num_batches * size.batch_size for size in networks.values())
        images = smooth_images(4 * num_images if options.quick else num_images)
        path = Path(directory) / "images.npz"
        labels = np.arange(len(images)) % 10
        train, test = (images.numpy(), labels), (images[:10].numpy(), labels[:10])
        np.savez(path, train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1])
        for name, size in networks.items():
            yield name, case_of(config_of(name, size, path, options), images, size, options)


def config_of(name: str, size: Size, path: Path, options: Options) -> TrainConfig:
    """The run."""
    return TrainConfig(
        model=name,
        dataset="file",
        dataset_path=path,
        augmentation="basic",
        batch_size=size.batch_size,
        epochs=1000,
        accelerator="cpu" if options.device == "cpu" else "cuda",
        output_dir=path.parent / "run",
        threads=options.threads,
    )


def case_of(config: TrainConfig, images: Tensor, size: Size, options: Options) -> Case:
    """One network."""
    variants = {"flatmin": VARIANTS["flatmin"]} if options.quick else VARIANTS
    ours = {name: Ours(replace(config, **changes), size.num_batches) for name, changes in variants.items()}
    contenders: dict[str, Stopwatch] = {name: timed(each, options.device) for name, each in ours.items()}
    reason = why_not("pytorch_optimizer")
    if reason is None:
        contenders["two_steps"] = timed(two_steps(config, images, size.num_batches, options), options.device)
    seconds = interleaved(contenders, options.rounds(size.rounds))
    facts = {
        "threads": options.threads,
        "images": size.num_batches * size.batch_size,
        "share_outside": ours["flatmin"].share_outside(options.device),
        **arithmetic({name: statistics.median(seconds[name]) for name in ours}, config, size, options),
    }
    reference = "flatmin" if reason else "two_steps"
    return Case(seconds, reference, facts=facts, skipped={"two_steps": reason} if reason else {})


def arithmetic(medians: dict[str, float], config: TrainConfig, size: Size, options: Options) -> dict[str, Any]:
    """Images a second of our fastest, and its two passes' operations as a share of the device's matrix rate."""
    fastest = min(medians, key=lambda name: medians[name])
    dtype = torch.bfloat16 if "bf16" in fastest else torch.float32
    rate = matrix_rate(options.device, dtype, 256 if options.quick else 2048 if options.device == "cpu" else 8192)
    images_per_second = size.num_batches * size.batch_size / medians[fastest]
    return {
        "fastest": fastest,
        "images_per_second": images_per_second,
        "matrix_rate": rate,
        "share_of_matrix_rate": 2 * operations(config.model, IMAGE_SIZE) * images_per_second / rate,
    }


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


def two_steps(config: TrainConfig, images: Tensor, num_batches: int, options: Options) -> Callable[[], None]:
    """The loop of the older ports."""
    model: nn.Module = build_model(config.model, 10, 3).to(options.device)
    optimizer: Any = port_of_sam(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader: DataLoader[tuple[Tensor, int]] = DataLoader(
        PerImage(images[: num_batches * config.batch_size], torchvision_transform("basic"), as_pil=True),
        batch_size=config.batch_size,
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
