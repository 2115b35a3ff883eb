"""SAM-ON: perturb the normalisation layers only."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.balls import Ball
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.groups import is_perturbed
from flatmin.optim.metrics import Adaptive, Identity
from flatmin.optim.options import EngineOptions


class SAMON(SharpnessAware):
    """SAM-ON: SAM, or ASAM, whose perturbation lies in the parameters of the normalisation layers.

    The base is built from ``flatmin.param_groups(model, "norm")``; norms are over those parameters alone. Cost: two
    forward-backward passes a step; the copy during the second is that of the norm layers, below 0.1 % of a network.

    Args:
        base: The optimizer that takes the step; its groups say what is perturbed.
        rho: Radius, ``>= 0``; about ten times SAM's, say the authors. The default is ten times that of SAM.
        adaptive: In ASAM's ball, for every parameter of the layers.
        eta: Added to ``|w|`` where adaptive, ``>= 0``; a group entry. The default is that of ASAM's authors.
        **options: See ``SharpnessAware``.

    Raises:
        ValueError: No group of the base is left out of the perturbation, so this would be SAM.

    References:
        Mueller et al. (2023), arXiv:2306.04226; mueller-mp/SAM-ON.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.5,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
        **options: Unpack[EngineOptions],
    ) -> None:
        metric = Adaptive(eta, "all") if adaptive else Identity()
        groups = getattr(base, "param_groups", [{"perturb": False}])  # what is no optimizer is refused by name later
        if all(is_perturbed(group) for group in groups):
            raise ValueError(
                'base must have groups with perturb=False: build it from flatmin.param_groups(model, "norm")'
            )
        super().__init__(base, rho, ball=Ball(metric=metric), **options)
