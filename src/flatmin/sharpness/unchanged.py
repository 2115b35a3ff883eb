"""Look at a model and leave it as it was, bit for bit: weights, buffers, gradients, training modes, random numbers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from flatmin.arguments import check_choice

BatchStatistics = Literal["batch", "running"]


@contextmanager
def unchanged(model: nn.Module, batch_norm: BatchStatistics) -> Iterator[list[Tensor]]:
    """Put ``model`` in evaluation mode and yield a copy of its weights; on leaving undo whatever happened to it.

    Autograd's count of writes into weights and gradients is undone too.

    Args:
        model: Any module.
        batch_norm: ``"running"`` leaves the batch norm layers in evaluation mode too, ``"batch"`` has them normalise
            with the statistics of each batch, as in training.

    Raises:
        ValueError: ``batch_norm`` is neither.
    """
    check_choice("batch_norm", batch_norm, get_args(BatchStatistics))
    params = list(model.parameters())
    weights = [param.detach().clone() for param in params]
    grads = [None if param.grad is None else (param.grad, param.grad.clone()) for param in params]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    written = [*params, *(grad[0] for grad in grads if grad is not None)]
    counted = tuple(tensor for tensor in written if not tensor.is_inference())
    # The values come back, so nobody who goes by autograd's count of writes is to think that there are others: a
    # one-pass optimizer whose weights rest at w + eps, or one that tells a new gradient from a used one.
    versions = tuple(tensor._version for tensor in counted)
    try:
        with same_random_numbers(params):
            model.eval()
            for layer in batch_norm_layers(model):
                layer.train(batch_norm == "batch")
            yield weights
    finally:
        with torch.no_grad():
            for param, weight, grad in zip(params, weights, grads, strict=True):
                param.copy_(weight)
                param.grad = None if grad is None else grad[0].copy_(grad[1])
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is None or value is None:
                    continue
                if 0 not in buffer.stride() or not torch.equal(buffer, value):  # nothing writes into an expanded one
                    buffer.copy_(value)
        torch._C._autograd._unsafe_set_version_counter(counted, versions)
        for module, training in modes:
            module.training = training


@contextmanager
def same_random_numbers(params: Sequence[Tensor]) -> Iterator[None]:
    """Put torch's random state, of the CPU and of every device that holds a parameter, back on leaving the block."""
    devices: dict[str, set[int]] = {}
    for param in params:
        if param.device.type != "cpu":
            devices.setdefault(param.device.type, set()).add(param.device.index)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        yield


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """The batch norm layers of every kind, in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32, or wider where ``dtype`` is."""
    return torch.promote_types(dtype, torch.float32)
