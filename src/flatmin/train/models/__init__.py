"""Networks for small images, each found by its name."""

import re

from torch import nn

from flatmin.train.models.resnet import ResNet
from flatmin.train.models.small_cnn import SmallCNN
from flatmin.train.models.wide_resnet import Shortcut, WideResNet

__all__ = ["ResNet", "Shortcut", "SmallCNN", "WideResNet", "build_model", "check_model_name"]


def build_model(
    name: str, num_classes: int, in_channels: int, *, shortcut: Shortcut = "pool-pad", dropout: float = 0.0
) -> nn.Module:
    """Build the network called ``name`` with freshly drawn weights.

    The weights come from torch's global generator: seed it first, or build under ``torch.random.fork_rng``.

    Args:
        name: ``small-cnn``; ``resnet-D`` with D = 6n + 2, such as ``resnet-20``; or ``wrn-D-W`` with D = 6n + 4 and
            W >= 1, such as ``wrn-28-10``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        shortcut: The form of the shortcuts of a wide ResNet, see `WideResNet`.
        dropout: Dropout probability inside the blocks of a wide ResNet.

    Returns:
        A module that maps float images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: No such model, an option it does not have, or a number outside its domain.
    """
    check_model_name(name)
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"num_classes and in_channels must be >= 1, got {num_classes} and {in_channels}")
    family, *numbers = name.split("-")
    if family == "wrn":
        depth, widen_factor = map(int, numbers)
        return WideResNet(depth, widen_factor, num_classes, in_channels, shortcut=shortcut, dropout=dropout)
    if shortcut != "pool-pad" or dropout != 0.0:
        raise ValueError(f"shortcut and dropout must stay at their defaults for {name}: they belong to wide ResNets")
    if family == "resnet":
        return ResNet(int(numbers[0]), num_classes, in_channels)
    return SmallCNN(num_classes, in_channels)


def check_model_name(name: str) -> None:
    """Refuse a name that `build_model` would not know.

    Args:
        name: Name of a model.

    Raises:
        ValueError: No such model.
    """
    if name == "small-cnn":
        return
    match = re.fullmatch(r"(resnet|wrn)-([1-9]\d*)(-[1-9]\d*)?", name, flags=re.ASCII)
    if match:
        family, depth, widen_factor = match[1], int(match[2]), match[3]
        if family == "resnet" and depth >= 8 and depth % 6 == 2 and widen_factor is None:
            return
        if family == "wrn" and depth >= 10 and depth % 6 == 4 and widen_factor is not None:
            return
    raise ValueError(
        f"model must be small-cnn, resnet-D with D = 6n + 2, or wrn-D-W with D = 6n + 4 and W >= 1, got {name!r}"
    )
