"""Which parameters are perturbed: parameter groups for the base optimizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from flatmin.optim.sharding import is_sharded, local, placed_like
from flatmin.optim.space import Space

Perturb = (
    Literal["norm", "no_norm"]
    | type[nn.Module]
    | tuple[type[nn.Module], ...]
    | Callable[[str, nn.Parameter], bool]
    | Mapping[str, Tensor]
)

_CHOICES = 'perturb must be "norm", "no_norm", module classes, a function or masks by name, got {!r}'
_NORM_LAYERS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module, perturb: Perturb, groups: Iterable[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Split parameter groups into a perturbed and an unperturbed part each, for the base optimizer's constructor.

    The norm of the gradient is then over the perturbed part alone, and only that part is copied during the second pass.
    A group of the base has the entry ``perturb``; one that lacks it is perturbed.

    Args:
        model: Whose parameters they are.
        perturb: What is perturbed: ``"norm"``, the parameters of norm layers (BatchNorm, LayerNorm, GroupNorm,
            InstanceNorm, RMSNorm of torch, and other modules whose class name ends in "Norm", "Norm1d", "Norm2d" or
            "Norm3d"); ``"no_norm"``, all others; a module class or several, the parameters directly in such modules; a
            function of a parameter's name and the parameter; or boolean masks by parameter name, whose true entries
            are perturbed. Masks are saved with the groups; for sharded parameters (DTensor) they must be sharded too.
        groups: Parameter groups with settings of their own, which both parts keep, such as timm's; all parameters in
            one group by default. Parameters that they leave out are left out.

    Returns:
        Groups with ``params`` (pairs of name and parameter, which the base takes as its ``param_names``), ``perturb``
        and the settings; empty ones are left out.

    Raises:
        ValueError: Nothing would be perturbed, or ``perturb`` is none of these.

    References:
        Mueller et al. (2023), arXiv:2306.04226 (SAM-ON), for norm layers only.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> [(len(group["params"]), group["perturb"]) for group in flatmin.param_groups(model, "norm")]
        [(2, True), (2, False)]
    """
    chosen = _chosen(model, perturb)
    names = {param: name for name, param in model.named_parameters()}
    given = [{"params": list(model.parameters())}] if groups is None else [dict(group) for group in groups]
    split = []
    for group in given:
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in group.pop("params")]
        if not all(param in names for param in params):
            raise ValueError("groups must hold parameters of the model, got one that is not")
        group.pop("param_names", None)
        for is_perturbed in (True, False):
            part = [param for param in params if (param in chosen) == is_perturbed]
            if not part:
                continue
            settings: dict[str, Any] = {"params": [(names[param], param) for param in part], "perturb": is_perturbed}
            if is_perturbed and isinstance(perturb, Mapping):
                settings["masks"] = [perturb[names[param]] for param in part]
            split.append({**group, **settings})
    if not any(group["perturb"] for group in split):
        raise ValueError(f"perturb must choose some parameter of the model, got {perturb!r}")
    return split


def masked(space: Space, tensors: list[Tensor]) -> list[Tensor]:
    """A direction with zeros where the groups' masks are false."""
    if not any("masks" in group.options for group in space.groups):
        return tensors
    masks = {
        param: mask
        for group in space.groups
        for param, mask in zip(group.options["params"], group.options.get("masks", ()), strict=False)
    }
    return [
        _with_zeros(tensor, masks[owner], owner) if owner in masks else tensor
        for owner, tensor in zip(space.owners, tensors, strict=True)
    ]


def _with_zeros(tensor: Tensor, mask: Tensor, owner: Tensor) -> Tensor:
    stays = ~local(placed_like(mask, owner)).to(tensor.device)
    if tensor.dim() > owner.dim():  # a complex parameter as a real view
        stays = stays.unsqueeze(-1)
    return tensor.masked_fill(stays, 0.0)


def _chosen(model: nn.Module, perturb: Perturb) -> set[Tensor]:
    every: set[Tensor] = set(model.parameters())
    if isinstance(perturb, Mapping):
        return _checked_masks(model, perturb)
    if isinstance(perturb, str):
        if perturb not in ("norm", "no_norm"):
            raise ValueError(_CHOICES.format(perturb))
        norm: set[Tensor] = {
            p for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)
        }
        return norm if perturb == "norm" else every - norm
    if not isinstance(perturb, tuple) and not callable(perturb):
        raise ValueError(_CHOICES.format(perturb))
    if isinstance(perturb, type | tuple):
        modules = [module for module in model.modules() if isinstance(module, perturb)]
        return {param for module in modules for param in module.parameters(recurse=False)}
    return {param for name, param in model.named_parameters() if perturb(name, param)}


def _checked_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> set[Tensor]:
    params: dict[str, Tensor] = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in params or mask.shape != params[name].shape or mask.dtype != torch.bool:
            raise ValueError(
                f"perturb must hold boolean masks shaped like the parameters they are named for, got {mask.dtype} "
                f"{tuple(mask.shape)} for {name!r}"
            )
        if is_sharded(params[name]) and not is_sharded(mask):
            raise ValueError(
                f"perturb must hold masks that are spread over processes like the parameters, got a whole one for "
                f"{name!r}: torch.distributed.tensor.distribute_tensor spreads it"
            )
    return {params[name] for name in masks}


def _is_norm(module: nn.Module) -> bool:
    suffixes = ("norm", "norm1d", "norm2d", "norm3d")
    return isinstance(module, _NORM_LAYERS) or type(module).__name__.lower().endswith(suffixes)
