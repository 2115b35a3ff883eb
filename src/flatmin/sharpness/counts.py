"""Counts among the settings of the measures."""

from numbers import Integral
from typing import Any


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
