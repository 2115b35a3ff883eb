"""An optimizer whose weights rest at w + eps between steps: where they go, who is shown w, and what is saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.directions import Direction
from flatmin.optim.freshness import mark_used
from flatmin.optim.layers import LayerBall
from flatmin.optim.memory import Memory
from flatmin.optim.rest import Rest
from flatmin.optim.rounding import Rounding, is_narrow
from flatmin.optim.schedules import RhoSchedule, set_radii
from flatmin.optim.seeding import seed_of
from flatmin.optim.sharding import mean_over_mesh
from flatmin.optim.space import every_space
from flatmin.optim.when import When
from flatmin.optim.where import masked
from flatmin.optim.wrapper import Wrapper

_TRUE_WEIGHTS = "true_weights"


class RestingWeights(Wrapper):
    """Perturbs the weights before a gradient is there, and knows w wherever they rest.

    Args:
        base: The optimizer to wrap.
        own_defaults: Entries that each group gets unless it brings its own.

    Attributes:
        direction: Where the perturbation points; one that needs no clean gradient.
        ball: Norm and metric of the ball.
        when: Before which steps the weights are perturbed.
        rho_schedule: Sets every group's rho before each step.
        rounding: How w + eps is rounded in bfloat16 and float16.
    """

    direction: Direction
    ball: Ball | LayerBall
    when: When
    rho_schedule: RhoSchedule | None
    rounding: Rounding

    def __init__(self, base: Optimizer, own_defaults: dict[str, Any]) -> None:
        super().__init__(base, {**own_defaults, "is_perturbed": False})
        self._names: dict[Tensor, str] = {}
        self._memory = Memory(base)
        self._rest = Rest()
        self._is_shown = False

    @contextmanager
    def unperturbed(self) -> Iterator[None]:
        """Show the true weights w inside the block; afterwards they rest at w + eps again, with the same bits."""
        if self._is_shown:
            yield
            return
        self._go_home()
        self._is_shown = True
        try:
            yield
        finally:
            self._is_shown = False
            self._perturb()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as ``torch.optim.Optimizer.zero_grad``."""
        self.base.zero_grad(set_to_none=set_to_none)
        mark_used(self._params())
        self._settle()

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with ``rho`` in its groups; also w where the weights rest at w + eps."""
        self._settle()
        true = self._rest.true_weights()
        for owner, value in true.items():
            self.state[owner][_TRUE_WEIGHTS] = value
        self._mark_perturbed(bool(true))
        try:
            packed = super().state_dict()
            return {**packed, "state": {key: dict(entry) for key, entry in packed["state"].items()}}
        finally:
            self._mark_perturbed(False)
            for owner in true:
                del self.state[owner][_TRUE_WEIGHTS]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the base optimizer, before or after the model's weights.

        One that was saved at rest brings w, otherwise the model's weights are w, and are perturbed now; those that are
        loaded later are w then, unless they are those that rest here now.

        Raises:
            ValueError: It was saved at rest, and whatever carried it has lost w.
        """
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = dict(zip(indices, self._params(), strict=False))
        entries = state_dict["state"].items()
        true = {params[key]: entry[_TRUE_WEIGHTS] for key, entry in entries if _TRUE_WEIGHTS in entry}
        others = {key: {name: x for name, x in entry.items() if name != _TRUE_WEIGHTS} for key, entry in entries}
        self._go_home()
        super().load_state_dict({**state_dict, "state": {key: entry for key, entry in others.items() if entry}})
        if self.param_groups[0]["is_perturbed"] and not true:
            raise ValueError(
                "state_dict was saved while the weights rested at w + eps and has lost w: save model and optimizer "
                "inside `with optimizer.unperturbed():`"
            )
        self._mark_perturbed(False)
        self._rest_from(true)
        self._rest.await_model()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return {**super().__getstate__(), "_rest": Rest(), "true_weights": self._rest.true_weights()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        true = state.pop("true_weights", {})
        super().__setstate__(state)
        self._rest_from(true)

    def _settle(self) -> None:
        """Perturb weights that somebody has written where others rested; no gradient of theirs is there yet."""
        if self._rest.has_moved and not self._knows_weights():
            self._perturb()

    def _go_home(self) -> None:
        """From where the weights rest to w, unless somebody has written others there."""
        if self._knows_weights():
            self._rest.go_home()

    @torch.no_grad()
    def _knows_weights(self) -> bool:
        """Whether the weights are those that rest; others are at home from now on.

        Where somebody has written, w is perturbed again and compared: whoever swaps weights for an evaluation and back
        has changed nothing.
        """
        if self._rest.is_as_left():
            return True
        found = self._rest.take_home()
        self._perturb()
        is_same = all(_is_same(param, value) for param, value in found)
        if bool(mean_over_mesh(torch.tensor(float(is_same), device=found[0][0].device), self._params()) == 1.0):
            return True
        self._rest.take_home()
        for param, value in found:
            param.copy_(value)
        return False

    @torch.no_grad()
    def _perturb(self) -> None:
        """From w to where the weights rest."""
        number = self.param_groups[0]["num_steps"]
        set_radii(self.rho_schedule, self.param_groups)
        space = every_space(self.base, self._names, self._memory).perturbed()
        if number == 0 or not self.when(number) or not space.groups:
            return
        seed = seed_of(number) if self.rounding == "stochastic" else None
        self._rest.ascend(space, masked(space, self.direction(space)), self.ball, seed)

    @torch.no_grad()
    def _rest_from(self, true: dict[Tensor, Tensor]) -> None:
        """Perturb the given true weights, or those that the parameters hold."""
        for param, value in true.items():
            param.copy_(value)
        if not self._is_shown:
            self._perturb()

    def _mark_perturbed(self, is_perturbed: bool) -> None:
        for group in self.param_groups:
            group["is_perturbed"] = is_perturbed


def _is_same(param: Tensor, value: Tensor) -> bool:
    """To the last digits: a compiled step, which has its own rounding, may have brought the weights there."""
    if torch.equal(param, value):
        return True
    if is_narrow(param.dtype) or not param.is_floating_point():
        return False
    tolerance = 64 * torch.finfo(param.dtype).eps * value.abs().max()
    return bool((param - value).abs().max() <= tolerance)
