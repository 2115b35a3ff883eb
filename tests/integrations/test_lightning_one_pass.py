"""One-pass methods in Lightning: true weights are validated, saved and averaged."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning_runs import LIGHTNING_WARNINGS, QUIET, RHO, Classifier, Noting, fit
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, parameters_to_vector
from torch.utils.data import DataLoader

import flatmin
from doors import everything
from flatmin.integrations.lightning import SharpnessAwareCallback
from problems import batches, tiny_network

pytestmark = LIGHTNING_WARNINGS


class Validated(Classifier):
    """Keeps the weights that validation sees."""

    def __init__(self):
        super().__init__(lambda base, module: flatmin.MSAM(base, RHO))
        self.seen, self.trained = [], []

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.trained.append(everything(self.network))

    def validation_step(self, batch, batch_idx):
        self.seen.append(everything(self.network))


@pytest.mark.parametrize("every", [1, 2])
def test_a_one_pass_method_shows_its_true_weights(tmp_path, every):
    module = Validated()
    loaders = [DataLoader(batches()[:count], batch_size=None) for count in (6, 1)]
    options = {"accumulate_grad_batches": every, "gradient_clip_val": 0.2, "precision": "bf16-mixed"}
    trainer = pl.Trainer(max_epochs=2, callbacks=[SharpnessAwareCallback()], num_sanity_val_steps=0, **options, **QUIET)
    trainer.fit(module, *loaders)
    network = tiny_network()
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 2, 0.5)
    optimizer = flatmin.MSAM(base, RHO)
    for epoch in range(2):
        for batch, (inputs, labels) in enumerate(batches()):
            torch.manual_seed(100 * epoch + batch)
            assert torch.equal(module.trained[6 * epoch + batch], everything(network))
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                loss = cross_entropy(network(inputs), labels) / every
            loss.backward()
            if (batch + 1) % every == 0:
                clip_grad_norm_(network.parameters(), 0.2)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
        assert not torch.equal(module.seen[epoch], everything(network))  # the control
        with optimizer.unperturbed():
            assert torch.equal(module.seen[epoch], everything(network))
    with optimizer.unperturbed():
        assert torch.equal(everything(module.network), everything(network))


def test_a_one_pass_method_saves_true_weights_and_resumes_exactly(tmp_path):
    def make(base, module):
        return flatmin.MSAM(base, RHO)

    whole, second = Classifier(make), Classifier(make)
    weights = []

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                with trainer.optimizers[0].unperturbed():
                    weights.append(module.network.last.weight.detach().clone())

    fit(whole, SharpnessAwareCallback(), Save(), max_epochs=3)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    assert torch.equal(saved["network.last.weight"], weights[0])
    fit(second, SharpnessAwareCallback(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(everything(second.network), everything(whole.network))


def _make(name, rho=RHO):
    return lambda base, module: getattr(flatmin, name)(base, rho=rho)


@pytest.mark.parametrize("name", ["SAM", "MSAM"])
@pytest.mark.parametrize("first", ["callback", "average"])
def test_stochastic_weight_averaging_averages_true_weights(name, first):
    """Its last epoch computes running statistics for the average and trains nothing."""
    module, noting = Classifier(_make(name)), Noting()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1)
    callbacks = [SharpnessAwareCallback(), average]
    fit(module, noting, *(callbacks if first == "callback" else callbacks[::-1]), max_epochs=4)
    found = parameters_to_vector(module.network.parameters())
    torch.testing.assert_close(found, torch.stack(noting.at_start[:4]).mean(dim=0))  # it counts from 1
    hidden = module.network.first(torch.cat([inputs for inputs, _ in batches()]))
    torch.testing.assert_close(module.network.norm.running_mean, hidden.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert "on_train_epoch_start" not in vars(average)


@pytest.mark.parametrize("name", ["SAM", "MSAM"])
@pytest.mark.skipif(not hasattr(pl.callbacks, "WeightAveraging"), reason="comes with Lightning 2.6")
def test_a_moving_average_is_one_of_true_weights(name):
    module, noting = Classifier(_make(name)), Noting()
    average = pl.callbacks.EMAWeightAveraging(decay=0.5)
    start = parameters_to_vector(module.network.parameters()).detach().clone()
    fit(module, noting, SharpnessAwareCallback(), average, max_epochs=2)
    expected = noting.after_batch[0]  # torch's first update is a copy
    for weights in noting.after_batch[1:]:
        expected = 0.5 * expected + 0.5 * weights
    torch.testing.assert_close(parameters_to_vector(module.network.parameters()), expected)
    assert (expected - noting.after_batch[-1]).abs().max() > 1e-3  # the control: an average is not the last weights
    assert (expected - start).abs().max() > 1e-3
