"""An optimizer around another one: groups, state, checkpoints and copies are the base's own."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from flatmin.arguments import check_number

_STATE_DICT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class Wrapper(Optimizer):
    """Shares ``param_groups`` and ``state`` with a base optimizer and adds entries of its own to the groups.

    The state dict is the base's, with our entries in its groups. So it loads into the base, a checkpoint of the base
    loads into the wrapper (our entries keep their present values), and a base that initialises its state on the first
    step never meets state that is not its own.

    Args:
        base: The optimizer to wrap.
        own_defaults: Entries that each group gets unless it brings its own.
    """

    def __init__(self, base: Optimizer, own_defaults: dict[str, Any]) -> None:
        check_base(base)
        self.base = base
        self.check_options({**own_defaults, "num_steps": 0})
        plain = {name: value.item() if hasattr(value, "item") else value for name, value in own_defaults.items()}
        self._own_defaults = {**plain, "num_steps": 0}  # without NumPy's numbers, which no safe checkpoint may hold
        taken = {name for name in self._own_defaults if name in base.defaults}
        if taken:
            raise ValueError(
                f"base must have no hyperparameter named {', '.join(sorted(taken))}, which are ours, "
                f"got {type(base).__name__}"
            )
        for group in base.param_groups:
            self._check_not_wrapped(group)
            self.check_options({**self._own_defaults, **group})
        groups, state = base.param_groups, base.state
        self._is_built = False
        super().__init__(groups, {**base.defaults, **self._own_defaults})  # empties both: they are the base's own
        base.param_groups, base.state = groups, state
        self._is_built = True
        self._share_hooks()

    @property
    def _found_inf(self) -> Tensor | None:
        """Other than 0 where the gradient scaler that calls ``step`` has found an overflow."""
        return getattr(self, "found_inf", None)

    @property
    def _grad_scale(self) -> Tensor | None:
        """The factor in the gradients that the scaler has left to us."""
        return getattr(self, "grad_scale", None)

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _create_state(self, names: tuple[str, ...]) -> None:
        """What a first step would create: the base's state, and zeros under names of ours."""
        self.base.step()
        for param in self._params():
            if param.grad is not None:
                self.state[param].update({name: torch.zeros_like(param) for name in names})

    @contextmanager
    def _heeding_scaler(self) -> Iterator[None]:
        """Forget what a gradient scaler has told where the step raises; the scaler itself would not."""
        try:
            yield
        except BaseException:
            for name in ("found_inf", "grad_scale"):
                self.__dict__.pop(name, None)
            raise

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where an entry of a group is outside its domain."""
        check_number("rho", options["rho"], ">= 0 and finite")

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, with our entries; its own ``rho`` is kept, and it counts the steps taken before."""
        if isinstance(param_group, dict):
            self.check_options({**self._own_defaults, **param_group})
            if self._is_built:
                param_group["num_steps"] = self.param_groups[0]["num_steps"]
            for name, default in self._own_defaults.items():
                param_group.setdefault(name, default)
        if self._is_built:
            self.base.add_param_group(param_group)
        else:  # torch's constructor adds the groups again that the base has checked long ago
            self.param_groups.append(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, in torch's standard form."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the base; entries it lacks keep their present values."""
        before = [dict(group) for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, entries in zip(self.param_groups, before, strict=True):
            scheduled = () if "rho" in group else ("initial_rho",)  # it belongs to the rho that is kept
            for name in (*self._own_defaults, "perturb", "masks", *scheduled):
                if name in entries:
                    group.setdefault(name, entries[name])

    def __getstate__(self) -> dict[str, Any]:
        return kept_in_copies(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_hooks()

    def _share_hooks(self) -> None:
        for name in _STATE_DICT_HOOKS:
            setattr(self, name, getattr(self.base, name))

    def _check_not_wrapped(self, group: dict[str, Any]) -> None:
        rho = self._own_defaults["rho"]
        if "num_steps" in group and group.get("rho") != rho:
            raise ValueError(
                f"rho must equal the {group.get('rho')} that the base already has from another sharpness-aware "
                f"optimizer or its checkpoint, got {rho}: set group['rho'] after construction to change it"
            )


def kept_in_copies(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes of an optimizer but for hooks; torch's own copies keep groups and state alone."""
    dropped = {"step", "_zero_grad_profile_name", *_STATE_DICT_HOOKS}  # a scheduler patches `step` on the instance
    return {
        name: value
        for name, value in optimizer.__dict__.items()
        if name not in dropped and not name.startswith("_optimizer_step")
    }


def only_creates_state(optimizer: Optimizer) -> bool:
    """Whether torch.distributed.checkpoint makes an optimizer create its state, with lr and gradients of zero."""
    groups = optimizer.param_groups
    return (
        not optimizer.state
        and all(float(group.get("lr", 1.0)) == 0.0 for group in groups)
        and not any(param.grad is not None and param.grad.any() for group in groups for param in group["params"])
    )


def names_of(model: nn.Module | None, groups: list[dict[str, Any]]) -> dict[Tensor, str]:
    """The parameters' names: as the groups tell them, else as the model does.

    Raises:
        ValueError: Some have none.
    """
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()} if model is not None else {}
    for group in groups:
        names.update(zip(group["params"], group.get("param_names", ()), strict=False))
    if not all(param in names for group in groups for param in group["params"]):
        raise ValueError(
            "parameters must have names, because the metric goes by them: pass model=, build the base from "
            'model.named_parameters(), or choose scaled="matrices" or "all"'
        )
    return names


def check_base(base: object) -> None:
    """Raise ``TypeError`` where it is no optimizer that can be wrapped."""
    if not isinstance(base, Optimizer):
        raise TypeError(
            f"base must be a torch.optim.Optimizer instance, got {base!r}; "
            "flatmin.compat.SAM takes a class and its keywords"
        )
    if isinstance(base, Wrapper):
        raise TypeError(f"base must not be sharpness-aware itself, got {type(base).__name__}")
    if not hasattr(base, _STATE_DICT_HOOKS[0]):
        raise TypeError(
            f"base must have been made by torch.optim.Optimizer's own constructor, got {type(base).__name__}: "
            "one that is around an optimizer itself goes around ours, such as Lookahead(flatmin.SAM(base))"
        )
    if isinstance(base, LBFGS):
        raise TypeError("base must take a step without a closure, got LBFGS, which evaluates the loss on its own")
