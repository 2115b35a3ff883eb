"""Policies for when a step is perturbed."""

import math
from collections.abc import Callable, MutableMapping
from typing import Any, Protocol, runtime_checkable

import torch

from flatmin.arguments import check_number
from flatmin.optim.piece_check import check_pieces
from flatmin.optim.seeding import seed_of


class When(Protocol):
    """A rule that says of each step, from its number alone, whether it is sharpness-aware or plain."""

    def __call__(self, step: int) -> bool:
        """Whether the step, counted from 0, is perturbed."""


@runtime_checkable
class GradientWhen(Protocol):
    """A rule that looks at the gradient at w first, so that the host waits for its norm."""

    def decide(self, step: int, gradient_norm: float, memory: MutableMapping[str, Any]) -> bool:
        """Whether the step is perturbed.

        Args:
            step: Number of the step, counted from 0.
            gradient_norm: ``||g||_2`` over all parameters; may be infinite or NaN.
            memory: Entries of the first parameter group, where the rule keeps numbers that are saved with it.
        """


class Always:
    """Perturb every step."""

    def __call__(self, step: int) -> bool:
        """Always true."""
        return True


class Every:
    """Perturb steps 0, k, 2k, ….

    Args:
        interval: k, ``>= 1``.
    """

    def __init__(self, interval: int) -> None:
        if not isinstance(interval, int) or not interval >= 1:
            raise ValueError(f"interval must be an integer >= 1, got {interval}")
        self.interval = interval

    def __call__(self, step: int) -> bool:
        """Whether the step is a multiple of k."""
        return step % self.interval == 0


class Bernoulli:
    """Perturb each step with a probability, independently; a function of seed and step, so that replicas agree.

    Args:
        probability: In [0, 1], or a function of the step that gives one.
        seed: Any integer ``>= 0``.

    References:
        Zhao et al. (2022), arXiv:2203.09962 (randomized sharpness-aware training), Eq. 4.
    """

    def __init__(self, probability: float | Callable[[int], float], seed: int = 0) -> None:
        if not callable(probability):
            check_number("probability", probability, "in [0, 1]")
        check_number("seed", seed, ">= 0")
        self.probability = probability
        self.seed = seed

    def __call__(self, step: int) -> bool:
        """Whether the draw of this step falls below the probability."""
        probability = float(self.probability(step)) if callable(self.probability) else self.probability
        check_number("probability", probability, "in [0, 1]")
        generator = torch.Generator().manual_seed(seed_of(self.seed, step))
        return float(torch.rand((), generator=generator)) < probability


class Window:
    """Perturb the steps from one on, up to another.

    Args:
        start: First perturbed step; a fraction of training where it is a float and ``num_steps`` is given.
        stop: First step after them, likewise; ``None`` for the end.
        num_steps: Steps of the whole training.
    """

    def __init__(self, start: float = 0, stop: float | None = None, num_steps: int | None = None) -> None:
        if num_steps is not None:
            check_number("num_steps", num_steps, ">= 1")
        self.start = _as_step("start", start, num_steps)
        self.stop = math.inf if stop is None else _as_step("stop", stop, num_steps)
        if not self.start <= self.stop:
            raise ValueError(f"stop must be >= start, got {stop} after {start}")

    def __call__(self, step: int) -> bool:
        """Whether the step lies in the window."""
        return self.start <= step < self.stop


class LargeGradient:
    """Perturb where the squared gradient norm is large for its time: ``||g||^2 >= mu + c_t sigma``.

    mu and sigma^2 are running mean and variance of ``||g||^2``, updated before they are asked, and
    ``c_t = (t/T) c_end + (1 - t/T) c_start``. With both at minus infinity every step is perturbed.

    Args:
        num_steps: T, the steps of the whole training.
        decay: delta, the weight of the old mean and variance, in [0, 1).
        c_start: Threshold at the beginning, in standard deviations.
        c_end: Threshold at the end.

    References:
        Jiang et al. (2023), ICLR, arXiv:2304.14647 (AE-SAM), Eq. 6-8 and Algorithm 1.
    """

    def __init__(self, num_steps: int, decay: float = 0.9, c_start: float = 1.0, c_end: float = -1.0) -> None:
        check_number("num_steps", num_steps, ">= 1")
        check_number("decay", decay, "in [0, 1)")
        check_number("c_start", c_start, "no NaN")
        check_number("c_end", c_end, "no NaN")
        self.num_steps = num_steps
        self.decay = decay
        self.c_start = c_start
        self.c_end = c_end

    def decide(self, step: int, gradient_norm: float, memory: MutableMapping[str, Any]) -> bool:
        """Whether ``||g||^2`` reaches the threshold; a gradient that is not finite leaves mean and variance alone."""
        square = gradient_norm**2
        if not math.isfinite(square):
            return False
        mean: float = memory.get("mean_square", 0.0)
        variance: float = memory.get("variance_square", 0.0)
        mean = self.decay * mean + (1.0 - self.decay) * square
        variance = self.decay * variance + (1.0 - self.decay) * (square - mean) ** 2
        memory["mean_square"], memory["variance_square"] = mean, variance
        share = min(step / self.num_steps, 1.0)
        ends = [(share, self.c_end), (1.0 - share, self.c_start)]
        threshold = math.fsum(weight * c for weight, c in ends if weight)  # 0 * infinity would be NaN
        if math.isinf(threshold):
            return threshold < 0
        return square >= mean + threshold * math.sqrt(variance)


class AllOf:
    """Perturb where every one of several rules says so.

    Args:
        *rules: Rules that go by the number of the step.

    Raises:
        ValueError: One looks at the gradient; ``Within`` takes it.
    """

    def __init__(self, *rules: When) -> None:
        for rule in rules:
            check_pieces(when=rule)
            if isinstance(rule, GradientWhen):
                raise ValueError(
                    f"rules must go by the number of the step, got {type(rule).__name__}: Within lets it decide"
                )
        self.rules = rules

    def __call__(self, step: int) -> bool:
        """Whether all say so."""
        return all(rule(step) for rule in self.rules)


class Within:
    """Let a rule that looks at the gradient decide in the steps that another rule allows; plain elsewhere.

    Args:
        rule: The rule that looks at the gradient.
        allowed: The rule that goes by the number of the step.
    """

    def __init__(self, rule: GradientWhen, allowed: When) -> None:
        if not isinstance(rule, GradientWhen) or isinstance(rule, type):
            raise TypeError(f"rule must be one that looks at the gradient, such as LargeGradient(...), got {rule!r}")
        check_pieces(when=allowed)
        self.rule = rule
        self.allowed = allowed

    def decide(self, step: int, gradient_norm: float, memory: MutableMapping[str, Any]) -> bool:
        """Whether both say so; the inner rule sees every gradient."""
        return self.rule.decide(step, gradient_norm, memory) and self.allowed(step)


def _as_step(name: str, value: float, num_steps: int | None) -> int:
    if isinstance(value, int) and value >= 0:
        return value
    if not isinstance(value, float) or num_steps is None or not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be a step >= 0, or a fraction in [0, 1] together with num_steps, got {value}")
    return round(value * num_steps)
