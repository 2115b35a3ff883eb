"""How does the cost of SAM grow with parameters, tensors, the batch, micro-batches and ranks?

Parameters and tensors: perturb and restore beside a step of SGD with momentum. The batch: a whole step beside one of
plain SGD. Micro-batches: a step with a perturbation for each beside one gradient of the whole batch. Ranks: a step in
DistributedDataParallel over gloo on one machine, with a batch of 32 on each rank and one thread.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from benchmarks.compiled_step import sam_step, sgd_step
from benchmarks.micro_batches import gradient, loop_step
from benchmarks.networks import network
from benchmarks.optimizer_step import Motions
from benchmarks.record import Case, Options
from benchmarks.timing import Stopwatch, interleaved, timed, torch_threads

NUM_TENSORS, TENSOR_SIZE, BATCH_PER_RANK = 16, 1000, 32
SIZES = {
    "parameters": [NUM_TENSORS * 2**power for power in (9, 12, 15, 18, 21)],
    "tensors": [125, 250, 500, 1000, 2000, 4000],
    "batch": [16, 32, 64, 128, 256, 512],
    "micro-batches": [1, 2, 4, 8, 16, 32],
    "ranks": [1, 2, 4],
}


def measure(options: Options) -> Iterator[tuple[str, Case]]:
    """Each size of each axis in turn."""
    with torch_threads(options.threads):
        for axis, sizes in SIZES.items():
            if axis == "ranks" and options.device != "cpu":  # gloo's are
                continue
            for size in sizes[:1] if options.quick else sizes:
                yield f"{axis} {size}", case_of(axis, size, options)


def case_of(axis: str, size: int, options: Options) -> Case:
    """One size."""
    facts = {"axis": axis, "size": size, "threads": 1 if axis == "ranks" else options.threads}
    rounds = options.rounds(20)
    if axis == "ranks":
        return Case(on_ranks(size, rounds, "small-mlp" if options.quick else "cnn"), "sgd", facts=facts)
    return Case(interleaved(contenders_of(axis, size, options), rounds), "sgd", facts=facts)


def contenders_of(axis: str, size: int, options: Options) -> dict[str, Stopwatch]:
    """SAM and what it is compared with."""
    if axis in {"parameters", "tensors"}:
        number, length = (NUM_TENSORS, size // NUM_TENSORS) if axis == "parameters" else (size, TENSOR_SIZE)
        motions = Motions([torch.Size([length])] * number, options.device)
        sgd = torch.optim.SGD(motions.params, lr=1e-6, momentum=0.9)
        return {"sam": motions.two_steps(motions.sam.first_step, motions.sam.restore), "sgd": motions.step_of(sgd)}
    name = "small-mlp" if options.quick else "cnn"
    if axis == "batch":
        model, batch = network(name, options.device, size)
        steps = {"sam": sam_step(model, batch), "sgd": sgd_step(copy.deepcopy(model), batch)}
    else:
        model, batch = network(name, options.device)
        steps = {"sam": loop_step(model, batch, size), "sgd": gradient(copy.deepcopy(model), batch)}
    return {key: timed(step, options.device) for key, step in steps.items()}


def on_ranks(size: int, rounds: int, name: str) -> dict[str, list[float]]:
    """What the first of so many processes measures."""
    with TemporaryDirectory() as directory:
        start_processes(serve, (size, directory, rounds, name), nprocs=size, start_method="spawn")  # type: ignore[no-untyped-call]
        found: dict[str, list[float]] = json.loads((Path(directory) / "seconds.json").read_text())
    return found


def serve(rank: int, size: int, directory: str, rounds: int, name: str) -> None:
    """One of the processes: all take the same turns, and wait for each other in the backward passes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
    model, batch = network(name, batch_size=BATCH_PER_RANK)
    steps = {
        "sam": sam_step(DistributedDataParallel(copy.deepcopy(model)), batch),
        "sgd": sgd_step(DistributedDataParallel(copy.deepcopy(model)), batch),
    }
    seconds = interleaved({key: timed(step) for key, step in steps.items()}, rounds)
    if rank == 0:
        (Path(directory) / "seconds.json").write_text(json.dumps(seconds))
    distributed.destroy_process_group()
