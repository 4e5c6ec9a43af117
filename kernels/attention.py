"""`attention`: packed segments that see themselves causally and their parent whole."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from kernels.tiles import LOG2E, check_launch, jit, load_rows, tiling_of, tl


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
    q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
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
            k_nc = load_rows(k_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
            score_mn = tl.dot(q_mc, k_nc.T, input_precision="ieee") * (scale * LOG2E)
            if MASKED:
                score_mn = tl.where(key_n[None, :] <= (position + token_m)[:, None], score_mn, float("-inf"))
            new_max_m = tl.maximum(max_m, tl.max(score_mn, 1))  # finite: all rows see position 0, of the first block
            weight_mn = tl.exp2(score_mn - new_max_m[:, None])
            keep_m = tl.exp2(max_m - new_max_m)
            sum_m = sum_m * keep_m + tl.sum(weight_mn, 1)
            v_nc = load_rows(v_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
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
    q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
    row_m = row_m * (n_kv * SHARE) + head_m
    dense_mc = row_m[:, None] * C + c[None, :]
    grad_out_mc = load_rows(grad_out_ptr + dense_mc, real_m, c, C, BLOCK_C, True)
    out_mc = load_rows(out_ptr + dense_mc, real_m, c, C, BLOCK_C, True)
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
            k_nc = load_rows(k_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
            v_nc = load_rows(v_n[:, None] + c[None, :], real_n, c, C, BLOCK_C, MASKED)
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
    k_nc = load_rows(k_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
    v_nc = load_rows(v_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
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
            q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
            row_m = token_m * (n_kv * SHARE) + head_m
            grad_out_mc = load_rows(grad_out_ptr + (row_m[:, None] * C + c[None, :]), real_m, c, C, BLOCK_C, True)
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


class AttentionTriton(torch.autograd.Function):
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
        out_nhc, lse_nh = launch_attention(q_nhc, k_nkc, v_nkc, k_nkc, v_nkc, tiles, False, invariant)
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
        tiling, options = tiling_of("attention_bwd_q", C, q_nhc)
        tiles = _query_tiles(ctx.segments, _tokens_per_tile(tiling, H, K), q_nhc.device)
        if len(tiles):
            _attention_bwd_q_kernel[len(tiles) * K,](
                q_nhc, k_nkc, v_nkc, out_nhc, grad_out_nhc, lse_nh, delta_nh, grad_q_nhc, tiles, *strides, K,
                1 / math.sqrt(C), H // K, C, **tiling, **options)
        tiling, options = tiling_of("attention_bwd_kv", C, q_nhc)
        tiles = _key_tiles(ctx.segments, tiling["BLOCK_N"], q_nhc.device)
        if len(tiles):
            _attention_bwd_kv_kernel[len(tiles) * K,](
                q_nhc, k_nkc, v_nkc, grad_out_nhc, lse_nh, delta_nh, grad_k_nkc, grad_v_nkc, tiles, *strides, K,
                1 / math.sqrt(C), H // K, C, **tiling, **options)
        return grad_q_nhc, grad_k_nkc, grad_v_nkc, None, None


def _tokens_per_tile(tiling, H, K):
    assert H // K <= tiling["BLOCK_M"], f"{H} heads share {K}: at most {tiling['BLOCK_M']} may share one"
    return tiling["BLOCK_M"] // (H // K)


def launch_attention(q_nhc, k_rkc, v_rkc, prefix_k_rkc, prefix_v_rkc, tiles, cached, invariant):
    """out_nhc and lse_nh; tiles(tokens per tile) gives the table of _query_tiles."""
    (N, H, C), K = q_nhc.shape, k_rkc.shape[1]
    check_launch(q_nhc, k_rkc, v_rkc, prefix_k_rkc, prefix_v_rkc)
    assert k_rkc.stride() == v_rkc.stride() and prefix_k_rkc.stride() == prefix_v_rkc.stride()
    tiling, options = tiling_of("attention_invariant" if invariant else "attention_fwd", C, q_nhc)
    assert not cached or all(s * q_nhc.element_size() % 16 == 0 for x in (k_rkc, prefix_k_rkc) for s in x.stride()[:2])
    out_nhc, lse_nh = q_nhc.new_empty(N, H, C), q_nhc.new_empty(N, H, dtype=torch.float32)
    table = tiles(_tokens_per_tile(tiling, H, K))
    if len(table):
        _attention_fwd_kernel[len(table) * K,](
            q_nhc, k_rkc, v_rkc, prefix_k_rkc, prefix_v_rkc, out_nhc, lse_nh, table, q_nhc.stride(0), q_nhc.stride(1),
            k_rkc.stride(0), k_rkc.stride(1), prefix_k_rkc.stride(0), prefix_k_rkc.stride(1), K, 1 / math.sqrt(C),
            H // K, C, CACHED=cached, **tiling, **options)
    return out_nhc, lse_nh
