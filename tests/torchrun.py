"""Two processes of one script, as ``torchrun`` starts them."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
COMMAND = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


def output_of_two_processes(*script: str | Path, timeout: float = 120) -> str:
    """What both wrote, together.

    Args:
        script: A file, or ``-m`` and a module, then its arguments; it may import what these tests may.
        timeout: Seconds after which they are ended.

    Raises:
        AssertionError: One of them failed.
    """
    done = subprocess.run(
        [sys.executable, *COMMAND, *map(str, script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
