"""The handwritten digits that ship inside scikit-learn: a real data set without a download."""

import torch

from flatmin.train.data.image_set import ImageSet
from flatmin.train.data.seeding import generator_from


def read_digits() -> ImageSet:
    """Read the 1797 images of 8x8 pixels and split them: 1297 to train, 500 to test.

    The grey values 0..16 are scaled to 0..255 and rounded. One fixed random order comes before the split, so a writer's
    digits fall on both sides: errors are lower than on writers never seen.

    References:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - it takes a second, which only this data set is worth

    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=generator_from("digits"))
    images = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8).unsqueeze(3)[order]
    labels = torch.from_numpy(digits.target).long()[order]
    names = tuple(str(digit) for digit in range(10))
    return ImageSet(images[:-500], labels[:-500], images[-500:], labels[-500:], names)
