"""Sets of image files: a directory per class, or the layout in which a published set comes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flatmin.train.data.catalogue import DatasetName
from flatmin.train.data.image_files import FileSet, ImageFiles
from flatmin.train.data.seeding import generator_from
from flatmin.train.errors import one_line

TEST_FOLDERS = ("test", "val", "validation", "valid")

Samples = tuple[list[str], list[int]]


def load_files(name: DatasetName, directory: Path, *, download: bool = True) -> FileSet:
    """Find the files of a data set and put them in one fixed random order, as `load_images` does.

    Args:
        name: ``folder`` and ``imagenet``: directories ``train`` and ``test`` (or ``val``, ``validation``, ``valid``) in
            ``directory``, with a directory per class in each. ``birdsnap``: its directory ``images`` and its list
            ``test_images.txt``. Any other: as torchvision downloads and keeps it.
        directory: Where the set is, or is downloaded to.
        download: Whether the network may be used.

    Raises:
        FileNotFoundError: The set, or a part of it, is not there and cannot be downloaded.
        ValueError: The parts do not fit each other.
    """
    if name in ("folder", "imagenet"):
        files = read_folder(directory)
    elif name == "birdsnap":
        files = read_birdsnap(directory)
    else:
        files = read_torchvision(name, directory, download=download)
    orders = [
        torch.randperm(len(labels), generator=generator_from(part))
        for part, labels in (("training images", files.train_labels), ("test images", files.test_labels))
    ]
    train, test = orders
    return FileSet(
        files.train_images[train],
        files.train_labels[train],
        files.test_images[test],
        files.test_labels[test],
        files.classes,
    )


def train_classes(directory: Path) -> list[str]:
    """List the directories in ``directory/train``, which are the classes.

    Raises:
        FileNotFoundError: There are none.
    """
    classes = directories_in(directory / "train") if (directory / "train").is_dir() else []
    if not classes:
        raise FileNotFoundError(f"{directory} must hold a directory train with a directory per class")
    return classes


def directories_in(directory: Path) -> list[str]:
    """Names of the directories in a directory, sorted."""
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir())


def read_folder(directory: Path) -> FileSet:
    """Read a directory with a directory per class in ``train`` and in ``test``, or what that is called."""
    test = next((directory / name for name in TEST_FOLDERS if (directory / name).is_dir()), None)
    if test is None or not (directory / "train").is_dir():
        raise FileNotFoundError(f"{directory} must hold the directories train and one of {', '.join(TEST_FOLDERS)}")
    classes = train_classes(directory)
    test_classes = directories_in(test)
    if not set(test_classes) <= set(classes):
        raise ValueError(f"{test} must hold classes of train, got {sorted(set(test_classes) - set(classes))}")
    return file_set(samples_in(directory / "train", classes), samples_in(test, classes), tuple(classes))


def samples_in(directory: Path, classes: list[str]) -> Samples:
    """List the images of a directory per class."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # noqa: PLC0415 - two seconds

    labels = {name: label for label, name in enumerate(classes)}
    pairs = make_dataset(str(directory), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    return [path for path, _ in pairs], [label for _, label in pairs]


def read_birdsnap(directory: Path) -> FileSet:
    """Read Birdsnap: ``images/SPECIES/FILE``, those of the test listed in ``test_images.txt``, a path a line.

    References:
        Berg et al. (2014), Birdsnap: Large-Scale Fine-Grained Visual Categorization of Birds. Its images are to be had
        by a script that comes with the lists; some addresses are dead by now, and so files listed may be missing.
    """
    listing = directory / "test_images.txt"
    if not listing.is_file() or not (directory / "images").is_dir():
        raise FileNotFoundError(f"{directory} must hold the directory images and the list test_images.txt of Birdsnap")
    in_test = {line.strip() for line in listing.read_text().splitlines()}
    classes = directories_in(directory / "images")
    paths, labels = samples_in(directory / "images", classes)
    parts: dict[bool, Samples] = {True: ([], []), False: ([], [])}
    for path, label in zip(paths, labels, strict=True):
        part = parts[Path(path).relative_to(directory / "images").as_posix() in in_test]
        part[0].append(path)
        part[1].append(label)
    return file_set(parts[False], parts[True], tuple(classes))


def read_torchvision(name: str, directory: Path, *, download: bool) -> FileSet:
    """Read a set that torchvision knows; it downloads what is missing, where the publisher still offers it."""
    from torchvision import datasets  # noqa: PLC0415

    def opened(cls: Callable[..., Any], split: str, **options: str) -> Any:
        try:
            return cls(str(directory), split=split, **options, download=False)
        except RuntimeError:  # it is not there
            if not download:
                raise
            directory.mkdir(parents=True, exist_ok=True)
            return cls(str(directory), split=split, **options, download=True)

    try:
        if name == "flowers":
            parts = [opened(datasets.Flowers102, split) for split in ("train", "val", "test")]
        elif name == "fgvc-aircraft":
            parts = [opened(datasets.FGVCAircraft, split, annotation_level="variant") for split in ("trainval", "test")]
        elif name == "oxford-pets":
            parts = [opened(datasets.OxfordIIITPet, split) for split in ("trainval", "test")]
        elif name == "food-101":
            parts = [opened(datasets.Food101, split) for split in ("train", "test")]
        else:
            parts = [opened(datasets.StanfordCars, split) for split in ("train", "test")]
    except (OSError, RuntimeError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is not in {directory}, where it must lie as torchvision keeps it, and could not be downloaded "
            f"({one_line(error)})"
        ) from error
    *train, test = [samples_of(part) for part in parts]
    joined = [path for paths, _ in train for path in paths], [label for _, labels in train for label in labels]
    return file_set(joined, test, classes_of(parts[-1], joined[1] + test[1]))


def samples_of(dataset: Any) -> Samples:
    """Paths and labels of one of torchvision's data sets, which keep them in private lists."""
    if hasattr(dataset, "_samples"):
        return [str(path) for path, _ in dataset._samples], [int(label) for _, label in dataset._samples]
    paths = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
    return [str(path) for path in paths], [int(label) for label in dataset._labels]


def classes_of(dataset: Any, labels: list[int]) -> tuple[str, ...]:
    """Names of the classes, or their numbers where torchvision has no names."""
    names = getattr(dataset, "classes", None) or range(max(labels) + 1)
    return tuple(str(name) for name in names)


def file_set(train: Samples, test: Samples, classes: tuple[str, ...]) -> FileSet:
    """Put paths and labels together."""
    (train_paths, train_labels), (test_paths, test_labels) = train, test
    return FileSet(
        ImageFiles(train_paths),
        torch.tensor(train_labels, dtype=torch.int64),
        ImageFiles(test_paths),
        torch.tensor(test_labels, dtype=torch.int64),
        classes,
    )
