"""Where the weights of one-pass methods rest, who is shown the true ones, and whose weights count."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import cross_entropy

from doors import everything
from flatmin.optim import Window
from flatmin.sharpness import hessian_eigenvalues, worst_case
from one_pass_methods import METHODS, every_method, made, run
from problems import batches, tiny_network


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_looking_at_the_true_weights_leaves_no_trace(method, dtype):
    model, optimizer = made(method, dtype=dtype)
    other, undisturbed = made(method, dtype=dtype)
    with optimizer.unperturbed():
        pass  # before the first step they are at home, whatever the direction is
    assert torch.equal(everything(model), everything(other))
    for step in range(6):
        run(optimizer, model, range(step, step + 1))
        before = everything(model)
        with optimizer.unperturbed(), optimizer.unperturbed():
            assert step == 0 or not torch.equal(everything(model), before)
        assert torch.equal(everything(model), before)
    run(undisturbed, other, range(6))
    assert torch.equal(everything(model), everything(other))


def test_weights_that_are_loaded_while_others_rest_count_as_true():
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(3))
    fresh = tiny_network(seed=5)
    model.load_state_dict(fresh.state_dict())
    with optimizer.unperturbed():
        assert torch.equal(everything(model), everything(fresh))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_weights_that_are_swapped_out_and_in_again_are_none_of_others(method, dtype):
    found = []
    for swaps in (False, True):
        model, optimizer = made(method, dtype=dtype)
        for step in range(6):
            run(optimizer, model, range(step, step + 1))
            if swaps:
                kept = copy.deepcopy(model.state_dict())
                model.load_state_dict(tiny_network(seed=5).state_dict())
                model.load_state_dict(kept)
        with optimizer.unperturbed():
            found.append(everything(model))
    assert torch.equal(*found)


def test_measuring_sharpness_leaves_resting_weights_and_used_gradients_as_they_are():
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(3))
    params = [param for param in model.parameters() if param.grad is not None]
    versions = [(param._version, param.grad._version) for param in params]
    worst_case(model, cross_entropy, batches(), rho=0.05, batch_norm="running")
    hessian_eigenvalues(model, cross_entropy, batches(), k=1, batch_norm="running", max_iterations=2)
    assert versions == [(param._version, param.grad._version) for param in params]
    optimizer.param_groups[0]["rho"] = 0.1  # so that the weights could not be recognised by perturbing again
    model_again, again = made(METHODS["MSAM"])
    run(again, model_again, range(3))
    with optimizer.unperturbed(), again.unperturbed():
        assert torch.equal(everything(model), everything(model_again))


def test_weights_written_past_autograd_count_inside_of_unperturbed_alone():
    model, optimizer = made(METHODS["MSAM"])
    for is_shown in (True, False):
        run(optimizer, model, range(3))
        with optimizer.unperturbed() if is_shown else nullcontext():
            model.last.weight.data.fill_(2.0)
        with optimizer.unperturbed():
            assert is_shown == bool((model.last.weight == 2.0).all())


def test_the_weights_rest_at_home_where_when_says_so():
    model, optimizer = made(METHODS["MSAM"], when=Window(3, 5))
    for step in range(7):
        run(optimizer, model, range(step, step + 1))
        before = everything(model)
        with optimizer.unperturbed():
            assert torch.equal(everything(model), before) == (optimizer.param_groups[0]["num_steps"] not in (3, 4))


@pytest.mark.parametrize("look", [lambda optimizer: optimizer.state_dict(), copy.deepcopy, lambda optimizer: None])
def test_weights_that_are_loaded_while_others_rest_survive_a_checkpoint_and_a_copy(look):
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(3))
    written = {name: value + 1.0 for name, value in tiny_network().state_dict().items() if value.is_floating_point()}
    model.load_state_dict(written, strict=False)
    found = look(optimizer)
    with optimizer.unperturbed():
        assert all(torch.equal(param, written[name]) for name, param in model.named_parameters())
    if isinstance(found, dict):
        entries = [found["state"][index]["true_weights"] for index in range(len(found["state"]))]
        assert all(
            torch.equal(x, written[name]) for x, (name, _) in zip(entries, model.named_parameters(), strict=True)
        )
    assert not torch.equal(model.first.weight, written["first.weight"])  # they rest where their gradient is wanted
