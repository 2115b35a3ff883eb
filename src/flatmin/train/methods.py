"""The methods by name: the class of each, and its options as its constructor declares and documents them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import make_dataclass
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

import torch
import tyro
from torch import nn
from torch.optim import Optimizer

import flatmin
from flatmin.optim import GradientWhen

__all__ = [
    "METHODS",
    "METHOD_NAMES",
    "Method",
    "canonical_options",
    "decides_by_gradient",
    "default_rho",
    "has_loss_rise",
    "option_flags",
    "option_types",
    "options_class",
    "reads_field",
    "resolved_options",
    "sharpness_aware",
    "steps_with_closure",
]

# fmt: off
Method = Literal[
    "sgd", "sam", "asam", "fishersam", "layersam", "usam", "lesam", "zsharp", "samon", "msam", "adaptivemsam",
    "looksam", "aesam", "rst", "latesam", "gsam", "wsam", "gnp", "stablesam", "friendlysam", "vasso", "bsam",
]
# fmt: on

Class = type[flatmin.SharpnessAware | flatmin.OnePass | flatmin.BSAM]

METHODS: Mapping[str, Class] = {
    name.lower(): getattr(flatmin, name) for name in flatmin.__all__ if name.lower() in get_args(Method)
}
"""The optimizer of every method but plain SGD."""

METHOD_NAMES: Mapping[str, str] = {"sgd": "SGD", **{name: method.__name__ for name, method in METHODS.items()}}
"""What to print for each method."""

# Keywords of the constructors that a run fills in from its own fields.
SET_BY_RUN = frozenset({"rho", "lr", "model", "num_steps", "num_data", "seed", "weight_decay"})

Options = tuple[tuple[str, Any], ...]


@cache
def options_class(method: str) -> type[Any]:
    """The options of a method as a dataclass: types, defaults and help are those of its constructor."""
    if method not in METHODS:
        return make_dataclass("Options", [], frozen=True)
    constructor = METHODS[method]
    hints, helps = get_type_hints(constructor.__init__), argument_helps(constructor)
    keywords = [
        parameter
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in SET_BY_RUN
    ]
    entries = [
        (each.name, Annotated[value_type(hints[each.name]), tyro.conf.arg(help=helps.get(each.name, ""))], each.default)
        for each in keywords
    ]
    return make_dataclass(f"{constructor.__name__}Options", entries, frozen=True)


def option_types(method: str) -> dict[str, Any]:
    """The type of each option of a method, without functions, which no file and no flag can hold."""
    return get_type_hints(options_class(method))


def default_rho(method: str) -> float:
    """The radius of the method's constructor; 0 for plain SGD."""
    if method not in METHODS:
        return 0.0
    rho: float = inspect.signature(METHODS[method]).parameters["rho"].default
    return rho


def canonical_options(method: str, options: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> Options:
    """Check options and return those that differ from their defaults, in the constructor's order.

    Raises:
        ValueError: The method has no such option, or refuses a value.
    """
    given, defaults = dict(options), vars(options_class(method)())
    for name, value in given.items():
        if name not in defaults:
            known = f"whose options are {', '.join(defaults)}" if defaults else "which has no options"
            raise ValueError(f"method.{name} must belong to method {method}, {known}, got {value}")
    pairs = [(name, tuple(v) if isinstance(v := given.get(name, old), list) else v) for name, old in defaults.items()]
    chosen = tuple((name, value) for name, value in pairs if value != defaults[name])
    _check_values(method, chosen)
    return chosen


def resolved_options(method: str, options: Options) -> dict[str, Any]:
    """Every option of a method with its value, chosen or by default."""
    return {**vars(options_class(method)()), **dict(options)}


def option_flags(options: Options) -> list[str]:
    """The flags of ``flatmin train`` that set these options."""
    flags: list[str] = []
    for name, value in options:
        text = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--method.{'' if value else 'no-'}{text}")
        else:
            flags += [f"--method.{text}", *map(str, value if isinstance(value, tuple) else (value,))]
    return flags


def reads_field(method: str, name: str) -> bool:
    """Say whether the field ``name`` of a configuration makes a difference to runs with ``method``."""
    if name.startswith("method."):
        return name.removeprefix("method.") in option_types(method)
    if name in ("rho", "rho_schedule", "rho_min"):
        return method in METHODS
    return name not in ("ascent_steps", "sync") or has_loss_rise(method)


def has_loss_rise(method: str) -> bool:
    """Say whether a method sees the loss at w and at w + eps."""
    return method in METHODS and issubclass(METHODS[method], flatmin.SharpnessAware)


@cache
def decides_by_gradient(method: str) -> bool:
    """Say whether a method looks at a step's gradient to decide whether the step is perturbed."""
    return has_loss_rise(method) and isinstance(trial_optimizer(method, ()).when, GradientWhen)


def steps_with_closure(optimizer: Optimizer) -> TypeGuard[flatmin.SharpnessAware | flatmin.OnePass | flatmin.BSAM]:
    """Say whether an optimizer wants the closure of a step, as all do but plain ones."""
    return isinstance(optimizer, tuple(METHODS.values()))


def sharpness_aware(method: str, base: Any, rho: float, options: Options, **run: Any) -> Optimizer:
    """Build the optimizer of a method.

    Args:
        method: Any but plain SGD.
        base: The optimizer to wrap; for ``bsam``, which wraps none, the parameters.
        rho: Radius.
        options: As ``canonical_options`` returns them.
        **run: What the run knows: ``model``, ``num_steps``, ``seed`` and so on; a method takes what it has.

    Raises:
        ValueError: The method refuses an argument.
    """
    constructor: Callable[..., Optimizer] = METHODS[method]
    parameters = inspect.signature(constructor).parameters
    shared = "options" in parameters  # model, ascent_steps and so on go on to the engine
    of_two_passes = {"ascent_steps", "sync"} if has_loss_rise(method) else set()
    engine = {"model", "rho_schedule", *of_two_passes} if shared else set()
    taken = {name: value for name, value in run.items() if name in parameters or name in engine}
    return constructor(base, rho=rho, **dict(options), **taken)


@cache
def _check_values(method: str, options: Options) -> None:
    """Build the optimizer for a network of one layer: its constructor knows the domains."""
    try:
        trial_optimizer(method, options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"method.{error}") from error


def trial_optimizer(method: str, options: Options) -> Any:
    """The optimizer of a method for a network of one layer; None for plain SGD."""
    if method not in METHODS:
        return None
    model = nn.BatchNorm1d(1)
    params = [{"params": [model.weight], "perturb": True}, {"params": [model.bias], "perturb": False}]
    base = params if METHODS[method] is flatmin.BSAM else torch.optim.SGD(params, lr=1.0, momentum=0.9)
    return sharpness_aware(method, base, 0.0, options, model=nn.Sequential(model), num_steps=1, num_data=1)


def value_type(hint: Any) -> Any:
    """``hint`` without the functions that a constructor takes in place of a number."""
    if get_origin(hint) not in {Union, UnionType}:
        return hint
    return reduce(or_, [each for each in get_args(hint) if get_origin(each) is not Callable])


def argument_helps(constructor: Class) -> dict[str, str]:
    """What the docstring says about each argument, as plain text."""
    section = (inspect.getdoc(constructor) or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    texts = re.findall(r"^    (\w+): (.*(?:\n {6,}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("``", "") for name, text in texts}
