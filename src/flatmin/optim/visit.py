"""A visit to w + eps: the way there, and the way back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatmin.optim.balls import Ball, UnitStep
from flatmin.optim.groups import ActiveGroup
from flatmin.optim.perturbation import Saved, perturb_


@dataclass
class Visit:
    """Where the parameters stand, and how they get home.

    Attributes:
        owners: The parameters that take part; none at home.
        params: The same as real tensors.
        saved: Their values at w; ``None`` at home and where a visit moves nothing.
        scaling: The metric's T at w, until the last ascent.
    """

    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    saved: Saved | None = None
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
        radii = [radius for group in groups for radius in [group.radius] * len(group.owners)]
        if not self.owners:
            self.owners = owners
            self.params = [param for group in groups for param in group.params]
            self.scaling = ball.metric.scaling(groups)
        elif list(map(id, owners)) != list(map(id, self.owners)):
            raise RuntimeError("the same parameters must have a gradient at each of several ascent steps")
        unit = ball.farthest(direction, self.scaling)
        if unit.is_finite.device.type != "cpu" or unit.is_finite:  # 0 * inf would be NaN; an accelerator cannot say
            self._move(unit, radii, ball, {id(grad) for group in groups for grad in group.grads})
        if is_last:
            self.scaling = None
        return unit.is_finite

    def go_home(self) -> None:
        """Put the exact values back, and free the copies."""
        if self.saved is not None:
            self.saved.restore_()
        self.owners, self.params, self.saved, self.scaling = [], [], None, None

    def perturbation(self) -> list[Tensor]:
        """The perturbation as realised, entry by entry in some order; empty where nothing was moved."""
        return [] if self.saved is None else self.saved.difference()

    def _move(self, unit: UnitStep, radii: list[float], ball: Ball, spent: set[int]) -> None:
        scales = _scales(unit.scale, radii, self.params)
        if self.saved is None:
            self.saved = perturb_(self.params, unit.tensors, scales, spent)
            return
        reached = [param.clone() for param in self.params]
        self.saved.restore_()
        onward = [
            point - param + tensor * scale
            for point, param, tensor, scale in zip(reached, self.params, unit.tensors, scales, strict=True)
        ]
        inside = ball.project(onward, radii, self.scaling)
        self.saved = perturb_(self.params, inside, [scale.new_ones(()) for scale in scales])


def _scales(unit: Tensor, radii: list[float], params: list[Tensor]) -> list[Tensor]:
    """``rho * unit`` for each parameter on its device; parameters that agree share one tensor."""
    if len(set(radii)) == 1 and len({param.get_device() for param in params}) == 1:
        return [(unit * radii[0]).to(params[0].device)] * len(params)
    made: dict[tuple[float, torch.device], Tensor] = {}
    scales = []
    for radius, param in zip(radii, params, strict=True):
        key = radius, param.device
        if key not in made:
            made[key] = (unit * radius).to(param.device)
        scales.append(made[key])
    return scales
