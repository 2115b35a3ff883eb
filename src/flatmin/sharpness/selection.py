"""Which parameters a measure moves."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

Selection = str | Sequence[str] | Callable[[str, Tensor], bool]


def select_params(model: nn.Module, selection: Selection | None) -> dict[str, Tensor]:
    """The parameters that are chosen and not frozen, by name, in the order of ``model.named_parameters()``.

    A parameter that several modules share has a name in each, and is chosen by any of them.

    Args:
        model: The module that holds them.
        selection: Names of parameters or of modules, one or several; a predicate ``(name, param) -> bool``; ``None``
            for all.

    Raises:
        ValueError: A name matches nothing, nothing is left, or a chosen parameter is not real.
    """
    every = [(name, param) for name, param in model.named_parameters(remove_duplicate=False) if param.numel() > 0]
    is_chosen = selection if callable(selection) else _by_name(selection, [name for name, _ in every])
    wanted = {param for name, param in every if is_chosen(name, param)}
    named: dict[str, Tensor] = dict(model.named_parameters())
    chosen = {name: param for name, param in named.items() if param in wanted and param.requires_grad}
    if not chosen:
        raise ValueError("params must choose at least one parameter that requires a gradient, got none")
    for name, param in chosen.items():
        if param.is_complex():
            raise ValueError(f"chosen parameters must be real, got {param.dtype} for {name!r}")
    return chosen


def described(selection: Selection | None) -> str:
    """The selection in words, for the settings of a result."""
    if selection is None:
        return "all"
    if callable(selection):
        return getattr(selection, "__name__", type(selection).__name__)
    return selection if isinstance(selection, str) else ", ".join(selection)


def _by_name(selection: str | Sequence[str] | None, names: Sequence[str]) -> Callable[[str, Tensor], bool]:
    if selection is None:
        return lambda name, param: True
    wanted = [selection] if isinstance(selection, str) else list(selection)
    for one in wanted:
        if not any(_is_in(name, one) for name in names):
            raise ValueError(f"params must name parameters or modules of the model, got {one!r}")
    return lambda name, param: any(_is_in(name, one) for one in wanted)


def _is_in(name: str, one: str) -> bool:
    return name == one or name.startswith(f"{one}.")
