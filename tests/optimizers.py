"""The table of all optimizers: a new method is tested by being listed here."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatmin
import flatmin.compat
from problems import TinyNetwork, batches, tiny_network


@dataclass(frozen=True)
class Row:
    """One optimizer.

    Attributes:
        name: The test's id.
        method: Called with a base, ``rho`` and ``model``.
        options: Its further keywords.
        num_closure_calls: Documented calls of the closure in a step.
        p: Order of the ball's norm.
        scale: The metric's T, written down again for the references: of a parameter's name and value.
        num_copies: Copies of the parameters made for the second pass.
        num_corrections: Copies kept for after the base optimizer's step, once for a micro-batch and once for their sum.
        kept: Names of what is kept in the state between steps, one copy of the parameters each.
        moves_all: Whether all parameters are perturbed; the others' clean gradients then matter, and their groups.
        renews_before: Whether that is renewed before the second pass, when the old is there still, or after it.
        invalid: Keywords outside their domain, and what the error must say.
    """

    name: str
    method: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    num_closure_calls: int = 2
    p: float = 2.0
    scale: Callable[[str, Tensor], Tensor] = lambda name, w: torch.ones_like(w)
    num_copies: int = 1
    num_corrections: int = 0
    kept: tuple[str, ...] = ()
    renews_before: bool = True
    moves_all: bool = True
    invalid: tuple[tuple[dict[str, Any], str], ...] = ()

    @property
    def num_renewed(self) -> int:
        """Copies of the parameters renewed before the second pass."""
        return len(self.kept) if self.renews_before else 0

    def build(self, base: torch.optim.Optimizer, model: nn.Module | None, rho: float = 0.1, **more: Any) -> Any:
        return self.method(base, rho, model=model, **self.options, **more)


def _port(base: torch.optim.Optimizer, rho: float, **options: Any) -> flatmin.compat.SAM:
    return flatmin.compat.SAM(base.param_groups, base, rho, **options)


def _samon(base: torch.optim.Optimizer, rho: float, *, model: nn.Module | None, **options: Any) -> flatmin.SAMON:
    """SAM-ON around a base made without its groups, which are split where they hold parameters of both kinds."""
    norms = {id(p) for m in model.modules() if isinstance(m, nn.BatchNorm1d) for p in m.parameters()} if model else None
    for group in [*base.param_groups]:
        others = [param for param in group["params"] if norms is not None and id(param) not in norms]
        group["params"] = [param for param in group["params"] if norms is None or id(param) in norms]
        if others:
            base.add_param_group({**group, "params": others, "perturb": False})
    base.param_groups[:] = [group for group in base.param_groups if group["params"]]
    return flatmin.SAMON(base, rho, model=model, **options)


def _weights_only(eta: float) -> Callable[[str, Tensor], Tensor]:
    return lambda name, w: w.abs() + eta if "weight" in name else torch.ones_like(w)


_RHO = tuple(({"rho": rho}, f"rho must be >= 0 and finite, got {rho}") for rho in (-1.0, math.nan, math.inf))
_P = tuple(({"p": p}, f"p must be >= 1, got {p}") for p in (0.5, math.nan))
_ETA = tuple(({"eta": eta}, f"eta must be >= 0 and finite, got {eta}") for eta in (-0.1, math.nan))
_SCALED = (({"scaled": "biases"}, "scaled must be"),)
_ASCENTS = (({"ascent_steps": 0}, "ascent_steps must be"), ({"ascent_steps": 2, "p": 1.5}, "ascent_steps must be"))

_ALPHA = (({"alpha": -1.0}, "alpha must be >= 0 and finite, got -1.0"), ({"alpha": math.nan}, "alpha must be >= 0"))

SIMPLE = (
    Row("SAM", flatmin.SAM, invalid=_RHO + _P + _ASCENTS),
    Row("SAM-p1", flatmin.SAM, {"p": 1.0}, p=1.0),
    Row("SAM-p1.5", flatmin.SAM, {"p": 1.5}, p=1.5),
    Row("SAM-p4", flatmin.SAM, {"p": 4.0}, p=4.0),
    Row("SAM-pinf", flatmin.SAM, {"p": math.inf}, p=math.inf),
    Row("SAM-3-ascents", flatmin.SAM, {"ascent_steps": 3}, num_closure_calls=4),
    Row("SAM-pinf-2-ascents", flatmin.SAM, {"p": math.inf, "ascent_steps": 2}, num_closure_calls=3, p=math.inf),
    Row("ASAM", flatmin.ASAM, scale=_weights_only(0.01), invalid=_RHO + _ETA + _SCALED),
    Row("ASAM-eta-2-ascents", flatmin.ASAM, {"eta": 0.3, "ascent_steps": 2}, 3, scale=_weights_only(0.3)),
    Row("ASAM-pinf", flatmin.ASAM, {"p": math.inf}, p=math.inf, scale=_weights_only(0.01)),
    Row(
        "ASAM-matrices",
        flatmin.ASAM,
        {"scaled": "matrices"},
        scale=lambda name, w: w.abs() + 0.01 if w.dim() > 1 else torch.ones_like(w),
    ),
    Row("ASAM-all", flatmin.ASAM, {"scaled": "all", "eta": 0.1}, scale=lambda name, w: w.abs() + 0.1),
    Row("compat-SAM", _port, invalid=_RHO),
    Row("compat-SAM-adaptive", _port, {"adaptive": True}, scale=lambda name, w: w.abs()),
)

METHODS = (
    Row("FisherSAM", flatmin.FisherSAM, invalid=(({"eta": 0.0}, "eta must be > 0 and finite, got 0.0"),)),
    Row("LayerSAM", flatmin.LayerSAM, invalid=(({"ascent_steps": 2}, "ascent_steps must be 1"),)),
    Row("USAM", flatmin.USAM, invalid=(({"share": 1.5}, "share must be in \\[0, 1\\] or None, got 1.5"),)),
    Row("USAM-half", flatmin.USAM, {"share": 0.5}),
    Row("USAM-unified", flatmin.USAM, {"share": None}),
    Row(
        "LESAM",
        flatmin.LESAM,
        {"sigma": 0.1},
        invalid=(
            ({"sigma": -1.0}, "sigma must be >= 0"),
            ({"decay_start": 1.0}, "decay_start must be in \\[0, 1\\), got 1.0"),
        ),
    ),
    Row("ZSharp", flatmin.ZSharp, {"quantile": 0.6}, invalid=(({"quantile": 1.0}, "quantile must be in"),)),
    Row("ZSharp-joint", flatmin.ZSharp, {"quantile": 0.6, "joint_vectors": True}),
    Row("GSAM", flatmin.GSAM, num_copies=2, invalid=(*_ALPHA, ({"minimised": "both"}, "minimised must be"))),
    Row("GSAM-clean", flatmin.GSAM, {"minimised": "clean"}, num_copies=2),
    Row("GNP", flatmin.GNP, num_copies=2, invalid=_ALPHA),
    Row("GNP-unit", flatmin.GNP, {"unit_clean": True}, num_copies=2),
    Row(
        "WSAM",
        flatmin.WSAM,
        num_copies=2,
        num_corrections=2,
        invalid=(({"gamma": 1.0}, "gamma must be in \\[0, 1\\), got 1.0"),),
    ),
    Row("WSAM-coupled", flatmin.WSAM, {"decouple": False}, num_copies=2),
    Row("StableSAM", flatmin.StableSAM, num_copies=2),
    Row(
        "VaSSO",
        flatmin.VaSSO,
        {"theta": 0.4},
        kept=("smoothed_gradient",),
        invalid=(({"theta": 0.0}, "theta must be in"),),
    ),
    Row("FriendlySAM", flatmin.FriendlySAM, kept=("mean_gradient",), invalid=(({"lmbda": 1.0}, "lmbda must be in"),)),
)

POLICIES = (
    Row("LookSAM", flatmin.LookSAM, {"interval": 3}, invalid=(*_ALPHA, ({"interval": 0}, "interval must be"))),
    Row("RST", flatmin.RST, invalid=(({"probability": 2.0}, "probability must be in"),)),
    Row("LateSAM", flatmin.LateSAM, {"num_steps": 8, "start": 0.5}, invalid=(({"start": 2.0}, "start must be"),)),
    Row("AESAM", flatmin.AESAM, {"num_steps": 12}, invalid=(({"decay": 1.0}, "decay must be in"),)),
)

SAMON = Row("SAMON", _samon, moves_all=False)

ALWAYS = (  # rules that perturb every step, so that the contract's single steps are perturbed ones
    Row("LookSAM-1", flatmin.LookSAM, {"interval": 1}, num_copies=2, kept=("across_gradient",), renews_before=False),
    Row("RST-1", flatmin.RST, {"probability": 1.0}),
    Row("LateSAM-0", flatmin.LateSAM, {"num_steps": 8, "start": 0.0}),
    Row("AESAM-always", flatmin.AESAM, {"num_steps": 12, "c_start": -math.inf, "c_end": -math.inf}),
)

TABLE = SIMPLE + METHODS + ALWAYS + (SAMON,)


def sgd(params: Any, **options: Any) -> torch.optim.SGD:
    """The usual base."""
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, **options})


def built(row: Row, rho: float = 0.1, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[TinyNetwork, Any]:
    """The row's optimizer around SGD for a fresh tiny network."""
    model = tiny_network(dtype=dtype)
    return model, row.build(sgd(model.parameters()), model, rho, **more)


def needs_all_moved(row: Row) -> None:
    """Skip a row that perturbs some parameters only, in a test that looks at all of them or gives them one group."""
    if not row.moves_all:
        pytest.skip("perturbs some parameters only; see test_where")


def closure_on(optimizer: Any, model: nn.Module, batch: int = 0) -> Callable[[], Tensor]:
    """A closure as torch wants it."""
    inputs, labels = batches(next(model.parameters()).dtype)[batch]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    return closure
