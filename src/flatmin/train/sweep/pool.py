"""A pool of places for runs, on Ray: the cores and GPUs of this machine or of a cluster."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError, one_line
from flatmin.train.summary import Summary
from flatmin.train.sweep.contenders import Run
from flatmin.train.trials import num_cores

__all__ = ["RayPool", "num_places_on"]

Result = TypeVar("Result")

OBJECT_STORE_BYTES = 128 * 2**20  # of a cluster started here; configurations and summaries are all that passes through
CONNECT_SECONDS = 10.0
COUNT_SECONDS = 2.0  # between two looks at how many nodes the cluster has


class RayPool:
    """Runs spread over a Ray cluster; a context manager. Ray is imported and started with the first run.

    Every try of a run is a Ray task of its own in a process that Ray uses again, so that a small run costs milliseconds
    and not the import of torch. Ray never repeats a task by itself: a run that lost its process comes back as an error.

    Args:
        work: A function of a module, which must be installed on every node, that does one run.
        address: Address of the cluster; None starts one on this machine, which ends with this process.
        num_cpus: CPUs that a run takes, in fractions too.
        num_gpus: GPUs that a run takes, 0 to 1.
    """

    def __init__(
        self, work: Callable[[TrainConfig], Summary], *, address: str | None, num_cpus: float, num_gpus: float
    ) -> None:
        self.work = work
        self.address = address
        self.num_cpus = num_cpus
        self.num_gpus = num_gpus
        self._ray: Any = None
        self._task: Any = None
        self._runs: dict[Any, Run] = {}
        self._num_places = 0
        self._counted_at = -math.inf

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ray is not None:
            self._ray.shutdown()

    @property
    def num_submitted(self) -> int:
        """How many runs were submitted and not returned by ``wait``."""
        return len(self._runs)

    @property
    def submitted(self) -> list[Run]:
        """Those runs, the earliest first."""
        return list(self._runs.values())

    @property
    def has_room(self) -> bool:
        """Whether fewer than two runs per place are submitted: one that runs, and one that Ray can start at once."""
        return self.num_submitted < 2 * max(self.num_places, 1)

    @property
    def num_places(self) -> int:
        """How many runs the nodes of the cluster have room for; at the start of it, 1."""
        if self._ray is None:
            return 1
        if time.monotonic() - self._counted_at > COUNT_SECONDS:
            self._num_places = sum(
                num_places_on(node["Resources"], self.num_cpus, self.num_gpus)
                for node in self._ray.nodes()
                if node["Alive"]
            )
            self._counted_at = time.monotonic()
        return self._num_places

    def submit(self, run: Run) -> None:
        """Start the run as soon as a node has room for it.

        Raises:
            TrainingError: If Ray is not installed or cannot be reached, or this machine has no room at all.
        """
        if self._ray is None:
            self._start()
        self._runs[self._task.remote(self.work, run.config)] = run

    def wait(self, seconds: float) -> list[tuple[Run, Summary | Exception]]:
        """Wait for a run to end, at most so long, and return all that have, each with its result or its error."""
        self._ray.wait(list(self._runs), num_returns=1, timeout=seconds)
        ended, _ = self._ray.wait(list(self._runs), num_returns=self.num_submitted, timeout=0)
        return [(self._runs.pop(task), self._result(task)) for task in ended]

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call a function of a module in a place for a run, and wait for what it returns.

        Raises:
            TrainingError: If it fails.
        """
        if self._ray is None:
            self._start()
        task = self._ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus)(function)
        try:
            result: Result = self._ray.get(task.remote(*arguments))
        except self._ray.exceptions.RayError as error:
            raise TrainingError(f"{function.__name__} failed: {one_line(error)[-300:]}") from error
        return result

    def _result(self, task: Any) -> Summary | Exception:
        try:
            summary: Summary = self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except self._ray.exceptions.RayError as error:
            return TrainingError(f"the process or machine of the run was lost: {one_line(error)[:300]}")
        return summary

    def _start(self) -> None:
        try:
            import ray  # noqa: PLC0415 - an optional dependency
        except ModuleNotFoundError as error:
            raise TrainingError("flatmin sweep needs the package ray: pip install 'flatmin[sweep]'") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a training command calls nobody
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what newer versions do anyway
        if self.address is not None:
            check_address(self.address)
        own: dict[str, Any] = {"num_cpus": num_cores(), "object_store_memory": OBJECT_STORE_BYTES}
        try:
            ray.init(
                address=self.address or "local",
                include_dashboard=None if self.address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if self.address else own),
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"could not reach the Ray cluster {self.address or 'of this machine'}: {error}"
            ) from error
        self._ray = ray
        if self.address is None and self.num_places == 0:
            needs = f"{self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs"
            raise TrainingError(f"a run needs {needs}, which this machine does not have")
        self._task = ray.remote(num_cpus=self.num_cpus, num_gpus=self.num_gpus, max_retries=0)(_do)


def check_address(address: str) -> None:
    """Make sure that something listens at ``HOST:PORT``: Ray itself would try for minutes.

    Raises:
        TrainingError: If nothing does.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address:  # "auto", or ray://HOST:PORT, of which Ray tells soon enough
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise TrainingError(f"address must be that of a running Ray cluster, got {address}: {error}") from error


def num_places_on(resources: Mapping[str, float], num_cpus: float, num_gpus: float) -> int:
    """Return how many runs a node has room for.

    Args:
        resources: What Ray says that the node has, under ``CPU`` and ``GPU``.
        num_cpus: CPUs of a run, above 0.
        num_gpus: GPUs of a run, 0 to 1; it uses one GPU, so the rests of two do not make a place.
    """
    places = resources.get("CPU", 0.0) / num_cpus + 1e-9  # 0.3 / 0.1 is a little less than 3
    if num_gpus > 0.0:
        places = min(places, resources.get("GPU", 0.0) * math.floor(1.0 / num_gpus + 1e-9))
    return math.floor(places)


def _do(work: Callable[[TrainConfig], Summary], config: TrainConfig) -> Summary:
    return work(config)
