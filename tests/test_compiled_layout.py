"""Where tensors lie in memory: the user's stay where they are, the graph's have the layout that is fast."""

import pytest
import torch
from torch import nn

import flatmin
from compiled_runs import assert_same, loss_fn, network, trained
from optimizers import Row, sgd
from problems import batches


def test_weights_and_state_stay_in_their_storage():
    model, optimizer, step, _ = trained(Row("SAM", flatmin.SAM), compiled=True, num_steps=3)
    tensors = [*model.state_dict(keep_vars=True).values(), *[s["momentum_buffer"] for s in optimizer.state.values()]]
    before = [(tensor, tensor.data_ptr()) for tensor in tensors]
    values = [tensor.detach().clone() for tensor in tensors]
    step(batches(torch.float64)[0])
    after = [*model.state_dict(keep_vars=True).values(), *[s["momentum_buffer"] for s in optimizer.state.values()]]
    assert all(new is old and new.data_ptr() == address for new, (old, address) in zip(after, before, strict=True))
    assert not all(torch.equal(new, old) for new, old in zip(after, values, strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_a_slice_of_a_larger_batch_is_compiled():
    """A compiler relies on the strides of the example."""
    laid_out = []

    def relying_on_strides(graph, inputs):
        laid_out.extend(tensor.stride() for tensor in inputs)

        def compiled(*given):
            assert [tensor.stride() for tensor in given] == laid_out
            return graph(*given)

        return compiled

    model = network()
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    step = flatmin.compile_step(model, loss_fn, optimizer, backend=relying_on_strides)
    for inputs, labels in batches(torch.float64)[:3]:
        step((torch.cat([inputs, inputs], dim=1)[:, :5], labels))
    assert step.reason is None
    assert (10, 1) in laid_out


class Flattened(nn.Module):
    """A convolutional network whose head needs contiguous outputs, or does not."""

    def __init__(self, flatten):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.dropout, self.head, self.flatten = nn.Dropout(0.3), nn.Linear(6 * 9, 3), flatten

    def forward(self, inputs):
        images = inputs.repeat(1, 10).view(-1, 2, 5, 5)
        return self.head(self.flatten(self.dropout(torch.relu(self.norm(self.convolution(images))))))


FLATTEN = {"any layout": lambda x: x.flatten(1), "contiguous alone": lambda x: x.view(len(x), -1)}


@pytest.mark.parametrize("flatten", FLATTEN)
def test_convolutions_have_their_channels_last_inside_the_graph(flatten):
    """Where the model can have it so; with the same numbers and the weights in their own layout either way."""

    def make():
        torch.manual_seed(0)
        model = Flattened(FLATTEN[flatten]).double()
        model.convolution.bias.requires_grad_(False)  # its gradient is zero but for rounding
        return model

    row, layouts = Row("SAM", flatmin.SAM), []

    def looking(graph, inputs):
        tensors = [node.meta["val"] for node in graph.graph.nodes if node.target is torch.ops.aten.convolution.default]
        layouts.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
        return graph

    compiled = trained(row, compiled=True, make=make, num_steps=8, backend=looking)
    assert compiled[2].reason is None
    assert layouts == [flatten == "any layout"] * 2
    assert all(param.is_contiguous() for param in compiled[0].parameters())
    assert_same(compiled, trained(row, compiled=False, make=make, num_steps=8))
