"""Successive halving against the published rule, by hand."""

import math
import random

from flatmin.train.sweep.halving import SuccessiveHalving, rung_epochs


def test_rungs_grow_by_the_reduction_up_to_the_whole_run() -> None:
    assert rung_epochs(40, 1, 3) == [1, 3, 9, 27, 40]
    assert rung_epochs(27, 3, 3) == [3, 9, 27]
    assert rung_epochs(2, 5, 4) == [2]


def test_halving_trains_a_third_a_ninth_and_keeps_the_best() -> None:
    """Sequentially, with errors that keep their order, it is the synchronous algorithm: 27, 9, 3 and 1 candidates."""
    order = random.Random(1).sample(range(27), 27)
    halving = SuccessiveHalving(order, 4, 3)
    while (step := halving.next()) is not None:
        halving.report(*step, error=float(step[0]))
    trained = [len(errors) for errors in halving.errors]
    assert trained[0] == 27
    assert 9 <= trained[1] <= 14  # some were promoted before the better ones were seen: the price of not waiting
    assert halving.best == 0


def test_halving_promotes_by_the_published_rule() -> None:
    """Algorithm 2 by hand, for a reduction of 2: as soon as one of the best half of a rung is there, it goes on."""
    halving = SuccessiveHalving([0, 1, 2, 3], 3, 2)
    assert [halving.next(), halving.next()] == [(0, 0), (1, 0)]
    halving.report(0, 0, 0.5)
    assert halving.next() == (2, 0)  # one of one is not the best half
    halving.report(1, 0, 0.4)
    assert halving.next() == (1, 1)
    halving.report(2, 0, 0.1)
    assert halving.next() == (2, 1)  # of three the best half is one, and that is candidate 2 now
    halving.report(1, 1, 0.3)
    halving.report(2, 1, 0.2)
    assert halving.next() == (2, 2)  # the highest rung first
    assert halving.next() == (3, 0)
    halving.report(3, 0, 0.45)
    assert halving.next() is None  # the best half of four are 2 and 1, which have gone on
    assert halving.is_waiting
    halving.report(2, 2, 0.15)
    assert (halving.best, halving.is_waiting) == (2, False)


def test_failed_candidate_is_never_promoted() -> None:
    halving = SuccessiveHalving([0, 1, 2], 2, 2)
    for _ in range(3):
        step = halving.next()
        assert step is not None
        halving.report(*step, error=math.inf)
    assert halving.next() is None
    assert halving.best is None


def test_best_of_the_highest_rung_goes_on_where_there_are_too_few_for_the_rule() -> None:
    """Two candidates, of four of which one would be promoted: the best alone goes on, and from where it has come to."""
    halving = SuccessiveHalving([0, 1], 3, 4)
    assert [halving.next(), halving.next()] == [(0, 0), (1, 0)]
    halving.report(0, 0, 0.5)
    assert halving.next() is None  # the other may be better
    halving.report(1, 0, 0.4)
    for rung in (1, 2):
        assert halving.next() == (1, rung)
        assert halving.next() is None
        halving.report(1, rung, 0.6)
    assert halving.next() is None
    assert halving.best == 1


def test_earlier_of_equals_is_the_better_one() -> None:
    halving = SuccessiveHalving([0, 1], 2, 2)
    halving.next()
    halving.next()
    halving.report(1, 0, 0.5)
    halving.report(0, 0, 0.5)
    assert halving.next() == (0, 1)
    halving.report(1, 1, 0.3)
    halving.report(0, 1, 0.3)
    assert halving.best == 0
