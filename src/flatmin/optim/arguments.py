"""What constructors are given: refused where it is made no use of, with the argument's name, the rule and the value."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

_RULES: dict[str, Callable[[Any], bool]] = {
    ">= 0": lambda number: number >= 0,
    ">= 1": lambda number: number >= 1,
    "no NaN": lambda number: not math.isnan(number),
    "finite": math.isfinite,
    ">= 0 and finite": lambda number: 0 <= number < math.inf,
    "> 0 and finite": lambda number: 0 < number < math.inf,
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "in [0, 1] or None": lambda number: 0 <= number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "two numbers in [0, 1)": lambda number: 0 <= number < 1,
    "in (0, 1]": lambda number: 0 < number <= 1,
}

_PIECES: dict[str, tuple[str, tuple[str, ...]]] = {
    "direction": ("a direction, such as Gradient()", ("__call__", "needs_clean_gradient", "depends_on_scale")),
    "ball": ("Ball(...) or LayerBall(...)", ("farthest", "metric", "check_ascent_steps")),
    "metric": ("a metric, such as Adaptive()", ("scaling", "defaults", "check", "needs_names", "depends_on_scale")),
    "radius": ("a rule of the radius, such as Fixed()", ("__call__", "defaults", "check", "depends_on_scale")),
    "when": ("a rule of when to perturb, such as Every(2)", ("__call__",)),
    "combine": ("a combination, such as Perturbed()", ("__call__", "plain", "correction", "needs_clean_gradient")),
    "rho_schedule": ("a function of the step and a group, such as WarmUp(100)", ("__call__",)),
    "model": ("a torch.nn.Module", ("register_forward_pre_hook", "parameters")),
}


def check_number(name: str, value: Any, rule: str) -> None:
    """Refuse what is no number, or one outside its domain.

    Args:
        name: Of the argument.
        value: What was given for it.
        rule: One of those above.

    Raises:
        TypeError: It is no number; booleans are none.
        ValueError: It breaks the rule.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not _RULES[rule](value):
        raise ValueError(f"{name} must be {rule}, got {value}")


def check_pieces(**given: Any) -> None:
    """Refuse what cannot do its argument's part, a class in place of an instance for example; ``None`` is let through.

    Args:
        **given: By the names above.

    Raises:
        TypeError: It is something else.
    """
    for name, piece in given.items():
        kind, needed = _PIECES[name]
        if name == "when" and hasattr(piece, "decide"):  # one that looks at the gradient
            needed = ("decide",)
        if piece is not None and (isinstance(piece, type) or not all(hasattr(piece, each) for each in needed)):
            raise TypeError(f"{name} must be {kind}, got {piece!r}")
