"""The doors for loops that run their own backward passes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.amp import GradScaler

from flatmin.optim.accumulation import Reduction, check_reduction
from flatmin.optim.base_step import take_base_step
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.freshness import has_fresh_gradient, mark_used
from flatmin.optim.loss_scaling import loss_scale_of
from flatmin.optim.progress import require
from flatmin.optim.two_pass import TwoPass
from flatmin.optim.wrapper import Wrapper, only_creates_state


class LoopDoors(Wrapper):
    """Calls that come between a loop's backward passes, and after them ``step()``.

    Attributes:
        ascent_steps: Ascents towards the worst point.
        skip_nonfinite: Skip a step with a gradient that is not finite.
    """

    ascent_steps: int
    skip_nonfinite: bool
    _passes: TwoPass

    @property
    def diagnostics(self) -> Diagnostics:
        """What the last step saw."""
        return self._passes.diagnostics

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, scaler: GradScaler | None = None) -> None:
        """After a backward pass at w: move the parameters to w + eps.

        With several ascent steps it is called as often, after a backward pass each.

        Args:
            zero_grad: Clear the gradients, so that the next backward pass starts from nothing. Where nobody does, it
                adds to them, and the step follows the sum of both gradients.
            scaler: Gradient scaler of the backward pass. It is needed only by methods whose perturbation depends on the
                gradient's length, such as USAM, and by those that combine both gradients where the second one is
                unscaled by hand.

        Raises:
            RuntimeError: No backward pass was run since the last step, or the parameters are at w + eps already.
        """
        passes = self._passes
        require(not passes.progress.is_complete, "first_step() came after a second pass that no step() has used")
        require(
            passes.progress.num_ascents < self.ascent_steps,
            "first_step() came twice: call second_step() after the second backward pass, or restore() to give up",
        )
        try:
            if passes.progress.num_ascents == 0:
                if not passes.sum.num_terms:
                    self.diagnostics.begin_step()
                passes.begin()
                passes.progress.loss_scale = loss_scale_of(scaler, passes.device)
                passes.decide()
            passes.ascend(keeps_grads=not zero_grad)
        except BaseException:
            self.restore()
            raise

    def second_step(self, zero_grad: bool = False) -> None:
        """After a backward pass at w + eps: restore w, and take the base optimizer's step.

        Args:
            zero_grad: Clear the gradients afterwards.

        Raises:
            RuntimeError: ``first_step`` was not called, or no backward pass was run since.
        """
        require(
            self._passes.progress.num_ascents > 0, "second_step() must follow first_step() and a second backward pass"
        )
        self._passes.descend()  # before the hooks of the step, which may raise
        self.step()
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def perturbed(self, scaler: GradScaler | None = None) -> Iterator[None]:
        """After a backward pass at w: stand at w + eps inside the block, with no gradients on entry.

        A backward pass inside finds the gradient that the following ``step()`` uses. However the block ends, the
        parameters are at w again; where it raises, the step is given up.

        Args:
            scaler: See ``first_step``.

        Raises:
            RuntimeError: No backward pass was run before the block or in it, or several ascent steps are asked for.
        """
        require(self.ascent_steps == 1, f"perturbed() makes 1 ascent step of {self.ascent_steps}: use a closure")
        self.first_step(zero_grad=True, scaler=scaler)
        try:
            yield
        except BaseException:
            self.restore()
            raise
        self._passes.descend()

    @torch.no_grad()
    def accumulate(self) -> None:
        """After both passes of a micro-batch: restore w, and put its gradient aside for ``step()``.

        The spelling of ``step([closures])`` for loops that have none::

            for inputs, labels in micro_batches:
                loss(inputs, labels).backward()
                optimizer.first_step(zero_grad=True)
                loss(inputs, labels).backward()
                optimizer.accumulate()
            optimizer.step()  # with the mean of the gradients
            optimizer.zero_grad()

        With a gradient scaler it ends with ``optimizer.step(scaler=scaler)``, because ``scaler.step`` would look for
        gradients that are put aside. Call ``gather`` before to have them back.

        Raises:
            RuntimeError: The passes of a micro-batch were not run.
            ValueError: A rule that looks at the gradient decides whether a step is perturbed; see ``step``.
        """
        self._passes.plan.check_micro_batches()
        passes = self._passes
        require(
            passes.progress.num_ascents > 0 or passes.progress.is_complete,
            "accumulate() must follow first_step() and a second backward pass, or perturbed()",
        )
        if passes.progress.num_ascents:
            passes.descend()
        passes.set_aside()

    def gather(self, reduction: Reduction = "mean") -> None:
        """After ``accumulate()``: the micro-batches' mean or sum becomes the gradient, and ``step()`` is to follow.

        ``step()`` does this by itself; call it before whatever looks at the gradient to follow, such as clipping,
        ``scaler.unscale_`` or ``scaler.step``.

        Args:
            reduction: Whether the gradients are averaged or summed; summed where each loss was divided already.

        Raises:
            RuntimeError: No gradient was put aside.
            ValueError: ``reduction`` is neither "mean" nor "sum".
        """
        check_reduction(reduction)
        require(self._passes.sum.num_terms > 0, "gather() must follow accumulate()")
        self._passes.gather(reduction)

    def restore(self) -> None:
        """Give up the step under way: back to w, with buffers and generators as the first pass left them.

        The gradients found so far count as used.
        """
        self._passes.give_up()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as ``torch.optim.Optimizer.zero_grad``."""
        passes = self._passes
        if set_to_none:
            passes.clear_gradients()
        else:
            self.base.zero_grad(set_to_none=False)
            mark_used(passes.params())
        if passes.progress.is_complete:
            passes.forget()
        if passes.replay is not None:
            passes.replay.expect_first_pass()

    def train(self) -> None:
        """Switch the base optimizer to training, where it knows of that: schedule-free ones do, torch's do not.

        May be called before every pass.
        """
        self._switch_base("train")

    def eval(self) -> None:
        """Switch the base optimizer to evaluation, see ``train``.

        Raises:
            RuntimeError: The parameters are at w + eps.
        """
        self._require_home("eval")
        self._switch_base("eval")

    def _switch_base(self, mode: str) -> None:
        switch = getattr(self.base, mode, None)
        if switch is not None:
            switch()

    def _step_without_closure(self, scaler: GradScaler | None, reduction: Reduction) -> None:
        """The update, from the gradient that the passes have found."""
        passes, progress = self._passes, self._passes.progress
        require(
            self._found_inf is None or not passes.sum.num_terms,
            "scaler.step(optimizer) after accumulate() looks for gradients that are put aside: "
            "call optimizer.step(scaler=scaler) and then scaler.update()",
        )
        if progress.num_ascents:
            require(
                self._found_inf is None or not passes.needs_averaging,
                "scaler.step(optimizer) looks at the gradient before the replicas have averaged it: "
                "call optimizer.step(scaler=scaler), or make the second pass inside `with optimizer.perturbed():`",
            )
            passes.descend(is_unscaled=self._found_inf is not None and self._grad_scale is None)
        if passes.sum.num_terms:
            if progress.is_complete:
                passes.set_aside()  # the last micro-batch, of which no one has said accumulate()
            if not has_fresh_gradient(self._params()):  # otherwise its second pass is missing
                passes.gather(reduction)
        if progress.is_complete:
            passes.require_backward()  # model.zero_grad() may have come in between
            self._step_base(scaler)
        elif only_creates_state(self):
            pieces = passes.plan.pieces
            self._create_state((*pieces.direction.remembers, *pieces.combine.remembers))
        else:
            raise RuntimeError(
                "step() came without a second pass, which would be a plain step of the base optimizer: pass a closure, "
                "or run backward() inside `with optimizer.perturbed():` or between first_step() and second_step(); "
                "where a trainer called it, docs/trainers.md says what to write (Lightning, transformers, Accelerate, "
                "Fabric)"
            )

    def _step_base(self, scaler: GradScaler | None = None) -> None:
        take_base_step(self, self._passes, scaler, skips_nonfinite=self.skip_nonfinite)

    def _require_home(self, call: str) -> None:
        message = f"{call}() must not be called between first_step() and second_step(): finish the step, or restore()"
        require(self._passes.progress.num_ascents == 0, message)
