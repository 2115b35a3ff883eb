"""Networks from timm, by its names or by those of the paper, with a head for the classes at hand."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from flatmin.train.errors import one_line
from flatmin.train.models.options import ModelOptions

TF_BATCH_NORM = {"bn_momentum": 0.01}  # beside the epsilon of 1e-3 that timm sets: the release's momentum of 0.99

# Name: the network in timm with its weights, and arguments. Those of the EfficientNets are the ones the paper tuned.
PLAIN_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"resnet{depth}": (f"resnet{depth}", {}) for depth in (50, 101, 152)},
    **{f"efficientnet-b{size}": (f"tf_efficientnet_b{size}.aa_in1k", TF_BATCH_NORM) for size in range(7)},
    **{f"efficientnet-b{size}": (f"tf_efficientnet_b{size}.ra_in1k", TF_BATCH_NORM) for size in (7, 8)},
    "efficientnet-l2": ("tf_efficientnet_l2.ns_jft_in1k", TF_BATCH_NORM),
    "efficientnet-l2-475": ("tf_efficientnet_l2.ns_jft_in1k_475", TF_BATCH_NORM),
    "vit-ti-16": ("vit_tiny_patch16_224", {}),
    "vit-s-16": ("vit_small_patch16_224", {}),
    "vit-s-32": ("vit_small_patch32_224", {}),
    "vit-b-16": ("vit_base_patch16_224", {}),
    "vit-b-32": ("vit_base_patch32_224", {}),
    "vit-l-16": ("vit_large_patch16_224", {}),
}


def is_timm_model(name: str) -> bool:
    """Whether ``name`` is one of ``PLAIN_NAMES``, or ``timm/`` and the name of a network that timm can build."""
    if not name.startswith("timm/"):
        return name in PLAIN_NAMES
    import timm  # noqa: PLC0415 - takes seconds, and most runs do not need it

    timm_name = name.removeprefix("timm/")
    known: bool = bool(timm_name) and timm.is_model(timm_name)
    return known


def build_timm_model(
    name: str, num_classes: int, in_channels: int, options: ModelOptions, image_size: int | None
) -> nn.Module:
    """Build a network of timm, with a head for ``num_classes`` and a first layer for ``in_channels``.

    With pretrained weights the head is drawn anew unless the number of classes is that of the weights, the first layer
    is summed or repeated over the channels, and the position embeddings of a transformer are interpolated. Every other
    tensor must be in the weights.

    Args:
        name: As ``is_timm_model`` accepts.
        num_classes: Number of logits.
        in_channels: Channels of the images.
        options: Those of timm: dropout, drop_path, pretrained and weights.
        image_size: Side of the images, for networks that are built for one size; None takes the published one.

    Raises:
        ValueError: timm refuses the arguments, or the file holds no weights that fit.
        OSError: The pretrained weights cannot be downloaded, or their file cannot be read.
    """
    import timm  # noqa: PLC0415 - takes seconds, and most runs do not need it

    timm_name, arguments = timm_arguments(name, num_classes, in_channels, image_size)
    published = timm.get_pretrained_cfg(timm_name)
    for argument, value in (("drop_rate", options.dropout), ("drop_path_rate", options.drop_path)):
        arguments |= {argument: value} if value > 0.0 else {}
    if options.weights is not None and not options.weights.is_file():
        raise FileNotFoundError(f"there is no file of weights {options.weights}")
    if options.weights is None and options.pretrained and not timm.is_model_pretrained(timm_name):
        raise ValueError(f"pretrained must be off for {name}, of which timm has no weights, got True")
    with _one_line_errors(timm_name, options):
        if options.pretrained or options.weights is not None:
            model = _pretrained(timm_name, published, arguments, options.weights)
        else:
            model = timm.create_model(timm_name, **arguments)
        if getattr(getattr(model, "patch_embed", None), "num_patches", 1) < 1:
            raise ValueError(f"a patch is larger than the image of {image_size} x {image_size} pixels")
    return model


def timm_arguments(name: str, num_classes: int, in_channels: int, image_size: int | None) -> tuple[str, dict[str, Any]]:
    """Return the name of a network in timm, and what its constructor takes for these classes and images."""
    import timm  # noqa: PLC0415 - takes seconds, and most runs do not need it

    timm_name, arguments = PLAIN_NAMES.get(name, (name.removeprefix("timm/"), {}))
    arguments = arguments | {"num_classes": num_classes, "in_chans": in_channels}
    published = timm.get_pretrained_cfg(timm_name)
    if published is not None and published.fixed_input_size and image_size is not None:
        arguments |= {"img_size": image_size}
    return timm_name, arguments


def timm_call(name: str, num_classes: int, in_channels: int, image_size: int) -> str | None:
    """Write the call of timm that builds the same network, as Python; None for a network that is not timm's."""
    if not is_timm_model(name):
        return None
    timm_name, arguments = timm_arguments(name, num_classes, in_channels, image_size)
    return f"timm.create_model({', '.join([repr(timm_name), *(f'{key}={value}' for key, value in arguments.items())])})"


def _pretrained(timm_name: str, published: Any, arguments: dict[str, Any], weights: Path | None) -> nn.Module:
    """Load weights with all of their classes, so that timm misses none, and then replace the head if need be."""
    import timm  # noqa: PLC0415 - takes seconds, and most runs do not need it

    num_classes, source = arguments["num_classes"], {}
    if weights is not None:
        state = timm.models.load_state_dict(str(weights))
        head = state.get(f"{published.classifier}.weight") if isinstance(published.classifier, str) else None
        source = {"state_dict": state, "num_classes": published.num_classes if head is None else len(head)}
    arguments = arguments | {"num_classes": source.get("num_classes", published.num_classes)}
    model: nn.Module = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=source, **arguments)
    if arguments["num_classes"] != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator] # every network of timm has it
    return model


@contextmanager
def _one_line_errors(timm_name: str, options: ModelOptions) -> Iterator[None]:
    """Turn what timm and the hub raise into one sentence, and keep the hub from talking while it tries."""
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:  # of any kind: the network, the hub, the file, the arguments
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        if options.weights is not None:
            message = f"weights must be a file with weights of {timm_name}, got {options.weights} ({reason})"
            raise ValueError(message) from error
        if not options.pretrained:
            raise ValueError(f"timm cannot build {timm_name} for these images and options ({reason})") from error
        raise ConnectionError(
            f"the pretrained weights of {timm_name} could not be downloaded: give their file with --weights, or leave "
            f"out --pretrained ({reason})"
        ) from error
    finally:
        hub.setLevel(level)
