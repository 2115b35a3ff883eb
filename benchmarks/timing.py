"""Contenders that are timed in turns, and the ratios of their times."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

Stopwatch = Callable[[], float]


class Ratio(NamedTuple):
    """The median of paired ratios, and the ends of its bootstrapped 95 % interval."""

    median: float
    low: float
    high: float


def timed(run: Callable[[], object], device: str = "cpu", repeats: int = 1) -> Stopwatch:
    """Make of a call one that says how many seconds it took on the clock, until the device has finished.

    Args:
        run: What is timed.
        device: Where it works.
        repeats: Calls of a turn, one after the other, as a training loop makes them; the mean of their seconds counts.
    """

    def stopwatch() -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        synchronise(device)
        return (time.perf_counter() - start) / repeats

    return stopwatch


def interleaved(contenders: Mapping[str, Stopwatch], rounds: int) -> dict[str, list[float]]:
    """Let all contenders have a turn in every round, so that what slows the machine down slows all of them.

    Every other round goes backwards, as none shall always follow the same one. Before the rounds that count there are a
    quarter as many, at least one, that warm up.

    Args:
        contenders: Each tells what its turn took.
        rounds: How many count.

    Returns:
        What the turns of each took, in the order of the rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + max(1, rounds // 4)):
        turns = list(contenders.items())
        for name, stopwatch in turns[:: -1 if number % 2 else 1]:
            seconds[name].append(stopwatch())
    return {name: values[-rounds:] for name, values in seconds.items()}


def ratio(values: Sequence[float], reference: Sequence[float]) -> Ratio:
    """The ratio of what was measured in the same rounds."""
    ratios = np.divide(values, reference)
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high))


def synchronise(device: str) -> None:
    """Wait until an accelerator has finished."""
    if device != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Let torch use this many threads inside the block."""
    before: Any = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
