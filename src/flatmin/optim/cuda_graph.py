"""Capture a compiled step as a CUDA graph: one launch instead of one for each kernel."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

_NUM_WARM_UPS = 3  # calls on a side stream before the capture, in which libraries choose their kernels


class CapturedStep:
    """A function of tensors with static shapes, captured on its fourth call and replayed from then on.

    Inputs that keep their memory (weights, buffers, state) are read and written where they are; others (the batch,
    random numbers) are copied to where the graph reads them. Where an input that was written has moved, as after
    loading a checkpoint, the graph is captured again. A function that cannot be captured is called as it is, with a
    warning.

    Args:
        function: Writes into its inputs only; every tensor that it touches is on the GPU.
        num_resident: How many inputs, from the first on, keep their memory.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], num_resident: int) -> None:
        self._function = function
        self._num_resident = num_resident
        self._num_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: list[int] = []
        self._copied: list[Tensor] = []
        self._outputs: Sequence[Tensor] = ()
        self._is_refused = False
        self._side_stream: torch.cuda.Stream | None = None

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Call the function, by replaying it where it was captured."""
        if self._is_refused:
            return self._function(*inputs)
        self._num_calls += 1
        if self._num_calls <= _NUM_WARM_UPS:
            return self._warm_up(inputs)
        resident, passing = inputs[: self._num_resident], inputs[self._num_resident :]
        addresses = [tensor.data_ptr() for tensor in resident]
        if self._graph is None or addresses != self._addresses:
            try:
                self._capture(resident, passing)
            except RuntimeError as error:
                self._refuse(error)
                return self._function(*inputs)
            self._addresses = addresses
        for target, value in zip(self._copied, passing, strict=True):
            _memory(target).copy_(_memory(value), non_blocking=True)
        assert self._graph is not None
        self._graph.replay()
        increment_version(resident)  # which compiled code does for what it writes, and a replay does not run
        return [output.clone() for output in self._outputs]  # the next replay writes into them

    def _warm_up(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._side_stream is None:  # one for all calls: the allocator keeps freed memory for its stream alone
            self._side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream, current = self._side_stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = self._function(*inputs)
        current.wait_stream(stream)
        for output in outputs:
            output.record_stream(current)
        return outputs

    def _capture(self, resident: Sequence[Tensor], passing: Sequence[Tensor]) -> None:
        self._copied = [copy_as_laid_out(tensor) for tensor in passing]
        self._graph = torch.cuda.CUDAGraph()
        # It records what would run, and runs nothing. Meanwhile other threads may pin memory, as data loaders do.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = self._function(*resident, *self._copied)

    def _refuse(self, error: RuntimeError) -> None:
        self._is_refused, self._graph, self._copied, self._outputs = True, None, [], ()
        cause = error.__context__ or error  # ending a capture fails because of what broke it before
        first_line = str(cause).strip().partition("\n")[0]
        warnings.warn(
            f"compile_step launches its kernels one by one: no CUDA graph holds them, {first_line}", stacklevel=5
        )


def can_be_captured(graph: GraphModule, inputs: Sequence[Tensor]) -> bool:
    """Whether all that a traced function touches is on one GPU: a graph holds no copy from or to pageable memory."""
    values = [leaf for node in graph.graph.nodes for leaf in tree_leaves(node.meta.get("val"))]
    tensors = [*inputs, *(value for value in values if isinstance(value, Tensor))]
    return inputs[0].is_cuda and all(tensor.device == inputs[0].device for tensor in tensors)


def copy_as_laid_out(tensor: Tensor) -> Tensor:
    """A copy with the same strides, for which a graph is compiled; ``clone`` closes the gaps of a slice."""
    return _memory(tensor).clone().as_strided(tensor.shape, tensor.stride())


def _memory(tensor: Tensor) -> Tensor:
    """The memory from the first entry of a tensor to its last one, as a vector."""
    if tensor.numel() == 0:
        return tensor.new_empty(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))
