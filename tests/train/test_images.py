"""Which images a run has, and with which labels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flatmin.train.config import TrainConfig
from flatmin.train.data import load_images
from flatmin.train.errors import TrainingError
from flatmin.train.images import images_of_split
from flatmin.train.loop import train


def test_label_noise_is_in_the_training_labels_alone(config: TrainConfig) -> None:
    image_set = load_images("digits", Path())
    config = replace(config, eval_on="validation")
    _, noisy = images_of_split(config, image_set, "train")
    _, right = images_of_split(replace(config, label_noise=0.0), image_set, "train")
    assert (noisy != right).double().mean().item() == pytest.approx(0.4, abs=1e-3)
    assert torch.equal(right, image_set.train_labels[: len(right)])
    assert torch.equal(images_of_split(config, image_set, "validation")[1], image_set.train_labels[len(right) :])
    assert torch.equal(images_of_split(config, image_set, "test")[1], image_set.test_labels)


def test_a_part_of_the_training_images_is_the_same_for_every_run(config: TrainConfig) -> None:
    image_set = load_images("digits", Path())
    config = replace(config, num_train_images=100, label_noise=0.0, eval_on="validation")
    images, labels = images_of_split(config, image_set, "train")
    places = [(image_set.train_images == image).flatten(1).all(dim=1).nonzero()[0].item() for image in images]
    assert len(images) == len(set(places)) == 100
    assert torch.equal(image_set.train_labels[places], labels)
    assert max(places) < len(image_set.train_labels) * 9 // 10 + 1
    assert torch.equal(images, images_of_split(replace(config, seed=7), image_set, "train")[0])
    assert labels.bincount().min() >= 3  # drawn over the whole set
    assert len(images_of_split(config, image_set, "validation")[1]) == len(image_set.train_labels) // 10
    noisy = images_of_split(replace(config, label_noise=0.4), image_set, "train")[1]
    assert (noisy != labels).sum() == 40
    assert train(replace(config, batch_size=50, max_epochs=1)).steps == 2
    with pytest.raises(TrainingError, match="num_train_images must be <= 1168, got 2000"):
        images_of_split(replace(config, num_train_images=2000), image_set, "train")


def test_validation_images_that_were_trained_on_are_refused(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match="trained on the validation images: it needs --eval-on validation"):
        images_of_split(config, load_images("digits", Path()), "validation")
