"""Loops that people do write, and that trip other implementations."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
import flatmin.compat
from doors import everything, through_closure, through_context, through_two_steps, train
from problems import batches, tiny_network


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def _loss(model, batch=0):
    inputs, labels = batches()[batch]
    return cross_entropy(model(inputs), labels)


@pytest.mark.parametrize("door", ["two steps", "context"])
def test_gradients_may_be_cleared_between_forward_and_backward(door):
    model, plain = tiny_network(), tiny_network()
    optimizer, base = flatmin.SAM(_sgd(model), 0.0, model=model), _sgd(plain)
    for step in range(4):
        torch.manual_seed(step)
        loss = _loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        if door == "two steps":
            optimizer.first_step(zero_grad=True)
            _loss(model, step).backward()
            optimizer.second_step()
        else:
            with optimizer.perturbed():
                _loss(model, step).backward()
            optimizer.step()
        torch.manual_seed(step)
        loss = _loss(plain, step)
        base.zero_grad()
        loss.backward()
        base.step()
    assert torch.equal(everything(model), everything(plain))


def test_two_batches_accumulated_in_each_pass_share_one_perturbation():
    model, plain = tiny_network(), tiny_network()
    optimizer, base = flatmin.SAM(_sgd(model), 0.0, model=model), _sgd(plain)
    for step in range(3):
        torch.manual_seed(step)
        for batch in (0, 1):
            _loss(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        for batch in (0, 1):
            _loss(model, batch).backward()
        optimizer.second_step(zero_grad=True)
        torch.manual_seed(step)
        base.zero_grad()
        for batch in (0, 1):
            _loss(plain, batch).backward()
        base.step()
    assert torch.equal(everything(model), everything(plain))


def test_a_model_that_the_first_pass_did_not_call_is_an_error():
    model, other = tiny_network(), tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=other)
    _loss(model).backward()
    weights = model.last.weight.detach().clone()
    with pytest.raises(RuntimeError, match="did not call the module given as model="):
        optimizer.first_step()
    assert torch.equal(model.last.weight, weights)


def test_a_second_pass_that_draws_fewer_numbers_leaves_the_generator_where_the_first_did():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    torch.manual_seed(0)
    _loss(model).backward()
    expected = torch.get_rng_state()
    with optimizer.perturbed():
        model.last(torch.ones(1, 12)).sum().backward()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), expected)


def test_the_block_that_raises_gives_the_step_up():
    model, other = tiny_network(), tiny_network()
    optimizer, other_optimizer = flatmin.SAM(_sgd(model), 0.3, model=model), flatmin.SAM(_sgd(other), 0.3, model=other)
    torch.manual_seed(0)
    _loss(model).backward()
    weights = [param.detach().clone() for param in model.parameters()]
    buffers = everything(model)[-4:]

    def fail():
        assert not torch.equal(model.last.weight, weights[-2])
        _loss(model)
        raise KeyError

    with pytest.raises(KeyError), optimizer.perturbed():
        fail()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), weights, strict=True))
    assert torch.equal(everything(model)[-4:], buffers)
    torch.manual_seed(0)
    other(batches()[0][0])
    train(optimizer, model, range(3), through_context)
    train(other_optimizer, other, range(3), through_context)
    assert torch.equal(everything(model), everything(other))


@pytest.mark.parametrize("after", ["the second closure raises", "the base raises"])
def test_a_gradient_of_a_step_that_failed_is_not_used_again(after):
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    base = torch.optim.SGD([weights], lr=0.1)
    optimizer = flatmin.SAM(base)
    failing = base.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError))
    if after == "the second closure raises":
        failing.remove()
    calls = []

    def closure():
        loss = weights.square().sum() / 2
        loss.backward()
        calls.append(weights.grad.clone())
        if len(calls) == 2 and after == "the second closure raises":
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    failing.remove()
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.first_step()
    calls.append(None)
    optimizer.step(closure)
    torch.testing.assert_close(calls[3], torch.tensor([3.0, 4.0]))


def test_a_closure_sees_no_gradient_of_the_pass_or_step_before():
    weights = nn.Parameter(torch.tensor([3.0]))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.0))
    seen = []

    def closure():
        seen.append(weights.grad)
        loss = weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    assert seen == [None] * 4


@pytest.mark.parametrize("values", [(1.0, 2.0), (None, None), (torch.tensor(1.0), None)])
def test_a_closure_may_return_what_it_likes(values):
    weights = nn.Parameter(torch.tensor([3.0]))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1))
    optimizer.diagnostics.loss = torch.tensor(7.0)  # of an earlier step
    returned = iter(values)

    def closure():
        optimizer.zero_grad()
        weights.square().sum().backward()
        return next(returned)

    assert optimizer.step(closure) is values[0]
    assert optimizer.diagnostics.loss is None
    through_closure(optimizer, lambda: weights.square().sum())
    assert optimizer.diagnostics.num_steps == 2


def _with_a_pending_gradient():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    _loss(model).backward()
    with optimizer.perturbed():
        _loss(model).backward()
    return model, optimizer


def test_a_pending_gradient_that_is_cleared_is_not_followed():
    model, optimizer = _with_a_pending_gradient()
    optimizer.zero_grad()
    _loss(model).backward()
    with pytest.raises(RuntimeError, match="without a second pass"):
        optimizer.step()


def test_a_pending_gradient_that_the_model_has_cleared_is_an_error():
    model, optimizer = _with_a_pending_gradient()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.step()
    assert optimizer.param_groups[0]["num_steps"] == 0
    train(optimizer, model, range(1))


def test_a_warm_up_from_zero_does_not_hide_a_missing_pass():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model, lr=0.0), model=model)
    _loss(model).backward()
    with pytest.raises(RuntimeError, match="without a second pass"):
        optimizer.step()


def test_loading_between_the_two_steps_is_refused():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    saved = copy.deepcopy(optimizer.state_dict())
    _loss(model).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) must not be called between"):
        optimizer.load_state_dict(saved)


def test_a_hook_that_raises_in_the_second_step_leaves_the_weights_at_home():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    weights = model.last.weight.detach().clone()
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError))
    _loss(model).backward()
    optimizer.first_step(zero_grad=True)
    _loss(model).backward()
    with pytest.raises(KeyError):
        optimizer.second_step()
    assert torch.equal(model.last.weight, weights)


@pytest.mark.parametrize("door", [through_closure, through_two_steps, through_context])
def test_clipping_in_a_hook_of_the_base_acts_on_the_final_gradient(door):
    weights = nn.Parameter(torch.tensor([3.0, 4.0]))
    base = torch.optim.SGD([weights], lr=1.0)
    base.register_step_pre_hook(lambda *_: (torch.nn.utils.clip_grad_norm_([weights], 0.01), None)[1])
    optimizer = flatmin.SAM(base)
    door(optimizer, lambda: weights.square().sum())
    assert (weights.detach() - torch.tensor([3.0, 4.0])).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_after_a_failed_closure_the_older_door_makes_both_passes_again():
    model = tiny_network()
    optimizer = flatmin.compat.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = _loss(model)
        loss.backward()
        if len(calls) == 1:
            raise KeyError
        return loss

    weights = model.last.weight.detach().clone()
    _loss(model).backward()
    with pytest.raises(KeyError), torch.no_grad():
        optimizer.step(closure)
    assert torch.equal(model.last.weight, weights)
    assert optimizer.step(closure) is not None
    assert calls == [True, True, True]


def test_zeros_left_in_place_are_no_first_pass_for_the_older_door():
    model = tiny_network()
    optimizer = flatmin.compat.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = []

    def closure():
        calls.append(1)
        loss = _loss(model)
        loss.backward()
        return loss

    for _ in range(2):
        model.zero_grad(set_to_none=False)
        optimizer.step(closure)
    assert len(calls) == 4


def _micro_batches_by_turns(optimizer, model, gather):
    for batch in (0, 1):
        _loss(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        _loss(model, batch).backward()
        optimizer.accumulate()
    if gather:
        optimizer.gather()
        assert model.last.weight.grad.any()
    optimizer.step()


def test_gathered_gradients_are_those_that_step_follows():
    networks = [tiny_network(), tiny_network()]
    for model, gather in zip(networks, (True, False), strict=True):
        optimizer = flatmin.SAM(_sgd(model), model=model)
        for step in range(3):
            torch.manual_seed(step)
            _micro_batches_by_turns(optimizer, model, gather)
    assert torch.equal(everything(networks[0]), everything(networks[1]))


def test_gathering_needs_gradients_put_aside_and_a_known_reduction():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    with pytest.raises(RuntimeError, match=r"gather\(\) must follow accumulate\(\)"):
        optimizer.gather()
    with pytest.raises(ValueError, match="reduction must be"):
        optimizer.gather("max")


def test_a_model_attached_later_is_one_given_at_construction():
    models = [tiny_network(), tiny_network(), tiny_network()]
    given, attached = flatmin.SAM(_sgd(models[0]), 0.3, model=models[0]), flatmin.SAM(_sgd(models[1]), 0.3)
    attached.attach(models[2])
    attached.attach(models[1])  # replaces the one before
    for optimizer, model in ((given, models[0]), (attached, models[1])):
        train(optimizer, model, range(4))
    assert torch.equal(everything(models[0]), everything(models[1]))


def test_attaching_between_the_two_steps_is_refused():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model))
    _loss(model).backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"attach\(\) must not be called between"):
        optimizer.attach(model)
