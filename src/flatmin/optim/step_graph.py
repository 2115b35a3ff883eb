"""One traced and compiled step: what it was traced for, and how its inputs are gathered."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from flatmin.optim.cuda_graph import CapturedStep, can_be_captured, copy_as_laid_out
from flatmin.optim.draws import DECOMPOSITIONS, Draw, Unfit
from flatmin.optim.functional_model import LossModule
from flatmin.optim.groups import count_step
from flatmin.optim.guard import Guard
from flatmin.optim.host_side import OnePassSide, TwoPassSide
from flatmin.optim.scene import Given

Compiled = Callable[..., Sequence[Tensor]]
Backend = Callable[[GraphModule, list[Tensor]], Compiled]


def with_inductor(graph: GraphModule, inputs: list[Tensor]) -> Compiled:
    """Compile with torch's inductor.

    On a CPU the calls of the kernels are compiled too: ten layers of 32 then take 0.52 instead of 0.60 ms.
    """
    from torch import _inductor  # noqa: PLC0415 - takes seconds that few need

    options = {"cpp_wrapper": all(tensor.is_cpu for tensor in inputs)}
    compiled: Compiled = _inductor.compile(graph, inputs, options)  # type: ignore[arg-type]
    return compiled


class StepGraph:
    """A step of one kind, compiled.

    Args:
        side: The host's part in it, and the function to trace.
        losses: The model with its loss function.
        num_micro_batches: Parts of the batch with a perturbation each.
    """

    def __init__(self, side: TwoPassSide | OnePassSide, losses: LossModule, num_micro_batches: int) -> None:
        self._side = side
        self._optimizer = optimizer = side.optimizer
        self._base = optimizer.base
        self._model = losses.model
        self._num_micro_batches = num_micro_batches
        self._params = list(optimizer._params())
        own = set(self._params)
        self._frozen: dict[str, Tensor] = {f"model.{n}": p for n, p in self._model.named_parameters() if p not in own}
        self._buffers = [
            (f"model.{prefix}{'.' if prefix else ''}{name}", module._buffers, name)
            for prefix, module in self._model.named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._slots = [(param, name) for param in self._params for name in self._base.state.get(param, ())]
        self._guard = Guard(self._model, self._base, self._params)
        self._draws: list[Draw] = []
        self._names_measured: list[str] = []
        self._compiled: Compiled

    def is_valid(self) -> bool:
        """Whether model, groups and state are still those that were traced, apart from the values."""
        return self._guard.is_satisfied()

    def compile(self, batch: Any, backend: Backend) -> None:
        """Trace the step and compile it.

        Args:
            batch: An example.
            backend: Makes a function of the graph.

        Raises:
            Unfit: It cannot be.
        """
        self._refuse_state_on_the_host()
        with self._side.undisturbed():
            graph, inputs = self._trace_either_way(batch)
        self._refuse_constants(graph)
        is_on_gpu = can_be_captured(graph, inputs)
        with torch.no_grad():
            self._compiled = backend(graph, inputs)
            self._compiled(*map(copy_as_laid_out, inputs))  # a trial: what fails must leave no trace
        if is_on_gpu:
            num_passing = len(tree_leaves(batch)) + len(self._draws) + 1
            self._compiled = CapturedStep(self._compiled, len(inputs) - num_passing)

    @torch.no_grad()
    def step(self, batch: Any) -> Tensor:
        """Take the step."""
        optimizer, diagnostics = self._optimizer, self._optimizer.diagnostics
        self._side.begin_step()
        inputs = self._inputs(batch, self._drawn())
        loss, last_loss, is_taken, *measured = self._compiled(*inputs)
        diagnostics.begin_step()
        for name, value in zip(self._names_measured, measured, strict=True):
            setattr(diagnostics, name, value)
        known = bool(is_taken) if is_taken.device.type == "cpu" else is_taken
        self._side.end_step(loss, last_loss, known)
        if known is not False:
            count_step(optimizer.param_groups)
        for stepped in (optimizer, self._base):
            setattr(stepped, "_opt_called", True)  # noqa: B010 - what a scheduler asks; torch declares it nowhere
        return loss

    def _trace_either_way(self, batch: Any) -> tuple[GraphModule, list[Tensor]]:
        """With the channels last where convolutions run on a CPU; as they are where the model cannot have it so."""
        has_convolutions = any(param.dim() == 4 and param.is_cpu for param in self._params)
        if has_convolutions and self._num_micro_batches == 1:
            self._side.function.model.channels_last = True
            try:
                return self._trace(batch)
            except (RuntimeError, ValueError):  # a view of what is no longer contiguous; anything else raises again
                self._side.function.model.channels_last = False
        return self._trace(batch)

    def _trace(self, batch: Any) -> tuple[GraphModule, list[Tensor]]:
        part = batch
        if self._num_micro_batches > 1:
            part = tree_map(lambda leaf: leaf.unflatten(0, (self._num_micro_batches, -1))[0], batch)
        given, spec = tree_flatten(self._given(part, []))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(leaf.detach()) if isinstance(leaf, Tensor) else leaf for leaf in given]
            survey = self._side.function.model.look(tree_unflatten(fake, spec))
        if self._num_micro_batches > 1 and survey.changed_buffers:
            raise Unfit("micro-batches change the model's buffers one after another")
        self._draws = survey.draws
        with torch.random.fork_rng(
            devices=sorted({p.device for p in self._params if p.device.type == "cuda"}, key=str)
        ):
            example = self._given(batch, self._drawn())
        leaves, spec = tree_flatten(example)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise Unfit("the batch holds something other than tensors")

        def flat_step(*flat: Any) -> list[Tensor]:
            outcome = self._side.function(tree_unflatten(list(flat), spec))
            self._names_measured = sorted(outcome.measured)
            return [
                outcome.loss,
                outcome.last_loss,
                outcome.is_taken,
                *[outcome.measured[n] for n in self._names_measured],
            ]

        inputs = [leaf.detach() for leaf in leaves]
        with torch.no_grad():
            graph = make_fx(flat_step, DECOMPOSITIONS, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        return graph, inputs

    def _given(self, batch: Any, draws: list[Tensor]) -> Given:
        base = self._base
        return Given(
            weights=self._params,
            true=self._side.true,
            frozen=self._frozen,
            buffers={name: held[key] for name, held, key in self._buffers},
            state=[dict(base.state[param]) if param in base.state else {} for param in self._params],
            numbers=self._numbers(),
            draws=draws,
            batch=batch,
        )

    def _inputs(self, batch: Any, draws: list[Tensor]) -> list[Tensor]:
        """The leaves of ``_given``, in its order and in a tenth of the time."""
        state = self._base.state
        return [
            *self._params,
            *self._side.true,
            *self._frozen.values(),
            *[held[key] for _, held, key in self._buffers],
            *[state[param][name] for param, name in self._slots],
            self._numbers(),
            *draws,
            *tree_leaves(batch),
        ]

    def _numbers(self) -> Tensor:
        groups = self._base.param_groups
        values = []
        for group in groups:
            if not group["rho"] >= 0.0:
                raise ValueError(f"rho must be >= 0, got {group['rho']}")
            lr = group["lr"]
            values += [0.0 if _is_elsewhere(lr) else float(lr), group["rho"]]
        numbers = torch.tensor([*values, groups[0]["num_steps"]], dtype=torch.float64)
        numbers = numbers.to(self._params[0].device, non_blocking=True)
        for index, group in enumerate(groups):
            if _is_elsewhere(group["lr"]):
                numbers[2 * index] = group["lr"]
        return numbers

    def _drawn(self) -> list[Tensor]:
        """The random numbers of a step, from torch's own generators; of each micro-batch in its turn."""
        if self._num_micro_batches == 1 or not self._draws:
            return [draw() for draw in self._draws]
        by_part = [[draw() for draw in self._draws] for _ in range(self._num_micro_batches)]
        return [torch.stack(same) for same in zip(*by_part, strict=True)]

    def _refuse_state_on_the_host(self) -> None:
        if not all(isinstance(self._base.state[param][name], Tensor) for param, name in self._slots):
            raise Unfit(f"{type(self._base).__name__} keeps numbers in its state that are no tensors")
        if any(self._base.state[param][name].device != param.device for param, name in self._slots):
            raise Unfit(
                f"{type(self._base).__name__} counts its steps in host memory: build it with capturable=True, "
                "or fused=True, where it has that"
            )

    def _refuse_constants(self, graph: GraphModule) -> None:
        """Refuse weights that the model or the loss function holds where they cannot be replaced."""
        constants = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        weights = {param.data_ptr() for param in self._params}
        for constant in constants:
            if isinstance(constant, Tensor) and not isinstance(constant, FakeTensor):
                if constant.requires_grad or constant.data_ptr() in weights:
                    raise Unfit("the loss depends on weights that are no parameters of the model by name")


def _is_elsewhere(number: float | Tensor) -> bool:
    """Whether the host would wait for it."""
    return isinstance(number, Tensor) and not number.is_cpu
