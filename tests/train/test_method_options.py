"""Every method in training: its options, what it counts, and the weights that are evaluated, averaged and saved."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import nn

import flatmin
from flatmin.train.arguments import config_from_arguments
from flatmin.train.checkpoint import load_newest_checkpoint
from flatmin.train.cli import main
from flatmin.train.config import TrainConfig
from flatmin.train.config_difference import differing_fields
from flatmin.train.config_file import config_to_yaml, load_config
from flatmin.train.errors import TrainingError
from flatmin.train.journal import read_metrics
from flatmin.train.launch import make_fabric
from flatmin.train.loaders import make_loaders
from flatmin.train.loop import train
from flatmin.train.methods import (
    METHODS,
    Method,
    canonical_options,
    default_rho,
    option_flags,
    options_class,
    resolved_options,
)
from flatmin.train.optimizers import build_optimizer
from flatmin.train.recipes import recipe_config
from flatmin.train.state import TrainingState, fresh_model
from flatmin.train.step import take_step


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run of a second: 4 epochs of 5 steps."""
    return TrainConfig(
        epochs=4, batch_size=256, rho=0.1, label_noise=0.4, output_dir=tmp_path / "run", accelerator="cpu", threads=1
    )


def test_every_public_method_can_be_trained_with() -> None:
    classes = [thing for name in flatmin.__all__ if isinstance(thing := getattr(flatmin, name), type)]
    engines = (flatmin.SharpnessAware, flatmin.OnePass)
    named = {c.__name__.lower(): c for c in classes if issubclass(c, (*engines, flatmin.BSAM)) and c not in engines}
    assert named == METHODS
    assert set(get_args(Method)) == {"sgd", *METHODS}


def test_options_have_the_types_defaults_and_help_of_the_constructor() -> None:
    assert vars(options_class("looksam")()) == {"interval": 5, "alpha": 0.7, "layerwise": False}
    assert vars(options_class("sgd")()) == {}
    assert (default_rho("msam"), default_rho("sgd")) == (3.0, 0.0)
    for method in METHODS:
        for name, hint in options_class(method).__annotations__.items():
            (argument,) = hint.__metadata__
            assert argument.help, f"{method} says nothing about {name}"


def test_flags_of_the_method_are_typed_and_reach_the_optimizer() -> None:
    arguments = ["--method", "looksam", "--method.interval", "3", "--method.layerwise", "--method.alpha=0.2"]
    config = config_from_arguments(arguments)
    assert config.method_options == (("interval", 3), ("alpha", 0.2), ("layerwise", True))
    optimizer: Any = build_optimizer(config, fresh_model(config), num_batches=5)
    assert optimizer.when.interval == 3
    assert config_from_arguments(["--method", "looksam", *option_flags(config.method_options)]) == config
    assert config_from_arguments(["--method=bsam", "--method.betas", "0.5", "0.9"]).method_options == (
        ("betas", (0.5, 0.9)),
    )


def test_help_lists_the_options_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--method", "wsam", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--method.gamma FLOAT In [0, 1); 0 is the base alone, and 1/2 coupled is SAM." in text
    assert "--method.interval" not in text


def test_file_holds_every_option_and_reads_back_equal(tmp_path: Path) -> None:
    options = {"betas": [0.5, 0.9], "damping": 0.2}
    config = replace(recipe_config("digits", "bsam"), method_options=options)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config
    saved = yaml.safe_load(path.read_text())["method_options"]
    assert saved == {"betas": [0.5, 0.9], "damping": 0.2, "initial_precision": 1.0}
    assert hash(load_config(path)) == hash(config)
    path.write_text("method: gsam\nmethod_options: {alpha: 1}\n")
    assert load_config(path).method_options == (("alpha", 1.0),)
    path.write_text("method: gsam\nmethod_options: {alpha: one}\n")
    with pytest.raises(ValueError, match="method.alpha must be of type float, got 'one'"):
        load_config(path)


def test_options_that_equal_their_defaults_make_no_difference() -> None:
    config = TrainConfig(method="gsam", method_options={"alpha": 0.4})
    assert config == TrainConfig(method="gsam")
    other = replace(config, method_options={"alpha": 0.5})
    assert differing_fields(config, other) == ["method.alpha 0.4 -> 0.5"]
    assert resolved_options("gsam", other.method_options) == {"alpha": 0.5, "minimised": "perturbed"}
    assert canonical_options("gsam", {"minimised": "perturbed"}) == ()


PASSES = {
    "sgd": 1.0,
    "sam": 2.0,
    "msam": 1.0,
    "adaptivemsam": 1.0,
    "looksam": 1.2,
    "latesam": 1.15,  # the last 3 of 20 steps, 0.875 of which is 17.5, rounded to even
    "bsam": 2.0,
}


@pytest.mark.parametrize("method", PASSES)
def test_passes_are_counted_and_the_rise_is_that_of_perturbed_steps(config: TrainConfig, method: Method) -> None:
    fabric = make_fabric(config)
    config = replace(config, method=method)
    summary = train(config)
    records = read_metrics(config.run_dir)
    expected = 20 - round(0.875 * 20)
    share = {**PASSES, "latesam": 1 + expected / 20}[method]
    assert sum(r["passes_per_step"] for r in records) / 4 == pytest.approx(share)  # type: ignore[misc]
    rises = [record["loss_rise"] for record in records]
    if method == "latesam":
        assert rises[:3] == [None, None, None]
        assert rises[3] == pytest.approx(rise_by_hand(config, fabric), rel=1e-6)
    assert (summary.loss_rise is None) == (method in ("sgd", "msam", "adaptivemsam", "bsam"))


def rise_by_hand(config: TrainConfig, fabric: Any) -> float:
    """Mean of what the optimizer saw in the perturbed steps of the last epoch."""
    loaders = make_loaders(config, fabric)
    state = TrainingState.initial(config, fabric, len(loaders.train))
    rises = []
    for epoch in range(4):
        state.begin_epoch(epoch)
        for batch in loaders.train.epoch(epoch):
            take_step(config, fabric, state, batch)
            rises.append(state.optimizer.diagnostics.loss_rise)  # type: ignore[attr-defined]
    seen = [rise.item() for rise in rises[-5:] if rise is not None]
    assert 0 < len(seen) < 5
    return sum(seen) / len(seen)


def test_one_pass_method_evaluates_averages_and_saves_the_true_weights(config: TrainConfig) -> None:
    config = replace(config, method="msam", rho=2.0, ema_decay=0.5)
    fabric = make_fabric(config)
    loaders = make_loaders(config, fabric)
    state = TrainingState.initial(config, fabric, len(loaders.train))
    average: torch.Tensor | None = None
    for batch in loaders.train.epoch(0):
        take_step(config, fabric, state, batch)
        resting = flat(state.model)
        with state.true_weights():
            true = flat(state.model)
        average = true if average is None else 0.5 * average + 0.5 * true
        assert (resting - true).norm().item() == pytest.approx(2.0, rel=1e-4)
        assert torch.equal(flat(state.model), resting)
    assert state.ema is not None
    assert average is not None
    torch.testing.assert_close(flat(state.ema.module), average, rtol=1e-5, atol=1e-7)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def test_saved_weights_of_a_one_pass_method_are_those_that_were_evaluated(config: TrainConfig) -> None:
    config = replace(config, method="msam", rho=2.0, keep_epochs=(config.epochs,))
    summary = train(config)
    saved = load_newest_checkpoint(config.run_dir)
    assert saved is not None
    assert not any("true_weights" in entry for entry in saved["optimizer"]["state"].values())
    model = fresh_model(config)
    model.load_state_dict(saved["model"])
    images, labels = next(iter(make_loaders(config, make_fabric(config)).evaluation))
    with torch.no_grad():
        logits = model.eval()(images)
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert summary.eval_loss == pytest.approx(loss, rel=1e-6)
    kept = torch.load(config.run_dir / f"epoch-{config.epochs:06d}.pt", weights_only=True)["model"]
    assert all(torch.equal(kept[name], value) for name, value in saved["model"].items())


def test_sam_on_perturbs_the_norm_layers_alone(config: TrainConfig) -> None:
    config = replace(config, method="samon", rho=1.0, decay_norm_params=False)
    fabric = make_fabric(config)
    state = TrainingState.initial(config, fabric, num_batches=5)
    optimizer: Any = state.optimizer
    batch = next(make_loaders(config, fabric).train.epoch(0))
    names = {param: name for name, param in state.model.named_parameters()}
    moved: set[str] = set()
    before = {param: param.detach().clone() for param in names}

    def look(*_: object) -> None:
        moved.update(name for param, name in names.items() if not torch.equal(param, before[param]))

    state.model.register_forward_pre_hook(look)
    take_step(config, fabric, state, batch)
    assert moved == {name for name in names.values() if name.startswith(("features.1.", "features.5.", "features.9."))}
    assert moved
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[name] for name in moved} == {0.0}
    assert decays["head.weight"] == config.weight_decay


def test_network_that_a_method_does_not_suit_is_refused(config: TrainConfig) -> None:
    with pytest.raises(TrainingError, match="method samon does not suit the run: perturb must choose some parameter"):
        build_optimizer(replace(config, method="samon"), nn.Linear(2, 2), num_batches=5)
    with pytest.raises(TrainingError, match="method msam does not suit the run: base must have a first moment"):
        build_optimizer(replace(config, method="msam", momentum=0.0, nesterov=False), nn.Linear(2, 2), num_batches=5)


def test_run_tells_the_method_its_length_and_its_seed(config: TrainConfig) -> None:
    config = replace(config, epochs=6, seed=7)
    model = fresh_model(config)
    late: Any = build_optimizer(replace(config, method="latesam"), model, num_batches=8)
    assert [late.when(step) for step in (41, 42, 47)] == [False, True, True]  # from 0.875 of 48 on
    rst: Any = build_optimizer(replace(config, method="rst"), model, num_batches=8)
    assert rst.when.seed == 7
    bsam: Any = build_optimizer(replace(config, method="bsam", rho=0.02, lr=0.3), model, num_batches=8)
    assert (bsam.num_data, bsam.seed) == (8 * config.batch_size, 7)
    assert {(g["rho"], g["lr"], g["weight_decay"]) for g in bsam.param_groups} == {(0.02, 0.3, config.weight_decay)}


def test_radius_follows_its_schedule(config: TrainConfig) -> None:
    """Radii of the last step of each epoch, and the same after a resume."""
    plain = replace(config, rho=0.2, warmup_epochs=2.0, eval_every=4)

    def radii(schedule: Any, **more: Any) -> list[float]:
        case = replace(plain, rho_schedule=schedule, output_dir=config.run_dir / schedule, **more)
        train(replace(case, max_steps=12))
        train(case)
        return [record["rho"] for record in read_metrics(case.run_dir)]  # type: ignore[misc]

    assert radii("constant") == [0.2] * 4
    assert radii("warmup") == pytest.approx([0.2 * 4 / 10, 0.2 * 9 / 10, 0.2, 0.2])
    assert radii("cosine") == pytest.approx([0.1 * (1 + math.cos(math.pi * s / 20)) for s in (4, 9, 14, 19)])
    rates = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * s / 10)) for s in (4, 9))]
    assert radii("lr", rho_min=0.1) == pytest.approx([0.1 + 0.1 * rate for rate in rates])


def test_summary_of_every_method_is_json(config: TrainConfig) -> None:
    for method in ("msam", "aesam", "latesam"):
        run = replace(config, method=method, output_dir=config.run_dir / method, max_steps=1)
        train(run)
        assert json.loads((run.run_dir / "summary.json").read_text())["method"] == method
