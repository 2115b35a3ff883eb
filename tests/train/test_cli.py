"""The command line: what it accepts, what it refuses, and what it leaves behind."""

import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

import flatmin
from flatmin.train import cli, commands
from flatmin.train.arguments import config_from_arguments
from flatmin.train.cli import COMMANDS, main
from flatmin.train.config import TrainConfig
from flatmin.train.config_file import config_to_yaml
from flatmin.train.errors import UsageError
from flatmin.train.methods import Method
from flatmin.train.recipes import RECIPES, recipe_config
from flatmin.train.summary import Summary

SHORT = ["--accelerator=cpu", "--threads=1", "--batch-size=432", "--max-steps=2"]


def test_help_lists_every_command_and_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flatmin {flatmin.__version__}\n"


def test_no_command_prints_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: flatmin COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: flatmin {name}" in capsys.readouterr().out


def test_without_a_recipe_digits_is_trained_with_sam() -> None:
    assert config_from_arguments([]) == recipe_config("digits", "sam")


def test_method_brings_the_radius_of_the_recipe_and_flags_override_it() -> None:
    assert config_from_arguments(["cifar100", "--method", "asam"]).rho == recipe_config("cifar100", "asam").rho
    assert config_from_arguments(["cifar100", "--rho", "0.3", "--method=asam"]).rho == 0.3
    assert config_from_arguments(["--method=sgd"]) == recipe_config("digits", "sgd")


def test_help_shows_the_defaults_of_the_recipe_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "cifar100", "--method", "asam", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--rho FLOAT Radius of the method's neighbourhood; 0 is the base optimizer. (default: 1.0)" in text
    assert "(default: wrn-28-10)" in text
    assert "SAM 16.5 ± 0.2, SGD 18.8 ± 0.2 (test error, %)" in text
    assert "Added to |w|, >= 0; a group entry." in text  # without the marks of a docstring


def test_the_papers_command_parses() -> None:
    text = "cifar10 --model wrn-28-10 --epochs 200 --batch-size 128 --lr 0.1 --rho 0.05 --precision bf16-mixed"
    config = config_from_arguments([*text.split(), "--label-noise", "0.2", "--eval-on", "validation", "--devices", "2"])
    assert (config.batch_size, config.rho, config.label_noise) == (128, 0.05, 0.2)
    assert (config.eval_on, config.devices, config.precision) == ("validation", "2", "bf16-mixed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], f"command must be one of {', '.join(COMMANDS)}, got 'trian'"),
        (
            ["train", "mnist"],
            "recipe must be one of those that flatmin recipes lists, such as fashion-mnist, "
            "fashion-mnist-wrn, fashion-mnist-wrn-aa, got mnist",
        ),
        (["train", "--method", "adam"], f"method must be one of {', '.join(get_args(Method))}, got 'adam'"),
        (["train", "--method"], "argument --method: expected one argument"),
        (["train", "--config", "nowhere.yaml"], "there is no configuration file nowhere.yaml"),
        (["train", "digits", "--config", "c.yaml"], "give a recipe or --config, not both: got digits and c.yaml"),
    ],
)
def test_wrong_command_recipe_or_method_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"flatmin: error: {message}\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rho", "-1"], "rho must be >= 0, got -1.0"),
        (["--rho", "nan"], "rho must be >= 0, got nan"),
        (["--rho", "big"], "could not convert string to float: 'big'"),
        (["--rhoo", "1"], "--rhoo"),
        (["--precision", "16-mixed"], "invalid choice '16-mixed'"),
        (["--model", "vgg"], "got 'vgg'"),
        (["--method=sam", "--method.alpha", "1"], "method.alpha must belong to method sam, whose options are p"),
        (["--method=msam", "--method.p=1"], "method.p must belong to method msam, which has no options, got 1"),
        (
            ["--method=sgd", "--method.no-nesterov"],
            "method.nesterov must belong to method sgd, which has no options, got --method.no-nesterov",
        ),
        (["--method=gsam", "--method.alpha", "-1"], "method.alpha must be >= 0 and finite, got -1.0"),
        (["--method=gsam", "--method.alpha", "big"], "could not convert string to float: 'big'"),
        (["--method=gsam", "--method.minimised", "both"], "invalid choice 'both'"),
        (["--method=bsam", "--gradient-clipping", "1"], "method bsam needs gradient_clipping 0.0, got 1.0"),
        (["--method=bsam", "--optimizer", "adamw"], "method bsam needs optimizer 'sgd', got 'adamw'"),
        (["--method=bsam", "--weight-decay-in", "decoupled"], "method bsam needs weight_decay_in base or loss"),
        (["--method=sam", "--rho-schedule", "lr", "--rho-min", "9"], "rho_min must be <= rho (0.8), got 9.0"),
    ],
)
def test_wrong_flag_or_value_is_named_with_code_2_and_no_traceback(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["train", *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error
    assert "Traceback" not in error


def test_train_prints_and_saves_its_configuration_and_config_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", "--method=asam", *SHORT, f"--output-dir={run}"]) == 0
    printed = capsys.readouterr().out
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["rho"] == recipe_config("digits", "asam").rho
    assert all(f"{name}: " in printed for name in saved)
    summary = Summary.from_json((run / "summary.json").read_text())
    assert f"test error {summary.eval_error_percent:.2f} %" in printed

    again = tmp_path / "again"
    assert main(["train", "--config", str(run / "config.yaml"), "--output-dir", str(again), "--max-steps", "1"]) == 0
    assert yaml.safe_load((again / "config.yaml").read_text()) == saved | {"output_dir": str(again), "max_steps": 1}


def test_config_file_keeps_its_radius_under_another_method(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("rho: 0.3\nmethod: sam\n")
    assert config_from_arguments(["--config", str(path), "--method", "asam"]) == TrainConfig(rho=0.3, method="asam")
    path.write_text("radius: 0.3\n")
    with pytest.raises(UsageError, match="has unknown fields: radius"):
        config_from_arguments(["--config", str(path)])


def test_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--method=sgd", *SHORT, f"--output-dir={tmp_path / 'run'}"]
    assert main(command) == 0
    first = capsys.readouterr().out
    assert main(command) == 0
    second = capsys.readouterr().out
    assert "is finished" not in " ".join(first.split())  # a long path breaks the line
    assert "is finished" in " ".join(second.split())
    assert first.splitlines()[-2] == second.splitlines()[-2]


def test_run_that_cannot_start_is_one_line_and_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SHORT, f"--output-dir={tmp_path}"]) == 0
    capsys.readouterr()
    assert main(["train", *SHORT, f"--output-dir={tmp_path}", "--lr=0.3"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flatmin: error: ")
    assert "(lr 0.1 -> 0.3)" in error
    assert error.count("\n") == 1


def test_evaluate_prints_the_error_that_training_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *SHORT, "--ema-decay=0.5", f"--output-dir={run}"]) == 0
    summary = Summary.from_json((run / "summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run), "--accelerator=cpu", "--threads=1"]) == 0
    table = capsys.readouterr().out
    assert f"{summary.eval_loss:.4f}" in table
    assert f"{summary.eval_error_percent:.2f} %" in table
    assert main(["evaluate", str(run), "--split=train"]) == 0
    assert "1297" in capsys.readouterr().out


def test_evaluate_refuses_a_path_without_a_run_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nothing")]) == 1
    expected = f"flatmin: error: {tmp_path}/nothing is not the directory of a run: it has no config.yaml\n"
    assert capsys.readouterr().err == expected
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert main(["evaluate", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"flatmin: error: {tmp_path} has no checkpoint yet\n"


def test_recipes_are_listed_with_result_and_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["recipes"]) == 0
    table = capsys.readouterr().out
    assert all(f"│ {name} " in table for name in RECIPES)
    assert "SAM 16.5 ± 0.2, SGD 18.8 ± 0.2 (test error, %)" in table


def test_a_recipe_is_shown_with_its_settings_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "cifar10-noise-40-bootstrap"]) == 0
    text = capsys.readouterr().out
    for part in (
        "Replicates: SAM paper, Table 4, Bootstrap + SAM, 40 % noise.",
        "Expects: SAM 94.2 (test accuracy, %).",
        "\n  flatmin relabel runs/cifar10-noise-40-sam-0\n",
        "hours with SAM",
    ):
        assert part in text
    settings = yaml.safe_load(text[text.index("\nrecipe:") :])
    assert settings == yaml.safe_load(config_to_yaml(recipe_config("cifar10-noise-40-bootstrap")))
    assert main(["recipes", "cifar10", "--method", "sgd"]) == 0
    assert "\nmethod: sgd\n" in capsys.readouterr().out
    assert main(["recipes", "mnist"]) == 2
    assert "recipe must be one of those" in capsys.readouterr().err


def test_missing_package_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(_: str) -> None:
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(cli, "import_module", import_module)
    assert main(["recipes"]) == 1
    assert capsys.readouterr().err == "flatmin: error: recipes needs the package tyro: pip install 'flatmin[train]'\n"


def test_missing_wandb_is_named_with_the_command_that_installs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", *SHORT, "--wandb", f"--output-dir={tmp_path}"]) == 1
    assert "--wandb needs the package wandb: pip install 'flatmin[wandb]'" in capsys.readouterr().err


def test_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "train", interrupted)
    assert main(["train"]) == 130
    assert "the same command goes on from the last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_recipe_is_no_flag(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--recipe", "cifar10", "--max-steps", "1"])
    assert "--recipe" in "".join(capsys.readouterr())


def test_a_damaged_data_file_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "cifar10.safetensors").write_bytes(b"not one")
    flags = [
        "--data-dir",
        str(tmp_path),
        "--output-dir",
        str(tmp_path / "run"),
        "--model",
        "resnet-8",
        "--threads",
        "1",
    ]
    assert main(["train", "cifar10", "--accelerator", "cpu", *flags]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "cifar10.safetensors" in lines[0]
    # a run that never started has not claimed its directory
    assert main(["train", "digits", "--max-steps", "1", "--output-dir", str(tmp_path / "run"), "--threads", "1"]) == 0


@pytest.mark.parametrize("text", ["emaa: 1.0\n", "- not a mapping\n", "{"])
def test_a_damaged_configuration_ends_in_one_line(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    assert main(["evaluate", str(tmp_path)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "config.yaml" in lines[0]


def test_a_radius_that_makes_the_second_pass_overflow_ends_in_one_line(tmp_path, capsys):
    flags = ["--rho", "1e30", "--max-steps", "3", "--threads", "1", "--output-dir", str(tmp_path)]
    assert main(["train", "digits", *flags]) == 1
    assert "the loss at w + eps was not finite" in capsys.readouterr().err


def test_compare_refuses_several_devices(capsys):
    assert main(["compare", "--devices", "2"]) == 2
    assert "one device" in capsys.readouterr().err
