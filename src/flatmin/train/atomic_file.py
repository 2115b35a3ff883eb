"""Files that a reader, or a crash at any moment, finds whole: written beside their place, and then moved to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "replaced_file"]


def atomic_write(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old content or the new."""
    with replaced_file(path) as file:
        file.write(text.encode())


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the name ``path`` when the block ends; where it fails the old one stays.

    Args:
        path: The file to make or to replace; its directory must be there.

    Raises:
        OSError: The file cannot be written. The unfinished one is gone again.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # each process its own: several may write at once
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _move(temporary: Path, path: Path) -> None:
    """Rename, and make the new name survive a power failure."""
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
