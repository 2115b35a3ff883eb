"""A loss that is not finite ends the run, which tells where and keeps what it needs to be looked at."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from short_runs import started

from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.config import TrainConfig
from flatmin.train.data import EvalLoader, dataset_facts, load_images
from flatmin.train.errors import TrainingError
from flatmin.train.images import images_of_split
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import batch_indices, make_loaders
from flatmin.train.loop import train
from flatmin.train.sums import EpochSums


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_loss_that_is_not_finite_ends_the_run_and_tells_step_and_images(config: TrainConfig, method: str) -> None:
    config = replace(config, method=method, lr=1e30, checkpoint_seconds=0)
    with pytest.raises(TrainingError) as caught:
        train(config)
    fabric, state, loaders = started(config)
    _, (images, _), _ = loaders.train.epoch(0)
    saved = torch.load(config.run_dir / "nonfinite-000000002.pt", weights_only=True)
    assert torch.equal(normalized_images(config, saved["batch_indices"]), images)
    assert saved["bad_step"] == 2
    assert set(saved) == {*state.state_dict(fabric), "bad_step", "batch_indices"}
    first = " ".join(map(str, saved["batch_indices"][:8].tolist()))
    assert str(caught.value) == (
        f"the training loss was not finite at step 2: in batch 2 of epoch 1, training images {first} and 424 more. "
        f"Try a lower lr, a smaller rho, or gradient clipping; the state is in "
        f"{config.run_dir}/nonfinite-000000002.pt, the checkpoint before it is checkpoint-000000001.pt"
    )
    assert load_newest_checkpoint(config.run_dir)["step"] == 1  # type: ignore[index]
    assert not (config.run_dir / "summary.json").exists()


def normalized_images(config: TrainConfig, indices: torch.Tensor) -> torch.Tensor:
    """Training images by their place in the data set, as the network sees them."""
    images, labels = images_of_split(config, load_images("digits", Path()), "train")
    batches = EvalLoader(images, labels, batch_size=500, normalization=dataset_facts("digits").normalization)
    return torch.cat([part for part, _ in batches])[indices]


@pytest.mark.parametrize("augmentation", ["none", "cutout"])
def test_indices_of_a_batch_are_those_of_its_images(config: TrainConfig, augmentation: Any) -> None:
    fabric = make_fabric(config)
    loader = make_loaders(replace(config, augmentation=augmentation, label_noise=0.0), fabric).train
    labels = load_images("digits", Path()).train_labels
    indices = [batch_indices(loader, epoch=1, batch=batch) for batch in range(3)]
    assert torch.cat(indices).unique().numel() == 3 * 432
    for own, (_, batch_labels) in zip(indices, loader.epoch(1), strict=True):
        assert torch.equal(labels[own], batch_labels)


def test_loss_that_is_not_finite_at_the_perturbed_weights_is_told_apart(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match=r"the loss at w \+ eps was not finite at step 1: in batch 1 of epoch 1, "):
        train(replace(config, rho=1e30))


def test_sums_remember_the_first_step_that_was_not_finite() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    sums = EpochSums(fabric.device)
    for step, loss in enumerate([1.0, 2.0, math.inf, 3.0, math.nan]):
        sums.add(step, torch.tensor(loss), torch.tensor(1), 4, [torch.tensor(1.0), torch.tensor(0.5)])
    with pytest.raises(TrainingError, match="not finite at step 3"):
        sums.means(fabric, with_rise=True)


def test_first_bad_step_of_all_replicas_is_told() -> None:
    """Rows as two replicas gather them: in the second one an earlier step was the first to go wrong."""
    fabric = Fabric(accelerator="cpu", devices=1)
    rows = []
    for bad_step in (4, 2):
        sums = EpochSums(fabric.device)
        for step in range(6):
            loss = torch.tensor(math.inf if step == bad_step else 1.0)
            sums.add(step, loss, torch.tensor(1), 4, [torch.tensor(1.0), torch.tensor(0.5)])
        rows.append(sums.values)
    whole = EpochSums(fabric.device)
    whole.gathered = lambda fabric: torch.stack(rows)  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="not finite at step 3"):
        whole.means(fabric, with_rise=True)
