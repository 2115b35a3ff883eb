"""The families of networks: how each spells its names, which options it knows, and how it is built."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from flatmin.train.models.from_timm import PLAIN_NAMES, build_timm_model, is_timm_model
from flatmin.train.models.lenet import LeNet
from flatmin.train.models.options import ModelOptions
from flatmin.train.models.pyramidnet import MAX_BASIC_DEPTH, PyramidNet, is_pyramid_depth
from flatmin.train.models.resnet import ResNet
from flatmin.train.models.shake_shake import ShakeShakeNet
from flatmin.train.models.small_cnn import SmallCNN
from flatmin.train.models.wide_resnet import WideResNet

NUMBER = r"([1-9]\d*)"


@dataclass(frozen=True)
class Family:
    """Networks whose names differ in numbers alone.

    Args:
        form: How a name looks, for messages.
        pattern: Regular expression that a name matches as a whole, with a group for each number.
        is_valid: Whether there is a network with these numbers.
        build: Makes the network from its numbers, the number of classes, the channels of the images and the options.
        options: Names of the fields of ``ModelOptions`` that it knows.
        smallest_side: Of the images, in pixels; smaller ones would leave nothing after its pooling.
    """

    form: str
    pattern: str
    is_valid: Callable[..., bool]
    build: Callable[[list[int], int, int, ModelOptions], nn.Module]
    options: frozenset[str] = frozenset()
    smallest_side: int = 1


FAMILIES = (
    Family(
        *("small-cnn", "small-cnn"),
        lambda: True,
        lambda _, classes, channels, __: SmallCNN(classes, channels),
        smallest_side=4,
    ),
    Family(
        *("lenet-5", "lenet-5"),
        lambda: True,
        lambda _, classes, channels, __: LeNet(classes, channels),
        smallest_side=12,
    ),
    Family(
        "resnet-D with D = 6n + 2",
        f"resnet-{NUMBER}",
        lambda depth: depth >= 8 and depth % 6 == 2,
        lambda n, classes, channels, _: ResNet(n[0], classes, channels),
    ),
    Family(
        "wrn-D-W with D = 6n + 4 and W >= 1",
        f"wrn-{NUMBER}-{NUMBER}",
        lambda depth, _: depth >= 10 and depth % 6 == 4,
        lambda n, classes, channels, chosen: WideResNet(
            *(n[0], n[1], classes, channels),
            shortcut=chosen.shortcut,
            extra_skips=chosen.extra_skips,
            dropout=chosen.dropout,
            norm=chosen.norm,
        ),
        frozenset({"shortcut", "extra_skips", "dropout", "norm"}),
    ),
    Family(
        "shake-shake-D-2xWd with D = 6n + 2 and W even",
        f"shake-shake-{NUMBER}-2x{NUMBER}d",
        lambda depth, width: depth >= 8 and depth % 6 == 2 and width % 2 == 0,
        lambda n, classes, channels, _: ShakeShakeNet(n[0], n[1], classes, channels),
    ),
    Family(
        f"pyramidnet-D-A with D = 6n + 2 up to {MAX_BASIC_DEPTH} or D = 9n + 2",
        f"pyramidnet-{NUMBER}-{NUMBER}",
        lambda depth, _: is_pyramid_depth(depth),
        lambda n, classes, channels, _: PyramidNet(n[0], n[1], classes, channels),
    ),
    Family(
        "pyramidnet-D-A-shakedrop with D and A as before",
        f"pyramidnet-{NUMBER}-{NUMBER}-shakedrop",
        lambda depth, _: is_pyramid_depth(depth),
        lambda n, classes, channels, _: PyramidNet(n[0], n[1], classes, channels, shake_drop=True),
    ),
)

TIMM_FORM = "timm/NAME"
TIMM_OPTIONS = frozenset({"dropout", "drop_path", "pretrained", "weights"})


def build_model(
    name: str,
    num_classes: int,
    in_channels: int,
    options: ModelOptions | None = None,
    *,
    image_size: int | None = None,
) -> nn.Module:
    """Build the network called ``name`` with freshly drawn weights, or pretrained ones if ``options`` say so.

    The weights come from torch's global generator: seed it first, or build under ``torch.random.fork_rng``.

    Args:
        name: A network for small images: ``small-cnn``; ``lenet-5``; ``resnet-D``, such as ``resnet-20``; ``wrn-D-W``,
            such as ``wrn-28-10``; ``shake-shake-D-2xWd``, such as ``shake-shake-26-2x96d``; ``pyramidnet-D-A``, such
            as ``pyramidnet-110-270``, or ``pyramidnet-D-A-shakedrop``. Or one of timm: ``timm/NAME``, or one of
            ``resnet50``, ``resnet101``, ``resnet152``, ``efficientnet-b0`` to ``-b8``, ``efficientnet-l2`` and
            ``-l2-475``, ``vit-ti-16``, ``vit-s-16``, ``vit-s-32``, ``vit-b-16``, ``vit-b-32`` and ``vit-l-16``.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        options: What differs from the defaults; None leaves all.
        image_size: Side of the images, the shorter one: for networks that are built for one size, such as ViT, or
            need a smallest one.

    Returns:
        A module that maps float images (N, in_channels, H, W) to logits (N, num_classes).

    Raises:
        ValueError: No such model, an option it does not have, or a number outside its domain.
        OSError: Pretrained weights were asked for and cannot be had.
    """
    options = options or ModelOptions()
    check_model(name, options)
    if num_classes < 1 or in_channels < 1:
        raise ValueError(f"num_classes and in_channels must be >= 1, got {num_classes} and {in_channels}")
    for family in FAMILIES:
        numbers = numbers_in(family, name)
        if numbers is not None:
            if image_size is not None and image_size < family.smallest_side:
                raise ValueError(f"image_size must be >= {family.smallest_side} for {name}, got {image_size}")
            return family.build(numbers, num_classes, in_channels, options)
    return build_timm_model(name, num_classes, in_channels, options, image_size)


def check_model(name: str, options: ModelOptions | None = None) -> None:
    """Refuse a name that ``build_model`` would not know, or options that do not belong to the network.

    Args:
        name: Name of a model.
        options: What differs from the defaults; None leaves all.

    Raises:
        ValueError: No such model, or an option it does not have.
    """
    known = known_options(name)
    for option in [] if options is None else options.changed():
        if option not in known:
            owners = [family.form.split()[0] for family in FAMILIES if option in family.options]
            owners += [TIMM_FORM] if option in TIMM_OPTIONS else []
            raise ValueError(
                f"{option} must stay at its default for {name}: it belongs to {' and '.join(owners)}, "
                f"got {getattr(options, option)}"
            )


def known_options(name: str) -> frozenset[str]:
    """Return the names of the options that the network called ``name`` has.

    Raises:
        ValueError: No such model.
    """
    for family in FAMILIES:
        if numbers_in(family, name) is not None:
            return family.options
    if is_timm_model(name):
        return TIMM_OPTIONS
    forms = [*(family.form for family in FAMILIES), *PLAIN_NAMES]
    raise ValueError(f"model must be {', '.join(forms)}, or {TIMM_FORM} with a name that timm knows, got {name!r}")


def numbers_in(family: Family, name: str) -> list[int] | None:
    """Return the numbers in a name of this family; None if it is not one."""
    match = re.fullmatch(family.pattern, name, flags=re.ASCII)
    numbers = [int(group) for group in match.groups()] if match else []
    return numbers if match and family.is_valid(*numbers) else None
