"""What a run computes, against the same numbers computed by hand."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning_fabric import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy

from flatmin.train import loop
from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.config import TrainConfig
from flatmin.train.data import EvalLoader, dataset_facts, load_images
from flatmin.train.errors import TrainingError
from flatmin.train.evaluate import evaluate
from flatmin.train.facts import facts_of
from flatmin.train.journal import read_metrics
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import batch_indices, images_of_split, make_loaders, read_images
from flatmin.train.loop import train
from flatmin.train.optimizers import build_optimizer
from flatmin.train.state import TrainingState, fresh_model
from flatmin.train.step import take_step
from flatmin.train.sums import EpochSums
from flatmin.train.trained import load_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of a second: 3 epochs of 3 steps."""
    return TrainConfig(
        epochs=3, batch_size=432, rho=0.1, label_noise=0.4, output_dir=tmp_path / "run", accelerator="cpu", threads=1
    )


def final_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    saved = load_newest_checkpoint(config.run_dir)
    assert saved is not None
    return saved["model"]


def started(config: TrainConfig) -> tuple[Fabric, TrainingState, Any]:
    fabric = make_fabric(config)
    loaders = make_loaders(config, fabric)
    return fabric, TrainingState.initial(config, fabric, len(loaders.train)), loaders


@pytest.mark.parametrize("method", ["sgd", "sam", "asam"])
def test_first_step_records_loss_error_and_gradient_at_the_initial_weights(config: TrainConfig, method: str) -> None:
    config = replace(config, method=method, label_smoothing=0.1, max_steps=1, weight_decay=0.1, weight_decay_in="loss")
    summary = train(config)

    fabric = make_fabric(config)
    model = fresh_model(config)
    images, labels = next(make_loaders(config, fabric).train.epoch(0))
    logits = model(images)
    loss = cross_entropy(logits, labels, label_smoothing=0.1)
    l2 = sum(0.05 * param.square().sum() for param in model.parameters())
    grads = torch.autograd.grad(loss + l2, list(model.parameters()))
    assert summary.train_loss == pytest.approx(loss.item(), rel=1e-6)
    assert summary.train_error_percent == pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item())
    assert summary.gradient_norm == pytest.approx(torch.cat([grad.flatten() for grad in grads]).norm().item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_mixed_images_have_the_mixed_loss_and_the_error_of_the_heavier_label(
    config: TrainConfig, precision: str
) -> None:
    config = replace(config, augmentation="basic+mixup", label_smoothing=0.1, max_steps=1, precision=precision)
    summary = train(config)
    loader = make_loaders(config, make_fabric(config)).train
    images, shares = next(loader.epoch(0))
    share = loader._plan(0).mixes[0].share
    labels = loader.labels[loader._plan(0).order[: config.batch_size]]
    model = fresh_model(config)
    logits = model(images).double()
    losses = [cross_entropy(logits, part, label_smoothing=0.1).item() for part in (labels, labels.flip(0))]
    assert 0.5 < share < 0.999
    assert summary.train_loss == pytest.approx(share * losses[0] + (1 - share) * losses[1], rel=1e-5)
    assert summary.train_loss != pytest.approx(losses[0], rel=1e-5)
    assert summary.train_error_percent == pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item())
    assert torch.equal(shares.argmax(dim=1), labels)


def test_rise_of_the_loss_is_that_of_the_step_along_the_gradient(config: TrainConfig) -> None:
    summary = train(replace(config, max_steps=1))
    model = fresh_model(config)
    images, labels = next(make_loaders(config, make_fabric(config)).train.epoch(0))
    params = list(model.parameters())
    loss = cross_entropy(model(images), labels)
    grads = torch.autograd.grad(loss, params)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param.add_(config.rho * grad / norm)
        rise = cross_entropy(model(images), labels) - loss
    assert summary.loss_rise == pytest.approx(rise.item(), rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.7])
def test_evaluation_is_that_of_the_saved_network_on_the_test_images(
    config: TrainConfig, ema_decay: float, precision: Any
) -> None:
    summary = train(replace(config, ema_decay=ema_decay, precision=precision))
    saved_config, model, step = load_run(config.run_dir)
    images, labels = next(iter(make_loaders(saved_config, make_fabric(config)).evaluation))
    assert len(labels) == 500
    with torch.no_grad():
        logits = model(images.double() if precision == "64-true" else images)
    assert step == summary.steps == 9
    assert summary.eval_loss == pytest.approx(
        cross_entropy(logits, labels).item(), rel=1e-12 if precision == "64-true" else 1e-6
    )
    assert summary.eval_error_percent == pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item())
    assert summary.complete


def test_evaluation_in_parts_of_unequal_size_counts_every_image_once(config: TrainConfig) -> None:
    fabric, state, loaders = started(config)
    state.model.eval()
    whole = evaluate(fabric, state.model, loaders.evaluation)
    images, labels = images_of_split(config, read_images(config), "test")
    facts = facts_of(config)

    def batches_of(size: int, rank: int = 0, num_replicas: int = 1) -> EvalLoader:
        ranks = {"rank": rank, "num_replicas": num_replicas}
        return EvalLoader(images, labels, batch_size=size, normalization=facts.normalization, **ranks)

    for size, ranks in ((96, 1), (333, 1), (60, 3)):  # the last part has 20, 167 or 6 to 7 images
        parts = [evaluate(fabric, state.model, batches_of(size, rank, ranks)) for rank in range(ranks)]
        total = sum(part.num_images for part in parts)
        assert total == whole.num_images == 500
        for name in ("loss", "error_percent", "top5_error_percent"):
            mean = sum(getattr(part, name) * part.num_images for part in parts) / total
            assert mean == pytest.approx(getattr(whole, name), rel=1e-6)
    uneven = [evaluate(fabric, state.model, [batch]).loss for batch in batches_of(333)]
    assert abs(sum(uneven) / 2 - whole.loss) > 1e-5 * whole.loss  # the control: it is no mean of means


def test_metrics_record_schedule_and_radius(config: TrainConfig) -> None:
    train(replace(config, warmup_epochs=1.0, lr=0.3, eval_every=2))
    records = read_metrics(config.run_dir)
    assert [record["step"] for record in records] == [3, 6, 9]
    assert [record["epoch"] for record in records] == [1.0, 2.0, 3.0]
    last_steps = [0.3, 0.15 * (1 + math.cos(math.pi * 2 / 6)), 0.15 * (1 + math.cos(math.pi * 5 / 6))]
    assert [record["learning_rate"] for record in records] == pytest.approx(last_steps)
    assert [record["rho"] for record in records] == [0.1, 0.1, 0.1]
    assert [record["eval_loss"] is None for record in records] == [True, False, False]  # every second, and the last


def test_radius_zero_is_sgd_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    runs = [
        replace(config, method=method, rho=rho, output_dir=tmp_path / f"{method}-{rho}")
        for method, rho in (("sgd", 0.0), ("sam", 0.0), ("sam", 0.1))
    ]
    sgd, flat, sam = [train(run) for run in runs]
    assert (flat.train_loss, flat.eval_loss) == (sgd.train_loss, sgd.eval_loss)
    assert (sam.train_loss, sam.eval_loss) != (sgd.train_loss, sgd.eval_loss)
    torch.testing.assert_close(final_weights(runs[1]), final_weights(runs[0]), rtol=0, atol=0)


def test_average_of_weights_follows_its_recursion(config: TrainConfig) -> None:
    config = replace(config, ema_decay=0.7)
    fabric, state, loaders = started(config)
    average: dict[str, torch.Tensor] = {}
    for batch in loaders.train.epoch(0):
        take_step(config, fabric, state, batch)
        weights = {
            name: value.double() for name, value in state.model.state_dict().items() if value.is_floating_point()
        }
        average = {name: 0.7 * average.get(name, value) + 0.3 * value for name, value in weights.items()}
    averaged = state.evaluated_model.module.state_dict()
    assert "features.1.running_mean" in average
    for name, value in average.items():
        torch.testing.assert_close(averaged[name].double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_clipping_bounds_the_gradient_that_the_base_takes(config: TrainConfig, method: str) -> None:
    plain = replace(config, method=method, lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    lengths = []
    for clipping in (0.0, 0.25):
        case = replace(plain, gradient_clipping=clipping)
        fabric, state, loaders = started(case)
        before = [param.detach().clone() for param in state.model.parameters()]
        take_step(case, fabric, state, next(loaders.train.epoch(0)))
        moves = [param - old for param, old in zip(state.model.parameters(), before, strict=True)]
        lengths.append(torch.cat([move.flatten() for move in moves]).norm().item())
    assert lengths[0] > 0.5
    assert lengths[1] == pytest.approx(0.25, rel=1e-4)


def test_decay_in_the_loss_is_decay_in_the_base_for_sgd_and_not_for_sam(config: TrainConfig) -> None:
    def weights_after_a_step(method: str, decay_in: str) -> torch.Tensor:
        options = {"precision": "64-true", "rho": 0.5, "weight_decay": 0.1}
        case = replace(config, method=method, weight_decay_in=decay_in, **options)
        fabric, state, loaders = started(case)
        take_step(case, fabric, state, next(loaders.train.epoch(0)))
        return torch.cat([param.detach().flatten() for param in state.model.parameters()])

    sgd = [weights_after_a_step("sgd", decay_in) for decay_in in ("base", "loss")]
    sam = [weights_after_a_step("sam", decay_in) for decay_in in ("base", "loss")]
    torch.testing.assert_close(sgd[0], sgd[1], rtol=1e-10, atol=1e-12)
    assert (sam[0] - sam[1]).norm() > 1e-3 * sam[0].norm()


def test_decay_can_leave_out_norm_params_and_biases(config: TrainConfig) -> None:
    model = fresh_model(config)
    groups = build_optimizer(replace(config, decay_norm_params=False), model, num_batches=3).param_groups
    assert [group["weight_decay"] for group in groups] == [config.weight_decay, 0.0]
    assert [{param.ndim > 1 for param in group["params"]} for group in groups] == [{True}, {False}]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert len(build_optimizer(config, model, num_batches=3).param_groups) == 1


def test_label_noise_is_in_the_training_labels_alone(config: TrainConfig) -> None:
    image_set = load_images("digits", Path())
    config = replace(config, eval_on="validation")
    _, noisy = images_of_split(config, image_set, "train")
    _, right = images_of_split(replace(config, label_noise=0.0), image_set, "train")
    assert (noisy != right).double().mean().item() == pytest.approx(0.4, abs=1e-3)
    assert torch.equal(right, image_set.train_labels[: len(right)])
    assert torch.equal(images_of_split(config, image_set, "validation")[1], image_set.train_labels[len(right) :])
    assert torch.equal(images_of_split(config, image_set, "test")[1], image_set.test_labels)


def test_a_part_of_the_training_images_is_the_same_for_every_run(config: TrainConfig) -> None:
    image_set = load_images("digits", Path())
    config = replace(config, num_train_images=100, label_noise=0.0, eval_on="validation")
    images, labels = images_of_split(config, image_set, "train")
    places = [(image_set.train_images == image).flatten(1).all(dim=1).nonzero()[0].item() for image in images]
    assert len(images) == len(set(places)) == 100
    assert torch.equal(image_set.train_labels[places], labels)
    assert max(places) < len(image_set.train_labels) * 9 // 10 + 1
    assert torch.equal(images, images_of_split(replace(config, seed=7), image_set, "train")[0])
    assert labels.bincount().min() >= 3  # drawn over the whole set
    assert len(images_of_split(config, image_set, "validation")[1]) == len(image_set.train_labels) // 10
    noisy = images_of_split(replace(config, label_noise=0.4), image_set, "train")[1]
    assert (noisy != labels).sum() == 40
    assert train(replace(config, batch_size=50, max_epochs=1)).steps == 2
    with pytest.raises(TrainingError, match="num_train_images must be <= 1168, got 2000"):
        images_of_split(replace(config, num_train_images=2000), image_set, "train")


def test_validation_images_that_were_trained_on_are_refused(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match="trained on the validation images: it needs --eval-on validation"):
        images_of_split(config, load_images("digits", Path()), "validation")


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


@pytest.mark.parametrize("method", ["sgd", "sam"])
def test_training_metrics_can_be_those_at_the_perturbed_weights(config: TrainConfig, method: str) -> None:
    config = replace(config, method=method, max_steps=1, precision="64-true")
    at_w = train(config)
    away = train(replace(config, train_metrics_at="w+eps", output_dir=config.run_dir.with_name("away")))
    model, rho = fresh_model(config).double(), 0.0 if method == "sgd" else config.rho
    images, labels = next(make_loaders(config, make_fabric(config)).train.epoch(0))
    params = list(model.parameters())
    grads = torch.autograd.grad(cross_entropy(model(images.double()), labels), params)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param.add_(rho * grad / norm)
    logits = model(images.double())
    loss = cross_entropy(logits, labels)
    grads = torch.autograd.grad(loss, params)
    assert away.train_loss == pytest.approx(loss.item(), rel=1e-9)
    assert away.train_error_percent == pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item())
    assert away.gradient_norm == pytest.approx(torch.cat([grad.flatten() for grad in grads]).norm().item(), rel=1e-6)
    assert (away.train_loss != at_w.train_loss) == (method == "sam")
    assert away.loss_rise == at_w.loss_rise
    assert away.eval_loss == at_w.eval_loss


def test_evaluation_counts_five_guesses_and_the_training_images(config: TrainConfig) -> None:
    summary = train(replace(config, eval_train=True, top5=True))
    _, model, _ = load_run(config.run_dir)
    loaders = make_loaders(replace(config, eval_train=True), make_fabric(config))
    assert loaders.train_evaluation is not None
    for name, batches in (("eval", loaders.evaluation), ("eval_train", loaders.train_evaluation)):
        logits, labels = [], []
        with torch.no_grad():
            for images, batch_labels in batches:
                logits.append(model(images))
                labels.append(batch_labels)
        scores, right = torch.cat(logits), torch.cat(labels)
        rank = (scores > scores.gather(1, right[:, None])).sum(
            dim=1
        )  # how many classes are likelier than the right one
        assert len(right) == {"eval": 500, "eval_train": 1297}[name]
        measured = [getattr(summary, f"{name}_{key}") for key in ("loss", "error_percent", "top5_error_percent")]
        expected = [cross_entropy(scores, right), *(100 * (rank >= k).double().mean() for k in (1, 5))]
        assert measured == pytest.approx([value.item() for value in expected], rel=1e-6)
        assert measured[1] > measured[2] > 0.0
    assert read_metrics(config.run_dir)[-1]["eval_train_top5_error_percent"] == summary.eval_train_top5_error_percent


def test_what_was_not_asked_for_is_not_recorded(config: TrainConfig) -> None:
    summary = train(replace(config, max_steps=1))
    assert summary.eval_top5_error_percent is summary.eval_train_loss is None
    assert not any("top5" in name or "eval_train" in name for name in read_metrics(config.run_dir)[0])


def test_checkpoints_are_kept_after_the_epochs_named_and_rotated_otherwise(config: TrainConfig) -> None:
    config = replace(config, epochs=5, keep_epochs=(0, 2, 4), checkpoint_every=1, num_checkpoints=3)
    train(config)
    files = sorted(path.name for path in config.run_dir.glob("*.pt"))
    kept, rotated = ["epoch-000000.pt", "epoch-000002.pt", "epoch-000004.pt"], [9, 12, 15]
    assert files == [*(f"checkpoint-{step:09d}.pt" for step in rotated), *kept]
    states = [torch.load(config.run_dir / name, weights_only=True) for name in kept]
    assert [state["step"] for state in states] == [0, 6, 12]
    initial = fresh_model(config).state_dict()
    assert all(torch.equal(states[0]["model"][name], value) for name, value in initial.items())

    other = replace(config, output_dir=config.run_dir.with_name("from-kept"), keep_epochs=())
    train(replace(other, max_steps=6))
    for path in other.run_dir.glob("checkpoint-*.pt"):
        path.unlink()
    (config.run_dir / kept[1]).rename(other.run_dir / "checkpoint-000000006.pt")  # a run can go on from a kept one
    train(other)
    assert (other.run_dir / "metrics.jsonl").read_bytes() == (config.run_dir / "metrics.jsonl").read_bytes()


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


def test_means_are_over_images_and_over_steps() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    sums = EpochSums(fabric.device)
    for num_images, loss in ((2, 1.0), (6, 3.0)):
        sums.add(0, torch.tensor(loss), torch.tensor(1), num_images, [torch.tensor(loss), torch.tensor(2 * loss)])
    means = sums.means(fabric, with_rise=True)
    assert (means.num_images, means.train_loss, means.train_error_percent) == (8, 2.5, 25.0)
    assert (means.gradient_norm, means.loss_rise) == (2.0, 4.0)
    assert sums.means(fabric, with_rise=False).loss_rise is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_is_that_of_the_weights_and_changes_the_loss(
    config: TrainConfig, precision: str, tmp_path: Path
) -> None:
    full = train(replace(config, max_steps=2, output_dir=tmp_path / "full"))
    summary = train(replace(config, max_steps=2, precision=precision))
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert final_weights(config)["head.weight"].dtype == dtype
    assert summary.train_loss == pytest.approx(full.train_loss, rel=1e-5 if precision == "64-true" else 0.05)
    assert summary.train_loss != full.train_loss


def test_max_steps_stops_in_the_middle_of_an_epoch_with_a_summary(config: TrainConfig) -> None:
    summary = train(replace(config, max_steps=4))
    assert (summary.steps, summary.epochs, summary.complete) == (4, 4 / 3, False)
    assert [record["step"] for record in read_metrics(config.run_dir)] == [3, 4]
    saved = json.loads((config.run_dir / "summary.json").read_text())
    assert saved["eval_error_percent"] == summary.eval_error_percent


def test_run_that_is_beyond_its_limit_takes_no_step_and_tells_where_it_is(config: TrainConfig) -> None:
    """Killed after its checkpoint and before its summary, and started again with a lower limit."""
    train(replace(config, max_steps=4))
    before = final_weights(config)
    (config.run_dir / "summary.json").unlink()
    summary = train(replace(config, max_steps=2))
    assert (summary.steps, summary.complete) == (4, False)
    assert all(torch.equal(value, before[name]) for name, value in final_weights(config).items())


def test_summary_of_fewer_steps_is_gone_while_the_run_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_that_fails(*_: object) -> None:
        assert not (config.run_dir / "summary.json").exists()
        raise KeyboardInterrupt

    train(replace(config, max_steps=2))
    monkeypatch.setattr(loop, "take_step", step_that_fails)
    with pytest.raises(KeyboardInterrupt):
        train(config)


def test_finished_run_is_not_trained_again(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = train(config)
    monkeypatch.setattr(loop, "run_epochs", None)
    assert train(config) == summary
    assert train(replace(config, max_steps=5)) == summary


def test_event_files_hold_every_number_of_the_records_and_the_time(config: TrainConfig) -> None:
    train(config)
    events = EventAccumulator(str(config.run_dir)).Reload()
    for name in ("train_loss", "eval_error_percent", "learning_rate", "loss_rise"):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(record["step"], pytest.approx(record[name])) for record in read_metrics(config.run_dir)]
    timing = [json.loads(line) for line in (config.run_dir / "timing.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("wall_seconds")] == pytest.approx(
        [record["wall_seconds"] for record in timing]
    )


def test_weights_and_biases_gets_the_records_and_goes_on_with_its_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = replace(config, wandb=True)
    train(replace(config, max_steps=3))
    train(config)
    ids = [call.kwargs["id"] for call in wandb.init.call_args_list]
    assert len(ids) == 2
    assert ids[0] == ids[1] != ""
    logged = [(call.kwargs["step"], call.args[0]["train_loss"]) for call in wandb.init.return_value.log.call_args_list]
    assert logged[1:] == [(record["step"], record["train_loss"]) for record in read_metrics(config.run_dir)]
    assert wandb.init.return_value.finish.call_count == 2
