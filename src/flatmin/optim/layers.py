"""A ball for each layer: every parameter tensor moves by a length of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatmin.optim.balls import Perturbation
from flatmin.optim.metrics import Identity, Metric
from flatmin.optim.space import Space


@dataclass(frozen=True)
class LayerBall:
    """``||eps_l||_2 <= rho`` for each parameter tensor l, or ``rho ||w_l||`` with the trust ratio.

    Args:
        trust_ratio: Make the radius of a layer proportional to the length of its weights.
        joint_vectors: Divide the gradient of a tensor of one dimension (bias, norm layer) by the length of the whole
            gradient in place of its own, as the code of ZSharp's author does.

    References:
        With the trust ratio: Liu et al. (2022), arXiv:2203.02714 (Look-LayerSAM), Eq. 8. Without: Yun (2025),
        arXiv:2505.02369 (ZSharp), Algorithm 1; its code: YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-
        Filtering, ``main.py``.
    """

    trust_ratio: bool = False
    joint_vectors: bool = False

    depends_on_scale = False

    @property
    def metric(self) -> Metric:
        """The Euclidean one."""
        return Identity()

    @property
    def defaults(self) -> Mapping[str, Any]:
        """None beside rho."""
        return {}

    def check(self, options: Mapping[str, Any]) -> None:
        """Nothing to check."""

    def check_ascent_steps(self, ascent_steps: int) -> None:
        """Refuse several ascents: nobody has published a projection to these balls."""
        if ascent_steps != 1:
            raise ValueError(f"ascent_steps must be 1 with a ball for each layer, got {ascent_steps}")

    def farthest(self, space: Space, direction: list[Tensor], scaling: list[Tensor] | None) -> Perturbation:
        """``eps_l = rho d_l / ||d_l||``, times ``||w_l||`` with the trust ratio; zero where d_l is.

        Args:
            space: The parameters; a group that is maximised goes the other way.
            direction: d, one tensor per parameter.
            scaling: Not used: the metric is Euclidean.
        """
        norms = space.norms(direction)
        if self.joint_vectors:
            whole = space.norm(space.grads)
            norms = [whole if owner.dim() < 2 else norm for owner, norm in zip(space.owners, norms, strict=True)]
        lengths = torch.stack([norm.to(direction[0].device) for norm in norms])
        is_finite = lengths.isfinite().all()
        reach = torch.where(is_finite & (lengths > 0), 1 / lengths, 0.0)
        if self.trust_ratio:
            reach = reach * torch.stack([length.to(reach.device) for length in space.norms(space.params)])
        radii = space.per_param([group.radius for group in space.groups])
        scales = [(r * rho).to(p.device) for r, rho, p in zip(reach.unbind(), radii, space.params, strict=True)]
        return Perturbation(direction, scales, is_finite)

    def project(self, space: Space, steps: list[Tensor], scaling: list[Tensor] | None) -> list[Tensor]:
        """Never asked for, see ``check_ascent_steps``."""
        raise NotImplementedError
