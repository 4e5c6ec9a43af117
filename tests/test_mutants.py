"""Oracle of the oracles: the tests of kernels/ must notice every mistake that mutants.py lists."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_every_mistake_in_the_kernels_is_caught():
    """Each is made alone in a copy; a test that names it must fail, and must pass without it. (`mutants.py --bfloat16`
    makes those that float32 shows once more, with the tests in bfloat16: a minute and a half by itself.)"""
    script = Path(__file__).with_name("mutants.py")
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
