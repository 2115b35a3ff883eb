"""Let every later pass of a step see what the first saw, and leave no trace of it.

The passes of one step must evaluate the same function of the weights: same dropout masks, same running statistics at
the start. Afterwards buffers and random generators are as the first pass left them, as if it had been the only one.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from flatmin.optim.freshness import has_fresh_gradient
from flatmin.optim.plan import Plan

_Generators = dict[torch.device, Tensor]
_Buffers = list[tuple[nn.Module, str, Tensor | None, Tensor | None]]


class Replay:
    """Records the first pass through a model and replays its random numbers and buffers in the later ones.

    A pass may call the model several times; the i-th call of a later pass sees the generators as the i-th call of the
    first pass did. Calls without gradient (evaluation) are ignored.

    Args:
        model: The module that the passes call.
        plan: Told before and after each call of the model that a backward pass can follow.
    """

    def __init__(self, model: nn.Module, plan: Plan | None = None) -> None:
        self.model = model
        self._plan = plan
        self._at_start: tuple[_Generators, _Buffers] | None = None
        self._after_first: tuple[_Generators, _Buffers] | None = None
        self._calls: list[_Generators] = []
        self._num_replayed = 0
        self._in_closure = False
        self._may_start_anew = False
        self.is_paused = False  # while the model is traced, or makes passes of a dry run
        hooks = (
            model.register_forward_pre_hook(_Hook(self, "before_call")),
            # Of two replays of one model the second begins later and ends sooner.
            model.register_forward_hook(_Hook(self, "after_call"), always_call=True, prepend=True),
        )
        for hook in hooks:
            weakref.finalize(self, hook.remove)

    @property
    def was_called(self) -> bool:
        """Whether the first pass has called the model."""
        return bool(self._calls)

    def begin(self, *, in_closure: bool = False) -> None:
        """The first pass starts here."""
        self._in_closure, self._may_start_anew = in_closure, False
        self._calls = []
        if self._plan is not None:
            self._plan.before_first_pass()
        self._at_start = self._generators(), self._buffers()

    def expect_first_pass(self) -> None:
        """Gradients were cleared: the model's next call starts a first pass, unless a backward pass comes before it."""
        self._may_start_anew = self._after_first is None and not self._in_closure

    def rewind(self) -> None:
        """A later pass starts here: return to where the first one started, having noted where it ended.

        Raises:
            RuntimeError: The first pass did not call the model.
        """
        if self._at_start is None:
            raise RuntimeError(
                "the first pass did not call the module given as model=, so there is nothing to replay: "
                "give the module that the loop calls, such as the compiled or distributed wrapper"
            )
        if self._after_first is None:
            self._after_first = self._generators(), self._buffers()
        set_generators(self._at_start[0])
        set_buffers(self._at_start[1])
        self._num_replayed = 0

    def finish(self) -> None:
        """The passes are over: return to where the first one ended."""
        if self._after_first is not None:
            set_generators(self._after_first[0])
            set_buffers(self._after_first[1])
        self._at_start = self._after_first = None
        self._calls = []
        self._in_closure = self._may_start_anew = False

    def before_call(self) -> None:
        """The model is about to run forward."""
        if self.is_paused or not torch.is_grad_enabled():
            return
        if self._after_first is None:
            if self._at_start is None or (self._may_start_anew and not has_fresh_gradient(self.model.parameters())):
                self.begin()
            self._may_start_anew = False
            self._calls.append(self._generators())
        elif self._num_replayed < len(self._calls):
            set_generators(self._calls[self._num_replayed])
            self._num_replayed += 1
        if self._plan is not None:
            self._plan.before_forward()

    def after_call(self) -> None:
        """The model has run forward, or failed to."""
        if self._plan is not None:
            self._plan.after_forward()

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "plan": self._plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _generators(self) -> _Generators:
        return generators_of(self.model.parameters())

    def _buffers(self) -> _Buffers:
        return buffers_of(self.model)


@contextmanager
def averaged_buffers(model: nn.Module | None, number: int) -> Iterator[Callable[[], None]]:
    """Let every micro-batch start from the same buffers, and leave their mean.

    What as many devices would find in running statistics, averaged. Buffers of integers are those of the last
    micro-batch.

    Args:
        model: The module; nothing happens without one.
        number: Micro-batches.

    Yields:
        To be called after each micro-batch, in order: the first calls, ``number`` of them, say where one ended. Later
        ones, after the second passes of them all, only go back to the start.
    """
    if model is None:
        yield lambda: None
        return
    start = buffers_of(model)
    found: list[_Buffers] = []

    def after_each() -> None:
        if len(found) < number:
            found.append(buffers_of(model))
        set_buffers(start)

    yield after_each
    if found:
        set_buffers([_mean_buffer(same) for same in zip(*found, strict=True)])


def generators_of(params: Iterable[Tensor]) -> _Generators:
    """The states of torch's own generators: of the CPU and of the devices of the parameters."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # then no parameter is there, and looking at all of them takes its time
        return states
    devices = {param.device for param in params if param.device.type == "cuda"}
    if devices and torch.cuda.is_current_stream_capturing():  # a graph counts its random numbers by itself
        return states
    for device in devices:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def buffers_of(model: nn.Module) -> _Buffers:
    """Every buffer of the model, the tensor itself and a copy."""
    return [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in _modules_of(model)
        for name, buffer in module._buffers.items()
    ]


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """``model.modules()`` without names, in a third of the time, which counts at every step of a small network."""
    found, seen = [model], {model}
    for module in found:  # which grows meanwhile
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def _mean_buffer(same: tuple[Any, ...]) -> tuple[nn.Module, str, Tensor | None, Tensor | None]:
    module, name, buffer, last = same[-1]
    if last is not None and last.is_floating_point():
        last = torch.stack([value for _, _, _, value in same]).mean(dim=0)
    return module, name, buffer, last


class _Hook:
    """Calls a method of the replay without keeping it alive, and does nothing in a copy of the model."""

    def __init__(self, replay: Replay | None, method: str) -> None:
        self._replay = weakref.ref(replay) if replay is not None else lambda: None
        self._method = method

    def __call__(self, *_: Any) -> None:
        if torch.compiler.is_compiling():  # model.compile() traces the hooks too
            _run_untraced(self)
        else:
            _run(self)

    def __reduce__(self) -> tuple[type["_Hook"], tuple[None, str]]:
        return _Hook, (None, self._method)


def _run(hook: _Hook) -> None:
    replay = hook._replay()
    if replay is not None:
        getattr(replay, hook._method)()


_run_untraced = _disable_dynamo(_run)  # torch.compiler.disable would import the compiler now


def set_generators(states: _Generators) -> None:
    """Put the states back."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def set_buffers(buffers: _Buffers) -> None:
    """Put the values back, in the tensors that held them."""
    targets, values = [], []
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer  # a module may have bound a new tensor instead of writing into this one
            if buffer is None or value is None:
                continue
            if type(buffer) is Tensor and 0 not in buffer.stride():
                targets.append(buffer)
                values.append(value)
            else:
                _put_back_(buffer, value)
        if targets:
            torch._foreach_copy_(targets, values)


def _put_back_(buffer: Tensor, value: Tensor) -> None:
    """One that cannot be in a list with others, such as a DTensor, or that is expanded: one number for many entries."""
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0 and buffer.shape[dim] > 1:
            buffer, value = buffer.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    buffer.copy_(value)
