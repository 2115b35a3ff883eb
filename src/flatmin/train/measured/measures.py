"""The measures of the command line: which there are, and what each is called with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from flatmin.arguments import check_choice
from flatmin.sharpness import (
    Measure,
    average_case,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
    worst_case,
)
from flatmin.train.errors import UsageError

__all__ = ["MEASURES", "MeasureSettings", "Planned", "check_names", "planned_measures"]

MEASURES = ("worst-case", "m-sharpness", "eigenvalues", "trace", "density", "average-case")

DEFAULT_MS = (4, 16, 64, 256)


@dataclass(frozen=True)
class MeasureSettings:
    """What the measures are called with.

    Attributes:
        rho: Radius of the ball.
        sigma: Deviation of the noise; None gives noise whose expected squared length is ``rho^2``.
        adaptive: Scale ball and noise by the weights.
        steps: Ascent steps of the worst case.
        ms: Examples that share a perturbation in m-sharpness; None takes those of 4, 16, 64 and 256 that fit.
        k: How many eigenvalues.
        num_vectors: Random vectors of the density.
        num_steps: Lanczos steps from each.
        hvp: How products with the Hessian are computed.
        batch_norm: Whose statistics batch norm uses.
        batch_size: Examples in a batch.
        params: The parameters that are moved: of one block or, for None, of all.
        seed: Of everything that is drawn.
    """

    rho: float
    sigma: float | None = None
    adaptive: bool = False
    steps: int = 1
    ms: tuple[int, ...] | None = None
    k: int = 5
    num_vectors: int = 5
    num_steps: int = 60
    hvp: Literal["double_backward", "finite_differences"] = "double_backward"
    batch_norm: Literal["running", "batch"] = "running"
    batch_size: int = 256
    params: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what is common to several measures; each checks its own settings.

        Raises:
            UsageError: A setting is outside its domain.
        """
        if not 0.0 <= self.rho < math.inf:
            raise UsageError(f"rho must be >= 0 and finite, got {self.rho}")
        for name in ("k", "steps", "batch_size", "num_vectors", "num_steps"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name} must be >= 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Planned:
    """A measure to be taken.

    Attributes:
        label: Its name for the progress bar.
        batch_size: Examples in a batch.
        measure: Called with ``(model, loss_fn, data, **settings)``.
        settings: Its keywords.
    """

    label: str
    batch_size: int
    measure: Callable[..., Measure]
    settings: dict[str, Any]


def planned_measures(
    names: Sequence[str], settings: MeasureSettings, model: nn.Module, largest_m: int
) -> list[Planned]:
    """The measures of the given names, in that order, m-sharpness once for each m.

    Raises:
        UsageError: There is no measure of some name, or m is larger than a batch can be.
    """
    check_names(names)
    common = {"batch_norm": settings.batch_norm, "params": settings.params, "seed": settings.seed}
    size, hessian = settings.batch_size, common | {"hvp": settings.hvp}
    ball = {"rho": settings.rho, "adaptive": settings.adaptive, "steps": settings.steps}
    quadrature = {"num_vectors": settings.num_vectors, "num_steps": settings.num_steps}
    sigma = settings.rho / math.sqrt(_num_moved(model, settings.params)) if settings.sigma is None else settings.sigma
    single = {
        "worst-case": Planned("worst case", size, worst_case, common | ball),
        "eigenvalues": Planned("eigenvalues", size, hessian_eigenvalues, hessian | {"k": settings.k}),
        "trace": Planned("trace", size, hessian_trace, hessian),
        "density": Planned("spectral density", size, spectral_density, hessian | quadrature),
        "average-case": Planned(
            "average case", size, average_case, common | {"sigma": sigma, "adaptive": settings.adaptive}
        ),
    }
    several = [
        # Batches of whole groups, so that none is cut by the end of a batch.
        Planned(f"m-sharpness, m = {m}", max(size // m, 1) * m, worst_case, common | ball | {"m": m})
        for m in (_fitting(settings.ms, largest_m) if "m-sharpness" in names else ())
    ]
    return [planned for name in names for planned in (several if name == "m-sharpness" else [single[name]])]


def check_names(names: Sequence[str]) -> None:
    """Raise ``UsageError`` unless every name is one of a measure."""
    for name in names:
        check_choice("measures", name, MEASURES, UsageError)


def _fitting(ms: tuple[int, ...] | None, largest: int) -> tuple[int, ...]:
    if ms is None:
        return tuple(m for m in DEFAULT_MS if m <= largest)
    for m in ms:
        if not 1 <= m <= largest:
            raise UsageError(f"m must be from 1 to the number of examples in a batch, {largest}, got {m}")
    return ms


def _num_moved(model: nn.Module, params: str | None) -> int:
    named = model.named_parameters()
    chosen = [p for name, p in named if params is None or name == params or name.startswith(f"{params}.")]
    return sum(param.numel() for param in chosen if param.requires_grad) or 1  # none is refused by the measure itself
