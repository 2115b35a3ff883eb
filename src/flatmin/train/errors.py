"""The errors that end a command for a reason its user can act on."""

__all__ = ["TrainingError", "UsageError"]


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message says why in a sentence, and a traceback would add nothing."""


class UsageError(ValueError):
    """The arguments of a command are wrong; the message says which and why in a sentence."""
