"""An accelerator measures what the CPU does, with the same random vectors."""

from typing import Any

import pytest
import torch
from known import smooth_network
from sharded_data import DATA, measure_all
from torch.utils._python_dispatch import TorchDispatchMode

from fake_gpu import fake_gpu
from flatmin.sharpness.batches import to_device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_what_the_cpu_does() -> None:
    on_cpu, on_gpu = measure_all(smooth_network(), DATA), measure_all(smooth_network().cuda(), DATA)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        # Finite differences make of the last bit of a gradient, which may differ, 1e-8 of a product.
        close = 1e-5 if one["settings"].get("hvp") == "finite_differences" else 1e-7
        assert other["value"] == pytest.approx(one["value"], rel=close)
        assert other["settings"] == one["settings"]


class Copies(TorchDispatchMode):
    """Notes of every copy between devices whether the host goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.are_async: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.are_async.append(bool(kwargs.get("non_blocking")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("start", "end", "is_async"), [("cpu", "cuda", True), ("cuda", "cpu", False)])
def test_only_the_way_to_a_gpu_is_not_waited_for(start: str, end: str, is_async: bool) -> None:
    """On the way to the host the values are there later, and nothing tells a reader when."""
    with fake_gpu(), Copies() as copies:
        moved = to_device({"inputs": torch.empty(3, device=start)}, torch.device(end))
    assert moved["inputs"].device.type == end
    assert copies.are_async == [is_async]
