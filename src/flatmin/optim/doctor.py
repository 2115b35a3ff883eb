"""Is sharpness-aware minimisation on? A few dry steps that say what is wrong with a set-up, and what to change."""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch.amp import GradScaler

from flatmin.arguments import check_number
from flatmin.optim.checkup import Checkup, Finding, shown
from flatmin.optim.closures import Closure, as_closures
from flatmin.optim.dry_run import DryRun, DryStep, Look, check_two_passes, dry_run
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.groups import has_radius
from flatmin.optim.norms import widened
from flatmin.optim.when import GradientWhen

_SURVIVING = 0.9  # share of eps that must be left after rounding
_SAME_BATCH = 0.01  # relative difference of two gradients at w, which parallel sums on a GPU stay far below
_TOO_BIG = 2.0  # rise of the loss relative to the loss


def doctor(
    optimizer: SharpnessAware,
    closure: Closure | Sequence[Closure],
    scaler: GradScaler | None = None,
    num_steps: int = 10,
) -> Checkup:
    """Find out in a few dry steps whether sharpness-aware minimisation is on, and what to change where it is not.

    The passes of ``num_steps`` steps are run at the present weights, without the base optimizer's update. Weights,
    buffers, gradients, random generators, groups, state and diagnostics are afterwards as before. A closure that draws
    its batch from a loader moves on in it; that is one of the things that are found.

    What is found, by name: "all frozen", "no radius", "no backward", "cleared gradient", "zero gradient", "not finite",
    "changing batch", "missing model", "model not called", "never perturbed", "rounded away", "stale closure",
    "no effect" (a rise below the rounding of the loss), "too big" (the loss rises by more than twice itself).

    Args:
        optimizer: The optimizer. One-pass methods and ``BSAM`` have other passes: look at their diagnostics.
        closure: As for ``step``; or a list of them, one per batch, that are used in turn.
        scaler: Gradient scaler of the closures.
        num_steps: Dry steps, ``>= 1``, of ``1 + ascent_steps`` calls of a closure each; two more calls come before.

    Raises:
        TypeError: ``optimizer`` is no ``SharpnessAware``.
        ValueError: ``num_steps`` is below 1, or there is no closure.
        RuntimeError: A step is under way.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
        >>> optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(2, 3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> [finding.name for finding in flatmin.doctor(optimizer, closure).findings]
        ['missing model']
    """
    check_two_passes(optimizer)
    check_number("num_steps", num_steps, ">= 1")
    closures = as_closures(closure)
    obstacles = tuple(_before(optimizer))
    if obstacles:
        return Checkup(obstacles)
    with dry_run(optimizer, scaler) as run:
        look = run.look(closures[0])
        obstacles = tuple(_of_gradient(look))
        if obstacles:
            return Checkup(obstacles)
        findings = list(_of_two_looks(run, look, closures[0]))
        steps: list[DryStep] = []
        while len(steps) < num_steps and not (steps and steps[-1].error):
            steps.append(run.step(closures[len(steps) % len(closures)]))
        num_perturbed = _num_perturbed(optimizer, steps)
    if num_perturbed == 0:
        findings.append(_never_perturbed(optimizer, len(steps)))
    findings.extend(_of_steps(optimizer, steps))
    return Checkup(
        tuple(findings),
        len(steps),
        num_perturbed,
        _median(step.loss for step in steps),
        _median(step.rise for step in steps),
        _median(step.asked for step in steps),
        _median(step.realised for step in steps),
        _median(step.cosine for step in steps),
    )


def _before(optimizer: SharpnessAware) -> Iterator[Finding]:
    """What can be seen without a pass."""
    groups = optimizer.param_groups
    if not any(param.requires_grad for group in groups for param in group["params"]):
        yield Finding(
            "all frozen",
            "no parameter of the optimizer requires a gradient",
            "unfreeze what is to be trained, or give the optimizer other parameters",
        )
    elif not has_radius(groups):
        yield Finding(
            "no radius",
            "rho is 0 in every group that is perturbed, so every step is the base optimizer's",
            "set rho, or look at what schedules it; flatmin.suggest_rho finds one",
        )


def _of_gradient(look: Look) -> Iterator[Finding]:
    """What makes further passes pointless."""
    if look.grads and not all(bool(grad.isfinite().all()) for grad in look.grads.values()):
        yield Finding(
            "not finite",
            f"the gradient at w is not finite, at a loss of {shown(look.loss)}; such a step is skipped",
            "look for an overflow or a division by zero in the loss; lower the initial scale of a GradScaler",
        )
    elif any(bool(grad.any()) for grad in look.grads.values()):
        return
    elif not look.has_run_backward:
        yield Finding(
            "no backward",
            "the closure returns without a backward pass that reaches the optimizer's parameters",
            "in the closure: zero_grad(), compute the loss from the model, loss.backward(), return loss",
        )
    elif not look.grads:
        yield Finding(
            "cleared gradient",
            "a backward pass runs in the closure, and no gradient is left at its end",
            "clear the gradients at the start of the closure, not after backward()",
        )
    else:
        yield Finding(
            "zero gradient",
            "every entry of the gradient is zero when the closure ends, so there is no direction to climb",
            "clear the gradients at the start of the closure, not after backward(); else the loss is at a plateau",
        )


def _of_two_looks(run: DryRun, look: Look, closure: Closure) -> Iterator[Finding]:
    """What a second call at the same weights, buffers and random numbers tells."""
    has_model, grads = run.passes.replay is not None, look.grads
    if not look.has_called_model:
        yield Finding(
            "model not called",
            "the closure never calls the module given as model=: a loop could not replay it, nor replicas wait for it",
            "give the module that the loop calls, such as the compiled or distributed wrapper",
        )
    elif not has_model and (look.changed or look.has_drawn):
        kinds = ", ".join(sorted({type(module).__name__ for module in look.changed}))
        seen = [f"buffers change in {kinds}"] if kinds else []
        seen += ["random numbers are drawn, as by dropout"] if look.has_drawn else []
        yield Finding(
            "missing model",
            f"{' and '.join(seen)} in each pass, and the passes of a step do not share them",
            "pass model= to the optimizer: then later passes repeat the first one's numbers and leave its buffers",
        )
    run.rewind()
    again = run.look(closure).grads
    apart = torch.stack(
        [(widened(grads[p]) - widened(again[p])).norm() for p in grads if p in again] or [torch.ones(())]
    )
    whole = torch.stack([widened(grad).norm() for grad in grads.values()])
    if set(again) != set(grads) or bool(apart.norm() > _SAME_BATCH * whole.norm()):
        yield Finding(
            "changing batch",
            "two calls of the closure at the same weights give different gradients",
            "draw the batch before step(closure), so that each pass sees the same one; random numbers that are not "
            "torch's own must not differ either",
        )
    run.rewind()


def _num_perturbed(optimizer: SharpnessAware, steps: Sequence[DryStep]) -> int:
    """How many of as many coming steps ``when`` perturbs."""
    when, group = optimizer.when, optimizer.param_groups[0]
    start = group["num_steps"]
    if not isinstance(when, GradientWhen):
        return sum(bool(when(start + index)) for index in range(len(steps)))
    notes: ChainMap[str, Any] = ChainMap({}, group)
    return sum(when.decide(start + index, step.gradient_norm, notes) for index, step in enumerate(steps))


def _never_perturbed(optimizer: SharpnessAware, number: int) -> Finding:
    start = optimizer.param_groups[0]["num_steps"]
    return Finding(
        "never perturbed",
        f"{type(optimizer.when).__name__} perturbs none of the steps {start} to {start + number - 1}",
        "nothing if it starts later; otherwise look at its window, interval or threshold",
    )


def _of_steps(optimizer: SharpnessAware, steps: Sequence[DryStep]) -> Iterator[Finding]:
    """What the passes at w + eps tell."""
    failed = next((step.error for step in steps if step.error), None)
    asked, realised = median(step.asked for step in steps), median(step.realised for step in steps)
    rho = max(group["rho"] for group in optimizer.param_groups)
    if failed is not None:
        yield Finding(
            "stale closure",
            f"the closure works at w and fails at w + eps: {failed.splitlines()[0]}",
            "compute the loss anew in each call of the closure, from the model's parameters as they are then",
        )
    elif realised < _SURVIVING * asked:
        kinds = {str(p.dtype).removeprefix("torch.") for g in optimizer.param_groups for p in g["params"]}
        yield Finding(
            "rounded away",
            f"rounding to {' and '.join(sorted(kinds))} leaves {realised:.3g} of {asked:.3g}, the length of eps",
            f"a radius larger than rho={rho:g}, or parameters in float32 with autocast in the closure",
        )
    elif not any(step.sees_perturbation for step in steps):
        yield Finding(
            "stale closure",
            "loss and gradient at w + eps are those at w to the last bit, although the weights differ",
            "compute the loss anew in each call of the closure, from the optimizer's own parameters",
        )
    else:
        yield from _of_rise(optimizer, steps)


def _of_rise(optimizer: SharpnessAware, steps: Sequence[DryStep]) -> Iterator[Finding]:
    rises = [abs(step.rise) for step in steps if step.rise is not None]
    losses = [abs(step.loss) for step in steps if step.loss is not None]
    if not rises:
        return
    rise, loss, rho = median(rises), median(losses), max(group["rho"] for group in optimizer.param_groups)
    if not rise <= _TOO_BIG * loss:  # NaN included
        yield Finding(
            "too big",
            f"from w to w + eps the loss goes from {loss:.3g} to {loss + rise:.3g}",
            f"a radius smaller than rho={rho:g}; flatmin.suggest_rho finds the one for a given rise",
        )
    elif rise <= 4 * torch.finfo(torch.float32).eps * loss:
        yield Finding(
            "no effect",
            f"the loss of {loss:.3g} rises by {rise:.3g} at w + eps, which is within its rounding",
            f"a radius larger than rho={rho:g}; flatmin.suggest_rho finds the one for a given rise",
        )


def _median(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
