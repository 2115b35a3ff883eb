"""Stochastic rounding to narrow dtypes, so that steps smaller than the spacing of the numbers survive on average."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flatmin.arguments import check_choice

Rounding = Literal["stochastic", "nearest"]

_DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of the 23 that float32 keeps of the fraction
_SMALLEST_NORMAL = 2.0**-14  # of float16; below, its numbers are as far apart as just above


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether ``round_stochastically`` knows the dtype."""
    return dtype in _DROPPED_BITS


def check_rounding(rounding: str) -> None:
    """Raise ``ValueError`` where it is neither of the two."""
    check_choice("rounding", rounding, get_args(Rounding))


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbours in ``dtype``, up with the probability that makes the expectation right.

    With neighbours ``a <= x <= b``::

        P(b) = (x - a) / (b - a),   E[rounded] = x,   Var[rounded] = (x - a) (b - x)

    A number of the narrow dtype stays as it is, and so do infinities and NaN. A finite number stays finite: beyond the
    largest one of the narrow dtype it becomes that one. Below 2^-14, float16 is right up to 2^-38.

    Args:
        values: float32, any shape and device.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        generator: On the device of ``values``; the host does not wait for it.

    Returns:
        Shaped like ``values``.

    Raises:
        TypeError: ``values`` is not float32, or ``dtype`` is another one.

    References:
        Gupta et al. (2015), arXiv:1502.02551, Sec. 3.
    """
    if values.dtype != torch.float32 or not is_narrow(dtype):
        raise TypeError(f"values must be float32 and dtype bfloat16 or float16, got {values.dtype} and {dtype}")
    largest = torch.finfo(dtype).max
    # As integers, the positive float32 numbers are in their own order: adding to the bits to be dropped carries upwards
    # as often as they say, also into the exponent.
    shift = _shift(values) if dtype == torch.float16 else None
    whole = values if shift is None else values + shift
    noise = _bits(values, generator) & ((1 << _DROPPED_BITS[dtype]) - 1)
    rounded = (noise.add_(whole.view(torch.int32)) & -(1 << _DROPPED_BITS[dtype])).view(torch.float32)
    if shift is not None:
        rounded = torch.copysign(rounded - shift, values)
    return torch.where(values.isfinite(), rounded.clamp_(-largest, largest), values).to(dtype)


class Rounder:
    """Rounds what a step has computed in float32 to the dtype of its parameters.

    Args:
        seed: Of the stochastic rounding, with one generator for each device; ``None`` rounds to the nearest.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def is_stochastic_in(self, dtype: torch.dtype) -> bool:
        """Whether sums in this dtype are rounded stochastically."""
        return self._seed is not None and is_narrow(dtype)

    def __call__(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Rounded, or left as they are for a copy to round them to the nearest."""
        if self._seed is None:
            return values
        device = values.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return round_stochastically(values, dtype, self._generators[device])


def _shift(values: Tensor) -> Tensor:
    """What takes the subnormal numbers to where as many bits are dropped as of the others."""
    magnitude = torch.full((), _SMALLEST_NORMAL, device=values.device)  # filled on the device: the host does not wait
    return torch.where(values.abs() < _SMALLEST_NORMAL, torch.copysign(magnitude, values), 0.0)


def _bits(values: Tensor, generator: torch.Generator) -> Tensor:
    """16 random bits for each entry, as int32; four entries share a draw."""
    num_draws = -(-values.numel() // 4)
    draws = torch.empty(num_draws, dtype=torch.int64, device=values.device).random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[: values.numel()].view(values.shape).to(torch.int32)
