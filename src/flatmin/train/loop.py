"""The training loop."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning_fabric import Fabric
from rich.console import Console

from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.config import TrainConfig
from flatmin.train.environment import record_environment
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.micro_batches import check_micro_batches
from flatmin.train.run import claim_directory, finished_summary, locked
from flatmin.train.state import TrainingState
from flatmin.train.step import take_step
from flatmin.train.summary import Summary
from flatmin.train.writer import run_writer

__all__ = ["train"]


def train(config: TrainConfig, console: Console | None = None) -> Summary:
    """Train as ``config`` says, or go on where an interrupted run of the same configuration stopped.

    A run that is interrupted at any moment and started again gives the numbers of an uninterrupted one, bit for bit
    where the device computes the same bits twice, as a CPU does. The global random generator is reseeded at each step.

    Args:
        config: The run. ``epochs`` sets the schedule and cannot change on the way; the limits ``max_...`` can.
        console: Where to show progress; None shows nothing.

    Returns:
        The summary of the run, also when it was finished before.

    Raises:
        TrainingError: If the directory is in use or holds another run, the loss is not finite, or the disk is full.
        FileNotFoundError: If the data set is not there and cannot be downloaded.
    """
    if config.dry_run:
        return dry_run(config, console)
    fabric = make_fabric(config)
    console = Console(quiet=True) if console is None or fabric.global_rank > 0 else console
    with locked(config.run_dir) if fabric.global_rank == 0 else nullcontext():
        if fabric.global_rank == 0:
            claim_directory(config)
        summary = finished_summary(config)
        if summary is not None:
            console.print(f"{config.run_dir} is finished")
            return summary
        if fabric.global_rank == 0:
            record_environment(config.run_dir, fabric.device)
        fabric.launch()
        return run_epochs(config, fabric, console)


def run_epochs(config: TrainConfig, fabric: Fabric, console: Console) -> Summary:
    """Train from the newest checkpoint of the run, or from the start, to the last step."""
    check_micro_batches(config, fabric.world_size)
    loaders = make_loaders(config, fabric)
    saved = load_newest_checkpoint(config.run_dir)
    state = TrainingState.initial(config, fabric, len(loaders.train), pretrained=saved is None)
    if saved is not None:
        state.load_state_dict(saved, fabric.global_rank, fabric.world_size)
        console.print(f"going on from step {state.step}")
    num_steps = config.epochs * state.num_batches
    limit = min(config.max_steps or num_steps, (config.max_epochs or config.epochs) * state.num_batches)
    last_step = max(state.step, min(num_steps, limit))

    with run_writer(config, fabric, state, loaders, console=console, last_step=last_step) as writer:
        writer.before_first_step(state)
        for epoch in range(state.epoch, config.epochs):
            batches = loaders.train.epoch(epoch, first_batch=state.batch)
            for batch in islice(batches, last_step - state.step):
                take_step(config, fabric, state, batch)
                writer.after_step(state)
            metrics = writer.after_epoch(state)
            if state.step == last_step:
                break
            state.begin_epoch(epoch + 1)
        return writer.finish(state, metrics)


def dry_run(config: TrainConfig, console: Console | None) -> Summary:
    """Two steps and a short evaluation in a temporary directory, which is gone when the summary is returned."""
    with TemporaryDirectory() as directory:
        trial = replace(config, dry_run=False, output_dir=Path(directory), max_steps=2, max_eval_batches=1)
        return train(trial, console)
