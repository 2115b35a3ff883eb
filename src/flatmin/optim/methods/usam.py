"""USAM: the perturbation without normalisation, and what lies between the two."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.options import EngineOptions
from flatmin.optim.radii import Unified


class USAM(SharpnessAware):
    """Unnormalised and unified SAM: ``eps = rho (1 - lambda + lambda / ||g||) g``.

    Cost: two forward-backward passes a step, and one copy of the parameters during the second.

    Args:
        base: The optimizer that takes the step.
        rho: Factor of the gradient, ``>= 0``. The default is SAM's number, but it does not transfer: SAM's perturbation
            has length rho. The authors of the family report results with 0.2 (WRN-28-10, CIFAR-10).
        share: lambda in [0, 1]; 0 is USAM, 1 is SAM, ``None`` is ``1 - 1/t`` in step t = 1, 2, …, the choice of the
            family's authors.
        **options: See ``SharpnessAware``.

    References:
        Andriushchenko and Flammarion (2022), arXiv:2206.06232; the family: Oikonomou and Loizou (2025),
        arXiv:2503.02225.
    """

    def __init__(
        self, base: Optimizer, rho: float = 0.05, *, share: float | None = 0.0, **options: Unpack[EngineOptions]
    ) -> None:
        super().__init__(base, rho, ball=Ball(radius=Unified(share)), **options)
