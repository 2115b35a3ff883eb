"""Stochastic rounding against its closed form: two neighbours, the expectation, the variance."""

import math

import pytest
import torch

from flatmin.optim.perturbation import perturb_
from flatmin.optim.perturbation_foreach import add_scaled_foreach_
from flatmin.optim.rounding import Rounder, round_stochastically
from flatmin.optim.saved import Saved

NARROW = [torch.bfloat16, torch.float16]
NUM_DRAWS = 40_000
# The spacing of the numbers just above 1, and values between neighbours there, below, at a power of two, subnormal.
SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
BETWEEN = {
    dtype: [
        (1 + 0.3 * spacing, 1.0, 1 + spacing),
        (-1 - 0.9 * spacing, -1 - spacing, -1.0),
        (2 - 0.25 * spacing, 2 - spacing, 2.0),
        (0.02 * (1 + 0.0), None, None),
    ]
    for dtype, spacing in SPACING.items()
}
BETWEEN[torch.float16] += [(2.7e-6, None, None), (-(2.0**-26), -(2.0**-24), -0.0), (6.0e-5, None, None)]
BETWEEN[torch.bfloat16] += [(1e-30, None, None), (1e-39, None, None)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _neighbours(value, dtype):
    """The numbers of the dtype on both sides, found by stepping from the nearest one."""
    nearest = torch.tensor(value, dtype=torch.float32).to(dtype)
    exact = torch.tensor(value, dtype=torch.float32).double().item()
    step = torch.nextafter(nearest, torch.tensor(math.inf if nearest.item() < exact else -math.inf, dtype=dtype))
    return sorted([nearest.item(), step.item()])


CASES = [(dtype, *case) for dtype in NARROW for case in BETWEEN[dtype]]


def _mean_error_in_sigmas(rounded, value, below, above):
    """How far the mean of the draws is from the value, in standard errors of its closed form."""
    sigma = math.sqrt((value - below) * (above - value) / len(rounded))
    return abs(rounded.double().mean().item() - value) / sigma


@pytest.mark.parametrize(("dtype", "value", "below", "above"), CASES)
def test_mean_and_variance_have_their_closed_form(dtype, value, below, above):
    found = _neighbours(value, dtype)
    assert below is None or found == [below, above]
    below, above = found
    values = torch.full((NUM_DRAWS,), value)
    value = values[0].double().item()
    rounded = round_stochastically(values, dtype, _generator())
    assert rounded.dtype == dtype
    assert set(rounded.unique().tolist()) == {below, above}
    assert _mean_error_in_sigmas(rounded, value, below, above) < 4
    variance = (rounded.double() - value).square().mean().item()
    assert variance == pytest.approx((value - below) * (above - value), rel=0.05)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_to_the_nearest_would_fail_that(dtype):
    """The control: its mean is far off."""
    value, below, above = BETWEEN[dtype][0]
    values = torch.full((NUM_DRAWS,), value)
    assert _mean_error_in_sigmas(values.to(dtype), values[0].double().item(), below, above) > 100


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_of_the_dtype_stays(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[~numbers.isnan()]
    rounded = round_stochastically(numbers.float(), dtype, _generator())
    assert torch.equal(rounded.view(torch.int16), numbers.view(torch.int16))  # the sign of zero, too


@pytest.mark.parametrize("dtype", NARROW)
def test_nothing_becomes_infinite_and_nothing_bad_is_hidden(dtype):
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest * 1.0005, -3e38, math.inf, -math.inf, math.nan]).repeat(1000, 1)
    beyond[:, 0].clamp_(max=torch.finfo(torch.float32).max)
    rounded = round_stochastically(beyond, dtype, _generator())
    assert (rounded[:, 0] == largest).all()
    assert (rounded[:, 1].abs() <= largest).all()
    assert (rounded[:, 2] == math.inf).all()
    assert (rounded[:, 3] == -math.inf).all()
    assert rounded[:, 4].isnan().all()
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # with any other bits
    assert round_stochastically(nans, dtype, _generator()).isnan().all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7), (4, 3, 2, 2)])
def test_a_seed_fixes_every_draw_and_another_one_changes_them(dtype, shape):
    values = torch.rand(shape, generator=_generator(5)) + 1
    state = torch.get_rng_state()
    one, again, other = (round_stochastically(values, dtype, _generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert one.shape == values.shape
    assert values.numel() < 20 or not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_neighbouring_entries_draw_independently():
    ups = round_stochastically(torch.full((400_000,), 1 + 2.0**-8), torch.bfloat16, _generator()) > 1
    signs = ups.double() * 2 - 1
    for lag in (1, 2, 3, 4):
        assert abs((signs[lag:] * signs[:-lag]).mean().item()) < 4 / math.sqrt(len(signs))


@pytest.mark.parametrize(("values", "dtype"), [(torch.ones(2).double(), torch.bfloat16), (torch.ones(2), torch.int16)])
def test_other_dtypes_are_refused(values, dtype):
    with pytest.raises(TypeError, match="values must be float32 and dtype bfloat16 or float16"):
        round_stochastically(values, dtype, _generator())


def _realised(dtype, seed, on_cpu=True):
    """Realised length of a perturbation of length 0.05, and its cosine with the direction asked for."""
    weights = (torch.randn(1_000_000, generator=_generator(3)) * 0.02).to(dtype)
    direction = torch.randn(1_000_000, generator=_generator(4)).to(dtype)
    before, asked = weights.clone(), 0.05 * direction.double() / direction.double().norm()
    scale = (0.05 / direction.float().norm()).float()
    if on_cpu:
        saved = perturb_([weights], [direction], [scale], seed=seed)
    else:
        saved = Saved()
        saved.add_together([weights])
        add_scaled_foreach_([weights], [direction], [scale], Rounder(seed))
    (step,) = saved.difference()
    along = (step.double() @ asked).item() / 0.05**2
    saved.restore_()
    assert torch.equal(weights, before)
    return along, (step != 0).double().mean().item(), step


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_perturbation_of_narrow_weights_has_its_whole_length_along_the_direction(on_cpu):
    along, _, step = _realised(torch.bfloat16, 1, on_cpu)
    assert along == pytest.approx(1.0, abs=0.02)
    assert torch.equal(step, _realised(torch.bfloat16, 1, on_cpu)[2])
    assert not torch.equal(step, _realised(torch.bfloat16, 2, on_cpu)[2])


def test_rounding_to_the_nearest_would_lose_much_of_it():
    """The control."""
    assert abs(_realised(torch.bfloat16, None)[0] - 1.0) > 0.1


def test_a_seed_changes_nothing_for_wide_weights():
    weights = [torch.randn(1000, generator=_generator()) for _ in range(2)]
    for weight, seed in zip(weights, (None, 1), strict=True):
        perturb_([weight], [torch.ones(1000)], [torch.tensor(0.1)], seed=seed)
    assert torch.equal(*weights)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
@pytest.mark.parametrize("dtype", NARROW)
def test_a_gpu_rounds_as_the_closed_form_says_and_the_host_does_not_wait(dtype):
    value, below, above = BETWEEN[dtype][0]
    values = torch.full((NUM_DRAWS,), value, device="cuda")
    round_stochastically(values, dtype, torch.Generator("cuda").manual_seed(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        rounded = round_stochastically(values, dtype, torch.Generator("cuda").manual_seed(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    value = values[0].double().item()
    assert set(rounded.unique().tolist()) == {below, above}
    assert _mean_error_in_sigmas(rounded, value, below, above) < 4
