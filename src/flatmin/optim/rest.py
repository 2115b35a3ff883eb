"""Weights that rest at w + eps between steps, and the way back to w, whoever has written to them since."""

import torch
from torch import Tensor

from flatmin.optim.balls import Ball
from flatmin.optim.layers import LayerBall
from flatmin.optim.saved import Saved
from flatmin.optim.space import Space
from flatmin.optim.visit import Visit


class Rest:
    """A visit to w + eps that lasts, during which weights may be loaded or written from outside.

    Weights that somebody has written since are the new true ones, unless they are those that rested there: swapped out
    and in again, or a checkpoint of the model taken at rest, which may be loaded after the optimizer's.
    """

    def __init__(self) -> None:
        self._visit = Visit()
        self._versions: list[int] = []
        self._loaded: list[Tensor] = []

    @property
    def has_moved(self) -> bool:
        """Whether weights are at w + eps."""
        return bool(self._visit.owners)

    def is_kept_in(self, saved: Saved) -> bool:
        """Whether w is in these tensors."""
        return self._visit.saved is saved

    def is_as_left(self) -> bool:
        """Whether nobody has written other weights where they rest."""
        is_untouched = self._versions == [owner._version for owner in self._visit.owners]
        return is_untouched or bool(self._loaded and all(map(torch.equal, self._visit.params, self._loaded)))

    def ascend(self, space: Space, direction: list[Tensor], ball: Ball | LayerBall, seed: int | None) -> None:
        """From w to w + eps, see ``Visit.ascend``."""
        self._visit.ascend(space, direction, ball, is_last=True, seed=seed)
        self._note_versions()

    def move_in(self, saved: Saved) -> None:
        """The weights have been moved by somebody else, who has kept w in ``saved``."""
        self._visit = Visit(saved.targets, saved.targets, saved)
        self._loaded = []
        self._note_versions()

    def await_model(self) -> None:
        """The weights that rest here now may be written once more: torch.distributed.checkpoint does so."""
        self._loaded = [param.clone() for param in self._visit.params]

    @torch.no_grad()
    def go_home(self) -> None:
        """To w, whoever has written to the weights since."""
        self._visit.go_home()
        self._versions, self._loaded = [], []

    @torch.no_grad()
    def take_home(self) -> list[tuple[Tensor, Tensor]]:
        """The same; returns each parameter with a copy of what it held."""
        found = [(param, param.clone()) for param in self._visit.params]
        self.go_home()
        return found

    @torch.no_grad()
    def true_weights(self) -> dict[Tensor, Tensor]:
        """A copy of w for each perturbed parameter; none at home."""
        true = self._visit.values()
        self._note_versions()
        return true

    def _note_versions(self) -> None:
        self._versions = [owner._version for owner in self._visit.owners]
