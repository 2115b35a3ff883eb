"""The documentation tells the truth: examples run, links lead somewhere, public names are described."""

import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import tyro

from flatmin.train.measured.landscape_command import LandscapeArguments
from flatmin.train.measured.sharpness_command import SharpnessArguments
from flatmin.train.methods import METHOD_NAMES, default_rho

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = [
    "flatmin",
    "flatmin.optim",
    "flatmin.sharpness",
    "flatmin.compat",
    "flatmin.integrations.lightning",
    "flatmin.integrations.transformers",
    "flatmin.train.data",
    "flatmin.train.models",
]


def _python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")  # about loggers and workers
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, capsys):
    for block in _python_blocks(page):
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


def test_the_readme_example_is_on():
    """The control of the test above: the example is found, and its optimizer perturbs every step."""
    block, _ = _python_blocks(ROOT / "README.md")
    names = {}
    exec(block, names)
    diagnostics = names["optimizer"].diagnostics
    assert diagnostics.num_perturbed_steps == 10
    assert diagnostics.loss_rise > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_a_page_find_their_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert anchor in _anchors(page.parent / target if target else page), f"{page.name}: {target}#{anchor}"


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, f"{page.name} is not in docs/README.md"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_described(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{package}.{name} has no docstring"
            assert not inspect.getdoc(thing).startswith(f"{name}("), f"{package}.{name} has only a generated docstring"


@pytest.mark.parametrize("name", importlib.import_module("flatmin").__all__)
def test_public_optimizers_are_in_the_docs(name):
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/optimizers.md", "docs/methods.md"))
    assert re.search(rf"\b{name}\b", pages), f"{name} is in no page"


@pytest.mark.parametrize("name", importlib.import_module("flatmin.optim").__all__)
def test_public_pieces_are_in_the_docs(name):
    pages = "".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    assert re.search(rf"\b{name}\b", pages), f"{name} is in no page"


@pytest.mark.parametrize("package", ["flatmin.train.data", "flatmin.train.models"])
def test_public_networks_and_data_are_in_the_docs(package):
    page = (ROOT / "docs" / "training.md").read_text()
    for name in importlib.import_module(package).__all__:
        assert re.search(rf"\b{name}\b", page), f"{name} is not in docs/training.md"


@pytest.mark.parametrize("name", importlib.import_module("flatmin.sharpness").__all__)
def test_public_measures_are_in_the_docs(name):
    page = (ROOT / "docs" / "sharpness.md").read_text()
    assert re.search(rf"\b{name}\b", page), f"{name} is not in docs/sharpness.md"


COMMANDS_THAT_LOOK = {"sharpness": SharpnessArguments, "landscape": LandscapeArguments}


@pytest.mark.parametrize("command", COMMANDS_THAT_LOOK)
def test_commands_that_look_at_runs_are_shown_as_they_are(command):
    pages = "".join(page.read_text() for page in PAGES)
    shown = re.findall(rf"^flatmin {command} ([^#\n]*)", pages, flags=re.MULTILINE)
    assert len(shown) >= 3
    for line in shown:
        tyro.cli(COMMANDS_THAT_LOOK[command], args=line.split())
    page = (ROOT / "docs" / "sharpness.md").read_text()
    named = set(re.findall(r"`--([a-z-]+)", page[page.index("## From the command line") :]))
    fields = {field.name.replace("_", "-") for one in COMMANDS_THAT_LOOK.values() for field in dataclasses.fields(one)}
    assert named - {"keep-epochs"} <= fields


def test_every_method_has_a_card_with_measured_cost():
    text = (ROOT / "docs" / "methods.md").read_text()
    result = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text())
    measured = result["cases"]["methods"]["facts"]["methods"]
    cards = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", text, flags=re.MULTILINE | re.DOTALL))
    for method, name in METHOD_NAMES.items():
        if method == "sgd":
            continue
        passes, seconds = measured[method]["passes_per_step"], measured[method]["relative_time"]
        assert f"- cost: {passes:.2f} passes, {seconds:.2f} × SGD; copies: " in cards[name], name
        assert f"`flatmin.{name}`" in cards[name], name
        for part in ("\n    ", "\n- radius: ", "\n- when: ", "\n- reported: ", "\n- own: "):
            assert part in cards[name], f"{name} has no {part.strip()}"
        assert f"default {default_rho(method):g}" in cards[name], f"the card of {name} has another default"
