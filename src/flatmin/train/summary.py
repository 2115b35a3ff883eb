"""The result of a run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Summary"]


@dataclass(frozen=True)
class Summary:
    """Result of a run, as ``summary.json`` holds it.

    Training values are means over the last epoch, taken at the weights before each step; ``loss_rise`` is the loss at
    w + eps minus the loss at w, in the steps that saw both, None if there were none. What was not asked for is None.
    ``complete`` says that the learning rate reached its end.
    """

    run_dir: Path
    recipe: str
    method: str
    seed: int
    epochs: float
    steps: int
    complete: bool
    train_loss: float
    train_error_percent: float
    eval_on: str
    eval_loss: float
    eval_error_percent: float
    loss_rise: float | None
    gradient_norm: float
    wall_seconds: float
    eval_top5_error_percent: float | None = None
    eval_train_loss: float | None = None
    eval_train_error_percent: float | None = None
    eval_train_top5_error_percent: float | None = None

    def to_json(self) -> str:
        """Write as JSON, one field a line."""
        return json.dumps(asdict(self) | {"run_dir": str(self.run_dir)}, indent=2) + "\n"

    @staticmethod
    def measured() -> tuple[str, ...]:
        """Names of the fields that are measured, which a record of ``metrics.jsonl`` holds too."""
        training = ("train_loss", "train_error_percent", "loss_rise", "gradient_norm")
        evaluated = ("loss", "error_percent", "top5_error_percent")
        return (*training, *(f"{split}_{name}" for split in ("eval", "eval_train") for name in evaluated))

    @classmethod
    def from_json(cls, text: str) -> Summary:
        """Read what `to_json` wrote.

        Raises:
            ValueError: The text is something else.
        """
        try:
            values = json.loads(text)
            return cls(**values | {"run_dir": Path(values["run_dir"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"it is no summary of a run: {error}") from error
