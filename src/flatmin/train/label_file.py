"""A file of labels for the training images of a run."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flatmin.train.atomic_file import replaced_file
from flatmin.train.config import TrainConfig
from flatmin.train.data.image_set import check_labels
from flatmin.train.errors import TrainingError

__all__ = ["read_labels", "write_labels"]


def write_labels(path: Path, config: TrainConfig, labels: Tensor) -> None:
    """Write labels for the training images that ``config`` sees, int64 (N,), in their order; the directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        file.write(save({"train_labels": labels.cpu()}, metadata=_images_of(config)))


def read_labels(config: TrainConfig, num_images: int, num_classes: int) -> Tensor:
    """Read the file ``config.train_labels``.

    Raises:
        TrainingError: If it is missing or damaged, or was written for other images.
    """
    path = config.train_labels
    assert path is not None
    try:
        with safe_open(path, framework="pt") as file:
            written_for = file.metadata() or {}
            labels: Tensor = file.get_tensor("train_labels").clone()
        if written_for != _images_of(config):
            raise ValueError(f"it must be written for {_images_of(config)}, got {written_for}")
        check_labels("train_labels", labels, num_images, num_classes)
    except (OSError, ValueError, SafetensorError) as error:
        raise TrainingError(f"{path} is no file of labels for this run: {error}") from error
    return labels


def _images_of(config: TrainConfig) -> dict[str, str]:
    """What decides which images a run trains on, and in which order they are numbered."""
    return {"dataset": config.dataset, "eval_on": config.eval_on}
