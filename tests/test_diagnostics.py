"""What the diagnostics count, and that looking changes nothing."""

import pytest
import torch
from torch import nn

import flatmin
from doors import through_closure, train
from flatmin.optim import Every, SharpnessAware
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


def test_diagnostics_of_a_plain_step_forget_the_perturbed_one():
    model = tiny_network()
    optimizer = SharpnessAware(sgd(model.parameters()), 0.1, model=model, when=Every(2), diagnostics=True)
    of_second_pass = {"loss_rise", "cosine", "perturbed_gradient_norm", "perturbation_norm"}
    for step in range(4):
        train(optimizer, model, range(step, step + 1))
        known = {name for name, value in optimizer.diagnostics.as_dict().items() if not name.startswith("num_")}
        assert known == {"loss", "gradient_norm"} | (of_second_pass if step % 2 == 0 else set())


def test_the_cosine_of_long_gradients_is_one_where_they_agree():
    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.0), diagnostics=True)
    through_closure(optimizer, lambda: 1e25 * weights.sum())  # the product of the lengths is beyond float32
    assert optimizer.diagnostics.as_dict()["cosine"] == pytest.approx(1.0)
