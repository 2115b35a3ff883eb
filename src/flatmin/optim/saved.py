"""The values of before of parameters that have been moved in place."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatmin.optim import kernel
from flatmin.optim.host_copies import HostCopies
from flatmin.optim.rounding import is_narrow


@dataclass(frozen=True)
class Saved:
    """Where the parameters live, and the values to put back there.

    Attributes:
        targets: The parameters or views of them, each entry once, in any order.
        values: Shaped like ``targets``.
        kept: The same for those that the compiled kernel moved, before the others.
    """

    targets: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    kept: list[kernel.Kept] = field(default_factory=list)

    def add(self, target: Tensor, value: Tensor) -> None:
        """Remember one value."""
        self.targets.append(target)
        self.values.append(value)

    def add_together(self, params: Sequence[Tensor], host: HostCopies | None = None) -> None:
        """Remember what parameters hold: in copies of one kernel, or in those on their way to host memory."""
        if host is None:
            values = [torch.empty_like(param) for param in params]
            torch._foreach_copy_(values, list(params))
        else:
            values = host.of(params)
            host.wait()
        self.targets.extend(params)
        self.values.extend(values)

    def __reduce__(self) -> tuple[type["Saved"], tuple[list[Tensor], list[Tensor]]]:
        """In a copy nothing lies where the kernel knew it; what it moved, before the others, is like them there."""
        moved = [param for kept in self.kept for param in kept.params]
        values = [value for kept in self.kept for value in kept.values()]
        return Saved, (moved + self.targets, values + self.values)

    def restore_(self) -> None:
        """Copy the values into the parameters' own storage.

        The last one saved comes first: of two that share memory, it may have been saved after the other had moved.
        """
        if self.targets:
            torch._foreach_copy_(self.targets[::-1], self.values[::-1], non_blocking=True)  # those in pinned memory
        for kept in self.kept:
            kept.put_back_()

    def moved(self) -> list[Tensor]:
        """The parameters or views of them, in the order of ``difference``."""
        return self.targets + [param for kept in self.kept for param in kept.params]

    def difference(self) -> list[Tensor]:
        """What the parameters have moved by, in float32 or wider."""
        values = self.values + [value for kept in self.kept for value in kept.values()]
        pairs = zip(self.moved(), values, strict=True)
        return [_wide(target) - _wide(value.to(target.device, non_blocking=True)) for target, value in pairs]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if is_narrow(tensor.dtype) else tensor
