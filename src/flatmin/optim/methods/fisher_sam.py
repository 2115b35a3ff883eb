"""Fisher SAM: SAM in a ball shaped by the curvature of the batch."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.metrics import Fisher
from flatmin.optim.options import EngineOptions


class FisherSAM(SharpnessAware):
    """Fisher SAM: ``eps = rho F^-1 g / sqrt(g^T F^-1 g)`` with ``F = g^2 + eta``, entry by entry.

    Cost: two forward-backward passes a step, and one copy of the parameters during the second.

    Args:
        base: The optimizer that takes the step.
        rho: Radius in the Fisher norm, ``>= 0``. The default is that of a port, SimonDufLab/LLQR; the authors released
            no code.
        eta: Added to ``g^2``, ``> 0``; a group entry. The default is that of the same port. The paper is quoted with
            radius 0.1 and eta 1, which makes the ball nearly round.
        **options: See ``SharpnessAware``.

    References:
        Kim et al. (2022), arXiv:2206.04920, Algorithm 1.
    """

    def __init__(
        self, base: Optimizer, rho: float = 0.1, *, eta: float = 0.1, **options: Unpack[EngineOptions]
    ) -> None:
        super().__init__(base, rho, ball=Ball(metric=Fisher(eta)), **options)
