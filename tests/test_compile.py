"""Every kernel compiles for A100, H100 and B200 without spills in a loop, within the shared memory, onto the tensor
cores; its loops' copies overlap products, and ptxas serializes nothing.

The oracle is NVIDIA's own assembler and disassembler, which the triton package brings: no GPU is needed. It runs in a
subprocess, since TRITON_INTERPRET=1, which the other kernel tests set, forbids compiling.
"""

import os
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


def test_the_main_tiles_have_no_fault(tmp_path):
    """Heads of 128 channels, 7 query heads per key/value head: all kernels for sm_90, attention's for sm_80 and sm_100
    too. `python -m bench.compile` compiles all tiles and more geometries: there is no time for that here. The tiles
    were chosen with Triton 3.9; another one allots registers otherwise, so there only what is no matter of registers
    is looked at."""
    out = run("""
import torch
from bench.compile import compile_all, faults
found = compile_all((80, 100), torch.bfloat16, ((128, 7),), chosen=lambda launch: launch.name.startswith("attention"))
found |= compile_all((90,), torch.bfloat16, ((128, 7),))
print(len(found), sum(len(code.loops) for code in found.values()), *faults(found), sep="\\n")
""", tmp_path)
    n_found, n_loops, *wrong = out.splitlines()
    if not triton.__version__.startswith("3.9."):
        wrong = [line for line in wrong if "shared memory, " in line or "no loop with" in line]
    assert int(n_found) > 30 and int(n_loops) > 20 and not wrong, "\n".join([n_found, n_loops, *wrong])


def test_a_bad_tile_is_reported(tmp_path):
    """The control: 256 queries in 4 warps cannot stay in registers, 256 keys of 256 channels not in shared memory, and
    two stages of 128 keys overlap nothing on sm_90 (each copy is waited for as soon as it is issued). What ptxas says
    and a product without a tensor-core instruction are put in by hand."""
    out = run("""
import dataclasses
import torch
from bench.compile import compiled, faults, launches

def retiled(launch, *tile):
    rows, keys, warps, stages = tile
    sizes = {"BLOCK_M": rows, "BLOCK_N": keys}
    options = dict(launch.options) | {"num_warps": warps, "num_stages": stages}
    return dataclasses.replace(launch, constants=tuple((k, sizes.get(k, v)) for k, v in launch.constants),
                               options=tuple(sorted(options.items())))

def forward(C, cc):
    return [x for x in launches(cc, torch.bfloat16, ((C, 7),)) if x.name == f"attention_fwd C={C}"][0]

for launch, cc in ((retiled(forward(64, 80), 256, 64, 4, 3), 80), (retiled(forward(256, 80), 16, 256, 4, 3), 80),
                   (retiled(forward(128, 90), 128, 128, 8, 2), 90)):
    print(*faults({(launch, cc): compiled(launch, cc)}), sep=" and ")
launch = forward(128, 90)
code = compiled(launch, 90)
for changed in ({}, {"messages": ("C7515",)}, {"loops": ()}, {"spilled": 400}):
    print(faults({(launch, 90): dataclasses.replace(code, **changed)}))
launch = forward(128, 80)
code = compiled(launch, 80)
loop = code.loops[-1]
store = (loop.instructions[-1][0] + 16, "STS", "[R1], R2")
stores = dataclasses.replace(loop, instructions=loop.instructions + (store,))
print(faults({(launch, 80): code}), faults({(launch, 80): dataclasses.replace(code, loops=(stores,))}))
""", tmp_path)
    spilling, large, waiting, good, serialized, no_products, much, through_memory = out.splitlines()
    assert through_memory.startswith("[] [") and "weights go through shared memory" in through_memory, out
    assert "a loop with" in spilling and "instructions that spill" in spilling, out
    assert "bytes of shared memory, 163 KB exist" in large, out
    assert waiting.endswith("a loop that waits for the copies it has just started: its stages overlap nothing"), out
    label = "sm_90 attention_fwd C=128, 128x128 8w 3s: "
    assert good == "[]" and serialized == f"['{label}serialized products, ptxas says C7515']", out
    assert no_products == f"['{label}no loop with HGMMA']", out
    assert much == f"['{label}400 bytes of stack and local memory']", out


def test_a_loop_is_read_as_it_stands():
    """Oracle: by hand. Two copies a block, one block ahead: at the head of the loop two groups may be under way, so the
    wait is for copies issued before the last products; with none allowed under way it is for those just issued. Two of
    the ten instructions stand under the branch. What lies behind EXIT is no loop."""
    from bench.machine_code import loops

    text = """
        /*0000*/                   LDGDEPBAR ;                  /* 0x00 */
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;         /* 0x00 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0030*/              @!P0 BRA 0x60 ;
        /*0040*/                   FSEL R1, R1, -INF , !P1 ;
        /*0050*/                   ISETP.GE.AND P1, PT, R2, R3, PT ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
        /*0080*/                   LDGDEPBAR ;
        /*0090*/                   STL [R1], R2 ;
        /*00a0*/               @P2 BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*00d0*/                   BRA 0x60 ;
    """
    [loop] = loops(text)
    assert loop.mix == {"HGMMA": 1, "F32": 1, "INT": 1, "MUFU": 1, "copy": 1, "barrier": 2, "spill": 1, "other": 2,
                        "all": 10}
    assert loop.skipped == 2 and not loop.waits_for_own_copies
    [loop] = loops(text.replace("SB0, 0x1", "SB0, 0x0"))
    assert loop.waits_for_own_copies


def test_a_batch_of_another_size_compiles_nothing_anew(tmp_path):
    """Each kernel of the training step is compiled once for its geometry, whatever N is: on a GPU a step that compiles
    holds up all ranks for seconds. Oracle: Triton's own keys, with a compiler that makes nothing. The logits'
    gradients come in blocks of columns, of which the last one of an odd vocabulary is another kernel."""
    out = run("""
from collections import defaultdict
from unittest import mock
import torch
from triton.runtime.jit import JITFunction
import kernels
from bench.fake import fake_gpu
from kernels import logp
keys = defaultdict(set)

def note(self, key, *args):
    keys[self.__name__].add(key)
logp.GRADIENT_CHUNK = 2**13
with fake_gpu(), mock.patch.object(JITFunction, "_do_compile", note):
    for n in (1, 2, 7, 16, 33, 48, 100):
        x, delta = (torch.zeros(n, 64, requires_grad=True) for _ in range(2))
        weight, matrix = torch.zeros(64, requires_grad=True), torch.zeros(999, 64, requires_grad=True)
        target, table = torch.zeros(n, dtype=torch.int64), torch.zeros(n, 8)
        norm = torch.zeros(16, requires_grad=True)
        x = kernels.rope(x.view(n, 4, 16), table, table, norm, 1e-6, "triton").view(n, 64)
        total, normed = kernels.add_rms_norm(x, delta, weight, 1e-6, "triton")
        x = kernels.swiglu(total, normed, "triton")
        x = kernels.attention(*x.view(n, 4, 16).unbind(1)[0][:, None].expand(3, n, 1, 16).contiguous(),
                              torch.tensor([(0, n, -1)]), "triton").flatten(1).repeat(1, 4)
        for impl in ("triton", "invariant"):
            kernels.linear_logp(x, matrix, target, 1.0, impl)[0].sum().backward(retain_graph=True)
        kernels.linear(x, matrix, None, "invariant").sum().backward()
print(sorted((name, len(found)) for name, found in keys.items()))
""", tmp_path)
    counts = dict(eval(out))
    twice = {"_logp_fwd_kernel", "_logp_bwd_kernel"}  # for "triton" and "invariant"; whole and last blocks
    assert counts == {name: 2 if name in twice else 1 for name in counts}
    assert set(counts) >= twice | {"_logp_merge_kernel", "_linear_kernel", "_rms_norm_bwd_kernel", "_rope_bwd_kernel",
                                   "_swiglu_bwd_kernel", "_attention_bwd_kv_kernel"}
