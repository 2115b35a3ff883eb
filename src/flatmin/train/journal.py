"""The record of a run: JSON lines, TensorBoard events and, if asked for, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError, one_line

__all__ = ["Journal", "read_metrics"]

Record = Mapping[str, float | None]


class Journal:
    """Writes one record an epoch to everything that keeps records; a context manager.

    ``metrics.jsonl`` holds only what the configuration determines, so that a resumed run writes the bytes of an
    uninterrupted one; times go to ``timing.jsonl`` and to the event files.

    Args:
        config: Configuration of the run.
        first_step: Step to go on from; what TensorBoard has of later ones is superseded.
        metrics_bytes: Length of ``metrics.jsonl`` at that step; the rest is cut off.
    """

    def __init__(self, config: TrainConfig, first_step: int, metrics_bytes: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - takes a second, and only writers need it

        directory = config.run_dir
        with ExitStack() as opened:
            self._wandb = _started_wandb(config) if config.wandb else None
            if self._wandb is not None:
                opened.callback(self._wandb.finish)
            self._metrics = opened.enter_context((directory / "metrics.jsonl").open("ab"))
            if self._metrics.seek(0, os.SEEK_END) < metrics_bytes:
                raise TrainingError(f"{self._metrics.name} is shorter than the checkpoint says: it was changed")
            self._metrics.truncate(metrics_bytes)
            self._timing = opened.enter_context((directory / "timing.jsonl").open("a"))
            self._events = SummaryWriter(str(directory), purge_step=first_step)
            opened.callback(self._events.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def write(self, step: int, metrics: Record, timing: Record) -> None:
        """Append one record; a value that is not finite, or not measured, becomes null."""
        self._metrics.write(_json_line(metrics).encode())
        self._metrics.flush()
        self._timing.write(_json_line(timing))
        self._timing.flush()
        known = {name: value for name, value in {**metrics, **timing}.items() if value is not None}
        for name, value in known.items():
            if name not in {"step", "epoch"}:
                self._events.add_scalar(name, value, step)
        self._events.flush()
        if self._wandb is not None:
            self._wandb.log(known, step=step)

    def synced_bytes(self) -> int:
        """Length of ``metrics.jsonl``, once all of it has reached the disk."""
        os.fsync(self._metrics.fileno())
        return self._metrics.seek(0, os.SEEK_END)


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    """Read the records of ``metrics.jsonl``."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _json_line(record: Record) -> str:
    finite = {name: value if value is None or math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _started_wandb(config: TrainConfig) -> Any:
    """Start a Weights & Biases run, or go on with the one that this directory began."""
    try:
        import wandb  # noqa: PLC0415 - an optional dependency
    except ModuleNotFoundError as error:
        raise TrainingError("--wandb needs the package wandb: pip install 'flatmin[wandb]'") from error
    id_file = config.run_dir / "wandb-id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    try:
        return wandb.init(
            project=config.wandb_project,
            name=config.run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            dir=config.run_dir,
            config=values,
        )
    except Exception as error:  # of its settings, its network or its account, each of a kind of its own
        raise TrainingError(
            f"--wandb could not start Weights & Biases: {one_line(error)} (WANDB_MODE=offline needs no account)"
        ) from error
