"""Compile a whole sharpness-aware step into one graph; where that is impossible, say why and take the eager step."""

import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from flatmin.optim.compilable import why_not_compiled
from flatmin.optim.draws import Unfit, Unready
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.functional_model import LossFn, LossModule
from flatmin.optim.host_side import OnePassSide, TwoPassSide
from flatmin.optim.methods.bsam import BSAM
from flatmin.optim.one_pass import OnePass
from flatmin.optim.step_graph import Backend, StepGraph, with_inductor
from flatmin.optim.when import When

_MOST_GRAPHS = 16  # traced for one step, after which it is taken to change all the time


def compile_step(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    num_micro_batches: int = 1,
    backend: Backend = with_inductor,
) -> "CompiledStep":
    """Compile both passes, the perturbation, the restoring, the combination and the base update into one graph.

    A step ``loss = step(batch)`` does what this one does, with the same numbers up to rounding::

        def closure():
            loss = loss_fn(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    Weights, buffers and state stay in the same storage, random numbers are drawn by the same generators in the same
    order, and the second pass repeats them. It is the optimizer's own state that is read and written, so eager and
    compiled steps may alternate, checkpoints are the optimizer's, and a new ``lr`` or ``rho`` needs no new graph. Only
    the gradients stay inside: ``param.grad`` is not set.

    The first step is eager and creates the state. The second is traced and compiled, which takes seconds to minutes,
    and so is every step of a kind that did not come before: a plain one among perturbed ones, a batch of another
    shape, another hyperparameter, a layer that was frozen or put into evaluation mode.

    What cannot be compiled takes the eager step, and a warning says why, once: methods that look at the gradient to
    decide whether a step is perturbed (``AESAM``), ``BSAM``, replicated or sharded models, parameters that are complex
    or narrower than float32, step hooks, and models that cannot be traced.

    Args:
        model: The module that the optimizer was given as ``model=``.
        loss_fn: Called with the model and a batch; returns the loss, a scalar tensor.
        optimizer: A sharpness-aware optimizer of the model's parameters.
        num_micro_batches: m-sharpness: the batch is cut into as many equal parts along the first dimension of each of
            its tensors, and each part has a perturbation of its own, as in ``optimizer.step([closure_1, …])``. They are
            worked on side by side, with a copy of the weights for each, where the model leaves its buffers alone and
            these copies together hold no more than 2^24 numbers; one after another, eagerly, elsewhere.
        backend: Makes a function of a traced graph and its example inputs; torch's inductor by default.

    Raises:
        TypeError: ``optimizer`` is none of these: a plain one, or ``SecondOrderSAM``, whose closure is another.
        ValueError: ``model`` is another than the optimizer's, or ``num_micro_batches`` is no integer ``>= 1``.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
        >>> step = flatmin.compile_step(model, lambda model, batch: model(batch).square().mean(), optimizer)
        >>> loss = step(torch.ones(2, 3))
    """
    if not isinstance(optimizer, SharpnessAware | OnePass | BSAM):
        raise TypeError(f"optimizer must be a SharpnessAware, OnePass or BSAM, got {type(optimizer).__name__}")
    if isinstance(optimizer, SharpnessAware) and optimizer._passes.model is not model:
        raise ValueError("model must be the one that the optimizer was given as model=, got another")
    if not isinstance(num_micro_batches, int) or not num_micro_batches >= 1:
        raise ValueError(f"num_micro_batches must be an integer >= 1, got {num_micro_batches}")
    return CompiledStep(LossModule(model, loss_fn), optimizer, num_micro_batches, backend)


class CompiledStep:
    """A step as one graph, see ``compile_step``, which makes it.

    Attributes:
        reason: Why the eager step is taken instead; ``None`` where it is not.
        num_graphs: Graphs traced so far.
    """

    def __init__(
        self,
        losses: LossModule,
        optimizer: SharpnessAware | OnePass | BSAM,
        num_micro_batches: int,
        backend: Backend,
    ) -> None:
        self.reason: str | None = None
        self.num_graphs = 0
        self._losses = losses
        self._optimizer = optimizer
        self._num_micro_batches = num_micro_batches
        self._backend = backend
        self._graphs: dict[Any, StepGraph] = {}
        self._has_stepped = False
        reason = why_not_compiled(optimizer, losses.model, num_micro_batches)
        if reason is not None:
            self._give_up(reason, stacklevel=4)

    def __call__(self, batch: Any) -> Tensor:
        """Take a step.

        Args:
            batch: What the loss function takes: a tensor, or tuples, lists and dictionaries of them.

        Returns:
            The loss at w; with micro-batches its mean over them.

        Raises:
            ValueError: A group's ``rho`` was scheduled below zero.
        """
        graph = self._graph_for(batch) if self.reason is None and self._has_stepped else None
        self._has_stepped = True
        return self._eager_step(batch) if graph is None else graph.step(batch)

    def _graph_for(self, batch: Any) -> StepGraph | None:
        """The graph of the coming step; ``None`` where it must be eager."""
        optimizer, is_perturbed = self._optimizer, True
        if isinstance(optimizer, SharpnessAware):
            plan, progress = optimizer._passes.plan, optimizer._passes.progress
            is_perturbed = cast(When, plan.pieces.when)(plan.num_steps)  # asking isinstance() takes 7 microseconds
            if progress.num_ascents or progress.is_complete:  # inside a loop of two steps, which the eager step refuses
                return None
            if self._num_micro_batches > 1 and not is_perturbed:
                return None
        elif cast(OnePass, optimizer)._is_shown:  # which the eager step refuses, too
            return None
        leaves = tree_leaves(batch)
        shapes = [(leaf.shape, leaf.dtype, leaf.stride(), leaf.device) for leaf in leaves if isinstance(leaf, Tensor)]
        key = is_perturbed, *_autocast(leaves), *shapes
        graph = self._graphs.get(key)
        if graph is None or not graph.is_valid():
            graph = self._traced(batch, is_perturbed)
        if graph is not None:
            self._graphs[key] = graph
        return graph

    def _traced(self, batch: Any, is_perturbed: bool) -> StepGraph | None:
        if self.num_graphs == _MOST_GRAPHS:
            self._give_up(f"{_MOST_GRAPHS} graphs were traced, each for other shapes or settings")
            return None
        self.num_graphs += 1
        try:
            graph = StepGraph(self._side(is_perturbed), self._losses, self._num_micro_batches)
            graph.compile(batch, self._backend)
        except Unready:
            return None
        except Exception as error:
            self._give_up(_sentence(error))
            return None
        return graph

    def _side(self, is_perturbed: bool) -> TwoPassSide | OnePassSide:
        optimizer = self._optimizer
        if isinstance(optimizer, OnePass):
            return OnePassSide(optimizer, self._losses)
        assert isinstance(optimizer, SharpnessAware)
        return TwoPassSide(optimizer, self._losses, is_perturbed, self._num_micro_batches)

    def _eager_step(self, batch: Any) -> Tensor:
        parts = [batch]
        if self._num_micro_batches > 1:
            cut = tree_map(lambda leaf: leaf.unflatten(0, (self._num_micro_batches, -1)), batch)
            parts = [tree_map(lambda leaf: leaf[i], cut) for i in range(self._num_micro_batches)]  # noqa: B023
        closures = [self._closure(part) for part in parts]
        return self._optimizer.step(closures[0] if len(closures) == 1 else closures)

    def _closure(self, batch: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss: Tensor = self._losses(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return closure

    def _give_up(self, reason: str, stacklevel: int = 5) -> None:
        self.reason = reason
        self._graphs.clear()
        warnings.warn(f"compile_step takes the eager step: {reason}", stacklevel=stacklevel)


def _autocast(leaves: list[Any]) -> tuple[Any, ...]:
    """The mixed precision around the call."""
    kinds = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
    return tuple(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in sorted(kinds))


def _sentence(error: Exception) -> str:
    if isinstance(error, Unfit):
        return str(error)
    first_line = str(error).strip().partition("\n")[0]
    return f"tracing or compiling it stopped with {type(error).__name__}: {first_line}"
