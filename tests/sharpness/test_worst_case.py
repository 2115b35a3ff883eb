"""Worst-case sharpness, against closed forms on quadratics and against the optimizers' own perturbation."""

import json
import math

import pytest
import torch
from known import ONE_BATCH, Quadratic, batch_norm_network, cross_entropy, pairs, quadratic_loss, smooth_network
from torch import Tensor, nn

import flatmin
from flatmin.optim import Adaptive
from flatmin.sharpness import WorstCase, worst_case

SIZE = 6


def convex(seed: int = 0) -> Tensor:
    factor = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / SIZE


def slope(seed: int = 1) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def highest_in_ball(curvature: Tensor, gradient: Tensor, rho: float) -> float:
    """``max 1/2 e^T A e + g^T e`` over ``||e|| = rho``: ``e = (mu I - A)^-1 g``, mu above the largest eigenvalue."""
    values, vectors = torch.linalg.eigh(curvature)
    parts = vectors.T @ gradient
    low, high = values.max().item(), values.max().item() + parts.norm().item() / rho
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (parts / (mu - values)).norm() > rho else (low, mu)
    step = parts / (high - values)
    return (0.5 * (values * step.square()).sum() + parts @ step).item()


def rise_of(quadratic: Quadratic, step: Tensor) -> float:
    here = quadratic.weights.detach()
    return (quadratic.loss_at(here + step) - quadratic.loss_at(here)).item()


def measured(quadratic: Quadratic, **settings: object) -> WorstCase:
    return worst_case(quadratic, quadratic_loss, ONE_BATCH, **settings)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("adaptive", [False, True, Adaptive(eta=0.3, scaled="all")])
def test_one_step_is_the_perturbation_of_the_optimizers(p: float, adaptive: bool | Adaptive) -> None:
    """``T sign(T g) |T g|^(q-1)``, scaled to length rho: equation 2 of the paper, with the scaling of ASAM."""
    model = Quadratic(convex(), slope(), weights=slope(2))
    gradient = convex() @ slope(2) + slope()
    eta = adaptive.eta if isinstance(adaptive, Adaptive) else 0.0
    scale = slope(2).abs() + eta if adaptive else torch.ones(SIZE, dtype=torch.float64)
    scaled = scale * gradient
    if p == 1.0:
        unit = scaled.sign() * (scaled.abs() == scaled.abs().max())
    else:
        power = 0.0 if math.isinf(p) else 1 / (p - 1)
        unit = scaled.sign() * scaled.abs() ** power
        unit = unit / torch.linalg.vector_norm(unit, p)
    wanted = rise_of(model, 0.2 * scale * unit)
    result = measured(model, rho=0.2, p=p, adaptive=adaptive)
    assert result.value == pytest.approx(wanted, rel=1e-12)
    assert result.num_passes == 2
    assert math.isnan(result.error)
    assert measured(model, rho=0.21, p=p, adaptive=adaptive).value != pytest.approx(wanted, rel=1e-3)  # control


def test_one_step_is_the_rise_that_sam_reports() -> None:
    model = smooth_network()
    ((inputs, targets),) = data = pairs((16,))
    result = worst_case(model, cross_entropy, data, 0.3)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, (inputs, targets))
        loss.backward()
        return loss

    assert result.loss == pytest.approx(optimizer.step(closure).item(), rel=1e-12)
    assert result.value == pytest.approx(optimizer.diagnostics.loss_rise.item(), rel=1e-12)


@pytest.mark.parametrize("rho", [0.1, 1.0, 5.0])
def test_many_steps_reach_the_maximum_of_a_quadratic(rho: float) -> None:
    model = Quadratic(convex(), slope(), weights=slope(2))
    exact = highest_in_ball(convex(), convex() @ slope(2) + slope(), rho)
    many = measured(model, rho=rho, steps=100)
    assert many.value == pytest.approx(exact, rel=1e-6)
    assert measured(model, rho=rho).value < exact * (1 - 1e-6)  # control: one step does not reach it


def test_many_steps_find_the_best_corner_of_a_cube() -> None:
    """A separable convex function is highest at a corner, coordinate by coordinate."""
    diagonal, gradient = slope(3).abs(), slope(4)
    model = Quadratic(torch.diag(diagonal), gradient, weights=torch.zeros(SIZE).double())
    exact = (0.5 * diagonal * 0.7**2 + 0.7 * gradient.abs()).sum().item()
    assert measured(model, rho=0.7, p=math.inf, steps=3).value == pytest.approx(exact, rel=1e-12)


def test_adaptive_ascent_is_plain_ascent_in_scaled_weights() -> None:
    """``u = T^-1 eps`` turns the adaptive ball into the plain one and the curvature into ``T A T``."""
    weights, start = slope(2), convex() @ slope(2) + slope()
    scale = torch.diag(weights.abs())
    exact = highest_in_ball(scale @ convex() @ scale, scale @ start, 0.8)
    result = measured(Quadratic(convex(), slope(), weights), rho=0.8, adaptive=True, steps=200)
    assert result.value == pytest.approx(exact, rel=1e-6)


def test_more_steps_never_give_less_and_cost_what_is_said() -> None:
    model = smooth_network()
    results = [worst_case(model, cross_entropy, pairs(), 1.5, steps=steps) for steps in (1, 2, 4, 8, 16)]
    values = [result.value for result in results]
    assert values == sorted(values)
    assert values[-1] > values[0]
    assert [result.num_passes for result in results] == [2, 3, 5, 9, 17]


def test_step_is_halved_where_it_overshoots() -> None:
    """Along the only axis the loss peaks at 0.3 and falls off: a step of 1 ends below the start."""
    peak = Quadratic(torch.tensor([[-2.0]]).double(), torch.tensor([0.6]).double())
    assert measured(peak, rho=1.0).value == pytest.approx(-0.4)  # the paper's step, taken as it is
    assert measured(peak, rho=1.0, steps=3).value == pytest.approx(0.05)  # 1, then 1/2, then 1/4
    assert measured(peak, rho=1.0, steps=30).value == pytest.approx(0.09, rel=1e-3)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_restarts_escape_a_critical_point(p: float) -> None:
    saddle = Quadratic(torch.diag(torch.tensor([3.0, 1.0, -1.0]).double()))
    assert measured(saddle, rho=0.5, p=p, steps=20).value == 0.0
    result = measured(saddle, rho=0.5, p=p, steps=60, restarts=4)
    exact = 0.5 * 3.0 * 0.25 if p == 2.0 else 0.5 * 4.0 * 0.25
    assert result.value == pytest.approx(exact, rel=1e-3)
    assert result.num_passes == 4 * 61


@pytest.mark.parametrize(("seed", "is_start"), [(10, True), (1, False)])
def test_restarts_of_one_step_climb_from_where_they_start_and_count_it(seed: int, is_start: bool) -> None:
    """``-x^2 + 0.6 x`` in [-1, 1]: a step of 1 uphill from w and from each point drawn, cut at the ends."""
    peak = Quadratic(torch.tensor([[-2.0]]).double(), torch.tensor([0.6]).double())
    generator = torch.Generator().manual_seed(seed)
    starts = [2 * torch.rand(1, generator=generator, dtype=torch.float64).item() - 1 for _ in range(3)]
    ends = [max(-1.0, min(1.0, x + (1.0 if x < 0.3 else -1.0))) for x in (0.0, *starts)]
    highest_start, highest_end = (max(-(x**2) + 0.6 * x for x in points) for points in (starts, ends))
    assert (highest_start > highest_end) == is_start
    result = measured(peak, rho=1.0, p=math.inf, restarts=4, seed=seed)
    assert result.value == pytest.approx(max(highest_start, highest_end), rel=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_no_start_lies_outside_the_ball(adaptive: bool, steps: int) -> None:
    weights = 0.1 * slope(2)
    gradient = convex() @ weights + slope()
    scale = torch.diag(weights.abs()) if adaptive else torch.eye(SIZE).double()
    exact = highest_in_ball(scale @ convex() @ scale, scale @ gradient, 0.8)
    model = Quadratic(convex(), slope(), weights)
    values = [measured(model, rho=0.8, adaptive=adaptive, steps=steps, restarts=num).value for num in (1, 40)]
    assert values[0] <= values[1] <= exact * (1 + 1e-12)


def test_restarts_stay_in_the_adaptive_ball() -> None:
    model = Quadratic(torch.eye(2).double(), weights=torch.tensor([0.0, 2.0]).double())
    result = measured(model, rho=0.5, adaptive=True, steps=5, restarts=5)
    assert result.value == pytest.approx(0.5 * (3.0**2 - 2.0**2))  # the weight of zero does not move


@pytest.mark.parametrize("steps", [1, 3])
def test_m_sharpness_is_the_mean_over_micro_batches(steps: int) -> None:
    model = smooth_network()
    data = pairs((8, 8, 5))
    groups = [(x[i : i + 4], y[i : i + 4]) for x, y in data for i in range(0, len(y) - 3, 4)]
    alone = [worst_case(model, cross_entropy, [group], 0.5, steps=steps).value for group in groups]
    result = worst_case(model, cross_entropy, data, 0.5, steps=steps, m=4)
    assert len(groups) == 5  # the fifth example of the last batch is left out
    assert result.rises == pytest.approx(alone, rel=1e-12)
    assert result.value == pytest.approx(sum(alone) / 5)
    assert result.loss == pytest.approx(sum(cross_entropy(model, group).item() for group in groups) / 5)
    deviation = torch.tensor(alone).double().std().item()
    assert result.error == pytest.approx(2.7764451 * deviation / 5**0.5, rel=1e-6)  # Student's t, 4 degrees of freedom
    assert result.num_passes == 1 + steps
    assert result.value > worst_case(model, cross_entropy, data, 0.5, steps=steps).value


def test_m_sharpness_with_batch_statistics_uses_those_of_the_micro_batch() -> None:
    model = batch_norm_network()
    ((inputs, targets),) = pairs((8,))
    halves = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    alone = [worst_case(model, cross_entropy, [half], 0.5, batch_norm="batch").value for half in halves]
    result = worst_case(model, cross_entropy, [(inputs, targets)], 0.5, m=4, batch_norm="batch")
    assert result.rises == pytest.approx(alone, rel=1e-12)


def test_micro_batches_only_save_memory() -> None:
    model = smooth_network()
    whole = worst_case(model, cross_entropy, pairs(), 0.5, steps=3)
    pieces = worst_case(model, cross_entropy, pairs(), 0.5, steps=3, micro_batch=3)
    assert pieces.value == pytest.approx(whole.value, rel=1e-10)
    in_groups = worst_case(model, cross_entropy, pairs(), 0.5, m=4, micro_batch=2)
    assert in_groups.rises == pytest.approx(worst_case(model, cross_entropy, pairs(), 0.5, m=4).rises, rel=1e-10)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_adaptive_sharpness_ignores_the_scale_of_relu_layers(p: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()

    def measure(adaptive: bool) -> float:
        return worst_case(model, cross_entropy, pairs(), 0.1, p=p, adaptive=adaptive, steps=4).value

    before = measure(True), measure(False)
    with torch.no_grad():
        model[0].weight.mul_(5.0)
        model[0].bias.mul_(5.0)
        model[2].weight.div_(5.0)
    assert measure(True) == pytest.approx(before[0], rel=1e-8)
    assert measure(False) != pytest.approx(before[1], rel=0.1)  # control


def test_only_chosen_parameters_move() -> None:
    model = smooth_network()
    result = worst_case(model, cross_entropy, pairs(), 0.5, params="2")
    part = nn.Sequential(*model)
    part[0].requires_grad_(False)
    assert result.value == worst_case(part, cross_entropy, pairs(), 0.5).value
    part[0].requires_grad_(True)
    assert result.value < worst_case(model, cross_entropy, pairs(), 0.5).value


def test_radius_zero_rises_by_nothing() -> None:
    assert worst_case(smooth_network(), cross_entropy, pairs(), 0.0, steps=3, restarts=2).value == 0.0


def test_record_is_json_also_where_values_are_not_finite() -> None:
    result = worst_case(smooth_network(), cross_entropy, pairs(), p=math.inf)
    record = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert record["error"] is None
    assert record["settings"]["p"] == "inf"
    assert record["rises"] == [result.value]


def test_it_prints_its_value_cost_and_settings() -> None:
    text = str(worst_case(smooth_network(), cross_entropy, pairs(), 0.5, m=4))
    assert text.startswith("worst_case = ")
    assert "±" in text
    assert "2 passes" in text
    assert "rho=0.5" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": -0.1}, "rho must be >= 0 and finite, got -0.1"),
        ({"rho": math.nan}, "rho must be >= 0 and finite, got nan"),
        ({"p": 0.5}, "p must be >= 1, got 0.5"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"steps": 2, "p": 3.0}, "^steps must be 1 unless p is 2 or infinity"),
        ({"restarts": 0}, "restarts must be an integer >= 1, got 0"),
        ({"restarts": 2, "p": 1.0}, "restarts must be 1 unless p is 2 or infinity"),
        ({"m": 0}, "m must be an integer >= 1, got 0"),
        ({"m": 9}, "m must be at most the number of examples in a batch of the loader, got 9"),
    ],
)
def test_settings_outside_their_domain_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        worst_case(smooth_network(), cross_entropy, pairs(), **settings)


def test_a_radius_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="rho must be a number, got '0.1'"):
        worst_case(smooth_network(), cross_entropy, pairs(), rho="0.1")  # type: ignore[arg-type]


def test_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="the loss at the weights must be finite, got nan"):
        measured(Quadratic(torch.full((2, 2), math.nan).double()))


def test_a_scaling_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"adaptive must be true, false or a flatmin.optim.Adaptive, got 'yes'"):
        worst_case(smooth_network(), cross_entropy, pairs(), adaptive="yes")
