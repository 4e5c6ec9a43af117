"""What all kernels share: how they are cut into tiles, and which devices run them."""

import functools
import math
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the kernels below stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=lambda x: x)
jit = triton.jit if triton else lambda f=None, **options: f or (lambda g: g)

POINTWISE = {"enable_fp_fusion": False}  # bound by memory: one rounding per operation costs nothing
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(math.log2(math.e))


def wide(dtype):
    """The dtype for sums, norms and softmax: float32, or float64 when the tensors are float64."""
    return torch.promote_types(dtype, torch.float32)


@functools.lru_cache
def runs_triton(device, dtype):
    """Whether the kernels can run there: on an NVIDIA GPU of 2020 or later, or in the interpreter if TRITON_INTERPRET=1
    was set before Python started; which multiplies the bit patterns of bfloat16, without an error."""
    if torch.device(device).type == "cuda":
        new_enough = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
        return bool(triton) and new_enough and dtype in (torch.float32, torch.float16, torch.bfloat16)
    return INTERPRETED and bool(triton) and dtype in (torch.float32, torch.float16)


def check_launch(*tensors):
    """What every launcher assumes: a device that runs Triton, one dtype, dense rows."""
    x = tensors[0]
    assert runs_triton(x.device, x.dtype), f"Triton does not run {x.dtype} on {x.device}, see runs_triton"
    assert not x.is_cuda or x.device.index == torch.cuda.current_device(), f"{x.device} is not the current device"
    for y in tensors:
        assert y.dtype == x.dtype, [t.dtype for t in tensors]
        assert y.device == x.device and y.stride(-1) == 1, (y.device, x.device, y.stride())


# How a kernel is cut: two block sizes, warps, pipeline stages; by operation and padded head size. Chosen so that
# nothing spills, the shared memory fits and every product is made of the generation's widest tensor-core instructions:
# bench/compile.py prints what each costs. 80, 90 and 100 are A100, H100 and B200; "small" are the cards of any of these
# generations with 99 KB of shared memory (RTX 30, 40, 50). The sizes are BLOCK_M and BLOCK_N (queries and keys), but
# BLOCK_N and BLOCK_V without a head size. An "invariant" tile serves training, prefill and decoding: they must agree.
GENERATIONS = (80, 90, 100, "small")
TILES = {
    ("attention_fwd", 32): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("attention_fwd", 64): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("attention_fwd", 128): ((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    ("attention_fwd", 256): ((64, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("attention_invariant", 32): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("attention_invariant", 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("attention_invariant", 128): ((64, 32, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)),
    ("attention_invariant", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("attention_bwd_q", 32): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("attention_bwd_q", 64): ((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3)),
    ("attention_bwd_q", 128): ((128, 32, 8, 3), (128, 128, 8, 2), (128, 128, 8, 2), (128, 32, 8, 2)),
    ("attention_bwd_q", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("attention_bwd_kv", 32): ((64, 128, 8, 3), (32, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
    ("attention_bwd_kv", 64): ((32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 3)),
    ("attention_bwd_kv", 128): ((64, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2)),
    ("attention_bwd_kv", 256): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("decode", 32): ((16, 64, 4, 4), (16, 64, 4, 4), (16, 64, 4, 4), (16, 64, 4, 4)),
    ("decode", 64): ((16, 64, 4, 4), (16, 64, 4, 4), (16, 64, 4, 4), (16, 64, 4, 4)),
    ("decode", 128): ((16, 64, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 64, 4, 3)),
    ("decode", 256): ((16, 32, 4, 2), (16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
    ("decode_group", 32): ((64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 4, 3)),
    ("decode_group", 64): ((64, 64, 8, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 64, 8, 3)),
    ("decode_group", 128): ((64, 64, 8, 3), (64, 64, 8, 3), (64, 64, 8, 3), (32, 64, 4, 2)),
    ("decode_group", 256): ((32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2)),
    ("logp", 0): ((128, 256, 8, 3), (128, 256, 16, 4), (128, 128, 8, 4), (128, 128, 8, 3)),
    ("linear_invariant", 0): ((64, 128, 4, 3), (64, 128, 4, 3), (64, 128, 4, 3), (64, 128, 4, 3)),
}
# "ieee" products have no tensor core: whole rows of both factors lie in registers
FLOAT32_TILES = {0: (32, 32, 4, 1), 32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
INTERPRETER_TILES = {"decode": (16, 16), "attention_bwd_kv": (16, 32), "attention_invariant": (16, 32),
                     "linear_invariant": (16, 32)}  # else (32, 16): small, so that tests cross them


@functools.lru_cache
def _generation(device):
    """The column of TILES for a device; None in the interpreter."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    small = card.shared_memory_per_block_optin < 160 * 1024
    return "small" if small else max(g for g in (80, 90, 100) if g <= 10 * card.major)


def tiling_of(op, C, x, n_rows=16):
    """The launch of an operation on x: its block sizes, as keyword arguments, and the compiler's options. n_rows are
    the query rows of decode: those of a group of slots have a tile of their own."""
    op = "decode_group" if op == "decode" and n_rows > 16 else op
    generation, BLOCK_C = _generation(x.device), C and max(32, triton.next_power_of_2(C))
    assert C <= 256, f"heads of {C} channels: the kernels have tiles for up to 256"
    if generation is None:
        first, second, warps, stages = *INTERPRETER_TILES.get(op, (32, 16)), 4, 1
    elif x.dtype == torch.float32:
        first, second, warps, stages = FLOAT32_TILES[BLOCK_C]
    else:
        first, second, warps, stages = TILES[op, BLOCK_C][GENERATIONS.index(generation)]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": "invariant" not in op}
    if C == 0:
        return dict(BLOCK_N=first, BLOCK_V=second, BLOCK_D=32 if x.dtype == torch.float32 else 64, GROUP=16), options
    return dict(BLOCK_M=first, BLOCK_N=second, BLOCK_C=BLOCK_C), options


@jit
def load_rows(ptr_rc, real_r, c, C: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr):
    """A [rows, BLOCK_C] block, zero from channel C on and, if MASKED, in rows that are not real."""
    if MASKED and C == BLOCK_C:
        return tl.load(ptr_rc, mask=real_r[:, None], other=0.0)
    if MASKED:
        return tl.load(ptr_rc, mask=real_r[:, None] & (c < C)[None, :], other=0.0)
    if C == BLOCK_C:
        return tl.load(ptr_rc)
    return tl.load(ptr_rc, mask=(c < C)[None, :], other=0.0)
