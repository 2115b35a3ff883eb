"""What the last step saw: was sharpness-aware minimisation even on?"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from flatmin.optim.norms import cosine_of
from flatmin.optim.space import Space


@dataclass
class Diagnostics:
    """Values of the last step, as 0-dim tensors on the device so that collecting them never waits for it.

    The losses are known where closures return them. The norms and the cosine are collected with ``diagnostics=True``,
    at the cost of keeping the clean gradient through the second pass and of reading it again.

    Attributes:
        loss: Loss at w.
        loss_rise: Loss at w + eps minus loss at w, on the same batch.
        gradient_norm: ``||g||_2`` at w.
        perturbed_gradient_norm: ``||g_p||_2`` at w + eps.
        cosine: ``<g, g_p> / (||g|| ||g_p||)``; 0 where one of them is zero.
        perturbation_norm: ``||eps||_2`` as realised after rounding to the parameters' dtype.
        num_steps: Steps so far, in this process.
        num_perturbed_steps: Those of them that ``when`` perturbed with a radius other than 0 somewhere.
        num_skipped_steps: Those of them that were skipped because a gradient was not finite; a 0-dim tensor where the
            device decided it.
    """

    loss: Tensor | None = None
    loss_rise: Tensor | None = None
    gradient_norm: Tensor | None = None
    perturbed_gradient_norm: Tensor | None = None
    cosine: Tensor | None = None
    perturbation_norm: Tensor | None = None
    num_steps: int = 0
    num_perturbed_steps: int = 0
    num_skipped_steps: int | Tensor = 0

    def begin_step(self) -> None:
        """Forget the values of the last step, not the counts."""
        self.loss = self.loss_rise = self.cosine = None
        self.gradient_norm = self.perturbed_gradient_norm = self.perturbation_norm = None

    def count(self, is_perturbed: bool, is_taken: bool | Tensor) -> None:
        """A step is over."""
        self.num_steps += 1
        self.num_perturbed_steps += is_perturbed
        self.num_skipped_steps += is_taken.logical_not() if isinstance(is_taken, Tensor) else not is_taken

    def measure_losses(self, loss: Tensor, perturbed_loss: Tensor | None) -> None:
        """Take the loss at w, and its rise where a second pass was run."""
        self.loss = loss
        self.loss_rise = None if perturbed_loss is None else perturbed_loss - loss

    def measure_gradients(self, space: Space, clean: Sequence[Tensor]) -> None:
        """Take the lengths of g and g_p and their cosine; g alone where the step is plain."""
        if not clean:
            self.gradient_norm = space.norm(space.grads)
        else:
            self.gradient_norm, self.perturbed_gradient_norm = space.norm(clean), space.norm(space.grads)
            dot = space.dot(clean, space.grads)
            self.cosine = cosine_of(self.gradient_norm, self.perturbed_gradient_norm, dot)
        if space.loss_scale is not None:
            self.unscale(space.loss_scale)

    def unscale(self, scale: Tensor | None) -> None:
        """The gradients came from a loss scaled by a factor; ``None`` where nobody knows it any more."""
        for name in ("gradient_norm", "perturbed_gradient_norm"):
            norm = getattr(self, name)
            setattr(self, name, None if norm is None or scale is None else norm / scale.to(norm.device))

    def as_dict(self) -> dict[str, float]:
        """The known values as numbers; this waits for the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}
