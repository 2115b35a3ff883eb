"""The configuration refuses values outside their domain and survives a file."""

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from flatmin.train.config import TrainConfig
from flatmin.train.config_difference import differing_fields
from flatmin.train.config_file import config_to_yaml, load_config
from flatmin.train.schedule import learning_rate

REFUSED = [
    ("rho", -1.0, "rho must be >= 0, got -1.0"),
    ("rho", math.nan, "rho must be >= 0, got nan"),
    ("rho", math.inf, "rho must be finite, got inf"),
    ("lr", math.nan, "lr must be >= 0, got nan"),
    ("momentum", -0.1, "momentum must be >= 0, got -0.1"),
    ("weight_decay", -1e-4, "weight_decay must be >= 0, got -0.0001"),
    ("gradient_clipping", -1.0, "gradient_clipping must be >= 0, got -1.0"),
    ("checkpoint_seconds", -1.0, "checkpoint_seconds must be >= 0, got -1.0"),
    ("rho_min", -1.0, "rho_min must be >= 0, got -1.0"),
    ("method_options", {"p": 0.5}, "method.p must be >= 1, got 0.5"),
    ("method_options", {"eta": 1.0}, "method.eta must belong to method sam, whose options are p, direction, got 1.0"),
    ("rho_schedule", "linear", "rho_schedule must be one of constant, lr, warmup, cosine, got 'linear'"),
    ("rho_schedule", "warmup", "rho_schedule warmup needs warmup_epochs > 0, got warmup_epochs 0.0"),
    ("seed", -1, "seed must be >= 0, got -1"),
    ("warmup_epochs", 60.0, "warmup_epochs must be < epochs \\(60\\), got 60.0"),
    ("epochs", 0, "epochs must be >= 1, got 0"),
    ("epochs", 2.5, "epochs must be of type int, got 2.5"),
    ("epochs", "3", "epochs must be of type int, got '3'"),
    ("epochs", None, "epochs must be of type int, got None"),
    ("epochs", True, "epochs must be of type int, got True"),
    ("batch_size", 64.0, "batch_size must be of type int, got 64.0"),
    ("max_steps", 1e4, "max_steps must be of type int, got 10000.0"),
    ("keep_epochs", (0, 1.5), "keep_epochs must be of type int, got 1.5"),
    ("seed", np.int64(1), r"seed must be of type int, got np\.int64\(1\)"),
    ("rho", np.float64(0.5), r"rho must be of type float, got np\.float64\(0\.5\)"),
    ("lr", "0.1", "lr must be of type float, got '0.1'"),
    ("batch_size", 0, "batch_size must be >= 1, got 0"),
    ("ascent_steps", 0, "ascent_steps must be >= 1, got 0"),
    ("eval_every", 0, "eval_every must be >= 1, got 0"),
    ("progress_steps", 0, "progress_steps must be >= 1, got 0"),
    ("num_nodes", 0, "num_nodes must be >= 1, got 0"),
    ("max_steps", 0, "max_steps must be >= 1, got 0"),
    ("max_eval_batches", 0, "max_eval_batches must be >= 1, got 0"),
    ("threads", 0, "threads must be >= 1, got 0"),
    ("micro_batch", 0, "micro_batch must be >= 1, got 0"),
    ("micro_batch", 33, "micro_batch must divide batch_size, 64, got 33"),
    ("sync", 0, "sync must be local, global or a number of devices >= 1, got 0"),
    ("sync", True, "sync must be local, global or a number of devices >= 1, got True"),
    ("sync", "4", "sync must be local, global or a number of devices >= 1, got 4"),
    ("augmentation", "flips", "augmentation must be none or some of basic, .*, joined by \\+, got 'flips'"),
    ("padding_mode", "edge", "padding_mode must be one of reflect, zeros, got 'edge'"),
    ("cutout_per", "epoch", "cutout_per must be one of image, batch, got 'epoch'"),
    ("cutout_length", -1, "cutout_length must be >= 0, got -1"),
    ("autoaugment_policy", "mnist", "autoaugment_policy must be one of cifar, svhn, imagenet, got 'mnist'"),
    ("autoaugment_scale", "new", "autoaugment_scale must be one of original, release, got 'new'"),
    ("randaugment_num_ops", -1, "randaugment_num_ops must be >= 0, got -1"),
    ("randaugment_level", math.nan, "randaugment_level must be >= 0, got nan"),
    ("mix_alpha", 0.0, "mix_alpha must be > 0 and finite, got 0.0"),
    ("label_smoothing", 1.0, "label_smoothing must be >= 0 and < 1, got 1.0"),
    ("num_train_images", 0, "num_train_images must be >= 1, got 0"),
    ("label_noise", 1.5, "label_noise must be >= 0 and < 1, got 1.5"),
    ("ema_decay", math.nan, "ema_decay must be >= 0 and < 1, got nan"),
    ("dropout", -0.5, "dropout must be >= 0 and < 1, got -0.5"),
    ("method", "adam", "method must be one of sgd, sam, asam, .* bsam, got 'adam'"),
    ("dataset", "mnist", "dataset must be one of .*, got 'mnist'"),
    ("weight_decay_in", "both", "weight_decay_in must be one of base, loss, decoupled, got 'both'"),
    ("model", "wrn-29-10", "model must be .*got 'wrn-29-10'"),
    ("devices", "two", "devices must be a count >= 1, a list of indices or auto, got two"),
    ("devices", "0", "devices must be a count >= 1, a list of indices or auto, got 0"),
    ("precision", "16-mixed", "precision 16-mixed is not supported yet: it needs loss scaling; use bf16-mixed"),
    ("momentum", 0.0, "nesterov needs momentum > 0, got momentum 0.0"),
    ("dropout", 0.1, "dropout must stay at its default for small-cnn: it belongs to wrn-D-W and timm/NAME, got 0.1"),
    ("pretrained", True, "pretrained must stay at its default for small-cnn"),
    ("drop_path", 1.0, "drop_path must be >= 0 and < 1, got 1.0"),
    ("pass_noise", "old", "pass_noise must be one of same, new, release, got 'old'"),
    ("schedule", "linear", "schedule must be one of cosine, exponential, step, constant, got 'linear'"),
    ("final_lr", 0.0, "final_lr must be > 0 and <= 1, got 0.0"),
    ("lr_factor", -0.1, "lr_factor must be >= 0, got -0.1"),
    ("lr_steps", (0.3, -0.6), "lr_steps must be >= 0, got -0.6"),
    ("lr_steps", (0.3, math.nan), "lr_steps must be >= 0, got nan"),
    ("keep_epochs", (3, -1), "keep_epochs must be >= 0, got -1"),
    ("checkpoint_every", 0, "checkpoint_every must be >= 1, got 0"),
    ("num_checkpoints", 0, "num_checkpoints must be >= 1, got 0"),
    ("ema_start", -1, "ema_start must be >= 0, got -1"),
    ("optimizer", "adam", "optimizer must be sgd, rmsprop, adamw, torch/CLASS .* or timm/NAME .*, got 'adam'"),
    ("optimizer", "torch/Optimizer", "optimizer must be .* got 'torch/Optimizer'"),
    ("optimizer", "torch/LBFGS", "optimizer must be .* got 'torch/LBFGS'"),
    ("optimizer", "torch/no", "optimizer must be .* got 'torch/no'"),
    ("optimizer", "timm/no", "optimizer must be .* got 'timm/no'"),
    ("optimizer_options", "0.9", "optimizer_options must look like .* got '0.9'"),
    ("optimizer_options", "eps=print(1)", "optimizer_options must look like .* got"),
    ("optimizer_options", "lr=1", "optimizer_options must not set lr, which has a flag of its own, got 'lr=1'"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_value_outside_its_domain_is_refused_by_name(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(TrainConfig(), **{name: value})


def test_average_of_weights_in_bfloat16_is_refused() -> None:
    with pytest.raises(ValueError, match="ema_decay needs weights wider than bfloat16"):
        TrainConfig(ema_decay=0.9, precision="bf16-true")


@pytest.mark.parametrize("method", ["msam", "adaptivemsam", "bsam"])
def test_a_perturbation_that_all_devices_share_cannot_be_local(method: str) -> None:
    with pytest.raises(ValueError, match=f"method {method} needs sync global: all devices share .* got local"):
        TrainConfig(method=method, sync="local")
    assert TrainConfig(method=method, sync="global").sync == "global"
    assert TrainConfig(method="sgd", sync="local").sync == "local"  # as a comparison with other methods gives it


def test_neutral_values_are_allowed() -> None:
    TrainConfig(rho=0.0, lr=0.0, weight_decay=0.0, momentum=0.0, nesterov=False, lr_factor=0.0)
    TrainConfig(method="asam", method_options={"p": math.inf, "eta": 0.0})
    TrainConfig(optimizer="rmsprop", momentum=0.0, lr_steps=(), keep_epochs=(0,), final_lr=1.0)


def test_every_field_has_a_line_of_help() -> None:
    source = Path(TrainConfig.__module__.replace(".", "/"))
    text = (Path(__file__).parents[2] / "src" / source.with_suffix(".py")).read_text()
    for field in fields(TrainConfig):
        line = text.index(f"\n    {field.name}: ")
        assert text[text.index("\n", line + 1) :].lstrip().startswith('"""'), field.name


def test_run_directory_is_named_by_recipe_method_and_seed() -> None:
    assert TrainConfig(recipe="digits", method="asam", seed=3).run_dir == Path("runs/digits-asam-3")
    assert TrainConfig(output_dir=Path("here")).run_dir == Path("here")


def test_file_holds_every_field_and_reads_back_equal(tmp_path: Path) -> None:
    config = TrainConfig(
        method_options={"p": math.inf},
        weight_decay=1e-5,
        output_dir=tmp_path,
        max_steps=7,
        threads=2,
        sync=4,
        micro_batch=8,
        nesterov=False,
        keep_epochs=(3, 30),
        lr_steps=(0.25,),
        optimizer="torch/Adam",
        optimizer_options="betas=(0.9, 0.95), eps=1e-6, amsgrad=True, weight_decay_is_far_from_short=1, and_so_on=2",
    )
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config
    assert {line.split(":")[0] for line in path.read_text().splitlines()} == {f.name for f in fields(TrainConfig)}


def test_file_written_by_hand_may_leave_out_fields_and_use_yaml_numbers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1\nweight_decay: 1e-3\ndevices: 2\nsync: global\noutput_dir: out\nmax_steps: null\n")
    config = load_config(path)
    assert config == TrainConfig(lr=1.0, weight_decay=1e-3, devices="2", sync="global", output_dir=Path("out"))
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1\nlearning: 2\nrate: 3", "has unknown fields: learning, rate"),
        ("lr: fast", "lr must be of type float, got 'fast'"),
        ("epochs: 1.5", "epochs must be of type int, got 1.5"),
        ("epochs: true", "epochs must be of type int, got True"),
        ("epochs: null", "epochs must be of type int, got None"),
        ("wandb: 1", "wandb must be of type bool, got 1"),
        ("wandb: 'no'", "wandb must be of type bool, got 'no'"),
        ("keep_epochs: 3", "keep_epochs must be a list, got 3"),
        ("keep_epochs: [3, x]", "keep_epochs must be of type int, got 'x'"),
        ("recipe: [a]", "recipe must be of type str, got \\['a'\\]"),
        ("method: 3", "method must be one of sgd, sam, asam, .* bsam, got 3"),
        ("rho: -1", "rho must be >= 0, got -1.0"),
        ("- a\n- b", "must map field names to values, got list"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_broken_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_fields_that_alter_no_number_do_not_count_as_different() -> None:
    config = TrainConfig()
    neutral = {"output_dir": Path("a"), "data_dir": Path("b"), "max_steps": 3, "checkpoint_seconds": 1.0}
    neutral |= {"checkpoint_every": 2, "num_checkpoints": 5, "keep_epochs": (1,)}
    assert differing_fields(config, replace(config, **neutral, wandb=True, wandb_project="p", progress_steps=1)) == []
    assert differing_fields(config, replace(config, lr=0.2, epochs=9)) == ["epochs 60 -> 9", "lr 0.1 -> 0.2"]


def test_learning_rate_rises_linearly_then_follows_half_a_cosine() -> None:
    rates = [learning_rate(step, peak=2.0, num_steps=8, num_warmup_steps=4) for step in range(9)]
    half_cosine = [1 + math.cos(math.pi * step / 4) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *half_cosine])
    assert rates[-1] == 0.0
    assert learning_rate(0, peak=2.0, num_steps=8) == 2.0


def test_exponential_schedule_falls_by_the_same_factor_in_every_step() -> None:
    rates = [learning_rate(step, peak=2.0, num_steps=200, schedule="exponential") for step in range(201)]
    # The release: lambda = -num_epochs / log(0.012), lr exp(-epoch / lambda); here 10 epochs of 20 steps.
    released = [2.0 * math.exp(-(step / 20) / (-10 / math.log(0.012))) for step in range(201)]
    assert rates == pytest.approx(released, rel=1e-12)
    assert rates[-1] == pytest.approx(0.024)
    warm = [learning_rate(step, peak=2.0, num_steps=6, num_warmup_steps=2, schedule="exponential") for step in range(7)]
    assert warm == pytest.approx([1.0, 2.0, 2.0, *(2.0 * 0.012 ** (i / 4) for i in (1, 2, 3, 4))])


def test_schedule_in_steps_drops_where_it_says() -> None:
    def rates(**options: int) -> list[float]:
        steps = {"schedule": "step", "drops": (0.3, 0.6, 0.8), "factor": 0.2}
        return [learning_rate(step, peak=1.0, num_steps=10, **steps, **options) for step in range(10)]

    assert rates() == pytest.approx([1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])
    assert rates(num_warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008])


def test_constant_schedule_stays_at_the_peak() -> None:
    assert {learning_rate(step, peak=0.3, num_steps=5, schedule="constant") for step in range(5)} == {0.3}
