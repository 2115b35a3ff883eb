"""The doctor finds what is wrong, nothing where nothing is, and alters nothing."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything, train
from flatmin.optim import SharpnessAware
from optimizers import TABLE, built, closure_on
from problems import batches, quadratic, tiny_network


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def _names(optimizer, closure, **options):
    return [finding.name for finding in flatmin.doctor(optimizer, closure, **options).findings]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_good_set_up_is_healthy_and_afterwards_nothing_has_changed(row):
    model, optimizer = built(row)
    train(optimizer, model, range(3))
    twin, twin_optimizer = built(row)
    train(twin_optimizer, twin, range(3))
    buffers = [(name, id(buffer)) for name, buffer in model.named_buffers()]
    grads = [(id(param.grad), None if param.grad is None else param.grad.clone()) for param in model.parameters()]
    before = copy.deepcopy(optimizer.state_dict()), optimizer.diagnostics.as_dict(), torch.get_rng_state()
    num_hooks, closure, calls = len(model._forward_pre_hooks), closure_on(optimizer, model), []

    checkup = flatmin.doctor(optimizer, lambda: (calls.append(1), closure())[1])
    rho = flatmin.suggest_rho(optimizer, closure, 0.05)
    assert checkup.is_healthy, str(checkup)
    assert rho > 0
    assert len(calls) == 2 + 10 * row.num_closure_calls

    assert torch.equal(everything(model), everything(twin))
    assert [(name, id(buffer)) for name, buffer in model.named_buffers()] == buffers
    assert all(
        param.grad is None or torch.equal(param.grad, value)
        for param, (_, value) in zip(model.parameters(), grads, strict=True)
    )
    assert [id(param.grad) for param in model.parameters()] == [address for address, _ in grads]
    torch.testing.assert_close(optimizer.state_dict(), before[0], rtol=0, atol=0)
    assert optimizer.diagnostics.as_dict() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert len(model._forward_pre_hooks) == num_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    train(optimizer, model, range(3, 6))
    train(twin_optimizer, twin, range(3, 6))
    assert torch.equal(everything(model), everything(twin))


def test_the_numbers_are_those_of_the_quadratic():
    """At w with L = w A w / 2: the rise is rho |g| + rho^2 g A g / 2 |g|^2."""
    curvature, start = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([1.0, -2.0])
    weights = nn.Parameter(start.clone())
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), 0.5)

    def closure():
        optimizer.zero_grad()
        loss = quadratic(curvature, weights)
        loss.backward()
        return loss

    checkup = flatmin.doctor(optimizer, closure, num_steps=3)
    g = curvature @ start
    there = curvature @ (start + 0.5 * g / g.norm())
    assert checkup.findings == ()
    assert (checkup.num_steps, checkup.num_perturbed_steps) == (3, 3)
    assert checkup.loss == pytest.approx(4.0)
    assert checkup.loss_rise == pytest.approx(float(0.5 * g.norm() + 0.125 * (g @ curvature @ g) / g.norm() ** 2))
    assert (checkup.asked_norm, checkup.perturbation_norm) == pytest.approx((0.5, 0.5))
    assert checkup.cosine == pytest.approx(float(torch.cosine_similarity(g, there, dim=0)))
    assert str(checkup).splitlines()[0] == "3 dry steps: nothing is wrong"
    assert "0.5 of 0.5 asked" in str(checkup)


def _closure(optimizer, loss):
    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def _loss(model, batch=0):
    inputs, labels = batches(next(model.parameters()).dtype)[batch]
    return cross_entropy(model(inputs), labels)


def _frozen():
    model = _network().requires_grad_(False)
    return flatmin.SAM(_sgd(model), model=model), lambda: _loss(model)


def _no_radius():
    model = _network()
    optimizer = flatmin.SAM(_sgd(model), 0.0, model=model)
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _nothing_perturbed():
    model = _network()
    base = torch.optim.SGD([{"params": list(model.parameters()), "perturb": False}], lr=0.1)
    optimizer = flatmin.SAM(base, model=model)
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _no_backward():
    model = _network()
    return flatmin.SAM(_sgd(model), model=model), lambda: _loss(model)


def _other_model():
    model, other = _network(), _network()
    optimizer = flatmin.SAM(_sgd(model))
    return optimizer, _closure(optimizer, lambda: _loss(other))


def _cleared(set_to_none):
    model = _network()
    optimizer = flatmin.SAM(_sgd(model), model=model)

    def closure():
        loss = _loss(model)
        loss.backward()
        model.zero_grad(set_to_none=set_to_none)
        return loss

    return optimizer, closure


def _not_finite():
    model = _network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    return optimizer, _closure(optimizer, lambda: _loss(model) * float("inf"))


def _changing_batch():
    model, number = _network(), itertools.count()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    return optimizer, _closure(optimizer, lambda: _loss(model, next(number) % 6))


def _without_model():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model))
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _only_dropout_without_model():
    model = nn.Sequential(nn.Linear(5, 30), nn.Dropout(), nn.Linear(30, 3))
    optimizer = flatmin.SAM(_sgd(model))
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _only_batch_norm_without_model():
    model = nn.Sequential(nn.Linear(5, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    optimizer = flatmin.SAM(_sgd(model))
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _inner_module():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=nn.Sequential(model))
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _never():
    class Window:
        def __call__(self, step):
            return step >= 1000

    model = _network()
    optimizer = SharpnessAware(_sgd(model), when=Window())
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _threshold():
    class AboveThousand:
        def decide(self, step, gradient_norm, memory):
            memory["seen"] = gradient_norm
            return gradient_norm > 1000

    model = _network()
    optimizer = SharpnessAware(_sgd(model), when=AboveThousand())
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _rounded(rho, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2000), nn.Tanh(), nn.Linear(2000, 3)).to(dtype)
    optimizer = flatmin.SAM(_sgd(model), rho, rounding="nearest")
    return optimizer, _closure(optimizer, lambda: _loss(model))


def _graph_from_before():
    model = _network()
    optimizer = flatmin.SAM(_sgd(model))
    loss = _loss(model)

    def closure():
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        return loss

    return optimizer, closure


def _linear_graph_from_before():
    """Whose backward pass needs no weights, so that torch has nothing to complain about."""
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1))
    loss = (weights * torch.ones(2)).sum()

    def closure():
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        return loss

    return optimizer, closure


def _radius(rho):
    weights = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), rho)
    return optimizer, _closure(optimizer, lambda: weights.square().sum() / 2)


SICK = {
    "frozen": (_frozen, "all frozen"),
    "rho 0": (_no_radius, "no radius"),
    "no group perturbed": (_nothing_perturbed, "no radius"),
    "no backward": (_no_backward, "no backward"),
    "another model": (_other_model, "no backward"),
    "cleared to none": (lambda: _cleared(True), "cleared gradient"),
    "cleared to zero": (lambda: _cleared(False), "zero gradient"),
    "not finite": (_not_finite, "not finite"),
    "next batch at each call": (_changing_batch, "changing batch"),
    "batch norm and dropout": (_without_model, "missing model"),
    "batch norm": (_only_batch_norm_without_model, "missing model"),
    "dropout": (_only_dropout_without_model, "missing model"),
    "wrapper never called": (_inner_module, "model not called"),
    "late window": (_never, "never perturbed"),
    "threshold": (_threshold, "never perturbed"),
    "bfloat16": (lambda: _rounded(1e-3, torch.bfloat16), "rounded away"),
    "float32": (lambda: _rounded(1e-9, torch.float32), "rounded away"),
    "graph from before": (_graph_from_before, "stale closure"),
    "linear graph from before": (_linear_graph_from_before, "stale closure"),
    "tiny radius": (lambda: _radius(1e-8), "no effect"),
    "huge radius": (lambda: _radius(50.0), "too big"),
}


@pytest.mark.parametrize("sick", SICK)
def test_each_illness_is_found_alone_and_nothing_is_altered(sick):
    build, name = SICK[sick]
    optimizer, closure = build()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict())
    state = torch.get_rng_state()
    checkup = flatmin.doctor(optimizer, closure)
    assert [finding.name for finding in checkup.findings] == [name], str(checkup)
    assert not checkup.is_healthy
    assert f"- {name}: " in str(checkup)
    assert "Change: " in str(checkup)
    assert all(torch.equal(x, y) for x, y in zip(params, before[0], strict=True))
    assert optimizer.state_dict() == before[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(param.grad is None for param in params)


def test_a_missing_model_is_told_by_what_it_does():
    messages = [
        flatmin.doctor(*build()).findings[0].message
        for build in (_without_model, _only_batch_norm_without_model, _only_dropout_without_model)
    ]
    assert ["BatchNorm1d" in message for message in messages] == [True, True, False]
    assert ["dropout" in message for message in messages] == [True, False, True]


@pytest.mark.parametrize("build", [lambda: _rounded(0.05, torch.float32), lambda: _radius(0.5)])
def test_a_sensible_radius_is_healthy(build):
    assert _names(*build()) == []


@pytest.mark.parametrize("gives_model", [True, False])
def test_a_compiled_model_is_examined_and_left_as_it_was(gives_model):
    model = nn.Sequential(nn.Linear(5, 30), nn.BatchNorm1d(30), nn.Linear(30, 3))
    compiled = torch.compile(model, backend="eager")
    optimizer = flatmin.SAM(_sgd(model), model=compiled if gives_model else None)
    before = everything(model)
    names = _names(optimizer, _closure(optimizer, lambda: _loss(compiled)))
    assert names == ([] if gives_model else ["missing model"])
    assert torch.equal(everything(model), before)


def test_several_batches_are_used_in_turn():
    model = _network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    used = []
    closures = [_closure(optimizer, lambda i=i: (used.append(i), _loss(model, i))[1]) for i in range(3)]
    assert _names(optimizer, closures) == []
    assert used == [0, 0, *(i % 3 for i in range(10) for _ in range(2))]


def test_a_scaled_loss_is_healthy_and_its_gradient_unscaled():
    class Below:
        norms = ()

        def decide(self, step, gradient_norm, memory):
            Below.norms += (gradient_norm,)
            return gradient_norm < 100

    model = _network()
    optimizer = SharpnessAware(_sgd(model), model=model, when=Below())
    scaler = GradScaler("cpu", init_scale=2.0**16)

    def closure():
        optimizer.zero_grad()
        loss = _loss(model)
        scaler.scale(loss).backward()
        return loss

    state = scaler.scale(torch.ones(())), scaler.state_dict()
    assert _names(optimizer, closure, scaler=scaler) == []
    assert max(Below.norms) < 10
    assert (scaler.scale(torch.ones(())), scaler.state_dict()) == state
    assert "seen" not in optimizer.param_groups[0]


def test_a_piece_with_a_generator_gets_it_back():
    class Noise:
        needs_clean_gradient, depends_on_scale = True, False

        def __init__(self):
            self.generator = torch.Generator().manual_seed(3)

        def __call__(self, space):
            return [torch.randn(grad.shape, generator=self.generator) for grad in space.grads]

    model, noise = _network(), Noise()
    optimizer = SharpnessAware(_sgd(model), direction=noise)
    before = noise.generator.get_state()
    flatmin.doctor(optimizer, _closure(optimizer, lambda: _loss(model)))
    assert torch.equal(noise.generator.get_state(), before)


def test_a_closure_that_raises_leaves_no_trace():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), 0.3, model=model)
    train(optimizer, model, range(2))
    for failing in range(1, 6):
        before, calls = everything(model), []

        def closure(calls=calls, failing=failing):
            calls.append(1)
            loss = _loss(model)
            loss.backward()
            if len(calls) == failing:
                raise KeyError
            return loss

        with pytest.raises(KeyError):
            flatmin.doctor(optimizer, closure)
        assert torch.equal(everything(model), before)
    train(optimizer, model, range(2, 3))


def test_an_optimizer_without_the_two_passes_is_refused_by_name():
    weights = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    for ask in (flatmin.doctor, lambda optimizer, closure: flatmin.suggest_rho(optimizer, closure, 0.1)):
        with pytest.raises(TypeError, match="optimizer must be a flatmin.SharpnessAware, .* got SGD$"):
            ask(plain, lambda: None)
        with pytest.raises(TypeError, match=r"got MSAM: look at its diagnostics$"):
            ask(flatmin.MSAM(torch.optim.SGD([weights], lr=0.1, momentum=0.9)), lambda: None)


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_steps_below_one_is_refused(number):
    with pytest.raises(ValueError, match=f"num_steps must be >= 1, got {number}"):
        flatmin.doctor(*_radius(0.1), num_steps=number)


@pytest.mark.parametrize("state", ["away", "accumulating", "complete"])
def test_a_step_under_way_is_refused(state):
    optimizer, closure = _radius(0.1)
    closure()
    with optimizer.perturbed():
        closure()
        if state == "away":
            with pytest.raises(RuntimeError, match="a step is under way"):
                flatmin.doctor(optimizer, closure)
            closure()
    if state == "accumulating":
        optimizer.accumulate()
    with pytest.raises(RuntimeError, match="a step is under way"):
        flatmin.doctor(optimizer, closure)
