"""Runs through a compiled step and through the eager one, to be compared."""

import torch
from torch.nn.functional import cross_entropy

import flatmin
from optimizers import Row, sgd
from problems import NUM_BATCHES, batches, tiny_network

CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64: what fifty steps make of another order of additions

ONE_PASS = [
    Row("MSAM", lambda base, rho, diagnostics=False, **options: flatmin.MSAM(base, rho, **options)),
    Row("AdaptiveMSAM", lambda base, rho, diagnostics=False, **options: flatmin.AdaptiveMSAM(base, rho, **options)),
]


def as_traced(graph, inputs):
    """A backend that runs the graph as it is, without the minutes that a compiler takes."""
    return graph


def loss_fn(model, batch):
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def network():
    """Without a bias before batch norm: its gradient is zero but for rounding, which p = infinity and Adam blow up."""
    model = tiny_network(dtype=torch.float64)
    model.first.bias.requires_grad_(False)
    return model


def trained(row, *, compiled, num_steps=50, make=network, base=sgd, **options):
    """Model, optimizer, step and losses of a run whose lr and rho change."""
    model = make()
    optimizer = row.build(base(model.parameters()), model, diagnostics=True)
    step = flatmin.compile_step(model, loss_fn, optimizer, **{"backend": as_traced, **options})
    if not compiled:
        step.reason = "to compare with"
    lr = optimizer.param_groups[0]["lr"]
    torch.manual_seed(5)
    losses = []
    for number in range(num_steps):
        optimizer.param_groups[0].update(lr=lr / (1 + number), rho=0.1 + 0.01 * number)
        losses.append(step(batches(torch.float64)[number % NUM_BATCHES]).detach())
    return model, optimizer, step, losses


def assert_same(run, other, **close):
    """Weights, buffers, state, groups, diagnostics, losses and generators."""
    (model, optimizer, _, losses), (other_model, other_optimizer, _, other_losses) = run, other
    state, other_state = optimizer.state_dict(), other_optimizer.state_dict()
    close = close or CLOSE
    torch.testing.assert_close(dict(model.state_dict()), dict(other_model.state_dict()), **close)
    torch.testing.assert_close(state["state"], other_state["state"], **close)
    assert state["param_groups"] == other_state["param_groups"]
    torch.testing.assert_close(optimizer.diagnostics.as_dict(), other_optimizer.diagnostics.as_dict(), **close)
    torch.testing.assert_close(losses, other_losses, **close)


def backward(model, batch):
    loss = loss_fn(model, batch)
    loss.backward()
    return loss
