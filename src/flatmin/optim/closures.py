"""What a step is given to compute its gradients with: one closure, or one for each micro-batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Closure = Callable[[], Tensor]


def as_closures(closure: Closure | Sequence[Closure]) -> list[Closure]:
    """The closures as a list, each with gradients switched on: steps run without.

    Raises:
        ValueError: There is none.
    """
    closures = [closure] if callable(closure) else list(closure)
    if not closures:
        raise ValueError("closure must not be an empty list")
    return [torch.enable_grad()(each) for each in closures]
