"""Let every later pass of a step see what the first saw, and leave no trace of it.

The passes of one step must evaluate the same function of the weights: same dropout masks, same running statistics at
the start. Afterwards buffers and random generators are as the first pass left them, as if it had been the only one.
"""

import weakref
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from flatmin.optim.buffers import Buffers, buffers_of, set_buffers
from flatmin.optim.freshness import has_fresh_gradient
from flatmin.optim.generators import Generators, generators_of, set_generators
from flatmin.optim.plan import Plan


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
        self._at_start: tuple[Generators, Buffers] | None = None
        self._after_first: tuple[Generators, Buffers] | None = None
        self._calls: list[Generators] = []
        self._num_replayed = 0
        self._in_closure = False
        self._may_start_anew = False
        self._has_trained = False
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
        self._in_closure, self._may_start_anew, self._has_trained = in_closure, False, False
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
            if self._at_start is None or self._starts_anew():
                self.begin()
            self._may_start_anew = False
            self._has_trained = self._has_trained or self.model.training
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

    def _starts_anew(self) -> bool:
        """Whether the calls so far belong to no first pass, and the coming one does.

        They were followed by a clearing of gradients and by no backward pass, or were an evaluation that has kept
        gradients on: in evaluation mode, as the coming one is not.
        """
        has_evaluated = self.model.training and not self._has_trained and not self._in_closure
        return (self._may_start_anew or has_evaluated) and not has_fresh_gradient(self.model.parameters())

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "plan": self._plan}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _generators(self) -> Generators:
        return generators_of(self.model.parameters())

    def _buffers(self) -> Buffers:
        return buffers_of(self.model)


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
