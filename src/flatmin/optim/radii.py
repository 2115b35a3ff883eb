"""Radii: how far the perturbation goes, given the length of the gradient."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from flatmin.arguments import check_number
from flatmin.optim.schedules import half_cosine
from flatmin.optim.space import ActiveGroup


class Radius(Protocol):
    """A rule for the factor in front of the direction."""

    @property
    def depends_on_scale(self) -> bool:
        """Whether the perturbation changes where all gradients are multiplied by one number."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Hyperparameters that every parameter group gets, each group with a value of its own."""

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where a group's own value is outside its domain."""

    def __call__(self, length: Tensor, unit: Tensor, group: ActiveGroup) -> Tensor:
        """The factor for a group, 0-dim.

        Args:
            length: Dual norm of the direction; for p other than 2 its largest entry.
            unit: The factor that makes the perturbation one of radius 1.
            group: Its entries, such as ``rho``.
        """


class Fixed:
    """``rho``, whatever the gradient's length: the constraint of the paper's Eq. 2."""

    depends_on_scale = False

    @property
    def defaults(self) -> Mapping[str, Any]:
        """None beside rho."""
        return {}

    def check(self, options: Mapping[str, Any]) -> None:
        """Nothing to check."""

    def __call__(self, length: Tensor, unit: Tensor, group: ActiveGroup) -> Tensor:
        """``rho * unit``."""
        return unit * group.radius


class Unified:
    """Between the unnormalised and the normalised perturbation: ``eps = rho (1 - lambda + lambda / ||g||) g``.

    Args:
        share: lambda in [0, 1]; 0 is USAM, 1 is SAM. ``None`` for ``1 - 1/t`` in step t = 1, 2, ….

    References:
        Andriushchenko and Flammarion (2022), arXiv:2206.06232 (USAM); Oikonomou and Loizou (2025), arXiv:2503.02225
        (Unified SAM), Eq. 3.
    """

    def __init__(self, share: float | None) -> None:
        if share is not None:
            check_number("share", share, "in [0, 1] or None")
        self.share = share

    @property
    def depends_on_scale(self) -> bool:
        """Except where lambda is 1."""
        return self.share != 1.0

    @property
    def defaults(self) -> Mapping[str, Any]:
        """None beside rho."""
        return {}

    def check(self, options: Mapping[str, Any]) -> None:
        """Nothing to check."""

    def __call__(self, length: Tensor, unit: Tensor, group: ActiveGroup) -> Tensor:
        """``rho (1 - lambda + lambda * unit)``."""
        share = 1.0 - 1.0 / (group.options["num_steps"] + 1) if self.share is None else self.share
        return group.radius * (1.0 - share + share * unit)


class FirstOrderGain:
    """The radius at which the linearised loss rises by sigma_t: ``min(sigma_t / (||g|| + delta), rho)``.

    ``sigma_t = sigma (1 + cos(pi s)) / 2``, where s goes from 0 at ``decay_start`` to 1 at the end of training and is 0
    before; sigma is a group entry, and rho is the upper limit.

    Args:
        sigma: Rise of the linearised loss at first, ``>= 0``.
        num_steps: Steps of the whole training; ``None`` for a sigma_t that stays.
        delta: Added to the gradient's length, ``>= 0``.
        decay_start: Share of training before sigma_t begins to fall, in [0, 1).

    References:
        Wang et al. (2026), ICML, arXiv:2605.10183 (LE-SAM).
    """

    depends_on_scale = True

    def __init__(
        self, sigma: float, num_steps: int | None = None, delta: float = 1e-12, decay_start: float = 0.0
    ) -> None:
        if num_steps is not None:
            check_number("num_steps", num_steps, ">= 1")
        check_number("delta", delta, ">= 0 and finite")
        check_number("decay_start", decay_start, "in [0, 1)")
        self.sigma = sigma
        self.num_steps = num_steps
        self.delta = delta
        self.decay_start = decay_start
        self.check(self.defaults)

    @property
    def defaults(self) -> Mapping[str, Any]:
        """``sigma``."""
        return {"sigma": self.sigma}

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuse ``sigma`` below zero, infinite or NaN."""
        check_number("sigma", options["sigma"], ">= 0 and finite")

    def __call__(self, length: Tensor, unit: Tensor, group: ActiveGroup) -> Tensor:
        """``min(sigma_t / (||g|| + delta), rho) * unit``."""
        share = 0.0 if self.num_steps is None else group.options["num_steps"] / self.num_steps
        sigma = group.options["sigma"] * half_cosine((share - self.decay_start) / (1.0 - self.decay_start))
        reach = torch.clamp(sigma / (length + self.delta), max=abs(group.radius))
        return -unit * reach if group.options.get("maximize", False) else unit * reach
