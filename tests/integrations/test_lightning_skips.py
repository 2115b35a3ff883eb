"""A training step of Lightning that returns None skips its batch."""

from functools import partial

import pytest
import torch
from lightning_runs import LIGHTNING_WARNINGS, RHO, Classifier, assert_same, fit, half_precision
from torch.nn.functional import cross_entropy

import flatmin
from by_hand import micro_batch_step, sam_step
from doors import everything
from flatmin.integrations.lightning import SharpnessAwareCallback
from problems import batches, tiny_network

pytestmark = LIGHTNING_WARNINGS


class Skipping(Classifier):
    """Returns None for some batches, in the first pass or in the second only."""

    def __init__(self, skipped, make=lambda base, module: flatmin.SAM(base, RHO), at_w=True):
        super().__init__(make)
        self.skipped, self.at_w = skipped, at_w
        self.num_calls = dict.fromkeys(range(6), 0)

    def training_step(self, batch, batch_idx):
        self.num_calls[batch_idx] += 1
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped and self.at_w == (self.num_calls[batch_idx] == 1) else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if outputs:
            super().on_train_batch_end(outputs, batch, batch_idx)


def by_hand_without(skipped, every=1, step=sam_step):
    """An epoch whose skipped batches run forward and are left out; steps that have no other are not taken."""
    network = tiny_network()
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 2, 0.5)

    def loss(batch):
        torch.manual_seed(batch)
        return cross_entropy(network(batches()[batch][0]), batches()[batch][1]) / every

    for start in range(0, 6, every):
        group = range(start, start + every)
        kept = [partial(loss, batch) for batch in group if batch not in skipped]
        if kept:
            step(base, network, kept, RHO)
        else:
            loss(start)
            base.step()  # without gradients, as Lightning does
        scheduler.step()
    return network


@pytest.mark.parametrize("plugins", [None, [1024.0]], ids=["float32", "float16"])
@pytest.mark.parametrize("at_w", [True, False], ids=["first pass", "second pass"])
def test_a_training_step_that_returns_none_skips_the_batch(at_w, plugins):
    """In the second pass too, where a loss that is not finite at w + eps is why."""
    module = Skipping({0, 3}, at_w=at_w)
    callbacks = [SharpnessAwareCallback()]
    trainer = fit(module, *callbacks, max_epochs=1, plugins=plugins and [half_precision(*plugins)])
    tolerances = {"rtol": 1e-5, "atol": 5e-3 if plugins else 1e-6}
    torch.testing.assert_close(everything(module.network), everything(by_hand_without({0, 3})), **tolerances)
    other = everything(by_hand_without({3}))  # the control
    assert (everything(module.network) - other).abs().max() > 1e-2
    assert trainer.optimizers[0].diagnostics.num_steps == len(module.hooks) == 4
    assert len(module.losses) == (4 if at_w else 6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 / 8


@pytest.mark.parametrize("shared", [False, True], ids=["each micro-batch", "shared"])
@pytest.mark.parametrize("skipped", [{0}, {1, 4}, {2, 3}], ids=str)
def test_a_skipped_micro_batch_leaves_the_others(skipped, shared):
    module = Skipping(skipped)
    trainer = fit(module, SharpnessAwareCallback(shared_perturbation=shared), max_epochs=1, accumulate_grad_batches=2)
    network = by_hand_without(skipped, 2, sam_step if shared else micro_batch_step)
    torch.testing.assert_close(list(module.network.parameters()), list(network.parameters()), rtol=1e-5, atol=1e-6)
    assert trainer.optimizers[0].diagnostics.num_steps == (2 if skipped == {2, 3} else 3)


@pytest.mark.parametrize("shared", [False, True], ids=["each micro-batch", "shared"])
@pytest.mark.parametrize("skipped", [2, 3])
def test_a_micro_batch_without_loss_in_the_second_pass_skips_its_step(skipped, shared):
    module = Skipping({skipped}, at_w=False)
    trainer = fit(module, SharpnessAwareCallback(shared_perturbation=shared), max_epochs=1, accumulate_grad_batches=2)
    assert trainer.optimizers[0].diagnostics.num_steps == len(module.hooks) == 2
    other = Skipping({2, 3})
    fit(other, SharpnessAwareCallback(shared_perturbation=shared), max_epochs=1, accumulate_grad_batches=2)
    assert_same(module, everything(other.network))


@pytest.mark.parametrize("every", [1, 2])
def test_a_skipped_batch_of_a_one_pass_method(every):
    def train(optimizer_of):
        module = Skipping({0, 2, 3}, optimizer_of)
        callbacks = [SharpnessAwareCallback()] if optimizer_of is made else []
        fit(module, *callbacks, max_epochs=1, accumulate_grad_batches=every)
        return everything(module.network)

    def made(base, module):
        return flatmin.MSAM(base, 0.0)

    torch.testing.assert_close(train(made), train(lambda base, module: base))


def test_a_skipped_batch_without_the_callback_is_an_error_that_names_it():
    for make in (flatmin.SAM, flatmin.MSAM):
        with pytest.raises(RuntimeError, match="training_step that returns None .*SharpnessAwareCallback"):
            fit(Skipping({0}, lambda base, module, make=make: make(base, rho=RHO)))
