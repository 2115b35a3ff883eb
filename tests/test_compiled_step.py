"""A compiled step takes the steps of the eager one, and says why where it cannot."""

import copy
import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
from flatmin.optim import WarmUp
from flatmin.optim.draws import RecordedPass, Unfit
from flatmin.optim.step_graph import with_inductor
from optimizers import METHODS, POLICIES, SIMPLE, Row, sgd
from problems import NUM_BATCHES, batches, tiny_network

ROWS = [row for row in SIMPLE + METHODS + POLICIES if row.name != "AESAM" and not row.name.startswith("compat")]
MICRO_BATCHED = [
    row for row in ROWS if row.name in ("SAM", "SAM-p1", "SAM-3-ascents", "ZSharp", "WSAM", "VaSSO", "LookSAM")
]
CLOSE = {"rtol": 1e-9, "atol": 1e-10}  # float64: what fifty steps make of another order of additions
ONE_PASS = [
    Row("MSAM", lambda base, rho, diagnostics=False, **options: flatmin.MSAM(base, rho, **options)),
    Row("AdaptiveMSAM", lambda base, rho, diagnostics=False, **options: flatmin.AdaptiveMSAM(base, rho, **options)),
]
BASES = {
    "sgd": sgd,
    "nesterov": lambda params: sgd(params, nesterov=True, maximize=True, lr=1e-2),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9),
}


def as_traced(graph, inputs):
    """A backend that runs the graph as it is, without the minutes that a compiler takes."""
    return graph


def loss_fn(model, batch):
    inputs, labels = batch
    return cross_entropy(model(inputs), labels)


def network():
    """Without a bias before batch norm: its gradient is zero but for rounding, which p = infinity and Adam blow up."""
    model = tiny_network(dtype=torch.float64)
    model.first.bias.requires_grad_(False)
    return model


def network_without_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 900), nn.Tanh(), nn.Dropout(0.4), nn.Linear(900, 3)).double()


def trained(row, *, compiled, num_steps=50, make=network, base=sgd, **options):
    """Model, optimizer, step and losses of a run whose lr and rho change."""
    model = make()
    optimizer = row.build(base(model.parameters()), model, diagnostics=True)
    step = flatmin.compile_step(model, loss_fn, optimizer, **{"backend": as_traced, **options})
    if not compiled:
        step.reason = "to compare with"
    lr = optimizer.param_groups[0]["lr"]
    torch.manual_seed(5)
    losses = []
    for number in range(num_steps):
        optimizer.param_groups[0].update(lr=lr / (1 + number), rho=0.1 + 0.01 * number)
        losses.append(step(batches(torch.float64)[number % NUM_BATCHES]).detach())
    return model, optimizer, step, losses


def assert_same(run, other, **close):
    """Weights, buffers, state, groups, diagnostics, losses and generators."""
    (model, optimizer, _, losses), (other_model, other_optimizer, _, other_losses) = run, other
    state, other_state = optimizer.state_dict(), other_optimizer.state_dict()
    close = close or CLOSE
    torch.testing.assert_close(dict(model.state_dict()), dict(other_model.state_dict()), **close)
    torch.testing.assert_close(state["state"], other_state["state"], **close)
    assert state["param_groups"] == other_state["param_groups"]
    torch.testing.assert_close(optimizer.diagnostics.as_dict(), other_optimizer.diagnostics.as_dict(), **close)
    torch.testing.assert_close(losses, other_losses, **close)


@pytest.mark.parametrize("row", ROWS + ONE_PASS, ids=lambda row: row.name)
def test_fifty_compiled_steps_are_the_eager_ones(row):
    eager = trained(row, compiled=False)
    generator = torch.get_rng_state()
    compiled = trained(row, compiled=True)
    assert compiled[2].reason is None
    assert compiled[2].num_graphs == (2 if row in POLICIES else 1), "lr and rho must not need another graph"
    torch.testing.assert_close(torch.get_rng_state(), generator, rtol=0, atol=0)
    assert_same(compiled, eager)


@pytest.mark.parametrize("row", [Row("WSAM", flatmin.WSAM), ONE_PASS[0]], ids=lambda row: row.name)
@pytest.mark.parametrize("base", BASES)
def test_any_base_optimizer_is_compiled(base, row):
    if row.name == "MSAM" and base == "rmsprop":
        pytest.skip("has no first moment in its betas")
    eager = trained(row, compiled=False, base=BASES[base], num_steps=12)
    compiled = trained(row, compiled=True, base=BASES[base], num_steps=12)
    assert compiled[2].reason is None
    assert_same(compiled, eager)


def test_the_comparison_sees_a_missing_perturbation():
    """The control of the tests above."""
    row = Row("SAM", flatmin.SAM)
    plain = trained(Row("plain", flatmin.SAM, {"when": lambda number: False}), compiled=True)
    with pytest.raises(AssertionError):
        assert_same(trained(row, compiled=True), plain)


@pytest.mark.parametrize("row", [Row("SAM", flatmin.SAM), ONE_PASS[0]], ids=lambda row: row.name)
def test_inductor_takes_the_same_steps(row):
    """The compiler itself, on the smallest network; ``test_fifty_steps_of_inductor`` takes longer."""
    make = lambda: nn.Linear(5, 3).double() if torch.manual_seed(0) else None  # noqa: E731
    options = {"make": make, "num_steps": 12}
    compiled = trained(row, compiled=True, backend=with_inductor, **options)
    assert compiled[2].reason is None
    assert_same(compiled, trained(row, compiled=False, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SAM", "ASAM", "GSAM", "VaSSO", "LookSAM", "SAM-p1", "ZSharp", "MSAM"])
def test_fifty_steps_of_inductor_are_the_eager_ones(name):
    (row,) = [row for row in ROWS + ONE_PASS if row.name == name]
    compiled = trained(row, compiled=True, backend=with_inductor)
    assert compiled[2].reason is None
    assert_same(compiled, trained(row, compiled=False))


@pytest.mark.parametrize("row", MICRO_BATCHED, ids=lambda row: row.name)
def test_micro_batches_at_once_are_the_loop(row):
    options = {"make": network_without_batch_norm, "num_micro_batches": 4, "num_steps": 8}
    loop = trained(row, compiled=False, **options)
    at_once = trained(row, compiled=True, **options)
    assert at_once[2].reason is None
    assert at_once[2].num_graphs == 1
    assert_same(at_once, loop)


def test_a_micro_batch_has_a_perturbation_of_its_own():
    """The control of the test above."""
    row, options = Row("SAM", flatmin.SAM), {"make": network_without_batch_norm, "num_steps": 8}
    with pytest.raises(AssertionError):
        assert_same(trained(row, compiled=True, num_micro_batches=4, **options), trained(row, compiled=True, **options))


def test_micro_batches_with_running_statistics_are_a_loop():
    options = {"num_micro_batches": 4, "num_steps": 4}
    row = Row("SAM", flatmin.SAM)
    with pytest.warns(UserWarning, match="change the model's buffers one after another"):
        run = trained(row, compiled=True, **options)
    assert_same(run, trained(row, compiled=False, **options), rtol=0, atol=0)


def test_weights_and_state_stay_in_their_storage():
    model, optimizer, step, _ = trained(Row("SAM", flatmin.SAM), compiled=True, num_steps=3)
    tensors = [*model.state_dict(keep_vars=True).values(), *[s["momentum_buffer"] for s in optimizer.state.values()]]
    before = [(tensor, tensor.data_ptr()) for tensor in tensors]
    values = [tensor.detach().clone() for tensor in tensors]
    step(batches(torch.float64)[0])
    after = [*model.state_dict(keep_vars=True).values(), *[s["momentum_buffer"] for s in optimizer.state.values()]]
    assert all(new is old and new.data_ptr() == address for new, (old, address) in zip(after, before, strict=True))
    assert not all(torch.equal(new, old) for new, old in zip(after, values, strict=True))
    assert all(param.grad is None for param in model.parameters())


def test_checkpoints_go_from_eager_to_compiled_and_back():
    row = Row("VaSSO", flatmin.VaSSO)
    whole = trained(row, compiled=False, num_steps=12)
    model, optimizer, step, _ = trained(row, compiled=True, num_steps=6)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    fresh = network()
    resumed = row.build(sgd(fresh.parameters()), fresh, diagnostics=True)
    fresh.load_state_dict(saved[0][0])
    resumed.load_state_dict(saved[0][1])
    torch.set_rng_state(saved[1])
    for number in range(6, 12):
        resumed.param_groups[0].update(lr=0.1 / (1 + number), rho=0.1 + 0.01 * number)
        batch = batches(torch.float64)[number % NUM_BATCHES]
        resumed.step(lambda batch=batch: _backward(fresh, batch))
    torch.testing.assert_close(dict(fresh.state_dict()), dict(whole[0].state_dict()), **CLOSE)
    torch.testing.assert_close(resumed.state_dict()["state"], whole[1].state_dict()["state"], **CLOSE)
    optimizer.load_state_dict(resumed.state_dict())  # other tensors, the same graph
    step(batches(torch.float64)[0])
    assert step.num_graphs == 1


def _backward(model, batch):
    loss = loss_fn(model, batch)
    loss.backward()
    return loss


@pytest.mark.parametrize("first", [True, False])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(first):
    """In the first pass, where the batch is not finite, or in the second, where the perturbed weights are."""
    model, optimizer, step, _ = trained(Row("SAM", flatmin.SAM), compiled=True, num_steps=3)
    values = {name: value.clone() for name, value in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    inputs, labels = batches(torch.float64)[0]
    if first:
        inputs = inputs.clone().index_fill_(0, torch.tensor([0]), math.nan)
    else:
        optimizer.param_groups[0]["rho"] = 1e308
    step((inputs, labels))
    torch.testing.assert_close(dict(model.named_parameters()), values, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    assert optimizer.diagnostics.num_skipped_steps == 1
    assert optimizer.param_groups[0]["num_steps"] == 3


@pytest.mark.parametrize("change", ["eval", "dropout", "freeze", "momentum", "shape", "group", "checkpoint"])
def test_what_a_graph_was_traced_for_may_change(change):
    runs = []
    for compiled in (False, True):
        run = trained(Row("SAM", flatmin.SAM), compiled=compiled, num_steps=3)
        model, optimizer, step, losses = run
        batch = batches(torch.float64)[0]
        if change == "eval":
            model.eval()
        elif change == "dropout":
            model.dropout.p = 0.1
        elif change == "freeze":
            model.first.weight.requires_grad_(False)
        elif change == "momentum":
            optimizer.param_groups[0]["momentum"] = 0.5
        elif change == "shape":
            batch = (batch[0][:7], batch[1][:7])
        elif change == "checkpoint":  # whose groups take the place of those that were traced
            saved = copy.deepcopy(optimizer.state_dict())
            saved["param_groups"][0]["momentum"] = 0.5
            optimizer.load_state_dict(saved)
        else:
            weight = optimizer.param_groups[0]["params"].pop(0)
            optimizer.add_param_group({"params": [weight], "lr": 0.01, "rho": 0.3})
        losses += [step(batch).detach() for _ in range(3)]
        runs.append(run)
    assert runs[1][2].reason is None
    assert runs[1][2].num_graphs == 2
    assert_same(runs[1], runs[0])


def test_a_checkpoint_of_the_same_settings_needs_no_new_graph():
    """The control."""
    _, optimizer, step, _ = trained(Row("SAM", flatmin.SAM), compiled=True, num_steps=3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(batches(torch.float64)[0])
    assert step.num_graphs == 1


def test_rho_schedules_and_lr_schedulers_go_on():
    runs = []
    for compiled in (False, True):
        model = tiny_network(dtype=torch.float64)
        optimizer = flatmin.SAM(sgd(model.parameters()), 0.1, model=model, rho_schedule=WarmUp(5))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        step = flatmin.compile_step(model, loss_fn, optimizer, backend=as_traced)
        if not compiled:
            step.reason = "to compare with"
        losses = []
        for number in range(8):
            losses.append(step(batches(torch.float64)[number % NUM_BATCHES]).detach())
            scheduler.step()
        runs.append((model, optimizer, step, losses))
    assert runs[1][2].num_graphs == 1
    assert_same(runs[1], runs[0])


class _Attention(nn.Module):
    """One head over the five entries of an input; dropout is after it."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.read = nn.Linear(1, 12), nn.Dropout(0.4), nn.Linear(4, 3)

    def forward(self, inputs):
        query, key, value = self.embed(inputs[..., None]).chunk(3, dim=-1)
        heads = (each[:, None] for each in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(*heads)
        return self.read(self.drop(found).mean(dim=(1, 2)))


def test_attention_without_dropout_draws_nothing():
    """Torch tags its fused forms as random whether they drop anything or not."""

    def make():
        torch.manual_seed(0)
        return _Attention().double()

    row = Row("SAM", flatmin.SAM)
    eager, compiled = (trained(row, compiled=is_it, num_steps=8, make=make) for is_it in (False, True))
    assert compiled[2].reason is None
    assert_same(compiled, eager)


def test_attention_with_dropout_is_refused():
    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with RecordedPass() as recorded:
        attention(query, query, query)
        attention(query, query, query, dropout_p=0.0)
    assert not recorded.draws
    with pytest.raises(Unfit, match="flash_attention"), RecordedPass():
        attention(query, query, query, 0.1)


def test_a_slice_of_a_larger_batch_is_compiled():
    """A compiler relies on the strides of the example."""
    laid_out = []

    def relying_on_strides(graph, inputs):
        laid_out.extend(tensor.stride() for tensor in inputs)

        def compiled(*given):
            assert [tensor.stride() for tensor in given] == laid_out
            return graph(*given)

        return compiled

    model = network()
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    step = flatmin.compile_step(model, loss_fn, optimizer, backend=relying_on_strides)
    for inputs, labels in batches(torch.float64)[:3]:
        step((torch.cat([inputs, inputs], dim=1)[:, :5], labels))
    assert step.reason is None
    assert (10, 1) in laid_out


class _OwnGenerator(nn.Linear):
    generator = torch.Generator()

    def forward(self, inputs):
        return super().forward(inputs + torch.rand(inputs.shape, generator=self.generator))


class _Branching(nn.Linear):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if outputs.sum() > 0 else 2 * outputs


def _hooked(model):
    base = sgd(model.parameters())
    base.register_step_pre_hook(lambda *_: None)
    return flatmin.SAM(base, model=model)


REASONS = {
    "AESAM": (nn.Linear, lambda m: flatmin.AESAM(sgd(m.parameters()), num_steps=9, model=m), "looks at the gradient"),
    "when": (
        nn.Linear,
        lambda m: flatmin.MSAM(sgd(m.parameters()), 0.1, when=flatmin.optim.Every(2)),
        "MSAM perturbs some steps only",
    ),
    "schedule": (
        nn.Linear,
        lambda m: flatmin.MSAM(sgd(m.parameters()), 0.1, rho_schedule=WarmUp(5)),
        "MSAM has a schedule of rho",
    ),
    "observer": (
        nn.Linear,
        lambda m: flatmin.OnePass(sgd(m.parameters()), 0.1, direction=flatmin.optim.StaleGradient()),
        "StaleGradient learns from the gradient",
    ),
    "BSAM": (nn.Linear, lambda m: flatmin.BSAM(m.parameters(), num_data=99, model=m), "does not make the passes"),
    "hooks": (nn.Linear, _hooked, "step hooks"),
    "generator": (_OwnGenerator, lambda m: flatmin.SAM(sgd(m.parameters()), model=m), "generator of its own"),
    "branch": (_Branching, lambda m: flatmin.SAM(sgd(m.parameters()), model=m), "stopped with"),
    "LSTM": (lambda *_: _Recurrent(), lambda m: flatmin.SAM(sgd(m.parameters()), model=m), "stopped with"),
    "bfloat16": (
        lambda *size: nn.Linear(*size).bfloat16(),
        lambda m: flatmin.SAM(sgd(m.parameters()), model=m),
        "narrower than float32",
    ),
}


class _Recurrent(nn.Module):
    """Weights that are also held in a list."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 3)

    def forward(self, inputs):
        return self.lstm(inputs)[0]


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_compiled_says_why_and_takes_the_eager_step(case):
    make, build, reason = REASONS[case]
    models = []
    for compiled in (True, False):
        torch.manual_seed(0)
        _OwnGenerator.generator.manual_seed(0)
        model = make(5, 3)
        optimizer = build(model)
        dtype = next(model.parameters()).dtype
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = flatmin.compile_step(model, loss_fn, optimizer, backend=as_traced) if compiled else None
            for batch in batches(dtype)[:4]:
                step(batch) if compiled else optimizer.step(lambda b=batch, m=model: _backward(m, b))
        if compiled:
            assert [str(each.message) for each in caught] == [f"compile_step takes the eager step: {step.reason}"]
            assert re.search(reason, step.reason)
            assert len(step.reason.splitlines()) == 1
        models.append(model)
    assert_equal_weights(*models)


def assert_equal_weights(model, other):
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_wrong_arguments_are_refused():
    model = nn.Linear(5, 3)
    optimizer = flatmin.SAM(sgd(model.parameters()), model=model)
    with pytest.raises(TypeError, match="optimizer must be a SharpnessAware, OnePass or BSAM, got SGD"):
        flatmin.compile_step(model, loss_fn, sgd(model.parameters()))
    with pytest.raises(ValueError, match="model must be the one that the optimizer was given"):
        flatmin.compile_step(nn.Linear(5, 3), loss_fn, optimizer)
    with pytest.raises(ValueError, match="num_micro_batches must be an integer >= 1, got 0"):
        flatmin.compile_step(model, loss_fn, optimizer, num_micro_batches=0)


def test_a_loop_of_two_steps_must_be_finished_first():
    model, optimizer, step, _ = trained(Row("SAM", flatmin.SAM), compiled=True, num_steps=3)
    _backward(model, batches(torch.float64)[0])
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="must not follow first_step"):
        step(batches(torch.float64)[0])


def _rested(compiled, between):
    """Six steps of Momentum-SAM, with something done to model and optimizer before the fourth."""
    model = network()
    optimizer = flatmin.MSAM(sgd(model.parameters()), 0.2, model=model)
    step = flatmin.compile_step(model, loss_fn, optimizer, backend=as_traced)
    if not compiled:
        step.reason = "to compare with"
    losses = []
    for number in range(6):
        if number == 3:
            between(model, optimizer)
        losses.append(step(batches(torch.float64)[number % NUM_BATCHES]).detach())
    assert compiled == (step.num_graphs > 0 and step.reason is None)
    return model, optimizer, step, losses


def _look(model, optimizer):
    with optimizer.unperturbed():
        pass


def _average(model, optimizer):
    with optimizer.unperturbed(), torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)


def _write(model, optimizer):
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)


def _resume(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _step_eagerly(model, optimizer):
    optimizer.step(lambda: _backward(model, batches(torch.float64)[0]))


@pytest.mark.parametrize("between", [_look, _average, _write, _resume, _step_eagerly])
def test_weights_at_rest_are_known_to_eager_and_compiled_steps_alike(between):
    assert_same(_rested(True, between), _rested(False, between))


def test_what_is_done_between_steps_counts():
    """The control of the test above: it is not lost in both."""
    looked, averaged, written = (_rested(True, between)[3][-1] for between in (_look, _average, _write))
    assert abs(looked - averaged) > 1e-4
    assert abs(averaged - written) > 1e-6


def test_a_compiled_step_inside_unperturbed_is_refused():
    _, optimizer, step, _ = _rested(True, _look)
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="must not be called inside unperturbed"):
        step(batches(torch.float64)[0])


def test_a_skipped_step_of_one_pass_leaves_the_weights_where_they_rest():
    runs = []
    for compiled in (True, False):
        model, optimizer, step, losses = _rested(compiled, _look)
        before = [param.detach().clone() for param in model.parameters()]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        inputs, labels = batches(torch.float64)[0]
        step((inputs * math.nan, labels))
        assert optimizer.diagnostics.num_skipped_steps == 1
        torch.testing.assert_close([*model.parameters()], before, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=1e-12, atol=1e-14)
        model.load_state_dict({name: value.nan_to_num() for name, value in model.state_dict().items()})
        losses.append(step(batches(torch.float64)[1]).detach())
        runs.append((model, optimizer, step, losses))
    assert_same(*runs)


class Flattened(nn.Module):
    """A convolutional network whose head needs contiguous outputs, or does not."""

    def __init__(self, flatten):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.dropout, self.head, self.flatten = nn.Dropout(0.3), nn.Linear(6 * 9, 3), flatten

    def forward(self, inputs):
        images = inputs.repeat(1, 10).view(-1, 2, 5, 5)
        return self.head(self.flatten(self.dropout(torch.relu(self.norm(self.convolution(images))))))


FLATTEN = {"any layout": lambda x: x.flatten(1), "contiguous alone": lambda x: x.view(len(x), -1)}


@pytest.mark.parametrize("flatten", FLATTEN)
def test_convolutions_have_their_channels_last_inside_the_graph(flatten):
    """Where the model can have it so; with the same numbers and the weights in their own layout either way."""

    def make():
        torch.manual_seed(0)
        model = Flattened(FLATTEN[flatten]).double()
        model.convolution.bias.requires_grad_(False)  # its gradient is zero but for rounding
        return model

    row, layouts = Row("SAM", flatmin.SAM), []

    def looking(graph, inputs):
        tensors = [node.meta["val"] for node in graph.graph.nodes if node.target is torch.ops.aten.convolution.default]
        layouts.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in tensors)
        return graph

    compiled = trained(row, compiled=True, make=make, num_steps=8, backend=looking)
    assert compiled[2].reason is None
    assert layouts == [flatten == "any layout"] * 2
    assert all(param.is_contiguous() for param in compiled[0].parameters())
    assert_same(compiled, trained(row, compiled=False, make=make, num_steps=8))
