"""Loops with Accelerate are the loop written by hand."""

from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import flatmin
from by_hand import micro_batch_step, tiny_training
from doors import everything
from problems import batches, tiny_network

RHO = 0.3
CLIP = partial(clip_grad_norm_, max_norm=0.2)


def prepared(**options):
    """A fresh accelerator, model, the optimizer prepared and the one inside."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the process
    accelerator = Accelerator(cpu=True, **options)
    model = accelerator.prepare(tiny_network())
    sam = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), RHO, model=model)
    return accelerator, model, accelerator.prepare(sam), sam


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_closure_is_the_loop_by_hand(precision):
    accelerator, model, optimizer, _ = prepared(mixed_precision=precision)
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    expected, atol = (tiny_training(autocast=torch.bfloat16), 2e-3) if precision == "bf16" else (tiny_training(), 1e-6)
    torch.testing.assert_close(everything(model), expected, rtol=1e-5, atol=atol)


def test_clipping_between_the_second_pass_and_the_step():
    accelerator, model, optimizer, sam = prepared()
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)
        accelerator.backward(cross_entropy(model(inputs), labels))
        with sam.perturbed():
            accelerator.backward(cross_entropy(model(inputs), labels))
        accelerator.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(everything(model), tiny_training(clip=CLIP), rtol=1e-5, atol=1e-6)


def test_the_loop_with_accumulate_is_the_loop_by_hand():
    accelerator, model, optimizer, sam = prepared(gradient_accumulation_steps=2)
    for index, (inputs, labels) in enumerate(batches()):
        if index % 2 == 0:
            torch.manual_seed(index)
        with accelerator.accumulate(model):
            accelerator.backward(cross_entropy(model(inputs), labels))
            with sam.perturbed():
                accelerator.backward(cross_entropy(model(inputs), labels))
            sam.accumulate()
            if accelerator.sync_gradients:
                sam.gather("sum")  # Accelerate has divided each loss
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
    expected = tiny_training(micro_batch_step, every=2, clip=CLIP)
    torch.testing.assert_close(everything(model), expected, rtol=1e-5, atol=1e-6)
    assert sam.diagnostics.num_steps == 3


def test_micro_batches_as_closures_are_the_loop_by_hand():
    accelerator, model, optimizer, _ = prepared()

    def closure(inputs, labels):
        loss = cross_entropy(model(inputs), labels)
        accelerator.backward(loss)
        return loss

    for start in range(0, 6, 2):
        torch.manual_seed(start)
        optimizer.step([partial(closure, *batch) for batch in batches()[start : start + 2]])
    torch.testing.assert_close(everything(model), tiny_training(micro_batch_step, every=2), rtol=1e-5, atol=1e-6)


def test_a_gradient_scaler_changes_nothing():
    """Accelerate makes one on accelerators only, so it is put in place here."""
    accelerator, model, _, sam = prepared()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerator._optimizers.clear()
    optimizer = accelerator.prepare_optimizer(sam)
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)
        accelerator.backward(cross_entropy(model(inputs), labels))
        with sam.perturbed(scaler=accelerator.scaler):
            accelerator.backward(cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(everything(model), tiny_training(), rtol=1e-5, atol=1e-6)


def test_a_loaded_run_ends_where_the_uninterrupted_one_does(tmp_path):
    def train(accelerator, model, optimizer, steps):
        for index in steps:
            torch.manual_seed(index)
            inputs, labels = batches()[index]

            def closure(inputs=inputs, labels=labels):
                optimizer.zero_grad()
                loss = cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)

    accelerator, whole, optimizer, _ = prepared()
    train(accelerator, whole, optimizer, range(3))
    accelerator.save_state(tmp_path)
    train(accelerator, whole, optimizer, range(3, 6))
    accelerator, resumed, optimizer, _ = prepared()
    accelerator.load_state(tmp_path)
    train(accelerator, resumed, optimizer, range(3, 6))
    assert torch.equal(everything(resumed), everything(whole))


def test_a_plain_step_is_an_error_that_names_the_page():
    accelerator, model, optimizer, _ = prepared()
    inputs, labels = batches()[0]
    accelerator.backward(cross_entropy(model(inputs), labels))
    with pytest.raises(RuntimeError, match=r"docs/trainers\.md"):
        optimizer.step()
