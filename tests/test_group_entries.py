"""The entries of groups say what the next step does, whoever wrote them: a user, a checkpoint, a schedule."""

import copy

import pytest
import torch
from torch import nn

import flatmin
from doors import train
from flatmin.optim import CosineToZero, WarmUp
from optimizers import sgd
from problems import tiny_network


def test_a_radius_scheduled_below_zero_is_refused():
    model = tiny_network()
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    optimizer.param_groups[0]["rho"] = -0.1
    with pytest.raises(ValueError, match=r"rho must be >= 0, got -0.1"):
        train(optimizer, model, range(1))


def test_a_group_that_was_given_to_the_base_is_refused():
    model = tiny_network()
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    optimizer.base.add_param_group({"params": list(nn.Linear(3, 3).parameters())})
    with pytest.raises(ValueError, match=r"rho must be an entry of every group, .* not of its base"):
        train(optimizer, model, range(1))


def test_a_checkpoint_of_the_base_leaves_what_is_perturbed_and_the_schedule_as_they_were():
    """It has neither entry; without them all would be perturbed, and by the radius of the first warm-up step."""
    networks = tiny_network(), tiny_network()
    groups = [[{"params": list(m.norm.parameters())}, {"params": list(m.last.parameters())}] for m in networks]
    plain = torch.optim.SGD(groups[0], lr=0.2, momentum=0.9)
    groups[1][1]["perturb"] = False
    base = torch.optim.SGD(groups[1], lr=0.1, momentum=0.9)
    optimizer = flatmin.MSAM(base, rho=1.0, rho_schedule=WarmUp(4))
    with optimizer.unperturbed():
        pass
    assert optimizer.param_groups[0]["rho"] == 0.0
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert [group.get("perturb", True) for group in optimizer.param_groups] == [True, False]
    train(optimizer, networks[1], range(2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert optimizer.param_groups[0]["rho"] == 0.5


def test_a_checkpoint_of_an_earlier_step_takes_the_schedule_back():
    model = tiny_network()
    optimizer = flatmin.SAM(sgd(model.parameters()), 0.3, rho_schedule=WarmUp(4))
    start = copy.deepcopy(optimizer.state_dict())
    start["param_groups"][0]["rho"] = 0.8
    train(optimizer, model, range(2))
    optimizer.load_state_dict(start)
    train(optimizer, model, range(3))
    assert optimizer.param_groups[0]["rho"] == 0.4


def test_a_group_added_late_follows_the_schedule_of_the_others():
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.first.parameters(), lr=0.1), rho_schedule=CosineToZero(10))
    train(optimizer, model, range(5))
    optimizer.add_param_group({"params": list(model.last.parameters())})
    train(optimizer, model, range(1))
    first, late = optimizer.param_groups
    assert (late["num_steps"], late["rho"]) == (6, first["initial_rho"] / 2)
