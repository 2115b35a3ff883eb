"""SAM: the gradient at the worst point of a ball around the weights."""

from typing import Literal, Unpack

from torch.optim import Optimizer

from flatmin.arguments import check_choice
from flatmin.optim.balls import Ball
from flatmin.optim.directions import RandomDirection
from flatmin.optim.engine import SharpnessAware
from flatmin.optim.options import EngineOptions
from flatmin.optim.wrapper import check_base


class SAM(SharpnessAware):
    """Sharpness-Aware Minimization: ``eps = rho * g / ||g||_2``, then a base step with the gradient at ``w + eps``.

    Cost: two forward-backward passes a step, and one copy of the parameters during the second.

    Args:
        base: The optimizer that takes the step.
        rho: Radius, ``>= 0``. The default is the paper's for WRN-28-10 on CIFAR-10 (Table 6), "a solid default".
        p: Order of the norm that bounds the perturbation, from 1 to infinity; the dual formula is Eq. 2.
        direction: The gradient, or the paper's control, a random direction of the same length (Appendix C.5). The first
            pass then only shows the rise of the loss; ``OnePass`` with ``RandomDirection`` does without it.
        seed: Of the random direction.
        **options: See ``SharpnessAware``.

    References:
        Foret et al. (2021), arXiv:2010.01412, Algorithm 1.

    Example:
        >>> import torch, flatmin
        >>> model = torch.nn.Linear(3, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = flatmin.SAM(base, rho=0.05, model=model)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(2, 3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        p: float = 2.0,
        direction: Literal["gradient", "random"] = "gradient",
        seed: int = 0,
        **options: Unpack[EngineOptions],
    ) -> None:
        check_base(base)  # here too: a class and its keywords would fail for a keyword
        check_choice("direction", direction, ("gradient", "random"))
        drawn = RandomDirection(seed, after_clean_pass=True) if direction == "random" else None
        super().__init__(base, rho, direction=drawn, ball=Ball(p), **options)
