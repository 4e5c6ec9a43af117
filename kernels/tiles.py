"""What all kernels share: which devices run them, and how they are cut into tiles."""

import functools
import math
import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the kernels stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=lambda x: x)
jit = triton.jit if triton else lambda f=None, **options: f or (lambda g: g)

POINTWISE = {"enable_fp_fusion": False}  # bound by memory: one rounding per operation costs nothing
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x log2 e): a GPU has an instruction for exp2 alone


def wide(dtype):
    """The dtype for sums, norms and softmax: float32, or float64 when the tensors are float64."""
    return torch.promote_types(dtype, torch.float32)


@functools.lru_cache
def runs_triton(device, dtype):
    """Whether the kernels can run there: on an NVIDIA GPU of 2020 or later, or in the interpreter if TRITON_INTERPRET=1
    was set before Python started."""
    if torch.device(device).type == "cuda":
        new_enough = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
        return bool(triton) and new_enough and dtype in (torch.float32, torch.float16, torch.bfloat16)
    # no bfloat16: the interpreter multiplies its bit patterns as if they were integers, without an error
    return INTERPRETED and bool(triton) and dtype in (torch.float32, torch.float16)


def check_launch(*tensors):
    """What every launcher assumes: a device that runs Triton, one dtype, dense rows. None stands for a tensor left out.
    """
    x = tensors[0]
    device, dtype = x.device, x.dtype
    assert runs_triton(device, dtype), f"Triton does not run {dtype} on {device}, see runs_triton"
    assert not x.is_cuda or device.index == torch.cuda.current_device(), f"{device} is not the current device"
    for y in tensors:
        if y is not None:
            assert y.dtype == dtype, [t.dtype for t in tensors if t is not None]
            assert y.device == device and y.stride(-1) == 1, (y.device, device, y.stride())


_COMPILED = {}


def launch(kernel, grid, tensors, numbers, options):
    """kernel[grid](*tensors, *numbers, **options), for what every layer of a step launches; a grid of three.

    At each launch Triton looks at all arguments to find what it has compiled for their like, which takes the host 6 to
    15 us. Here it is found again in 2 to 4, by all that it was compiled for: the device, the tensors' dtypes, and the
    numbers and options as they are. Tensors begin at multiples of 16 bytes, as memory does when it is allocated; for
    one that does not Triton is asked. In the interpreter it always is.
    """
    dtypes = tuple([None if x is None else x.dtype for x in tensors])
    key = id(kernel), tensors[0].device, dtypes, numbers, tuple(options.values())
    aligned = True
    for x in tensors:
        if x is not None and x.storage_offset() % 8:
            aligned = False
    compiled = _COMPILED.get(key) if aligned else None
    if compiled is not None:
        compiled[grid](*tensors, *numbers)
        return
    compiled = kernel[grid](*tensors, *numbers, **options)
    if aligned and compiled is not None:
        _COMPILED[key] = compiled


# How attention kernels are cut, by operation and padded head size: BLOCK_M (query rows), BLOCK_N (keys), warps and
# pipeline stages. A column for each generation: 80, 90 and 100 are A100, H100 and B200; "small" are the cards of any of
# these with 99 KB of shared memory (RTX 30, 40, 50). So on an H100 attention_fwd takes heads of 128 channels in tiles
# of 128 rows by 128 keys, with 8 warps and 3 stages. Chosen with bench/compile.py, which compiles every tile and reads
# its loops: nothing spills in them, the copies of two stages overlap the third's products, which use the generation's
# widest tensor-core instructions (LOG.md names exceptions). An "invariant" tile serves training, prefill and decoding,
# which must agree; "decode_group" serves slots that share a prompt. Decoding's stages are 2 n - 1 where blocks of keys
# are copied in n: a page's number is fetched as many blocks before its keys as these before their products.
GENERATIONS = (80, 90, 100, "small")
ATTENTION_TILES = {
    ("attention_fwd", 32): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("attention_fwd", 64): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
    ("attention_fwd", 128): ((128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("attention_fwd", 256): ((64, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 3), (64, 32, 8, 2)),
    ("attention_invariant", 32): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("attention_invariant", 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("attention_invariant", 128): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2)),
    ("attention_invariant", 256): ((64, 32, 8, 3), (64, 32, 8, 3), (64, 32, 8, 3), (64, 32, 8, 2)),
    ("attention_bwd_q", 32): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    ("attention_bwd_q", 64): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3)),
    ("attention_bwd_q", 128): ((128, 32, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2)),
    ("attention_bwd_q", 256): ((64, 32, 8, 3), (64, 32, 8, 3), (64, 32, 8, 2), (32, 32, 8, 2)),
    ("attention_bwd_kv", 32): ((64, 128, 8, 3), (32, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3)),
    ("attention_bwd_kv", 64): ((32, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3)),
    ("attention_bwd_kv", 128): ((64, 64, 8, 3), (32, 128, 8, 4), (64, 128, 8, 3), (64, 64, 8, 2)),
    ("attention_bwd_kv", 256): ((32, 32, 8, 3), (32, 32, 8, 3), (32, 64, 8, 3), (32, 32, 8, 2)),
    ("decode", 32): ((16, 64, 4, 7), (16, 64, 4, 7), (16, 64, 4, 7), (16, 64, 4, 7)),
    ("decode", 64): ((16, 64, 4, 7), (16, 64, 4, 7), (16, 64, 4, 7), (16, 64, 4, 7)),
    ("decode", 128): ((16, 64, 4, 5), (16, 64, 4, 5), (16, 64, 4, 5), (16, 64, 4, 5)),
    ("decode", 256): ((16, 32, 4, 5), (16, 64, 4, 5), (16, 64, 4, 5), (16, 32, 4, 5)),
    ("decode_group", 32): ((64, 128, 4, 5), (64, 64, 4, 5), (64, 64, 8, 5), (64, 128, 4, 5)),
    ("decode_group", 64): ((64, 64, 8, 5), (64, 128, 8, 5), (64, 64, 8, 5), (64, 64, 8, 5)),
    ("decode_group", 128): ((64, 64, 8, 5), (64, 128, 8, 5), (64, 64, 8, 5), (32, 64, 4, 3)),
    ("decode_group", 256): ((32, 64, 8, 3), (32, 64, 8, 5), (32, 64, 8, 5), (32, 64, 8, 3)),
}
# The same for products of [rows, D] with [columns, D]: BLOCK_N (rows), BLOCK_V (columns), warps, stages
PRODUCT_TILES = {
    "logp": ((128, 256, 8, 3), (128, 256, 8, 4), (128, 256, 8, 3), (128, 128, 8, 3)),
    "linear_invariant": ((64, 128, 4, 3), (64, 128, 4, 3), (64, 128, 4, 3), (64, 128, 4, 3)),
}
# float32 on any GPU, by padded head size: "ieee" products have no tensor core, and hold whole rows in registers
FLOAT32_ATTENTION_TILES = {32: (32, 32, 8, 1), 64: (32, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
FLOAT32_PRODUCT_TILE = (32, 32, 4, 1)
# In the interpreter: small, so that the tests' small problems cross tiles; other operations take (32, 16)
INTERPRETER_TILES = {"decode": (16, 16), "decode_group": (32, 32), "attention_bwd_kv": (16, 32),
                     "attention_invariant": (16, 32), "linear_invariant": (16, 32)}
# Compiled without fused multiply-adds: what gets fused depends on the code around it, and training, prefill and
# decoding must round alike
UNFUSED = ("attention_invariant", "linear_invariant")


@functools.lru_cache
def _generation(device):
    """The column of the tables for a device; None in the interpreter."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_properties(device)
    if card.shared_memory_per_block_optin < 160 * 1024:
        return "small"
    return max(g for g in (80, 90, 100) if g <= 10 * card.major)


def _tile(op, x, by_generation, in_float32):
    """Two block sizes, warps and stages of an operation on x."""
    generation = _generation(x.device)
    if generation is None:
        return *INTERPRETER_TILES.get(op, (32, 16)), 4, 1
    if x.dtype == torch.float32:
        return in_float32
    return by_generation[GENERATIONS.index(generation)]


def _options(op, warps, stages):
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": op not in UNFUSED}


def attention_tiling(op, x, C):
    """Block sizes and compiler options, both keyword arguments, of an attention kernel on x with C channels a head."""
    assert C <= 256, f"heads of {C} channels: the kernels have tiles for up to 256"
    BLOCK_C = max(32, triton.next_power_of_2(C))  # Triton's blocks are powers of two: channels from C on are zeros
    rows, keys, warps, stages = _tile(op, x, ATTENTION_TILES[op, BLOCK_C], FLOAT32_ATTENTION_TILES[BLOCK_C])
    return {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_C": BLOCK_C}, _options(op, warps, stages)


def product_tiling(op, x):
    """The same of a product of x; D is summed in steps of BLOCK_D, and GROUP is explained at tile_of in logp.py."""
    rows, columns, warps, stages = _tile(op, x, PRODUCT_TILES[op], FLOAT32_PRODUCT_TILE)
    BLOCK_D = 32 if x.dtype == torch.float32 else 64
    return {"BLOCK_N": rows, "BLOCK_V": columns, "BLOCK_D": BLOCK_D, "GROUP": 16}, _options(op, warps, stages)


@jit
def load_rows(ptr_rc, real_r, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A [rows, BLOCK_C] block, zero from channel C on and in rows that are not real."""
    if C == BLOCK_C:
        return tl.load(ptr_rc, mask=real_r[:, None], other=0.0)
    return tl.load(ptr_rc, mask=real_r[:, None] & (c < C)[None, :], other=0.0)


@jit
def in_pages(page_ptr, token_n, real_n, stride_kx, stride_ki, I: tl.constexpr):
    """Where in a pool, in elements from its beginning, the tokens number token_n lie of one whose pages page_ptr lists.

    In pages of 64, listed as 5, 2, 7, token 100 lies in page 2, in place 36. Of tokens that are not real, which may be
    more than the list has pages, nothing is read.
    """
    page_n = tl.load(page_ptr + token_n // I, mask=real_n, other=0).to(tl.int64)
    return page_n * stride_kx + token_n % I * stride_ki
