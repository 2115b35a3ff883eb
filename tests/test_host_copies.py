"""The values at w in host memory: the same steps, begun in time, and of no effect on a CPU.

A CPU's parameters stand in for a GPU's where the test says that they are not on the host; on a GPU see ``test_gpu.py``.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import flatmin
from doors import everything, through_closure, through_context, through_two_steps
from flatmin.optim import visit
from flatmin.optim.host_copies import HostCopies
from problems import batches, tiny_network

DOORS = [through_closure, through_two_steps, through_context]


def trained(door, num_steps=4, **options):
    torch.manual_seed(0)
    model = tiny_network(dtype=torch.float64)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.2, model=model, **options)
    for inputs, labels in batches(torch.float64)[:num_steps]:
        door(optimizer, lambda x=inputs, y=labels: cross_entropy(model(x), y))
    return model, optimizer


@pytest.fixture
def device(monkeypatch):
    """Parameters count as being on a device; returns the copies that were made."""
    made = []

    class Noted(HostCopies):
        def __init__(self, params):
            super().__init__(params)
            made.append(self)

    monkeypatch.setattr(visit, "is_on_host", lambda param: False)
    monkeypatch.setattr(visit, "HostCopies", Noted)
    return made


@pytest.mark.parametrize("door", DOORS)
def test_the_steps_are_the_same(device, door):
    model, optimizer = trained(door, save_to="host", diagnostics=True)
    other, other_optimizer = trained(door, diagnostics=True)
    assert len(device) == 4
    assert_close(everything(model), everything(other), rtol=1e-12, atol=1e-13)
    assert_close(optimizer.diagnostics.as_dict(), other_optimizer.diagnostics.as_dict(), rtol=1e-9, atol=1e-12)


def test_several_ascents_are_the_same_with_copies_on_the_host(device):
    model, _ = trained(through_closure, save_to="host", ascent_steps=3)
    other, _ = trained(through_closure, ascent_steps=3)
    assert len(device) == 4 * 3
    assert_close(everything(model), everything(other), rtol=1e-12, atol=1e-13)


def test_the_weights_come_back_exactly(device):
    model, optimizer = trained(through_closure, save_to="host")
    before = [param.clone() for param in model.parameters()]
    inputs, labels = batches(torch.float64)[0]
    cross_entropy(model(inputs), labels).backward()
    optimizer.first_step(zero_grad=True)
    assert not all(map(torch.equal, before, model.parameters()))
    optimizer.restore()
    assert all(map(torch.equal, before, model.parameters()))


def test_the_copies_are_on_their_way_before_the_first_pass(device):
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, save_to="host")
    seen = []

    def closure():
        seen.append(len(device))
        optimizer.zero_grad()
        inputs, labels = batches()[0]
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert seen == [1, 1]
    assert optimizer._passes.visit.host is None, "nothing is kept between steps"


def test_weights_that_the_closure_writes_are_copied_again(device):
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.0), model=model, save_to="host")
    inputs, labels = batches()[0]
    weight, calls = model.last.weight, []

    def closure():
        if not calls:
            with torch.no_grad():
                weight.fill_(0.5)
        calls.append(1)
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert len(device) == 2
    assert torch.equal(weight, torch.full_like(weight, 0.5))


def test_steps_that_are_not_perturbed_copy_nothing(device):
    trained(through_closure, save_to="host", when=lambda number: number == 2)
    assert len(device) == 1


def test_it_has_no_effect_on_a_cpu(monkeypatch):
    monkeypatch.setattr(visit, "HostCopies", None)
    model, _ = trained(through_closure, save_to="host")
    assert_close(everything(model), everything(trained(through_closure)[0]), rtol=0, atol=0)


def test_another_place_is_refused():
    with pytest.raises(ValueError, match="save_to must be one of device, host, got 'disk'"):
        trained(through_closure, save_to="disk")


def test_a_graph_does_not_pretend_to():
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, save_to="host")
    with pytest.warns(UserWarning, match="in host memory"):
        step = flatmin.compile_step(model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), optimizer)
    assert "host memory" in step.reason
