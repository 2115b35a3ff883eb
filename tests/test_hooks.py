"""Hooks run once, on the optimizer that they belong to, and ours leave with it."""

import copy

import torch

import flatmin
import flatmin.compat
from doors import train
from optimizers import sgd
from problems import tiny_network


def test_the_hook_leaves_the_model_with_the_optimizer():
    model = tiny_network()
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    assert len(model._forward_pre_hooks) == 1
    del optimizer
    assert not model._forward_pre_hooks


def test_a_copy_does_not_drive_the_originals_scheduler():
    model = tiny_network()
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    train(optimizer_copy, model_copy, range(2))
    assert optimizer.diagnostics.num_steps == 0
    assert optimizer_copy.diagnostics.num_steps == 2


def test_state_dict_hooks_run_once_on_a_copy():
    model = tiny_network()
    optimizer = copy.deepcopy(flatmin.SAM(sgd(model.parameters()), model=model))
    calls = []
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "loading"]


def test_step_hooks_of_the_older_constructor_run_once():
    flatmin.SAM(sgd(tiny_network().parameters()))
    model = tiny_network()
    optimizer = flatmin.compat.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(optimizer, model, range(2))
    assert len(calls) == 2
