"""The trace of the Hessian, from products with random vectors."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from flatmin.arguments import check_choice, checked_count
from flatmin.optim import joint_dot
from flatmin.sharpness.interval import mean_and_half_width
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
from flatmin.sharpness.random_vectors import signs

Estimator = Literal["hutchinson", "hutch++"]

_AT_ONCE = 8  # vectors that share a forward and a first backward pass, and are in memory together


@dataclass(frozen=True, eq=False)
class HessianTrace(Measure):
    """An unbiased estimate of the trace.

    ``error`` is half the length of its 95 % confidence interval, from the spread of ``samples``.

    Attributes:
        exact_part: What is not estimated: 0 for Hutchinson, the trace on the sketched subspace for Hutch++.
        samples: Estimates of the rest, one from each random vector.
        mean_eigenvalue: ``value`` over the number of parameters.
    """

    exact_part: float
    samples: tuple[float, ...]
    mean_eigenvalue: float

    name: ClassVar[str] = "hessian_trace"


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    data: Iterable[Any],
    num_products: int = 30,
    *,
    estimator: Estimator = "hutchinson",
    seed: int = 0,
    **options: Unpack[HessianOptions],
) -> HessianTrace:
    """The trace of the Hessian H of the mean loss over the data.

    Hutchinson: the mean of ``v^T H v`` over random signs v, of variance ``2 (||H||_F^2 - sum_i H_ii^2)`` each.
    Hutch++: a third of the products finds the orthonormal basis Q of ``H S`` for random signs S, a third gives
    ``tr(Q^T H Q)`` exactly, and Hutchinson on ``(I - Q Q^T) H (I - Q Q^T)`` gives the rest: better where few
    eigenvalues stand out. Its interval holds given Q.

    Args:
        model: The network; left as it was.
        loss_fn: ``loss_fn(model, batch)``, or a criterion for batches ``(inputs, targets)``; see ``Objective``.
        data: Batches, see ``Objective``.
        num_products: Products of the Hessian with a vector in all, at least 2, for Hutch++ at least 4.
        estimator: ``"hutchinson"`` or ``"hutch++"``.
        seed: Of the random vectors.
        options: See ``LossOptions`` and ``HessianOptions``.

    Raises:
        ValueError: A setting is outside its domain, or a product is not finite.

    References:
        Hutchinson (1990); Meyer et al. (2021), "Hutch++: Optimal Stochastic Trace Estimation", arXiv:2010.09649,
        Algorithm 1.
    """
    start = time.perf_counter()
    check_choice("estimator", estimator, get_args(Estimator))
    fewest = 2 if estimator == "hutchinson" else 4
    num_products = checked_count("num_products", num_products, fewest, f"for {estimator}")
    objective = Objective(model, loss_fn, data, **loss_options(options))
    generator = torch.Generator().manual_seed(seed)
    with objective.measuring():
        product = checked_product(objective, options)
        basis = None
        if estimator == "hutch++":
            basis = _sketch(product, _draws(objective, num_products // 3, generator))
        exact = 0.0 if basis is None else math.fsum(_forms(product, torch.split(basis, _AT_ONCE)))
        num_samples = num_products - 2 * (num_products // 3) if estimator == "hutch++" else num_products
        rest = (_outside(basis, block) for block in _draws(objective, num_samples, generator))
        samples = _forms(product, rest)
    mean, error = mean_and_half_width(samples)
    settings = {"num_products": num_products, "estimator": estimator, "seed": seed}
    return HessianTrace(
        value=exact + mean,
        error=error,
        num_passes=objective.num_passes,
        wall_seconds=time.perf_counter() - start,
        settings=hessian_settings(objective, options) | settings,
        exact_part=exact,
        samples=tuple(samples),
        mean_eigenvalue=(exact + mean) / objective.num_params,
    )


def _draws(objective: Objective, num_vectors: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random signs in blocks, shape ``(block, num_params)``."""
    for start in range(0, num_vectors, _AT_ONCE):
        rows = range(start, min(start + _AT_ONCE, num_vectors))
        size, dtype, device = objective.num_params, objective.dtype, objective.device
        yield torch.stack([signs(size, dtype, device, generator) for _ in rows])


def _sketch(product: Product, blocks: Iterable[Tensor]) -> Tensor:
    """Orthonormal rows that span the images of the random vectors."""
    images = torch.cat([product(block) for block in blocks])
    basis: Tensor = torch.linalg.qr(images.T).Q.T
    return basis.contiguous()


def _forms(product: Product, blocks: Iterable[Tensor]) -> list[float]:
    """``v^T H v`` of every row v."""
    forms = []
    for block in blocks:
        images = product(block)
        forms += [joint_dot([image], [vector]).item() for image, vector in zip(images, block, strict=True)]
    return forms


def _outside(basis: Tensor | None, vectors: Tensor) -> Tensor:
    return vectors if basis is None else vectors - (vectors @ basis.T) @ basis
