"""bSAM against a transcription of the authors' box, and its posterior."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything
from problems import batches, tiny_network

OPTIONS = {"lr": 0.3, "num_data": 200, "rho": 0.05, "weight_decay": 1e-3, "damping": 0.1}


def _closures(optimizer, model, step, number=1, seen=None):
    inputs, labels = batches(next(model.parameters()).dtype)[step % 6]

    def closure_of(part):
        def closure():
            optimizer.zero_grad()
            if seen is not None:
                seen.append([param.detach().clone() for param in model.parameters()])
            loss = cross_entropy(model(inputs[part]), labels[part])
            loss.backward()
            return loss

        return closure

    size = len(labels) // number
    return [closure_of(slice(i * size, (i + 1) * size)) for i in range(number)]


def _run(optimizer, model, steps, number=1):
    for step in steps:
        torch.manual_seed(step)
        optimizer.step(_closures(optimizer, model, step, number))


@pytest.mark.parametrize("number", [1, 2])
def test_twenty_steps_equal_the_published_box_in_float64(number):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    names = [name for name, _ in model.named_parameters()]
    optimizer = flatmin.BSAM(model.parameters(), **OPTIONS)
    w = [param.detach().clone() for param in model.parameters()]
    m, s = [torch.zeros_like(x) for x in w], [torch.ones_like(x) for x in w]
    for step in range(20):
        seen = []
        optimizer.step(_closures(optimizer, model, step, number, seen))
        inputs, labels = batches(torch.float64)[step % 6]
        rise, mean = [torch.zeros_like(x) for x in w], [torch.zeros_like(x) for x in w]
        size = 16 // number
        for index in range(number):
            part = slice(index * size, (index + 1) * size)

            def gradient(weights, part=part, inputs=inputs, labels=labels):
                weights = [x.detach().requires_grad_() for x in weights]
                output = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (inputs[part],))
                return torch.autograd.grad(cross_entropy(output, labels[part]), weights)

            g = gradient(seen[2 * index])  # the sample that was drawn
            there = [x + 0.05 * a / b for x, a, b in zip(w, g, s, strict=True)]
            torch.testing.assert_close(seen[2 * index + 1], there, rtol=1e-9, atol=1e-9, check_stride=False)
            g_p = gradient(there)
            rise = [x + b.sqrt() * a.abs() / number for x, a, b in zip(rise, g, s, strict=True)]
            mean = [x + a / number for x, a in zip(mean, g_p, strict=True)]
        m = [0.9 * a + 0.1 * (b + 1e-3 * x) for a, b, x in zip(m, mean, w, strict=True)]
        w = [x - 0.3 * a / b for x, a, b in zip(w, m, s, strict=True)]
        s = [0.999 * b + 0.001 * (a + 0.1 + 1e-3) for a, b in zip(rise, s, strict=True)]
        torch.testing.assert_close(list(model.parameters()), w, rtol=1e-9, atol=1e-9, check_stride=False)


def test_samples_have_the_posteriors_spread():
    weights = nn.Parameter(torch.zeros(200_000, dtype=torch.float64))
    optimizer = flatmin.BSAM([weights], num_data=50, initial_precision=0.2)
    with optimizer.sampled(torch.Generator().manual_seed(3)):
        sample = weights.detach().clone()
    assert not weights.any()
    expected = math.sqrt(1 / (50 * 0.2))
    assert abs(sample.std() / expected - 1) < 0.01
    assert abs(sample.mean()) < 5 * expected / math.sqrt(len(sample))
    assert abs(sample.std() / (1 / (50 * 0.2)) - 1) > 0.5  # the control: the root is there


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit():
    model = tiny_network()
    optimizer = flatmin.BSAM(model.parameters(), **OPTIONS, model=model)
    _run(optimizer, model, range(4), 2)
    resumed = tiny_network(seed=1)
    resumed_optimizer = flatmin.BSAM(resumed.parameters(), num_data=200, model=resumed)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _run(optimizer, model, range(4, 8), 2)
    _run(resumed_optimizer, resumed, range(4, 8), 2)
    assert torch.equal(everything(resumed), everything(model))


@pytest.mark.parametrize("what", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(what):
    model = tiny_network()
    optimizer = flatmin.BSAM(model.parameters(), **OPTIONS, model=model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    _run(optimizer, model, range(3))
    scheduler.step()
    both = (model, optimizer)
    model_copy, optimizer_copy = copy.deepcopy(both) if what == "deepcopy" else pickle.loads(pickle.dumps(both))
    _run(optimizer, model, range(3, 6))
    _run(optimizer_copy, model_copy, range(3, 6))
    assert torch.equal(everything(model_copy), everything(model))
    assert optimizer_copy.diagnostics.num_steps == 6
    optimizer_copy.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("num_steps", [0, 4])
def test_torch_distributed_checkpoint_resumes_bit_for_bit(num_steps):
    (model, optimizer), (resumed, resumed_optimizer), (untouched, other) = (
        (network, flatmin.BSAM(network.parameters(), **OPTIONS, model=network))
        for network in (tiny_network(), tiny_network(seed=1), tiny_network())
    )
    for network in (model, resumed, untouched):
        network.unused.requires_grad_(False)  # torch asks for a state of every parameter that has gradients
    for each, network in ((optimizer, model), (other, untouched)):
        _run(each, network, range(num_steps))
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    set_state_dict(resumed, resumed_optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    for each, network in ((optimizer, model), (resumed_optimizer, resumed), (other, untouched)):
        _run(each, network, range(num_steps, num_steps + 3))
    assert torch.equal(everything(resumed), everything(model))
    assert torch.equal(everything(untouched), everything(model))


def test_no_closure_is_refused_where_a_step_would_be_taken():
    model = tiny_network()
    with pytest.raises(TypeError, match="closure must be a function that returns the loss, .* got None"):
        flatmin.BSAM(model.parameters(), **OPTIONS).step()


@pytest.mark.parametrize("only_call", [1, 2])
def test_a_gradient_that_one_pass_lacks_is_zero_there(only_call):
    """As in the box, of which ``|g|`` or ``g_p`` is zero then."""
    both, one = (nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64)) for _ in range(2))
    optimizer = flatmin.BSAM([both, one], **OPTIONS)
    before = one.detach().clone()
    slope = torch.tensor([3.0, -2.0], dtype=torch.float64)
    num_calls = 0

    def closure():
        nonlocal num_calls
        num_calls += 1
        optimizer.zero_grad()
        loss = both.sum() + (one @ slope if num_calls == only_call else 0.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    decay, damping, lr = (OPTIONS[name] for name in ("weight_decay", "damping", "lr"))
    g, g_p = (slope if call == only_call else torch.zeros_like(slope) for call in (1, 2))
    torch.testing.assert_close(one.detach(), before - lr * 0.1 * (g_p + decay * before))
    precision = 0.999 + 0.001 * (g.abs() + damping + decay)
    torch.testing.assert_close(optimizer.state[one]["precision"], precision)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_weights_are_restored_when_a_closure_raises(failing_call):
    model = tiny_network()
    optimizer = flatmin.BSAM(model.parameters(), **OPTIONS, model=model)
    before = [param.detach().clone() for param in model.parameters()]
    (closure,) = _closures(optimizer, model, 0)
    calls = []

    def failing():
        calls.append(None)
        if len(calls) == failing_call:
            raise KeyError
        return closure()

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    optimizer.step(closure)
    assert not all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("bad_call", [1, 2])
def test_a_gradient_that_is_not_finite_skips_the_step(bad_call):
    model = tiny_network()
    optimizer = flatmin.BSAM(model.parameters(), **OPTIONS, model=model)
    _run(optimizer, model, range(2))
    before = [param.detach().clone() for param in model.parameters()]
    (closure,) = _closures(optimizer, model, 0)
    calls = []

    def spoiled():
        loss = closure()
        calls.append(None)
        if len(calls) == bad_call:
            model.last.weight.grad[0, 0] = torch.nan
        return loss

    optimizer.step(spoiled)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))
    assert optimizer.diagnostics.num_skipped_steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"rho": -1.0}, "rho must be >= 0 and finite, got -1.0"),
        ({"damping": math.nan}, "damping must be >= 0 and finite, got nan"),
        ({"initial_precision": 0.0}, "initial_precision must be > 0"),
        ({"betas": (1.0, 0.9)}, "betas must be two numbers in"),
        ({"betas": (0.9,)}, "betas must be two numbers in"),
        ({"num_data": 0}, "num_data must be >= 1, got 0"),
    ],
)
def test_values_outside_the_domain_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        flatmin.BSAM(tiny_network().parameters(), **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"maximize": True}, "groups must have no maximize with BSAM"),
        ({"masks": [torch.ones(2, dtype=torch.bool)]}, "groups must have no masks with BSAM"),
        ({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]}, "params must be real, got complex"),
    ],
)
def test_groups_that_the_box_does_not_know_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        flatmin.BSAM([{"params": [nn.Parameter(torch.ones(2))], **group}], **OPTIONS)


def test_a_group_left_out_of_the_perturbation_is_sampled_only():
    model = tiny_network()
    optimizer = flatmin.BSAM(
        flatmin.param_groups(model, "norm"), **{**OPTIONS, "num_data": 1e30}
    )  # no noise to speak of
    seen = []
    optimizer.step(_closures(optimizer, model, 0, seen=seen))
    moves = {name: (y - x).abs().max() for (name, _), x, y in zip(model.named_parameters(), *seen, strict=True)}
    assert {name for name, move in moves.items() if move > 1e-9} == {"norm.weight", "norm.bias"}


def test_sparse_gradients_and_frozen_networks_are_refused_by_name():
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = flatmin.BSAM(model.parameters(), **OPTIONS)

    def closure():
        loss = model(torch.tensor([1, 2])).square().sum()
        if loss.requires_grad:
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="gradients must be dense, got a sparse one"):
        optimizer.step(closure)
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(closure)
