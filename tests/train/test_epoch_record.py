"""A record has the same columns whatever was measured in an epoch, and its line leaves out what was not."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from flatmin.train.config import TrainConfig
from flatmin.train.epoch_record import epoch_line, epoch_metrics
from flatmin.train.evaluate import Evaluation
from flatmin.train.state import TrainingState
from flatmin.train.sums import EpochMeans, EpochSums

MEANS = EpochMeans(num_images=96, train_loss=0.5, train_error_percent=12.5, gradient_norm=2.0, loss_rise=None)
HELD_OUT = Evaluation(loss=0.7, error_percent=20.0, top5_error_percent=3.0, num_images=64)
TRAIN = replace(HELD_OUT, loss=0.4, error_percent=10.0)


def state_after(num_steps: int) -> TrainingState:
    """A run of ten steps an epoch, that many steps into its second."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainingState(model, model, optimizer, None, EpochSums(torch.device("cpu")), num_batches=10)
    state.epoch, state.batch, state.step, state.num_passes = 1, num_steps, 10 + num_steps, 2 * num_steps
    return state


@pytest.mark.parametrize("fields", [{}, {"top5": True}, {"eval_train": True}, {"top5": True, "eval_train": True}])
def test_columns_are_the_same_with_an_evaluation_and_without(fields: dict[str, Any]) -> None:
    config = TrainConfig(**fields)
    evaluated = epoch_metrics(config, state_after(10), MEANS, HELD_OUT, TRAIN)
    skipped = epoch_metrics(config, state_after(10), MEANS, None, None)
    assert list(evaluated) == list(skipped)
    assert {name for name in evaluated if evaluated[name] != skipped[name]} == {
        f"{images}_{value}"
        for images in ("eval", *(("eval_train",) if config.eval_train else ()))
        for value in ("loss", "error_percent", *(("top5_error_percent",) if config.top5 else ()))
    }


def test_a_part_of_an_epoch_counts_as_that_part() -> None:
    metrics = epoch_metrics(TrainConfig(epochs=4, lr=0.2, schedule="constant"), state_after(5), MEANS, None, None)
    assert (metrics["epoch"], metrics["step"], metrics["passes_per_step"]) == (1.5, 15, 2.0)
    assert (metrics["learning_rate"], metrics["rho"]) == (0.2, None)


def test_a_line_says_what_was_measured_alone() -> None:
    config = TrainConfig(epochs=4)
    assert epoch_line(config, 1, MEANS, None, "", "7 s") == "epoch 2/4  loss 0.500  train error 12.50 %  7 s"
    assert epoch_line(config, 1, MEANS, HELD_OUT) == ("epoch 2/4  loss 0.500  train error 12.50 %  test error 20.00 %")
