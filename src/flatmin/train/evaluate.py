"""Loss and error of a network on labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from flatmin.train.launch import forward
from flatmin.train.sums import wide_zeros

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, without label smoothing, and the share of images whose most likely class is wrong."""

    loss: float
    error_percent: float
    num_images: int


@torch.no_grad()
def evaluate(
    fabric: Fabric, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], max_batches: int | None = None
) -> Evaluation:
    """Evaluate ``model`` in evaluation mode, and leave it in the mode it was in.

    With several replicas each takes its own batches, all with the buffers of the first: between steps the running
    statistics of the replicas differ until its next forward pass sends them around.

    Args:
        fabric: Device, precision and replicas.
        model: Bare network, not wrapped for training.
        batches: Images and labels of this replica.
        max_batches: Stop after so many; None takes all.
    """
    was_training = model.training
    model.eval()
    share_buffers(fabric, model)
    sums = wide_zeros(3, fabric.device)
    for images, labels in islice(batches, max_batches):
        logits = forward(fabric, model, images)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        errors = (logits.argmax(dim=1) != labels).sum()
        sums += torch.stack([loss.to(sums), errors.to(sums), torch.full_like(loss, len(labels)).to(sums)])
    model.train(was_training)
    reduced = fabric.all_reduce(sums, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    loss_sum, num_errors, num_images = reduced.tolist()
    return Evaluation(loss_sum / num_images, 100 * num_errors / num_images, int(num_images))


def share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give every replica the buffers of the first; counts that stayed on the CPU are equal anyway."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            if buffer.device.type == fabric.device.type:
                torch.distributed.broadcast(buffer, src=0)
