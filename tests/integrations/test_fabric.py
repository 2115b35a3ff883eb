"""Loops with Lightning Fabric are the loop written by hand."""

from functools import partial

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import flatmin
from by_hand import micro_batch_step, tiny_training
from doors import everything
from problems import batches, tiny_network

RHO = 0.3
CLIP = partial(clip_grad_norm_, max_norm=0.2)


def setup(**options):
    fabric = Fabric(accelerator="cpu", devices=1, **options)
    network = tiny_network()
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    model, optimizer = fabric.setup(network, flatmin.SAM(base, RHO))
    optimizer.attach(model)
    return fabric, network, model, optimizer


def test_plain_training_ends_elsewhere():
    """The control of the comparisons here and with Accelerate."""
    assert (tiny_training(rho=0.0) - tiny_training()).abs().max() > 0.01
    assert (tiny_training(clip=CLIP) - tiny_training()).abs().max() > 0.01
    assert (tiny_training(micro_batch_step, every=2) - tiny_training(every=2)).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_closure_is_the_loop_by_hand(precision):
    fabric, network, model, optimizer = setup(precision=precision)
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels)
            fabric.backward(loss)
            return loss

        optimizer.step(closure)
    expected, atol = (
        (tiny_training(autocast=torch.bfloat16), 2e-3) if precision == "bf16-mixed" else (tiny_training(), 1e-6)
    )
    torch.testing.assert_close(everything(network), expected, rtol=1e-5, atol=atol)
    assert optimizer.diagnostics.num_perturbed_steps == 6


@pytest.mark.parametrize("door", ["context", "two steps"])
@pytest.mark.parametrize("scale", [None, 1024.0], ids=["float32", "float16"])
def test_two_backward_passes_are_the_loop_by_hand(door, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    plugins = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if scaler else {}
    fabric, network, model, optimizer = setup(**plugins)
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)
        fabric.backward(cross_entropy(model(inputs), labels))
        if door == "context":
            with optimizer.perturbed(scaler=scaler):
                fabric.backward(cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.first_step(zero_grad=True, scaler=scaler)
            fabric.backward(cross_entropy(model(inputs), labels))
            optimizer.second_step(zero_grad=True)
    expected, atol = (tiny_training(autocast=torch.float16), 5e-4) if scaler else (tiny_training(), 1e-6)
    torch.testing.assert_close(everything(network), expected, rtol=1e-5, atol=atol)


def test_clipping_between_the_second_pass_and_the_step():
    fabric, network, model, optimizer = setup()
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)
        fabric.backward(cross_entropy(model(inputs), labels))
        with optimizer.perturbed():
            fabric.backward(cross_entropy(model(inputs), labels))
        fabric.clip_gradients(model, optimizer, max_norm=0.2)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(everything(network), tiny_training(clip=CLIP), rtol=1e-5, atol=1e-6)


def test_clipping_in_float16_is_a_hook_of_the_base():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fabric, network, model, optimizer = setup(plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    optimizer.base.register_step_pre_hook(lambda *_: CLIP(model.parameters()) and None)
    for index, (inputs, labels) in enumerate(batches()):
        torch.manual_seed(index)
        fabric.backward(cross_entropy(model(inputs), labels))
        with optimizer.perturbed(scaler=scaler):
            fabric.backward(cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
    expected = tiny_training(autocast=torch.float16, clip=CLIP)
    torch.testing.assert_close(everything(network), expected, rtol=1e-5, atol=5e-4)


def test_micro_batches_as_closures_are_the_loop_by_hand():
    fabric, network, model, optimizer = setup()

    def closure(inputs, labels):
        loss = cross_entropy(model(inputs), labels)
        fabric.backward(loss)
        return loss

    for start in range(0, 6, 2):
        torch.manual_seed(start)
        optimizer.step([partial(closure, *batch) for batch in batches()[start : start + 2]])
    torch.testing.assert_close(everything(network), tiny_training(micro_batch_step, every=2), rtol=1e-5, atol=1e-6)


def test_buffers_are_averaged_where_the_model_came_late():
    """Fabric's wrapper pretends to be the optimizer: what is set through it must reach the one inside."""
    networks = []
    for late in (True, False):
        network = tiny_network()
        base = torch.optim.SGD(network.parameters(), lr=0.1)
        if late:
            fabric = Fabric(accelerator="cpu", devices=1)
            model, optimizer = fabric.setup(network, flatmin.SAM(base, RHO))
            optimizer.attach(model)
            optimizer = optimizer.optimizer
        else:
            optimizer = flatmin.SAM(base, RHO, model=network)

        def closure(inputs, labels, network=network):
            loss = cross_entropy(network(inputs), labels)
            loss.backward()
            return loss

        torch.manual_seed(0)
        optimizer.step([partial(closure, *batch) for batch in batches()[:2]], average_buffers=True)
        networks.append(network)
    assert torch.equal(everything(networks[0]), everything(networks[1]))


def test_a_loaded_run_ends_where_the_uninterrupted_one_does(tmp_path):
    def train(fabric, model, optimizer, steps):
        for index in steps:
            torch.manual_seed(index)
            inputs, labels = batches()[index]
            fabric.backward(cross_entropy(model(inputs), labels))
            with optimizer.perturbed():
                fabric.backward(cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()

    fabric, whole, model, optimizer = setup()
    train(fabric, model, optimizer, range(3))
    fabric.save(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, range(3, 6))
    fabric, resumed, model, optimizer = setup()
    fabric.load(tmp_path / "state.ckpt", {"model": model, "optimizer": optimizer})
    train(fabric, model, optimizer, range(3, 6))
    assert torch.equal(everything(resumed), everything(whole))


def test_a_plain_step_is_an_error_that_names_the_page():
    fabric, _, model, optimizer = setup()
    inputs, labels = batches()[0]
    fabric.backward(cross_entropy(model(inputs), labels))
    with pytest.raises(RuntimeError, match=r"docs/trainers\.md"):
        optimizer.step()
