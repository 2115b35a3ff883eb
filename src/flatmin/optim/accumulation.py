"""Gradients of several micro-batches, put aside and combined into one."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatmin.arguments import check_choice

Reduction = Literal["mean", "sum"]


class GradientSum:
    """The sum of the gradients put aside so far; a parameter without gradient in one micro-batch counts as zero there.

    Attributes:
        num_terms: Micro-batches in the sum.
    """

    def __init__(self) -> None:
        self.num_terms = 0
        self._sums: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self, params: Iterable[Tensor]) -> None:
        """Move the parameters' gradients into the sum, leaving none.

        Raises:
            RuntimeError: There are none.
        """
        params = list(params)
        if all(param.grad is None for param in params):
            raise RuntimeError(
                "no parameter has a gradient: each micro-batch must run backward() in each of its passes"
            )
        for param in params:
            if param.grad is None:
                continue
            if param in self._sums:
                self._sums[param].add_(param.grad)
            else:
                self._sums[param] = as_kept(param.grad)
            param.grad = None
        self.num_terms += 1

    @torch.no_grad()
    def give(self, reduction: Reduction) -> None:
        """Make the sum, or the mean over the micro-batches, the parameters' gradient."""
        if reduction == "mean" and self.num_terms > 1:
            torch._foreach_div_(list(self._sums.values()), self.num_terms)
        for param, total in self._sums.items():
            param.grad = total
        self._sums, self.num_terms = {}, 0


def as_kept(grad: Tensor) -> Tensor:
    """The gradient in memory that the next backward pass does not fill again, as it does DDP's buckets."""
    return grad.clone() if grad._is_view() else grad


def one_after_another(
    closures: Sequence[Callable[[], Tensor]],
    params: Callable[[], Iterable[Tensor]],
    reduction: Reduction,
    after_each: Callable[[], None],
) -> Callable[[], Tensor]:
    """One closure for a batch whose micro-batches have one each: loss and gradient are their mean, or their sum.

    Called with no gradients about.

    Args:
        closures: The micro-batches' closures.
        params: Gives all parameters.
        reduction: Mean or sum.
        after_each: Called after each micro-batch.
    """

    def closure() -> Tensor:
        total, losses = GradientSum(), []
        for part in closures:
            losses.append(part())
            total.take(params())
            after_each()
        total.give(reduction)
        loss: Tensor = reduced(losses, reduction)
        return loss

    return closure


def check_reduction(reduction: str) -> None:
    """Raise ``ValueError`` where the argument is none of those."""
    check_choice("reduction", reduction, get_args(Reduction))


def reduced(losses: Sequence[Any], reduction: Reduction) -> Any:
    """The losses' mean or sum, tensors or numbers; the loss itself where there is one, ``None`` where one is."""
    if len(losses) == 1:
        return losses[0]
    if any(loss is None for loss in losses):
        return None
    total = sum(loss.detach() if isinstance(loss, Tensor) else loss for loss in losses)
    return total / len(losses) if reduction == "mean" else total
