"""What a run computes, against the same numbers computed by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from short_runs import final_weights, started
from torch.nn.functional import cross_entropy

from flatmin.train.config import TrainConfig
from flatmin.train.data import EvalLoader
from flatmin.train.evaluate import evaluate
from flatmin.train.facts import facts_of
from flatmin.train.images import images_of_split, read_images
from flatmin.train.journal import read_metrics
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.loop import train
from flatmin.train.optimizers import build_optimizer
from flatmin.train.state import fresh_model
from flatmin.train.step import take_step
from flatmin.train.sums import EpochSums
from flatmin.train.trained import load_run


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
