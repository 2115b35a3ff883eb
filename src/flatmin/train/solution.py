"""What the loss looks like around the weights that training found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from flatmin.sharpness import filter_normalised_direction, gradient_direction, loss_on_line, loss_on_plane
from flatmin.train.atomic_file import atomic_write
from flatmin.train.config import TrainConfig
from flatmin.train.data import TrainLoader
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.report import LossPicture
from flatmin.train.trained import load_run

__all__ = ["Solution", "loss_picture", "loss_rises", "measured_solution"]

Batch = tuple[Tensor, Tensor]
BatchStatistics = Literal["batch", "running"]

NUM_RISES = 20  # batches at most whose rise is averaged
NUM_PICTURED = 6  # batches whose mean loss a picture shows; it has hundreds of points


@dataclass(frozen=True)
class Solution:
    """What was measured at the weights of one finished run.

    Attributes:
        num_steps: Optimizer steps that led there.
        radii: Radii of the ball.
        rises: Rise of the loss at ``w + eps`` for each of them.
        picture: The loss around the weights; None where it was not asked for.
    """

    num_steps: int
    radii: list[float]
    rises: list[float]
    picture: LossPicture | None


def measured_solution(config: TrainConfig, radii: Sequence[float], positions: Sequence[float]) -> Solution:
    """Measure the solution of a finished run, or read what an earlier call measured.

    The numbers are kept as ``solution.json`` in the directory of the run.

    Args:
        config: The run.
        radii: As in ``loss_rises``.
        positions: As in ``loss_picture``; none makes no picture.
    """
    path = config.run_dir / "solution.json"
    run = load_run(config.run_dir)
    if path.exists():
        known = _solution_from_json(path.read_text())
        known_positions = known.picture.positions if known.picture else []
        if (known.num_steps, known.radii, known_positions) == (run.step, list(radii), list(positions)):
            return known
    fabric = make_fabric(config)
    loader = make_loaders(config, fabric).train
    model = run.model.to(fabric.device)
    statistics: BatchStatistics = "running" if config.freeze_batchnorm else "batch"  # as in training
    picture = loss_picture(model, loader, positions, batch_norm=statistics) if positions else None
    solution = Solution(run.step, list(radii), loss_rises(model, loader, radii, batch_norm=statistics), picture)
    atomic_write(path, json.dumps(asdict(solution)) + "\n")
    return solution


def loss_rises(
    model: nn.Module,
    loader: TrainLoader,
    radii: Sequence[float],
    *,
    batch_norm: BatchStatistics = "batch",
) -> list[float]:
    """Return how much the loss of a training batch rises at ``w + eps``, on average over batches, for each radius.

    ``mean_B L_B(w + rho g_B / ||g_B||) - L_B(w)`` with ``g_B`` the gradient of the batch: the rise that a step of SAM
    with radius ``rho`` would see at ``w``, whichever optimizer found ``w``.

    Args:
        model: The network; left as it was.
        loader: Training batches; the first ones of its first epoch are used.
        radii: ``rho``, each an L2 norm over all parameters together.
        batch_norm: Whose statistics batch normalisation uses: those of the batch, or the running ones.

    References:
        Foret et al. (2021), arXiv:2010.01412, section 4.1 (m-sharpness), with the maximum taken by one step (Eq. 2).
    """
    rises = [_rises_of_batch(model, batch, radii, batch_norm) for batch in islice(loader.epoch(0), NUM_RISES)]
    means: list[float] = torch.stack(rises).mean(dim=0).tolist()
    return means


def loss_picture(
    model: nn.Module,
    loader: TrainLoader,
    positions: Sequence[float],
    *,
    batch_norm: BatchStatistics = "batch",
) -> LossPicture:
    """Evaluate the training loss in the plane of two random filter-normalised directions around the weights.

    The Gaussian draws behind the directions are the same for every network of one architecture. The loss is the mean
    over a few training batches.

    Args:
        model: The network; left as it was.
        loader: Training batches; the first ones of its first epoch are used.
        positions: Coordinates along both directions, in fractions of each filter's length.
        batch_norm: As in ``loss_rises``.
    """
    batches = list(islice(loader.epoch(0), NUM_PICTURED))
    params = list(model.parameters())
    generator = torch.Generator().manual_seed(0)
    losses = loss_on_plane(
        model,
        lambda: torch.stack([_loss(model, batch) for batch in batches]).mean(),
        (filter_normalised_direction(params, generator), filter_normalised_direction(params, generator)),
        positions,
        positions,
        batch_norm=batch_norm,
    )
    return LossPicture(list(positions), losses.tolist())


def _solution_from_json(text: str) -> Solution:
    values = json.loads(text)
    picture = None if values["picture"] is None else LossPicture(**values["picture"])
    return Solution(**values | {"picture": picture})


def _rises_of_batch(model: nn.Module, batch: Batch, radii: Sequence[float], batch_norm: BatchStatistics) -> Tensor:
    direction = gradient_direction(model, lambda: _loss(model, batch), batch_norm=batch_norm)
    losses = loss_on_line(model, lambda: _loss(model, batch), direction, [0.0, *radii], batch_norm=batch_norm)
    return losses[1:] - losses[0]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    logits: Tensor = model(images.to(next(model.parameters()).dtype))
    return nn.functional.cross_entropy(logits.float(), labels)
