"""A data set is downloaded once, kept as one file, and asked for in one sentence where it cannot be had."""

import hashlib
import os
import urllib.error
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from cifar_tensors import CIFAR10_CLASSES, cifar_tensors
from safetensors.torch import save_file
from scipy.io import loadmat, savemat
from torchvision import datasets

from flatmin.train.data import catalogue, dataset_facts, load, load_images, split_validation
from flatmin.train.data.image_file import read_image_file


class FakeCIFAR:
    """What torchvision's data set shows of itself, from memory."""

    classes = CIFAR10_CLASSES.split(",")
    calls = 0

    def __init__(self, root, train, download):
        assert download
        type(self).calls += 1
        tensors, part = cifar_tensors(), "train" if train else "test"
        self.data = tensors[f"{part}_images"].numpy()
        self.targets = tensors[f"{part}_labels"].tolist()


class FakeFashionMNIST(FakeCIFAR):
    def __init__(self, root, train, download):
        super().__init__(root, train, download)
        self.data = torch.from_numpy(self.data)[:, :28, :28, 0].contiguous()
        self.targets = torch.tensor(self.targets)


@pytest.mark.parametrize(
    ("name", "fake", "shape"), [("cifar10", FakeCIFAR, (32, 32, 3)), ("fashion-mnist", FakeFashionMNIST, (28, 28, 1))]
)
def test_a_download_is_kept_as_one_file_and_not_repeated(tmp_path, monkeypatch, name, fake, shape):
    monkeypatch.setattr(datasets, load.TORCHVISION_CLASSES[name], fake)
    monkeypatch.setattr("flatmin.train.data.fashion_mnist.DEBIAN_DIR", tmp_path / "none")
    monkeypatch.setattr(fake, "calls", 0)
    data_dir = tmp_path / "new" / "data"
    first = load_images(name, data_dir)
    assert fake.calls == 2
    assert os.listdir(data_dir) == [f"{name}.safetensors"]
    stored = read_image_file(data_dir / f"{name}.safetensors")
    expected = cifar_tensors()["train_images"][:, : shape[0], : shape[1], : shape[2]]
    assert torch.equal(stored.train_images, expected)
    assert torch.equal(stored.test_labels, cifar_tensors()["test_labels"].long())
    second = load_images(name, data_dir)
    assert fake.calls == 2
    assert torch.equal(first.train_images, second.train_images)
    assert first.classes == second.classes == tuple(fake.classes)


@pytest.fixture
def svhn_dir(tmp_path, monkeypatch):
    """Small files in SVHN's own format, where torchvision looks for its downloads."""
    monkeypatch.setattr(load, "TemporaryDirectory", lambda: nullcontext(str(tmp_path)))
    split_list = {}
    for number, (split, count) in enumerate({"train": 40, "extra": 70, "test": 20}.items()):
        images = np.random.default_rng(number).integers(256, size=(32, 32, 3, count), dtype=np.uint8)
        images[0, 0, 0] = np.arange(count) % 10
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": images, "y": (np.arange(count) % 10)[:, None] + 10 * (np.arange(count)[:, None] % 10 == 0)})
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        split_list[split] = [f"http://{split}", path.name, md5]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return tmp_path


@pytest.mark.parametrize(("name", "num_extra"), [("svhn", 0), ("svhn-extra", 70)])
def test_svhn_is_read_from_its_own_files_with_the_extra_images_in_front(svhn_dir, monkeypatch, name, num_extra):
    facts = replace(dataset_facts(name), num_extra=num_extra)
    monkeypatch.setitem(catalogue.CATALOGUE, name, facts)
    images = load_images(name, svhn_dir / "data")
    assert len(images.train_labels) == 40 + num_extra
    for part in ("train", "test"):
        pixels, labels = getattr(images, f"{part}_images"), getattr(images, f"{part}_labels")
        assert torch.equal(pixels[:, 0, 0, 0].long(), labels)  # the label 10 of the file is the digit 0
    extra = loadmat(svhn_dir / "extra_32x32.mat")["X"].transpose(3, 0, 1, 2)
    ours = images.train_images[:num_extra].flatten(1).tolist()
    assert sorted(ours) == sorted(extra.reshape(70, -1).tolist() if num_extra else [])
    assert ours != extra.reshape(70, -1).tolist()
    (_, kept), (held_out, _) = split_validation(images.train_images, images.train_labels, num_extra)
    assert (len(kept), len(held_out)) == (36 + num_extra, 4)
    assert torch.equal(load_images(name, svhn_dir / "data", download=False).train_images, images.train_images)


def test_an_image_file_without_more_than_its_extra_images_is_refused(tmp_path):
    save_file(cifar_tensors(), tmp_path / "svhn-extra.safetensors", metadata={"classes": CIFAR10_CLASSES})
    with pytest.raises(ValueError, match="train_images must be more than 531131, got 50"):
        load_images("svhn-extra", tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), RuntimeError("Error downloading:\nTried x, got:\nno route to host")],
)
def test_without_network_and_file_one_sentence_says_what_to_put_where(tmp_path, monkeypatch, name, error):
    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, load.TORCHVISION_CLASSES[name], unreachable)
    monkeypatch.setattr("flatmin.train.data.fashion_mnist.DEBIAN_DIR", tmp_path / "none")
    data_dir = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match="no route to host") as caught:
        load_images(name, data_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert f"put it at {data_dir / name}.safetensors, one safetensors file with uint8 tensors" in message
    assert f"(N, {', '.join(map(str, dataset_facts(name).image_shape))})" in message
    assert ("dataset-fashion-mnist" in message) == (name == "fashion-mnist")
    assert not data_dir.exists()


def test_a_download_that_is_switched_off_is_not_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR100", pytest.fail)
    with pytest.raises(FileNotFoundError, match="downloads are switched off"):
        load_images("cifar100", tmp_path, download=False)
