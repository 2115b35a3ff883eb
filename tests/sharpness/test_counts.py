"""Every count of the measures is an integer, of whatever type, or is refused by name."""

import json
import math

import numpy as np
import pytest
from known import cross_entropy, pairs, smooth_network

from flatmin.sharpness import (
    Measure,
    SharpnessMonitor,
    average_case,
    hessian_eigenvalues,
    hessian_trace,
    principal_directions,
    spectral_density,
    worst_case,
)

# Each measure with its counts and the smallest number that each may be.
COUNTS = [
    (worst_case, {"rho": 0.1}, {"m": 1, "steps": 1, "restarts": 1, "micro_batch": 1}),
    (average_case, {"sigma": 0.1}, {"num_draws": 2, "micro_batch": 1}),
    (hessian_trace, {}, {"num_products": 2, "micro_batch": 1}),
    (hessian_eigenvalues, {}, {"k": 1, "max_iterations": 1}),
    (spectral_density, {}, {"num_vectors": 1, "num_steps": 1}),
]
CASES = [(measure, others, name, least) for measure, others, counts in COUNTS for name, least in counts.items()]


def measured(measure, **settings) -> Measure:
    return measure(smooth_network(), cross_entropy, pairs(), **settings)


@pytest.mark.parametrize("wrong", [2.5, 4.0, math.nan, "4", True, 0, np.float64(4.0)], ids=repr)
@pytest.mark.parametrize(("measure", "others", "name", "least"), CASES)
def test_what_is_no_integer_or_too_small_is_refused_by_name(measure, others, name, least, wrong) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be an integer >= {least}.*, got {wrong}$"):
        measured(measure, **others, **{name: wrong})


@pytest.mark.parametrize(("measure", "others", "counts"), COUNTS)
def test_integers_of_numpy_give_the_same_numbers_and_a_record_that_json_knows(measure, others, counts) -> None:
    sizes = {name: max(least, 2) for name, least in counts.items()}
    if "max_iterations" in sizes:
        sizes["max_iterations"] = 9
    found = measured(measure, **others, **{name: np.int64(size) for name, size in sizes.items()})
    plain = measured(measure, **others, **sizes)
    assert json.loads(json.dumps(found.as_dict())) | {"wall_seconds": 0} == plain.as_dict() | {"wall_seconds": 0}


def test_the_monitor_and_the_plane_of_a_trajectory_count_in_integers_too() -> None:
    with pytest.raises(ValueError, match=r"m must be an integer >= 1, got 2.5"):
        SharpnessMonitor(m=2.5)
    with pytest.raises(ValueError, match=r"num_directions must be an integer >= 1, got 1.5"):
        principal_directions([], 1.5)
