"""Small images for training: found, checked, split, and batched on the device."""

from flatmin.train.data.augmentation import Augmentation
from flatmin.train.data.catalogue import (
    AugmentationName,
    DatasetFacts,
    DatasetName,
    augmentation_preset,
    dataset_facts,
)
from flatmin.train.data.device_loader import EvalLoader, TrainLoader
from flatmin.train.data.image_set import ImageSet, split_validation
from flatmin.train.data.label_noise import flip_labels
from flatmin.train.data.load import load_images
from flatmin.train.data.normalization import Normalization

__all__ = [
    "Augmentation",
    "AugmentationName",
    "DatasetFacts",
    "DatasetName",
    "EvalLoader",
    "ImageSet",
    "Normalization",
    "TrainLoader",
    "augmentation_preset",
    "dataset_facts",
    "flip_labels",
    "load_images",
    "split_validation",
]
