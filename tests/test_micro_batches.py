"""Micro-batches at the edges: closures of other kinds, rules that say no, and loops that stop half-way."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy

import flatmin
from doors import accumulated, closures_on, everything, in_a_list
from flatmin.optim import SharpnessAware
from problems import batches, quadratic, tiny_network


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def _losses(model, number=4):
    inputs, labels = batches()[0]
    parts = zip(inputs.chunk(number), labels.chunk(number), strict=True)
    return [lambda x=x, y=y: cross_entropy(model(x), y) for x, y in parts]


class _OnlyEven:
    def __call__(self, step):
        return step % 2 == 0


class _Below:
    def __init__(self, threshold):
        self.threshold, self.norms = threshold, []

    def decide(self, step, gradient_norm, memory):
        self.norms.append(gradient_norm)
        return gradient_norm < self.threshold


@pytest.mark.parametrize("door", [in_a_list, accumulated])
def test_a_step_that_is_not_perturbed_is_the_base_with_accumulated_gradients(door):
    model, plain = tiny_network(), tiny_network()
    optimizer, base = SharpnessAware(_sgd(model), 0.3, model=model, when=_OnlyEven()), _sgd(plain)
    optimizer.param_groups[0]["num_steps"] = 1
    calls = []
    torch.manual_seed(0)
    door(optimizer, [lambda loss=loss: (calls.append(1), loss())[1] for loss in _losses(model)])
    torch.manual_seed(0)
    for loss in _losses(plain):
        (loss() / 4).backward()
    base.step()
    assert torch.equal(everything(model), everything(plain))
    assert len(calls) == (4 if door is in_a_list else 8)  # a loop has run its second passes before we are asked
    assert (optimizer.diagnostics.num_steps, optimizer.diagnostics.num_perturbed_steps) == (1, 0)
    door(optimizer, _losses(model))
    assert optimizer.diagnostics.num_perturbed_steps == 1


def test_a_rule_that_looks_at_the_gradient_decides_once_for_a_shared_perturbation():
    model = tiny_network()
    when = _Below(100.0)
    optimizer = SharpnessAware(_sgd(model), 0.3, model=model, when=when)
    in_a_list(optimizer, _losses(model), shared_perturbation=True)
    assert len(when.norms) == 1
    assert optimizer.diagnostics.num_perturbed_steps == 1
    with pytest.raises(ValueError, match="shared_perturbation must be True with _Below"):
        in_a_list(optimizer, _losses(model))
    with pytest.raises(ValueError, match="shared_perturbation must be True with _Below"):
        accumulated(optimizer, _losses(model))
    optimizer.restore()
    when.threshold = 0.0
    in_a_list(optimizer, _losses(model), shared_perturbation=True)
    assert optimizer.diagnostics.num_perturbed_steps == 1


def test_the_last_micro_batch_may_go_without_accumulate():
    model, other = tiny_network(), tiny_network()
    optimizer, reference = flatmin.SAM(_sgd(model), 0.3, model=model), flatmin.SAM(_sgd(other), 0.3, model=other)
    for door in ("two steps", "context"):
        torch.manual_seed(0)
        for index, loss in enumerate(_losses(model)):
            loss().backward()
            if door == "two steps":
                optimizer.first_step(zero_grad=True)
                loss().backward()
            else:
                with optimizer.perturbed():
                    loss().backward()
            if index < 3:
                optimizer.accumulate()
        optimizer.second_step() if door == "two steps" else optimizer.step()
        optimizer.zero_grad()
        torch.manual_seed(0)
        in_a_list(reference, _losses(other))
    assert torch.equal(everything(model), everything(other))


def test_a_micro_batch_without_a_second_pass_is_an_error():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), 0.3, model=model)
    first, second, *_ = _losses(model)
    weights = model.last.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"accumulate\(\) must follow first_step\(\)"):
        optimizer.accumulate()
    first().backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.accumulate()
    assert torch.equal(model.last.weight, weights)
    first().backward()
    optimizer.first_step(zero_grad=True)
    first().backward()
    optimizer.accumulate()
    second().backward()
    with pytest.raises(RuntimeError, match="without a second pass"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="must not follow first_step"):
        in_a_list(optimizer, [first])
    optimizer.restore()
    assert torch.equal(model.last.weight, weights)
    in_a_list(optimizer, [first])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("silent", [0, 1, 3])
def test_a_closure_without_backward_is_an_error_whichever_it_is(shared, silent):
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), 0.3, model=model)
    closures = closures_on(optimizer, _losses(model))
    closures[silent] = lambda: _losses(model)[silent]()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="no parameter has a"):
        optimizer.step(closures, shared_perturbation=shared)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


def test_the_scaler_cannot_step_with_gradients_put_aside_and_says_so():
    model, other = tiny_network(), tiny_network()
    optimizer, reference = flatmin.SAM(_sgd(model), 0.3, model=model), flatmin.SAM(_sgd(other), 0.3, model=other)
    scaler = GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(0)
    for loss in _losses(model):
        scaler.scale(loss()).backward()
        with optimizer.perturbed():
            scaler.scale(loss()).backward()
        optimizer.accumulate()
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(scaler=scaler\) and then scaler.update"):
        scaler.step(optimizer)
    optimizer.step(scaler=scaler)
    scaler.update()
    torch.manual_seed(0)
    in_a_list(reference, _losses(other))
    assert torch.equal(everything(model), everything(other))


@pytest.mark.parametrize(
    ("values", "reduction", "expected"),
    [((1.0, 2.0), "mean", 1.5), ((1.0, 2.0), "sum", 3.0), ((torch.tensor(1.0), None), "mean", None)],
)
def test_closures_may_return_numbers_or_nothing(values, reduction, expected):
    weights = nn.Parameter(torch.tensor([3.0]))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1))
    closures = [lambda value=value: (weights.square().sum().backward(), value)[1] for value in values]
    assert optimizer.step(closures, reduction=reduction) == expected


@pytest.mark.parametrize(
    ("closures", "options", "message"),
    [
        ([], {}, "closure must not be an empty list"),
        (None, {"reduction": "max"}, "reduction must be one of mean, sum, got 'max'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(closures, options, message):
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closures, **options)


def test_second_passes_see_the_masks_of_their_own_micro_batch():
    model = nn.Dropout(0.5)
    weights = nn.Parameter(torch.ones(200))
    for shared in (False, True):
        optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.0), model=model)
        masks = []

        def loss(masks=masks):
            output = model(weights)
            masks.append(output != 0)
            return output.sum()

        in_a_list(optimizer, [loss, loss], shared_perturbation=shared)
        first, second = (masks[:2], masks[2:]) if shared else (masks[::2], masks[1::2])
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        assert not torch.equal(*first)


def test_diagnostics_hold_the_mean_loss_and_its_rise():
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.0), 0.5)
    losses = [lambda: weights.square().sum() / 2, lambda: weights[1] * 1.0]
    for shared in (False, True):
        loss = in_a_list(optimizer, losses, shared_perturbation=shared)
        values = optimizer.diagnostics.as_dict()
        assert loss.item() == values["loss"] == pytest.approx((12.5 + 4) / 2)
        if not shared:  # 0.5 (|w| + 1/4) along the gradient of each
            assert values["loss_rise"] == pytest.approx((0.5 * 5 + 0.125 + 0.5) / 2, rel=1e-5)
    assert values["num_perturbed_steps"] == 2


def test_buffers_can_be_averaged_in_a_loop_of_ones_own():
    model = tiny_network()
    copies = [copy.deepcopy(model) for _ in range(4)]
    inputs = batches()[0][0].chunk(4)
    with flatmin.optim.averaged_buffers(model, 4) as next_micro_batch:
        for part in inputs:
            model(part)
            next_micro_batch()
    for each, part in zip(copies, inputs, strict=True):
        each(part)
    start = tiny_network().mean_input
    expected = torch.stack([each.mean_input for each in copies]).mean(dim=0)
    assert torch.equal(model.mean_input, expected)
    assert not torch.allclose(expected, start)
    assert model.num_calls == 1  # integers are those of the last


_CURVATURES = [torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([4.0, 1.0], [1.0, 3.0], [0.5, 2.0])]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_follows_the_base_step_is_that_of_all_micro_batches(reduction):
    """WSAM: ``w -= lr mean g_i``, then ``w -= lr gamma / (1 - gamma) mean (g_p,i - g_i)``, each with its own eps."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    weights = nn.Parameter(start.clone())
    optimizer = flatmin.WSAM(torch.optim.SGD([weights], lr=0.1), 0.7, gamma=0.6)
    in_a_list(optimizer, [lambda a=a: quadratic(a, weights) for a in _CURVATURES], reduction=reduction)
    clean = [a @ start for a in _CURVATURES]
    perturbed = [a @ (start + 0.7 * g / g.norm()) for a, g in zip(_CURVATURES, clean, strict=True)]
    divisor = 3 if reduction == "mean" else 1
    gap = sum(perturbed) - sum(clean)
    torch.testing.assert_close(weights.detach(), start - 0.1 * (sum(clean) + 1.5 * gap) / divisor, rtol=1e-12, atol=0.0)


def test_what_is_remembered_is_the_mean_over_the_micro_batches():
    """VaSSO: ``d_t`` is the mean of ``(1 - theta) d_(t-1) + theta g_i``, from which each next eps starts."""
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    weights = nn.Parameter(start.clone())
    optimizer = flatmin.VaSSO(torch.optim.SGD([weights], lr=0.1), 0.7, theta=0.4)
    mean = None
    for _ in range(3):
        before = weights.detach().clone()
        in_a_list(optimizer, [lambda a=a: quadratic(a, weights) for a in _CURVATURES])
        clean = [a @ before for a in _CURVATURES]
        along = [g if mean is None else 0.6 * mean + 0.4 * g for g in clean]
        followed = [a @ (before + 0.7 * d / d.norm()) for a, d in zip(_CURVATURES, along, strict=True)]
        torch.testing.assert_close(weights.detach(), before - 0.1 * sum(followed) / 3, rtol=1e-12, atol=0.0)
        mean = sum(along) / 3
        torch.testing.assert_close(optimizer.state[weights]["smoothed_gradient"], mean, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("shared", [True, False])
def test_the_loss_of_several_micro_batches_holds_no_graph(shared):
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), 0.1, model=model)
    assert not in_a_list(optimizer, _losses(model), shared_perturbation=shared).requires_grad


@pytest.mark.parametrize("shared", [True, False])
def test_closures_need_not_zero_the_gradients_that_steps_have_used(shared):
    ends = []
    for zeroes in (True, False):
        weights = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), 0.3)

        def closure(curvature, weights=weights, optimizer=optimizer, zeroes=zeroes):
            if zeroes:
                optimizer.zero_grad()
            loss = quadratic(curvature, weights)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step([partial(closure, a) for a in _CURVATURES], shared_perturbation=shared)
        ends.append(weights.detach())
    assert torch.equal(*ends)
