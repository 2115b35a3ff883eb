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
from flatmin.uncompiled import uncompiled

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy, without label smoothing, and the share of images whose most likely class is wrong.

    ``top5_error_percent`` is the share of those whose class is not among the five most likely.
    """

    loss: float
    error_percent: float
    top5_error_percent: float
    num_images: int


@torch.no_grad()
def evaluate(
    fabric: Fabric, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], max_batches: int | None = None
) -> Evaluation:
    """Evaluate ``model`` in evaluation mode, and leave every layer in the mode it was in.

    With several replicas each takes its own batches, all with the buffers of the first: between steps the running
    statistics of the replicas differ until its next forward pass sends them around.

    Args:
        fabric: Device, precision and replicas.
        model: Bare network, not wrapped for training.
        batches: Images and labels of this replica.
        max_batches: Stop after so many; None takes all.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    share_buffers(fabric, model)
    sums = wide_zeros(4, fabric.device)
    for images, labels in islice(batches, max_batches):
        with uncompiled():
            logits = forward(fabric, model, images)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits = (logits.argmax(dim=1) == labels).sum(), likeliest.sum()
        sums += torch.stack(
            [loss.to(sums), *(hit.to(sums) for hit in hits), torch.full_like(loss, len(labels)).to(sums)]
        )
    for module, was_training in modes:  # each its own: frozen batch norms are not in training mode
        module.training = was_training
    reduced = fabric.all_reduce(sums, reduce_op="sum")
    assert isinstance(reduced, Tensor)
    loss_sum, *num_hits, num_images = reduced.tolist()
    errors = [100 * (num_images - hits) / num_images for hits in num_hits]
    return Evaluation(loss_sum / num_images, errors[0], errors[1], int(num_images))


def share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give every replica the buffers of the first; counts that stayed on the CPU are equal anyway."""
    if fabric.world_size > 1:
        for buffer in model.buffers():
            if buffer.device.type == fabric.device.type:
                torch.distributed.broadcast(buffer, src=0)
