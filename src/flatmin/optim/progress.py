"""How far the step under way has come, and what its passes found."""

from collections import ChainMap
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flatmin.optim.corrections import Corrections


@dataclass
class Progress:
    """State between the calls that make up one step.

    Attributes:
        is_perturbed: What ``when`` says of the step; ``None`` until it was asked.
        num_ascents: Ascents made; 0 at w.
        is_complete: The gradient to follow is ready, at w.
        has_moved: Some parameter was moved by a radius other than 0.
        is_in_closure: The passes are made by ``step``, which knows what comes next.
        is_in_turn: A pass goes through several micro-batches.
        averages_at_end: The replicas average their gradients once, when all micro-batches are done.
        clean: g of each parameter, where something needs it after the second pass.
        corrections: What is followed after the base optimizer's step.
        loss_scale: The factor of the loss in mixed precision, where it is known; 0-dim.
        notes: What ``when`` has changed in the first group, kept in front of it until the step is taken.
    """

    is_perturbed: bool | None = None
    num_ascents: int = 0
    is_complete: bool = False
    has_moved: bool = False
    is_in_closure: bool = False
    is_in_turn: bool = False
    averages_at_end: bool = False
    clean: dict[Tensor, Tensor] = field(default_factory=dict)
    corrections: Corrections = field(default_factory=Corrections)
    loss_scale: Tensor | None = None
    notes: ChainMap[str, Any] = field(default_factory=ChainMap)

    def end_passes(self) -> None:
        """The passes are over and the parameters at w, with the gradient to follow."""
        self.num_ascents, self.is_complete, self.clean = 0, True, {}

    def forget(self) -> None:
        """The step is over or given up."""
        self.__init__()  # type: ignore[misc]


def require(condition: bool, message: str) -> None:
    """Raise ``RuntimeError`` where the calls of a step come in an order that makes none."""
    if not condition:
        raise RuntimeError(message)
