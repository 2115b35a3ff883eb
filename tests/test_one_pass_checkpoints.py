"""One-pass methods saved, loaded and copied: with w or w + eps in the model, in either order."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.functional import cross_entropy

from doors import everything
from one_pass_methods import BASES, METHODS, every_method, made, run
from problems import batches


@every_method
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("shown", "model_last"),
    [(False, False), (True, False), (False, True)],
    ids=["saved at rest", "saved on show", "saved at rest, model loaded last"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(method, base, shown, model_last):
    model, optimizer = made(method, base)
    run(optimizer, model, range(4))
    file = io.BytesIO()
    if shown:
        with optimizer.unperturbed():
            torch.save([model.state_dict(), optimizer.state_dict()], file)
    else:
        torch.save([model.state_dict(), optimizer.state_dict()], file)
    run(optimizer, model, range(4, 8))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    has_copy = any("true_weights" in entry for entry in state["state"].values())
    assert has_copy != shown
    resumed, resumed_optimizer = made(method, base, seed=1, rho=0.9)
    for each, saved in [(resumed, weights), (resumed_optimizer, state)][:: -1 if model_last else 1]:
        each.load_state_dict(saved)
    run(resumed_optimizer, resumed, range(4, 8))
    assert torch.equal(everything(resumed), everything(model))


def test_a_state_that_has_lost_the_true_weights_is_refused():
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(2))
    state = optimizer.state_dict()
    assert [state["param_groups"][0]["is_perturbed"], optimizer.param_groups[0]["is_perturbed"]] == [True, False]
    for entry in state["state"].values():
        entry.pop("true_weights", None)
    with pytest.raises(ValueError, match="has lost w"):
        optimizer.load_state_dict(state)


@every_method
def test_torch_distributed_checkpoint_resumes_bit_for_bit(method):
    model, optimizer = made(method)
    model.unused.requires_grad_(False)
    run(optimizer, model, range(4))
    resumed, resumed_optimizer = made(method, seed=1)
    resumed.unused.requires_grad_(False)
    with optimizer.unperturbed():
        resumed.load_state_dict(model.state_dict())
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(resumed, resumed_optimizer, saved)
    run(optimizer, model, range(4, 8))
    run(resumed_optimizer, resumed, range(4, 8))
    assert torch.equal(everything(resumed), everything(model))


@every_method
@pytest.mark.parametrize("by_closure", [False, True], ids=["zero_grad", "closure"])
def test_weights_loaded_after_the_optimizer_are_perturbed_before_their_first_gradient(method, by_closure):
    """The order of torch's ``set_state_dict``; w comes without the copy, because it was saved inside."""
    model, optimizer = made(method)
    run(optimizer, model, range(4))
    resumed, resumed_optimizer = made(method, seed=1)
    with optimizer.unperturbed():
        resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed.load_state_dict(model.state_dict())
    run(optimizer, model, range(4, 8))
    if by_closure:
        torch.manual_seed(104)
        inputs, labels = batches()[4]

        def closure():
            loss = cross_entropy(resumed(inputs), labels)
            loss.backward()
            return loss

        resumed_optimizer.step(closure)
    run(resumed_optimizer, resumed, range(5 if by_closure else 4, 8))
    assert torch.equal(everything(resumed), everything(model))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("is_shown", [True, False], ids=["inside", "at rest"])
@pytest.mark.parametrize("method", [METHODS["MSAM"], METHODS["stale"]], ids=["MSAM", "stale"])
def test_files_of_torch_distributed_checkpoint_resume_if_saved_inside_unperturbed(method, is_shown, tmp_path):
    """The page says so; files that were saved at rest have lost w."""
    model, optimizer = made(method)
    model.unused.requires_grad_(False)
    run(optimizer, model, range(4))
    with optimizer.unperturbed() if is_shown else nullcontext():
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    resumed, resumed_optimizer = made(method, seed=1)
    resumed.unused.requires_grad_(False)
    model_state, optimizer_state = get_state_dict(resumed, resumed_optimizer)
    checkpoint.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)
    with nullcontext() if is_shown else pytest.raises(ValueError, match="has lost w"):
        set_state_dict(resumed, resumed_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    if is_shown:
        run(optimizer, model, range(4, 8))
        run(resumed_optimizer, resumed, range(4, 8))
        assert torch.equal(everything(resumed), everything(model))


@every_method
@pytest.mark.parametrize("what", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(method, what):
    model, optimizer = made(method)
    run(optimizer, model, range(3))
    both = (model, optimizer)
    model_copy, optimizer_copy = copy.deepcopy(both) if what == "deepcopy" else pickle.loads(pickle.dumps(both))
    run(optimizer, model, range(3, 6))
    run(optimizer_copy, model_copy, range(3, 6))
    assert torch.equal(everything(model_copy), everything(model))


def test_a_state_that_is_loaded_while_the_true_weights_are_on_show_leaves_them_there():
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(3))
    state, rests = copy.deepcopy(optimizer.state_dict()), everything(model)
    with optimizer.unperturbed():
        true = everything(model)
        optimizer.load_state_dict(state)
        assert torch.equal(everything(model), true)
        assert not torch.equal(true, rests)
    assert torch.equal(everything(model), rests)
