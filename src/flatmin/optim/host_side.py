"""What the host does around a compiled step: the bookkeeping of the eager step, which is no arithmetic."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flatmin.optim.engine import SharpnessAware
from flatmin.optim.freshness import mark_used
from flatmin.optim.functional_model import LossModule
from flatmin.optim.functional_one_pass import FunctionalOnePass
from flatmin.optim.functional_step import FunctionalStep
from flatmin.optim.groups import has_radius
from flatmin.optim.memory import Memory
from flatmin.optim.one_pass import OnePass
from flatmin.optim.saved import Saved
from flatmin.optim.space import every_space


class TwoPassSide:
    """The host's part in the steps of a two-pass method.

    Args:
        optimizer: Whose steps they are.
        losses: The model with its loss function.
        is_perturbed: What ``when`` says of them.
        num_micro_batches: Parts of the batch with a perturbation each.

    Attributes:
        optimizer: As given.
        function: The device's part.
        true: Tensors for w where the parameters rest elsewhere between steps: none.
    """

    def __init__(
        self, optimizer: SharpnessAware, losses: LossModule, is_perturbed: bool, num_micro_batches: int
    ) -> None:
        self.optimizer = optimizer
        self.function = FunctionalStep(optimizer, losses, is_perturbed, num_micro_batches)
        self.true: list[Tensor] = []
        self._is_perturbed = is_perturbed

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While the step is traced: without gradients, and without what listens to the model's passes."""
        passes = self.optimizer._passes
        passes.clear_gradients()
        assert passes.replay is not None
        passes.replay.is_paused = True
        try:
            yield
        finally:
            passes.replay.is_paused = False

    def begin_step(self) -> None:
        """Before the graph reads anything."""
        self.optimizer._passes.plan.begin_step()

    def end_step(self, loss: Tensor, last_loss: Tensor, is_taken: bool | Tensor) -> None:
        """After the graph has written everything."""
        groups, diagnostics = self.optimizer.param_groups, self.optimizer.diagnostics
        diagnostics.measure_losses(loss, last_loss if self._is_perturbed else None)
        has_moved = self._is_perturbed and has_radius(groups)
        diagnostics.count(has_moved, is_taken)


class OnePassSide:
    """The host's part in the steps of a one-pass method, whose weights rest at w + eps between them.

    Args:
        optimizer: Whose steps they are.
        losses: The model with its loss function.

    Attributes:
        optimizer: As given.
        function: The device's part.
        true: The parameters at w, in tensors that every step reads and writes.
    """

    def __init__(self, optimizer: OnePass, losses: LossModule) -> None:
        self.optimizer = optimizer
        self.function = FunctionalOnePass(optimizer, losses)
        self._params = list(optimizer._params())
        self.true = [torch.empty_like(param) for param in self._params]
        true_of = dict(zip(self._params, self.true, strict=True))
        moving = every_space(optimizer.base, {}, Memory()).perturbed().owners
        self._saved = Saved(moving, [true_of[param] for param in moving])
        self._has_moved = False
        self._versions: list[int] = []

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While the step is traced: without gradients."""
        mark_used(self._params)
        for param in self._params:
            param.grad = None
        yield

    def begin_step(self) -> None:
        """Before the graph reads anything: know w, unless it is known from the step before."""
        self.optimizer._settle()
        rest = self.optimizer._rest
        self._has_moved = rest.has_moved
        if not rest.is_kept_in(self._saved) or self._versions != [param._version for param in self._params]:
            known = rest.true_weights()
            torch._foreach_copy_(self.true, [known.get(param, param) for param in self._params])

    def end_step(self, loss: Tensor, last_loss: Tensor, is_taken: bool | Tensor) -> None:
        """After the graph has written everything: w is in ``true``, and the weights are elsewhere."""
        self.optimizer.diagnostics.measure_losses(loss, None)
        self.optimizer.diagnostics.count(self._has_moved, is_taken)
        self.optimizer._rest.move_in(self._saved)
        self._versions = [param._version for param in self._params]
