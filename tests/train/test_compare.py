"""The command ``compare``: fair trials, measures against closed forms, errors that are shown."""

import json
import multiprocessing
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from io import StringIO
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from flatmin.train import compare as compare_module
from flatmin.train import solution as solution_module
from flatmin.train import step_time as step_time_module
from flatmin.train.arguments import config_from_arguments
from flatmin.train.compare import CompareArguments, compare_command, parsed_radii
from flatmin.train.config import TrainConfig
from flatmin.train.config_difference import differing_fields
from flatmin.train.errors import TrainingError, UsageError
from flatmin.train.solution import loss_picture, loss_rises
from flatmin.train.step_time import relative_step_times
from flatmin.train.trials import run_trials

QUICK = ["--epochs", "2", "--max-steps", "3", "--max-eval-batches", "1", "--batch-size", "32"]


class Batches:
    """Three batches of random images, in place of a training loader."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = [rng.normal(size=(6, 4)) for _ in range(3)]
        self.labels = [rng.integers(0, 3, size=6) for _ in range(3)]

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        assert epoch == 0
        pairs = zip(self.images, self.labels, strict=True)
        return ((torch.from_numpy(images).float(), torch.from_numpy(labels)) for images, labels in pairs)


def softmax_loss(weight: np.ndarray, images: np.ndarray, labels: np.ndarray) -> float:
    logits = images @ weight.T
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]))


def softmax_gradient(weight: np.ndarray, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    probabilities = np.exp(images @ weight.T)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return (probabilities - np.eye(3)[labels]).T @ images / len(labels)


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=False)


def rises_in_closed_form(weight: np.ndarray, batches: Batches, radii: Sequence[float]) -> list[float]:
    rises = []
    for images, labels in zip(batches.images, batches.labels, strict=True):
        gradient = softmax_gradient(weight, images, labels)
        unit = gradient / np.linalg.norm(gradient)
        loss = softmax_loss(weight, images, labels)
        rises.append([softmax_loss(weight + rho * unit, images, labels) - loss for rho in radii])
    return np.mean(rises, axis=0).tolist()


def test_rises_are_those_of_a_step_along_each_batch_gradient(linear: nn.Linear) -> None:
    weight, batches, radii = linear.weight.detach().double().numpy(), Batches(), [0.1, 1.0]
    wanted = rises_in_closed_form(weight, batches, radii)
    assert loss_rises(linear, batches, radii) == pytest.approx(wanted, rel=1e-4)
    assert loss_rises(linear, batches, [-1.0, 0.5]) != pytest.approx(wanted, rel=1e-1)  # control: other steps


def test_picture_has_the_loss_at_the_weights_in_its_centre(linear: nn.Linear) -> None:
    weight, batches = linear.weight.detach().double().numpy(), Batches()
    picture = loss_picture(linear, batches, [-1.0, 0.0, 1.0])
    losses = [softmax_loss(weight, *pair) for pair in zip(batches.images, batches.labels, strict=True)]
    assert picture.losses[1][1] == pytest.approx(np.mean(losses), rel=1e-5)
    assert picture.losses[0][1] != pytest.approx(picture.losses[1][1], rel=1e-3)


def test_pictures_of_rescaled_networks_are_equal(linear: nn.Linear) -> None:
    """A step is a fraction of each filter, so filters 3 times as long with images a third as bright change nothing."""
    batches = Batches()
    before = loss_picture(linear, batches, [-1.0, 0.0, 1.0])
    with torch.no_grad():
        linear.weight.mul_(3.0)
    batches.images = [images / 3.0 for images in batches.images]
    after = loss_picture(linear, batches, [-1.0, 0.0, 1.0])
    np.testing.assert_allclose(after.losses, before.losses, rtol=1e-4)


def test_step_times_are_medians_of_paired_rounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = iter([9.0, 1.0, 2.0, 6.0, 1.0, 90.0, 4.0, 10.0])  # warm-up; then 3, 90 and 2.5 times as long
    monkeypatch.setattr(step_time_module, "_pass_seconds", lambda *_: next(seconds))
    configs = [TrainConfig(method="sgd", output_dir=tmp_path, threads=1)] * 2
    assert relative_step_times(configs, seconds=0.0, passes_per_step=[1.0, 2.0]) == [1.0, 6.0]


def test_step_times_count_the_passes_of_the_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ticks = count()
    monkeypatch.setattr(step_time_module, "_now", lambda _: float(next(ticks)))  # every turn takes a second
    configs = [TrainConfig(method=method, output_dir=tmp_path, threads=1) for method in ("sgd", "sam", "msam")]
    assert relative_step_times(configs, seconds=0.0) == [1.0, 1.0, 1.0]  # a turn of SAM's has twice the passes
    assert relative_step_times(configs, seconds=0.0, passes_per_step=[1.0, 1.0, 1.0]) == [1.0, 0.5, 1.0]  # control


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """Run trials one after the other in this process; yields the list of what was run."""
    ran: list[TrainConfig] = []

    def run(work: Callable[[TrainConfig], object], configs: Sequence[TrainConfig], *_: object) -> list[object]:
        ran.extend(configs)
        return [work(config) for config in configs]

    monkeypatch.setattr(compare_module, "run_trials", run)
    monkeypatch.setattr(compare_module, "relative_step_times", lambda configs, **_: [1.0, *[2.0] * (len(configs) - 1)])
    monkeypatch.setattr(compare_module, "PICTURE_POINTS", 3)
    return ran


def test_trials_of_a_seed_differ_in_method_and_radius_alone(in_process: list[TrainConfig], tmp_path: Path) -> None:
    compare_command(["digits", "--seeds", "2", "--output-dir", str(tmp_path), "--radius", "sam=0.3", *QUICK])
    assert sorted((config.method, config.seed) for config in in_process) == [
        (method, seed) for method in ("asam", "sam", "sgd") for seed in (0, 1)
    ]
    for seed in (0, 1):
        rows = [asdict(config) for config in in_process if config.seed == seed]
        differing = {name for name in rows[0] if len({str(row[name]) for row in rows}) > 1}
        assert differing == {"method", "rho", "output_dir"}
    assert {config.rho for config in in_process if config.method == "sam"} == {0.3}
    report = (tmp_path / "report.html").read_text()
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    for method in numbers["methods"]:
        assert method["name"] in report
        summaries = [
            json.loads((config.output_dir / "summary.json").read_text())
            for config in in_process
            if config.method.upper() == method["name"] and config.output_dir
        ]
        assert method["eval_error_percents"] == [summary["eval_error_percent"] for summary in summaries]


def test_finished_runs_are_not_run_again(
    in_process: list[TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--methods", "sgd", "--seeds", "1", "--output-dir", str(tmp_path), *QUICK]
    compare_command(arguments)
    before = (tmp_path / "comparison.json").read_text()

    def again(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(solution_module, "loss_rises", again)
    monkeypatch.setattr("flatmin.train.loop.run_epochs", again)
    compare_command(arguments)
    assert (tmp_path / "comparison.json").read_text() == before
    with pytest.raises(AssertionError, match="measured again"):  # control: one more seed is a new run
        compare_command([*arguments, "--seeds", "2"])
    with pytest.raises(AssertionError, match="measured again"):  # control: another measure of the same runs
        compare_command([*arguments, "--rise-radius", "0.3"])


def test_solution_of_a_run_that_went_on_is_measured_again(in_process: list[TrainConfig], tmp_path: Path) -> None:
    arguments = ["--methods", "sgd", "--seeds", "1", "--output-dir", str(tmp_path), *QUICK]
    compare_command(arguments)
    before = (tmp_path / "sgd-rho0-seed0" / "solution.json").read_text()
    compare_command([*arguments, "--max-steps", "5"])
    after = (tmp_path / "sgd-rho0-seed0" / "solution.json").read_text()
    assert (json.loads(before)["num_steps"], json.loads(after)["num_steps"]) == (3, 5)
    assert json.loads(before)["rises"] != json.loads(after)["rises"]


def test_dry_run_leaves_nothing_behind(
    in_process: list[TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    compare_command(["--methods", "sgd", "--seeds", "1", "--dry-run"])
    assert len(in_process) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rho", "0.1"], "compare sets --rho for each run: use --radius"),
        (["--seed=1"], "compare sets --seed=1 for each run: use --seeds"),
        (["--method", "sam"], "compare sets --method for each run: use --methods"),
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
        (["--workers", "0"], "workers must be >= 1, got 0"),
        (["--rise-radius", "nan"], "rise_radius must be > 0, got nan"),
        (["--methods", "sam", "sam"], "methods must be one or more different ones, got sam sam"),
        (["--radius", "sam"], "radius must look like sam=0.3, got sam"),
        (["--radius", "sgd=1"], "radius must name a compared method that has one and be >= 0, got sgd=1"),
        (["--radius", "sam=-1"], "radius must name a compared method that has one and be >= 0, got sam=-1"),
        (["--method.p", "1"], "compare sets --method.p for each run: use --options"),
        (["--options", "sam.p"], "options must look like looksam.interval=10, for a compared method, got sam.p"),
        (["--options", "gsam.alpha=1"], "options must look like .*, for a compared method, got gsam.alpha=1"),
        (
            ["--options", "sam.alpha=1"],
            "options: method.alpha must belong to method sam, whose options are p, direction",
        ),
        (["--options", "sam.p=big"], "options: method.p must be of type float, got 'big'"),
        (["--options", "sam.p=0.5"], "options: method.p must be >= 1, got 0.5"),
        (["mnist"], "recipe must be one of"),
    ],
)
def test_arguments_outside_their_domain_are_refused(
    arguments: list[str], message: str, in_process: list[TrainConfig]
) -> None:
    with pytest.raises(UsageError, match=message):
        compare_command(arguments)
    assert not in_process


def test_radii_are_read_by_method() -> None:
    assert parsed_radii(CompareArguments(radius=("sam=0.3", "asam=2"))) == {"sam": 0.3, "asam": 2.0}


def test_any_set_of_methods_with_options_is_compared(in_process: list[TrainConfig], tmp_path: Path) -> None:
    options = ["--methods", "msam", "looksam", "samon", "--options", "looksam.interval=2", "samon.adaptive=true"]
    compare_command([*options, "--seeds", "1", "--output-dir", str(tmp_path), *QUICK])
    assert {config.method: config.method_options for config in in_process} == {
        "msam": (),
        "looksam": (("interval", 2),),
        "samon": (("adaptive", True),),
    }
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    titles = ["MSAM", "LookSAM, interval=2", "SAMON, adaptive=True"]
    assert [method["name"] for method in numbers["methods"]] == titles
    report = (tmp_path / "report.html").read_text()
    assert all(f"</span>{title}</th>" in report for title in titles)
    command = next(line for line in numbers["commands"] if "--method looksam" in line)
    ran = next(config for config in in_process if config.method == "looksam")
    assert differing_fields(config_from_arguments(shlex.split(command)[2:]), ran) == []


def seed_and_process(config: TrainConfig) -> tuple[int, int, int]:
    return config.seed, os.getpid(), torch.get_num_threads()


def fail_or_die(config: TrainConfig) -> None:
    if config.seed == 1:
        raise ValueError("no luck today")
    if config.seed == 2:
        os._exit(1)  # as if killed for its memory


def test_trials_run_in_other_processes_of_one_thread_and_come_back_in_order(tmp_path: Path) -> None:
    configs = [TrainConfig(seed=seed, output_dir=tmp_path / str(seed)) for seed in (3, 1, 2)]
    results = run_trials(seed_and_process, configs, 1, Console(file=StringIO()))
    assert [seed for seed, _, _ in results] == [3, 1, 2]
    assert {threads for _, _, threads in results} == {1}
    assert os.getpid() not in {process for _, process, _ in results}


@pytest.mark.parametrize(("seed", "message"), [(1, "ValueError: no luck today"), (2, "BrokenProcessPool")])
def test_failure_of_a_trial_is_raised_with_its_name_and_ends_the_workers(
    seed: int, message: str, tmp_path: Path
) -> None:
    configs = [TrainConfig(seed=seed, output_dir=tmp_path / "run")]
    others = set(multiprocessing.active_children())  # other tests keep process groups open
    with pytest.raises(TrainingError, match=rf"sam with seed {seed} in .*run failed: {message}"):
        run_trials(fail_or_die, configs, 1, Console(file=StringIO()))
    assert set(multiprocessing.active_children()) <= others
