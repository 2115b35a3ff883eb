"""A visit to w + eps: the way there, and the way back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatmin.optim.balls import Ball, UnitStep
from flatmin.optim.groups import ActiveGroup
from flatmin.optim.perturbation import assign_, perturb_


@dataclass
class Visit:
    """Where the parameters stand, and how they get home.

    Attributes:
        num_ascents: Ascent steps made so far; 0 at home.
        owners: The parameters that take part.
        params: The same as real tensors.
        values: Their values at w, empty at home and where a visit moves nothing.
        scaling: The metric's T at w, until the last ascent.
    """

    num_ascents: int = 0
    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    scaling: list[Tensor] | None = None

    def ascend(self, groups: list[ActiveGroup], direction: list[Tensor], ball: Ball, is_last: bool) -> Tensor:
        """Climb along the direction: to the sphere at first, then onward and back into the ball.

        Args:
            groups: The parameters with a gradient.
            direction: One tensor per parameter.
            ball: Where eps may be.
            is_last: Whether the descent comes next, so that T can be freed.

        Returns:
            Whether the direction was finite, 0-dim; where it was not, the parameters stay.

        Raises:
            RuntimeError: Other parameters have a gradient than at the first ascent.
        """
        owners = [owner for group in groups for owner in group.owners]
        radii = [group.radius for group in groups for _ in group.owners]
        if self.num_ascents == 0:
            self.owners = owners
            self.params = [param for group in groups for param in group.params]
            self.scaling = ball.metric.scaling(groups)
        elif list(map(id, owners)) != list(map(id, self.owners)):
            raise RuntimeError("the same parameters must have a gradient at each of several ascent steps")
        unit = ball.farthest(direction, self.scaling)
        self.num_ascents += 1
        if unit.is_finite.device.type != "cpu" or unit.is_finite:  # 0 * inf would be NaN; an accelerator cannot say
            self._move(unit, radii, ball)
        if is_last:
            self.scaling = None
        return unit.is_finite

    def go_home(self) -> None:
        """Put the exact values back, and free the copies."""
        assign_(self.params[: len(self.values)], self.values)
        self.num_ascents = 0
        self.owners, self.params, self.values, self.scaling = [], [], [], None

    def perturbation(self) -> list[Tensor]:
        """The perturbation as realised: the difference of the present values and those at w."""
        return [param - value for param, value in zip(self.params, self.values, strict=False)]

    def _move(self, unit: UnitStep, radii: list[float], ball: Ball) -> None:
        scales = _scales(unit.scale, radii, self.params)
        if not self.values:
            self.values = perturb_(self.params, unit.tensors, scales)
            return
        onward = [
            eps + tensor * scale for eps, tensor, scale in zip(self.perturbation(), unit.tensors, scales, strict=True)
        ]
        assign_(self.params, self.values)
        inside = ball.project(onward, radii, self.scaling)
        perturb_(self.params, inside, [scale.new_ones(()) for scale in scales])


def _scales(unit: Tensor, radii: list[float], params: list[Tensor]) -> list[Tensor]:
    """``rho * unit`` for each parameter on its device; parameters that agree share one tensor."""
    made: dict[tuple[float, torch.device], Tensor] = {}
    scales = []
    for radius, param in zip(radii, params, strict=True):
        key = radius, param.device
        if key not in made:
            made[key] = (unit * radius).to(param.device)
        scales.append(made[key])
    return scales
