"""How sure a mean is: Student's t interval, with torch alone."""

import math
from collections.abc import Sequence

import torch

CONFIDENCE = 0.95


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values and half the length of its 95 % confidence interval.

    ``half_width = t s / sqrt(n)`` with the sample deviation ``s`` and the 97.5 % point ``t`` of Student's distribution
    with ``n - 1`` degrees of freedom.

    Args:
        values: At least one value.

    Returns:
        Mean and half-width; the latter is NaN for a single value.
    """
    sample = torch.tensor(values, dtype=torch.float64)
    if len(sample) == 1:
        return sample.item(), math.nan
    half_width = student_quantile(len(sample) - 1) * sample.std().item() / math.sqrt(len(sample))
    return sample.mean().item(), half_width


def student_quantile(degrees: int) -> float:
    """The t for which ``P(|T| <= t) = 0.95`` with Student's distribution of so many degrees of freedom.

    >>> round(student_quantile(1), 3), round(student_quantile(10), 3), round(student_quantile(10**6), 3)
    (12.706, 2.228, 1.96)
    """
    low, high = 0.0, 1.0
    while _within(high, degrees) < CONFIDENCE:
        high *= 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """``P(|T| <= t)``: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4; the normal law from 1000 on."""
    if degrees >= 1000:
        return math.erf(t / math.sqrt(2)) - t * (t * t + 1) * math.exp(-t * t / 2) / (
            2 * degrees * math.sqrt(2 * math.pi)
        )
    angle = math.atan(t / math.sqrt(degrees))
    term = math.cos(angle) if degrees % 2 else 1.0
    series = 0.0
    for k in range(2 + degrees % 2, degrees + 1, 2):
        series += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    if degrees % 2:
        return 2 / math.pi * (angle + math.sin(angle) * series)
    return math.sin(angle) * series
