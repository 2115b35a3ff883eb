"""The passes of one step: from w to w + eps and back, with the gradient to follow."""

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from flatmin.optim.accumulation import GradientSum, Reduction, as_kept
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.freshness import has_fresh_gradient, mark_used
from flatmin.optim.memory import Memory
from flatmin.optim.overflow import Overflow
from flatmin.optim.plan import Plan
from flatmin.optim.replay import Replay
from flatmin.optim.seeding import seed_of
from flatmin.optim.sharding import mean_over_mesh
from flatmin.optim.space import Space, active_space, as_owned, every_space
from flatmin.optim.sync import GradientSync
from flatmin.optim.visit import Visit
from flatmin.optim.when import GradientWhen
from flatmin.optim.where import masked


class TwoPass:
    """Takes the parameters of an optimizer to the worst point and back.

    Args:
        plan: The method, and the base optimizer whose parameters they are. Not the optimizer around it: an object that
            refers to it would keep its memory until the next garbage collection.
        model: The module that the passes call, if known.
        collects_norms: Whether diagnostics measure the gradients.
    """

    def __init__(self, plan: Plan, model: nn.Module | None, *, collects_norms: bool) -> None:
        self.plan = plan
        self.progress = plan.progress
        self.sync = plan.sync
        self.names: Mapping[Tensor, str] = {}
        self.diagnostics = Diagnostics()
        self.sum = GradientSum()
        self.memory = Memory(plan.base)
        self.visit = Visit()
        self.overflow = Overflow()
        self.replay = Replay(model, plan) if model is not None else None
        self._keeps_clean = collects_norms or plan.pieces.combine.needs_clean_gradient
        self._collects_norms = collects_norms

    def attach(self, model: nn.Module, sync: GradientSync | None) -> None:
        """The passes call this model from now on, whose replicas share gradients as ``sync`` says."""
        self.plan = replace(self.plan, sync=sync)
        self.sync = sync
        self.replay = Replay(model, self.plan)

    def begin(self, *, is_in_closure: bool = False, averages_at_end: bool = False) -> None:
        """The passes of a step, or of a micro-batch, start at w."""
        progress = self.progress
        self.plan.begin_step()
        progress.is_perturbed = self.plan.asked_in_advance()
        progress.is_in_closure, progress.averages_at_end = is_in_closure, averages_at_end
        if is_in_closure and self.replay is not None:
            self.replay.begin(in_closure=True)
        if is_in_closure and progress.is_perturbed and self.plan.save_to == "host":  # while the first pass runs
            self.visit.save_to_host(every_space(self.plan.base, {}, self.memory).perturbed().params)

    def decide(self) -> bool:
        """After the first pass: whether the step is perturbed."""
        self.require_backward()
        when, progress = self.plan.pieces.when, self.progress
        if progress.is_perturbed is None:
            assert isinstance(when, GradientWhen)
            space = self._unscaled(self.space())
            norm = space.norm(space.grads)
            norm = norm if self.sync is None else self.sync.mean(norm)
            length = float(norm)
            if not math.isfinite(length):  # no ascent will look at it, and a loop's next pass at w must not hide it
                self.overflow.announce(norm.isfinite(), space.owners)
            progress.notes = ChainMap({}, self.plan.base.param_groups[0])
            progress.is_perturbed = math.isfinite(length) and when.decide(self.plan.num_steps, length, progress.notes)
        return progress.is_perturbed

    def ascend(self, *, keeps_grads: bool) -> None:
        """From the gradient of a pass: climb, and make ready for the next pass."""
        self.require_backward()
        progress, pieces = self.progress, self.plan.pieces
        if self.sync is not None and not self.sync.has_shared:
            self.sync.share_ascent(list(self.params()))
        space = self.space()
        if progress.num_ascents == 0 and progress.is_perturbed and self._keeps_clean:
            grads = zip(space.owners, space.grads, strict=True)
            progress.clean = {owner: grad.clone() if keeps_grads else as_kept(grad) for owner, grad in grads}
        if keeps_grads:
            mark_used(self.params())
        else:
            self.clear_gradients()
        if progress.is_perturbed:
            moved = self._unscaled(space).perturbed()
            progress.has_moved = any(group.radius != 0.0 for group in moved.groups)
            if moved.groups:
                is_last = progress.num_ascents + 1 == self.plan.ascent_steps
                if self.plan.save_to == "host" and progress.num_ascents == 0:
                    self.visit.save_to_host(moved.params)
                direction = masked(moved, pieces.direction(moved))
                is_finite = self.visit.ascend(moved, direction, pieces.ball, is_last=is_last, seed=self._seed())
                self.overflow.announce(space.finite_with_rest(is_finite), space.owners)
        progress.num_ascents += 1
        if self.replay is not None:
            self.replay.rewind()

    @torch.no_grad()
    def descend(self, *, is_unscaled: bool = False) -> None:
        """From the gradient of the last pass: go home, and make the gradient to follow.

        Args:
            is_unscaled: The caller has unscaled the gradient since.
        """
        self.require_backward()
        progress, combine = self.progress, self.plan.pieces.combine
        if self._collects_norms and progress.is_perturbed:
            self.diagnostics.perturbation_norm = self.visit.length()
        self.visit.go_home()
        if self.replay is not None:
            self.replay.finish()
        self.overflow.deliver(self.params())
        if self.needs_averaging:
            self._share_before_combining()
        completed = self._complete_gradients()
        space = self.space()
        if is_unscaled:
            space = replace(space, loss_scale=None)
        clean = self._clean(space, is_unscaled)
        if self._collects_norms:
            self.diagnostics.measure_gradients(space, clean)
        if progress.is_perturbed:
            corrections = combine.correction(space, clean, space.grads)
            progress.corrections.add(space.owners, corrections, progress.loss_scale, is_unscaled=is_unscaled)
            self._follow(space, combine(space, clean, space.grads))
        else:
            self._follow(space, combine.plain(space, space.grads))
        if not combine.needs_clean_gradient:  # diagnostics alone have asked for them
            for owner in completed:
                owner.grad = None
        if self.sync is not None and progress.is_perturbed and not progress.averages_at_end:
            self._share_after_combining()
        progress.end_passes()

    def set_aside(self) -> None:
        """Keep the gradient to follow of a micro-batch; the next one's passes start at w."""
        self.sum.take(self.params())
        self.progress.is_complete = False

    def gather(self, reduction: Reduction) -> None:
        """All micro-batches are over: their mean or sum is the gradient to follow."""
        if not self.sum.num_terms:
            return
        self.progress.corrections.divide_(self.sum.num_terms if reduction == "mean" else 1)
        self.sum.give(reduction)
        if self.sync is not None and self.progress.averages_at_end:
            self._share_after_combining()
        self.progress.is_complete = True

    @property
    def needs_averaging(self) -> bool:
        """Whether the replicas' present gradients differ, and it is for us to average them."""
        return self.sync is not None and not self.sync.has_shared

    def _share_before_combining(self) -> None:
        """Both gradients of a combination belong to the same replicas; those of a plain step to all."""
        assert self.sync is not None
        if not self.progress.is_perturbed:
            self.sync.average(list(self.params()))
        elif self.plan.pieces.combine.needs_clean_gradient:
            self.sync.share_ascent(list(self.params()))

    def _share_after_combining(self) -> None:
        """Give every replica the mean of what they have found: gradients, corrections, and what pieces remember."""
        assert self.sync is not None
        if self.needs_averaging:
            self.sync.average(list(self.params()))
        if self.sync.sync != "global":
            self.sync.average_tensors([*self.progress.corrections.tensors(), *self.memory.totals()])

    def give_up(self) -> None:
        """Back to w, with buffers and generators as the first pass left them; the gradients count as used."""
        with torch.no_grad():
            self.visit.go_home()
        if self.replay is not None:
            self.replay.finish()
        self.forget()
        self.memory.discard()
        mark_used(self.params())

    def forget(self) -> None:
        """The step is over or given up."""
        self.overflow.close()
        self.progress.forget()
        self.sum = GradientSum()
        if self.sync is not None:
            self.sync.finish()

    def mean_over_processes(self, value: Tensor) -> Tensor:
        """The mean of what each process finds on its own data, for decisions on which they must agree; 0-dim."""
        return mean_over_mesh(value, self.params()) if self.sync is None else self.sync.mean(value)

    def space(self) -> Space:
        """The parameters that have a gradient now."""
        return active_space(self.plan.base, self.names, self.memory, self.progress.loss_scale)

    def params(self) -> Iterator[Tensor]:
        """All parameters of the optimizer."""
        return (param for group in self.plan.base.param_groups for param in group["params"])

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.params()).device

    @property
    def model(self) -> nn.Module | None:
        """The module that the passes call, if known."""
        return None if self.replay is None else self.replay.model

    def clear_gradients(self) -> None:
        """Set every gradient to ``None``."""
        for param in self.params():
            param.grad = None

    def require_backward(self) -> None:
        """Refuse gradients that a step has used already.

        Raises:
            RuntimeError: No parameter has a new one.
        """
        if not has_fresh_gradient(self.params()):
            self.give_up()  # also between the two steps, where the caller may go on after the error
            raise RuntimeError(
                "no parameter has a new gradient: backward() must run before the first step, again at w + eps, "
                "and inside a closure; and some parameter must require a gradient. In Lightning, a training_step that "
                "returns None needs flatmin.integrations.lightning.SharpnessAwareCallback"
            )

    def _seed(self) -> int | None:
        """Of the rounding of weights in narrow dtypes: another one for each ascent, the same on every process."""
        numbers = self.plan.num_steps, self.sum.num_terms, self.progress.num_ascents
        return seed_of(*numbers) if self.plan.rounding == "stochastic" else None

    def _unscaled(self, space: Space) -> Space:
        """The space with gradients that carry no loss scale, where a piece depends on that."""
        if space.loss_scale is None or not self.plan.pieces.ascent_depends_on_scale:
            return space
        inverse = 1 / space.loss_scale
        groups = [replace(g, grads=[grad * inverse.to(grad.device) for grad in g.grads]) for g in space.groups]
        return replace(space, groups=groups, loss_scale=None)

    def _clean(self, space: Space, is_unscaled: bool) -> list[Tensor]:
        """The clean gradient of each parameter; zero where it had none, and nothing where it was not kept."""
        if not self.progress.clean:
            return []
        clean = [self.progress.clean.get(owner) for owner in space.owners]
        scale = self.progress.loss_scale
        if is_unscaled and scale is not None:
            clean = [None if grad is None else grad / scale.to(grad.device) for grad in clean]
        elif is_unscaled and self.plan.pieces.combine.needs_clean_gradient:
            self.give_up()
            raise RuntimeError(
                f"{type(self.plan.pieces.combine).__name__} combines both gradients, and one was unscaled: "
                "pass the scaler to the first step as well, first_step(scaler=scaler)"
            )
        return [torch.zeros_like(g_p) if g is None else g for g, g_p in zip(clean, space.grads, strict=True)]

    def _complete_gradients(self) -> list[Tensor]:
        """Give zeros to the parameters on which the loss at w depends and that at w + eps does not; returns them."""
        missing = [owner for owner in self.progress.clean if owner.grad is None]
        for owner in missing:
            owner.grad = torch.zeros_like(owner)
        return missing

    def _follow(self, space: Space, followed: list[Tensor]) -> None:
        for owner, grad, new in zip(space.owners, space.grads, followed, strict=True):
            if new is not grad:
                owner.grad = as_owned(new, owner)
