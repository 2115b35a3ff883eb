"""transformers: any ``Trainer``, sharpness-aware."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer

from flatmin.integrations.true_weights import go_home, true_weights
from flatmin.optim import SAM, OnePass, SharpnessAware, Sync

__all__ = ["SharpnessAwareMixin", "SharpnessAwareTrainer"]

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object  # the Trainer comes by the subclass


class SharpnessAwareMixin(_Base):
    """Makes a subclass of ``Trainer`` take sharpness-aware steps: ``class Mine(SharpnessAwareMixin, Theirs)``.

    Every batch gets its second pass inside ``training_step``, so ``compute_loss`` runs twice on it; clipping, loss
    scaling, schedulers, checkpoints, callbacks and several processes stay the ``Trainer``'s own. The optimizer that the
    ``Trainer`` makes or is given becomes the base optimizer. The loss reported is that of the first pass; the logs
    also get the optimizer's ``Diagnostics``, as ``SAM/loss_rise`` and so on. What the optimizer trains is perturbed and
    nothing else: with PEFT, the adapters. With one-pass methods (``OnePass``) evaluation, saved weights and the weights
    that ``train`` leaves are the true ones.

    Args:
        *args: For the ``Trainer``.
        sharpness_aware: Makes the optimizer from the base optimizer.
        shared_perturbation: With ``gradient_accumulation_steps``: one perturbation for the whole accumulated batch,
            whose micro-batches are kept until it ends, instead of one for each micro-batch.
        sync: Which processes share the gradient of the ascent, see ``SharpnessAware``.
        **kwargs: For the ``Trainer``.

    Raises:
        TypeError: ``sharpness_aware`` is no function; when training starts, if it has made something else.
    """

    optimizer: Any

    def __init__(
        self,
        *args: Any,
        sharpness_aware: Callable[[Optimizer], SharpnessAware | OnePass] = SAM,
        shared_perturbation: bool = False,
        sync: Sync | None = None,
        **kwargs: Any,
    ) -> None:
        if not callable(sharpness_aware):
            raise TypeError(
                "sharpness_aware must be a function that makes the optimizer from the base optimizer, such as "
                f"partial(flatmin.SAM, rho=0.05), got {sharpness_aware!r}"
            )
        self.sharpness_aware = sharpness_aware
        self.shared_perturbation = shared_perturbation
        self.sync = sync
        self._attached: tuple[SharpnessAware, nn.Module] | None = None
        self._waiting: list[Callable[[], Tensor]] = []
        self._losses: list[Tensor] = []
        self._perturbed_losses: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Make the ``Trainer``'s own optimizer, unless it was given one, and wrap it."""
        super().create_optimizer(*args, **kwargs)
        if not isinstance(_unwrapped(self.optimizer), SharpnessAware | OnePass):
            made = self.sharpness_aware(self.optimizer)
            if not isinstance(made, SharpnessAware | OnePass):
                raise TypeError(
                    "sharpness_aware must make a flatmin.SharpnessAware, such as SAM, or a flatmin.OnePass, "
                    f"got {type(made).__name__}"
                )
            self.optimizer = made
        optimizer: Optimizer = self.optimizer
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Both passes of a batch; after the last of a step its gradient is the one to follow.

        Returns:
            The loss of the first pass.
        """
        optimizer = _unwrapped(self.optimizer)
        run: Callable[..., Tensor] = super().training_step
        if isinstance(optimizer, OnePass):
            return run(model, inputs, *args, **kwargs)
        self._attach(optimizer, model)

        def one_pass() -> Tensor:
            return run(model, copy.copy(inputs), *args, **kwargs)  # the step takes entries out of its inputs

        loss = one_pass()
        self._losses.append(loss)
        self._waiting.append(one_pass)
        ends_step = self.accelerator.sync_gradients
        if self.shared_perturbation and not ends_step:
            return loss
        for _ in range(optimizer.ascent_steps):
            optimizer.first_step(zero_grad=True, scaler=self.accelerator.scaler)
            perturbed_losses = [again() for again in self._waiting]
        self._perturbed_losses += perturbed_losses
        self._waiting = []
        optimizer.accumulate()
        if ends_step:  # the Trainer has divided each loss by the number of micro-batches or of tokens
            optimizer.gather("sum")
            optimizer.diagnostics.measure_losses(
                torch.stack(self._losses).sum(), torch.stack(self._perturbed_losses).sum()
            )
            self._losses, self._perturbed_losses = [], []
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the diagnostics where the training loss is logged."""
        optimizer = _unwrapped(self.optimizer)
        if "loss" in logs and isinstance(optimizer, SharpnessAware | OnePass):
            found = optimizer.diagnostics.as_dict()
            logs.update({f"{type(optimizer).__name__}/{name}": value for name, value in found.items()})
        super().log(logs, *args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the weights are the true ones afterwards, also after an exception."""
        try:
            return super().train(*args, **kwargs)
        finally:
            optimizer = _unwrapped(self.optimizer)
            if isinstance(optimizer, SharpnessAware):
                optimizer.restore()
            self._waiting, self._losses, self._perturbed_losses = [], [], []
            go_home([optimizer])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the true weights."""
        with true_weights([_unwrapped(self.optimizer)]):
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the true weights."""
        with true_weights([_unwrapped(self.optimizer)]):
            super().save_model(*args, **kwargs)

    def _attach(self, optimizer: SharpnessAware, model: nn.Module) -> None:
        """Tell the optimizer of the model that is called, which may have been wrapped after it was made."""
        if self._attached is None or self._attached[0] is not optimizer or self._attached[1] is not model:
            optimizer.attach(model, self.sync)
            self._attached = optimizer, model


class SharpnessAwareTrainer(SharpnessAwareMixin, Trainer):
    """The ``Trainer``, sharpness-aware; takes the arguments of both."""


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper."""
    while not isinstance(optimizer, SharpnessAware | OnePass) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
