"""WSAM: sharpness as a weighted regulariser."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.arguments import check_number
from flatmin.optim.combine import Blend, Combine, Decoupled
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.options import EngineOptions


class WSAM(SharpnessAware):
    """Weighted SAM: the loss plus ``gamma / (1 - gamma)`` times its rise at w + eps.

    Decoupled: a base step with g, then ``w -= lr (gamma / (1 - gamma)) (g_p - g)``. Coupled: a base step with
    ``((1 - 2 gamma) g + gamma g_p) / (1 - gamma)``. Cost: two forward-backward passes a step, and two copies of the
    parameters during the second.

    Args:
        base: The optimizer that takes the step.
        rho: Radius, ``>= 0``. The default is the authors'.
        gamma: In [0, 1); 0 is the base alone, and 1/2 coupled is SAM. The default is the authors'.
        decouple: Keep the sharpness term out of the base's moments, as the paper advises.
        **options: See ``SharpnessAware``.

    References:
        Yue et al. (2023), arXiv:2305.15817, Algorithm 2; intelligent-machine-learning/atorch.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        gamma: float = 0.9,
        decouple: bool = True,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_number("gamma", gamma, "in [0, 1)")
        weight = gamma / (1.0 - gamma)
        combine: Combine = Decoupled(weight) if decouple else Blend(weight)
        super().__init__(base, rho, combine=combine, **options)
