"""The grid: what it says, and what is refused before anything starts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from flatmin.train.cli import main
from flatmin.train.config import Method, TrainConfig
from flatmin.train.loop import train
from flatmin.train.methods import reads_field
from flatmin.train.recipes import recipe_config
from flatmin.train.sweep.arguments import SweepArguments, made_plan
from flatmin.train.sweep.contenders import Plan, run_name
from flatmin.train.sweep.grid import grid_points, parsed_grid

BASES: Mapping[Method, TrainConfig] = {method: recipe_config("digits", method) for method in ("sgd", "sam", "asam")}


def plan_of(*grid: str, fields: tuple[str, ...] = (), **own: object) -> Plan:
    return made_plan(SweepArguments(grid=grid, **own), ["digits"], fields)  # type: ignore[arg-type]


def test_values_have_the_types_of_their_fields() -> None:
    grid = parsed_grid(["rho=0.01,2", "batch-size=64", "nesterov=true,false", "augmentation=none,basic", "lr=1e-3"])
    assert grid["rho"] == (0.01, 2.0)
    assert isinstance(grid["rho"][1], float)
    assert grid["batch_size"] == (64,)
    assert grid["nesterov"] == (True, False)
    assert grid["augmentation"] == ("none", "basic")
    assert grid["lr"] == (0.001,)


def test_points_that_a_method_cannot_tell_apart_are_one_point() -> None:
    points = grid_points(parsed_grid(["rho=0.1,0.2,0.5", "lr=0.1,0.2"]), BASES)
    count = {method: sum(point.method == method for point in points) for method in BASES}
    assert count == {"sgd": 2, "sam": 6, "asam": 6}
    assert {point.rho for point in points if point.method == "sgd"} == {0.0}


@pytest.mark.parametrize("method", ["sgd", "sam", "msam", "bsam"])
def test_unread_fields_change_no_number(method: Method, tmp_path: Path) -> None:
    values = {"rho": 0.3, "ascent_steps": 2, "rho_schedule": "cosine"}
    base = recipe_config("digits", method)
    base = replace(base, max_steps=3, batch_size=32, max_eval_batches=1, accelerator="cpu", threads=1)
    unread = {name: value for name, value in values.items() if not reads_field(method, name)}
    read = "rho" not in unread
    one = train(replace(base, output_dir=tmp_path / "one"))
    other = train(replace(base, output_dir=tmp_path / "other", **unread))  # type: ignore[arg-type]
    assert (one.train_loss, one.eval_loss) == (other.train_loss, other.eval_loss)
    assert set(unread) == {"sgd": set(values), "sam": set()}.get(method, {"ascent_steps"})
    if read:  # control: a field that is read does
        third = train(replace(base, output_dir=tmp_path / "third", rho=0.3))
        assert third.eval_loss != one.eval_loss


def test_options_of_a_method_are_axes_for_the_methods_that_have_them() -> None:
    plan = plan_of("method=sgd,sam,gsam,looksam", "method.alpha=0.1,0.4", "rho=0.1,0.2")
    counts = {row.name: len(row.candidates) for row in plan.contenders}
    assert counts == {"SGD": 1, "SAM": 2, "GSAM": 4, "LookSAM": 4}
    gsam = plan.contenders[2]
    chosen = [gsam.settings(candidate, plan.swept) for candidate in gsam.candidates]
    assert chosen[0] == {"method.alpha": 0.1, "rho": 0.1}
    assert [candidate.method_options for candidate in gsam.candidates[::2]] == [(("alpha", 0.1),), ()]  # 0.4: default
    assert plan.contenders[1].settings(plan.contenders[1].candidates[0], plan.swept) == {"rho": 0.1}
    assert len({run_name(candidate) for row in plan.contenders for candidate in row.candidates}) == 11


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["rhoo=0.1"], "grid must name fields that flatmin train --help lists, got rhoo (did you mean rho?)"),
        (["rho=0.1,-1", "method=sgd,sam"], "grid point method=sgd, rho=-1.0: rho must be >= 0, got -1.0"),
        (["rho=0.1,nan"], "grid point method=sam, rho=nan: rho must be >= 0, got nan"),
        (["rho=0.1,0.2,0.10"], "grid rho must have different values, got 0.1 twice"),
        (["rho=0.1", "rho=0.2"], "grid must name each field once, got rho twice"),
        (["rho=0.1,big"], "grid rho: rho must be of type float, got 'big'"),
        (["epochs=1.5"], "grid epochs: epochs must be of type int, got 1.5"),
        (["rho="], "grid must look like rho=0.05,0.1, got rho="),
        (["rho"], "grid must look like rho=0.05,0.1, got rho"),
        (["method=sgd,adam"], f"grid method must be one of {', '.join(get_args(Method))}, got 'adam'"),
        (["augmentation=all"], "grid point method=sam, augmentation=all: augmentation must be none or some of"),
        (["momentum=0.0,0.9"], "grid point method=sam, momentum=0.0: nesterov needs momentum > 0"),
        (["method.alpha=1,2"], "grid method.alpha must be an option of a method of the grid, sam"),
        (["method=gsam", "method.alpha=-1"], "grid point method=gsam, method.alpha=-1.0: method.alpha must be >= 0"),
        (["method=gsam", "method.alpha=big"], "grid method.alpha: method.alpha must be of type float, got 'big'"),
        (["method_options=1"], "grid must leave out method_options: give one option"),
        (["seed=1,2"], "grid must leave out seed: use --seeds and --search-seeds"),
        (["max_steps=1,2"], "grid must leave out max_steps: it leaves the numbers of a run as they are"),
        (["devices=1,2"], "grid must leave out devices: every run has one device"),
    ],
)
def test_bad_grid_is_refused_with_name_rule_and_value_before_anything_starts(
    grid: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [argument for item in grid for argument in ("--grid", item)]
    assert main(["sweep", "digits", *flags, "--output-dir", str(tmp_path / "sweep")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--asha-reduction", "1"], "asha_reduction must be >= 2, got 1"),
        (["--retries", "-1"], "retries must be >= 0, got -1"),
        (["--cpus-per-trial", "0"], "cpus_per_trial must be > 0, got 0"),
        (["--gpus-per-trial", "2"], "gpus_per_trial must be >= 0 and <= 1, got 2"),
        (["--claim", "0"], "claim must be > 0, got 0"),
        (["--baseline", "sgd"], "baseline must be a method of the grid, sam, got sgd"),
        (["--baseline-epochs", "twice"], "baseline_epochs must look like 2x or 400, got twice"),
        (["--baseline-epochs", "40"], "baseline_epochs must be a whole number of epochs above 40, got 40"),
        (["--baseline-epochs", "1.01x"], "baseline_epochs must be a whole number of epochs above 40, got 1.01x"),
        (["--baseline-epochs", "2x", "--grid", "epochs=1,2"], "baseline_epochs must be left out where the grid has"),
        (["--each", "lr"], "each must name fields of the grid other than method, got lr"),
        (["--rho", "0.1", "--grid", "rho=0.2"], "--rho must be left out where the grid has rho"),
        (["--no-nesterov", "--grid", "nesterov=true"], "--no-nesterov must be left out where the grid has nesterov"),
        (["--seed=1"], "a sweep sets --seed for each run: use --seeds"),
        (["--eval-on", "test"], "a sweep sets --eval-on for each run: use nothing"),
        (["--method", "sam"], "a sweep sets --method for each run: use --grid method=sgd,sam"),
    ],
)
def test_arguments_outside_their_domain_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", "digits", *arguments, "--output-dir", str(tmp_path / "sweep")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_contenders_are_methods_and_the_baseline_has_two_budgets() -> None:
    plan = plan_of("rho=0.1,0.2", "method=sam,sgd", baseline_epochs="2x")
    assert [(row.name, len(row.candidates), row.is_baseline) for row in plan.contenders] == [
        ("SAM", 2, False),
        ("SGD", 1, True),
        ("SGD, 2x epochs", 1, True),
    ]
    assert [row.candidates[0].epochs for row in plan.contenders] == [40, 40, 80]
    assert all(plan.needs_search(row) for row in plan.contenders)


def test_contender_without_a_choice_needs_no_search() -> None:
    plan = plan_of("rho=0.1,0.2", "method=sgd,sam")
    assert [plan.needs_search(row) for row in plan.contenders] == [False, True]


def test_label_noise_and_what_each_names_are_tasks_and_never_chosen() -> None:
    plan = plan_of("label_noise=0.2,0.4", "method=sgd,sam", "lr=0.1,0.2", "batch_size=32,64", each=("batch_size",))
    assert len(plan.contenders) == 2 * 2 * 2
    assert {len(row.candidates) for row in plan.contenders} == {2}
    assert plan.contenders[0].task == (("label_noise", 0.2), ("batch_size", 32))


def test_search_and_final_runs_differ_in_split_and_seeds() -> None:
    plan = plan_of("rho=0.1,0.2", search_seeds=2, seeds=3)
    search, final = plan.search_runs(0, 1), plan.final_runs(0, 1)
    assert [(run.config.eval_on, run.config.seed) for run in search] == [("validation", 1000), ("validation", 1001)]
    assert [(run.config.eval_on, run.config.seed) for run in final] == [("test", 0), ("test", 1), ("test", 2)]
    assert {run.config.rho for run in search + final} == {0.2}


def test_run_names_depend_on_what_decides_the_numbers_alone(tmp_path: Path) -> None:
    config = BASES["sam"]
    assert run_name(replace(config, output_dir=tmp_path, checkpoint_seconds=1.0, max_epochs=3)) == run_name(config)
    changed = [
        replace(config, **change) for change in ({"lr": 0.2}, {"seed": 1}, {"eval_on": "validation"}, {"rho": 0.1})
    ]  # type: ignore[arg-type]
    assert len({run_name(other) for other in [config, *changed]}) == 5


def test_workers_find_files_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = ("--dataset", "file", "--dataset-path", "own.npz", "--train-labels", "own.st", "--label-noise", "0")
    (contender,) = plan_of("rho=0.1,0.2", fields=fields).contenders
    (config, _) = contender.candidates
    assert (config.dataset_path, config.train_labels) == (tmp_path / "own.npz", tmp_path / "own.st")
    assert config.data_dir == tmp_path / "data"
    assert config.weights is None


def test_larger_grid_keeps_the_runs_of_the_smaller_one() -> None:
    def directories(plan: Plan) -> set[Path]:
        rows = range(len(plan.contenders))
        search = [
            run for row in rows for i in range(len(plan.contenders[row].candidates)) for run in plan.search_runs(row, i)
        ]
        return {run.config.run_dir for run in [*search, *(run for row in rows for run in plan.final_runs(row, 0))]}

    small = directories(plan_of("rho=0.1,0.2", "method=sam"))
    assert small < directories(plan_of("rho=0.1,0.2,0.5", "method=sam,sgd", "lr=0.1,0.3", seeds=7))
    assert small.isdisjoint(directories(plan_of("rho=0.1,0.2", "method=sam", fields=("--epochs", "3"))))  # control
