"""What a few seeds say: means with their 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean over independent runs and how sure it is.

    Attributes:
        mean: Mean of the values.
        half_width: Half the length of its 95 % confidence interval, in the same unit; NaN for a single value.
    """

    mean: float
    half_width: float

    def text(self, digits: int) -> str:
        """Return ``mean ± half_width`` with ``digits`` decimals, or the mean alone where there is no interval."""
        if math.isnan(self.half_width):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of ``values`` with its 95 % confidence interval for normally distributed values.

    ``half_width = t s / sqrt(n)`` with the sample deviation ``s`` (``n - 1`` in the denominator) and the 97.5 % point
    ``t`` of Student's distribution with ``n - 1`` degrees of freedom.

    Args:
        values: One value per independent run, at least one.

    Raises:
        ValueError: ``values`` is empty.

    References:
        Student (1908), "The probable error of a mean", Biometrika 6.
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    means, half_widths = estimate_curve([[value] for value in values])
    return Estimate(float(means[0]), float(half_widths[0]))


def estimate_curve(curves: Sequence[Sequence[float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ``estimate`` at every point of curves of equal length.

    Args:
        curves: One curve per independent run, shape ``(runs, points)``.

    Returns:
        Means and half-widths, each of shape ``(points,)``; the half-widths of a single curve are NaN.
    """
    values = np.asarray(curves, dtype=np.float64)
    means = values.mean(axis=0)
    num_runs = len(values)
    if num_runs == 1:
        return means, np.full_like(means, np.nan)
    quantile = float(stdtrit(num_runs - 1, 0.975))
    return means, quantile * values.std(axis=0, ddof=1) / math.sqrt(num_runs)
