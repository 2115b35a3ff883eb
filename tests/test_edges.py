"""Pieces, bases, models and options at the edges."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
import flatmin.compat
from doors import everything, through_closure, through_context, through_two_steps, train
from flatmin.optim import Combine, CosineToZero, Every, SharpnessAware, WarmUp
from flatmin.optim.corrections import Corrections
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.memory import Memory
from problems import batches, tiny_network


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def _loss(model, batch=0):
    inputs, labels = batches()[batch]
    return cross_entropy(model(inputs), labels)


class _Mean(Combine):
    """g* = (3 g + g_p) / 4, by a closed form that no shipped method has."""

    needs_clean_gradient = True

    def __call__(self, space, clean, perturbed):
        return [(3 * g + g_p) / 4 for g, g_p in zip(clean, perturbed, strict=True)]


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_combination_gets_both_gradients_and_its_result_is_followed(zero_grad, dtype):
    start = torch.tensor([3.0, -4.0], dtype=dtype)
    weights = nn.Parameter(start.clone())
    optimizer = SharpnessAware(torch.optim.SGD([weights], lr=1.0), 0.5, combine=_Mean())

    def backward():
        weights.grad = (
            None if zero_grad else torch.zeros_like(weights) if weights.grad is None else weights.grad.zero_()
        )
        (weights * weights.conj()).real.sum().div(2).backward()  # the gradient is w itself

    backward()
    optimizer.first_step(zero_grad=zero_grad)
    backward()
    optimizer.second_step()
    there = start * (1 + 0.5 / 5)
    torch.testing.assert_close(weights.detach(), start - (3 * start + there) / 4)


@pytest.mark.parametrize("door", [through_closure, through_two_steps, through_context])
@pytest.mark.parametrize("method", ["mean", "StableSAM"])
def test_a_gradient_at_w_alone_counts_in_a_combination(method, door):
    """An expert to which w sends something and w + eps nothing has g and no g_p, which is a g_p of zero."""
    start = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    params = [nn.Parameter(value.clone()) for value in start]
    base = torch.optim.SGD(params, lr=1.0)
    optimizer = SharpnessAware(base, 0.5, combine=_Mean()) if method == "mean" else flatmin.StableSAM(base, 0.5)

    def loss():
        expert = 2 * params[1].sum() if torch.equal(params[1].detach(), start[1]) else 0.0
        return params[0].square().sum() / 2 + expert

    door(optimizer, loss)
    g = torch.tensor([3.0, 4.0, 2.0], dtype=torch.float64)
    g_p = torch.cat([start[0] * (1 + 0.5 / g.norm()), torch.zeros(1, dtype=torch.float64)])
    followed = (3 * g + g_p) / 4 if method == "mean" else g.norm() / g_p.norm() * g_p
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.cat(start) - followed)


def test_diagnostics_count_a_gradient_at_w_alone_and_leave_training_as_it_is():
    """Weight decay would tell a gradient of zero, which they measure with, from none."""

    def stepped(diagnostics):
        params = [nn.Parameter(torch.tensor(value)) for value in ([3.0, 4.0], [1.0])]
        optimizer = flatmin.SAM(torch.optim.SGD(params, lr=1.0, weight_decay=0.1), 0.5, diagnostics=diagnostics)
        gates = iter([12.0, 0.0])

        def loss():
            gate = next(gates)
            return params[0].square().sum() / 2 + (gate * params[1].sum() if gate else 0.0)

        through_closure(optimizer, loss)
        return torch.cat([param.detach() for param in params]), optimizer.diagnostics

    (weights, diagnostics), (others, _) = stepped(True), stepped(False)
    assert torch.equal(weights, others)
    assert weights[2] == 1.0
    assert diagnostics.gradient_norm.item() == pytest.approx(13.0)
    assert diagnostics.cosine.item() == pytest.approx(25 / 13 / 5)


def test_a_direction_of_ones_own_is_followed():
    class Uphill:
        needs_clean_gradient, depends_on_scale = True, False

        def __call__(self, space):
            return [torch.ones_like(grad) for grad in space.grads]

    weights = nn.Parameter(torch.zeros(4))
    optimizer = SharpnessAware(torch.optim.SGD([weights], lr=0.0), 2.0, direction=Uphill())
    (weights * torch.arange(4.0)).sum().backward()
    with optimizer.perturbed():
        assert weights.tolist() == [1.0] * 4
        weights.sum().backward()


def test_skipping_can_be_turned_off():
    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), skip_nonfinite=False)
    through_closure(optimizer, lambda: (weights * float("inf")).sum())
    assert not weights.isfinite().any()
    assert optimizer.diagnostics.num_skipped_steps == 0


@pytest.mark.usefixtures("arithmetic")
@pytest.mark.parametrize(("entry", "is_taken"), [(3e38, True), (float("inf"), False), (float("nan"), False)])
def test_a_gradient_is_skipped_for_its_entries_and_not_for_its_length(entry, is_taken):
    """Four entries of 3e38 are finite numbers, their norm is none in float32."""
    weights, others = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(5000))
    optimizer = flatmin.MSAM(torch.optim.SGD([weights, others], lr=1e-30, momentum=0.9))
    (weights.sum() * entry + others.sum()).backward()
    optimizer.step()
    with optimizer.unperturbed():
        assert weights.tolist() == pytest.approx([-3e8 if is_taken else 0.0] * 4)
    assert optimizer.diagnostics.num_skipped_steps == (0 if is_taken else 1)


def test_a_non_finite_first_gradient_does_not_reach_the_running_statistics():
    """Without model= nobody restores them, so the second pass must not run at weights that are not finite."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    optimizer = flatmin.SAM(_sgd(model))
    _loss(model).backward()
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.first_step(zero_grad=True)
    _loss(model).backward()
    optimizer.second_step()
    assert everything(model).isfinite().all()
    assert optimizer.diagnostics.num_skipped_steps == 1


def test_an_overflow_beside_a_frozen_parameter_skips_the_step():
    """Whose gradient is that of a pass before: no other will come, so nobody can watch for it."""
    frozen, weights = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([frozen, weights], lr=0.1))
    (frozen.sum() + weights.sum() * float("inf")).backward()
    frozen.requires_grad_(False)
    optimizer.first_step(zero_grad=True)
    weights.sum().backward()
    optimizer.second_step()
    assert weights.tolist() == [1.0, 1.0]
    assert optimizer.diagnostics.num_skipped_steps == 1


def test_a_fused_base_that_cannot_read_the_flag_is_skipped_by_the_host():
    class Fused(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1, "fused": True})

        @torch.no_grad()
        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                param.sub_(param.grad)

    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(Fused([weights]))
    through_closure(optimizer, lambda: (weights * float("nan")).sum())
    assert weights.tolist() == [1.0, 1.0]
    assert optimizer.diagnostics.num_skipped_steps == 1


@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.MSAM])
def test_a_skipped_first_step_leaves_no_trace_in_the_momentum_of_a_fused_sgd(method):
    """Torch's own kernel returns early then, after the momentum's memory was taken as it was found."""

    def trained(factors):
        junk = [torch.full((1000,), 7.0) for _ in range(50)]
        weights = nn.Parameter(torch.ones(1000))
        base = torch.optim.SGD([weights], lr=0.1, momentum=0.9, dampening=0.5, fused=True)
        del junk  # what memory that nobody fills may hold
        optimizer = method(base)
        for factor in factors:
            optimizer.zero_grad()
            optimizer.step(lambda factor=factor: _backward((weights * factor).square().sum()))
        assert optimizer.diagnostics.num_skipped_steps == len(factors) - 2
        return weights.detach()

    assert torch.equal(trained([float("nan"), 1.0, 1.0]), trained([1.0, 1.0]))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_checkpoint_of_an_unfused_base_goes_on_in_a_fused_one(base):
    """It turns the base's groups into unfused ones, which cannot read the flag."""
    models = [tiny_network() for _ in range(2)]
    bases = [base(model.parameters(), lr=0.01, fused=fused) for model, fused in zip(models, (None, True), strict=True)]
    optimizers = [flatmin.SAM(base, model=model) for base, model in zip(bases, models, strict=True)]
    train(optimizers[0], models[0])
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for optimizer, model in zip(optimizers, models, strict=True):
        train(optimizer, model)
    assert torch.equal(everything(models[0]), everything(models[1]))


def _backward(loss):
    loss.backward()
    return loss


def _constructible_bases():
    takes_dense_closure_free = {"LBFGS", "SparseAdam", "Optimizer", "Adadelta", "Muon"}
    return [
        base
        for name, base in inspect.getmembers(torch.optim, inspect.isclass)
        if issubclass(base, torch.optim.Optimizer) and name not in takes_dense_closure_free
    ]


@pytest.mark.parametrize("base", _constructible_bases(), ids=lambda base: base.__name__)
def test_rho_zero_is_every_base_of_torch(base):
    model, plain = tiny_network(), tiny_network()
    train(flatmin.SAM(base(model.parameters(), lr=0.01), 0.0, model=model), model)
    train(base(plain.parameters(), lr=0.01), plain)
    assert torch.equal(everything(model), everything(plain))


def test_a_base_with_a_hyperparameter_of_our_name_is_refused():
    with pytest.raises(ValueError, match="no hyperparameter named rho, which are ours, got Adadelta"):
        flatmin.SAM(torch.optim.Adadelta(tiny_network().parameters()))


def test_a_base_whose_zero_grad_is_its_own_works():
    class Own(torch.optim.SGD):
        def zero_grad(self):
            for param in self.param_groups[0]["params"]:
                param.grad = None

    model, other = tiny_network(), tiny_network()
    for door in (through_closure, through_two_steps, through_context):
        train(flatmin.SAM(Own(model.parameters(), lr=0.1), model=model), model, range(3), door)
        train(flatmin.SAM(torch.optim.SGD(other.parameters(), lr=0.1), model=other), other, range(3), door)
    assert torch.equal(everything(model), everything(other))


@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.ASAM])
def test_a_head_added_later_joins(method):
    model = tiny_network()
    optimizer = method(_sgd(model), model=model)
    train(optimizer, model, range(1))
    model.head = nn.Linear(3, 3)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    before = model.head.weight.detach().clone()
    through_closure(optimizer, lambda: model.head(model(batches()[0][0])).square().sum())
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, float("inf")])
def test_an_empty_parameter_is_left_alone(p):
    weights, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0, 3))
    optimizer = flatmin.SAM(torch.optim.SGD([empty, weights], lr=0.1), p=p)
    through_closure(optimizer, lambda: weights.square().sum() + empty.sum())
    assert (weights < 1).all()


def test_a_compiled_model_and_a_copy_of_channels_last_weights_take_the_same_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2))
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 4, 4)
    for network in (model, other):
        optimizer = flatmin.SAM(torch.optim.SGD(network.parameters(), lr=0.1), 0.5, model=network)
        for _ in range(5):
            through_closure(optimizer, lambda network=network: network(images).square().mean())
    torch.testing.assert_close(everything(model), everything(other), rtol=1e-5, atol=1e-6)


def test_flattened_rnn_weights_stay_flat():
    model = nn.LSTM(4, 5)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    before = {param.untyped_storage().data_ptr() for param in model.parameters()}
    through_closure(optimizer, lambda: model(torch.randn(3, 2, 4))[0].sum())
    assert {param.untyped_storage().data_ptr() for param in model.parameters()} == before


def test_a_buffer_that_the_first_pass_creates_is_created_again_by_the_second():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("scale", None)

        def forward(self, inputs):
            if self.scale is None:
                self.scale = inputs.abs().amax()
                inputs = inputs * 2
            return (self.weight * inputs / self.scale).square().sum()

    model, plain = Lazy(), Lazy()
    inputs = torch.tensor([1.0, 2.0, 4.0])
    through_closure(flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.0, model=model), lambda: model(inputs))
    through_closure(torch.optim.SGD(plain.parameters(), lr=0.1), lambda: plain(inputs))
    assert torch.equal(everything(model), everything(plain))


def test_the_hook_leaves_the_model_with_the_optimizer():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    assert len(model._forward_pre_hooks) == 1
    del optimizer
    assert not model._forward_pre_hooks


def test_a_copy_does_not_drive_the_originals_scheduler():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    train(optimizer_copy, model_copy, range(2))
    assert optimizer.diagnostics.num_steps == 0
    assert optimizer_copy.diagnostics.num_steps == 2


def test_state_dict_hooks_run_once_on_a_copy():
    model = tiny_network()
    optimizer = copy.deepcopy(flatmin.SAM(_sgd(model), model=model))
    calls = []
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("loading"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "loading"]


def test_step_hooks_of_the_older_constructor_run_once():
    flatmin.SAM(_sgd(tiny_network()))
    model = tiny_network()
    optimizer = flatmin.compat.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    train(optimizer, model, range(2))
    assert len(calls) == 2


def test_a_radius_of_zero_does_not_count_as_perturbed():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), 0.0, model=model, diagnostics=True)
    train(optimizer, model, range(2))
    optimizer.param_groups[0]["rho"] = 0.1
    train(optimizer, model, range(2, 5))
    assert (optimizer.diagnostics.num_steps, optimizer.diagnostics.num_perturbed_steps) == (5, 3)


def test_diagnostics_of_a_plain_step_forget_the_perturbed_one():
    model = tiny_network()
    optimizer = SharpnessAware(_sgd(model), 0.1, model=model, when=Every(2), diagnostics=True)
    of_second_pass = {"loss_rise", "cosine", "perturbed_gradient_norm", "perturbation_norm"}
    for step in range(4):
        train(optimizer, model, range(step, step + 1))
        known = {name for name, value in optimizer.diagnostics.as_dict().items() if not name.startswith("num_")}
        assert known == {"loss", "gradient_norm"} | (of_second_pass if step % 2 == 0 else set())


def test_the_cosine_of_long_gradients_is_one_where_they_agree():
    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.0), diagnostics=True)
    through_closure(optimizer, lambda: 1e25 * weights.sum())  # the product of the lengths is beyond float32
    assert optimizer.diagnostics.as_dict()["cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize("is_taken", [True, False])
def test_what_follows_a_step_that_the_device_decided_on_follows_its_decision(is_taken):
    """Where the host does not know whether the base has taken its step: counts, state and what comes after it."""
    params = [nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0)]
    base = torch.optim.SGD(params, lr=0.5)
    decision = torch.tensor(is_taken)
    diagnostics, memory, corrections = Diagnostics(), Memory(base), Corrections()
    diagnostics.count(True, decision)
    assert int(diagnostics.num_skipped_steps) == (not is_taken)

    base.state[params[0]]["seen"] = torch.full((2,), 3.0)
    for param in params:
        memory.remember(param, "seen", torch.full((2,), 7.0))
    memory.commit(decision, params)
    assert [base.state[param]["seen"][0].item() for param in params] == ([7.0, 7.0] if is_taken else [3.0, 0.0])

    corrections.add(params, [torch.full((2,), 4.0), torch.full((2,), 6.0)], None, is_unscaled=True)
    with torch.no_grad():
        corrections.follow_(base.param_groups, decision, None)
    assert [param[0].item() for param in params] == ([-1.0, -1.0] if is_taken else [1.0, 2.0])


def test_diagnostics_of_a_zero_gradient_are_zero():
    weights = nn.Parameter(torch.ones(2))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), diagnostics=True)
    through_closure(optimizer, lambda: 0 * weights.sum())
    values = optimizer.diagnostics.as_dict()
    assert (values["cosine"], values["perturbation_norm"], values["gradient_norm"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": "0.1"}, TypeError, "rho must be a number, got '0.1'"),
        ({"ascent_steps": 1.5}, ValueError, "ascent_steps must be an integer >= 1, got 1.5"),
        (
            {"ascent_steps": 2, "p": 3.0},
            ValueError,
            "ascent_steps must be 1 unless p is 2 or infinity, got 2 with p = 3",
        ),
    ],
)
def test_options_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        flatmin.SAM(_sgd(tiny_network()), **arguments)


def test_a_radius_scheduled_below_zero_is_refused():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    optimizer.param_groups[0]["rho"] = -0.1
    with pytest.raises(ValueError, match=r"rho must be >= 0, got -0.1"):
        train(optimizer, model, range(1))


def test_a_group_that_was_given_to_the_base_is_refused():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), model=model)
    optimizer.base.add_param_group({"params": list(nn.Linear(3, 3).parameters())})
    with pytest.raises(ValueError, match=r"rho must be an entry of every group, .* not of its base"):
        train(optimizer, model, range(1))


def test_a_checkpoint_of_the_base_leaves_what_is_perturbed_and_the_schedule_as_they_were():
    """It has neither entry; without them all would be perturbed, and by the radius of the first warm-up step."""
    networks = tiny_network(), tiny_network()
    groups = [[{"params": list(m.norm.parameters())}, {"params": list(m.last.parameters())}] for m in networks]
    plain = torch.optim.SGD(groups[0], lr=0.2, momentum=0.9)
    groups[1][1]["perturb"] = False
    base = torch.optim.SGD(groups[1], lr=0.1, momentum=0.9)
    optimizer = flatmin.MSAM(base, rho=1.0, rho_schedule=WarmUp(4))
    with optimizer.unperturbed():
        pass
    assert optimizer.param_groups[0]["rho"] == 0.0
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert [group.get("perturb", True) for group in optimizer.param_groups] == [True, False]
    train(optimizer, networks[1], range(2))
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert optimizer.param_groups[0]["rho"] == 0.5


def test_a_checkpoint_of_an_earlier_step_takes_the_schedule_back():
    model = tiny_network()
    optimizer = flatmin.SAM(_sgd(model), 0.3, rho_schedule=WarmUp(4))
    start = copy.deepcopy(optimizer.state_dict())
    start["param_groups"][0]["rho"] = 0.8
    train(optimizer, model, range(2))
    optimizer.load_state_dict(start)
    train(optimizer, model, range(3))
    assert optimizer.param_groups[0]["rho"] == 0.4


def test_a_group_added_late_follows_the_schedule_of_the_others():
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.first.parameters(), lr=0.1), rho_schedule=CosineToZero(10))
    train(optimizer, model, range(5))
    optimizer.add_param_group({"params": list(model.last.parameters())})
    train(optimizer, model, range(1))
    first, late = optimizer.param_groups
    assert (late["num_steps"], late["rho"]) == (6, first["initial_rho"] / 2)
