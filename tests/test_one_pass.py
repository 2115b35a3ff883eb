"""One-pass methods: plain training's cost, weights that rest at w + eps, and the true ones on show."""

import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything
from flatmin.optim import (
    Ball,
    BaseMomentum,
    Filtered,
    Gradient,
    LayerBall,
    RandomDirection,
    StaleGradient,
    WarmUp,
    Window,
)
from flatmin.optim.filters import Centralised
from flatmin.sharpness import hessian_eigenvalues, worst_case
from problems import batches, tiny_network

METHODS = {
    "MSAM": lambda base, rho=0.3, **o: flatmin.MSAM(base, rho, **o),
    "AdaptiveMSAM": lambda base, rho=0.3, **o: flatmin.AdaptiveMSAM(base, rho, **o),
    "stale": lambda base, rho=0.3, **o: flatmin.OnePass(base, rho, direction=StaleGradient(), **o),
    "random": lambda base, rho=0.3, **o: flatmin.OnePass(base, rho, direction=RandomDirection(), **o),
    "layers": lambda base, rho=0.3, **o: flatmin.OnePass(base, rho, ball=LayerBall(), **o),
    "centralised": lambda base, rho=0.3, **o: flatmin.OnePass(
        base, rho, direction=Filtered(BaseMomentum(), Centralised()), **o
    ),
}
BASES = {
    "sgd": lambda params, **o: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, **o),
    "adam": lambda params, **o: torch.optim.Adam(params, lr=0.01, **o),
    "nadam": lambda params, **o: torch.optim.NAdam(params, lr=0.01, **o),
    "adamw-fused": lambda params, **o: torch.optim.AdamW(params, lr=0.01, fused=True, **o),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def run(optimizer, model, steps):
    """An ordinary training loop, with dropout masks of the step's own."""
    data = batches(next(model.parameters()).dtype)
    losses = []
    for step in steps:
        torch.manual_seed(100 + step)
        inputs, labels = data[step % len(data)]
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def made(method, base="sgd", dtype=torch.float32, seed=0, **options):
    model = tiny_network(seed, dtype)
    return model, method(BASES[base](model.parameters()), **options)


def _scaling(eta, w):
    """T of ASAM's ball, or of a round one."""
    return [torch.ones_like(x) if eta is None else x.abs() + eta for x in w]


@pytest.mark.parametrize(("method", "eta"), [(flatmin.MSAM, None), (flatmin.AdaptiveMSAM, 0.01)])
def test_momentum_sam_equals_the_published_box_in_float64(method, eta):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    names = [name for name, _ in model.named_parameters()]
    w = [param.detach().clone() for param in model.parameters()]
    v = [torch.zeros_like(x) for x in w]
    groups = [{"params": list(model[0].parameters()), "rho": 0.5}, {"params": list(model[2].parameters())}]
    optimizer = method(torch.optim.SGD(groups, lr=0.1, momentum=0.9), 0.2)
    radii = [0.5, 0.5, 0.2, 0.2]
    for step in range(30):
        inputs, labels = batches(torch.float64)[step % 6]
        scaling = _scaling(eta, w)
        length = torch.cat([(t * x).flatten() for t, x in zip(scaling, v, strict=True)]).norm()
        moves = [t**2 * y / length if length > 0 else 0.0 * y for t, y in zip(scaling, v, strict=True)]
        there = [x - rho * move for x, move, rho in zip(w, moves, radii, strict=True)]
        torch.testing.assert_close(list(model.parameters()), there, rtol=1e-9, atol=1e-9, check_stride=False)
        run(optimizer, model, range(step, step + 1))
        there = [x.detach().requires_grad_() for x in there]
        output = torch.func.functional_call(model, dict(zip(names, there, strict=True)), (inputs,))
        g = torch.autograd.grad(cross_entropy(output, labels), there)
        v = [0.9 * x + y for x, y in zip(v, g, strict=True)]
        w = [x - 0.1 * y for x, y in zip(w, v, strict=True)]
        with optimizer.unperturbed():
            torch.testing.assert_close(list(model.parameters()), w, rtol=1e-9, atol=1e-9, check_stride=False)
    assert max((x - y).abs().max() for x, y in zip(w, there, strict=True)) > 1e-3  # the two places do differ


@every_method
@pytest.mark.parametrize("base", BASES)
def test_rho_zero_is_the_base_optimizer_bit_for_bit(method, base):
    model, optimizer = made(method, base, rho=0.0)
    plain = tiny_network()
    losses = run(BASES[base](plain.parameters()), plain, range(8))
    assert torch.equal(torch.stack(run(optimizer, model, range(8))), torch.stack(losses))
    assert torch.equal(everything(model), everything(plain))
    moved, other = made(method, base)
    run(other, moved, range(8))
    with other.unperturbed():
        assert not torch.equal(everything(moved), everything(plain))


@every_method
def test_the_step_length_is_rho(method):
    model, optimizer = made(method, dtype=torch.float64, rho=0.25)
    run(optimizer, model, range(3))
    rests = [param.detach().clone() for param in model.parameters()]
    with optimizer.unperturbed():
        eps = [rest - param for rest, param in zip(rests, model.parameters(), strict=True)]
        if isinstance(optimizer, flatmin.AdaptiveMSAM):
            eps = [e / (param.abs() + 0.01) for e, param in zip(eps, model.parameters(), strict=True)]
    lengths = torch.stack([e.norm() for e in eps])
    if isinstance(optimizer.ball, LayerBall):
        torch.testing.assert_close(
            lengths[1:], torch.full((6,), 0.25, dtype=torch.float64)
        )  # the first has no gradient
    else:
        torch.testing.assert_close(lengths.norm(), torch.tensor(0.25, dtype=torch.float64))


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


@every_method
def test_a_closure_is_called_once_and_gives_the_same_numbers(method):
    model, optimizer = made(method)
    losses = run(optimizer, model, range(5))
    other, other_optimizer = made(method)
    found = []
    for step in range(5):
        torch.manual_seed(100 + step)
        inputs, labels = batches()[step % 6]
        calls = []

        def closure(inputs=inputs, labels=labels, calls=calls):
            other_optimizer.zero_grad()
            loss = cross_entropy(other(inputs), labels)
            loss.backward()
            calls.append(loss)
            return loss

        found.append(other_optimizer.step(closure).detach())
        assert len(calls) == 1
    assert torch.equal(torch.stack(found), torch.stack(losses))
    assert torch.equal(everything(other), everything(model))


def test_micro_batches_are_averaged():
    model, optimizer = made(METHODS["MSAM"], dtype=torch.float64)
    model.eval()  # batch norm and dropout see the whole batch
    other, at_once = made(METHODS["MSAM"], dtype=torch.float64)
    other.eval()
    inputs, labels = batches(torch.float64)[0]

    def closure_of(network, part):
        def closure():
            loss = cross_entropy(network(inputs[part]), labels[part])
            loss.backward()
            return loss

        return closure

    for _ in range(4):
        loss = optimizer.step([closure_of(model, slice(0, 8)), closure_of(model, slice(8, 16))])
        expected = at_once.step(closure_of(other, slice(0, 16)))
        torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(everything(model), everything(other))


@every_method
@pytest.mark.parametrize("base", ["sgd", "adamw-fused"])
def test_a_gradient_that_is_not_finite_skips_the_step(method, base):
    model, optimizer = made(method, base)
    run(optimizer, model, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.unperturbed():
        before = [param.detach().clone() for param in model.parameters()]
    optimizer.zero_grad()
    cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()
    model.last.weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert optimizer.diagnostics.as_dict()["num_skipped_steps"] == 1
    assert optimizer.param_groups[0]["num_steps"] == 3
    names = ("momentum_buffer", "exp_avg", "stale_gradient")
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(entry[n], state["state"][index][n]) for n in names if n in entry and entry[n] is not None
        )
    with optimizer.unperturbed():
        assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


@every_method
def test_a_gradient_scaler_steps_and_backs_off(method):
    model, optimizer = made(method)
    plain, unscaled = made(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(6):
        torch.manual_seed(100 + step)
        inputs, labels = batches()[step]
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(inputs), labels)).backward()
        if step == 3:
            model.last.bias.grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    run(unscaled, plain, [0, 1, 2, 4, 5])
    for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param, expected)


def test_an_error_inside_of_the_scalers_step_does_not_spoil_the_next_one():
    """A factor left behind would divide the gradients of the next step, which has none."""
    model, optimizer = made(METHODS["MSAM"])
    expected, plain = made(METHODS["MSAM"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs, labels = batches()[0]
    scaler.scale(cross_entropy(model(inputs), labels)).backward()
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="unperturbed"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    run(optimizer, model, [1, 2])
    run(plain, expected, [1, 2])
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(param, other)


def test_errors_say_what_is_wrong():
    model, optimizer = made(METHODS["MSAM"])
    with pytest.raises(RuntimeError, match="backward\\(\\) must run before each step"):
        optimizer.step()
    run(optimizer, model, range(1))
    for clears in (lambda: None, lambda: optimizer.zero_grad(set_to_none=False), optimizer.zero_grad):
        clears()
        with pytest.raises(RuntimeError, match="backward\\(\\) must run before each step"):
            optimizer.step()
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="must not be called inside unperturbed"):
        optimizer.step()
    params = list(tiny_network().parameters())
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="direction must need no clean gradient"):
        flatmin.OnePass(base, 0.1, direction=Gradient())
    with pytest.raises(ValueError, match="direction must need the clean gradient"):
        flatmin.SharpnessAware(base, 0.1, direction=BaseMomentum())
    for ball in (Ball(metric=flatmin.optim.Fisher(0.1)), LayerBall(joint_vectors=True)):
        with pytest.raises(ValueError, match="ball must not depend on the gradient"):
            flatmin.OnePass(base, 0.1, ball=ball)
    with pytest.raises(ValueError, match="when must go by the number"):
        flatmin.OnePass(base, 0.1, when=flatmin.optim.LargeGradient(10))
    with pytest.raises(ValueError, match="base must have a first moment"):
        flatmin.MSAM(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(ValueError, match="rho must be >= 0"):
        flatmin.MSAM(base, -1.0)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "eta": -1.0}]
    with pytest.raises(ValueError, match="eta must be >= 0 and finite, got -1.0"):
        flatmin.AdaptiveMSAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9))


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


def test_a_schedule_sets_the_radius_of_the_way_out():
    model, optimizer = made(METHODS["MSAM"], dtype=torch.float64, rho_schedule=WarmUp(4))
    for step in range(6):
        run(optimizer, model, range(step, step + 1))
        rests = torch.cat([param.detach().flatten() for param in model.parameters()])
        with optimizer.unperturbed():
            eps = rests - torch.cat([param.detach().flatten() for param in model.parameters()])
        assert eps.norm().item() == pytest.approx(0.3 * min((step + 1) / 4, 1.0))


def test_narrow_weights_are_rounded_anew_in_each_step():
    weights = torch.nn.Parameter(torch.linspace(1.0, 2.0, 500).bfloat16())
    optimizer = flatmin.OnePass(torch.optim.SGD([weights], lr=0.0), 0.02, direction=StaleGradient())
    rests = []
    for _ in range(2):
        optimizer.zero_grad()
        weights.sum().backward()
        optimizer.step()
        rests.append(weights.detach().clone())
    assert not torch.equal(*rests)  # the same w and the same eps
    with optimizer.unperturbed():
        pass
    assert torch.equal(weights, rests[1])  # control: the same step


def test_weights_that_are_loaded_while_others_rest_count_as_true():
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(3))
    fresh = tiny_network(seed=5)
    model.load_state_dict(fresh.state_dict())
    with optimizer.unperturbed():
        assert torch.equal(everything(model), everything(fresh))


class _OtherNames(torch.optim.Adagrad):
    """Has momentum, which it keeps under a name of its own."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["momentum"] = 0.9


def test_a_base_whose_momentum_cannot_be_found_is_refused():
    model = tiny_network()
    with pytest.raises(ValueError, match=r"base must have a first moment .* got Adagrad"):
        flatmin.OnePass(torch.optim.Adagrad(model.parameters()), 0.3)
    optimizer = flatmin.MSAM(_OtherNames(model.parameters()))
    with pytest.raises(TypeError, match="base must keep its first moment .* got step, sum"):
        run(optimizer, model, range(2))


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


def test_a_maximised_group_looks_ahead_too():
    """Maximising -L with momentum is minimising L, perturbation included."""
    model, optimizer = made(METHODS["MSAM"])
    run(optimizer, model, range(5))
    mirrored = tiny_network()
    ascending = flatmin.MSAM(BASES["sgd"](mirrored.parameters(), maximize=True), 0.3)
    for step in range(5):
        torch.manual_seed(100 + step)
        ascending.zero_grad()
        (-cross_entropy(mirrored(batches()[step][0]), batches()[step][1])).backward()
        ascending.step()
    assert torch.equal(everything(model), everything(mirrored))


def test_a_filter_lets_its_direction_see_the_gradient():
    """Which else would know none, and the weights would rest at w without a word."""
    weights = torch.nn.Parameter(torch.zeros(2, 2))
    direction = Filtered(StaleGradient(), Centralised())
    optimizer = copy.deepcopy(flatmin.OnePass(torch.optim.SGD([weights], lr=0.0), 2.0, direction=direction))
    (weights,) = optimizer.param_groups[0]["params"]
    (weights * torch.tensor([[3.0, 1.0], [1.0, 1.0]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor([[1.0, -1.0], [0.0, 0.0]]) * 2**0.5)


def test_the_gradient_is_seen_before_the_base_writes_into_it():
    class Spends(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            super().step(closure)
            for param in self.param_groups[0]["params"]:
                param.grad.zero_()

    weights = torch.nn.Parameter(torch.zeros(2))
    optimizer = flatmin.OnePass(Spends([weights], lr=0.0), 5.0, direction=StaleGradient())
    (weights * torch.tensor([3.0, 4.0])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(weights.detach(), torch.tensor([3.0, 4.0]))


def test_a_group_added_late_brings_its_names():
    model = tiny_network()
    base = torch.optim.SGD(model.first.named_parameters(), lr=0.1, momentum=0.9)
    optimizer = flatmin.AdaptiveMSAM(base, scaled="weights")
    optimizer.add_param_group({"params": [("last.weight", model.last.weight)]})
    for _ in range(2):
        optimizer.step(lambda: _backward(model))
    assert optimizer.diagnostics.num_perturbed_steps == 1


def _backward(model):
    inputs, labels = batches()[0]
    loss = cross_entropy(model(inputs), labels)
    loss.backward()
    return loss
