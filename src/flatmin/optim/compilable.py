"""Whether a step can be compiled, as far as its optimizer and its model tell."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flatmin.optim.directions import Observer
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.methods.bsam import BSAM
from flatmin.optim.norms import widest_dtype
from flatmin.optim.one_pass import OnePass
from flatmin.optim.sharding import is_sharded
from flatmin.optim.when import Always, GradientWhen

_MOST_COPIED = 1 << 24  # numbers in the micro-batches' copies of the weights
_REPLICATED = "the model is replicated or sharded, and its gradients are shared between processes"


def why_not_compiled(optimizer: Optimizer, model: nn.Module, num_micro_batches: int) -> str | None:
    """What is known in advance to stand in the way of compiling a step, as a sentence; ``None`` for nothing."""
    if isinstance(optimizer, BSAM):
        return "BSAM does not make the passes that are compiled"
    assert isinstance(optimizer, SharpnessAware | OnePass)
    params = list(optimizer._params())
    if isinstance(optimizer, OnePass):
        own = _of_one_pass(optimizer, model, num_micro_batches)
    else:
        own = _of_two_passes(optimizer, params, num_micro_batches)
    hooks = [
        hook
        for each in (optimizer, optimizer.base)
        for hook in (*each._optimizer_step_pre_hooks, *each._optimizer_step_post_hooks)
    ]
    obstacles = {
        **own,
        "the optimizer has parameters that the model does not have": not set(params) <= set(model.parameters()),
        "parameters are complex or narrower than float32": any(p.is_complex() or p.dtype.itemsize < 4 for p in params),
        "the parameters are on a device that has no float64, in which the graph takes numbers": any(
            widest_dtype(param.device).itemsize < 8 for param in params
        ),
        "the parameters are on several devices": len({param.device for param in params}) > 1,
        "the optimizer has step hooks, which must run between the passes and the update": bool(hooks),
    }
    return next((reason for reason, is_so in obstacles.items() if is_so), None)


def _of_two_passes(optimizer: SharpnessAware, params: list[Tensor], num_micro_batches: int) -> dict[str, bool]:
    when = optimizer._passes.plan.pieces.when
    num_copied = num_micro_batches * sum(param.numel() for param in params)
    return {
        f"{type(when).__name__} looks at the gradient to decide whether a step is perturbed": isinstance(
            when, GradientWhen
        ),
        _REPLICATED: optimizer._passes.sync is not None or any(map(is_sharded, params)),
        "the weights at w are to be kept in host memory, and a graph keeps them on the device": (
            optimizer._passes.plan.save_to == "host"
        ),
        "the micro-batches' copies of the weights hold more than 2^24 numbers": (
            num_micro_batches > 1 and num_copied > _MOST_COPIED
        ),
    }


def _of_one_pass(optimizer: OnePass, model: nn.Module, num_micro_batches: int) -> dict[str, bool]:
    name = type(optimizer).__name__
    return {
        f"{type(optimizer.direction).__name__} learns from the gradient of each pass": isinstance(
            optimizer.direction, Observer
        ),
        f"{name} perturbs some steps only, which the graph would not know when it skips one": not isinstance(
            optimizer.when, Always
        ),
        f"{name} has a schedule of rho, whose value depends on whether the step is skipped": (
            optimizer.rho_schedule is not None
        ),
        _REPLICATED: isinstance(model, DistributedDataParallel) or any(map(is_sharded, optimizer._params())),
        "a method of one pass has no perturbation for each micro-batch": num_micro_batches > 1,
    }
