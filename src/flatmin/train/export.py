"""The command ``export``: the weights of a run as a plain file, for code that does not know this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors.torch import save
from torch import Tensor

from flatmin.train.atomic_file import replaced_file
from flatmin.train.config import TrainConfig
from flatmin.train.errors import UsageError
from flatmin.train.facts import facts_of
from flatmin.train.models import timm_call
from flatmin.train.trained import load_run

__all__ = ["ExportArguments", "export_command", "plain_weights"]

SUFFIXES = (".pt", ".safetensors")


@dataclass(frozen=True)
class ExportArguments:
    """Write the weights of a run as a plain state_dict, which loads without this package."""

    run: tyro.conf.Positional[Path]
    """Directory of the run."""
    out: Path | None = None
    """File to write, .pt or .safetensors; None is weights.safetensors in that directory."""


def export_command(arguments: list[str]) -> None:
    """``flatmin export RUN [--out FILE]``: write the file and print what it holds."""
    asked = tyro.cli(ExportArguments, prog="flatmin export", args=arguments)
    path = asked.out or asked.run / "weights.safetensors"
    if path.suffix not in SUFFIXES:
        raise UsageError(f"out must end in {' or '.join(SUFFIXES)}, got {path}")
    config, model, step = load_run(asked.run)
    weights = plain_weights(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        if path.suffix == ".pt":
            torch.save(weights, file)
        else:
            file.write(save(weights, metadata={"format": "pt", "model": config.model}))
    which = "averaged weights" if config.ema_decay > 0.0 else "weights"
    print(f"{which} of {config.model} after {step} steps: {len(weights)} tensors in {path}{_how_to_load(config)}")


def plain_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of ``model`` by name, each in memory of its own and in the usual order of dimensions."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def _how_to_load(config: TrainConfig) -> str:
    facts = facts_of(config)
    side = config.image_size or facts.image_shape[0]
    call = timm_call(config.model, facts.num_classes, facts.image_shape[2], side)
    return "" if call is None else f"; they fit {call}"
