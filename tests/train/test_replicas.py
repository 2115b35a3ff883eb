"""Several processes train as one."""

import json
from pathlib import Path

from torchrun import output_of_two_processes

RANKS = """
import hashlib, sys, torch
from flatmin.train.cli import main
from flatmin.train.writer import RunWriter

finish = RunWriter.finish

def finish_and_compare(writer, state, metrics):
    weights = torch.cat([param.detach().flatten() for param in state.model.parameters()])
    digests = [None, None]
    torch.distributed.all_gather_object(digests, hashlib.sha256(weights.numpy().tobytes()).hexdigest())
    sys.stdout.write(f"DIGESTS {digests[0]} {digests[1]}\\n")  # at once, or the processes' words mix
    return finish(writer, state, metrics)

RunWriter.finish = finish_and_compare
flags = "--accelerator cpu --threads 1 --checkpoint-seconds 0 --epochs 2 --batch-size 432"
model = "--model wrn-10-1 --dropout 0.2 --ema-decay 0.5 --rho 0.2"
measured = "--sharpness-every 1 --sharpness-images 9 --sharpness-budget inf"
runs = (("resumed", "--max-steps 2"), ("resumed", ""), ("whole", ""), ("measured", measured))
for directory, limit in runs:
    arguments = f"train digits {flags} {model} --output-dir {sys.argv[1]}/{directory} {limit}"
    assert main(arguments.split()) == 0
torch.distributed.destroy_process_group()
"""


def test_two_processes_end_with_equal_weights_and_resume_exactly(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    output = output_of_two_processes(script, tmp_path)
    digests = [line.split()[1:] for line in output.splitlines() if line.startswith("DIGESTS")]
    assert len(digests) == 2 * 4  # one line of each process for each run
    assert all(first == second for first, second in digests)
    resumed, whole = ((tmp_path / run / "metrics.jsonl").read_text() for run in ("resumed", "whole"))
    assert resumed == whole
    assert len(whole.splitlines()) == 2
    measured = [json.loads(line) for line in (tmp_path / "measured" / "metrics.jsonl").read_text().splitlines()]
    assert all(record.pop("sharpness_worst_case") > 0.0 for record in measured)
    assert measured == [json.loads(line) for line in whole.splitlines()]
    assert digests[-2:] == digests[-4:-2]
    assert output.count("epoch 2/2") == 3  # only the first process talks
