"""One sharpness-aware step around any base optimizer: the class behind every named method."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from flatmin.optim.accumulation import Reduction, check_reduction
from flatmin.optim.balls import Ball
from flatmin.optim.closure_passes import MicroBatches, run_passes
from flatmin.optim.closures import Closure, as_closures
from flatmin.optim.combine import Combine, Perturbed
from flatmin.optim.directions import Direction, Gradient
from flatmin.optim.host_copies import SaveTo, check_save_to
from flatmin.optim.layers import LayerBall
from flatmin.optim.leftover import refusing_leftovers
from flatmin.optim.loop_doors import LoopDoors
from flatmin.optim.piece_check import check_pieces
from flatmin.optim.plan import Pieces, Plan
from flatmin.optim.progress import Progress, require
from flatmin.optim.rounding import Rounding, check_rounding
from flatmin.optim.schedules import RhoSchedule
from flatmin.optim.sync import Sync, gradient_sync
from flatmin.optim.two_pass import TwoPass
from flatmin.optim.when import Always, GradientWhen, When
from flatmin.optim.wrapper import names_of


class SharpnessAware(LoopDoors):
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
        sync: Which replicas share the gradient that the perturbation is made of, where ``model`` is in
            DistributedDataParallel: ``"local"``, each its own, without communication in the first pass (the paper's
            choice, and the default); ``"global"``; or groups of that many neighbouring ranks. Sharded parameters
            (FSDP2) can have no other than ``"global"``.
        rho_schedule: Sets every group's rho at the beginning of each step, see ``flatmin.optim.schedules``.
        save_to: Where w is kept during the second pass: beside the parameters, or in pinned host memory, for a model
            that fills its device. With a closure it is copied there while the first pass runs, so that only the way
            back takes time. Of no effect on a CPU, whose memory is the host's.
        rounding: How w + eps is rounded where the parameters themselves are bfloat16 or float16: stochastically, so
            that it is right on average, as a function of the number of the step; or to the nearest, where most of a
            small perturbation is lost.

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
        ball: Ball | LayerBall | None = None,
        when: When | GradientWhen | None = None,
        combine: Combine | None = None,
        ascent_steps: int = 1,
        model: nn.Module | None = None,
        diagnostics: bool = False,
        skip_nonfinite: bool = True,
        sync: Sync | None = None,
        rho_schedule: RhoSchedule | None = None,
        rounding: Rounding = "stochastic",
        save_to: SaveTo = "device",
    ) -> None:
        check_rounding(rounding)
        check_save_to(save_to)
        check_pieces(direction=direction, ball=ball, when=when, combine=combine)
        check_pieces(model=model, rho_schedule=rho_schedule)
        self.ball = ball or Ball()
        self.when = when or Always()
        self.ascent_steps = ascent_steps
        self.skip_nonfinite = skip_nonfinite
        self.ball.check_ascent_steps(ascent_steps)
        super().__init__(base, {"rho": rho, **self.ball.defaults})
        pieces = Pieces(direction or Gradient(), self.ball, self.when, combine or Perturbed())
        if not pieces.direction.needs_clean_gradient:
            raise ValueError(
                f"direction must need the clean gradient, got {type(pieces.direction).__name__}: "
                "flatmin.OnePass makes one pass with it"
            )
        replicas = gradient_sync(model, list(self._params()), sync)
        plan = Plan(base, pieces, ascent_steps, replicas, Progress(), rho_schedule, rounding, save_to)
        self._passes = TwoPass(plan, model, collects_norms=diagnostics)
        self._passes.names = self._names_for_metric()

    @property
    def is_climbing(self) -> bool:
        """Whether the gradient of the next backward pass serves the perturbation alone: no part of it is followed.

        Then it may be another one than training follows: the true gradient of a network that trains with a shaken
        backward pass, for instance. False in a plain step, in the first pass of a method that combines both gradients,
        and in that of one which looks at the gradient to decide whether the step is perturbed.
        """
        return self._passes.plan.is_climbing

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A gradient scaler calls ``step`` also after an overflow, to put the weights back.

        Not while ``step`` runs closures: trainers take it that such an optimizer's gradients cannot be clipped in them.
        """
        return not self._passes.progress.is_in_closure

    @overload  # type: ignore[override]  # torch types a closure's loss as a float, and every user returns the tensor
    def step(self, closure: None = None, scaler: GradScaler | None = None) -> None: ...

    @overload
    def step(
        self,
        closure: Closure | Sequence[Closure],
        scaler: GradScaler | None = None,
        *,
        shared_perturbation: bool = False,
        reduction: Reduction = "mean",
        average_buffers: bool = False,
    ) -> Tensor: ...

    @torch.no_grad()
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        scaler: GradScaler | None = None,
        *,
        shared_perturbation: bool = False,
        reduction: Reduction = "mean",
        average_buffers: bool = False,
    ) -> Tensor | None:
        """Take a step: both passes and the base optimizer's update with a closure, only the update without.

        Args:
            closure: Zeroes the gradients, computes the loss of one batch, calls ``backward`` and returns the loss. It
                is called ``1 + ascent_steps`` times, or once where ``when`` says that the step is not perturbed. Or a
                list of closures, one per micro-batch, each called as often: m-sharpness on one device. During the
                second passes two copies of the parameters are alive, the weights and the sum of gradients.
            scaler: Gradient scaler of the closure's ``scaler.scale(loss).backward()``. It takes the step, or skips it
                where a pass overflowed; ``scaler.update()`` is left to the caller.
            shared_perturbation: One perturbation for all micro-batches, made of the mean or sum of their gradients,
                instead of one for each. Their first passes come before their second ones.
            reduction: Whether the micro-batches' losses and gradients are averaged or summed.
            average_buffers: Every micro-batch starts from the same buffers, and those with fractions (running
                statistics) end as the mean over the micro-batches, as they would on as many devices. By default each
                goes on where the one before it ended.

        Returns:
            The loss at w, with a closure; of a list the mean or sum.

        Raises:
            RuntimeError: Without a closure: the second backward pass was not run, see the other two doors. With one: it
                ran no backward pass, or would add to gradients left before, which belong to a loop that accumulates;
                or the optimizer was called by ``scaler.step``.
            ValueError: The list is empty, or ``reduction`` is neither "mean" nor "sum"; a rule that looks at the
                gradient to decide whether a step is perturbed cannot do so for each micro-batch.
        """
        check_reduction(reduction)
        with self._heeding_scaler():
            if closure is None:
                self._step_without_closure(scaler, reduction)
                return None
            micro = MicroBatches(shared_perturbation, reduction, average_buffers)
            return self._step_with(as_closures(closure), scaler, micro)

    def attach(self, model: nn.Module, sync: Sync | None = None) -> None:
        """Take the model that the passes call, as ``model=`` does, where it is known only after construction.

        Trainers wrap a model (DistributedDataParallel, compiled) after they have made its optimizer.

        Args:
            model: The outermost wrapper; it replaces a model given before.
            sync: Which replicas share the gradient of the ascent, see ``SharpnessAware``.

        Raises:
            RuntimeError: A step is under way.
            ValueError: See ``SharpnessAware``.
        """
        check_pieces(model=model)
        self._require_home("attach")
        self._passes.attach(model, gradient_sync(model, list(self._params()), sync))
        self._passes.names = self._names_for_metric()

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
            self._passes.names = self._names_for_metric()

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where an entry of a group is outside its domain."""
        super().check_options(options)
        self.ball.check(options)

    def _step_with(self, closures: list[Closure], scaler: GradScaler | None, micro: MicroBatches) -> Tensor | None:
        """Both passes of every micro-batch, and the update."""
        passes, progress = self._passes, self._passes.progress
        require(
            progress.num_ascents == 0 and not progress.is_complete and not passes.sum.num_terms,
            "step(closure) makes both passes itself: it must not follow first_step() or perturbed()",
        )
        require(
            self._found_inf is None,
            "scaler.step(optimizer, closure) looks for gradients that the closure has not made yet: "
            "call optimizer.step(closure, scaler=scaler) and then scaler.update()",
        )
        closures = [refusing_leftovers(closures[0], self._params()), *closures[1:]]
        loss = run_passes(passes, closures, micro, scaler)
        self._step_base(scaler)
        return loss

    def _names_for_metric(self) -> dict[Tensor, str]:
        return names_of(self._passes.model, self.param_groups) if self.ball.metric.needs_names else {}
