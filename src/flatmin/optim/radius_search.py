"""The radius at which the loss rises as asked."""

import math
from collections.abc import Callable, Sequence

import torch
from torch.amp import GradScaler

from flatmin.arguments import check_number
from flatmin.optim.closures import Closure, as_closures
from flatmin.optim.dry_run import check_two_passes, dry_run
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.norms import widest_dtype

_START = 0.05  # where no group has a radius yet: the paper's "solid default"
_NUM_DOUBLINGS = 60


def suggest_rho(
    optimizer: SharpnessAware,
    closure: Closure | Sequence[Closure],
    target_rise: float,
    *,
    scaler: GradScaler | None = None,
    tolerance: float = 0.01,
) -> float:
    """The radius rho at which the loss at w + eps is higher than at w by ``target_rise``.

    Solves ``mean_b [L_b(w + eps_b(rho)) - L_b(w)] = target_rise`` over the batches b, by doubling or halving from the
    present radius and then by bisection. A radius is hard to carry over from one model to another; the rise of the loss
    is a quantity that one can name. Near w it is ``rho ||g||``, so the radius shrinks as the gradient grows.

    Nothing of the model or the optimizer is altered. Each radius tried costs ``1 + ascent_steps`` calls of every
    closure, about ten radii in all. Processes that train one model find one radius, for the mean of their losses.

    Args:
        optimizer: The optimizer, with the pieces and the weights that matter.
        closure: As for ``step``; or a list of them, one per batch. Each must always compute the same batch.
        target_rise: In units of the loss, ``> 0``.
        scaler: Gradient scaler of the closures.
        tolerance: Relative error of the radius, ``> 0``.

    Returns:
        The radius, to be set as each group's ``rho``. Where the groups' radii differ their proportions are kept, and
        the one returned is that of the first group that has any.

    Raises:
        ValueError: ``target_rise`` or ``tolerance`` is not positive and finite, or there is no closure.
        TypeError: A closure returns no loss, or ``optimizer`` is no ``SharpnessAware``.
        RuntimeError: No radius raises the loss as asked; a closure runs no backward pass; a step is under way.

    Example:
        >>> import torch, flatmin
        >>> weights = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1))
        >>> def closure():
        ...     loss = weights.square().sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> rho = flatmin.suggest_rho(optimizer, closure, target_rise=5.5)
        >>> round(rho, 1)  # 5 rho + rho^2 / 2 = 5.5
        1.0
    """
    check_two_passes(optimizer)
    for name, value in (("target_rise", target_rise), ("tolerance", tolerance)):
        check_number(name, value, "> 0 and finite")
    closures = as_closures(closure)
    radii = [group["rho"] for group in optimizer.param_groups]
    first = next((rho for rho in radii if rho > 0.0), None)
    shares = [1.0 if first is None else rho / first for rho in radii]
    sign = -1.0 if all(group.get("maximize", False) for group in optimizer.param_groups) else 1.0
    with dry_run(optimizer, scaler) as run:

        def rise(rho: float) -> float:
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["rho"] = rho * share
            run.rewind()
            rises = [run.step(each).rise for each in closures]
            if any(value is None for value in rises):
                raise TypeError("closure must return the loss, got None")
            own = sign * math.fsum(value for value in rises if value is not None) / len(rises)
            device = run.passes.device
            own_mean = torch.tensor(own, dtype=widest_dtype(device), device=device)
            mean = float(run.passes.mean_over_processes(own_mean))
            return math.inf if math.isnan(mean) else mean  # as high as can be

        return _crossing(rise, target_rise, first or _START, tolerance)


def _crossing(rise: Callable[[float], float], target: float, start: float, tolerance: float) -> float:
    """Where a function of positive numbers that starts below the target reaches it."""
    low = high = start
    if rise(start) < target:
        while True:
            low, high = high, 2.0 * high
            value = rise(high)
            if value >= target:
                break
            if high > start * 2.0**_NUM_DOUBLINGS:
                raise RuntimeError(f"no radius up to {high:.3g} raises the loss by {target}; it rises by {value:.3g}")
    else:
        while True:
            low, high = low / 2.0, low
            value = rise(low)
            if value < target:
                break
            if low < start / 2.0**_NUM_DOUBLINGS:
                raise RuntimeError(f"the loss rises by {value:.3g} >= {target} at a radius of {low:.3g} already")
    while high / low > 1.0 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if rise(middle) < target else (low, middle)
    return math.sqrt(low * high)
