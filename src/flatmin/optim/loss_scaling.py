"""The factor that a gradient scaler puts on losses: read off, and taken out of gradients again."""

import torch
from torch import Tensor
from torch.amp import GradScaler

from flatmin.optim.norms import widened
from flatmin.optim.space import Space
from flatmin.optim.wrapper import Wrapper


def loss_scale_of(scaler: GradScaler | None, device: torch.device) -> Tensor | None:
    """The factor that the scaler puts on losses, 0-dim; ``None`` where there is none.

    Raises:
        TypeError: It is no gradient scaler, but a second closure for example.
    """
    if scaler is not None and not hasattr(scaler, "unscale_"):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {scaler!r}; several closures are given as a list")
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def remaining_scale(optimizer: Wrapper, scaler: GradScaler | None) -> Tensor | None:
    """The factor that is in the gradients when a step begins, 0-dim; ``None`` where there is none any more.

    Args:
        optimizer: The one whose ``step`` runs, called by a scaler or not.
        scaler: The one that the caller of ``step`` has given.
    """
    if scaler is None:
        return optimizer._grad_scale
    return loss_scale_of(scaler, next(optimizer._params()).device)


def unscale_(optimizer: Wrapper, space: Space, scale: Tensor, scaler: GradScaler | None) -> None:
    """Take the loss scale out of the gradients, rounded as torch's own scaler does; by it, where it is given.

    Args:
        optimizer: The one whose ``step`` runs, and not its base: a caller who has unscaled already gets torch's error.
        space: The parameters that have a gradient.
        scale: The factor, 0-dim.
        scaler: The one that the caller of ``step`` has given.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
        return
    inverse = widened(scale).reciprocal().float()
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in space.grads:
        by_device.setdefault(grad.device, []).append(grad)
    for device, grads in by_device.items():
        torch._foreach_mul_(grads, inverse.to(device))
