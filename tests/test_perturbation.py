"""Moving parameters and putting them back."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flatmin
from fake_gpu import fake_gpu
from flatmin.optim import perturbation_foreach
from flatmin.optim.perturbation import perturb_
from flatmin.optim.perturbation_foreach import _suits_sgd, add_scaled_foreach_
from flatmin.optim.rounding import Rounder
from flatmin.optim.saved import Saved

pytestmark = pytest.mark.usefixtures("arithmetic")


def _on_an_accelerator(params, tensors, scales):
    saved = Saved()
    saved.add_together(params)
    add_scaled_foreach_(params, tensors, scales, Rounder(None))
    return saved


def _by_sgd(params, tensors, scales):
    """As on a GPU, by the fused kernel that torch has for a CPU as well."""
    if not _sgd_moves(params[0].dtype):
        pytest.skip("this torch's fused SGD for a CPU leaves weights of 16 bits where they are; 2.11's does")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturbation_foreach, "_suits_sgd", lambda param, tensor, rounder: param.dtype != torch.float64)
        return _on_an_accelerator(params, tensors, scales)


def _sgd_moves(dtype):
    weights, rate = torch.zeros(64, dtype=dtype), torch.ones(())
    options = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "is_first_step": False}
    torch._fused_sgd_([weights], [torch.ones_like(weights)], [], lr=rate, maximize=True, **options)
    return bool(weights.all())


def _case(dtype):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in [(30, 20), (7,), ()]]
    tensors = [torch.randn(param.shape, generator=generator).to(dtype) for param in params]
    small, large = torch.tensor(0.01), torch.tensor(0.7)
    return params, tensors, [small, large, small]


@pytest.mark.parametrize("form", [perturb_, _on_an_accelerator, _by_sgd])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_all_forms_add_in_wide_precision_and_return_the_values_of_before(form, dtype):
    params, tensors, scales = _case(dtype)
    before = [param.clone() for param in params]
    wide = torch.promote_types(dtype, torch.float32)
    expected = [
        (w.to(wide) + s.to(wide) * t.to(wide)).to(dtype) for w, t, s in zip(params, tensors, scales, strict=True)
    ]
    versions = [param._version for param in params]
    saved = form(params, tensors, scales)
    assert all(param._version > version for param, version in zip(params, versions, strict=True))
    ulps = {torch.float64: 4e-16, torch.float32: 4e-7}.get(dtype, 0.0)  # whether the product is rounded on its own
    torch.testing.assert_close(params, expected, rtol=0.0, atol=ulps)
    assert not torch.equal(params[0], before[0])
    saved.restore_()
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))


def test_a_gpu_copies_the_weights_and_moves_them_in_two_kernels():
    """Five numbers are read or written for each weight, and the copy is all the memory that is taken."""

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aten" and func.overloadpacket is not torch.ops.aten.empty_like:
                names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    names = []
    with fake_gpu(), Noted():
        params, tensors = ([torch.empty(shape, device="cuda") for shape in [(30, 20), (7,)]] for _ in range(2))
        scale = torch.empty((), device="cuda")
        names.clear()
        perturb_(params, tensors, [scale, scale], seed=0)
    assert names == ["_foreach_copy_", "_fused_sgd_"]


@pytest.mark.parametrize(
    ("is_taken", "device", "dtype", "shape", "rounder"),
    [
        (True, "cuda", torch.float32, (2, 3), Rounder(0)),
        (True, "cuda", torch.bfloat16, (2, 3), Rounder(None)),
        (False, "cuda", torch.bfloat16, (2, 3), Rounder(0)),  # it rounds to the nearest
        (False, "cuda", torch.float64, (2, 3), Rounder(None)),  # its learning rate is float32
        (False, "cpu", torch.float32, (2, 3), Rounder(None)),
    ],
)
def test_the_kernel_of_sgd_is_asked_where_it_suits(is_taken, device, dtype, shape, rounder):
    with fake_gpu():
        param, tensor = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        assert _suits_sgd(param, tensor, rounder) == is_taken
        assert not _suits_sgd(param, torch.empty(3, 2, dtype=dtype, device=device).t(), rounder)
        assert not _suits_sgd(param, tensor.double().half(), rounder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sums_are_formed_of_a_bounded_part_of_the_weights_at_a_time(dtype, monkeypatch):
    found, sizes = [], []
    whole = perturbation_foreach._add_together_

    def noting(params, *others):
        sizes.append([param.numel() for param in params])
        whole(params, *others)

    monkeypatch.setattr(perturbation_foreach, "_add_together_", noting)
    for limit in (perturbation_foreach._TOGETHER, 50):
        monkeypatch.setattr(perturbation_foreach, "_TOGETHER", limit)
        params, tensors = ([torch.full((n,), 1.0 + n, dtype=dtype) for n in (30, 20, 1, 90, 4)] for _ in range(2))
        _on_an_accelerator(params, tensors, [torch.tensor(0.3)] * 5)
        found.append(params)
    assert sizes == [[30, 20, 1, 90, 4], [30, 20], [1], [90], [4]]
    torch.testing.assert_close(*found, rtol=0.0, atol=0.0)


def test_adding_and_subtracting_again_would_not_be_exact():
    """The control of the exact restore: the cheaper way, which several ports take, drifts."""
    params, tensors, scales = _case(torch.float32)
    before = params[0].clone()
    perturb_(params, tensors, scales)
    params[0].sub_(tensors[0] * scales[0])
    assert not torch.equal(params[0], before)


def test_an_addition_that_fails_half_way_leaves_the_parameters_as_they_were():
    params, tensors, scales = _case(torch.float32)
    params[0] = torch.cat([params[0]] * 10)  # too large to wait for the batch of small ones
    tensors[0] = torch.cat([tensors[0]] * 10)
    before = [param.clone() for param in params]
    tensors[1] = torch.ones(8)  # does not fit its parameter
    with pytest.raises(RuntimeError, match="size"):
        perturb_(params, tensors, scales)
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))


NUM_LARGE = (3 << 19) + 5


def _large_case(channels_last=False):
    shape = (8, 8, 1, NUM_LARGE // 64 + 1) if channels_last else (NUM_LARGE,)
    weights = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    if channels_last:
        weights.data = weights.data.to(memory_format=torch.channels_last)
    weights.grad = torch.randn_like(weights)
    return weights, flatmin.SAM(torch.optim.SGD([weights], lr=0.1), rho=50.0)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_of_a_large_gradient_that_no_one_holds_keeps_the_weights(channels_last):
    weights, optimizer = _large_case(channels_last)
    before, address = weights.detach().clone(), weights.grad.data_ptr()
    expected = before + 50.0 * weights.grad / weights.grad.norm()
    optimizer.first_step(zero_grad=True)
    saved = optimizer._passes.visit.saved
    values = saved.values + [value for kept in saved.kept for value in kept.values()]
    assert [value.data_ptr() for value in values] == [address]
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-4, atol=1e-5)
    optimizer.restore()
    assert torch.equal(weights, before)


@pytest.mark.parametrize("holder", ["the tensor", "a view", "an alias", "the parameter", "a bucket", "a diagnosis"])
def test_a_gradient_that_someone_holds_is_not_written_into(holder):
    weights, optimizer = _large_case()
    if holder == "a bucket":
        bucket = torch.randn(NUM_LARGE + 7)
        weights.grad = bucket[:NUM_LARGE]
        held = bucket
    else:
        holders = {"the tensor": weights.grad, "a view": weights.grad.view(-1), "an alias": weights.grad.detach()}
        held = holders.get(holder)
        del holders
    if holder == "a diagnosis":
        optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1), diagnostics=True)
    gradient = weights.grad.clone()
    before = weights.detach().clone()
    optimizer.first_step(zero_grad=holder != "the parameter")
    if holder == "a diagnosis":
        held = optimizer._passes.progress.clean[weights]
    if holder == "the parameter":
        held = weights.grad
    assert torch.equal(held[:NUM_LARGE], gradient)
    assert not torch.equal(weights, before)
    optimizer.restore()
    assert torch.equal(weights, before)


def test_a_direction_that_keeps_its_tensors_finds_them_unchanged():
    class Kept:
        def __init__(self):
            self.kept = None

        needs_clean_gradient, depends_on_scale = True, False

        def __call__(self, space):
            if self.kept is None:
                self.kept = [grad.clone() for grad in space.grads]
            return list(self.kept)

    weights, _ = _large_case()
    direction = Kept()
    gradient = weights.grad.clone()
    optimizer = flatmin.SharpnessAware(torch.optim.SGD([weights], lr=0.1), 50.0, direction=direction)
    optimizer.first_step(zero_grad=True)
    assert torch.equal(direction.kept[0], gradient)
