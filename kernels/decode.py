"""`decode_attention`: one new token per slot against its own cache and its shared prompt."""

import functools
import math
from dataclasses import dataclass

import torch

from kernels.attention import launch_attention
from kernels.tiles import LOG2E, POINTWISE, check_launch, jit, load_rows, tiling_of, tl, triton, wide


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
        q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C, True)
        k_ptr += item * stride_kx + kv.to(tl.int64) * stride_kh
        v_ptr += item * stride_kx + kv.to(tl.int64) * stride_kh
        max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_m = tl.zeros([BLOCK_M], tl.float32)
        acc_cm = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
        for start in range(begin, end, BLOCK_N):
            real_n = start + j < end
            offset_nc = ((start + j).to(tl.int64) * stride_kt)[:, None] + c[None, :]
            k_nc = load_rows(k_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
            score_nm = tl.dot(k_nc, q_mc.T, input_precision="ieee") * (scale * LOG2E)
            score_nm = tl.where(real_n[:, None], score_nm, float("-inf"))
            new_max_m = tl.maximum(max_m, tl.max(score_nm, 0))
            weight_nm = tl.exp2(score_nm - new_max_m[None, :])
            keep_m = tl.exp2(max_m - new_max_m)
            sum_m = sum_m * keep_m + tl.sum(weight_nm, 0)
            v_nc = load_rows(v_ptr + offset_nc, real_n, c, C, BLOCK_C, True)
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


def decode_triton(q_bhc, k_bktc, v_bktc, length_b, prompts):
    """Both parts split over their keys, then merged. The grid depends on shapes alone, so a CUDA graph can hold it."""
    B, H, C = q_bhc.shape
    K, T = k_bktc.shape[1:3]
    parts = [(k_bktc, v_bktc, length_b, torch.arange(B, device=q_bhc.device)[:, None])]
    if prompts is not None:
        parts.append((prompts.k_pkuc, prompts.v_pkuc, prompts.length_p, prompts.slot_pm))
    launches, n_splits = [], 0
    for k, v, length_x, slot_xm in parts:
        check_launch(q_bhc, k, v)
        assert k.stride() == v.stride() and k.shape == v.shape and k.shape[::3] == (len(length_x), C), (k.shape, C)
        n_rows = slot_xm.shape[1] * (H // K)
        tiling, options = tiling_of("decode", C, q_bhc, n_rows)
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


def decode_invariant(q_bhc, k_bktc, v_bktc, length_b, prompts):
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
    return launch_attention(q_bhc, *rows, lambda tokens_per_tile: table, True, True)[0]
