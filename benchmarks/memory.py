"""How much memory tensors take, and what the C library does with it when they are gone."""

import ctypes
import gc

from torch import Tensor, nn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_INT = 2**31 - 1
LARGEST_HEAP_BLOCK = 32 * 2**20  # glibc takes no larger threshold


def live_elements() -> int:
    """Numbers of four bytes in all tensors that are alive on a CPU, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // 4
    return sum(storages.values())


def keep_freed_memory() -> bool:
    """Ask the C library to keep the memory of tensors that are gone, until the process ends.

    By default glibc gives the free end of its heap back to the system, and the next step pays for fresh pages. Whether
    the end is free is chance: the same steps took 65 ms or 108.

    Returns:
        Whether the C library heeds it; only glibc does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK) and mallopt(M_TRIM_THRESHOLD, LARGEST_INT))
