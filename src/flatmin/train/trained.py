"""The network that a run has trained, read back from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.config import TrainConfig
from flatmin.train.config_file import load_run_config
from flatmin.train.errors import TrainingError
from flatmin.train.state import average_of, fresh_model, unfit_checkpoint

__all__ = ["TrainedRun", "load_run"]


class TrainedRun(NamedTuple):
    """A run's configuration, its network in evaluation mode on the CPU, and the steps that were taken."""

    config: TrainConfig
    model: nn.Module
    step: int


def load_run(run_dir: Path) -> TrainedRun:
    """Read the newest checkpoint of a run; the network has the averaged weights if the run kept them.

    Raises:
        TrainingError: If the directory holds no run, or no whole checkpoint of one.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise TrainingError(f"{run_dir} is not the directory of a run: it has no config.yaml")
    config = load_run_config(path)
    saved = load_newest_checkpoint(run_dir)
    if saved is None:
        raise TrainingError(f"{run_dir} has no checkpoint yet")
    model = fresh_model(config, pretrained=False)
    try:
        if saved["ema"] is None:
            model.load_state_dict(saved["model"], assign=True)  # keeps the dtype that the run had
            return TrainedRun(config, model.eval(), saved["step"])
        average = average_of(config, model)
        average.load_state_dict(saved["ema"], assign=True)
        return TrainedRun(config, average.module.eval(), saved["step"])
    except (KeyError, RuntimeError) as error:
        raise TrainingError(f"{run_dir}: {unfit_checkpoint(error)}") from error
