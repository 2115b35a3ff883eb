"""What a run writes: checkpoints and progress between steps, a record after each epoch, a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from lightning_fabric import Fabric
from rich.console import Console

from flatmin.train.checkpoint import save_checkpoint, write_state
from flatmin.train.config import TrainConfig
from flatmin.train.data import EvalLoader
from flatmin.train.epoch_record import epoch_line, epoch_metrics
from flatmin.train.errors import NonFiniteLossError
from flatmin.train.evaluate import Evaluation, evaluate
from flatmin.train.failure import kept_failure
from flatmin.train.journal import Journal
from flatmin.train.loaders import Loaders
from flatmin.train.methods import has_loss_rise
from flatmin.train.progress import TrainingProgress
from flatmin.train.run import write_summary
from flatmin.train.sharpness import EpochSharpness, EpochValues
from flatmin.train.state import TrainingState
from flatmin.train.summary import Summary
from flatmin.train.sums import EpochMeans

__all__ = ["RunWriter", "run_writer"]


@contextmanager
def run_writer(
    config: TrainConfig, fabric: Fabric, state: TrainingState, loaders: Loaders, *, console: Console, last_step: int
) -> Iterator[RunWriter]:
    """Open the files of a run, in its first process alone, and show progress there."""
    with ExitStack() as stack:
        journal = None
        if fabric.global_rank == 0:
            (config.run_dir / "summary.json").unlink(missing_ok=True)  # of fewer steps
            journal = stack.enter_context(Journal(config, state.step, state.metrics_bytes))
        progress = stack.enter_context(TrainingProgress(console, state.step, last_step))
        yield RunWriter(
            *(config, fabric, loaders, last_step),
            journal=journal,
            progress=progress,
            wall_seconds=state.wall_seconds,
            sharpness=None if loaders.sharpness is None else EpochSharpness(config, fabric, loaders.sharpness, state),
        )


class RunWriter:
    """Writes for all processes of a run; each must call it at the same steps, since numbers are reduced over them.

    Args:
        config: Configuration of the run.
        fabric: Its processes.
        loaders: Its images.
        last_step: Number of steps after which it ends.
        journal: Where records go; None in all processes but the first.
        progress: What the terminal shows.
        wall_seconds: Time that the run took before it was interrupted.
        sharpness: What measures sharpness; None unless asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        fabric: Fabric,
        loaders: Loaders,
        last_step: int,
        *,
        journal: Journal | None,
        progress: TrainingProgress,
        wall_seconds: float,
        sharpness: EpochSharpness | None,
    ) -> None:
        self.config = config
        self.fabric = fabric
        self.loaders = loaders
        self.last_step = last_step
        self.journal = journal
        self.progress = progress
        self.sharpness = sharpness
        self.started = time.monotonic() - wall_seconds
        self.saved_at = time.monotonic()

    def before_first_step(self, state: TrainingState) -> None:
        """Keep the initial weights, if they are asked for."""
        if state.step == 0 and 0 in self.config.keep_epochs:
            self._keep(state, num_epochs=0)

    def after_step(self, state: TrainingState) -> None:
        """Show progress and save a checkpoint, whenever it is time for one.

        Raises:
            TrainingError: If the loss was not finite, or the checkpoint could not be written.
        """
        if state.step % self.config.progress_steps == 0:
            self.progress.show(state.epoch, state.step, self._means(state))
        num_epochs = state.epoch + 1 if state.batch == state.num_batches else None
        if state.step == self.last_step or self._save_is_due(state.step, num_epochs):
            self._save(state)
        if num_epochs in self.config.keep_epochs:
            self._keep(state, num_epochs)

    def after_epoch(self, state: TrainingState) -> dict[str, float | None]:
        """Evaluate, if it is time for it, and record the epoch or the part of it that was trained."""
        means = self._means(state)
        on_held_out, on_train = self._evaluations(state)
        sharpness = EpochValues({}, {}, "") if self.sharpness is None else self.sharpness.after_epoch(state)
        metrics = epoch_metrics(self.config, state, means, on_held_out, on_train) | sharpness.values
        wall_seconds = self._wall_seconds()
        if self.journal is not None:
            timing = {"step": state.step, **sharpness.timing, "wall_seconds": wall_seconds}
            self.journal.write(state.step, metrics, timing)
        line = epoch_line(self.config, state.epoch, means, on_held_out, sharpness.words, f"{wall_seconds:.0f} s")
        self.progress.epoch_done(line)
        return metrics

    def finish(self, state: TrainingState, metrics: dict[str, float | None]) -> Summary:
        """Write the summary of the run, whose last record is ``metrics``."""
        config = self.config
        measured: dict[str, Any] = {name: metrics.get(name) for name in Summary.measured()}
        summary = Summary(
            run_dir=config.run_dir,
            recipe=config.recipe,
            method=config.method,
            seed=config.seed,
            epochs=state.step / state.num_batches,
            steps=state.step,
            complete=state.step == config.epochs * state.num_batches,
            eval_on=config.eval_on,
            wall_seconds=self._wall_seconds(),
            **measured,
        )
        if self.journal is not None:
            write_summary(summary)
        return summary

    def _means(self, state: TrainingState) -> EpochMeans:
        try:
            means = state.sums.means(self.fabric, with_rise=has_loss_rise(self.config.method))
        except NonFiniteLossError as error:
            raise kept_failure(self.config, self.fabric, state, self.loaders.train, error) from error
        share = state.num_perturbed_steps / max(state.batch, 1)
        return replace(means, loss_rise=means.loss_rise / share if means.loss_rise is not None and share else None)

    def _evaluations(self, state: TrainingState) -> tuple[Evaluation | None, Evaluation | None]:
        """Results on the images held out and on the training images; None where it is not time for one."""
        if (state.epoch + 1) % self.config.eval_every and state.step != self.last_step:
            return None, None
        held_out, train = self.loaders.evaluation, self.loaders.train_evaluation
        with state.true_weights():
            return self._evaluation(state, held_out), None if train is None else self._evaluation(state, train)

    def _evaluation(self, state: TrainingState, batches: EvalLoader) -> Evaluation:
        return evaluate(self.fabric, state.evaluated_model, batches, self.config.max_eval_batches)

    def _wall_seconds(self) -> float:
        return time.monotonic() - self.started

    def _save_is_due(self, step: int, num_epochs: int | None) -> bool:
        every = self.config.checkpoint_every
        if self.config.checkpoint_seconds == 0.0 or (every and num_epochs and num_epochs % every == 0):
            return True
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_seconds
        if self.fabric.world_size == 1:
            return due
        # Clocks differ between processes, so the first one's decides, and rarely: asking it is a synchronisation.
        return step % self.config.progress_steps == 0 and self.fabric.broadcast(due)

    def _keep(self, state: TrainingState, num_epochs: int) -> None:
        """Write a checkpoint that no later one replaces."""
        with self._saved_state(state) as saved:
            if self.journal is not None:
                write_state(self.config.run_dir / f"epoch-{num_epochs:06d}.pt", saved)

    def _save(self, state: TrainingState) -> None:
        with self._saved_state(state) as saved:
            if self.journal is not None:
                save_checkpoint(self.config.run_dir, state.step, saved, self.config.num_checkpoints)
        self.saved_at = time.monotonic()

    @contextmanager
    def _saved_state(self, state: TrainingState) -> Iterator[dict[str, Any]]:
        """Give what to write, which holds the weights themselves: it is right inside the block alone."""
        self._means(state)  # raises if the loss was not finite: such weights must not replace good ones
        state.wall_seconds = self._wall_seconds()
        if self.sharpness is not None:
            self.sharpness.keep_spent(state)
        if self.journal is not None:
            state.metrics_bytes = self.journal.synced_bytes()
        with state.true_weights():
            yield state.state_dict(self.fabric)
