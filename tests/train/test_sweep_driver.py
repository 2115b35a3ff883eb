"""The order of runs, resuming, retries and early stopping, in a pool that does one run at a time in this process."""

import csv
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from one_by_one import OneByOne
from rich.console import Console

from flatmin.train.atomic_file import atomic_write
from flatmin.train.checkpoint import checkpoint_paths
from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError
from flatmin.train.loop import train
from flatmin.train.run import write_summary
from flatmin.train.summary import Summary
from flatmin.train.sweep.arguments import SweepArguments, made_plan
from flatmin.train.sweep.contenders import Plan
from flatmin.train.sweep.cost import relative_run_times
from flatmin.train.sweep.driver import drive
from flatmin.train.sweep.pool import check_address, num_places_on
from flatmin.train.sweep.progress import counts, progress_line, progress_view
from flatmin.train.sweep.record import results_csv
from flatmin.train.sweep.results import sweep_result
from flatmin.train.sweep.schedule import Schedule
from flatmin.train.sweep.worker import finished_run, run_trial

SHORT = ("--epochs", "2", "--batch-size", "432", "--checkpoint-seconds", "0", "--model", "resnet-8")


class Stopped(BaseException):
    """Stands for the death of the driver: nothing catches it."""


def plan_in(directory: Path, *grid: str, fields: tuple[str, ...] = (), **own: object) -> Plan:
    arguments = SweepArguments(grid=grid, output_dir=directory, gpus_per_trial=0.0, **own)  # type: ignore[arg-type]
    plan = made_plan(arguments, ["digits"], fields)
    (directory / "runs").mkdir(parents=True, exist_ok=True)
    return plan


def invented(config: TrainConfig) -> Summary:
    """A finished run whose error depends on its settings: the best radius is 0.2, and more epochs help."""
    epochs = config.max_epochs or config.epochs
    method = {"sgd": 3.0, "sam": 2.0, "asam": 2.5}[config.method]
    error = method + 10 * abs(config.rho - 0.2) * (config.method != "sgd") + 8.0 / epochs + 0.1 * (config.seed % 5)
    complete = epochs == config.epochs
    summary = Summary(
        config.run_dir, config.recipe, config.method, config.seed, epochs, epochs * 10, complete, 0.5, 20.0,
        config.eval_on, 0.1, error, None, 1.0, 2.0 if config.method == "sgd" else 4.0,
    )  # fmt: skip
    config.run_dir.mkdir(exist_ok=True)
    if config.max_epochs is not None:
        atomic_write(config.run_dir / f"after-{config.max_epochs}-epochs.json", summary.to_json())
    write_summary(summary)
    return summary


def driven(
    plan: Plan, work: Callable[[TrainConfig], Summary] = invented, retries: int = 2
) -> tuple[Schedule, OneByOne]:
    schedule, pool = Schedule(plan), OneByOne(work)
    drive(schedule, pool, lambda: None, retries)
    return schedule, pool


def without_times(text: str) -> list[dict[str, str]]:
    return [
        {name: value for name, value in row.items() if name != "wall_seconds"}
        for row in csv.DictReader(text.splitlines())
    ]


GRID = ("rho=0.1,0.2,0.4", "method=sgd,sam,asam")


def test_settings_are_chosen_on_validation_and_reported_on_the_test_set(tmp_path: Path) -> None:
    schedule, pool = driven(plan_in(tmp_path, *GRID, seeds=3, search_seeds=2))
    assert len(pool.done) == len({run.config.run_dir for run in pool.done}) == 2 * 3 * 2 + 3 * 3
    result = sweep_result(schedule)
    assert [dict(row.settings) for row in result.contenders] == [{}, {"rho": 0.2}, {"rho": 0.2}]
    sgd, sam, _ = result.contenders
    assert sam.test_error_percents == pytest.approx({seed: 2.2 + 0.1 * seed for seed in range(3)})
    assert sam.validation_error_percent == pytest.approx(2.2 + 0.05)
    assert sgd.is_baseline
    assert sam.difference is not None
    assert sam.difference.values == pytest.approx([-1.0] * 3)
    assert (sam.relative_time, sgd.relative_time) == (2.0, 1.0)
    assert [point.rho for point in sam.radii] == [0.1, 0.2, 0.4]
    assert sam.radii[2].error_percents == pytest.approx([4.2, 4.3])
    assert not sgd.radii


def test_better_budget_of_the_baseline_on_validation_is_what_counts(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, *GRID, seeds=2, baseline_epochs="2x", fields=("--epochs", "4"))
    result = sweep_result(driven(plan)[0])
    assert [(row.name, row.epochs, row.is_baseline) for row in result.contenders[:2]] == [
        ("SGD", 4, False),
        ("SGD, 2x epochs", 8, True),
    ]
    difference = result.contenders[2].difference
    assert difference is not None
    assert difference.values == pytest.approx([(2.0 + 2.0) - (3.0 + 1.0)] * 2)


def test_baseline_without_an_error_on_validation_is_the_best(tmp_path: Path) -> None:
    """Zero once counted as no number, so that the worse budget was what the others were compared with."""

    def perfect_when_long(config: TrainConfig) -> Summary:
        summary = replace(invented(config), eval_error_percent=0.0 if config.epochs == 8 else 5.0)
        write_summary(summary)
        return summary

    plan = plan_in(tmp_path, "method=sgd,sam", seeds=1, baseline_epochs="2x", fields=("--epochs", "4"))
    rows = sweep_result(driven(plan, perfect_when_long)[0]).contenders
    assert [(row.name, row.is_baseline) for row in rows[:2]] == [("SGD", False), ("SGD, 2x epochs", True)]


def test_finished_runs_are_never_rerun_and_more_seeds_and_radii_add_what_is_missing(tmp_path: Path) -> None:
    driven(plan_in(tmp_path, *GRID, seeds=2))
    assert not driven(plan_in(tmp_path, *GRID, seeds=2))[1].done
    more = driven(plan_in(tmp_path, "rho=0.1,0.2,0.3,0.4", "method=sgd,sam,asam", seeds=3))[1].done
    assert sorted((run.config.method, run.phase, run.config.rho, run.config.seed) for run in more) == [
        ("asam", "final", 0.2, 2),
        ("asam", "search", 0.3, 1000),
        ("sam", "final", 0.2, 2),
        ("sam", "search", 0.3, 1000),
        ("sgd", "final", 0.0, 2),
    ]


def test_sweep_whose_driver_dies_after_every_run_gives_the_same_values(tmp_path: Path) -> None:
    wanted = results_csv(driven(plan_in(tmp_path / "whole", *GRID, seeds=2))[0])
    plan = plan_in(tmp_path / "cut", *GRID, seeds=2)
    done: list[Path] = []

    def dying(config: TrainConfig) -> Summary:
        if config.run_dir in done:
            raise AssertionError(f"{config.run_dir} was run again")
        done.append(config.run_dir)
        invented(config)
        raise Stopped

    for _ in range(6 + 6):
        with pytest.raises(Stopped):
            driven(plan, dying)
    schedule, pool = driven(plan)
    assert not pool.done
    assert without_times(results_csv(schedule)) == without_times(wanted)


def test_failed_run_is_tried_again_then_listed_with_its_error_and_left_out(tmp_path: Path) -> None:
    def failing(config: TrainConfig) -> Summary:
        if config.rho == 0.2 or (config.method == "sgd" and config.seed == 1):
            raise TrainingError("no luck, today")
        return invented(config)

    schedule, pool = driven(plan_in(tmp_path, *GRID, seeds=3), failing, retries=2)
    assert sum(run.config.rho == 0.2 for run in pool.done) == 2 * 3  # two methods, three tries
    result = sweep_result(schedule)
    assert [dict(row.settings) for row in result.contenders] == [{}, {"rho": 0.1}, {"rho": 0.1}]
    assert list(result.contenders[0].test_error_percents) == [0, 2]
    difference = result.contenders[1].difference
    assert difference is not None
    assert len(difference.values) == 2  # the seeds in common
    assert len(result.failures) == 3
    assert "SAM rho=0.2 seed 1000: TrainingError: no luck, today" in result.failures
    rows = [row for row in without_times(results_csv(schedule)) if row["status"] == "failed"]
    assert {row["error"] for row in rows} == {"TrainingError: no luck, today"}
    assert {run.config.rho for run in driven(plan_in(tmp_path, *GRID, seeds=3))[1].done} == {0.0, 0.2}  # another go


def test_contender_whose_settings_all_fail_is_shown_as_failed(tmp_path: Path) -> None:
    def failing(config: TrainConfig) -> Summary:
        if config.method == "sam":
            raise TrainingError("diverged")
        return invented(config)

    result = sweep_result(driven(plan_in(tmp_path, *GRID, seeds=2), failing, retries=0)[0])
    sam = result.contenders[1]
    assert (sam.test_error, sam.difference, sam.relative_time, sam.settings) == (None, None, None, {})
    assert result.contenders[2].difference is not None


def test_try_that_came_further_does_not_count(tmp_path: Path) -> None:
    tries: list[int] = []

    def lost_with_its_machine(config: TrainConfig) -> Summary:
        tries.append(len(tries))
        if len(tries) < 8:
            config.run_dir.mkdir(exist_ok=True)
            (config.run_dir / f"checkpoint-{len(tries):09d}.pt").touch()
            raise TrainingError("machine gone")
        return invented(config)

    schedule, _ = driven(plan_in(tmp_path, "method=sgd", seeds=1), lost_with_its_machine, retries=0)
    assert len(tries) == 8
    assert not sweep_result(schedule).failures


def test_cost_is_the_measured_step_time_times_the_epochs_and_measured_once(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, *GRID, seeds=2, baseline_epochs="2x", fields=("--epochs", "4"))
    schedule, asked = driven(plan)[0], []

    def measure(configs: Sequence[TrainConfig], seconds: float) -> list[float]:
        asked.append([(config.method, config.epochs) for config in configs])
        return [1.0, 0.9, 2.0, 3.0]

    times = relative_run_times(schedule, measure)
    assert asked == [[("sgd", 8), ("sgd", 4), ("sam", 4), ("asam", 4)]]  # relative to the baseline that counts
    assert times == pytest.approx({1: 1.0, 0: 0.45, 2: 1.0, 3: 1.5})
    assert [row.relative_time for row in sweep_result(schedule, None, times).contenders] == [0.45, 1.0, 1.0, 1.5]
    assert relative_run_times(driven(plan)[0], measure) == times
    assert len(asked) == 1


def test_cost_is_that_of_the_final_runs_where_steps_cannot_be_compared(tmp_path: Path) -> None:
    def broken(configs: Sequence[TrainConfig], seconds: float) -> list[float]:
        raise TrainingError("no memory")

    schedule = driven(plan_in(tmp_path, *GRID, seeds=2))[0]
    times = relative_run_times(schedule, broken)
    assert not times
    assert [row.relative_time for row in sweep_result(schedule, None, times).contenders] == [1.0, 2.0, 2.0]


# ASHA


def test_asha_stops_hopeless_candidates_and_never_touches_final_seeds(tmp_path: Path) -> None:
    radii = [0.02 * index for index in range(1, 28)]
    grid = (f"rho={','.join(f'{rho:g}' for rho in radii)}", "method=sam")
    fields = ("--epochs", "27")
    schedule, pool = driven(plan_in(tmp_path, *grid, asha=True, seeds=3, fields=fields))
    result = sweep_result(schedule)
    assert dict(result.contenders[0].settings) == {"rho": 0.2}
    assert all(run.config.max_epochs is None for run in pool.done if run.phase == "final")
    rows = without_times(results_csv(schedule))
    assert sum(row["status"] == "stopped early" for row in rows) >= 18
    epochs = sum(float(row["epochs"]) for row in rows if row["phase"] == "search")
    assert epochs < 0.4 * 27 * 27  # control: without it, all candidates to the end
    again, pool = driven(plan_in(tmp_path, *grid, asha=True, seeds=3, fields=fields))
    assert not pool.done
    assert dict(sweep_result(again).contenders[0].settings) == {"rho": 0.2}


def test_asha_on_fewer_candidates_than_a_reduction_still_finishes_one(tmp_path: Path) -> None:
    schedule, _ = driven(plan_in(tmp_path, *GRID, asha=True, asha_reduction=4, seeds=1, fields=("--epochs", "9")))
    assert [dict(row.settings) for row in sweep_result(schedule).contenders] == [{}, {"rho": 0.2}, {"rho": 0.2}]


def test_progress_counts_runs_and_shows_choices_and_runs_under_way(tmp_path: Path) -> None:
    schedule, pool = Schedule(plan_in(tmp_path, *GRID, seeds=2)), OneByOne(invented)
    seen = []

    def show() -> None:
        console = Console(file=StringIO(), width=120)
        console.print(progress_view(schedule, pool.waiting, num_places=2))
        seen.append((console.file.getvalue(), progress_line(schedule)))  # type: ignore[attr-defined]
        for run in pool.waiting:
            run.config.run_dir.mkdir(exist_ok=True)
            (run.config.run_dir / "metrics.jsonl").write_text("{}\n" * 7)

    drive(schedule, pool, show, retries=0)
    assert list(dict.fromkeys(line for _, line in seen)) == [f"{done} of 12 runs done" for done in range(1, 13)]
    assert "2 runs at a time on 2 places" in seen[1][0]
    assert re.search(r"  SAM rho=0.\d seed 1000: epoch 7 of 40\n", seen[1][0])
    last = " ".join(seen[-1][0].split())
    assert "│ SAM │ 3/3 │" in last
    assert "│ 2/2 │ │ 2.20 │ rho=0.2 │" in last
    assert counts(schedule.contenders[0]) == (0, 0, 2, 2, 0)


def test_a_node_has_places_for_what_its_cores_and_gpus_hold() -> None:
    assert num_places_on({"CPU": 16, "GPU": 2}, num_cpus=1, num_gpus=0.25) == 8
    assert num_places_on({"CPU": 4, "GPU": 2}, num_cpus=1, num_gpus=0.25) == 4
    assert num_places_on({"CPU": 16, "GPU": 2}, num_cpus=1, num_gpus=0.4) == 4  # not 5: no run on two GPUs
    assert num_places_on({"CPU": 3}, num_cpus=0.5, num_gpus=0) == 6
    assert num_places_on({"CPU": 0.3}, num_cpus=0.1, num_gpus=0) == 3
    assert num_places_on({"CPU": 16}, num_cpus=1, num_gpus=1) == 0
    assert num_places_on({"memory": 1}, num_cpus=1, num_gpus=0) == 0


def test_address_at_which_nothing_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_address(address)
    for wrong in (address, "127.0.0.1:port"):
        with pytest.raises(TrainingError, match=f"address must be that of a running Ray cluster, got {wrong}"):
            check_address(wrong)
    check_address("auto")  # Ray finds out by itself


def test_run_stopped_on_the_way_goes_on_to_the_numbers_of_a_whole_one(tmp_path: Path) -> None:
    (run,) = plan_in(tmp_path, "rho=0.1,0.2", "method=sam", fields=SHORT).search_runs(0, 1)
    early = replace(run.config, max_epochs=1)
    assert run_trial(early).epochs == 1
    assert finished_run(early) is not None
    assert finished_run(run.config) is None
    assert checkpoint_paths(run.config.run_dir)
    whole = replace(run.config, output_dir=tmp_path / "whole")
    wanted, summary = train(whole), run_trial(run.config)
    assert (summary.eval_loss, summary.train_loss) == (wanted.eval_loss, wanted.train_loss)
    assert finished_run(early) != finished_run(run.config)
    assert len((run.config.run_dir / "tries.jsonl").read_text().splitlines()) == 2
    assert not checkpoint_paths(run.config.run_dir)  # of a finished search run only the numbers are kept
    assert run_trial(run.config) == summary  # and they are found again without them


def test_node_that_does_not_share_the_directory_says_so(tmp_path: Path) -> None:
    config = TrainConfig(output_dir=tmp_path / "elsewhere" / "runs" / "run")
    with pytest.raises(TrainingError, match="does not see .*elsewhere/runs: nodes must share --output-dir"):
        run_trial(config)
