"""Random generators named by words and numbers, so that a draw can be repeated without saving a generator's state."""

import hashlib

import torch


def seed_from(*key: str | int) -> int:
    """Hash ``key`` to the 32 bits that torch's CPU generator looks at in its seed.

    A sum would confuse (0, 1) with (1, 0), and a wide integer would lose its upper part.

    Args:
        key: What the draw is for, then the numbers that tell one such draw from another, as a seed and an epoch.
    """
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")


def generator_from(*key: str | int) -> torch.Generator:
    """Return a CPU generator that is a pure function of ``key``, and unrelated to that of any other key.

    Torch's global generator is not touched.
    """
    return torch.Generator().manual_seed(seed_from(*key))
