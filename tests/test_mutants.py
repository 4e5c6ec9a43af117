"""Oracle of the oracles: the tests of kernels/ must notice every mistake that mutants.py lists."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("which", [[], ["--bfloat16"]], ids=["as listed", "bfloat16"])
def test_every_mistake_in_the_kernels_is_caught(which):
    """Each is made alone in a copy; a test that names it must fail, and must pass without it. Then those that float32
    shows, by the same tests in bfloat16."""
    script = Path(__file__).with_name("mutants.py")
    run = subprocess.run([sys.executable, str(script), *which], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
