"""The errors that end a command for a reason its user can act on."""

__all__ = ["DirectoryInUse", "NonFiniteLossError", "TrainingError", "UsageError", "check_threads", "one_line"]


class TrainingError(RuntimeError):
    """A run cannot start or go on; the message says why in a sentence, and a traceback would add nothing."""


class DirectoryInUse(TrainingError):
    """Another process is writing to the directory; it may end by itself."""


class NonFiniteLossError(TrainingError):
    """The loss of a step was not finite.

    Args:
        what: Which loss.
        step: Number of the step, from 1.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"the {what} was not finite at step {step}")
        self.step = step


class UsageError(ValueError):
    """The arguments of a command are wrong; the message says which and why in a sentence."""


def check_threads(threads: int | None) -> None:
    """Raise ``UsageError`` for a number of CPU threads below 1; None leaves the number to torch."""
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be >= 1, got {threads}")


def one_line(error: BaseException) -> str:
    """What an error of another library says, which may be a page, as a part of our sentence."""
    return " ".join(str(error).split())
