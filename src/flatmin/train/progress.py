"""What a run shows on the terminal."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flatmin.train.sums import EpochMeans

__all__ = ["TrainingProgress"]


class TrainingProgress(Progress):
    """A bar over all steps of a run, with loss, error and speed of the epoch so far."""

    def __init__(self, console: Console, first_step: int, num_steps: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, disable=console.quiet, transient=True)
        self._task = self.add_task("starting", total=num_steps, completed=first_step)
        self._mark = (time.monotonic(), 0)

    def show(self, epoch: int, step: int, means: EpochMeans) -> None:
        """Move the bar to ``step``."""
        earlier, num_images = self._mark
        now = time.monotonic()
        speed = max(means.num_images - num_images, 0) / max(now - earlier, 1e-9)
        self._mark = (now, means.num_images)
        text = f"epoch {epoch + 1}  loss {means.train_loss:.3f}  error {means.train_error_percent:.1f} %"
        self.update(self._task, completed=step, description=f"{text}  {speed:,.0f} images/s")

    def epoch_done(self, line: str) -> None:
        """Print a line above the bar, which stays readable in a log file."""
        self._mark = (time.monotonic(), 0)
        self.console.print(line, highlight=False)
