"""The Trainer of transformers takes the steps of a loop written by hand."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import SequentialSampler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import flatmin
from by_hand import micro_batch_step, sam_step
from flatmin.integrations.transformers import SharpnessAwareMixin, SharpnessAwareTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # in PEFT
RHO = 0.1
OWN = ("sharpness_aware", "shared_perturbation", "optimizers")


def bert(dropout=0.1):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            pad_token_id=0,
        )
    )


def sentences(causal=False):
    """48 rows of 8 tokens; those of a language model are labels too, of which some do not count."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for index in range(48):
        tokens = torch.randint(3, 50, (8,), generator=generator)
        labels = torch.where(torch.arange(8) < 3 + index % 5, tokens, -100) if causal else tokens[0] % 3
        rows.append({"input_ids": tokens, "attention_mask": torch.ones(8, dtype=torch.int64), "labels": labels})
    return rows


class _Seed(TrainerCallback):
    """Every step draws its own dropout masks, also after a resume."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(100 + state.global_step)


def train(model, directory, trainer_class=SharpnessAwareTrainer, resume=None, scaler=None, **options):
    """Two epochs of six batches, in order."""
    settings = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    own = {
        name: options.pop(name) for name in ("sharpness_aware", "shared_perturbation", "optimizers") if name in options
    }
    if issubclass(trainer_class, SharpnessAwareMixin):
        own.setdefault("sharpness_aware", partial(flatmin.SAM, rho=RHO))
    arguments = TrainingArguments(output_dir=str(directory), **(settings | options))
    rows = sentences(causal=not isinstance(model, BertForSequenceClassification))
    trainer = trainer_class(model=model, args=arguments, train_dataset=rows, callbacks=[_Seed()], **own)
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    trainer.accelerator.scaler = scaler
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def by_hand(model, step=sam_step, rho=RHO, every=1, autocast=False, **options):
    """The same training; ``every`` batches make a step."""
    params = [param for param in model.parameters() if param.requires_grad]
    base = torch.optim.SGD(params, lr=0.1)
    rows = sentences(causal=not isinstance(model, BertForSequenceClassification))
    batches = [default_data_collator(rows[start : start + 8]) for start in range(0, 48, 8)]
    groups = [batches[start : start + every] for start in range(0, 6, every)] * 2
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda done: 1 - done / len(groups))
    model.train()

    def loss(batch, group):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        if logits.ndim == 2:
            return cross_entropy(logits, batch["labels"]) / len(group)
        num_tokens = sum((each["labels"][:, 1:] != -100).sum() for each in group)
        return (
            cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / num_tokens
        )

    losses = []
    for index, group in enumerate(groups):
        torch.manual_seed(100 + index)
        found = step(base, model, [partial(loss, batch, group) for batch in group], rho, **options)
        losses.append(torch.stack(found).sum())
        scheduler.step()
    return weights_of(model), torch.stack(losses)


def weights_of(model):
    return torch.cat([param.detach().flatten() for param in model.parameters()])


CLIP = partial(clip_grad_norm_, max_norm=0.1)


def test_it_is_the_loop_by_hand(tmp_path):
    trainer = train(model := bert(), tmp_path, max_grad_norm=0.1)
    weights, losses = by_hand(bert(), clip=CLIP)
    torch.testing.assert_close(weights_of(model), weights, rtol=1e-5, atol=1e-6)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor([entry["loss"] for entry in logs]), losses)
    assert logs[-1]["SAM/num_perturbed_steps"] == 12
    assert all(entry["SAM/loss_rise"] > 0 and entry["SAM/loss"] == pytest.approx(entry["loss"]) for entry in logs)
    plain = train(bert(), tmp_path, Trainer, max_grad_norm=0.1).model  # the control
    assert (weights_of(plain) - weights).abs().max() > 1e-3
    assert (by_hand(bert())[0] - weights).abs().max() > 1e-3


@pytest.mark.parametrize("shared", [False, True], ids=["each micro-batch", "shared"])
@pytest.mark.parametrize("every", [2, 4])  # with 4 the epoch ends on a group of two
def test_accumulation_is_the_loop_by_hand(tmp_path, every, shared):
    options = {"gradient_accumulation_steps": every, "shared_perturbation": shared, "max_grad_norm": 0.1}
    trainer = train(model := llama(), tmp_path, **options)
    step, other = (sam_step, micro_batch_step) if shared else (micro_batch_step, sam_step)
    weights, losses = by_hand(llama(), step, every=every, clip=CLIP)
    torch.testing.assert_close(weights_of(model), weights, rtol=1e-5, atol=1e-6)
    logged = [entry["SAM/loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(torch.tensor(logged), losses)
    assert (by_hand(llama(), other, every=every, clip=CLIP)[0] - weights).abs().max() > 1e-4  # the control


def test_bfloat16_is_the_loop_by_hand_under_autocast(tmp_path):
    train(model := llama(), tmp_path, bf16=True)
    weights, _ = by_hand(llama(), autocast=True)
    torch.testing.assert_close(weights_of(model), weights, rtol=1e-5, atol=1e-3)
    plain, _ = by_hand(llama(), rho=0.0, autocast=True)
    assert (plain - weights).abs().max() > 0.01  # the control


def test_a_gradient_scaler_changes_nothing_and_steps_back_after_an_overflow(tmp_path):
    train(model := bert(), tmp_path, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    torch.testing.assert_close(weights_of(model), by_hand(bert())[0], rtol=1e-5, atol=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-10)
    trainer = train(model := bert(), tmp_path, scaler=scaler)
    skipped = trainer.optimizer.optimizer.diagnostics.num_skipped_steps
    assert 0 < skipped < 12
    assert scaler.get_scale() == 2.0 ** (127 - 10 * skipped)
    assert weights_of(model).isfinite().all()


def test_without_radius_it_is_the_plain_trainer(tmp_path):
    options = {
        "optim": "adamw_torch_fused",
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
    }
    train(model := bert(), tmp_path, sharpness_aware=partial(flatmin.SAM, rho=0.0), **options)
    plain = train(bert(), tmp_path, Trainer, **options).model
    assert torch.equal(weights_of(model), weights_of(plain))


def test_resuming_is_exact(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 5}
    whole = train(bert(), tmp_path, **options)
    resumed = train(bert(), tmp_path / "other", resume=str(tmp_path / "checkpoint-5"), **options)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert resumed.optimizer.param_groups[0]["num_steps"] == 12
    assert resumed.optimizer.optimizer.diagnostics.num_steps == 7


def _with_adapters():
    torch.manual_seed(1)
    return get_peft_model(llama(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))


def test_only_the_adapters_are_perturbed(tmp_path):
    model = _with_adapters()
    frozen = {name: param.detach().clone() for name, param in model.named_parameters() if not param.requires_grad}
    seen = []

    def look(*_):
        params = dict(model.named_parameters())
        moved = {name for name, value in frozen.items() if not torch.equal(params[name], value)}
        adapter = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
        seen.append((moved, params[adapter].detach().clone()))

    model.register_forward_pre_hook(look)
    trainer = train(model, tmp_path, learning_rate=0.1)
    assert len(seen) == 24
    assert not any(moved for moved, _ in seen)
    assert not torch.equal(seen[0][1], seen[1][1])
    assert sum(map(len, (group["params"] for group in trainer.optimizer.param_groups))) == 4
    torch.testing.assert_close(weights_of(model), by_hand(_with_adapters())[0], rtol=1e-5, atol=1e-6)


class Reversed(Trainer):
    """Somebody's own trainer: labels are taken out of the batch, the loss is another."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        return cross_entropy(model(**inputs).logits, 2 - labels)


class SharpnessAwareReversed(SharpnessAwareMixin, Reversed):
    pass


def test_the_mixin_makes_any_trainer_sharpness_aware(tmp_path):
    model = bert()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = train(model, tmp_path, SharpnessAwareReversed, optimizers=(base, None))
    assert trainer.optimizer.optimizer.base is base
    assert trainer.optimizer.optimizer.diagnostics.num_perturbed_steps == 12
    assert (weights_of(model) - by_hand(bert())[0]).abs().max() > 1e-3  # the loss is theirs


class Failing(SharpnessAwareTrainer):
    """Its sixth pass, the second of the third batch, raises."""

    num_passes = 0

    def compute_loss(self, *args, **kwargs):
        self.num_passes += 1
        if self.num_passes == 6:
            raise KeyError
        return super().compute_loss(*args, **kwargs)


def test_an_exception_leaves_the_weights_at_home(tmp_path):
    with pytest.raises(KeyError):
        train(model := bert(), tmp_path, Failing, lr_scheduler_type="constant")
    expected = train(bert(), tmp_path, max_steps=2, lr_scheduler_type="constant").model
    assert torch.equal(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("made", [flatmin.SAM, lambda base: base], ids=["instance", "base"])
def test_what_makes_no_optimizer_of_ours_is_refused(tmp_path, made):
    model = bert()
    if made is flatmin.SAM:
        made = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"sharpness_aware must .*, got (SAM|SGD)"):
        train(model, tmp_path, sharpness_aware=made)


def test_a_base_with_modes_is_switched_by_the_trainer(tmp_path):
    modes = []

    class WithModes(torch.optim.SGD):
        def train(self):
            modes.append("train")

    model = bert()
    train(model, tmp_path, optimizers=(WithModes(model.parameters(), lr=0.1), None))
    assert modes.count("train") >= 12


def test_a_plain_trainer_with_our_optimizer_gets_an_error_that_names_the_page(tmp_path):
    model = bert()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"docs/trainers\.md"):
        train(model, tmp_path, Trainer, optimizers=(optimizer, None))


def test_a_one_pass_method_evaluates_saves_and_leaves_its_true_weights(tmp_path):
    seen = []

    class Looking(SharpnessAwareTrainer):
        def prediction_step(self, model, *args, **kwargs):
            seen.append(weights_of(model))
            return super().prediction_step(model, *args, **kwargs)

    momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    options = {"save_strategy": "steps", "save_steps": 5, "sharpness_aware": partial(flatmin.MSAM, rho=RHO)}
    model = bert()
    whole = train(model, tmp_path, Looking, optimizers=(momentum(model.parameters()), None), **options)
    left = weights_of(whole.model)
    whole.evaluate(whole.train_dataset[:1])
    assert torch.equal(seen[0], left)
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(weights_of(saved), left)
    model = bert()
    base = momentum(model.parameters())
    resume = str(tmp_path / "checkpoint-5")
    resumed = train(model, tmp_path / "other", resume=resume, optimizers=(base, None), **options)
    assert torch.equal(weights_of(resumed.model), left)
    assert whole.optimizer.optimizer.diagnostics.num_perturbed_steps == 11  # the first has no momentum yet
