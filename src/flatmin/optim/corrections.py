"""What a combination leaves to be followed after the base optimizer's step, past its momentum and its scaling."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.sharding import local
from flatmin.optim.space import as_real


class Corrections:
    """A vector beside the gradient, summed over micro-batches.

    Attributes:
        has_unknown_scale: It carries a loss scale that nobody has told us yet.
    """

    def __init__(self) -> None:
        self.has_unknown_scale = False
        self._found: dict[Tensor, Tensor] = {}

    def tensors(self) -> list[Tensor]:
        """Those of all parameters that have one."""
        return list(self._found.values())

    def add(
        self, owners: Sequence[Tensor], corrections: Sequence[Tensor] | None, scale: Tensor | None, *, is_unscaled: bool
    ) -> None:
        """Take in what the combination has found; ``None`` for nothing.

        Args:
            owners: The parameters.
            corrections: One tensor for each.
            scale: The factor of the loss, where it is known.
            is_unscaled: The factor is no longer in them.
        """
        scale = None if is_unscaled else scale
        self.has_unknown_scale = bool(corrections) and not is_unscaled and scale is None
        for owner, correction in zip(owners, corrections or (), strict=bool(corrections)):
            unscaled = correction if scale is None else correction / scale.to(correction.device)
            self._found[owner] = self._found[owner] + unscaled if owner in self._found else unscaled

    def divide_(self, divisor: int) -> None:
        """Make a mean of the sum."""
        for correction in self._found.values():
            correction.div_(divisor)

    def follow_(self, groups: list[dict[str, Any]], is_taken: bool | Tensor, scale: Tensor | None) -> None:
        """Move the parameters: ``w <- w - lr * correction``, uphill where the group maximises.

        Args:
            groups: Of the base optimizer, which has taken its step.
            is_taken: Whether it has; 0-dim where only the device knows.
            scale: The loss scale, which is still in the corrections where the passes did not know it.
        """
        if is_taken is False or not self._found:
            return
        for group in groups:
            lr = -group["lr"] if group.get("maximize", False) else group["lr"]
            for owner in (param for param in group["params"] if param in self._found):
                correction = self._found[owner]
                if self.has_unknown_scale and scale is not None:
                    correction = correction / scale.to(owner.device)
                if isinstance(is_taken, Tensor):
                    correction = torch.where(is_taken.to(correction.device), correction, 0.0)
                as_real(local(owner)).sub_(lr * correction)
