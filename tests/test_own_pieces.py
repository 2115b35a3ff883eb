"""Pieces of one's own: what they are given, and that what they return is followed."""

import pytest
import torch
from torch import nn

import flatmin
from doors import through_closure, through_context, through_two_steps
from flatmin.optim import Combine, SharpnessAware


class _Mean(Combine):
    """g* = (3 g + g_p) / 4, by a closed form that no shipped method has."""

    needs_clean_gradient = True

    def __call__(self, space, clean, perturbed):
        return [(3 * g + g_p) / 4 for g, g_p in zip(clean, perturbed, strict=True)]


@pytest.mark.parametrize("zero_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_combination_gets_both_gradients_and_its_result_is_followed(zero_grad, dtype):
    start = torch.tensor([3.0, -4.0], dtype=dtype)
    weights = nn.Parameter(start.clone())
    optimizer = SharpnessAware(torch.optim.SGD([weights], lr=1.0), 0.5, combine=_Mean())

    def backward():
        weights.grad = (
            None if zero_grad else torch.zeros_like(weights) if weights.grad is None else weights.grad.zero_()
        )
        (weights * weights.conj()).real.sum().div(2).backward()  # the gradient is w itself

    backward()
    optimizer.first_step(zero_grad=zero_grad)
    backward()
    optimizer.second_step()
    there = start * (1 + 0.5 / 5)
    torch.testing.assert_close(weights.detach(), start - (3 * start + there) / 4)


@pytest.mark.parametrize("door", [through_closure, through_two_steps, through_context])
@pytest.mark.parametrize("method", ["mean", "StableSAM"])
def test_a_gradient_at_w_alone_counts_in_a_combination(method, door):
    """An expert to which w sends something and w + eps nothing has g and no g_p, which is a g_p of zero."""
    start = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)]
    params = [nn.Parameter(value.clone()) for value in start]
    base = torch.optim.SGD(params, lr=1.0)
    optimizer = SharpnessAware(base, 0.5, combine=_Mean()) if method == "mean" else flatmin.StableSAM(base, 0.5)

    def loss():
        expert = 2 * params[1].sum() if torch.equal(params[1].detach(), start[1]) else 0.0
        return params[0].square().sum() / 2 + expert

    door(optimizer, loss)
    g = torch.tensor([3.0, 4.0, 2.0], dtype=torch.float64)
    g_p = torch.cat([start[0] * (1 + 0.5 / g.norm()), torch.zeros(1, dtype=torch.float64)])
    followed = (3 * g + g_p) / 4 if method == "mean" else g.norm() / g_p.norm() * g_p
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.cat(start) - followed)


def test_a_direction_of_ones_own_is_followed():
    class Uphill:
        needs_clean_gradient, depends_on_scale = True, False

        def __call__(self, space):
            return [torch.ones_like(grad) for grad in space.grads]

    weights = nn.Parameter(torch.zeros(4))
    optimizer = SharpnessAware(torch.optim.SGD([weights], lr=0.0), 2.0, direction=Uphill())
    (weights * torch.arange(4.0)).sum().backward()
    with optimizer.perturbed():
        assert weights.tolist() == [1.0] * 4
        weights.sum().backward()
