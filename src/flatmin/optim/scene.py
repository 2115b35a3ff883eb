"""Copies of an optimizer's weights and state that a traced step may write into."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.optim.draws import Unready
from flatmin.optim.memory import Memory
from flatmin.optim.space import ActiveGroup, Space, active_space, every_space

Gradients = Sequence[Tensor | None]


class Given(NamedTuple):
    """What a step reads; weights, buffers and state are overwritten with what it finds.

    Attributes:
        weights: The optimizer's parameters, in the order of its groups.
        true: The same at w, where ``weights`` rest at w + eps between steps; empty elsewhere.
        frozen: The model's other parameters, by name.
        buffers: The model's buffers, by name.
        state: The base optimizer's tensors of each of its parameters.
        numbers: ``lr`` and ``rho`` of each group, and the number of the step; float64, shape ``(2 groups + 1,)``.
        draws: The random numbers of the forward pass, in the order in which it asks for them.
        batch: What the loss function takes.
    """

    weights: list[Tensor]
    true: list[Tensor]
    frozen: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: list[dict[str, Tensor]]
    numbers: Tensor
    draws: list[Tensor]
    batch: Any


class Scene:
    """An optimizer's parameters and state, copied, as its pieces and its base see them.

    Numbers that change from step to step are tensors here, so that they are read when the step runs and not when it is
    traced.

    Args:
        base: Whose groups and hyperparameters they are; it is left alone.
        names: Of its parameters.
        given: What to copy.

    Attributes:
        weights: The parameters, at w.
        memory: What pieces keep, in the copied state.
    """

    def __init__(self, base: Optimizer, names: Mapping[Tensor, str], given: Given) -> None:
        real = [param for group in base.param_groups for param in group["params"]]
        self.weights = [
            weight.detach().clone().requires_grad_(param.requires_grad)
            for weight, param in zip(given.true or given.weights, real, strict=True)
        ]
        copy_of = dict(zip(real, self.weights, strict=True))
        self._given = given
        self._names = {copy_of[param]: name for param, name in names.items()}
        self._base = _copy_of_base(base, copy_of, given.state)
        self.memory = Memory(self._base)
        wide = torch.float64 if any(weight.dtype == torch.float64 for weight in real) else torch.float32
        *pairs, number = given.numbers.unbind()
        self._numbers = [
            {"lr": lr, "rho": rho.to(wide), "num_steps": number}
            for lr, rho in zip(pairs[::2], pairs[1::2], strict=True)
        ]

    @property
    def state(self) -> list[dict[str, Tensor]]:
        """The base's tensors of each parameter."""
        return [dict(self._base.state.get(weight, {})) for weight in self.weights]

    def space(self, grads: Gradients) -> Space:
        """The parameters at w, with gradients found anywhere."""
        self._set_gradients(self.weights, grads)
        return self._with_numbers(active_space(self._base, self._names, self.memory))

    def trainable(self) -> Space:
        """All parameters that can be trained, at w, without gradients."""
        return self._with_numbers(every_space(self._base, self._names, self.memory))

    def step_base(self, owners: Sequence[Tensor], followed: Sequence[Tensor], corrections: Sequence[Tensor]) -> None:
        """The base optimizer's rule, and the corrections after it."""
        self._set_gradients(owners, followed)
        for group, entries in zip(self._base.param_groups, self._numbers, strict=True):
            group["lr"] = entries["lr"]
        with _seen_as_compiled():
            type(self._base).step(self._base)
        signed_lr = {
            weight: -group["lr"] if group.get("maximize", False) else group["lr"]
            for group in self._base.param_groups
            for weight in group["params"]
        }
        for owner, correction in zip(owners, corrections, strict=bool(corrections)):
            owner.sub_(signed_lr[owner] * correction)
        self.memory.commit(True, owners)

    def undo_unless(self, is_taken: Tensor) -> None:
        """Put weights and state back where the step is not taken."""
        for weight, old in zip(self.weights, self._given.true or self._given.weights, strict=True):
            weight.copy_(torch.where(is_taken, weight, old))
        for weight, entries in zip(self.weights, self._given.state, strict=True):
            own = self._base.state[weight]
            for name, old in entries.items():
                own[name] = torch.where(is_taken, own[name], old.to(own[name].dtype))

    def write(self, weights: Sequence[Tensor], buffers: Mapping[str, Tensor], is_taken: Tensor | None) -> None:
        """Put weights and state where they were read, unless the step is not taken, and buffers in any case."""
        given = self._given
        require_complete(given.state, self.state)
        targets, values = list(given.weights), list(weights)
        for old, new in zip(given.state, self.state, strict=True):
            targets += old.values()
            values += [new[name] for name in old]
        for target, value in zip(targets, values, strict=True):
            kept = value.to(target.dtype)
            target.copy_(kept if is_taken is None else torch.where(is_taken, kept, target))
        for name, value in buffers.items():
            given.buffers[name].copy_(value)

    def _with_numbers(self, space: Space) -> Space:
        """The numbers that change from step to step as tensors in the groups' options."""
        numbers = {id(group): entries for group, entries in zip(self._base.param_groups, self._numbers, strict=True)}
        groups: list[ActiveGroup] = [replace(g, options={**g.options, **numbers[id(g.options)]}) for g in space.groups]
        return replace(space, groups=groups)

    def _set_gradients(self, owners: Sequence[Tensor], grads: Gradients) -> None:
        for weight in self.weights:
            weight.grad = None
        for owner, grad in zip(owners, grads, strict=True):
            owner.grad = grad


def _copy_of_base(base: Optimizer, copy_of: Mapping[Tensor, Tensor], state: Sequence[Mapping[str, Any]]) -> Optimizer:
    """The base optimizer with other tensors, and torch's own in the form in which every number may be a tensor."""
    traceable = {"foreach": True, "fused": False, "capturable": True}
    copy = object.__new__(type(base))
    copy.__dict__.update(base.__dict__)
    copy.param_groups = [
        {**group, **{name: value for name, value in traceable.items() if name in group}}
        | {"params": [copy_of[param] for param in group["params"]]}
        for group in base.param_groups
    ]
    copy.state = defaultdict(dict)
    for weight, entries in zip(copy_of.values(), state, strict=True):
        for name, value in entries.items():  # the count as float64, or 1 - beta ** step would lose half of its digits
            is_count = name == "step" and value.dim() == 0
            copy.state[weight][name] = value.double() if is_count else value.clone()
    return copy


@contextmanager
def _seen_as_compiled() -> Iterator[None]:
    """Let torch's optimizers take the branches in which every number may be a tensor."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def require_complete(before: Sequence[Mapping[str, Tensor]], after: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse a step that adds to the state, which the eager step must do first.

    Raises:
        Unready: It does.
    """
    if any(old.keys() != new.keys() for old, new in zip(before, after, strict=True)):
        raise Unready("the step adds entries to the optimizer's state")
