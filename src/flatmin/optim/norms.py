"""Norms and dot products over many tensors as if they were one vector, accumulated in float32 or wider."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.optim import kernel

# A CPU sums the entries of a tensor one after another in float32: 36 million lose 0.2 % of the norm, 65536 lose 2e-7,
# rows of 4096 lose 2e-9 and cost as little.
_AT_ONCE = 65536
_ROW = 4096
_WITHOUT_FLOAT64 = ("mps",)  # Apple's
_BATCH = 64  # tensors shorter than a row that are copied into one, which is cheaper than a norm of each


def joint_norm(tensors: Sequence[Tensor], p: float = 2.0, arrays: kernel.Arrays | None = None) -> Tensor:
    """The p-norm of all entries of all tensors together: ``(sum_i |x_i|^p)^(1/p)``, ``max |x_i|`` for infinity.

    Args:
        tensors: At least one real tensor; any shapes, dtypes and devices.
        p: Order of the norm, from 1 to infinity.
        arrays: Where the tensors lie, if that is known and suits the compiled kernel.

    Returns:
        0-dim tensor on the first tensor's device, at least float32. The host does not wait for it.
    """
    device = tensors[0].device
    wide = torch.float32
    if arrays is None and any(tensor.dtype == torch.float64 for tensor in tensors):
        wide = torch.float64
    pieces: list[Tensor] = []
    if p == 2.0 and kernel.has_compiled_kernel():
        arrays = arrays or kernel.describe(tensors)
        if any(arrays.addresses):
            norm = math.sqrt(kernel.sum_of_squares(arrays))
            tiny = torch.finfo(wide).tiny  # 1 / norm stays finite
            pieces.append(torch.tensor([0.0 if norm < tiny else norm], dtype=wide))
            if arrays.all_fit:
                return pieces[0].view(())
        tensors = [x for x, at in zip(tensors, arrays.addresses, strict=True) if not at]
    small: list[Tensor] = []
    medium: list[Tensor] = []
    long: list[Tensor] = []
    for tensor in tensors:
        if not tensor.is_cpu or _ROW < tensor.numel() <= _AT_ONCE:
            medium.append(tensor)
        else:
            (small if tensor.numel() <= _ROW else long).append(tensor)
    for start in range(0, len(small), _BATCH):
        vectors = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in small[start : start + _BATCH]]
        long.append(torch.cat(vectors))
    pieces.extend(norm for tensor in long for norm in _row_norms(tensor, p, wide))
    pieces.extend(torch.stack(_norms_at_once(part, p, wide)) for part in _by_device(medium))
    length: Tensor = torch.linalg.vector_norm(torch.cat([piece.to(device) for piece in pieces]), p)
    return length


def each_norm(tensors: Sequence[Tensor], p: float = 2.0) -> list[Tensor]:
    """The p-norm of each tensor on its own, 0-dim and at least float32, see ``joint_norm``."""
    norms = [joint_norm([tensor], p) if tensor.is_cpu and tensor.numel() > _AT_ONCE else None for tensor in tensors]
    for dtype in {tensor.dtype for tensor in tensors}:
        indices = [i for i, norm in enumerate(norms) if norm is None and tensors[i].dtype == dtype]
        wide = torch.promote_types(dtype, torch.float32)
        for index, norm in zip(indices, _norms_at_once([tensors[i] for i in indices], p, wide), strict=True):
            norms[index] = norm
    return [norm for norm in norms if norm is not None]


def are_finite(tensors: Sequence[Tensor], arrays: kernel.Arrays | None = None) -> Tensor:
    """Whether every entry is finite, 0-dim; the arguments are those of ``joint_norm``."""
    if arrays is None and tensors[0].is_cpu and kernel.has_compiled_kernel():
        arrays = kernel.describe(tensors)
    if arrays is not None and arrays.all_fit:
        return torch.tensor(math.isfinite(kernel.sum_of_squares(arrays)))  # in float64 no square overflows
    return joint_norm(tensors, math.inf).isfinite()


def joint_dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The dot product ``sum_i x_i y_i`` over all entries of two lists of equally shaped tensors.

    Returns:
        0-dim tensor on the first tensor's device, in float64 on a CPU and at least float32 elsewhere.
    """
    device = left[0].device
    wide = torch.float64 if device.type == "cpu" else torch.float32
    products = [(x.to(wide) * y.to(wide)).sum().to(device) for x, y in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def cosine_of(left: Tensor, right: Tensor, dot: Tensor) -> Tensor:
    """``<x, y> / (||x|| ||y||)``, 0 where a length is 0; dividing twice, since the product may overflow.

    Args:
        left: ``||x||``, 0-dim.
        right: ``||y||``, 0-dim.
        dot: ``<x, y>``, 0-dim.
    """
    return torch.where((left == 0) | (right == 0), 0.0, dot / left / right)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has no float64."""
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the widest dtype of its device."""
    return tensor.to(widest_dtype(tensor.device))


def dual_order(p: float) -> float:
    """The order q of the dual norm: ``1/p + 1/q = 1``.

    >>> dual_order(2.0), dual_order(1.0), dual_order(5.0)
    (2.0, inf, 1.25)
    """
    if p == 1.0:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1.0)


def _norms_at_once(tensors: list[Tensor], p: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    # vmap has no rule for lists of tensors, and inductor calls one from compiled code at a detour
    if torch.compiler.is_compiling() or any(map(torch._C._functorch.is_batchedtensor, tensors)):
        return tuple(torch.linalg.vector_norm(tensor, p, dtype=dtype) for tensor in tensors)
    return torch._foreach_norm(tensors, p, dtype) if tensors else ()


def _row_norms(tensor: Tensor, p: float, dtype: torch.dtype) -> list[Tensor]:
    if not tensor.numel():  # small tensors that were all empty
        return [tensor.new_zeros(1, dtype=dtype)]
    if 256 <= tensor.numel() // len(tensor) <= _AT_ONCE:  # the tensor's own rows, such as the filters of a convolution
        return [torch.linalg.vector_norm(tensor, p, dim=tuple(range(1, tensor.dim())), dtype=dtype)]
    flat = _in_memory_order(tensor)
    cut = flat.numel() // _ROW * _ROW
    rows = [torch.linalg.vector_norm(flat[:cut].view(-1, _ROW), p, dim=1, dtype=dtype)] if cut else []
    if cut < flat.numel():
        rows.append(torch.linalg.vector_norm(flat[cut:], p, dtype=dtype).view(1))
    return rows


def _in_memory_order(tensor: Tensor) -> Tensor:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)  # a view: flattening the default order would copy
    return tensor.reshape(-1)


def _by_device(tensors: list[Tensor]) -> list[list[Tensor]]:
    devices = {tensor.device for tensor in tensors}
    if len(devices) <= 1:
        return [tensors] if tensors else []
    return [[tensor for tensor in tensors if tensor.device == device] for device in devices]
