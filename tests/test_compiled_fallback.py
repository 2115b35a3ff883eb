"""What cannot be compiled says why and takes the eager step, and wrong calls are refused."""

import re
import warnings

import pytest
import torch
from torch import nn

import flatmin
from compiled_runs import as_traced, backward, loss_fn, trained
from flatmin.optim import WarmUp
from flatmin.optim.draws import RecordedPass, Unfit
from optimizers import Row, sgd
from problems import batches


class _OwnGenerator(nn.Linear):
    generator = torch.Generator()

    def forward(self, inputs):
        return super().forward(inputs + torch.rand(inputs.shape, generator=self.generator))


class _Branching(nn.Linear):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if outputs.sum() > 0 else 2 * outputs


class _Recurrent(nn.Module):
    """Weights that are also held in a list."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 3)

    def forward(self, inputs):
        return self.lstm(inputs)[0]


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
                step(batch) if compiled else optimizer.step(lambda b=batch, m=model: backward(m, b))
        if compiled:
            assert [str(each.message) for each in caught] == [f"compile_step takes the eager step: {step.reason}"]
            assert re.search(reason, step.reason)
            assert len(step.reason.splitlines()) == 1
        models.append(model)
    torch.testing.assert_close(*[dict(model.state_dict()) for model in models], rtol=0, atol=0)


def test_attention_with_dropout_is_refused():
    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with RecordedPass() as recorded:
        attention(query, query, query)
        attention(query, query, query, dropout_p=0.0)
    assert not recorded.draws
    with pytest.raises(Unfit, match="flash_attention"), RecordedPass():
        attention(query, query, query, 0.1)


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
    backward(model, batches(torch.float64)[0])
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="must not follow first_step"):
        step(batches(torch.float64)[0])
