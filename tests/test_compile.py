"""Every kernel compiles for A100, H100 and B200 without spills, within the shared memory, onto the tensor cores.

The oracle is NVIDIA's own assembler and disassembler, which the triton package brings: no GPU is needed. It runs in a
subprocess, since TRITON_INTERPRET=1, which the other kernel tests set, forbids compiling.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent


def run(code, tmp_path):
    """Runs code in a fresh Python that can compile, with an empty cache: nothing stale is read."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_no_launch_spills_or_misses_the_tensor_cores(tmp_path):
    """Every tile of the three generations, at 7 query heads per key/value head; `python -m bench.compile` compiles more
    geometries than there is time for here. The tiles were chosen with Triton 3.9; where another one allots registers
    otherwise (3.7.1: two tiles of sm_80), a few bytes of stack cost less than a smaller tile would."""
    out = run("""
import torch
from bench.compile import TUNED, compile_all, faults
found = compile_all((80, 90, 100), torch.bfloat16, TUNED)
print(len(found), *faults(found), sep="\\n")
""", tmp_path)
    n_found, *wrong = out.splitlines()
    if not triton.__version__.startswith("3.9."):
        few = re.compile(r": (8|16|24) bytes of stack and local memory$")
        wrong = [line for line in wrong if not few.search(line)]
    assert int(n_found) > 140 and not wrong, "\n".join(wrong)


def test_a_bad_tile_is_reported(tmp_path):
    """The control: 256 queries in 4 warps cannot stay in registers, nor 256 keys of 256 channels in shared memory; and
    a matrix product without a tensor-core instruction is noticed."""
    out = run("""
import dataclasses
import torch
from bench.compile import compiled, faults, launches

def retiled(launch, first, second):
    sizes = {"BLOCK_M": first, "BLOCK_N": second}
    options = dict(launch.options) | {"num_warps": 4, "num_stages": 3}
    return dataclasses.replace(launch, constants=tuple((k, sizes.get(k, v)) for k, v in launch.constants),
                               options=tuple(sorted(options.items())))

def forward(C):
    return [x for x in launches(80, torch.bfloat16, ((C, 7),)) if x.name == f"attention_fwd C={C}"][0]

spilling, large = retiled(forward(64), 256, 64), retiled(forward(256), 16, 256)
for launch in (spilling, large):
    print(*faults({(launch, 80): compiled(launch, 80)}), sep=" and ")
good = (128, 0, 1024, 8, 2)
print(faults({(spilling, 80): good}), faults({(spilling, 80): (*good[:3], 0, 2)}))
""", tmp_path)
    spilling, large, by_hand = out.splitlines()
    assert "bytes of stack and local memory" in spilling, out
    assert "bytes of shared memory, 163 KB exist" in large, out
    assert by_hand.startswith("[] ['sm_80 attention_fwd C=64, 256x64 4w 3s: no HMMA instruction']"), out
