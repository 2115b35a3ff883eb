"""What the diagnostics count, and that looking changes nothing."""

import pytest
import torch
from torch import nn

import flatmin
from doors import through_closure, train
from optimizers import sgd
from problems import tiny_network


def test_diagnostics_count_a_gradient_at_w_alone_and_leave_training_as_it_is():
    """Weight decay would tell a gradient of zero, which they measure with, from none."""

    def stepped(diagnostics):
        params = [nn.Parameter(torch.tensor(value)) for value in ([3.0, 4.0], [1.0])]
        optimizer = flatmin.SAM(torch.optim.SGD(params, lr=1.0, weight_decay=0.1), 0.5, diagnostics=diagnostics)
        gates = iter([12.0, 0.0])

        def loss():
            gate = next(gates)
            return params[0].square().sum() / 2 + (gate * params[1].sum() if gate else 0.0)

        through_closure(optimizer, loss)
        return torch.cat([param.detach() for param in params]), optimizer.diagnostics

    (weights, diagnostics), (others, _) = stepped(True), stepped(False)
    assert torch.equal(weights, others)
    assert weights[2] == 1.0
    assert diagnostics.gradient_norm.item() == pytest.approx(13.0)
    assert diagnostics.cosine.item() == pytest.approx(25 / 13 / 5)


def test_a_radius_of_zero_does_not_count_as_perturbed():
    model = tiny_network()
    optimizer = flatmin.SAM(sgd(model.parameters()), 0.0, model=model, diagnostics=True)
    train(optimizer, model, range(2))
    optimizer.param_groups[0]["rho"] = 0.1
    train(optimizer, model, range(2, 5))
    assert (optimizer.diagnostics.num_steps, optimizer.diagnostics.num_perturbed_steps) == (5, 3)


def test_diagnostics_of_a_zero_gradient_are_zero():
    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), diagnostics=True)
    through_closure(optimizer, lambda: 0 * weights.sum())
    values = optimizer.diagnostics.as_dict()
    assert (values["cosine"], values["perturbation_norm"], values["gradient_norm"]) == (0.0, 0.0, 0.0)
