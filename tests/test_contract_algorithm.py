"""The published box, and the reduction to the base optimizer."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from doors import everything, through_closure, through_context, through_two_steps, train
from optimizers import TABLE, built, closure_on, sgd
from problems import batches, tiny_network
from reference import momentum_sgd, sam_gradient

pytestmark = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


@pytest.mark.parametrize("rhos", [(0.3, 0.3), (0.3, 0.02)], ids=["equal groups", "unequal groups"])
@pytest.mark.parametrize("seed", [0, 1])
def test_thirty_steps_equal_the_published_box_in_float64(row, rhos, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    names = [name for name, _ in model.named_parameters()]
    weights = [param.detach().clone() for param in model.parameters()]
    groups = [{"params": list(model[0].parameters()), "rho": rhos[0]}, {"params": list(model[2:].parameters())}]
    optimizer = row.build(sgd(groups, weight_decay=0.0), model, rhos[1])
    rho_of = [rhos[0]] * 2 + [rhos[1]] * 4
    data = batches(torch.float64)

    def gradient_of(inputs, labels):
        def gradient(w):
            w = [x.detach().requires_grad_() for x in w]
            output = torch.func.functional_call(model, dict(zip(names, w, strict=True)), (inputs,))
            return list(torch.autograd.grad(cross_entropy(output, labels), w))

        return gradient

    velocity, plain, plain_velocity = None, weights, None
    for step in range(30):
        inputs, labels = data[step % len(data)]
        through_closure(optimizer, lambda x=inputs, y=labels: cross_entropy(model(x), y))
        gradient = gradient_of(inputs, labels)
        g_p = sam_gradient(
            weights,
            gradient,
            rho_of,
            p=row.p,
            scale=lambda index, w: row.scale(names[index], w),
            ascent_steps=row.num_closure_calls - 1,
        )
        weights, velocity = momentum_sgd(weights, g_p, velocity, lr=0.1, momentum=0.9)
        plain, plain_velocity = momentum_sgd(plain, gradient(plain), plain_velocity, lr=0.1, momentum=0.9)
        torch.testing.assert_close(list(model.parameters()), weights, rtol=1e-9, atol=1e-9, check_stride=False)
    farthest_from_plain = max((x - y).abs().max().item() for x, y in zip(weights, plain, strict=True))
    assert farthest_from_plain > 1e-3, "the reference does not tell the method from plain SGD"


def test_rho_zero_is_the_base_optimizer_bit_for_bit(row):
    model, optimizer = built(row, rho=0.0)
    train(optimizer, model)
    plain = tiny_network()
    losses = train(sgd(plain.parameters()), plain)
    assert torch.equal(everything(model), everything(plain))
    moved, optimizer = built(row, rho=0.1)
    assert not torch.equal(everything(moved), everything(model))
    assert not torch.equal(torch.stack(train(optimizer, moved)), torch.stack(losses))


def test_rho_zero_without_the_model_is_not_the_base_optimizer(row):
    """The control of the test above: dropout and batch norm do differ between the passes."""
    if row.name in ("ASAM", "ASAM-eta-2-ascents", "ASAM-pinf"):
        pytest.skip("goes by names, which come with the model")
    model = tiny_network()
    optimizer = row.build(sgd(model.parameters()), None, 0.0)
    train(optimizer, model)
    plain = tiny_network()
    train(sgd(plain.parameters()), plain)
    assert not torch.equal(everything(model), everything(plain))


@pytest.mark.parametrize("door", [through_two_steps, through_context])
def test_every_door_gives_the_same_numbers(row, door):
    if door is through_context and row.num_closure_calls > 2:
        pytest.skip("the context manager makes one ascent, and says so")
    model, optimizer = built(row)
    losses = train(optimizer, model)
    other, other_optimizer = built(row)
    assert torch.equal(torch.stack(train(other_optimizer, other, door=door)), torch.stack(losses))
    assert torch.equal(everything(other), everything(model))


def test_the_closure_is_called_as_often_as_documented_and_its_first_loss_returned(row):
    model, optimizer = built(row)
    losses = []
    closure = closure_on(optimizer, model)

    def counting():
        losses.append(closure())
        return losses[-1]

    loss = optimizer.step(counting)
    assert len(losses) == row.num_closure_calls
    assert loss is losses[0]
    assert losses[-1] > loss


def test_no_gradient_mode_outside_does_not_reach_the_closure(row):
    model, optimizer = built(row)
    with torch.no_grad():
        assert optimizer.step(closure_on(optimizer, model)).requires_grad
