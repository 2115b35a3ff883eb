"""Data sharded over two processes measure as in one."""

import json
from pathlib import Path

import pytest
from known import smooth_network
from sharded_data import DATA, loss_on_points, measure_all, sharpness_of, with_buffers_of

from torchrun import output_of_two_processes

SCRIPT = Path(__file__).with_name("sharded_data.py")


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    output_of_two_processes(SCRIPT, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = measure_all(smooth_network(), DATA)
    for index, one in enumerate(alone):
        together, apart = first["together"][index], first["apart"][index]
        assert together["value"] == second["together"][index]["value"]
        assert together["value"] == pytest.approx(one["value"], rel=1e-9)
        assert apart["value"] != pytest.approx(one["value"], rel=1e-3)  # control: the shard by itself
        assert (one["settings"]["num_ranks"], together["settings"]["num_ranks"]) == (1, 2)
        for name in ("rises", "samples", "eigenvalues"):
            assert sorted(together.get(name, [])) == pytest.approx(sorted(one.get(name, [])), rel=1e-8)
    assert len(alone[5]["rises"]) == 7  # m-sharpness: the micro-batches of both ranks
    assert first["buffers"] == second["buffers"]  # those of the first rank, whatever a rank has of its own
    assert first["buffers"] == pytest.approx(sharpness_of(with_buffers_of(0), DATA), rel=1e-9)
    assert first["buffers"] != pytest.approx(sharpness_of(with_buffers_of(1), DATA), rel=1e-3)  # control
    assert first["refused"]  # though its own shard is finite: it must not wait for the other
    assert second["refused"]
    assert first["line"] == second["line"] == loss_on_points(smooth_network())
    points = [(tmp_path / f"line.{rank}").read_text().splitlines()[1:] for rank in range(2)]
    assert [len(lines) for lines in points] == [3, 2]  # each rank evaluated its share of the five
