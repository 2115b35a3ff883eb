"""The move to w + eps on an accelerator: in a constant number of kernels for each device, dtype and scale."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from flatmin.optim.layout import same_layout
from flatmin.optim.rounding import Rounder

_TOGETHER = 1 << 24  # entries of parameters whose sums are alive together (64 MB in float32)


def add_scaled_foreach_(
    params: Sequence[Tensor], tensors: Sequence[Tensor], scales: Sequence[Tensor], rounder: Rounder
) -> None:
    """``w += scale * tensor`` for all parameters together, as ``perturb_`` does; stochastic rounding goes one by one.

    Args:
        params: The parameters.
        tensors: One per parameter, shaped like it.
        scales: One 0-dim tensor per parameter.
        rounder: Rounds the sums to the parameters' dtype.
    """
    kinds: dict[tuple[torch.device, torch.dtype, int, bool], list[int]] = {}
    for index, (param, tensor, scale) in enumerate(zip(params, tensors, scales, strict=True)):
        kind = param.device, param.dtype, id(scale), _suits_sgd(param, tensor, rounder)
        kinds.setdefault(kind, []).append(index)
    for (device, _, _, suits_sgd), indices in kinds.items():
        scale = scales[indices[0]].to(device)
        if suits_sgd:
            _climb_by_sgd_([params[index] for index in indices], [tensors[index] for index in indices], scale)
            continue
        for some in _bounded(indices, params):
            part, steps = ([column[index] for index in some] for column in (params, tensors))
            _add_together_(part, steps, scale, rounder)


def _suits_sgd(param: Tensor, tensor: Tensor, rounder: Rounder) -> bool:
    """Whether torch's fused kernel takes them: its learning rate is float32, and it rounds to the nearest."""
    if not param.is_cuda or param.dtype == torch.float64 or rounder.is_stochastic_in(param.dtype):
        return False
    return same_layout(param, tensor)


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


def _add_together_(params: list[Tensor], tensors: list[Tensor], scale: Tensor, rounder: Rounder) -> None:
    """The same by a product and a sum, in float32 or wider."""
    dtype = params[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    steps = torch._foreach_mul([tensor.to(wide) for tensor in tensors], scale.to(wide))
    if wide == dtype:
        torch._foreach_add_(params, steps)
    else:
        torch._foreach_add_(steps, [param.to(wide) for param in params])
        torch._foreach_copy_(params, [rounder(step, dtype) for step in steps])


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
