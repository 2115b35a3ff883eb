"""SAM with the term that it drops, against closed forms, differences and SAM itself."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import flatmin
from flatmin.optim import SecondOrderSAM
from problems import batches, quadratic, tiny_network

RHO = 0.3


class Bowl(nn.Module):
    """``1/2 w^T A w``, whose gradient is ``A w`` and whose Hessian is A."""

    def __init__(self) -> None:
        super().__init__()
        factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.curvature = factor @ factor.T
        self.weights = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64))

    def forward(self) -> Tensor:
        return quadratic(self.curvature, self.weights)


def stepped(model: nn.Module, loss: Callable[[], Tensor], rho: float = RHO, num_steps: int = 1) -> SecondOrderSAM:
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = SecondOrderSAM(base, rho, model=model)
    for _ in range(num_steps):
        optimizer.step(loss)
    return optimizer


def loss_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(inputs), labels)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_gradient_of_a_quadratic_is_that_of_its_closed_form() -> None:
    model = Bowl()
    w, a = model.weights.detach().clone(), model.curvature
    g = a @ w
    unit = g / g.norm()
    first_order = a @ (w + RHO * unit)
    term = RHO / g.norm() * a @ (first_order - (first_order @ unit) * unit)
    stepped(model, model)
    torch.testing.assert_close(model.weights.detach(), w - 0.1 * (first_order + term), rtol=1e-12, atol=1e-12)
    assert term.norm() > 0.01 * first_order.norm()  # the control: without the term the test above fails


def test_gradient_of_a_network_is_the_slope_of_the_loss_at_the_worst_point() -> None:
    """Along any direction, by central differences of ``L(w + eps(w))`` in float64, with batch norm and dropout."""
    inputs, labels = batches(torch.float64)[0]
    model = tiny_network(dtype=torch.float64)
    params = list(model.parameters())
    start = [param.detach().clone() for param in params]

    def loss() -> Tensor:
        torch.manual_seed(5)
        return nn.functional.cross_entropy(model(inputs), labels)

    def loss_at_worst(shift: float, direction: list[Tensor]) -> float:
        place = [w + shift * d for w, d in zip(start, direction, strict=True)]

        def put(values: list[Tensor]) -> None:
            with torch.no_grad():
                for param, value in zip(params, values, strict=True):
                    param.copy_(value)

        put(place)
        grads = torch.autograd.grad(loss(), params, allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(place, grads, strict=True)]
        length = flat(grads).norm()
        put([w + RHO * g / length for w, g in zip(place, grads, strict=True)])
        value = loss().item()
        put(start)
        return value

    generator = torch.Generator().manual_seed(3)
    directions = [[torch.randn(w.shape, generator=generator, dtype=w.dtype) / 10 for w in start] for _ in range(3)]
    slopes = [(loss_at_worst(1e-5, d) - loss_at_worst(-1e-5, d)) / 2e-5 for d in directions]
    control = deepcopy(model)
    stepped(model, loss)
    found = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    for direction, slope in zip(directions, slopes, strict=True):
        assert float(flat(direction) @ flat(found)) == pytest.approx(slope, rel=1e-6)

    sam = flatmin.SAM(torch.optim.SGD(control.parameters(), lr=0.1), RHO, model=control)

    def closure() -> Tensor:
        sam.zero_grad()
        torch.manual_seed(5)
        value = nn.functional.cross_entropy(control(inputs), labels)
        value.backward()
        return value

    sam.step(closure)
    first_order = flat(torch.zeros_like(p) if p.grad is None else p.grad for p in control.parameters())
    assert abs(float(flat(directions[0]) @ first_order) - slopes[0]) > 1e-3 * abs(slopes[0])


def test_radius_zero_is_the_base_optimizer_with_the_same_buffers_and_random_numbers() -> None:
    def trained(wraps: bool) -> tuple[dict[str, Tensor], Tensor]:
        model = tiny_network()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = SecondOrderSAM(base, 0.0, model=model) if wraps else base
        for inputs, labels in batches():
            base.zero_grad()
            if wraps:
                optimizer.step(partial(loss_of, model, inputs, labels))
            else:
                loss_of(model, inputs, labels).backward()
                base.step()
        return model.state_dict(), torch.rand(3)

    (ours, drawn), (plain, plainly_drawn) = trained(True), trained(False)
    assert torch.equal(drawn, plainly_drawn)
    assert all(torch.equal(ours[name], value) for name, value in plain.items())


def test_parameter_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    model = tiny_network()
    stepped(model, partial(loss_of, model, *batches()[0]))
    assert model.unused.grad is None


def test_second_pass_sees_the_first_ones_random_numbers_and_leaves_no_trace() -> None:
    model = tiny_network()
    inputs, labels = batches()[0]
    drawn = []
    model.dropout.register_forward_hook(lambda _, args, out: drawn.append((out == 0) & (args[0] != 0)))
    stepped(model, lambda: nn.functional.cross_entropy(model(inputs), labels))
    assert torch.equal(*drawn)
    assert model.num_calls == 1
    assert model.norm.num_batches_tracked == 1


def test_tied_weights_and_modules_with_two_names_are_moved_once_and_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.inner = model.again = nn.Linear(3, 3).double()
    model.tied = nn.Linear(3, 3).double()
    model.tied.weight = model.inner.weight
    inputs = torch.randn(4, 3, dtype=torch.float64)
    params = list(model.parameters())
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(flat((model.inner.weight, model.again.weight, model.tied.weight)))
        return model.tied(model.inner(inputs).tanh()).square().mean()

    stepped(model, loss, num_steps=2)
    assert list(model.parameters()) == params
    for place in seen:
        first, second, third = place.chunk(3)
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    assert not torch.equal(seen[0], seen[1])


def test_diagnostics_tell_rise_and_cosine() -> None:
    model = Bowl()
    w, a = model.weights.detach().clone(), model.curvature
    optimizer = stepped(model, model)
    g = a @ w
    eps = RHO * g / g.norm()
    diagnostics = optimizer.diagnostics
    assert diagnostics.loss_rise.item() == pytest.approx(float(quadratic(a, w + eps) - quadratic(a, w)))
    first_order, followed = a @ (w + eps), (w - model.weights.detach()) / 0.1
    cosine = torch.nn.functional.cosine_similarity(first_order, followed, dim=0)
    assert diagnostics.cosine.item() == pytest.approx(cosine.item())
    assert 0.5 < diagnostics.cosine < 1 - 1e-6
    assert (diagnostics.num_steps, diagnostics.num_perturbed_steps) == (1, 1)


def test_zero_gradient_moves_nothing_and_a_loss_that_is_not_finite_skips_the_step() -> None:
    model = Bowl()
    with torch.no_grad():
        model.weights.zero_()
    optimizer = stepped(model, model)
    assert torch.equal(model.weights.detach(), torch.zeros(4, dtype=torch.float64))
    assert optimizer.diagnostics.num_skipped_steps == 0
    optimizer.step(lambda: model.weights.sum() * float("nan"))
    assert model.weights.isfinite().all()
    assert optimizer.diagnostics.num_skipped_steps == 1


def test_resumed_run_is_the_uninterrupted_one() -> None:
    model = Bowl()
    base = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    optimizer = SecondOrderSAM(base, RHO, model=model)
    optimizer.step(model)
    copy = Bowl()
    copy.load_state_dict(model.state_dict())
    again = SecondOrderSAM(torch.optim.SGD(copy.parameters(), lr=0.01, momentum=0.9), 0.1, model=copy)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for each, network in ((optimizer, model), (again, copy)):
        each.step(network)
    assert torch.equal(model.weights, copy.weights)
    assert again.param_groups[0]["rho"] == RHO


def test_parameters_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="base must have parameters of model alone, got others"):
        SecondOrderSAM(torch.optim.SGD(Bowl().parameters(), lr=0.1), model=Bowl())
    with pytest.raises(ValueError, match="model must have no recurrent layer"):
        SecondOrderSAM(torch.optim.SGD((model := nn.LSTM(2, 2)).parameters(), lr=0.1), model=model)
    with pytest.raises(ValueError, match=r"rho must be >= 0 and finite, got -1"):
        SecondOrderSAM(torch.optim.SGD((model := Bowl()).parameters(), lr=0.1), -1.0, model=model)


def test_what_is_no_closure_of_this_method_is_refused_by_name() -> None:
    model = Bowl()
    optimizer = stepped(model, model, num_steps=0)

    def runs_backward() -> Tensor:
        loss = model()
        loss.backward()
        return loss

    for wrong in (None, [], [model], model()):
        with pytest.raises(TypeError, match="closure must be one function that returns the loss, got"):
            optimizer.step(wrong)
    with pytest.raises(TypeError, match="closure must return the loss as a scalar tensor, got NoneType"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match=r"closure must return the loss as a scalar tensor, got shape \(4,\)"):
        optimizer.step(lambda: model.weights * 2)
    for unrelated in (lambda: model().detach(), lambda: torch.ones((), requires_grad=True) * 2):
        with pytest.raises(RuntimeError, match="closure must return a loss that depends on a parameter"):
            optimizer.step(unrelated)
    with pytest.raises(RuntimeError, match="closure must run no backward pass"):
        optimizer.step(runs_backward)
    assert torch.equal(model.weights, Bowl().weights)
    with pytest.raises(RuntimeError, match="none before step\\(\\) may leave gradients"):
        optimizer.step(model)  # the gradient of runs_backward is there still
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(model)
    assert not torch.equal(model.weights, Bowl().weights)


def test_sparse_gradients_are_refused_by_name() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(RuntimeError, match="gradients must be dense, got a sparse one"):
        stepped(model, lambda: model(torch.tensor([1, 2])).square().sum())


def test_parameters_frozen_since_the_last_step_stay() -> None:
    model = tiny_network()
    optimizer = stepped(model, partial(loss_of, model, *batches()[0]))
    model.first.requires_grad_(False)
    before = flat(model.first.parameters()), flat(model.last.parameters())
    optimizer.step(partial(loss_of, model, *batches()[1]))
    assert torch.equal(flat(model.first.parameters()), before[0])
    assert not torch.equal(flat(model.last.parameters()), before[1])
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="depends on a parameter which requires a gradient"):
        optimizer.step(partial(loss_of, model, *batches()[1]))


def test_a_skipped_step_does_not_count_for_the_schedule() -> None:
    model = Bowl()
    optimizer = SecondOrderSAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO, model=model)
    optimizer.step(lambda: model() * float("nan"))
    optimizer.step(model)
    assert optimizer.param_groups[0]["num_steps"] == 1
    assert (optimizer.diagnostics.num_steps, optimizer.diagnostics.num_skipped_steps) == (2, 1)


def test_random_numbers_go_on_after_the_first_pass_where_the_second_raises() -> None:
    model = tiny_network()
    optimizer = stepped(model, partial(loss_of, model, *batches()[0]), num_steps=0)
    states: list[Tensor] = []

    def failing() -> Tensor:
        if states:
            raise KeyError
        loss = loss_of(model, *batches()[0])
        states.append(torch.get_rng_state())
        return loss

    with pytest.raises(KeyError):
        optimizer.step(failing)
    assert torch.equal(torch.get_rng_state(), states[0])


def test_complex_parameters_are_pairs_of_reals() -> None:
    class Pair(nn.Module):
        def __init__(self, is_complex: bool) -> None:
            super().__init__()
            numbers = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
            self.weights = nn.Parameter(numbers if is_complex else torch.view_as_real(numbers))

        def forward(self) -> Tensor:
            w = torch.view_as_real(self.weights) if self.weights.is_complex() else self.weights
            return quadratic(torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64), w.sum(dim=0)) + (w**4).sum()

    pairs, reals = Pair(True), Pair(False)
    cosines = [stepped(model, model).diagnostics.cosine for model in (pairs, reals)]
    torch.testing.assert_close(torch.view_as_real(pairs.weights), reals.weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*cosines)
    assert 0.5 < cosines[0] < 1 - 1e-6


def test_torch_distributed_checkpoint_resumes_bit_for_bit() -> None:
    def built() -> tuple[Bowl, SecondOrderSAM]:
        model = Bowl()
        return model, SecondOrderSAM(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), RHO, model=model)

    (model, optimizer), (resumed, again) = built(), built()
    optimizer.step(model)
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, again, deepcopy(get_optimizer_state_dict(model, optimizer)))
    optimizer.step(model)
    again.step(resumed)
    assert torch.equal(model.weights, resumed.weights)


def test_a_maximised_objective_is_its_minimised_opposite() -> None:
    up, down = Bowl(), Bowl()
    for model, sign, maximize in ((up, 1.0, True), (down, -1.0, False)):
        base = torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize)
        optimizer = SecondOrderSAM(base, RHO, model=model)
        for _ in range(3):
            optimizer.step(lambda model=model, sign=sign: sign * model())
    torch.testing.assert_close(up.weights, down.weights, rtol=1e-12, atol=1e-12)
    assert not torch.equal(up.weights, Bowl().weights)


def test_only_what_param_groups_chooses_is_perturbed() -> None:
    """A group left out of it behaves like one of radius 0 that does not count in the norm."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    model = nn.ParameterDict({name: torch.tensor([value], dtype=torch.float64) for name, value in (("x", 1), ("y", 3))})

    def loss() -> Tensor:
        return quadratic(a, torch.cat([model["x"], model["y"]]))

    base = torch.optim.SGD(flatmin.param_groups(model, lambda name, _: name == "x"), lr=0.1)
    optimizer = SecondOrderSAM(base, RHO, model=model)
    optimizer.step(loss)
    w = torch.tensor([1.0, 3.0], dtype=torch.float64)
    there = a @ (w + RHO * torch.tensor([1.0, 0.0], dtype=torch.float64))  # the gradient's first entry is positive
    torch.testing.assert_close(flat(model.values()), w - 0.1 * there, rtol=1e-12, atol=1e-12)  # a unit of one entry
    assert optimizer.diagnostics.num_perturbed_steps == 1
