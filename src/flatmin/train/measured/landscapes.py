"""Evaluate the loss on the grid of a view, go on after an interruption, and keep the landscape."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flatmin.sharpness import GridOptions, OtherGridError, loss_on_line, loss_on_plane, mean_loss
from flatmin.train.atomic_file import atomic_write
from flatmin.train.errors import TrainingError
from flatmin.train.measured.directions import View
from flatmin.train.measured.processes import is_first
from flatmin.train.pictures.landscape import Landscape, read_landscape

__all__ = ["evaluated_landscape"]

Progress = Callable[[int, int], None]


def evaluated_landscape(
    view: View, *, with_error: bool, progress: Progress, group: ProcessGroup | None = None
) -> Landscape:
    """Evaluate the loss of a view, or read it where that was done, and write ``landscape-<kind>-<directions>.json``.

    The points found so far are kept in a file beside it while the work goes on.

    Args:
        view: What is looked at.
        with_error: Evaluate the share of wrong answers too, at twice the price.
        progress: Called with the points done and all points.
        group: Processes that share the points; the first writes the result.

    Raises:
        TrainingError: The loss could not be evaluated.
    """
    subject = view.subject
    path = subject.directory / f"{view.name}.json"
    known = _known(path, view, with_error=with_error)
    if known is not None:
        return known
    subject.directory.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    batches = list(subject.batches(view.look.batch_size))
    functions = {"loss": mean_loss(subject.model, subject.loss_fn, batches)}
    if with_error:
        functions["error"] = _error_percent(subject.model, batches)
    grids: dict[str, Tensor] = {}
    logs = {name: subject.directory / f"{view.name}-{name}-{_digest(view)}.jsonl" for name in functions}
    for number, (name, function) in enumerate(functions.items()):

        def show(num_done: int, num_points: int, number: int = number) -> None:
            progress(number * num_points + num_done, len(functions) * num_points)

        try:
            options: GridOptions = {"resume": logs[name], "progress": show, "process_group": group}
            grids[name] = _resumed_grid(view, function, options)
        except (ValueError, RuntimeError) as error:
            raise TrainingError(f"{subject.directory}: {error}") from error
    landscape = _landscape(view, grids, time.perf_counter() - start)
    if is_first(group):
        atomic_write(path, json.dumps(landscape.as_dict(), allow_nan=False) + "\n")
    for log in logs.values():
        _own_log(log, group).unlink()
    return landscape


def _landscape(view: View, grids: dict[str, Tensor], wall_seconds: float) -> Landscape:
    loss = grids["loss"].numpy()
    return Landscape(
        kind=view.look.kind,
        directions=view.along,
        split=view.subject.split,
        num_images=view.subject.num_images,
        x=view.x,
        y=view.y,
        loss=np.where(np.isfinite(loss), loss, np.nan),
        error_percent=grids["error"].numpy() if "error" in grids else None,
        trajectory=view.trajectory,
        settings=_settings(view) | dict(view.found),
        wall_seconds=wall_seconds,
    )


def _settings(view: View) -> dict[str, Any]:
    """What decides the numbers of a landscape beside its positions and images."""
    subject, look, other = view.subject, view.look, view.other
    return {
        "seed": look.seed,
        "radius": look.radius,
        "points": look.points,
        "batch_norm": look.batch_norm,
        "batch_size": look.batch_size,
        "step": subject.checkpoint["step"],
        "weights": subject.weights,
        "other": None if other is None else [str(other.directory), other.checkpoint["step"]],
    }


def _known(path: Path, view: View, *, with_error: bool) -> Landscape | None:
    """The landscape in the file, if it is the one that is wanted."""
    if view.subject.config is None or not path.exists():  # weights of a factory have no step to know them by
        return None
    try:
        found = read_landscape(path)
    except ValueError:
        return None
    wanted = _settings(view)
    same = {name: found.settings.get(name) for name in wanted} == wanted and (found.x, found.y) == (view.x, view.y)
    same = same and (found.split, found.num_images) == (view.subject.split, view.subject.num_images)
    return found if same and (found.error_percent is not None or not with_error) else None


def _resumed_grid(view: View, loss: Callable[[], Tensor], options: GridOptions) -> Tensor:
    """The values at all points; those in the log are not evaluated again, unless they are of other directions."""
    try:
        return _grid(view, loss, options)
    except OtherGridError:
        _own_log(Path(options["resume"] or ""), options["process_group"]).unlink()
        return _grid(view, loss, options)


def _grid(view: View, loss: Callable[[], Tensor], options: GridOptions) -> Tensor:
    model, statistics = view.subject.model, view.look.batch_norm
    if view.y is None:
        return loss_on_line(model, loss, view.directions[0], view.x, batch_norm=statistics, **options)
    first, second = view.directions
    return loss_on_plane(model, loss, (first, second), view.x, view.y, batch_norm=statistics, **options)


def _own_log(log: Path, group: ProcessGroup | None) -> Path:
    """The file in which this process keeps its points, as ``GridOptions`` says."""
    return log if group is None else Path(f"{log}.{group.rank()}")


def _error_percent(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
    """The share of images whose most likely class is wrong, in percent."""

    def error() -> Tensor:
        wrong = [(model(images).argmax(dim=1) != labels).sum() for images, labels in batches]
        return 100 * torch.stack(wrong).sum().double() / sum(len(labels) for _, labels in batches)

    return error


def _digest(view: View) -> str:
    subject = view.subject
    text = json.dumps([_settings(view), subject.split, subject.num_images, view.x, view.y])
    return hashlib.sha256(text.encode()).hexdigest()[:8]
