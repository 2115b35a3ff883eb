"""LE-SAM: a radius of equal rise of the linearised loss."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.options import EngineOptions
from flatmin.optim.radii import FirstOrderGain


class LESAM(SharpnessAware):
    """LE-SAM: ``eps = min(sigma_t / (||g|| + delta), rho) g / ||g||``, so that the linearised loss rises by sigma_t.

    ``sigma_t`` falls from sigma to 0 along half a cosine, from ``decay_start`` on. Cost: two forward-backward passes a
    step, and one copy of the parameters during the second.

    The defaults of sigma and rho are ours: with a gradient of length 1 they give SAM's radius. The authors have sigma
    0.1 and rho 0.05 in their class, 0.35 and 0.3 in their script, and 0.35 without a limit in the README's command for
    CIFAR-100 (ResNet-18, 200 epochs). There sigma rises over the first 10 epochs, stays, and falls over the last 40.

    Args:
        base: The optimizer that takes the step.
        rho: Largest radius, ``>= 0``.
        sigma: Rise of the linearised loss at first, ``>= 0``; a group entry.
        num_steps: Steps of the whole training; ``None`` for a sigma_t that stays.
        delta: Added to the gradient's length, ``>= 0``. The default is that of the authors' class.
        decay_start: Share of training before sigma_t begins to fall, in [0, 1); 0.8 is the authors' script's.
        **options: See ``SharpnessAware``.

    References:
        Wang et al. (2026), ICML, arXiv:2605.10183; smithgun2005/LE-SAM-ICML2026, ``lesam.py``.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.5,
        *,
        sigma: float = 0.05,
        num_steps: int | None = None,
        delta: float = 1e-12,
        decay_start: float = 0.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        radius = FirstOrderGain(sigma, num_steps, delta, decay_start)
        super().__init__(base, rho, ball=Ball(radius=radius), **options)
