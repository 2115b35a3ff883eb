"""Thirty steps of every method equal a float64 transcription of its published box."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
import reference
from doors import through_closure
from optimizers import SIMPLE, sgd
from problems import batches
from reference import momentum_sgd


@dataclass(frozen=True)
class Box:
    """A method and its transcription.

    Attributes:
        name: The test's id.
        build: Called with a base, rho and ``model``.
        followed: The transcription: of w, the gradient function, rho of each tensor, and a memory.
        is_plain_at_first: Whether the first steps are those of the base.
        options: Keywords of both.
    """

    name: str
    build: Callable[..., Any]
    followed: Callable[..., reference.Weights]
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, base: torch.optim.Optimizer, rho: float, model: nn.Module) -> Any:
        return self.build(base, rho, model=model, **self.options)


def _simple(row: Any) -> Box:
    """SAM and ASAM in every form, with the scaling by name."""

    def followed(
        w: reference.Weights, gradient: reference.Gradient, rhos: list[float], memory: dict[str, Any]
    ) -> reference.Weights:
        return reference.sam_gradient(
            w,
            gradient,
            rhos,
            p=row.p,
            scale=lambda index, x: row.scale(NAMES[index], x),
            ascent_steps=row.num_closure_calls - 1,
        )

    return Box(row.name, lambda base, rho, model: row.build(base, model, rho), followed)


def _box(name: str, method: Any, followed: Callable[..., reference.Weights], **options: Any) -> Box:
    return Box(name, method, partial(followed, **options), options)


NAMES = ["0.weight", "0.bias", "2.weight", "2.bias", "3.weight", "3.bias"]
BOXES = [
    *(_simple(row) for row in SIMPLE),
    _box("FisherSAM", flatmin.FisherSAM, reference.fisher_sam, eta=0.1),
    _box("LayerSAM", flatmin.LayerSAM, reference.layer_sam),
    _box("USAM", flatmin.USAM, reference.unified_sam, share=0.0),
    _box("USAM-half", flatmin.USAM, reference.unified_sam, share=0.5),
    _box("USAM-unified", flatmin.USAM, reference.unified_sam, share=None),
    _box("LESAM", flatmin.LESAM, reference.le_sam, sigma=0.15),
    _box("LESAM-falling", flatmin.LESAM, reference.le_sam, sigma=0.15, num_steps=30),
    _box("LESAM-falling-late", flatmin.LESAM, reference.le_sam, sigma=0.15, num_steps=30, decay_start=0.4),
    _box("ZSharp", flatmin.ZSharp, reference.z_sharp, quantile=0.7, joint_vectors=False),
    _box("ZSharp-joint", flatmin.ZSharp, reference.z_sharp, quantile=0.7, joint_vectors=True),
    _box("GSAM", flatmin.GSAM, reference.gsam, alpha=0.4, minimised="perturbed"),
    _box("GSAM-clean", flatmin.GSAM, reference.gsam, alpha=0.4, minimised="clean"),
    _box("GNP", flatmin.GNP, reference.gnp, alpha=0.8, unit_clean=False),
    _box("GNP-unit", flatmin.GNP, reference.gnp, alpha=0.8, unit_clean=True),
    _box("WSAM", flatmin.WSAM, reference.wsam, gamma=0.6, decouple=True),
    _box("WSAM-coupled", flatmin.WSAM, reference.wsam, gamma=0.6, decouple=False),
    _box("StableSAM", flatmin.StableSAM, reference.stable_sam),
    _box("VaSSO", flatmin.VaSSO, reference.vasso, theta=0.4),
    _box("FriendlySAM", flatmin.FriendlySAM, reference.friendly_sam, sigma=1.0, lmbda=0.6),
    _box("LookSAM", flatmin.LookSAM, reference.look_sam, interval=4, alpha=0.7),
    _box("AESAM", flatmin.AESAM, reference.ae_sam, num_steps=30, decay=0.9, c_start=1.0, c_end=-1.0),
    Box(
        "RST",
        partial(flatmin.RST, probability=lambda step: float(step % 3 == 1)),
        partial(reference.some_steps, perturbs=lambda step: step % 3 == 1),
    ),
    Box(
        "LateSAM",
        partial(flatmin.LateSAM, num_steps=30, start=0.4),
        partial(reference.some_steps, perturbs=lambda step: step >= 12),
    ),
]


def _problem(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()


def _gradient(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> reference.Gradient:
    def gradient(w: reference.Weights) -> reference.Weights:
        w = [x.detach().requires_grad_() for x in w]
        output = torch.func.functional_call(model, dict(zip(NAMES, w, strict=True)), (inputs,))
        return list(torch.autograd.grad(cross_entropy(output, labels), w))

    return gradient


@pytest.mark.parametrize("box", BOXES, ids=lambda box: box.name)
@pytest.mark.parametrize("rhos", [(0.3, 0.3), (0.3, 0.02)], ids=["equal groups", "unequal groups"])
@pytest.mark.parametrize("seed", [0, 1])
def test_thirty_steps_equal_the_published_box_in_float64(box, rhos, seed):
    model = _problem(seed)
    weights = [param.detach().clone() for param in model.parameters()]
    groups = [{"params": list(model[0].parameters()), "rho": rhos[0]}, {"params": list(model[2:].parameters())}]
    optimizer = box.make(sgd(groups, weight_decay=0.0), rhos[1], model)
    rho_of = [rhos[0]] * 2 + [rhos[1]] * 4
    data = batches(torch.float64)
    velocity, plain, plain_velocity, memory = None, weights, None, {}
    for step in range(30):
        inputs, labels = data[step % len(data)]
        through_closure(optimizer, lambda x=inputs, y=labels: cross_entropy(model(x), y))
        gradient = _gradient(model, inputs, labels)
        followed = box.followed(weights, gradient, rho_of, memory)
        weights, velocity = momentum_sgd(weights, followed, velocity, lr=0.1, momentum=0.9)
        if "after" in memory:
            weights = [w - 0.1 * x for w, x in zip(weights, memory["after"], strict=True)]
        plain, plain_velocity = momentum_sgd(plain, gradient(plain), plain_velocity, lr=0.1, momentum=0.9)
        torch.testing.assert_close(list(model.parameters()), weights, rtol=1e-9, atol=1e-9, check_stride=False)
    farthest_from_plain = max((x - y).abs().max().item() for x, y in zip(weights, plain, strict=True))
    assert farthest_from_plain > 1e-3, "the reference does not tell the method from plain SGD"


def test_the_transcriptions_tell_the_methods_apart():
    """The control: after the same steps no two boxes are at the same place."""
    ends = []
    for box in BOXES:
        if box.name.startswith("compat") or box.name == "USAM-unified":
            continue
        model = _problem(0)
        weights, memory, velocity = [param.detach().clone() for param in model.parameters()], {}, None
        for step in range(14):
            inputs, labels = batches(torch.float64)[step % 6]
            followed = box.followed(weights, _gradient(model, inputs, labels), [0.3] * 6, memory)
            weights, velocity = momentum_sgd(weights, followed, velocity, lr=0.1, momentum=0.9)
            if "after" in memory:
                weights = [w - 0.1 * x for w, x in zip(weights, memory["after"], strict=True)]
        ends.append(torch.cat([w.flatten() for w in weights]))
    distances = torch.cdist(torch.stack(ends), torch.stack(ends)) + torch.eye(len(ends))
    assert distances.min() > 1e-6


def test_ae_sam_makes_steps_of_both_kinds():
    memory = {}
    model = _problem(0)
    weights, velocity = [param.detach().clone() for param in model.parameters()], None
    for step in range(30):
        gradient = _gradient(model, *batches(torch.float64)[step % 6])
        options = {"num_steps": 30, "decay": 0.9, "c_start": 1.0, "c_end": -1.0}
        followed = reference.ae_sam(weights, gradient, [0.3] * 6, memory, **options)
        weights, velocity = momentum_sgd(weights, followed, velocity, lr=0.1, momentum=0.9)
    assert 0 < memory["num_perturbed"] < 30
