"""The pieces that constructors are given: refused where they cannot do their argument's part."""

from typing import Any

_PIECES: dict[str, tuple[str, tuple[str, ...]]] = {
    "direction": ("a direction, such as Gradient()", ("__call__", "needs_clean_gradient", "depends_on_scale")),
    "ball": ("Ball(...) or LayerBall(...)", ("farthest", "metric", "check_ascent_steps")),
    "metric": ("a metric, such as Adaptive()", ("scaling", "defaults", "check", "needs_names", "depends_on_scale")),
    "radius": ("a rule of the radius, such as Fixed()", ("__call__", "defaults", "check", "depends_on_scale")),
    "when": ("a rule of when to perturb, such as Every(2)", ("__call__",)),
    "combine": ("a combination, such as Perturbed()", ("__call__", "plain", "correction", "needs_clean_gradient")),
    "rho_schedule": ("a function of the step and a group, such as WarmUp(100)", ("__call__",)),
    "model": ("a torch.nn.Module", ("register_forward_pre_hook", "parameters")),
}


def check_pieces(**given: Any) -> None:
    """Refuse what cannot do its argument's part, a class in place of an instance for example; ``None`` is let through.

    Args:
        **given: By the names above.

    Raises:
        TypeError: It is something else.
    """
    for name, piece in given.items():
        kind, needed = _PIECES[name]
        if name == "when" and hasattr(piece, "decide"):  # one that looks at the gradient
            needed = ("decide",)
        if piece is not None and (isinstance(piece, type) or not all(hasattr(piece, each) for each in needed)):
            raise TypeError(f"{name} must be {kind}, got {piece!r}")
