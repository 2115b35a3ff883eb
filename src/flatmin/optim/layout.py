"""The order of tensors' entries in memory."""

import torch
from torch import Tensor


def same_layout(param: Tensor, tensor: Tensor) -> bool:
    """Whether both are dense and of one dtype, with their entries in the same order."""
    is_dense = param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))
    return is_dense and param.stride() == tensor.stride() and param.dtype == tensor.dtype
