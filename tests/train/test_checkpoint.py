"""A checkpoint is whole or absent, whatever happens while it is written."""

import os
from pathlib import Path

import pytest
import torch
from full_disk import files_of_at_most

from flatmin.train.checkpoint import checkpoint_paths, load_newest_checkpoint, save_checkpoint
from flatmin.train.errors import TrainingError


def state(step: int) -> dict[str, object]:
    return {"step": step, "weights": torch.full((5000,), float(step))}


def test_newest_two_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, state(step))
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["checkpoint-000000100.pt", "checkpoint-000000010.pt"]
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 100
    assert torch.equal(loaded["weights"], torch.full((5000,), 100.0))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "bit", "empty"])
def test_damaged_newest_falls_back_to_the_one_before_with_a_warning(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, state(1))
    path = save_checkpoint(tmp_path, 2, state(2))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # inside the weights, which torch loads without a look at the checksum
    path.write_bytes({"cut": content[:-100], "bit": content, "empty": b""}[damage])
    with pytest.warns(UserWarning, match=r"checkpoint-000000002\.pt is damaged"):
        loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1


@pytest.mark.parametrize("num_bytes", [0, 1000, 15_000])
def test_full_disk_leaves_the_old_checkpoint_whole_and_is_one_sentence(tmp_path: Path, num_bytes: int) -> None:
    path = save_checkpoint(tmp_path, 1, state(1))
    before = path.read_bytes()
    with files_of_at_most(num_bytes), pytest.raises(TrainingError) as caught:
        save_checkpoint(tmp_path, 2, state(2))
    assert str(caught.value) == (
        f"could not save {tmp_path}/checkpoint-000000002.pt: File too large; the previous checkpoint is untouched"
    )
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_process_that_dies_while_saving_leaves_the_old_checkpoint(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException):
        """Stands for a signal that nothing can handle."""

    def die(*_: object) -> None:
        raise Death

    save_checkpoint(tmp_path, 1, state(1))
    with monkeypatch.context() as patch:
        patch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[moment], die)
        with pytest.raises(Death):
            save_checkpoint(tmp_path, 2, state(2))
    loaded = load_newest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded["step"] == 1
    save_checkpoint(tmp_path, 2, state(2))
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".pt", ".pt"]
