"""The base optimizer's update, left out where a gradient is not finite, with loss scaling undone before."""

from typing import Any

from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

from flatmin.optim.freshness import mark_used
from flatmin.optim.groups import count_step
from flatmin.optim.loss_scaling import remaining_scale, unscale_
from flatmin.optim.progress import require
from flatmin.optim.space import Space
from flatmin.optim.two_pass import TwoPass
from flatmin.optim.wrapper import Wrapper


def guarded_step(base: Optimizer, space: Space, *, found_inf: Tensor | None, looks: bool) -> bool | Tensor:
    """Take the base optimizer's step, or leave parameters and state as they are where a gradient is not finite.

    An optimizer that supports gradient scalers (torch's fused ones) reads that on the device. For any other, and in the
    first step of an SGD with momentum, the host reads it, which on a CPU waits for nothing.

    Args:
        base: The optimizer.
        space: The parameters with the gradient to follow, without loss scale.
        found_inf: Other than 0 where a gradient scaler has found a gradient that is not finite.
        looks: Whether to look for such gradients where no scaler has.

    Returns:
        Whether the step was taken; a 0-dim tensor where only the device knows.
    """
    if found_inf is None and not looks:
        base.step()
        return True
    is_finite = space.has_finite_grads()
    if found_inf is not None:
        is_finite = is_finite & (found_inf.to(is_finite.device) == 0)
    if _skips_on_device(base) and not _creates_momentum(base):
        fused: Any = base
        fused.found_inf = is_finite.logical_not().float()  # where such an optimizer looks for it
        try:
            base.step()
        finally:
            del fused.found_inf
        return bool(is_finite) if is_finite.device.type == "cpu" else is_finite
    if is_finite:
        base.step()
        return True
    return False


def _skips_on_device(base: Optimizer) -> bool:
    """Whether the base reads ``found_inf``, by torch's own protocol; groups from an unfused checkpoint do not."""
    is_meant_to = getattr(base, "_step_supports_amp_scaling", False)
    return is_meant_to and all(group.get("fused", True) for group in base.param_groups)


def _creates_momentum(base: Optimizer) -> bool:
    """Whether the coming step is SGD's first: skipped on the device, its fused form leaves momentum without values."""
    if not isinstance(base, SGD):
        return False
    moved = [group["params"] for group in base.param_groups if group["momentum"] != 0.0]
    firsts = (next((param for param in params if param.grad is not None), None) for params in moved)
    return any(p is not None and base.state.get(p, {}).get("momentum_buffer") is None for p in firsts)


def take_base_step(optimizer: Wrapper, passes: TwoPass, scaler: GradScaler | None, *, skips_nonfinite: bool) -> None:
    """Take the base optimizer's step with the gradient to follow, and end ours, counted or skipped.

    Args:
        optimizer: The one around the base.
        passes: Have found the gradient.
        scaler: Gradient scaler of the losses, where the caller has given one.
        skips_nonfinite: Skip the step where a gradient is not finite.
    """
    progress = passes.progress
    space = passes.space()
    try:
        scale = _unscaled(optimizer, passes, space, scaler)
        looks = skips_nonfinite or scale is not None
        is_taken = guarded_step(optimizer.base, space, found_inf=optimizer._found_inf, looks=looks)
        progress.corrections.follow_(optimizer.base.param_groups, is_taken, scale)
        passes.memory.commit(is_taken, space.owners)
    finally:
        has_moved, notes = progress.has_moved, progress.notes.maps[0]
        passes.forget()
        mark_used(passes.params())
    passes.diagnostics.count(has_moved, is_taken)
    if is_taken is not False:
        optimizer.param_groups[0].update(notes)
        count_step(optimizer.param_groups)


def _unscaled(optimizer: Wrapper, passes: TwoPass, space: Space, scaler: GradScaler | None) -> Tensor | None:
    """Take the loss scale out of the gradients, so that hooks of the base which clip see what they should.

    Returns:
        The scale; ``None`` where there was none any more.
    """
    progress = passes.progress
    scale = remaining_scale(optimizer, scaler)
    was_scaled = scale is not None or optimizer._found_inf is not None
    if was_scaled and progress.loss_scale is None:
        is_lost = progress.corrections.has_unknown_scale and scale is None
        require(
            not passes.plan.pieces.depends_on_scale and not is_lost,
            f"{type(optimizer).__name__} depends on the length of the gradient, and the loss was scaled: "
            "pass the scaler to the first pass as well, first_step(scaler=scaler) or perturbed(scaler=scaler)",
        )
        passes.diagnostics.unscale(scale)
    if scale is not None:
        unscale_(optimizer, space, scale, scaler)
    return scale
