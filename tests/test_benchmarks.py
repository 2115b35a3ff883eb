"""Every benchmark runs in its quick form, with a complete result; what is said of the times is what was measured."""

import json
import math
import platform
import re
import resource
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import compiled_step, networks, page, peers, record, timing
from benchmarks.record import Case, Options

QUICK = Options(quick=True)
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "sweep-overhead" else name  # it starts Ray
    for name in command.BENCHMARKS
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of what is compared with
def test_a_quick_run_is_complete(name):
    found = command.run(name, QUICK, "python -m benchmarks")
    assert found["cases"]
    assert list(record.problems_of(json.loads(json.dumps(found)))) == []
    for case in found["cases"].values():
        assert case["values"] or case["facts"]
        assert all(len(values) == len(next(iter(case["values"].values()))) for values in case["values"].values())


def test_a_result_with_a_hole_is_refused():
    """The control of the test above."""
    whole = command.record("x", "?", "x", QUICK, {"a": Case({"b": [1.0, 2.0]})})
    assert list(record.problems_of(whole)) == []
    assert list(record.problems_of({**whole, "commit": ""})) == ["no commit"]
    for case in (Case(), Case({"b": []}), Case({"b": [1.0, math.nan]}), Case(facts={"b": {"c": [math.inf]}})):
        with pytest.raises((ValueError, statistics.StatisticsError), match="complete|median"):
            command.record("x", "?", "x", QUICK, {"a": case})


def test_turns_alternate_and_warm_up_is_left_out():
    turns = []

    def contender(name):
        return lambda: turns.append(name) or float(len(turns))

    seconds = timing.interleaved({name: contender(name) for name in "ab"}, 4)
    assert "".join(turns) == "abbaabbaab"
    assert seconds == {"a": [4.0, 5.0, 8.0, 9.0], "b": [3.0, 6.0, 7.0, 10.0]}


def test_the_clock_runs_until_the_asked_device_has_finished(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", calls.append)
    assert timing.timed(lambda: calls.append("run"), "cuda:1")() > 0.0
    assert calls == ["cuda:1", "run", "cuda:1"]


@pytest.mark.parametrize("name", ["methods", "optimizer-step"])
def test_what_runs_on_a_cpu_alone_is_recorded_so(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", name, "--device", "cuda"])
    arguments = command.parsed()
    is_moved = name != "methods"
    assert command.device_of(name, arguments) == ("cuda" if is_moved else "cpu")
    assert ("--device cuda" in command.command_of(name, arguments)) == is_moved


FRESH_PAGES = """
import ctypes, resource, sys, torch
from benchmarks.memory import M_MMAP_THRESHOLD, keep_freed_memory

ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)  # larger blocks go back to the system at once
if "keep" in sys.argv:
    assert keep_freed_memory()
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2_000_000) for _ in range(6)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they like")
@pytest.mark.parametrize("argument", ["keep", "give-back"])
def test_freed_memory_is_kept_when_asked(argument):
    """48 MB in each turn: fresh pages again without it, the same ones with it."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", FRESH_PAGES, argument]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    pages = 48_000_000 / resource.getpagesize()
    assert (int(done.stdout) < pages / 10) == (argument == "keep")


def test_the_ratio_is_that_of_the_same_rounds():
    """A slow hour doubles both; the medians' ratio would be that of other rounds."""
    reference = [1.0, 2.0, 1.0, 4.0, 1.0]
    found = timing.ratio([3.0, 6.0, 3.0, 12.0, 3.3], reference)
    assert found.median == pytest.approx(3.0)
    assert found.low == pytest.approx(3.0)
    assert 3.0 <= found.high <= 3.3 + 1e-9


def test_the_interval_covers_the_median_of_repeated_measurements():
    """95 % of such intervals should hold the true median; 2.5 % of luck either way."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 31, generator=generator).exp()
    covered = [low <= 1.0 <= high for _, low, high in (timing.ratio(row.tolist(), [1.0] * 31) for row in draws)]
    assert statistics.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_a_peer_that_is_not_installed_is_skipped_and_said_so(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    model, batch = networks.network("small-mlp")
    steps, skipped = compiled_step.peers_of(model, batch, 1, QUICK)
    assert steps == {}
    assert "pytorch_optimizer not installed: pip install 'flatmin[bench]'" in skipped["pytorch_optimizer_sam"]
    assert "jax and optax not installed" in skipped["optax_sam"]


def test_jax_computes_the_same_network():
    jax = pytest.importorskip("jax", reason="needs the extra bench")
    model, (images, _) = networks.network("cnn")
    params = [jax.numpy.asarray(param.detach().numpy()) for param in model.parameters()]
    outputs = peers.jax_forward(jax, model, params, jax.numpy.asarray(images[:4].numpy()))
    torch.testing.assert_close(torch.tensor(outputs.tolist()), model(images[:4]).detach(), rtol=1e-4, atol=1e-5)


def test_the_ports_step_is_ours():
    pytest.importorskip("pytorch_optimizer", reason="needs the extra bench")
    (model, batch), (other, _) = networks.network("small-mlp"), networks.network("small-mlp")
    ours, theirs = compiled_step.sam_step(model, batch), peers.port_step(other, batch)
    before = [param.clone() for param in model.parameters()]
    for _ in range(3):
        ours()
        theirs()
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    assert not torch.equal(before[0], model[0].weight)


@pytest.mark.filterwarnings("ignore:'benchmarks.__main__' found in sys.modules:RuntimeWarning")
def test_the_command_writes_one_file_for_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "low-precision", "--quick", "--threads", "1", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks", run_name="__main__")
    assert ended.value.code == 0
    found = json.loads((tmp_path / "low_precision.json").read_text())
    assert found["command"] == "python -m benchmarks low-precision --threads 1 --quick"
    assert found["quick"]
    assert re.search(r"stochastic [\d.]+ \[", capsys.readouterr().out)
    assert command.is_up_to_date("low-precision", tmp_path) == (not record.commit().endswith("+"))
    assert not command.is_up_to_date("growth", tmp_path)


def test_the_page_says_what_the_results_say():
    """Run ``python -m benchmarks.page`` where this fails; it shows that no table was written by hand."""
    text = page.PAGE.read_text()
    assert page.filled(text, record.RESULTS) == text
    assert set(re.findall(r"<!-- ([a-z-]+) -->", text)) - {"end"} == set(page.TABLES)
    assert set(page.TABLES) | {"methods"} == set(command.BENCHMARKS)


def test_the_page_follows_a_result(tmp_path):
    """The control of the test above."""
    seconds = {"gradient": [1.0, 2.0, 1.0], "loop": [3.0, 6.0, 3.3], "compiled": [0.5, 1.0, 0.5]}
    case = Case(seconds, "gradient", facts={"threads": 1, "micro_batches": 16})
    found = record.record("micro-batches", "?", "python -m benchmarks micro-batches", QUICK, {"cnn": case})
    record.write_result(tmp_path, found)
    text = page.filled("before\n<!-- micro-batches -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert "old" not in text
    assert "| cnn | 1 | 16 | 1 s | 3.00 (3.00–3.30) | 0.50 (0.50–0.50) |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "`python -m benchmarks micro-batches` on " in text
    assert "Not measured yet" in page.filled("<!-- growth -->\n<!-- end -->", tmp_path)


def test_a_result_of_a_script_that_is_no_more_names_the_command_of_today():
    found = {"benchmark": "lanczos", "command": "python benchmarks/lanczos.py", "commit": "0123456789abcdef"}
    text = page.provenance({**found, "device": "a CPU", "versions": {"torch": "2.15.0"}})
    assert text.startswith("`python -m benchmarks lanczos`; these numbers are of commit 0123456789, where it was ")
    assert "`python benchmarks/lanczos.py`, on a CPU; torch 2.15.0; " in text


def test_results_of_a_trial_are_not_published():
    for path in record.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert not found.get("quick", False), f"{path.name} is of a quick run"
