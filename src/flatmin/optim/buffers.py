"""The buffers of a model, such as running statistics: kept, put back, averaged over micro-batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Buffers = list[tuple[nn.Module, str, Tensor | None, Tensor | None]]


def buffers_of(model: nn.Module) -> Buffers:
    """Every buffer of the model, the tensor itself and a copy."""
    return [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in _modules_of(model)
        for name, buffer in module._buffers.items()
    ]


def set_buffers(buffers: Buffers) -> None:
    """Put the values back, in the tensors that held them."""
    targets, values = [], []
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer  # a module may have bound a new tensor instead of writing into this one
            if buffer is None or value is None:
                continue
            if type(buffer) is Tensor and 0 not in buffer.stride():
                targets.append(buffer)
                values.append(value)
            else:
                _put_back_(buffer, value)
        if targets:
            torch._foreach_copy_(targets, values)


def _put_back_(buffer: Tensor, value: Tensor) -> None:
    """One that cannot be in a list with others, such as a DTensor, or that is expanded: one number for many entries."""
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer, value = buffer.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    buffer.copy_(value)


@contextmanager
def averaged_buffers(model: nn.Module | None, number: int) -> Iterator[Callable[[], None]]:
    """Let every micro-batch start from the same buffers, and leave their mean.

    What as many devices would find in running statistics, averaged. Buffers of integers are those of the last
    micro-batch.

    Args:
        model: The module; nothing happens without one.
        number: Micro-batches.

    Yields:
        To be called after each micro-batch, in order: the first calls, ``number`` of them, say where one ended. Later
        ones, after the second passes of them all, only go back to the start.
    """
    if model is None:
        yield lambda: None
        return
    start = buffers_of(model)
    found: list[Buffers] = []

    def after_each() -> None:
        if len(found) < number:
            found.append(buffers_of(model))
        set_buffers(start)

    yield after_each
    if found:
        set_buffers([_mean_buffer(same) for same in zip(*found, strict=True)])


def _mean_buffer(same: tuple[Any, ...]) -> tuple[nn.Module, str, Tensor | None, Tensor | None]:
    module, name, buffer, last = same[-1]
    if last is not None and last.is_floating_point():
        last = torch.stack([value for _, _, _, value in same]).mean(dim=0)
    return module, name, buffer, last


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()`` without names, in a third of the time, which counts at every step of a small network."""
    found, seen = [model], {model}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found
