"""What the tests of training begin with, unless a module has its own."""

from pathlib import Path

import pytest

from flatmin.train.config import TrainConfig


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of a second: 3 epochs of 3 steps."""
    return TrainConfig(
        epochs=3, batch_size=432, rho=0.1, label_noise=0.4, output_dir=tmp_path / "run", accelerator="cpu", threads=1
    )
