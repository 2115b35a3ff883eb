"""Fashion-MNIST as Debian's package ``dataset-fashion-mnist`` installs it: gzipped IDX files."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flatmin.train.data.image_set import ImageSet

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def read_idx_files(directory: Path) -> ImageSet:
    """Read the four files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`` in ``directory``.

    Args:
        directory: Where they lie. They are only read.

    Raises:
        ValueError: A file is damaged or breaks a rule; the message names it, the rule and the value.
        OSError: A file is missing or cannot be opened.
    """
    train_images = read_idx(directory / "train-images-idx3-ubyte.gz").unsqueeze(3)
    train_labels = read_idx(directory / "train-labels-idx1-ubyte.gz").long()
    test_images = read_idx(directory / "t10k-images-idx3-ubyte.gz").unsqueeze(3)
    test_labels = read_idx(directory / "t10k-labels-idx1-ubyte.gz").long()
    try:
        return ImageSet(train_images, train_labels, test_images, test_labels, CLASSES)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def read_idx(path: Path) -> Tensor:
    """Read one gzipped IDX file of bytes.

    Its header is two zero bytes, the type 8 of unsigned bytes, the number of dimensions, then each dimension as a
    big-endian 32-bit number; the values follow, and nothing else. torchvision's reader takes no compressed file and
    ignores values that are too many.

    Returns:
        A uint8 tensor of the shape in the header.

    Raises:
        ValueError: The file is damaged or is no such file; the message names it, the rule and the value.
        OSError: The file cannot be opened.
    """
    compressed = path.read_bytes()
    try:
        content = gzip.decompress(compressed)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} must be a whole gzip file, got one that says: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{path} must begin like an IDX file of unsigned bytes, got {content[:4]!r}")
    start = 4 + 4 * content[3]
    shape = [int(size) for size in np.frombuffer(content[4:start], dtype=">u4")]
    values = torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).copy())
    if values.numel() != int(np.prod(shape)):
        raise ValueError(f"{path} must hold as many values as its shape {shape} says, got {values.numel()}")
    return values.view(shape)
