"""tests/gpu.sh, rehearsed on a CPU: it must not be broken on the day there is a GPU."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu.sh")


@pytest.mark.slow
def test_every_step_of_the_script_for_the_first_gpu_runs_on_a_cpu(tmp_path):
    done = subprocess.run([SCRIPT, "--rehearse", tmp_path], capture_output=True, text=True)
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 10 and all(" code 0 " in line for line in lines[1:]), lines
