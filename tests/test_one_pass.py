"""One-pass methods: plain training's cost, and weights that rest at w + eps."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything
from flatmin.optim import (
    Ball,
    BaseMomentum,
    Filtered,
    Gradient,
    LayerBall,
    StaleGradient,
    WarmUp,
)
from flatmin.optim.filters import Centralised
from one_pass_methods import BASES, METHODS, backward, every_method, made, run
from problems import batches, tiny_network


def _scaling(eta, w):
    """T of ASAM's ball, or of a round one."""
    return [torch.ones_like(x) if eta is None else x.abs() + eta for x in w]


@pytest.mark.parametrize(("method", "eta"), [(flatmin.MSAM, None), (flatmin.AdaptiveMSAM, 0.01)])
def test_momentum_sam_equals_the_published_box_in_float64(method, eta):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    names = [name for name, _ in model.named_parameters()]
    w = [param.detach().clone() for param in model.parameters()]
    v = [torch.zeros_like(x) for x in w]
    groups = [{"params": list(model[0].parameters()), "rho": 0.5}, {"params": list(model[2].parameters())}]
    optimizer = method(torch.optim.SGD(groups, lr=0.1, momentum=0.9), 0.2)
    radii = [0.5, 0.5, 0.2, 0.2]
    for step in range(30):
        inputs, labels = batches(torch.float64)[step % 6]
        scaling = _scaling(eta, w)
        length = torch.cat([(t * x).flatten() for t, x in zip(scaling, v, strict=True)]).norm()
        moves = [t**2 * y / length if length > 0 else 0.0 * y for t, y in zip(scaling, v, strict=True)]
        there = [x - rho * move for x, move, rho in zip(w, moves, radii, strict=True)]
        torch.testing.assert_close(list(model.parameters()), there, rtol=1e-9, atol=1e-9, check_stride=False)
        run(optimizer, model, range(step, step + 1))
        there = [x.detach().requires_grad_() for x in there]
        output = torch.func.functional_call(model, dict(zip(names, there, strict=True)), (inputs,))
        g = torch.autograd.grad(cross_entropy(output, labels), there)
        v = [0.9 * x + y for x, y in zip(v, g, strict=True)]
        w = [x - 0.1 * y for x, y in zip(w, v, strict=True)]
        with optimizer.unperturbed():
            torch.testing.assert_close(list(model.parameters()), w, rtol=1e-9, atol=1e-9, check_stride=False)
    assert max((x - y).abs().max() for x, y in zip(w, there, strict=True)) > 1e-3  # the two places do differ


@every_method
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(method, base):
    model, optimizer = made(method, base, rho=0.0)
    plain = tiny_network()
    losses = run(BASES[base](plain.parameters()), plain, range(8))
    assert torch.equal(torch.stack(run(optimizer, model, range(8))), torch.stack(losses))
    assert torch.equal(everything(model), everything(plain))
    moved, other = made(method, base)
    run(other, moved, range(8))
    with other.unperturbed():
        assert not torch.equal(everything(moved), everything(plain))


@every_method
def test_the_step_length_is_rho(method):
    model, optimizer = made(method, dtype=torch.float64, rho=0.25)
    run(optimizer, model, range(3))
    rests = [param.detach().clone() for param in model.parameters()]
    with optimizer.unperturbed():
        eps = [rest - param for rest, param in zip(rests, model.parameters(), strict=True)]
        if isinstance(optimizer, flatmin.AdaptiveMSAM):
            eps = [e / (param.abs() + 0.01) for e, param in zip(eps, model.parameters(), strict=True)]
    lengths = torch.stack([e.norm() for e in eps])
    if isinstance(optimizer.ball, LayerBall):
        torch.testing.assert_close(
            lengths[1:], torch.full((6,), 0.25, dtype=torch.float64)
        )  # the first has no gradient
    else:
        torch.testing.assert_close(lengths.norm(), torch.tensor(0.25, dtype=torch.float64))


@every_method
def test_a_closure_is_called_once_and_gives_the_same_numbers(method):
    model, optimizer = made(method)
    losses = run(optimizer, model, range(5))
    other, other_optimizer = made(method)
    found = []
    for step in range(5):
        torch.manual_seed(100 + step)
        inputs, labels = batches()[step % 6]
        calls = []

        def closure(inputs=inputs, labels=labels, calls=calls):
            other_optimizer.zero_grad()
            loss = cross_entropy(other(inputs), labels)
            loss.backward()
            calls.append(loss)
            return loss

        found.append(other_optimizer.step(closure).detach())
        assert len(calls) == 1
    assert torch.equal(torch.stack(found), torch.stack(losses))
    assert torch.equal(everything(other), everything(model))


def test_micro_batches_are_averaged():
    model, optimizer = made(METHODS["MSAM"], dtype=torch.float64)
    model.eval()  # batch norm and dropout see the whole batch
    other, at_once = made(METHODS["MSAM"], dtype=torch.float64)
    other.eval()
    inputs, labels = batches(torch.float64)[0]

    def closure_of(network, part):
        def closure():
            loss = cross_entropy(network(inputs[part]), labels[part])
            loss.backward()
            return loss

        return closure

    for _ in range(4):
        loss = optimizer.step([closure_of(model, slice(0, 8)), closure_of(model, slice(8, 16))])
        expected = at_once.step(closure_of(other, slice(0, 16)))
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(everything(model), everything(other))


@every_method
@pytest.mark.parametrize("base", ["sgd", "adamw-fused"])
def test_a_gradient_that_is_not_finite_skips_the_step(method, base):
    model, optimizer = made(method, base)
    run(optimizer, model, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.unperturbed():
        before = [param.detach().clone() for param in model.parameters()]
    optimizer.zero_grad()
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    model.last.weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert optimizer.diagnostics.as_dict()["num_skipped_steps"] == 1
    assert optimizer.param_groups[0]["num_steps"] == 3
    names = ("momentum_buffer", "exp_avg", "stale_gradient")
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(entry[n], state["state"][index][n]) for n in names if n in entry and entry[n] is not None
        )
    with optimizer.unperturbed():
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


@every_method
def test_a_gradient_scaler_steps_and_backs_off(method):
    model, optimizer = made(method)
    plain, unscaled = made(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        torch.manual_seed(100 + step)
        inputs, labels = batches()[step]
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(inputs), labels)).backward()
        if step == 3:
            model.last.bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    run(unscaled, plain, [0, 1, 2, 4, 5])
    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, expected)


def test_an_error_inside_of_the_scalers_step_does_not_spoil_the_next_one():
    """A factor left behind would divide the gradients of the next step, which has none."""
    model, optimizer = made(METHODS["MSAM"])
    expected, plain = made(METHODS["MSAM"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs, labels = batches()[0]
    scaler.scale(cross_entropy(model(inputs), labels)).backward()
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="unperturbed"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    run(optimizer, model, [1, 2])
    run(plain, expected, [1, 2])
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(param, other)


def test_errors_say_what_is_wrong():
    model, optimizer = made(METHODS["MSAM"])
    with pytest.raises(RuntimeError, match="backward\\(\\) must run before each step"):
        optimizer.step()
    run(optimizer, model, range(1))
    for clears in (lambda: None, lambda: optimizer.zero_grad(set_to_none=False), optimizer.zero_grad):
        clears()
        with pytest.raises(RuntimeError, match="backward\\(\\) must run before each step"):
            optimizer.step()
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="must not be called inside unperturbed"):
        optimizer.step()
    params = list(tiny_network().parameters())
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="direction must need no clean gradient"):
        flatmin.OnePass(base, 0.1, direction=Gradient())
    with pytest.raises(ValueError, match="direction must need the clean gradient"):
        flatmin.SharpnessAware(base, 0.1, direction=BaseMomentum())
    for ball in (Ball(metric=flatmin.optim.Fisher(0.1)), LayerBall(joint_vectors=True)):
        with pytest.raises(ValueError, match="ball must not depend on the gradient"):
            flatmin.OnePass(base, 0.1, ball=ball)
    with pytest.raises(ValueError, match="when must go by the number"):
        flatmin.OnePass(base, 0.1, when=flatmin.optim.LargeGradient(10))
    with pytest.raises(ValueError, match="base must have a first moment"):
        flatmin.MSAM(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="rho must be >= 0"):
        flatmin.MSAM(base, -1.0)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "eta": -1.0}]
    with pytest.raises(ValueError, match="eta must be >= 0 and finite, got -1.0"):
        flatmin.AdaptiveMSAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9))


def test_a_schedule_sets_the_radius_of_the_way_out():
    model, optimizer = made(METHODS["MSAM"], dtype=torch.float64, rho_schedule=WarmUp(4))
    for step in range(6):
        run(optimizer, model, range(step, step + 1))
        rests = torch.cat([param.detach().flatten() for param in model.parameters()])
        with optimizer.unperturbed():
            eps = rests - torch.cat([param.detach().flatten() for param in model.parameters()])
        assert eps.norm().item() == pytest.approx(0.3 * min((step + 1) / 4, 1.0))


def test_narrow_weights_are_rounded_anew_in_each_step():
    weights = torch.nn.Parameter(torch.linspace(1.0, 2.0, 500).bfloat16())
    optimizer = flatmin.OnePass(torch.optim.SGD([weights], lr=0.0), 0.02, direction=StaleGradient())
    rests = []
    for _ in range(2):
        optimizer.zero_grad()
        weights.sum().backward()
        optimizer.step()
        rests.append(weights.detach().clone())
    assert not torch.equal(*rests)  # the same w and the same eps
    with optimizer.unperturbed():
        pass
    assert torch.equal(weights, rests[1])  # control: the same step


class _OtherNames(torch.optim.Adagrad):
    """Has momentum, which it keeps under a name of its own."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["momentum"] = 0.9


def test_a_base_whose_momentum_cannot_be_found_is_refused():
    model = tiny_network()
    with pytest.raises(ValueError, match=r"base must have a first moment .* got Adagrad"):
        flatmin.OnePass(torch.optim.Adagrad(model.parameters()), 0.3)
    optimizer = flatmin.MSAM(_OtherNames(model.parameters()))
    with pytest.raises(TypeError, match="base must keep its first moment .* got step, sum"):
        run(optimizer, model, range(2))


def test_a_maximised_group_looks_ahead_too():
    """Maximising -L with momentum is minimising L, perturbation included."""
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(5))
    mirrored = tiny_network()
    ascending = flatmin.MSAM(BASES["sgd"](mirrored.parameters(), maximize=True), 0.3)
    for step in range(5):
        torch.manual_seed(100 + step)
        ascending.zero_grad()
        (-cross_entropy(mirrored(batches()[step][0]), batches()[step][1])).backward()
        ascending.step()
    assert torch.equal(everything(model), everything(mirrored))


def test_a_filter_lets_its_direction_see_the_gradient():
    """Which else would know none, and the weights would rest at w without a word."""
    weights = torch.nn.Parameter(torch.zeros(2, 2))
    direction = Filtered(StaleGradient(), Centralised())
    optimizer = copy.deepcopy(flatmin.OnePass(torch.optim.SGD([weights], lr=0.0), 2.0, direction=direction))
    (weights,) = optimizer.param_groups[0]["params"]
    (weights * torch.tensor([[3.0, 1.0], [1.0, 1.0]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor([[1.0, -1.0], [0.0, 0.0]]) * 2**0.5)


def test_the_gradient_is_seen_before_the_base_writes_into_it():
    class Spends(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for param in self.param_groups[0]["params"]:
                param.grad.zero_()

    weights = torch.nn.Parameter(torch.zeros(2))
    optimizer = flatmin.OnePass(Spends([weights], lr=0.0), 5.0, direction=StaleGradient())
    (weights * torch.tensor([3.0, 4.0])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor([3.0, 4.0]))


def test_a_group_added_late_brings_its_names():
    model = tiny_network()
    base = torch.optim.SGD(model.first.named_parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.AdaptiveMSAM(base, scaled="weights")
    optimizer.add_param_group({"params": [("last.weight", model.last.weight)]})
    for _ in range(2):
        optimizer.step(lambda: backward(model))
    assert optimizer.diagnostics.num_perturbed_steps == 1
