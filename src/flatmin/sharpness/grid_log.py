"""A file that keeps the losses of a grid, so that a long evaluation can be stopped at any moment and go on later."""

import ctypes
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from torch import Tensor


class OtherGridError(ValueError):
    """A file that should keep a grid's losses keeps those of other weights, directions, positions or statistics."""


class GridLog:
    """JSON lines: the fingerprint of the grid, then an index and its loss for each point. A torn last line is dropped.

    Attributes:
        known: Losses by index, as found in the file.

    Args:
        path: The file; ``None`` keeps nothing.
        key: The fingerprint.

    Raises:
        OtherGridError: The file is of another grid.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.known: dict[int, float] = {}
        self._path, self._key = path, key
        self._file: TextIO | None = None
        self._num_bytes = 0
        if path is not None and path.exists():
            self._read(path)

    def write(self, index: int, loss: float) -> None:
        """Add a point; it is in the hands of the operating system when this returns."""
        if self._file is not None:
            self._file.write(json.dumps([index, loss]) + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        if self._path is not None:
            self._file = self._path.open("r+" if self._num_bytes else "w")
            self._file.truncate(self._num_bytes)
            self._file.seek(self._num_bytes)
            if self._num_bytes == 0:
                self._file.write(json.dumps({"grid": self._key}) + "\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):  # the writer was killed in the middle of it
            lines.pop()
        if not lines:
            return
        if _header(lines[0]) != self._key:
            raise OtherGridError(f"resume must be a file of the same grid and weights, got {str(path)!r} of another")
        self.known = {index: loss for index, loss in map(json.loads, lines[1:])}
        self._num_bytes = sum(map(len, lines))


def fingerprint(tensors: Sequence[Sequence[Tensor]], settings: Any) -> str:
    """A hash of the bits of all tensors, and of settings that JSON takes."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for part in tensors:
        for tensor in part:
            held = tensor.detach().cpu().contiguous()
            digest.update(ctypes.string_at(held.data_ptr(), held.nbytes))
    return digest.hexdigest()


def _header(line: bytes) -> object:
    try:
        header = json.loads(line)
    except ValueError:
        return None
    return header.get("grid") if isinstance(header, dict) else None
