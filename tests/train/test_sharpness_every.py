"""Sharpness measured between epochs: right values, within the budget, and training that does not notice."""

import json
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import nn

from flatmin.sharpness import hessian_eigenvalues, worst_case
from flatmin.train import loop
from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.config import TrainConfig
from flatmin.train.errors import TrainingError
from flatmin.train.journal import read_metrics
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.loop import train
from flatmin.train.sharpness import EpochSharpness
from flatmin.train.trained import load_run

SHARPNESS = {"sharpness_every": 1, "sharpness_images": 40, "sharpness_budget": float("inf")}
ALL = ("worst-case", "average-case", "eigenvalues", "trace")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Two epochs of two steps with all that a measurement could disturb: norms, dropout, momentum, an average."""
    return TrainConfig(
        model="wrn-10-1",
        dropout=0.2,
        augmentation="basic",
        ema_decay=0.8,
        label_noise=0.2,
        epochs=2,
        batch_size=600,
        rho=0.2,
        accelerator="cpu",
        threads=1,
        output_dir=tmp_path / "plain",
    )


def training_numbers(config: TrainConfig) -> list[dict[str, float | None]]:
    records = read_metrics(config.run_dir)
    return [{name: value for name, value in r.items() if not name.startswith("sharpness_")} for r in records]


def assert_same_training(config: TrainConfig, other: TrainConfig) -> None:
    assert training_numbers(config) == training_numbers(other)
    states = [load_newest_checkpoint(run.run_dir) for run in (config, other)]
    for state in states:
        for name in ("wall_seconds", "metrics_bytes", "sharpness"):  # the record is longer by what was measured
            del state[name]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["sgd", "sam", "msam", "bsam"])
def test_training_is_the_same_with_a_measurement(config: TrainConfig, method: str, tmp_path: Path) -> None:
    config = replace(config, method=method)
    train(config)
    measured = replace(config, **SHARPNESS, output_dir=tmp_path / "measured")
    train(measured)
    assert_same_training(config, measured)
    assert all(record["sharpness_worst_case"] > 0.0 for record in read_metrics(measured.run_dir))


def test_training_is_the_same_with_every_measure(config: TrainConfig, tmp_path: Path) -> None:
    train(config)
    measured = replace(
        config, **SHARPNESS | {"sharpness_images": 20}, sharpness_measures=ALL, output_dir=tmp_path / "measured"
    )
    train(measured)
    assert_same_training(config, measured)
    for record in read_metrics(measured.run_dir):
        assert record["sharpness_worst_case"] > 0.0
        assert record["sharpness_lambda_1"] > 0.0
        assert record["sharpness_lambda_1_over_lambda_5"] > 1.0
        assert {"sharpness_average_case", "sharpness_hessian_trace"} < set(record)


def test_a_compiled_network_is_measured_and_trains_the_same(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fast_compile = partialmethod(nn.Module.compile, backend="aot_eager")  # without the minute of the default compiler
    monkeypatch.setattr(nn.Module, "compile", fast_compile)
    config = replace(config, model="small-cnn", dropout=0.0, ema_decay=0.0, compile=True)
    train(config)
    measured = replace(
        config, **SHARPNESS, sharpness_measures=("worst-case", "eigenvalues"), output_dir=tmp_path / "measured"
    )
    train(measured)
    assert_same_training(config, measured)
    assert read_metrics(measured.run_dir)[-1]["sharpness_lambda_1"] > 0.0


@pytest.mark.parametrize(("method", "ema_decay"), [("sam", 0.8), ("msam", 0.0)])
def test_values_are_those_of_the_measures_at_the_weights_on_the_same_images(
    config: TrainConfig, method: str, ema_decay: float
) -> None:
    config = replace(config, method=method, ema_decay=ema_decay)
    config = replace(config, **SHARPNESS, sharpness_measures=("worst-case", "eigenvalues"), sharpness_m=20)
    train(config)
    run = load_run(config.run_dir)  # the averaged or the true weights, as they are evaluated
    batches = list(make_loaders(config, make_fabric(config)).sharpness)
    assert sum(len(labels) for _, labels in batches) == 40
    options = {"batch_norm": "running"}
    sharpness = worst_case(run.model, torch.nn.CrossEntropyLoss(), batches, 0.05, m=20, **options)
    eigenvalues = hessian_eigenvalues(run.model, torch.nn.CrossEntropyLoss(), batches, tolerance=1e-2, **options)
    record = read_metrics(config.run_dir)[-1]
    assert record["sharpness_worst_case"] == pytest.approx(sharpness.value, rel=1e-4)
    assert record["sharpness_lambda_1"] == pytest.approx(eigenvalues.value, rel=1e-3)
    whole = worst_case(run.model, torch.nn.CrossEntropyLoss(), batches, 0.05, **options)
    assert record["sharpness_worst_case"] != pytest.approx(whole.value, rel=1e-2)  # control: m matters


def test_the_sample_is_the_same_for_every_seed_and_has_the_labels_trained_on(config: TrainConfig) -> None:
    config = replace(config, **SHARPNESS)
    first, second, right = (
        next(iter(make_loaders(replace(config, **changed), make_fabric(config)).sharpness))
        for changed in ({"seed": 0}, {"seed": 1}, {"label_noise": 0.0})
    )
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])  # each seed has its own wrong labels
    assert 0.02 < (first[1] != right[1]).float().mean().item() < 0.4
    assert torch.equal(first[0], right[0])


def test_only_every_nth_epoch_has_values_and_the_event_files_have_them(config: TrainConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415 - slow

    config = replace(config, **SHARPNESS | {"sharpness_every": 2}, epochs=4)
    train(config)
    values = [record["sharpness_worst_case"] for record in read_metrics(config.run_dir)]
    assert [value is None for value in values] == [True, False, True, False]
    events = EventAccumulator(str(config.run_dir)).Reload()
    assert [event.step for event in events.Scalars("sharpness_worst_case")] == [4, 8]


def test_a_spent_budget_leaves_measurements_out_and_says_so(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, **SHARPNESS | {"sharpness_budget": 1e-9}, epochs=3)
    train(config, Console(width=200))
    values = [record["sharpness_worst_case"] for record in read_metrics(config.run_dir)]
    assert [value is None for value in values] == [False, True, True]  # the first is always taken
    timings = [json.loads(line) for line in (config.run_dir / "timing.jsonl").read_text().splitlines()]
    assert [timing["sharpness_skipped"] for timing in timings] == [0, 1, 2]
    assert 0.0 < timings[0]["sharpness_seconds"] == timings[2]["sharpness_seconds"] < timings[2]["wall_seconds"]
    assert capsys.readouterr().out.count("sharpness skipped") == 2


def test_interrupted_run_keeps_to_the_budget_and_trains_the_same(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = replace(config, epochs=3, checkpoint_seconds=0.0)
    train(config)
    measured = replace(config, **SHARPNESS | {"sharpness_budget": 1e-9}, output_dir=tmp_path / "measured")
    take_step = loop.take_step

    def dying_step(config: TrainConfig, fabric: Fabric, state: loop.TrainingState, batch: object) -> None:
        if state.step == 3:
            raise KeyboardInterrupt
        take_step(config, fabric, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            train(measured)
    train(measured)
    assert_same_training(config, measured)
    values = [record["sharpness_worst_case"] for record in read_metrics(measured.run_dir)]
    assert [value is None for value in values] == [False, True, True]  # a fresh budget would have taken the second


def test_a_group_that_fits_no_batch_is_refused(config: TrainConfig) -> None:
    asked = replace(config, sharpness_every=1, sharpness_images=100, sharpness_m=300)
    with pytest.raises(TrainingError, match="sharpness_m must be at most .* 100, got 300"):
        EpochSharpness(asked, make_fabric(config), SimpleNamespace(), SimpleNamespace())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("sharpness_every", 0, "sharpness_every must be >= 1, got 0"),
        ("sharpness_measures", ("sharp",), "measures must be one or several of worst-case"),
        ("sharpness_measures", (), "measures must be one or several of worst-case"),
        ("sharpness_measures", ("trace", "trace"), "each once, got"),
        ("sharpness_budget", 0.0, "sharpness_budget must be > 0, got 0.0"),
        ("sharpness_images", 0, "sharpness_images must be >= 1, got 0"),
        ("sharpness_rho", -1.0, "sharpness_rho must be >= 0, got -1.0"),
        ("sharpness_m", 7, r"sharpness_m must divide batch_size \(600\), got 7"),
        ("sharpness_batchnorm", "both", "sharpness_batchnorm must be one of running, batch, got 'both'"),
    ],
)
def test_settings_outside_their_domain_are_refused(
    config: TrainConfig, field: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **{field: value})
