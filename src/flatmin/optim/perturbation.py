"""Move parameters in place, and put the exact values back."""

from collections.abc import Sequence

import torch
from torch import Tensor


def perturb_(params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """``w += scale * tensor`` in place, each parameter with its own 0-dim scale.

    The sum is formed in float32 or wider and rounded once, to the parameter's dtype.

    Returns:
        The values of before, for ``assign_``; adding and subtracting again would not be exact.
    """
    if all(param.device.type == "cpu" for param in params):
        return _perturb_one_by_one_(params, tensors, scales)
    return _perturb_foreach_(params, tensors, scales)


def assign_(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into the parameters' own storage."""
    if params:
        torch._foreach_copy_(list(params), list(values))


def _perturb_one_by_one_(params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    # A foreach on a CPU is a loop as well. This one adds to each parameter while saving it has it in the cache.
    saved = []
    for param, tensor, scale in zip(params, tensors, scales, strict=True):
        saved.append(param.clone())
        if param.dtype in (torch.bfloat16, torch.float16):
            param.copy_(torch.addcmul(param.float(), tensor.float(), scale))
        else:
            param.addcmul_(tensor, scale)
    return saved


def _perturb_foreach_(params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> list[Tensor]:
    """The same in a constant number of kernels for each kind of parameter and each scale."""
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
