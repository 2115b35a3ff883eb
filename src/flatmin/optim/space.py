"""The parameters a step works on, as one vector: what pieces read, measure and remember."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.optim import kernel
from flatmin.optim.groups import is_perturbed
from flatmin.optim.memory import Memory
from flatmin.optim.norms import are_finite, each_norm, joint_dot, joint_norm
from flatmin.optim.sharding import Shards, is_sharded, local, placed_like


@dataclass(frozen=True)
class ActiveGroup:
    """The parameters of one group that have a gradient, beside the group's own hyperparameters.

    Attributes:
        owners: The parameters as the user knows them.
        params: The same as real tensors of this process: complex ones are views ``(..., 2)``, as in ``torch.optim``;
            of a sharded one, the shard.
        grads: Their gradients, shaped like ``params``.
        names: Their names; ``None`` where the optimizer was told none.
        options: The group's entries: ``rho``, ``lr``, ``maximize`` and whatever a piece keeps there.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    names: list[str] | None
    options: Mapping[str, Any]

    @cached_property
    def arrays(self) -> kernel.Arrays | None:
        """Where parameters and gradients lie, the latter as partners, if all of them suit the compiled kernel."""
        if not self.grads or not self.params[0].is_cpu or not kernel.has_compiled_kernel():
            return None
        arrays = kernel.describe(self.params, self.grads)
        return arrays if arrays.all_fit else None

    @property
    def radius(self) -> float:
        """``rho``, negative in a group that is maximised: there the worst neighbour has the lowest objective."""
        rho: float = self.options["rho"]
        return -rho if self.options.get("maximize", False) else rho


@dataclass(frozen=True)
class Space:
    """The vector of all parameters that have a gradient, in the order of the groups.

    Norms and dot products are over the whole vector: over all groups, and over all shards of sharded parameters.

    Attributes:
        groups: The groups that have any.
        memory: What pieces keep from step to step.
        loss_scale: The factor in the gradients where they came from a loss scaled for mixed precision and are not
            unscaled yet; 0-dim.
    """

    groups: list[ActiveGroup]
    memory: Memory = field(default_factory=Memory)
    loss_scale: Tensor | None = None

    @cached_property
    def owners(self) -> list[Tensor]:
        """The parameters as the user knows them."""
        return [owner for group in self.groups for owner in group.owners]

    @cached_property
    def params(self) -> list[Tensor]:
        """The parameters as real tensors of this process."""
        return [param for group in self.groups for param in group.params]

    @cached_property
    def grads(self) -> list[Tensor]:
        """The gradients, shaped like ``params``."""
        return [grad for group in self.groups for grad in group.grads]

    @cached_property
    def arrays(self) -> kernel.Arrays | None:
        """Where all parameters and gradients lie, see ``ActiveGroup.arrays``."""
        found = [group.arrays for group in self.groups]
        return kernel.joined([each for each in found if each is not None]) if found and all(found) else None

    def arrays_with(self, tensors: Sequence[Tensor]) -> kernel.Arrays | None:
        """The same where the tensors are the gradients themselves; ``None`` for others, of which nothing is known."""
        return self.arrays if tensors is self.grads else None

    @cached_property
    def shards(self) -> Shards | None:
        """How sums over sharded parameters are completed; ``None`` where every tensor is whole."""
        are_whole = self.arrays is not None and all(group.owners is group.params for group in self.groups)
        return None if are_whole else Shards.of(self.owners)

    def per_param(self, value_of: Mapping[int, Any] | Sequence[Any]) -> list[Any]:
        """One value per group, repeated for each of its parameters."""
        return [value_of[index] for index, group in enumerate(self.groups) for _ in group.owners]

    def norm(self, tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
        """The p-norm over all entries, see ``joint_norm``."""
        if self.shards is not None:
            return self.shards.norm(tensors, p)
        arrays = self.arrays_with(tensors)
        return joint_norm(tensors, p, None if arrays is None else arrays.of_partners())

    def has_finite_grads(self) -> Tensor:
        """Whether every entry of the gradients is finite, in all shards; 0-dim."""
        if self.shards is not None:
            return self.norm(self.grads, math.inf).isfinite()
        return are_finite(self.grads, None if self.arrays is None else self.arrays.of_partners())

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The dot product over all entries, see ``joint_dot``."""
        return joint_dot(left, right) if self.shards is None else self.shards.dot(left, right)

    def norms(self, tensors: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
        """The p-norm of each tensor on its own, 0-dim and at least float32."""
        if self.shards is not None:
            return self.shards.norms(tensors, p)
        return each_norm(tensors, p)

    def recall(self, name: str) -> list[Tensor | None]:
        """What was remembered of each parameter under a name, shaped like ``params``; ``None`` where nothing was."""
        return [self.recall_at(index, name) for index in range(len(self.owners))]

    def recall_at(self, index: int, name: str) -> Tensor | None:
        """The same of one parameter."""
        value = self.memory.recall(self.owners[index], name)
        return None if value is None else as_real(local(value))

    def remember(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep one tensor per parameter for later steps; it becomes state when the step has been taken."""
        for owner, tensor in zip(self.owners, tensors, strict=True):
            self.memory.remember(owner, name, as_owned(tensor, owner))

    def perturbed(self) -> "Space":
        """The part that is perturbed: the groups without an entry ``perturb`` that is false."""
        if all(is_perturbed(group.options) for group in self.groups):
            return self
        return Space([g for g in self.groups if is_perturbed(g.options)], self.memory, self.loss_scale)

    def finite_with_rest(self, is_finite: Tensor) -> Tensor:
        """Whether the perturbed part's gradients are finite, as is known, and those of the others are, too; 0-dim."""
        rest = Space([group for group in self.groups if not is_perturbed(group.options)])
        return is_finite & rest.has_finite_grads().to(is_finite.device) if rest.groups else is_finite


def active_space(
    optimizer: Optimizer, names: Mapping[Tensor, str], memory: Memory, loss_scale: Tensor | None = None
) -> Space:
    """Collect the parameters that have a gradient; groups without any are left out.

    Raises:
        RuntimeError: A gradient is sparse.
        ValueError: A group's ``rho`` was scheduled below zero, or it has none.
    """
    groups = []
    for options in optimizer.param_groups:
        if "rho" not in options:
            raise ValueError(
                "rho must be an entry of every group, got one without: give later groups to add_param_group() of the "
                "sharpness-aware optimizer, not of its base"
            )
        if not options["rho"] >= 0.0:
            raise ValueError(f"rho must be >= 0, got {options['rho']}")
        group = _dense_group(options, names)
        if group.arrays is not None:  # which says all that is asked below
            groups.append(group)
            continue
        owners = [param for param in options["params"] if param.grad is not None and param.numel() > 0]
        if not owners:
            continue
        grads = [param.grad for param in owners]
        refuse_sparse(grads)
        params = owners
        if any(param.is_complex() or is_sharded(param) for param in owners):
            grads = [as_real(local(placed_like(grad, param))) for grad, param in zip(grads, owners, strict=True)]
            params = [as_real(local(param)) for param in owners]
        known = [names[param] for param in owners] if names else None
        groups.append(ActiveGroup(owners, params, grads, known, options))
    return Space(groups, memory, loss_scale)


def refuse_sparse(grads: Iterable[Tensor]) -> None:
    """Raise ``RuntimeError`` where a gradient is sparse."""
    if any(grad.is_sparse for grad in grads):
        raise RuntimeError(
            "gradients must be dense, got a sparse one: build the embedding with sparse=False, "
            "or give its weights to an optimizer of their own"
        )


def _dense_group(options: Mapping[str, Any], names: Mapping[Tensor, str]) -> ActiveGroup:
    """The group as it is where every parameter is real, whole and not empty, and has a dense gradient."""
    params = list(options["params"])
    known = [names[param] for param in params] if names else None
    return ActiveGroup(params, params, [param.grad for param in params], known, options)


def every_space(optimizer: Optimizer, names: Mapping[Tensor, str], memory: Memory) -> Space:
    """The vector of all parameters that can be trained, whether or not they have a gradient; it has no gradients."""
    groups = []
    for options in optimizer.param_groups:
        owners = [param for param in options["params"] if param.requires_grad and param.numel() > 0]
        if owners:
            params = [as_real(local(param)) for param in owners]
            known = [names[param] for param in owners] if names else None
            groups.append(ActiveGroup(owners, params, [], known, options))
    return Space(groups, memory)


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself; a complex one as a real view with a last dimension of 2."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_owned(tensor: Tensor, owner: Tensor) -> Tensor:
    """A real tensor of this process as what stands beside the parameter: complex or sharded where that one is."""
    if owner.is_complex() and not tensor.is_complex():
        tensor = torch.view_as_complex(tensor.contiguous())
    return placed_like(tensor, owner)
