"""The processes and devices of a run, by Lightning Fabric."""

from __future__ import annotations

import inspect
import os
from dataclasses import replace
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.strategy import Strategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch.nn.parallel import DistributedDataParallel

from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError, one_line

__all__ = ["forward", "make_fabric", "on_one_device"]


def make_fabric(config: TrainConfig) -> Fabric:
    """Choose devices, precision and strategy; ``launch()`` then starts the other processes, if any.

    Under ``torchrun`` the processes are there already; their number is taken from it unless the configuration says one.

    Raises:
        TrainingError: If this machine has no such devices.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    devices, num_nodes = _parsed_devices(config.devices), config.num_nodes
    if torch.distributed.is_torchelastic_launched() and (devices, num_nodes) == (1, 1):
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    several = devices != 1 or num_nodes > 1
    strategy: str | Strategy = _replicas() if config.strategy == "ddp" or several else "auto"
    try:
        return Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=config.precision,
        )
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        raise TrainingError(
            f"accelerator {config.accelerator} with devices {config.devices} must be on this machine: {one_line(error)}"
        ) from error


def on_one_device(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration, with other ``changes``, for one device of this machine, however many the run trained on."""
    return replace(config, devices="1", num_nodes=1, strategy="auto", **changes)


def forward(fabric: Fabric, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits in float32, or in float64 when that is the precision of the run.

    Under autocast and in the dtype of the weights, so that ``model`` may be Fabric's module or the bare one.
    """
    dtype = next(model.parameters()).dtype
    with fabric.autocast():
        logits: torch.Tensor = model(images.to(dtype))
    return logits if logits.dtype == torch.float64 else logits.float()


def _replicas() -> DDPStrategy:
    """Replicas that send no buffers before a pass, since each step ends with the mean of them everywhere."""
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DDPStrategy(**options)


def _parsed_devices(devices: str) -> int | str | list[int]:
    if devices == "auto":
        return devices
    if "," in devices:
        return [int(index) for index in devices.split(",") if index.strip()]
    return int(devices)
