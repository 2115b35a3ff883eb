"""Training metrics of an epoch, summed on the device so that no step waits for the host."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from flatmin.train.errors import NonFiniteLossError

__all__ = ["EpochMeans", "EpochSums", "wide_zeros"]


@dataclass(frozen=True)
class EpochMeans:
    """Means over the steps of an epoch, or of its part so far; ``loss_rise`` is None where no step saw it."""

    num_images: int
    train_loss: float
    train_error_percent: float
    gradient_norm: float
    loss_rise: float | None


class EpochSums:
    """Sums over the steps of an epoch so far, in ``values``: this replica's own, to be added over replicas when read.

    In order: images, loss and errors per image; then steps, gradient norm and rise of the loss per step, and the first
    step whose loss was not finite, at w or at w + eps, counted from 1, or 0.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = wide_zeros(7, device)

    def add(self, step: int, loss: Tensor, num_errors: Tensor, num_images: int, norm_and_rise: list[Tensor]) -> None:
        """Add one step without waiting for the device.

        Args:
            step: Index of the step, from 0.
            loss: Mean loss over the batch.
            num_errors: Images of the batch whose class was not the most likely one.
            num_images: Images of the batch.
            norm_and_rise: Norm of the gradient and the rise of the loss from w to w + eps.
        """
        is_finite = (loss + norm_and_rise[1]).isfinite()
        bad_step = torch.where(is_finite | (self.values[6] > 0), 0, step + 1)
        terms = [loss * num_images, num_errors, torch.ones_like(loss), *norm_and_rise, bad_step]
        self.values[0] += num_images
        self.values[1:] += torch.stack([term.to(self.values) for term in terms])

    def means(self, fabric: Fabric, *, with_rise: bool) -> EpochMeans:
        """Means over all replicas; waits for the device.

        Raises:
            NonFiniteLossError: If the loss of a step was not finite, at w or at w + eps.
        """
        rows = self.gathered(fabric).tolist()
        bad_steps = [int(row[6]) for row in rows if row[6] > 0]
        images, loss, errors, steps, norm, rise = (sum(column) for column in list(zip(*rows, strict=True))[:6])
        if bad_steps:
            raise NonFiniteLossError("loss at w + eps" if math.isfinite(loss) else "training loss", min(bad_steps))
        return EpochMeans(
            num_images=int(images),
            train_loss=loss / max(images, 1),
            train_error_percent=100 * errors / max(images, 1),
            gradient_norm=norm / max(steps, 1),
            loss_rise=rise / max(steps, 1) if with_rise else None,
        )

    def gathered(self, fabric: Fabric) -> Tensor:
        """The sums of every replica, a row each, in the order of the ranks."""
        rows = self.values.new_zeros(fabric.world_size, len(self.values))
        rows[fabric.global_rank] = self.values
        gathered = fabric.all_reduce(rows, reduce_op="sum")
        assert isinstance(gathered, Tensor)
        return gathered

    def restore_(self, rows: Tensor, rank: int, num_ranks: int) -> None:
        """Take this replica's row of what `gathered` returned; of another number of replicas the first takes all."""
        if len(rows) != num_ranks:
            rows = torch.cat([rows.sum(dim=0, keepdim=True), rows.new_zeros(num_ranks - 1, rows.shape[1])])
        self.values.copy_(rows[rank])

    def reset_(self) -> None:
        """Begin an epoch."""
        self.values.zero_()


def wide_zeros(size: int, device: torch.device) -> Tensor:
    """Zeros in float64, or in float32 on the one kind of device that has no wider type."""
    return torch.zeros(size, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
