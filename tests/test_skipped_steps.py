"""A gradient that is not finite skips the step, and the skipped step leaves no trace."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything, through_closure
from flatmin.optim.corrections import Corrections
from flatmin.optim.diagnostics import Diagnostics
from flatmin.optim.memory import Memory
from optimizers import sgd
from problems import batches


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
    inputs, labels = batches()[0]
    optimizer = flatmin.SAM(sgd(model.parameters()))
    cross_entropy(model(inputs), labels).backward()
    model[0].weight.grad[0, 0] = float("inf")
    optimizer.first_step(zero_grad=True)
    cross_entropy(model(inputs), labels).backward()
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


def _backward(loss):
    loss.backward()
    return loss


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
