"""Sweeps on a real Ray cluster of two nodes: killed workers, a killed node, a killed driver, the same table."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from one_by_one import OneByOne
from rich.console import Console

from flatmin.train.checkpoint import checkpoint_paths
from flatmin.train.sweep.arguments import SweepArguments, made_plan
from flatmin.train.sweep.contenders import Plan
from flatmin.train.sweep.driver import drive
from flatmin.train.sweep.pool import RayPool
from flatmin.train.sweep.progress import live_progress
from flatmin.train.sweep.record import results_csv
from flatmin.train.sweep.schedule import Schedule
from flatmin.train.sweep.worker import run_trial

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="sweeps need the extra `sweep`")

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
GRID = ("rho=0.1,0.3", "method=sgd,sam")
FIELDS = ("--epochs", "5", "--checkpoint-seconds", "0")


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head with one place and a second node with another."""
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


def plan_in(directory: Path, grid: tuple[str, ...], seeds: int) -> Plan:
    own = SweepArguments(grid=grid, output_dir=directory, seeds=seeds, gpus_per_trial=0.0)
    (directory / "runs").mkdir(parents=True)
    return made_plan(own, ["digits"], FIELDS)


def uninterrupted(directory: Path, grid: tuple[str, ...], seeds: int) -> list[dict[str, str]]:
    """Every value of the same sweep, run in this process without Ray."""
    schedule = Schedule(plan_in(directory, grid, seeds))
    drive(schedule, OneByOne(run_trial), lambda: None, retries=0)
    return values(results_csv(schedule))


def values(text: str) -> list[dict[str, str]]:
    """Every value but the times."""
    rows = [{name: row[name] for name in row if name != "wall_seconds"} for row in csv.DictReader(StringIO(text))]
    assert all(row["status"] == "finished" and float(row["eval_error_percent"]) >= 0.0 for row in rows)
    return rows


def under_way(directory: Path, least_steps: int) -> list[tuple[Path, int]]:
    """The runs that have come so far and are not finished, each with the process that works on it."""
    found = []
    for tries in directory.glob("runs/*/tries.jsonl"):
        checkpoints, lines = checkpoint_paths(tries.parent), tries.read_text().splitlines()
        if lines and checkpoints and checkpoints[0].name >= f"checkpoint-{least_steps:09d}.pt":
            if not (tries.parent / "summary.json").exists():
                found.append((tries.parent, json.loads(lines[-1])["pid"]))
    return found


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes] | None = None) -> Any:
    deadline = time.monotonic() + 300  # where many tests share a core
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, "the sweep ended before it could be killed"
        time.sleep(0.01)
    return found


def num_tries(directory: Path) -> dict[str, int]:
    return {tries.parent.name: len(tries.read_text().splitlines()) for tries in directory.glob("runs/*/tries.jsonl")}


def test_worker_killed_in_the_middle_goes_on_elsewhere_to_the_same_values(cluster: Any, tmp_path: Path) -> None:
    directory = tmp_path / "sweep"
    grid = ("method=sam",)  # no search: two runs are enough here
    schedule = Schedule(plan_in(directory, grid, seeds=2))
    killed: list[Path] = []

    def kill_once() -> None:
        if not killed and (running := under_way(directory, least_steps=10)):
            run_dir, pid = running[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(run_dir)

    with RayPool(run_trial, address=cluster.address, num_cpus=1.0, num_gpus=0.0) as pool:
        with live_progress(schedule, pool, Console(file=StringIO(), force_terminal=True)) as show:
            drive(schedule, pool, lambda: (show(), kill_once()), retries=1)  # type: ignore[func-returns-value]
        assert pool.num_places == 2
    tries = num_tries(directory)
    assert len(killed) == 1
    assert tries == dict.fromkeys(tries, 1) | {killed[0].name: 2}
    steps = [json.loads(line)["step"] for line in (killed[0] / "timing.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))  # it went on from its checkpoint, not from the start
    assert values(results_csv(schedule)) == uninterrupted(tmp_path / "whole", grid, seeds=2)


@pytest.mark.slow
def test_sweep_that_loses_a_worker_a_node_and_its_driver_gives_the_table_of_an_uninterrupted_one(
    cluster: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "sweep"
    grid = [argument for item in GRID for argument in ("--grid", item)]
    command = [sys.executable, "-m", "flatmin", "sweep", "digits", *grid, *FIELDS, "--address", cluster.address]
    command += ["--output-dir", str(directory), "--gpus-per-trial", "0"]

    node = cluster.add_node(**NODE)
    sweep = subprocess.Popen([*command, "--seeds", "3"], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        run_dir, pid = wait_for(lambda: under_way(directory, least_steps=10), sweep)[0]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: num_tries(directory)[run_dir.name] == 2, sweep)
        cluster.remove_node(node, allow_graceful=False)
        finished = wait_for(lambda: list(directory.glob("runs/*-test-*/summary.json")), sweep)
        wait_for(lambda: under_way(directory, least_steps=10), sweep)
    finally:
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    assert not (directory / "results.csv").exists()
    before = num_tries(directory)

    finished_before = [path.parent.name for path in directory.glob("runs/*/summary.json")]
    again = subprocess.run([*command, "--seeds", "3"], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    after = num_tries(directory)
    assert finished
    assert all(after[name] == before[name] for name in finished_before)
    wanted = uninterrupted(tmp_path / "whole", GRID, seeds=3)
    assert values((directory / "results.csv").read_text()) == wanted

    more = subprocess.run([*command, "--seeds", "4"], capture_output=True, text=True, check=False)
    assert more.returncode == 0, more.stderr
    assert {name: count for name, count in num_tries(directory).items() if name in after} == after
    assert len(values((directory / "results.csv").read_text())) == len(wanted) + 2
