"""Filters: pure functions that a direction passes through before the ball sets its length."""

from typing import Protocol

import torch
from torch import Tensor

from flatmin.arguments import check_number
from flatmin.optim.directions import Direction, Observer
from flatmin.optim.sharding import local, placed_like, whole
from flatmin.optim.space import Space


class Filter(Protocol):
    """A rule that turns one direction into another."""

    def __call__(self, space: Space, tensors: list[Tensor]) -> list[Tensor]:
        """The filtered direction; ``tensors`` are not written into."""


class Filtered:
    """A direction with filters applied one after the other.

    Args:
        direction: What goes in.
        *filters: Applied in this order.
    """

    def __init__(self, direction: Direction, *filters: Filter) -> None:
        self.direction = direction
        self.filters = filters
        self.needs_clean_gradient = direction.needs_clean_gradient
        self.depends_on_scale = direction.depends_on_scale
        self.remembers = direction.remembers
        if isinstance(direction, Observer):
            self.observe = direction.observe  # here, since a class with that method is an Observer in any case

    def __call__(self, space: Space) -> list[Tensor]:
        """The direction, filtered."""
        tensors = self.direction(space)
        for each in self.filters:
            tensors = each(space, tensors)
        return tensors


class ZScore:
    """Keep the entries that stand out in their layer: ``|z| > quantile_q(|z|)`` with ``z = (g - mean) / std``.

    In tensors of two dimensions and more; others pass unchanged. The mean is over the tensor, and since the standard
    deviation is one number for each, the entries kept are those with the largest ``|g - mean|``.

    Args:
        quantile: Share of entries that become zero, in [0, 1).

    References:
        Yun (2025), arXiv:2505.02369 (ZSharp), Algorithm 1.
    """

    def __init__(self, quantile: float) -> None:
        check_number("quantile", quantile, "in [0, 1)")
        self.quantile = quantile

    def __call__(self, space: Space, tensors: list[Tensor]) -> list[Tensor]:
        """The entries that stand out, zeros elsewhere."""
        return [
            self._kept(tensor, owner) if owner.dim() > 1 else tensor
            for owner, tensor in zip(space.owners, tensors, strict=True)
        ]

    def _kept(self, tensor: Tensor, owner: Tensor) -> Tensor:
        if owner.numel() < 2:
            return tensor
        entries = whole(tensor, owner)  # all of them, since ranks cannot be summed over shards
        wide = torch.promote_types(tensor.dtype, torch.float32)
        mean = entries.to(wide).mean()
        distances = (entries.to(wide) - mean).abs()
        rank = int(self.quantile * (entries.numel() - 1))  # torch.quantile refuses more than 16 million entries
        threshold = distances.flatten().kthvalue(rank + 1).values
        own = distances if entries is tensor else (tensor.to(wide) - mean).abs()
        return torch.where(own <= threshold, 0.0, tensor)  # NaN, of a gradient that is not finite, is kept


class Centralised:
    """Take the mean out of each output's weights: ``g - mean over all dimensions but the first``.

    In tensors of two dimensions and more; others pass unchanged.

    References:
        Yong et al. (2020), arXiv:2004.01461 (gradient centralization), Eq. 1; with SAM: Hassan et al. (2025).
    """

    def __call__(self, space: Space, tensors: list[Tensor]) -> list[Tensor]:
        """The direction whose entries sum to zero for each output."""
        return [
            self._centred(tensor, owner) if owner.dim() > 1 else tensor
            for owner, tensor in zip(space.owners, tensors, strict=True)
        ]

    def _centred(self, tensor: Tensor, owner: Tensor) -> Tensor:
        placed = placed_like(tensor, owner)  # DTensor completes the mean where the weights of an output are spread
        centred = placed - placed.mean(dim=tuple(range(1, owner.dim())), keepdim=True)
        return local(placed_like(centred, owner))
