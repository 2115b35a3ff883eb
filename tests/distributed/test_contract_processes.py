"""Every named method on several processes: replicas, each with its own perturbation or one for all, and shards."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import flatmin
from optimizers import METHODS, POLICIES, SIMPLE, Row
from replicas import batch, closure_on, is_same_everywhere, network, parameters_of, replicated, sgd
from test_shards import data_of, fsdp, shards, take_step, whole
from test_shards import network as network_of_shards

ROWS = {row.name: row for row in (*SIMPLE, *METHODS, *POLICIES, Row("SAMON", flatmin.SAMON))}
RESTING = {"MSAM": flatmin.MSAM, "AdaptiveMSAM": flatmin.AdaptiveMSAM}
NUM_STEPS = 6  # of which LookSAM, LateSAM, RST and AESAM perturb some


def _built(name, model, sync=None):
    """A method around SGD; the model is attached as trainers do it, who wrap it late."""
    if name in RESTING:
        return RESTING[name](sgd(model), 0.3, model=model)
    groups = flatmin.param_groups(model, "norm") if name == "SAMON" else list(model.parameters())
    optimizer = ROWS[name].build(torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=1e-3), model, 0.3)
    optimizer.attach(model, sync)
    return optimizer


def _alone(name, sync, steps):
    """The same steps in one process, with a micro-batch for each replica."""
    model = network()
    optimizer = _built(name, model)
    options = {} if name in RESTING else {"average_buffers": True, "shared_perturbation": sync == "global"}
    for step in range(steps):
        parts = range(distributed.get_world_size())
        optimizer.step([closure_on(optimizer, model, step, part) for part in parts], **options)
    return model


def _train(name, sync, steps, saved=None):
    """Weights that never differ between ranks; what was saved after the third step."""
    model = replicated(network(), broadcast_buffers=False)
    optimizer = _built(name, model, sync)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for step in steps:
        if step == 3 and saved is None:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.step(closure_on(optimizer, model, step))
        assert is_same_everywhere(parameters_of(model))
    return model, optimizer, saved


def _replicas(name, sync):
    model, optimizer, saved = _train(name, sync, range(NUM_STEPS))
    if sync in ("local", "global") and (name, sync) != ("AESAM", "local"):  # it decides once for all micro-batches
        alone = parameters_of(_alone(name, sync, NUM_STEPS))
        assert_close(parameters_of(model), alone, rtol=1e-10, atol=1e-11)
    resumed = _train(name, sync, range(3, NUM_STEPS), saved)[0]
    if distributed.get_world_size() == 2:
        assert torch.equal(parameters_of(resumed), parameters_of(model))
    else:  # DDP orders its buckets anew after a first step, and the sum of more than two numbers rounds by their place
        assert_close(parameters_of(resumed), parameters_of(model), rtol=1e-12, atol=1e-13)
    for overflowing in (0, getattr(optimizer, "ascent_steps", 1)):
        _overflow(optimizer, partial(_loss_of, model), lambda: parameters_of(model), overflowing)
    return parameters_of(model)


def _loss_of(model, dtype=torch.float64):
    inputs, labels = batch(NUM_STEPS, distributed.get_rank())
    return cross_entropy(model(inputs.to(dtype)), labels)


def _overflow(optimizer, loss_of, weights, overflowing):
    """A pass of the last rank alone overflows: nobody takes the step, and every scaler steps back once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    is_bad, calls = distributed.get_rank() == distributed.get_world_size() - 1, []

    def closure(overflowing=overflowing):
        optimizer.zero_grad()
        value = loss_of()
        scaler.scale(value * (math.inf if is_bad and len(calls) == overflowing else 1.0)).backward()
        calls.append(1)
        return value

    before, state = weights(), copy.deepcopy(optimizer.state_dict()["state"])
    num_skipped = optimizer.diagnostics.num_skipped_steps
    optimizer.step(closure, scaler)
    scaler.update()
    has_overflowed = len(calls) > overflowing  # a step that is not perturbed has no later pass
    assert has_overflowed or overflowing
    assert torch.equal(weights(), before) == has_overflowed
    assert optimizer.diagnostics.num_skipped_steps == num_skipped + has_overflowed
    assert scaler.get_scale() == (2.0**9 if has_overflowed else 2.0**10)
    if has_overflowed:
        assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    optimizer.step(partial(closure, None), scaler)
    assert not torch.equal(weights(), before)
    assert is_same_everywhere(weights())


@pytest.mark.parametrize("name", [*ROWS, *RESTING])
def test_replicas_are_micro_batches_and_resume_and_agree_on_overflows(two_ranks, name):
    ends = [two_ranks.run(_replicas, name, sync)[0] for sync in ("local", "global") if name in ROWS or sync == "global"]
    if name in ROWS:  # the control: what the replicas share makes a difference
        assert (ends[0] - ends[1]).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROWS, *RESTING])
def test_four_replicas_are_micro_batches_and_resume_and_agree_on_overflows(four_ranks, name):
    for sync in ("local", "global", 2) if name in ROWS else ("global",):
        four_ranks.run(_replicas, name, sync)


def _train_shards(name, steps, saved=None):
    model = fsdp()
    optimizer = _built(name, model)
    if saved is not None:
        set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
    for step in steps:
        if step == 3 and saved is None:
            saved = copy.deepcopy(get_state_dict(model, optimizer))
        take_step(optimizer, model, data_of("fsdp", step)[0])
    return model, optimizer, saved


def _shards(name):
    model, optimizer, saved = _train_shards(name, range(NUM_STEPS))
    alone = network_of_shards()
    reference = _built(name, alone)
    for step in range(NUM_STEPS):
        take_step(reference, alone, data_of("fsdp", step)[1])
    assert_close(whole(model), whole(alone), rtol=1e-10, atol=1e-11)
    resumed = _train_shards(name, range(3, NUM_STEPS), saved)[0]
    assert all(map(torch.equal, shards(resumed), shards(model)))
    for overflowing in (0, getattr(optimizer, "ascent_steps", 1)):
        _overflow(optimizer, partial(_loss_of, model), lambda: whole(model), overflowing)


@pytest.mark.parametrize("name", [*ROWS, *RESTING])
def test_shards_are_one_process_and_resume_and_agree_on_overflows(two_ranks, name):
    two_ranks.run(_shards, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROWS, *RESTING])
def test_shards_over_four_processes_are_one_process(four_ranks, name):
    four_ranks.run(_shards, name)


def _bsam(num_micro_batches):
    """The noise is the same on all replicas, and the gradients of both passes are their mean."""
    model, alone = replicated(network(), broadcast_buffers=False, gradient_as_bucket_view=True), network()
    optimizer, reference = (
        flatmin.BSAM(each.parameters(), lr=0.1, num_data=100, model=each) for each in (model, alone)
    )
    for step in range(4):
        numbers = [num_micro_batches * step + index for index in range(num_micro_batches)]
        optimizer.step([closure_on(optimizer, model, number) for number in numbers])

        def mean(number):
            parts = [batch(number, rank) for rank in range(distributed.get_world_size())]
            reference.zero_grad()
            loss = sum(cross_entropy(alone(inputs), labels) for inputs, labels in parts) / len(parts)
            loss.backward()
            return loss

        reference.step([partial(mean, number) for number in numbers])
        assert is_same_everywhere(parameters_of(model))
    assert_close(parameters_of(model), parameters_of(alone), rtol=1e-10, atol=1e-11)
    for overflowing in (0, 1):
        before, calls = parameters_of(model), []

        def overflow(overflowing=overflowing, calls=calls):
            optimizer.zero_grad()
            is_bad = distributed.get_rank() == 1 and len(calls) == overflowing
            calls.append(1)
            loss = _loss_of(model) * (math.inf if is_bad else 1.0)
            loss.backward()
            return loss

        optimizer.step(overflow)
        assert torch.equal(parameters_of(model), before)
    assert optimizer.diagnostics.num_skipped_steps == 2
    with pytest.raises(ValueError, match="params must be whole, got sharded ones.*use DistributedDataParallel"):
        flatmin.BSAM(fsdp().parameters(), num_data=100)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
def test_bsam_shares_one_perturbation_and_refuses_shards(two_ranks, num_micro_batches):
    two_ranks.run(_bsam, num_micro_batches)


def test_every_named_method_is_tested_here():
    public = [getattr(flatmin, name) for name in flatmin.__all__]
    methods = {thing for thing in public if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer)}
    engines = {flatmin.SharpnessAware, flatmin.OnePass}
    assert methods - engines == {*(row.method for row in ROWS.values()), *RESTING.values(), flatmin.BSAM} & methods
