"""Manual optimization in Lightning: any door, several optimizers."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import LIGHTNING_WARNINGS, RHO, Classifier, assert_same, by_hand, fit, half_precision
from torch.nn.functional import cross_entropy

import flatmin
from by_hand import sam_step
from doors import everything
from flatmin.integrations.lightning import SharpnessAwareCallback
from problems import batches, tiny_network

pytestmark = LIGHTNING_WARNINGS


class Manual(Classifier):
    def __init__(self, door):
        super().__init__(lambda base, module: flatmin.SAM(base, RHO, model=module.network))
        self.automatic_optimization = False
        self.door = door

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(self.network(inputs), labels)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.manual_backward(loss)
            return loss

        if self.door == "closure":
            loss = optimizer.step(closure)
        else:
            loss = closure()
            if self.door == "two steps":
                optimizer.first_step(zero_grad=True)
                self.manual_backward(cross_entropy(self.network(inputs), labels))
                optimizer.second_step(zero_grad=True)
            else:
                with optimizer.perturbed():
                    self.manual_backward(cross_entropy(self.network(inputs), labels))
                optimizer.step()
        scheduler.step()
        return {"loss": loss}


@pytest.mark.parametrize("plugins", [None, [1024.0]], ids=["float32", "float16"])
@pytest.mark.parametrize("door", ["closure", "two steps", "context"])
def test_manual_optimization_is_the_loop_by_hand(door, plugins):
    module = Manual(door)
    plugins = plugins and [half_precision(*plugins)]
    trainer = fit(module, SharpnessAwareCallback(), plugins=plugins)
    weights, losses = by_hand(autocast=torch.float16 if plugins else None)
    assert_same(module, weights, **({"atol": 5e-4} if plugins else {}))
    assert trainer.global_step == len(module.hooks) == 12
    if not plugins:
        torch.testing.assert_close(trainer.callback_metrics["loss"], torch.stack(losses[6:]).mean())


class TakingTurns(pl.LightningModule):
    """Two optimizers; while one steps, the other's parameters require no gradient."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.networks = torch.nn.ModuleList([tiny_network(0), tiny_network(1)])
        self.frozen = []

    def training_step(self, batch, batch_idx):
        for network, optimizer in zip(self.networks, self.optimizers(), strict=True):

            def closure(network=network, optimizer=optimizer):
                loss = sum(cross_entropy(each(batch[0]), batch[1]) for each in self.networks)
                self.frozen.append([not each.last.weight.requires_grad for each in self.networks])
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            torch.manual_seed(batch_idx)
            with optimizer.toggle_model():
                optimizer.step(closure)

    def configure_optimizers(self):
        return [
            flatmin.SAM(torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9), RHO, model=self.networks)
            for network in self.networks
        ]


@pytest.mark.parametrize("callbacks", [0, 1])
def test_two_optimizers_take_turns(callbacks):
    module = TakingTurns()
    fit(module, *[SharpnessAwareCallback() for _ in range(callbacks)], max_epochs=1)
    assert module.frozen == [[False, True], [False, True], [True, False], [True, False]] * 6
    networks = torch.nn.ModuleList([tiny_network(0), tiny_network(1)])
    bases = [torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9) for network in networks]

    def loss(batch):
        return sum(cross_entropy(each(batch[0]), batch[1]) for each in networks)

    for index, batch in enumerate(batches()):
        for base in bases:
            torch.manual_seed(index)
            sam_step(base, networks, [partial(loss, batch)], RHO)
    torch.testing.assert_close(everything(module.networks), everything(networks), rtol=1e-5, atol=1e-6)
