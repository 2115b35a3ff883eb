"""The extreme eigenvalues of the Hessian: how sharply the loss curves in its sharpest directions."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from flatmin.arguments import check_choice, check_number, checked_count
from flatmin.optim import joint_norm
from flatmin.sharpness.lanczos import Tridiagonal, lanczos
from flatmin.sharpness.loss_functions import LossFn
from flatmin.sharpness.measure import Measure
from flatmin.sharpness.objective import Objective
from flatmin.sharpness.products import (
    HessianOptions,
    Product,
    checked_product,
    hessian_settings,
    loss_options,
)
from flatmin.sharpness.random_vectors import gaussian

Which = Literal["largest", "smallest", "magnitude"]


@dataclass(frozen=True, eq=False)
class HessianEigenvalues(Measure):
    """Eigenvalues at one end of the spectrum.

    ``value`` is the first of them and ``error`` its residual.

    Attributes:
        eigenvalues: In the order asked for: the largest first, the smallest first, or the largest in magnitude first.
        residuals: ``||H v - lambda v||`` of each, computed with another product; some eigenvalue of H lies within this
            distance.
        converged: Whether each residual is within the tolerance.
        num_products: Products of the Hessian with a vector.
        eigenvectors: On request. Each is a list with one tensor per parameter of the model, zeros where it was not
            chosen, of joint length 1: a direction for ``loss_on_line``.
    """

    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    num_products: int
    eigenvectors: tuple[list[Tensor], ...] | None = field(default=None, repr=False)

    name: ClassVar[str] = "hessian_eigenvalues"

    def ratio(self, index: int = 5) -> float:
        """``lambda_1 / lambda_index``; with 5 the paper's measure of how much the sharpest direction stands out.

        Raises:
            ValueError: Fewer eigenvalues were computed.

        References:
            Foret et al. (2021), arXiv:2010.01412, section 4.2; Jastrzebski et al. (2020), arXiv:2002.09572.
        """
        if not 1 <= index <= len(self.eigenvalues):
            raise ValueError(f"index must be from 1 to {len(self.eigenvalues)}, the eigenvalues computed, got {index}")
        return self.eigenvalues[0] / self.eigenvalues[index - 1] if self.eigenvalues[index - 1] else float("nan")

    def as_dict(self) -> dict[str, Any]:
        """As of every measure, with ``lambda_1_over_lambda_5`` where the five largest were computed."""
        return super().as_dict() | ({"lambda_1_over_lambda_5": self.ratio()} if self._has_the_papers_ratio() else {})

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.settings['which']}; {self._cost()}, {self.num_products} products)"]
        rows = zip(self.eigenvalues, self.residuals, self.converged, strict=True)
        for index, (value, residual, converged) in enumerate(rows, start=1):
            lines.append(f"  λ{index} = {value:<12.6g} residual {residual:.1e}{'' if converged else '  NOT CONVERGED'}")
        if self._has_the_papers_ratio():
            lines.append(f"  λ1/λ5 = {self.ratio():.4g}")
        return "\n".join(lines)

    def _has_the_papers_ratio(self) -> bool:
        return self.settings["which"] == "largest" and len(self.eigenvalues) >= 5


def hessian_eigenvalues(  # noqa: PLR0913 - each setting is one keyword
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[Any],
    k: int = 5,
    *,
    which: Which = "largest",
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    eigenvectors: bool = False,
    seed: int = 0,
    **options: Unpack[HessianOptions],
) -> HessianEigenvalues:
    """The k extreme eigenvalues of the Hessian of the mean loss over the data.

    Lanczos iteration with full reorthogonalisation, until the residual ``||H v - lambda v||`` of each of the k is at
    most ``tolerance * |lambda|`` or the iterations are used up; then each residual is computed anew. The error of an
    eigenvalue is at most its residual, and of the order of its square over the gap to the next. Of an eigenvalue that
    is exactly multiple, one copy may be found.

    Costs a product of the Hessian per iteration and k more; the memory of ``max_iterations`` gradients.

    Args:
        model: The network; left as it was.
        loss_fn: ``loss_fn(model, batch)``, or a criterion for batches ``(inputs, targets)``; see ``Objective``.
        data: Batches, see ``Objective``.
        k: How many.
        which: ``"largest"``, ``"smallest"`` (the most negative first) or ``"magnitude"``.
        tolerance: Relative to each eigenvalue, but not below what rounding leaves: 100 times the precision of the dtype
            of the largest.
        max_iterations: Size of the Krylov space, at least k.
        eigenvectors: Return them too.
        seed: Of the start vector.
        options: See ``LossOptions`` and ``HessianOptions``.

    Raises:
        ValueError: A setting is outside its domain, or a product is not finite.

    References:
        Foret et al. (2021), arXiv:2010.01412, section 4.2, Figure 3; Ghorbani et al. (2019), arXiv:1901.10159.
    """
    start = time.perf_counter()
    objective = Objective(model, loss_fn, data, **loss_options(options))
    k, max_iterations = checked_count("k", k), checked_count("max_iterations", max_iterations)
    wanted = _Wanted(k, which, tolerance, max_iterations)
    wanted.check_fits(objective.num_params)
    generator = torch.Generator().manual_seed(seed)
    with objective.measuring():
        product = checked_product(objective, options)
        space = _krylov_space(product, objective, wanted, generator)
        values, vectors = _eigenpairs(space, wanted)
        images = product(vectors)
        residuals = [
            joint_norm([image - value * vector]).item()
            for image, value, vector in zip(images, values.tolist(), vectors, strict=True)
        ]
        directions = tuple(objective.in_model(vector) for vector in vectors) if eigenvectors else None
    bounds = wanted.bounds(values, space).tolist()
    return HessianEigenvalues(
        value=values[0].item(),
        error=residuals[0],
        num_passes=objective.num_passes,
        wall_seconds=time.perf_counter() - start,
        settings=hessian_settings(objective, options) | asdict(wanted) | {"seed": seed},
        eigenvalues=tuple(values.tolist()),
        residuals=tuple(residuals),
        converged=tuple(residual <= bound for residual, bound in zip(residuals, bounds, strict=True)),
        num_products=len(space.diagonal) + k,
        eigenvectors=directions,
    )


@dataclass(frozen=True)
class _Wanted:
    """Which eigenvalues, and how exactly."""

    k: int
    which: Which
    tolerance: float
    max_iterations: int

    def __post_init__(self) -> None:
        check_choice("which", self.which, get_args(Which))
        check_number("tolerance", self.tolerance, "> 0")
        if not self.max_iterations >= self.k:
            raise ValueError(f"max_iterations must be >= k, got {self.max_iterations} with k = {self.k}")

    def check_fits(self, num_params: int) -> None:
        if not 1 <= self.k <= num_params:
            raise ValueError(f"k must be from 1 to the number of parameters, {num_params}, got {self.k}")

    def among(self, values: Tensor) -> Tensor:
        """The indices of the k wanted of all Ritz values, in the order asked for."""
        keys = {"largest": values, "smallest": -values, "magnitude": values.abs()}
        return keys[self.which].argsort(descending=True)[: self.k]

    def bounds(self, values: Tensor, space: Tridiagonal) -> Tensor:
        """How large residuals may be: relative to each value, not below what rounding leaves of the largest of all."""
        rounding = 100 * torch.finfo(space.basis.dtype).eps * space.eigen()[0].abs().max()
        return torch.clamp(self.tolerance * values.abs(), min=rounding)


def _krylov_space(product: Product, objective: Objective, wanted: _Wanted, generator: torch.Generator) -> Tridiagonal:
    """Iterate until the residuals of the wanted values, by Lanczos' own estimate ``beta |s_m|``, are small enough.

    Where an invariant subspace is exhausted before, go on with fresh vectors until one more subspace changes nothing:
    multiple eigenvalues have their copies there.
    """

    def draw() -> Tensor:
        return gaussian(objective.num_params, objective.dtype, objective.device, generator)

    at_last_end: Tensor | None = None
    for space in lanczos(lambda vector: product(vector[None])[0], draw(), wanted.max_iterations, redraw=draw):
        if len(space.diagonal) < wanted.k:
            continue
        ritz_values, columns = space.eigen()
        chosen = wanted.among(ritz_values)
        values, estimates = ritz_values[chosen], space.beta * columns[-1, chosen].abs()
        bounds = wanted.bounds(values, space)
        if space.beta > 0.0 and at_last_end is None and bool((estimates <= bounds).all()):
            break
        if space.beta == 0.0:
            if at_last_end is not None and bool(((values - at_last_end).abs() <= bounds).all()):
                break
            at_last_end = values
    return space


def _eigenpairs(space: Tridiagonal, wanted: _Wanted) -> tuple[Tensor, Tensor]:
    """The wanted Ritz values, in float64 on the CPU, and their vectors as rows."""
    values, columns = space.eigen()
    chosen = wanted.among(values)
    vectors = columns[:, chosen].T.to(space.basis) @ space.basis
    return values[chosen], vectors / torch.stack([joint_norm([vector]) for vector in vectors])[:, None]
