"""The parameters a step works on: per group, those that have a gradient."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class ActiveGroup:
    """The parameters of one group that have a gradient, beside the group's own hyperparameters.

    Attributes:
        owners: The parameters as the user knows them.
        params: The same as real tensors: complex ones are views ``(..., 2)``, as in ``torch.optim``.
        grads: Their gradients, shaped like ``params``.
        names: Their names; ``None`` where the optimizer was told none.
        options: The group's entries: ``rho``, ``lr``, ``maximize`` and whatever a piece keeps there.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    names: list[str] | None
    options: Mapping[str, Any]

    @property
    def radius(self) -> float:
        """``rho``, negative in a group that is maximised: there the worst neighbour has the lowest objective."""
        rho: float = self.options["rho"]
        return -rho if self.options.get("maximize", False) else rho


def active_groups(optimizer: Optimizer, names: Mapping[Tensor, str]) -> list[ActiveGroup]:
    """Collect the parameters that have a gradient; groups without any are left out.

    Raises:
        RuntimeError: A gradient is sparse.
        ValueError: A group's ``rho`` was scheduled below zero.
    """
    groups = []
    for options in optimizer.param_groups:
        if not options["rho"] >= 0.0:
            raise ValueError(f"rho must be >= 0, got {options['rho']}")
        owners = [param for param in options["params"] if param.grad is not None and param.numel() > 0]
        if not owners:
            continue
        grads = [param.grad for param in owners]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError(
                "gradients must be dense, got a sparse one: build the embedding with sparse=False, "
                "or give its weights to an optimizer of their own"
            )
        is_real = not any(param.is_complex() for param in owners)
        params = owners if is_real else real_views(owners)
        known = [names[param] for param in owners] if names else None
        groups.append(ActiveGroup(owners, params, grads if is_real else real_views(grads), known, options))
    return groups


def real_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves; complex ones as real views with a last dimension of 2."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
