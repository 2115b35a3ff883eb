"""Passes at the weights an optimizer has, after which nothing has changed."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.modules.module import register_module_forward_pre_hook

from flatmin.optim.balls import Ball, Perturbation
from flatmin.optim.buffers import buffers_of, set_buffers
from flatmin.optim.closures import Closure
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.generators import generators_of, set_generators
from flatmin.optim.layers import LayerBall
from flatmin.optim.loss_scaling import loss_scale_of
from flatmin.optim.norms import joint_norm, widened
from flatmin.optim.progress import Progress
from flatmin.optim.space import Space
from flatmin.optim.two_pass import TwoPass
from flatmin.optim.when import Always


@dataclass(frozen=True)
class Look:
    """What one call of a closure did.

    Attributes:
        loss: What it returned, as a number.
        grads: The gradients that it left.
        has_run_backward: Some parameter received a gradient meanwhile.
        has_called_model: It called the module given as ``model=``; true where there is none.
        has_drawn: It drew numbers from torch's generators.
        changed: The modules one of whose buffers it changed.
    """

    loss: float | None
    grads: dict[Tensor, Tensor]
    has_run_backward: bool
    has_called_model: bool
    has_drawn: bool
    changed: list[nn.Module]


@dataclass(frozen=True)
class DryStep:
    """What the passes of one step found.

    Attributes:
        loss: Loss at w.
        perturbed_loss: Loss at w + eps.
        asked: ``||eps||`` of the first ascent before it is rounded to the parameters' dtype.
        realised: The same after.
        gradient_norm: ``||g||``.
        cosine: Of g and g_p.
        sees_perturbation: The last pass found another loss or gradient than the first.
        error: Why the pass at w + eps failed.
    """

    loss: float | None
    asked: float
    realised: float
    gradient_norm: float
    perturbed_loss: float | None = None
    cosine: float | None = None
    sees_perturbation: bool = False
    error: str | None = None

    @property
    def rise(self) -> float | None:
        """Loss at w + eps minus loss at w."""
        return None if self.loss is None or self.perturbed_loss is None else self.perturbed_loss - self.loss


class DryRun:
    """Runs closures at w and at w + eps with the pieces of an optimizer, but with passes of its own.

    Args:
        optimizer: Whose weights, groups and pieces they are.
        scaler: The gradient scaler of the closures.
        saved: The buffers of the modules called so far, see ``dry_run``.
    """

    def __init__(self, optimizer: SharpnessAware, scaler: GradScaler | None, saved: "_SavedBuffers") -> None:
        own = optimizer._passes
        self._ball = _WatchedBall(optimizer.ball)
        pieces = own.plan.pieces._replace(when=Always(), ball=cast(Ball, self._ball))
        self.passes = TwoPass(replace(own.plan, pieces=pieces, progress=Progress()), own.model, collects_norms=True)
        self.passes.names = own.names
        self.params = list(self.passes.params())
        self._scaler, self._saved = scaler, saved
        self._generators = generators_of(self.params)

    def rewind(self) -> None:
        """Back to the buffers and random numbers of the beginning."""
        set_generators(self._generators)
        self._saved.restore()

    def look(self, closure: Closure) -> Look:
        """Call a closure at w; the gradients that it leaves are its own."""
        self.passes.clear_gradients()
        before, num_received, replay = generators_of(self.params), 0, self.passes.replay

        def count(_: Tensor) -> None:
            nonlocal num_received
            num_received += 1

        hooks = [p.register_post_accumulate_grad_hook(count) for p in self.params if p.requires_grad]  # type: ignore[no-untyped-call]
        try:
            loss = closure()
            has_called_model = replay is None or replay.was_called or _only_holds_modules(replay.model)
        finally:
            for hook in hooks:
                hook.remove()
            if replay is not None:
                replay.finish()
        grads = {param: param.grad for param in self.params if param.grad is not None}
        has_drawn = not all(torch.equal(state, before[device]) for device, state in generators_of(self.params).items())
        return Look(_number(loss), grads, num_received > 0, has_called_model, has_drawn, self._saved.changed())

    def step(self, closure: Closure) -> DryStep:
        """Both passes of a step, back at w afterwards.

        Raises:
            RuntimeError: A pass leaves no new gradient.
        """
        passes = self.passes
        self.passes.clear_gradients()
        passes.begin(is_in_closure=True)
        passes.progress.loss_scale = loss_scale_of(self._scaler, self.params[0].device)
        at_start = generators_of(self.params)
        loss = last_loss = _number(closure())
        passes.decide()
        space = passes.space()
        norm = float(space.norm(space.grads)) / float(passes.progress.loss_scale or 1.0)
        first = [grad.clone() for grad in space.grads]
        asked = realised = 0.0
        for ascent in range(passes.plan.ascent_steps):
            passes.ascend(keeps_grads=False)
            if ascent == 0:
                asked = self._ball.asked
                realised = float(passes.visit.length())
            if passes.replay is None:
                set_generators(at_start)  # other dropout masks would be mistaken for a rise
            try:
                last_loss = _number(closure())
            except RuntimeError as error:
                passes.give_up()
                return DryStep(loss, asked, realised, norm, error=str(error))
        passes.require_backward()
        sees = last_loss != loss or not _are_equal(first, passes.space().grads)
        passes.descend()
        cosine = passes.diagnostics.cosine
        passes.give_up()
        return DryStep(loss, asked, realised, norm, last_loss, None if cosine is None else float(cosine), sees)


@contextmanager
def dry_run(optimizer: SharpnessAware, scaler: GradScaler | None = None) -> Iterator[DryRun]:
    """Run closures at w and w + eps; afterwards everything is as before, also where one raises.

    Weights, buffers of every module that was called, gradients, random generators (torch's and those of the pieces),
    groups, state and diagnostics. What a closure does beyond the model, such as drawing from a data loader, it does.

    Raises:
        RuntimeError: A step is under way.
    """
    own = optimizer._passes
    if own.progress.num_ascents or own.progress.is_complete or own.sum.num_terms:
        raise RuntimeError("a step is under way: finish it, or restore(), before a dry run")
    saved = _SavedBuffers()
    if own.model is not None:
        saved.add(own.model)
    run = DryRun(optimizer, scaler, saved)
    grads = [param.grad for param in run.params]
    groups = [dict(group) for group in optimizer.param_groups]
    piece_generators = _generators_of_pieces(own.plan.pieces)
    hook = register_module_forward_pre_hook(saved.on_call)
    if own.replay is not None:
        own.replay.is_paused = True
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks on modules", UserWarning)
            yield run
    finally:
        hook.remove()
        run.passes.give_up()
        if own.replay is not None:
            own.replay.is_paused = False
            own.replay.finish()
        for group, entries in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(entries)
        for param, grad in zip(run.params, grads, strict=True):
            param.grad = grad
        run.rewind()
        for generator, state in piece_generators:
            generator.set_state(state)


class _SavedBuffers:
    """The buffers of all modules that are called, as they were before."""

    def __init__(self) -> None:
        self._modules: set[nn.Module] = set()
        self._values: list[Any] = []

    def add(self, module: nn.Module) -> None:
        if module not in self._modules:
            self._values.extend(entry for entry in buffers_of(module) if entry[0] not in self._modules)
            self._modules.update(module.modules())

    def on_call(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # inside of a compiled module, which was saved when it was called
            self.add(module)

    def changed(self) -> list[nn.Module]:
        def differs(module: nn.Module, name: str, value: Tensor | None) -> bool:
            now = module._buffers[name]
            return (now is None) != (value is None) or (
                now is not None and value is not None and not torch.equal(now, value)
            )

        return list(dict.fromkeys(m for m, name, _, value in self._values if differs(m, name, value)))

    def restore(self) -> None:
        set_buffers(self._values[::-1])  # of a tensor that two modules hold the first value wins


class _WatchedBall:
    """A ball that notes the length of the last perturbation it was asked for."""

    def __init__(self, ball: Ball | LayerBall) -> None:
        self._ball = ball
        self.asked = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ball, name)

    def farthest(self, space: Space, direction: list[Tensor], scaling: list[Tensor] | None) -> Perturbation:
        step = self._ball.farthest(space, direction, scaling)
        wide = [widened(tensor) * scale for tensor, scale in zip(step.tensors, step.scales, strict=True)]
        self.asked = float(joint_norm(wide))
        return step


def _generators_of_pieces(pieces: Sequence[object]) -> list[tuple[torch.Generator, Tensor]]:
    values = (value for piece in pieces for value in getattr(piece, "__dict__", {}).values())
    return [(value, value.get_state()) for value in values if isinstance(value, torch.Generator)]


def _are_equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def _number(loss: Any) -> float | None:
    return None if loss is None else float(loss)


def check_two_passes(optimizer: object) -> None:
    """Refuse an optimizer without the engine's two passes.

    Raises:
        TypeError: It is plain, or one whose passes are others.
    """
    if not isinstance(optimizer, SharpnessAware):
        hint = ": look at its diagnostics" if hasattr(optimizer, "diagnostics") else ""
        raise TypeError(
            "optimizer must be a flatmin.SharpnessAware, which makes a pass at w and one at w + eps, got "
            f"{type(optimizer).__name__}{hint}"
        )


def _only_holds_modules(model: nn.Module) -> bool:
    """Whether nobody could call it, so that a closure calls what it holds: an ``nn.ModuleList``, for example."""
    return type(model).forward is nn.Module.forward
