"""Norms and dot products over many tensors, against one long vector in float64."""

import math

import pytest
import torch

from flatmin.optim.norms import each_norm, joint_dot, joint_norm

pytestmark = pytest.mark.usefixtures("arithmetic")

ORDERS = [1.0, 1.5, 2.0, 3.0, math.inf]


def _tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(100, 50), (), (7,), (64, 32, 3, 3), (4096,), (4097,), (8, 16, 31, 33)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_joint_norm_equals_the_norm_of_one_vector(p, dtype):
    tensors = _tensors(dtype)
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    tensors[6] = tensors[6].transpose(1, 2)
    norm = joint_norm(tensors, p)
    expected = torch.linalg.vector_norm(torch.cat([x.flatten().double() for x in tensors]), p)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-12 if dtype == torch.float64 else 3e-6)


def test_a_long_float32_vector_keeps_six_digits():
    long = torch.randn(36_000_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    expected = long.double().norm().item()
    assert joint_norm([long]).item() == pytest.approx(expected, rel=1e-6)
    assert long.norm().item() != pytest.approx(expected, rel=1e-4)  # the control: torch's own sum loses three of them


def test_half_precision_does_not_overflow():
    assert joint_norm([torch.full((1000,), 3e4, dtype=torch.float16)]).item() == pytest.approx(
        3e4 * 1000**0.5, rel=1e-6
    )


def test_mixed_dtypes_make_one_norm():
    mixed = [torch.ones(4, dtype=torch.bfloat16), torch.ones(5), torch.ones(16, dtype=torch.float16)]
    assert joint_norm(mixed).item() == 5.0


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_each_norm_is_that_of_one_tensor_whatever_the_others_are(p):
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    tensors = [tensor for kind in kinds for tensor in _tensors(kind)]
    tensors.append(torch.full((10,), 300.0, dtype=torch.float16))  # whose squares are beyond float16
    norms = each_norm(tensors, p)
    for tensor, norm in zip(tensors, norms, strict=True):
        is_double = tensor.dtype == torch.float64
        expected = torch.linalg.vector_norm(tensor.double(), p).item()
        assert norm.dtype == (torch.float64 if is_double else torch.float32)
        assert norm.item() == pytest.approx(expected, rel=1e-12 if is_double else 1e-5)


def test_joint_dot_equals_the_dot_product_of_one_vector():
    left = _tensors(torch.float32)
    right = [x.sin() + 0.3 for x in left]
    expected = sum((x.double() * y.double()).sum() for x, y in zip(left, right, strict=True))
    assert joint_dot(left, right).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, torch.inf])
def test_empty_tensors_have_no_length(p):
    assert joint_norm([torch.empty(0), torch.empty(0, 3)], p).item() == 0.0
    assert joint_norm([torch.empty(0, 3), torch.full((1,), 2.0)], p).item() == 2.0


@pytest.mark.parametrize("num_tensors", [64, 65, 200])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_each_of_many_short_tensors_counts(num_tensors, p):
    """Lengths 1, 2, 3, … and the largest entry in the last one."""
    tensors = [torch.full((index % 7 + 1,), 1.0 + index, dtype=torch.float64) for index in range(num_tensors)]
    expected = torch.linalg.vector_norm(torch.cat(tensors), p).item()
    for index in (0, num_tensors // 2, num_tensors - 1):
        without = torch.linalg.vector_norm(torch.cat(tensors[:index] + tensors[index + 1 :]), p).item()
        assert joint_norm(tensors[:index] + tensors[index + 1 :], p).item() == pytest.approx(without, rel=1e-12)
    assert joint_norm(tensors, p).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_a_norm_is_finite_or_the_norm_zero(dtype):
    for power in range(-50, -30):
        norm = joint_norm([torch.full((3,), 10.0**power, dtype=dtype)])
        assert norm == 0 or (1 / norm).isfinite()
