"""The directory of a run: one process at a time, one configuration, one summary."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from flatmin.train.atomic_file import atomic_write
from flatmin.train.checkpoint import checkpoint_paths
from flatmin.train.config import TrainConfig
from flatmin.train.config_difference import differing_fields
from flatmin.train.config_file import config_to_yaml, load_run_config
from flatmin.train.errors import DirectoryInUse, TrainingError
from flatmin.train.summary import Summary

__all__ = ["claim_directory", "finished_summary", "locked", "write_summary"]


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory``, which is made if need be; the system drops it however the process ends.

    Raises:
        DirectoryInUse: If another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DirectoryInUse(f"another process is training in {directory}") from error
        yield


def claim_directory(config: TrainConfig) -> None:
    """Save the configuration in the run's directory, or make sure that it is the one that the run began with.

    Raises:
        TrainingError: If the directory belongs to a run whose numbers would differ.
    """
    path = config.run_dir / "config.yaml"
    for unfinished in config.run_dir.glob("*.tmp"):  # a process was killed while it wrote them
        unfinished.unlink()
    has_begun = checkpoint_paths(config.run_dir) or (config.run_dir / "summary.json").exists()
    if path.exists() and has_begun:
        differing = differing_fields(load_run_config(path), config)
        if differing:
            raise TrainingError(
                f"{config.run_dir} holds a run with other settings ({'; '.join(differing)}): choose another "
                f"--output-dir, or delete it"
            )
    atomic_write(path, config_to_yaml(replace(config, output_dir=config.run_dir)))


def finished_summary(config: TrainConfig) -> Summary | None:
    """The summary of a run that has nothing left to do, else None; a damaged one is passed over with a warning."""
    path = config.run_dir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = replace(Summary.from_json(path.read_text()), run_dir=config.run_dir)
    except ValueError as error:  # the checkpoints are the run: it goes on from there, and writes another summary
        warnings.warn(f"{path} is damaged ({error}); going on from the newest checkpoint", stacklevel=2)
        return None
    reached_steps = config.max_steps is not None and summary.steps >= config.max_steps
    reached_epochs = config.max_epochs is not None and summary.epochs >= config.max_epochs
    return summary if summary.complete or reached_steps or reached_epochs else None


def write_summary(summary: Summary) -> None:
    """Write ``summary.json``, which marks the run as finished."""
    atomic_write(summary.run_dir / "summary.json", summary.to_json())
