"""Which candidate to train how far: asynchronous successive halving, or simply all of them to the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["SuccessiveHalving", "rung_epochs"]


def rung_epochs(epochs: int, first: int, reduction: int) -> list[int]:
    """Return the epochs after which candidates are compared: ``first``, ``first * reduction``, ..., ``epochs``.

    Args:
        epochs: Length of a whole run.
        first: Epochs that every candidate gets, at least 1.
        reduction: Factor from one rung to the next, at least 2; also the number of candidates of which one goes on.
    """
    rungs = []
    while first < epochs:
        rungs.append(first)
        first *= reduction
    return [*rungs, epochs]


class SuccessiveHalving:
    """Decide which candidate to train next and to which rung, from the errors that are known at that moment.

    A candidate is promoted to the next rung as soon as it is among the best ``1 / reduction`` of those that have come
    to its rung, the highest rung first; when there is none, the next new candidate begins. With one rung, all
    candidates are trained to the end. Unlike the published algorithm the list of candidates is finite: when nothing is
    left to start or to wait for and no candidate has come to the last rung, the best of the highest rung goes on.

    Args:
        candidates: Their numbers, in the order in which they begin.
        num_rungs: How many rungs there are, at least 1; the last is the end of training.
        reduction: Of how many candidates one is promoted.

    References:
        Li et al. (2020), "A system for massively parallel hyperparameter tuning", arXiv:1810.05934, Algorithm 2.
    """

    def __init__(self, candidates: Sequence[int], num_rungs: int, reduction: int) -> None:
        self.reduction = reduction
        self._new = list(candidates)[::-1]
        self._started: list[set[int]] = [set() for _ in range(num_rungs)]
        self.errors: list[dict[int, float]] = [{} for _ in range(num_rungs)]
        """For each rung, the error of every candidate that has come there; infinite where its run failed."""

    def next(self) -> tuple[int, int] | None:
        """Return a candidate and the rung to train it to, which count as started; None if there is none for now."""
        chosen = self._promotion(one_of=self.reduction) or self._beginning() or self._last_resort()
        if chosen is not None:
            candidate, rung = chosen
            self._started[rung].add(candidate)
        return chosen

    def report(self, candidate: int, rung: int, error: float) -> None:
        """Take note of the error of a candidate at a rung; infinity says that it failed."""
        self.errors[rung][candidate] = error

    @property
    def is_waiting(self) -> bool:
        """Whether a started candidate has not been reported yet."""
        return any(len(started) > len(errors) for started, errors in zip(self._started, self.errors, strict=True))

    @property
    def best(self) -> int | None:
        """The candidate with the lowest error at the last rung, the earlier of equals; None if there is none."""
        return next(iter(self._top(self.errors[-1], 1)), None)

    def _promotion(self, one_of: int) -> tuple[int, int] | None:
        """Return one of the best ``1 / one_of`` of a rung that has not gone on from it, the highest rung first."""
        for rung in reversed(range(len(self.errors) - 1)):
            for candidate in self._top(self.errors[rung], len(self.errors[rung]) // one_of):
                if candidate not in self._started[rung + 1]:
                    return candidate, rung + 1
        return None

    def _beginning(self) -> tuple[int, int] | None:
        return (self._new.pop(), 0) if self._new else None

    def _last_resort(self) -> tuple[int, int] | None:
        return None if self.is_waiting or self.best is not None else self._promotion(one_of=1)

    @staticmethod
    def _top(errors: dict[int, float], count: int) -> Sequence[int]:
        finite = [candidate for candidate, error in errors.items() if math.isfinite(error)]
        return sorted(finite, key=lambda candidate: (errors[candidate], candidate))[:count]
