"""Paired intervals and needed seeds against scipy, printed tables and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from flatmin.train.sweep.differences import MOST_SEEDS, needed_seeds, paired_difference, paired_test_power

# Sample sizes of the two-sided paired t test at 5 % with power 0.8, as G*Power prints them: effect -> pairs.
PRINTED_TABLE = {0.2: 199, 0.5: 34, 0.8: 15, 1.0: 10}

SAM = [4.1, 4.4, 3.9, 4.6, 4.0]
SGD = [4.9, 5.3, 4.5, 5.2, 4.9]


def test_interval_is_that_of_scipys_paired_test() -> None:
    found = paired_difference(SAM, SGD)
    wanted = stats.ttest_rel(SAM, SGD).confidence_interval(0.95)
    low, high = found.estimate.mean - found.estimate.half_width, found.estimate.mean + found.estimate.half_width
    assert (low, high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    unpaired = stats.ttest_ind(SAM, SGD).confidence_interval(0.95)  # control: the pairs matter
    assert (low, high) != pytest.approx((unpaired.low, unpaired.high), rel=0.1)


def test_what_a_seed_gives_to_both_methods_cancels() -> None:
    luck = [0.0, 10.0, -5.0, 2.0, 7.0]
    lucky = paired_difference(
        [a + b for a, b in zip(SAM, luck, strict=True)], [a + b for a, b in zip(SGD, luck, strict=True)]
    )
    assert lucky.values == pytest.approx(paired_difference(SAM, SGD).values)
    shuffled = paired_difference(SAM, SGD[1:] + SGD[:1])  # control: seeds of different runs do not cancel
    assert shuffled.estimate.half_width > 1.5 * lucky.estimate.half_width


@pytest.mark.parametrize(("effect", "pairs"), PRINTED_TABLE.items())
def test_needed_seeds_are_those_of_printed_tables(effect: float, pairs: int) -> None:
    assert needed_seeds(effect, 1.0) == pairs
    assert needed_seeds(-3.0 * effect, 3.0) == pairs
    normal = math.ceil((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) ** 2 / effect**2)
    assert normal < pairs <= normal + 3  # control: the normal approximation is known to be two or so too low


def test_power_is_how_often_simulated_intervals_exclude_zero() -> None:
    effect, num_seeds = 1.0, 6
    draws = np.random.default_rng(0).normal(effect, 1.0, size=(20_000, num_seeds))
    half_widths = stats.t.ppf(0.975, num_seeds - 1) * draws.std(axis=1, ddof=1) / math.sqrt(num_seeds)
    share = float((draws.mean(axis=1) > half_widths).mean())
    standard_error = math.sqrt(share * (1 - share) / len(draws))
    assert abs(paired_test_power(effect, num_seeds) - share) < 4 * standard_error
    assert abs(paired_test_power(effect, num_seeds + 1) - share) > 4 * standard_error  # control: one more seed shows


def test_needed_seeds_reach_the_power_and_one_less_does_not() -> None:
    for effect in (0.1, 0.37, 1.3, 2.6):
        count = needed_seeds(effect, 1.0)
        assert count is not None
        assert paired_test_power(effect, count) >= 0.8 > paired_test_power(effect, count - 1)


def test_claim_replaces_the_difference_found() -> None:
    deviation = float(np.std(np.subtract(SAM, SGD), ddof=1))
    assert paired_difference(SAM, SGD, claim=0.1).needed_seeds == needed_seeds(0.1, deviation)
    assert paired_difference(SAM, SGD).needed_seeds == needed_seeds(float(np.mean(np.subtract(SAM, SGD))), deviation)


def test_no_number_of_seeds_shows_no_difference_and_two_show_one_without_deviation() -> None:
    assert needed_seeds(0.0, 1.0) is None
    assert needed_seeds(1e-3, 1.0) is None  # more than MOST_SEEDS
    assert needed_seeds(0.03, 1.0) in range(2, MOST_SEEDS)
    assert needed_seeds(1.0, 0.0) == 2
    assert needed_seeds(1.0, 1e-17) == 2
    assert paired_difference([1.0], [2.0]).needed_seeds is None


def test_numbers_outside_their_domain_are_refused() -> None:
    with pytest.raises(ValueError, match="deviation must be >= 0, got -1.0"):
        needed_seeds(1.0, -1.0)
    with pytest.raises(ValueError, match="power must be > 0.025 and < 1, got 1.0"):
        needed_seeds(1.0, 1.0, power=1.0)
    with pytest.raises(ValueError, match="power must be > 0.025 and < 1, got 0.02"):
        needed_seeds(1.0, 1.0, power=0.02)
    with pytest.raises(ValueError, match="values must have one entry per seed, got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])
