"""Sharpness of the training loss after an epoch, in the record of a run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from flatmin.sharpness import SharpnessMonitor
from flatmin.train.config import TrainConfig
from flatmin.train.data import EvalLoader
from flatmin.train.errors import TrainingError
from flatmin.train.launch import forward
from flatmin.train.state import TrainingState

__all__ = ["EpochSharpness", "EpochValues"]


class EpochValues(NamedTuple):
    """What measuring brought after an epoch, for the record of the run.

    ``values`` by name, None where not measured; in ``timing`` what measuring has cost by now and how often it was left
    out; what happened in ``words``, none if nothing was due.
    """

    values: dict[str, float | None]
    timing: dict[str, float]
    words: str


class EpochSharpness:
    """Measures every ``sharpness_every`` epochs, as far as the budget goes; all processes must call it.

    Measured are the weights that are evaluated: their average, if the run keeps one.

    Args:
        config: The run, which asks for sharpness.
        fabric: Its processes.
        sample: Training images of this process to measure on; they are kept on the device.
        state: Where the run stands: what it has spent on measuring.

    Raises:
        TrainingError: If no group of ``sharpness_m`` images fits.
    """

    def __init__(self, config: TrainConfig, fabric: Fabric, sample: EvalLoader, state: TrainingState) -> None:
        images_per_batch = min(config.batch_size, config.sharpness_images) // fabric.world_size
        if config.sharpness_m is not None and config.sharpness_m > images_per_batch:
            raise TrainingError(
                f"sharpness_m must be at most the images of a batch or of the sample on each device, "
                f"{images_per_batch}, got {config.sharpness_m}"
            )
        self.config = config
        self.fabric = fabric
        self.sample = list(sample)  # in memory: there are many passes over it, and files would be decoded in each
        self.monitor = SharpnessMonitor(
            config.sharpness_measures, budget=config.sharpness_budget, rho=config.sharpness_rho, m=config.sharpness_m
        )
        if state.sharpness:
            self.monitor.load_state_dict(state.sharpness)

    def after_epoch(self, state: TrainingState) -> EpochValues:
        """Measure the epoch that has just ended, if it is due and can be afforded; ``state`` keeps what that cost."""
        values: dict[str, float | None] = {f"sharpness_{name}": None for name in self.monitor.names}
        words = ""
        if (state.epoch + 1) % (self.config.sharpness_every or 1) == 0:
            if self.fabric.broadcast(self.monitor.can_afford()):  # clocks differ between processes
                with state.true_weights():
                    numbers = self._measured(state.evaluated_model)
                values = {f"sharpness_{name}": value for name, value in numbers.items()}
                words = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
            else:
                self.monitor.skip()
                words = "sharpness skipped: its budget is spent for now"
        self.keep_spent(state)
        timing = {"sharpness_seconds": self.monitor.spent_seconds, "sharpness_skipped": self.monitor.num_skipped}
        return EpochValues(values, timing, words)

    def keep_spent(self, state: TrainingState) -> None:
        """Write into ``state`` what measuring has cost by now."""
        state.sharpness = self.monitor.state_dict()

    def _measured(self, model: nn.Module) -> dict[str, float]:
        several = self.fabric.world_size > 1
        return self.monitor.measure(
            model,
            self._loss,
            self.sample,
            batch_norm=self.config.sharpness_batchnorm,
            process_group=torch.distributed.group.WORLD if several else None,
        )

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(forward(self.fabric, model, images), labels)
