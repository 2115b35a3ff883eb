"""What a user gives: words, numbers and counts, refused with the argument's name, the rule and the value."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

__all__ = ["check_choice", "check_number", "checked_count"]

_RULES: dict[str, Callable[[Any], bool]] = {
    ">= 0": lambda number: number >= 0,
    ">= 1": lambda number: number >= 1,
    "no NaN": lambda number: not math.isnan(number),
    "finite": math.isfinite,
    ">= 0 and finite": lambda number: 0 <= number < math.inf,
    "> 0": lambda number: number > 0,
    "> 0 and finite": lambda number: 0 < number < math.inf,
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "in [0, 1] or None": lambda number: 0 <= number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "two numbers in [0, 1)": lambda number: 0 <= number < 1,
    "in (0, 1]": lambda number: 0 < number <= 1,
}


def check_choice(name: str, value: object, choices: Iterable[str], error: type[ValueError] = ValueError) -> None:
    """Refuse a value that is none of the words its argument may have.

    Args:
        name: Of the argument.
        value: What was given for it, of any type.
        choices: The words; ``get_args`` of a ``Literal``, or a mapping's keys.
        error: What to raise; commands end with one of their own.

    Raises:
        ValueError: It is none of them, or what ``error`` says.
    """
    words = list(choices)
    if value not in words:
        raise error(f"{name} must be one of {', '.join(words)}, got {value!r}")


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


def checked_count(name: str, value: Any, least: int = 1, where: str = "") -> int:
    """Return ``value`` as a plain integer, whichever type of integer it has.

    Args:
        name: Of the argument.
        value: What was given for it; NumPy's integers are integers, booleans are not.
        least: The smallest that is allowed.
        where: When that holds, for the message.

    Raises:
        ValueError: It is no integer, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}{where and f' {where}'}, got {value}")
    return int(value)
