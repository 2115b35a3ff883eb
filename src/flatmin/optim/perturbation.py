"""Move parameters in place, and put the exact values back."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flatmin.optim import kernel
from flatmin.optim.host_copies import HostCopies
from flatmin.optim.rounding import is_narrow, round_stochastically

_SMALL = 4096  # entries of a tensor that is copied faster with others than on its own
_BATCH = 64  # of those at a time, so that the memory they share is small as well
_LARGE = 3 << 19  # entries of a tensor (6 MB) whose memory a C library takes from the system afresh each time
_PIECE = 1 << 17  # entries of such a tensor that are in the cache at a time
_TOGETHER = 1 << 24  # entries of parameters whose sums are alive together on an accelerator (64 MB in float32)


@dataclass(frozen=True)
class Saved:
    """Where the parameters live, and the values to put back there.

    Attributes:
        targets: The parameters or views of them, each entry once, in any order.
        values: Shaped like ``targets``.
        kept: The same for those that the compiled kernel moved, before the others.
    """

    targets: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    kept: list[kernel.Kept] = field(default_factory=list)

    def add(self, target: Tensor, value: Tensor) -> None:
        """Remember one value."""
        self.targets.append(target)
        self.values.append(value)

    def __reduce__(self) -> tuple[type["Saved"], tuple[list[Tensor], list[Tensor]]]:
        """In a copy nothing lies where the kernel knew it; what it moved, before the others, is like them there."""
        moved = [param for kept in self.kept for param in kept.params]
        values = [value for kept in self.kept for value in kept.values()]
        return Saved, (moved + self.targets, values + self.values)

    def restore_(self) -> None:
        """Copy the values into the parameters' own storage.

        The last one saved comes first: of two that share memory, it may have been saved after the other had moved.
        """
        if self.targets:
            torch._foreach_copy_(self.targets[::-1], self.values[::-1], non_blocking=True)  # those in pinned memory
        for kept in self.kept:
            kept.put_back_()

    def moved(self) -> list[Tensor]:
        """The parameters or views of them, in the order of ``difference``."""
        return self.targets + [param for kept in self.kept for param in kept.params]

    def difference(self) -> list[Tensor]:
        """What the parameters have moved by, in float32 or wider."""
        values = self.values + [value for kept in self.kept for value in kept.values()]
        pairs = zip(self.moved(), values, strict=True)
        return [_wide(target) - _wide(value.to(target.device, non_blocking=True)) for target, value in pairs]


@dataclass(frozen=True)
class _Move:
    """``params += scales * tensors``; the other two as for ``perturb_``."""

    params: Sequence[Tensor]
    tensors: Sequence[Tensor]
    scales: Sequence[Tensor]
    spent: Sequence[Tensor]
    generators: "_Generators | None"
    arrays: kernel.Arrays | None = None
    host: HostCopies | None = None

    @cached_property
    def ids_of_spent(self) -> frozenset[int]:
        """Asked for only where there is a large tensor."""
        return frozenset(map(id, self.spent))


class _Generators:
    """One generator for each device, all with the same seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.made: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device."""
        if device not in self.made:
            self.made[device] = torch.Generator(device).manual_seed(self.seed)
        return self.made[device]


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
    move = _Move(params, tensors, scales, spent, None if seed is None else _Generators(seed), arrays, host)
    try:
        if host is None and params[0].is_cpu:
            rest = _perturb_by_kernel_(saved, move) if kernel.has_compiled_kernel() else range(len(params))
            _perturb_on_cpu_(saved, move, rest)
        else:
            _perturb_at_once_(saved, move)
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
        if large and _same_layout(param, tensors[index]) and _is_free(move, index):
            saved.add(param, _swap_(param, tensors[index], scales[index], move.generators))
        else:
            saved.add(param, param.clone())
            _add_scaled_(param, tensors[index], scales[index], move.generators)
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


def _swap_(param: Tensor, tensor: Tensor, scale: Tensor, generators: _Generators | None) -> Tensor:
    """Move the parameter and leave its values of before in the memory of ``tensor``."""
    for moved, spent in _pieces(param, tensor):
        before = moved.clone()
        _add_scaled_(moved, spent, scale, generators)
        spent.copy_(before)
    return tensor


def _pieces(param: Tensor, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both as vectors, in pieces that fit the cache; as they are where their entries are in different orders."""
    if not _same_layout(param, tensor):
        yield param, tensor
        return
    flat_param, flat_tensor = (x.as_strided((x.numel(),), (1,)) for x in (param, tensor))
    for start in range(0, param.numel(), _PIECE):
        yield flat_param[start : start + _PIECE], flat_tensor[start : start + _PIECE]


def _add_scaled_(param: Tensor, tensor: Tensor, scale: Tensor, generators: _Generators | None) -> None:
    if not is_narrow(param.dtype):
        param.addcmul_(tensor, scale)
        return
    for moved, step in _pieces(param, tensor):
        moved.copy_(_narrowed(torch.addcmul(moved.float(), step.float(), scale), param.dtype, generators))


def _narrowed(values: Tensor, dtype: torch.dtype, generators: _Generators | None) -> Tensor:
    """Rounded to the dtype, or left to be rounded to the nearest by the copy."""
    return values if generators is None else round_stochastically(values, dtype, generators.on(values.device))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if is_narrow(tensor.dtype) else tensor


def _same_layout(param: Tensor, tensor: Tensor) -> bool:
    """Whether both are dense, so that one order of memory fits both."""
    is_dense = param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))
    return is_dense and param.stride() == tensor.stride() and param.dtype == tensor.dtype


def _is_free(move: _Move, index: int) -> bool:
    """Whether only the step holds a gradient that is off its parameter, and no other tensor shares its memory."""
    grads = move.tensors
    if id(grads[index]) not in move.ids_of_spent:
        return False
    num_references = sys.getrefcount(grads[index])  # by this call, by the group's list and by the direction's
    num_storage_users = torch._C._storage_Use_Count(grads[index].untyped_storage()._cdata)  # by this call and by itself
    return num_references <= 3 and grads[index]._use_count() == 1 and num_storage_users <= 2


def _perturb_at_once_(saved: Saved, move: _Move) -> None:
    """The same in a constant number of kernels for each device, dtype and scale, but for stochastic rounding."""
    params, tensors, scales = move.params, move.tensors, move.scales
    if move.host is not None:
        values = move.host.of(params)
        move.host.wait()
    else:
        values = [torch.empty_like(param) for param in params]
        torch._foreach_copy_(values, list(params))
    saved.targets.extend(params)
    saved.values.extend(values)
    kinds: dict[tuple[torch.device, torch.dtype, int, bool], list[int]] = {}
    for index, (param, tensor, scale) in enumerate(zip(params, tensors, scales, strict=True)):
        kind = param.device, param.dtype, id(scale), _suits_sgd(param, tensor, move.generators)
        kinds.setdefault(kind, []).append(index)
    for (device, _, _, suits_sgd), indices in kinds.items():
        scale = scales[indices[0]].to(device)
        if suits_sgd:
            _climb_by_sgd_([params[index] for index in indices], [tensors[index] for index in indices], scale)
            continue
        for some in _bounded(indices, params):
            part, steps = ([column[index] for index in some] for column in (params, tensors))
            _add_together_(part, steps, scale, move.generators)


def _suits_sgd(param: Tensor, tensor: Tensor, generators: _Generators | None) -> bool:
    """Whether torch's fused kernel takes them: its learning rate is float32, and it rounds to the nearest."""
    if not param.is_cuda or param.dtype == torch.float64 or (generators is not None and is_narrow(param.dtype)):
        return False
    return _same_layout(param, tensor)


def _climb_by_sgd_(params: list[Tensor], tensors: list[Tensor], scale: Tensor) -> None:
    """``w += scale * tensor`` as an ascent of plain SGD, whose fused kernel reads its learning rate on the device.

    It reads both and writes w: 3 numbers for each entry of w and no memory, where a product and a sum move 5 and need
    as much memory as the parameters.
    """
    torch._fused_sgd_(
        *(params, tensors, []),
        lr=scale.float(),
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
    )
    increment_version(params)  # as every other operator in place does


def _add_together_(params: list[Tensor], tensors: list[Tensor], scale: Tensor, generators: _Generators | None) -> None:
    """The same by a product and a sum, in float32 or wider."""
    dtype = params[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch._foreach_mul([tensor.to(wide) for tensor in tensors], scale.to(wide))
    if wide == dtype:
        torch._foreach_add_(params, steps)
    else:
        torch._foreach_add_(steps, [param.to(wide) for param in params])
        torch._foreach_copy_(params, [_narrowed(step, dtype, generators) for step in steps])


def _bounded(indices: Sequence[int], params: Sequence[Tensor]) -> Iterator[list[int]]:
    """The indices in runs of at most ``_TOGETHER`` entries, or of one parameter, which bounds the memory of sums."""
    run: list[int] = []
    num_entries = 0
    for index in indices:
        if run and num_entries + params[index].numel() > _TOGETHER:
            yield run
            run, num_entries = [], 0
        run.append(index)
        num_entries += params[index].numel()
    yield run
