"""Words that a user chooses from a fixed few: any other is refused, everywhere in the same sentence."""

from collections.abc import Iterable

__all__ = ["check_choice"]


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
