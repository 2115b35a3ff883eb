"""What pairs of runs say about a difference: its interval, and how many seeds would show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit
from scipy.stats import nct

from flatmin.train.report.statistics import Estimate, estimate

__all__ = ["MOST_SEEDS", "PairedDifference", "needed_seeds", "paired_difference", "paired_test_power"]

MOST_SEEDS = 10_000  # above this a difference is of no practical interest, and the answer is "more than"


@dataclass(frozen=True)
class PairedDifference:
    """How much higher one quantity is than another, run by run.

    Attributes:
        values: One difference per seed.
        estimate: Their mean with its 95 % interval.
        needed_seeds: Seeds with which a paired test would find the claimed difference four times out of five; None if
            the seeds at hand do not tell, that is with one seed, or if more than ``MOST_SEEDS`` are needed.
    """

    values: Sequence[float]
    estimate: Estimate
    needed_seeds: int | None


def paired_difference(
    values: Sequence[float], baseline_values: Sequence[float], claim: float | None = None
) -> PairedDifference:
    """Compare two methods on the same seeds.

    The runs of a seed share initial weights and the order of images, so what a lucky seed gives to both cancels:
    ``d_i = values_i - baseline_values_i``, and the interval of the mean is ``t s_d / sqrt(n)`` on either side.

    Args:
        values: One value per seed.
        baseline_values: Those of the baseline, for the same seeds in the same order, at least one.
        claim: Difference whose needed seeds are wanted; None is the mean found here.

    Raises:
        ValueError: The two differ in length, or are empty.

    References:
        Student (1908), "The probable error of a mean", Biometrika 6: intervals of paired differences.
    """
    if len(values) != len(baseline_values):
        raise ValueError(f"values must have one entry per seed, got {len(values)} and {len(baseline_values)}")
    differences = [value - other for value, other in zip(values, baseline_values, strict=True)]
    found = estimate(differences)
    if len(differences) < 2:
        return PairedDifference(differences, found, None)
    deviation = float(np.std(differences, ddof=1))
    return PairedDifference(differences, found, needed_seeds(found.mean if claim is None else claim, deviation))


def needed_seeds(difference: float, deviation: float, power: float = 0.8) -> int | None:
    """Return the smallest number of seeds with which a paired t test finds ``difference`` with probability ``power``.

    Args:
        difference: True mean of the paired differences; the sign does not matter.
        deviation: Their standard deviation, at least 0.
        power: Wanted probability that the 95 % interval excludes zero, on the side of the difference.

    Returns:
        At least 2; None if it is more than ``MOST_SEEDS``, as it always is for a difference of zero.

    Raises:
        ValueError: ``deviation`` is negative or ``power`` is not between 0.025 and 1.
    """
    if not deviation >= 0.0:
        raise ValueError(f"deviation must be >= 0, got {deviation}")
    if not 0.025 < power < 1.0:
        raise ValueError(f"power must be > 0.025 and < 1, got {power}")
    if difference == 0.0:
        return None
    if deviation == 0.0:
        return 2
    effect = abs(difference) / deviation
    if not paired_test_power(effect, MOST_SEEDS) >= power:
        return None
    too_few, enough = 1, MOST_SEEDS  # the power rises with the number of seeds: halve the bracket
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if paired_test_power(effect, middle) >= power else (middle, enough)
    return enough


def paired_test_power(effect: float, num_seeds: int) -> float:
    """Return the probability that the 95 % interval of a mean difference lies on its side of zero.

    ``P(T > t)`` for ``T`` with the noncentral t distribution of ``n - 1`` degrees of freedom and noncentrality
    ``effect sqrt(n)``, and ``t`` the 97.5 % point of Student's.

    Args:
        effect: True mean of the differences over their standard deviation, positive.
        num_seeds: Number of pairs ``n``, at least 2.

    References:
        Cohen (1988), "Statistical power analysis for the behavioral sciences", chapter 2.
    """
    critical = float(stdtrit(num_seeds - 1, 0.975))
    noncentrality = min(effect * math.sqrt(num_seeds), 1e6)  # scipy answers NaN to more; the power is 1 by then
    return float(nct.sf(critical, num_seeds - 1, noncentrality))
