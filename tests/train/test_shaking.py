"""Random gates: one mix forward, another backward, drawn for each image; and the true gradient where it is asked."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatmin.train.models import ModelOptions, ShakeDrop, ShakeShake, build_model, repeated_gates, true_gradient

SHAPE = (5, 3, 4, 2)


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def mixed_by_hand(a: np.ndarray, b: np.ndarray, gates: np.ndarray) -> np.ndarray:
    mix = np.empty_like(a)
    for image in range(len(a)):
        for place in np.ndindex(*a.shape[1:]):
            mix[image][place] = gates[image] * a[image][place] + (1.0 - gates[image]) * b[image][place]
    return mix


@pytest.mark.parametrize("is_true", [False, True])
def test_shake_shake_mixes_by_one_gate_forward_and_by_another_backward(is_true: bool) -> None:
    a, b, upstream = (double(*SHAPE, seed=seed) for seed in range(3))
    layer, leaves = ShakeShake(), [a.clone().requires_grad_(), b.clone().requires_grad_()]
    torch.manual_seed(7)
    with true_gradient(layer, is_true):
        mix = layer(*leaves)
    mix.backward(upstream)

    torch.manual_seed(7)
    alpha, beta = torch.rand(2, 5, dtype=torch.float64).numpy()
    assert len(set(alpha)) == len(set(beta)) == 5  # one per image, and two sets
    np.testing.assert_allclose(mix.detach().numpy(), mixed_by_hand(a.numpy(), b.numpy(), alpha), rtol=1e-14)
    factor = (alpha if is_true else beta)[:, None, None, None]
    np.testing.assert_allclose(leaves[0].grad.numpy(), factor * upstream.numpy(), rtol=1e-14)
    np.testing.assert_allclose(leaves[1].grad.numpy(), (1 - factor) * upstream.numpy(), rtol=1e-14)


@pytest.mark.parametrize("is_true", [False, True])
def test_shake_drop_scales_by_equation_6(is_true: bool) -> None:
    x, upstream = double(40, 3, 2, 2), double(40, 3, 2, 2, seed=1)
    layer, leaf = ShakeDrop(0.7), x.clone().requires_grad_()
    torch.manual_seed(7)
    with true_gradient(layer, is_true):
        shaken = layer(leaf)
    shaken.backward(upstream)

    torch.manual_seed(7)
    mask = (torch.rand(40, dtype=torch.float64) < 0.7).double().numpy()
    uniform, beta = torch.rand(2, 40, dtype=torch.float64).numpy()
    assert 0 < mask.sum() < 40
    forward, backward = np.empty(40), np.empty(40)
    for image in range(40):
        alpha = -1.0 + 2.0 * uniform[image]
        forward[image] = mask[image] + alpha - mask[image] * alpha
        backward[image] = mask[image] + beta[image] - mask[image] * beta[image]
    factors = {"forward": forward, "backward": forward if is_true else backward}
    np.testing.assert_allclose(shaken.detach().numpy(), factors["forward"][:, None, None, None] * x.numpy(), rtol=1e-13)
    expected = factors["backward"][:, None, None, None] * upstream.numpy()
    np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=1e-13)


def test_evaluation_takes_the_expectation_of_training() -> None:
    ones = torch.ones(100_000, 1, 1, 1)
    torch.manual_seed(0)
    for layer, inputs in ((ShakeShake(), (ones, 3 * ones)), (ShakeDrop(0.7), (ones,))):
        trained = layer(*inputs)
        evaluated = layer.eval()(*inputs)
        assert trained.std() > 0.1
        assert (evaluated == evaluated[0]).all()
        assert trained.mean().item() == pytest.approx(evaluated[0].item(), abs=5 * trained.std().item() / 100_000**0.5)


def loss_of(network: nn.Module, images: Tensor) -> Callable[..., Tensor]:
    names = [name for name, _ in network.named_parameters()]

    def loss(*params: Tensor) -> Tensor:
        torch.manual_seed(3)
        logits = torch.func.functional_call(network, dict(zip(names, params, strict=True)), images)
        return logits.square().sum()

    return loss


@pytest.mark.parametrize("name", ["shake-shake-8-2x2d", "pyramidnet-8-2-shakedrop"])
def test_the_true_gradient_is_that_of_finite_differences_and_the_other_is_not(name: str) -> None:
    torch.manual_seed(0)
    network = build_model(name, 2, 1).double()
    images = double(3, 1, 8, 8)
    params = [param.detach().clone().requires_grad_() for param in network.parameters()]
    loss = loss_of(network, images)

    def slope_and_gradient() -> tuple[float, float]:
        direction = [double(*param.shape, seed=9) for param in params]
        h = 1e-6
        with torch.no_grad():
            ends = [loss(*(p + sign * h * d for p, d in zip(params, direction, strict=True))) for sign in (1, -1)]
        grads = torch.autograd.grad(loss(*params), params)
        gradient = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
        return ((ends[0] - ends[1]) / (2 * h)).item(), float(gradient)

    with true_gradient(network):
        slope, gradient = slope_and_gradient()
        assert gradient == pytest.approx(slope, rel=1e-4)
    slope_again, shaken_gradient = slope_and_gradient()
    assert slope_again == slope  # the forward pass is the same
    assert abs(shaken_gradient - slope) > 0.01 * abs(slope)


def test_the_context_ends_with_its_block_and_nests() -> None:
    network = nn.Sequential(ShakeDrop(0.5), ShakeDrop(0.5))
    with true_gradient(network):
        with pytest.raises(KeyError), true_gradient(network):
            raise KeyError
        assert all(layer.has_true_gradient for layer in network)
    assert not any(layer.has_true_gradient for layer in network)
    with true_gradient(network, enabled=False):
        assert not any(layer.has_true_gradient for layer in network)


def test_repeated_gates_are_those_of_the_last_call_and_masks_are_new() -> None:
    ones = torch.ones(200, 1, 1, 1)
    mix, drop = ShakeShake(), ShakeDrop(0.5)
    with repeated_gates(mix):
        assert mix(ones, -ones).std() > 0.1  # there is no last call yet
    first, dropped = mix(ones, -ones), drop(ones)
    with repeated_gates(mix), repeated_gates(drop):
        assert torch.equal(mix(ones, -ones), first)
        again = drop(ones)
    shaken_twice = (dropped != 1) & (again != 1)
    assert torch.equal(dropped[shaken_twice], again[shaken_twice])
    assert not torch.equal(dropped == 1, again == 1)
    assert not torch.equal(mix(ones, -ones), first)


def test_second_derivatives_go_through_the_gates() -> None:
    layer, x = ShakeDrop(0.0), double(3, 1, 1, 1).requires_grad_()
    torch.manual_seed(0)
    (first,) = torch.autograd.grad(layer(x.square()).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, first.detach() / x.detach())  # (beta x^2)'' = (beta x^2)' / x


def test_gates_in_bfloat16_are_drawn_in_float32() -> None:
    torch.manual_seed(0)
    narrow = ShakeShake()(torch.ones(4, 1, 1, 1, dtype=torch.bfloat16), torch.zeros(4, 1, 1, 1, dtype=torch.bfloat16))
    torch.manual_seed(0)
    wide = ShakeShake()(torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, atol=0.0, rtol=2**-8)


def test_keep_probability_falls_linearly_to_a_half() -> None:
    network = build_model("pyramidnet-14-6-shakedrop", 2, 1, ModelOptions())
    drops = [module.keep_probability for module in network.modules() if isinstance(module, ShakeDrop)]
    assert drops == pytest.approx([1 - k / 6 * 0.5 for k in range(1, 7)])
