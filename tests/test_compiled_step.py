"""A compiled step takes the steps of the eager one."""

import copy
import math

import pytest
import torch
from torch import nn

import flatmin
from compiled_runs import CLOSE, ONE_PASS, as_traced, assert_same, backward, loss_fn, network, trained
from flatmin.optim import WarmUp
from flatmin.optim.step_graph import with_inductor
from optimizers import METHODS, POLICIES, SIMPLE, Row, sgd
from problems import NUM_BATCHES, batches, tiny_network

ROWS = [row for row in SIMPLE + METHODS + POLICIES if row.name != "AESAM" and not row.name.startswith("compat")]

BASES = {
    "sgd": sgd,
    "nesterov": lambda params: sgd(params, nesterov=True, maximize=True, lr=1e-2),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9),
}


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
        resumed.step(lambda batch=batch: backward(fresh, batch))
    torch.testing.assert_close(dict(fresh.state_dict()), dict(whole[0].state_dict()), **CLOSE)
    torch.testing.assert_close(resumed.state_dict()["state"], whole[1].state_dict()["state"], **CLOSE)
    optimizer.load_state_dict(resumed.state_dict())  # other tensors, the same graph
    step(batches(torch.float64)[0])
    assert step.num_graphs == 1


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
