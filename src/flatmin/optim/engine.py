"""One sharpness-aware step around any base optimizer, and the doors through which users call it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.combine import Combine, Perturbed
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.directions import Direction, Gradient
from flatmin.optim.freshness import drop_used, has_fresh_gradient, mark_used
from flatmin.optim.groups import active_groups
from flatmin.optim.norms import joint_dot, joint_norm
from flatmin.optim.passes import Replay
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


@dataclass
class _Progress:
    """How far the step under way has come, and what its passes found."""

    num_ascents: int = 0
    is_complete: bool = False  # the gradient to follow is ready, at w
    clean: dict[Tensor, Tensor] = field(default_factory=dict)  # g, where something needs it after the second pass
    finite: list[Tensor] = field(default_factory=list)  # a flag per pass

    def forget(self) -> None:
        self.num_ascents, self.is_complete, self.clean, self.finite = 0, False, {}, []


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
        self._progress = _Progress()
        if not ascent_steps >= 1 or (ascent_steps > 1 and self.ball.p not in (2.0, math.inf)):
            raise ValueError(f"ascent_steps must be >= 1, and 1 unless p is 2 or infinity, got {ascent_steps}")
        super().__init__(base, {"rho": rho, **self.ball.metric.defaults})
        self._names = names_of(model, self.param_groups)
        if self.ball.metric.needs_names and not self._names:
            raise ValueError(
                f"{type(self.ball.metric).__name__} goes by parameter names: pass model=, build the base from "
                'model.named_parameters(), or choose scaled="matrices" or "all"'
            )

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
        if self._progress.is_complete or self._only_initialises_state():
            self._step_base()
            return None
        raise RuntimeError(
            "step() came without a second pass, which would be a plain step of the base optimizer: pass a closure, "
            "or run backward() inside `with optimizer.perturbed():` or between first_step() and second_step() before it"
        )

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
        self._ascend(keeps_grads=not zero_grad)
        if zero_grad:
            self.base.zero_grad()
        else:
            mark_used(self._params())

    def second_step(self, zero_grad: bool = False) -> None:
        """After a backward pass at w + eps: restore w, and take the base optimizer's step.

        Args:
            zero_grad: Clear the gradients afterwards.

        Raises:
            RuntimeError: ``first_step`` was not called, or no backward pass was run since.
        """
        _require(self._progress.num_ascents > 0, "second_step() must follow first_step() and a second backward pass")
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
        """Give up the step under way: back to w, with buffers and generators as the first pass left them."""
        with torch.no_grad():
            self._visit.go_home()
        if self._replay is not None:
            self._replay.finish()
        self._progress.forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as ``torch.optim.Optimizer.zero_grad``."""
        self.base.zero_grad(set_to_none)
        if not set_to_none:
            mark_used(self._params())
        if self._replay is not None:
            self._replay.forget()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict, with ``rho`` in its groups; no copy of the weights.

        Raises:
            RuntimeError: The parameters are at w + eps, so a model saved now would be the wrong one.
        """
        _require(
            self._progress.num_ascents == 0, "state_dict() must not be called between first_step() and second_step()"
        )
        return super().state_dict()

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` where an entry of a group is outside its domain."""
        super().check_options(options)
        self.ball.metric.check(options)

    def _step_with(self, closure: Closure) -> Tensor:
        _require(
            self._progress.num_ascents == 0 and not self._progress.is_complete,
            "step(closure) makes both passes itself: it must not follow first_step() or perturbed()",
        )
        drop_used(self._params())
        if self._replay is not None:
            self._replay.begin(in_closure=True)
        try:
            loss = last_loss = closure()
            if self._is_perturbed_step():
                for _ in range(self.ascent_steps):
                    self._ascend()
                    self.base.zero_grad()
                    last_loss = closure()
            self._descend()
        except BaseException:
            self.restore()
            raise
        if isinstance(loss, Tensor):
            self.diagnostics.loss = loss.detach()
            self.diagnostics.loss_rise = last_loss.detach() - loss.detach()
        self._step_base()
        return loss

    def _ascend(self, keeps_grads: bool = False) -> None:
        """From the gradient of a pass: climb, and make ready for the next pass."""
        self._require_backward()
        groups = active_groups(self, self._names)
        if self._progress.num_ascents == 0 and (self.combine.needs_clean_gradient or self._collects_norms):
            self._progress.clean = {
                owner: grad.clone() if keeps_grads else grad
                for group in groups
                for owner, grad in zip(group.owners, group.grads, strict=True)
            }
        if self._is_perturbed_step():
            is_last = self._progress.num_ascents + 1 == self.ascent_steps
            self._progress.finite.append(self._visit.ascend(groups, self.direction(groups), self.ball, is_last))
        self._progress.num_ascents += 1
        if self._replay is not None:
            self._replay.rewind()

    @torch.no_grad()
    def _descend(self) -> None:
        """From the gradient of the last pass: go home, and make the gradient to follow."""
        self._require_backward()
        if self._collects_norms and self._visit.values:
            self.diagnostics.perturbation_norm = joint_norm(self._visit.perturbation())
        self._visit.go_home()
        if self._replay is not None:
            self._replay.finish()
        groups = active_groups(self, self._names)
        owners = [owner for group in groups for owner in group.owners]
        grads = [grad for group in groups for grad in group.grads]
        clean = [self._progress.clean.get(owner) for owner in owners]
        if self._collects_norms:
            self._collect_norms(clean, grads)
        if self.skip_nonfinite:
            self._progress.finite.append(joint_norm(grads, math.inf).isfinite())
        if self._is_perturbed_step():
            for owner, grad, followed in zip(owners, grads, self.combine(clean, grads), strict=True):
                if followed is not grad:
                    owner.grad = torch.view_as_complex(followed) if owner.is_complex() else followed
        self._progress.is_complete = True

    def _step_base(self) -> None:
        """The base optimizer's update, unless a pass found a gradient that is not finite."""
        was_perturbed, finite = self._is_perturbed_step(), self._progress.finite
        self._progress.forget()
        if self.skip_nonfinite and finite:
            is_finite = torch.stack([flag.to(finite[0].device) for flag in finite]).all()
            self.diagnostics.num_skipped_steps += step_if_finite(self.base, is_finite)
        else:
            self.base.step()
        mark_used(self._params())
        self.diagnostics.num_steps += 1
        self.diagnostics.num_perturbed_steps += was_perturbed
        for group in self.param_groups:
            group["num_steps"] += 1

    def _collect_norms(self, clean: list[Tensor | None], grads: list[Tensor]) -> None:
        both = [(g, g_p) for g, g_p in zip(clean, grads, strict=True) if g is not None]
        if not both:
            return
        g, g_p = [pair[0] for pair in both], [pair[1] for pair in both]
        self.diagnostics.gradient_norm = joint_norm(g)
        self.diagnostics.perturbed_gradient_norm = joint_norm(g_p)
        lengths = self.diagnostics.gradient_norm * self.diagnostics.perturbed_gradient_norm
        self.diagnostics.cosine = joint_dot(g, g_p) / lengths

    def _is_perturbed_step(self) -> bool:
        return self.when(self.param_groups[0]["num_steps"])

    def _only_initialises_state(self) -> bool:
        # torch.distributed.checkpoint makes a base create its state by a step with zero gradients and zero lr.
        return all(float(group.get("lr", 1.0)) == 0.0 for group in self.param_groups)

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _require_backward(self) -> None:
        if not has_fresh_gradient(self._params()):
            self.restore()
            raise RuntimeError(
                "no parameter has a new gradient: backward() must run before the first step, again at w + eps, "
                "and inside a closure; and some parameter must require a gradient"
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)
