"""A sharpness-aware step as a function of tensors, made of the same pieces as the engine: what gets compiled."""

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map

from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.functional_model import FunctionalModel, LossModule
from flatmin.optim.norms import joint_norm
from flatmin.optim.scene import Given, Scene
from flatmin.optim.space import Space
from flatmin.optim.where import masked


class Passes(NamedTuple):
    """What the passes of a step, or of a micro-batch, find.

    Attributes:
        loss: At w.
        last_loss: At the last point reached.
        followed: The gradient to follow of each parameter that has one.
        corrections: What is followed after the base optimizer's step, likewise; empty for nothing.
        remembered: What pieces keep, in the order of ``Memory.totals``.
        measured: Norms and cosine by their names in ``Diagnostics``.
        buffers: The changed buffers after the first pass.
    """

    loss: Tensor
    last_loss: Tensor
    followed: list[Tensor]
    corrections: list[Tensor]
    remembered: list[Tensor]
    measured: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Outcome(NamedTuple):
    """What a step returns: two losses, whether the base took its step (0-dim boolean), and norms and cosine."""

    loss: Tensor
    last_loss: Tensor
    is_taken: Tensor
    measured: dict[str, Tensor]


class FunctionalStep:
    """One step of an optimizer, which is left alone: only the tensors given are read and written.

    Args:
        optimizer: Says which pieces, and what the base optimizer does.
        losses: The model with its loss function.
        is_perturbed: What ``when`` says of the step.
        num_micro_batches: Equal parts of the batch with a perturbation each, worked on at the same time.
    """

    def __init__(
        self, optimizer: SharpnessAware, losses: LossModule, is_perturbed: bool, num_micro_batches: int = 1
    ) -> None:
        self.optimizer = optimizer
        self.plan = optimizer._passes.plan
        self.measures = optimizer._passes._collects_norms
        self.is_perturbed = is_perturbed
        self.num_micro_batches = num_micro_batches
        self.model = FunctionalModel(losses, list(optimizer._params()), is_batched=num_micro_batches > 1)

    @torch.no_grad()
    def __call__(self, given: Given) -> Outcome:
        """Take the step."""
        scene = Scene(self.optimizer.base, self.optimizer._passes.names, given)
        found = self.passes(scene, given) if self.num_micro_batches == 1 else self.passes_at_once(scene, given)
        owners = self.model.used(scene.weights)
        scene.step_base(owners, found.followed, found.corrections)
        is_taken = all_finite(found.followed) if self.optimizer.skip_nonfinite else None
        scene.write(scene.weights, found.buffers, is_taken)
        if is_taken is None:
            is_taken = torch.ones_like(found.loss, dtype=torch.bool)
        return Outcome(found.loss, found.last_loss, is_taken, found.measured)

    def passes(self, scene: Scene, given: Given) -> Passes:
        """From w to the gradient to follow."""
        combine, diagnostics = self.plan.pieces.combine, Diagnostics()
        loss, grads, buffers = self.model.evaluate(given, scene.weights)
        space = scene.space(grads)
        last_loss, clean, corrections = loss, [], None
        if self.is_perturbed:
            keeps_clean = combine.needs_clean_gradient or self.measures
            clean = list(space.grads) if keeps_clean else []
            last_loss, grads, way = self.climb(scene, given, space)
            space = scene.space(grads)
            if self.measures:
                diagnostics.perturbation_norm = joint_norm(way)
        if self.measures:
            diagnostics.measure_gradients(space, clean)
        if self.is_perturbed:
            corrections = combine.correction(space, clean, space.grads)
            followed = combine(space, clean, space.grads)
        else:
            followed = combine.plain(space, space.grads)
        known = {field.name: getattr(diagnostics, field.name) for field in fields(diagnostics)}
        measured = {name: value for name, value in known.items() if isinstance(value, Tensor)}
        return Passes(loss, last_loss, followed, corrections or [], scene.memory.totals(), measured, buffers)

    def passes_at_once(self, scene: Scene, given: Given) -> Passes:
        """The same of every micro-batch side by side, and the mean over them; norms are those of the last one."""
        parts = tree_map(lambda leaf: leaf.unflatten(0, (self.num_micro_batches, -1)), given.batch)
        one = lambda part: self.passes(scene, given._replace(batch=part))  # noqa: E731 - a name for vmap's argument
        found = vmap(one, randomness="different")(parts)
        last = {name: value[-1] for name, value in found.measured.items()}
        mean = tree_map(lambda value: value.mean(dim=0), found._replace(measured={}))
        scene.memory.replace_found(mean.remembered)
        return Passes(*mean._replace(measured=last))

    def climb(self, scene: Scene, given: Given, space: Space) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        """From the gradient at w to loss and gradient at the worst point, and the perturbation on the way there."""
        pieces, points = self.plan.pieces, list(scene.weights)
        place = {id(weight): index for index, weight in enumerate(points)}
        scaling: list[Tensor] | None = None
        for number in range(self.plan.ascent_steps):
            moved = space.perturbed()
            scaling = pieces.ball.metric.scaling(moved) if number == 0 else scaling
            step = pieces.ball.farthest(moved, masked(moved, pieces.direction(moved)), scaling)
            here = [points[place[id(owner)]] for owner in moved.owners]
            eps = [tensor * scale for tensor, scale in zip(step.tensors, step.scales, strict=True)]
            if number > 0:
                onward = [p - w + e for p, w, e in zip(here, moved.params, eps, strict=True)]
                eps = pieces.ball.project(moved, onward, scaling)
            for owner, old, e in zip(moved.owners, here, eps, strict=True):
                points[place[id(owner)]] = torch.where(step.is_finite, owner + e, old)
            is_finite = space.finite_with_rest(step.is_finite)
            loss, grads, _ = self.model.evaluate(given, points)
            _spoil(grads, is_finite)
            space = scene.space(grads)
        way = [points[place[id(owner)]] - owner for owner in space.perturbed().owners]
        return loss, grads, way


def _spoil(grads: list[Tensor | None], is_finite: Tensor) -> None:
    """Make a gradient NaN where an earlier one was not finite, so that the step is skipped as the engine's is."""
    index, first = next((index, grad) for index, grad in enumerate(grads) if grad is not None)
    grads[index] = first.masked_fill(is_finite.logical_not(), torch.nan)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether no entry of any is infinite or NaN, 0-dim."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
