"""Sharpness during training: chosen measures from time to time, within a budget."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

from torch import nn

from flatmin.arguments import check_number, checked_count
from flatmin.sharpness.average_case import average_case
from flatmin.sharpness.eigenvalues import hessian_eigenvalues
from flatmin.sharpness.loss_functions import LossFn
from flatmin.sharpness.measure import NotFiniteError
from flatmin.sharpness.objective import Objective
from flatmin.sharpness.products import HessianOptions, loss_options
from flatmin.sharpness.trace import hessian_trace
from flatmin.sharpness.worst_case import worst_case

MeasureName = Literal["worst-case", "average-case", "eigenvalues", "trace"]

# What each measure is recorded as.
VALUES: Mapping[MeasureName, tuple[str, ...]] = {
    "worst-case": ("worst_case",),
    "average-case": ("average_case",),
    "eigenvalues": ("lambda_1", "lambda_1_over_lambda_5"),
    "trace": ("hessian_trace",),
}

TOLERANCE = 1e-2  # of the residual of an eigenvalue, relative; the error of the eigenvalue is smaller by far


class SharpnessMonitor:
    """Measures sharpness for at most a share of the training time.

    Ask ``can_afford()`` where a measurement is due, then call ``measure``. The first one is always affordable, since
    nobody knows what it costs. After that one is, if it would leave all measuring within the budget, should it cost
    what the last one did: ``spent + last <= budget * training_seconds``. One that is not is counted and left out, so
    that a dear measurement is taken more rarely than asked for, and training is slowed by the budget at most, once the
    first measurement is paid off.

    The clock runs from the construction, or from ``start()``. Whether a value is there thus depends on time. The values
    do not: each is a function of weights and data. The model is left as it was, bit for bit, random numbers included,
    so training does not depend on it either.

    Args:
        measures: ``"worst-case"``, the paper's one-step sharpness; ``"average-case"``, under Gaussian noise of expected
            length rho (10 draws); ``"eigenvalues"``, the largest five of the Hessian; ``"trace"``, that of the Hessian
            (10 products).
        budget: Share of the training time, above 0; infinity affords everything.
        rho: Radius of the first two.
        m: Examples that share one perturbation in the worst case (m-sharpness); None takes all data together.

    Raises:
        ValueError: A setting is outside its domain.
    """

    def __init__(
        self,
        measures: Sequence[MeasureName] = ("worst-case",),
        *,
        budget: float = 0.1,
        rho: float = 0.05,
        m: int | None = None,
    ) -> None:
        _check_measures(measures)
        check_number("budget", budget, "> 0")
        check_number("rho", rho, ">= 0 and finite")
        self.measures = tuple(measures)
        self.budget = budget
        self.rho = rho
        self.m = None if m is None else checked_count("m", m)
        self.start()

    def start(self) -> None:
        """Training begins now: nothing has been spent yet."""
        self.num_skipped = 0
        self.spent_seconds = 0.0
        self._last_seconds: float | None = None
        self._started = time.monotonic()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that a measurement returns."""
        return tuple(name for measure in self.measures for name in VALUES[measure])

    @property
    def training_seconds(self) -> float:
        """Time that has passed, without the time spent on measuring."""
        return time.monotonic() - self._started - self.spent_seconds

    def can_afford(self) -> bool:
        """Whether a measurement is within the budget now; on several ranks let one of them decide."""
        if self._last_seconds is None:
            return True
        return self.spent_seconds + self._last_seconds <= self.budget * self.training_seconds

    def skip(self) -> None:
        """Count a measurement that was due and is left out."""
        self.num_skipped += 1

    def measure(
        self, model: nn.Module, loss_fn: LossFn, data: Iterable[Any], **options: Unpack[HessianOptions]
    ) -> dict[str, float]:
        """Take every measure now, whatever the budget says; on several ranks they must all call it.

        Args:
            model: The network; left as it was.
            loss_fn: ``loss_fn(model, batch)``, or a criterion for batches ``(inputs, targets)``; see ``Objective``.
            data: Batches, see ``Objective``: the same ones each time.
            options: See ``LossOptions`` and ``HessianOptions``.

        Returns:
            A number for each of ``names``. NaN where the loss or the Hessian is not finite, where an eigenvalue has not
            converged after 100 products, or the network has fewer than five parameters.
        """
        start = time.monotonic()
        values: dict[str, float] = {}
        for measure in self.measures:
            try:
                numbers = self._measured(measure, model, loss_fn, data, options)
            except NotFiniteError:
                numbers = [math.nan] * len(VALUES[measure])
            values |= zip(VALUES[measure], numbers, strict=True)
        self._last_seconds = time.monotonic() - start
        self.spent_seconds += self._last_seconds
        return values

    def state_dict(self) -> dict[str, float | None]:
        """What has been spent, so that a resumed run keeps to the budget of the whole."""
        return {
            "num_skipped": self.num_skipped,
            "training_seconds": self.training_seconds,
            "spent_seconds": self.spent_seconds,
            "last_seconds": self._last_seconds,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another monitor had spent."""
        self.num_skipped = state["num_skipped"]
        self.spent_seconds = state["spent_seconds"]
        self._last_seconds = state["last_seconds"]
        self._started = time.monotonic() - state["training_seconds"] - state["spent_seconds"]

    def _measured(
        self, measure: MeasureName, model: nn.Module, loss_fn: LossFn, data: Iterable[Any], options: HessianOptions
    ) -> list[float]:
        if measure == "worst-case":
            return [worst_case(model, loss_fn, data, self.rho, m=self.m, **loss_options(options)).value]
        num_params = Objective(model, loss_fn, data, **loss_options(options)).num_params
        if measure == "average-case":
            sigma = self.rho / math.sqrt(num_params)
            return [average_case(model, loss_fn, data, sigma, num_draws=10, **loss_options(options)).value]
        if measure == "trace":
            return [hessian_trace(model, loss_fn, data, 10, **options).value]
        found = hessian_eigenvalues(model, loss_fn, data, min(5, num_params), tolerance=TOLERANCE, **options)
        ratio = found.ratio() if num_params >= 5 and found.converged[4] else math.nan
        return [found.value if found.converged[0] else math.nan, ratio]


def _check_measures(measures: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``measures`` names measures, at least one and each once."""
    known = get_args(MeasureName)
    if not measures or len(set(measures)) < len(measures) or not set(measures) <= set(known):
        raise ValueError(f"measures must be one or several of {', '.join(known)}, each once, got {list(measures)}")
