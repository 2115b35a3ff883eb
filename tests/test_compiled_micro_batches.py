"""Micro-batches of a compiled step are computed at once, each with its own perturbation."""

import pytest
import torch
from torch import nn

import flatmin
from compiled_runs import assert_same, trained
from optimizers import METHODS, POLICIES, SIMPLE, Row

NAMES = ("SAM", "SAM-p1", "SAM-3-ascents", "ZSharp", "WSAM", "VaSSO", "LookSAM")
ROWS = [row for row in SIMPLE + METHODS + POLICIES if row.name in NAMES]


def network_without_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 900), nn.Tanh(), nn.Dropout(0.4), nn.Linear(900, 3)).double()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_micro_batches_at_once_are_the_loop(row):
    options = {"make": network_without_batch_norm, "num_micro_batches": 4, "num_steps": 8}
    loop = trained(row, compiled=False, **options)
    at_once = trained(row, compiled=True, **options)
    assert at_once[2].reason is None
    assert at_once[2].num_graphs == 1
    assert_same(at_once, loop)


def test_a_micro_batch_has_a_perturbation_of_its_own():
    """The control of the test above."""
    row, options = Row("SAM", flatmin.SAM), {"make": network_without_batch_norm, "num_steps": 8}
    with pytest.raises(AssertionError):
        assert_same(trained(row, compiled=True, num_micro_batches=4, **options), trained(row, compiled=True, **options))


def test_micro_batches_with_running_statistics_are_a_loop():
    options = {"num_micro_batches": 4, "num_steps": 4}
    row = Row("SAM", flatmin.SAM)
    with pytest.warns(UserWarning, match="change the model's buffers one after another"):
        run = trained(row, compiled=True, **options)
    assert_same(run, trained(row, compiled=False, **options), rtol=0, atol=0)
