"""A CUDA device without values, for a machine without one, and a watch on what such a device makes the host wait for.

Torch's fake tensors know a shape, a type and a device, and refuse what needs a value on the host and operators on
several devices. They have no backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import register_op_impl
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from optimizers import ALWAYS, METHODS, POLICIES, SAMON, SIMPLE

_aten = torch.ops.aten
COPIES = {_aten._to_copy, _aten.copy_}
SENDS_NUMBERS = {_aten.where, _aten.index_put, _aten.index_put_}  # 0-dim ones from the host, by a copy of their own
READS_NUMBERS = {_aten.masked_fill.Tensor, _aten.masked_fill_.Tensor}  # the last argument, wherever it is

READS_THE_GRADIENT = ("AESAM", "AESAM-always")  # whose rule needs its norm on the host
DRAWS_ON_THE_HOST = ("RST", "RST-1")  # a fake generator has no numbers
OWN_SIGNATURE = ("compat-SAM", "compat-SAM-adaptive")  # the same engine, which takes no skip_nonfinite
RUN_WITHOUT_VALUES = [
    row
    for row in (*SIMPLE, *METHODS, *ALWAYS, *POLICIES, SAMON)
    if row.name not in READS_THE_GRADIENT + DRAWS_ON_THE_HOST + OWN_SIGNATURE
]


@register_op_impl(lambda func: func.overloadpacket is _aten._fused_sgd_)
def fused_sgd_(mode, func, *args, **kwargs):
    """Stands for the kernel, which fake tensors know for Adam and not for SGD."""
    assert {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)} == {"cuda"}


class NothingWaits(TorchDispatchMode):
    """Refuses what copies between host and device while the host waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        sources, targets = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), found)
        )
        assert not ("cuda" in sources and "cpu" in targets), f"{func} brings a tensor to the host"
        assert not (func in READS_NUMBERS and args[2].is_cuda), f"{func} brings a number to the host"
        if "cpu" in sources and "cuda" in targets:
            assert func.overloadpacket not in SENDS_NUMBERS, f"{func} waits for a number to come to the device"
            if func.overloadpacket in COPIES:
                non_blocking = (kwargs or {}).get("non_blocking", args[2:3] == (True,))
                assert non_blocking, f"{func} waits for a tensor to come to the device"
        return found


class RealOnHost(TorchDispatchMode):
    """Gives the host's own tensors values again, inside of fake tensors for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        is_for_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if is_for_cuda or any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


class Closure:
    """Leaves gradients and returns a loss, as a backward pass would."""

    def __init__(self, model: nn.Module) -> None:
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.num_calls = 0

    def __call__(self) -> Tensor:
        self.num_calls += 1
        for param in self.params:
            param.grad = torch.empty_like(param)
        return torch.empty((), device=self.params[0].device)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Tensors on "cuda" are fake inside the block; those on the host are real."""
    with FakeTensorMode(allow_non_fake_inputs=True), RealOnHost():
        yield


def send_(network: nn.Module) -> nn.Module:
    """Put a network on the fake device."""
    for module in network.modules():
        for name, param in module._parameters.items():
            if param is not None:
                tensor = torch.empty(param.shape, dtype=param.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(tensor, param.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return network
