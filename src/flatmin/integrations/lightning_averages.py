"""Lightning's own averages of weights, which are averages of the true ones."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch.optim import Optimizer

from flatmin.integrations.true_weights import true_weights

try:
    from lightning.pytorch import callbacks
except ModuleNotFoundError:  # the same code under its older name
    from pytorch_lightning import callbacks  # type: ignore[no-redef]

__all__ = ["averaging_hooks", "show_true_weights"]

_NAMES = ("StochasticWeightAveraging", "WeightAveraging")  # the second since Lightning 2.6
_AVERAGES = tuple(getattr(callbacks, name) for name in _NAMES if hasattr(callbacks, name))
_HOOKS = ("on_train_batch_end", "on_train_epoch_start", "on_train_epoch_end", "on_train_end")


def averaging_hooks(trainer: Any) -> list[tuple[Any, str]]:
    """The hooks in which callbacks of the trainer average weights, or put the average in their place."""
    return [(each, hook) for each in trainer.callbacks if isinstance(each, _AVERAGES) for hook in _HOOKS]


def show_true_weights(optimizers: Iterable[Optimizer], shown: ExitStack) -> Callable[..., None]:
    """What takes the place of such a hook.

    Args:
        optimizers: Of any kind.
        shown: Takes over where the average is in the weights' place, for an epoch in which nothing is trained.
    """
    return partial(_at_true_weights, optimizers, shown)


def _at_true_weights(
    optimizers: Iterable[Optimizer], shown: ExitStack, original: Callable[..., None], trainer: Any, *args: Any
) -> None:
    with ExitStack() as stack:
        stack.enter_context(true_weights(optimizers))
        original(trainer, *args)
        if trainer.fit_loop._skip_backward:
            shown.enter_context(stack.pop_all())
