"""One sharpness-aware step around any base optimizer, and the doors through which users call it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.combine import Combine, Perturbed
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.directions import Direction, Gradient
from flatmin.optim.freshness import has_fresh_gradient, mark_used
from flatmin.optim.groups import active_groups
from flatmin.optim.norms import joint_norm
from flatmin.optim.passes import Replay
from flatmin.optim.progress import Progress
from flatmin.optim.skipping import step_if_finite
from flatmin.optim.visit import Visit
from flatmin.optim.when import Always, When
from flatmin.optim.wrapper import Wrapper, names_of

Closure = Callable[[], Tensor]


class EngineOptions(TypedDict, total=False):
    """What every method takes beside its own hyperparameters; see ``SharpnessAware``."""

    ascent_steps: int
    model: nn.Module | None
    diagnostics: bool
    skip_nonfinite: bool


class SharpnessAware(Wrapper):
    """Sharpness-aware minimisation around a base optimizer: the one engine behind every named method.

    A step is::

        g   = gradient of the batch loss at w
        eps = rho * ball.farthest(direction(g))        one norm over all parameter groups
        g_p = gradient of the same batch loss at w + eps
        g*  = combine(g, g_p)
        base.step() with g*, at w restored bit for bit

    and is taken through any of three doors, with the same numbers::

        optimizer.step(closure)  # zeroes the gradients, computes the loss, calls backward, returns the loss

        loss.backward()
        optimizer.first_step(zero_grad=True)
        loss_again.backward()
        optimizer.second_step(zero_grad=True)

        loss.backward()
        with optimizer.perturbed():
            loss_again.backward()
        optimizer.step()

    ``param_groups`` and ``state`` are the base optimizer's own, so schedulers and hooks work on either. Every group has
    an entry ``rho`` that may differ between groups and be scheduled. In a group that is maximised the worst neighbour
    has the lowest objective, so eps points down.

    A step with a gradient that is not finite is skipped and counted, see ``Diagnostics``. A fused base decides that on
    the device; with any other on an accelerator the host waits once a step for the flag, unless ``skip_nonfinite`` is
    off.

    Args:
        base: The optimizer that takes the step; any that needs no closure of its own.
        rho: Radius of the ball, ``>= 0``; a group that brings an entry ``rho`` keeps it.
        direction: Where the perturbation points; the gradient by default.
        ball: Norm and metric of the ball; Euclidean by default.
        when: Which steps are perturbed; all by default.
        combine: How g and g_p become the gradient to follow; g_p by default.
        ascent_steps: Ascents towards the worst point, ``>= 1``. From the second on, each goes on by a step of length
            rho from the point reached and is projected back to the ball (p = 2 and infinity). The paper prints no
            length of the step.
        model: The module that the passes call. With it, the later passes repeat the random numbers of the first
            (dropout masks) and leave its buffers (running statistics) as the first pass left them. Give the outermost
            wrapper where the module is compiled or distributed.
        diagnostics: Collect norms and the cosine at every step, see ``Diagnostics``.
        skip_nonfinite: Skip a step with a gradient that is not finite.

    Raises:
        TypeError: ``base`` is no optimizer, is itself sharpness-aware, or drives a closure of its own (LBFGS).
        ValueError: A hyperparameter is outside its domain.

    References:
        Foret et al. (2021), arXiv:2010.01412, Algorithm 1; several ascent steps: Appendix C.6.
    """

    def __init__(  # noqa: PLR0913 - each piece is one keyword
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        direction: Direction | None = None,
        ball: Ball | None = None,
        when: When | None = None,
        combine: Combine | None = None,
        ascent_steps: int = 1,
        model: nn.Module | None = None,
        diagnostics: bool = False,
        skip_nonfinite: bool = True,
    ) -> None:
        self.direction = direction or Gradient()
        self.ball = ball or Ball()
        self.when = when or Always()
        self.combine = combine or Perturbed()
        self.ascent_steps = ascent_steps
        self.skip_nonfinite = skip_nonfinite
        self.diagnostics = Diagnostics()
        self._collects_norms = diagnostics
        self._replay = Replay(model) if model is not None else None
        self._visit = Visit()
        self._progress = Progress()
        self.ball.check_ascent_steps(ascent_steps)
        super().__init__(base, {"rho": rho, **self.ball.metric.defaults})
        self._names = self._names_for_metric()

    @overload  # type: ignore[override]  # torch types a closure's loss as a float, and every user returns the tensor
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Closure) -> Tensor: ...

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:
        """Take a step: both passes and the base optimizer's update with a closure, only the update without.

        Args:
            closure: Zeroes the gradients, computes the loss of one batch, calls ``backward`` and returns the loss. It
                is called ``1 + ascent_steps`` times, or once where ``when`` says that the step is not perturbed.

        Returns:
            The loss at w, with a closure.

        Raises:
            RuntimeError: Without a closure: the second backward pass was not run, see the other two doors. With one: it
                ran no backward pass.
        """
        if closure is not None:
            return self._step_with(torch.enable_grad()(closure))
        if self._progress.num_ascents:
            self._descend()
        if self._progress.is_complete:
            self._step_base()
        elif self._only_creates_state():
            self.base.step()
        else:
            raise RuntimeError(
                "step() came without a second pass, which would be a plain step of the base optimizer: pass a closure, "
                "or run backward() inside `with optimizer.perturbed():` or between first_step() and second_step() first"
            )
        return None

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """After a backward pass at w: move the parameters to w + eps.

        With several ascent steps it is called as often, after a backward pass each.

        Args:
            zero_grad: Clear the gradients, so that the next backward pass starts from nothing.

        Raises:
            RuntimeError: No backward pass was run since the last step, or the parameters are at w + eps already.
        """
        _require(not self._progress.is_complete, "first_step() came after a second pass that no step() has used")
        _require(
            self._progress.num_ascents < self.ascent_steps,
            "first_step() came twice: call second_step() after the second backward pass, or restore() to give up",
        )
        if self._progress.num_ascents == 0:
            self._begin()
        try:
            self._ascend(keeps_grads=not zero_grad)
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
        _require(self._progress.num_ascents > 0, "second_step() must follow first_step() and a second backward pass")
        self._descend()
        self.step()
        if zero_grad:
            self.zero_grad()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """After a backward pass at w: stand at w + eps inside the block, with no gradients on entry.

        A backward pass inside finds the gradient that the following ``step()`` uses. However the block ends, the
        parameters are at w again; where it raises, the step is given up.

        Raises:
            RuntimeError: No backward pass was run before the block or in it, or several ascent steps are asked for.
        """
        _require(self.ascent_steps == 1, f"perturbed() makes 1 ascent step of {self.ascent_steps}: use a closure")
        self.first_step(zero_grad=True)
        try:
            yield
        except BaseException:
            self.restore()
            raise
        self._descend()

    def restore(self) -> None:
        """Give up the step under way: back to w, with buffers and generators as the first pass left them.

        The gradients found so far count as used.
        """
        with torch.no_grad():
            self._visit.go_home()
        if self._replay is not None:
            self._replay.finish()
        self._progress.forget()
        mark_used(self._params())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as ``torch.optim.Optimizer.zero_grad``."""
        if set_to_none:
            self._clear_gradients()
        else:
            self.base.zero_grad(set_to_none=False)
            mark_used(self._params())
        if self._progress.is_complete:
            self._progress.forget()
        if self._replay is not None:
            self._replay.expect_first_pass()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with ``rho`` in its groups; no copy of the weights.

        Raises:
            RuntimeError: The parameters are at w + eps, so a model saved now would be the wrong one.
        """
        self._require_home("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of the base optimizer; entries it lacks keep their present values.

        Raises:
            RuntimeError: The parameters are at w + eps; ``restore`` first.
        """
        self._require_home("load_state_dict")
        super().load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with its own ``rho`` or the one given to the constructor."""
        super().add_param_group(param_group)
        if self._is_built:
            self._names = self._names_for_metric()

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where an entry of a group is outside its domain."""
        super().check_options(options)
        self.ball.metric.check(options)

    def _step_with(self, closure: Closure) -> Tensor | None:
        """Both passes and the update; the gradients are cleared before each call, so a closure need not."""
        _require(
            self._progress.num_ascents == 0 and not self._progress.is_complete,
            "step(closure) makes both passes itself: it must not follow first_step() or perturbed()",
        )
        self._begin()
        if self._replay is not None:
            self._replay.begin(in_closure=True)
        try:
            self._clear_gradients()
            loss = last_loss = closure()
            for _ in range(self.ascent_steps if self._progress.is_perturbed else 0):
                self._ascend(keeps_grads=False)
                last_loss = closure()
            self._descend()
        except BaseException:
            self.restore()
            raise
        if isinstance(loss, Tensor) and isinstance(last_loss, Tensor):
            self.diagnostics.measure_losses(loss.detach(), last_loss.detach() if self._progress.is_perturbed else None)
        self._step_base()
        return loss

    def _begin(self) -> None:
        self._progress.is_perturbed = self.when(self.param_groups[0]["num_steps"])
        self.diagnostics.begin_step()

    def _ascend(self, keeps_grads: bool) -> None:
        """From the gradient of a pass: climb, and make ready for the next pass."""
        self._require_backward()
        progress = self._progress
        groups = active_groups(self, self._names)
        if progress.num_ascents == 0 and (self.combine.needs_clean_gradient or self._collects_norms):
            progress.clean = {
                owner: grad.clone() if keeps_grads else grad
                for group in groups
                for owner, grad in zip(group.owners, group.grads, strict=True)
            }
        if keeps_grads:
            mark_used(self._params())
        else:
            self._clear_gradients()
        if progress.is_perturbed:
            is_last = progress.num_ascents + 1 == self.ascent_steps
            progress.finite.append(self._visit.ascend(groups, self.direction(groups), self.ball, is_last))
            progress.has_moved = any(group.radius != 0.0 for group in groups)
        progress.num_ascents += 1
        if self._replay is not None:
            self._replay.rewind()

    @torch.no_grad()
    def _descend(self) -> None:
        """From the gradient of the last pass: go home, and make the gradient to follow."""
        self._require_backward()
        progress = self._progress
        if self._collects_norms and progress.is_perturbed:
            self.diagnostics.measure_perturbation(self._visit.perturbation())
        self._visit.go_home()
        if self._replay is not None:
            self._replay.finish()
        groups = active_groups(self, self._names)
        owners = [owner for group in groups for owner in group.owners]
        grads = [grad for group in groups for grad in group.grads]
        clean = [progress.clean.get(owner) for owner in owners]
        if self._collects_norms:
            self.diagnostics.measure_gradients(clean, grads)
        if self.skip_nonfinite:
            progress.finite.append(joint_norm(grads, math.inf).isfinite())
        if progress.is_perturbed:
            for owner, grad, followed in zip(owners, grads, self.combine(clean, grads), strict=True):
                if followed is not grad:
                    owner.grad = torch.view_as_complex(followed) if owner.is_complex() else followed
        progress.num_ascents, progress.is_complete = 0, True

    def _step_base(self) -> None:
        """The base optimizer's update, unless a pass found a gradient that is not finite."""
        finite, has_moved = self._progress.finite, self._progress.has_moved
        self._progress.forget()
        try:
            if self.skip_nonfinite and finite:
                is_finite = torch.stack([flag.to(finite[0].device) for flag in finite]).all()
                self.diagnostics.num_skipped_steps += step_if_finite(self.base, is_finite)
            else:
                self.base.step()
        finally:
            mark_used(self._params())
        self.diagnostics.num_steps += 1
        self.diagnostics.num_perturbed_steps += has_moved
        for group in self.param_groups:
            group["num_steps"] += 1

    def _only_creates_state(self) -> bool:
        """Whether torch.distributed.checkpoint makes the base create its state, with lr and gradients of zero."""
        return (
            not self.state
            and all(float(group.get("lr", 1.0)) == 0.0 for group in self.param_groups)
            and not any(param.grad is not None and param.grad.any() for param in self._params())
        )

    def _names_for_metric(self) -> dict[Tensor, str]:
        if not self.ball.metric.needs_names:
            return {}
        return names_of(self._replay.model if self._replay is not None else None, self.param_groups)

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _clear_gradients(self) -> None:
        for param in self._params():
            param.grad = None

    def _require_home(self, call: str) -> None:
        message = f"{call}() must not be called between first_step() and second_step(): finish the step, or restore()"
        _require(self._progress.num_ascents == 0, message)

    def _require_backward(self) -> None:
        if not has_fresh_gradient(self._params()):
            self.restore()  # also between the two steps, where the caller may go on after the error
            raise RuntimeError(
                "no parameter has a new gradient: backward() must run before the first step, again at w + eps, "
                "and inside a closure; and some parameter must require a gradient"
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
