"""The loss along one direction or over the plane of two: the picture of a sharp or a wide minimum."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flatmin.arguments import check_choice
from flatmin.sharpness.batches import num_examples
from flatmin.sharpness.grid_log import GridLog, fingerprint
from flatmin.sharpness.loss_functions import LossFn, as_scalar
from flatmin.sharpness.objective import Objective, mean_of, refuse_unknown
from flatmin.sharpness.ranks import list_of_ranks
from flatmin.sharpness.unchanged import batch_norm_layers, same_random_numbers, unchanged

PointStatistics = Literal["batch", "running", "recomputed"]


class GridOptions(TypedDict, total=False):
    """For large grids.

    Attributes:
        progress: Called as ``progress(num_done, num_points)`` after each point.
        resume: File that keeps the losses found so far. Points that it holds are not evaluated again; one that was
            written for other weights, directions, positions or statistics is refused by ``OtherGridError``. It cannot
            see another loss.
        process_group: Ranks that share the points among them; each must hold the same weights and all data. Each
            writes a file of its own, ``<resume>.<rank>``, and all get all losses.
    """

    progress: Callable[[int, int], None] | None
    resume: str | Path | None
    process_group: ProcessGroup | None


def loss_on_line(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    direction: Sequence[Tensor],
    positions: Sequence[float],
    *,
    batch_norm: PointStatistics,
    **options: Unpack[GridOptions],
) -> Tensor:
    """Evaluate the loss at ``w + x d`` for each position ``x``.

    The model is left as it was, bit for bit and in the same storage, whatever happens inside: parameters, buffers,
    gradients, the training mode of every module, and torch's random state. Every position sees the same random numbers.
    Costs one call of ``loss_fn`` for each position, two where statistics are recomputed.

    Args:
        model: The network, with weights ``w``.
        loss_fn: Returns the loss of ``model`` as a scalar; called without gradients. ``mean_loss`` makes one of a
            loader.
        direction: ``d``, one tensor per parameter of ``model``, in the order of ``model.parameters()``.
        positions: ``x``, in units of ``d``.
        batch_norm: ``"running"`` normalises with the running statistics collected at ``w``, as in evaluation: the loss
            then rises also because they no longer fit the weights. ``"batch"`` normalises with the statistics of each
            batch, as in training. ``"recomputed"`` collects the running statistics anew at each position, as the mean
            over the batches of one call of ``loss_fn``, and evaluates with them. All other layers are in evaluation
            mode in any case.
        options: See ``GridOptions``.

    Returns:
        The losses, shape ``(len(positions),)``, on the CPU.
    """
    points = [(position,) for position in positions]
    return _loss_at(model, loss_fn, [direction], points, batch_norm, options)


def loss_on_plane(
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    directions: tuple[Sequence[Tensor], Sequence[Tensor]],
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    batch_norm: PointStatistics,
    **options: Unpack[GridOptions],
) -> Tensor:
    """Evaluate the loss at ``w + x d_1 + y d_2`` on a grid.

    Args:
        model: As in ``loss_on_line``; left as it was.
        loss_fn: As in ``loss_on_line``; called ``len(xs) * len(ys)`` times.
        directions: ``d_1`` and ``d_2``.
        xs: Positions along ``d_1``.
        ys: Positions along ``d_2``.
        batch_norm: As in ``loss_on_line``.
        options: See ``GridOptions``.

    Returns:
        The losses, shape ``(len(ys), len(xs))``, on the CPU: row ``y``, column ``x``, as contour plots expect.

    References:
        Li et al. (2018), arXiv:1712.09913, Eq. 1 and section 4.
    """
    points = [(x, y) for y in ys for x in xs]
    return _loss_at(model, loss_fn, directions, points, batch_norm, options).reshape(len(ys), len(xs))


def mean_loss(
    model: nn.Module, loss_fn: LossFn, data: Iterable[Any], batch_weight: Callable[[Any], float] = num_examples
) -> Callable[[], Tensor]:
    """Make of a loader the function that ``loss_on_line`` and ``gradient_direction`` take.

    Args:
        model: The network.
        loss_fn: ``loss_fn(model, batch)``, or a criterion such as ``torch.nn.CrossEntropyLoss()`` for batches
            ``(inputs, targets)``.
        data: Batches; iterated once a call.
        batch_weight: The weight of a batch in the mean; its number of examples by default.

    Returns:
        A function of nothing that returns the mean loss over the data at the model's present weights, and raises
        ``ValueError`` where the data hold no batch.
    """
    objective = Objective(model, loss_fn, data, batch_norm="running", batch_weight=batch_weight)

    def loss() -> Tensor:
        total, weights = torch.zeros((), dtype=objective.dtype, device=objective.device), 0.0
        with objective.one_pass() as batches:
            for batch, weight in batches:
                total = total + weight * objective.loss_of(batch)
                weights += weight
        return mean_of(total, weights)

    return loss


def _loss_at(  # noqa: PLR0917 - the two callers name them all
    model: nn.Module,
    loss_fn: Callable[[], Tensor],
    directions: Sequence[Sequence[Tensor]],
    points: Sequence[tuple[float, ...]],
    batch_norm: PointStatistics,
    options: GridOptions,
) -> Tensor:
    refuse_unknown(options, GridOptions)
    check_choice("batch_norm", batch_norm, get_args(PointStatistics))
    params = list(model.parameters())
    for direction in directions:
        _check_direction(direction, params)
    group = options.get("process_group")
    log = _open_log(options.get("resume"), group, lambda: fingerprint([params, *directions], [points, batch_norm]))
    mine = range(len(points)) if group is None else range(group.rank(), len(points), group.size())
    losses = {index: loss for index, loss in log.known.items() if index in mine}
    progress = options.get("progress") or (lambda num_done, num_points: None)
    statistics: Literal["batch", "running"] = "batch" if batch_norm == "batch" else "running"
    with log, unchanged(model, statistics) as weights, torch.no_grad():
        for index in mine:
            if index in losses:
                continue
            _move(params, weights, directions, points[index])
            with same_random_numbers(params):
                if batch_norm == "recomputed":
                    _recompute_statistics(model, loss_fn)
                losses[index] = as_scalar(loss_fn()).detach().double().item()
            log.write(index, losses[index])
            progress(len(losses), len(mine))
    found = {index: loss for part in list_of_ranks(losses, group) for index, loss in part.items()}
    return torch.tensor([found[index] for index in range(len(points))], dtype=torch.float64)


def _move(
    params: Sequence[Tensor],
    weights: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    point: tuple[float, ...],
) -> None:
    for index, (param, weight) in enumerate(zip(params, weights, strict=True)):
        param.copy_(weight)
        for position, direction in zip(point, directions, strict=True):
            param.add_(direction[index], alpha=position)


def _recompute_statistics(model: nn.Module, loss_fn: Callable[[], Tensor]) -> None:
    """Let one call of the loss collect running statistics, each batch counting alike."""
    layers = [layer for layer in batch_norm_layers(model) if layer.track_running_stats]
    if not layers:
        return
    with same_random_numbers(list(model.parameters())), _cumulative(layers):
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        loss_fn()
        for layer in layers:
            layer.eval()


@contextmanager
def _cumulative(layers: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Average over batches without forgetting: the meaning of momentum ``None`` in torch."""
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = None
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _open_log(path: str | Path | None, group: ProcessGroup | None, key: Callable[[], str]) -> GridLog:
    if path is None:
        return GridLog(None, "")
    return GridLog(Path(path) if group is None else Path(f"{path}.{group.rank()}"), key())


def _check_direction(direction: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    shapes = [tuple(step.shape) for step in direction]
    wanted = [tuple(param.shape) for param in params]
    if shapes != wanted:
        raise ValueError(f"a direction must have the shapes of the model's parameters, {wanted}, got {shapes}")
