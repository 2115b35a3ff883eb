"""Move parameters in place, and put the exact values back."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SMALL = 4096  # entries of a tensor that is copied faster with others than on its own
_BATCH = 64  # of those at a time, so that the memory they share is small as well
_LARGE = 3 << 19  # entries of a tensor (6 MB) whose memory a C library takes from the system afresh each time
_PIECE = 1 << 17  # entries of such a tensor that are in the cache at a time
_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Saved:
    """Where the parameters live, and the values to put back there.

    Attributes:
        targets: The parameters or views of them, each entry once, in any order.
        values: Shaped like ``targets``.
    """

    targets: list[Tensor]
    values: list[Tensor]

    def add(self, target: Tensor, value: Tensor) -> None:
        """Remember one value."""
        self.targets.append(target)
        self.values.append(value)

    def restore_(self) -> None:
        """Copy the values into the parameters' own storage."""
        if self.targets:
            torch._foreach_copy_(self.targets, self.values)

    def difference(self) -> list[Tensor]:
        """What the targets have moved by."""
        return [target - value for target, value in zip(self.targets, self.values, strict=True)]


def perturb_(
    params: Sequence[Tensor], tensors: list[Tensor], scales: Sequence[Tensor], spent: Collection[int] = ()
) -> Saved:
    """``w += scale * tensor`` in place, each parameter with its own 0-dim scale.

    The sum is formed in float32 or wider and rounded once, to the parameter's dtype.

    Args:
        params: The parameters.
        tensors: One per parameter, shaped like it.
        scales: One per parameter.
        spent: Ids of gradients that the step is done with. Where no one else holds one, its memory takes the values of
            before: on a CPU, large fresh memory costs more in page faults than all of the arithmetic.

    Returns:
        The values of before; adding and subtracting again would not be exact.
    """
    saved = Saved([], [])
    try:
        if params[0].is_cpu:
            _perturb_on_cpu_(saved, params, tensors, scales, spent)
        else:
            _perturb_at_once_(saved, params, tensors, scales)
    except BaseException:  # out of memory half-way, say
        saved.restore_()
        raise
    return saved


def _perturb_on_cpu_(
    saved: Saved,
    params: Sequence[Tensor],
    tensors: list[Tensor],
    scales: Sequence[Tensor],
    spent: Collection[int] = (),
) -> None:
    """Small parameters in one batch; each other one alone, saved and moved while it is in the cache."""
    small: list[int] = []
    for index, param in enumerate(params):
        if param.numel() <= _SMALL and param.is_contiguous() and param.dtype not in _NARROW:
            small.append(index)
            continue
        large = param.numel() >= _LARGE
        if large and id(tensors[index]) in spent and _same_layout(param, tensors[index]) and _is_free(tensors, index):
            saved.add(param, _swap_(param, tensors[index], scales[index]))
        else:
            saved.add(param, param.clone())
            _add_scaled_(param, tensors[index], scales[index])
    flat = [params[i] if params[i].dim() == 1 else params[i].view(-1) for i in small]
    for start in range(0, len(flat), _BATCH):
        batch = flat[start : start + _BATCH]
        saved.targets.extend(batch)
        saved.values.extend(_copies(batch))
    if small:
        torch._foreach_addcmul_([params[i] for i in small], [tensors[i] for i in small], [scales[i] for i in small])


def _copies(vectors: list[Tensor]) -> tuple[Tensor, ...]:
    copies: tuple[Tensor, ...] = torch.split(torch.cat(vectors), [vector.numel() for vector in vectors])
    return copies


def _swap_(param: Tensor, tensor: Tensor, scale: Tensor) -> Tensor:
    """Move the parameter and leave its values of before in the memory of ``tensor``."""
    size, stride = (param.numel(),), (1,)
    flat_param, flat_tensor = param.as_strided(size, stride), tensor.as_strided(size, stride)
    for start in range(0, param.numel(), _PIECE):
        moved, spent = flat_param[start : start + _PIECE], flat_tensor[start : start + _PIECE]
        before = moved.clone()
        _add_scaled_(moved, spent, scale)
        spent.copy_(before)
    return tensor


def _add_scaled_(param: Tensor, tensor: Tensor, scale: Tensor) -> None:
    if param.dtype in _NARROW:
        param.copy_(torch.addcmul(param.float(), tensor.float(), scale))
    else:
        param.addcmul_(tensor, scale)


def _same_layout(param: Tensor, tensor: Tensor) -> bool:
    """Whether both are dense, so that one order of memory fits both."""
    is_dense = param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))
    return is_dense and param.stride() == tensor.stride() and param.dtype == tensor.dtype


def _is_free(grads: list[Tensor], index: int) -> bool:
    """Whether only the step holds a gradient that is off its parameter, and no other tensor shares its memory."""
    num_references = sys.getrefcount(grads[index])  # by this call, by the group's list and by the direction's
    num_storage_users = torch._C._storage_Use_Count(grads[index].untyped_storage()._cdata)  # by this call and by itself
    return num_references <= 3 and grads[index]._use_count() == 1 and num_storage_users <= 2


def _perturb_at_once_(
    saved: Saved, params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]
) -> None:
    """The same in a constant number of kernels for each device, dtype and scale."""
    values = [torch.empty_like(param) for param in params]
    torch._foreach_copy_(values, list(params))
    saved.targets.extend(params)
    saved.values.extend(values)
    kinds: dict[tuple[torch.device, torch.dtype, int], list[int]] = {}
    for index, (param, scale) in enumerate(zip(params, scales, strict=True)):
        kinds.setdefault((param.device, param.dtype, id(scale)), []).append(index)
    for (device, dtype, _), indices in kinds.items():
        wide = torch.promote_types(dtype, torch.float32)
        part = [params[index] for index in indices]
        scale = scales[indices[0]].to(device, wide)
        steps = torch._foreach_mul([tensors[index].to(wide) for index in indices], scale)
        if wide == dtype:
            torch._foreach_add_(part, steps)
        else:
            torch._foreach_add_(steps, [param.to(wide) for param in part])
            torch._foreach_copy_(part, steps)
