"""No step reads from a CUDA device or mixes in the host's tensors, for every method; here on tensors without values.

Torch's fake tensors know a shape, a type and a device, and refuse both what needs a value on the host and operators on
several devices. So a step of the optimizer runs here as on a GPU, with a closure that leaves gradients as a backward
pass would. `pytest -m gpu` has the passes themselves, on a real device.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import flatmin
from fake_gpu import READS_THE_GRADIENT, RUN_WITHOUT_VALUES, Closure, NothingWaits, send_
from flatmin.optim.directions import Gradient
from flatmin.optim.saved import Saved
from flatmin.optim.space import Space
from optimizers import ALWAYS, POLICIES, SAMON, sgd
from problems import tiny_network

ADAM = partial(torch.optim.Adam, lr=0.1, capturable=True)
ONE_PASS = {
    "MSAM": lambda params: flatmin.MSAM(sgd(params), skip_nonfinite=False),
    "AdaptiveMSAM": lambda params: flatmin.AdaptiveMSAM(sgd(params), skip_nonfinite=False),
    "MSAM around Adam": lambda params: flatmin.MSAM(ADAM(params), skip_nonfinite=False),
}


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """The tiny network on a CUDA device, without values, while operators act on such tensors."""
    network = tiny_network()
    with FakeTensorMode():
        send_(network)
        with NothingWaits():
            yield network


@pytest.mark.parametrize("base", [sgd, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("diagnostics", [False, True], ids=["plain", "diagnostics"])
@pytest.mark.parametrize("row", RUN_WITHOUT_VALUES, ids=lambda row: row.name)
def test_a_step_with_a_closure_reads_nothing(row, diagnostics, base, model):
    closure = Closure(model)
    optimizer = row.build(base(model.parameters()), model, skip_nonfinite=False, diagnostics=diagnostics)
    for _ in range(3):
        loss = optimizer.step(closure)
    assert loss.device.type == "cuda"
    assert 3 <= closure.num_calls <= 3 * row.num_closure_calls


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("row", RUN_WITHOUT_VALUES, ids=lambda row: row.name)
def test_micro_batches_read_nothing(row, shared, model):
    closure, optimizer = Closure(model), row.build(sgd(model.parameters()), model, skip_nonfinite=False)
    for _ in range(2):
        optimizer.step([closure, closure], shared_perturbation=shared)
    assert closure.num_calls >= 4


@pytest.mark.parametrize("row", [row for row in RUN_WITHOUT_VALUES if row is not SAMON], ids=lambda row: row.name)
def test_the_two_step_loop_reads_nothing(row, model):
    closure = Closure(model)
    optimizer = row.build(sgd(model.named_parameters()), None, skip_nonfinite=False)
    for _ in range(2):
        closure()
        for _ in range(optimizer.ascent_steps):
            optimizer.first_step(zero_grad=True)
            closure()
        optimizer.second_step(zero_grad=True)
    assert closure.num_calls >= 4


@pytest.mark.parametrize("method", ONE_PASS)
def test_one_pass_methods_read_nothing(method, model):
    closure, optimizer = Closure(model), ONE_PASS[method](model.parameters())
    for _ in range(3):
        optimizer.step(closure)
    assert closure.num_calls >= 3


@pytest.mark.parametrize("form", ["closure", "two steps"])
@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.USAM, flatmin.GSAM, flatmin.MSAM])
def test_a_gradient_scaler_reads_nothing(method, form, model, monkeypatch):
    """With a base that skips on the device; USAM depends on the scale, GSAM combines two scaled gradients."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    optimizer = method(torch.optim.Adam(model.parameters(), lr=0.1, fused=True))
    scaler, closure = torch.amp.GradScaler("cuda"), Closure(model)
    scaler.scale(torch.empty((), device="cuda"))  # creates its factor
    for _ in range(2):
        if form == "closure":
            optimizer.step(closure, scaler=scaler)
        else:
            closure()
            if method is not flatmin.MSAM:
                optimizer.first_step(zero_grad=True, scaler=scaler)
                closure()
            scaler.step(optimizer)
        scaler._per_optimizer_states.clear()  # what update() does, beside a kernel that fake tensors do not know
    assert closure.num_calls == (2 if method is flatmin.MSAM else 4)
    assert optimizer.diagnostics.num_skipped_steps.is_cuda


def test_a_base_that_cannot_skip_on_the_device_is_asked_on_the_host(model):
    """A control, and what `skip_nonfinite` says of itself."""
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    with pytest.raises(DataDependentOutputException):
        optimizer.step(Closure(model))


@pytest.mark.parametrize(
    "row", [row for row in (*ALWAYS, *POLICIES) if row.name in READS_THE_GRADIENT], ids=lambda row: row.name
)
def test_a_rule_on_the_gradient_reads_its_norm(row, model):
    """A control, and what AE-SAM says of itself."""
    optimizer = row.build(sgd(model.parameters()), model, skip_nonfinite=False)
    with pytest.raises(DataDependentOutputException):
        optimizer.step(Closure(model))


class Carried(Gradient):
    """The gradient, by way of the host."""

    def __call__(self, space: Space) -> list[Tensor]:
        return [tensor.cpu().to(tensor.device) for tensor in super().__call__(space)]


class Fresh(Gradient):
    """The gradient times a number that is copied to the device."""

    def __call__(self, space: Space) -> list[Tensor]:
        return [tensor * torch.ones(1).to(tensor.device) for tensor in super().__call__(space)]


class Chosen(Gradient):
    """The positive part of the gradient, by a zero that ``where`` itself copies to the device."""

    def __call__(self, space: Space) -> list[Tensor]:
        return [torch.where(tensor > 0, tensor, torch.zeros(())) for tensor in super().__call__(space)]


class Filled(Gradient):
    """The gradient, filled with a number that ``masked_fill`` reads on the host."""

    def __call__(self, space: Space) -> list[Tensor]:
        return [tensor.masked_fill(tensor > 0, tensor.sum()) for tensor in super().__call__(space)]


@pytest.mark.parametrize(
    ("direction", "complaint"),
    [
        (Carried(), "brings a tensor"),
        (Fresh(), "a tensor to"),
        (Chosen(), "a number to"),
        (Filled(), "brings a number"),
    ],
)
def test_a_copy_between_host_and_device_is_noticed(direction, complaint, model):
    """A control."""
    base = sgd(model.parameters())
    optimizer = flatmin.SharpnessAware(base, 0.1, direction=direction, model=model, skip_nonfinite=False)
    with pytest.raises(AssertionError, match=complaint):
        optimizer.step(Closure(model))


def test_an_operator_on_several_devices_is_refused(model):
    """A control."""
    with pytest.raises(RuntimeError, match="cuda"):
        next(model.parameters()) + torch.ones(1)


def test_what_weights_in_host_memory_have_moved_by(model):
    """The diagnostics of ``save_to="host"``, whose copies are in pinned memory."""
    here = [param.detach() for param in model.parameters()]
    saved = Saved(here, [torch.empty(param.shape) for param in here])
    assert {moved.device.type for moved in saved.difference()} == {"cuda"}
