"""ASAM: SAM in a ball that scales with the weights."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.metrics import Adaptive, Scaled
from flatmin.optim.options import EngineOptions
from flatmin.optim.wrapper import check_base


class ASAM(SharpnessAware):
    """Adaptive SAM: ``eps = rho * T^2 g / ||T g||_2`` with ``T = |w| + eta``, invariant to rescaling of layers.

    Cost: two forward-backward passes a step, and one copy of the parameters during the second.

    Args:
        base: The optimizer that takes the step.
        rho: Radius in the scaled norm, ``>= 0``; larger than SAM's. The default is the paper's for CIFAR-10; it
            used 1.0 for CIFAR-100.
        eta: Added to ``|w|``, ``>= 0``; a group entry. The default is that of the authors' class.
        scaled: Which parameters are scaled, see ``flatmin.optim.Adaptive``. The default is the authors' rule, by name:
            give ``model=`` or build the base from ``model.named_parameters()``.
        p: Order of the norm, from 1 to infinity.
        **options: See ``SharpnessAware``.

    References:
        Kwon et al. (2021), arXiv:2102.11600, Algorithm 1; SamsungLabs/ASAM.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.5,
        *,
        eta: float = 0.01,
        scaled: Scaled = "weights",
        p: float = 2.0,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_base(base)  # here too: a class and its keywords would fail for a keyword
        super().__init__(base, rho, ball=Ball(p, Adaptive(eta, scaled)), **options)
