"""A visit to w + eps: the way there, and the way back."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatmin.optim.balls import Ball, Perturbation
from flatmin.optim.host_copies import HostCopies, is_on_host
from flatmin.optim.layers import LayerBall
from flatmin.optim.norms import joint_norm
from flatmin.optim.perturbation import perturb_
from flatmin.optim.saved import Saved
from flatmin.optim.sharding import Shards
from flatmin.optim.space import Space


@dataclass
class Visit:
    """Where the parameters stand, and how they get home.

    Attributes:
        owners: The parameters that take part; none at home.
        params: The same as real tensors.
        saved: Their values at w; ``None`` at home and where a visit moves nothing.
        scaling: The metric's T at w, until the last ascent.
        host: Their values at w on the way to host memory, if that is where they are to be kept.
    """

    owners: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    saved: Saved | None = None
    scaling: list[Tensor] | None = None
    host: HostCopies | None = None

    def save_to_host(self, params: list[Tensor]) -> None:
        """Begin to copy the values at w to host memory, unless they are there already or on their way."""
        if params and not any(map(is_on_host, params)) and not (self.host is not None and self.host.hold(params)):
            self.host = HostCopies(params)

    def ascend(
        self, space: Space, direction: list[Tensor], ball: Ball | LayerBall, *, is_last: bool, seed: int | None = None
    ) -> Tensor:
        """Climb along the direction: to the sphere at first, then onward and back into the ball.

        Args:
            space: The parameters with a gradient.
            direction: One tensor per parameter.
            ball: Where eps may be.
            is_last: Whether the descent comes next, so that T can be freed.
            seed: Of the stochastic rounding of narrow dtypes; ``None`` rounds to the nearest.

        Returns:
            Whether the direction was finite, 0-dim; where it was not, the parameters stay.

        Raises:
            RuntimeError: Other parameters have a gradient than at the first ascent.
        """
        if not self.owners:
            self.owners, self.params = space.owners, space.params
            self.scaling = ball.metric.scaling(space)
        elif list(map(id, space.owners)) != list(map(id, self.owners)):
            raise RuntimeError("the same parameters must have a gradient at each of several ascent steps")
        step = ball.farthest(space, direction, self.scaling)
        if step.is_finite.device.type != "cpu" or step.is_finite:  # 0 * inf would be NaN; an accelerator cannot say
            self._move(space, step, ball, seed)
            torch.clear_autocast_cache()  # of weights as they were, where a whole step is inside of torch.autocast
        if is_last:
            self.scaling = None
        return step.is_finite

    def go_home(self) -> None:
        """Put the exact values back, and free the copies."""
        if self.saved is not None:
            self.saved.restore_()
            torch.clear_autocast_cache()
        self.forget()

    def forget(self) -> None:
        """Stay where the parameters are, and free the copies."""
        self.owners, self.params, self.saved, self.scaling, self.host = [], [], None, None, None

    def values(self) -> dict[Tensor, Tensor]:
        """A copy of each parameter's value at w, while it is elsewhere."""
        if self.saved is None:
            return {}
        here = [param.clone() for param in self.params]
        self.saved.restore_()
        values = {owner: owner.detach().clone() for owner in self.owners}
        torch._foreach_copy_(self.params, here)
        return values

    def length(self) -> Tensor:
        """``||eps||_2`` as realised, over all shards; 0 where nothing was moved."""
        if self.saved is None:
            return torch.zeros(())
        moved, shards = self.saved.difference(), Shards.of(self.owners)
        if shards is None:
            return joint_norm(moved)
        place = {target.data_ptr(): index for index, target in enumerate(self.saved.moved())}
        return shards.norm([moved[place[param.data_ptr()]] for param in self.params])

    def _move(self, space: Space, step: Perturbation, ball: Ball | LayerBall, seed: int | None) -> None:
        if self.saved is None:
            arrays = space.arrays_with(step.tensors)
            self.saved = perturb_(
                self.params, step.tensors, step.scales, space.grads, seed=seed, arrays=arrays, host=self.host
            )
            return
        reached = [param.clone() for param in self.params]
        self.saved.restore_()
        onward = [
            point - param + tensor * scale
            for point, param, tensor, scale in zip(reached, self.params, step.tensors, step.scales, strict=True)
        ]
        inside = ball.project(space, onward, self.scaling)
        if self.host is not None:
            self.host = HostCopies(self.params)
        ones = [scale.new_ones(()) for scale in step.scales]
        self.saved = perturb_(self.params, inside, ones, seed=seed, host=self.host)
