"""What is known of a step's passes before they run."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.combine import Combine
from flatmin.optim.directions import Direction
from flatmin.optim.host_copies import SaveTo
from flatmin.optim.layers import LayerBall
from flatmin.optim.progress import Progress
from flatmin.optim.rounding import Rounding
from flatmin.optim.schedules import RhoSchedule, set_radii
from flatmin.optim.sync import GradientSync
from flatmin.optim.when import GradientWhen, When


class Pieces(NamedTuple):
    """What makes a method."""

    direction: Direction
    ball: Ball | LayerBall
    when: When | GradientWhen
    combine: Combine

    @property
    def depends_on_scale(self) -> bool:
        """Whether the scale of a scaled loss must be known."""
        return self.ascent_depends_on_scale or self.combine.depends_on_scale

    @property
    def ascent_depends_on_scale(self) -> bool:
        """Whether a scaled loss must be unscaled before the ascent."""
        decides_by_gradient = isinstance(self.when, GradientWhen)
        return self.direction.depends_on_scale or self.ball.depends_on_scale or decides_by_gradient


@dataclass(frozen=True)
class Plan:
    """Tells what the next pass is for, and has its gradients shared accordingly.

    Attributes:
        base: The optimizer whose groups count the steps.
        pieces: The method.
        ascent_steps: Ascents towards the worst point.
        sync: How replicas share gradients; ``None`` where there are none.
        progress: How far the step has come.
        rho_schedule: Sets rho at the beginning of each step.
        rounding: Of perturbed weights in bfloat16 and float16.
        save_to: Where the values at w are kept during the later passes.
    """

    base: Optimizer
    pieces: Pieces
    ascent_steps: int
    sync: GradientSync | None
    progress: Progress
    rho_schedule: RhoSchedule | None = None
    rounding: Rounding = "stochastic"
    save_to: SaveTo = "device"

    def begin_step(self) -> None:
        """Set every group's rho."""
        set_radii(self.rho_schedule, self.base.param_groups)

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        number: int = self.base.param_groups[0]["num_steps"]
        return number

    def asked_in_advance(self) -> bool | None:
        """Whether the step is perturbed; ``None`` where that depends on its gradient."""
        return None if self._when is None else self._when(self.num_steps)

    @cached_property
    def _when(self) -> When | None:
        """The rule that goes by the number of the step, if it does; kept, since asking what it is takes a while."""
        when = self.pieces.when
        return None if isinstance(when, GradientWhen) else when

    @property
    def is_plain(self) -> bool:
        """Whether it is known in advance that the step is not perturbed."""
        return self.asked_in_advance() is False

    @property
    def is_climbing(self) -> bool:
        """Whether the gradient of the next backward pass is for an ascent and nothing else."""
        num_ascents = self.progress.num_ascents
        if num_ascents == 0 and (self.asked_in_advance() is not True or self.pieces.combine.needs_clean_gradient):
            return False
        return num_ascents < self.ascent_steps and not self.progress.is_complete

    def check_micro_batches(self) -> None:
        """Raise ``ValueError`` where each of several micro-batches cannot have a perturbation of its own."""
        if isinstance(self.pieces.when, GradientWhen):
            raise ValueError(
                f"shared_perturbation must be True with {type(self.pieces.when).__name__}, "
                "which decides once for all micro-batches"
            )

    def before_first_pass(self) -> None:
        """Give every replica the buffers that all passes of the step start from."""
        if self.sync is not None:
            self.sync.share_buffers()

    def before_forward(self) -> None:
        """Let DDP average the gradients of the pass that begins where nothing else happens to them first."""
        if self.sync is None:
            return
        progress, is_global = self.progress, self.sync.sync == "global"
        if progress.averages_at_end or progress.is_in_turn:
            self.sync.begin_forward(False)
        elif progress.num_ascents == self.ascent_steps or (progress.is_in_closure and self.is_plain):
            self.sync.begin_forward(is_global or self.is_plain or not self.pieces.combine.needs_clean_gradient)
        else:
            self.sync.begin_forward(is_global)

    def after_forward(self) -> None:
        """A forward pass is over or has failed."""
        if self.sync is not None:
            self.sync.end_forward()
