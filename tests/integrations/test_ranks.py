"""Trainers on two processes take the steps of one process by hand, and both processes hold the same weights."""

from pathlib import Path

import pytest

from torchrun import output_of_two_processes

HERE = Path(__file__).parent


@pytest.mark.slow  # 20 to 50 s each on two shared cores, of which most is starting two processes
@pytest.mark.parametrize(("script", "num_results"), [("lightning_ranks.py", 5), ("trainer_ranks.py", 12)])
def test_two_processes_are_the_loop_by_hand(script: str, num_results: int) -> None:
    output = output_of_two_processes(HERE / script, timeout=300)
    results = [line.split()[1:] for line in output.splitlines() if line.startswith("RESULT")]
    assert len(results) == num_results
    for *_, weights_are_equal, error, control in results:
        assert weights_are_equal == "True"
        assert float(error) < 1e-6
        assert float(control) > 1e-3  # the other meaning of sync= or of accumulation ends elsewhere
