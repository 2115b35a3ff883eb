"""Parameter groups, schedulers, hooks and copies are those of the base optimizer."""

import copy
import pickle

import pytest
import torch

from doors import everything, through_closure, through_two_steps, train
from optimizers import TABLE, built, closure_on, needs_all_moved, sgd
from problems import batches, tiny_network

pytestmark = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def _weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_groups_and_state_are_the_base_optimizers_own(row):
    _, optimizer = built(row)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("door", [through_closure, through_two_steps])
def test_a_scheduler_changes_the_step_without_a_warning(row, on_base, door):
    model, optimizer = built(row)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base if on_base else optimizer, 1, gamma=0.5)
    train(optimizer, model, range(3), door, scheduler.step)
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    other, unscheduled = built(row)
    train(unscheduled, other, range(3), door)
    assert not torch.equal(everything(model), everything(other))


def test_rho_can_be_scheduled_and_is_saved(row):
    model, optimizer = built(row)
    optimizer.param_groups[0]["rho"] = 0.0
    train(optimizer, model, range(3))
    plain = tiny_network()
    train(sgd(plain.parameters()), plain, range(3))
    assert torch.equal(everything(model), everything(plain))
    assert optimizer.state_dict()["param_groups"][0]["rho"] == 0.0


def test_step_hooks_run_on_wrapper_and_base(row):
    model, optimizer = built(row)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("wrapper before"))
    optimizer.base.register_step_pre_hook(lambda *_: seen.append("base before"))
    optimizer.base.register_step_post_hook(lambda *_: seen.append("base after"))
    optimizer.register_step_post_hook(lambda *_: seen.append("wrapper after"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    train(optimizer, model, range(1))
    optimizer.state_dict()
    assert seen == ["wrapper before", "base before", "base after", "wrapper after", "saved"]


def test_a_group_added_later_is_perturbed_with_its_own_rho(row):
    needs_all_moved(row)
    model = tiny_network()
    optimizer = row.build(sgd(model.first.parameters()), model, 0.1)
    optimizer.add_param_group({"params": [*model.norm.parameters(), *model.last.parameters()], "rho": 0.3})
    assert [group["rho"] for group in optimizer.base.param_groups] == [0.1, 0.3]
    same = tiny_network()
    groups = [
        {"params": list(same.first.parameters())},
        {"params": [*same.norm.parameters(), *same.last.parameters()], "rho": 0.3},
    ]
    at_once = row.build(sgd(groups), same, 0.1)
    train(optimizer, model)
    train(at_once, same)
    assert torch.equal(everything(model), everything(same))


def test_a_maximised_group_mirrors_a_minimised_one(row):
    """Maximising -L is minimising L, neighbourhood included."""
    model, optimizer = built(row)
    train(optimizer, model, range(4), lambda o, loss: through_closure(o, loss))
    mirrored = tiny_network()
    ascending = row.build(sgd(mirrored.parameters(), maximize=True), mirrored)
    train(ascending, mirrored, range(4), lambda o, loss: through_closure(o, lambda: -loss()))
    assert torch.equal(everything(model), everything(mirrored))


@pytest.mark.parametrize("what", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(row, what):
    model, optimizer = built(row)
    train(optimizer, model, range(3))
    both = (model, optimizer)
    model_copy, optimizer_copy = copy.deepcopy(both) if what == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert optimizer_copy.param_groups is optimizer_copy.base.param_groups
    train(optimizer, model, range(3, 6))
    train(optimizer_copy, model_copy, range(3, 6))
    assert torch.equal(everything(model_copy), everything(model))


@pytest.mark.parametrize("what", ["deepcopy", "pickle"])
def test_a_copy_made_between_the_two_steps_goes_home_alone(row, what):
    model, optimizer = built(row)
    home = _weights(model)
    closure_on(optimizer, model)()
    optimizer.first_step(zero_grad=True)
    there = _weights(model)
    both = (model, optimizer)
    model_copy, optimizer_copy = copy.deepcopy(both) if what == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert torch.equal(_weights(model_copy), there)
    optimizer_copy.restore()
    assert torch.equal(_weights(model_copy), home)
    assert torch.equal(_weights(model), there)
    assert not torch.equal(there, home)
    optimizer.restore()
    assert torch.equal(_weights(model), home)


def test_a_copy_of_the_model_alone_is_inert(row):
    model, optimizer = built(row)
    average = copy.deepcopy(model)
    train(optimizer, model, range(2))
    before = everything(average)
    through_closure(torch.optim.SGD(average.parameters(), lr=0.0), lambda: average(batches()[0][0]).sum())
    other, other_optimizer = built(row)
    train(other_optimizer, other, range(2))
    assert torch.equal(everything(model), everything(other))
    assert not torch.equal(everything(average), before)  # its running statistics did move
