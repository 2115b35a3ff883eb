"""Every recipe is complete, says what it replicates, and runs."""

import re
import shlex
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import timm
import torch
from layouts import FLOWERS_LISTS, write_layouts
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets

from flatmin.train.arguments import config_from_arguments
from flatmin.train.cli import COMMANDS
from flatmin.train.config import Method, TrainConfig
from flatmin.train.data import ImageSet, catalogue, dataset_facts
from flatmin.train.data.image_file import write_image_file
from flatmin.train.facts import is_file_set
from flatmin.train.label_file import write_labels
from flatmin.train.loop import train
from flatmin.train.methods import has_loss_rise
from flatmin.train.models import build_model
from flatmin.train.recipes import RECIPES, Result, find_recipe, recipe_config
from flatmin.train.recipes.cost import MULTIPLY_ADDS
from flatmin.train.recipes.table_1 import NUM_IMAGES
from flatmin.train.sweep.arguments import SweepArguments, made_plan

METHODS: tuple[Method, ...] = get_args(Method)

# The smallest network of each family, for a CPU; everything else of a recipe stays as it is.
SMALLEST = {
    r"small-cnn": "small-cnn",
    r"wrn-.*": "wrn-10-1",
    r"resnet-.*": "resnet-8",
    r"shake-shake-.*": "shake-shake-8-2x2d",
    r"pyramidnet-272-200": "pyramidnet-11-3",
    r"pyramidnet-272-200-shakedrop": "pyramidnet-11-3-shakedrop",
    r"resnet\d+": "timm/test_resnet",
    r"efficientnet-.*": "timm/test_efficientnet",
}


@pytest.mark.parametrize("method", METHODS)
def test_recipes_fit_their_names_and_every_method(method: Method) -> None:
    for name in RECIPES:
        config = recipe_config(name, method)
        assert (config.recipe, config.method) == (name, method)
        assert (config.rho == 0.0) == (method == "sgd")


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_what_it_replicates_expects_and_costs(name: str) -> None:
    recipe = RECIPES[name]
    for part in (recipe.summary, recipe.replicates, recipe.expects, recipe.costs):
        assert part.endswith(".")
    assert not recipe.remark or recipe.remark.endswith(".")
    assert recipe.config() == recipe.config(recipe.method)


def test_a_perturbation_for_the_whole_batch_is_no_matter_of_words_alone():
    """The recipe of the script once said so, and had micro-batches."""
    whole = [
        recipe for recipe in RECIPES.values() if "One perturbation" in recipe.remark and "--micro" not in recipe.remark
    ]
    assert {"cifar10-batch-128", "cifar10-second-order"} <= {recipe.name for recipe in whole}
    assert all(recipe.config().micro_batch is None for recipe in whole)
    assert RECIPES["cifar10"].config().micro_batch == 32  # control
    script = RECIPES["cifar10-batch-128"].config()  # as its train.py and data.py have it
    assert (script.padding_mode, script.nesterov, script.gradient_clipping) == ("zeros", False, 0.0)


def test_what_a_remark_reports_is_about_its_own_data_set():
    """The number that others report for CIFAR-10 once stood with CIFAR-100 too."""
    reported = [
        (float(low), float(high), recipe.expected["sam"].value)
        for recipe in RECIPES.values()
        for low, high in re.findall(r"reported to give ([\d.]+) to ([\d.]+) %", recipe.remark)
    ]
    assert reported
    assert all(low < 2 * printed and printed < 2 * high for low, high, printed in reported)


def test_every_row_of_the_papers_tables_has_a_recipe() -> None:
    tables = Counter(match[0] for recipe in RECIPES.values() if (match := re.search(r"Table \d+", recipe.replicates)))
    rows = {
        "Table 1": 5 * 3 * 2,  # networks, augmentations, data sets
        "Table 2": 3 * 3,
        "Table 3": 9 * 2,
        "Table 4": 1 + 4 * 4,  # digits, its small copy; four rows with a recipe, SAM's being SGD's too, at four levels
        "Table 5": 1 + 4 * 2,  # fashion-mnist, its small copy
        "Table 8": 4,
        "Table 9": 3 * 2,  # those that say something of their own
        "Table 11": 2,
    }
    assert tables == rows


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("cifar10", {"sam": (2.7, 0.1), "sgd": (3.5, 0.1)}),
        ("cifar100-pyramidnet", {"sam": (14.6, 0.4), "sgd": (19.7, 0.3)}),
        ("imagenet-resnet152-400", {"SAM top-1": (18.4, 0.01), "SGD top-5": (5.84, 0.07)}),
        ("food-101-efficientnet-l2", {"sam": (3.82, 0.01), "sgd": (3.97, 0.03)}),
        ("cifar10-noise-60-bootstrap", {"sam": (91.8, None)}),
        ("svhn-shake-shake-aa", {"sam": (1.07, 0.02), "sgd": (1.03, 0.02)}),
        ("cifar100-inner-steps", {"ascent_steps 5": (16.6, 0.06)}),
    ],
)
def test_expected_results_are_the_papers(name: str, cells: dict[str, tuple[float, float | None]]) -> None:
    expected = RECIPES[name].expected
    assert {key: (expected[key].value, expected[key].half_width) for key in cells} == cells


def test_sam_is_better_in_every_row_but_one() -> None:
    """A slip of a digit or of a column would most likely show here."""
    pairs = {
        name: (recipe.expected["sam"].value, recipe.expected["sgd"].value)
        for name, recipe in RECIPES.items()
        if {"sam", "sgd"} <= recipe.expected.keys()
    }
    worse = [n for n, (sam, sgd) in pairs.items() if (sam > sgd) != ("accuracy" in RECIPES[n].measure)]
    assert worse == ["svhn-shake-shake-aa"]
    assert len(pairs) > 60


@pytest.mark.parametrize("text", ["", "2.7 ± 0.1", "±.1", "2.7±", "a"])
def test_a_result_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"a result must look like 2\.7±\.1, got"):
        Result(text)


def test_cifar_recipes_are_the_papers_protocol() -> None:
    config = recipe_config("cifar10")
    tables_6_and_7 = {
        "model": "wrn-28-10",
        "epochs": 200,
        "batch_size": 256,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "rho": 0.05,
    }
    assert {name: getattr(config, name) for name in tables_6_and_7} == tables_6_and_7
    assert replace(recipe_config("cifar100"), recipe="cifar10", dataset="cifar10", rho=0.05) == config
    assert recipe_config("cifar100").rho == 0.1


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if "Table 3," in recipe.replicates])
def test_fine_tuning_takes_the_papers_number_of_steps(name: str) -> None:
    config = recipe_config(name)
    num_images = {"cifar10": NUM_IMAGES, "flowers": 2040, "food-101": 75_750}.get(config.dataset)
    if num_images is not None:
        steps = config.epochs * (num_images // config.batch_size)
        assert steps == pytest.approx(5000 * 1024 / config.batch_size, rel=0.01)


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must be one of those that flatmin recipes lists, such as cifar10.*, got cifar10-c"
    ):
        find_recipe("cifar10-c")


@pytest.mark.parametrize(
    "command", [command for recipe in RECIPES.values() for command in recipe.commands], ids=lambda text: text[8:70]
)
def test_commands_of_a_recipe_are_understood(command: str) -> None:
    program, name, *arguments = shlex.split(command.replace("RHO", "0.1"))
    assert (program, name in COMMANDS) == ("flatmin", True)
    if name == "train":
        config_from_arguments(arguments)
    elif name in ("relabel", "sharpness"):
        assert arguments[0].startswith("runs/")
    else:
        values = [(flag, value) for flag, value in pairwise(arguments) if flag.startswith("--")]
        each = tuple(value for flag, value in values if flag == "--each")
        grid = tuple(value for flag, value in values if flag == "--grid")
        (choices,) = (item.split("=")[1].split(",") for item in grid if item.split("=")[0] in each)
        assert len(made_plan(SweepArguments(grid=grid, each=each), arguments[:1], []).contenders) == len(choices)


@pytest.mark.parametrize(("model", "image_size"), MULTIPLY_ADDS)
def test_networks_of_the_recipes_cost_what_is_written(model: str, image_size: int) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        channels = 1 if image_size == 28 else 3
        build_model(model, 10, channels, image_size=image_size).eval()(torch.empty(1, channels, image_size, image_size))
    assert counter.get_total_flops() / 2 == pytest.approx(MULTIPLY_ADDS[model, image_size], rel=0.01)


def test_every_network_of_a_recipe_is_in_the_table_of_costs() -> None:
    models = {recipe.base.model for recipe in RECIPES.values()} - {"small-cnn"}
    assert models == {model for model, _ in MULTIPLY_ADDS}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set in small, and pretrained weights."""
    directory = tmp_path_factory.mktemp("data")
    for name in ("cifar10", "cifar100", "fashion-mnist"):
        write_image_file(directory / f"{name}.safetensors", tiny_images(name, num_extra=0))
    write_image_file(directory / "svhn-extra.safetensors", tiny_images("svhn", num_extra=8))
    write_layouts(directory)
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet").state_dict(), directory / "weights.safetensors")
    return directory


def tiny_images(name: str, num_extra: int) -> ImageSet:
    """24 training and 8 test images in the form of a data set."""
    facts = dataset_facts(name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32 + num_extra, *facts.image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.arange(len(images)) % facts.num_classes
    classes = tuple(f"class {index}" for index in range(facts.num_classes))
    return ImageSet(images[:-8], labels[:-8], images[-8:], labels[-8:], classes)


def smallest(config: TrainConfig, data_dir: Path, tmp_path: Path) -> TrainConfig:
    """``config`` with the smallest network of its family, small images and batches, and the files that it needs."""
    if config.dataset == "digits":
        return replace(config, dry_run=True, accelerator="cpu", threads=1)
    (model,) = (small for family, small in SMALLEST.items() if re.fullmatch(family, config.model))
    config = replace(
        config,
        model=model,
        batch_size=2 if config.pretrained else 4,
        micro_batch=None if config.micro_batch is None else 1 if config.pretrained else 2,
        image_size=None if config.image_size is None and not is_file_set(config) else 32,
        data_dir=data_dir,
        num_workers=0,
        dry_run=True,
        accelerator="cpu",
        threads=1,
    )
    if config.pretrained:
        config = replace(config, pretrained=False, weights=data_dir / "weights.safetensors")
    if config.train_labels is not None:
        labels = torch.arange(22 if config.eval_on == "validation" else 24) % 10
        config = replace(config, train_labels=tmp_path / "labels.safetensors")
        write_labels(config.train_labels, config, labels)
    return config


RUNS = [
    *((name, recipe.method) for name, recipe in RECIPES.items()),
    *((name, "sgd") for name in ("digits", "cifar10", "imagenet-resnet50-100", "flowers-efficientnet-b7")),
    ("cifar10", "asam"),
    *(("digits", method) for method in METHODS[2:]),
]


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_recipe_runs_dry(
    name: str, method: Method, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = smallest(recipe_config(name, method), data_dir, tmp_path)
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", FLOWERS_LISTS)
    if is_file_set(config) and config.dataset != "flowers":
        monkeypatch.setitem(catalogue.NUM_CLASSES, config.dataset, 2)
    facts = catalogue.CATALOGUE["svhn-extra"]
    monkeypatch.setitem(catalogue.CATALOGUE, "svhn-extra", replace(facts, num_extra=8))
    summary = train(config)
    assert (summary.steps, summary.complete) == (2, False)
    sees_both = has_loss_rise(method) and method != "latesam"  # which begins later
    assert (summary.loss_rise is not None) == sees_both
    assert not sees_both or summary.loss_rise != 0.0
    assert not summary.run_dir.exists()
