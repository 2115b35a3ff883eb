"""Moving parameters and putting them back."""

import pytest
import torch

from flatmin.optim.perturbation import _perturb_at_once_, _perturb_in_runs_, assign_


def _case(dtype):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in [(30, 20), (7,), ()]]
    tensors = [torch.randn(param.shape, generator=generator).to(dtype) for param in params]
    small, large = torch.tensor(0.01), torch.tensor(0.7)
    return params, tensors, [small, large, small]


@pytest.mark.parametrize("perturb_", [_perturb_in_runs_, _perturb_at_once_])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_forms_add_in_wide_precision_and_return_the_values_of_before(perturb_, dtype):
    params, tensors, scales = _case(dtype)
    before = [param.clone() for param in params]
    wide = torch.promote_types(dtype, torch.float32)
    expected = [
        (w.to(wide) + s.to(wide) * t.to(wide)).to(dtype) for w, t, s in zip(params, tensors, scales, strict=True)
    ]
    saved = perturb_(params, tensors, scales)
    ulps = {torch.float64: 4e-16, torch.float32: 4e-7}.get(dtype, 0.0)  # whether the product is rounded on its own
    torch.testing.assert_close(params, expected, rtol=0.0, atol=ulps)
    assert not torch.equal(params[0], before[0])
    assign_(params, saved)
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))


def test_adding_and_subtracting_again_would_not_be_exact():
    """The control of the exact restore: the cheaper way, which several ports take, drifts."""
    params, tensors, scales = _case(torch.float32)
    before = params[0].clone()
    _perturb_in_runs_(params, tensors, scales)
    params[0].sub_(tensors[0] * scales[0])
    assert not torch.equal(params[0], before)
