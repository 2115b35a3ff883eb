"""The budget of a monitor, on a clock that tests turn, and its values."""

import math
from dataclasses import replace

import pytest
import torch
from known import ONE_BATCH, Quadratic, batch_norm_network, pairs, quadratic_loss, smooth_network

from flatmin.sharpness import (
    SharpnessMonitor,
    average_case,
    hessian_eigenvalues,
    hessian_trace,
    monitor,
    worst_case,
)

LOSS = torch.nn.CrossEntropyLoss()
ALL = ("worst-case", "average-case", "eigenvalues", "trace")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list of one; a pass over the data takes two."""
    now = [0.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    return now


def slow_loss(clock: list[float]):
    def loss(model: Quadratic, batch: torch.Tensor) -> torch.Tensor:
        clock[0] += 2.0
        return quadratic_loss(model, batch)

    return loss


def test_measuring_stays_within_the_budget_once_the_first_is_paid_off(clock: list[float]) -> None:
    asked = SharpnessMonitor(budget=0.1)
    model = Quadratic(torch.eye(3), weights=torch.ones(3))
    taken = []
    for epoch in range(1, 201):
        clock[0] += 5.0
        if asked.can_afford():
            asked.measure(model, slow_loss(clock), ONE_BATCH)  # two passes: four seconds
            taken.append(epoch)
        else:
            asked.skip()
        assert asked.training_seconds == pytest.approx(5.0 * epoch)
        if epoch >= 8:
            assert asked.spent_seconds <= 0.1 * asked.training_seconds
    assert taken == [
        1,
        *range(16, 201, 8),
    ]  # 8 seconds are a tenth of 16 epochs, and so on: as many as the budget allows
    assert (asked.spent_seconds, asked.num_skipped) == (4.0 * len(taken), 200 - len(taken))


def test_an_infinite_budget_affords_everything(clock: list[float]) -> None:
    asked = SharpnessMonitor(budget=math.inf)
    model = Quadratic(torch.eye(3), weights=torch.ones(3))
    for _ in range(3):
        clock[0] += 0.1
        assert asked.can_afford()
        asked.measure(model, slow_loss(clock), ONE_BATCH)


def test_a_resumed_monitor_goes_on_from_what_was_spent(clock: list[float]) -> None:
    first = SharpnessMonitor(budget=0.1)
    model = Quadratic(torch.eye(3), weights=torch.ones(3))
    first.measure(model, slow_loss(clock), ONE_BATCH)
    clock[0] += 79.0
    first.skip()
    state = first.state_dict()
    clock[0] += 1000.0  # nothing runs meanwhile
    second = SharpnessMonitor(budget=0.1)
    second.load_state_dict(state)
    assert second.num_skipped == 1
    assert (second.spent_seconds, second.training_seconds) == (4.0, 79.0)
    assert not second.can_afford()
    clock[0] += 1.0
    assert second.can_afford()
    second.start()
    assert (second.spent_seconds, second.num_skipped, second.training_seconds) == (0.0, 0, 0.0)


def test_values_are_those_of_the_measures() -> None:
    model, data = smooth_network(), pairs()
    num_params = sum(param.numel() for param in model.parameters())
    values = SharpnessMonitor(ALL, rho=0.1, m=4).measure(model, LOSS, data)
    eigenvalues = hessian_eigenvalues(model, LOSS, data, tolerance=1e-2)
    expected = {
        "worst_case": worst_case(model, LOSS, data, 0.1, m=4).value,
        "average_case": average_case(model, LOSS, data, 0.1 / math.sqrt(num_params), num_draws=10).value,
        "lambda_1": eigenvalues.value,
        "lambda_1_over_lambda_5": eigenvalues.ratio(),
        "hessian_trace": hessian_trace(model, LOSS, data, 10).value,
    }
    assert values == expected
    assert values["worst_case"] != SharpnessMonitor(rho=0.2, m=4).measure(model, LOSS, data)["worst_case"]


def test_options_reach_the_measures() -> None:
    model, data = batch_norm_network(), pairs()
    values = [
        SharpnessMonitor(("eigenvalues",)).measure(model, LOSS, data, batch_norm=kind) for kind in ("running", "batch")
    ]
    assert values[0]["lambda_1"] != pytest.approx(values[1]["lambda_1"], rel=1e-3)


def test_what_is_not_finite_or_has_no_fifth_eigenvalue_is_nan() -> None:
    infinite = Quadratic(torch.full((3, 3), torch.nan))
    assert all(
        math.isnan(value) for value in SharpnessMonitor(ALL).measure(infinite, quadratic_loss, ONE_BATCH).values()
    )
    small = Quadratic(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    values = SharpnessMonitor(("eigenvalues",)).measure(small, quadratic_loss, ONE_BATCH)
    assert values["lambda_1"] == pytest.approx(3.0, rel=1e-4)
    assert math.isnan(values["lambda_1_over_lambda_5"])


@pytest.mark.parametrize("last_converged", [4, 3, 0])
def test_an_eigenvalue_that_has_not_converged_is_nan(last_converged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    converged = tuple(index < last_converged for index in range(5))
    found = hessian_eigenvalues(Quadratic(torch.diag(torch.arange(1.0, 8.0))), quadratic_loss, ONE_BATCH, 5)
    monkeypatch.setattr(monitor, "hessian_eigenvalues", lambda *_, **__: replace(found, converged=converged))
    values = SharpnessMonitor(("eigenvalues",)).measure(smooth_network(), LOSS, pairs())
    assert math.isnan(values["lambda_1"]) == (last_converged == 0)
    assert math.isnan(values["lambda_1_over_lambda_5"])
    monkeypatch.setattr(monitor, "hessian_eigenvalues", lambda *_, **__: found)
    values = SharpnessMonitor(("eigenvalues",)).measure(smooth_network(), LOSS, pairs())
    assert values == {"lambda_1": found.value, "lambda_1_over_lambda_5": found.ratio()}  # control


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measures": ("sharp",)}, "measures must be one or several of worst-case"),
        ({"measures": ()}, r"each once, got \[\]"),
        ({"measures": ("trace", "trace")}, "each once"),
        ({"budget": 0.0}, "budget must be > 0, got 0.0"),
        ({"budget": math.nan}, "budget must be > 0, got nan"),
        ({"m": 0}, "m must be an integer >= 1, got 0"),
        ({"rho": -1.0}, "rho must be >= 0 and finite, got -1.0"),
        ({"rho": math.inf}, "rho must be >= 0 and finite, got inf"),
    ],
)
def test_settings_outside_their_domain_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharpnessMonitor(**settings)
