"""SAM with the term of second order that it drops: the gradient of the loss at the worst point, eps included."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flatmin.optim.balls import spread
from flatmin.optim.base_step import guarded_step
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.freshness import is_fresh, mark_used
from flatmin.optim.generators import generators_of, set_generators
from flatmin.optim.groups import count_step, has_radius
from flatmin.optim.memory import Memory
from flatmin.optim.norms import cosine_of, joint_dot, joint_norm
from flatmin.optim.piece_check import check_pieces
from flatmin.optim.schedules import RhoSchedule, set_radii
from flatmin.optim.sharding import is_sharded
from flatmin.optim.space import ActiveGroup, Space, active_space, as_real, refuse_sparse
from flatmin.optim.where import masked
from flatmin.optim.wrapper import Wrapper, only_creates_state

_Slot = tuple[Any, str, Any]  # a module's parameters or buffers, a name in them, and a tensor


class SecondOrderSAM(Wrapper):
    """SAM whose gradient goes through the perturbation too: ``d/dw L(w + eps(w))`` with ``eps = rho g / ||g||_2``.

    With H the Hessian at w, ``u = g / ||g||`` and ``g_p`` the gradient at w + eps, which SAM follows alone, the step is
    along::

        g* = g_p + (rho / ||g||) H (g_p - <g_p, u> u)

    where the second term is found by differentiating eps. The paper drops it, and found that keeping it does not help.
    At g = 0, where eps is 0 and has no derivative, the term is 0.

    The closure differs from that of the other methods: it returns the loss and runs no backward pass. It is called
    twice, and both times through ``model``, at w and at w + eps; the weights themselves are not moved. The second call
    sees the random numbers of the first and leaves no trace in buffers.

    Cost: the passes of SAM and a backward pass through the first backward pass; the graphs of both passes are alive at
    once. Every operation must have a second derivative.

    Args:
        base: The optimizer that takes the step; its parameters must be those of ``model``, all or some. Groups that are
            maximised, or left out of the perturbation by ``flatmin.param_groups``, are so here too.
        rho: Radius, ``>= 0``, a group entry; with 0 this is the base optimizer. The default is SAM's.
        model: The module that the closure calls; no wrapper that reduces gradients (DistributedDataParallel).
        skip_nonfinite: Skip a step with a gradient that is not finite.
        rho_schedule: Sets every group's rho before each step.

    Attributes:
        diagnostics: Losses and counts as of other methods; ``cosine`` is that of g* and g_p, the paper's Figure 4.

    Raises:
        TypeError: ``base`` is no optimizer, is itself sharpness-aware, or drives a closure of its own (LBFGS).
        ValueError: A parameter is not one of the model's, or is sharded; the model has a recurrent layer of torch or is
            in DistributedDataParallel; or rho is outside its domain.

    References:
        Foret et al. (2021), arXiv:2010.01412, section 2 (before Eq. 3) and Appendix C.4.

    Example:
        >>> import torch
        >>> from flatmin.optim import SecondOrderSAM
        >>> model = torch.nn.Linear(3, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = SecondOrderSAM(base, rho=0.05, model=model)
        >>> loss = optimizer.step(lambda: model(torch.ones(2, 3)).square().mean())
    """

    def __init__(
        self,
        base: Optimizer,
        rho: float = 0.05,
        *,
        model: nn.Module,
        skip_nonfinite: bool = True,
        rho_schedule: RhoSchedule | None = None,
    ) -> None:
        check_pieces(model=model, rho_schedule=rho_schedule)
        super().__init__(base, {"rho": rho})
        self.model = model
        self.skip_nonfinite = skip_nonfinite
        self.rho_schedule = rho_schedule
        self.diagnostics = Diagnostics()
        self._memory = Memory(base)
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "model must not be in DistributedDataParallel, which would not average these gradients, got one that "
                "is: replicas would drift apart"
            )
        if any(map(is_sharded, self._params())):
            raise ValueError("base must have whole parameters, got sharded ones (DTensor)")
        known = set(model.parameters())
        if any(param not in known for param in self._params()):
            raise ValueError("base must have parameters of model alone, got others")
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            raise ValueError("model must have no recurrent layer of torch, which holds its weights in a second place")

    @overload  # type: ignore[override]  # as the other methods
    def step(self, closure: Callable[[], Tensor]) -> Tensor: ...

    @overload
    def step(self, closure: None = None) -> None: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Take a step and return the loss at w.

        Args:
            closure: Computes the loss of one batch with ``model`` and returns it, differentiable. It is called twice.
                Only torch.distributed.checkpoint gives none, to have the base optimizer's state created.

        Raises:
            TypeError: There is no closure, or several, or it returns no scalar tensor.
            RuntimeError: The loss depends on no parameter, some gradient is sparse, or there are gradients that no step
                has used: of a backward pass in the closure, or before the step, which would be lost.
        """
        if closure is None and only_creates_state(self):
            self._create_state(())
            return None
        if not callable(closure):
            raise TypeError(f"closure must be one function that returns the loss, got {closure!r}")
        set_radii(self.rho_schedule, self.param_groups)
        with torch.enable_grad():
            loss, followed = self._differentiated(closure)
        for param in self._params():  # of one that was frozen since, the last step's gradient is there still
            param.grad = followed.get(param)
        space = active_space(self.base, {}, self._memory)
        is_taken = guarded_step(self.base, space, found_inf=None, looks=self.skip_nonfinite)
        mark_used(self._params())
        if is_taken is not False:
            count_step(self.param_groups)
        self.diagnostics.count(has_radius(self.param_groups), is_taken)
        return loss

    def _differentiated(self, closure: Callable[[], Tensor]) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """The loss at w, and g* of every parameter that it depends on."""
        at_start = generators_of(self._params())
        buffers = [(place, name, None if b is None else b.clone()) for place, name, b in _buffers_of(self.model)]
        loss = _checked(closure())
        params, grads = self._gradients_at_w(loss)
        after_first = generators_of(params)
        steps = self._steps(params, grads)
        moved = [(param + step).detach().requires_grad_() for param, step in zip(params, steps, strict=True)]
        try:
            set_generators(at_start)
            with _standing_at(self.model, dict(zip(params, moved, strict=True)), buffers):
                loss_there = _checked(closure())
        finally:
            set_generators(after_first)
        first_order = _gradients([loss_there], moved)
        # steps is a function of w: its derivative, applied to the gradient at w + eps, is the term that SAM drops.
        second_order = _gradients(steps, params, weights=first_order)
        followed = [g + term for g, term in zip(first_order, second_order, strict=True)]
        self.diagnostics.measure_losses(loss.detach(), loss_there.detach())
        self.diagnostics.cosine = _cosine(first_order, followed)
        return loss.detach(), dict(zip(params, followed, strict=True))

    def _gradients_at_w(self, loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters that the loss depends on, and its gradients, with their graph."""
        if any(is_fresh(param.grad) and param.grad is not None and bool(param.grad.any()) for param in self._params()):
            raise RuntimeError(
                "closure must run no backward pass, which SecondOrderSAM does itself, and none before step() may leave "
                "gradients, which would be lost: got parameters with a gradient that no step has used"
            )
        params = [param for param in self._params() if param.requires_grad]
        found: Sequence[Tensor | None] = ()
        if params and loss.requires_grad:
            found = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        used = {param: grad for param, grad in zip(params, found, strict=bool(found)) if grad is not None}
        if not used:
            raise RuntimeError("closure must return a loss that depends on a parameter which requires a gradient")
        refuse_sparse(used.values())
        return list(used), list(used.values())

    def _steps(self, params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """eps, with the graph from w to it."""
        grad_of, groups = dict(zip(params, grads, strict=True)), []
        for options in self.param_groups:
            owners = [param for param in options["params"] if param in grad_of]
            groups.append(ActiveGroup(owners, owners, [grad_of[owner] for owner in owners], None, options))
        space = Space(groups).perturbed()
        steps = {param: torch.zeros_like(param) for param in params}
        if not space.owners:
            return list(steps.values())
        along = masked(space, space.grads)
        norm = _norm(along)
        scale = torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)
        scales = spread(space, [group.radius * scale for group in space.groups])
        steps |= {w: factor * grad for w, factor, grad in zip(space.owners, scales, along, strict=True)}
        return list(steps.values())


def _buffers_of(model: nn.Module) -> list[_Slot]:
    """Every buffer of the modules, with the place that holds it."""
    return [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]


@contextmanager
def _standing_at(model: nn.Module, moved: Mapping[Tensor, Tensor], buffers: list[_Slot]) -> Iterator[None]:
    """Let the modules have other parameters and buffers inside the block.

    torch.func.functional_call would do, but a module that has two names, as wrappers give it, keeps the other tensors.
    """
    params: list[_Slot] = [
        (module._parameters, name, param)
        for module in model.modules()
        for name, param in module._parameters.items()
        if param in moved
    ]
    own = [*params, *_buffers_of(model)]
    try:
        for place, name, value in [*((place, name, moved[param]) for place, name, param in params), *buffers]:
            place[name] = value
        yield
    finally:
        for place, name, value in own:
            place[name] = value


def _gradients(outputs: list[Tensor], inputs: list[Tensor], *, weights: list[Tensor] | None = None) -> list[Tensor]:
    """``d <weights, outputs> / d inputs``, with zeros where there is no connection: a linear loss has no Hessian."""
    connected = [index for index, output in enumerate(outputs) if output.requires_grad]
    if not connected:
        return [torch.zeros_like(each) for each in inputs]
    found = torch.autograd.grad(
        [outputs[index] for index in connected],
        inputs,
        grad_outputs=None if weights is None else [weights[index] for index in connected],
        allow_unused=True,
    )
    return [torch.zeros_like(each) if grad is None else grad for each, grad in zip(inputs, found, strict=True)]


def _checked(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"closure must return the loss as a scalar tensor, got {got}")
    return loss


def _norm(grads: list[Tensor]) -> Tensor:
    """``joint_norm``, which has no derivative."""
    real = [as_real(grad.resolve_conj()) for grad in grads]
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in real]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))
    return norm


def _cosine(left: list[Tensor], right: list[Tensor]) -> Tensor:
    left, right = ([as_real(x.resolve_conj()) for x in tensors] for tensors in (left, right))
    return cosine_of(joint_norm(left), joint_norm(right), joint_dot(left, right))
