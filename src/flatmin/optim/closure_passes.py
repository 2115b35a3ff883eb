"""The passes of a step whose closures compute the gradients: both passes of every micro-batch."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.amp import GradScaler

from flatmin.optim.accumulation import Reduction, one_after_another, reduced
from flatmin.optim.buffers import averaged_buffers
from flatmin.optim.closures import Closure
from flatmin.optim.loss_scaling import loss_scale_of
from flatmin.optim.two_pass import TwoPass


class MicroBatches(NamedTuple):
    """How a step treats its micro-batches, see ``SharpnessAware.step``."""

    shared_perturbation: bool
    reduction: Reduction
    average_buffers: bool


def run_passes(
    passes: TwoPass, closures: Sequence[Closure], micro: MicroBatches, scaler: GradScaler | None
) -> Tensor | None:
    """From w to w, with the gradient to follow.

    Returns:
        The loss at w; the mean or sum over the micro-batches.
    """
    is_several = len(closures) > 1
    in_turn = is_several and (micro.shared_perturbation or passes.plan.is_plain)
    if is_several and not in_turn:
        passes.plan.check_micro_batches()
    passes.diagnostics.begin_step()
    passes.plan.before_first_pass()  # here too, for the buffers from which every micro-batch starts
    try:
        pairs = _losses_of_each(passes, closures, micro, scaler, in_turn=in_turn)
        passes.gather(micro.reduction)
    except BaseException:
        passes.give_up()
        raise
    losses, last_losses = zip(*pairs, strict=True)
    loss: Tensor | None = reduced(losses, micro.reduction)
    last_loss = reduced(last_losses, micro.reduction)
    if isinstance(loss, Tensor) and isinstance(last_loss, Tensor):
        passes.diagnostics.measure_losses(loss.detach(), last_loss.detach() if passes.progress.is_perturbed else None)
    return loss


def _losses_of_each(
    passes: TwoPass, closures: Sequence[Closure], micro: MicroBatches, scaler: GradScaler | None, *, in_turn: bool
) -> list[tuple[Tensor, Tensor]]:
    """Both passes of each micro-batch, whose gradient is put aside where there are several; of all of them in turn."""
    is_several = len(closures) > 1
    model = passes.model if is_several and micro.average_buffers else None
    pairs = []
    with averaged_buffers(model, len(closures)) as next_micro_batch:
        if in_turn:
            closures = [one_after_another(closures, passes.params, micro.reduction, next_micro_batch)]
        for closure in closures:
            passes.progress.is_in_turn = in_turn
            passes.progress.loss_scale = loss_scale_of(scaler, passes.device)
            pairs.append(both_passes(passes, closure, averages_at_end=is_several and not in_turn))
            if len(closures) > 1:
                passes.set_aside()
                next_micro_batch()
    return pairs


def both_passes(passes: TwoPass, closure: Closure, *, averages_at_end: bool) -> tuple[Tensor, Tensor]:
    """From w to w with the gradient to follow; the gradients are cleared before each call, so a closure need not.

    Returns:
        The losses at w and at the last point reached.
    """
    passes.clear_gradients()
    passes.begin(is_in_closure=True, averages_at_end=averages_at_end)
    loss = last_loss = closure()
    for _ in range(passes.plan.ascent_steps if passes.decide() else 0):
        passes.ascend(keeps_grads=False)
        last_loss = closure()
    passes.descend()
    return loss, last_loss
