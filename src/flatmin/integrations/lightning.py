"""PyTorch Lightning: a callback for what ``configure_optimizers`` cannot reach, and one that measures sharpness."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor

from flatmin.integrations.lightning_averages import averaging_hooks, show_true_weights
from flatmin.integrations.lightning_sharpness import SharpnessCallback
from flatmin.integrations.lightning_steps import Steps
from flatmin.integrations.true_weights import go_home, true_weights
from flatmin.optim import OnePass, SharpnessAware, Sync

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same code under its older name
    from pytorch_lightning import Callback  # type: ignore[assignment]

__all__ = ["SharpnessAwareCallback", "SharpnessCallback"]


class SharpnessAwareCallback(Callback):
    """Makes every setting of a Lightning ``Trainer`` right for the optimizers of ``flatmin``.

    Plain ``configure_optimizers`` is enough to train: Lightning's closure is torch's. The callback adds, for automatic
    optimization: the second pass sees the dropout masks of the first and leaves buffers, logged values and torchmetrics
    as the first left them; the loss reported is that of the first pass; replicas (DDP) share gradients as ``sync``
    says; ``accumulate_grad_batches`` perturbs; a ``training_step`` that returns None skips its batch, or in the second
    pass the step. For manual optimization too: clipping and ``on_before_optimizer_step`` act once, on the gradient to
    follow, and get the base optimizer; a gradient scaler (``"16-mixed"``) unscales that gradient only and steps back
    after an overflow in either pass. With manual optimization, give the optimizer its ``model=`` yourself. For one-pass
    methods (``OnePass``): validation, saved weights, Lightning's averages of weights and what ``fit`` leaves are true
    weights.

    Args:
        shared_perturbation: With ``accumulate_grad_batches``: one perturbation for the whole accumulated batch, whose
            micro-batches are kept until it ends, instead of one for each micro-batch.
        sync: Which replicas share the gradient of the ascent, see ``SharpnessAware``.
        log_diagnostics: Log the optimizer's ``Diagnostics`` after every step, as ``SAM/loss_rise`` and so on; their
            norms and cosine where it was made with ``diagnostics=True``.

    Raises:
        TypeError: At the start of ``fit``, if no optimizer is ours.
    """

    def __init__(
        self, *, shared_perturbation: bool = False, sync: Sync | None = None, log_diagnostics: bool = True
    ) -> None:
        super().__init__()
        self.shared_perturbation = shared_perturbation
        self.sync = sync
        self.log_diagnostics = log_diagnostics
        self._num_logged_steps = 0
        self._undo: list[Callable[[], None]] = []
        self._shown = ExitStack()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The optimizers exist, with the model wrapped and no checkpoint restored yet."""
        optimizers = _ours(trainer)
        if not optimizers:
            names = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            raise TypeError(
                "configure_optimizers must return a flatmin.SharpnessAware, such as SAM, or a flatmin.OnePass, "
                f"got {names}"
            )
        self._num_logged_steps = optimizers[0].diagnostics.num_steps
        steps = Steps(trainer, self.shared_perturbation)
        self._patch(trainer.strategy.precision_plugin, "optimizer_step", steps.optimizer_step)
        self._patch(trainer.strategy, "lightning_module_state_dict", partial(_true_state_dict, optimizers))
        if any(isinstance(optimizer, OnePass) for optimizer in optimizers):
            for callback, hook in averaging_hooks(trainer):
                self._patch(callback, hook, show_true_weights(optimizers, self._shown))
        if pl_module.automatic_optimization and isinstance(optimizers[0], SharpnessAware):
            optimizers[0].attach(steps.forward, self.sync)
            self._patch(trainer.fit_loop.epoch_loop.automatic_optimization, "_make_closure", steps.make_closure)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the diagnostics if the batch ended a step."""
        optimizers = _ours(trainer)
        num_steps = optimizers[0].diagnostics.num_steps
        if not self.log_diagnostics or num_steps == self._num_logged_steps:
            return
        self._num_logged_steps = num_steps
        for optimizer in optimizers:
            pl_module.log_dict(_named_diagnostics(optimizer), on_step=True, on_epoch=False)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Validate the true weights."""
        self._shown.enter_context(true_weights(_ours(trainer)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Back to where training goes on."""
        self._shown.close()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the true weights."""
        self._shown.close()
        go_home(_ours(trainer))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the trainer as it was."""
        self._shown.close()
        while self._undo:
            self._undo.pop()()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A step under way is given up, so that the weights are the true ones; the trainer is left as it was."""
        for optimizer in _ours(trainer):
            if isinstance(optimizer, SharpnessAware):
                optimizer.restore()
        self.teardown(trainer, pl_module, "fit")
        go_home(_ours(trainer))

    def _patch(self, owner: object, name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, partial(replacement, original))
        self._undo.append(partial(delattr, owner, name))


def _true_state_dict(optimizers: list[SharpnessAware | OnePass], original: Callable[..., Any]) -> dict[str, Any]:
    """In place of the strategy's own: what is saved are the true weights."""
    if not any(isinstance(optimizer, OnePass) for optimizer in optimizers):
        state: dict[str, Any] = original()
        return state
    with true_weights(optimizers):
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in original().items()}


def _named_diagnostics(optimizer: SharpnessAware | OnePass) -> dict[str, Any]:
    found = optimizer.diagnostics
    values = {f"{type(optimizer).__name__}/{field.name}": getattr(found, field.name) for field in fields(found)}
    return {
        name: float(value) if isinstance(value, int) else value for name, value in values.items() if value is not None
    }


def _ours(trainer: Any) -> list[SharpnessAware | OnePass]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SharpnessAware | OnePass)]
