"""`decode_attention`: one new token per slot against its own pages and its prompt's; `store`: keys into pages."""

import functools
import math
from dataclasses import dataclass

import torch

from kernels.attention import launch_attention, tokens_per_tile
from kernels.tiles import (LOG2E, POINTWISE, attention_tiling, check_launch, in_pages, jit, launch, load_rows, tl,
                           triton, wide)

NOBODY = 2**62  # first_x of a page that nobody owns: beyond every length


@dataclass(frozen=True)
class Tables:
    """Where the keys of a decode step lie: in pages of I tokens, some a slot's own, some a prompt's, for all its slots.

    A pool of 9 pages of 64 tokens. Slots 0 and 1 continue prompt 0, of 100 tokens; slot 2 has its whole sequence in its
    own pages. The slots hold 5, 70 and 3 tokens of their own, the new one included:

        page_bt = [[0, -1], [1, 3], [2, -1]]    length_b = [5, 70, 3]    slots' pages, from the pool's beginning
        page_pu = [[8, 7]]                      length_p = [100]         prompts' pages, from its end
        slot_pg = [[0, 1]]                      place_b  = [0, 1, -1]    who continues whom

    and the same from the pages' side, as the PyTorch path walks them, with n_own = 4 and n_shared = 2:

        owner_x = [0, 1, 2, 1, 0, 0, 0, -1, -1]   first_x = [0, 0, 0, 64, NOBODY, NOBODY, NOBODY, 64, 0]

    The kernels read no page beyond the lengths, so the tables may be wider than needed and the pool's memory anything.
    The PyTorch path multiplies what lies there by zero: it must be finite.

    An instance is of one step: what its layers share is derived in the first of them, and kept. For a CUDA graph it is
    made within the capture, or the graph would not derive it anew.
    """
    page_bt: torch.Tensor   # int32: where the slot's own tokens t I to (t + 1) I lie
    length_b: torch.Tensor  # int64: how many they are, the new one included
    page_pu: torch.Tensor   # int32: where the prompt's tokens u I to (u + 1) I lie
    length_p: torch.Tensor  # int64
    slot_pg: torch.Tensor   # int64: the slots that continue prompt p, or -1
    place_b: torch.Tensor   # int64: where slot b stands in slot_pg, as p * G + g, or -1
    owner_x: torch.Tensor   # int64: the slot whose tokens page x holds, or -1 - the prompt
    first_x: torch.Tensor   # int64: which of its tokens is the page's first
    n_own: int              # pages 0 to n_own are walked as slots' ...
    n_shared: int           # ... and the last n_shared as prompts'
    page_size: int          # I

    # What the PyTorch path derives, once for all layers of a step

    @functools.cached_property
    def own(self):
        """Of the pages walked as slots': slot_x, and hidden_xi, 1 where the slot has no such token (yet), and
        everywhere in a page that is no slot's."""
        owner_x, first_x = self.owner_x[:self.n_own], self.first_x[:self.n_own]
        slot_x = owner_x.clamp(min=0)
        return slot_x, self._hidden(self.length_b[slot_x] - first_x, owner_x >= 0)

    @functools.cached_property
    def shared(self):
        """Of those walked as prompts': prompt_x, hidden_xi."""
        begin = len(self.owner_x) - self.n_shared
        owner_x, first_x = self.owner_x[begin:], self.first_x[begin:]
        prompt_x = (-1 - owner_x).clamp(min=0)
        return prompt_x, self._hidden(self.length_p[prompt_x] - first_x, owner_x < 0)

    def _hidden(self, n_left_x, counts_x):
        place_i = torch.arange(self.page_size, device=n_left_x.device)
        return ((place_i >= n_left_x[:, None]) | ~counts_x[:, None]).float()

    @functools.cached_property
    def part_by(self):
        """Of the numbers that pages have, n_own of slots' pages and then n_shared x G of prompts', those of slot b; and
        where there is none."""
        G, begin = self.slot_pg.shape[1], len(self.owner_x) - self.n_shared
        prompt_b, member_b1 = self.place_b.clamp(min=0) // G, self.place_b[:, None] % G
        shared_bu = self.n_own + (self.page_pu[prompt_b].long() - begin) * G + member_b1
        n_prompt_b = torch.where(self.place_b >= 0, self.length_p[prompt_b], 0)
        absent_by = torch.cat([_starts(self.page_bt, self.page_size) >= self.length_b[:, None],
                               _starts(self.page_pu, self.page_size) >= n_prompt_b[:, None]], 1)
        return torch.cat([self.page_bt.long(), shared_bu], 1).masked_fill(absent_by, 0), absent_by

    # What the kernels derive

    @functools.cached_property
    def plans(self):
        """decode_triton's launches: {geometry of the heads: _Plan}, one for all layers of a model."""
        return {}

    @functools.cached_property
    def tiles_b6(self):
        """Each slot as a row of _query_tiles in attention.py: row b of q, 1 token, at the last position; where its
        pages' row begins in page_bt, and its prompt's in page_pu; how many keys are the prompt's."""
        prompt_b = self.place_b.clamp(min=0) // self.slot_pg.shape[1]
        n_prefix_b = torch.where(self.place_b >= 0, self.length_p[prompt_b], 0)
        slot_b = torch.arange(len(self.place_b), device=self.place_b.device)
        return torch.stack([slot_b, torch.ones_like(slot_b), n_prefix_b + self.length_b - 1,
                            slot_b * self.page_bt.stride(0), prompt_b * self.page_pu.stride(0), n_prefix_b], 1).int()


def _starts(page_xt, page_size):
    return page_size * torch.arange(page_xt.shape[1], device=page_xt.device)


def decode_attention_ref(q_bhc, k_xkic, v_xkic, tables):
    """Pages are walked as they lie in the pool, so that none is copied, and a prompt's page meets the queries of all
    its slots as rows of one matrix product, so that it is read once for them.

    With the slot's largest score over all pages, max: out = sum exp(score - max) v / sum exp(score - max), each sum
    within the pages first, then over a slot's own and over its prompt's. Scores are in units of log 2: PyTorch's exp
    takes ten times as long where it underflows, as it does for all that is hidden; its exp2 does not.
    """
    (B, H, C), (X, K) = q_bhc.shape, k_xkic.shape[:2]
    (P, G), n_own, n_shared = tables.slot_pg.shape, tables.n_own, tables.n_shared
    share = H // K
    (slot_x, own_hidden_xi), (prompt_x, shared_hidden_xi) = tables.own, tables.shared
    own_k, shared_k, own_v, shared_v = k_xkic[:n_own], k_xkic[X - n_shared:], v_xkic[:n_own], v_xkic[X - n_shared:]

    def by_prompt(x_bkr):  # [B, K, share, ..] of the slots -> [P, K, G share, ..] of the prompts
        return x_bkr[tables.slot_pg.clamp(min=0)].transpose(1, 2).flatten(2, 3)

    def by_member(x_pkr):  # and back to (prompt, member), or (page, member)
        return x_pkr.unflatten(2, (G, share)).transpose(1, 2).flatten(0, 1)
    q_bkrc = q_bhc.view(B, K, share, C)
    own_xkri = _scores(q_bkrc[slot_x], own_k, own_hidden_xi)
    shared_xkri = _scores(by_prompt(q_bkrc)[prompt_x], shared_k, shared_hidden_xi)

    part_by, absent_by = tables.part_by
    max_ykr = torch.cat([own_xkri.amax(-1), by_member(shared_xkri.amax(-1))])
    max_bkr = max_ykr[part_by].masked_fill_(absent_by[..., None, None], -math.inf).amax(1)
    own_xkri.sub_(max_bkr[slot_x][..., None]).exp2_()
    shared_xkri.sub_(by_prompt(max_bkr)[prompt_x][..., None]).exp2_()

    own_bkrc, own_sum_bkr = _weighted(own_xkri, own_v, slot_x, B)
    shared_pkrc, shared_sum_pkr = _weighted(shared_xkri, shared_v, prompt_x, P)
    place_b = tables.place_b.clamp(min=0)
    alone_b = (tables.place_b < 0)[:, None, None]
    total_bkr = own_sum_bkr + by_member(shared_sum_pkr)[place_b].masked_fill(alone_b, 0)
    out_bkrc = own_bkrc + by_member(shared_pkrc)[place_b].masked_fill(alone_b[..., None], 0)
    # a slot that sees nothing gets zeros; else the total is at least 2^0
    return (out_bkrc / total_bkr[..., None].clamp(min=1)).to(q_bhc.dtype).reshape(B, H, C)


def _scores(q_xkrc, k_xkic, hidden_xi):
    """q k^T / (sqrt(C) log 2), and of hidden keys half the lowest number less: not infinity, of which a page that
    nobody sees would make NaN."""
    X, K, R, C = q_xkrc.shape
    dtype = q_xkrc.dtype
    hidden_n1i = hidden_xi.to(dtype).repeat_interleave(K, 0)[:, None]
    score_nri = torch.baddbmm(hidden_n1i, q_xkrc.reshape(X * K, R, C), k_xkic.flatten(0, 1).transpose(1, 2),
                              beta=torch.finfo(dtype).min / 2, alpha=math.log2(math.e) / math.sqrt(C))
    return score_nri.to(wide(dtype)).view(X, K, R, -1)


def _weighted(weight_xkri, v_xkic, owner_x, n_owners):
    """sum weight v and sum weight, over the pages of each owner."""
    (X, K, R, _), C = weight_xkri.shape, v_xkic.shape[3]
    out_xkrc = torch.bmm(weight_xkri.flatten(0, 1).to(v_xkic.dtype), v_xkic.flatten(0, 1)).view(X, K, R, C)
    out_xkrc = out_xkrc.to(weight_xkri.dtype)
    sum_xkr = weight_xkri.sum(-1)
    return (out_xkrc.new_zeros(n_owners, K, R, C).index_add_(0, owner_x, out_xkrc),
            sum_xkr.new_zeros(n_owners, K, R).index_add_(0, owner_x, sum_xkr))


def store_ref(k_xkic, v_xkic, k_nkc, v_nkc, page_n, offset_n):
    """Keys and values of token n go to place offset_n of page_n."""
    _, K, I, C = k_xkic.shape
    row_nk = (page_n[:, None] * K + torch.arange(K, device=page_n.device)) * I + offset_n[:, None]
    k_xkic.view(-1, C)[row_nk.flatten()] = k_nkc.reshape(-1, C)
    v_xkic.view(-1, C)[row_nk.flatten()] = v_nkc.reshape(-1, C)


# not specialized: these vary during a run, and a 1 or a multiple of 16 among them would compile anew
@jit(do_not_specialize=["stride_page", "stride_slot", "n_members", "n_row_tiles", "n_splits", "first_split",
                        "n_all_splits"])
def _decode_split_kernel(q_ptr, k_ptr, v_ptr, page_ptr, length_ptr, slot_ptr, out_ptr, lse_ptr, stride_qb, stride_qh,
                         stride_kx, stride_kh, stride_ki, stride_page, stride_slot, n_kv, n_members, n_row_tiles,
                         n_splits, first_split, n_all_splits, scale, SHARE: tl.constexpr, C: tl.constexpr,
                         I: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """The softmax over one split of an item's keys, for all slots that see them, its members. An item is a slot's own
    tokens, whose one member is the slot, or a prompt. Its row of page_ptr says in which pages its tokens lie.

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
    slot_m = tl.load(slot_ptr + item * stride_slot + member_m, mask=member_m < n_members, other=-1).to(tl.int64)
    real_m = slot_m >= 0
    out_m = (slot_m * (n_kv * SHARE) + head_m) * n_all_splits + first_split + split
    if begin >= end:
        tl.store(lse_ptr + out_m, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=real_m)
    else:
        j, c = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C)
        q_m = q_ptr + slot_m * stride_qb + head_m * stride_qh
        q_mc = load_rows(q_m[:, None] + c[None, :], real_m, c, C, BLOCK_C)
        page_ptr += item * stride_page
        k_ptr += kv.to(tl.int64) * stride_kh
        v_ptr += kv.to(tl.int64) * stride_kh
        max_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        sum_m = tl.zeros([BLOCK_M], tl.float32)
        acc_cm = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
        for start in range(begin, end, BLOCK_N):  # the online softmax of _attention_fwd_kernel
            real_n = start + j < end
            if BLOCK_N <= I:  # both are powers of two, and start is a multiple of BLOCK_N: the block lies in one page
                page = tl.load(page_ptr + start // I).to(tl.int64)
                offset_nc = page * stride_kx + ((start % I + j) * stride_ki)[:, None] + c[None, :]
            else:
                offset_nc = in_pages(page_ptr, start + j, real_n, stride_kx, stride_ki, I)[:, None] + c[None, :]
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


def decode_triton(q_bhc, k_xkic, v_xkic, tables):
    """The slots' own keys and the prompts', each cut into splits, then merged: first the own splits, then the prompt's.

    The grid depends on shapes alone, so that a CUDA graph can hold the step while lengths and members change.
    """
    B, H, C = q_bhc.shape
    K = k_xkic.shape[1]
    check_launch(q_bhc, k_xkic, v_xkic)
    assert k_xkic.stride() == v_xkic.stride() and k_xkic.shape[2:] == (tables.page_size, C), (k_xkic.shape, C)
    geometry = H, K, C, q_bhc.dtype, q_bhc.stride(), k_xkic.stride()
    if geometry not in tables.plans:
        tables.plans[geometry] = _plan(q_bhc, k_xkic, tables)
    plan = tables.plans[geometry]
    for splits in plan.splits:
        launch(_decode_split_kernel, splits.grid, (q_bhc, k_xkic, v_xkic, *splits.tables, plan.part_bhsc, plan.lse_bhs),
               splits.numbers, splits.options)
    out_bhc = q_bhc.new_empty(B, H, C)
    launch(_decode_merge_kernel, (B * H, 1, 1), (plan.part_bhsc, plan.lse_bhs, tables.place_b, out_bhc),
           plan.merge_numbers, plan.merge_options)
    return out_bhc


@dataclass(frozen=True)
class _Splits:
    """A launch of _decode_split_kernel over the items x: but for the queries and keys, what all layers ask for."""
    grid: tuple
    tables: tuple   # page_xt, length_x, slot_xg
    numbers: tuple  # from stride_qb on
    options: dict


@dataclass(frozen=True)
class _Plan:
    """A step's launches and the memory of its partial results, which its layers take in turn."""
    splits: list
    merge_numbers: tuple  # from n_heads on
    merge_options: dict
    part_bhsc: torch.Tensor
    lse_bhs: torch.Tensor


def _plan(q_bhc, k_xkic, tables):
    (B, H, C), K, device = q_bhc.shape, k_xkic.shape[1], q_bhc.device
    share, I = H // K, tables.page_size
    items = [(tables.page_bt, tables.length_b, torch.arange(B, device=device)[:, None]),
             (tables.page_pu, tables.length_p, tables.slot_pg)]
    assert tables.place_b.shape == (B,) and tables.place_b.is_contiguous(), tables.place_b.shape
    tilings, n_splits = [], []
    for page_xt, length_x, slot_xg in items:
        assert len(page_xt) == len(length_x) == len(slot_xg), (page_xt.shape, length_x.shape, slot_xg.shape)
        assert page_xt.dtype == torch.int32 and page_xt.stride(1) == slot_xg.stride(1) == 1, page_xt.stride()
        assert length_x.is_contiguous(), length_x.stride()
        n_rows = slot_xg.shape[1] * share  # query rows of an item: (member, head) pairs of one key/value head
        blocks, options = attention_tiling("decode_group" if n_rows > 16 else "decode", q_bhc, C)
        n_row_tiles = triton.cdiv(n_rows, blocks["BLOCK_M"])
        n_items = min(len(page_xt), triton.cdiv(B, slot_xg.shape[1]) + 1)  # a bucket's tables have more rows than that
        n_programs, T = n_items * n_row_tiles * K, page_xt.shape[1] * I
        tilings.append((n_row_tiles, tuple(blocks.values()), options))
        n_splits.append(_n_splits(n_programs, T, blocks["BLOCK_N"], device) if n_programs * T else 0)
    splits, first_split, n_all = [], 0, sum(n_splits)
    for (page_xt, length_x, slot_xg), (n_row_tiles, blocks, options), n in zip(items, tilings, n_splits):
        grid = len(page_xt) * n_row_tiles, K, n
        numbers = (*q_bhc.stride()[:2], *k_xkic.stride()[:3], page_xt.stride(0), slot_xg.stride(0), K, slot_xg.shape[1],
                   n_row_tiles, n, first_split, n_all, 1 / math.sqrt(C), share, C, I, *blocks)
        if n:
            splits.append(_Splits(grid, (page_xt, length_x, slot_xg), numbers, options))
        first_split += n
    BLOCK_S, BLOCK_C = triton.next_power_of_2(n_all), triton.next_power_of_2(C)
    merge_numbers = H, n_splits[0], n_all, C, BLOCK_S, BLOCK_C
    merge_options = {"num_warps": min(max(BLOCK_S * BLOCK_C // 2048, 1), 16)} | POINTWISE
    part_bhsc = q_bhc.new_empty(B, H, n_all, C, dtype=torch.float32)
    return _Plan(splits, merge_numbers, merge_options, part_bhsc, part_bhsc.new_empty(B, H, n_all))


@functools.lru_cache
def _n_splits(n_programs, T, BLOCK_N, device):
    """Into how many splits the keys of each item, T at most, are cut.

    A power of two, so that few programs fill the GPU twice; at least 4 blocks of keys each, at most 64. One sequence of
    32,768 keys with 4 key/value heads has 4 programs: on 132 cores min(264 / 4, 32768 / 256, 64) = 64.
    """
    n_cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
    wanted = min(2 * n_cores / n_programs, T / (4 * BLOCK_N), 64)
    return 2 ** max(0, math.ceil(math.log2(wanted)))


def decode_invariant(q_bhc, k_xkic, v_xkic, tables):
    """Each slot is a segment of one token whose keys lie in pages: the sums of `attention` in the same order."""
    (_, H, C), K = q_bhc.shape, k_xkic.shape[1]
    check_launch(q_bhc, k_xkic, v_xkic)
    blocks, options = attention_tiling("attention_invariant", q_bhc, C)
    tiling = blocks, options | {"num_stages": 2 * options["num_stages"] - 1}  # as in decoding's own tiles
    assert tokens_per_tile(tiling, H, K) >= 1, "a slot's token, with all heads that share a key/value head, is a tile"
    return launch_attention(q_bhc, k_xkic, v_xkic, tables.tiles_b6, tiling, tables)[0]


@jit
def _store_kernel(k_pool_ptr, v_pool_ptr, k_ptr, v_ptr, page_ptr, offset_ptr, stride_kn, stride_vn, stride_x, stride_h,
                  stride_i, K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """The keys and values of one token, all heads, to their place in the pool."""
    token = tl.program_id(0).to(tl.int64)
    kv, c = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_C)[None, :]
    real_kc = (kv < K) & (c < C)
    place = tl.load(page_ptr + token) * stride_x + tl.load(offset_ptr + token) * stride_i
    k_kc = tl.load(k_ptr + token * stride_kn + kv * C + c, mask=real_kc)
    v_kc = tl.load(v_ptr + token * stride_vn + kv * C + c, mask=real_kc)
    tl.store(k_pool_ptr + place + kv * stride_h + c, k_kc, mask=real_kc)
    tl.store(v_pool_ptr + place + kv * stride_h + c, v_kc, mask=real_kc)


def store_triton(k_xkic, v_xkic, k_nkc, v_nkc, page_n, offset_n):
    """One launch for both. The tokens may be columns of a wider product, [N, Q + K + V]; their heads are dense."""
    check_launch(k_xkic, v_xkic, k_nkc, v_nkc)
    N, K, C = k_nkc.shape
    assert k_nkc.shape == v_nkc.shape and (K == 1 or k_nkc.stride(1) == v_nkc.stride(1) == C), k_nkc.stride()
    assert k_xkic.stride() == v_xkic.stride() and k_xkic.shape[1::2] == (K, C), (k_xkic.shape, k_nkc.shape)
    assert page_n.shape == offset_n.shape == (N,) and page_n.is_contiguous() and offset_n.is_contiguous(), page_n.shape
    if N:
        blocks, options = _store_tiling(K, C)
        launch(_store_kernel, (N, 1, 1), (k_xkic, v_xkic, k_nkc, v_nkc, page_n, offset_n),
               (k_nkc.stride(0), v_nkc.stride(0), *k_xkic.stride()[:3], K, C, *blocks), options)


@functools.lru_cache
def _store_tiling(K, C):
    """16 bytes of 2-byte elements a thread."""
    BLOCK_K, BLOCK_C = triton.next_power_of_2(K), triton.next_power_of_2(C)
    return (BLOCK_K, BLOCK_C), {"num_warps": min(max(BLOCK_K * BLOCK_C // 256, 1), 8)} | POINTWISE
