"""Lightning's trainer takes the steps of a loop written by hand."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parameters_to_vector
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import flatmin
from by_hand import micro_batch_step, sam_step
from doors import everything
from flatmin.integrations.lightning import SharpnessAwareCallback
from flatmin.integrations.true_weights import true_weights
from problems import batches, tiny_network

pytestmark = [
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


def _half_precision(init_scale):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=100))


@pytest.mark.parametrize("every", [1, 2])
def test_float16_with_clipping(every):
    module = Classifier()
    options = {"gradient_clip_val": 0.2, "accumulate_grad_batches": every}
    fit(module, SharpnessAwareCallback(), plugins=[_half_precision(1024.0)], **options)
    step = micro_batch_step if every > 1 else sam_step
    weights, _ = by_hand(step, every=every, autocast=torch.float16, clip=partial(clip_grad_norm_, max_norm=0.2))
    assert_same(module, weights, atol=5e-4)
    assert module.dtypes == {torch.float16}


def test_float16_steps_back_after_an_overflow():
    module = Classifier()
    plugin = _half_precision(2.0**26)
    trainer = fit(module, SharpnessAwareCallback(), plugins=[plugin])
    skipped = trainer.optimizers[0].diagnostics.num_skipped_steps
    assert skipped > 0
    assert plugin.scaler.get_scale() == 2.0 ** (26 - skipped)
    assert trainer.optimizers[0].param_groups[0]["num_steps"] == 12 - skipped == len(module.hooks)
    assert everything(module.network).isfinite().all()


def test_float16_without_the_callback_is_an_error_that_names_the_page():
    with pytest.raises(RuntimeError, match=r"step\(\) came without a second pass.*docs/trainers\.md"):
        fit(Classifier(), plugins=[_half_precision(1024.0)])


def test_resuming_is_exact(tmp_path):
    whole, first, second = Classifier(), Classifier(), Classifier()
    fit(whole, SharpnessAwareCallback(), max_epochs=3)
    fit(first, SharpnessAwareCallback(), max_epochs=2).save_checkpoint(tmp_path / "last.ckpt")
    trainer = fit(second, SharpnessAwareCallback(), max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(everything(second.network), everything(whole.network))
    assert trainer.global_step == 18
    assert trainer.optimizers[0].param_groups[0]["num_steps"] == 18


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
    trainer = fit(module, *callbacks, max_epochs=1, plugins=plugins and [_half_precision(*plugins)])
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
    plugins = plugins and [_half_precision(*plugins)]
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
