"""`attention`: packed segments that see themselves causally and their parent whole.

A token's keys are a prefix (its parent's, or a prompt's in pages) and its own segment's up to itself.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from kernels.tiles import LOG2E, attention_tiling, check_launch, in_pages, jit, load_rows, tl


def attention_ref(q_nhc, k_nkc, v_nkc, segments_s3):
    """softmax(q k^T / sqrt(C)) v of every segment over what it sees, by scaled_dot_product_attention.

    Segments of similar size are padded into one call: a forest of many short segments costs a handful of calls, and a
    long one is padded by 31 keys at most, and as many of its prompt.
    """
    H = q_nhc.shape[1]
    out_nhc = torch.zeros_like(q_nhc)
    for query_st, key_su, real_st, visible in _padded_segments(segments_s3, q_nhc.device):
        q = _gather(q_nhc, query_st).transpose(1, 2)  # [S, H, T, C]
        k = _gather(k_nkc, key_su).transpose(1, 2)
        v = _gather(v_nkc, key_su).transpose(1, 2)
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

    Example: replies of 3 and 2 tokens to a prompt of 2, [(0, 2, -1), (2, 3, 0), (5, 2, 0)], are one group. Its
    query_st is [[2, 3, 4], [5, 6, 6]], where the last 6 is padding; its key_su is [[0, 1, 2, 3, 4], [0, 1, 5, 6, 6]].
    """
    start, length, parent = segments_s3.unbind(1)
    has_parent = parent >= 0  # where it is not, parent -1 picks the last segment below: times False, it counts zero
    parent_start, parent_length = start[parent] * has_parent, length[parent] * has_parent
    assert not has_parent[parent[has_parent]].any(), "a parent segment must be parentless"
    size_s2 = torch.stack([(length + 31) // 32, (parent_length + 31) // 32], 1)
    for size in size_s2[length > 0].unique(dim=0):
        group = ((size_s2 == size).all(1) & (length > 0)).nonzero()[:, 0]
        start_s1, length_s1 = start[group, None], length[group, None]
        parent_start_s1, parent_length_s1 = parent_start[group, None], parent_length[group, None]
        row_t = torch.arange(int(length_s1.max()))
        prefix_u = torch.arange(int(parent_length_s1.max()))
        real_st = row_t < length_s1
        query_st = start_s1 + row_t.minimum(length_s1 - 1)  # padding repeats the last token
        if len(prefix_u) == 0:
            yield query_st.to(device), query_st.to(device), real_st.to(device), None
            continue
        prefix_su = parent_start_s1 + prefix_u.minimum((parent_length_s1 - 1).clamp(min=0))
        sees_prefix_stu = (prefix_u < parent_length_s1)[:, None, :].expand(-1, len(row_t), -1)
        sees_own_stt = (row_t[None, :, None] >= row_t[None, None, :]).expand(len(group), -1, -1)
        key_su = torch.cat([prefix_su, query_st], 1)
        visible = torch.cat([sees_prefix_stu, sees_own_stt], 2)[:, None]
        yield query_st.to(device), key_su.to(device), real_st.to(device), visible.to(device)


@jit
def _packed_at(key_n, n_prefix, own_row, prefix_row, stride):
    """Where keys number key_n of a sequence lie: the first n_prefix are rows from prefix_row on, then own_row's.

    The reply (5, 2, 0) to the prompt (0, 3, -1) has prefix_row 0, n_prefix 3, own_row 5: its keys are rows 0 1 2 5 6.
    Offsets of packed keys fit 32 bits, which the launcher asserts: in 64 they made a tenth of the loops' instructions.
    """
    return tl.where(key_n < n_prefix, prefix_row + key_n, own_row + key_n - n_prefix) * stride


@jit
def _load_tile(tile_ptr):
    """The six numbers of a row of _query_tiles."""
    first, n_tokens, position = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    return first, n_tokens, position, tl.load(tile_ptr + 3), tl.load(tile_ptr + 4), tl.load(tile_ptr + 5)


@jit
def _attention_fwd_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_ptr, own_page_ptr, prefix_page_ptr, stride_qn,
                          stride_qh, stride_kn, stride_kh, stride_kx, n_kv, scale, SHARE: tl.constexpr, C: tl.constexpr,
                          I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = softmax(scale q k^T) v and lse = log2 of the softmax's denominator, for one tile of queries of one segment.

    Keys are taken in blocks of the sequence's own positions, prompt first, whatever lies where in memory; so the order
    of a row's sums depends on its position alone. They lie packed (I is 0), or in a pool's pages of I tokens, which
    own_page_ptr and prefix_page_ptr list from own_row and from prefix_row on.
    """
    # 1. Which tile: BLOCK_M / SHARE tokens of a segment, and the heads that share key/value head kv. With 3 heads each,
    #    rows 0 1 2 3 .. are token 0's heads 0 1 2, token 1's head 0 ..
    tile_ptr += tl.program_id(0) // n_kv * 6  # a row of _query_tiles
    kv = tl.program_id(0) % n_kv
    first, n_tokens, position, own_row, prefix_row, n_prefix = _load_tile(tile_ptr)
    r, j, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    token_m, head_m = r // SHARE, kv * SHARE + r % SHARE
    real_m = token_m < n_tokens
    row_m = (first + token_m).to(tl.int64)  # 600,000 tokens of 28 heads of 128 channels are 2^31 elements
    q_m = q_ptr + row_m * stride_qn + head_m * stride_qh
    q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C)
    k_ptr, v_ptr = k_ptr + kv * stride_kh.to(tl.int64), v_ptr + kv * stride_kh.to(tl.int64)
    # 2. Online softmax: weight = exp2(score - max); acc and sum are rescaled whenever the running maximum grows. Scores
    #    1 and 3, then a block with 5: max 3, sum 2^-2 + 2^0 = 1.25; then max 5, sum 1.25 2^-2 + 2^0 = 1.3125, and
    #    1.3125 2^5 = 2^1 + 2^3 + 2^5. The first n_clear keys every row sees: a tile at position 100 sees key 0 to 100
    #    with its first row, so in blocks of 64 one is clear. In the blocks around the diagonal the scores that a row
    #    must not see start from minus infinity, to which the product adds. One loop with an `if`, not two loops: if
    #    the first one may have nothing to do, ptxas lets no two products of an H100 run into each other (C7515)
    max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_m = tl.zeros([BLOCK_M], tl.float32)
    acc_mc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    n_keys = position + n_tokens
    n_clear = (position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, n_keys, BLOCK_N):
        key_n = start + j
        real_n = key_n < n_keys
        if I == 0:
            at_n = _packed_at(key_n, n_prefix, own_row, prefix_row, stride_kn)
        else:
            page_ptr_n = tl.where(key_n < n_prefix, prefix_page_ptr + prefix_row, own_page_ptr + own_row)
            token_n = tl.where(key_n < n_prefix, key_n, key_n - n_prefix)
            at_n = in_pages(page_ptr_n, token_n, real_n, stride_kx, stride_kn, I)
        k_nc = load_rows((k_ptr + at_n)[:, None] + c[None, :], real_n, c, C, BLOCK_C)
        v_nc = load_rows((v_ptr + at_n)[:, None] + c[None, :], real_n, c, C, BLOCK_C)
        mask_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if start >= n_clear:
            mask_mn = tl.where(key_n[None, :] <= (position + token_m)[:, None], 0.0, float("-inf"))
        # "ieee": float32 inputs are multiplied in float32; Triton's default would be TF32, of 10 bits
        score_mn = tl.dot(q_mc, k_nc.T, mask_mn, input_precision="ieee")
        # the maximum is finite: all rows see position 0, of the first block. It is taken before the scores are scaled:
        # then scaling them and subtracting it is one instruction
        new_max_m = tl.maximum(max_m, tl.max(score_mn, 1) * (scale * LOG2E))
        weight_mn = tl.exp2(score_mn * (scale * LOG2E) - new_max_m[:, None])
        keep_m = tl.exp2(max_m - new_max_m)
        sum_m = sum_m * keep_m + tl.sum(weight_mn, 1)
        acc_mc = tl.dot(weight_mn.to(v_nc.dtype), v_nc, acc_mc * keep_m[:, None], input_precision="ieee")
        max_m = new_max_m
    # 3. out is dense [N, H, C], lse [N, H]. Where a row goes is read and computed again (volatile: or the compiler
    #    would keep it): offsets kept during the loops took registers from the products, which spilled 56 bytes
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
    grad_q = scale grad_score k. delta is left in memory for the kernel of the keys, which runs next.

    delta is the softmax's own term: sum_n weight_n (grad_out v_n) = grad_out out, since out = sum_n weight_n v_n.
    """
    tile_ptr += tl.program_id(0) // n_kv * 6
    kv = tl.program_id(0) % n_kv
    first, n_tokens, position, own_row, prefix_row, n_prefix = _load_tile(tile_ptr)
    r, j, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    token_m, head_m = r // SHARE, kv * SHARE + r % SHARE
    real_m = token_m < n_tokens
    row_m = (first + token_m).to(tl.int64)
    q_m = q_ptr + row_m * stride_qn + head_m * stride_qh
    q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C)
    row_m = row_m * (n_kv * SHARE) + head_m  # from here on a row of the dense [N H, C]
    dense_mc = row_m[:, None] * C + c[None, :]
    grad_out_mc = load_rows(grad_out_ptr + dense_mc, real_m, c, C, BLOCK_C)
    out_mc = load_rows(out_ptr + dense_mc, real_m, c, C, BLOCK_C)
    delta_m = tl.sum(grad_out_mc.to(tl.float32) * out_mc.to(tl.float32), 1)
    tl.store(delta_ptr + row_m, delta_m, mask=real_m)
    lse_m = tl.load(lse_ptr + row_m, mask=real_m, other=0.0)
    k_ptr, v_ptr = k_ptr + kv * stride_kh.to(tl.int64), v_ptr + kv * stride_kh.to(tl.int64)
    grad_q_mc = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    n_keys = position + n_tokens
    n_clear = (position + 1) // BLOCK_N * BLOCK_N
    for start in range(0, n_keys, BLOCK_N):
        key_n = start + j
        real_n = key_n < n_keys
        at_n = _packed_at(key_n, n_prefix, own_row, prefix_row, stride_kn)
        k_nc = load_rows((k_ptr + at_n)[:, None] + c[None, :], real_n, c, C, BLOCK_C)
        v_nc = load_rows((v_ptr + at_n)[:, None] + c[None, :], real_n, c, C, BLOCK_C)
        mask_mn = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if start >= n_clear:
            mask_mn = tl.where(key_n[None, :] <= (position + token_m)[:, None], 0.0, float("-inf"))
        score_mn = tl.dot(q_mc, k_nc.T, mask_mn, input_precision="ieee")
        # the forward pass's softmax: its scores were not kept
        weight_mn = tl.exp2(score_mn * (scale * LOG2E) - lse_m[:, None])
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
    directly, of all its children: one range of packed tokens, first to `until`. One program gathers it in one order, so
    there are no atomics. Pointers start at the tile's first token, and offsets from there fit 32 bits.
    """
    tile_ptr += tl.program_id(0) // n_kv * 3  # a row of _key_tiles
    kv = tl.program_id(0) % n_kv
    first, n_tile_keys, until = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    j, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
    real_n = j < n_tile_keys
    key_n = (first + j).to(tl.int64)
    offset_nc = (key_n * stride_kn + kv * stride_kh)[:, None] + c[None, :]
    k_nc = load_rows(k_ptr + offset_nc, real_n, c, C, BLOCK_C)
    v_nc = load_rows(v_ptr + offset_nc, real_n, c, C, BLOCK_C)
    grad_k_nc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    grad_v_nc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    q_ptr += first.to(tl.int64) * stride_qn
    first_row = first.to(tl.int64) * (n_kv * SHARE)
    grad_out_ptr += first_row * C
    lse_ptr += first_row
    delta_ptr += first_row
    # Rows are (token, head) pairs from the tile's first token on. Those of the tile's own tokens are the diagonal: of
    # 50 keys, at 3 heads, they are 150 rows, masked in 3 blocks of 64; the rows from 192 on see all 50 keys
    n_rows = (until - first) * SHARE
    n_diagonal = tl.minimum(tl.cdiv(n_tile_keys * SHARE, BLOCK_M) * BLOCK_M, n_rows)
    for CLEAR in tl.static_range(2):
        for start in range(n_diagonal if CLEAR else 0, n_rows if CLEAR else n_diagonal, BLOCK_M):
            r = start + tl.arange(0, BLOCK_M)
            token_m, head_m = r // SHARE, kv * SHARE + r % SHARE
            real_m = r < n_rows  # q and grad_out of rows beyond are zeros: they add nothing
            q_m = q_ptr + (token_m * stride_qn + head_m * stride_qh)
            q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C)
            row_m = token_m * (n_kv * SHARE) + head_m
            grad_out_mc = load_rows(grad_out_ptr + (row_m[:, None] * C + c[None, :]), real_m, c, C, BLOCK_C)
            lse_m = tl.load(lse_ptr + row_m, mask=real_m, other=0.0)
            delta_m = tl.load(delta_ptr + row_m, mask=real_m, other=0.0)
            # transposed, keys by query rows: so both gradients are products of it as it is
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


# The tables that say what each program does. `segments` is the bytes of segments_s3, which can be a key of a cache: the
# tables of a forest are made once for all layers and for both passes. Example, as in `attention`: a prompt of 3 tokens
# and two replies of 2, [(0, 3, -1), (3, 2, 0), (5, 2, 0)].
@functools.lru_cache(maxsize=16)
def _query_tiles(segments, tokens_per_tile, device):
    """int32 [tiles, 6]: first token, tokens, position of the first; own_row, prefix_row, n_prefix as in _packed_at.

    Of 2 tokens each: (3, 2, 3, 3, 0, 3), (5, 2, 3, 5, 0, 3), (2, 1, 2, 0, 0, 0), (0, 2, 0, 0, 0, 0). A tile never
    crosses segments. Those with most keys come first, so that no long one is left over at the end.
    """
    start, length, parent = _columns(segments)
    segment, offset = _cut(length, tokens_per_tile)
    above = parent[segment]
    prefix_row = np.where(above >= 0, start[above], 0)
    n_prefix = np.where(above >= 0, length[above], 0)
    n_tokens = np.minimum(length[segment] - offset, tokens_per_tile)
    position = n_prefix + offset
    table = np.stack([start[segment] + offset, n_tokens, position, start[segment], prefix_row, n_prefix], 1)
    return _upload(table[np.argsort(-position, kind="stable")], device)


@functools.lru_cache(maxsize=16)
def _key_tiles(segments, keys_per_tile, device):
    """int32 [tiles, 3]: first token, tokens, and the end of the tokens that see them.

    Of 2 keys each: (0, 2, 7), (2, 1, 7), (3, 2, 5), (5, 2, 7): the prompt is seen until the last reply ends.
    """
    start, length, parent = _columns(segments)
    until = start + length
    child = parent >= 0
    np.maximum.at(until, parent[child], until[child].copy())  # a parent has several children: the largest counts
    segment, offset = _cut(length, keys_per_tile)
    first = start[segment] + offset
    n_keys = np.minimum(length[segment] - offset, keys_per_tile)
    table = np.stack([first, n_keys, until[segment]], 1)
    return _upload(table[np.argsort(first - until[segment], kind="stable")], device)


def _columns(segments):
    return np.frombuffer(segments, np.int64).reshape(-1, 3).T


def _cut(length, size):
    """Segments of these lengths in pieces of at most `size`: each piece's segment, and its first token in it.

    Lengths 3, 0, 5 in pieces of 2 give segments [0, 0, 2, 2, 2] and first tokens [0, 2, 0, 2, 4].
    """
    n_pieces = -(-length // size)  # rounded up
    segment = np.repeat(np.arange(len(length)), n_pieces)
    pieces_before = np.repeat(n_pieces.cumsum() - n_pieces, n_pieces)
    return segment, (np.arange(n_pieces.sum()) - pieces_before) * size


def _upload(table, device):
    table = torch.from_numpy(table.astype(np.int32))  # pinned, the copy does not wait for the GPU to catch up
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


@functools.lru_cache(maxsize=16)
def _check_segments(segments, N):
    """The order that the kernels build on: segments back to back, children directly after their parentless parent."""
    start, length, parent = _columns(segments)
    has_parent = parent >= 0
    assert length.sum() == N and (start == length.cumsum() - length).all(), "segments must lie back to back"
    assert not has_parent[parent[has_parent]].any(), "a parent segment must be parentless"
    first_or_next = (parent == np.arange(len(parent)) - 1) | (parent == np.append(-1, parent[:-1]))
    assert first_or_next[has_parent].all(), "a parent's children must follow it directly"


class AttentionTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_nhc, k_nkc, v_nkc, segments_s3, invariant):
        q_nhc, k_nkc, v_nkc = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_nhc, k_nkc, v_nkc))
        if k_nkc.stride() != v_nkc.stride():  # the kernels take one set of strides for both
            k_nkc, v_nkc = k_nkc.contiguous(), v_nkc.contiguous()
        assert segments_s3.dtype == torch.int64 and not segments_s3.is_cuda, (segments_s3.dtype, segments_s3.device)
        check_launch(q_nhc, k_nkc, v_nkc)
        segments = segments_s3.numpy().tobytes()
        (N, H, C), K = q_nhc.shape, k_nkc.shape[1]
        assert N * k_nkc.stride(0) < 2**31, f"{N} tokens: the kernels count elements of packed keys in 32 bits"
        _check_segments(segments, N)
        tiling = attention_tiling("attention_invariant" if invariant else "attention_fwd", q_nhc, C)
        tiles = _query_tiles(segments, tokens_per_tile(tiling, H, K), q_nhc.device)
        out_nhc, lse_nh = launch_attention(q_nhc, k_nkc, v_nkc, tiles, tiling)
        ctx.save_for_backward(q_nhc, k_nkc, v_nkc, out_nhc, lse_nh)
        ctx.segments = segments
        return out_nhc

    @staticmethod
    def backward(ctx, grad_out_nhc):
        q_nhc, k_nkc, v_nkc, out_nhc, lse_nh = ctx.saved_tensors
        (N, H, C), K = q_nhc.shape, k_nkc.shape[1]
        assert N * max(q_nhc.stride(0), H * C) < 2**31, f"{N} tokens: the kernel of the keys counts in 32 bits"
        grad_out_nhc = grad_out_nhc.contiguous()
        grad_q_nhc = torch.empty_like(out_nhc)
        grad_k_nkc, grad_v_nkc = q_nhc.new_empty(N, K, C), q_nhc.new_empty(N, K, C)
        delta_nh = torch.empty_like(lse_nh)
        strides = q_nhc.stride(0), q_nhc.stride(1), k_nkc.stride(0), k_nkc.stride(1)
        blocks, options = tiling = attention_tiling("attention_bwd_q", q_nhc, C)
        tiles = _query_tiles(ctx.segments, tokens_per_tile(tiling, H, K), q_nhc.device)
        if len(tiles):
            _attention_bwd_q_kernel[len(tiles) * K,](
                q_nhc, k_nkc, v_nkc, out_nhc, grad_out_nhc, lse_nh, delta_nh, grad_q_nhc, tiles, *strides, K,
                1 / math.sqrt(C), H // K, C, **blocks, **options)
        blocks, options = attention_tiling("attention_bwd_kv", q_nhc, C)
        tiles = _key_tiles(ctx.segments, blocks["BLOCK_N"], q_nhc.device)
        if len(tiles):
            _attention_bwd_kv_kernel[len(tiles) * K,](
                q_nhc, k_nkc, v_nkc, grad_out_nhc, lse_nh, delta_nh, grad_k_nkc, grad_v_nkc, tiles, *strides, K,
                1 / math.sqrt(C), H // K, C, **blocks, **options)
        return grad_q_nhc, grad_k_nkc, grad_v_nkc, None, None


def tokens_per_tile(tiling, H, K):
    """A tile has BLOCK_M (token, head) rows: 128 are 18 tokens of 7 heads on one key/value head, and 2 idle rows."""
    rows = tiling[0]["BLOCK_M"]
    assert H // K <= rows, f"{H} heads share {K}: at most {rows} may share one"
    return rows // (H // K)


def launch_attention(q_nhc, k, v, tiles, tiling, tables=None):
    """out_nhc and lse_nh, of tiles as _query_tiles makes them. Keys and values are k_nkc and v_nkc or, with the Tables
    that say what lies where, k_xkic and v_xkic."""
    (N, H, C), K = q_nhc.shape, k.shape[1]
    assert k.stride() == v.stride(), (k.stride(), v.stride())
    page_bt, page_pu, page_size, stride_kx, stride_kn = None, None, 0, None, k.stride(0)
    if tables is not None:
        page_bt, page_pu, page_size = tables.page_bt, tables.page_pu, tables.page_size
        stride_kx, stride_kn = k.stride(0), k.stride(2)
        assert k.shape[2:] == (page_size, C) and page_bt.dtype == page_pu.dtype == torch.int32, (k.shape, page_bt.dtype)
        assert page_bt.stride(1) == page_pu.stride(1) == 1, (page_bt.stride(), page_pu.stride())
    blocks, options = tiling
    out_nhc = q_nhc.new_empty(N, H, C)
    lse_nh = q_nhc.new_empty(N, H, dtype=torch.float32)
    if len(tiles):
        _attention_fwd_kernel[len(tiles) * K,](
            q_nhc, k, v, out_nhc, lse_nh, tiles, page_bt, page_pu, q_nhc.stride(0), q_nhc.stride(1), stride_kn,
            k.stride(1), stride_kx, K, 1 / math.sqrt(C), H // K, C, page_size, **blocks, **options)
    return out_nhc, lse_nh
