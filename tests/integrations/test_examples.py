"""The examples run, and their optimizers are on."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def _run(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]()


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert all(example.name in tested for example in EXAMPLES.glob("*.py"))


def test_the_lightning_example_learns_and_perturbs_every_step():
    logged = _run("lightning_digits.py")
    assert logged["accuracy"] > 0.85
    assert logged["SAM/num_perturbed_steps"] == 3 * 24
    assert logged["SAM/loss_rise"] > 0


def test_the_transformers_example_learns_and_perturbs_its_adapters():
    whole, adapted = _run("transformers_lora.py")
    assert whole[-1]["loss"] < 0.7 * whole[0]["loss"]
    assert adapted[-1]["SAM/num_perturbed_steps"] == 6
    assert 0 < adapted[-1]["SAM/loss_rise"]


@pytest.mark.parametrize("name", ["accelerate_loop.py", "fabric_loop.py"])
def test_the_loops_of_the_examples_learn(name):
    losses = _run(name)
    assert len(losses) == 3
    assert losses[-1] < 0.7
