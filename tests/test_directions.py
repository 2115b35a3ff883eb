"""Directions and filters by themselves, on vectors whose answer is known."""

import pytest
import torch
from torch import nn

import flatmin
from flatmin.optim import (
    BaseMomentum,
    Centralised,
    Filtered,
    Gradient,
    NoiseOfGradient,
    RandomDirection,
    Space,
    StaleGradient,
)
from flatmin.optim.directions import first_moment
from flatmin.optim.filters import ZScore
from flatmin.optim.space import ActiveGroup

NUM = 5000


def _space(tensors, grads=None, step=0, **options):
    return Space([ActiveGroup(tensors, tensors, grads or [], None, {"rho": 1.0, "num_steps": step, **options})])


def _drawn(seed, step):
    return torch.stack(RandomDirection(seed)(_space([torch.zeros(NUM), torch.zeros(NUM)], step=step)))


def test_random_directions_are_standard_normal():
    draw = _drawn(3, 0).flatten().double()
    for order, moment, variance in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)]:
        assert abs((draw**order).mean() - moment) < 4 * (variance / len(draw)) ** 0.5
    uniform = 12**0.5 * (torch.rand(2 * NUM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.5)
    assert abs((uniform**4).mean() - 3.0) > 4 * (96.0 / len(draw)) ** 0.5  # control: of the same mean and variance


def test_random_directions_follow_seed_step_and_parameter_alone():
    one = _drawn(3, 7)
    assert torch.equal(_drawn(3, 7), one)
    others = torch.cat([one, _drawn(3, 8), _drawn(4, 7)])
    correlations = torch.corrcoef(others) - torch.eye(len(others))
    assert correlations.abs().max() < 5 / NUM**0.5


def test_sam_moves_along_the_random_direction_of_its_seed():
    """The paper's control (Appendix C.5): SAM's length, whatever the gradient is."""
    weights = nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), 0.3, direction="random", seed=6)
    for step in range(2):
        drawn = RandomDirection(6)(_space([weights.detach()], step=step))[0]
        weights.grad = torch.ones_like(weights)
        before = weights.detach().clone()
        with optimizer.perturbed():
            torch.testing.assert_close(weights.detach() - before, 0.3 * drawn / drawn.norm(), rtol=1e-12, atol=1e-14)
            weights.grad = torch.ones_like(weights)
        optimizer.step()


def test_the_stale_gradient_is_that_of_the_step_before():
    """``eps_t = rho g_(t-1) / ||g_(t-1)||``, in whatever memory the next gradient is written."""
    weights = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = flatmin.OnePass(torch.optim.SGD([weights], lr=0.0), 2.0, direction=StaleGradient())
    for gradient in torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        optimizer.zero_grad(set_to_none=False)
        (weights @ gradient).backward()
        optimizer.step()
        torch.testing.assert_close(weights.detach(), 2.0 * gradient / gradient.norm())
        weights.grad.fill_(9.0)
        with optimizer.unperturbed():
            pass  # out along the same direction again
        torch.testing.assert_close(weights.detach(), 2.0 * gradient / gradient.norm())


@pytest.mark.parametrize("base", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax])
def test_the_first_moment_is_a_running_mean_of_gradients(base):
    """``v_t = 0.9 v_(t-1) + 0.1 g_t``; one that has none yet stays."""
    seen, unseen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = flatmin.MSAM(base([seen, unseen], lr=0.0), 0.5)
    mean = torch.zeros(3)
    for gradient in torch.randn(3, 3, generator=torch.Generator().manual_seed(0)):
        mean = 0.9 * mean + 0.1 * gradient
        (seen @ gradient).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(seen.detach(), -0.5 * mean / mean.norm())
    assert not unseen.any()


@pytest.mark.parametrize(
    ("sign", "maximize", "expected"), [(-1, False, -1), (1, False, 1), (-1, True, 1), (1, True, -1)]
)
def test_momentum_has_the_sign_asked_for(sign, maximize, expected):
    """The ball turns a maximised group's direction round, so that the published method looks ahead in either case."""
    base = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    optimizer = flatmin.OnePass(base, 1.0, direction=BaseMomentum(sign))
    (weights,) = optimizer.param_groups[0]["params"]
    optimizer.state[weights]["momentum_buffer"] = torch.tensor([3.0, -4.0])
    group = ActiveGroup([weights], [weights], [], None, {"rho": 1.0, "maximize": maximize})
    space = Space([group], optimizer._memory)
    assert first_moment(space, 0).tolist() == [3.0, -4.0]
    assert BaseMomentum(sign)(space)[0].tolist() == [3.0 * expected, -4.0 * expected]


@pytest.mark.parametrize(("quantile", "num_kept"), [(0.0, 6), (0.2, 5), (0.5, 3), (0.8, 2), (0.99, 1)])
def test_entries_kept_are_those_above_the_lower_quantile_of_the_distance_to_the_mean(quantile, num_kept):
    matrix, vector = torch.tensor([[10.0, 12.5, 9.0, 7.0, 15.0, 4.0, 20.0]]), torch.tensor([1.0, 2.0, 3.0])
    distances = (matrix - matrix.mean()).abs()
    threshold = torch.quantile(distances, quantile, interpolation="lower")
    found, untouched = Filtered(Gradient(), ZScore(quantile))(_space([matrix, vector], [matrix, vector]))
    assert torch.equal(found, torch.where(distances > threshold, matrix, 0.0))
    assert int((found != 0).sum()) == num_kept
    assert torch.equal(untouched, vector)


def test_a_matrix_of_one_entry_stands_out():
    single = torch.tensor([[2.0]])
    assert Filtered(Gradient(), ZScore(0.5))(_space([single], [single]))[0].tolist() == [[2.0]]


def test_filters_are_applied_in_their_order():
    """The entries that stand out are chosen of the centred gradient where centring comes first."""
    gradient = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    space = _space([gradient], [gradient])
    centred = gradient - gradient.mean(dim=1, keepdim=True)
    distances = (centred - centred.mean()).abs()
    expected = torch.where(distances > torch.quantile(distances, 0.5, interpolation="lower"), centred, 0.0)
    torch.testing.assert_close(Filtered(Gradient(), Centralised(), ZScore(0.5))(space), [expected])
    other_order = Filtered(Gradient(), ZScore(0.5), Centralised())(space)[0]
    assert not torch.allclose(other_order, expected)  # control


def test_a_filter_hands_on_what_its_direction_needs():
    for direction in (Gradient(), StaleGradient(), NoiseOfGradient(1.0, 0.5)):
        filtered = Filtered(direction, Centralised())
        for name in ("needs_clean_gradient", "depends_on_scale", "remembers"):
            assert getattr(filtered, name) == getattr(direction, name)
