"""The blocks of the page on many devices, run as it says."""

import re
from pathlib import Path

from torchrun import output_of_two_processes

PAGE = Path(__file__).parents[2] / "docs" / "many-devices.md"
CHECKS = """
for param in model.parameters():
    assert param.grad is not None
assert optimizer.diagnostics.num_perturbed_steps == 3
assert abs(float(optimizer.diagnostics.cosine)) <= 1
sys.stdout.write("page is done\\n")
"""


def test_the_page_runs_in_two_processes(tmp_path):
    blocks = re.findall(r"```python torchrun\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    script = tmp_path / "page.py"
    script.write_text("import sys\n" + "\n".join(blocks) + CHECKS)
    output = output_of_two_processes(script, timeout=300)
    assert output.count("page is done") == 2
