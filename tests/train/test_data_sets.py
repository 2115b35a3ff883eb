"""Digits, the catalogue, the validation split and label noise."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flatmin.train.data import (
    Augmentation,
    AugmentationOptions,
    AutoAugment,
    ImageSet,
    Normalization,
    RandAugment,
    dataset_facts,
    fashion_mnist,
    flip_labels,
    flip_labels_to,
    label_noise,
    load_images,
    mistaken_for,
    named_augmentation,
    split_validation,
)
from flatmin.train.data.seeding import generator_from


def test_digits_are_those_of_scikit_learn_each_once_with_its_label(tmp_path):
    images = load_images("digits", tmp_path / "absent")
    assert images.train_images.shape == (1297, 8, 8, 1)
    assert images.test_images.shape == (500, 8, 8, 1)
    ours = torch.cat((images.train_images, images.test_images)).flatten(1).tolist()
    labels = torch.cat((images.train_labels, images.test_labels)).tolist()
    source = load_digits()
    scaled = np.rint(source.data * 255 / 16).astype(int).tolist()
    assert sorted(zip(ours, labels, strict=True)) == sorted(zip(scaled, source.target.tolist(), strict=True))
    assert ours != scaled
    assert not (tmp_path / "absent").exists()


def test_digits_are_split_alike_in_every_run(tmp_path):
    first, second = (load_images("digits", tmp_path) for _ in range(2))
    assert torch.equal(first.test_images, second.test_images)
    assert first.test_labels[:8].tolist() == [8, 8, 6, 3, 0, 3, 3, 9]  # results must stay comparable
    assert (first.test_labels.bincount(minlength=10) > 35).all()


def test_digits_have_the_mean_and_deviation_of_the_catalogue(tmp_path):
    pixels = load_images("digits", tmp_path).train_images.double() / 255
    facts = dataset_facts("digits")
    assert facts.normalization == Normalization((round(pixels.mean().item(), 4),), (round(pixels.std().item(), 4),))


@pytest.mark.skipif(not fashion_mnist.DEBIAN_DIR.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_has_the_published_counts_and_statistics(tmp_path):
    images = load_images("fashion-mnist", tmp_path, download=False)
    assert images.train_labels.bincount().tolist() == [6000] * 10
    assert images.test_labels.bincount().tolist() == [1000] * 10
    counts = images.train_images.flatten().bincount(minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts * levels).sum() / counts.sum()
    std = ((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt()
    assert dataset_facts("fashion-mnist").normalization == Normalization(
        (round(mean.item(), 4),), (round(std.item(), 4),)
    )


@pytest.mark.parametrize("name", ["digits", "fashion-mnist", "cifar10", "cifar100"])
def test_named_augmentations_are_none_basic_and_what_is_added(name):
    facts = dataset_facts(name)
    assert named_augmentation("none", facts) == Augmentation()
    basic = named_augmentation("basic", facts)
    if name == "digits":
        assert basic == Augmentation(crop_padding=1, padding_mode="zeros")
    else:
        assert basic == Augmentation(flip=True, crop_padding=4, padding_mode="reflect")
    length = 4 if name == "digits" else 16
    assert named_augmentation("basic+cutout", facts) == dataclasses.replace(basic, cutout_length=length)
    assert named_augmentation("cutout", facts) == Augmentation(cutout_length=length)
    policy = "svhn" if name == "digits" else "cifar"
    everything = named_augmentation("mixup+autoaugment+cutout+basic+cutmix", facts)
    assert everything == dataclasses.replace(
        basic, operations=AutoAugment(policy), mixup_alpha=1.0, cutmix_alpha=1.0, cutout_length=length
    )


def test_options_change_the_parts_they_belong_to():
    facts = dataset_facts("cifar10")
    options = AugmentationOptions(
        padding_mode="zeros",
        cutout_length=8,
        cutout_per="batch",
        autoaugment_policy="imagenet",
        autoaugment_scale="release",
        randaugment_num_ops=3,
        randaugment_level=4,
        mix_alpha=8,
    )
    assert named_augmentation("basic+autoaugment+cutout", facts, options) == Augmentation(
        AutoAugment("imagenet", "release"),
        flip=True,
        crop_padding=4,
        padding_mode="zeros",
        cutout_length=8,
        cutout_per="batch",
    )
    mixed = named_augmentation("mixup+randaugment", facts, options)
    assert (mixed.operations, mixed.mixup_alpha, mixed.cutmix_alpha) == (RandAugment(3, 4, "release"), 8, 0)
    assert (mixed.cutout_length, mixed.flip) == (0, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fmix", "augmentation must be none or some of basic, autoaugment, randaugment, mixup, cutmix, cutout, joined"),
        ("basic+basic", "augmentation must be none or some of .* joined by +, got 'basic+basic'"),
        ("none+basic", "augmentation must be none or some of .* joined by +, got 'none+basic'"),
        ("", "augmentation must be none or some of .* joined by +, got ''"),
        ("autoaugment+randaugment", "augmentation must have autoaugment or randaugment, not both, got"),
    ],
)
def test_unknown_augmentations_are_refused(name, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        named_augmentation(name, dataset_facts("cifar10"))


@pytest.mark.parametrize(("count", "held_out"), [(50_000, 5_000), (60_000, 6_000), (1297, 129), (10, 1)])
def test_validation_is_the_last_tenth(count, held_out):
    images, labels = torch.arange(count), torch.arange(count) + 1
    (train_images, train_labels), (validation_images, validation_labels) = split_validation(images, labels)
    assert torch.equal(validation_images, images[count - held_out :])
    assert torch.equal(validation_labels, labels[count - held_out :])
    assert torch.equal(torch.cat((train_images, validation_images)), images)
    assert torch.equal(torch.cat((train_labels, validation_labels)), labels)


def test_splits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="images and labels must have the same length, got 20 and 19"):
        split_validation(torch.zeros(20), torch.zeros(19))
    with pytest.raises(ValueError, match="images must be at least 10 to hold out a tenth, got 9"):
        split_validation(torch.zeros(9), torch.zeros(9))


def test_labels_must_be_int64_in_an_image_set():
    images = torch.zeros(2, 4, 4, 1, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    ImageSet(images, labels, images, labels, ("a",))
    with pytest.raises(ValueError, match=r"train_labels must have dtype torch.int64, got torch.uint8"):
        ImageSet(images, labels.to(torch.uint8), images, labels, ("a",))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.333, 0.8, 1.0])
@pytest.mark.parametrize("count", [10, 1237])
def test_flipping_changes_exactly_the_stated_number_of_labels(rate, count):
    labels = torch.arange(count) % 10
    before = labels.clone()
    flipped = flip_labels(labels, rate, 10, seed=3)
    assert (flipped != labels).sum() == round(rate * count)
    assert torch.equal(labels, before)
    assert flipped is not labels
    assert flipped.dtype == torch.int64


def test_flipped_labels_are_uniform_over_the_other_classes_and_over_the_examples():
    labels = torch.arange(90_000) % 10
    flipped = flip_labels(labels, 0.5, 10, seed=0)
    pairs = (labels * 10 + flipped)[flipped != labels].bincount(minlength=100).view(10, 10)
    assert (pairs.diagonal() == 0).all()
    others = pairs[~torch.eye(10, dtype=torch.bool)].double()  # 90 cells of expected value 500
    chi_square = ((others - 500) ** 2 / 500).sum()
    assert abs(chi_square - 89) < 5 * math.sqrt(2 * 89)
    by_place = (flipped != labels).view(9, 10_000).sum(dim=1).double()
    assert ((by_place - 5000).abs() < 5 * math.sqrt(10_000 * 0.25)).all()


def test_flips_are_a_function_of_the_seed_alone():
    labels = torch.arange(1000) % 7
    state = torch.get_rng_state()
    first, again, other = (flip_labels(labels, 0.4, 7, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rate", "num_classes", "message"),
    [
        (-0.1, 10, r"rate must be in \[0, 1\], got -0.1"),
        (1.5, 10, r"rate must be in \[0, 1\], got 1.5"),
        (math.nan, 10, r"rate must be in \[0, 1\], got nan"),
        (0.5, 1, "num_classes must be >= 2, got 1"),
        (0.5, 9, r"labels must be in \[0, 9\), got 9"),
    ],
)
def test_label_noise_outside_its_domain_is_refused(rate, num_classes, message):
    with pytest.raises(ValueError, match=message):
        flip_labels(torch.arange(10), rate, num_classes, seed=0)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.45, 1.0])
def test_asymmetric_noise_flips_its_share_of_each_class_to_the_one_target(rate):
    labels = torch.arange(5000) % 10
    targets = mistaken_for(CIFAR10)
    flipped = flip_labels_to(labels, rate, targets, seed=1)
    for label, target in enumerate(targets):
        of_class = flipped[labels == label].bincount(minlength=10)
        num_flipped = round(rate * 500) if target != label else 0
        assert of_class[label] == 500 - num_flipped
        assert of_class[target] == (num_flipped if target != label else 500)
    assert torch.equal(labels, torch.arange(5000) % 10)
    assert torch.equal(flipped, flip_labels_to(labels, rate, targets, seed=1))
    assert torch.equal(flipped, flip_labels_to(labels, rate, targets, seed=2)) == (rate in (0.0, 1.0))
    halves = (flipped != labels).view(2, -1).sum(dim=1).double()
    assert (halves[0] - halves[1]).abs() < 200


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def test_classes_are_mistaken_as_published_and_else_for_the_next():
    pairs = {name: CIFAR10[target] for name, target in zip(CIFAR10, mistaken_for(CIFAR10), strict=True)}
    assert {name: target for name, target in pairs.items() if name != target} == {
        **{"truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"}
    }
    assert mistaken_for(("a", "b", "c")) == [1, 2, 0]
    assert mistaken_for(("truck", "bird", "deer", "cat", "dog")) == [1, 2, 3, 4, 0]  # some, without their targets


def test_classes_of_cifar100_are_mistaken_within_their_superclass():
    for members in label_noise.CIFAR100_SUPERCLASSES:
        assert list(members) == sorted(members)  # the next one is that of the next label
    names = sorted(label_noise.CIFAR100_PAIRS)  # the order of its labels
    targets = mistaken_for(names)
    assert sorted(targets) == list(range(100))
    assert [names[targets[names.index(name)]] for name in ("beaver", "whale", "pickup_truck")] == [
        *("dolphin", "beaver", "train")
    ]
    label = 0
    for _ in range(5):
        label = targets[label]
        assert names[label] in ("apple", "mushroom", "orange", "pear", "sweet_pepper")
    assert label == 0


@pytest.mark.parametrize(
    ("rate", "targets", "message"),
    [
        (1.1, [1, 0], r"rate must be in \[0, 1\], got 1.1"),
        (0.1, [0], "num_classes must be >= 2, got 1"),
        (0.1, [1, 2], r"targets must be in \[0, 2\), got \[1, 2\]"),
        (0.1, [1, 0], r"labels must be in \[0, 2\), got 2"),
    ],
)
def test_asymmetric_noise_outside_its_domain_is_refused(rate, targets, message):
    labels = torch.arange(3) if "labels" in message else torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        flip_labels_to(labels, rate, targets, seed=0)


def test_generators_of_different_keys_are_unrelated():
    keys = [
        (0,),
        (1,),
        (0, 0),
        (0, 1),
        (1, 0),
        (-1,),
        (2**32,),
        (0, 2**32),
        ("a", 0),
        ("b", 0),
    ]  # bad hashes confuse some
    draws = {tuple(torch.randperm(20, generator=generator_from(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)
