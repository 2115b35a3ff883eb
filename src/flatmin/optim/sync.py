"""Which replicas share which gradient: DistributedDataParallel around the passes of a step."""

import copy
import sys
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatmin.optim.sharding import is_sharded

Sync = Literal["local", "global"] | int

_BUCKET = 1 << 23  # entries that travel in one message


class GradientSync:
    """Keeps or shares the gradients of a replicated model's passes.

    The gradient that a step follows is always the mean over all replicas. What differs is the one that the perturbation
    is made of: ``"local"``, each replica's own; ``"global"``, the mean over all; an integer n, the mean over groups of
    n neighbouring ranks. DDP averages a pass by itself where that mean is over all replicas and nothing else happens to
    the gradient in between; otherwise its forward pass runs as under its ``no_sync``, and we average.

    Args:
        replicas: The wrapped modules.
        sync: Who shares the gradient of the ascent.

    Attributes:
        sync: The same, with groups of one called ``"local"`` and one group of all ``"global"``.
        has_shared: Whether DDP averages the gradients of the pass whose forward ran last over all replicas.

    Raises:
        ValueError: n does not divide the number of replicas.
    """

    def __init__(self, replicas: Sequence[DistributedDataParallel], sync: Sync) -> None:
        self.has_shared = True
        self._replicas = replicas
        self._all: Any = replicas[0].process_group
        self._is_static = all(replica.static_graph for replica in replicas)
        self._may_differ = any(replica.find_unused_parameters or replica.static_graph for replica in replicas)
        self._neighbours: Any = None
        self._flags: list[tuple[bool, bool]] = []  # of each replica, while one of our forward passes runs
        ranks = torch.distributed.get_process_group_ranks(self._all)
        if isinstance(sync, int):
            if len(ranks) % sync:
                raise ValueError(f"sync must divide the number of replicas, {len(ranks)}, got {sync}")
            sync = "global" if sync == len(ranks) else "local" if sync == 1 else sync
        if isinstance(sync, int):
            start = torch.distributed.get_rank(self._all) // sync * sync
            self._neighbours = torch.distributed.new_group(ranks[start : start + sync], use_local_synchronization=True)
        self.sync: Sync = sync

    def share_buffers(self) -> None:
        """Before the first pass: what DDP does before a forward pass, so that every pass starts from these buffers.

        Its own broadcast is off until the step is over, since the replicas stand at different weights meanwhile.
        """
        for replica in self._replicas:
            if replica._check_sync_bufs_pre_fwd():  # type: ignore[no-untyped-call]
                replica._sync_buffers()  # type: ignore[no-untyped-call]
            replica.require_forward_param_sync = False

    def begin_forward(self, shares: bool) -> None:
        """Before a forward pass: let DDP average the gradients of its backward pass, or not.

        Args:
            shares: Whether it should, unless the caller's own ``no_sync`` says otherwise. With a static graph it never
                does: a pass under ``no_sync`` after DDP's first average would make it count every later gradient twice,
                and then average in the wrong pass.
        """
        shares = shares and not any(replica.static_graph for replica in self._replicas)
        self._flags = [
            (
                replica.require_backward_grad_sync,
                replica.static_graph and replica._static_graph_delay_allreduce_enqueued,
            )
            for replica in self._replicas
        ]
        for replica in self._replicas:
            replica.require_forward_param_sync = False
            if not shares:
                replica.require_backward_grad_sync = False
                if replica.static_graph:  # DDP would queue its first average whether told to or not
                    replica._static_graph_delay_allreduce_enqueued = True

    def end_forward(self) -> None:
        """After a forward pass: see what DDP has noted of it, and leave DDP as it was.

        Another optimizer of the same model may have told it not to average, where this one would have it do so.
        """
        if not self._flags:  # a pass without gradient
            return
        self.has_shared = all(replica.require_forward_param_sync for replica in self._replicas)
        for replica, (is_on, is_enqueued) in zip(self._replicas, self._flags, strict=True):
            replica.require_backward_grad_sync = is_on
            if replica.static_graph:
                replica._static_graph_delay_allreduce_enqueued = is_enqueued
        self._flags = []

    def finish(self) -> None:
        """After a step: DDP may broadcast buffers at the next forward pass."""
        self.has_shared = True
        for replica in self._replicas:
            replica.require_forward_param_sync = True

    def share_ascent(self, params: Sequence[Tensor]) -> None:
        """Average a gradient, which DDP has not, over those who share the ascent's."""
        if self.sync == "global":
            self.average(params)
        elif self._neighbours is not None:
            _average(self._gradients(params), self._neighbours)

    def average(self, params: Sequence[Tensor]) -> None:
        """Average the gradient, which DDP has not, over all replicas."""
        _average(self._gradients(params), self._all)
        self.has_shared = True

    def average_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Average what pieces found, over all replicas, in place.

        Raises:
            RuntimeError: The replicas may not have found it of the same parameters.
        """
        if tensors and self._may_differ:
            raise RuntimeError(
                'sync must be "global" for a method that keeps tensors from step to step where replicas may use '
                "different parameters (find_unused_parameters=True, or a static graph in which they do), got "
                f"{self.sync!r}: they have different ones"
            )
        _average(tensors, self._all)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over all replicas, for decisions on which they must agree."""
        value = value.clone()
        _average([value], self._all)
        return value

    def _gradients(self, params: Sequence[Tensor]) -> list[Tensor]:
        """The gradients; zero where a parameter has one on other replicas only."""
        if self._may_differ:
            used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
            torch.distributed.all_reduce(used, group=self._all)
            numbers = used.tolist()
            for param, number in zip(params, numbers, strict=True):
                if number and param.grad is None:
                    param.grad = torch.zeros_like(param)
            if self._is_static:  # one look is enough
                size = torch.distributed.get_world_size(self._all)
                self._may_differ = any(0 < number < size for number in numbers)
        return [param.grad for param in params if param.grad is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> "GradientSync":
        """The same groups around the copied modules; DDP's own copies are in the default group."""
        duplicate = GradientSync.__new__(GradientSync)
        memo[id(self)] = duplicate
        duplicate.__dict__.update(self.__dict__)
        duplicate._replicas = copy.deepcopy(self._replicas, memo)
        duplicate._all = duplicate._replicas[0].process_group
        return duplicate

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer whose model is in DistributedDataParallel cannot be pickled, because process groups cannot: "
            "save its state_dict() instead"
        )


def gradient_sync(model: nn.Module | None, params: Sequence[Tensor], sync: Sync | None) -> GradientSync | None:
    """How the replicas of a model share gradients; ``None`` where DDP wraps none.

    Args:
        model: The module that the passes call; somewhere in it is the DDP wrapper.
        params: The optimizer's parameters.
        sync: Who shares the gradient of the ascent; ``None`` for the paper's choice, each replica's own.

    Raises:
        TypeError: The model is in FSDP's first version.
        ValueError: ``sync`` is neither ``"local"`` nor ``"global"`` nor a number of replicas, or asks for gradients of
            less than all processes where the parameters are sharded, or for DDP where there is none.
    """
    _refuse_flat_parameters(model)
    if sync is None:
        replicas = _replicas(model)
        return GradientSync(replicas, "local") if replicas else None
    if sync not in ("local", "global") and (not isinstance(sync, int) or isinstance(sync, bool) or sync < 1):
        raise ValueError(f'sync must be "local", "global" or a number of replicas >= 1, got {sync!r}')
    if sync != "global" and any(map(is_sharded, params)):
        raise ValueError(
            f'sync must be "global" where parameters are sharded, got {sync!r}: a process holds a shard of the summed '
            "gradient only and has none of its own. Use DistributedDataParallel, or step([closures]) for one "
            "perturbation per micro-batch"
        )
    replicas = _replicas(model)
    if not replicas and sync != "global" and torch.distributed.is_initialized():
        raise ValueError(f"sync must not be given without model= wrapped by DistributedDataParallel, got {sync!r}")
    return GradientSync(replicas, sync) if replicas else None


def _replicas(model: nn.Module | None) -> list[DistributedDataParallel]:
    modules = () if model is None else model.modules()
    return [module for module in modules if isinstance(module, DistributedDataParallel)]


def _refuse_flat_parameters(model: nn.Module | None) -> None:
    first = sys.modules.get("torch.distributed.fsdp")  # not imported here: a model that needs it has imported it
    if first is not None and model is not None:
        if any(isinstance(module, first.FullyShardedDataParallel) for module in model.modules()):
            raise TypeError(
                "model must be sharded by torch.distributed.fsdp.fully_shard, got FullyShardedDataParallel, whose "
                "parameters do not tell that they are shards: eps would be too long"
            )


def _average(tensors: Sequence[Tensor], group: Any) -> None:
    """Replace tensors by their means over a process group, in few messages."""
    size = torch.distributed.get_world_size(group)
    bucket: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        bucket.append(tensor)
        is_last = index + 1 == len(tensors)
        if not is_last and _fits(bucket, tensors[index + 1]):
            continue
        flat = torch.cat([part.reshape(-1) for part in bucket]) if len(bucket) > 1 else bucket[0].reshape(-1).clone()
        torch.distributed.all_reduce(flat, group=group)
        flat.div_(size)
        pieces = torch.split(flat, [part.numel() for part in bucket])
        torch._foreach_copy_(bucket, [piece.view(part.shape) for piece, part in zip(pieces, bucket, strict=True)])
        bucket = []


def _fits(bucket: Sequence[Tensor], tensor: Tensor) -> bool:
    first = bucket[0]
    same = tensor.dtype == first.dtype and tensor.device == first.device
    return same and sum(part.numel() for part in bucket) + tensor.numel() <= _BUCKET
