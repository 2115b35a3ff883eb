"""Find a data set: in its file, where the system keeps it, or on the network."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flatmin.train.data import fashion_mnist
from flatmin.train.data.catalogue import DatasetName, dataset_facts
from flatmin.train.data.digits import read_digits
from flatmin.train.data.image_file import read_image_file, write_image_file
from flatmin.train.data.image_set import ImageSet
from flatmin.train.data.seeding import generator_from
from flatmin.train.errors import one_line

TORCHVISION_CLASSES = {"fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}

SVHN_SPLITS = {"svhn": ("train", "test"), "svhn-extra": ("extra", "train", "test")}


def load_images(name: DatasetName, data_dir: Path, *, download: bool = True) -> ImageSet:
    """Load a data set.

    ``digits`` comes with scikit-learn. Any other is kept as the one file ``<data_dir>/<name>.safetensors``: tensors
    ``train_images`` and ``test_images``, uint8 (N, H, W, C); ``train_labels`` and ``test_labels``, integers (N,); and
    the class names, separated by commas, as metadata ``classes``. Where it lies, nothing is downloaded. Fashion-MNIST
    is also found where Debian's package ``dataset-fashion-mnist`` puts it. Else torchvision downloads the set, and the
    file is written. Replicas that share ``data_dir`` may all call this, but it is cheaper to let one go first.

    Training and test images are put in one fixed random order each, the same in every run, because a file may be sorted
    by class: then `split_validation`, which takes the last of them, is a random split, and the first batches of an
    evaluation hold every class. The extra images of SVHN come before the others, so that none is held out.

    Args:
        name: Which data set.
        data_dir: Directory of the files. It is made when a download succeeds.
        download: Whether the network may be used.

    Returns:
        The images, on the CPU.

    Raises:
        FileNotFoundError: There is no file and no download; the message says what to put where.
        ValueError: There is no such data set, or the file is damaged; the message names the file, the tensor, the rule
            and the value. The file is left as it is.
    """
    facts = dataset_facts(name)
    path = data_dir / f"{name}.safetensors"
    if name == "digits":
        return read_digits()
    if path.exists():
        images = read_image_file(path)
    elif name == "fashion-mnist" and fashion_mnist.DEBIAN_DIR.is_dir():
        path = fashion_mnist.DEBIAN_DIR
        images = fashion_mnist.read_idx_files(path)
    else:
        images = downloaded(name, path, download=download)
        write_image_file(path, images)
    try:
        facts.check(images)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return in_random_order(images, facts.num_extra)


def in_random_order(images: ImageSet, num_extra: int = 0) -> ImageSet:
    """Put training and test images in one fixed random order each, the first ``num_extra`` to train on in front."""
    generator = generator_from("training images")
    parts = [torch.randperm(count, generator=generator) for count in (num_extra, len(images.train_labels) - num_extra)]
    order = torch.cat((parts[0], parts[1] + num_extra))
    test_order = torch.randperm(len(images.test_labels), generator=generator_from("test images"))
    return ImageSet(
        images.train_images[order],
        images.train_labels[order],
        images.test_images[test_order],
        images.test_labels[test_order],
        images.classes,
    )


def downloaded(name: DatasetName, path: Path, *, download: bool) -> ImageSet:
    """Fetch a data set with torchvision, which compares the published checksums, by way of a temporary directory."""
    from torchvision import datasets  # noqa: PLC0415 - it takes two seconds, which only a download is worth

    try:
        if not download:
            raise RuntimeError("downloads are switched off")
        with TemporaryDirectory() as directory:
            if name in SVHN_SPLITS:
                splits = [datasets.SVHN(directory, split, download=True) for split in SVHN_SPLITS[name]]
                return svhn_images([(split.data, split.labels) for split in splits])
            dataset = getattr(datasets, TORCHVISION_CLASSES[name])
            train, test = (dataset(directory, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        height, width, channels = dataset_facts(name).image_shape
        package = " or install Debian's package dataset-fashion-mnist" if name == "fashion-mnist" else ""
        raise FileNotFoundError(
            f"{name} could not be downloaded ({reason}): put it at {path}, one safetensors file with uint8 tensors "
            f"train_images and test_images of shape (N, {height}, {width}, {channels}), integer tensors train_labels "
            f'and test_labels of shape (N,), and the class names, separated by commas, as metadata "classes"{package}'
        ) from error
    parts = [torch.as_tensor(part) for split in (train, test) for part in (split.data, split.targets)]
    train_images, train_labels, test_images, test_labels = parts
    shape = (-1, *dataset_facts(name).image_shape)  # torchvision leaves out the channel of grey images
    return ImageSet(
        train_images.view(shape), train_labels.long(), test_images.view(shape), test_labels.long(), tuple(train.classes)
    )


def svhn_images(splits: Sequence[tuple[Any, Any]]) -> ImageSet:
    """Put together what torchvision reads of SVHN: arrays (N, 3, 32, 32) and (N,), those of the test last."""
    images = [torch.as_tensor(split).permute(0, 2, 3, 1) for split, _ in splits]
    labels = [torch.as_tensor(split).long() for _, split in splits]
    names = tuple(str(digit) for digit in range(10))
    return ImageSet(torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1], names)
