"""The scaling T of the weights in which neighbourhoods are measured: that of the optimizers."""

from collections.abc import Sequence

from torch import Tensor

from flatmin.optim import ActiveGroup, Adaptive, Identity, Metric, Space
from flatmin.sharpness.objective import Objective


def metric_of(adaptive: bool | Adaptive) -> Metric:
    """The metric: ``T = 1``, or ``T = |w|`` for ``True``, or another ``flatmin.optim.Adaptive``."""
    if isinstance(adaptive, bool):
        return Adaptive(eta=0.0, scaled="all") if adaptive else Identity()
    if not isinstance(adaptive, Adaptive):
        raise TypeError(f"adaptive must be true, false or a flatmin.optim.Adaptive, got {adaptive!r}")
    return adaptive


def space_at_weights(metric: Metric, objective: Objective, rho: float = 1.0) -> Space:
    """The chosen parameters as one vector, with the radius and the metric's own numbers."""
    params = [param.detach() for param in objective.params]
    return Space([ActiveGroup(params, params, params, objective.names, {"rho": rho, **metric.defaults})])


def scaling_at_weights(metric: Metric, objective: Objective) -> list[Tensor] | None:
    """T at the present weights, a tensor per chosen parameter that broadcasts to it; ``None`` stands for all ones."""
    return metric.scaling(space_at_weights(metric, objective))


def scaled(steps: Sequence[Tensor], scaling: Sequence[Tensor] | None) -> list[Tensor]:
    """``T eps``, elementwise, for ``steps`` of one tensor per chosen parameter."""
    return list(steps) if scaling is None else [step * t for step, t in zip(steps, scaling, strict=True)]


def described(adaptive: bool | Adaptive) -> str | bool:
    """The metric in words, for the settings of a result."""
    return adaptive if isinstance(adaptive, bool) else f"eta={adaptive.eta}, scaled={adaptive.scaled}"
