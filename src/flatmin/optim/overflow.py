"""Carry a gradient that is not finite from one pass of a step into the next."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flatmin.optim.sharding import local

_NUM_CARRIERS = 4  # parameters that are tried; one that gets a gradient in the next pass is enough


class Overflow:
    """Makes the next pass's gradient NaN where an earlier one was not finite, on the device and without waiting for it.

    A gradient scaler looks at the last gradient only, and replicas agree on the last gradient only: whatever made an
    earlier pass worthless must show there, before the replicas average it. So the first of a few parameters that
    receives its gradient passes the news on.
    """

    def __init__(self) -> None:
        self._is_finite: Tensor | None = None
        self._num_announced = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def announce(self, is_finite: Tensor, owners: Sequence[Tensor]) -> None:
        """A pass found a gradient that was finite or not.

        Args:
            is_finite: 0-dim boolean tensor.
            owners: The parameters that had a gradient.
        """
        self.close()
        if is_finite.device.type == "cpu" and is_finite:  # known without waiting: there is nothing to pass on
            return
        self._is_finite = is_finite
        watched = [owner for owner in owners if owner.requires_grad]  # one frozen since has the gradient it had
        step = max(1, len(watched) // _NUM_CARRIERS)
        self._handles = [
            owner.register_post_accumulate_grad_hook(self._mark)  # type: ignore[no-untyped-call]
            for owner in watched[self._num_announced % step :: step]  # others each time, lest all of them never get any
        ]
        self._num_announced += 1

    def close(self) -> None:
        """Stop watching backward passes."""
        for handle in self._handles:
            handle.remove()
        self._is_finite, self._handles = None, []

    def deliver(self, params: Iterable[Tensor]) -> None:
        """The last pass is over: if none of the watched parameters had a gradient, mark one that had."""
        if self._is_finite is not None:
            _spoil_(next(param.grad for param in params if param.grad is not None), self._is_finite)
        self.close()

    def _mark(self, owner: Tensor) -> None:
        if self._is_finite is not None and owner.grad is not None:
            _spoil_(owner.grad, self._is_finite)
            self._is_finite = None  # removing hooks while they run would upset torch's iteration over them


def _spoil_(grad: Tensor, is_finite: Tensor) -> None:
    with torch.no_grad():
        local(grad).masked_fill_(is_finite.logical_not().to(grad.device), torch.nan)
