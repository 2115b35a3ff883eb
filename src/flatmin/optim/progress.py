"""How far the step under way has come, and what its passes found."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Progress:
    """State between the calls that make up one step.

    Attributes:
        is_perturbed: What ``when`` says of the step, asked once.
        num_ascents: Ascents made; 0 at w.
        is_complete: The gradient to follow is ready, at w.
        has_moved: Some parameter was moved by a radius other than 0.
        clean: g of each parameter, where something needs it after the second pass.
        finite: Whether the gradient was finite, 0-dim, one per pass.
    """

    is_perturbed: bool = False
    num_ascents: int = 0
    is_complete: bool = False
    has_moved: bool = False
    clean: dict[Tensor, Tensor] = field(default_factory=dict)
    finite: list[Tensor] = field(default_factory=list)

    def forget(self) -> None:
        """The step is over or given up."""
        self.is_perturbed = self.is_complete = self.has_moved = False
        self.num_ascents, self.clean, self.finite = 0, {}, []
