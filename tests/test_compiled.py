"""Compiled models: no new compilation from step to step, and the numbers of the model as it is."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import RecompileError
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import flatmin
from doors import everything, through_closure, through_context, through_two_steps
from problems import batches

compiled = torch.compile(backend="aot_eager")  # traces and differentiates as the default one, without a C compiler
in_one_graph = torch.compile(backend="aot_eager", fullgraph=True)


class _Sequential(nn.Sequential):
    """Not torch's own class, which torch 2.11 does not compile in place."""

    def forward(self, inputs):
        for module in self:
            inputs = module(inputs)
        return inputs


def _network():
    torch.manual_seed(0)
    return _Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.4), nn.Linear(12, 3))


def _outer(model):
    outer = in_one_graph(model)
    return outer, lambda x, y: cross_entropy(outer(x), y)


def _inner(model):
    model[0], model[4] = in_one_graph(model[0]), in_one_graph(model[4])
    return model, lambda x, y: cross_entropy(model(x), y)


def _in_place(model):
    model.compile(backend="aot_eager")
    return model, lambda x, y: cross_entropy(model(x), y)


def _loss(model):
    return model, compiled(lambda x, y: cross_entropy(model(x), y))


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at inputs
@pytest.mark.parametrize("door", [through_closure, through_two_steps, through_context])
@pytest.mark.parametrize("compile_", [_outer, _inner, _in_place, _loss])
def test_nothing_is_compiled_after_the_first_step(compile_, door):
    model, plain = _network(), _network()
    called, loss = compile_(model)
    base, plain_base = (torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9) for each in (model, plain))
    optimizer, other = flatmin.SAM(base, 0.2, model=called), flatmin.SAM(plain_base, 0.2, model=plain)
    for step in range(5):
        inputs, labels = batches()[step]
        torch.manual_seed(step)
        with torch._dynamo.config.patch(error_on_recompile=step > 0 or compile_ is not _inner):
            door(optimizer, lambda x=inputs, y=labels: loss(x, y))
        torch.manual_seed(step)
        door(other, lambda x=inputs, y=labels: cross_entropy(plain(x), y))
        if step == 0:
            after_first = dict(counters["stats"])
    assert after_first["unique_graphs"] >= 1
    assert dict(counters["stats"]) == after_first
    assert_close(everything(model), everything(plain), rtol=1e-5, atol=1e-6)


def test_a_new_compilation_would_be_seen():
    """The control: an input of another dtype."""
    outer, _ = _outer(_network())
    outer(batches()[0][0])
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(RecompileError):
        outer(batches()[0][0].double())
