"""Average-case sharpness: how far the loss rises on average when noise is added to the weights."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import nn

from flatmin.arguments import check_number, checked_count
from flatmin.optim import Adaptive
from flatmin.sharpness.interval import mean_and_half_width
from flatmin.sharpness.loss_functions import LossFn
from flatmin.sharpness.measure import Measure, check_finite_loss
from flatmin.sharpness.objective import LossOptions, Objective
from flatmin.sharpness.random_vectors import gaussian
from flatmin.sharpness.scaling import described, metric_of, scaled, scaling_at_weights


@dataclass(frozen=True, eq=False)
class AverageCase(Measure):
    """The mean rise of the loss under noise.

    ``value`` is the mean over the draws and ``error`` half the length of its 95 % confidence interval.

    Attributes:
        rises: The rise of each draw.
        loss: Loss at the weights.
    """

    rises: tuple[float, ...]
    loss: float

    name: ClassVar[str] = "average_case"


def average_case(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[Any],
    sigma: float,
    *,
    adaptive: bool | Adaptive = False,
    num_draws: int = 30,
    seed: int = 0,
    **options: Unpack[LossOptions],
) -> AverageCase:
    """``E L(w + sigma T xi) - L(w)`` over standard normal ``xi``: half of ``sigma^2 tr(T H T)`` to second order.

    Costs ``1 + num_draws`` passes over the data, forward only.

    Args:
        model: The network; left as it was.
        loss_fn: ``loss_fn(model, batch)``, or a criterion for batches ``(inputs, targets)``; see ``Objective``.
        data: Batches, see ``Objective``.
        sigma: Standard deviation of the noise, ``>= 0``.
        adaptive: Scale the noise elementwise: ``True`` for ``T = |w|``; a ``flatmin.optim.Adaptive`` for
            ``T = |w| + eta`` on the parameters that it chooses.
        num_draws: Draws of the noise, ``>= 2``.
        seed: Of the draws.
        options: See ``LossOptions``.

    Raises:
        ValueError: A setting is outside its domain, or the loss at w is not finite.

    References:
        Andriushchenko et al. (2023), arXiv:2302.07011, section 3; Keskar et al. (2017), arXiv:1609.04836.
    """
    start = time.perf_counter()
    check_number("sigma", sigma, ">= 0 and finite")
    num_draws = checked_count("num_draws", num_draws, 2)
    objective = Objective(model, loss_fn, data, **options)
    generator = torch.Generator().manual_seed(seed)
    rises = []
    with objective.measuring():
        scaling = scaling_at_weights(metric_of(adaptive), objective)
        loss = objective.loss()
        check_finite_loss(loss)
        for _ in range(num_draws):
            noise = sigma * gaussian(objective.num_params, objective.dtype, objective.device, generator)
            with objective.moved(scaled(objective.unflatten(noise), scaling)):
                rises.append(objective.loss() - loss)
    value, error = mean_and_half_width(rises)
    settings = {"sigma": sigma, "adaptive": described(adaptive), "num_draws": num_draws, "seed": seed}
    return AverageCase(
        value=value,
        error=error,
        num_passes=objective.num_passes,
        wall_seconds=time.perf_counter() - start,
        settings=objective.settings | settings,
        rises=tuple(rises),
        loss=loss,
    )
