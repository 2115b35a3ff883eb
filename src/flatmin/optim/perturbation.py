"""Move parameters in place, and put the exact values back."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_RUN_BYTES = 1 << 19  # half of a common second-level cache


def perturb_(params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """``w += scale * tensor`` in place, each parameter with its own 0-dim scale.

    The sum is formed in float32 or wider and rounded once, to the parameter's dtype.

    Returns:
        The values of before, for ``assign_``; adding and subtracting again would not be exact.
    """
    if all(param.device.type == "cpu" for param in params):
        return _perturb_in_runs_(params, tensors, scales)
    return _perturb_at_once_(params, tensors, scales)


def assign_(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into the parameters' own storage."""
    if params:
        torch._foreach_copy_(list(params), list(values))


def _perturb_in_runs_(params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """Save and add run by run, so that the addition finds in the cache what saving has just read."""
    saved: list[Tensor] = []
    for run in _runs(params):
        part = list(params[run])
        saved.extend(param.clone() for param in part)
        if part[0].dtype in (torch.bfloat16, torch.float16):
            for param, tensor, scale in zip(part, tensors[run], scales[run], strict=True):
                param.copy_(torch.addcmul(param.float(), tensor.float(), scale))
        else:
            torch._foreach_addcmul_(part, list(tensors[run]), list(scales[run]))
    return saved


def _runs(params: Sequence[Tensor]) -> Iterator[slice]:
    """Slices of consecutive parameters of one dtype, of up to ``_RUN_BYTES`` where there are several."""
    start, num_bytes = 0, 0
    for index, param in enumerate(params):
        size = param.nbytes
        if index > start and (num_bytes + size > _RUN_BYTES or param.dtype != params[start].dtype):
            yield slice(start, index)
            start, num_bytes = index, 0
        num_bytes += size
    yield slice(start, len(params))


def _perturb_at_once_(params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """The same in a constant number of kernels for each device, dtype and scale."""
    saved = [torch.empty_like(param) for param in params]
    torch._foreach_copy_(saved, list(params))
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
    return saved
