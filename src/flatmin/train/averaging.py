"""An exponential moving average of parameters and buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["MovingAverage", "averaged"]


def averaged(model: nn.Module, decay: float, *, ramp: bool = False, start: int = 0) -> MovingAverage:
    """Average the parameters and buffers of ``model`` from its next update on.

    ``a <- d_t a + (1 - d_t) w`` after step s = 1, 2, … with ``t = s - start``, and ``a <- w`` while t < 0. Without a
    ramp ``d_t = decay``, and the average starts as a copy of the first weights it sees. With one
    ``d_t = min(decay, (1 + t) / (10 + t))``, and it starts at the weights that ``model`` has now, as TensorFlow's
    ``ExponentialMovingAverage`` does with its ``num_updates``.

    Args:
        model: What to average; call ``update_parameters(model)`` after every step.
        decay: In [0, 1).
        ramp: Let the decay rise.
        start: Steps during which the average is a copy.

    References:
        google-research/sam, ``sam_jax/efficientnet/optim.py``, where ``start`` is 1560.
    """
    return MovingAverage(model, decay, ramp=ramp, start=start)


class MovingAverage(AveragedModel):
    """See ``averaged``. The count stays on the CPU, where torch's own update would send it to the GPU and wait."""

    def __init__(self, model: nn.Module, decay: float, *, ramp: bool, start: int) -> None:
        super().__init__(model, use_buffers=True)
        self.decay, self.ramp, self.start = decay, ramp, start
        self.n_averaged.fill_(self._num_before)

    @property
    def _num_before(self) -> int:
        return 1 if self.ramp else 0  # the initial weights count as the first of the averages

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights after one more step."""
        share = self._share_of_new(int(self.n_averaged))
        moved: tuple[list[Tensor], list[Tensor]] = ([], [])
        copied: tuple[list[Tensor], list[Tensor]] = ([], [])  # counts too, such as that of batch norm
        own, new = ([*each.parameters(), *each.buffers()] for each in (self.module, model))
        for average, value in zip(own, new, strict=True):
            averages, values = moved if share < 1.0 and average.is_floating_point() else copied
            averages.append(average)
            values.append(value)
        if moved[0]:
            changes = torch._foreach_sub(moved[1], moved[0])
            torch._foreach_add_(moved[0], changes, alpha=share)
        if copied[0]:
            torch._foreach_copy_(*copied)
        self.n_averaged += 1

    def _share_of_new(self, num_averaged: int) -> float:
        """``1 - d_t``, without the rounding that would come with a decay near 1 in float32."""
        t = num_averaged + 1 - self._num_before - self.start
        if t < 0 or num_averaged == 0:
            return 1.0
        return max(9.0 / (10.0 + t), 1.0 - self.decay) if self.ramp else 1.0 - self.decay
