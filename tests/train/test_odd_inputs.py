"""What a user may get wrong, or find damaged, ends in one line that names it, and costs no work."""

import json
import shutil
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image

from flatmin.train.checkpoint import checkpoint_paths, load_newest_checkpoint
from flatmin.train.cli import main
from flatmin.train.journal import read_metrics
from flatmin.train.models import build_model
from flatmin.train.sums import EpochSums

SHORT = ["--accelerator=cpu", "--threads=1", "--batch-size=432", "--max-steps=2"]
LONGER = [*SHORT[:-1], "--max-steps=3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("a run") / "its directory"
    assert main(["train", *SHORT, "--output-dir", str(directory)]) == 0
    return directory


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("flatmin: error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to train on")
@pytest.mark.parametrize("command", ["train", "evaluate", "relabel", "sharpness"])
def test_device_that_is_not_there_is_named(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--output-dir", str(run / "new")] if command == "train" else [str(run)]
    error = error_of([command, *place, "--accelerator", "cuda"], capsys, code=1)
    assert error.startswith("accelerator cuda with devices 1 must be on this machine: ")


@pytest.mark.parametrize("command", ["evaluate", "sharpness", "landscape"])
def test_threads_below_one_are_refused(command: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of([command, str(run), "--threads", "0"], capsys, code=2) == "threads must be >= 1, got 0"


@pytest.mark.parametrize(("command", "name"), [("export", "w.pt"), ("export", "w.safetensors"), ("relabel", "l.st")])
def test_results_go_into_a_directory_that_is_not_there_yet(
    command: str, name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new one" / name
    assert main([command, str(run), "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == [name]  # nothing temporary stays
    (tmp_path / "file").touch()
    assert "file" in error_of([command, str(run), "--out", str(tmp_path / "file" / name)], capsys, code=1)


def test_option_that_is_no_yaml_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(["compare", "--methods", "sam", "--options", "sam.p=["], capsys, code=2)
    assert error == "options must look like looksam.interval=10, for a compared method, got sam.p=["


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"lr: fast\n", b"epochs: 2.5\n", b"method_options: [1]\n", b"lr: -1\n"]
)
def test_configuration_that_is_wrong_is_named_with_its_file(
    content: bytes, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_bytes(content)
    assert str(run / "config.yaml") in error_of(["evaluate", str(run)], capsys, code=1)
    assert str(run / "config.yaml") in error_of(["train", "--config", str(run / "config.yaml")], capsys, code=2)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", '{"run_dir": 1}'])
def test_damaged_summary_costs_no_work(text: str, run: Path, finished: Path) -> None:
    (run / "summary.json").write_text(text)
    with pytest.warns(UserWarning, match=r"summary\.json is damaged .*; going on from the newest checkpoint"):
        assert main(["train", *SHORT, "--output-dir", str(run)]) == 0
    ours, theirs = (json.loads((place / "summary.json").read_text()) for place in (run, finished))
    assert ours | {"run_dir": "", "wall_seconds": 0} == theirs | {"run_dir": "", "wall_seconds": 0}
    assert read_metrics(run) == read_metrics(finished)


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
@pytest.mark.parametrize("change", ["another file", "another network"])
def test_checkpoint_that_does_not_fit_is_refused_and_kept(
    command: str, change: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = checkpoint_paths(run)
    state = torch.load(path, weights_only=True)
    if change == "another network":
        state["model"].pop(next(iter(state["model"])))
    torch.save(state if change == "another network" else {"weights": 1}, path)
    kept = path.read_bytes()
    arguments = ["train", *LONGER, "--output-dir", str(run)] if command == "train" else [command, str(run)]
    assert "the newest checkpoint must fit the configuration" in error_of(arguments, capsys, code=1)
    assert path.read_bytes() == kept


def test_checkpoint_that_may_not_be_read_is_not_taken_for_a_damaged_one(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would begin anew, and cut off the metrics."""

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("zipfile.ZipFile", forbidden)
    with pytest.raises(PermissionError, match="Permission denied"):
        load_newest_checkpoint(run)


def test_package_that_is_missed_on_the_way_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    error = error_of(["train", *SHORT, "--output-dir", str(tmp_path)], capsys, code=1)
    assert error == "train needs the package torch.utils.tensorboard: pip install 'flatmin[train]'"


def test_wandb_that_does_not_start_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")

    def refused(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refused)
    error = error_of(["train", *SHORT, "--wandb", "--output-dir", str(tmp_path)], capsys, code=1)
    assert "--wandb could not start Weights & Biases: No API key configured. (WANDB_MODE=offline" in error


def images_file(path: Path, count: int, num_classes: int, side: int = 8) -> list[str]:
    """A file of random images, and the flags that train on it in batches of at most four."""
    draws = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = draws.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % num_classes
    np.savez(path, **arrays)  # type: ignore[arg-type]
    flags = ["train", "--dataset", "file", "--dataset-path", str(path), "--label-noise", "0", "--threads", "1"]
    return [
        *flags,
        "--batch-size",
        str(min(count, 4)),
        "--max-steps",
        "1",
        "--output-dir",
        str(path.parent / "of file"),
    ]


@pytest.mark.parametrize("count", [1, 8])
def test_one_class_and_one_image_are_trained_on(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = images_file(tmp_path / "one class.npz", count, 1)
    noisy = [*command, "--label-noise", "0.4"]
    assert "label_noise must be 0 for these images, got 0.4: num_classes" in error_of(noisy, capsys, code=1)
    asymmetric = [*noisy, "--label-noise-kind", "asymmetric"]
    assert "label_noise must be 0 for these images, got 0.4: num_classes" in error_of(asymmetric, capsys, code=1)
    assert main(command) == 0
    assert json.loads((tmp_path / "of file" / "summary.json").read_text())["eval_error_percent"] == 0.0


def test_too_few_images_to_hold_any_out_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*images_file(tmp_path / "few.npz", 9, 2), "--eval-on", "validation"]
    assert error_of(command, capsys, code=1) == (
        "eval_on must be test for so few images: images must be at least 10 to hold out a tenth, got 9"
    )


@pytest.mark.parametrize(("model", "smallest"), [("small-cnn", 4), ("lenet-5", 12)])
def test_images_too_small_for_the_network_are_refused(
    model: str, smallest: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*images_file(tmp_path / "small.npz", 8, 2, side=smallest - 1), "--model", model]
    assert error_of(command, capsys, code=1) == f"image_size must be >= {smallest} for {model}, got {smallest - 1}"
    assert build_model(model, 2, 3, image_size=smallest)(torch.zeros(2, 3, smallest, smallest)).shape == (2, 2)
    with pytest.raises(
        RuntimeError, match=r"too small|greater than actual input"
    ):  # control: the rule is not too strict
        build_model(model, 2, 3)(torch.zeros(2, 3, smallest - 1, smallest - 1))


def test_folder_without_classes_or_images_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder"
    command = ["train", "--dataset", "folder", "--dataset-path", str(folder), "--output-dir", str(tmp_path / "run")]
    (folder / "test").mkdir(parents=True)
    (folder / "train").mkdir()
    assert str(folder) in error_of(command, capsys, code=1)
    (folder / "train" / "a class").mkdir()
    assert error_of(command, capsys, code=1) == f"{folder}: train_images must be at least one file, got none"


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_damage_that_is_no_os_error_names_its_image(
    num_workers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, name in product(("train", "test"), "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / part / name / "0.bmp")
    broken = tmp_path / "train" / "a" / "0.bmp"
    content = bytearray(broken.read_bytes())
    content[18:26] = np.array([100_000, 100_000], dtype="<i4").tobytes()  # width and height
    broken.write_bytes(content)
    with pytest.raises(Image.DecompressionBombError):  # control
        Image.open(broken)
    flags = ["--image-size", "8", "--batch-size", "2", "--label-noise", "0", "--threads", "1", "--max-steps", "1"]
    place = ["--dataset-path", str(tmp_path), "--output-dir", str(tmp_path / "run"), "--num-workers", num_workers]
    error = error_of(["train", "--dataset", "folder", *place, *flags], capsys, code=1)
    assert error.startswith(
        f"{broken} must be a whole image file, got one that says: Image size (10000000000 pixels) exceeds"
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sums_of_an_epoch_outlive_a_change_in_the_number_of_processes(num_ranks: int) -> None:
    """An elastic launcher starts a run again with the processes that are left."""
    rows = torch.arange(14, dtype=torch.float64).view(2, 7)  # of two processes
    sums = [EpochSums(torch.device("cpu")) for _ in range(num_ranks)]
    for rank, each in enumerate(sums):
        each.restore_(rows, rank, num_ranks)
    torch.testing.assert_close(torch.stack([each.values for each in sums]).sum(dim=0), rows.sum(dim=0))
    if num_ranks == 2:  # bit for bit where the number is the same
        assert all(torch.equal(each.values, row) for each, row in zip(sums, rows, strict=True))
    assert sums[0].gathered(Fabric(accelerator="cpu", devices=1)).shape == (1, 7)
