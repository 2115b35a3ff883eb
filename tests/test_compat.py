"""Code and checkpoints written for the older ports. The loops are theirs but for the import line."""

import io

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

import flatmin
from doors import everything
from flatmin.compat import SAM
from problems import batches

LR, MOMENTUM, RHO = 0.1, 0.9, 0.05


def _model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


loss_function = nn.CrossEntropyLoss()


def _port_in_float64(adaptive=False, steps=6):
    """davda54's box, written down: eps = rho T^2 g / ||T g||, T = |w| or 1; then SGD with momentum."""
    model = _model()
    velocity = None
    for inputs, labels in batches(torch.float64)[:steps]:
        params = list(model.parameters())
        w = [param.detach().clone() for param in params]
        t = [x.abs() if adaptive else torch.ones_like(x) for x in w]
        g = torch.autograd.grad(loss_function(model(inputs), labels), params)
        norm = sum((a * b).square().sum() for a, b in zip(t, g, strict=True)).sqrt()
        with torch.no_grad():
            for param, a, b in zip(params, t, g, strict=True):
                param.add_(RHO * a * a * b / norm)
        g_p = torch.autograd.grad(loss_function(model(inputs), labels), params)
        velocity = list(g_p) if velocity is None else [MOMENTUM * v + x for v, x in zip(velocity, g_p, strict=True)]
        with torch.no_grad():
            for param, x, v in zip(params, w, velocity, strict=True):
                param.copy_(x - LR * v)
    return everything(model)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_two_step_loop_runs_unchanged(adaptive):
    model = _model()
    base_optimizer = torch.optim.SGD
    optimizer = SAM(model.parameters(), base_optimizer, rho=RHO, adaptive=adaptive, lr=LR, momentum=MOMENTUM)
    for input, output in batches(torch.float64):
        loss = loss_function(model(input), output)
        loss.backward()
        optimizer.first_step(zero_grad=True)

        loss_function(model(input), output).backward()
        optimizer.second_step(zero_grad=True)
    torch.testing.assert_close(everything(model), _port_in_float64(adaptive), rtol=1e-11, atol=1e-12)
    assert (everything(model) - _port_in_float64(not adaptive)).abs().max() > 1e-4


def test_the_closure_loop_runs_unchanged():
    """The caller runs one backward pass, the closure zeroes nothing and is called once."""
    model = _model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=MOMENTUM)
    num_calls = 0
    for input, output in batches(torch.float64):

        def closure(input=input, output=output):
            nonlocal num_calls
            num_calls += 1
            loss = loss_function(model(input), output)
            loss.backward()
            return loss

        loss = loss_function(model(input), output)
        loss.backward()
        optimizer.step(closure)
        optimizer.zero_grad()
    assert num_calls == 6
    torch.testing.assert_close(everything(model), _port_in_float64(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_closure_that_does_everything_is_called_twice(zeroes):
    model = _model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=MOMENTUM)
    num_calls = 0
    for input, output in batches(torch.float64):

        def closure(input=input, output=output):
            nonlocal num_calls
            num_calls += 1
            if zeroes:
                optimizer.zero_grad()
            loss = loss_function(model(input), output)
            loss.backward()
            return loss

        assert optimizer.step(closure) is not None
    assert num_calls == 12
    torch.testing.assert_close(everything(model), _port_in_float64(), rtol=1e-11, atol=1e-12)


def test_an_instance_around_resnet18_and_a_closure_run_unchanged():
    torch.manual_seed(0)
    model = resnet18()
    optim = torch.optim.SGD(model.parameters(), 1e-3)
    optim = SAM(model.parameters(), optim)
    before = model.fc.weight.detach().clone()

    def closure():
        optim.zero_grad()
        loss = model(torch.randn(1, 3, 64, 64)).sum()
        loss.backward()
        return loss

    loss = optim.step(closure)
    assert loss.isfinite()
    assert not torch.equal(model.fc.weight, before)
    assert optim.diagnostics.num_perturbed_steps == 1


def test_groups_bring_their_own_rho_and_adaptive():
    model = _model()
    groups = [{"params": model[0].parameters(), "rho": 0.5, "adaptive": True}, {"params": model[2].parameters()}]
    optimizer = SAM(groups, torch.optim.SGD, rho=RHO, lr=LR)
    assert [(group["rho"], group["adaptive"]) for group in optimizer.param_groups] == [(0.5, True), (RHO, False)]
    inputs, labels = batches(torch.float64)[0]
    before = [param.detach().clone() for param in model.parameters()]
    loss_function(model(inputs), labels).backward()
    g = [param.grad.clone() for param in model.parameters()]
    optimizer.first_step()
    t = [x.abs() for x in before[:2]] + [torch.ones_like(x) for x in before[2:]]
    norm = sum((a * b).square().sum() for a, b in zip(t, g, strict=True)).sqrt()
    for index, param in enumerate(model.parameters()):
        expected = before[index] + (0.5 if index < 2 else RHO) * t[index] ** 2 * g[index] / norm
        torch.testing.assert_close(param.detach(), expected, rtol=1e-12, atol=1e-14)


def test_a_scheduler_on_base_optimizer_works_without_a_warning():
    model = _model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.base_optimizer, T_max=2)
    inputs, labels = batches(torch.float64)[0]
    loss_function(model(inputs), labels).backward()
    optimizer.first_step(zero_grad=True)
    loss_function(model(inputs), labels).backward()
    optimizer.second_step(zero_grad=True)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 2)


def _checkpoint_of_the_port(model, rho, lr):
    """What davda54's state_dict() holds after a step: a copy of the weights, and the hyperparameters."""
    params = list(model.parameters())
    state = {index: {"old_p": param.detach().clone()} for index, param in enumerate(params)}
    group = {
        "rho": rho,
        "adaptive": False,
        "lr": lr,
        "momentum": MOMENTUM,
        "dampening": 0,
        "weight_decay": 0,
        "nesterov": False,
        "params": list(range(len(params))),
    }
    return {"state": state, "param_groups": [group]}


def test_a_checkpoint_of_the_port_loads_with_a_warning_about_the_momentum_it_lacks():
    model = _model()
    file = io.BytesIO()
    torch.save(_checkpoint_of_the_port(model, rho=0.2, lr=0.03), file)
    file.seek(0)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=MOMENTUM)
    with pytest.warns(UserWarning, match="no state of the base optimizer"):
        optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert not optimizer.state
    inputs, labels = batches(torch.float64)[0]
    loss_function(model(inputs), labels).backward()
    optimizer.first_step(zero_grad=True)
    loss_function(model(inputs), labels).backward()
    optimizer.second_step(zero_grad=True)
    assert optimizer.state_dict()["state"][0].keys() == {"momentum_buffer"}


def test_a_port_checkpoint_that_does_hold_state_keeps_it():
    """pytorch_optimizer saves the base's state beside the copy of the weights."""
    model = _model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=MOMENTUM)
    checkpoint = _checkpoint_of_the_port(model, RHO, LR)
    checkpoint["state"][1]["momentum_buffer"] = torch.full((8,), 2.0, dtype=torch.float64)
    optimizer.load_state_dict(checkpoint)
    assert torch.equal(optimizer.state[model[0].bias]["momentum_buffer"], torch.full((8,), 2.0, dtype=torch.float64))


def test_wrong_arguments_are_refused():
    model, other = _model(), _model()
    base = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(
        ValueError, match="params must be the parameters of base_optimizer: 4 given, 4 held, 0 in common"
    ):
        SAM(other.parameters(), base)
    with pytest.raises(TypeError, match="takes no keywords, got \\['lr'\\]"):
        SAM(model.parameters(), base, lr=0.1)
    with pytest.raises(TypeError, match="must be a class of optimizers or an instance"):
        SAM(model.parameters(), "sgd")
    with pytest.raises(TypeError, match="flatmin.compat.SAM takes a class"):
        flatmin.SAM(torch.optim.SGD)
    for method in (flatmin.SAM, flatmin.ASAM):
        with pytest.raises(TypeError, match="flatmin.compat.SAM takes a class"):
            method(model.parameters(), torch.optim.SGD, lr=LR, momentum=MOMENTUM)
