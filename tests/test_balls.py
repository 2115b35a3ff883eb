"""The dual formula against brute force, and its properties."""

import math

import pytest
import torch

import reference
from flatmin.optim import LayerBall, SharpnessAware
from flatmin.optim.balls import Ball
from flatmin.optim.metrics import Adaptive, Fisher
from flatmin.optim.radii import FirstOrderGain, Unified
from flatmin.optim.space import ActiveGroup, Space

ORDERS = [1.0, 1.2, 1.5, 2.0, 3.0, 10.0, math.inf]
SHAPES = [(3, 4), (5,), (), (2, 1, 3)]


def _random(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def _flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def _space(tensors, radii=None):
    """Each tensor in a group of its own."""
    radii = radii or [1.0] * len(tensors)
    return Space([ActiveGroup([t], [t], [t], None, {"rho": rho}) for t, rho in zip(tensors, radii, strict=True)])


def _step(ball, direction, scaling=None):
    found = ball.farthest(_space(direction), direction, scaling)
    return [tensor * scale for tensor, scale in zip(found.tensors, found.scales, strict=True)]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_step_equals_the_formula_of_the_paper(p, scaled):
    g, t = _random(), [x.abs() + 0.1 for x in _random(1)]
    expected = reference.perturbation(g, [1.0] * 4, p, t if scaled else [torch.ones_like(x) for x in g])
    torch.testing.assert_close(_step(Ball(p), g, t if scaled else None), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", ORDERS)
def test_no_point_of_the_ball_goes_further(p):
    g, t = _random(), [x.abs() + 0.1 for x in _random(1)]
    step = _flat(_step(Ball(p), g, t))
    scale, gradient = _flat(t), _flat(g)
    assert torch.linalg.vector_norm(step / scale, p).item() == pytest.approx(1.0, rel=1e-12)
    others = torch.randn(20_000, step.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    others = scale * others / torch.linalg.vector_norm(others, p, dim=1, keepdim=True)
    assert (others @ gradient).max() < step @ gradient
    # the dual norm is the value of the maximum (Hoelder's inequality is tight)
    q = math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)
    assert (step @ gradient).item() == pytest.approx(torch.linalg.vector_norm(scale * gradient, q).item(), rel=1e-12)


def test_p_one_moves_only_the_first_of_the_largest_entries():
    g = [torch.tensor([1.0, -3.0, 3.0]), torch.tensor([[3.0]])]
    step = _step(Ball(1.0), g)
    assert step[0].tolist() == [0.0, -1.0, 0.0]
    assert step[1].tolist() == [[0.0]]


@pytest.mark.parametrize("p", ORDERS)
def test_the_scale_of_the_loss_does_not_matter(p):
    g = _random()
    for factor in (1e-30, 1e-3, 1e30):
        scaled = _step(Ball(p), [x * factor for x in g])
        torch.testing.assert_close(scaled, _step(Ball(p), g), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_direction_gives_zero(p, dtype):
    assert not _flat(_step(Ball(p), [torch.zeros(3, dtype=dtype), torch.zeros(2, dtype=dtype)])).any()


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_direction_that_is_not_finite_is_reported_and_scaled_by_zero(p, value):
    g = _random()
    assert Ball(p).farthest(_space(g), g, None).is_finite
    g[1][2] = value
    found = Ball(p).farthest(_space(g), g, None)
    assert not found.is_finite
    assert not any(found.scales)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("ball", [LayerBall(), LayerBall(trust_ratio=True), LayerBall(joint_vectors=True)])
def test_no_layer_moves_where_a_direction_is_not_finite(ball, value):
    g, w = _random(), _random(1)
    space = Space([ActiveGroup(w, w, g, None, {"rho": 1.0})])
    assert ball.farthest(space, g, None).is_finite
    assert all(ball.farthest(space, g, None).scales)
    g[1][2] = value
    found = ball.farthest(space, g, None)
    assert not found.is_finite
    assert not any(found.scales)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_projection_is_the_nearest_point(p):
    eps, t, radii = _random(), [x.abs() + 0.1 for x in _random(1)], [0.5, 0.5, 0.2, 0.7]
    expected = reference.projected(eps, radii, p, t)
    found = Ball(p).project(_space(eps, radii), eps, t)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    inside = [x * 0.01 * y for x, y in zip(eps, t, strict=True)]
    torch.testing.assert_close(Ball(p).project(_space(eps, radii), inside, t), inside, rtol=1e-12, atol=0.0)
    nowhere = Ball(p).project(_space(eps, [0.0] * 4), [torch.zeros_like(x) for x in eps], None)
    assert not _flat(nowhere).any()


def test_the_adaptive_metric_scales_what_it_says():
    params = [torch.tensor([[-2.0, 0.0]]), torch.tensor([3.0]), torch.tensor([-4.0])]
    names = ["conv.weight", "conv.bias", "norm.weight"]
    group = ActiveGroup(params, params, params, names, {"eta": 0.5})
    expected = {
        "weights": [[[2.5, 0.5]], 1.0, [4.5]],
        "matrices": [[[2.5, 0.5]], 1.0, 1.0],
        "all": [[[2.5, 0.5]], [3.5], [4.5]],
    }
    for scaled, values in expected.items():
        assert [t.tolist() for t in Adaptive(0.1, scaled).scaling(Space([group]))] == values


@pytest.mark.parametrize("radius", [Unified(0.5), FirstOrderGain(0.1)])
def test_radii_that_need_the_euclidean_length_are_refused_in_other_balls(radius):
    """The rise of the linearised loss is rho times the dual norm, which the largest entry is not."""
    Ball(radius=radius)
    with pytest.raises(ValueError, match=f"p must be 2 with {type(radius).__name__}, got 1.5"):
        Ball(1.5, radius=radius)


@pytest.mark.parametrize("radius", [Unified(0.5), FirstOrderGain(0.1)])
def test_several_ascents_are_refused_where_the_radius_is_not_rho(radius):
    Ball(radius=radius).check_ascent_steps(1)
    with pytest.raises(ValueError, match=f"ascent_steps must be 1 with {type(radius).__name__}, got 2"):
        Ball(radius=radius).check_ascent_steps(2)


@pytest.mark.parametrize(
    ("ball", "name"),
    [
        (Ball(metric=Adaptive(0.1)), "eta"),
        (Ball(metric=Fisher(0.1)), "eta"),
        (Ball(radius=FirstOrderGain(0.1)), "sigma"),
    ],
)
def test_a_groups_own_value_is_checked(ball, name):
    ball.check({name: 0.2})
    with pytest.raises(ValueError, match=f"{name} must be >=? 0 and finite, got -1.0"):
        ball.check({name: -1.0})
    base = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], name: -1.0}], lr=0.1)
    with pytest.raises(ValueError, match=f"{name} must be"):
        SharpnessAware(base, 0.1, ball=ball)


@pytest.mark.parametrize(("delta", "rho"), [(0.0, 1.0), (0.5, 1.0), (0.5, 0.01), (3.0, 1.0)])
def test_the_linearised_loss_rises_by_sigma_up_to_the_limits(delta, rho):
    """``||eps|| = min(sigma / (||g|| + delta), rho)``."""
    g = _random()
    length = _flat(g).norm().item()
    found = Ball(radius=FirstOrderGain(0.2, delta=delta)).farthest(_gain_space(g, rho), g, None)
    step = _flat([tensor * scale for tensor, scale in zip(found.tensors, found.scales, strict=True)])
    torch.testing.assert_close(step, min(0.2 / (length + delta), rho) * _flat(g) / length, rtol=1e-12, atol=0.0)


def _gain_space(tensors, rho):
    return Space([ActiveGroup(tensors, tensors, tensors, None, {"rho": rho, "sigma": 0.2, "num_steps": 0})])
