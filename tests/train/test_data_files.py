"""The one file of a data set is read strictly, written all at once, and in one fixed order."""

import math
import os
from dataclasses import replace

import pytest
import torch
from cifar_tensors import CIFAR10_CLASSES, cifar_tensors
from safetensors import safe_open
from safetensors.torch import save_file

from flatmin.train.data import load_images
from flatmin.train.data.image_file import read_image_file, write_image_file


@pytest.fixture
def cifar_file(tmp_path):
    path = tmp_path / "cifar10.safetensors"
    save_file(cifar_tensors(), path, metadata={"classes": CIFAR10_CLASSES})
    return path


def test_a_file_is_read_as_it_was_saved(cifar_file):
    images = read_image_file(cifar_file)
    expected = cifar_tensors()
    for name in ("train_images", "test_images"):
        assert torch.equal(getattr(images, name), expected[name])
    for name in ("train_labels", "test_labels"):
        assert getattr(images, name).dtype == torch.int64
        assert torch.equal(getattr(images, name), expected[name].long())
    assert images.classes == tuple(CIFAR10_CLASSES.split(","))
    assert (images.num_classes, images.num_channels) == (10, 3)


def test_what_is_read_does_not_depend_on_the_file_any_more(cifar_file):
    images = read_image_file(cifar_file)
    cifar_file.write_bytes(bytes(cifar_file.stat().st_size))
    assert torch.equal(images.test_images, cifar_tensors()["test_images"])


def test_a_written_file_reads_back_equal_and_replaces_the_old_one(cifar_file, tmp_path):
    images = read_image_file(cifar_file)
    fewer = replace(images, train_images=images.train_images[:30], train_labels=images.train_labels[:30])
    write_image_file(cifar_file, fewer)
    again = read_image_file(cifar_file)
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert torch.equal(getattr(again, name), getattr(fewer, name))
    assert again.classes == images.classes
    with safe_open(cifar_file, framework="pt") as file:
        assert file.get_tensor("train_labels").dtype == torch.uint8
    assert os.listdir(tmp_path) == ["cifar10.safetensors"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(cifar_file, tmp_path, monkeypatch, failing):
    images, before = read_image_file(cifar_file), cifar_file.read_bytes()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        write_image_file(cifar_file, images)
    assert os.listdir(tmp_path) == ["cifar10.safetensors"]
    assert cifar_file.read_bytes() == before


def test_a_class_name_that_the_file_cannot_hold_is_refused(cifar_file):
    images = read_image_file(cifar_file)
    with pytest.raises(ValueError, match="classes must be at most 256 names without a comma, got"):
        write_image_file(cifar_file, replace(images, classes=("cat, or dog", *images.classes[1:])))
    with pytest.raises(ValueError, match="classes must be at most 256 names without a comma, got"):
        write_image_file(cifar_file, replace(images, classes=tuple(map(str, range(257)))))


@pytest.mark.parametrize("length", [0, 5, 8, 100, 4000, -1])
def test_a_truncated_file_is_refused_and_kept(cifar_file, length):
    content = cifar_file.read_bytes()[:length]
    cifar_file.write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole safetensors file, got one that says: ") as caught:
        load_images("cifar10", cifar_file.parent)
    assert str(cifar_file) in str(caught.value)
    assert cifar_file.read_bytes() == content


@pytest.mark.parametrize("position", [0, 7, 9, 30])
def test_a_file_with_a_damaged_header_is_refused_and_kept(cifar_file, position):
    content = bytearray(cifar_file.read_bytes())
    content[position] ^= 0xFF
    cifar_file.write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole safetensors file, got one that says: ") as caught:
        load_images("cifar10", cifar_file.parent)
    assert str(cifar_file) in str(caught.value)
    assert cifar_file.read_bytes() == content


def with_label(name: str, value: int):
    def change(tensors):
        labels = tensors[name].to(torch.int16)
        labels[3] = value
        tensors[name] = labels

    return change


BROKEN = [
    (lambda t: t.pop("test_labels"), "test_labels must be among its tensors, got ['test_images', 'train_images', 'tr"),
    (with_label("train_labels", 10), "train_labels must be in [0, 10), got 10"),
    (with_label("test_labels", -1), "test_labels must be in [0, 10), got -1"),
    (
        lambda t: t.update(train_labels=t["train_labels"].float()),
        "train_labels must have an integer dtype, got torch.f",
    ),
    (lambda t: t.update(test_labels=t["test_labels"].bool()), "test_labels must have an integer dtype, got torch.bool"),
    (
        lambda t: t.update(train_labels=t["train_labels"][:49].clone()),
        "train_labels must have shape (50,), one for each",
    ),
    (
        lambda t: t.update(test_labels=t["test_labels"][:, None].clone()),
        "test_labels must have shape (20,), one for each",
    ),
    (
        lambda t: t.update(train_images=t["train_images"].float()),
        "train_images must have dtype torch.uint8, got torch.fl",
    ),
    (
        lambda t: t.update(test_images=t["test_images"][:, 0].clone()),
        "test_images must have shape (N, H, W, 1) or (N, H",
    ),
    (
        lambda t: t.update(test_images=t["test_images"][:0].clone()),
        "test_images must have shape (N, H, W, 1) or (N, H, W",
    ),
    (
        lambda t: t.update(train_images=t["train_images"].mT[..., :2].contiguous()),
        "train_images must have shape (N, H,",
    ),
    (
        lambda t: t.update(test_images=t["test_images"][:, :8].clone()),
        "test_images must have the size of train_images, g",
    ),
    (
        lambda t: t.update({name: t[name][:, :8].clone() for name in ("train_images", "test_images")}),
        "train_images must have shape (N, 32, 32, 3), got (N, 8, 32, 3)",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_file_that_breaks_a_rule_is_refused_by_name_and_kept(cifar_file, damage, message):
    tensors = cifar_tensors()
    damage(tensors)
    save_file(tensors, cifar_file, metadata={"classes": CIFAR10_CLASSES})
    before = cifar_file.read_bytes()
    with pytest.raises(ValueError, match="must") as caught:
        load_images("cifar10", cifar_file.parent)
    assert str(caught.value).startswith(f"{cifar_file}: {message}")
    assert cifar_file.read_bytes() == before


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "classes must be in its metadata: names separated by commas, got none"),
        ({"classes": ""}, "classes must be in its metadata: names separated by commas, got none"),
        ({"classes": ",".join(map(str, range(100)))}, "classes must be 10 names, got 100"),
    ],
)
def test_a_file_with_the_wrong_classes_is_refused(cifar_file, metadata, message):
    save_file(cifar_tensors(), cifar_file, metadata=metadata)
    with pytest.raises(ValueError, match="classes must") as caught:
        load_images("cifar10", cifar_file.parent)
    assert str(caught.value) == f"{cifar_file}: {message}"


def test_training_images_come_in_one_fixed_random_order_with_their_labels(cifar_file):
    images = load_images("cifar10", cifar_file.parent)
    order = images.train_images[:, 0, 1, 0].tolist()
    assert sorted(order) == list(range(50))
    assert order[:6] == [26, 5, 22, 35, 19, 8]  # results must stay comparable
    assert torch.equal(images.train_images[:, 0, 0, 0].long(), images.train_labels)
    assert torch.equal(load_images("cifar10", cifar_file.parent).train_images, images.train_images)


def test_test_images_come_in_one_fixed_random_order_with_their_labels(cifar_file):
    images = load_images("cifar10", cifar_file.parent)
    order = images.test_images[:, 0, 1, 0].tolist()
    assert sorted(order) == list(range(20))
    assert order[:6] == [10, 1, 9, 4, 5, 7]  # results must stay comparable
    assert torch.equal(images.test_images[:, 0, 0, 0].long(), images.test_labels)
    assert torch.equal(load_images("cifar10", cifar_file.parent).test_images, images.test_images)


def test_the_first_batches_of_an_evaluation_hold_every_class_about_equally(tmp_path):
    tensors = cifar_tensors(num_test=5000)
    save_file(tensors, tmp_path / "cifar10.safetensors", metadata={"classes": CIFAR10_CLASSES})
    counts = load_images("cifar10", tmp_path).test_labels[:500].bincount(minlength=10)
    assert ((counts - 50).abs() < 4 * math.sqrt(500 * 0.1 * 0.9)).all(), counts
    assert (tensors["test_labels"][:500].bincount(minlength=10) == 0).any()  # the control


def test_the_last_tenth_of_a_sorted_file_holds_every_class_about_equally(tmp_path):
    tensors = cifar_tensors(num_train=5000)
    save_file(tensors, tmp_path / "cifar10.safetensors", metadata={"classes": CIFAR10_CLASSES})
    counts = load_images("cifar10", tmp_path).train_labels[-500:].bincount(minlength=10)
    assert ((counts - 50).abs() < 4 * math.sqrt(500 * 0.1 * 0.9)).all(), counts


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dataset must be one of digits, fashion-mnist, cifar10, .*, got 'mnist'"):
        load_images("mnist", tmp_path)
