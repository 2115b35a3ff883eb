"""A training run makes batches, takes steps and keeps metrics without waiting for a GPU; none is needed here.

The device's tensors have no values. A backward pass is replaced by one that leaves gradients of the right shapes.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fake_gpu import NothingWaits, fake_gpu, send_
from flatmin.train.averaging import averaged
from flatmin.train.config import TrainConfig
from flatmin.train.data import Augmentation, AutoAugment, EvalLoader, Normalization, RandAugment, TrainLoader
from flatmin.train.optimizers import build_optimizer
from flatmin.train.state import TrainingState, fresh_model
from flatmin.train.step import take_step
from flatmin.train.sums import EpochSums

CUDA = torch.device("cuda", 0)
GREY = Normalization((0.5,) * 3, (0.5,) * 3)
AUGMENTATIONS = {
    "none": {},
    "reflected crops": {"flip": True, "crop_padding": 4},
    "black crops and cutout": {"padding_mode": "zeros", "crop_padding": 4, "cutout_length": 16},
    "mixup": {"mixup_alpha": 0.2},
    "cutmix": {"cutmix_alpha": 1.0},
    "autoaugment": {"operations": AutoAugment("imagenet")},
    "the release's autoaugment": {"operations": AutoAugment(scale="release")},
    "randaugment, mixed": {"operations": RandAugment(), "mixup_alpha": 1.0, "cutmix_alpha": 1.0},
}


@pytest.fixture(autouse=True)
def _fake_gpu() -> Iterator[None]:
    with fake_gpu():
        yield


def images(number: int, side: int = 32, channels: int = 3) -> Tensor:
    return torch.empty(number, side, side, channels, dtype=torch.uint8, device="cuda")


def labels(number: int) -> Tensor:
    return torch.empty(number, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmented_batches_are_made_without_waiting(name: str) -> None:
    augmentation = Augmentation(**AUGMENTATIONS[name])  # type: ignore[arg-type]
    loader = TrainLoader(
        images(400), labels(400), batch_size=100, normalization=GREY, augmentation=augmentation, num_classes=10
    )
    batches = loader.epoch(0)
    next(batches)  # the order of the epoch goes to the device
    with NothingWaits():
        rest = list(batches)
    assert [batch.shape for batch, _ in rest] == [(100, 3, 32, 32)] * 3
    assert {tensor.device for batch in rest for tensor in batch} == {CUDA}


def test_batches_for_evaluation_are_made_without_waiting() -> None:
    loader = EvalLoader(images(100), labels(100), batch_size=30, normalization=GREY, resize_to=48)
    with NothingWaits():
        assert [len(batch) for batch, _ in loader] == [30, 30, 30, 10]


@pytest.mark.parametrize("ramp", [False, True])
def test_the_moving_average_is_updated_without_waiting(ramp: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    average = averaged(model, 0.9, ramp=ramp, start=2)
    for network in (model, average.module):
        send_(network)
    with NothingWaits():
        for _ in range(4):
            average.update_parameters(model)


class FakeFabric(SimpleNamespace):
    """One process on the fake device."""

    device, global_rank, world_size = CUDA, 0, 1
    autocast = nullcontext

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model=model)

    def backward(self, loss: Tensor) -> None:
        for param in self.model.parameters():
            param.grad = torch.empty_like(param) if param.grad is None else param.grad.add_(1.0)


@pytest.mark.parametrize("method", ["sgd", "sam", "gsam", "msam"])
@pytest.mark.parametrize("options", [{}, {"micro_batch": 8, "sync": "global"}, {"micro_batch": 8}], ids=str)
def test_a_step_of_training_never_waits(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = TrainConfig(
        method=method,  # type: ignore[arg-type]
        batch_size=32,
        ema_decay=0.9,
        label_smoothing=0.1,
        gradient_clipping=1.0,
        output_dir=tmp_path,
        **options,
    )
    model = fresh_model(config)
    average = averaged(model, 0.9)
    for network in (model, average.module):
        send_(network)
    optimizer = build_optimizer(config, model, 10)
    for param in model.parameters():
        optimizer.state[param]["momentum_buffer"] = torch.empty_like(param)  # the first step asks the host
    state = TrainingState(model, model, optimizer, average, EpochSums(CUDA), 10)
    fabric: Any = FakeFabric(model)
    inputs = torch.empty(32, 1, 8, 8, device="cuda")
    with NothingWaits():
        for _ in range(3):
            take_step(config, fabric, state, (inputs, labels(32)))
    assert state.step == 3
    assert optimizer.param_groups[0]["fused"]
