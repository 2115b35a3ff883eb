"""Metrics: the diagonal scaling T in which a ball is measured, ``||T^-1 eps||_p <= rho``."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from flatmin.arguments import check_choice, check_number
from flatmin.optim.space import Space

Scaled = Literal["weights", "matrices", "all"]


class Metric(Protocol):
    """A diagonal scaling of the parameters.

    Attributes:
        depends_on_scale: Whether the perturbation changes where all gradients are multiplied by one number.
    """

    depends_on_scale: bool

    @property
    def needs_names(self) -> bool:
        """Whether the scaling asks for the parameters' names."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Hyperparameters that every parameter group gets, each group with a value of its own."""

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` or ``TypeError`` where a group's own value is outside its domain."""

    def scaling(self, space: Space) -> list[Tensor] | None:
        """T at the present parameters: a tensor per parameter that broadcasts to it; ``None`` stands for all ones."""


class Identity:
    """The Euclidean metric of SAM: T = 1."""

    needs_names = False
    depends_on_scale = False

    @property
    def defaults(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def check(self, options: Mapping[str, Any]) -> None:
        """Nothing to check."""

    def scaling(self, space: Space) -> None:
        """T = 1 for every entry."""


class Fisher:
    """The diagonal of the empirical Fisher matrix of the batch: ``T = 1 / sqrt(g^2 + eta)``.

    Args:
        eta: Added to ``g^2``; a group entry, ``> 0``.

    References:
        Kim et al. (2022), arXiv:2206.04920 (Fisher SAM), Eq. 13 and Algorithm 1.
    """

    needs_names = False
    depends_on_scale = True

    def __init__(self, eta: float) -> None:
        self.eta = eta
        self.check(self.defaults)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """``eta``."""
        return {"eta": self.eta}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse ``eta`` that is not positive, infinite or NaN."""
        check_number("eta", options["eta"], "> 0 and finite")

    def scaling(self, space: Space) -> list[Tensor]:
        """``1 / sqrt(g^2 + eta)``."""
        return [(grad.square() + group.options["eta"]).rsqrt() for group in space.groups for grad in group.grads]


class Adaptive:
    """The scale-invariant metric of ASAM: ``T = |w| + eta`` where a parameter is scaled, 1 elsewhere.

    Args:
        eta: Added to ``|w|`` so that zero weights move too; a group entry, ``>= 0``.
        scaled: Which parameters are scaled. ``"weights"``: those whose name contains "weight", which leaves out biases
            and the shift of a norm layer but not its gain, as in the ASAM authors' code; it needs the names.
            ``"matrices"``: those of two dimensions and more, so neither biases nor norm layers. ``"all"``: every one,
            as in the popular port.

    References:
        Kwon et al. (2021), arXiv:2102.11600, Eq. 3 and Algorithm 1; SamsungLabs/ASAM, ``asam.py``.
    """

    depends_on_scale = False

    def __init__(self, eta: float = 0.01, scaled: Scaled = "weights") -> None:
        check_choice("scaled", scaled, get_args(Scaled))
        self.eta = eta
        self.scaled = scaled
        self.check(self.defaults)

    @property
    def needs_names(self) -> bool:
        """Only the authors' rule goes by name."""
        return self.scaled == "weights"

    @property
    def defaults(self) -> Mapping[str, Any]:
        """``eta``."""
        return {"eta": self.eta}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse ``eta`` below zero, infinite or NaN."""
        check_number("eta", options["eta"], ">= 0 and finite")

    def scaling(self, space: Space) -> list[Tensor]:
        """``|w| + eta``, or a 0-dim one."""
        return [
            param.abs().add_(group.options["eta"]) if self._scales(owner, name) else param.new_ones(())
            for group in space.groups
            for owner, param, name in zip(
                group.owners, group.params, group.names or [""] * len(group.params), strict=True
            )
        ]

    def _scales(self, owner: Tensor, name: str) -> bool:
        if self.scaled == "weights":
            return "weight" in name
        return self.scaled == "all" or owner.dim() > 1
