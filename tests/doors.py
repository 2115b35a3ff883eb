"""Run an optimizer through each of its front doors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from problems import batches

Loss = Callable[[], Tensor]


def through_closure(optimizer: Any, loss: Loss) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return optimizer.step(closure)


def through_two_steps(optimizer: Any, loss: Loss) -> Tensor:
    first = loss()
    first.backward()
    for _ in range(getattr(optimizer, "ascent_steps", 1)):
        optimizer.first_step(zero_grad=True)
        loss().backward()
    optimizer.second_step(zero_grad=True)
    return first


def through_context(optimizer: Any, loss: Loss) -> Tensor:
    optimizer.zero_grad()
    first = loss()
    first.backward()
    with optimizer.perturbed():
        loss().backward()
    optimizer.step()
    return first


def train(
    optimizer: Any,
    model: nn.Module,
    steps: range = range(12),
    door: Callable[[Any, Loss], Tensor] = through_closure,
    after: Callable[[], object] = lambda: None,
) -> list[Tensor]:
    """Train on the batches in turn; every step draws its own dropout masks. Returns the losses at w."""
    dtype = next(model.parameters()).dtype
    data = batches(dtype)
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        inputs, labels = data[step % len(data)]
        losses.append(door(optimizer, lambda x=inputs, y=labels: cross_entropy(model(x), y)).detach())
        after()
    return losses


def everything(model: nn.Module) -> Tensor:
    """Weights and buffers as one vector."""
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])
