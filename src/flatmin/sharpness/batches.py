"""Batches of any form: tensors, tuples, dictionaries and nests of them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def num_examples(batch: Any) -> int:
    """The size of the first dimension of the first tensor in ``batch``.

    >>> num_examples({"inputs": torch.zeros(8, 3), "labels": torch.zeros(8)})
    8

    Raises:
        ValueError: There is no tensor of one dimension or more.
    """
    for tensor in _tensors(batch):
        if tensor.ndim > 0:
            return len(tensor)
    raise ValueError(f"a batch must hold a tensor whose first dimension counts examples, got {type(batch).__name__}")


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor on ``device``; mappings become dictionaries."""
    can_wait = device.type != "cpu"  # for a tensor on its way to the host nobody would
    return _map(lambda tensor: tensor.to(device, non_blocking=can_wait), batch)


def micro_batches(batch: Any, size: int) -> list[Any]:
    """Cut ``batch`` into consecutive pieces of ``size`` examples; the last one may have fewer.

    Every tensor whose first dimension is the number of examples is cut, the others stay whole.

    >>> [len(inputs) for inputs, _ in micro_batches((torch.zeros(5, 2), torch.zeros(5)), 2)]
    [2, 2, 1]
    """
    total = num_examples(batch)
    return [_cut(batch, start, start + size, total) for start in range(0, total, size)]


def _cut(batch: Any, start: int, stop: int, total: int) -> Any:
    return _map(lambda tensor: tensor[start:stop] if tensor.ndim > 0 and len(tensor) == total else tensor, batch)


def _map(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_map(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(_map(function, value) for value in batch)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from _tensors(value)
