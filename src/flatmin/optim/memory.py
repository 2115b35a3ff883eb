"""What the pieces of a method keep from step to step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.optim.sharding import local, placed_like


class Memory:
    """Entries of the optimizer's state that belong to us, one tensor per parameter and name.

    What a step finds out becomes state only when the base optimizer has taken that step. So a step that is skipped or
    given up leaves no trace, and a base that creates its state on its first step (Adam) never meets ours before its
    own. What several micro-batches or replicas find out is averaged.

    Args:
        optimizer: Whose state it is; without one nothing is remembered.
    """

    def __init__(self, optimizer: Optimizer | None = None) -> None:
        self._optimizer = optimizer
        self._found: dict[tuple[Tensor, str], tuple[Tensor, int]] = {}

    def recall(self, owner: Tensor, name: str) -> Tensor | None:
        """The value as of the last step that was taken."""
        state: Any = {} if self._optimizer is None else self._optimizer.state
        value: Tensor | None = state[owner].get(name) if owner in state else None
        return value

    def names_of(self, owner: Tensor) -> list[str]:
        """Of all entries that there are for a parameter, the base's own too."""
        state: Any = {} if self._optimizer is None else self._optimizer.state
        return list(state[owner]) if owner in state else []

    def remember(self, owner: Tensor, name: str, value: Tensor) -> None:
        """A value for the steps after this one; the mean where a step remembers several."""
        if (owner, name) in self._found:
            total, number = self._found[owner, name]
            self._found[owner, name] = total + value, number + 1
        else:
            self._found[owner, name] = value, 1

    def totals(self) -> list[Tensor]:
        """The sums of what was found in this step, to be averaged over replicas in place."""
        return [total for total, _ in self._found.values()]

    def replace_found(self, values: Sequence[Tensor]) -> None:
        """Put other values in the place of those found, in the same order."""
        self._found = {key: (value, 1) for key, value in zip(self._found, values, strict=True)}

    def commit(self, is_taken: bool | Tensor, owners: Sequence[Tensor]) -> None:
        """The step is over: make what it found the state.

        Args:
            is_taken: Whether the base took it; a 0-dim tensor where only the device knows.
            owners: The parameters that it moved.
        """
        if self._found and self._optimizer is not None and is_taken is not False:
            moved = set(owners)
            for (owner, name), (total, number) in self._found.items():
                if owner not in moved:
                    continue
                value = total / number if number > 1 else total
                if isinstance(is_taken, Tensor):
                    before = self.recall(owner, name)
                    unchanged = torch.zeros_like(value) if before is None else before
                    kept = torch.where(is_taken.to(value.device), local(value), local(unchanged))
                    value = placed_like(kept, owner)
                self._optimizer.state[owner][name] = value
        self._found = {}

    def discard(self) -> None:
        """The step was given up."""
        self._found = {}
