"""What a run carries from step to step, and how it is saved."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

import flatmin
from flatmin.train.averaging import averaged
from flatmin.train.batch_statistics import freeze_statistics_, synchronised
from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError, one_line
from flatmin.train.facts import facts_of
from flatmin.train.models import build_model
from flatmin.train.optimizers import build_optimizer
from flatmin.train.sums import EpochSums

__all__ = ["TrainingState", "average_of", "fresh_model", "unfit_checkpoint"]


@dataclass
class TrainingState:
    """Weights, optimizer and position of a run.

    ``replica`` is the model as Fabric wrapped it, for training passes; ``model`` is the bare one. The position is
    ``batch`` of ``num_batches`` batches into epoch ``epoch``, both from 0, after ``step`` optimizer steps; by then the
    run had taken ``wall_seconds`` and written ``metrics_bytes`` of metrics. In this epoch there were ``num_passes``
    forward-backward passes and ``num_perturbed_steps`` steps that saw the loss at w and at w + eps. ``sharpness`` is
    what the monitor of sharpness has spent, if there is one.
    """

    model: nn.Module
    replica: nn.Module
    optimizer: Optimizer
    ema: AveragedModel | None
    sums: EpochSums
    num_batches: int
    epoch: int = 0
    batch: int = 0
    step: int = 0
    wall_seconds: float = 0.0
    metrics_bytes: int = 0
    num_passes: int = 0
    num_perturbed_steps: int = 0
    sharpness: dict[str, float | None] = field(default_factory=dict)

    @classmethod
    def initial(
        cls, config: TrainConfig, fabric: Fabric, num_batches: int, *, pretrained: bool = True
    ) -> TrainingState:
        """Draw the weights, or read the pretrained ones, and build the optimizer around them.

        Args:
            config: The run.
            fabric: Its processes.
            num_batches: Steps of an epoch.
            pretrained: False leaves out weights that ``config`` asks for, because saved ones will replace them.

        Raises:
            TrainingError: If pretrained weights cannot be had, or batch norm cannot be synchronised.
        """
        with fabric.rank_zero_first() if config.pretrained else nullcontext():  # one process downloads
            model = fresh_model(config, pretrained=pretrained)
        if config.batchnorm == "synchronised":
            model = synchronised(model, fabric)
        replica = fabric.setup_module(model)
        if config.freeze_batchnorm:
            freeze_statistics_(model)
        if config.compile:
            model.compile(dynamic=False)  # each shape on its own, so that a resumed run has the kernels of a whole one
        ema = average_of(config, model) if config.ema_decay > 0.0 else None
        optimizer = build_optimizer(config, replica, num_batches)
        return cls(model, replica, optimizer, ema, EpochSums(fabric.device), num_batches)

    @property
    def evaluated_model(self) -> nn.Module:
        """The average of the weights if there is one, else the weights."""
        return self.model if self.ema is None else self.ema

    def true_weights(self) -> AbstractContextManager[None]:
        """Show the weights themselves inside the block, where the method lets them rest at w + eps between steps."""
        return self.optimizer.unperturbed() if isinstance(self.optimizer, flatmin.OnePass) else nullcontext()

    def begin_epoch(self, epoch: int) -> None:
        """Move to the first batch of ``epoch``."""
        self.epoch, self.batch = epoch, 0
        self.num_passes = self.num_perturbed_steps = 0
        self.sums.reset_()

    def state_dict(self, fabric: Fabric) -> dict[str, Any]:
        """Everything needed to go on, in types that ``torch.load(weights_only=True)`` accepts.

        No generator state: the random numbers of a step follow from the seed and the step, the order and
        augmentation of images from the seed and the epoch, the learning rate from the step. Take it and write it
        inside ``true_weights()``: it holds the tensors themselves.
        """
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "wall_seconds": self.wall_seconds,
            "metrics_bytes": self.metrics_bytes,
            "num_passes": self.num_passes,
            "num_perturbed_steps": self.num_perturbed_steps,
            "sharpness": self.sharpness,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "sums": self.sums.gathered(fabric),
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int, num_ranks: int) -> None:
        """Return to a saved state, bit for bit; another number of processes may have saved it.

        Raises:
            TrainingError: It is that of another network or optimizer.
        """
        try:
            self._load(state, rank, num_ranks)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise unfit_checkpoint(error) from error

    def _load(self, state: Mapping[str, Any], rank: int, num_ranks: int) -> None:
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.wall_seconds, self.metrics_bytes = state["wall_seconds"], state["metrics_bytes"]
        self.num_passes, self.num_perturbed_steps = state["num_passes"], state["num_perturbed_steps"]
        self.sharpness = state.get("sharpness", {})  # not in checkpoints of older versions
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.sums.restore_(state["sums"], rank, num_ranks)


def fresh_model(config: TrainConfig, *, pretrained: bool = True) -> nn.Module:
    """Build the network of ``config`` with weights drawn from its seed, or the pretrained ones that it asks for.

    Args:
        config: The run.
        pretrained: False draws the weights whatever ``config`` asks for.

    Raises:
        TrainingError: If the network does not suit the images, or pretrained weights cannot be had.
    """
    facts = facts_of(config)
    options = config.model_options if pretrained else replace(config.model_options, pretrained=False, weights=None)
    torch.manual_seed(config.seed)
    try:
        model = build_model(
            config.model,
            facts.num_classes,
            facts.image_shape[2],
            options,
            image_size=config.image_size or min(facts.image_shape[:2]),
        )
    except ValueError as error:
        raise TrainingError(str(error)) from error
    return model.to(memory_format=torch.channels_last)  # as the images are: convolutions then convert nothing


def average_of(config: TrainConfig, model: nn.Module) -> AveragedModel:
    """The moving average that ``config`` asks for, around a copy of ``model``."""
    return averaged(model, config.ema_decay, ramp=config.ema_ramp, start=config.ema_start)


def unfit_checkpoint(error: Exception) -> TrainingError:
    """What to raise where a checkpoint is whole, but of another network than its configuration builds here."""
    reason = f"it has no {error}" if isinstance(error, KeyError) else one_line(error)
    return TrainingError(
        f"the newest checkpoint must fit the configuration, as one of the same versions of all packages does: {reason}"
    )
