"""Worst-case sharpness: how far the loss rises within a ball around the weights."""

import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from flatmin.arguments import check_number, checked_count
from flatmin.optim import Adaptive, Ball
from flatmin.sharpness.interval import mean_and_half_width
from flatmin.sharpness.loss_functions import LossFn
from flatmin.sharpness.measure import Measure, check_finite_loss
from flatmin.sharpness.objective import LossOptions, Objective
from flatmin.sharpness.ranks import list_of_ranks
from flatmin.sharpness.scaling import described, metric_of, scaled, scaling_at_weights, space_at_weights


@dataclass(frozen=True, eq=False)
class WorstCase(Measure):
    """The rise of the loss at the worst point found in the ball.

    ``value`` is its mean over the micro-batches and ``error`` half the length of the 95 % confidence interval of that
    mean, as over independent micro-batches; NaN where there is one. It says nothing about the maximum that the ascent
    may have missed: more ``steps`` and ``restarts`` show that.

    Attributes:
        rises: The rise on each micro-batch, or on all data.
        loss: Mean loss at the weights.
    """

    rises: tuple[float, ...]
    loss: float

    name: ClassVar[str] = "worst_case"


def worst_case(  # noqa: PLR0913 - each setting is one keyword
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[Any],
    rho: float = 0.05,
    *,
    p: float = 2.0,
    adaptive: bool | Adaptive = False,
    steps: int = 1,
    restarts: int = 1,
    m: int | None = None,
    seed: int = 0,
    **options: Unpack[LossOptions],
) -> WorstCase:
    """Sharpness, ``max L(w + eps) - L(w)`` over ``||T^-1 eps||_p <= rho``, of all data or as a mean over micro-batches.

    One step is the paper's: ``eps = rho * ball.farthest(grad L(w))``, the very perturbation of ``flatmin.SAM``; its
    rise is returned as it is, also below zero. With K steps, projected ascent goes on from there: a step of length rho
    along the gradient's ``ball.farthest``, back into the ball; where the loss did not rise, the step is halved and
    taken again from the best point so far. The best loss seen counts, w among the candidates, so more steps never give
    less. Each further restart climbs from a random point of the ball.

    Costs ``1 + steps`` passes over the data, and as many for each further restart.

    Args:
        model: The network; left as it was.
        loss_fn: ``loss_fn(model, batch)``, or a criterion for batches ``(inputs, targets)``; see ``Objective``.
        data: Batches, see ``Objective``.
        rho: Radius of the ball, ``>= 0``.
        p: Order of its norm: 2 or infinity; for one step and one start any from 1.
        adaptive: Scale the ball elementwise: ``True`` for ``T = |w|``; a ``flatmin.optim.Adaptive`` for
            ``T = |w| + eta`` on the parameters that it chooses.
        steps: Ascents K, ``>= 1``.
        restarts: Starting points, the weights being the first, ``>= 1``.
        m: Examples that share one perturbation (m-sharpness). Micro-batches are cut from the loader's batches, so m
            should divide their size: of each batch, what remains after the last full m is left out. ``None`` takes all
            data together.
        seed: Of the random starting points.
        options: See ``LossOptions``.

    Raises:
        ValueError: A setting is outside its domain, no batch has m examples, or the loss at w is not finite.

    References:
        Foret et al. (2021), arXiv:2010.01412, Eqs. 1 and 2, sections 3.1 and 4.1, Appendix C.6; adaptive: Kwon et al.
        (2021), arXiv:2102.11600, Eq. 3; step-size control after Andriushchenko et al. (2023), arXiv:2302.07011.
    """
    start = time.perf_counter()
    objective = Objective(model, loss_fn, data, **options)
    steps, restarts = checked_count("steps", steps), checked_count("restarts", restarts)
    ascent = _Ascent(Ball(p, metric_of(adaptive)), rho, steps, restarts)
    m = None if m is None else checked_count("m", m)
    generator = torch.Generator().manual_seed(seed)
    with objective.measuring():
        with nullcontext(iter([objective])) if m is None else objective.groups_of(m) as parts:
            results = [(*ascent.highest(part, generator), part.num_passes) for part in parts]
    if m is not None:
        results = [result for part in list_of_ranks(results, objective.process_group) for result in part]
        if not results:
            raise ValueError(f"m must be at most the number of examples in a batch of the loader, got {m}")
    losses, peaks, passes = zip(*results, strict=True)
    for loss in losses:  # now that all ranks know of it: one that raised alone would leave the others waiting
        check_finite_loss(loss)
    rises = tuple(peak - loss for peak, loss in zip(peaks, losses, strict=True))
    value, error = mean_and_half_width(rises)
    settings = {"rho": rho, "p": p, "adaptive": described(adaptive), "steps": steps, "restarts": restarts}
    return WorstCase(
        value=value,
        error=error,
        num_passes=max(passes),
        wall_seconds=time.perf_counter() - start,
        settings=objective.settings | settings | {"m": m, "seed": seed},
        rises=rises,
        loss=math.fsum(losses) / len(losses),
    )


@dataclass(frozen=True)
class _Point:
    """A perturbation with the loss there, and its gradient where the ascent goes on from it."""

    perturbation: list[Tensor]
    loss: float
    gradient: list[Tensor]


@dataclass(frozen=True)
class _Ascent:
    """Projected gradient ascent within the ball."""

    ball: Ball
    rho: float
    steps: int
    restarts: int

    def __post_init__(self) -> None:
        check_number("rho", self.rho, ">= 0 and finite")
        self.ball.check_ascent_steps(self.steps, "steps")
        if self.restarts > 1 and self.ball.p not in (2.0, math.inf):
            raise ValueError(
                f"restarts must be 1 unless p is 2 or infinity, got {self.restarts} with p = {self.ball.p}"
            )

    def highest(self, objective: Objective, generator: torch.Generator) -> tuple[float, float]:
        """The loss at w, and the highest found in the ball."""
        scaling = scaling_at_weights(self.ball.metric, objective)
        centre = _visit(objective, [torch.zeros_like(param.detach()) for param in objective.params])
        highest = self._climb(objective, centre, scaling)
        for _ in range(self.restarts - 1):
            start = _visit(objective, self._random_point(objective, scaling, generator))
            highest = max(highest, start.loss, self._climb(objective, start, scaling))
        return centre.loss, highest

    def _climb(self, objective: Objective, start: _Point, scaling: list[Tensor] | None) -> float:
        best, length = start, self.rho
        for step in range(self.steps):
            is_last = step == self.steps - 1
            ahead = self._ahead(objective, best, length, scaling)
            trial = _visit(objective, ahead, needs_gradient=not is_last)
            if self.steps == 1:  # the paper's estimate, whatever it is
                return trial.loss
            if trial.loss > best.loss:
                best = trial
            else:
                length /= 2
        return best.loss

    def _ahead(self, objective: Objective, point: _Point, length: float, scaling: list[Tensor] | None) -> list[Tensor]:
        within = space_at_weights(self.ball.metric, objective, length)
        farthest = self.ball.farthest(within, point.gradient, scaling)
        moves = [scale.to(tensor) * tensor for tensor, scale in zip(farthest.tensors, farthest.scales, strict=True)]
        if self.steps == self.restarts == 1:  # any p; where the ascent goes on, the ball has a projection
            return moves
        moved = [old + move for old, move in zip(point.perturbation, moves, strict=True)]
        return self.ball.project(space_at_weights(self.ball.metric, objective, self.rho), moved, scaling)

    def _random_point(
        self, objective: Objective, scaling: list[Tensor] | None, generator: torch.Generator
    ) -> list[Tensor]:
        """Uniform on the sphere for p = 2, uniform in the cube for infinity; both in the metric."""
        shape = (objective.num_params,)
        if self.ball.p == 2.0:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn /= drawn.norm()
        else:
            drawn = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        return scaled(objective.unflatten(self.rho * drawn), scaling)


def _visit(objective: Objective, perturbation: list[Tensor], *, needs_gradient: bool = True) -> _Point:
    with objective.moved(perturbation):
        if not needs_gradient:
            return _Point(perturbation, objective.loss(), [])
        loss, gradient = objective.loss_and_gradient()
        return _Point(perturbation, loss, objective.unflatten(gradient))
