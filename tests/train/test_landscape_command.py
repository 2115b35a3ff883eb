"""The command ``landscape``: the losses are those of the library, grids go on where they stopped, runs share axes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flatmin.sharpness import (
    direction_between,
    filter_normalised_direction,
    gradient_direction,
    hessian_eigenvalues,
    loss_on_line,
    loss_on_plane,
    mean_loss,
    principal_directions,
)
from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.cli import main
from flatmin.train.measured import landscapes
from flatmin.train.measured.subject import ImageChoice, Subject, subject_of_run
from flatmin.train.pictures.landscape import read_landscape
from torchrun import output_of_two_processes

TRAIN = ["train", "digits", "--accelerator=cpu", "--threads=1", "--batch-size=432", "--epochs=2"]
FAST = ["--accelerator=cpu", "--threads=1", "--num-images=16", "--batch-size=8", "--points=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    for method in ("sgd", "sam"):
        kept = ["--keep-epochs", "0", "1"]
        assert main([*TRAIN, f"--method={method}", f"--output-dir={runs / method}", *kept]) == 0
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def looked_at(*arguments: object) -> None:
    assert main(["landscape", *map(str, arguments), *FAST]) == 0


def content(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def subject(run: Path) -> Subject:
    return subject_of_run(run, ImageChoice("train", 16), "cpu")


def loss_of(one: Subject) -> Any:
    return mean_loss(one.model, nn.CrossEntropyLoss(), one.batches(8))


def test_a_plane_holds_the_losses_of_the_library_and_is_drawn(runs: Path) -> None:
    looked_at(runs / "sam", "--seed=5")
    file = content(runs / "sam" / "landscape-plane-random.json")
    one, generator = subject(runs / "sam"), torch.Generator().manual_seed(5)
    params = list(one.model.parameters())
    directions = filter_normalised_direction(params, generator), filter_normalised_direction(params, generator)
    positions = [-1.0, 0.0, 1.0]
    losses = loss_on_plane(one.model, loss_of(one), directions, positions, positions, batch_norm="batch")
    assert file["loss"] == losses.tolist()
    assert (file["format"], file["kind"], file["directions"]) == (1, "plane", "random")
    assert (file["x"], file["y"], file["split"], file["num_images"]) == (positions, positions, "train", 16)
    assert file["trajectory"] is file["error_percent"] is None
    assert (file["settings"]["step"], file["settings"]["weights"], file["settings"]["seed"]) == (6, "model", 5)
    assert file["wall_seconds"] > 0
    stems = {path.name for path in (runs / "sam").glob("landscape-*")}
    drawn = {f"landscape-plane-random-{kind}.{ending}" for kind in ("surface", "contour") for ending in ("png", "svg")}
    assert stems == {"landscape-plane-random.json", *drawn}


def test_lines_along_gradient_eigenvector_and_a_random_direction(runs: Path) -> None:
    one = subject(runs / "sgd")
    batches, positions = one.batches(8), [-0.5, 0.0, 0.5]
    top = hessian_eigenvalues(
        one.model, nn.CrossEntropyLoss(), batches, 1, eigenvectors=True, batch_norm="running", seed=3
    )
    assert top.eigenvectors is not None
    expected = {
        "gradient": gradient_direction(one.model, loss_of(one), "running"),
        "eigenvectors": top.eigenvectors[0],
        "random": filter_normalised_direction([*one.model.parameters()], torch.Generator().manual_seed(3)),
    }
    for name, direction in expected.items():
        flags = ["--kind=line", "--radius=0.5", "--seed=3", "--batch-norm=running"]
        looked_at(runs / "sgd", f"--directions={name}", *flags)
        file = content(runs / "sgd" / f"landscape-line-{name}.json")
        losses = loss_on_line(one.model, loss_of(one), direction, positions, batch_norm="running")
        assert file["loss"] == losses.tolist(), name
        assert (file["x"], file["y"]) == (positions, None)
    sharpest = content(runs / "sgd" / "landscape-line-eigenvectors.json")
    assert sharpest["settings"]["eigenvalues"] == [top.value]
    assert (runs / "sgd" / "landscape-line-random.svg").stat().st_size > 0


def test_the_trajectory_is_the_way_of_the_kept_checkpoints(runs: Path) -> None:
    looked_at(runs / "sam", "--directions=trajectory")
    file = content(runs / "sam" / "landscape-plane-trajectory.json")
    saved = [torch.load(runs / "sam" / f"epoch-{number:06d}.pt", weights_only=True) for number in (0, 1)]
    saved.append(load_newest_checkpoint(runs / "sam"))
    one = subject(runs / "sam")
    names = [name for name, _ in one.model.named_parameters()]
    way = principal_directions([[state["model"][name] for name in names] for state in saved])
    np.testing.assert_allclose(file["trajectory"], way.coordinates)
    assert file["trajectory"][-1] == [0.0, 0.0]
    assert file["settings"]["explained"] == list(way.explained)
    x, y = np.array(file["trajectory"]).T
    assert (file["x"][0], file["x"][-1]) == pytest.approx((x.min() - 0.2 * np.ptp(x), x.max() + 0.2 * np.ptp(x)))
    assert (file["y"][0], file["y"][-1]) == pytest.approx((y.min() - 0.2 * np.ptp(y), y.max() + 0.2 * np.ptp(y)))
    losses = loss_on_plane(one.model, loss_of(one), way.directions, file["x"], file["y"], batch_norm="batch")
    np.testing.assert_allclose(file["loss"], losses, rtol=1e-6)


def test_several_runs_have_the_same_axes_and_one_picture(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directions in ("random", "trajectory"):
        looked_at(runs / "sgd", runs / "sam", f"--directions={directions}")
        first, second = (content(runs / name / f"landscape-plane-{directions}.json") for name in ("sgd", "sam"))
        assert (first["x"], first["y"]) == (second["x"], second["y"])
        assert first["loss"] != second["loss"]
        for points in (first["trajectory"], second["trajectory"]):
            assert all(
                first["x"][0] < x < first["x"][-1] and first["y"][0] < y < first["y"][-1] for x, y in points or []
            )
        assert (runs / f"landscape-plane-{directions}-contour.png").stat().st_size > 0
        text = (runs / f"landscape-plane-{directions}-surface.svg").read_text()
        assert ">SGD<" in text
        assert ">SAM<" in text
    assert f"picture in {runs}/landscape-plane-random-surface.png" in capsys.readouterr().out


def test_the_line_between_two_runs_has_errors_and_a_barrier(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    looked_at(runs / "sgd", runs / "sam", "--kind=between", "--error", "--batch-norm=recomputed")
    file = content(runs / "sgd" / "landscape-between-sam.json")
    first, second = subject(runs / "sgd"), subject(runs / "sam")
    direction = direction_between(first.model, second.model)
    losses = loss_on_line(first.model, loss_of(first), direction, [0.0, 0.5, 1.0], batch_norm="recomputed")
    assert (file["kind"], file["directions"], file["x"]) == ("between", "sam", [0.0, 0.5, 1.0])
    assert file["loss"] == losses.tolist()
    with torch.no_grad():
        first.model.eval()
        wrong = [(first.model(images).argmax(1) != labels).sum().item() for images, labels in first.batches(8)]
    looked_at(runs / "sgd", runs / "sam", "--kind=between", "--error", "--batch-norm=running")
    running = content(runs / "sgd" / "landscape-between-sam.json")
    assert running["error_percent"][0] == pytest.approx(100 * sum(wrong) / 16)
    assert "barrier" in capsys.readouterr().out
    assert not (runs / "sam" / "landscape-between-sam.json").exists()


def test_an_interrupted_grid_goes_on_and_leaves_no_trace(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(shutil.copytree(runs / "sam", runs / "whole"))
    looked_at(whole)
    calls = 0

    def stopping(model: Any, loss_fn: Any, batches: Any) -> Any:
        loss = mean_loss(model, loss_fn, batches)

        def counted() -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise KeyboardInterrupt
            return loss()

        return counted

    monkeypatch.setattr(landscapes, "mean_loss", stopping)
    assert main(["landscape", str(runs / "sam"), *FAST]) == 130
    (log,) = (runs / "sam").glob("landscape-*.jsonl")
    assert len(log.read_text().splitlines()) == 1 + 4
    assert not (runs / "sam" / "landscape-plane-random.json").exists()
    looked_at(runs / "sam")
    assert calls == 5 + 5  # nine points, four of which were known
    name = "landscape-plane-random.json"
    assert content(runs / "sam" / name)["loss"] == content(whole / name)["loss"]
    assert not log.exists()
    looked_at(runs / "sam")
    assert calls == 10  # the finished one is read
    looked_at(runs / "sam", "--radius=0.5")
    assert calls == 19  # control: another one is not


def test_a_log_of_other_directions_is_begun_anew(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at(runs / "sam")
    expected = content(runs / "sam" / "landscape-plane-random.json")
    (runs / "sam" / "landscape-plane-random.json").unlink()
    view_digest = landscapes._digest
    names: list[str] = []
    monkeypatch.setattr(landscapes, "_digest", lambda view: names.append(view_digest(view)) or names[-1])
    looked_at(runs / "sam")
    (runs / "sam" / "landscape-plane-random.json").unlink()
    log = runs / "sam" / f"landscape-plane-random-loss-{names[0]}.jsonl"
    log.write_text('{"grid": "of another device"}\n[0, 9.0]\n')
    looked_at(runs / "sam")
    assert content(runs / "sam" / "landscape-plane-random.json")["loss"] == expected["loss"]


def test_a_network_that_went_on_training_is_looked_at_again(runs: Path) -> None:
    run = runs / "on"
    flags = [*TRAIN, f"--output-dir={run}"]
    assert main([*flags, "--max-steps=2"]) == 0
    looked_at(run, "--kind=line")
    early = content(run / "landscape-line-random.json")
    assert main([*flags, "--max-steps=4"]) == 0
    looked_at(run, "--kind=line")
    late = content(run / "landscape-line-random.json")
    assert (early["settings"]["step"], late["settings"]["step"]) == (2, 4)
    assert early["loss"] != late["loss"]


def test_losses_that_are_not_finite_are_null_and_drawn_as_holes(runs: Path) -> None:
    looked_at(runs / "sgd", "--radius=1e38")
    file = content(runs / "sgd" / "landscape-plane-random.json")
    assert None in [value for row in file["loss"] for value in row]
    assert file["loss"][1][1] is not None
    landscape = read_landscape(runs / "sgd" / "landscape-plane-random.json")
    assert np.isnan(landscape.loss[0, 0])
    assert (runs / "sgd" / "landscape-plane-random-surface.png").stat().st_size > 0


def test_a_network_of_ones_own_has_a_landscape_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    looked_at("--factory=foreign_network:make", "--kind=line", f"--output-dir={tmp_path}")
    file = content(tmp_path / "landscape-line-random.json")
    assert (file["split"], file["num_images"], len(file["loss"])) == ("data", 16, 3)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["nowhere"], 1, "nowhere is not the directory of a run"),
        (["RUN", "--points=1"], 2, "points must be >= 2, got 1"),
        (["RUN", "--radius=0"], 2, "radius must be > 0 and finite (between: >= 0), got 0.0"),
        (["RUN", "--directions=gradient"], 2, "directions must be random, eigenvectors or trajectory for a plane"),
        (["RUN", "--kind=between"], 2, "runs must be at least two with --kind between, got 1"),
        (["BARE", "--directions=trajectory"], 1, "must have kept at least 3 checkpoints for the way of its training"),
        (["RUN", "BARE", "--kind=between"], 1, "both models must have parameters of the same shapes"),
        (["--factory=foreign_network:make", "--directions=trajectory"], 2, "directions must not be trajectory"),
        (["--factory=foreign_network:make", "--error"], 2, "error needs runs, whose data have labels"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(  # noqa: PLR0917
    flags: list[str],
    code: int,
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    if "BARE" in flags:
        other = ["--model=resnet-8", "--max-steps=1", f"--output-dir={tmp_path / 'bare'}"]
        assert main([*TRAIN, *other]) == 0
    places = {"RUN": str(trained / "sam"), "BARE": str(tmp_path / "bare")}
    capsys.readouterr()
    given = [places.get(flag, flag) for flag in flags]
    assert main(["landscape", *(flag for flag in FAST if "points" not in flag), *given]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("flatmin: error: ")
    assert error.count("\n") == 1


@pytest.mark.slow  # 30 s, of which most is starting two processes
@pytest.mark.parametrize("command", ["landscape", "sharpness"])
def test_two_processes_find_what_one_finds(command: str, runs: Path) -> None:
    flags = {
        "landscape": [*FAST, "--directions=eigenvectors", "--seed=1"],
        "sharpness": [*FAST[:-1], "--measures=worst-case,m-sharpness"],
    }[command]
    alone = shutil.copytree(runs / "sam", runs / "alone")
    assert main([command, str(alone), *flags]) == 0
    output = output_of_two_processes("-m", "flatmin", command, runs / "sam", *flags, timeout=300)
    name = "landscape-plane-eigenvectors.json" if command == "landscape" else "sharpness.json"
    one, two = content(alone / name), content(runs / "sam" / name)
    if command == "landscape":
        assert two["loss"] == one["loss"]
        assert not [*(runs / "sam").glob("landscape-*.jsonl*")]
        assert output.count("picture in") == 4  # the first process alone draws and says so
    else:
        values = [[record["value"] for record in file["measures"]] for file in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4)
        assert [record["settings"]["num_ranks"] for record in two["measures"]] == [2, 2, 2]
