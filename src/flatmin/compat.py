"""The constructor and the meaning of the older SAM ports, so that code written for them runs with one import changed.

davda54/sam and pytorch_optimizer build the base from a class, ``SAM(model.parameters(), torch.optim.SGD, lr=0.1)``;
tourdeml/sam takes an instance, ``SAM(model.parameters(), optimizer)``. Of pytorch_optimizer's arguments ``use_gc`` and
``perturb_eps`` are not here. moskomule/sam.pytorch is an SGD itself: its ``SAMSGD(params, lr=0.1)`` is written like the
first.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from flatmin.optim import Ball, SharpnessAware, Space
from flatmin.optim.closure_passes import MicroBatches
from flatmin.optim.closures import Closure
from flatmin.optim.freshness import has_fresh_gradient

__all__ = ["SAM"]

_COPIES_OF_WEIGHTS = {"old_p", "e_w"}  # what the older ports keep as state: weights and perturbation of the last step


class SAM(SharpnessAware):
    """SAM and ASAM behind the older ports' constructor.

    ``first_step``, ``second_step`` and ``step(closure)`` mean what they meant there. The closure may be of either kind:
    where the caller has run ``backward`` before ``step(closure)``, that was the first pass and the closure is called
    once, for the second; otherwise it is called for both, as torch's own contract has it. Unlike the ports, the state
    dict holds the base optimizer's state.

    Args:
        params: Parameters or parameter groups; a group may bring its own ``rho`` and ``adaptive``. With an instance as
            base they must be the instance's own parameters.
        base_optimizer: Class of the base optimizer, or an instance.
        rho: Radius, ``>= 0``. The default is the ports' and the paper's.
        adaptive: Scale the ball by ``|w|`` for every parameter, as davda54/sam does: without eta, biases included.
            The ASAM authors' own rule is ``flatmin.ASAM``. Its radius does not transfer: the port advises 2.0 where the
            authors use 0.5.
        model: See ``flatmin.SharpnessAware``; the ports had no such argument.
        **kwargs: For the base optimizer's constructor; none with an instance.

    Raises:
        TypeError: ``base_optimizer`` is neither a class of optimizers nor an instance, or comes with keywords it cannot
            take.
        ValueError: ``params`` are not the instance's parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer] | Callable[..., Optimizer] | Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            _base(params, base_optimizer, kwargs), rho, ball=Ball(metric=_PortMetric(adaptive)), model=model
        )

    @property
    def base_optimizer(self) -> Optimizer:
        """The base, under the older ports' name."""
        return self.base

    def _step_with(self, closures: list[Closure], scaler: GradScaler | None, micro: MicroBatches) -> Tensor | None:
        """Take a step with a closure of either kind.

        Gradients that are all zero count as none; to know that, the host looks at them.
        """
        grads = [param.grad for param in self._params() if param.grad is not None]
        is_second = self._passes.progress.num_ascents or self._passes.progress.is_complete or len(closures) > 1
        if is_second or not has_fresh_gradient(self._params()) or not any(map(torch.any, grads)):
            return super()._step_with(closures, scaler, micro)
        self.first_step(zero_grad=True, scaler=scaler)
        try:
            closures[0]()
        except BaseException:
            self.restore()
            raise
        self._passes.descend()
        self._step_base(scaler)
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of the base optimizer, or of an older port.

        The older ports saved a copy of the weights and nothing of the base optimizer. Of such a checkpoint the
        hyperparameters are taken; a warning says that the base optimizer starts without its momentum.
        """
        state = {
            key: {name: value for name, value in entry.items() if name not in _COPIES_OF_WEIGHTS}
            for key, entry in state_dict["state"].items()
        }
        filled = {key: entry for key, entry in state.items() if entry}
        if len(filled) < len(state) and not filled:
            warnings.warn(
                "this checkpoint of an older SAM holds a copy of the weights but no state of the base optimizer, "
                "which starts afresh (momentum zero)",
                stacklevel=2,
            )
        super().load_state_dict({**state_dict, "state": filled})


class _PortMetric:
    """T = |w| in the groups that are adaptive, 1 in the others, as davda54/sam has it."""

    needs_names = False
    depends_on_scale = False

    def __init__(self, adaptive: bool) -> None:
        self.defaults = {"adaptive": adaptive}

    def check(self, options: Mapping[str, Any]) -> None:
        if not isinstance(options["adaptive"], bool):
            raise TypeError(f"adaptive must be True or False, got {options['adaptive']!r}")

    def scaling(self, space: Space) -> list[Tensor] | None:
        if not any(group.options["adaptive"] for group in space.groups):
            return None
        return [
            param.abs() if group.options["adaptive"] else param.new_ones(())
            for group in space.groups
            for param in group.params
        ]


def _base(params: Iterable[Any], base: object, kwargs: dict[str, Any]) -> Optimizer:
    if not isinstance(base, Optimizer):
        if not callable(base):
            raise TypeError(f"base_optimizer must be a class of optimizers or an instance, got {base!r}")
        made: Optimizer = base(params, **kwargs)
        return made
    if kwargs:
        raise TypeError(f"base_optimizer is an instance, so it takes no keywords, got {sorted(kwargs)}")
    given = {id(param) for entry in params for param in (entry["params"] if isinstance(entry, dict) else [entry])}
    held = {id(param) for group in base.param_groups for param in group["params"]}
    if given != held:
        raise ValueError(
            f"params must be the parameters of base_optimizer: {len(given)} given, {len(held)} held, "
            f"{len(given & held)} in common"
        )
    return base
