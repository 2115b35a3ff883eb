"""Combinations: from the gradients found to the one that the base optimizer follows."""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from flatmin.arguments import check_choice, check_number
from flatmin.optim.groups import is_perturbed
from flatmin.optim.space import Space


class Combine(ABC):
    """A rule that merges the clean gradient g and the perturbed gradient g_p.

    Where the loss is scaled for mixed precision both carry the same factor, so the result must carry it too: a rule is
    homogeneous of degree 1 in the two together.

    Attributes:
        needs_clean_gradient: Whether g is kept through the second pass; otherwise its memory is freed before.
        depends_on_scale: Whether the rule needs to know that factor; ``space.loss_scale`` has it.
        remembers: Names under which tensors are kept between steps.
    """

    needs_clean_gradient = False
    depends_on_scale = False
    remembers: tuple[str, ...] = ()

    @abstractmethod
    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """The gradient to follow.

        Args:
            space: The parameters, at w.
            clean: g at w; zero where a parameter had none; empty unless asked for.
            perturbed: g_p at w + eps, one tensor per parameter; zero where it had none there; may be written into.
        """

    def plain(self, space: Space, grads: list[Tensor]) -> list[Tensor]:
        """The gradient to follow in a step that is not perturbed.

        Args:
            space: The parameters, at w.
            grads: g at w; may be written into.
        """
        return grads

    def correction(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor] | None:
        """A further gradient, followed with the group's lr after the base optimizer's step; none by default."""
        return None


class Perturbed(Combine):
    """Follow the gradient at the perturbed point and forget the other one.

    References:
        Foret et al. (2021), arXiv:2010.01412, Eq. 3 and Algorithm 1.
    """

    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """``g_p``, as it is."""
        return perturbed


class Blend(Combine):
    """``(1 - alpha) g + alpha g_p``: a penalty on the gradient's norm; SAM for alpha = 1.

    Args:
        alpha: Weight of the perturbed gradient, ``>= 0``; above 1 it goes beyond SAM.
        unit_clean: Blend with ``g / ||g||`` in place of g in the groups that are perturbed, as the code of the first
            paper's authors does; zero where g is.

    References:
        Zhao et al. (2022), arXiv:2202.03599 (gradient norm penalty), Eq. 12; Yue et al. (2023), arXiv:2305.15817
        (WSAM), where alpha = gamma / (1 - gamma); zhaoyang-0204/gnp, ``norm_perturbations``.
    """

    needs_clean_gradient = True

    def __init__(self, alpha: float, *, unit_clean: bool = False) -> None:
        check_number("alpha", alpha, ">= 0 and finite")
        self.alpha = alpha
        self.unit_clean = unit_clean
        self.depends_on_scale = unit_clean

    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """``(1 - alpha) g + alpha g_p``."""
        if self.alpha == 1.0:
            return perturbed
        if self.unit_clean:
            clean = self._unit(space, clean)
        return [torch.lerp(g, g_p, self.alpha) for g, g_p in zip(clean, perturbed, strict=True)]  # g where both agree

    @staticmethod
    def _unit(space: Space, clean: list[Tensor]) -> list[Tensor]:
        """``g / ||g||``, scaled as the loss; g itself in groups that are not perturbed."""
        length = space.norm(clean)
        unit = torch.where(length == 0, 0.0, (1.0 if space.loss_scale is None else space.loss_scale) / length)
        radii = [g.radius if is_perturbed(g.options) else 0.0 for g in space.groups]
        factors = space.per_param([_unless_zero(radius, unit) for radius in radii])
        return [g * factor.to(g.device, g.dtype) for g, factor in zip(clean, factors, strict=True)]


def _unless_zero(radius: float | Tensor, factor: Tensor) -> Tensor:
    """The factor, or 1 for a radius of 0; a radius that is a number does not become a tensor, which would be sent."""
    if isinstance(radius, Tensor):  # in a traced step
        return torch.where(radius == 0, 1.0, factor)
    return factor if radius else torch.ones_like(factor)


class Decoupled(Combine):
    """A base step with g, then ``w -= lr * weight * (g_p - g)``: the base's moments never see the sharpness term.

    Args:
        weight: Of the sharpness term, ``>= 0``.

    References:
        Yue et al. (2023), arXiv:2305.15817 (WSAM), Algorithm 2, where weight = gamma / (1 - gamma).
    """

    needs_clean_gradient = True

    def __init__(self, weight: float) -> None:
        check_number("weight", weight, ">= 0 and finite")
        self.weight = weight

    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """``g``; not finite where g_p is not."""
        return [torch.where(g_p.isfinite(), g, g_p) for g, g_p in zip(clean, perturbed, strict=True)]

    def correction(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """``weight * (g_p - g)``."""
        return [self.weight * (g_p - g) for g, g_p in zip(clean, perturbed, strict=True)]


class SurrogateGap(Combine):
    """Descend on the perturbed loss and, across it, ascend on the other, so that the gap between the two shrinks.

    ``"perturbed"``: ``g_p - alpha (g - proj_{g_p} g)``. ``"clean"``, the JAX release's other form:
    ``g + alpha (g_p - proj_g g_p)``.

    Args:
        alpha: Weight of the part across, ``>= 0``; with 0 the first form is SAM.
        minimised: Which loss is minimised.

    References:
        Zhuang et al. (2022), arXiv:2203.08065 (GSAM), Algorithm 1; big_vision, ``trainers/proj/gsam``.
    """

    needs_clean_gradient = True

    def __init__(self, alpha: float, minimised: Literal["perturbed", "clean"] = "perturbed") -> None:
        check_number("alpha", alpha, ">= 0 and finite")
        check_choice("minimised", minimised, ("perturbed", "clean"))
        self.alpha = alpha
        self.minimised = minimised

    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """The minimised loss's gradient, with alpha times the part of the other across it."""
        if self.minimised == "clean":
            return _plus(clean, self.alpha, across(space, perturbed, clean))
        return perturbed if self.alpha == 0.0 else _plus(perturbed, -self.alpha, across(space, clean, perturbed))


class Renormalised(Combine):
    """``(||g|| / ||g_p||) g_p``: the perturbed direction with the clean length.

    References:
        Tan et al. (2025), JMLR (StableSAM).
    """

    needs_clean_gradient = True

    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """``(||g|| / ||g_p||) g_p``; zero where g_p is."""
        length = space.norm(perturbed)
        factor = torch.where(length == 0, 0.0, space.norm(clean) / length)
        return [g_p * factor.to(g_p.device, g_p.dtype) for g_p in perturbed]


class Reuse(Combine):
    """SAM where the step is perturbed, and from there on its direction again: ``g + alpha (||g|| / ||g_v||) g_v``.

    ``g_v = g_p - proj_g g_p`` is the part of the perturbed gradient across the clean one, over the whole gradient, and
    is kept between steps: one more copy of the parameters.

    Args:
        alpha: Weight of the reused part, ``>= 0``.

    References:
        Liu et al. (2022), arXiv:2203.02714 (LookSAM), Algorithm 1.
    """

    needs_clean_gradient = True
    remembers: tuple[str, ...] = ("across_gradient",)

    def __init__(self, alpha: float) -> None:
        check_number("alpha", alpha, ">= 0 and finite")
        self.alpha = alpha

    def __call__(self, space: Space, clean: list[Tensor], perturbed: list[Tensor]) -> list[Tensor]:
        """``g_p``, and g_v is remembered."""
        space.remember("across_gradient", across(space, perturbed, clean))
        return perturbed

    def plain(self, space: Space, grads: list[Tensor]) -> list[Tensor]:
        """``g + alpha (||g|| / ||g_v||) g_v``; g alone before the first perturbed step."""
        kept = space.recall("across_gradient")
        if all(value is None for value in kept):
            return grads
        old = [torch.zeros_like(g) if value is None else value for g, value in zip(grads, kept, strict=True)]
        length = space.norm(old)
        factor = torch.where(length == 0, 0.0, self.alpha * space.norm(grads) / length)
        return [g + v * factor.to(g.device, g.dtype) for g, v in zip(grads, old, strict=True)]


def across(space: Space, tensors: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    """The part across another vector: ``a - (<a, b> / <b, b>) b``, over the whole gradient; a where b is zero."""
    square = space.dot(other, other)
    factor = torch.where(square == 0, 0.0, space.dot(tensors, other) / square)
    return [a - b * factor.to(b.device, b.dtype) for a, b in zip(tensors, other, strict=True)]


def _plus(left: list[Tensor], weight: float, right: list[Tensor]) -> list[Tensor]:
    return [a + weight * b for a, b in zip(left, right, strict=True)]
