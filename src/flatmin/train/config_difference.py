"""Which settings decide the numbers of a run, and in which of them two configurations differ."""

from __future__ import annotations

from dataclasses import fields

from flatmin.train.config import TrainConfig
from flatmin.train.methods import resolved_options

__all__ = ["NEUTRAL_FIELDS", "differing_fields"]

# Where and how often to write, and when to stop: fields that leave every number of the run as it is.
NEUTRAL_FIELDS = frozenset(
    (
        *("output_dir", "data_dir", "num_workers", "wandb", "wandb_project", "progress_steps", "dry_run"),
        *("max_steps", "max_epochs"),
        *("checkpoint_seconds", "checkpoint_every", "num_checkpoints", "keep_epochs"),
        *("sharpness_every", "sharpness_measures", "sharpness_budget", "sharpness_images", "sharpness_rho"),
        *("sharpness_m", "sharpness_batchnorm"),
    )
)


def differing_fields(first: TrainConfig, second: TrainConfig) -> list[str]:
    """Name the fields that differ and alter a run's numbers, each with both values."""
    pairs = [(f.name, getattr(first, f.name), getattr(second, f.name)) for f in fields(TrainConfig)]
    if first.method == second.method:
        old, new = (resolved_options(config.method, config.method_options) for config in (first, second))
        pairs += [(f"method.{name}", old[name], new[name]) for name in old]
    return [
        f"{name} {old} -> {new}"
        for name, old, new in pairs
        if name not in (*NEUTRAL_FIELDS, "method_options") and old != new
    ]
