"""Models that grow, have empty parameters, another layout in memory, or buffers that come late."""

import copy

import pytest
import torch
from torch import nn

import flatmin
from doors import everything, through_closure, train
from optimizers import sgd
from problems import batches, tiny_network


@pytest.mark.parametrize("method", [flatmin.SAM, flatmin.ASAM])
def test_a_head_added_later_joins(method):
    model = tiny_network()
    optimizer = method(sgd(model.parameters()), model=model)
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


def test_channels_last_weights_take_the_steps_of_contiguous_ones():
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
