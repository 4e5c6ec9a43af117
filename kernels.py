"""The operations that decide the speed and the memory of everything else: Triton kernels, each beside plain PyTorch.

    attention           packed segments that see themselves causally and their parent whole   training, prefill
    decode_attention    one new token per slot against its own cache and its shared prompt    sampling
    linear_logp         log-probability and entropy of a token, straight from hidden states   SFT, policy, reference
    rms_norm, add_rms_norm, rope, swiglu    what stands between the matrix products           every layer
    linear              the matrix product itself, in an order that no batch changes          batch invariance

`impl` chooses: None (Triton for CUDA tensors, else PyTorch), "torch", "triton", or "invariant": Triton with tiles,
splits and rounding that depend on nothing but a row's own sequence, so that a token's numbers are the same bits alone,
in any batch, in a forest and when decoded. Softmax statistics and sums are float32 (float64 for float64 inputs, which
PyTorch computes). Nothing here ever holds [tokens, tokens] scores of a whole batch or [tokens, vocabulary] logits, and
nothing uses atomics: every sum has one order.

Letters: N packed tokens, S segments, B decode slots with T positions, P prompts with U positions and M slots, H query
heads, K key/value heads, C channels of a head, D width, F width of the MLP, V vocabulary. Query head h reads key/value
head h // (H / K). Inside the attention kernels m counts query rows and n keys. A query row is a (token, head) pair:
the H / K heads that share a key/value head are rows of one tile, so that keys are loaded once for all of them and their
gradients need no sum over heads afterwards.
"""

import functools
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the kernels below stay plain functions that nobody calls
    triton, tl = None, SimpleNamespace(constexpr=lambda x: x)
jit = triton.jit if triton else lambda f=None, **options: f or (lambda g: g)

LOGIT_CHUNK = 2**24  # elements of the [N, columns] float32 blocks that linear_logp holds at once, two of 64 MB
GRADIENT_CHUNK = 2**27  # elements of the [N, columns] logit gradients, in the inputs' dtype, that the Triton path holds
POINTWISE = {"enable_fp_fusion": False}  # bound by memory: one rounding per operation costs nothing
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(math.log2(math.e))


def wide(dtype):
    """The dtype for sums, norms and softmax: float32, or float64 when the tensors are float64."""
    return torch.promote_types(dtype, torch.float32)


def use_triton(x, impl):
    """The dispatch of every operation here."""
    assert impl in (None, "torch", "triton", "invariant"), f"impl is None, torch, triton or invariant, got {impl!r}"
    if impl is None:
        return x.is_cuda and runs_triton(x.device, x.dtype)
    return impl != "torch"


@functools.lru_cache
def runs_triton(device, dtype):
    """Whether the kernels can run there: on an NVIDIA GPU of 2020 or later, or in the interpreter if TRITON_INTERPRET=1
    was set before Python started; which multiplies the bit patterns of bfloat16, without an error."""
    if torch.device(device).type == "cuda":
        new_enough = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
        return bool(triton) and new_enough and dtype in (torch.float32, torch.float16, torch.bfloat16)
    return INTERPRETED and bool(triton) and dtype in (torch.float32, torch.float16)


def _check(*tensors):
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


def _tiling(op, C, x, n_rows=16):
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


# -------------------------------------------------------------------------------------------------------- shared pieces


@jit
def _load_rows(ptr_rc, real_r, c, C: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr):
    """A [rows, BLOCK_C] block, zero from channel C on and, if MASKED, in rows that are not real."""
    if MASKED and C == BLOCK_C:
        return tl.load(ptr_rc, mask=real_r[:, None], other=0.0)
    if MASKED:
        return tl.load(ptr_rc, mask=real_r[:, None] & (c < C)[None, :], other=0.0)
    if C == BLOCK_C:
        return tl.load(ptr_rc)
    return tl.load(ptr_rc, mask=(c < C)[None, :], other=0.0)


@jit
def _product_tile(x_ptr, w_ptr, row_n, col_v, N, V, D, stride_xn, stride_wv, BLOCK_N: tl.constexpr,
                  BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """A [BLOCK_N, BLOCK_V] float32 tile of x w^T, summed over D in steps of BLOCK_D, first to last.

    Rows and columns beyond N and V repeat the last one instead of being masked: they are not stored. (No test on a CPU
    can tell: a read beyond the end that is thrown away is silent there, and a fault on a GPU.)
    """
    d = tl.arange(0, BLOCK_D)
    x_ptr += tl.minimum(row_n, N - 1).to(tl.int64)[:, None] * stride_xn + d[None, :]
    w_ptr += tl.minimum(col_v, V - 1).to(tl.int64)[:, None] * stride_wv + d[None, :]
    acc_nv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, D, BLOCK_D):
        x_nd = tl.load(x_ptr, mask=(d < D - first)[None, :], other=0.0)
        w_vd = tl.load(w_ptr, mask=(d < D - first)[None, :], other=0.0)
        acc_nv = tl.dot(x_nd, w_vd.T, acc_nv, input_precision="ieee")  # float32 inputs stay float32, not TF32
        x_ptr += BLOCK_D
        w_ptr += BLOCK_D
    return acc_nv


@jit
def _tile_of(pid, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """Program -> (row tile, column tile): GROUP row tiles walk together through all columns, so both stay in L2."""
    first = pid // (GROUP * n_col_tiles) * GROUP
    n_rows = tl.minimum(n_row_tiles - first, GROUP)
    within = pid % (GROUP * n_col_tiles)
    return first + within % n_rows, within // n_rows


# ------------------------------------------------------------------------------------------------------------ attention


def attention_ref(q_nhc, k_nkc, v_nkc, segments_s3):
    """`attention` in plain PyTorch. Segments of similar size are padded into one scaled_dot_product_attention call: a
    forest of many short segments costs a handful of calls, and a long one is padded by 31 keys at most, and as many of
    its prompt."""
    N, H, C = q_nhc.shape
    out_nhc = torch.zeros_like(q_nhc)
    for query_st, key_su, real_st, visible in _padded_segments(segments_s3, q_nhc.device):
        q = _gather(q_nhc, query_st).transpose(1, 2)  # [S, H, T, C]
        k, v = _gather(k_nkc, key_su).transpose(1, 2), _gather(v_nkc, key_su).transpose(1, 2)
        if q.is_cuda and visible is not None:  # masked GQA would fall to the kernel that keeps all scores
            k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=True)
        out_nhc[query_st[real_st]] = out.transpose(1, 2)[real_st]
    return out_nhc


def _gather(x_nhc, index_st):
    """Rows of x: [S, T, H, C]. index_select, because its backward adds rows in a fixed order on the CPU."""
    return x_nhc.index_select(0, index_st.flatten()).unflatten(0, index_st.shape)


def _padded_segments(segments_s3, device):
    """Groups segments whose lengths agree after rounding up to 32; yields for each group what one attention call needs.

    query_st: the token at (segment, row). real_st: False where a row is padding. key_su: the token at (segment, key),
    the parent's tokens first. visible: bool [S, 1, T, U], or None for parentless segments, where causal masking already
    hides the padding from every real row.
    """
    start, length, parent = segments_s3.unbind(1)
    has_parent = parent >= 0
    parent_start, parent_length = start[parent] * has_parent, length[parent] * has_parent
    assert not has_parent[parent[has_parent]].any(), "a parent segment must be parentless"
    size_s2 = torch.stack([(length + 31) // 32, (parent_length + 31) // 32], 1)
    for size in size_s2[length > 0].unique(dim=0):
        rows = ((size_s2 == size).all(1) & (length > 0)).nonzero()[:, 0]
        first, n, p_first, p = (x[rows, None] for x in (start, length, parent_start, parent_length))
        row_t, prefix_u = torch.arange(int(n.max())), torch.arange(int(p.max()))
        real_st = row_t < n
        query_st = first + row_t.minimum(n - 1)
        if len(prefix_u) == 0:
            yield query_st.to(device), query_st.to(device), real_st.to(device), None
            continue
        key_su = torch.cat([p_first + prefix_u.minimum((p - 1).clamp(min=0)), query_st], 1)
        prefix_stu = (prefix_u < p)[:, None, :].expand(-1, len(row_t), -1)
        causal_stu = (row_t[None, :, None] >= row_t[None, None, :]).expand(len(rows), -1, -1)
        visible = torch.cat([prefix_stu, causal_stu], 2)[:, None]
        yield query_st.to(device), key_su.to(device), real_st.to(device), visible.to(device)


@jit
def _keys_at(ptr, prefix_ptr, key_n, n_prefix, own_row, prefix_row, stride, prefix_stride, CACHED: tl.constexpr):
    """Pointers to keys number key_n of a sequence: the first n_prefix are rows from prefix_row on, then own_row's."""
    if CACHED:  # two tensors; a choice between pointers forgets that both are aligned: loads of 2 bytes would follow
        ptr_n = tl.where(key_n < n_prefix, prefix_ptr + (prefix_row + key_n).to(tl.int64) * prefix_stride,
                         ptr + (own_row + key_n - n_prefix).to(tl.int64) * stride)
        return tl.multiple_of(ptr_n, 16)
    return ptr + tl.where(key_n < n_prefix, prefix_row + key_n, own_row + key_n - n_prefix).to(tl.int64) * stride


@jit
def _attention_fwd_kernel(q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, out_ptr, lse_ptr, tile_ptr, stride_qn,
                          stride_qh, stride_kn, stride_kh, stride_pn, stride_ph, n_kv, scale, SHARE: tl.constexpr,
                          C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
                          CACHED: tl.constexpr):
    """out = softmax(scale q k^T) v and lse = log2 of the softmax's denominator, for one tile of queries of one segment.

    Keys are taken in blocks of the sequence's own positions, prompt first, whatever lies where in memory; so the order
    of a row's sums depends on its position alone.
    """
    # 1. which tile: BLOCK_M / SHARE tokens of a segment, and the heads that share key/value head kv
    tile_ptr += tl.program_id(0) // n_kv * 6
    kv = tl.program_id(0) % n_kv
    first, n_tokens, position = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    own_row, prefix_row, n_prefix = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    r, j, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    token_m, head_m = r // SHARE, kv * SHARE + r % SHARE
    real_m = token_m < n_tokens
    row_m = (first + token_m).to(tl.int64)
    q_m = q_ptr + row_m * stride_qn + head_m * stride_qh
    q_mc = _load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
    k_ptr, v_ptr = k_ptr + kv * stride_kh.to(tl.int64), v_ptr + kv * stride_kh.to(tl.int64)
    prefix_k_ptr += kv * stride_ph.to(tl.int64)
    prefix_v_ptr += kv * stride_ph.to(tl.int64)
    # 2. online softmax: weight = exp2(score - max); acc and sum are rescaled whenever the running maximum grows. First
    #    over the keys that every row sees, without masks; then over those around the diagonal
    max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_m = tl.zeros([BLOCK_M], tl.float32)
    acc_mc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    n_keys = position + n_tokens
    n_clear = (position + 1) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        for start in range(n_clear if MASKED else 0, n_keys if MASKED else n_clear, BLOCK_N):
            key_n = start + j
            real_n = key_n < n_keys
            k_n = _keys_at(k_ptr, prefix_k_ptr, key_n, n_prefix, own_row, prefix_row, stride_kn, stride_pn, CACHED)
            v_n = _keys_at(v_ptr, prefix_v_ptr, key_n, n_prefix, own_row, prefix_row, stride_kn, stride_pn, CACHED)
            k_nc = _load_rows(k_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
            score_mn = tl.dot(q_mc, k_nc.T, input_precision="ieee") * (scale * LOG2E)
            if MASKED:
                score_mn = tl.where(key_n[None, :] <= (position + token_m)[:, None], score_mn, float("-inf"))
            new_max_m = tl.maximum(max_m, tl.max(score_mn, 1))  # finite: all rows see position 0, of the first block
            weight_mn = tl.exp2(score_mn - new_max_m[:, None])
            keep_m = tl.exp2(max_m - new_max_m)
            sum_m = sum_m * keep_m + tl.sum(weight_mn, 1)
            v_nc = _load_rows(v_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
            acc_mc = tl.dot(weight_mn.to(v_nc.dtype), v_nc, acc_mc * keep_m[:, None], input_precision="ieee")
            max_m = new_max_m
    # 3. out is dense [N, H, C], lse [N, H]. Where a row goes is read and computed again: kept during the loops, the
    #    offsets would take the registers of the products, and spill
    first, n_tokens = tl.load(tile_ptr, volatile=True), tl.load(tile_ptr + 1, volatile=True)
    real_m = token_m < n_tokens
    row_m = (first + token_m).to(tl.int64) * (n_kv * SHARE) + head_m
    out_mc = (acc_mc / sum_m[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_m[:, None] * C + c[None, :], out_mc, mask=real_m[:, None] & (c < C)[None, :])
    tl.store(lse_ptr + row_m, max_m + tl.log2(sum_m), mask=real_m)


@jit
def _attention_bwd_q_kernel(q_ptr, k_ptr, v_ptr, out_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_q_ptr, tile_ptr,
                            stride_qn, stride_qh, stride_kn, stride_kh, n_kv, scale, SHARE: tl.constexpr,
                            C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """weight = exp2(score - lse);  delta = sum_c grad_out out;  grad_score = weight (grad_out v^T - delta);
    grad_q = scale grad_score k. delta is left in memory for the kernel of the keys, which runs next."""
    tile_ptr += tl.program_id(0) // n_kv * 6
    kv = tl.program_id(0) % n_kv
    first, n_tokens, position = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    own_row, prefix_row, n_prefix = tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)
    r, j, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    token_m, head_m = r // SHARE, kv * SHARE + r % SHARE
    real_m = token_m < n_tokens
    row_m = (first + token_m).to(tl.int64)
    q_m = q_ptr + row_m * stride_qn + head_m * stride_qh
    q_mc = _load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
    row_m = row_m * (n_kv * SHARE) + head_m
    dense_mc = row_m[:, None] * C + c[None, :]
    grad_out_mc = _load_rows(grad_out_ptr + dense_mc, real_m, c, C, BLOCK_C, True)
    out_mc = _load_rows(out_ptr + dense_mc, real_m, c, C, BLOCK_C, True)
    delta_m = tl.sum(grad_out_mc.to(tl.float32) * out_mc.to(tl.float32), 1)
    tl.store(delta_ptr + row_m, delta_m, mask=real_m)
    lse_m = tl.load(lse_ptr + row_m, mask=real_m, other=0.0)
    k_ptr, v_ptr = k_ptr + kv * stride_kh.to(tl.int64), v_ptr + kv * stride_kh.to(tl.int64)
    grad_q_mc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    n_keys = position + n_tokens
    n_clear = (position + 1) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        for start in range(n_clear if MASKED else 0, n_keys if MASKED else n_clear, BLOCK_N):
            key_n = start + j
            real_n = key_n < n_keys
            k_n = _keys_at(k_ptr, k_ptr, key_n, n_prefix, own_row, prefix_row, stride_kn, stride_kn, False)
            v_n = _keys_at(v_ptr, v_ptr, key_n, n_prefix, own_row, prefix_row, stride_kn, stride_kn, False)
            k_nc = _load_rows(k_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
            v_nc = _load_rows(v_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
            score_mn = tl.dot(q_mc, k_nc.T, input_precision="ieee") * (scale * LOG2E)
            weight_mn = tl.exp2(score_mn - lse_m[:, None])
            if MASKED:
                weight_mn = tl.where(key_n[None, :] <= (position + token_m)[:, None], weight_mn, 0.0)
            grad_weight_mn = tl.dot(grad_out_mc, v_nc.T, input_precision="ieee")
            grad_score_mn = weight_mn * (grad_weight_mn - delta_m[:, None])
            grad_q_mc = tl.dot(grad_score_mn.to(k_nc.dtype), k_nc, grad_q_mc, input_precision="ieee")
    first, n_tokens = tl.load(tile_ptr, volatile=True), tl.load(tile_ptr + 1, volatile=True)  # as in the forward kernel
    real_m = token_m < n_tokens
    dense_mc = ((first + token_m).to(tl.int64) * (n_kv * SHARE) + head_m)[:, None] * C + c[None, :]
    grad_q_mc = (grad_q_mc * scale).to(grad_q_ptr.dtype.element_ty)
    tl.store(grad_q_ptr + dense_mc, grad_q_mc, mask=real_m[:, None] & (c < C)[None, :])


@jit
def _attention_bwd_kv_kernel(q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, tile_ptr,
                             stride_qn, stride_qh, stride_kn, stride_kh, n_kv, scale, SHARE: tl.constexpr,
                             C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """grad_v = weight^T grad_out;  grad_k = scale grad_score^T q, for one tile of keys of one segment.

    The queries that see a key are the tokens from it to the end of its segment and, a parent's children following it
    directly, of all its children: one range of packed tokens, gathered by one program in one order.
    """
    tile_ptr += tl.program_id(0) // n_kv * 3
    kv = tl.program_id(0) % n_kv
    first, n_tile_keys, until = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    j, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    real_n = j < n_tile_keys
    key_n = (first + j).to(tl.int64)
    offset_nc = (key_n * stride_kn + kv * stride_kh)[:, None] + c[None, :]
    k_nc = _load_rows(k_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
    v_nc = _load_rows(v_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
    grad_k_nc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    grad_v_nc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    q_ptr += first.to(tl.int64) * stride_qn
    first_row = first.to(tl.int64) * (n_kv * SHARE)
    grad_out_ptr += first_row * C
    lse_ptr += first_row
    delta_ptr += first_row
    n_rows = (until - first) * SHARE
    n_diagonal = tl.minimum(tl.cdiv(n_tile_keys * SHARE, BLOCK_M) * BLOCK_M, n_rows)
    for CLEAR in tl.static_range(2):  # the queries around the diagonal; then those that see all of the tile
        for start in range(n_diagonal if CLEAR else 0, n_rows if CLEAR else n_diagonal, BLOCK_M):
            r = start + tl.arange(0, BLOCK_M)
            token_m, head_m = r // SHARE, kv * SHARE + r % SHARE
            real_m = r < n_rows  # rows beyond are zeros: they add nothing
            q_m = q_ptr + (token_m * stride_qn + head_m * stride_qh)
            q_mc = _load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
            row_m = token_m * (n_kv * SHARE) + head_m
            grad_out_mc = _load_rows(grad_out_ptr + (row_m[:, None] * C + c[None, :]), real_m, c, C, BLOCK_C, True)
            lse_m = tl.load(lse_ptr + row_m, mask=real_m, other=0.0)
            delta_m = tl.load(delta_ptr + row_m, mask=real_m, other=0.0)
            score_nm = tl.dot(k_nc, q_mc.T, input_precision="ieee") * (scale * LOG2E)
            weight_nm = tl.exp2(score_nm - lse_m[None, :])
            if not CLEAR:  # key j is token first + j
                weight_nm = tl.where(j[:, None] <= token_m[None, :], weight_nm, 0.0)
            grad_v_nc = tl.dot(weight_nm.to(k_nc.dtype), grad_out_mc, grad_v_nc, input_precision="ieee")
            grad_weight_nm = tl.dot(v_nc, grad_out_mc.T, input_precision="ieee")
            grad_score_nm = weight_nm * (grad_weight_nm - delta_m[None, :])
            grad_k_nc = tl.dot(grad_score_nm.to(k_nc.dtype), q_mc, grad_k_nc, input_precision="ieee")
    first, n_tile_keys = tl.load(tile_ptr, volatile=True), tl.load(tile_ptr + 1, volatile=True)  # as in the forward one
    real_n, key_n = j < n_tile_keys, (first + j).to(tl.int64)
    dense_nc = ((key_n * n_kv + kv) * C)[:, None] + c[None, :]
    stored_nc = real_n[:, None] & (c < C)[None, :]
    tl.store(grad_k_ptr + dense_nc, (grad_k_nc * scale).to(grad_k_ptr.dtype.element_ty), mask=stored_nc)
    tl.store(grad_v_ptr + dense_nc, grad_v_nc.to(grad_v_ptr.dtype.element_ty), mask=stored_nc)


@functools.lru_cache(maxsize=16)
def _query_tiles(segments, tokens_per_tile, device):
    """int32 [tiles, 6]: first token, tokens, position of the first; segment's first row; parent's first row, length.

    A tile never crosses segments. The longest come first, so that no long one is left over at the end. `segments` is
    the table's bytes: the tiles of a forest are made once for all layers.
    """
    start, length, parent = np.frombuffer(segments, np.int64).reshape(-1, 3).T
    segment, first = _cut(length, tokens_per_tile)
    above = parent[segment]
    n_prefix = np.where(above >= 0, length[above], 0)
    n_tokens = np.minimum(length[segment] - first, tokens_per_tile)
    table = np.stack([start[segment] + first, n_tokens, n_prefix + first, start[segment],
                      np.where(above >= 0, start[above], 0), n_prefix], 1)
    return _upload(table[np.argsort(-table[:, 2], kind="stable")], device)


@functools.lru_cache(maxsize=16)
def _key_tiles(segments, keys_per_tile, device):
    """int32 [tiles, 3]: first token, tokens, and the end of the tokens that see them."""
    start, length, parent = np.frombuffer(segments, np.int64).reshape(-1, 3).T
    until = start + length
    np.maximum.at(until, parent[parent >= 0], until[parent >= 0].copy())
    segment, first = _cut(length, keys_per_tile)
    table = np.stack([start[segment] + first, np.minimum(length[segment] - first, keys_per_tile), until[segment]], 1)
    return _upload(table[np.argsort(table[:, 0] - table[:, 2], kind="stable")], device)


def _cut(length, size):
    """Segments of these lengths in pieces of at most `size`: each piece's segment, and its first token in it."""
    n_tiles = -(-length // size)
    segment = np.repeat(np.arange(len(length)), n_tiles)
    return segment, (np.arange(n_tiles.sum()) - np.repeat(n_tiles.cumsum() - n_tiles, n_tiles)) * size


def _upload(table, device):
    table = torch.from_numpy(table.astype(np.int32))
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@functools.lru_cache(maxsize=16)
def _check_segments(segments, N):
    """The order that the kernels build on: segments back to back, children directly after their parentless parent."""
    start, length, parent = np.frombuffer(segments, np.int64).reshape(-1, 3).T
    has_parent = parent >= 0
    assert length.sum() == N and (start == length.cumsum() - length).all(), "segments must lie back to back"
    assert not has_parent[parent[has_parent]].any(), "a parent segment must be parentless"
    first_or_next = (parent == np.arange(len(parent)) - 1) | (parent == np.append(-1, parent[:-1]))
    assert first_or_next[has_parent].all(), "a parent's children must follow it directly"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_nhc, k_nkc, v_nkc, segments_s3, invariant):
        q_nhc, k_nkc, v_nkc = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_nhc, k_nkc, v_nkc))
        if k_nkc.stride() != v_nkc.stride():
            k_nkc, v_nkc = k_nkc.contiguous(), v_nkc.contiguous()
        assert segments_s3.dtype == torch.int64 and not segments_s3.is_cuda, (segments_s3.dtype, segments_s3.device)
        segments = segments_s3.numpy().tobytes()
        _check_segments(segments, len(q_nhc))

        def tiles(tokens_per_tile):
            return _query_tiles(segments, tokens_per_tile, q_nhc.device)
        out_nhc, lse_nh = _launch_attention(q_nhc, k_nkc, v_nkc, k_nkc, v_nkc, tiles, False, invariant)
        ctx.save_for_backward(q_nhc, k_nkc, v_nkc, out_nhc, lse_nh)
        ctx.segments = segments
        return out_nhc

    @staticmethod
    def backward(ctx, grad_out_nhc):
        q_nhc, k_nkc, v_nkc, out_nhc, lse_nh = ctx.saved_tensors
        (N, H, C), K = q_nhc.shape, k_nkc.shape[1]
        grad_out_nhc = grad_out_nhc.contiguous()
        assert N * max(q_nhc.stride(0), H * C) < 2**31, f"{N} tokens: the kernel of the keys counts in 32 bits"
        grad_q_nhc = torch.empty_like(out_nhc)
        grad_k_nkc, grad_v_nkc = q_nhc.new_empty(N, K, C), q_nhc.new_empty(N, K, C)
        delta_nh = torch.empty_like(lse_nh)
        strides = q_nhc.stride(0), q_nhc.stride(1), k_nkc.stride(0), k_nkc.stride(1)
        tiling, options = _tiling("attention_bwd_q", C, q_nhc)
        tiles = _query_tiles(ctx.segments, _tokens_per_tile(tiling, H, K), q_nhc.device)
        if len(tiles):
            _attention_bwd_q_kernel[len(tiles) * K,](
                q_nhc, k_nkc, v_nkc, out_nhc, grad_out_nhc, lse_nh, delta_nh, grad_q_nhc, tiles, *strides, K,
                1 / math.sqrt(C), H // K, C, **tiling, **options)
        tiling, options = _tiling("attention_bwd_kv", C, q_nhc)
        tiles = _key_tiles(ctx.segments, tiling["BLOCK_N"], q_nhc.device)
        if len(tiles):
            _attention_bwd_kv_kernel[len(tiles) * K,](
                q_nhc, k_nkc, v_nkc, grad_out_nhc, lse_nh, delta_nh, grad_k_nkc, grad_v_nkc, tiles, *strides, K,
                1 / math.sqrt(C), H // K, C, **tiling, **options)
        return grad_q_nhc, grad_k_nkc, grad_v_nkc, None, None


def _tokens_per_tile(tiling, H, K):
    assert H // K <= tiling["BLOCK_M"], f"{H} heads share {K}: at most {tiling['BLOCK_M']} may share one"
    return tiling["BLOCK_M"] // (H // K)


def _launch_attention(q_nhc, k_rkc, v_rkc, prefix_k_rkc, prefix_v_rkc, tiles, cached, invariant):
    """out_nhc and lse_nh; tiles(tokens per tile) gives the table of _query_tiles."""
    (N, H, C), K = q_nhc.shape, k_rkc.shape[1]
    _check(q_nhc, k_rkc, v_rkc, prefix_k_rkc, prefix_v_rkc)
    assert k_rkc.stride() == v_rkc.stride() and prefix_k_rkc.stride() == prefix_v_rkc.stride()
    tiling, options = _tiling("attention_invariant" if invariant else "attention_fwd", C, q_nhc)
    assert not cached or all(s * q_nhc.element_size() % 16 == 0 for x in (k_rkc, prefix_k_rkc) for s in x.stride()[:2])
    out_nhc, lse_nh = q_nhc.new_empty(N, H, C), q_nhc.new_empty(N, H, dtype=torch.float32)
    table = tiles(_tokens_per_tile(tiling, H, K))
    if len(table):
        _attention_fwd_kernel[len(table) * K,](
            q_nhc, k_rkc, v_rkc, prefix_k_rkc, prefix_v_rkc, out_nhc, lse_nh, table, q_nhc.stride(0), q_nhc.stride(1),
            k_rkc.stride(0), k_rkc.stride(1), prefix_k_rkc.stride(0), prefix_k_rkc.stride(1), K, 1 / math.sqrt(C),
            H // K, C, CACHED=cached, **tiling, **options)
    return out_nhc, lse_nh


def attention(q_nhc, k_nkc, v_nkc, segments_s3, impl=None):
    """softmax(q k^T / sqrt(C)) v over a forest of segments; returns out_nhc.

    segments_s3 is an int64 CPU table of (start, length, parent). A token sees its own segment up to itself and, if
    parent is not -1, all of the parent segment. A parent is itself parentless, segments lie back to back, and children
    directly follow their parent. Example, a prompt of 3 tokens and two replies of 2:

        segments = [(0, 3, -1), (3, 2, 0), (5, 2, 0)]
        token      0  1  2 | 3  4 | 5  6
        sees       0  01 012 | 0123  01234 | 0125  01256
    """
    N, H, C = q_nhc.shape
    assert k_nkc.shape == v_nkc.shape and k_nkc.shape[0] == N and H % k_nkc.shape[1] == 0, (q_nhc.shape, k_nkc.shape)
    if use_triton(q_nhc, impl):
        return _Attention.apply(q_nhc, k_nkc, v_nkc, segments_s3, impl == "invariant")
    return attention_ref(q_nhc, k_nkc, v_nkc, segments_s3)


# ----------------------------------------------------------------------------------------------------- decode attention


@dataclass(frozen=True)
class Prompts:
    """The prompts of a decode step, each held once for all the slots that continue it.

    slot_pm lists the slots that continue prompt p, with -1 for places that nobody takes: two rollouts of prompt 0 in
    slots 3 and 1, and one of prompt 1 in slot 0, are [[3, 1], [-1, 0]]; slot 2 is empty, or has its whole sequence in
    its own cache.
    """
    k_pkuc: torch.Tensor
    v_pkuc: torch.Tensor
    length_p: torch.Tensor  # int64: so many of the U positions count
    slot_pm: torch.Tensor   # int64
    place_b: torch.Tensor | None = None  # int64: where slot b stands in slot_pm, as p * M + m, or -1


def decode_attention_ref(q_bhc, k_bktc, v_bktc, length_b, prompts=None):
    """One softmax over the prompt's keys and the slot's own, in two parts merged by their maxima, as the kernels do it.

    The queries of a prompt's slots become rows of one matrix product, so that its keys are read once for all of them.
    What the caches hold beyond the lengths must be finite.
    """
    (B, H, C), K = q_bhc.shape, k_bktc.shape[1]
    q_bkgc = q_bhc.view(B, K, H // K, C)
    out_bkgc, max_bkg1, sum_bkg1 = _softmax_part(q_bkgc, k_bktc, v_bktc, length_b)
    if prompts is None:
        return (out_bkgc / sum_bkg1).to(q_bhc.dtype).reshape(B, H, C)
    P, M = prompts.slot_pm.shape
    q_pkrc = q_bkgc[prompts.slot_pm.clamp(min=0)].transpose(1, 2).reshape(P, K, M * (H // K), C)
    part = _softmax_part(q_pkrc, prompts.k_pkuc, prompts.v_pkuc, prompts.length_p)
    place_b = _places(prompts, B)
    out, top, total = (x.view(P, K, M, H // K, -1).transpose(1, 2).flatten(0, 1)[place_b.clamp(min=0)] for x in part)
    new_max_bkg1 = torch.maximum(max_bkg1, top)
    keep_bkg1 = ((max_bkg1 - new_max_bkg1) / math.sqrt(C)).exp()
    prompt_bkg1 = torch.where((place_b >= 0)[:, None, None, None], ((top - new_max_bkg1) / math.sqrt(C)).exp(), 0)
    out_bkgc = (keep_bkg1 * out_bkgc + prompt_bkg1 * out) / (keep_bkg1 * sum_bkg1 + prompt_bkg1 * total)
    return out_bkgc.to(q_bhc.dtype).reshape(B, H, C)


def _softmax_part(q_xkrc, k_xktc, v_xktc, length_x):
    """score = q k^T over the first length_x keys, weight = exp((score - max) / sqrt(C)): weight v, max, sum weight.

    Scaled after the subtraction, so that what is rounded is a small difference.
    """
    score_xkrt = (q_xkrc @ k_xktc.transpose(2, 3)).to(wide(q_xkrc.dtype))
    hidden_xt = torch.arange(score_xkrt.shape[-1], device=score_xkrt.device) >= length_x[:, None]
    score_xkrt.masked_fill_(hidden_xt[:, None, None], -math.inf)
    max_xkr1 = score_xkrt.amax(-1, keepdim=True).clamp(min=torch.finfo(score_xkrt.dtype).min)  # finite without keys too
    weight_xkrt = score_xkrt.sub_(max_xkr1).div_(math.sqrt(q_xkrc.shape[-1])).exp_()
    return weight_xkrt.to(v_xktc.dtype) @ v_xktc, max_xkr1, weight_xkrt.sum(-1, keepdim=True)


def _places(prompts, B):
    """prompts.place_b, worked out from slot_pm if it is not given."""
    if prompts.place_b is not None:
        return prompts.place_b
    slot_pm = prompts.slot_pm
    place_b = torch.full((B + 1,), -1, device=slot_pm.device)
    place_x = torch.arange(slot_pm.numel(), device=slot_pm.device)
    return place_b.scatter_(0, slot_pm.flatten() % (B + 1), place_x)[:B]  # -1 wraps to the last, which is cut off


@jit(do_not_specialize=["n_members", "n_row_tiles", "first_split", "n_splits", "splits"])  # they vary during a run
def _decode_split_kernel(q_ptr, k_ptr, v_ptr, length_ptr, slot_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_kx,
                         stride_kh, stride_kt, n_kv, n_members, n_row_tiles, first_split, n_splits, scale,
                         splits, SHARE: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_C: tl.constexpr):
    """The softmax of all slots of one item (a slot's own cache, or a prompt) over one split of the item's keys.

    Query rows are (member, head) pairs, and they are the columns of the products: k q^T and v^T weight need 64 or 128
    rows to fill a tensor core, which keys and channels have and one token's heads have not. Split s writes out and lse
    (log2) at first_split + s; an empty one leaves the lse that is there, minus infinity.
    """
    item = (tl.program_id(0) // n_row_tiles).to(tl.int64)
    kv, split = tl.program_id(1), tl.program_id(2)
    n_keys = tl.load(length_ptr + item).to(tl.int32)
    n_split_keys = tl.cdiv(tl.cdiv(n_keys, splits), BLOCK_N) * BLOCK_N
    begin = split * n_split_keys
    end = tl.minimum(begin + n_split_keys, n_keys)
    if begin < end:
        r = tl.program_id(0) % n_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        j, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
        member_m, head_m = r // SHARE, kv * SHARE + r % SHARE
        slot_m = tl.load(slot_ptr + item * n_members + member_m, mask=member_m < n_members, other=-1).to(tl.int64)
        real_m = slot_m >= 0
        q_m = q_ptr + slot_m * stride_qb + head_m * stride_qh
        q_mc = _load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
        k_ptr += item * stride_kx + kv.to(tl.int64) * stride_kh
        v_ptr += item * stride_kx + kv.to(tl.int64) * stride_kh
        max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_m = tl.zeros([BLOCK_M], tl.float32)
        acc_cm = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
        for start in range(begin, end, BLOCK_N):
            real_n = start + j < end
            offset_nc = ((start + j).to(tl.int64) * stride_kt)[:, None] + c[None, :]
            k_nc = _load_rows(k_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
            score_nm = tl.dot(k_nc, q_mc.T, input_precision="ieee") * (scale * LOG2E)
            score_nm = tl.where(real_n[:, None], score_nm, float("-inf"))
            new_max_m = tl.maximum(max_m, tl.max(score_nm, 0))
            weight_nm = tl.exp2(score_nm - new_max_m[None, :])
            keep_m = tl.exp2(max_m - new_max_m)
            sum_m = sum_m * keep_m + tl.sum(weight_nm, 0)
            v_nc = _load_rows(v_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
            acc_cm = tl.dot(v_nc.T, weight_nm.to(v_nc.dtype), acc_cm * keep_m[None, :], input_precision="ieee")
            max_m = new_max_m
        out_m = (slot_m * (n_kv * SHARE) + head_m) * n_splits + first_split + split
        tl.store(out_ptr + out_m[None, :] * C + c[:, None], acc_cm / sum_m[None, :],
                 mask=real_m[None, :] & (c < C)[:, None])
        tl.store(lse_ptr + out_m, max_m + tl.log2(sum_m), mask=real_m)


@jit(do_not_specialize=["n_splits"])
def _decode_merge_kernel(part_ptr, lse_ptr, out_ptr, n_splits, C: tl.constexpr, BLOCK_S: tl.constexpr,
                         BLOCK_C: tl.constexpr):
    """out = sum_s weight_s part_s with weight = softmax(lse over the splits s), for one head of one slot."""
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    row = tl.program_id(0).to(tl.int64)
    lse_s = tl.load(lse_ptr + row * n_splits + s, mask=s < n_splits, other=float("-inf"))
    weight_s = tl.exp2(lse_s - tl.max(lse_s, 0))
    # an empty split wrote no part: what lies there may be NaN, and is not read
    part_sc = tl.load(part_ptr + (row * n_splits + s)[:, None] * C + c[None, :],
                      mask=(lse_s > float("-inf"))[:, None] & (c < C)[None, :], other=0.0)
    out_c = tl.sum(weight_s[:, None] * part_sc, 0) / tl.sum(weight_s, 0)
    tl.store(out_ptr + row * C + c, out_c.to(out_ptr.dtype.element_ty), mask=c < C)


def _decode_triton(q_bhc, k_bktc, v_bktc, length_b, prompts):
    """Both parts split over their keys, then merged. The grid depends on shapes alone, so a CUDA graph can hold it."""
    B, H, C = q_bhc.shape
    K, T = k_bktc.shape[1:3]
    parts = [(k_bktc, v_bktc, length_b, torch.arange(B, device=q_bhc.device)[:, None])]
    if prompts is not None:
        parts.append((prompts.k_pkuc, prompts.v_pkuc, prompts.length_p, prompts.slot_pm))
    launches, n_splits = [], 0
    for k, v, length_x, slot_xm in parts:
        _check(q_bhc, k, v)
        assert k.stride() == v.stride() and k.shape == v.shape and k.shape[::3] == (len(length_x), C), (k.shape, C)
        n_rows = slot_xm.shape[1] * (H // K)
        tiling, options = _tiling("decode", C, q_bhc, n_rows)
        n_row_tiles = triton.cdiv(n_rows, tiling["BLOCK_M"])
        splits = _n_splits(len(length_x) * n_row_tiles * K, k.shape[2], tiling["BLOCK_N"], q_bhc.device)
        launches.append((k, v, length_x, slot_xm.contiguous(), n_row_tiles, n_splits, splits, tiling, options))
        n_splits += splits
    part_bhsc = q_bhc.new_empty(B, H, n_splits, C, dtype=torch.float32)
    lse_bhs = torch.full((B, H, n_splits), -math.inf, device=q_bhc.device)
    for k, v, length_x, slot_xm, n_row_tiles, first_split, splits, tiling, options in launches:
        _decode_split_kernel[len(length_x) * n_row_tiles, K, splits](
            q_bhc, k, v, length_x, slot_xm, part_bhsc, lse_bhs, q_bhc.stride(0), q_bhc.stride(1), *k.stride()[:3], K,
            slot_xm.shape[1], n_row_tiles, first_split, n_splits, 1 / math.sqrt(C), splits, H // K, C, **tiling,
            **options)
    out_bhc = q_bhc.new_empty(B, H, C)
    BLOCK_S, BLOCK_C = triton.next_power_of_2(n_splits), triton.next_power_of_2(C)
    _decode_merge_kernel[B * H,](part_bhsc, lse_bhs, out_bhc, n_splits, C, BLOCK_S, BLOCK_C,
                                 num_warps=min(max(BLOCK_S * BLOCK_C // 2048, 1), 16), **POINTWISE)
    return out_bhc


@functools.lru_cache
def _n_splits(n_programs, T, BLOCK_N, device):
    """Splits of the keys, a power of two, so that few programs fill the GPU twice; at least 4 blocks of keys each."""
    n_cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    wanted = min(2 * n_cores / n_programs, T / (4 * BLOCK_N), 64)
    return 2 ** max(0, math.ceil(math.log2(wanted)))


def _decode_invariant(q_bhc, k_bktc, v_bktc, length_b, prompts):
    """Each slot is a segment of one token whose keys lie in the caches: the sums of `attention` in the same order."""
    B, device = len(q_bhc), q_bhc.device
    prompt_k, prompt_v, zero_b = k_bktc, v_bktc, torch.zeros(B, dtype=torch.int64, device=device)
    place_b, n_prefix_b = zero_b, zero_b
    if prompts is not None:
        prompt_k, prompt_v = prompts.k_pkuc, prompts.v_pkuc
        place_b = _places(prompts, B)
        n_prefix_b = torch.where(place_b >= 0, prompts.length_p[place_b // prompts.slot_pm.shape[1]], 0)
        place_b = place_b.clamp(min=0) // prompts.slot_pm.shape[1]
    assert k_bktc.stride(0) % k_bktc.stride(2) == prompt_k.stride(0) % prompt_k.stride(2) == 0
    own_b = torch.arange(B, device=device) * (k_bktc.stride(0) // k_bktc.stride(2))  # rows are [C] blocks of memory
    prompt_b = place_b * (prompt_k.stride(0) // prompt_k.stride(2))
    table = torch.stack([torch.arange(B, device=device), zero_b + 1, n_prefix_b + length_b - 1, own_b, prompt_b,
                         n_prefix_b], 1).to(torch.int32)
    rows = [x[0].transpose(0, 1) for x in (k_bktc, v_bktc, prompt_k, prompt_v)]
    return _launch_attention(q_bhc, *rows, lambda tokens_per_tile: table, True, True)[0]


def decode_attention(q_bhc, k_bktc, v_bktc, length_b, prompts=None, impl=None):
    """Attention of one token per slot over its prompt and the first length_b entries of its cache; returns out_bhc.

    The slot's own new token is in its cache already: length_b is at least 1. In the Triton path a program takes one
    split of a slot's keys, or of a prompt's keys for all the heads and slots that share them: a prompt is read once for
    its group, and one long sequence still fills the GPU.
    """
    if not use_triton(q_bhc, impl):
        return decode_attention_ref(q_bhc, k_bktc, v_bktc, length_b, prompts)
    decode = _decode_invariant if impl == "invariant" else _decode_triton
    return decode(q_bhc, k_bktc, v_bktc, length_b, prompts)


# ------------------------------------------------------------------------------------------ log-probabilities of tokens


class _LinearLogp(torch.autograd.Function):
    """z = hidden weight^T / temperature, a block of columns after the other. With M = max z, S = sum exp(z - M) and
    E = sum exp(z - M) (z - M) so far: logp = (z[target] - M) - log S, entropy = log S - E / S in the end. (Sums of one
    sign: lse - sum p z or z[target] - lse cancel in float32 where one token is nearly certain.)

    The backward pass recomputes each block's z: dz = grad (onehot(target) - softmax(z)) / temperature, dhidden = sum
    over blocks of dz weight, dweight = dz^T hidden: one whole product for the rows of a block. Blocks of rows instead
    would add up dweight, the largest array here, again and again.
    """

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, temperature):
        dtype, N = wide(hidden_nd.dtype), len(hidden_nd)
        max_n = hidden_nd.new_full((N,), torch.finfo(dtype).min, dtype=dtype)
        sum_n, moment_n, logit_n = (torch.zeros_like(max_n) for _ in range(3))
        for first, z_nv, other_nv in _column_blocks(hidden_nd, weight_vd, temperature, 2):
            within_n = target_n - first
            inside_n = (within_n >= 0) & (within_n < z_nv.shape[1])
            here_n = z_nv.gather(1, within_n.clamp(0, z_nv.shape[1] - 1)[:, None])[:, 0]
            logit_n = torch.where(inside_n, here_n, logit_n)
            new_max_n = torch.maximum(max_n, z_nv.amax(1))
            down_n, below_nv = max_n - new_max_n, z_nv.sub_(new_max_n[:, None])
            weight_nv = torch.exp(below_nv, out=other_nv)
            moment_n = down_n.exp() * (moment_n + sum_n * down_n)  # before sum_n: it is the old sum that moves down
            sum_n = down_n.exp() * sum_n + weight_nv.sum(1)
            moment_n += weight_nv.mul_(below_nv).sum(1)
            max_n = new_max_n
        log_sum_n = sum_n.log()
        entropy_n, lse_n = log_sum_n - moment_n / sum_n, max_n + log_sum_n
        ctx.save_for_backward(hidden_nd, weight_vd, target_n, max_n, log_sum_n)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_n, lse_n)
        return (logit_n - max_n) - log_sum_n, entropy_n, lse_n

    @staticmethod
    def backward(ctx, grad_n, *_):
        hidden_nd, weight_vd, target_n, max_n, log_sum_n = ctx.saved_tensors
        grad_hidden_nd = torch.zeros_like(hidden_nd, dtype=grad_n.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_vd = torch.empty_like(weight_vd) if ctx.needs_input_grad[1] else None
        scale_n1 = -(grad_n / ctx.temperature)[:, None]
        for first, z_nv in _column_blocks(hidden_nd, weight_vd, ctx.temperature, 1):
            last = first + z_nv.shape[1]
            dz_nv = z_nv.sub_(max_n[:, None]).sub_(log_sum_n[:, None]).exp_().mul_(scale_n1)
            rows = ((target_n >= first) & (target_n < last)).nonzero()[:, 0]
            dz_nv[rows, target_n[rows] - first] -= scale_n1[rows, 0]
            dz_nv = dz_nv.to(hidden_nd.dtype)
            if grad_hidden_nd is not None and grad_hidden_nd.dtype == dz_nv.dtype:
                grad_hidden_nd.addmm_(dz_nv, weight_vd[first:last])
            elif grad_hidden_nd is not None:
                grad_hidden_nd += dz_nv @ weight_vd[first:last]
            if grad_weight_vd is not None:
                torch.mm(dz_nv.t(), hidden_nd, out=grad_weight_vd[first:last])
        grad_hidden_nd = grad_hidden_nd.to(hidden_nd.dtype) if grad_hidden_nd is not None else None
        return grad_hidden_nd, grad_weight_vd, None, None


def _column_blocks(hidden_nd, weight_vd, temperature, n_blocks):
    """(first column, its block of logits z at the temperature, n_blocks - 1 empty ones like it), LOGIT_CHUNK elements.

    The blocks are allocated once: on a CPU fresh memory of this size costs more (page faults) than the softmax in it.
    """
    N, V = len(hidden_nd), len(weight_vd)
    step = max(1, min(V, LOGIT_CHUNK // max(N, 1)))
    memory = hidden_nd.new_empty(n_blocks, N * step, dtype=wide(hidden_nd.dtype))
    for first in range(0, V, step):
        weight_bd = weight_vd[first:first + step]
        z_nb, *others = (x[:N * len(weight_bd)].view(N, len(weight_bd)) for x in memory)
        if z_nb.dtype == hidden_nd.dtype:
            torch.mm(hidden_nd, weight_bd.t(), out=z_nb)
        else:
            z_nb.copy_(logits(hidden_nd, weight_bd))
        yield first, z_nb.div_(temperature), *others


@jit
def _logp_fwd_kernel(hidden_ptr, weight_ptr, target_ptr, max_ptr, sum_ptr, moment_ptr, logit_ptr, N, V, D, stride_hn,
                     stride_wv, inverse_temperature, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                     BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """One tile of logits z, reduced on the spot:  max z,  sum exp(z - max),  sum exp(z - max) (z - max),  z[target]."""
    n_col_tiles = tl.cdiv(V, BLOCK_V)
    row_tile, col_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), n_col_tiles, GROUP)
    row_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    col_v = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z_nv = _product_tile(hidden_ptr, weight_ptr, row_n, col_v, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D)
    z_nv *= inverse_temperature
    target_n = tl.load(target_ptr + row_n, mask=row_n < N, other=-1)
    logit_n = tl.sum(tl.where(col_v[None, :] == target_n[:, None], z_nv, 0.0), 1)
    tl.store(logit_ptr + row_n, logit_n, mask=(target_n >= col_tile * BLOCK_V) & (target_n < (col_tile + 1) * BLOCK_V))
    z_nv = tl.where((col_v < V)[None, :], z_nv, float("-inf"))
    max_n = tl.max(z_nv, 1)
    below_nv = tl.maximum(z_nv - max_n[:, None], -1e4)  # exp of it is zero already, and zero times it is not NaN
    weight_nv = tl.exp(below_nv)
    part_n = col_tile.to(tl.int64) * N + row_n
    tl.store(max_ptr + part_n, max_n, mask=row_n < N)
    tl.store(sum_ptr + part_n, tl.sum(weight_nv, 1), mask=row_n < N)
    tl.store(moment_ptr + part_n, tl.sum(weight_nv * below_nv, 1), mask=row_n < N)


@jit
def _logp_merge_kernel(max_ptr, sum_ptr, moment_ptr, logit_ptr, logp_ptr, entropy_ptr, N, n_tiles,
                       BLOCK_N: tl.constexpr):
    """The tiles of a row, first to last, under their common maximum M: S = sum exp(z - M), E = sum exp(z - M) (z - M),

    logp = (z[target] - M) - log S,  entropy = log S - E / S: sums of one sign, so that nothing cancels where one token
    is nearly certain. M and log S are left in the first tile's place, for the backward pass.
    """
    row_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_n = row_n < N
    max_n = tl.load(max_ptr + row_n, mask=real_n, other=0.0)
    sum_n = tl.load(sum_ptr + row_n, mask=real_n, other=1.0)
    moment_n = tl.load(moment_ptr + row_n, mask=real_n, other=0.0)
    for tile in range(1, n_tiles):
        part_n = tl.full([BLOCK_N], tile, tl.int64) * N + row_n
        tile_max_n = tl.load(max_ptr + part_n, mask=real_n, other=0.0)
        tile_sum_n = tl.load(sum_ptr + part_n, mask=real_n, other=1.0)
        tile_moment_n = tl.load(moment_ptr + part_n, mask=real_n, other=0.0)
        new_max_n = tl.maximum(max_n, tile_max_n)
        down_n, tile_down_n = max_n - new_max_n, tile_max_n - new_max_n
        keep_n, tile_keep_n = tl.exp(down_n), tl.exp(tile_down_n)
        moment_n = keep_n * (moment_n + sum_n * down_n) + tile_keep_n * (tile_moment_n + tile_sum_n * tile_down_n)
        sum_n = keep_n * sum_n + tile_keep_n * tile_sum_n
        max_n = new_max_n
    log_sum_n = tl.log(sum_n)
    logit_n = tl.load(logit_ptr + row_n, mask=real_n, other=0.0)
    tl.store(logp_ptr + row_n, (logit_n - max_n) - log_sum_n, mask=real_n)
    tl.store(entropy_ptr + row_n, log_sum_n - moment_n / sum_n, mask=real_n)
    tl.store(max_ptr + row_n, max_n, mask=real_n)
    tl.store(sum_ptr + row_n, log_sum_n, mask=real_n)


@jit
def _logp_bwd_kernel(hidden_ptr, weight_ptr, target_ptr, max_ptr, log_sum_ptr, grad_ptr, grad_logit_ptr, N, V, D,
                     first_col, n_cols, stride_hn, stride_wv, inverse_temperature, BLOCK_N: tl.constexpr,
                     BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """grad_logit = grad (onehot(target) - softmax(z)) / temperature for the columns from first_col on; z recomputed."""
    row_tile, col_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(n_cols, BLOCK_V), GROUP)
    row_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within_v = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    col_v = first_col + within_v
    z_nv = _product_tile(hidden_ptr, weight_ptr, row_n, col_v, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D)
    z_nv *= inverse_temperature
    real_n = row_n < N
    target_n = tl.load(target_ptr + row_n, mask=real_n, other=-1)
    max_n = tl.load(max_ptr + row_n, mask=real_n, other=float("inf"))  # no exp of large rubbish
    log_sum_n = tl.load(log_sum_ptr + row_n, mask=real_n, other=0.0)
    grad_n = tl.load(grad_ptr + row_n, mask=real_n, other=0.0)
    p_nv = tl.exp((z_nv - max_n[:, None]) - log_sum_n[:, None])
    hit_nv = tl.where(col_v[None, :] == target_n[:, None], 1.0, 0.0)
    grad_nv = (hit_nv - p_nv) * (grad_n * inverse_temperature)[:, None]
    tl.store(grad_logit_ptr + row_n.to(tl.int64)[:, None] * n_cols + within_v[None, :],
             grad_nv.to(grad_logit_ptr.dtype.element_ty), mask=real_n[:, None] & (within_v < n_cols)[None, :])


class _LinearLogpTriton(torch.autograd.Function):
    """The forward pass keeps four numbers per row and vocabulary tile; the backward pass recomputes the logits of
    GRADIENT_CHUNK / N columns at a time. A chunk of columns, not of rows: so each row of the weight's gradient is one
    whole product over N, and no float32 copy of it is summed up."""

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, temperature, invariant):
        hidden_nd, weight_vd = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden_nd, weight_vd))
        target_n = target_n.contiguous()
        _check(hidden_nd, weight_vd)
        (N, D), V = hidden_nd.shape, len(weight_vd)
        tiling, options = _tiling("linear_invariant" if invariant else "logp", 0, hidden_nd)
        n_tiles = triton.cdiv(V, tiling["BLOCK_V"])
        part_xtn = hidden_nd.new_empty(3, n_tiles, N, dtype=torch.float32)
        logit_n, logp_n, entropy_n = (torch.empty_like(part_xtn[0, 0]) for _ in range(3))
        if N:
            _logp_fwd_kernel[triton.cdiv(N, tiling["BLOCK_N"]) * n_tiles,](
                hidden_nd, weight_vd, target_n, *part_xtn, logit_n, N, V, D, hidden_nd.stride(0), weight_vd.stride(0),
                1 / temperature, **tiling, **options)
            _logp_merge_kernel[triton.cdiv(N, 64),](*part_xtn, logit_n, logp_n, entropy_n, N, n_tiles, 64, num_warps=2,
                                                    **POINTWISE)
        max_n, log_sum_n = part_xtn[:2, 0].clone()
        ctx.save_for_backward(hidden_nd, weight_vd, target_n, max_n, log_sum_n)
        ctx.temperature = temperature
        lse_n = max_n + log_sum_n
        ctx.mark_non_differentiable(entropy_n, lse_n)
        return logp_n, entropy_n, lse_n

    @staticmethod
    def backward(ctx, grad_n, *_):
        hidden_nd, weight_vd, target_n, max_n, log_sum_n = ctx.saved_tensors
        (N, D), V = hidden_nd.shape, len(weight_vd)
        tiling, options = _tiling("logp", 0, hidden_nd)
        step = max(tiling["BLOCK_V"], min(V, GRADIENT_CHUNK // max(N, 1) // tiling["BLOCK_V"] * tiling["BLOCK_V"]))
        grad_n, block = grad_n.contiguous(), hidden_nd.new_empty(N * step)
        grad_hidden_nd = torch.zeros_like(hidden_nd, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        new = torch.empty_like if N else torch.zeros_like  # without rows the loop writes nothing
        grad_weight_vd = new(weight_vd) if ctx.needs_input_grad[1] else None
        for first in range(0, V if N else 0, step):
            n_cols = min(step, V - first)
            grad_nv = block[:N * n_cols].view(N, n_cols)
            n_programs = triton.cdiv(N, tiling["BLOCK_N"]) * triton.cdiv(n_cols, tiling["BLOCK_V"])
            _logp_bwd_kernel[n_programs,](
                hidden_nd, weight_vd, target_n, max_n, log_sum_n, grad_n, grad_nv, N, V, D, first, n_cols,
                hidden_nd.stride(0), weight_vd.stride(0), 1 / ctx.temperature, **tiling, **options)
            if grad_hidden_nd is not None:
                grad_hidden_nd += grad_nv @ weight_vd[first:first + n_cols]
            if grad_weight_vd is not None:
                torch.mm(grad_nv.t(), hidden_nd, out=grad_weight_vd[first:first + n_cols])
        return None if grad_hidden_nd is None else grad_hidden_nd.to(hidden_nd.dtype), grad_weight_vd, None, None, None


def linear_logp(hidden_nd, weight_vd, target_n, temperature=1.0, impl=None, return_lse=False):
    """log softmax(hidden weight^T / temperature)[target] and that distribution's entropy, in nats: logp_n, entropy_n.

    With return_lse also lse_n = log sum exp(hidden weight^T / temperature). float32 (float64 for float64 inputs); only
    logp carries a gradient. Peak extra memory: in PyTorch two blocks of LOGIT_CHUNK elements, whatever N and V are; in
    Triton 12 bytes per row and column tile forward (0.12 GB at N = 16384, V = 151936), GRADIENT_CHUNK elements and a
    float32 gradient of hidden backward; and the gradients themselves.
    """
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    assert hidden_nd.shape[0] == target_n.shape[0] and hidden_nd.shape[1] == weight_vd.shape[1], \
        (hidden_nd.shape, weight_vd.shape, target_n.shape)
    if use_triton(hidden_nd, impl):
        out = _LinearLogpTriton.apply(hidden_nd, weight_vd, target_n, temperature, impl == "invariant")
    else:
        out = _LinearLogp.apply(hidden_nd, weight_vd, target_n, temperature)
    return out if return_lse else out[:2]


# ------------------------------------------------------------------------------------------------- the matrix product


@jit
def _linear_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, N, V, D, stride_xn, stride_wv, BLOCK_N: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr):
    """out = x weight^T + bias, one tile."""
    row_tile, col_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    row_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    col_v = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    out_nv = _product_tile(x_ptr, weight_ptr, row_n, col_v, N, V, D, stride_xn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D)
    if BIAS:
        out_nv += tl.load(bias_ptr + col_v, mask=col_v < V, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + row_n.to(tl.int64)[:, None] * V + col_v[None, :], out_nv.to(out_ptr.dtype.element_ty),
             mask=(row_n < N)[:, None] & (col_v < V)[None, :])


def _launch_linear(x_nd, weight_vd, bias_v, dtype):
    _check(x_nd, weight_vd, *([] if bias_v is None else [bias_v]))
    (N, D), V = x_nd.shape, len(weight_vd)
    tiling, options = _tiling("linear_invariant", 0, x_nd)
    out_nv = x_nd.new_empty(N, V, dtype=dtype)
    if N:
        _linear_kernel[triton.cdiv(N, tiling["BLOCK_N"]) * triton.cdiv(V, tiling["BLOCK_V"]),](
            x_nd, weight_vd, bias_v, out_nv, N, V, D, x_nd.stride(0), weight_vd.stride(0), BIAS=bias_v is not None,
            **tiling, **options)
    return out_nv


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nd, weight_vd, bias_v):
        x_nd = x_nd if x_nd.stride(1) == 1 else x_nd.contiguous()
        ctx.save_for_backward(x_nd, weight_vd)
        return _launch_linear(x_nd, weight_vd, bias_v, x_nd.dtype)

    @staticmethod
    def backward(ctx, grad_nv):
        x_nd, weight_vd = ctx.saved_tensors
        grad_x_nd = grad_nv @ weight_vd if ctx.needs_input_grad[0] else None
        grad_weight_vd = grad_nv.t() @ x_nd if ctx.needs_input_grad[1] else None
        return grad_x_nd, grad_weight_vd, grad_nv.sum(0) if ctx.needs_input_grad[2] else None


def linear(x_nd, weight_vd, bias_v=None, impl=None):
    """x weight^T + bias: PyTorch's own, unless impl is "invariant".

    A library picks tiles and splits by the number of rows, so a row's sum over D changes with the rows beside it. Here
    the tile is fixed and D is summed first to last; gradients are PyTorch's, since only the forward pass must agree.
    """
    if impl != "invariant":
        return F.linear(x_nd, weight_vd, bias_v)
    return _Linear.apply(x_nd, weight_vd, bias_v)


def logits(hidden_nd, weight_vd, impl=None):
    """hidden weight^T without gradient, float32 (float64 for float64 inputs): what the sampler draws from.

    On a GPU bfloat16 products are not rounded to bfloat16 on the way, like linear_logp's: rounded logits would put
    the sampler's log-probabilities 2e-2 off the trainer's.
    """
    if impl == "invariant":
        return _launch_linear(hidden_nd, weight_vd, None, torch.float32)
    if hidden_nd.is_cuda and wide(hidden_nd.dtype) != hidden_nd.dtype:
        return torch.mm(hidden_nd, weight_vd.t(), out_dtype=torch.float32)
    return F.linear(hidden_nd, weight_vd).to(wide(hidden_nd.dtype))


# ---------------------------------------------------------------------------------------------------- pointwise fusions


def add_rms_norm_ref(x_nd, delta_nd, weight_d, eps):
    """sum = x + delta;  normed = weight sum / sqrt(mean(sum^2) + eps), the division in float32 or wider."""
    sum_nd = x_nd if delta_nd is None else x_nd + delta_nd
    wide_nd = sum_nd.to(wide(sum_nd.dtype))
    return sum_nd, weight_d * (wide_nd * torch.rsqrt(wide_nd.square().mean(-1, keepdim=True) + eps)).to(sum_nd.dtype)


@jit
def _rms_norm_fwd_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, rstd_ptr, D, eps, ADD: tl.constexpr,
                         BLOCK_D: tl.constexpr):
    """rstd = 1 / sqrt(mean(x^2) + eps);  out = weight x rstd, one row; with ADD, x + delta takes x's place."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x_d = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)
    if ADD:
        x_d = (x_d.to(tl.float32) + tl.load(delta_ptr + row * D + d, mask=d < D, other=0.0)).to(x_d.dtype)
        tl.store(sum_ptr + row * D + d, x_d, mask=d < D)
    x_d = x_d.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x_d * x_d, 0) / D + eps)
    out_d = tl.load(weight_ptr + d, mask=d < D, other=0.0) * (x_d * rstd)
    tl.store(out_ptr + row * D + d, out_d.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(rstd_ptr + row, rstd)


@jit
def _rms_norm_bwd_kernel(x_ptr, weight_ptr, rstd_ptr, grad_ptr, grad_sum_ptr, grad_x_ptr, part_ptr, N, D,
                         ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    """With h = x rstd:  grad_x = rstd (weight grad - h mean(weight grad h)) (+ grad_sum);  grad_weight = sum_n grad h.

    A program takes every n-th row and leaves its part of grad_weight, a row of part.
    """
    d = tl.arange(0, BLOCK_D)
    weight_d = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    part_d = tl.zeros([BLOCK_D], tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(n, tl.int64)
        h_d = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32) * tl.load(rstd_ptr + row)
        grad_d = tl.load(grad_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        part_d += grad_d * h_d
        grad_d *= weight_d
        grad_x_d = (grad_d - h_d * (tl.sum(grad_d * h_d, 0) / D)) * tl.load(rstd_ptr + row)
        if ADD:
            grad_x_d += tl.load(grad_sum_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * D + d, grad_x_d.to(grad_x_ptr.dtype.element_ty), mask=d < D)
    tl.store(part_ptr + tl.program_id(0) * D + d, part_d, mask=d < D)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nd, delta_nd, weight_d, eps):
        x_nd, (N, D) = x_nd.contiguous(), x_nd.shape
        delta_nd = None if delta_nd is None else delta_nd.contiguous()
        _check(x_nd, weight_d, *([] if delta_nd is None else [delta_nd]))
        sum_nd = x_nd if delta_nd is None else torch.empty_like(x_nd)
        out_nd, rstd_n = torch.empty_like(x_nd), x_nd.new_empty(N, dtype=torch.float32)
        if N:
            _rms_norm_fwd_kernel[N,](x_nd, delta_nd, weight_d, sum_nd, out_nd, rstd_n, D, eps, delta_nd is not None,
                                     triton.next_power_of_2(D), num_warps=_row_warps(D), **POINTWISE)
        ctx.save_for_backward(sum_nd, weight_d, rstd_n)
        ctx.add = delta_nd is not None
        return (sum_nd, out_nd) if ctx.add else out_nd

    @staticmethod
    def backward(ctx, *grads):
        sum_nd, weight_d, rstd_n = ctx.saved_tensors
        N, D = sum_nd.shape
        grads = [g.contiguous() for g in grads]
        grad_x_nd, n_programs = torch.empty_like(sum_nd), min(N, 1024)
        part_pd = rstd_n.new_empty(n_programs, D)
        if N:
            _rms_norm_bwd_kernel[n_programs,](sum_nd, weight_d, rstd_n, grads[-1], grads[0], grad_x_nd, part_pd, N, D,
                                              ctx.add, triton.next_power_of_2(D), num_warps=_row_warps(D), **POINTWISE)
        return grad_x_nd, grad_x_nd if ctx.add else None, part_pd.sum(0).to(weight_d.dtype), None


def _row_warps(D):
    return min(max(triton.next_power_of_2(D) // 512, 1), 16)


def rms_norm(x_nd, weight_d, eps, impl=None):
    """weight x / sqrt(mean(x^2) + eps) over the last axis."""
    if not use_triton(x_nd, impl):
        return add_rms_norm_ref(x_nd, None, weight_d, eps)[1]
    return _AddRmsNorm.apply(x_nd, None, weight_d, eps)


def add_rms_norm(x_nd, delta_nd, weight_d, eps, impl=None):
    """The residual stream x + delta, and its rms_norm, in one pass over memory."""
    if not use_triton(x_nd, impl):
        return add_rms_norm_ref(x_nd, delta_nd, weight_d, eps)
    return _AddRmsNorm.apply(x_nd, delta_nd, weight_d, eps)


def rope_ref(x_nhc, cos_nc, sin_nc, weight_c=None, eps=0.0):
    """rms_norm over the channels of a head, if there is a weight; then channel pairs (i, i + C/2), Hugging Face's
    half-split layout, rotate by their token's angle."""
    if weight_c is not None:
        x_nhc = add_rms_norm_ref(x_nhc, None, weight_c, eps)[1]
    a, b = x_nhc.chunk(2, dim=-1)
    cos, sin = cos_nc[:, None], sin_nc[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_nhc.dtype)


@jit
def _rope_fwd_kernel(x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, eps, stride_xn, stride_xh, H: tl.constexpr,
                     HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """(a, b) -> (a cos - b sin, b cos + a sin) for the two halves of the channels of a token's heads."""
    row = tl.program_id(0).to(tl.int64)
    h, c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    real_hc = (h < H)[:, None] & (c < HALF)[None, :]
    x_hc = x_ptr + row * stride_xn + h[:, None] * stride_xh + c[None, :]
    a_hc = tl.load(x_hc, mask=real_hc, other=0.0).to(tl.float32)
    b_hc = tl.load(x_hc + HALF, mask=real_hc, other=0.0).to(tl.float32)
    if NORM:
        rstd_h = tl.rsqrt((tl.sum(a_hc * a_hc, 1) + tl.sum(b_hc * b_hc, 1)) / (2 * HALF) + eps)
        a_hc *= rstd_h[:, None] * tl.load(weight_ptr + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
        b_hc *= rstd_h[:, None] * tl.load(weight_ptr + HALF + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
    cos_c = tl.load(cos_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
    sin_c = tl.load(sin_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
    out_hc = out_ptr + (row * H + h)[:, None] * (2 * HALF) + c[None, :]
    tl.store(out_hc, (a_hc * cos_c - b_hc * sin_c).to(out_ptr.dtype.element_ty), mask=real_hc)
    tl.store(out_hc + HALF, (b_hc * cos_c + a_hc * sin_c).to(out_ptr.dtype.element_ty), mask=real_hc)


@jit
def _rope_bwd_kernel(x_ptr, cos_ptr, sin_ptr, weight_ptr, grad_ptr, grad_x_ptr, part_ptr, N, eps, stride_xn, stride_xh,
                     H: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """The gradient is rotated back by the same angle; then, with NORM, through the norm as in _rms_norm_bwd_kernel."""
    h, c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    real_hc = (h < H)[:, None] & (c < HALF)[None, :]
    part_a_c, part_b_c = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(n, tl.int64)
        grad_hc = grad_ptr + (row * H + h)[:, None] * (2 * HALF) + c[None, :]
        u_hc = tl.load(grad_hc, mask=real_hc, other=0.0).to(tl.float32)
        w_hc = tl.load(grad_hc + HALF, mask=real_hc, other=0.0).to(tl.float32)
        cos_c = tl.load(cos_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
        sin_c = tl.load(sin_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
        grad_a_hc = u_hc * cos_c + w_hc * sin_c
        grad_b_hc = w_hc * cos_c - u_hc * sin_c
        if NORM:
            x_hc = x_ptr + row * stride_xn + h[:, None] * stride_xh + c[None, :]
            a_hc = tl.load(x_hc, mask=real_hc, other=0.0).to(tl.float32)
            b_hc = tl.load(x_hc + HALF, mask=real_hc, other=0.0).to(tl.float32)
            rstd_h = tl.rsqrt((tl.sum(a_hc * a_hc, 1) + tl.sum(b_hc * b_hc, 1)) / (2 * HALF) + eps)
            a_hc *= rstd_h[:, None]
            b_hc *= rstd_h[:, None]
            part_a_c += tl.sum(grad_a_hc * a_hc, 0)
            part_b_c += tl.sum(grad_b_hc * b_hc, 0)
            grad_a_hc *= tl.load(weight_ptr + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
            grad_b_hc *= tl.load(weight_ptr + HALF + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
            mean_h = (tl.sum(grad_a_hc * a_hc, 1) + tl.sum(grad_b_hc * b_hc, 1)) / (2 * HALF)
            grad_a_hc = (grad_a_hc - a_hc * mean_h[:, None]) * rstd_h[:, None]
            grad_b_hc = (grad_b_hc - b_hc * mean_h[:, None]) * rstd_h[:, None]
        grad_x_hc = grad_x_ptr + (row * H + h)[:, None] * (2 * HALF) + c[None, :]
        tl.store(grad_x_hc, grad_a_hc.to(grad_x_ptr.dtype.element_ty), mask=real_hc)
        tl.store(grad_x_hc + HALF, grad_b_hc.to(grad_x_ptr.dtype.element_ty), mask=real_hc)
    if NORM:
        tl.store(part_ptr + tl.program_id(0) * (2 * HALF) + c, part_a_c, mask=c < HALF)
        tl.store(part_ptr + tl.program_id(0) * (2 * HALF) + HALF + c, part_b_c, mask=c < HALF)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nhc, cos_nc, sin_nc, weight_c, eps):
        x_nhc = x_nhc if x_nhc.stride(2) == 1 else x_nhc.contiguous()
        _check(x_nhc, *([] if weight_c is None else [weight_c]))
        N, H, C = x_nhc.shape
        assert cos_nc.dtype == sin_nc.dtype == torch.float32 and cos_nc.is_contiguous() and sin_nc.is_contiguous()
        ctx.shapes = H, C // 2, weight_c is not None, triton.next_power_of_2(H), triton.next_power_of_2(C // 2)
        ctx.strides, ctx.eps = x_nhc.stride()[:2], eps
        out_nhc = x_nhc.new_empty(N, H, C)
        if N:
            _rope_fwd_kernel[N,](x_nhc, cos_nc, sin_nc, weight_c, out_nhc, eps, *ctx.strides, *ctx.shapes, **POINTWISE)
        ctx.save_for_backward(None if weight_c is None else x_nhc, cos_nc, sin_nc, weight_c)
        return out_nhc

    @staticmethod
    def backward(ctx, grad_nhc):
        x_nhc, cos_nc, sin_nc, weight_c = ctx.saved_tensors
        N, H, C = grad_nhc.shape
        grad_nhc = grad_nhc.contiguous()
        grad_x_nhc, n_programs = torch.empty_like(grad_nhc), min(N, 1024)
        part_pc = None if weight_c is None else cos_nc.new_empty(n_programs, C)
        if N:
            _rope_bwd_kernel[n_programs,](x_nhc, cos_nc, sin_nc, weight_c, grad_nhc, grad_x_nhc, part_pc, N, ctx.eps,
                                          *ctx.strides, *ctx.shapes, **POINTWISE)
        return grad_x_nhc, None, None, None if weight_c is None else part_pc.sum(0).to(weight_c.dtype), None


def rope(x_nhc, cos_nc, sin_nc, weight_c=None, eps=0.0, impl=None):
    """Rotary embedding, after Qwen3's norm over the channels of a head if weight_c is given."""
    if not use_triton(x_nhc, impl):
        return rope_ref(x_nhc, cos_nc, sin_nc, weight_c, eps)
    return _Rope.apply(x_nhc, cos_nc, sin_nc, weight_c, eps)


def swiglu_ref(gate_nf, up_nf):
    """silu(gate) up, with silu(x) = x sigmoid(x)."""
    return F.silu(gate_nf) * up_nf


@jit
def _swiglu_fwd_kernel(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = gate sigmoid(gate) up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=i < n)


@jit
def _swiglu_bwd_kernel(gate_ptr, up_ptr, grad_ptr, grad_gate_ptr, grad_up_ptr, n, BLOCK: tl.constexpr):
    """With s = sigmoid(gate):  grad_up = grad gate s;  grad_gate = grad up s (1 + gate (1 - s))."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(grad_up_ptr + i, (grad * gate * s).to(grad_up_ptr.dtype.element_ty), mask=i < n)
    tl.store(grad_gate_ptr + i, (grad * up * s * (1 + gate * (1 - s))).to(grad_gate_ptr.dtype.element_ty), mask=i < n)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_nf, up_nf):
        gate_nf, up_nf = gate_nf.contiguous(), up_nf.contiguous()
        _check(gate_nf, up_nf)
        out_nf = torch.empty_like(gate_nf)
        if out_nf.numel():
            n = out_nf.numel()
            _swiglu_fwd_kernel[triton.cdiv(n, 1024),](gate_nf, up_nf, out_nf, n, 1024, **POINTWISE)
        ctx.save_for_backward(gate_nf, up_nf)
        return out_nf

    @staticmethod
    def backward(ctx, grad_nf):
        gate_nf, up_nf = ctx.saved_tensors
        grad_gate_nf, grad_up_nf = torch.empty_like(gate_nf), torch.empty_like(up_nf)
        if grad_nf.numel():
            _swiglu_bwd_kernel[triton.cdiv(grad_nf.numel(), 1024),](
                gate_nf, up_nf, grad_nf.contiguous(), grad_gate_nf, grad_up_nf, grad_nf.numel(), 1024, **POINTWISE)
        return grad_gate_nf, grad_up_nf


def swiglu(gate_nf, up_nf, impl=None):
    """silu(gate) up, elementwise: the MLP's middle."""
    if not use_triton(gate_nf, impl):
        return swiglu_ref(gate_nf, up_nf)
    return _SwiGLU.apply(gate_nf, up_nf)
