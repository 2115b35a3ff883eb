"""Methods that need no clean gradient: the weights rest at w + eps between steps, and a step costs one pass."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from flatmin.optim.accumulation import Reduction, check_reduction, one_after_another
from flatmin.optim.balls import Ball
from flatmin.optim.base_step import guarded_step
from flatmin.optim.closures import Closure, as_closures
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.directions import BaseMomentum, Direction, Observer, check_has_moment
from flatmin.optim.freshness import has_fresh_gradient, is_fresh, mark_used
from flatmin.optim.groups import count_step
from flatmin.optim.layers import LayerBall
from flatmin.optim.leftover import refusing_leftovers
from flatmin.optim.loss_scaling import remaining_scale, unscale_
from flatmin.optim.piece_check import check_pieces
from flatmin.optim.resting_weights import RestingWeights
from flatmin.optim.rounding import Rounding, check_rounding
from flatmin.optim.schedules import RhoSchedule
from flatmin.optim.space import active_space
from flatmin.optim.when import Always, GradientWhen, When
from flatmin.optim.wrapper import names_of, only_creates_state


class OnePass(RestingWeights):
    """Sharpness-aware minimisation with a direction that is known before the gradient, at the cost of plain training.

    Between steps the weights rest at w + eps. A step is::

        g_p = gradient of the batch loss where the weights rest, at w + eps
        back to w, bit for bit
        base.step() with g_p
        w  -> w + eps with the new  eps = rho * ball.farthest(direction)

    so any loop or trainer drives it as it would drive the base: ``backward()`` and ``step()``. For evaluation, saving
    and weight averages the true weights are shown by::

        with optimizer.unperturbed():
            ...

    One copy of the perturbed parameters, w, is kept. Weights that are written from outside while they rest, by loading
    a checkpoint for instance, count as new true weights; ``zero_grad()`` and a step with a closure perturb them before
    their first gradient. What is written through ``.data`` cannot be noticed and is lost at the next step: write the
    parameter itself under ``torch.no_grad()``, or inside ``unperturbed()``. ``state_dict()`` holds w where it is taken
    at rest, and no copy inside ``unperturbed()``. A run that was saved anywhere goes on with the same bits, whether the
    model's weights or ours are loaded first.

    Args:
        base: The optimizer that takes the step; any that needs no closure of its own.
        rho: Radius of the ball, ``>= 0``; a group that brings an entry ``rho`` keeps it.
        direction: Where the perturbation points; one that needs no clean gradient.
        ball: Norm and metric of the ball; Euclidean by default.
        when: Before which steps the weights are perturbed; all by default.
        model: Gives parameters their names, for metrics that go by them.
        skip_nonfinite: Skip a step with a gradient that is not finite.
        rho_schedule: Sets every group's rho before each step, see ``flatmin.optim.schedules``.
        rounding: How w + eps is rounded in bfloat16 and float16, see ``SharpnessAware``.

    Attributes:
        diagnostics: What the last step saw: counts, and the loss at w + eps where a closure returns it.

    Raises:
        TypeError: ``base`` is no optimizer, is itself sharpness-aware, or drives a closure of its own (LBFGS).
        ValueError: A hyperparameter is outside its domain, a piece asks for the clean gradient, or the direction is the
            base's momentum and it has none.
    """

    def __init__(  # noqa: PLR0913 - each piece is one keyword
        self,
        base: Optimizer,
        rho: float,
        *,
        direction: Direction | None = None,
        ball: Ball | LayerBall | None = None,
        when: When | None = None,
        model: nn.Module | None = None,
        skip_nonfinite: bool = True,
        rho_schedule: RhoSchedule | None = None,
        rounding: Rounding = "stochastic",
    ) -> None:
        check_rounding(rounding)
        self.rounding = rounding
        check_pieces(direction=direction, ball=ball, when=when, model=model, rho_schedule=rho_schedule)
        self.direction = direction or BaseMomentum()
        self.ball = ball or Ball()
        self.when = when or Always()
        self.skip_nonfinite = skip_nonfinite
        self.rho_schedule = rho_schedule
        self.diagnostics = Diagnostics()
        self._check_pieces()
        if isinstance(self.direction, BaseMomentum):
            check_has_moment(base)
        super().__init__(base, {"rho": rho, **self.ball.defaults})
        self._model = model if self.ball.metric.needs_names else None
        self._names = self._names_for_metric()

    _step_supports_amp_scaling = True  # a gradient scaler calls step() also after an overflow, which is counted

    @overload  # type: ignore[override]  # torch types a closure's loss as a float, and every user returns the tensor
    def step(self, closure: None = None, scaler: GradScaler | None = None) -> None: ...

    @overload
    def step(
        self,
        closure: Closure | Sequence[Closure],
        scaler: GradScaler | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> Tensor: ...

    @torch.no_grad()
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        scaler: GradScaler | None = None,
        *,
        reduction: Reduction = "mean",
    ) -> Tensor | None:
        """Take a step with the gradient that ``backward()`` has left, or that a closure computes first.

        Args:
            closure: Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss; called once. One
                that does not zero them adds to those left since the last step. Or a list of them, one per micro-batch.
            scaler: Gradient scaler of the closure's ``scaler.scale(loss).backward()``; ``scaler.update()`` is left to
                the caller.
            reduction: Whether the micro-batches' losses and gradients are averaged or summed.

        Returns:
            With a closure, the loss at w + eps, where the weights rest.

        Raises:
            RuntimeError: No backward pass was run since the last step, or the true weights are on show.
        """
        with self._heeding_scaler():
            if self._is_shown:
                raise RuntimeError("step() must not be called inside unperturbed(): the gradient belongs to w + eps")
            loss = None
            if closure is not None:
                check_reduction(reduction)
                loss = self._loss_of(closure, reduction)
                self.diagnostics.begin_step()
                if isinstance(loss, Tensor):
                    self.diagnostics.loss = loss.detach()
            if only_creates_state(self):
                self._create_state(self.direction.remembers)
            elif has_fresh_gradient(self._params()):
                self._take_step(scaler)
            else:
                raise RuntimeError(
                    "no parameter has a new gradient: backward() must run before each step(). In Lightning, a "
                    "training_step that returns None needs flatmin.integrations.lightning.SharpnessAwareCallback"
                )
            return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer, with its own ``rho`` or the one given to the constructor."""
        super().add_param_group(param_group)
        if self._is_built:
            self._names = self._names_for_metric()

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where an entry of a group is outside its domain."""
        super().check_options(options)
        self.ball.check(options)

    def _loss_of(self, closure: Closure | Sequence[Closure], reduction: Reduction) -> Tensor:
        closures = as_closures(closure)
        is_several = len(closures) > 1
        if not has_fresh_gradient(self._params()):
            self._settle()
        if is_several:
            closures[0] = refusing_leftovers(closures[0], self._params())
        for param in self._params():
            if is_several or not is_fresh(param.grad):
                param.grad = None
        if not is_several:
            return closures[0]()
        return one_after_another(closures, self._params, reduction, lambda: None)()

    def _take_step(self, scaler: GradScaler | None) -> None:
        """Home, the base optimizer's update unless the gradient is not finite, and out again."""
        space = active_space(self.base, self._names, self._memory)
        has_moved = self._rest.has_moved
        self._go_home()
        try:
            scale = remaining_scale(self, scaler)
            if scale is not None:
                unscale_(self, space, scale, scaler)
            if isinstance(self.direction, Observer):
                self.direction.observe(space)
            looks = self.skip_nonfinite or scale is not None
            is_taken = guarded_step(self.base, space, found_inf=self._found_inf, looks=looks)
            self._memory.commit(is_taken, space.owners)
            self.diagnostics.count(has_moved, is_taken)
            if is_taken is not False:
                count_step(self.param_groups)
        finally:
            mark_used(self._params())
            self._perturb()

    def _names_for_metric(self) -> dict[Tensor, str]:
        return names_of(self._model, self.param_groups) if self.ball.metric.needs_names else {}

    def _check_pieces(self) -> None:
        if self.direction.needs_clean_gradient:
            raise ValueError(
                f"direction must need no clean gradient, got {type(self.direction).__name__}: "
                "use flatmin.SharpnessAware, which makes two passes"
            )
        needs_gradient = isinstance(self.ball, LayerBall) and self.ball.joint_vectors
        if needs_gradient or self.ball.depends_on_scale:
            raise ValueError("ball must not depend on the gradient, which is not known when the weights are perturbed")
        if isinstance(self.when, GradientWhen):
            raise ValueError(f"when must go by the number of the step, got {type(self.when).__name__}")
