"""Lightning's trainer takes the steps of a loop written by hand."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import LIGHTNING_WARNINGS, QUIET, RHO, Classifier, Noting, assert_same, by_hand, fit, half_precision
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector
from torch.utils.data import DataLoader

import flatmin
from by_hand import micro_batch_step, sam_step
from doors import everything
from flatmin.integrations.lightning import SharpnessAwareCallback
from problems import batches, tiny_network

pytestmark = LIGHTNING_WARNINGS


def test_plain_training_ends_elsewhere():
    """The control of all comparisons below."""
    weights, _ = by_hand()
    assert (by_hand(rho=0.0)[0] - weights).abs().max() > 0.01
    assert (by_hand(clip=partial(clip_grad_norm_, max_norm=0.2))[0] - weights).abs().max() > 0.01


def test_the_callback_makes_it_the_loop_by_hand():
    module = Classifier()
    trainer = fit(module, SharpnessAwareCallback())
    weights, losses = by_hand()
    assert_same(module, weights)
    torch.testing.assert_close(torch.stack(module.losses), torch.stack(losses))
    optimizer = trainer.optimizers[0]
    assert trainer.global_step == len(module.hooks) == optimizer.diagnostics.num_perturbed_steps == 12
    assert optimizer.param_groups[0]["lr"] == 0.1 / 64


class Noted(Classifier):
    """Notes Lightning's hooks in the order in which they run."""

    def __init__(self):
        super().__init__()
        self.order = []

    def training_step(self, *args):
        self.order.append("forward")
        return super().training_step(*args)

    def on_before_zero_grad(self, optimizer):
        self.order.append("zero_grad")

    def on_before_backward(self, loss):
        assert all(param.grad is None for param in self.network.parameters())
        self.order.append("backward")

    def on_before_optimizer_step(self, optimizer):
        self.order.append("step")


def test_both_passes_clear_gradients_before_the_backward_pass():
    module = Noted()
    fit(module, SharpnessAwareCallback(), max_epochs=1)
    assert module.order == [*("forward", "zero_grad", "backward") * 2, "step"] * 6


def test_configure_optimizers_alone_is_enough():
    module = Classifier(lambda base, module: flatmin.SAM(base, RHO, model=module.trainer.model))
    fit(module)
    assert_same(module, by_hand()[0])


def test_the_older_package_takes_the_callback():
    import pytorch_lightning as older  # noqa: PLC0415 - takes seconds

    class Older(older.LightningModule):
        def __init__(self, make):
            super().__init__()
            self.network, self.make = tiny_network(), make

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return self.make(torch.optim.SGD(self.network.parameters(), lr=0.1, momentum=0.9), rho=RHO)

    trainer = fit(Older(flatmin.SAM), SharpnessAwareCallback(), package=older, max_epochs=1)
    assert trainer.optimizers[0].diagnostics.num_perturbed_steps == 6
    assert trainer.callback_metrics["SAM/loss_rise"] > 0
    module, noting = Older(flatmin.MSAM), Noting()
    average = older.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    fit(module, noting, SharpnessAwareCallback(), average, package=older)
    torch.testing.assert_close(parameters_to_vector(module.parameters()), torch.stack(noting.at_start[:2]).mean(dim=0))


def test_later_passes_log_nothing():
    module, plain = Classifier(), Classifier(lambda base, module: base)
    logged = fit(module, SharpnessAwareCallback(), max_epochs=1).callback_metrics
    torch.testing.assert_close(logged["loss_epoch"], torch.stack(module.losses).mean())
    twice = fit(Classifier(), max_epochs=1).callback_metrics  # the control: the mean over both passes
    assert abs(twice["loss_epoch"] - logged["loss_epoch"]) > 0.01
    zero = Classifier(lambda base, module: flatmin.SAM(base, 0.0))
    with_zero = fit(zero, SharpnessAwareCallback(log_diagnostics=False), max_epochs=1).callback_metrics
    assert with_zero == fit(plain, max_epochs=1).callback_metrics


def test_diagnostics_are_logged():
    make = partial(flatmin.SAM, rho=RHO, diagnostics=True)
    logged = fit(Classifier(lambda base, module: make(base)), SharpnessAwareCallback(), max_epochs=1).callback_metrics
    assert logged["SAM/perturbation_norm"] == pytest.approx(RHO, rel=1e-5)
    assert logged["SAM/num_perturbed_steps"] == 6
    assert logged["SAM/loss_rise"] > 0
    assert 0 < logged["SAM/cosine"] < 1


@pytest.mark.parametrize(
    ("options", "clip"),
    [
        ({"gradient_clip_val": 0.2}, partial(clip_grad_norm_, max_norm=0.2)),
        (
            {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
            partial(clip_grad_value_, clip_value=0.02),
        ),
    ],
    ids=["norm", "value"],
)
def test_clipping_acts_on_the_gradient_to_follow(options, clip):
    module = Classifier()
    fit(module, SharpnessAwareCallback(), **options)
    assert_same(module, by_hand(clip=clip)[0])
    assert all(type(optimizer) is torch.optim.SGD for optimizer in module.hooks)


@pytest.mark.parametrize("shared", [False, True], ids=["each micro-batch", "shared"])
@pytest.mark.parametrize("every", [2, 4])  # with 4 the epoch ends on a group of two
def test_accumulation_is_the_loop_by_hand(every, shared):
    module = Classifier()
    callback = SharpnessAwareCallback(shared_perturbation=shared)
    trainer = fit(module, callback, accumulate_grad_batches=every, gradient_clip_val=0.2)
    step, clip = sam_step if shared else micro_batch_step, partial(clip_grad_norm_, max_norm=0.2)
    weights, losses = by_hand(step, every=every, clip=clip)
    assert_same(module, weights)
    torch.testing.assert_close(torch.stack(module.losses), torch.stack(losses))
    assert trainer.global_step == len(module.hooks) == {2: 6, 4: 4}[every]
    other = by_hand(micro_batch_step if shared else sam_step, every=every, clip=clip)[0]
    assert (other - weights).abs().max() > 1e-3  # the control: the two meanings differ


def test_accumulation_without_the_callback_is_an_error():
    """Lightning's closure for the last micro-batch would lose the gradients of those before it."""
    module = Classifier()
    weights = [param.detach().clone() for param in module.network.parameters()]
    with pytest.raises(RuntimeError, match="accumulate_grad_batches needs .*SharpnessAwareCallback"):
        fit(module, accumulate_grad_batches=2)
    assert all(map(torch.equal, module.network.parameters(), weights))


def test_accumulation_of_a_one_pass_method_needs_no_callback():
    found = []
    for callbacks in ([], [SharpnessAwareCallback()]):
        module = Classifier(lambda base, module: flatmin.MSAM(base, RHO))
        trainer = fit(module, *callbacks, accumulate_grad_batches=2)
        with trainer.optimizers[0].unperturbed():
            found.append(everything(module.network))
    torch.testing.assert_close(*found)
    module = Classifier(lambda base, module: flatmin.MSAM(base, RHO))
    trainer = fit(module)  # the control: every batch makes a step
    with trainer.optimizers[0].unperturbed():
        assert (everything(module.network) - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("with_callback", [True, False])
def test_bfloat16_with_clipping(with_callback):
    module = Classifier(lambda base, module: flatmin.SAM(base, RHO, model=module.trainer.model))
    callbacks = [SharpnessAwareCallback()] if with_callback else []
    fit(module, *callbacks, precision="bf16-mixed", gradient_clip_val=0.2)
    weights, _ = by_hand(autocast=torch.bfloat16, clip=partial(clip_grad_norm_, max_norm=0.2))
    assert_same(module, weights, atol=2e-3)
    assert module.dtypes == {torch.bfloat16}


@pytest.mark.parametrize("every", [1, 2])
def test_float16_with_clipping(every):
    module = Classifier()
    options = {"gradient_clip_val": 0.2, "accumulate_grad_batches": every}
    fit(module, SharpnessAwareCallback(), plugins=[half_precision(1024.0)], **options)
    step = micro_batch_step if every > 1 else sam_step
    weights, _ = by_hand(step, every=every, autocast=torch.float16, clip=partial(clip_grad_norm_, max_norm=0.2))
    assert_same(module, weights, atol=5e-4)
    assert module.dtypes == {torch.float16}


def test_float16_steps_back_after_an_overflow():
    module = Classifier()
    plugin = half_precision(2.0**26)
    trainer = fit(module, SharpnessAwareCallback(), plugins=[plugin])
    skipped = trainer.optimizers[0].diagnostics.num_skipped_steps
    assert skipped > 0
    assert plugin.scaler.get_scale() == 2.0 ** (26 - skipped)
    assert trainer.optimizers[0].param_groups[0]["num_steps"] == 12 - skipped == len(module.hooks)
    assert everything(module.network).isfinite().all()


def test_float16_without_the_callback_is_an_error_that_names_the_page():
    with pytest.raises(RuntimeError, match=r"step\(\) came without a second pass.*docs/trainers\.md"):
        fit(Classifier(), plugins=[half_precision(1024.0)])


def test_resuming_is_exact(tmp_path):
    whole, first, second = Classifier(), Classifier(), Classifier()
    fit(whole, SharpnessAwareCallback(), max_epochs=3)
    fit(first, SharpnessAwareCallback(), max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    trainer = fit(second, SharpnessAwareCallback(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(everything(second.network), everything(whole.network))
    assert trainer.global_step == 18
    assert trainer.optimizers[0].param_groups[0]["num_steps"] == 18


def test_an_optimizer_that_is_not_sharpness_aware_is_refused():
    with pytest.raises(TypeError, match=r"must return a flatmin.SharpnessAware, .* got \['SGD'\]"):
        fit(Classifier(lambda base, module: base), SharpnessAwareCallback())


def test_bsam_goes_without_the_callback():
    def make(base, module):
        return flatmin.BSAM(module.network.parameters(), num_data=96, model=module.trainer.model)

    with pytest.raises(TypeError, match=r"got \['BSAM'\]"):
        fit(Classifier(make), SharpnessAwareCallback())
    assert fit(Classifier(make)).optimizers[0].diagnostics.num_perturbed_steps == 12


def test_an_exception_leaves_the_weights_at_home_and_the_trainer_as_it_was():
    class Failing(Classifier):
        def training_step(self, batch, batch_idx):
            if self.trainer.optimizers[0]._passes.progress.num_ascents and batch_idx == 1:
                raise KeyError
            return super().training_step(batch, batch_idx)

    module = Failing()
    trainer = pl.Trainer(max_epochs=1, callbacks=[SharpnessAwareCallback()], accumulate_grad_batches=2, **QUIET)
    weights = [param.detach().clone() for param in module.network.parameters()]
    with pytest.raises(KeyError):
        trainer.fit(module, DataLoader(batches(), batch_size=None))
    assert all(torch.equal(x, y) for x, y in zip(module.network.parameters(), weights, strict=True))
    assert "optimizer_step" not in vars(trainer.strategy.precision_plugin)
