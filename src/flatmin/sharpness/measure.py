"""What every measure returns: a value, how sure it is, and what it cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

Setting = str | int | float | bool | None


class NotFiniteError(ValueError):
    """The loss or the Hessian at the weights is infinite or NaN."""


def check_finite_loss(loss: float) -> None:
    """Raise ``NotFiniteError`` for a loss at the weights from which no rise can be told."""
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss at the weights must be finite, got {loss}")


@dataclass(frozen=True, eq=False)
class Measure:
    """A measured quantity.

    Attributes:
        value: The quantity.
        error: How far off it may be; each measure says in which sense. NaN where that is unknown.
        num_passes: Passes over the data that it took, of whatever kind.
        wall_seconds: Time that it took.
        settings: What it was measured with.
    """

    value: float
    error: float
    num_passes: int
    wall_seconds: float
    settings: Mapping[str, Setting]

    name: ClassVar[str] = "measure"

    def as_dict(self) -> dict[str, Any]:
        """Everything but tensors, in what JSON knows; NaN becomes ``None``, infinity the string ``"inf"``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"measure": self.name} | {
            name: _plain(value) for name, value in values.items() if value is not None and not _holds_tensors(value)
        }

    def __str__(self) -> str:
        interval = "" if math.isnan(self.error) else f" ± {self.error:.2g}"
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        return f"{self.name} = {self.value:.5g}{interval}  ({self._cost()}; {settings})"

    def _cost(self) -> str:
        return f"{self.num_passes} passes, {self.wall_seconds:.2g} s"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(_holds_tensors(part) for part in value)
    return isinstance(value, Tensor)
