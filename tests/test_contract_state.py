"""State dicts: resuming, exchanging with the base, torch.distributed.checkpoint."""

import copy
import io

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from doors import everything, train
from optimizers import TABLE, built, needs_all_moved
from problems import tiny_network

pytestmark = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


BASES = {
    "sgd-momentum": lambda params, **o: torch.optim.SGD(params, lr=0.1, momentum=0.9, **o),
    "sgd-nesterov": lambda params, **o: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **o),
    "adam": lambda params, **o: torch.optim.Adam(params, lr=0.01, **o),
    "adamw": lambda params, **o: torch.optim.AdamW(params, lr=0.01, **o),
    "rmsprop": lambda params, **o: torch.optim.RMSprop(params, lr=0.01, momentum=0.9, **o),
}
FORMS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(row, base, form):
    if base == "rmsprop" and form == "fused":
        pytest.skip("torch has no fused RMSprop")
    model = tiny_network()
    optimizer = row.build(BASES[base](model.parameters(), **FORMS[form]), model)
    train(optimizer, model, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(optimizer, model, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny_network(seed=1)
    resumed_optimizer = row.build(BASES[base](resumed.parameters(), **FORMS[form]), resumed, rho=0.7)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    train(resumed_optimizer, resumed, range(5, 10))
    assert torch.equal(everything(resumed), everything(model))

    forgetful = tiny_network(seed=1)  # the control: without the optimizer's state the run is another
    forgetful.load_state_dict(saved["model"])
    train(row.build(BASES[base](forgetful.parameters(), **FORMS[form]), forgetful), forgetful, range(5, 10))
    assert not torch.equal(everything(forgetful), everything(model))


def test_the_state_dict_has_the_standard_form_and_no_copy_of_the_weights(row):
    model, optimizer = built(row)
    train(optimizer, model, range(2))
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert {name for entry in state_dict["state"].values() for name in entry} == {"momentum_buffer", *row.kept}


def test_checkpoints_pass_between_the_base_and_the_wrapper(row):
    needs_all_moved(row)
    plain = tiny_network()
    base = torch.optim.Adam(plain.parameters(), lr=0.01)
    train(base, plain, range(3))
    model = tiny_network()
    model.load_state_dict(plain.state_dict())
    optimizer = row.build(torch.optim.Adam(model.parameters(), lr=0.5), model, 0.25)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))  # sharpness-awareness switched on late
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (0.01, 0.25)
    train(optimizer, model, range(3, 6))

    plain.load_state_dict(model.state_dict())
    base = torch.optim.Adam(plain.parameters(), lr=0.5)
    base.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # and off again
    optimizer.param_groups[0]["rho"] = 0.0
    train(optimizer, model, range(6, 9))
    train(base, plain, range(6, 9))
    assert torch.equal(everything(model), everything(plain))


@pytest.mark.parametrize("base", ["sgd-momentum", "adam"])
def test_torch_distributed_checkpoint_resumes_bit_for_bit(row, base):
    model = tiny_network()
    optimizer = row.build(BASES[base](model.parameters()), model)
    train(optimizer, model, range(4))
    resumed = tiny_network(seed=1)
    for each in (model, resumed):
        each.unused.requires_grad_(False)  # torch refuses trainable parameters that have no state yet
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer = row.build(BASES[base](resumed.parameters()), resumed, 0.7)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(resumed, resumed_optimizer, saved)
    train(optimizer, model, range(4, 8))
    train(resumed_optimizer, resumed, range(4, 8))
    assert torch.equal(everything(resumed), everything(model))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_files_of_torch_distributed_checkpoint_hold_what_a_method_remembers(row, tmp_path):
    """They are read into the state of a fresh optimizer, which must have every entry before its first step."""
    if not row.kept:
        pytest.skip("keeps nothing of its own")
    model = tiny_network()
    optimizer = row.build(BASES["sgd-momentum"](model.parameters()), model)
    model.unused.requires_grad_(False)
    train(optimizer, model, range(4))
    model_state, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path)
    resumed = tiny_network(seed=1)
    resumed.unused.requires_grad_(False)
    resumed_optimizer = row.build(BASES["sgd-momentum"](resumed.parameters()), resumed)
    model_state, state = get_state_dict(resumed, resumed_optimizer)
    checkpoint.load({"model": model_state, "optimizer": state}, checkpoint_id=tmp_path)
    set_state_dict(resumed, resumed_optimizer, model_state_dict=model_state, optim_state_dict=state)
    train(optimizer, model, range(4, 8))
    train(resumed_optimizer, resumed, range(4, 8))
    assert torch.equal(everything(resumed), everything(model))
