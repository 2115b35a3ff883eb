"""Tensors of a small CIFAR-10."""

import torch

CIFAR10_CLASSES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"


def cifar_tensors(num_train: int = 50, num_test: int = 20) -> dict[str, torch.Tensor]:
    """Images sorted by class, each of which holds its label in its first pixel and its index in the second."""
    tensors = {}
    for part, count in (("train", num_train), ("test", num_test)):
        labels = (torch.arange(count) * 10 // count).to(torch.uint8)
        images = torch.randint(
            256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
        )
        images[:, 0, 0, 0] = labels
        images[:, 0, 1, 0] = torch.arange(count)
        tensors |= {f"{part}_images": images, f"{part}_labels": labels}
    return tensors
