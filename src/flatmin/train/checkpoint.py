"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flatmin.train.atomic_file import replaced_file
from flatmin.train.errors import TrainingError

__all__ = ["checkpoint_paths", "load_newest_checkpoint", "save_checkpoint", "write_state"]


def save_checkpoint(directory: Path, step: int, state: Mapping[str, Any], num_kept: int = 2) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and delete all but the newest ``num_kept``.

    Raises:
        TrainingError: If the file cannot be written, for instance to a full disk; the older checkpoints are whole.
    """
    path = write_state(directory / f"checkpoint-{step:09d}.pt", state)
    for old in checkpoint_paths(directory)[num_kept:]:
        old.unlink()
    return path


def write_state(path: Path, state: Mapping[str, Any]) -> Path:
    """Write ``state`` to ``path`` as a whole or not at all.

    Raises:
        TrainingError: If the file cannot be written.
    """
    try:
        with replaced_file(path) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:  # torch turns an OSError of its file into a RuntimeError
        reason = _root_cause(error)
        raise TrainingError(f"could not save {path}: {reason}; the previous checkpoint is untouched") from error
    return path


def load_newest_checkpoint(directory: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint that is whole, on the CPU; None if there is none.

    A damaged one is passed over with a warning that names it. Torch does not compare the checksums in its files, so
    they are compared here first.
    """
    for path in checkpoint_paths(directory):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except PermissionError:  # which is no damage, and no reason to begin anew
            raise
        except Exception as error:  # damage shows as an error of any kind
            warnings.warn(f"{path} is damaged ({error}); falling back to the one before", stacklevel=2)
        else:
            return state
    return None


def checkpoint_paths(directory: Path) -> list[Path]:
    """All checkpoints of a run, the newest first."""
    return sorted(directory.glob("checkpoint-*.pt"), reverse=True)


def _root_cause(error: BaseException) -> str:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
