"""Model and loss as a function of weights, buffers and random numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.utils._pytree import tree_map

from flatmin.optim.draws import Draw, PreparedDraws, RecordedPass
from flatmin.optim.scene import Given

LossFn = Callable[[nn.Module, Any], Tensor]


class LossModule(nn.Module):
    """Model and loss function as one module, so that its tensors can be replaced however the loss is computed."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self._loss_fn(self.model, batch)


class Survey(NamedTuple):
    """What one forward and backward pass tells.

    Attributes:
        draws: How to make its random numbers, in order.
        is_used: Of each parameter of the optimizer, whether it gets a gradient.
        changed_buffers: Names of the buffers that the pass writes or binds anew.
    """

    draws: list[Draw]
    is_used: list[bool]
    changed_buffers: list[str]


class FunctionalModel:
    """The loss of a batch and its gradients, as a function of tensors.

    Args:
        losses: The model with its loss function.
        params: The optimizer's parameters, in the order of its groups.
        is_batched: Whether it is called inside of ``vmap``.

    Attributes:
        survey: What ``look`` has learned.
        channels_last: Whether images and the weights of convolutions are laid out with their channels last inside the
            passes, which is what the convolutions of a CPU work with.
    """

    def __init__(self, losses: LossModule, params: Sequence[Tensor], *, is_batched: bool = False) -> None:
        self.survey = Survey([], [], [])
        self.channels_last = False
        self._losses = losses
        self._params = params
        self._is_batched = is_batched
        names: dict[Tensor, str] = {param: f"model.{name}" for name, param in losses.model.named_parameters()}
        self._weight_names = [names[param] for param in params]

    def look(self, given: Given) -> Survey:
        """Learn from one pass over a batch what tracing must know; the later calls rely on it."""
        leaves = [
            weight.detach().requires_grad_(param.requires_grad)
            for weight, param in zip(given.weights, self._params, strict=True)
        ]
        before = {name: buffer.clone() for name, buffer in given.buffers.items()}
        tensors = {**given.frozen, **before, **dict(zip(self._weight_names, leaves, strict=True))}
        with torch.enable_grad(), RecordedPass() as recorded:
            loss = functional_call(self._losses, tensors, (given.batch,))
            wanted = [leaf for leaf in leaves if leaf.requires_grad and leaf.numel()]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        used = {id(leaf) for leaf, grad in zip(wanted, grads, strict=True) if grad is not None}
        changed = [
            name
            for name, old in before.items()
            if tensors[name] is not old or old._version > 0 or id(old) in recorded.written
        ]
        self.survey = Survey(recorded.draws, [id(leaf) in used for leaf in leaves], changed)
        return self.survey

    def used(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Those of the optimizer's parameters that get a gradient."""
        return [weight for weight, is_used in zip(weights, self.survey.is_used, strict=True) if is_used]

    def evaluate(
        self, given: Given, weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
        """Loss, gradients and the changed buffers afterwards, at some weights."""
        used = [index for index, is_used in enumerate(self.survey.is_used) if is_used]
        fixed = {**given.frozen, **dict(zip(self._weight_names, weights, strict=True))}

        def loss_of(leaves: list[Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            named = {**fixed, **buffers, **{self._weight_names[i]: leaf for i, leaf in zip(used, leaves, strict=True)}}
            batch = given.batch
            if self.channels_last:
                named, batch = tree_map(_with_channels_last, (named, batch))
            loss = functional_call(self._losses, named, (batch,))
            return loss, {name: named[name] for name in self.survey.changed_buffers}

        buffers = {name: buffer.clone() for name, buffer in given.buffers.items()}
        leaves = [weights[index].detach() for index in used]
        with torch.enable_grad(), PreparedDraws(given.draws):
            if self._is_batched:  # vmap knows no other way to differentiate
                found, (loss, after) = grad_and_value(loss_of, has_aux=True)(leaves, buffers)
            else:
                loss, after = loss_of([leaf.requires_grad_() for leaf in leaves], buffers)
                found = torch.autograd.grad(loss, leaves)
        grads: list[Tensor | None] = [None] * len(weights)
        for index, grad in zip(used, found, strict=True):
            grads[index] = grad
        return loss.detach(), grads, after


def _with_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
