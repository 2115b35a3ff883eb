"""Directions: which way the perturbation points."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from flatmin.arguments import check_number
from flatmin.optim.seeding import seed_of
from flatmin.optim.space import Space


class Direction(Protocol):
    """A rule that gives one tensor per parameter; its length does not matter, the ball sets it.

    Attributes:
        needs_clean_gradient: Whether it asks for the gradient at w; if not, one pass a step is enough.
        depends_on_scale: Whether it is another direction where all gradients are multiplied by one number, so that
            those of a loss scaled for mixed precision must be unscaled first.
        remembers: Names under which tensors are kept between steps.
    """

    needs_clean_gradient: bool
    depends_on_scale: bool
    remembers: tuple[str, ...] = ()

    def __call__(self, space: Space) -> list[Tensor]:
        """The direction at the present parameters, one tensor for each; never written into."""


@runtime_checkable
class Observer(Protocol):
    """A direction that learns from the gradient of each pass."""

    def observe(self, space: Space) -> None:
        """See the gradient at w + eps, before the base optimizer's step."""


class Gradient:
    """Steepest ascent: the gradient itself.

    References:
        Foret et al. (2021), arXiv:2010.01412, Eq. 2.
    """

    needs_clean_gradient = True
    depends_on_scale = False
    remembers: tuple[str, ...] = ()

    def __call__(self, space: Space) -> list[Tensor]:
        """``g``, without a copy."""
        return space.grads


class SmoothedGradient:
    """A running mean of gradients, which suppresses the noise of single batches: ``d_t = (1-theta) d_{t-1} + theta g``.

    The first one is g. One more copy of the parameters is kept between steps.

    Args:
        theta: Weight of the new gradient, in (0, 1].

    References:
        Li and Giannakis (2023), arXiv:2309.15639 (VaSSO), Algorithm 2.
    """

    needs_clean_gradient = True
    depends_on_scale = True
    remembers: tuple[str, ...] = ("smoothed_gradient",)

    def __init__(self, theta: float) -> None:
        check_number("theta", theta, "in (0, 1]")
        self.theta = theta

    def __call__(self, space: Space) -> list[Tensor]:
        """``d_t``."""
        means = _updated_means(space, "smoothed_gradient", self.theta)
        space.remember("smoothed_gradient", means)
        return means


class NoiseOfGradient:
    """The gradient without its running mean, which leaves the noise of the batch: ``d_t = g - sigma m_{t-1}``.

    ``m_t = lmbda m_{t-1} + (1-lmbda) g``, where m starts as the first gradient, after the first direction was g itself.
    One more copy of the parameters is kept between steps.

    Args:
        sigma: Share of the mean that is taken out.
        lmbda: Weight of the old mean, in [0, 1).

    References:
        Li et al. (2024), arXiv:2403.12350 (Friendly SAM), Algorithm 1; nblt/F-SAM.
    """

    needs_clean_gradient = True
    depends_on_scale = True
    remembers: tuple[str, ...] = ("mean_gradient",)

    def __init__(self, sigma: float, lmbda: float) -> None:
        check_number("lmbda", lmbda, "in [0, 1)")
        check_number("sigma", sigma, "finite")
        self.sigma = sigma
        self.lmbda = lmbda

    def __call__(self, space: Space) -> list[Tensor]:
        """``d_t``."""
        means = space.recall("mean_gradient")
        space.remember("mean_gradient", _updated_means(space, "mean_gradient", 1.0 - self.lmbda))
        return [g if m is None else torch.sub(g, m, alpha=self.sigma) for g, m in zip(space.grads, means, strict=True)]


class BaseMomentum:
    """Against the base optimizer's first moment v: ``d = -v``, which costs no gradient of its own.

    The step that is about to come goes along -v, so the perturbation looks ahead of it. Before the first step, and for
    a parameter that has no moment yet, it is zero.

    Args:
        sign: -1 for the published method, +1 for the opposite side.

    Raises:
        TypeError: When it is asked for, where the base optimizer keeps its first moment under other names than torch's.

    References:
        Becker et al. (2024), arXiv:2401.12033 (Momentum-SAM), Algorithm 1.
    """

    needs_clean_gradient = False
    depends_on_scale = False
    remembers: tuple[str, ...] = ()

    def __init__(self, sign: int = -1) -> None:
        if sign not in (-1, 1):
            raise ValueError(f"sign must be -1 or 1, got {sign}")
        self.sign = sign

    def __call__(self, space: Space) -> list[Tensor]:
        """``-v``; ``v`` in a group that is maximised, where the ball turns it round once more."""
        moments = [first_moment(space, index) for index in range(len(space.owners))]
        if all(moment is None for moment in moments):
            _check_has_no_state(space)
        signs = space.per_param([-self.sign if g.options.get("maximize", False) else self.sign for g in space.groups])
        return [
            torch.zeros_like(param) if moment is None else moment if sign > 0 else -moment
            for param, moment, sign in zip(space.params, moments, signs, strict=True)
        ]


class StaleGradient:
    """The gradient that the step before followed, which is there already.

    One more copy of the parameters is kept between steps. Zero before the first step.

    References:
        Asynchronous SAM (2025), arXiv:2503.11147, with a delay of one step.
    """

    needs_clean_gradient = False
    depends_on_scale = True
    remembers: tuple[str, ...] = ("stale_gradient",)

    def observe(self, space: Space) -> None:
        """Keep the gradient for the next step."""
        space.remember("stale_gradient", [grad.clone() for grad in space.grads])

    def __call__(self, space: Space) -> list[Tensor]:
        """``g_{t-1}``."""
        stale = space.recall("stale_gradient")
        return [torch.zeros_like(p) if g is None else g for p, g in zip(space.params, stale, strict=True)]


class RandomDirection:
    """A direction drawn from the normal distribution, the paper's control: same length, no gradient.

    The draw is a function of the seed, the number of the step and the parameter, so that a run can be resumed and
    replicas agree.

    Args:
        seed: Any integer ``>= 0``.
        after_clean_pass: Draw after a pass at w, as the gradient would be found, whose gradient is not used: for a
            comparison with SAM step by step, which sees the rise of the loss.

    References:
        Foret et al. (2021), arXiv:2010.01412, Appendix C.5.
    """

    depends_on_scale = False
    remembers: tuple[str, ...] = ()

    def __init__(self, seed: int = 0, *, after_clean_pass: bool = False) -> None:
        check_number("seed", seed, ">= 0")
        self.seed = seed
        self.needs_clean_gradient = after_clean_pass

    def __call__(self, space: Space) -> list[Tensor]:
        """Standard normal tensors."""
        step = int(space.groups[0].options["num_steps"])
        return [self._draw(param, step, index, space) for index, param in enumerate(space.params)]

    def _draw(self, param: Tensor, step: int, index: int, space: Space) -> Tensor:
        rank = space.shards.rank_of(index) if space.shards is not None else 0
        generator = torch.Generator(param.device).manual_seed(seed_of(self.seed, step, index, rank))
        return torch.randn(param.shape, generator=generator, dtype=param.dtype, device=param.device)


def first_moment(space: Space, index: int) -> Tensor | None:
    """The base optimizer's running mean of gradients for a parameter, shaped like it; ``None`` where it has none yet.

    SGD calls it ``momentum_buffer``; Adam, AdamW, NAdam, RAdam, Adamax and Lion ``exp_avg``.
    """
    for name in ("momentum_buffer", "exp_avg"):
        moment = space.recall_at(index, name)
        if moment is not None:
            return moment
    return None


def check_has_moment(base: Optimizer) -> None:
    """Refuse a base without a first moment, along which nothing could be perturbed.

    Raises:
        ValueError: Its groups have neither a momentum nor a beta other than 0.
    """
    for group in getattr(base, "param_groups", ()):  # what is no optimizer is refused by name later
        betas = group.get("betas", (0.0,))
        if not group.get("momentum", 0.0) and not float(betas[0]):
            raise ValueError(
                f"base must have a first moment (momentum or betas) in every group, got {type(base).__name__} without"
            )


def _check_has_no_state(space: Space) -> None:
    kept = sorted({name for owner in space.owners for name in space.memory.names_of(owner)})
    if kept:
        raise TypeError(
            f"base must keep its first moment in its state, as momentum_buffer or exp_avg, got {', '.join(kept)}"
        )


def _updated_means(space: Space, name: str, weight: float) -> list[Tensor]:
    """``(1 - weight) mean + weight g``; g itself where there is no mean yet."""
    means = space.recall(name)
    return [
        g.clone() if m is None else torch.lerp(m, g.to(m.dtype), weight)
        for g, m in zip(space.grads, means, strict=True)
    ]
