"""On a CUDA device: no step waits for it, and a whole step can be captured in a graph. Run with `pytest -m gpu`."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import flatmin
from flatmin.optim.cuda_graph import CapturedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]

METHODS = {
    "sam": flatmin.SAM,
    "sam 2 ascents": partial(flatmin.SAM, ascent_steps=2),
    "sam pinf 2 ascents": partial(flatmin.SAM, p=math.inf, ascent_steps=2),
    "sam p1": partial(flatmin.SAM, p=1.0),
    "sam p1.5": partial(flatmin.SAM, p=1.5),
    "asam": flatmin.ASAM,
    "asam diagnostics": partial(flatmin.ASAM, diagnostics=True),
}
BASES = {
    "fused adam": (partial(torch.optim.Adam, lr=1e-2, fused=True), {}),
    "fused sgd": (partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), {}),
    "foreach sgd": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), {"skip_nonfinite": False}),
}


def _network(dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3)
    return nn.Sequential(*layers).cuda()


def _batch(step=0):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 5, generator=generator).cuda(), torch.randint(0, 3, (16,), generator=generator).cuda()


@pytest.fixture
def forbid_waiting():
    """Turns every wait of the host for the device into an error, between the calls of what it gives."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["closure", "micro-batches", "two steps"])
def test_a_step_does_not_wait_for_the_device(method, base, form, forbid_waiting):
    model = _network(dropout=0.3)
    make_base, options = BASES[base]
    optimizer = METHODS[method](make_base(model.parameters()), 0.1, model=model, **options)
    inputs, labels = _batch()

    def closure():
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    def step():
        if form == "closure":
            optimizer.step(closure)
        elif form == "micro-batches":
            optimizer.step([closure, closure])
        else:
            closure()
            for _ in range(optimizer.ascent_steps):
                optimizer.first_step(zero_grad=True)
                closure()
            optimizer.second_step(zero_grad=True)

    step()  # creates the base's state
    torch.cuda.synchronize()
    forbid_waiting("error")
    for _ in range(3):
        step()
    forbid_waiting("default")
    assert optimizer.diagnostics.num_perturbed_steps == 4


def test_a_base_that_cannot_skip_on_the_device_makes_the_host_wait(forbid_waiting):
    """The control: documented, and seen by the mode that the test above relies on."""
    model = _network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.1, model=model)
    inputs, labels = _batch()

    def closure():
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    forbid_waiting("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        optimizer.step(closure)


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_step_replayed_from_a_graph_equals_the_step(method):
    """Both passes, perturbation, restore and update in one CUDA graph, which the constant storage allows."""
    model, plain = _network(), _network()
    optimizer, other = (
        METHODS[method](
            torch.optim.Adam(each.parameters(), lr=torch.tensor(1e-2), fused=True, capturable=True), 0.1, model=each
        )
        for each in (model, plain)
    )
    inputs, labels = (tensor.clone() for tensor in _batch())

    def closure_on(network, x, y):
        def closure():
            loss = cross_entropy(network(x), y)
            loss.backward()
            return loss

        return closure

    captured_closure = closure_on(model, inputs, labels)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # warm up, as torch asks, and create the base's state
            optimizer.step(captured_closure)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        other.step(closure_on(plain, inputs, labels))
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):  # captures without running
        loss = optimizer.step(captured_closure)
    for step in range(1, 5):
        new_inputs, new_labels = _batch(step)
        inputs.copy_(new_inputs)
        labels.copy_(new_labels)
        graph.replay()
        expected = other.step(closure_on(plain, new_inputs, new_labels))
        assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    for here, there in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert_close(here, there, rtol=1e-3, atol=1e-5)
    assert not torch.equal(model[0].weight, _network()[0].weight)


def test_a_copy_in_host_memory_frees_the_devices():
    """One copy of the parameters less at the peak, with the same steps, and no waiting host."""
    found = {}
    for save_to in ("device", "host"):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(4)]).cuda()
        optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.2, model=model, save_to=save_to)
        inputs = torch.randn(8, 2048, device="cuda")

        def closure(model=model, optimizer=optimizer, inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step(closure)
        found[save_to] = torch.cuda.max_memory_allocated() - before, [p.detach().cpu() for p in model.parameters()]
    one_copy = 4 * 4 * 2048**2
    assert found["device"][0] - found["host"][0] > 0.9 * one_copy
    assert_close(found["device"][1], found["host"][1], rtol=0, atol=0)


def _attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layers = nn.Unflatten(1, (5, 1)), nn.Linear(1, 8), layer, nn.Flatten(), nn.Linear(40, 3)
    return nn.Sequential(*layers).cuda()


@pytest.mark.filterwarnings("ignore")  # the compiler's; ours would be a reason
@pytest.mark.parametrize("make", [partial(_network, dropout=0.3), _attention], ids=["dropout", "attention"])
@pytest.mark.parametrize("capturable", [False, True], ids=["sgd", "adam"])
def test_a_compiled_step_is_captured_and_takes_the_eager_steps(make, capturable):
    """By inductor and a CUDA graph: the first step is eager, three warm up, and from the fifth on it is replayed."""
    found = []
    for is_compiled in (False, True):
        model = make()
        params = model.parameters()
        adam, sgd = partial(torch.optim.Adam, lr=1e-2, capturable=True), partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = flatmin.SAM((adam if capturable else sgd)(params), 0.1, model=model)
        step = flatmin.compile_step(model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), optimizer)
        if not is_compiled:
            step.reason = "to compare with"
        torch.cuda.manual_seed(1)
        losses = [step(_batch(number)).detach() for number in range(8)]
        if is_compiled:
            assert step.reason is None
            (graph,) = step._graphs.values()
            assert isinstance(graph._compiled, CapturedStep)
            assert graph._compiled._graph is not None
        found.append((losses, dict(model.state_dict()), torch.cuda.get_rng_state()))
    (losses, state, generator), (other_losses, other_state, other_generator) = found
    assert_close(other_losses, losses, rtol=1e-3, atol=1e-4)
    assert_close(other_state, state, rtol=1e-2, atol=1e-3)
    assert torch.equal(other_generator, generator)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_skipped_first_step_of_a_fused_sgd_leaves_no_trace(momentum):
    found = []
    for factors in ([math.nan, 1.0, 1.0], [1.0, 1.0]):
        weights = nn.Parameter(torch.ones(1000, device="cuda"))
        optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.1, momentum=momentum, fused=True))

        def closure(factor, weights=weights):
            loss = (factor * weights).square().sum()
            loss.backward()
            return loss

        for factor in factors:
            optimizer.step(partial(closure, factor))
        assert optimizer.diagnostics.as_dict()["num_skipped_steps"] == len(factors) - 2
        found.append(weights.detach())
    assert torch.equal(*found)


def _closure_on(model, inputs, labels, scaler=None):
    def closure():
        loss = cross_entropy(model(inputs), labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_cpus(method):
    """The same network and batches in float64, on either device: only the order of sums differs."""
    found = []
    for device in ("cpu", "cuda"):
        model = _network().to(device, torch.float64)
        optimizer = METHODS[method](torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.1, model=model)
        for step in range(5):
            inputs, labels = (tensor.to(device) for tensor in _batch(step))
            optimizer.step(_closure_on(model, inputs.double(), labels))
        found.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert_close(*found, rtol=1e-6, atol=1e-8)
    assert not torch.equal(found[0]["0.weight"], _network()[0].weight.cpu().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("save_to", ["device", "host"])
def test_weights_move_by_rho_and_come_back_bit_for_bit(dtype, layout, save_to):
    """By the fused kernel of SGD, or by sums: float64, stochastic rounding, a gradient in another order of memory."""
    torch.manual_seed(0)
    weights = [torch.randn(64, 32, 3, 3, device="cuda", dtype=dtype).to(memory_format=layout) for _ in range(2)]
    params = [nn.Parameter(weight) for weight in weights]
    optimizer = flatmin.SAM(torch.optim.SGD(params, lr=0.1), 0.5, save_to=save_to)
    before = [param.detach().clone() for param in params]
    grads = [torch.randn_like(params[0]), torch.randn(64, 32, 3, 3, device="cuda", dtype=dtype)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.first_step(zero_grad=True)
    length = torch.stack([grad.double().norm() for grad in grads]).norm()
    moved = [(param.double() - old.double()).detach() for param, old in zip(params, before, strict=True)]
    expected = [0.5 * grad.double() / length for grad in grads]
    if dtype == torch.bfloat16:  # right on average: an entry is off by 0.003, its product with the direction by 0.002
        along = sum((m * e).sum() for m, e in zip(moved, expected, strict=True))
        assert_close(along, torch.full_like(along, 0.25), rtol=0, atol=0.01)
    else:
        assert_close(moved, expected, rtol=1e-4, atol=1e-6)
    optimizer.restore()
    assert all(map(torch.equal, before, params))


def test_both_passes_have_the_same_dropout_and_the_generator_goes_on_as_in_one():
    model, plain = _network(dropout=0.5), _network(dropout=0.5)
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.0, model=model)
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    masks = []
    model[3].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    torch.cuda.manual_seed(3)
    for step in range(4):
        optimizer.step(_closure_on(model, *_batch(step)))
    state = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(3)
    for step in range(4):
        base.zero_grad()
        _closure_on(plain, *_batch(step))()
        base.step()
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert all(torch.equal(first, second) for first, second in zip(masks[::2], masks[1::2], strict=True))
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("overflows_at", [None, 0, 1])
def test_a_gradient_scaler_skips_what_overflows_in_either_pass_without_waiting(overflows_at, forbid_waiting):
    model = _network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), 0.1, model=model)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    inputs, labels = _batch()
    calls = []

    def closure(is_bad=False):
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model(inputs), labels)
        loss = loss * math.inf if is_bad and len(calls) == overflows_at else loss
        calls.append(1)
        scaler.scale(loss).backward()
        return loss

    optimizer.step(closure, scaler=scaler)
    scaler.update()
    before = [param.detach().clone() for param in model.parameters()]
    calls.clear()
    forbid_waiting("error")
    optimizer.step(partial(closure, is_bad=True), scaler=scaler)
    forbid_waiting("default")
    scaler.update()
    has_moved = not all(map(torch.equal, before, model.parameters()))
    assert has_moved == (overflows_at is None)
    assert scaler.get_scale() == (1024.0 if overflows_at is None else 512.0)
    assert optimizer.diagnostics.as_dict()["num_skipped_steps"] == (overflows_at is not None)


def test_the_move_takes_one_copy_of_the_weights():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(1024, 1024, device="cuda")) for _ in range(8)]
    optimizer = flatmin.SAM(torch.optim.SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.randn_like(param)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.first_step(zero_grad=True)
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * 4 * 8 * 1024**2
    optimizer.restore()


@pytest.mark.parametrize("save_to", ["device", "host"])
def test_one_replica_by_nccl_takes_the_steps_of_a_bare_model(save_to, tmp_path):
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for wraps in (False, True):
            model = _network(dropout=0.3)
            outer = nn.parallel.DistributedDataParallel(model, device_ids=[0]) if wraps else model
            base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            optimizer = flatmin.SAM(base, 0.1, model=outer, save_to=save_to)
            torch.cuda.manual_seed(1)
            for step in range(4):
                optimizer.step(_closure_on(outer, *_batch(step)))
            found.append(dict(model.state_dict()))
        assert_close(*found, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # the compiler's; ours would be a reason
def test_a_captured_step_heeds_a_checkpoint_an_evaluation_and_another_lr():
    found = []
    for is_compiled in (False, True):
        model = _network()
        optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 0.1, model=model)
        step = flatmin.compile_step(model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), optimizer)
        if not is_compiled:
            step.reason = "to compare with"
        for number in range(12):
            if number == 6:
                optimizer.param_groups[0].update(lr=0.01, rho=0.3)
            if number == 8:
                with torch.no_grad():
                    model.eval()(_batch()[0])
                model.train()
            if number == 10:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step(_batch(number))
        found.append((dict(model.state_dict()), optimizer.state_dict()["state"]))
        if is_compiled:
            assert step.reason is None
            assert step.num_graphs == 1
    assert_close(*found, rtol=1e-3, atol=1e-4)
