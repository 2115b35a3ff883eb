"""Weights that rest at w + eps are known to eager and compiled steps alike."""

import copy
import math

import pytest
import torch

import flatmin
from compiled_runs import as_traced, assert_same, backward, loss_fn, network
from optimizers import sgd
from problems import NUM_BATCHES, batches


def _rested(compiled, between):
    """Six steps of Momentum-SAM, with something done to model and optimizer before the fourth."""
    model = network()
    optimizer = flatmin.MSAM(sgd(model.parameters()), 0.2, model=model)
    step = flatmin.compile_step(model, loss_fn, optimizer, backend=as_traced)
    if not compiled:
        step.reason = "to compare with"
    losses = []
    for number in range(6):
        if number == 3:
            between(model, optimizer)
        losses.append(step(batches(torch.float64)[number % NUM_BATCHES]).detach())
    assert compiled == (step.num_graphs > 0 and step.reason is None)
    return model, optimizer, step, losses


def _look(model, optimizer):
    with optimizer.unperturbed():
        pass


def _average(model, optimizer):
    with optimizer.unperturbed(), torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)


def _write(model, optimizer):
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)


def _resume(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _step_eagerly(model, optimizer):
    optimizer.step(lambda: backward(model, batches(torch.float64)[0]))


@pytest.mark.parametrize("between", [_look, _average, _write, _resume, _step_eagerly])
def test_weights_at_rest_are_known_to_eager_and_compiled_steps_alike(between):
    assert_same(_rested(True, between), _rested(False, between))


def test_what_is_done_between_steps_counts():
    """The control of the test above: it is not lost in both."""
    looked, averaged, written = (_rested(True, between)[3][-1] for between in (_look, _average, _write))
    assert abs(looked - averaged) > 1e-4
    assert abs(averaged - written) > 1e-6


def test_a_compiled_step_inside_unperturbed_is_refused():
    _, optimizer, step, _ = _rested(True, _look)
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="must not be called inside unperturbed"):
        step(batches(torch.float64)[0])


def test_a_skipped_step_of_one_pass_leaves_the_weights_where_they_rest():
    runs = []
    for compiled in (True, False):
        model, optimizer, step, losses = _rested(compiled, _look)
        before = [param.detach().clone() for param in model.parameters()]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        inputs, labels = batches(torch.float64)[0]
        step((inputs * math.nan, labels))
        assert optimizer.diagnostics.num_skipped_steps == 1
        torch.testing.assert_close([*model.parameters()], before, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=1e-12, atol=1e-14)
        model.load_state_dict({name: value.nan_to_num() for name, value in model.state_dict().items()})
        losses.append(step(batches(torch.float64)[1]).detach())
        runs.append((model, optimizer, step, losses))
    assert_same(*runs)
