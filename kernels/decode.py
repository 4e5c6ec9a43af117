"""`decode_attention`: one new token per slot against its own cache and its shared prompt."""

import functools
import math
from dataclasses import dataclass

import torch

from kernels.attention import launch_attention, tokens_per_tile
from kernels.tiles import LOG2E, POINTWISE, attention_tiling, check_launch, jit, load_rows, tl, triton, wide


@dataclass(frozen=True)
class Prompts:
    """The prompts of a decode step, each held once for all the slots that continue it.

    Two rollouts of prompt 0 in slots 3 and 1, and one of prompt 1 in slot 0, are slot_pg [[3, 1], [0, -1]], where -1
    is a place that nobody takes, and place_b [2, 1, -1, 0]. Slot 2 is empty, or has its whole sequence in its cache.
    """
    k_pkuc: torch.Tensor
    v_pkuc: torch.Tensor
    length_p: torch.Tensor  # int64: so many of the U positions count
    slot_pg: torch.Tensor   # int64: the slots that continue prompt p, or -1
    place_b: torch.Tensor   # int64: where slot b stands in slot_pg, as p * G + g, or -1


def decode_attention_ref(q_bhc, k_bktc, v_bktc, length_b, prompts):
    """One softmax over the prompt's keys and the slot's own, in two parts merged by their maxima, as the kernels do it.

    The queries of a prompt's slots become rows of one matrix product, so that its keys are read once for all of them;
    with the prompt's keys copied to each slot a step takes 1.4 times as long. What the caches hold beyond the lengths
    must be finite: it is multiplied by zero.
    """
    (B, H, C), K = q_bhc.shape, k_bktc.shape[1]
    P, G = prompts.slot_pg.shape
    share = H // K
    q_bkrc = q_bhc.view(B, K, share, C)
    # 1. each slot against its own cache
    own_bkrc, own_max_bkr1, own_sum_bkr1 = _softmax_part(q_bkrc, k_bktc, v_bktc, length_b)
    # 2. each prompt against the queries of its G slots, gathered: [B, K, share, C] -> [P, K, G share, C]; and back
    q_pkrc = q_bkrc[prompts.slot_pg.clamp(min=0)].transpose(1, 2).reshape(P, K, G * share, C)
    part = _softmax_part(q_pkrc, prompts.k_pkuc, prompts.v_pkuc, prompts.length_p)
    read_b = prompts.place_b.clamp(min=0)
    prompt_bkrc, prompt_max_bkr1, prompt_sum_bkr1 = (
        x.view(P, K, G, share, -1).transpose(1, 2).flatten(0, 1)[read_b] for x in part)
    # a slot without prompt has read place 0: it weighs nothing, and must not raise the maximum either
    seen_b111 = (prompts.place_b >= 0)[:, None, None, None]
    prompt_max_bkr1 = torch.where(seen_b111, prompt_max_bkr1, torch.finfo(prompt_max_bkr1.dtype).min)
    # 3. under the larger of both maxima: sums of 3 and 4 under maxima of 2 and 5 are exp(2 - 5) 3 + 4 under 5
    max_bkr1 = torch.maximum(own_max_bkr1, prompt_max_bkr1)
    keep_own = ((own_max_bkr1 - max_bkr1) / math.sqrt(C)).exp()
    keep_prompt = ((prompt_max_bkr1 - max_bkr1) / math.sqrt(C)).exp()
    total_bkr1 = keep_own * own_sum_bkr1 + keep_prompt * prompt_sum_bkr1
    out_bkrc = (keep_own * own_bkrc + keep_prompt * prompt_bkrc) / total_bkr1
    return out_bkrc.to(q_bhc.dtype).reshape(B, H, C)


def _softmax_part(q_xkrc, k_xktc, v_xktc, length_x):
    """score = q k^T over the first length_x keys, weight = exp((score - max) / sqrt(C)): weight v, max, sum weight.

    Scaled after the subtraction, so that what is rounded is a small difference.
    """
    score_xkrt = (q_xkrc @ k_xktc.transpose(2, 3)).to(wide(q_xkrc.dtype))
    hidden_xt = torch.arange(score_xkrt.shape[-1], device=score_xkrt.device) >= length_x[:, None]
    score_xkrt.masked_fill_(hidden_xt[:, None, None], -math.inf)
    max_xkr1 = score_xkrt.amax(-1, keepdim=True)
    max_xkr1 = max_xkr1.clamp(min=torch.finfo(score_xkrt.dtype).min)  # without keys: -inf less -inf would be NaN
    weight_xkrt = score_xkrt.sub_(max_xkr1).div_(math.sqrt(q_xkrc.shape[-1])).exp_()
    return weight_xkrt.to(v_xktc.dtype) @ v_xktc, max_xkr1, weight_xkrt.sum(-1, keepdim=True)


# not specialized: these vary during a run, and a 1 or a multiple of 16 among them would compile anew
@jit(do_not_specialize=["n_members", "n_row_tiles", "n_splits", "first_split", "n_all_splits"])
def _decode_split_kernel(q_ptr, k_ptr, v_ptr, length_ptr, slot_ptr, out_ptr, lse_ptr, stride_qb, stride_qh, stride_kx,
                         stride_kh, stride_kt, n_kv, n_members, n_row_tiles, n_splits, first_split, n_all_splits,
                         scale, SHARE: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         BLOCK_C: tl.constexpr):
    """The softmax over one split of an item's keys, for all slots that see them, its members. An item is a slot's own
    cache, whose one member is the slot, or a prompt.

    As in _attention_fwd_kernel a query row is a (member, head) pair, but the products are transposed: k q^T and
    v^T weight. For the left factor a tensor core wants 64 or 128 rows. Keys and channels are as many; query rows are
    not: one token's heads that share a key/value head may be 7. On the right, 16 columns are enough.

    out and lse (log2) go to a row's n_all_splits places, of which this item has those from first_split on. A split
    without keys says so by an lse of minus infinity, and writes no out.
    """
    item = (tl.program_id(0) // n_row_tiles).to(tl.int64)
    kv, split = tl.program_id(1), tl.program_id(2)
    n_keys = tl.load(length_ptr + item).to(tl.int32)
    # whole blocks: 1000 keys in 4 splits and blocks of 64 are 256, 256, 256, 232; 100 keys are 64, 36, and two empty
    n_split_keys = tl.cdiv(tl.cdiv(n_keys, n_splits), BLOCK_N) * BLOCK_N
    begin = split * n_split_keys
    end = tl.minimum(begin + n_split_keys, n_keys)
    r = tl.program_id(0) % n_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    member_m, head_m = r // SHARE, kv * SHARE + r % SHARE
    # -1 where nobody took the place, or the tile has more rows than the item: loaded as zeros, and not stored
    slot_m = tl.load(slot_ptr + item * n_members + member_m, mask=member_m < n_members, other=-1).to(tl.int64)
    real_m = slot_m >= 0
    out_m = (slot_m * (n_kv * SHARE) + head_m) * n_all_splits + first_split + split
    if begin >= end:
        tl.store(lse_ptr + out_m, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real_m)
    else:
        j, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
        q_m = q_ptr + slot_m * stride_qb + head_m * stride_qh
        q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C)
        k_ptr += item * stride_kx + kv.to(tl.int64) * stride_kh
        v_ptr += item * stride_kx + kv.to(tl.int64) * stride_kh
        max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_m = tl.zeros([BLOCK_M], tl.float32)
        acc_cm = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
        for start in range(begin, end, BLOCK_N):  # the online softmax of _attention_fwd_kernel
            real_n = start + j < end
            offset_nc = ((start + j).to(tl.int64) * stride_kt)[:, None] + c[None, :]
            k_nc = load_rows(k_ptr + offset_nc, real_n, c, C, BLOCK_C)
            score_nm = tl.dot(k_nc, q_mc.T, input_precision="ieee") * (scale * LOG2E)
            score_nm = tl.where(real_n[:, None], score_nm, float("-inf"))
            new_max_m = tl.maximum(max_m, tl.max(score_nm, 0))
            weight_nm = tl.exp2(score_nm - new_max_m[None, :])
            keep_m = tl.exp2(max_m - new_max_m)
            sum_m = sum_m * keep_m + tl.sum(weight_nm, 0)
            v_nc = load_rows(v_ptr + offset_nc, real_n, c, C, BLOCK_C)
            acc_cm = tl.dot(v_nc.T, weight_nm.to(v_nc.dtype), acc_cm * keep_m[None, :], input_precision="ieee")
            max_m = new_max_m
        tl.store(out_ptr + out_m[None, :] * C + c[:, None], acc_cm / sum_m[None, :],
                 mask=real_m[None, :] & (c < C)[:, None])
        tl.store(lse_ptr + out_m, max_m + tl.log2(sum_m), mask=real_m)


@jit(do_not_specialize=["n_own_splits", "n_all_splits"])
def _decode_merge_kernel(part_ptr, lse_ptr, place_ptr, out_ptr, n_heads, n_own_splits, n_all_splits, C: tl.constexpr,
                         BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = sum_s weight_s part_s with weight = softmax(lse over the splits s), for one head of one slot.

    Splits that saw sums of 8 and 24 have lse 3 and 4.58, and weigh 8 / 32 and 24 / 32. The last splits are the
    prompt's: nobody wrote those of a slot without one.
    """
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    row = tl.program_id(0).to(tl.int64)
    n_splits = tl.where(tl.load(place_ptr + row // n_heads) >= 0, n_all_splits, n_own_splits)
    lse_s = tl.load(lse_ptr + row * n_all_splits + s, mask=s < n_splits, other=float("-inf"))
    weight_s = tl.exp2(lse_s - tl.max(lse_s, 0))
    # an empty split wrote no part: what lies there may be NaN, and is not read
    part_sc = tl.load(part_ptr + (row * n_all_splits + s)[:, None] * C + c[None, :],
                      mask=(lse_s > float("-inf"))[:, None] & (c < C)[None, :], other=0.0)
    out_c = tl.sum(weight_s[:, None] * part_sc, 0) / tl.sum(weight_s, 0)
    tl.store(out_ptr + row * C + c, out_c.to(out_ptr.dtype.element_ty), mask=c < C)


def decode_triton(q_bhc, k_bktc, v_bktc, length_b, prompts):
    """The slots' own keys and the prompts', each cut into splits, then merged: first the own splits, then the prompt's.

    The grid depends on shapes alone, so that a CUDA graph can hold the step while lengths and members change.
    """
    B, H, C = q_bhc.shape
    check_launch(q_bhc, k_bktc, v_bktc, prompts.k_pkuc, prompts.v_pkuc)
    slot_b1 = _each_slot(B, q_bhc.device)[:, None]
    n_own = _n_splits(q_bhc, k_bktc, slot_b1)
    n_prompt = _n_splits(q_bhc, prompts.k_pkuc, prompts.slot_pg)
    assert prompts.place_b.shape == (B,) and prompts.place_b.is_contiguous(), prompts.place_b.shape
    part_bhsc = q_bhc.new_empty(B, H, n_own + n_prompt, C, dtype=torch.float32)
    lse_bhs = part_bhsc.new_empty(B, H, n_own + n_prompt)
    _launch_splits(q_bhc, k_bktc, v_bktc, length_b, slot_b1, part_bhsc, lse_bhs, 0, n_own)
    _launch_splits(q_bhc, prompts.k_pkuc, prompts.v_pkuc, prompts.length_p, prompts.slot_pg, part_bhsc, lse_bhs, n_own,
                   n_prompt)
    out_bhc = q_bhc.new_empty(B, H, C)
    BLOCK_S, BLOCK_C = triton.next_power_of_2(n_own + n_prompt), triton.next_power_of_2(C)
    _decode_merge_kernel[B * H,](part_bhsc, lse_bhs, prompts.place_b, out_bhc, H, n_own, n_own + n_prompt, C, BLOCK_S,
                                 BLOCK_C, num_warps=min(max(BLOCK_S * BLOCK_C // 2048, 1), 16), **POINTWISE)
    return out_bhc


@functools.lru_cache
def _each_slot(B, device):
    """0, 1 .. B - 1: made once, not in every layer of every step; before a CUDA graph is captured, not within."""
    return torch.arange(B, device=device)


def _launch_splits(q_bhc, k_xktc, v_xktc, length_x, slot_xg, part_bhsc, lse_bhs, first_split, n_splits):
    """Splits first_split to first_split + n_splits of part and lse: the items x, each against the slots in slot_xg."""
    H, C = q_bhc.shape[1:]
    X, K = k_xktc.shape[:2]
    assert k_xktc.stride() == v_xktc.stride() and k_xktc.shape == v_xktc.shape, (k_xktc.stride(), v_xktc.stride())
    assert len(length_x) == X and k_xktc.shape[3] == C, (len(length_x), k_xktc.shape, C)
    (blocks, options), n_row_tiles = _split_tiling(q_bhc, K, slot_xg)
    _decode_split_kernel[X * n_row_tiles, K, n_splits](
        q_bhc, k_xktc, v_xktc, length_x, slot_xg.contiguous(), part_bhsc, lse_bhs, q_bhc.stride(0), q_bhc.stride(1),
        *k_xktc.stride()[:3], K, slot_xg.shape[1], n_row_tiles, n_splits, first_split, lse_bhs.shape[2],
        1 / math.sqrt(C), H // K, C, **blocks, **options)


def _split_tiling(q_bhc, K, slot_xg):
    """How an item's query rows, (member, head) pairs of one key/value head, are cut; and the number of their tiles."""
    _, H, C = q_bhc.shape
    n_rows = slot_xg.shape[1] * (H // K)
    tiling = attention_tiling("decode_group" if n_rows > 16 else "decode", q_bhc, C)
    return tiling, triton.cdiv(n_rows, tiling[0]["BLOCK_M"])


def _n_splits(q_bhc, k_xktc, slot_xg):
    """Into how many splits the keys of each item are cut."""
    X, K, T, _ = k_xktc.shape
    (blocks, _), n_row_tiles = _split_tiling(q_bhc, K, slot_xg)
    return _n_splits_for(X * n_row_tiles * K, T, blocks["BLOCK_N"], q_bhc.device)


@functools.lru_cache
def _n_splits_for(n_programs, T, BLOCK_N, device):
    """A power of two, so that few programs fill the GPU twice; at least 4 blocks of keys each, at most 64.

    One sequence of 32,768 keys with 4 key/value heads has 4 programs: on 132 cores min(264 / 4, 32768 / 256, 64) = 64.
    """
    n_cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    wanted = min(2 * n_cores / n_programs, T / (4 * BLOCK_N), 64)
    return 2 ** max(0, math.ceil(math.log2(wanted)))


def decode_invariant(q_bhc, k_bktc, v_bktc, length_b, prompts):
    """Each slot is a segment of one token whose keys lie in the caches: the sums of `attention` in the same order."""
    B, H, C = q_bhc.shape
    K, G = k_bktc.shape[1], prompts.slot_pg.shape[1]
    check_launch(q_bhc, k_bktc, v_bktc, prompts.k_pkuc, prompts.v_pkuc)
    prompt_b = prompts.place_b.clamp(min=0) // G  # place p * G + g is prompt p's; a slot without one sees 0 keys of 0's
    n_prefix_b = torch.where(prompts.place_b >= 0, prompts.length_p[prompt_b], 0)
    # A cache's memory as rows of [C] a position's stride apart: slot b's begin at b rows_per_slot. So the table below
    # addresses [B, K, T, C] as the kernel addresses packed keys, with a key/value head being an offset within a row
    assert k_bktc.stride(0) % k_bktc.stride(2) == prompts.k_pkuc.stride(0) % prompts.k_pkuc.stride(2) == 0
    slot_b = _each_slot(B, q_bhc.device)
    own_row_b = slot_b * (k_bktc.stride(0) // k_bktc.stride(2))
    prefix_row_b = prompt_b * (prompts.k_pkuc.stride(0) // prompts.k_pkuc.stride(2))
    k_tkc, v_tkc, prompt_k_ukc, prompt_v_ukc = (
        x[0].transpose(0, 1) for x in (k_bktc, v_bktc, prompts.k_pkuc, prompts.v_pkuc))
    # the columns of _query_tiles: row b of q, 1 token, at the last position
    tiles = torch.stack([slot_b, torch.ones_like(slot_b), n_prefix_b + length_b - 1, own_row_b, prefix_row_b,
                         n_prefix_b], 1).to(torch.int32)
    tiling = attention_tiling("attention_invariant", q_bhc, C)
    assert tokens_per_tile(tiling, H, K) >= 1, "a slot's token, with all heads that share a key/value head, is a tile"
    out_bhc, _ = launch_attention(q_bhc, k_tkc, v_tkc, prompt_k_ukc, prompt_v_ukc, tiles, tiling, cached=True)
    return out_bhc
