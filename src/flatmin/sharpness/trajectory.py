"""The plane in which training moved: principal directions of its checkpoints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.arguments import checked_count


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Checkpoints in the plane, or space, of their principal directions; the last checkpoint is the origin.

    Attributes:
        directions: Each with one tensor per parameter, of joint length 1: for ``loss_on_plane`` at the last checkpoint.
        coordinates: Of every checkpoint along every direction, shape ``(num_checkpoints, num_directions)``.
        explained: The share of the checkpoints' variance along each direction.
    """

    directions: tuple[list[Tensor], ...]
    coordinates: Tensor
    explained: tuple[float, ...]


def principal_directions(checkpoints: Sequence[Sequence[Tensor]], num_directions: int = 2) -> Trajectory:
    """Principal component analysis of the weights seen in training.

    The directions are the leading eigenvectors of the covariance of ``w_t - w_n``, found through the Gram matrix of the
    checkpoints, so that nothing larger than the checkpoints is built. The first checkpoint has coordinates ``>= 0``.

    Args:
        checkpoints: Weights in the order of ``model.parameters()``, from first to last.
        num_directions: How many.

    Returns:
        The directions, in the dtype and on the device of the last checkpoint, and where each checkpoint lies.

    Raises:
        ValueError: Shapes differ, or the checkpoints vary in fewer directions than asked for.

    References:
        Li et al. (2018), arXiv:1712.09913, section 7.2.
    """
    num = len(checkpoints)
    shapes = {tuple(tuple(tensor.shape) for tensor in checkpoint) for checkpoint in checkpoints}
    if len(shapes) > 1:
        raise ValueError("checkpoints must hold parameters of the same shapes, got several")
    num_directions = checked_count("num_directions", num_directions)
    if not num_directions < num:
        raise ValueError(f"num_directions must be from 1 to {num - 1} for {num} checkpoints, got {num_directions}")
    gram = torch.zeros(num, num, dtype=torch.float64)
    for rows in _by_parameter(checkpoints):
        gram += rows @ rows.T
    centre = torch.eye(num, dtype=torch.float64) - 1 / num
    values, vectors = torch.linalg.eigh(centre @ gram @ centre)
    values, vectors = values.flip(0)[:num_directions], vectors.flip(1)[:, :num_directions]
    total = (centre @ gram @ centre).trace().item()
    if not bool((values > 1e-12 * total).all()):
        raise ValueError(
            f"checkpoints must vary in {num_directions} directions, got {int((values > 0).sum())} or fewer"
        )
    combination = centre @ vectors / values.sqrt()  # directions = combination^T (w_t - w_n), of length 1
    coordinates = gram @ combination
    sign = torch.where(coordinates[0] < 0, -1.0, 1.0)
    parts = [(combination * sign).T @ rows for rows in _by_parameter(checkpoints)]
    last = checkpoints[-1]
    directions = tuple(
        [part[index].reshape(tensor.shape).to(tensor) for part, tensor in zip(parts, last, strict=True)]
        for index in range(num_directions)
    )
    return Trajectory(directions, coordinates * sign, tuple((values / total).tolist()))


def _by_parameter(checkpoints: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """``w_t - w_n`` of each parameter in turn, a row per checkpoint, in float64 on the CPU."""
    for tensors in zip(*checkpoints, strict=True):
        rows = torch.stack([tensor.detach().to("cpu", torch.float64).reshape(-1) for tensor in tensors])
        yield rows - rows[-1]
