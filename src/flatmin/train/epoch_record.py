"""What is recorded of an epoch: its numbers under their names, and the line that shows the first of them."""

from __future__ import annotations

from flatmin.train.config import TrainConfig
from flatmin.train.evaluate import Evaluation
from flatmin.train.state import TrainingState
from flatmin.train.step import step_learning_rate
from flatmin.train.sums import EpochMeans

__all__ = ["epoch_line", "epoch_metrics"]


def epoch_metrics(
    config: TrainConfig,
    state: TrainingState,
    means: EpochMeans,
    on_held_out: Evaluation | None,
    on_train: Evaluation | None,
) -> dict[str, float | None]:
    """Name everything that the configuration determines and the epoch, or the part of it that was trained, has shown.

    Args:
        config: The run.
        state: Where it stands, at the end of the epoch or of the run.
        means: Over the steps of the epoch so far.
        on_held_out: Result on the images that the run evaluates on; None where it was not time for it.
        on_train: Result on the training images; None where it was not time for it, or never is.

    Returns:
        Columns of ``metrics.jsonl``, the same ones after each epoch of a run; None where nothing was measured.
    """
    return {
        "epoch": state.step / state.num_batches,
        "step": state.step,
        "train_loss": means.train_loss,
        "train_error_percent": means.train_error_percent,
        **_evaluated("eval", on_held_out, top5=config.top5),
        **(_evaluated("eval_train", on_train, top5=config.top5) if config.eval_train else {}),
        "learning_rate": step_learning_rate(config, state.step - 1, state.num_batches),
        "rho": state.optimizer.param_groups[0].get("rho"),
        "loss_rise": means.loss_rise,
        "gradient_norm": means.gradient_norm,
        "passes_per_step": state.num_passes / state.batch,
    }


def epoch_line(
    config: TrainConfig, epoch: int, means: EpochMeans, evaluation: Evaluation | None, *more_words: str
) -> str:
    """Say how an epoch, counted from 0, went; words that are empty are left out."""
    parts = [f"epoch {epoch + 1}/{config.epochs}", f"loss {means.train_loss:.3f}"]
    parts.append(f"train error {means.train_error_percent:.2f} %")
    if evaluation is not None:
        parts.append(f"{config.eval_on} error {evaluation.error_percent:.2f} %")
    return "  ".join([*parts, *filter(None, more_words)])


def _evaluated(prefix: str, evaluation: Evaluation | None, *, top5: bool) -> dict[str, float | None]:
    names = ("loss", "error_percent", *(("top5_error_percent",) if top5 else ()))
    return {f"{prefix}_{name}": None if evaluation is None else getattr(evaluation, name) for name in names}
