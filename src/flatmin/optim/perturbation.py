"""Move parameters in place, and put the exact values back."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flatmin.optim import kernel
from flatmin.optim.host_copies import HostCopies
from flatmin.optim.layout import same_layout
from flatmin.optim.perturbation_foreach import add_scaled_foreach_
from flatmin.optim.rounding import Rounder, is_narrow
from flatmin.optim.saved import Saved

_SMALL = 4096  # entries of a tensor that is copied faster with others than on its own
_BATCH = 64  # of those at a time, so that the memory they share is small as well
_LARGE = 3 << 19  # entries of a tensor (6 MB) whose memory a C library takes from the system afresh each time
_PIECE = 1 << 17  # entries of such a tensor that are in the cache at a time


@dataclass(frozen=True)
class _Move:
    """``params += scales * tensors``; the other two as for ``perturb_``."""

    params: Sequence[Tensor]
    tensors: Sequence[Tensor]
    scales: Sequence[Tensor]
    spent: Sequence[Tensor]
    rounder: Rounder
    arrays: kernel.Arrays | None = None

    @cached_property
    def ids_of_spent(self) -> frozenset[int]:
        """Asked for only where there is a large tensor."""
        return frozenset(map(id, self.spent))


def perturb_(
    params: Sequence[Tensor],
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    spent: Sequence[Tensor] = (),
    *,
    seed: int | None = None,
    arrays: kernel.Arrays | None = None,
    host: HostCopies | None = None,
) -> Saved:
    """``w += scale * tensor`` in place, each parameter with its own 0-dim scale.

    The sum is formed in float32 or wider and rounded once, to the parameter's dtype.

    Args:
        params: The parameters.
        tensors: One per parameter, shaped like it.
        scales: One per parameter.
        spent: Gradients that the step is done with. Where no one else holds one, its memory takes the values of
            before: on a CPU, large fresh memory costs more in page faults than all of the arithmetic.
        seed: Of the stochastic rounding of bfloat16 and float16, whose spacing is wider than most of a perturbation's
            entries; another one each step. ``None`` rounds to the nearest. Other dtypes round to the nearest always.
        arrays: Where the parameters and, as partners, the tensors lie, if that is known and suits the compiled kernel.
        host: Copies of the parameters in host memory, to go back to.

    Returns:
        The values of before; adding and subtracting again would not be exact.
    """
    saved = Saved()
    move = _Move(params, tensors, scales, spent, Rounder(seed), arrays)
    try:
        if host is None and params[0].is_cpu:
            rest = _perturb_by_kernel_(saved, move) if kernel.has_compiled_kernel() else range(len(params))
            _perturb_on_cpu_(saved, move, rest)
        else:
            saved.add_together(params, host)
            add_scaled_foreach_(params, tensors, scales, move.rounder)
    except BaseException:  # out of memory half-way, say
        saved.restore_()
        raise
    return saved


def _perturb_by_kernel_(saved: Saved, move: _Move) -> Sequence[int]:
    """Those that fit the kernel, all in one pass over memory; returns the indices of the others."""
    params, tensors, scales = move.params, move.tensors, move.scales
    arrays = move.arrays or kernel.describe(params, tensors)
    if arrays.overlap():
        return range(len(params))
    indices: Sequence[int] = range(len(params))
    others: Sequence[int] = ()
    if not arrays.all_fit:
        indices = [index for index, address in enumerate(arrays.addresses) if address]
        others = [index for index, address in enumerate(arrays.addresses) if not address]
        arrays = arrays.fitting()
    lengths = arrays.lengths()
    worth_asking = (position for position, length in enumerate(lengths) if length > _SMALL)
    is_any_large = max(lengths, default=0) > _SMALL
    free = {i: tensors[indices[i]] for i in worth_asking if _is_free(move, indices[i])} if is_any_large else {}
    numbers = {key: scale.item() for key, scale in dict(zip(map(id, scales), scales, strict=True)).items()}
    factors = list(map(numbers.__getitem__, map(id, scales)))
    moved = list(params)
    if others:
        factors, moved = ([column[index] for index in indices] for column in (factors, moved))  # type: ignore[assignment]
    saved.kept.append(kernel.save_and_move_(moved, arrays, factors, free))
    return others


def _perturb_on_cpu_(saved: Saved, move: _Move, indices: Sequence[int]) -> None:
    """Small parameters in one batch; each other one alone, saved and moved while it is in the cache."""
    tensors, scales, small = move.tensors, move.scales, []
    for index in indices:
        param = move.params[index]
        if param.numel() <= _SMALL and param.is_contiguous() and not is_narrow(param.dtype):
            small.append(index)
            continue
        large = param.numel() >= _LARGE
        if large and same_layout(param, tensors[index]) and _is_free(move, index):
            saved.add(param, _swap_(param, tensors[index], scales[index], move.rounder))
        else:
            saved.add(param, param.clone())
            _add_scaled_(param, tensors[index], scales[index], move.rounder)
    params = [move.params[i] for i in small]
    for start in range(0, len(small), _BATCH):
        saved.targets.extend(params[start : start + _BATCH])
        saved.values.extend(_copies(params[start : start + _BATCH]))
    if small:
        torch._foreach_addcmul_(params, [tensors[i] for i in small], [scales[i] for i in small])


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    joined = torch.cat([tensor if tensor.dim() == 1 else tensor.view(-1) for tensor in tensors])
    pieces = torch.split(joined, [tensor.numel() for tensor in tensors])
    return [piece if x.dim() == 1 else piece.view(x.shape) for piece, x in zip(pieces, tensors, strict=True)]


def _swap_(param: Tensor, tensor: Tensor, scale: Tensor, rounder: Rounder) -> Tensor:
    """Move the parameter and leave its values of before in the memory of ``tensor``."""
    for moved, spent in _pieces(param, tensor):
        before = moved.clone()
        _add_scaled_(moved, spent, scale, rounder)
        spent.copy_(before)
    return tensor


def _pieces(param: Tensor, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as vectors, in pieces that fit the cache; as they are where their entries are in different orders."""
    if not same_layout(param, tensor):
        yield param, tensor
        return
    flat_param, flat_tensor = (x.as_strided((x.numel(),), (1,)) for x in (param, tensor))
    for start in range(0, param.numel(), _PIECE):
        yield flat_param[start : start + _PIECE], flat_tensor[start : start + _PIECE]


def _add_scaled_(param: Tensor, tensor: Tensor, scale: Tensor, rounder: Rounder) -> None:
    if not is_narrow(param.dtype):
        param.addcmul_(tensor, scale)
        return
    for moved, step in _pieces(param, tensor):
        moved.copy_(rounder(torch.addcmul(moved.float(), step.float(), scale), param.dtype))


def _is_free(move: _Move, index: int) -> bool:
    """Whether only the step holds a gradient that is off its parameter, and no other tensor shares its memory."""
    grads = move.tensors
    if id(grads[index]) not in move.ids_of_spent:
        return False
    num_references = sys.getrefcount(grads[index])  # by this call, by the group's list and by the direction's
    num_storage_users = torch._C._storage_Use_Count(grads[index].untyped_storage()._cdata)  # by this call and by itself
    return num_references <= 3 and grads[index]._use_count() == 1 and num_storage_users <= 2
