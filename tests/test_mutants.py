"""Oracle of the oracles: the tests of kernels/ must notice every mistake that mutants.py lists."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("options", [["--every", "8"], *([pytest.param(x, marks=pytest.mark.long) for x in
                                                          ([], ["--bfloat16"])])], ids=" ".join)
def test_every_mistake_in_the_kernels_is_caught(options):
    """Each is made alone in a copy; a test that names it must fail, and must pass without it. All of them take three
    minutes, and so do those that float32 shows, made once more with the tests in bfloat16."""
    script = Path(__file__).with_name("mutants.py")
    run = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
