"""A compiled model is measured as it is, since compiled functions cannot be differentiated twice."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flatmin.sharpness import hessian_eigenvalues, hessian_trace, worst_case


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(inputs).tanh())


def _network() -> _Network:
    torch.manual_seed(0)
    return _Network()


def _outer(model: _Network) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def _in_place(model: _Network) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def _inner(model: _Network) -> nn.Module:
    model.first.compile(backend="aot_eager")
    return model


COMPILED = [_outer, _in_place, _inner]


def _data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 5, generator=generator), torch.arange(6) % 3) for _ in range(2)]


@pytest.mark.parametrize("compile_", COMPILED)
def test_measures_are_those_of_the_model_itself(compile_) -> None:
    model = compile_(_network())
    grad_fn = model(_data()[0][0]).grad_fn
    for measure in (hessian_trace, worst_case):
        assert measure(model, cross_entropy, _data()).value == measure(_network(), cross_entropy, _data()).value
    assert model(_data()[0][0]).grad_fn.name() == grad_fn.name()  # and compiled again


@pytest.mark.parametrize("compile_", COMPILED)
def test_parameters_are_chosen_by_the_names_of_the_model_itself(compile_) -> None:
    chosen = hessian_eigenvalues(compile_(_network()), cross_entropy, _data(), params="last")
    assert chosen.eigenvalues == hessian_eigenvalues(_network(), cross_entropy, _data(), params="last").eigenvalues


@pytest.mark.parametrize("compile_", COMPILED)
def test_a_compiled_model_cannot_be_differentiated_twice(compile_) -> None:
    """A control: what the measures would meet."""
    model = compile_(_network())
    weights = [param for param in model.parameters() if param.dim() == 2]

    def twice() -> None:
        loss = cross_entropy(model(_data()[0][0]), _data()[0][1])
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        torch.autograd.grad(sum(gradient.sum() for gradient in gradients), weights)

    with pytest.raises(RuntimeError, match="double backward|donated buffers"):
        twice()
