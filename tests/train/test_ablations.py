"""What the paper's ablations need of a run: the term of second order, and a random direction."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flatmin.optim import SecondOrderSAM
from flatmin.train.config import TrainConfig
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.loop import train
from flatmin.train.state import TrainingState, fresh_model
from flatmin.train.step import take_step
from flatmin.train.trained import load_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        model="wrn-10-1",
        dropout=0.3,
        batch_size=64,
        epochs=1,
        max_steps=4,
        rho=0.5,
        weight_decay_in="loss",
        accelerator="cpu",
        threads=1,
        max_eval_batches=1,
        output_dir=tmp_path / "run",
    )


def weights_after(config: TrainConfig, num_steps: int) -> torch.Tensor:
    fabric = make_fabric(config)
    state = TrainingState.initial(config, fabric, num_batches=20)
    batches = make_loaders(config, fabric).train.epoch(0)
    for _ in range(num_steps):
        take_step(config, fabric, state, next(batches))
    return flat(state.model.parameters())


def test_run_with_the_term_of_second_order_resumes_exactly_and_sees_the_rise(config: TrainConfig) -> None:
    config = replace(config, second_order=True)
    whole = train(config)
    resumed = replace(config, output_dir=config.run_dir.with_name("resumed"))
    train(replace(resumed, max_steps=2))
    assert train(resumed).eval_loss == whole.eval_loss
    assert whole.loss_rise is not None
    assert whole.loss_rise > 0.0
    assert whole.gradient_norm > 0.0
    assert load_run(config.run_dir).step == 4


def test_step_is_along_the_gradient_of_the_loss_at_the_worst_point_with_its_penalty(config: TrainConfig) -> None:
    config = replace(config, precision="64-true", dropout=0.0, momentum=0.0, nesterov=False, weight_decay=0.1)
    model = fresh_model(config).double()
    weights = {name: param.detach().requires_grad_() for name, param in model.named_parameters()}
    images, labels = next(make_loaders(config, make_fabric(config)).train.epoch(0))

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = torch.func.functional_call(model, values, images.double())
        penalty = torch.stack([value.square().sum() for value in values.values()]).sum()
        return torch.nn.functional.cross_entropy(logits, labels) + 0.5 * config.weight_decay * penalty

    grads = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
    length = torch.cat([grad.flatten() for grad in grads]).norm()
    pairs = zip(weights.items(), grads, strict=True)
    at_worst = loss({name: w + config.rho * grad / length for (name, w), grad in pairs})
    followed = torch.autograd.grad(at_worst, list(weights.values()))
    expected = torch.cat([(w - config.lr * g).flatten() for w, g in zip(weights.values(), followed, strict=True)])
    found = weights_after(replace(config, second_order=True), 1)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)
    assert (weights_after(config, 1) - found).norm() > 1e-3 * (found - flat(weights.values())).norm()  # the control


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "asam"}, "second_order needs method 'sam', got 'asam'"),
        ({"method_options": {"p": float("inf")}}, r"second_order needs no options of the method, got {'p': inf}"),
        ({"micro_batch": 32}, "second_order needs micro_batch None, got 32"),
        ({"devices": "2"}, "second_order needs devices '1', got '2'"),
    ],
)
def test_second_order_is_refused_where_it_is_not_defined(config: TrainConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, second_order=True, **changes)


def test_build_gives_the_optimizer_its_name(config: TrainConfig) -> None:
    fabric = make_fabric(config)
    state = TrainingState.initial(replace(config, second_order=True), fabric, num_batches=5)
    assert isinstance(state.optimizer, SecondOrderSAM)


def test_random_direction_is_drawn_by_seed_and_step_and_rises_less_than_the_gradients(config: TrainConfig) -> None:
    random = replace(config, method_options={"direction": "random"}, rho=0.2)
    summaries = [
        train(replace(each, output_dir=config.run_dir.with_name(str(index))))
        for index, each in enumerate((random, random, replace(random, method_options=())))
    ]
    assert summaries[0].eval_loss == summaries[1].eval_loss
    assert summaries[0].loss_rise is not None
    assert summaries[2].loss_rise is not None
    assert abs(summaries[0].loss_rise) < 0.3 * summaries[2].loss_rise
    other_seed = replace(random, seed=1)
    with pytest.raises(ValueError, match="direction must be one of gradient, random, got 'up'"):
        replace(other_seed, method_options={"direction": "up"})
