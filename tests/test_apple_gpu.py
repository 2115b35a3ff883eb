"""Apple's GPU, which has no float64 and whose random numbers torch keeps in a module of its own.

A CUDA device without values stands in for it where the test says that it has no float64.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flatmin
from doors import everything
from fake_gpu import RUN_WITHOUT_VALUES, Closure, send_
from flatmin.optim import norms
from flatmin.optim.compilable import why_not_compiled
from flatmin.optim.directions import Gradient
from flatmin.optim.generators import generators_of, set_generators
from flatmin.optim.space import Space
from optimizers import sgd
from problems import batches, tiny_network


class NoFloat64(TorchDispatchMode):
    """Refuses what the device refuses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                assert leaf.dtype != torch.float64, f"{func} makes a number of 64 bits"
        return found


@pytest.fixture
def model(monkeypatch) -> Iterator[nn.Module]:
    """The tiny network on the device, without values."""
    monkeypatch.setattr(norms, "_WITHOUT_FLOAT64", ("cuda",))
    network = tiny_network()
    with FakeTensorMode():
        send_(network)
        with NoFloat64():
            yield network


@pytest.mark.parametrize("row", RUN_WITHOUT_VALUES, ids=lambda row: row.name)
def test_a_step_needs_no_float64(row, model):
    closure = Closure(model)
    optimizer = row.build(sgd(model.parameters()), model, skip_nonfinite=False, diagnostics=True)
    for _ in range(3):
        loss = optimizer.step(closure)
    assert loss.is_cuda
    assert closure.num_calls >= 3


@pytest.mark.parametrize("method", [flatmin.MSAM, flatmin.AdaptiveMSAM])
def test_a_step_of_one_pass_needs_no_float64(method, model):
    optimizer, closure = method(sgd(model.parameters()), skip_nonfinite=False), Closure(model)
    for _ in range(3):
        optimizer.step(closure)
    assert closure.num_calls == 3


@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.GSAM, flatmin.MSAM])
def test_a_loss_scale_is_taken_out_without_float64(method, monkeypatch):
    """With values, on a CPU: the factor is a power of two, so that nothing is lost."""

    def trained() -> Tensor:
        torch.manual_seed(0)
        network, scaler = tiny_network(), torch.amp.GradScaler("cpu")
        optimizer = method(sgd(network.parameters()))
        for inputs, labels in batches()[:3]:

            def closure(x=inputs, y=labels) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(network(x), y)
                scaler.scale(loss).backward()
                return loss

            optimizer.step(closure, scaler=scaler)
            scaler.update()
        return everything(network)

    expected = trained()
    monkeypatch.setattr(norms, "_WITHOUT_FLOAT64", ("cpu",))
    assert torch.equal(trained(), expected)


def test_a_step_is_not_compiled(model):
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    assert "no float64" in why_not_compiled(optimizer, model, num_micro_batches=1)


class Widened(Gradient):
    """The gradient by way of float64."""

    def __call__(self, space: Space) -> list[Tensor]:
        return [tensor.double().float() for tensor in super().__call__(space)]


def test_float64_is_noticed(model):
    """A control."""
    optimizer = flatmin.SharpnessAware(sgd(model.parameters()), direction=Widened(), model=model, skip_nonfinite=False)
    with pytest.raises(AssertionError, match="64 bits"):
        optimizer.step(Closure(model))


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_the_random_numbers_of_any_accelerator_are_repeated(kind, monkeypatch):
    states = {f"{kind}:0": 3, f"{kind}:1": 5}
    module = SimpleNamespace(
        get_rng_state=lambda device: states[str(device)],
        set_rng_state=lambda state, device: states.update({str(device): state}),
    )
    modules = {kind: module}
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device(kind))
    monkeypatch.setattr(torch, "get_device_module", modules.__getitem__)
    with FakeTensorMode():
        params = [torch.empty(2, device=f"{kind}:{index}") for index in (0, 1, 1)]
    found = generators_of([*params, torch.empty(2)])
    assert {str(device) for device in found} == {"cpu", f"{kind}:0", f"{kind}:1"}
    states.update({f"{kind}:0": 7, f"{kind}:1": 8})
    torch.rand(1)
    set_generators(found)
    assert states == {f"{kind}:0": 3, f"{kind}:1": 5}
    assert torch.equal(torch.get_rng_state(), found[torch.device("cpu")])
    module.is_initialized = lambda: False
    assert set(generators_of(params)) == {torch.device("cpu")}
