"""bSAM: SAM as Bayesian inference, with a posterior to sample from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.arguments import check_number
from flatmin.optim.accumulation import as_kept, reduced
from flatmin.optim.closures import Closure, as_closures
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.freshness import mark_used
from flatmin.optim.groups import count_step, has_radius, radius_of
from flatmin.optim.leftover import refusing_leftovers
from flatmin.optim.norms import are_finite
from flatmin.optim.perturbation import perturb_
from flatmin.optim.piece_check import check_pieces
from flatmin.optim.replay import Replay
from flatmin.optim.saved import Saved
from flatmin.optim.seeding import seed_of
from flatmin.optim.sharding import is_sharded
from flatmin.optim.space import refuse_sparse
from flatmin.optim.wrapper import kept_in_copies, only_creates_state

_RisesAndGradients = dict[Tensor, tuple[Tensor, Tensor]]  # sqrt(s) |g| and g_p of each parameter


class BSAM(Optimizer):
    """Bayesian SAM: an Adam-like optimizer whose scale s is the precision of a Gaussian posterior ``N(w, 1 / (N s))``.

    A step with the loss averaged over a batch is, entry by entry::

        g    = gradient at a sample of the posterior
        g_p  = gradient at w + rho g / s
        m    = beta1 m + (1 - beta1) (g_p + weight_decay w)
        w    = w - lr m / s
        s    = beta2 s + (1 - beta2) (sqrt(s) |g| + damping + weight_decay)

    With a list of closures, one per micro-batch, each has a sample and a perturbation of its own, and g_p and
    ``sqrt(s) |g|`` are averaged; the paper used eight. Cost: two forward-backward passes a step; m and s are kept
    between steps, and a copy of the parameters and ``sqrt(s) |g|`` during the second pass, with several micro-batches
    two sums too.

    Groups of ``flatmin.param_groups`` that are left out of the perturbation have samples and no perturbation.

    Args:
        params: Parameters or parameter groups; ``lr``, ``rho`` and the other numbers are group entries.
        lr: Learning rate, ``> 0``. This default, betas and rho are those of the authors' README for ResNet-18 on
            CIFAR-10; damping and initial_precision those of their ``train.py``.
        num_data: N, the size of the training set, ``>= 1``. The README multiplies it by 4 for augmentation.
        betas: beta1 and beta2, each in [0, 1).
        rho: Size of the perturbation, ``>= 0``.
        weight_decay: The prior's precision divided by N, ``>= 0``. The default is ours, between those of two versions
            of the README, 40 / 200,000 and 10 / 200,000.
        damping: Added to the precision, ``>= 0``.
        initial_precision: s at the beginning, ``> 0``.
        seed: Of the samples, which are functions of it and the step.
        model: As in ``SharpnessAware``: with it the second pass repeats the random numbers of the first and leaves its
            buffers alone.

    Attributes:
        diagnostics: Counts, and the loss at the sample of the posterior.

    Raises:
        ValueError: A hyperparameter is outside its domain, a parameter is sharded or complex, or a group is to be
            maximised or has masks.

    References:
        Möllenhoff and Khan (2023), ICLR, arXiv:2210.01620, Algorithm 1; team-approx-bayes/bayesian-sam, ``optim.py``.
    """

    def __init__(  # noqa: PLR0913 - each number of the box is one keyword
        self,
        params: Any,
        lr: float = 0.5,
        *,
        num_data: int,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.01,
        weight_decay: float = 1e-4,
        damping: float = 0.1,
        initial_precision: float = 1.0,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        check_pieces(model=model)
        check_number("num_data", num_data, ">= 1")
        self.num_data = num_data
        self.seed = seed
        self.diagnostics = Diagnostics()
        self._replay = Replay(model) if model is not None else None
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "weight_decay": weight_decay,
            "damping": damping,
            "initial_precision": initial_precision,
            "num_steps": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with its own numbers or those given to the constructor."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        _check_params(self.param_groups[-1]["params"])

    @overload  # type: ignore[override]  # torch types a closure's loss as a float, and every user returns the tensor
    def step(self, closure: Closure | Sequence[Closure]) -> Tensor: ...

    @overload
    def step(self, closure: None = None) -> None: ...

    @torch.no_grad()
    def step(self, closure: Closure | Sequence[Closure] | None = None) -> Tensor | None:
        """Take a step.

        Args:
            closure: Zeroes the gradients, computes the loss, calls ``backward`` and returns the loss; called twice. Or
                a list of them, one per micro-batch. Only torch.distributed.checkpoint gives none, to have the state
                created.

        Returns:
            The loss at the sample of the posterior; of a list the mean.

        Raises:
            TypeError: There is no closure.
            RuntimeError: A closure ran no backward pass.
        """
        if closure is None and only_creates_state(self):
            self._create_state([param for param in self._params() if param.grad is not None])
            return None
        closures = as_closures(closure)
        closures[0] = refusing_leftovers(closures[0], self._params())
        self.diagnostics.begin_step()
        total: _RisesAndGradients = {}
        losses = []
        try:
            for index, each in enumerate(closures):
                loss, found = self._both_passes(each, index)
                losses.append(loss)
                _add_(total, found, is_kept=len(closures) > 1)
            self._update(total, len(closures))
        finally:
            mark_used(self._params())
        mean: Tensor = reduced(losses, "mean")
        self.diagnostics.loss = mean.detach()
        return mean

    @contextmanager
    def sampled(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Put a sample of the posterior ``N(w, 1 / (N s))`` in place of w inside the block, for prediction.

        Average the predicted probabilities over several samples.

        Args:
            generator: Source of the sample; torch's own where it is ``None``.
        """
        with torch.no_grad():
            saved = self._perturb_by_noise(dict.fromkeys({param.device for param in self._params()}, generator))
        try:
            yield
        finally:
            with torch.no_grad():
                saved.restore_()

    def __getstate__(self) -> dict[str, Any]:
        return kept_in_copies(self)

    def _both_passes(self, closure: Closure, index: int) -> tuple[Tensor, _RisesAndGradients]:
        """The loss at a sample; ``sqrt(s) |g|`` there and the gradient at w + rho g / s, zero where one is missing."""
        saved = None
        if self._replay is not None:
            self._replay.begin(in_closure=True)
        try:
            number = seed_of(self.seed, self.param_groups[0]["num_steps"], index)
            devices = {param.device for param in self._params()}
            saved = self._perturb_by_noise({d: torch.Generator(d).manual_seed(number) for d in devices})
            self._clear_gradients()
            loss = closure()
            saved.restore_()
            saved = None
            params, grads = self._gradients()
            precisions = self._precisions(params)
            rises = torch._foreach_mul(torch._foreach_sqrt(precisions), grads)
            torch._foreach_abs_(rises)
            saved = self._perturb_by(params, torch._foreach_div(grads, precisions))
            if self._replay is not None:
                self._replay.rewind()
            self._clear_gradients()
            closure()
            there = dict(zip(*self._gradients(), strict=True))
        finally:
            if saved is not None:
                saved.restore_()
            if self._replay is not None:
                self._replay.finish()
        here = dict(zip(params, rises, strict=True))
        return loss, {p: (_or_zeros(here.get(p), p), _or_zeros(there.get(p), p)) for p in {**here, **there}}

    def _update(self, total: _RisesAndGradients, number: int) -> None:
        """Momentum, weights and precision; nothing where a gradient is not finite."""
        is_finite = bool(are_finite([x for pair in total.values() for x in pair]))
        self.diagnostics.count(has_radius(self.param_groups), is_finite)
        if not is_finite:
            return
        count_step(self.param_groups)
        for group in self.param_groups:
            params = [param for param in group["params"] if param in total]
            if params:
                rises, grads = zip(*(total[param] for param in params), strict=True)
                if number > 1:
                    torch._foreach_div_(rises, number)
                    torch._foreach_div_(grads, number)
                self._update_group(group, params, rises, grads)

    def _update_group(
        self, group: dict[str, Any], params: list[Tensor], rises: tuple[Tensor, ...], grads: tuple[Tensor, ...]
    ) -> None:
        """The last three lines of the box; the rises are spent."""
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        self._create_state(params)
        momenta, precisions = ([self.state[param][name] for param in params] for name in ("momentum", "precision"))
        torch._foreach_lerp_(momenta, torch._foreach_add(grads, params, alpha=decay), 1.0 - beta1)
        torch._foreach_addcdiv_(params, momenta, precisions, value=-group["lr"])
        torch._foreach_add_(rises, group["damping"] + decay)
        torch._foreach_lerp_(precisions, rises, 1.0 - beta2)

    def _create_state(self, params: list[Tensor]) -> None:
        """Momentum 0 and the initial precision for those that have none yet."""
        for param, precision in zip(params, self._precisions(params), strict=True):
            if not self.state[param]:
                self.state[param].update(momentum=torch.zeros_like(param), precision=precision)

    def _perturb_by_noise(self, generators: dict[torch.device, torch.Generator | None]) -> Saved:
        params = [param for param in self._params() if param.requires_grad]
        if not params:
            return Saved()
        noises = [
            torch.randn(param.shape, generator=generators[param.device], dtype=param.dtype, device=param.device)
            for param in params
        ]
        torch._foreach_div_(noises, torch._foreach_sqrt(self._precisions(params)))
        return perturb_(params, noises, _scales(noises, [self.num_data**-0.5] * len(params)))

    def _perturb_by(self, params: list[Tensor], steps: Sequence[Tensor]) -> Saved | None:
        """To w + rho g / s; nowhere where that is not finite, since the update will be skipped."""
        if not are_finite(steps):
            return None
        radii = {param: radius_of(group) for group in self.param_groups for param in group["params"]}
        return perturb_(params, steps, _scales(steps, [radii[param] for param in params]))

    def _precisions(self, params: list[Tensor]) -> list[Tensor]:
        """The scale s of each parameter; the initial one before its first step."""
        found = [self.state[param]["precision"] for param in params if self.state.get(param)]
        if len(found) == len(params):
            return found
        initial = {param: group["initial_precision"] for group in self.param_groups for param in group["params"]}
        known = [self.state[param].get("precision") if param in self.state else None for param in params]
        return [torch.full_like(p, initial[p]) if s is None else s for p, s in zip(params, known, strict=True)]

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that have a gradient, and the gradients."""
        params = [param for param in self._params() if param.grad is not None]
        if not params:
            raise RuntimeError("no parameter has a gradient: backward() must run inside the closure")
        grads = [param.grad for param in params if param.grad is not None]
        refuse_sparse(grads)
        return params, grads

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _clear_gradients(self) -> None:
        for param in self._params():
            param.grad = None


def _or_zeros(found: Tensor | None, param: Tensor) -> Tensor:
    return torch.zeros_like(param) if found is None else found


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("lr", "rho", "weight_decay", "damping", "initial_precision"):
        is_positive = name in ("lr", "initial_precision")
        value = float(options[name]) if isinstance(options[name], Tensor) else options[name]
        check_number(name, value, "> 0 and finite" if is_positive else ">= 0 and finite")
    if not isinstance(options["betas"], Sequence) or len(options["betas"]) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1), got {options['betas']}")
    for beta in options["betas"]:
        check_number("betas", beta, "two numbers in [0, 1)")
    for name in ("maximize", "masks"):
        if options.get(name):
            raise ValueError(f"groups must have no {name} with BSAM, got one that has")


def _check_params(params: Sequence[Tensor]) -> None:
    if any(map(is_sharded, params)):
        raise ValueError(
            "params must be whole, got sharded ones (DTensor), because BSAM draws its noise for whole tensors: "
            "use DistributedDataParallel"
        )
    if any(map(torch.is_complex, params)):
        raise ValueError("params must be real, got complex ones, of which the posterior is not defined")


def _add_(total: _RisesAndGradients, found: _RisesAndGradients, *, is_kept: bool) -> None:
    """Add what a micro-batch has found; the first one's tensors take the sums, so those of DDP must be kept apart."""
    for param, (rise, g_p) in found.items():
        if param in total:
            total[param][0].add_(rise)
            total[param][1].add_(g_p)
        else:
            total[param] = rise, as_kept(g_p) if is_kept else g_p


def _scales(tensors: Sequence[Tensor], numbers: Sequence[float]) -> list[Tensor]:
    """The numbers as 0-dim tensors, each beside its tensor; those that agree are one and the same."""
    made: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}
    for tensor, number in zip(tensors, numbers, strict=True):
        if (number, tensor.device, tensor.dtype) not in made:
            made[number, tensor.device, tensor.dtype] = tensor.new_tensor(number)
    return [made[number, tensor.device, tensor.dtype] for tensor, number in zip(tensors, numbers, strict=True)]
