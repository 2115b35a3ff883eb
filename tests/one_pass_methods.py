"""One-pass methods and bases to try them with, and the loop that trains."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import flatmin
from flatmin.optim import (
    BaseMomentum,
    Filtered,
    LayerBall,
    RandomDirection,
    StaleGradient,
)
from flatmin.optim.filters import Centralised
from problems import batches, tiny_network

METHODS = {
    "MSAM": lambda base, rho=0.3, **o: flatmin.MSAM(base, rho, **o),
    "AdaptiveMSAM": lambda base, rho=0.3, **o: flatmin.AdaptiveMSAM(base, rho, **o),
    "stale": lambda base, rho=0.3, **o: flatmin.OnePass(base, rho, direction=StaleGradient(), **o),
    "random": lambda base, rho=0.3, **o: flatmin.OnePass(base, rho, direction=RandomDirection(), **o),
    "layers": lambda base, rho=0.3, **o: flatmin.OnePass(base, rho, ball=LayerBall(), **o),
    "centralised": lambda base, rho=0.3, **o: flatmin.OnePass(
        base, rho, direction=Filtered(BaseMomentum(), Centralised()), **o
    ),
}


BASES = {
    "sgd": lambda params, **o: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, **o),
    "adam": lambda params, **o: torch.optim.Adam(params, lr=0.01, **o),
    "nadam": lambda params, **o: torch.optim.NAdam(params, lr=0.01, **o),
    "adamw-fused": lambda params, **o: torch.optim.AdamW(params, lr=0.01, fused=True, **o),
}


every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def run(optimizer, model, steps):
    """An ordinary training loop, with dropout masks of the step's own."""
    data = batches(next(model.parameters()).dtype)
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        inputs, labels = data[step % len(data)]
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def made(method, base="sgd", dtype=torch.float32, seed=0, **options):
    model = tiny_network(seed, dtype)
    return model, method(BASES[base](model.parameters()), **options)


def backward(model):
    inputs, labels = batches()[0]
    loss = cross_entropy(model(inputs), labels)
    loss.backward()
    return loss
