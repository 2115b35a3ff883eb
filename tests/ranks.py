"""Processes that stay: start a process group once and run many functions in it."""

import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

_SECONDS = (
    120  # for one function; a process that waits in a collective for another that has failed never ends by itself
)


class Ranks:
    """A gloo process group of several processes.

    Args:
        size: Number of processes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.is_open = True
        self._directory = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._processes, self._pipes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = Path(self._directory.name) / "store"
            process = context.Process(target=_serve, args=(rank, size, str(store), theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
        for pipe in self._pipes:
            assert pipe.poll(_SECONDS), "a process did not start"
            pipe.recv()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a test module in every process; returns what it returned, by rank."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_SECONDS if not errors else 10):
                errors.append(f"rank {rank} gave no answer")
                continue
            is_error, answer = pipe.recv()
            (errors if is_error else answers).append(answer)
        if errors:
            if len(errors) < self.size or "no answer" in errors[-1]:
                self.close()  # the processes are at different collectives now
            raise AssertionError("\n".join(errors))
        return answers

    def close(self) -> None:
        """End the processes."""
        self.is_open = False
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # what tensor parallelism returns
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    pipe.send("ready")
    while True:
        function, arguments = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((False, function(*arguments)))
        except BaseException:
            pipe.send((True, f"rank {rank}:\n{traceback.format_exc()}"))
