"""Labelled image files of any size, and the stream of equal-sized crops that workers read from them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flatmin.train.data.image_set import check_labels
from flatmin.train.data.seeding import generator_from

Key = tuple[int, tuple[int, int] | None]  # an image, and the seed and epoch of its random crop
Box = tuple[int, int, int, int]  # left, top, right, bottom


class ImageFiles:
    """N image files.

    Args:
        paths: Where they are.
    """

    def __init__(self, paths: Sequence[Path | str] | NDArray[np.str_]) -> None:
        self.paths = np.asarray(paths, dtype=np.str_)  # one block, which workers share after a fork

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, images: slice | Tensor) -> "ImageFiles":
        return ImageFiles(self.paths[images if isinstance(images, slice) else images.numpy()])


@dataclass(frozen=True, eq=False)
class FileSet:
    """Image files and labels of a training and a test set, checked when it is made.

    Args:
        train_images: N files.
        train_labels: int64 (N,), each in [0, num_classes).
        test_images: M files.
        test_labels: int64 (M,), each in [0, num_classes).
        classes: Names of the classes, in the order of the labels.

    Raises:
        ValueError: There are no images, or labels break one of these rules.
    """

    train_images: ImageFiles
    train_labels: Tensor
    test_images: ImageFiles
    test_labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            num_images = len(getattr(self, f"{part}_images"))
            if num_images == 0:
                raise ValueError(f"{part}_images must be at least one file, got none")
            check_labels(f"{part}_labels", getattr(self, f"{part}_labels"), num_images, len(self.classes))

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


class ImageStream:
    """Crops of image files, decoded by workers: a source of images for the loaders.

    The crop of an image is a function of seed, epoch and image, so that neither the number of workers nor where an
    epoch begins changes it. Workers start anew for each epoch and evaluation.

    A damaged or missing file raises ``OSError`` when its batch is due; the message names it.

    Args:
        files: The files, of any size and colour mode.
        image_size: Side of the square images that come out.
        device: Where they go.
        num_workers: Processes that read; 0 reads in this one.
        random_crop: Train on random crops of 8 to 100 % of the area and 3:4 to 4:3; else on the centre.

    References:
        Szegedy et al. (2015), arXiv:1409.4842, section 6; google-research/sam, ``dataset_source_imagenet.py``:
        bicubic, and for evaluation the share size / (size + 32) of the shorter side.
    """

    def __init__(
        self, files: ImageFiles, *, image_size: int, device: torch.device, num_workers: int = 0, random_crop: bool
    ) -> None:
        self.files = files
        self.shape = (image_size, image_size, 3)
        self.device = device
        self.num_workers = num_workers
        self.random_crop = random_crop

    def __len__(self) -> int:
        return len(self.files)

    def train_batches(
        self, order: Tensor, parts: Sequence[slice], key: tuple[int, int]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the images of each part of ``order``, cropped at random if that is wished."""
        crop = key if self.random_crop else None
        for images in self._batches([[(index, crop) for index in order[part].tolist()] for part in parts]):
            yield images, torch.arange(len(images), device=self.device)

    def eval_batches(self, parts: Sequence[slice]) -> Iterator[Tensor]:
        """Iterate over the centres of ``parts`` of the images."""
        return self._batches([[(index, None) for index in range(part.start, part.stop)] for part in parts])

    def _batches(self, keys: list[list[Key]]) -> Iterator[Tensor]:
        loader = DataLoader(
            CropReader(self.files, self.shape[0]),
            batch_sampler=keys,
            num_workers=self.num_workers,
            collate_fn=stacked,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws the seed of its workers from the global one
        )
        for images in loader:
            if isinstance(images, str):
                raise OSError(images)
            yield images.to(self.device, non_blocking=True)


def stacked(crops: list[Tensor | str]) -> Tensor | str:
    """Put crops together, or return the first sentence that stands for one: an error would lose it in a worker."""
    damaged = [crop for crop in crops if isinstance(crop, str)]
    return damaged[0] if damaged else torch.stack([crop for crop in crops if isinstance(crop, Tensor)])


class CropReader(Dataset[Tensor | str]):
    """Square crops of image files, uint8 (size, size, 3), or a sentence on what is wrong with a file."""

    def __init__(self, files: ImageFiles, size: int) -> None:
        self.files = files
        self.size = size

    def __getitem__(self, key: Key) -> Tensor | str:
        index, crop = key
        path = str(self.files.paths[index])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (
            Exception
        ) as error:  # an OSError nearly always; PIL has others for some damage, and for sizes beyond reason
            return f"{path} must be a whole image file, got one that says: {error}"
        box = centre_box(image.size, self.size)
        if crop is not None:
            box = random_box(image.size, generator_from("crop", *crop, index))
        resized = image.crop(box).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized))


def random_box(size: tuple[int, int], generator: torch.Generator) -> Box:
    """Draw a crop of an image of ``size`` = (width, height).

    Ten times a share of the area is drawn, uniform in [0.08, 1], and a ratio of width to height, log-uniform in
    [3/4, 4/3], until such a box fits; its place is uniform. Else it is the largest box in the middle with a ratio in
    that range. This is torchvision's ``RandomResizedCrop``, with a generator.
    """
    width, height = size
    for _ in range(10):
        area, ratio, *place = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
        area = (0.08 + 0.92 * area) * width * height
        ratio = math.exp((2 * ratio - 1) * math.log(4 / 3))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = int(place[0] * (width - box_width + 1)), int(place[1] * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width, box_height = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def centre_box(size: tuple[int, int], image_size: int) -> Box:
    """Return the square in the middle of an image of ``size`` = (width, height) that is evaluated."""
    width, height = size
    side = max(int(image_size / (image_size + 32) * min(width, height)), 1)
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    return left, top, left + side, top + side
