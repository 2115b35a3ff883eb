"""What does a whole SAM step cost, eager and compiled, relative to an eager step of plain SGD on the same batch?

The same network, weights and batch for all: plain SGD as torch takes it, with its model compiled too; SAM eager, as one
graph, and as others have it; Momentum-SAM as one graph. Contenders take turns, of ten steps where these take less than
a millisecond: alone among others a step would find nothing of its own in the caches, as it does in training. The floor
of an eager SAM step is two.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import flatmin
from benchmarks.networks import Batch, loss_fn, network
from benchmarks.peers import LR, RHO, optax_steps, port_step, why_not
from benchmarks.record import Case, Options
from benchmarks.timing import interleaved, timed, torch_threads
from flatmin.optim.step_graph import with_inductor

Step = Callable[[], object]


class Timing(NamedTuple):
    """How a network's steps are timed: so many rounds, and in each so many steps of a contender after each other."""

    network: str
    threads: int
    rounds: int
    repeats: int = 1


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Each network in turn."""
    asked = [
        Timing("mlp", threads=1, rounds=60, repeats=10),
        Timing("cnn", options.threads, rounds=24),
        Timing("wrn-16-2", options.threads, rounds=8),
    ]
    for timing in asked[:1] if options.quick else asked:
        with torch_threads(timing.threads):
            yield timing.network, case_of(timing, options)


def case_of(timing: Timing, options: Options) -> Case:
    """All contenders on one network."""
    model, batch = network(timing.network, options.device)
    eager = {
        "sgd": sgd_step(copy.deepcopy(model), batch),
        "fused_sgd": sgd_step(copy.deepcopy(model), batch, fused=True),
        "sam": sam_step(copy.deepcopy(model), batch),
    }
    start = time.perf_counter()
    compiled = {"compiled_sam": compiled_step(copy.deepcopy(model), batch, options)}
    facts = {"threads": timing.threads, "repeats": timing.repeats, "seconds_to_compile": time.perf_counter() - start}
    compiled["compiled_msam"] = compiled_step(copy.deepcopy(model), batch, options, momentum_sam)
    if not options.quick:  # another compiler's start, for nothing
        compiled["compiled_model_sgd"] = sgd_step(compiled_model(copy.deepcopy(model), options), batch)
        compiled["compiled_model_sam"] = sam_step(compiled_model(copy.deepcopy(model), options), batch)
    others, skipped = peers_of(model, batch, timing.threads, options)
    steps = {**eager, **compiled, **others}
    contenders = {key: timed(step, options.device, timing.repeats) for key, step in steps.items()}
    seconds = interleaved(contenders, options.rounds(timing.rounds))
    return Case(seconds, "sgd", facts=facts, skipped=skipped)


def peers_of(model: nn.Module, batch: Batch, threads: int, options: Options) -> tuple[dict[str, Step], dict[str, str]]:
    """The others' steps, and why some are missing."""
    steps: dict[str, Step] = {}
    skipped: dict[str, str] = {}
    reason = why_not("pytorch_optimizer")
    if reason:
        skipped["pytorch_optimizer_sam"] = reason
    else:
        steps["pytorch_optimizer_sam"] = port_step(copy.deepcopy(model), batch)
    reason = why_not("jax", "optax")
    if not isinstance(model, nn.Sequential):
        reason = "written in JAX only for the small networks"
    elif options.device != "cpu":
        reason = "compared on a CPU only"
    if reason:
        skipped["optax_sam"] = reason
    else:
        assert isinstance(model, nn.Sequential)
        steps |= optax_steps(model, batch, threads)
    return steps, skipped


def sgd_step(model: nn.Module, batch: Batch, **options: Any) -> Step:
    """A step of plain SGD."""
    sgd = torch.optim.SGD(model.parameters(), lr=LR, **options)

    def step() -> None:
        sgd.zero_grad()
        loss_fn(model, batch).backward()  # type: ignore[no-untyped-call]
        sgd.step()

    return step


def sam_step(model: nn.Module, batch: Batch) -> Step:
    """A step of SAM with a closure."""
    sam = two_pass_sam(model)

    def closure() -> torch.Tensor:
        sam.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return lambda: sam.step(closure)


def two_pass_sam(model: nn.Module) -> flatmin.SAM:
    """SAM around plain SGD."""
    return flatmin.SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO, model=model)


def momentum_sam(model: nn.Module) -> flatmin.MSAM:
    """Momentum-SAM, of one pass, around SGD with the momentum that it needs."""
    return flatmin.MSAM(torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), rho=RHO, model=model)


def compiled_step(
    model: nn.Module,
    batch: Batch,
    options: Options,
    method: Callable[[nn.Module], torch.optim.Optimizer] = two_pass_sam,
    num_micro_batches: int = 1,
) -> Step:
    """A step of a method as one graph, compiled.

    Raises:
        RuntimeError: It could not be.
    """
    sam = method(model)
    backend = as_traced if options.quick else with_inductor
    step = flatmin.compile_step(model, loss_fn, sam, num_micro_batches=num_micro_batches, backend=backend)
    for _ in range(2 if options.device == "cpu" else 6):  # on a GPU it is captured after a while
        step(batch)
    if step.reason is not None:
        raise RuntimeError(step.reason)
    return lambda: step(batch)


def compiled_model(model: nn.Module, options: Options) -> nn.Module:
    """The model, which torch compiles when it is first called."""
    model.compile(mode="reduce-overhead" if options.device != "cpu" else None)
    return model


def as_traced(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """A backend that takes no time and saves none, in place of a compiler's minute."""
    return graph
