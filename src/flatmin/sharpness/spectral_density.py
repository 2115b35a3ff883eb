"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from flatmin.arguments import check_number, checked_count
from flatmin.sharpness.interval import mean_and_half_width, student_quantile
from flatmin.sharpness.lanczos import Tridiagonal, lanczos
from flatmin.sharpness.loss_functions import LossFn
from flatmin.sharpness.measure import Measure
from flatmin.sharpness.objective import Objective
from flatmin.sharpness.products import (
    HessianOptions,
    checked_product,
    hessian_settings,
    loss_options,
)
from flatmin.sharpness.random_vectors import gaussian

_NUM_POINTS = 1000


@dataclass(frozen=True, eq=False)
class SpectralDensity(Measure):
    """How the eigenvalues are distributed: a density of integral 1.

    ``value`` is the mean eigenvalue and ``error`` half the length of its 95 % confidence interval.

    Attributes:
        grid: Where the density is given, ascending.
        density: Mean over the random vectors, smoothed by a Gaussian of deviation ``settings["width"]``.
        half_widths: Of the 95 % confidence interval of ``density`` at each point.
        nodes: Quadrature nodes of each random vector (its Ritz values).
        weights: Their weights, which add up to 1 for each random vector.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    half_widths: tuple[float, ...]
    nodes: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    name: ClassVar[str] = "spectral_density"

    def moment(self, order: int) -> tuple[float, float]:
        """The estimate of ``tr(H^order) / n``, and half the length of its 95 % confidence interval."""
        return mean_and_half_width(_moments(self.nodes, self.weights, order))


def spectral_density(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[Any],
    *,
    num_vectors: int = 5,
    num_steps: int = 60,
    width: float | None = None,
    seed: int = 0,
    **options: Unpack[HessianOptions],
) -> SpectralDensity:
    """The density of eigenvalues ``1/n sum_i N(x; lambda_i, width^2)`` of the Hessian of the mean loss over the data.

    From each random unit vector v, m steps of Lanczos give nodes ``theta_i`` (Ritz values) and weights ``s_1i^2``
    (squared first entries of the eigenvectors of T), the Gauss quadrature of the spectrum as v sees it: exact for
    polynomials up to degree ``2 m - 1``. The mean over v is unbiased for those.

    Costs ``num_vectors * num_steps`` passes over the data and the memory of ``num_steps`` gradients.

    Args:
        model: The network; left as it was.
        loss_fn: ``loss_fn(model, batch)``, or a criterion for batches ``(inputs, targets)``; see ``Objective``.
        data: Batches, see ``Objective``.
        num_vectors: Random vectors, ``>= 1``; the interval needs two.
        num_steps: Lanczos steps m from each, ``>= 1``.
        width: Deviation of the Gaussian that smooths the density, ``> 0``; a hundredth of the spectrum's range by
            default, or of its only eigenvalue.
        seed: Of the random vectors.
        options: See ``LossOptions`` and ``HessianOptions``.

    Raises:
        ValueError: A setting is outside its domain, or a product is not finite.

    References:
        Ghorbani et al. (2019), arXiv:1901.10159, Algorithms 1 and 2; Lin et al. (2016), arXiv:1308.5467.
    """
    start = time.perf_counter()
    num_vectors, num_steps = checked_count("num_vectors", num_vectors), checked_count("num_steps", num_steps)
    if width is not None:
        check_number("width", width, "> 0 and finite")
    objective = Objective(model, loss_fn, data, **loss_options(options))
    generator = torch.Generator().manual_seed(seed)
    rules = []
    with objective.measuring():
        product = checked_product(objective, options)
        for _ in range(num_vectors):
            vector = gaussian(objective.num_params, objective.dtype, objective.device, generator)
            for space in lanczos(lambda v: product(v[None])[0], vector, num_steps):
                last = space
            rules.append(_quadrature(last))
    nodes, weights = tuple(rule[0] for rule in rules), tuple(rule[1] for rule in rules)
    width = width or _default_width(nodes, objective.dtype)
    grid, densities = _smooth(nodes, weights, width)
    value, error = mean_and_half_width(_moments(nodes, weights, 1))
    settings = {"num_vectors": num_vectors, "num_steps": num_steps, "width": width, "seed": seed}
    return SpectralDensity(
        value=value,
        error=error,
        num_passes=objective.num_passes,
        wall_seconds=time.perf_counter() - start,
        settings=hessian_settings(objective, options) | settings,
        grid=tuple(grid.tolist()),
        density=tuple(densities.mean(dim=0).tolist()),
        half_widths=tuple(_half_widths(densities).tolist()),
        nodes=nodes,
        weights=weights,
    )


def _quadrature(space: Tridiagonal) -> tuple[tuple[float, ...], tuple[float, ...]]:
    values, vectors = space.eigen()
    return tuple(values.tolist()), tuple(vectors[0].square().tolist())


def _moments(nodes: tuple[tuple[float, ...], ...], weights: tuple[tuple[float, ...], ...], order: int) -> list[float]:
    return [math.fsum(w * x**order for x, w in zip(xs, ws, strict=True)) for xs, ws in zip(nodes, weights, strict=True)]


def _default_width(nodes: tuple[tuple[float, ...], ...], dtype: torch.dtype) -> float:
    """A hundredth of the range; of the largest eigenvalue where the range is rounding, of 1 where that is zero."""
    low, high = min(map(min, nodes)), max(map(max, nodes))
    largest = max(abs(low), abs(high))
    is_rounding = high - low <= 100 * torch.finfo(dtype).eps * largest
    return ((largest or 1.0) if is_rounding else high - low) / 100


def _smooth(
    nodes: tuple[tuple[float, ...], ...], weights: tuple[tuple[float, ...], ...], width: float
) -> tuple[Tensor, Tensor]:
    """The grid, four widths beyond the outermost nodes, and each vector's density on it."""
    low, high = min(map(min, nodes)) - 4 * width, max(map(max, nodes)) + 4 * width
    grid = torch.linspace(low, high, _NUM_POINTS, dtype=torch.float64)
    densities = []
    for xs, ws in zip(nodes, weights, strict=True):
        distance = (grid[:, None] - torch.tensor(xs, dtype=torch.float64)) / width
        bells = torch.exp(-distance.square() / 2) / (width * math.sqrt(2 * math.pi))
        densities.append(bells @ torch.tensor(ws, dtype=torch.float64))
    return grid, torch.stack(densities)


def _half_widths(densities: Tensor) -> Tensor:
    num = len(densities)
    if num == 1:
        return torch.full_like(densities[0], math.nan)
    return student_quantile(num - 1) * densities.std(dim=0) / math.sqrt(num)
