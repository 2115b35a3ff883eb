"""Lightning's own averages of weights, which are averages of the true ones."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch.optim import Optimizer

from flatmin.integrations.true_weights import true_weights

__all__ = ["averaging_hooks", "show_true_weights"]

_AVERAGES = {"StochasticWeightAveraging", "WeightAveraging"}  # in either package, the second since Lightning 2.6
_HOOKS = ("on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_end")


def averaging_hooks(trainer: Any) -> list[tuple[Any, str]]:
    """The hooks in which callbacks of the trainer average weights, or put the average in their place."""
    return [(each, hook) for each in trainer.callbacks if _averages(each) for hook in _HOOKS]


def show_true_weights(optimizers: Iterable[Optimizer], shown: ExitStack) -> Callable[..., None]:
    """What takes the place of such a hook.

    Args:
        optimizers: Of any kind.
        shown: Takes over where the average is in the weights' place, for an epoch in which nothing is trained.
    """
    return partial(_at_true_weights, optimizers, shown)


def _averages(callback: object) -> bool:
    return any(each.__name__ in _AVERAGES for each in type(callback).__mro__)


def _at_true_weights(
    optimizers: Iterable[Optimizer], shown: ExitStack, original: Callable[..., None], trainer: Any, *args: Any
) -> None:
    with ExitStack() as stack:
        stack.enter_context(true_weights(optimizers))
        original(trainer, *args)
        if trainer.fit_loop._skip_backward:
            shown.enter_context(stack.pop_all())
