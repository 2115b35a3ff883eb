"""A file is old or new and never in between, whoever writes it and however that ends."""

import os
from pathlib import Path

import pytest
from full_disk import files_of_at_most

from flatmin.train.atomic_file import atomic_write, replaced_file


def test_text_is_old_or_new_and_never_in_between(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    atomic_write(path, "old")
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        atomic_write(path, "n" * 20)
    assert path.read_text() == "old"
    atomic_write(path, "new")
    assert path.read_text() == "new"


def test_processes_that_write_at_once_leave_the_whole_file_of_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits.safetensors"
    with replaced_file(path) as slow:
        slow.write(b"the longer file of the ")
        slow.flush()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with replaced_file(path) as fast:
                fast.write(b"fast one")
        assert path.read_bytes() == b"fast one"
        slow.write(b"slow one")
    assert path.read_bytes() == b"the longer file of the slow one"
    assert os.listdir(tmp_path) == [path.name]


def test_what_the_block_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "labels.safetensors"
    atomic_write(path, "old")

    def write_half() -> None:
        with replaced_file(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
