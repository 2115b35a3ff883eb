"""Errors and diagnostics."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
from doors import through_closure, through_two_steps, train
from optimizers import TABLE, built, closure_on, sgd
from problems import batches, tiny_network

pytestmark = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)


def test_values_outside_the_domain_are_refused_by_name(row):
    for options, message in row.invalid:
        model = tiny_network()
        base = sgd(model.parameters())
        arguments = {"rho": 0.1, **options}
        with pytest.raises(ValueError, match=message):
            row.method(base, model=model, **{**row.options, **arguments})
        row.build(base, model)  # the refusal has left no mark on the base


def test_a_step_without_a_second_pass_is_an_error(row):
    model, optimizer = built(row)
    closure = closure_on(optimizer, model)
    closure()
    with pytest.raises(RuntimeError, match="without a second pass"):
        optimizer.step()


def test_a_closure_without_backward_is_an_error(row):
    model, optimizer = built(row)
    inputs, labels = batches()[0]
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="no parameter has a new gradient"):
        optimizer.step(lambda: cross_entropy(model(inputs), labels))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("zero_grad", [True, False])
def test_a_missing_or_stale_backward_pass_is_an_error(row, zero_grad):
    model, optimizer = built(row)
    closure = closure_on(optimizer, model)
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
    model, optimizer = built(row)
    closure = closure_on(optimizer, model)
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
    model, optimizer = built(row)
    with pytest.raises(TypeError, match="LBFGS"):
        row.build(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(TypeError, match="must not be sharpness-aware itself"):
        row.build(optimizer, model)


def test_diagnostics_tell_what_the_step_saw(row):
    if "compat" in row.name:
        pytest.skip("the older constructor has no such argument")
    model = tiny_network()
    optimizer = row.build(sgd(model.parameters()), model, diagnostics=True)
    seen, points = [], []
    closure = closure_on(optimizer, model)

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
