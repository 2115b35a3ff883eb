"""What a run leaves behind: records, checkpoints, a summary, and what draws its curves."""

import json
import math
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from short_runs import final_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flatmin.train import loop
from flatmin.train.config import TrainConfig
from flatmin.train.journal import read_metrics
from flatmin.train.loop import train
from flatmin.train.state import fresh_model


def test_metrics_record_schedule_and_radius(config: TrainConfig) -> None:
    train(replace(config, warmup_epochs=1.0, lr=0.3, eval_every=2))
    records = read_metrics(config.run_dir)
    assert [record["step"] for record in records] == [3, 6, 9]
    assert [record["epoch"] for record in records] == [1.0, 2.0, 3.0]
    last_steps = [0.3, 0.15 * (1 + math.cos(math.pi * 2 / 6)), 0.15 * (1 + math.cos(math.pi * 5 / 6))]
    assert [record["learning_rate"] for record in records] == pytest.approx(last_steps)
    assert [record["rho"] for record in records] == [0.1, 0.1, 0.1]
    assert [record["eval_loss"] is None for record in records] == [True, False, False]  # every second, and the last


def test_what_was_not_asked_for_is_not_recorded(config: TrainConfig) -> None:
    summary = train(replace(config, max_steps=1))
    assert summary.eval_top5_error_percent is summary.eval_train_loss is None
    assert not any("top5" in name or "eval_train" in name for name in read_metrics(config.run_dir)[0])


def test_checkpoints_are_kept_after_the_epochs_named_and_rotated_otherwise(config: TrainConfig) -> None:
    config = replace(config, epochs=5, keep_epochs=(0, 2, 4), checkpoint_every=1, num_checkpoints=3)
    train(config)
    files = sorted(path.name for path in config.run_dir.glob("*.pt"))
    kept, rotated = ["epoch-000000.pt", "epoch-000002.pt", "epoch-000004.pt"], [9, 12, 15]
    assert files == [*(f"checkpoint-{step:09d}.pt" for step in rotated), *kept]
    states = [torch.load(config.run_dir / name, weights_only=True) for name in kept]
    assert [state["step"] for state in states] == [0, 6, 12]
    initial = fresh_model(config).state_dict()
    assert all(torch.equal(states[0]["model"][name], value) for name, value in initial.items())

    other = replace(config, output_dir=config.run_dir.with_name("from-kept"), keep_epochs=())
    train(replace(other, max_steps=6))
    for path in other.run_dir.glob("checkpoint-*.pt"):
        path.unlink()
    (config.run_dir / kept[1]).rename(other.run_dir / "checkpoint-000000006.pt")  # a run can go on from a kept one
    train(other)
    assert (other.run_dir / "metrics.jsonl").read_bytes() == (config.run_dir / "metrics.jsonl").read_bytes()


def test_max_steps_stops_in_the_middle_of_an_epoch_with_a_summary(config: TrainConfig) -> None:
    summary = train(replace(config, max_steps=4))
    assert (summary.steps, summary.epochs, summary.complete) == (4, 4 / 3, False)
    assert [record["step"] for record in read_metrics(config.run_dir)] == [3, 4]
    saved = json.loads((config.run_dir / "summary.json").read_text())
    assert saved["eval_error_percent"] == summary.eval_error_percent


def test_summary_of_fewer_steps_is_gone_while_the_run_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step_that_fails(*_: object) -> None:
        assert not (config.run_dir / "summary.json").exists()
        raise KeyboardInterrupt

    train(replace(config, max_steps=2))
    monkeypatch.setattr(loop, "take_step", step_that_fails)
    with pytest.raises(KeyboardInterrupt):
        train(config)


def test_finished_run_is_not_trained_again(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = train(config)
    monkeypatch.setattr(loop, "run_epochs", None)
    assert train(config) == summary
    assert train(replace(config, max_steps=5)) == summary


def test_event_files_hold_every_number_of_the_records_and_the_time(config: TrainConfig) -> None:
    train(config)
    events = EventAccumulator(str(config.run_dir)).Reload()
    for name in ("train_loss", "eval_error_percent", "learning_rate", "loss_rise"):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(record["step"], pytest.approx(record[name])) for record in read_metrics(config.run_dir)]
    timing = [json.loads(line) for line in (config.run_dir / "timing.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("wall_seconds")] == pytest.approx(
        [record["wall_seconds"] for record in timing]
    )


def test_weights_and_biases_gets_the_records_and_goes_on_with_its_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = replace(config, wandb=True)
    train(replace(config, max_steps=3))
    train(config)
    ids = [call.kwargs["id"] for call in wandb.init.call_args_list]
    assert len(ids) == 2
    assert ids[0] == ids[1] != ""
    logged = [(call.kwargs["step"], call.args[0]["train_loss"]) for call in wandb.init.return_value.log.call_args_list]
    assert logged[1:] == [(record["step"], record["train_loss"]) for record in read_metrics(config.run_dir)]
    assert wandb.init.return_value.finish.call_count == 2


def test_run_that_is_beyond_its_limit_takes_no_step_and_tells_where_it_is(config: TrainConfig) -> None:
    """Killed after its checkpoint and before its summary, and started again with a lower limit."""
    train(replace(config, max_steps=4))
    before = final_weights(config)
    (config.run_dir / "summary.json").unlink()
    summary = train(replace(config, max_steps=2))
    assert (summary.steps, summary.complete) == (4, False)
    assert all(torch.equal(value, before[name]) for name, value in final_weights(config).items())
