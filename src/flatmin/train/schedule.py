"""The learning rate as a pure function of the step, so that nothing of it needs saving."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(step: int, *, peak: float, num_steps: int, num_warmup_steps: int = 0) -> float:
    """Linear warm-up from zero to ``peak``, then half a cosine down to zero at ``num_steps``.

    Args:
        step: Index of the optimizer step about to be taken, from 0.
        peak: Largest learning rate.
        num_steps: Steps of the whole run.
        num_warmup_steps: Steps of the warm-up, at the end of which the rate is ``peak``.

    References:
        Foret et al. (2021), arXiv:2010.01412, Appendix C.1; per step as in the authors' release.
    """
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
