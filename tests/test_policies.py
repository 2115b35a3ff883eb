"""When steps are perturbed, how far, and what the named methods reduce to."""

import copy
import math

import pytest
import torch
from torch import nn

import flatmin
from doors import everything, through_closure, through_two_steps, train
from flatmin.optim import (
    AllOf,
    Always,
    Bernoulli,
    CosineToZero,
    Every,
    LargeGradient,
    ProportionalToLr,
    SharpnessAware,
    WarmUp,
    Window,
    Within,
)
from optimizers import POLICIES, built, closure_on, sgd
from problems import quadratic, tiny_network

INF = math.inf


def _trained(build, steps=range(9), **options):
    model = tiny_network(dtype=torch.float64)
    optimizer = build(sgd(model.parameters()), model=model, **options)
    train(optimizer, model, steps)
    return everything(model)


def _bound(method, **fixed):
    return lambda base, **options: method(base, 0.2, **fixed, **options)


@pytest.mark.parametrize(
    "method",
    [
        _bound(flatmin.GSAM, alpha=0.0),
        _bound(flatmin.GNP, alpha=1.0),
        _bound(flatmin.WSAM, gamma=0.5, decouple=False),
        _bound(flatmin.LookSAM, interval=1),
        _bound(flatmin.AESAM, num_steps=9, c_start=-INF, c_end=-INF),
        _bound(flatmin.RST, probability=1.0),
        _bound(flatmin.LateSAM, num_steps=9, start=0.0),
        _bound(flatmin.VaSSO, theta=1.0),
        _bound(flatmin.FriendlySAM, sigma=0.0, lmbda=0.5),
        _bound(flatmin.USAM, share=1.0),
        _bound(flatmin.LESAM, sigma=1e9),
        _bound(SharpnessAware),
    ],
    ids=[
        "GSAM",
        "GNP",
        "WSAM",
        "LookSAM",
        "AESAM",
        "RST",
        "LateSAM",
        "VaSSO",
        "FriendlySAM",
        "USAM",
        "LESAM",
        "engine",
    ],
)
def test_the_limit_of_a_method_is_sam(method):
    found, expected = _trained(method), _trained(_bound(flatmin.SAM))
    assert torch.equal(found, expected)
    assert not torch.allclose(expected, _trained(lambda base, model: base))


@pytest.mark.parametrize(
    "method",
    [
        _bound(flatmin.GNP, alpha=0.0),
        _bound(flatmin.WSAM, gamma=0.0),
        _bound(flatmin.WSAM, gamma=0.0, decouple=False),
        _bound(flatmin.RST, probability=0.0),
        _bound(flatmin.LateSAM, num_steps=9, start=1.0),
        _bound(flatmin.AESAM, num_steps=9, c_start=INF, c_end=INF),
        _bound(flatmin.LESAM, sigma=0.0),
    ],
    ids=["GNP", "WSAM", "WSAM-coupled", "RST", "LateSAM", "AESAM", "LESAM"],
)
def test_the_other_limit_is_the_base_bit_for_bit(method):
    assert torch.equal(_trained(method), _trained(lambda base, model: base))


def test_what_is_reused_is_nothing_where_nothing_was_kept():
    """``g + alpha (||g|| / ||g_v||) g_v``, with zeros in g_v for a parameter that the perturbed step did not use."""
    curvature = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    used = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    late = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = flatmin.LookSAM(torch.optim.SGD([used, late], lr=0.0), 0.7, interval=2, alpha=0.3)
    g = curvature @ used.detach()
    perturbed = curvature @ (used.detach() + 0.7 * g / g.norm())
    across = perturbed - (perturbed @ g) / (g @ g) * g
    through_closure(optimizer, lambda: quadratic(curvature, used))
    through_closure(optimizer, lambda: quadratic(curvature, used) + 3.0 * late.sum())
    length = (g @ g + 9.0).sqrt()
    torch.testing.assert_close(used.grad, g + 0.3 * length / across.norm() * across, rtol=1e-12, atol=0.0)
    assert late.grad.item() == 3.0


@pytest.mark.parametrize(
    ("method", "num_passes"),
    [
        (_bound(flatmin.SAM), 20),
        (_bound(flatmin.LookSAM, interval=5), 12),
        (_bound(flatmin.RST, probability=lambda step: float(step < 4)), 14),
        (_bound(flatmin.LateSAM, num_steps=10, start=0.8), 12),
        (_bound(flatmin.AESAM, num_steps=10, c_start=INF, c_end=INF), 10),
        (_bound(SharpnessAware, when=AllOf(Every(2), Window(0, 5))), 13),
    ],
    ids=["SAM", "LookSAM", "RST", "LateSAM", "AESAM", "combined"],
)
def test_passes_are_saved_as_documented(method, num_passes):
    model = tiny_network()
    optimizer = method(sgd(model.parameters()), model=model)
    calls = []
    closure = closure_on(optimizer, model)
    for _ in range(10):
        optimizer.step(lambda: calls.append(None) or closure())
    assert len(calls) == num_passes
    assert optimizer.diagnostics.num_perturbed_steps == num_passes - 10


@pytest.mark.parametrize("row", POLICIES, ids=lambda row: row.name)
def test_every_door_gives_the_same_weights(row):
    model, optimizer = built(row)
    train(optimizer, model, range(8))
    other, other_optimizer = built(row)
    train(other_optimizer, other, range(8), through_two_steps)
    torch.testing.assert_close(everything(other), everything(model), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", POLICIES, ids=lambda row: row.name)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(row):
    model, optimizer = built(row)
    train(optimizer, model, range(5))
    resumed, resumed_optimizer = built(row, rho=0.7)
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, range(5, 10))
    train(resumed_optimizer, resumed, range(5, 10))
    assert torch.equal(everything(resumed), everything(model))


@pytest.mark.parametrize("row", POLICIES, ids=lambda row: row.name)
def test_rho_zero_is_the_base_optimizer_unless_it_reuses(row):
    model, optimizer = built(row, rho=0.0)
    train(optimizer, model)
    plain = tiny_network()
    train(sgd(plain.parameters()), plain)
    torch.testing.assert_close(everything(model), everything(plain), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("row", POLICIES, ids=lambda row: row.name)
def test_values_outside_the_domain_are_refused_by_name(row):
    for options, message in row.invalid:
        model = tiny_network()
        with pytest.raises(ValueError, match=message):
            row.method(sgd(model.parameters()), 0.1, model=model, **{**row.options, **options})


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_a_probability_that_a_function_gives_is_checked_too(wrong):
    when = Bernoulli(lambda step: wrong if step == 2 else 0.5)
    when(1)
    with pytest.raises(ValueError, match=f"probability must be in \\[0, 1\\], got {wrong}"):
        when(2)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        Bernoulli(0.5, seed=-1)


def test_windows_without_steps_and_rules_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="num_steps must be >= 1, got -5"):
        flatmin.LateSAM(sgd(tiny_network().parameters()), num_steps=-5)
    with pytest.raises(ValueError, match="rules must go by the number of the step, got LargeGradient"):
        AllOf(Always(), LargeGradient(10))


def test_a_window_may_be_empty_and_a_share_of_training_is_rounded_to_a_step():
    assert not any(Window(3, 3)(step) for step in range(8))
    assert (Window(0.29, num_steps=100).start, Window(0, 0.29, 100).stop) == (29, 29)  # 0.29 * 100 is below 29
    for start, stop, message in [
        (4, 3, "stop must be >= start, got 3 after 4"),
        (-1, None, "start must be a step >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Window(start, stop)


def test_bernoulli_draws_have_the_probability_and_are_independent():
    draws = torch.tensor([Bernoulli(0.3, seed=4)(step) for step in range(4000)], dtype=torch.float64)
    assert abs(draws.mean() - 0.3) < 4 * math.sqrt(0.21 / 4000)
    correlation = ((draws[1:] - 0.3) * (draws[:-1] - 0.3)).mean() / 0.21
    assert abs(correlation) < 4 / math.sqrt(4000)
    assert [Bernoulli(0.3, seed=4)(step) for step in range(20)] == draws[:20].tolist()
    assert [Bernoulli(0.3, seed=5)(step) for step in range(50)] != draws[:50].tolist()


def test_the_gradient_rule_keeps_the_running_moments_of_the_paper():
    rule, memory, mean, variance = LargeGradient(10, 0.9, 1.0, -1.0), {}, 0.0, 0.0
    for step, length in enumerate([1.0, 2.0, 0.5, 3.0, math.nan, 1.0]):
        decided = rule.decide(step, length, memory)
        if math.isnan(length):
            assert not decided
            continue
        mean = 0.9 * mean + 0.1 * length**2
        variance = 0.9 * variance + 0.1 * (length**2 - mean) ** 2
        assert memory == pytest.approx({"mean_square": mean, "variance_square": variance})
        assert decided == (length**2 >= mean + (1 - 2 * step / 10) * math.sqrt(variance))


def test_the_gradient_rule_keeps_its_last_threshold_after_the_end_and_takes_an_equal_gradient():
    for c_start, c_end, length, expected in [(1.0, 0.5, 0.5, False), (-1.0, 0.1, 1.1, True)]:
        for step in (10, 30):
            mean = 0.5 * (1.0 + length**2)
            deviation = math.sqrt(0.5 * (1.0 + (length**2 - mean) ** 2))
            assert (length**2 >= mean + c_end * deviation) == expected
            memory = {"mean_square": 1.0, "variance_square": 1.0}
            assert LargeGradient(10, 0.5, c_start, c_end).decide(step, length, memory) == expected
    assert LargeGradient(10, 0.0).decide(0, 2.0, {})  # the mean is the square itself, and the variance 0


def test_a_gradient_rule_within_a_window():
    rule = Within(LargeGradient(10, c_start=-INF, c_end=-INF), Window(2, 4))
    assert [rule.decide(step, 1.0, {}) for step in range(5)] == [False, False, True, True, False]
    memory = {}
    rule.decide(0, 3.0, memory)
    assert memory["mean_square"] == pytest.approx(0.9)  # it sees the gradients before the window too


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (WarmUp(4), [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]),
        (CosineToZero(4), [0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5), 0.0, 0.0]),
        (ProportionalToLr(0.8, 0.2, lr_max=0.1), [0.8, 0.5, 0.35, 0.275, 0.2375, 0.21875]),
        (ProportionalToLr(0.8, 0.2, lr_max=0.05, lr_min=0.0125), [0.8, 0.8, 0.4, 0.2, 0.2, 0.2]),
        (lambda step, group: step * 0.5, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
    ],
    ids=["warm-up", "cosine", "proportional to lr", "proportional to lr within a range", "a function"],
)
def test_rho_follows_its_schedule_also_after_a_resume(schedule, expected):
    weights = nn.Parameter(torch.ones(3))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), 0.4, rho_schedule=schedule)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    found = []
    for step in range(6):
        if step == 3:  # a resumed run goes on
            saved = optimizer.state_dict(), scheduler.state_dict()
            optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), 0.9, rho_schedule=schedule)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            optimizer.load_state_dict(saved[0])
            scheduler.load_state_dict(saved[1])
        weights.grad = torch.ones(3)
        before = weights.detach().clone()
        with optimizer.perturbed():
            found.append((weights.detach() - before).norm().item())
            weights.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0.1, -0.2, 0.1), "0 <= rho_min <= rho_max, got -0.2 and 0.1"),
        ((0.1, 0.2, 0.1), "0 <= rho_min <= rho_max, got 0.2 and 0.1"),
        ((0.2, 0.1, 0.1, 0.1), "0 <= lr_min < lr_max, got 0.1 and 0.1"),
        ((0.2, 0.1, 0.1, -0.1), "0 <= lr_min < lr_max, got -0.1 and 0.1"),
    ],
)
def test_a_range_that_is_none_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        ProportionalToLr(*numbers)


@pytest.mark.parametrize("wrong", [-1.0, INF, math.nan])
def test_a_schedule_outside_the_domain_is_refused(wrong):
    weights = nn.Parameter(torch.ones(3))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), rho_schedule=lambda step, group: wrong)
    weights.grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"rho must be >= 0 and finite, got {wrong} from rho_schedule"):
        optimizer.first_step()
