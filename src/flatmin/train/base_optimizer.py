"""The optimizer that takes the step, by name: three of the paper's, any of torch and any of timm."""

from __future__ import annotations

import ast
from typing import Any, TypedDict

import torch
from torch.optim import Optimizer

from flatmin.train.errors import TrainingError, one_line

__all__ = ["base_optimizer", "check_optimizer", "parsed_options"]

OWN_NAMES = ("sgd", "rmsprop", "adamw")
SET_ELSEWHERE = ("params", "lr", "weight_decay", "momentum", "nesterov")


class Momentum(TypedDict):
    """The part of the settings that SGD and RMSProp share, and whether SGD's is Nesterov's."""

    momentum: float
    nesterov: bool


def base_optimizer(
    name: str, groups: list[dict[str, Any]], lr: float, options: dict[str, Any], momentum: Momentum
) -> Optimizer:
    """Build the optimizer called ``name``.

    ``rmsprop`` has TensorFlow's semantics, with the constants of EfficientNet and the SAM authors' release: ``v``
    starts at 1 and epsilon is inside the root,

        v <- 0.9 v + 0.1 g^2,    m <- momentum m + g / sqrt(v + 0.001),    w <- w - lr m.

    Args:
        name: As ``check_optimizer`` accepts.
        groups: Parameters, with the weight decay of each group.
        lr: Learning rate.
        options: More arguments of the optimizer; they win over what this function sets.
        momentum: For ``sgd`` and ``rmsprop``; the others have their own defaults, which ``options`` change.

    Raises:
        TrainingError: The optimizer refuses the arguments, or has no weight decay where one is asked for.
    """
    if name == "sgd":
        arguments = {**momentum, **options}
    elif name == "rmsprop":
        arguments = {"alpha": 0.9, "eps": 1e-3, "momentum": momentum["momentum"], "lr_in_momentum": False, **options}
    else:
        arguments = options
    try:
        base: Optimizer = _constructor(name)(groups, lr=lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"optimizer {name} refuses its arguments: {one_line(error)}") from error
    if "weight_decay" not in base.defaults and any(group["weight_decay"] > 0.0 for group in groups):
        raise TrainingError(f"optimizer {name} has no weight decay: choose --weight-decay-in decoupled or loss")
    return base


def check_optimizer(name: str, options: str = "") -> None:
    """Refuse a name that ``base_optimizer`` does not know, and options that cannot be read.

    Args:
        name: ``sgd``, ``rmsprop`` or ``adamw``; ``torch/CLASS`` for a class of ``torch.optim``, such as ``torch/Adam``;
            or ``timm/NAME`` for one that timm lists, such as ``timm/lamb``.
        options: As ``parsed_options`` reads them.

    Raises:
        ValueError: No such optimizer, one that drives a closure of its own (LBFGS), or options of another form.
    """
    parsed_options(options)
    library, _, rest = name.partition("/")
    known = name in OWN_NAMES
    if library == "torch":
        candidate = getattr(torch.optim, rest, None)
        known = isinstance(candidate, type) and issubclass(candidate, Optimizer)
        known &= candidate not in (Optimizer, torch.optim.LBFGS)  # the second drives a closure of its own
    elif library == "timm":
        import timm.optim  # noqa: PLC0415 - takes seconds, and most runs do not need it

        known = rest in timm.optim.list_optimizers()
    if not known:
        raise ValueError(
            f"optimizer must be {', '.join(OWN_NAMES)}, torch/CLASS with a class of torch.optim, or timm/NAME with a "
            f"name that timm lists, got {name!r}"
        )


def parsed_options(text: str) -> dict[str, Any]:
    """Read arguments as Python writes them: names with numbers, strings, booleans or tuples of such.

    Raises:
        ValueError: The text has another form, or sets what a field of the configuration sets.

    Examples:
        >>> parsed_options("betas=(0.9, 0.95), eps=1e-6")
        {'betas': (0.9, 0.95), 'eps': 1e-06}
    """
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("every argument needs a name")
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"optimizer_options must look like betas=(0.9, 0.95), eps=1e-6, got {text!r}") from error
    for name in options:
        if name in SET_ELSEWHERE:
            raise ValueError(f"optimizer_options must not set {name}, which has a flag of its own, got {text!r}")
    return options


def _constructor(name: str) -> Any:
    if name in ("sgd", "adamw"):
        return {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    library, _, rest = name.partition("/")
    if library == "torch":
        return getattr(torch.optim, rest)
    import timm.optim  # noqa: PLC0415 - takes seconds, and most runs do not need it

    return timm.optim.get_optimizer_class("rmsproptf" if name == "rmsprop" else rest)
