"""One run of a sweep, in the process where it takes place."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

from flatmin.train.atomic_file import atomic_write
from flatmin.train.checkpoint import checkpoint_paths
from flatmin.train.config import TrainConfig
from flatmin.train.errors import DirectoryInUse, TrainingError
from flatmin.train.loop import train
from flatmin.train.run import finished_summary
from flatmin.train.summary import Summary

__all__ = ["finished_run", "run_trial"]

RELEASE_SECONDS = 120.0  # how long a process that was told to end may still hold the directory of its run


def run_trial(config: TrainConfig, *, keep_checkpoints: bool = False) -> Summary:
    """Train as ``config`` says, from the newest checkpoint of the run if there is one.

    Args:
        config: The run; ``max_epochs`` ends it early, and what it has come to by then is kept for good.
        keep_checkpoints: Keep those of a finished search run too, of which nothing but the numbers is needed.

    Raises:
        TrainingError: If the run cannot start or go on, or this machine does not see the sweep's directory.
    """
    if not config.run_dir.parent.is_dir():
        raise TrainingError(f"{platform.node()} does not see {config.run_dir.parent}: nodes must share --output-dir")
    config.run_dir.mkdir(exist_ok=True)
    with (config.run_dir / "tries.jsonl").open("a") as file:
        file.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "time": time.time()}) + "\n")
    summary = _train_when_free(config)
    if config.max_epochs is not None:
        atomic_write(_rung_file(config), summary.to_json())
    elif config.eval_on == "validation" and not keep_checkpoints:
        for path in checkpoint_paths(config.run_dir):
            path.unlink()
    return summary


def finished_run(config: TrainConfig) -> Summary | None:
    """Return what ``config`` has come to if nothing is left to do, else None.

    Where ``max_epochs`` ends it early, a run that went all the way without having been looked at then is finished too.
    """
    if config.max_epochs is not None and _rung_file(config).exists():
        return Summary.from_json(_rung_file(config).read_text())
    summary = finished_summary(config)
    return summary if summary is None or config.max_epochs is None or summary.complete else None


def _train_when_free(config: TrainConfig) -> Summary:
    deadline = time.monotonic() + RELEASE_SECONDS
    while True:
        try:
            return train(config)
        except DirectoryInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _rung_file(config: TrainConfig) -> Path:
    return config.run_dir / f"after-{config.max_epochs}-epochs.json"
