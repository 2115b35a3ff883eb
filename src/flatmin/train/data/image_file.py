"""The one file in which a data set is kept: read with suspicion, written all at once."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flatmin.train.atomic_file import replaced_file
from flatmin.train.data.image_set import ImageSet

TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


def read_image_file(path: Path) -> ImageSet:
    """Read a safetensors file of images.

    The file holds the tensors ``train_images`` and ``test_images``, uint8 (N, H, W, C), and ``train_labels`` and
    ``test_labels``, integers (N,); its metadata holds the names of the classes under ``classes``, separated by commas.

    Args:
        path: The file. It is only read.

    Returns:
        Copies of its tensors, in the order of the file.

    Raises:
        ValueError: The file is damaged or breaks a rule; the message names the file, tensor, rule and value.
        OSError: The file cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            present = sorted(file.keys())
            for name in TENSORS:
                if name not in present:
                    raise ValueError(f"{name} must be among its tensors, got {present}")
            classes = (file.metadata() or {}).get("classes", "")
            if not classes:
                raise ValueError("classes must be in its metadata: names separated by commas, got none")
            # Cloned out of the memory map, so that the file may be replaced while a run goes on.
            tensors = {name: file.get_tensor(name).clone() for name in TENSORS}
        for name in ("train_labels", "test_labels"):
            tensors[name] = as_int64(name, tensors[name])
        return ImageSet(**tensors, classes=tuple(classes.split(",")))
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got one that says: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def as_int64(name: str, labels: Tensor) -> Tensor:
    """Convert labels of any integer type to int64; raise ``ValueError`` for any other type."""
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"{name} must have an integer dtype, got {labels.dtype}")
    return labels.long()


def write_image_file(path: Path, images: ImageSet) -> None:
    """Write a file for `read_image_file`, whole or not at all.

    Args:
        path: The file to make or to replace; its directory is made when it is missing.
        images: What to write. Labels are stored as uint8.

    Raises:
        ValueError: There are more than 256 classes, or the name of a class holds a comma.
        OSError: The file cannot be written; an older one stays as it was.
    """
    if images.num_classes > 256 or any("," in name for name in images.classes):
        raise ValueError(f"classes must be at most 256 names without a comma, got {images.classes}")
    tensors = {name: getattr(images, name).contiguous() for name in TENSORS}
    for name in ("train_labels", "test_labels"):
        tensors[name] = tensors[name].to(torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as file:
        file.write(save(tensors, metadata={"classes": ",".join(images.classes)}))
