"""The rules that a run's settings keep: every value in its domain, and those that depend on one another."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from flatmin.arguments import check_choice
from flatmin.sharpness import SharpnessMonitor
from flatmin.train.base_optimizer import check_optimizer
from flatmin.train.data import named_parts
from flatmin.train.methods import canonical_options, has_loss_rise
from flatmin.train.models import check_model

if TYPE_CHECKING:
    from flatmin.train.config import TrainConfig

COUNTS = (
    *("epochs", "batch_size", "max_steps", "max_epochs", "ascent_steps", "eval_every", "max_eval_batches", "num_nodes"),
    *("threads", "progress_steps", "checkpoint_every", "num_checkpoints", "image_size", "micro_batch"),
    *("sharpness_every", "sharpness_images", "sharpness_m", "num_train_images"),
)
AMOUNTS = (
    *("rho", "rho_min", "lr", "lr_factor", "lr_steps", "warmup_epochs", "momentum", "weight_decay"),
    *("gradient_clipping", "ema_start", "checkpoint_seconds", "keep_epochs", "seed", "randaugment_num_ops"),
    *("randaugment_level", "num_workers", "cutout_length", "sharpness_rho"),
)
SHARES = ("label_smoothing", "label_noise", "ema_decay", "dropout", "drop_path")

# Rule as an error states it, test, and the fields that must pass it, each item of a tuple; None always passes.
DOMAINS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (">= 1", lambda value: value >= 1, COUNTS),
    (">= 0", lambda value: value >= 0, AMOUNTS),
    ("finite", lambda value: value < math.inf, AMOUNTS),
    (">= 0 and < 1", lambda value: 0 <= value < 1, SHARES),
    ("> 0 and <= 1", lambda value: 0 < value <= 1, ("final_lr",)),
    ("> 0", lambda value: value > 0, ("sharpness_budget",)),
)


def check_config(config: TrainConfig) -> None:
    """Raise ``ValueError`` with field, rule and value for a setting outside its domain."""
    if config.precision in {"16-mixed", "16-true", "16"}:
        raise ValueError(f"precision {config.precision} is not supported yet: it needs loss scaling; use bf16-mixed")
    _check_choices(config)
    _check_numbers(config)
    _check_ranges(config)
    _check_data(config)
    _check_method(config)
    _check_sharpness(config)
    check_model(config.model, config.model_options)
    check_optimizer(config.optimizer, config.optimizer_options)
    if config.optimizer == "sgd" and config.nesterov and not config.momentum > 0.0:
        raise ValueError(f"nesterov needs momentum > 0, got momentum {config.momentum}; add --no-nesterov")
    if config.compile and config.pass_noise != "same":
        raise ValueError(f"compile needs pass_noise same, got {config.pass_noise}")
    if config.ema_decay > 0.0 and config.precision == "bf16-true":
        raise ValueError("ema_decay needs weights wider than bfloat16, got precision bf16-true")


def _check_choices(config: TrainConfig) -> None:
    config_class: Any = type(config)
    for name, (choices, may_be_none) in _choices(config_class).items():
        value = getattr(config, name)
        if not (value is None and may_be_none):
            check_choice(name, value, choices)


def _check_numbers(config: TrainConfig) -> None:
    """Refuse what is no plain number: 2.5 epochs, or a number of NumPy's, which no configuration file can hold."""
    config_class: Any = type(config)
    for name, (kind, may_be_none) in _numbers(config_class).items():
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if type(item) not in ({int, float} if kind is float else {int}) and not (item is None and may_be_none):
                raise ValueError(f"{name} must be of type {kind.__name__}, got {item!r}")


def _check_data(config: TrainConfig) -> None:
    if (config.dataset in {"folder", "file"}) != (config.dataset_path is not None):
        raise ValueError(
            f"dataset_path must be given with dataset folder or file and no other, got {config.dataset_path} with "
            f"{config.dataset}"
        )
    if config.train_labels is not None and config.label_noise > 0:
        raise ValueError(f"label_noise must be 0 where train_labels replaces the labels, got {config.label_noise}")
    named_parts(config.augmentation)
    if not 0 < config.mix_alpha < math.inf:
        raise ValueError(f"mix_alpha must be > 0 and finite, got {config.mix_alpha}")


def _check_method(config: TrainConfig) -> None:
    if not config.rho_min <= config.rho and config.rho_schedule == "lr":
        raise ValueError(f"rho_min must be <= rho ({config.rho}), got {config.rho_min}")
    if config.rho_schedule == "warmup" and not config.warmup_epochs > 0.0:
        raise ValueError(f"rho_schedule warmup needs warmup_epochs > 0, got warmup_epochs {config.warmup_epochs}")
    if config.method == "bsam":
        _check_bsam(config)
    if config.second_order:
        _check_second_order(config)
    _check_micro_batches(config)


def _check_micro_batches(config: TrainConfig) -> None:
    sync = config.sync
    if sync not in ("local", "global", None) and not (type(sync) is int and sync >= 1):
        raise ValueError(f"sync must be local, global or a number of devices >= 1, got {sync}")
    if sync not in (None, "global") and config.method != "sgd" and not has_loss_rise(config.method):
        raise ValueError(f"method {config.method} needs sync global: all devices share its perturbation; got {sync}")
    if config.micro_batch is not None and config.batch_size % config.micro_batch:
        raise ValueError(f"micro_batch must divide batch_size, {config.batch_size}, got {config.micro_batch}")


def _check_second_order(config: TrainConfig) -> None:
    """Refuse what has no derivative of eps here: other methods and balls, several ascents, several parts of a batch."""
    taken = {"method": "sam", "ascent_steps": 1, "micro_batch": None, "compile": False, "devices": "1", "num_nodes": 1}
    if options := canonical_options(config.method, config.method_options):
        raise ValueError(f"second_order needs no options of the method, got {dict(options)}")
    for name, value in {**taken, "strategy": "auto"}.items():
        if getattr(config, name) != value:
            raise ValueError(f"second_order needs {name} {value!r}, got {getattr(config, name)!r}")


def _check_bsam(config: TrainConfig) -> None:
    """Refuse what belongs to a base optimizer, which this method does not have, and a changing radius."""
    taken = {"rho_schedule": "constant", "gradient_clipping": 0.0, "optimizer": "sgd", "optimizer_options": ""}
    for name, value in taken.items():
        if getattr(config, name) != value:
            raise ValueError(f"method bsam needs {name} {value!r}, got {getattr(config, name)!r}")
    if config.weight_decay_in == "decoupled":
        raise ValueError("method bsam needs weight_decay_in base or loss, got decoupled")


def _check_sharpness(config: TrainConfig) -> None:
    SharpnessMonitor(config.sharpness_measures)  # refuses any others
    if config.sharpness_m is not None and config.batch_size % config.sharpness_m:
        raise ValueError(f"sharpness_m must divide batch_size ({config.batch_size}), got {config.sharpness_m}")


def _check_ranges(config: TrainConfig) -> None:
    for rule, holds, names in DOMAINS:
        for name in names:
            value = getattr(config, name)
            for item in value if isinstance(value, tuple) else (value,):
                if item is not None and not holds(item):
                    raise ValueError(f"{name} must be {rule}, got {item}")
    if not re.fullmatch(r"auto|[1-9]\d*|\d+(,\d+)*,?", config.devices) or config.devices == "0":
        raise ValueError(f"devices must be a count >= 1, a list of indices or auto, got {config.devices}")
    if not config.warmup_epochs < config.epochs:
        raise ValueError(f"warmup_epochs must be < epochs ({config.epochs}), got {config.warmup_epochs}")


@cache
def _choices(config_class: type[TrainConfig]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """The fields that hold one of a few words: which, and whether None stands for one.

    Kept, since reading the hints takes longer than all checks together.
    """
    choices = {}
    for name, hint in get_type_hints(config_class).items():
        kinds = [hint] if get_origin(hint) is Literal else [kind for kind in get_args(hint) if kind is not type(None)]
        if len(kinds) == 1 and get_origin(kinds[0]) is Literal:
            choices[name] = get_args(kinds[0]), kinds[0] is not hint
    return choices


@cache
def _numbers(config_class: type[TrainConfig]) -> dict[str, tuple[type, bool]]:
    """The fields that hold a number, or several: of which type, and whether None stands for one."""
    numbers = {}
    for name, hint in get_type_hints(config_class).items():
        kinds = [kind for kind in get_args(hint) or (hint,) if kind not in (type(None), Ellipsis)]
        if kinds in ([int], [float]):
            numbers[name] = kinds[0], type(None) in get_args(hint)
    return numbers
