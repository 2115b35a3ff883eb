"""What does m-sharpness cost: a batch of 128 cut into 16 with a perturbation each, relative to one plain gradient?"""

import copy
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import flatmin
from benchmarks.compiled_step import compiled_step
from benchmarks.networks import Batch, loss_fn, network
from benchmarks.peers import LR, RHO
from benchmarks.record import Case, Options
from benchmarks.timing import interleaved, timed, torch_threads

NUM_MICRO_BATCHES = 16


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Two networks, one after another and side by side."""
    asked = [("small-mlp", 1, 200), ("cnn", options.threads, 30)]
    for name, threads, rounds in asked[:1] if options.quick else asked:
        with torch_threads(threads):
            model, batch = network(name, options.device)
            start = time.perf_counter()
            at_once = compiled_step(copy.deepcopy(model), batch, options, num_micro_batches=NUM_MICRO_BATCHES)
            seconds_to_compile = time.perf_counter() - start
            steps = {
                "gradient": gradient(copy.deepcopy(model), batch),
                "loop": loop_step(copy.deepcopy(model), batch, NUM_MICRO_BATCHES),
                "compiled": at_once,
            }
            facts = {"threads": threads, "micro_batches": NUM_MICRO_BATCHES, "seconds_to_compile": seconds_to_compile}
            contenders = {key: timed(step, options.device) for key, step in steps.items()}
            yield name, Case(interleaved(contenders, options.rounds(rounds)), "gradient", facts=facts)


def gradient(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """One forward and backward pass."""

    def run() -> None:
        model.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]

    return run


def loop_step(model: nn.Module, batch: Batch, number: int) -> Callable[[], object]:
    """A step whose micro-batches come one after another."""
    sam = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)
    parts = list(zip(*(part.chunk(number) for part in batch), strict=True))

    def closure_of(part: Batch) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            loss = loss_fn(model, part)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        return closure

    closures = [closure_of((images, labels)) for images, labels in parts]
    return lambda: sam.step(closures)
