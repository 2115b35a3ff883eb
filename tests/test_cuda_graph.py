"""A captured step is its function; here with a recorder in place of CUDA graphs, on a GPU see ``test_gpu.py``."""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import flatmin
from fake_gpu import send_
from flatmin.optim.cuda_graph import CapturedStep, can_be_captured, copy_as_laid_out
from flatmin.optim.directions import Gradient
from flatmin.optim.draws import Unfit
from flatmin.optim.functional_model import FunctionalModel, LossModule, Survey
from flatmin.optim.host_side import OnePassSide, TwoPassSide
from flatmin.optim.one_pass import OnePass
from flatmin.optim.step_graph import StepGraph


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
        except RuntimeError:  # as CUDA does: the end of a capture that was broken is an error of its own
            raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
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


def test_the_warning_names_what_broke_the_capture_and_not_its_end(recorder):
    def function(weight, batch):
        if recorder.kernels is not None:
            raise RuntimeError("this operator waits for the device")
        return recorder(weight, batch)

    step, weight, batches = CapturedStep(function, num_resident=1), torch.zeros(3), list(_batches("whole"))
    for batch in batches[:3]:
        step(weight, batch)
    with pytest.warns(UserWarning, match="no CUDA graph holds them, this operator waits for the device$"):
        step(weight, batches[3])


def test_the_calls_before_the_capture_share_a_stream(recorder, monkeypatch):
    made = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(1) or stream)
    step = CapturedStep(recorder, num_resident=1)
    for batch in _batches("whole"):
        step(torch.zeros(3), batch)
    assert len(made) == 1


def test_autograd_knows_that_a_replay_has_written_the_weights(recorder):
    def function(weight, batch):
        def work():
            weight.data.sub_(batch.mean())  # as a kernel does, of which autograd knows nothing

        if recorder.kernels is None:
            work()
        else:
            recorder.kernels.append(work)
        return [batch.sum()]

    weight, step = torch.zeros(3), CapturedStep(function, num_resident=1)
    versions = []
    for batch in _batches("whole"):
        step(weight, batch)
        versions.append(weight._version)
    assert versions[:3] == [0, 0, 0]
    assert len(set(versions[3:])) == len(versions[3:])
    assert 0 not in versions[3:]


@pytest.mark.parametrize("layout", ["whole", "slice", "spread", "none"])
def test_a_copy_has_the_strides_of_the_original(layout):
    for batch in (next(_batches(layout)), next(_batches(layout)).t()):
        copy = copy_as_laid_out(batch)
        assert copy.stride() == batch.stride()
        assert torch.equal(copy, batch)
        if batch.numel():
            batch[0, 0] += 1.0
            assert not torch.equal(copy, batch)


@pytest.fixture
def _fake_gpu(monkeypatch):
    """Tensors without values have no backward pass, generators or addresses."""
    monkeypatch.setattr(FunctionalModel, "evaluate", _stands_for_the_passes)
    monkeypatch.setattr(FunctionalModel, "look", lambda model, given: model.survey)
    monkeypatch.setattr(StepGraph, "_refuse_constants", lambda step, graph: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    with FakeTensorMode():
        yield


def _stands_for_the_passes(step, given, weights):
    return torch.stack([weight.sum() for weight in weights]).sum(), [2.0 * weight for weight in weights], {}


def _graph_of_step(method, base, state):
    """The traced step of a network on a GPU, without values, and its inputs."""
    model = send_(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    optimizer = method(base(model.parameters()), model=model)
    for param in model.parameters():
        for name in state:
            is_count = name == "step"
            optimizer.state[param][name] = torch.empty((), device=state[name]) if is_count else torch.empty_like(param)
    losses = LossModule(model, lambda model, batch: model(batch).sum())
    is_one_pass = isinstance(optimizer, OnePass)
    side = OnePassSide(optimizer, losses) if is_one_pass else TwoPassSide(optimizer, losses, True, 1)
    step = StepGraph(side, losses, 1)
    traced = []
    side.function.model.survey = Survey([], [True] * 4, [])
    with pytest.raises(_Traced):
        step.compile(torch.empty(16, 5, device="cuda"), lambda graph, inputs: _stop(traced, graph, inputs))
    return traced


class _Traced(Exception):
    pass


def _stop(traced, *found):
    traced.extend(found)
    raise _Traced


class _ByHost(Gradient):
    """The gradient, by way of the host."""

    def __call__(self, space):
        return [tensor.cpu().to(tensor.device) for tensor in super().__call__(space)]


ADAM = {"step": "cuda", "exp_avg": "cuda", "exp_avg_sq": "cuda"}
BASES = {
    "sgd": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"momentum_buffer": "cuda"}),
    "adam": (partial(torch.optim.Adam, capturable=True), ADAM),
    "adamw": (partial(torch.optim.AdamW, fused=True), ADAM),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "method",
    [
        flatmin.SAM,
        partial(flatmin.SAM, p=math.inf, ascent_steps=2),
        partial(flatmin.ASAM, diagnostics=True),
        flatmin.GSAM,
        flatmin.GNP,
        flatmin.ZSharp,
        flatmin.MSAM,
        flatmin.AdaptiveMSAM,
    ],
)
@pytest.mark.usefixtures("_fake_gpu")
def test_a_traced_step_stays_on_the_gpu(method, base):
    assert can_be_captured(*_graph_of_step(method, *BASES[base]))


@pytest.mark.usefixtures("_fake_gpu")
def test_a_traced_step_that_leaves_the_gpu_is_not_captured():
    """The control."""
    by_host = partial(flatmin.SharpnessAware, direction=_ByHost())
    assert not can_be_captured(*_graph_of_step(by_host, *BASES["sgd"]))


@pytest.mark.usefixtures("_fake_gpu")
def test_a_base_that_counts_on_the_host_is_not_traced():
    with pytest.raises(Unfit, match="build it with capturable=True"):
        _graph_of_step(flatmin.SAM, torch.optim.Adam, {**ADAM, "step": "cpu"})
