"""What is known of each data set: its size, its normalisation, and what is done to its training images."""

from dataclasses import dataclass, replace
from typing import Literal

from flatmin.arguments import check_choice
from flatmin.train.data.augmentation import Augmentation
from flatmin.train.data.image_set import ImageSet
from flatmin.train.data.normalization import Normalization
from flatmin.train.data.policies import PolicyName

ArraySetName = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "svhn", "svhn-extra"]
FileSetName = Literal["imagenet", "birdsnap", "stanford-cars", "flowers", "fgvc-aircraft", "oxford-pets", "food-101"]
DatasetName = Literal[ArraySetName, FileSetName, "folder", "file"]


@dataclass(frozen=True)
class DatasetFacts:
    """Facts about one data set that hold before it is loaded.

    Args:
        image_shape: Height, width and channels.
        num_classes: Number of classes.
        normalization: Mean and standard deviation of the training set.
        basic: The augmentation called ``basic``.
        cutout_length: Side in pixels of the square that the augmentation called ``cutout`` adds.
        policy: Sub-policies of the augmentation called ``autoaugment``.
        num_extra: How many of the training images, the first ones, are never held out for validation.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    normalization: Normalization
    basic: Augmentation
    cutout_length: int
    policy: PolicyName = "cifar"
    num_extra: int = 0

    def check(self, images: ImageSet) -> None:
        """Raise ``ValueError`` unless ``images`` has the image shape and the number of classes of this data set."""
        shape = tuple(images.train_images.shape[1:])
        if shape != self.image_shape:
            raise ValueError(f"train_images must have shape (N, {str(self.image_shape)[1:]}, got (N, {str(shape)[1:]}")
        if len(images.train_images) <= self.num_extra:
            raise ValueError(f"train_images must be more than {self.num_extra}, got {len(images.train_images)}")
        if images.num_classes != self.num_classes:
            raise ValueError(f"classes must be {self.num_classes} names, got {images.num_classes}")


FLIP_AND_CROP = Augmentation(flip=True, crop_padding=4)

SVHN = DatasetFacts(
    image_shape=(32, 32, 3),
    num_classes=10,
    normalization=Normalization((0.4309, 0.4302, 0.4463), (0.1976, 0.2003, 0.1981)),  # of training and extra images
    basic=FLIP_AND_CROP,  # as in the SAM authors' release, though a mirrored digit is another sign
    cutout_length=16,
    policy="svhn",
)

CATALOGUE: dict[DatasetName, DatasetFacts] = {
    "digits": DatasetFacts(
        image_shape=(8, 8, 1),
        num_classes=10,
        normalization=Normalization((0.3056,), (0.3760,)),
        # A mirrored digit is another sign, and the paper around a digit is black.
        basic=Augmentation(crop_padding=1, padding_mode="zeros"),
        cutout_length=4,
        policy="svhn",  # digits too
    ),
    "fashion-mnist": DatasetFacts(
        image_shape=(28, 28, 1),
        num_classes=10,
        # Of its own training set. The SAM authors' release takes those of MNIST, 0.1307 and 0.3081.
        normalization=Normalization((0.2860,), (0.3530,)),
        basic=FLIP_AND_CROP,
        cutout_length=16,
    ),
    "cifar10": DatasetFacts(
        image_shape=(32, 32, 3),
        num_classes=10,
        normalization=Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        basic=FLIP_AND_CROP,
        cutout_length=16,
    ),
    "cifar100": DatasetFacts(
        image_shape=(32, 32, 3),
        num_classes=100,
        normalization=Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        basic=FLIP_AND_CROP,
        cutout_length=16,
    ),
    "svhn": SVHN,
    "svhn-extra": replace(SVHN, num_extra=531_131),
}


NUM_CLASSES: dict[DatasetName, int] = {
    "imagenet": 1000,
    "birdsnap": 500,
    "stanford-cars": 196,
    "flowers": 102,
    "fgvc-aircraft": 100,
    "oxford-pets": 37,
    "food-101": 101,
}


def dataset_facts(name: DatasetName) -> DatasetFacts:
    """Return what is known of the small images called ``name``.

    Raises:
        ValueError: No such data set.
    """
    check_choice("dataset", name, CATALOGUE)
    return CATALOGUE[name]


def file_facts(num_classes: int, image_size: int) -> DatasetFacts:
    """Return what training needs to know of a set of image files: crops of ``image_size``, normalised as ImageNet.

    The augmentation ``basic`` is a random crop of the file and a flip.
    """
    return DatasetFacts(
        image_shape=(image_size, image_size, 3),
        num_classes=num_classes,
        normalization=Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        basic=Augmentation(flip=True, resized_crop=True),
        cutout_length=image_size // 2,
        policy="imagenet",
    )
