"""Let every later pass of a step see what the first saw, and leave no trace of it.

The passes of one step must evaluate the same function of the weights: same dropout masks, same running statistics at
the start. Afterwards buffers and random generators are as the first pass left them, as if it had been the only one.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

_Generators = dict[torch.device, Tensor]
_Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]


class Replay:
    """Records the first pass through a model and replays its random numbers and buffers in the later ones.

    A pass may call the model several times; the i-th call of a later pass sees the generators as the i-th call of the
    first pass did. Calls without gradient (evaluation) are ignored.

    Args:
        model: The module that the passes call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._at_start: tuple[_Generators, _Buffers] | None = None
        self._after_first: tuple[_Generators, _Buffers] | None = None
        self._calls: list[_Generators] = []
        self._num_replayed = 0
        self._in_closure = False
        model.register_forward_pre_hook(_Recorder(self))

    def begin(self, *, in_closure: bool = False) -> None:
        """The first pass starts here."""
        self._in_closure = in_closure
        self._calls = []
        self._at_start = self._generators(), self._buffers()

    def rewind(self) -> None:
        """A later pass starts here: return to where the first one started, having noted where it ended."""
        if self._at_start is None:  # no call of the model was seen, so there is nothing to replay
            return
        if self._after_first is None:
            self._after_first = self._generators(), self._buffers()
        _set_generators(self._at_start[0])
        _set_buffers(self._at_start[1])
        self._num_replayed = 0

    def finish(self) -> None:
        """The passes are over: return to where the first one ended."""
        if self._after_first is not None:
            _set_generators(self._after_first[0])
            _set_buffers(self._after_first[1])
        self._at_start = self._after_first = None
        self._calls = []
        self._in_closure = False

    def forget(self) -> None:
        """Gradients were zeroed: what was recorded since the last step belongs to no pass."""
        if self._after_first is None and not self._in_closure:
            self._at_start = None
            self._calls = []

    def on_call(self) -> None:
        """The model is about to run forward."""
        if not torch.is_grad_enabled():
            return
        if self._after_first is None:
            if self._at_start is None:
                self.begin()
            self._calls.append(self._generators())
        elif self._num_replayed < len(self._calls):
            _set_generators(self._calls[self._num_replayed])
            self._num_replayed += 1

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]

    def _generators(self) -> _Generators:
        states = {torch.device("cpu"): torch.get_rng_state()}
        for device in {param.device for param in self.model.parameters() if param.device.type == "cuda"}:
            states[device] = torch.cuda.get_rng_state(device)
        return states

    def _buffers(self) -> _Buffers:
        return [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]


class _Recorder:
    """Forward hook that does not keep the replay alive, and does nothing in a copy of the model."""

    def __init__(self, replay: Replay | None) -> None:
        self._replay = weakref.ref(replay) if replay is not None else lambda: None

    def __call__(self, module: nn.Module, args: Any) -> None:
        replay = self._replay()
        if replay is not None:
            replay.on_call()

    def __reduce__(self) -> tuple[type["_Recorder"], tuple[None]]:
        return _Recorder, (None,)


def _set_generators(states: _Generators) -> None:
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def _set_buffers(buffers: _Buffers) -> None:
    with torch.no_grad():
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer  # a module may have bound a new tensor instead of writing into this one
            buffer.copy_(value)
