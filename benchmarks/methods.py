"""What does each method of the family cost: passes, memory, time?

A small network is trained for a few dozen steps with every method at its defaults, around SGD with
momentum. Counted are the calls of the closure, and the copies of the parameters that are alive beyond weights,
gradients and SGD's momentum: when the last pass of a step begins, and between steps. Timed are whole steps, in rounds
in which SGD and the method take one step each on the same batch; a method's time is the median of the round-by-round
ratios, taken apart for steps with one pass and with two and weighted by how many there were. The C library keeps the
memory of tensors that are gone, as otherwise chance decides which of two contenders pays for fresh pages in every step;
where two networks lie in memory is chance, too, so that the rounds are those of several pairs.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import flatmin
from benchmarks.memory import keep_freed_memory, live_elements
from benchmarks.record import Case, Options
from benchmarks.timing import Stopwatch, interleaved, timed, torch_threads
from flatmin.train.methods import METHODS, Method, default_rho, sharpness_aware, steps_with_closure
from flatmin.train.models import build_model
from flatmin.train.optimizers import perturbed_groups

NETWORKS = {"timed": "small-cnn", "counted": "wrn-10-4"}  # beside the second, a generator's state is nothing
QUICK_NETWORKS = dict.fromkeys(NETWORKS, "resnet-8")
IMAGE_SIZE = 28
BATCH_SIZE = 128
PAIRS = 3

Batch = tuple[Tensor, Tensor]


class Training:
    """A network and one method, and what was seen of its steps."""

    def __init__(self, network: str, method: Method, num_steps: int, batch_size: int = BATCH_SIZE) -> None:
        torch.manual_seed(0)
        self.batch_size = batch_size
        self.model = build_model(network, 10, 1).to(memory_format=torch.channels_last)
        groups = perturbed_groups(method, self.model, [{"params": list(self.model.parameters())}])
        base: Any = groups
        if METHODS.get(method) is not flatmin.BSAM:
            base = torch.optim.SGD(groups, lr=1e-3, momentum=0.9)
        run = {"model": self.model, "num_steps": num_steps, "num_data": num_steps * BATCH_SIZE, "lr": 1e-3}
        self.optimizer = base if method == "sgd" else sharpness_aware(method, base, default_rho(method), (), **run)
        self.passes: list[int] = []

    def step(self, batch: Batch, at_pass: Callable[[], object] = lambda: None) -> float:
        """Take a step, calling ``at_pass`` when a pass begins; the seconds it took."""
        images, labels = batch
        num_passes = 0

        def closure() -> Tensor:
            nonlocal num_passes
            num_passes += 1
            self.optimizer.zero_grad()
            at_pass()
            loss = cross_entropy(self.model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        def run() -> None:
            if steps_with_closure(self.optimizer):
                self.optimizer.step(closure)
            else:
                closure()
                self.optimizer.step()

        seconds = timed(run)()
        self.passes.append(num_passes)
        return seconds


def relative_time(own: Sequence[float], other: Sequence[float], passes: Sequence[int], every: Sequence[int]) -> float:
    """Mean time of a step over another's.

    Args:
        own: Seconds of the steps.
        other: Seconds of the other's steps in the same rounds.
        passes: Of the steps.
        every: Passes of all steps of a run, also of those that were not timed.

    Returns:
        The median ratio for each number of passes, weighted by how many steps of a run make so many.
    """
    ratios: dict[int, list[float]] = {}
    for left, right, number in zip(own, other, passes, strict=True):
        ratios.setdefault(number, []).append(left / right)
    counts = {number: every.count(number) for number in ratios}
    return sum(statistics.median(ratios[number]) * count for number, count in counts.items()) / sum(counts.values())


def time_beside_sgd(
    training: Callable[..., Training], name: Method, rounds: int
) -> tuple[dict[str, list[float]], list[int], list[int]]:
    """Let pairs of networks train beside each other, ``PAIRS`` of them one after the other.

    Returns:
        Seconds of the timed steps of SGD and of the method, the method's passes in these, and in all its steps.
    """
    seconds: dict[str, list[float]] = {"sgd": [], name: []}
    passes: list[int] = []
    every: list[int] = []
    each_rounds = max(1, rounds // PAIRS)
    num_steps = each_rounds + max(1, each_rounds // 4)
    for _ in range(rounds // each_rounds):
        pair = {each: training(each, num_steps) for each in seconds}
        turns: dict[str, Stopwatch] = {each: partial(take_next_step, trained) for each, trained in pair.items()}
        found = interleaved(turns, each_rounds)
        for each, values in found.items():
            seconds[each].extend(values)
        passes.extend(pair[name].passes[-each_rounds:])
        every.extend(pair[name].passes)
    return seconds, passes, every


def copies(network: str, method: Method, num_steps: int) -> tuple[float, float]:
    """Copies of the parameters alive in the last pass of a step, at most, and between steps."""
    images, labels = random_batch(0)
    batch = images[:4], labels[:4]
    case = Training(network, method, num_steps)
    size = sum(param.numel() for param in case.model.parameters())
    gc.collect()
    before = live_elements() + size  # SGD's momentum to come
    during: list[int] = []
    between: list[int] = []
    for _ in range(num_steps):
        last: list[int] = []
        case.step(batch, lambda last=last: last.append(live_elements()))  # type: ignore[misc]
        case.optimizer.zero_grad()
        during.append(last[-1] - before)
        between.append(live_elements() - before)
    warm = num_steps // 2  # state is there, and late phases have begun
    return max(during[warm:]) / size, max(between[warm:]) / size


def random_batch(seed: int) -> Batch:
    """Images and labels that mean nothing."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH_SIZE, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return images.to(memory_format=torch.channels_last), torch.randint(0, 10, (BATCH_SIZE,), generator=generator)


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Every method at its defaults, with one thread."""
    names: tuple[Method, ...] = ("sgd", "sam", "msam") if options.quick else get_args(Method)
    networks, rounds = QUICK_NETWORKS if options.quick else NETWORKS, options.rounds(90)
    batch_size = 8 if options.quick else BATCH_SIZE
    rows: dict[str, dict[str, Any]] = {}
    keeps_memory = keep_freed_memory()
    with torch_threads(1):
        for name in names:
            during, between = copies(networks["counted"], name, num_steps=2 if options.quick else 8)
            seconds, passes, every = time_beside_sgd(
                partial(Training, networks["timed"], batch_size=batch_size), name, rounds
            )
            rows[name] = {
                "passes_per_step": statistics.mean(every),
                "copies_during": during,
                "copies_between": between,
                "relative_time": relative_time(seconds[name], seconds["sgd"], passes, every),
                "passes": passes,
            }
            yield name, Case(seconds, "sgd")
    facts: dict[str, Any] = {"threads": 1, "image_size": IMAGE_SIZE, "batch": BATCH_SIZE, **networks}
    facts |= {"keeps_freed_memory": keeps_memory, "methods": rows}
    yield "methods", Case(facts=facts)


def take_next_step(trained: Training) -> float:
    """A step on the batch that all take in this round."""
    images, labels = random_batch(len(trained.passes))
    return trained.step((images[: trained.batch_size], labels[: trained.batch_size]))
