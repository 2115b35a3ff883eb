"""A module for Lightning, its training by a trainer, and the same by a loop."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import flatmin
from by_hand import sam_step
from doors import everything
from flatmin.integrations.true_weights import true_weights
from problems import batches, tiny_network

LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


RHO = 0.3


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Classifier(pl.LightningModule):
    """Calls its network and not itself, as most modules do; every batch draws its own dropout masks."""

    def __init__(self, make=lambda base, module: flatmin.SAM(base, RHO)):
        super().__init__()
        self.network = tiny_network()
        self.make = make
        self.accuracy = MulticlassAccuracy(3)
        self.losses, self.hooks, self.dtypes = [], [], set()

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        logits = self.network(inputs)
        self.dtypes.add(logits.dtype)
        loss = cross_entropy(logits, labels)
        self.accuracy(logits.detach(), labels)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())

    def on_before_optimizer_step(self, optimizer):
        self.hooks.append(optimizer)

    def configure_optimizers(self):
        base = torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9)
        optimizer = self.make(base, self)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, *callbacks, package=pl, max_epochs=2, ckpt_path=None, **options):
    trainer = package.Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **(QUIET | options))
    trainer.fit(module, DataLoader(batches(), batch_size=None), ckpt_path=ckpt_path)
    return trainer


def by_hand(step=sam_step, rho=RHO, every=1, epochs=2, autocast=None, **options):
    """The same training; ``every`` batches make a step."""
    network = tiny_network()
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 2, 0.5)

    def loss(epoch, batch):
        inputs, labels = batches()[batch]
        if every > 1:
            torch.manual_seed(100 * epoch + batch)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
            return cross_entropy(network(inputs), labels) / every

    losses = []
    for epoch in range(epochs):
        for start in range(0, len(batches()), every):
            group = range(start, min(start + every, len(batches())))
            torch.manual_seed(100 * epoch + start)
            losses += step(base, network, [partial(loss, epoch, batch) for batch in group], rho, **options)
            scheduler.step()
    return everything(network), losses


def assert_same(module, weights, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(everything(module.network), weights, rtol=rtol, atol=atol)


def half_precision(init_scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=100))


class Noting(pl.Callback):
    """Keeps the true weights after each batch and at the start of each epoch."""

    def __init__(self):
        self.after_batch, self.at_start = [], []

    def on_train_batch_end(self, trainer, module, *args):
        self._keep(trainer, module, self.after_batch)

    def on_train_epoch_start(self, trainer, module):
        self._keep(trainer, module, self.at_start)

    @staticmethod
    def _keep(trainer, module, where):
        with true_weights(trainer.optimizers):
            where.append(parameters_to_vector(module.network.parameters()).detach().clone())
