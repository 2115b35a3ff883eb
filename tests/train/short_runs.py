"""A run that has begun, and one that has ended."""

from typing import Any

import torch
from lightning_fabric import Fabric

from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.config import TrainConfig
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.state import TrainingState


def final_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    saved = load_newest_checkpoint(config.run_dir)
    assert saved is not None
    return saved["model"]


def started(config: TrainConfig) -> tuple[Fabric, TrainingState, Any]:
    fabric = make_fabric(config)
    loaders = make_loaders(config, fabric)
    return fabric, TrainingState.initial(config, fabric, len(loaders.train)), loaders
