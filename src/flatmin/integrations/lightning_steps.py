"""The closure of a Lightning batch, made fit for several passes, and the step that takes it."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler

from flatmin.integrations.lightning_silence import silent
from flatmin.optim import OnePass, SharpnessAware

__all__ = ["Steps"]


class _SkippedBatch(Exception):
    """``training_step`` has returned None, which is Lightning's way to skip a batch."""


class _TrainingStep(nn.Module):
    """Calls the training step: Lightning calls a module's method and no module, and our hooks are on modules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, step: Callable[[], Any]) -> Any:
        return step()


class _Passes:
    """Lightning's closure for one batch; its later passes are silent, and the result is that of the first.

    Attributes:
        has_loss: Whether ``training_step`` has returned one in the last call.
    """

    def __init__(self, closure: Any, model: Any) -> None:
        self._closure, self._model = closure, model
        self._result: Any = None
        self.has_loss = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        is_first = self._result is None
        with nullcontext() if is_first else silent(self._model):
            loss: Tensor | None = self._closure(*args, **kwargs)
        result = self._closure.consume_result()
        self.has_loss = loss is not None
        if is_first:
            self._result = result
            if loss is None:  # later passes repeat its calls of the model and no more
                self._closure._backward_fn = None
        return loss

    def consume_result(self) -> Any:
        return self._result


class _MicroBatch:
    """Lightning's closure for a batch that ends no step."""

    def __init__(self, passes: _Passes, add: Callable[[_Passes], Tensor | None]) -> None:
        self._passes, self._add = passes, add

    def __call__(self) -> Tensor | None:
        return self._add(self._passes)

    def consume_result(self) -> Any:
        return self._passes.consume_result()


class Steps:
    """Takes the place of two of Lightning's methods: how a batch gets its closure, and how the optimizer steps."""

    def __init__(self, trainer: Any, shared_perturbation: bool) -> None:
        self.trainer, self.shared_perturbation = trainer, shared_perturbation
        self.forward = _TrainingStep(trainer.strategy.model)
        self._passes: _Passes | None = None  # of the present batch
        self._waiting: list[Callable[[], Any]] = []
        self._num_losses = 0  # micro-batches of the step under way that were not skipped
        self._is_given_up = False

    def make_closure(self, original: Callable[..., Any], kwargs: Any, optimizer: SharpnessAware, batch_idx: int) -> Any:
        """A closure for several passes."""
        closure = original(kwargs, optimizer, batch_idx)
        if self.trainer.fit_loop._skip_backward:
            return closure
        closure._step_fn = partial(self.forward, closure._step_fn)
        self._passes = passes = _Passes(closure, self.trainer.lightning_module)
        ends_step = not self.trainer.fit_loop._should_accumulate()
        return passes if ends_step else _MicroBatch(passes, partial(self._add, optimizer))

    def optimizer_step(
        self, original: Callable[..., Any], optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """A step whose gradient scaler and clipping see the gradient to follow."""
        if not isinstance(optimizer, SharpnessAware | OnePass):
            return original(optimizer, model=model, closure=closure, **kwargs)
        if self.trainer.fit_loop._skip_backward:  # an epoch for the running statistics of averaged weights
            return closure()
        plugin = self.trainer.strategy.precision_plugin
        hook = optimizer.base.register_step_pre_hook(lambda base, *_: plugin._after_closure(model, base))
        try:
            if not model.automatic_optimization:
                is_left_out = getattr(closure, "__name__", "") == "do_nothing_closure"  # the passes are made
                loss = optimizer.step(None if is_left_out else _loud_once(closure, model), self._scaler)
            elif isinstance(optimizer, OnePass):
                loss = self._one_pass(optimizer, closure)
            elif self.trainer.accumulate_grad_batches > 1:
                loss = self._end(optimizer, closure)
            else:
                loss = optimizer.step(self._unless_skipped(closure), self._scaler)
        except _SkippedBatch:
            if isinstance(optimizer, SharpnessAware):
                optimizer.restore()
            return None
        finally:
            hook.remove()
        if self._scaler is not None:
            self._scaler.update()
        return loss

    @property
    def _scaler(self) -> GradScaler | None:
        return getattr(self.trainer.strategy.precision_plugin, "scaler", None)

    def _one_pass(self, optimizer: OnePass, closure: Callable[[], Tensor | None]) -> Tensor | None:
        """A step of a one-pass method, whose earlier micro-batches have left their gradients."""
        loss = closure()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if loss is None and all(param.grad is None for param in params):
            raise _SkippedBatch
        optimizer.step(scaler=self._scaler)
        return loss

    def _add(self, optimizer: SharpnessAware, passes: _Passes) -> Tensor | None:
        """A micro-batch that ends no step."""
        loss = passes()
        try:
            self._take(optimizer, passes)
            if not self.shared_perturbation:
                self._climb(optimizer)
        except _SkippedBatch:
            optimizer.restore()
            self._is_given_up = True
        return loss

    def _end(self, optimizer: SharpnessAware, closure: Callable[[], Tensor | None]) -> Tensor | None:
        """The last micro-batch, and the step; Lightning has divided each loss by the number of micro-batches."""
        loss = closure()
        try:
            self._take(optimizer, closure)
            if not self._num_losses or self._is_given_up:
                raise _SkippedBatch
            self._climb(optimizer)
            optimizer.gather("sum")
            optimizer.step(scaler=self._scaler)
        finally:
            self._waiting, self._num_losses, self._is_given_up = [], 0, False
        return loss

    def _take(self, optimizer: SharpnessAware, closure: Callable[[], Any]) -> None:
        """Keep a micro-batch for its later passes; a skipped one keeps its place among others in a row."""
        assert self._passes is not None
        self._num_losses += self._passes.has_loss
        if self._passes.has_loss:
            self._waiting.append(self._unless_skipped(closure))
        elif self._waiting:
            self._waiting.append(closure)
        else:
            optimizer.zero_grad()  # what the model drew for it is not what the next micro-batch replays

    def _climb(self, optimizer: SharpnessAware) -> None:
        """The later passes of the micro-batches that wait, whose gradient is put aside."""
        waiting, self._waiting = self._waiting, []
        if not waiting or self._is_given_up:
            return
        for _ in range(optimizer.ascent_steps):
            optimizer.first_step(zero_grad=True, scaler=self._scaler)
            for closure in waiting:
                closure()
        optimizer.accumulate()

    def _unless_skipped(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of the present batch, which gives the step up where ``training_step`` returns None."""
        passes = self._passes
        assert passes is not None

        def run() -> Any:
            loss = closure()
            if not passes.has_loss:
                raise _SkippedBatch
            return loss

        return run


def _loud_once(closure: Callable[[], Any], model: Any) -> Callable[[], Any]:
    """The closure, silent from its second call on."""
    num_calls = 0

    def passes() -> Any:
        nonlocal num_calls
        num_calls += 1
        with nullcontext() if num_calls == 1 else silent(model):
            return closure()

    return passes
