"""The command ``sharpness``: the numbers are those of the library, and the file keeps what was measured before."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_network import make
from torch import nn

from flatmin import __version__
from flatmin.sharpness import average_case, hessian_eigenvalues, hessian_trace, spectral_density, worst_case
from flatmin.train.cli import main
from flatmin.train.images import read_images
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import training_sample
from flatmin.train.measured.measures import MEASURES, MeasureSettings, planned_measures
from flatmin.train.measured.subject import ImageChoice, Subject, subject_of_run
from flatmin.train.recipes import recipe_config
from flatmin.train.report.measures import measure_columns
from flatmin.train.report.runs import read_run
from flatmin.train.trained import load_run

TRAIN = ["train", "digits", "--accelerator=cpu", "--threads=1", "--batch-size=432", "--max-steps=2"]
FAST = ["--accelerator=cpu", "--threads=1", "--num-images=24", "--batch-size=16", "--num-vectors=2", "--num-steps=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([*TRAIN, f"--output-dir={run}"]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def measured(run: Path, *flags: str) -> dict[str, Any]:
    assert main(["sharpness", str(run), *FAST, *flags]) == 0
    values: dict[str, Any] = json.loads((run / "sharpness.json").read_text())
    return values


def subject(run: Path, split: str = "train", num_images: int | None = 24) -> Subject:
    return subject_of_run(run, ImageChoice(split, num_images), "cpu")  # type: ignore[arg-type]


def of(file: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    return [record for record in file["measures"] if record["measure"] == measure]


def test_values_are_those_of_the_library_on_the_same_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = measured(run, "--rho=0.3", "--m=4,8", "--k=2", "--seed=7", "--sigma=0.01")
    one = subject(run)
    args = (one.model, nn.CrossEntropyLoss(), one.batches(16))
    common: dict[str, Any] = {"batch_norm": "running", "seed": 7}
    whole, small, larger = of(file, "worst_case")
    assert whole["value"] == worst_case(*args, 0.3, **common).value
    assert small["value"] == worst_case(*args, 0.3, m=4, **common).value
    assert larger["value"] == worst_case(*args, 0.3, m=8, **common).value
    assert (small["settings"]["m"], larger["settings"]["m"], whole["settings"]["m"]) == (4, 8, None)
    assert of(file, "hessian_eigenvalues")[0]["values"] == list(hessian_eigenvalues(*args, 2, **common).eigenvalues)
    assert of(file, "hessian_trace")[0]["value"] == hessian_trace(*args, **common).value
    assert of(file, "spectral_density")[0]["density"] == list(
        spectral_density(*args, num_vectors=2, num_steps=4, **common).density
    )
    assert of(file, "average_case")[0]["value"] == average_case(*args, 0.01, **common).value
    other = worst_case(one.model, nn.CrossEntropyLoss(), subject(run, num_images=23).batches(16), 0.3, **common)
    assert other.value != whole["value"]  # control: one image less
    printed = capsys.readouterr().out
    assert f"{whole['value']:.4g}" in printed
    assert "m-sharpness, m = 4, ρ = 0.3" in printed


def test_the_file_has_the_agreed_entries(run: Path) -> None:
    file = measured(run, "--measures=worst-case,eigenvalues,density", "--params=head")
    assert file["format"] == 1
    wanted = {"method": "sam", "rho": 0.8, "seed": 0, "dataset": "digits", "model": "small-cnn"}
    assert {name: file["run"][name] for name in wanted} == wanted
    assert file["checkpoint"] == {"step": 2, "epoch": 2 / 3}  # 1297 images, 432 a step
    assert file["weights"] == "model"
    assert file["versions"] == {"flatmin": __version__, "torch": torch.__version__}
    assert "cores" in file["hardware"]
    for record in file["measures"]:
        assert {"measure", "split", "num_images", "value", "error", "num_passes", "wall_seconds", "settings"} <= set(
            record
        )
        assert (record["split"], record["num_images"]) == ("train", 24)
    assert {"values", "residuals", "lambda_1_over_lambda_5"} <= set(of(file, "hessian_eigenvalues")[0])
    assert {"grid", "density"} <= set(of(file, "spectral_density")[0])


def test_another_call_adds_or_replaces_only_what_it_measured(run: Path) -> None:
    first = measured(run, "--measures=worst-case,trace", "--rho=0.1")
    second = measured(run, "--measures=worst-case", "--rho=0.2")
    assert [r["settings"]["rho"] for r in of(second, "worst_case")] == [0.1, 0.2]
    assert of(second, "hessian_trace") == of(first, "hessian_trace")
    third = measured(run, "--measures=worst-case", "--rho=0.1")
    assert [r["settings"]["rho"] for r in of(third, "worst_case")] == [0.2, 0.1]
    assert of(third, "worst_case")[0] == of(second, "worst_case")[1]
    again = of(third, "worst_case")[1]
    assert again["value"] == of(first, "worst_case")[0]["value"]
    assert again["wall_seconds"] != of(first, "worst_case")[0]["wall_seconds"]
    test = measured(run, "--measures=worst-case", "--rho=0.1", "--split=test")
    assert [r["split"] for r in of(test, "worst_case")] == ["train", "train", "test"]
    assert not list(run.glob("*.tmp"))


def test_a_density_replaces_itself_though_its_width_is_a_result(run: Path) -> None:
    one = measured(run, "--measures=density")
    path = run / "sharpness.json"
    one["measures"][0]["settings"]["width"] *= 1 + 1e-12  # as another device would find it
    path.write_text(json.dumps(one))
    assert len(measured(run, "--measures=density")["measures"]) == 1
    assert ">SAM<" in (run / "spectrum.svg").read_text()
    assert len(measured(run, "--measures=density", "--seed=1")["measures"]) == 2  # control


def test_measures_of_an_earlier_checkpoint_are_dropped(run: Path) -> None:
    assert measured(run, "--measures=trace")["checkpoint"]["step"] == 2
    assert main([*TRAIN[:-1], "--max-steps=3", f"--output-dir={run}"]) == 0
    file = measured(run, "--measures=worst-case")
    assert file["checkpoint"] == {"step": 3, "epoch": 1.0}
    assert [record["measure"] for record in file["measures"]] == ["worst_case"]


def test_a_damaged_file_is_written_anew(run: Path) -> None:
    (run / "sharpness.json").write_text('{"format": 1, "measu')
    assert len(measured(run, "--measures=worst-case")["measures"]) == 1
    assert not (run / "spectrum.png").exists()  # nothing of it was measured


def test_an_interruption_keeps_what_was_measured(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flatmin.train.measured.measures.hessian_trace", interrupted)
    assert main(["sharpness", str(run), *FAST, "--measures=worst-case,trace"]) == 130
    file = json.loads((run / "sharpness.json").read_text())
    assert [record["measure"] for record in file["measures"]] == ["worst_case"]


def test_averaged_weights_are_measured_where_they_are_evaluated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--ema-decay=0.9", f"--output-dir={run}"]) == 0
    file = measured(run, "--measures=worst-case", "--rho=0.3")
    assert file["weights"] == "ema"
    one = subject(run)
    averaged = load_run(run).model
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), averaged.parameters(), strict=True))
    expected = worst_case(averaged, nn.CrossEntropyLoss(), one.batches(16), 0.3, batch_norm="running")
    assert file["measures"][0]["value"] == expected.value


def test_bfloat16_weights_are_measured_in_float32(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--precision=bf16-true", f"--output-dir={run}"]) == 0
    assert {param.dtype for param in load_run(run).model.parameters()} == {torch.bfloat16}
    assert {param.dtype for param in subject(run).model.parameters()} == {torch.float32}
    assert measured(run, "--measures=worst-case")["measures"][0]["value"] > 0


def test_runs_get_the_same_images_and_training_labels_with_their_noise(run: Path) -> None:
    images, labels = subject(run).batches(24)[0]  # type: ignore[index]
    again, _ = subject(run).batches(24)[0]  # type: ignore[index]
    assert torch.equal(images, again)
    everything, all_labels = subject(run, num_images=None).batches(2000)[0]  # type: ignore[index]
    assert len(everything) == 1297
    matches = (everything[:, None] == images).flatten(2).all(dim=2).nonzero()
    assert set(matches[:, 1].tolist()) == set(range(24))
    assert all(all_labels[place] == labels[index] for place, index in matches.tolist())


def test_several_runs_share_a_table_and_the_radius(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert main([*TRAIN, "--method=sgd", f"--output-dir={other}"]) == 0
    same = shutil.copytree(run, tmp_path / "seeds" / "run")
    flags = [*FAST, "--measures=worst-case"]
    assert main(["sharpness", str(other), str(run), str(same), *flags]) == 0
    heads = capsys.readouterr().out
    assert all(name in heads for name in ("SGD", "SAM (run)", "SAM (seeds/run)"))
    values = []
    for directory in (other, run):
        (record,) = json.loads((directory / "sharpness.json").read_text())["measures"]
        assert record["settings"]["rho"] == recipe_config("digits", "sam").rho
        values.append(f"{record['value']:.4g}")
    assert all(value in heads for value in values)


def test_the_images_are_those_that_are_measured_during_training(run: Path) -> None:
    config = replace(load_run(run).config, accelerator="cpu")
    sample = training_sample(config, make_fabric(config), read_images(config), num_images=24, batch_size=24)
    (images, labels), (ours, our_labels) = next(iter(sample)), subject(run).batches(24)[0]  # type: ignore[index]
    assert torch.equal(images, ours)
    assert torch.equal(labels, our_labels)


def test_data_are_looked_for_where_the_flag_says(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(
        "flatmin.train.measured.subject.read_images",
        lambda config: (seen.append(config.data_dir), read_images(config))[1],
    )
    measured(run, "--measures=worst-case", f"--data-dir={tmp_path}")
    measured(run, "--measures=worst-case")
    assert seen == [tmp_path, load_run(run).config.data_dir]


@pytest.mark.parametrize(("adaptive", "method"), [(False, "sam"), (True, "asam")])
def test_the_radius_is_that_of_the_recipe(adaptive: bool, method: str, run: Path) -> None:
    file = measured(run, "--measures=worst-case", *(["--adaptive"] if adaptive else []))
    assert file["measures"][0]["settings"]["rho"] == recipe_config("digits", method).rho  # type: ignore[arg-type]
    assert file["measures"][0]["settings"]["adaptive"] is adaptive


def test_options_of_the_method_do_not_make_it_another_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*TRAIN, "--method=asam", "--method.eta=0.1", f"--output-dir={run}"]) == 0
    measured(run, "--measures=worst-case", "--rho=0.1")
    file = measured(run, "--measures=worst-case", "--rho=0.2")
    assert file["run"]["method_options"] == {"eta": 0.1}
    assert len(file["measures"]) == 2


def test_blocks_are_measured_one_by_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = measured(run, "--measures=eigenvalues", "--k=1", "--params=each,features.0")
    assert [record["settings"]["params"] for record in file["measures"]] == ["features", "head", "features.0"]
    one = subject(run)
    head = hessian_eigenvalues(one.model, one.loss_fn, one.batches(16), 1, params="head", batch_norm="running")
    assert file["measures"][1]["value"] == head.value
    assert "λ1 of head" in capsys.readouterr().out
    columns = {column.title: column.values for column in measure_columns([read_run(run)])}  # of the page
    assert columns["λ1, head"] == {str(run): head.value}
    assert "λ1" not in columns


def test_default_noise_is_as_long_as_the_radius(run: Path) -> None:
    model = subject(run).model
    (planned,) = planned_measures(["average-case"], MeasureSettings(rho=0.3), model, 24)
    num_params = sum(param.numel() for param in model.parameters())
    assert planned.settings["sigma"] ** 2 * num_params == pytest.approx(0.09)
    (part,) = planned_measures(["average-case"], MeasureSettings(rho=0.3, params="head"), model, 24)
    assert part.settings["sigma"] ** 2 * (64 * 10 + 10) == pytest.approx(0.09)


def test_batches_for_m_are_whole_groups_and_default_ms_fit() -> None:
    model = nn.Linear(2, 2)
    plans = planned_measures(["m-sharpness"], MeasureSettings(rho=0.1, batch_size=100), model, 99)
    assert [(plan.settings["m"], plan.batch_size) for plan in plans] == [(4, 100), (16, 96), (64, 64)]
    (large,) = planned_measures(["m-sharpness"], MeasureSettings(rho=0.1, batch_size=10, ms=(30,)), model, 99)
    assert large.batch_size == 30


def test_progress_counts_the_passes_over_the_data(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "flatmin.train.measured.passes.Passes.update",
        lambda self, task, description: seen.append(description),
    )
    measured(run, "--measures=worst-case")
    assert seen == [f"SAM, worst case: {part} passes over the data" for part in ("0.5", "1.0", "1.5", "2.0")]


def test_a_network_of_ones_own_with_dictionaries_as_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    model, loss_fn, data = make()
    torch.nn.init.constant_(model.out.bias, 0.7)  # type: ignore[arg-type,union-attr]
    file = tmp_path / "tagger.pt"
    torch.save({"model": {f"module.{name}": value for name, value in model.state_dict().items()}, "step": 9}, file)
    flags = ["--factory=foreign_network:make", "--accelerator=cpu", "--threads=1", "--rho=0.2"]
    chosen = ["--measures=worst-case,m-sharpness,eigenvalues", "--m=4", "--k=2", "--num-images=30"]
    assert main(["sharpness", *flags, *chosen, f"--checkpoint={file}"]) == 0
    content = json.loads((tmp_path / "tagger" / "sharpness.json").read_text())
    whole, small = of(content, "worst_case")
    part = data[:4]  # type: ignore[index]
    assert (whole["split"], whole["num_images"]) == ("data", 32)  # whole batches
    assert whole["value"] == worst_case(model, loss_fn, part, 0.2).value  # type: ignore[arg-type]
    assert small["value"] == worst_case(model, loss_fn, part, 0.2, m=4).value  # type: ignore[arg-type]
    values = hessian_eigenvalues(model, loss_fn, part, 2).eigenvalues  # type: ignore[arg-type]
    assert of(content, "hessian_eigenvalues")[0]["values"] == list(values)
    assert content["run"]["model"] == "Tagger"
    assert "tagger" in capsys.readouterr().out
    assert main(["sharpness", *flags, "--measures=m-sharpness", f"--checkpoint={file}", "--num-images=30"]) == 0
    content = json.loads((tmp_path / "tagger" / "sharpness.json").read_text())
    assert [record["settings"]["m"] for record in of(content, "worst_case")] == [None, 4]  # of 4, 16, … what fits in 8
    own = tmp_path / "own"
    assert main(["sharpness", *flags, "--measures=worst-case", f"--output-dir={own}"]) == 0
    untrained = of(json.loads((own / "sharpness.json").read_text()), "worst_case")[0]
    assert untrained["value"] != whole["value"]  # control: without the checkpoint


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["nowhere"], 1, "nowhere is not the directory of a run: it has no config.yaml"),
        ([], 2, "runs must name at least one directory, got none"),
        (["RUN", "RUN"], 2, "runs must differ, got one twice"),
        (["RUN", "--measures=flatness"], 2, f"measures must be one of {', '.join(MEASURES)}, got 'flatness'"),
        (["RUN", "--measures=m-sharpness", "--m=4,x"], 2, "m must be whole numbers joined by commas, got x"),
        (
            ["RUN", "--measures=m-sharpness", "--m=25"],
            2,
            "m must be from 1 to the number of examples in a batch, 24, got 25",
        ),
        (["RUN", "--rho=-1"], 2, "rho must be >= 0 and finite, got -1.0"),
        (["RUN", "--k=0"], 2, "k must be >= 1, got 0"),
        (["RUN", "--num-images=0"], 2, "num_images must be >= 1, got 0"),
        (["RUN", "--batch-size=0"], 2, "batch_size must be >= 1, got 0"),
        (["RUN", "--params=tail"], 2, "params must be all, each, or layers of the network (features, head), got tail"),
        (["RUN", "--split=validation"], 1, "this run trained on the validation images"),
        (["RUN", "--factory=a:b"], 2, "give runs or --factory, not both"),
        (["--checkpoint=x.pt"], 2, "checkpoint needs --factory"),
        (["--factory=foreign_network"], 2, "factory must look like module:function, got foreign_network"),
        (["--factory=no_such_module:make"], 2, "No module named 'no_such_module'"),
        (["--factory=foreign_network:made"], 2, "has no attribute 'made'"),
        (["--factory=foreign_network:make_nothing"], 2, "factory must return (model, loss_fn, data), got NoneType"),
        (["--factory=foreign_network:make_empty"], 2, "factory must return data with at least one batch, got none"),
        (["--factory=foreign_network:make", "--checkpoint=x.pt"], 1, "there is no checkpoint x.pt"),
        (["--factory=foreign_network:make", "--checkpoint=conftest.py"], 1, "conftest.py must hold weights of Tagger"),
    ],
)
def test_what_cannot_be_measured_is_one_line(  # noqa: PLR0917
    flags: list[str],
    code: int,
    message: str,
    trained: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    given = [str(trained) if flag == "RUN" else flag for flag in flags]
    given = [flag.replace("conftest.py", str(Path(__file__).parent.parent / "conftest.py")) for flag in given]
    assert main(["sharpness", *FAST, *given]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("flatmin: error: ")
    assert error.count("\n") == 1


def test_a_run_without_a_checkpoint_and_one_of_nan_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(run / "config.yaml", empty)
    assert main(["sharpness", str(empty), *FAST]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err
    (checkpoint,) = run.glob("checkpoint-*.pt")
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["head.bias"].fill_(torch.nan)
    torch.save(saved, checkpoint)
    assert main(["sharpness", str(run), *FAST, "--measures=worst-case"]) == 1
    assert "worst case: the loss at the weights must be finite, got nan" in capsys.readouterr().err
