"""A captured step is its function; here with a recorder in place of CUDA graphs, on a GPU see ``test_gpu.py``."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from flatmin.optim.cuda_graph import CapturedStep, copy_as_laid_out


class Recorder:
    """Notes the work of a function while a graph is captured, without doing it, and repeats it in a replay."""

    def __init__(self):
        self.kernels = None
        self.num_captures = 0
        self.error = None

    def __call__(self, weight, batch):
        """A step as a graph would hold it: ``w <- w - mean(batch)``, which returns the sum of the batch."""
        out = torch.full((), torch.nan)

        def work():
            weight.sub_(batch.mean())
            out.copy_(batch.sum())

        if self.kernels is None:
            work()
        else:
            self.kernels.append(work)
        return [out]

    @contextmanager
    def graph(self, graph, *, capture_error_mode):
        assert capture_error_mode == "thread_local"
        if self.error is not None:
            raise self.error
        graph.kernels = self.kernels = []
        try:
            yield
        finally:
            self.kernels = None
        self.num_captures += 1


class Graph:
    def replay(self):
        for kernel in self.kernels:
            kernel()


@pytest.fixture
def recorder(monkeypatch):
    found, stream = Recorder(), SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", found.graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return found


def _batches(layout):
    for seed in range(7):
        numbers = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        yield {"whole": numbers, "slice": numbers[:, 1:3], "spread": numbers[:, :1].expand(4, 6), "none": numbers[:0]}[
            layout
        ]


@pytest.mark.parametrize("layout", ["whole", "slice", "spread"])
def test_from_the_fourth_call_on_the_same_steps_are_replayed(layout, recorder):
    weight, other = torch.zeros(3), torch.zeros(3)
    step = CapturedStep(recorder, num_resident=1)
    found = [step(weight, batch)[0] for batch in _batches(layout)]
    expected = [recorder(other, batch)[0] for batch in _batches(layout)]
    assert recorder.num_captures == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=0)  # each call's own, also after the last one
    torch.testing.assert_close(weight, other, rtol=0, atol=0)
    assert weight.abs().min() > 0


def test_weights_that_have_moved_are_captured_again(recorder):
    weight, other = torch.zeros(3), torch.zeros(3)
    step = CapturedStep(recorder, num_resident=1)
    for number, batch in enumerate(_batches("whole")):
        if number == 5:
            weight.data = weight.clone()
        step(weight, batch)
        recorder(other, batch)
    assert recorder.num_captures == 2
    torch.testing.assert_close(weight, other, rtol=0, atol=0)


def test_what_cannot_be_captured_is_called(recorder):
    weight, other = torch.zeros(3), torch.zeros(3)
    step = CapturedStep(recorder, num_resident=1)
    recorder.error = RuntimeError("operation not permitted when stream is capturing\nand more")

    def train():
        for batch in _batches("whole"):
            step(weight, batch)
            recorder(other, batch)

    with pytest.warns(UserWarning, match=r"one by one: .* is capturing$") as caught:
        train()
    assert len(caught) == 1
    torch.testing.assert_close(weight, other, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["whole", "slice", "spread", "none"])
def test_a_copy_has_the_strides_of_the_original(layout):
    for batch in (next(_batches(layout)), next(_batches(layout)).t()):
        copy = copy_as_laid_out(batch)
        assert copy.stride() == batch.stride()
        assert torch.equal(copy, batch)
        if batch.numel():
            batch[0, 0] += 1.0
            assert not torch.equal(copy, batch)
