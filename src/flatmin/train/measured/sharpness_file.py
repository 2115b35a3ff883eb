"""``sharpness.json``: what was measured of a network, one line per measure and settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flatmin import __version__
from flatmin.sharpness import Measure
from flatmin.train.atomic_file import atomic_write
from flatmin.train.environment import device_name
from flatmin.train.measured.subject import Subject

__all__ = ["add_measure", "measure_record", "read_sharpness"]

FORMAT = 1
NAME = "sharpness.json"

# Settings by which equal requests may differ: one follows from the result, and may by rounding.
_FREE = frozenset({"width", "num_ranks"})


def read_sharpness(directory: Path) -> dict[str, Any] | None:
    """The content of the file in ``directory``; None if there is none, it is damaged, or of another version."""
    try:
        values = json.loads((directory / NAME).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) and values.get("format") == FORMAT else None


def measure_record(result: Measure, subject: Subject) -> dict[str, Any]:
    """A measure as the file holds it: ``as_dict`` with the data, the eigenvalues being called ``values``."""
    record = {"split": subject.split, "num_images": subject.num_images} | result.as_dict()
    if "eigenvalues" in record:
        record["values"] = record.pop("eigenvalues")
    return record


def add_measure(result: Measure, subject: Subject) -> dict[str, Any]:
    """Write a measure to the file: in place of the one with the same settings, beside all others.

    Measures of an earlier checkpoint, or of other weights, are dropped: they are of another network.

    Returns:
        The record that was written.
    """
    record = measure_record(result, subject)
    head = _head(subject)
    known = read_sharpness(subject.directory)
    same = known is not None and all(known.get(name) == head[name] for name in ("run", "checkpoint", "weights"))
    kept = known["measures"] if known is not None and same else []
    measures = [other for other in kept if _key(other) != _key(record)] + [record]
    subject.directory.mkdir(parents=True, exist_ok=True)
    atomic_write(subject.directory / NAME, _as_text(head, measures))
    return record


def _head(subject: Subject) -> dict[str, Any]:
    head = {
        "format": FORMAT,
        "run": dict(subject.run),
        "checkpoint": dict(subject.checkpoint),
        "weights": subject.weights,
        "versions": {"flatmin": __version__, "torch": torch.__version__},
        "hardware": device_name(next(subject.model.parameters()).device),
    }
    plain: dict[str, Any] = json.loads(json.dumps(head))  # as it will be read: tuples are lists
    return plain


def _key(record: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in record["settings"].items() if name not in _FREE}
    return json.dumps([record["measure"], record["split"], record["num_images"], settings], sort_keys=True)


def _as_text(head: Mapping[str, Any], measures: list[dict[str, Any]]) -> str:
    """One measure a line; strict JSON, which knows no NaN."""
    lines = ",\n".join(json.dumps(record, allow_nan=False) for record in measures)
    return f'{json.dumps(head, allow_nan=False)[:-1]}, "measures": [\n{lines}\n]}}\n'
