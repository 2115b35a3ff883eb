"""Balls: the perturbation within reach that goes furthest along a direction (eq. 2 of the paper)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatmin.arguments import check_number
from flatmin.optim.metrics import Identity, Metric
from flatmin.optim.norms import dual_order, widened
from flatmin.optim.piece_check import check_pieces
from flatmin.optim.radii import FirstOrderGain, Fixed, Radius, Unified
from flatmin.optim.space import Space


@dataclass(frozen=True)
class Perturbation:
    """``eps = scale * tensor`` for each parameter, held so because the product fuses into the addition that uses it.

    Attributes:
        tensors: One per parameter, shaped like it.
        scales: One per parameter, 0-dim on its device; zero where the direction is zero or not finite.
        is_finite: 0-dim boolean tensor: whether every entry of the direction was finite.
    """

    tensors: list[Tensor]
    scales: list[Tensor]
    is_finite: Tensor


@dataclass(frozen=True)
class Ball:
    """The ball ``||T^-1 eps||_p <= rho`` over all parameters together.

    Args:
        p: Order of the norm, from 1 to infinity.
        metric: The scaling T.
        radius: How far to go, given the length of the gradient; ``rho`` by default. ``Unified`` and ``FirstOrderGain``
            are defined for p = 2 alone.

    Raises:
        ValueError: p is below 1, or other than 2 with one of those radii.
    """

    p: float = 2.0
    metric: Metric = field(default_factory=Identity)
    radius: Radius = field(default_factory=Fixed)

    def __post_init__(self) -> None:
        check_number("p", self.p, ">= 1")
        check_pieces(metric=self.metric, radius=self.radius)
        if self.p != 2.0 and isinstance(self.radius, Unified | FirstOrderGain):  # which divide by the dual norm
            raise ValueError(f"p must be 2 with {type(self.radius).__name__}, got {self.p}")

    @property
    def defaults(self) -> dict[str, Any]:
        """Group entries of metric and radius."""
        return {**self.metric.defaults, **self.radius.defaults}

    def check(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where a group's own value is outside its domain."""
        self.metric.check(options)
        self.radius.check(options)

    @property
    def depends_on_scale(self) -> bool:
        """Whether the perturbation changes where all gradients are multiplied by one number."""
        return self.radius.depends_on_scale or self.metric.depends_on_scale

    def check_ascent_steps(self, ascent_steps: int, name: str = "ascent_steps") -> None:
        """Refuse several ascents where the projection back to the ball has no closed form, and numbers below 1.

        Args:
            ascent_steps: How many.
            name: What the user calls them.
        """
        if not isinstance(ascent_steps, int) or not ascent_steps >= 1:
            raise ValueError(f"{name} must be an integer >= 1, got {ascent_steps}")
        if ascent_steps > 1 and not isinstance(self.radius, Fixed):
            raise ValueError(f"{name} must be 1 with {type(self.radius).__name__}, got {ascent_steps}")
        if ascent_steps > 1 and self.p not in (2.0, math.inf):
            raise ValueError(f"{name} must be 1 unless p is 2 or infinity, got {ascent_steps} with p = {self.p}")

    def farthest(self, space: Space, direction: list[Tensor], scaling: list[Tensor] | None) -> Perturbation:
        """The maximiser of ``<direction, eps>`` over the ball.

        With ``u = T d`` and ``1/p + 1/q = 1``::

            eps = rho * T * sign(u) * |u|^(q-1) / (||u||_q^q)^(1/p)

        which is rho times ``d / ||d||`` for p = 2, ``sign(d)`` for p = infinity, and for p = 1 the largest entry alone
        (the first of equal ones). A zero direction gives zero.

        Args:
            space: The parameters; a group that is maximised goes the other way.
            direction: d, one tensor per parameter.
            scaling: T from the metric; ``None`` for all ones.

        References:
            Foret et al. (2021), arXiv:2010.01412, Eq. 2; with T: Kwon et al. (2021), arXiv:2102.11600, Eq. 4.
        """
        scaled = direction if scaling is None else [d * t for d, t in zip(direction, scaling, strict=True)]
        if self.p == 2.0:
            length = space.norm(scaled)
            tensors, unit = scaled, 1 / length
        else:
            length = space.norm(scaled, math.inf)
            tensors, unit = _dual(space, scaled, self.p, length)
        if scaling is not None:
            tensors = [u * t for u, t in zip(tensors, scaling, strict=True)]
        is_finite = length < math.inf  # which NaN is not
        radii = [self.radius(length, unit, group) for group in space.groups]
        moves = is_finite & (length > 0)
        return Perturbation(tensors, spread(space, [torch.where(moves, radius, 0.0) for radius in radii]), is_finite)

    def project(self, space: Space, steps: list[Tensor], scaling: list[Tensor] | None) -> list[Tensor]:
        """The nearest point of the ball, for p = 2 (in the metric's length) and p = infinity.

        Args:
            space: The parameters; those of a group with rho 0 stay where they are.
            steps: eps, one tensor per parameter.
            scaling: T, or ``None``.
        """
        radii = space.per_param([group.radius for group in space.groups])
        reach = [abs(rho) if scaling is None else abs(rho) * scaling[index] for index, rho in enumerate(radii)]
        if math.isinf(self.p):
            edges = [
                r.to(step) if isinstance(r, Tensor) else step.new_full((), r)
                for r, step in zip(reach, steps, strict=True)
            ]
            return [torch.clamp(step, -edge, edge) for step, edge in zip(steps, edges, strict=True)]
        relative = [torch.where(step == 0, 0.0, step / r) for step, r in zip(steps, reach, strict=True)]
        shrink = torch.clamp(1 / space.norm(relative), max=1.0)  # 1 / 0 is infinite: no step stays no step
        return [step * shrink.to(step.device, step.dtype) for step in steps]


def spread(space: Space, scales: Sequence[Tensor]) -> list[Tensor]:
    """One scale per group as one per parameter, on its device; parameters that agree share one tensor."""
    spread_out: list[Tensor] = []
    for scale, group in zip(scales, space.groups, strict=True):
        if group.arrays is not None:  # all of them are on the CPU
            spread_out.extend([scale.cpu()] * len(group.params))
            continue
        by_device = {device: scale.to(device) for device in {param.device for param in group.params}}
        spread_out.extend(by_device[param.device] for param in group.params)
    return spread_out


def _dual(space: Space, u: list[Tensor], p: float, largest: Tensor) -> tuple[list[Tensor], Tensor]:
    """``sign(u) |u|^(q-1)`` and ``1 / (||u||_q^q)^(1/p)``, both on u divided by its largest entry, against overflow."""
    if p == 1.0:
        return _largest_entry(space, u), torch.ones_like(largest)
    if math.isinf(p):
        return [tensor.sign() for tensor in u], torch.ones_like(largest)
    q = dual_order(p)
    peak = torch.where(largest > 0, largest, 1.0)
    relative = [tensor / peak.to(tensor.device, tensor.dtype) for tensor in u]
    # (sum |u|^q)^(1/p) = ||u||_q^(q/p) and q/p = q - 1
    return [r.sign() * r.abs() ** (q - 1) for r in relative], space.norm(relative, q) ** (1 - q)


def _largest_entry(space: Space, u: list[Tensor]) -> list[Tensor]:
    """The sign of the entry largest in absolute value, in its place; zero elsewhere. The first of equal ones wins."""
    peaks = [tensor.abs().flatten().max(dim=0) if tensor.numel() else None for tensor in u]  # a shard may be empty
    values = [u[0].new_tensor(-1.0) if peak is None else peak.values.to(u[0].device) for peak in peaks]
    if space.shards is None:
        winner = torch.stack([widened(value) for value in values]).argmax()
    else:
        winner = space.shards.first_of_largest(values)
    one_hot = []
    for index, (tensor, peak) in enumerate(zip(u, peaks, strict=True)):
        flat = torch.zeros_like(tensor).flatten()
        if peak is not None:
            place = peak.indices.view(1)  # indexing by a 0-dim tensor would make the host wait
            sign = tensor.flatten().gather(0, place).sign() * (winner == index).to(tensor.device)
            flat = flat.scatter(0, place, sign)
        one_hot.append(flat.view_as(tensor))
    return one_hot
