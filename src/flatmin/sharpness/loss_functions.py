"""The two forms of a loss function: one that calls the model on a batch, and one that compares outputs with targets."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

LossFn = Callable[..., Tensor]


def on_batches(loss_fn: LossFn) -> LossFn:
    """The loss function as ``loss_fn(model, batch)``, whichever of the two forms it has.

    One that compares outputs with targets is known by where it comes from: a module, or ``torch.nn.functional``.

    Raises:
        ValueError: It is known to sum over the batch.
    """
    if _reduction(loss_fn) == "sum":
        raise ValueError("loss_fn must return the mean loss of a batch, got reduction='sum'")
    return _on_outputs(loss_fn) if _is_criterion(loss_fn) else loss_fn


def as_scalar(loss: object) -> Tensor:
    """What a loss function has returned, 0-dim.

    Raises:
        ValueError: It is no tensor of one entry.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
    return loss.reshape(())


def _is_criterion(loss_fn: LossFn) -> bool:
    if isinstance(loss_fn, partial):
        return _is_criterion(loss_fn.func)
    return isinstance(loss_fn, nn.Module) or getattr(loss_fn, "__module__", None) == "torch.nn.functional"


def _reduction(loss_fn: LossFn) -> object:
    """Of one of torch's own; ``None`` where it is not told."""
    return loss_fn.keywords.get("reduction") if isinstance(loss_fn, partial) else getattr(loss_fn, "reduction", None)


def _on_outputs(criterion: LossFn) -> LossFn:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"a batch must be (inputs, targets) where loss_fn compares outputs with targets, got "
                f"{type(batch).__name__}: give loss_fn(model, batch) instead"
            )
        inputs, targets = batch
        return criterion(model(inputs), targets)

    return loss_fn
