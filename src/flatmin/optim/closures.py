"""What a step is given to compute its gradients with: one closure, or one for each micro-batch."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Tensor]


def as_closures(closure: Closure | Sequence[Closure] | None) -> list[Closure]:
    """The closures as a list, each with gradients switched on: steps run without.

    Raises:
        TypeError: It is neither a function nor a list of functions; the loss itself, for instance.
        ValueError: There is none.
    """
    given: Any = closure  # Tensors can be iterated, too
    is_list = not callable(given) and isinstance(given, Iterable) and not isinstance(given, Tensor)
    closures = list(given) if is_list else [given]
    if not closures:
        raise ValueError("closure must not be an empty list")
    if not all(map(callable, closures)):
        raise TypeError(f"closure must be a function that returns the loss, or a list of such, got {closure!r}")
    return [_with_gradients(each) for each in closures]


def _with_gradients(closure: Closure) -> Closure:
    def enabled() -> Tensor:
        with torch.enable_grad():
            return closure()

    return enabled
