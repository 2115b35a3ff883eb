"""What every optimizer of the table promises."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything, through_closure, through_context, through_two_steps, train
from optimizers import TABLE
from problems import batches, tiny_network
from reference import momentum_sgd, sam_gradient

pytestmark = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def _sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, **options})


def _built(row, rho=0.1, dtype=torch.float32, **more):
    model = tiny_network(dtype=dtype)
    return model, row.build(_sgd(model.parameters()), model, rho, **more)


def _closure(optimizer, model, batch=0):
    inputs, labels = batches(next(model.parameters()).dtype)[batch]

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    return closure


# The algorithm


@pytest.mark.parametrize("rhos", [(0.3, 0.3), (0.3, 0.02)], ids=["equal groups", "unequal groups"])
@pytest.mark.parametrize("seed", [0, 1])
def test_thirty_steps_equal_the_published_box_in_float64(row, rhos, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    names = [name for name, _ in model.named_parameters()]
    weights = [param.detach().clone() for param in model.parameters()]
    groups = [{"params": list(model[0].parameters()), "rho": rhos[0]}, {"params": list(model[2:].parameters())}]
    optimizer = row.build(_sgd(groups, weight_decay=0.0), model, rhos[1])
    rho_of = [rhos[0]] * 2 + [rhos[1]] * 4
    data = batches(torch.float64)

    def gradient_of(inputs, labels):
        def gradient(w):
            w = [x.detach().requires_grad_() for x in w]
            output = torch.func.functional_call(model, dict(zip(names, w, strict=True)), (inputs,))
            return list(torch.autograd.grad(cross_entropy(output, labels), w))

        return gradient

    velocity, plain, plain_velocity = None, weights, None
    for step in range(30):
        inputs, labels = data[step % len(data)]
        through_closure(optimizer, lambda x=inputs, y=labels: cross_entropy(model(x), y))
        gradient = gradient_of(inputs, labels)
        g_p = sam_gradient(
            weights,
            gradient,
            rho_of,
            p=row.p,
            scale=lambda index, w: row.scale(names[index], w),
            ascent_steps=row.num_closure_calls - 1,
        )
        weights, velocity = momentum_sgd(weights, g_p, velocity, lr=0.1, momentum=0.9)
        plain, plain_velocity = momentum_sgd(plain, gradient(plain), plain_velocity, lr=0.1, momentum=0.9)
        torch.testing.assert_close(list(model.parameters()), weights, rtol=1e-9, atol=1e-9, check_stride=False)
    farthest_from_plain = max((x - y).abs().max().item() for x, y in zip(weights, plain, strict=True))
    assert farthest_from_plain > 1e-3, "the reference does not tell the method from plain SGD"


def test_rho_zero_is_the_base_optimizer_bit_for_bit(row):
    model, optimizer = _built(row, rho=0.0)
    train(optimizer, model)
    plain = tiny_network()
    losses = train(_sgd(plain.parameters()), plain)
    assert torch.equal(everything(model), everything(plain))
    moved, optimizer = _built(row, rho=0.1)
    assert not torch.equal(everything(moved), everything(model))
    assert not torch.equal(torch.stack(train(optimizer, moved)), torch.stack(losses))


def test_rho_zero_without_the_model_is_not_the_base_optimizer(row):
    """The control of the test above: dropout and batch norm do differ between the passes."""
    if row.name in ("ASAM", "ASAM-eta-2-ascents", "ASAM-pinf"):
        pytest.skip("goes by names, which come with the model")
    model = tiny_network()
    optimizer = row.build(_sgd(model.parameters()), None, 0.0)
    train(optimizer, model)
    plain = tiny_network()
    train(_sgd(plain.parameters()), plain)
    assert not torch.equal(everything(model), everything(plain))


# The doors


@pytest.mark.parametrize("door", [through_two_steps, through_context])
def test_every_door_gives_the_same_numbers(row, door):
    if door is through_context and row.num_closure_calls > 2:
        pytest.skip("the context manager makes one ascent, and says so")
    model, optimizer = _built(row)
    losses = train(optimizer, model)
    other, other_optimizer = _built(row)
    assert torch.equal(torch.stack(train(other_optimizer, other, door=door)), torch.stack(losses))
    assert torch.equal(everything(other), everything(model))


def test_the_closure_is_called_as_often_as_documented_and_its_first_loss_returned(row):
    model, optimizer = _built(row)
    losses = []
    closure = _closure(optimizer, model)

    def counting():
        losses.append(closure())
        return losses[-1]

    loss = optimizer.step(counting)
    assert len(losses) == row.num_closure_calls
    assert loss is losses[0]
    assert losses[-1] > loss


def test_no_gradient_mode_outside_does_not_reach_the_closure(row):
    model, optimizer = _built(row)
    with torch.no_grad():
        assert optimizer.step(_closure(optimizer, model)).requires_grad


# Weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("failing_call", [1, 2])
def test_weights_are_restored_bit_for_bit_when_the_closure_raises(row, dtype, failing_call):
    model, optimizer = _built(row, dtype=dtype)
    train(optimizer, model, range(2))
    weights = [param.detach().clone() for param in model.parameters()]
    closure, calls = _closure(optimizer, model), []

    def failing():
        calls.append([param.detach().clone() for param in model.parameters()])
        if len(calls) == failing_call:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), weights, strict=True))
    if failing_call == 2:
        assert not all(torch.equal(x, y) for x, y in zip(calls[1], weights, strict=True))

    # the failed step has left nothing behind that a later step would notice
    fresh, fresh_optimizer = _built(row, dtype=dtype)
    train(fresh_optimizer, fresh, range(2))
    model.load_state_dict(fresh.state_dict())
    train(optimizer, model, range(2, 5))
    train(fresh_optimizer, fresh, range(2, 5))
    assert torch.equal(everything(model), everything(fresh))


def test_weights_stay_in_their_storage(row):
    model, optimizer = _built(row)
    addresses = [param.data_ptr() for param in model.parameters()]
    seen = []
    closure = _closure(optimizer, model)

    def looking():
        seen.append([param.data_ptr() for param in model.parameters()])
        return closure()

    optimizer.step(looking)
    assert all(found == addresses for found in seen)
    assert [param.data_ptr() for param in model.parameters()] == addresses


def test_the_second_pass_costs_one_copy_of_the_weights_and_nothing_between_steps(row):
    model, optimizer = _built(row)
    train(optimizer, model, range(1))
    num_weights = sum(param.numel() for param in model.parameters() if param.grad is not None)
    own = {param.data_ptr() for param in model.parameters()}
    closure, counts = _closure(optimizer, model), []

    def alive():
        """Entries of the floating-point tensors made since, each storage once, other than the weights."""
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.is_floating_point()]
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 4 for x in tensors}
        return sum(size for address, size in sizes.items() if address not in own)

    def counting():
        optimizer.zero_grad()
        counts.append(alive())
        return closure()

    gc.collect()
    gc.freeze()
    before = alive()
    optimizer.step(counting)
    after = alive()
    gc.unfreeze()
    buffers = sum(buffer.numel() for buffer in model.buffers() if buffer.is_floating_point())
    assert num_weights <= counts[-1] - counts[0] <= num_weights + 2 * buffers + 10  # 10: the losses and the like
    assert after - before <= num_weights + 10  # the last gradient, which is the user's to clear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_zero_gradient_moves_nothing_and_makes_no_nan(row, dtype):
    model, optimizer = _built(row, dtype=dtype)
    seen = []

    def closure():
        optimizer.zero_grad()
        seen.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
        loss = 0 * sum(param.sum() for param in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(torch.equal(weights, seen[0]) for weights in seen)
    assert everything(model).isfinite().all()


def test_frozen_and_unused_parameters_stay_and_do_not_count(row):
    model, optimizer = _built(row)
    model.first.weight.requires_grad_(False)
    frozen, unused = model.first.weight.clone(), model.unused.detach().clone()
    train(optimizer, model, range(3))
    assert torch.equal(model.first.weight, frozen)
    assert torch.equal(model.unused, unused)


def test_a_parameter_with_a_gradient_in_one_pass_only_is_handled(row):
    if row.num_closure_calls > 2:
        pytest.skip("several ascents refuse it, see test_several_ascents_refuse_a_changing_set_of_gradients")
    weights = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    model = nn.Module()
    model.weights = nn.ParameterList(weights)
    optimizer = row.build(_sgd(weights, weight_decay=0.0, momentum=0.0), model)
    used = iter([(0, 1), (0, 2)])

    def closure():
        optimizer.zero_grad()
        loss = sum(weights[index].square().sum() for index in next(used))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(weights[1], torch.ones(3))  # perturbed, restored, and without a gradient to follow
    torch.testing.assert_close(weights[2].detach(), torch.full((3,), 0.8))
    assert (weights[0] <= 0.8).all()
    assert weights[0].min() < 0.8


# Skipping


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("bad_call", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_that_is_not_finite_skips_the_step(row, value, bad_call, fused):
    model = tiny_network()
    optimizer = row.build(_sgd(model.parameters(), fused=fused), model)
    train(optimizer, model, range(2))
    weights = [param.detach().clone() for param in model.parameters()]
    momentum = [x["momentum_buffer"].clone() for x in optimizer.state.values() if x.get("momentum_buffer") is not None]
    closure, calls = _closure(optimizer, model), []

    def spoiled():
        loss = closure()
        calls.append(loss)
        if len(calls) == bad_call:
            model.last.weight.grad[0, 0] = value
        return loss

    optimizer.step(spoiled)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), weights, strict=True))
    after = [x["momentum_buffer"] for x in optimizer.state.values() if x.get("momentum_buffer") is not None]
    assert len(after) == len(momentum) > 0
    assert all(torch.equal(x, y) for x, y in zip(after, momentum, strict=True))
    assert optimizer.diagnostics.as_dict()["num_skipped_steps"] == 1
    train(optimizer, model, range(2, 3))
    assert optimizer.diagnostics.as_dict()["num_skipped_steps"] == 1
    assert everything(model).isfinite().all()
    assert not torch.equal(model.last.weight, weights[-2])


# Groups, schedulers, hooks


def test_groups_and_state_are_the_base_optimizers_own(row):
    _, optimizer = _built(row)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state


@pytest.mark.parametrize("on_base", [False, True])
@pytest.mark.parametrize("door", [through_closure, through_two_steps])
def test_a_scheduler_changes_the_step_without_a_warning(row, on_base, door):
    model, optimizer = _built(row)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base if on_base else optimizer, 1, gamma=0.5)
    train(optimizer, model, range(3), door, scheduler.step)
    assert optimizer.base.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    other, unscheduled = _built(row)
    train(unscheduled, other, range(3), door)
    assert not torch.equal(everything(model), everything(other))


def test_rho_can_be_scheduled_and_is_saved(row):
    model, optimizer = _built(row)
    optimizer.param_groups[0]["rho"] = 0.0
    train(optimizer, model, range(3))
    plain = tiny_network()
    train(_sgd(plain.parameters()), plain, range(3))
    assert torch.equal(everything(model), everything(plain))
    assert optimizer.state_dict()["param_groups"][0]["rho"] == 0.0


def test_step_hooks_run_on_wrapper_and_base(row):
    model, optimizer = _built(row)
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
    model = tiny_network()
    optimizer = row.build(_sgd(model.first.parameters()), model, 0.1)
    optimizer.add_param_group({"params": [*model.norm.parameters(), *model.last.parameters()], "rho": 0.3})
    assert [group["rho"] for group in optimizer.base.param_groups] == [0.1, 0.3]
    same = tiny_network()
    groups = [
        {"params": list(same.first.parameters())},
        {"params": [*same.norm.parameters(), *same.last.parameters()], "rho": 0.3},
    ]
    at_once = row.build(_sgd(groups), same, 0.1)
    train(optimizer, model)
    train(at_once, same)
    assert torch.equal(everything(model), everything(same))


def test_a_maximised_group_mirrors_a_minimised_one(row):
    """Maximising -L is minimising L, neighbourhood included."""
    model, optimizer = _built(row)
    train(optimizer, model, range(4), lambda o, loss: through_closure(o, loss))
    mirrored = tiny_network()
    ascending = row.build(_sgd(mirrored.parameters(), maximize=True), mirrored)
    train(ascending, mirrored, range(4), lambda o, loss: through_closure(o, lambda: -loss()))
    assert torch.equal(everything(model), everything(mirrored))


@pytest.mark.parametrize("what", ["deepcopy", "pickle"])
def test_a_copy_goes_on_like_the_original(row, what):
    model, optimizer = _built(row)
    train(optimizer, model, range(3))
    both = (model, optimizer)
    model_copy, optimizer_copy = copy.deepcopy(both) if what == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert optimizer_copy.param_groups is optimizer_copy.base.param_groups
    train(optimizer, model, range(3, 6))
    train(optimizer_copy, model_copy, range(3, 6))
    assert torch.equal(everything(model_copy), everything(model))


def test_a_copy_of_the_model_alone_is_inert(row):
    model, optimizer = _built(row)
    average = copy.deepcopy(model)
    train(optimizer, model, range(2))
    before = everything(average)
    through_closure(torch.optim.SGD(average.parameters(), lr=0.0), lambda: average(batches()[0][0]).sum())
    other, other_optimizer = _built(row)
    train(other_optimizer, other, range(2))
    assert torch.equal(everything(model), everything(other))
    assert not torch.equal(everything(average), before)  # its running statistics did move


# State


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
    model, optimizer = _built(row)
    train(optimizer, model, range(2))
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert {name for entry in state_dict["state"].values() for name in entry} == {"momentum_buffer"}


def test_checkpoints_pass_between_the_base_and_the_wrapper(row):
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


# Errors


def test_values_outside_the_domain_are_refused_by_name(row):
    for options, message in row.invalid:
        model = tiny_network()
        base = _sgd(model.parameters())
        arguments = {"rho": 0.1, **options}
        with pytest.raises(ValueError, match=message):
            row.method(base, model=model, **{**row.options, **arguments})
        row.build(base, model)  # the refusal has left no mark on the base


def test_a_step_without_a_second_pass_is_an_error(row):
    model, optimizer = _built(row)
    closure = _closure(optimizer, model)
    closure()
    with pytest.raises(RuntimeError, match="without a second pass"):
        optimizer.step()


def test_a_closure_without_backward_is_an_error(row):
    model, optimizer = _built(row)
    inputs, labels = batches()[0]
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.step(lambda: cross_entropy(model(inputs), labels))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("zero_grad", [True, False])
def test_a_missing_or_stale_backward_pass_is_an_error(row, zero_grad):
    model, optimizer = _built(row)
    closure = _closure(optimizer, model)
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.first_step()
    weights = [param.detach().clone() for param in model.parameters()]
    closure()
    optimizer.first_step(zero_grad=zero_grad)
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.second_step()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), weights, strict=True))
    train(optimizer, model, range(1), through_two_steps)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.first_step()


def test_doors_called_out_of_order_are_errors(row):
    model, optimizer = _built(row)
    closure = _closure(optimizer, model)
    with pytest.raises(RuntimeError, match="must follow first_step"):
        optimizer.second_step()
    for _ in range(optimizer.ascent_steps):
        closure()
        optimizer.first_step()
    closure()
    with pytest.raises(RuntimeError, match="first_step\\(\\) came twice"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="must not be called between"):
        optimizer.state_dict()
    optimizer.restore()
    optimizer.step(closure)


def test_sparse_gradients_are_refused(row):
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = row.build(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(RuntimeError, match="must be dense"):
        through_closure(optimizer, lambda: model(torch.tensor([1])).sum())


def test_bases_that_cannot_be_wrapped_are_refused(row):
    model, optimizer = _built(row)
    with pytest.raises(TypeError, match="LBFGS"):
        row.build(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(TypeError, match="must not be sharpness-aware itself"):
        row.build(optimizer, model)


def test_diagnostics_tell_what_the_step_saw(row):
    if "compat" in row.name:
        pytest.skip("the older constructor has no such argument")
    model = tiny_network()
    optimizer = row.build(_sgd(model.parameters()), model, diagnostics=True)
    seen, points = [], []
    closure = _closure(optimizer, model)

    def watching():
        points.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
        loss = closure()
        seen.append(
            (loss.detach(), torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None]))
        )
        return loss

    optimizer.step(watching)
    (loss, g), (loss_there, g_p) = seen[0], seen[-1]
    expected = {
        "loss": loss,
        "loss_rise": loss_there - loss,
        "gradient_norm": g.norm(),
        "perturbed_gradient_norm": g_p.norm(),
        "cosine": torch.cosine_similarity(g, g_p, dim=0),
        "perturbation_norm": (points[-1] - points[0]).norm(),
        "num_steps": 1,
        "num_perturbed_steps": 1,
        "num_skipped_steps": 0,
    }
    assert optimizer.diagnostics.as_dict() == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)
    assert isinstance(optimizer, flatmin.SharpnessAware)
