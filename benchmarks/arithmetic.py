"""How fast a device multiplies matrices, and how much of that a training run makes use of."""

import statistics

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import timed
from flatmin.train.models import build_model


def matrix_rate(device: str, dtype: torch.dtype, size: int, rounds: int = 10) -> float:
    """Floating-point operations a second in products of square matrices of this size, the median of some rounds."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = timed(lambda: left @ right, device)
    product()
    return 2 * size**3 / statistics.median(product() for _ in range(rounds))


def operations(model_name: str, image_size: int) -> float:
    """Floating-point operations of a forward and backward pass over one image, of products and convolutions."""
    model: nn.Module = build_model(model_name, 10, 3).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta")).sum().backward()
    return float(counter.get_total_flops())
