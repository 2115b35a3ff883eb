"""What the last step saw: was sharpness-aware minimisation even on?"""

from dataclasses import dataclass, fields

from torch import Tensor


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
        cosine: ``<g, g_p> / (||g|| ||g_p||)``.
        perturbation_norm: ``||eps||_2`` as realised after rounding to the parameters' dtype.
        num_steps: Steps so far, in this process.
        num_perturbed_steps: Those of them that perturbed the weights.
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

    def as_dict(self) -> dict[str, float]:
        """The known values as numbers; this waits for the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in values.items() if value is not None}
