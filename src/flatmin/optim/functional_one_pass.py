"""A one-pass step as a function of tensors, made of the same pieces as ``OnePass``: what gets compiled."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flatmin.optim.functional_model import FunctionalModel, LossModule
from flatmin.optim.functional_step import Outcome, all_finite
from flatmin.optim.one_pass import OnePass
from flatmin.optim.scene import Given, Scene
from flatmin.optim.where import masked


class FunctionalOnePass:
    """One step of an optimizer, which is left alone: only the tensors given are read and written.

    Args:
        optimizer: Says which pieces, and what the base optimizer does.
        losses: The model with its loss function.
    """

    def __init__(self, optimizer: OnePass, losses: LossModule) -> None:
        self.optimizer = optimizer
        self.model = FunctionalModel(losses, list(optimizer._params()))

    @torch.no_grad()
    def __call__(self, given: Given) -> Outcome:
        """Take the step: the gradient at w + eps, the base's update of w, and out along the new direction."""
        names: Mapping[Tensor, str] = self.optimizer._names
        scene = Scene(self.optimizer.base, names, given)
        loss, grads, buffers = self.model.evaluate(given, given.weights)
        followed = [grad for grad in grads if grad is not None]
        scene.step_base(self.model.used(scene.weights), followed, [])
        is_taken = torch.ones_like(loss, dtype=torch.bool)
        if self.optimizer.skip_nonfinite:
            is_taken = all_finite(followed)
            scene.undo_unless(is_taken)
        scene.write(self.points(scene), buffers, None)
        for true, weight in zip(given.true, scene.weights, strict=True):
            true.copy_(weight)
        return Outcome(loss, loss.clone(), is_taken, {})

    def points(self, scene: Scene) -> list[Tensor]:
        """Where the weights rest: w + eps."""
        ball, space = self.optimizer.ball, scene.trainable().perturbed()
        direction = masked(space, self.optimizer.direction(space))
        step = ball.farthest(space, direction, ball.metric.scaling(space))
        moved = {
            id(owner): torch.where(step.is_finite, owner + tensor * scale, owner)
            for owner, tensor, scale in zip(space.owners, step.tensors, step.scales, strict=True)
        }
        return [moved.get(id(weight), weight) for weight in scene.weights]
