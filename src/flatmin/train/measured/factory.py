"""A network that flatmin did not train: a Python function builds it and its data, a checkpoint holds its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.sharpness import num_examples
from flatmin.train.errors import TrainingError, UsageError, one_line
from flatmin.train.measured.subject import Subject

__all__ = ["subject_of_factory"]

_WEIGHTS_ENTRIES = ("model", "state_dict", "model_state_dict")


def subject_of_factory(
    factory: str, checkpoint: Path | None, num_images: int | None, device: torch.device, directory: Path | None = None
) -> Subject:
    """Call ``make()``, load the weights, and take the first batches of the data.

    Args:
        factory: ``module:function``; the function returns ``(model, loss_fn, data)`` as the measures of
            ``flatmin.sharpness`` take them. The module is looked for in the current directory too.
        checkpoint: File of ``torch.save``: a state dict, or a mapping with one under ``model``, ``state_dict`` or
            ``model_state_dict``; None keeps the weights that the function gave the model.
        num_images: Take whole batches until there are so many examples; None takes all.
        device: Where to measure.
        directory: Where results go; None is a directory named like the checkpoint without its ending.

    Raises:
        UsageError: There is no such function, or it returns something else.
        TrainingError: The checkpoint is missing or damaged, or does not fit the model.
    """
    model, loss_fn, data = _made(factory)
    if checkpoint is not None:
        _load(model, checkpoint)
    batches = _first_batches(data, num_images)
    model = model.to(device)
    if any(param.dtype in (torch.float16, torch.bfloat16) for param in model.parameters()):
        model = model.float()
    name = factory if checkpoint is None else checkpoint.stem
    return Subject(
        name=name,
        directory=directory or (Path(name.replace(":", ".")) if checkpoint is None else checkpoint.with_suffix("")),
        run={"method": None, "rho": None, "seed": None, "dataset": None, "model": type(model).__name__}
        | {"factory": factory, "checkpoint": None if checkpoint is None else str(checkpoint)},
        checkpoint={"step": None, "epoch": None},
        weights="model",
        model=model,
        loss_fn=loss_fn,
        batches=lambda size: batches,
        split="data",
        num_images=sum(map(num_examples, batches)),
        largest_m=max(map(num_examples, batches)),
    )


def _made(factory: str) -> tuple[nn.Module, Callable[..., Tensor], Iterable[Any]]:
    module_name, colon, function_name = factory.partition(":")
    if not (colon and module_name and function_name):
        raise UsageError(f"factory must look like module:function, got {factory}")
    sys.path.insert(0, "")  # as with python -m
    try:
        make = getattr(import_module(module_name), function_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise UsageError(f"factory must name a function that can be imported, got {factory}: {error}") from error
    finally:
        sys.path.remove("")
    made = make()
    if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
        raise UsageError(f"factory must return (model, loss_fn, data), got {type(made).__name__} from {factory}")
    return made


def _load(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise TrainingError(f"there is no checkpoint {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        entry = next((saved[name] for name in _WEIGHTS_ENTRIES if isinstance(saved.get(name), Mapping)), saved)
        model.load_state_dict({name.removeprefix("module."): value for name, value in entry.items()})
    except Exception as error:  # damage shows as an error of any kind
        raise TrainingError(f"{path} must hold weights of {type(model).__name__}: {one_line(error)}") from error


def _first_batches(data: Iterable[Any], num_images: int | None) -> list[Any]:
    batches: list[Any] = []
    num_taken = 0
    for batch in data:
        batches.append(batch)
        num_taken += num_examples(batch)
        if num_images is not None and num_taken >= num_images:
            break
    if not batches:
        raise UsageError("factory must return data with at least one batch, got none")
    return batches
