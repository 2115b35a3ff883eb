"""AE-SAM: SAM where the gradient is large for its time, plain steps elsewhere."""

from typing import Unpack

from torch.optim import Optimizer

from flatmin.optim.engine import SharpnessAware
from flatmin.optim.options import FixedWhenOptions
from flatmin.optim.when import LargeGradient


class AESAM(SharpnessAware):
    """Adaptive policy to employ SAM: perturb where ``||g||^2 >= mu + c_t sigma``.

    mu and sigma^2 are running mean and variance of ``||g||^2``; ``c_t`` goes linearly from ``c_start`` to ``c_end``.
    The host waits for the norm once a step. Cost: between one and two forward-backward passes a step, about 1.5.

    Args:
        base: The optimizer that takes the step.
        rho: Radius, ``>= 0``. The default is SAM's.
        num_steps: Steps of the whole training.
        decay: Weight of the old mean and variance, in [0, 1); the paper's delta. This default and the two below are
            the values quoted for the paper's experiments; no code of the authors was at hand to check them.
        c_start: Threshold at the beginning, in standard deviations; the paper's lambda_2.
        c_end: Threshold at the end; the paper's lambda_1.
        **options: See ``SharpnessAware``.

    References:
        Jiang et al. (2023), ICLR, arXiv:2304.14647, Algorithm 1.
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        num_steps: int,
        decay: float = 0.9,
        c_start: float = 1.0,
        c_end: float = -1.0,
        **options: Unpack[FixedWhenOptions],
    ) -> None:
        super().__init__(base, rho, when=LargeGradient(num_steps, decay, c_start, c_end), **options)
