"""Sums over parameters that are spread over processes: FSDP2 and tensor parallelism (DTensor)."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.norms import joint_dot, joint_norm

_ProcessGroups = tuple[Any, ...]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor; the module is looked up because importing it takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor in this process, in its own storage; the tensor itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(tensor: Tensor, owner: Tensor) -> Tensor:
    """A gradient, or this process's part of one, as a tensor spread like the parameter."""
    if not is_sharded(owner):
        return tensor
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - loaded already, since the parameter is one

    assert isinstance(owner, DTensor)
    if isinstance(tensor, DTensor):  # tensor parallelism may leave a gradient as partial sums
        same = tensor.placements == owner.placements
        return tensor if same else tensor.redistribute(owner.device_mesh, owner.placements)
    return DTensor.from_local(
        tensor, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
    )


def whole(tensor: Tensor, owner: Tensor) -> Tensor:
    """The tensor of which this process has a part, shaped like the parameter; every process must ask for it."""
    return placed_like(tensor, owner).full_tensor() if is_sharded(owner) else tensor  # type: ignore[attr-defined]


def mean_over_mesh(value: Tensor, params: Iterable[Tensor]) -> Tensor:
    """The mean of a value over the processes that parameters are spread over; the value itself where they are whole."""
    owner = next(filter(is_sharded, params), None)
    if owner is None:
        return value
    mesh: Any = owner.device_mesh  # type: ignore[attr-defined]
    total = _all_reduce(value, tuple(map(mesh.get_group, range(mesh.ndim))), "sum")
    return total / int(mesh.size())


@dataclass(frozen=True)
class Shards:
    """Over which processes each tensor of a list is spread.

    Attributes:
        groups: For each tensor the process groups over which its shards are; none where every process holds all of it.
    """

    groups: list[_ProcessGroups]

    @classmethod
    def of(cls, owners: Sequence[Tensor]) -> "Shards | None":
        """How the parameters are spread; ``None`` where each is whole."""
        if not any(map(is_sharded, owners)):
            return None
        return cls([_process_groups(owner) for owner in owners])

    def rank_of(self, index: int) -> int:
        """A number for this process among those that hold other shards of the tensor."""
        return _position(self.groups[index])

    def norm(self, tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
        """The p-norm over all entries of all shards, equal on every process; 0-dim."""
        device, norms = tensors[0].device, []
        for groups, part in self._parts.items():
            own = _norm([tensors[index] for index in part], p).to(device)
            norms.append(_completed_norm(own, groups, p))
        length: Tensor = torch.linalg.vector_norm(torch.stack(norms), p)
        return length

    def norms(self, tensors: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
        """The p-norm of each tensor on its own, equal on every process; each 0-dim."""
        own = [_norm([tensor], p).to(tensors[0].device) for tensor in tensors]
        return self._each_part(own, lambda part, groups: _completed_norm(part, groups, p))

    def dot(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """The dot product over all entries of all shards, equal on every process; 0-dim."""
        products = []
        for groups, part in self._parts.items():
            own = joint_dot([left[index] for index in part], [right[index] for index in part])
            products.append(_all_reduce(own.to(left[0].device, torch.float64), groups, "sum"))
        return torch.stack(products).sum()

    def first_of_largest(self, peaks: Sequence[Tensor]) -> Tensor:
        """Which tensor holds the largest entry of all: its index, or -1 where it is in another process's shard.

        Of equal ones the first tensor's comes first, and in it the first shard's, as in one process.

        Args:
            peaks: Each tensor's largest entry in this process, 0-dim and at least 0; -1 where the shard is empty.
        """
        own = [peak.double() for peak in peaks]
        top = self._each_part(own, lambda part, groups: _all_reduce(part, groups, "max"))
        places = [
            torch.where(peak == highest, float(_position(groups)), math.inf)
            for peak, highest, groups in zip(own, top, self.groups, strict=True)
        ]
        first = self._each_part(places, lambda part, groups: _all_reduce(part, groups, "min"))
        is_here = torch.stack(places) == torch.stack(first)
        winner = torch.stack(top).argmax(0, keepdim=True)
        return torch.where(is_here.gather(0, winner), winner, -1).squeeze(0)

    def _each_part(
        self, values: Sequence[Tensor], completed: Callable[[Tensor, _ProcessGroups], Tensor]
    ) -> list[Tensor]:
        """One value for each tensor, completed over its process groups in as few messages as there are sets of them."""
        results = list(values)
        for groups, part in self._parts.items():
            together = completed(torch.stack([values[index] for index in part]), groups)
            for index, value in zip(part, together.unbind(), strict=True):
                results[index] = value
        return results

    @cached_property
    def _parts(self) -> dict[_ProcessGroups, list[int]]:
        """The tensors of each set of process groups, in the same order on every process."""
        parts: dict[_ProcessGroups, list[int]] = {}
        for index, groups in enumerate(self.groups):
            parts.setdefault(groups, []).append(index)
        return parts


def _process_groups(owner: Tensor) -> _ProcessGroups:
    if not is_sharded(owner):
        return ()
    mesh, placements = owner.device_mesh, owner.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def _position(groups: _ProcessGroups) -> int:
    """The place of this process's shard among all shards of a tensor."""
    place = 0
    for group in groups:
        place = place * torch.distributed.get_world_size(group) + torch.distributed.get_rank(group)
    return place


def _norm(tensors: list[Tensor], p: float) -> Tensor:
    """The norm of this process's part, which may be empty."""
    filled = [tensor for tensor in tensors if tensor.numel()]
    return joint_norm(filled, p).double() if filled else torch.zeros((), dtype=torch.float64, device=tensors[0].device)


def _completed_norm(own: Tensor, groups: _ProcessGroups, p: float) -> Tensor:
    """Norms of the parts of vectors as norms of the whole vectors, entry by entry."""
    if math.isinf(p):
        return _all_reduce(own, groups, "max")
    powers: Tensor = _all_reduce(own**p, groups, "sum") ** (1 / p)
    return powers


def _all_reduce(value: Tensor, groups: _ProcessGroups, operation: str) -> Tensor:
    operations = torch.distributed.ReduceOp
    reduce_op = {"sum": operations.SUM, "max": operations.MAX, "min": operations.MIN}[operation]
    value = value.clone()
    for group in groups:
        torch.distributed.all_reduce(value, op=reduce_op, group=group)
    return value
