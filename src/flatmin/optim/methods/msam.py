"""Momentum-SAM: perturb along the base optimizer's momentum, at the cost of plain training."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.directions import BaseMomentum
from flatmin.optim.metrics import Adaptive, Scaled
from flatmin.optim.one_pass import OnePass
from flatmin.optim.options import OnePassOptions


class MSAM(OnePass):
    """Momentum-SAM: ``eps = -rho v / ||v||`` with the base's first moment v, between steps.

    Cost: one forward-backward pass a step. The weights rest at w + eps, and one copy of them, w, is kept.

    Args:
        base: The optimizer that takes the step; one with a first moment (SGD with momentum, Adam, AdamW, NAdam, …).
        rho: Radius, ``>= 0``; far larger than SAM's. The default is the paper's for SGD; it used 1 with AdamW on
            ImageNet, and 0.3 is the default of the authors' class.
        **options: See ``OnePass``.

    References:
        Becker et al. (2024), arXiv:2401.12033, Algorithm 1; MarlonBecker/MSAM.
    """

    def __init__(self, base: Optimizer, rho: float = 3.0, **options: Unpack[OnePassOptions]) -> None:
        super().__init__(base, rho, direction=BaseMomentum(), **options)


class AdaptiveMSAM(OnePass):
    """Momentum-SAM in ASAM's ball: ``eps = -rho T^2 v / ||T v||`` with ``T = |w| + eta``.

    Cost: as ``MSAM``.

    Args:
        base: As for ``MSAM``.
        rho: Radius in the scaled norm, ``>= 0``. The default is MSAM's.
        eta: Added to ``|w|``, ``>= 0``; a group entry. The default is that of ASAM's authors.
        scaled: Which parameters are scaled, see ``flatmin.optim.Adaptive``; every one by default, for which no names
            are needed.
        **options: As for ``MSAM``.

    References:
        Becker et al. (2024), arXiv:2401.12033, Table 3.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 3.0,
        *,
        eta: float = 0.01,
        scaled: Scaled = "all",
        **options: Unpack[OnePassOptions],
    ) -> None:
        super().__init__(base, rho, direction=BaseMomentum(), ball=Ball(metric=Adaptive(eta, scaled)), **options)
