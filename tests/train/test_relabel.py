"""Bootstrap: the labels that a network gives to its training images train another."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flatmin.train.cli import main
from flatmin.train.config import TrainConfig
from flatmin.train.data import load_images
from flatmin.train.data.normalization import normalized
from flatmin.train.errors import TrainingError
from flatmin.train.images import images_of_split
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.loop import train
from flatmin.train.trained import load_run


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        epochs=4,
        batch_size=64,
        rho=0.5,
        label_noise=0.4,
        eval_on="validation",
        output_dir=tmp_path / "run",
        accelerator="cpu",
        threads=1,
    )


def test_labels_are_the_predictions_on_the_training_images_in_their_order(config: TrainConfig, capsys) -> None:
    train(config)
    assert main(["relabel", str(config.run_dir), "--accelerator", "cpu"]) == 0
    changed, out_of = map(int, capsys.readouterr().out.split(" labels changed")[0].split(" of "))
    path = config.run_dir / "train-labels.safetensors"
    second = replace(config, label_noise=0.0, train_labels=path, output_dir=config.run_dir.parent / "second")
    image_set = load_images("digits", Path())
    images, labels = images_of_split(second, image_set, "train")
    loader = make_loaders(second, make_fabric(second)).train
    pixels = normalized(images, loader.coefficients).permute(0, 3, 1, 2)
    assert torch.equal(labels, load_run(config.run_dir).model(pixels).argmax(dim=1))
    assert torch.equal(loader.labels, labels)
    noisy, right = images_of_split(config, image_set, "train")[1], image_set.train_labels[: len(labels)]
    assert (changed, out_of) == ((labels != noisy).sum(), len(labels))
    assert (labels != right).double().mean() < 0.5 * (noisy != right).double().mean()  # it is good for something
    assert torch.equal(images_of_split(second, image_set, "validation")[1], image_set.train_labels[len(labels) :])
    train(second)
    with pytest.raises(TrainingError, match="is no file of labels for this run: it must be written for .*'test'"):
        train(replace(second, eval_on="test", output_dir=config.run_dir.parent / "third"))


def test_missing_and_damaged_files_are_refused_by_name(config: TrainConfig, tmp_path: Path) -> None:
    for content in (None, b"nothing"):
        path = tmp_path / "labels.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TrainingError, match=f"{path} is no file of labels for this run"):
            train(replace(config, label_noise=0.0, train_labels=path))


def test_noise_on_top_of_other_labels_is_refused(config: TrainConfig) -> None:
    with pytest.raises(ValueError, match="label_noise must be 0 where train_labels replaces the labels, got 0.4"):
        replace(config, train_labels=Path("labels.safetensors"))


def test_asymmetric_noise_reaches_the_training_labels_alone(config: TrainConfig) -> None:
    config = replace(config, label_noise_kind="asymmetric")
    image_set = load_images("digits", Path())
    labels = images_of_split(config, image_set, "train")[1]
    right = image_set.train_labels[: len(labels)]
    wrong = labels != right
    assert wrong.double().mean().item() == pytest.approx(0.4, abs=5e-3)
    assert torch.equal(labels[wrong], (right[wrong] + 1) % 10)
    assert torch.equal(images_of_split(config, image_set, "test")[1], image_set.test_labels)
