"""Leave out the update of a step whose gradient is not finite."""

from torch import Tensor
from torch.optim import Optimizer


def step_if_finite(base: Optimizer, is_finite: Tensor) -> int | Tensor:
    """Take the base optimizer's step, or leave parameters and state as they are.

    An optimizer that supports gradient scalers (torch's fused ones) reads the flag on the device. For any other the
    host reads it, which on a CPU waits for nothing.

    Args:
        base: The optimizer.
        is_finite: 0-dim boolean tensor.

    Returns:
        How many steps were skipped, 0 or 1; a 0-dim tensor where the device decided.
    """
    if getattr(base, "_step_supports_amp_scaling", False):  # torch's own protocol
        is_skipped = is_finite.logical_not()
        base.found_inf = is_skipped.float()  # type: ignore[attr-defined]  # where they look for it
        try:
            base.step()
        finally:
            del base.found_inf  # type: ignore[attr-defined]
        return is_skipped
    if is_finite:
        base.step()
        return 0
    return 1
