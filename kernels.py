"""The three operations that decide the speed and the memory of everything else, in plain PyTorch.

    attention           packed segments that see themselves causally and their parent whole   training, prefill
    decode_attention    one new token per sequence against its key/value cache                sampling
    linear_logp         log-probability and entropy of a token, straight from hidden states   SFT, policy, reference

All three run on any device and dtype; softmax statistics are float32 (float64 for float64 inputs). None of them ever
holds [tokens, tokens] scores of a whole batch or [tokens, vocabulary] logits.

Letters: N packed tokens, S segments, B decode slots, T positions, H query heads, K key/value heads, C channels of a
head, D width, V vocabulary. Query head h reads key/value head h // (H / K).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOGIT_CHUNK = 2**24  # elements of the [rows, V] float32 blocks that linear_logp holds at once, two of 64 MB


def wide(dtype):
    """The dtype for sums, norms and softmax: float32, or float64 when the tensors are float64."""
    return torch.promote_types(dtype, torch.float32)


# ------------------------------------------------------------------------------------------------------------ attention


def attention(q_nhc, k_nkc, v_nkc, segments_s3, impl=None):
    """softmax(q k^T / sqrt(C)) v over a forest of segments; returns out_nhc.

    segments_s3 is an int64 CPU table of (start, length, parent). A token sees its own segment up to itself and, if
    parent is not -1, all of the parent segment. A parent is itself parentless. Example, a prompt of 3 tokens and two
    replies of 2:

        segments = [(0, 3, -1), (3, 2, 0), (5, 2, 0)]
        token      0  1  2 | 3  4 | 5  6
        sees       0  01 012 | 0123  01234 | 0125  01256

    Segments of similar size are padded into one scaled_dot_product_attention call, so that a forest of many short
    segments costs a handful of calls and a long segment is never padded by more than 31 keys.
    """
    assert impl in (None, "torch"), f"impl {impl!r} is unknown; there is only 'torch' so far"
    N, H, C = q_nhc.shape
    assert k_nkc.shape == v_nkc.shape and k_nkc.shape[0] == N and H % k_nkc.shape[1] == 0, (q_nhc.shape, k_nkc.shape)
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


@dataclass(frozen=True)
class Prompts:
    """The prompts of a decode step, each held once for all the slots that continue it.

    slot_pm lists the slots of prompt p, filled up with -1: two rollouts of prompt 0 in slots 3 and 1, and one of prompt 1
    in slot 0, are [[3, 1], [0, -1]]; slot 2 is empty, or has its whole sequence in its own cache.
    """
    k_pkuc: torch.Tensor
    v_pkuc: torch.Tensor
    length_p: torch.Tensor  # int64: so many of the U positions count
    slot_pm: torch.Tensor   # int64


def decode_attention(q_bhc, k_bktc, v_bktc, length_b, prompts=None, impl=None):
    """Attention of one token per slot over its prompt and the first length_b entries of its cache; returns out_bhc.

    The slot's own new token is in its cache already: length_b is at least 1.
    """
    assert impl in (None, "torch"), f"impl {impl!r} is unknown; there is only 'torch' so far"
    return decode_attention_ref(q_bhc, k_bktc, v_bktc, length_b, prompts)


def decode_attention_ref(q_bhc, k_bktc, v_bktc, length_b, prompts=None):
    """softmax over [the prompt's scores, the slot's own], written out; the queries of a prompt's slots become rows of one
    matrix product, so that its keys are read once for all of them."""
    B, H, C = q_bhc.shape
    K, T = k_bktc.shape[1:3]
    if prompts is None:
        visible_b11t = (torch.arange(T, device=q_bhc.device) < length_b[:, None])[:, None, None]
        out = F.scaled_dot_product_attention(q_bhc.view(B, K, H // K, C), k_bktc, v_bktc, attn_mask=visible_b11t)
        return out.reshape(B, H, C)
    q_bkgc = (q_bhc / math.sqrt(C)).view(B, K, H // K, C)
    own_bkgt = _hide(q_bkgc @ k_bktc.transpose(2, 3), length_b)
    P, M = prompts.slot_pm.shape
    slot_pm, place_b = prompts.slot_pm.clamp(min=0), _places(prompts.slot_pm, B)
    q_pkrc = q_bkgc[slot_pm].transpose(1, 2).reshape(P, K, M * (H // K), C)
    score_pkru = _hide(q_pkrc @ prompts.k_pkuc.transpose(2, 3), prompts.length_p)
    score_xkgu = score_pkru.view(P, K, M, H // K, -1).transpose(1, 2).flatten(0, 1)  # x: place p * M + m
    prompt_bkgu = score_xkgu[place_b].masked_fill((place_b < 0)[:, None, None, None], -math.inf)
    weight = torch.cat([prompt_bkgu, own_bkgt], -1).softmax(-1).to(q_bhc.dtype)
    prompt_bkgu, own_bkgt = weight.split([prompt_bkgu.shape[-1], T], -1)
    weight_pkru = prompt_bkgu[slot_pm].transpose(1, 2).reshape(P, K, M * (H // K), -1)
    out_xkgc = (weight_pkru @ prompts.v_pkuc).view(P, K, M, H // K, C).transpose(1, 2).flatten(0, 1)
    out_bkgc = torch.where((place_b >= 0)[:, None, None, None], out_xkgc[place_b], 0)
    return (out_bkgc + own_bkgt @ v_bktc).reshape(B, H, C)


def _hide(score_xkrt, length_x):
    """Scores in float32 or wider, minus infinity from each row's length on."""
    hidden_xt = torch.arange(score_xkrt.shape[-1], device=score_xkrt.device) >= length_x[:, None]
    return score_xkrt.to(wide(score_xkrt.dtype)).masked_fill(hidden_xt[:, None, None], -math.inf)


def _places(slot_pm, B):
    """Where slot b stands in slot_pm, as p * M + m, or -1."""
    place_b = torch.full((B + 1,), -1, device=slot_pm.device)
    place_x = torch.arange(slot_pm.numel(), device=slot_pm.device)
    return place_b.scatter_(0, slot_pm.flatten() % (B + 1), place_x)[:B]  # -1 wraps to the last, which is cut off


# ------------------------------------------------------------------------------------------ log-probabilities of tokens


class _LinearLogp(torch.autograd.Function):
    """z = hidden weight^T / temperature;  l = log_softmax(z);  logp = l[target];  entropy = -sum exp(l) l.

    (Not lse(z) - sum softmax(z) z, nor z[target] - lse(z): in float32 both cancel where one token is nearly certain.)
    Row blocks of LOGIT_CHUNK elements; the backward pass recomputes each block's z, so nothing of size V x N is kept:
    dz = g (onehot(target) - softmax(z)) / temperature, dhidden = dz weight, dweight = sum over blocks of dz^T hidden.
    """

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, temperature):
        logp_n = torch.empty(len(hidden_nd), dtype=wide(hidden_nd.dtype), device=hidden_nd.device)
        entropy_n = torch.empty_like(logp_n)
        for rows, z, l in _row_blocks(hidden_nd, weight_vd, temperature):
            torch.log_softmax(z, 1, out=l)
            logp_n[rows] = l.gather(1, target_n[rows, None])[:, 0]
            entropy_n[rows] = -torch.exp(l, out=z).mul_(l).sum(1)
        ctx.save_for_backward(hidden_nd, weight_vd, target_n)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_n)
        return logp_n, entropy_n

    @staticmethod
    def backward(ctx, grad_n, _):
        hidden_nd, weight_vd, target_n = ctx.saved_tensors
        grad_hidden_nd = torch.empty_like(hidden_nd) if ctx.needs_input_grad[0] else None
        # float32 even for bfloat16 weights: hundreds of blocks are added into it
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=grad_n.dtype) if ctx.needs_input_grad[1] else None
        for rows, z, dz in _row_blocks(hidden_nd, weight_vd, ctx.temperature):
            scale = (grad_n[rows] / ctx.temperature)[:, None]
            torch.softmax(z, 1, out=dz).mul_(-scale)
            dz.scatter_add_(1, target_n[rows, None], scale)
            dz = dz.to(hidden_nd.dtype)
            if grad_hidden_nd is not None:
                grad_hidden_nd[rows] = dz @ weight_vd
            if grad_weight_vd is not None and grad_weight_vd.dtype == dz.dtype:
                grad_weight_vd.addmm_(dz.t(), hidden_nd[rows])
            elif grad_weight_vd is not None:
                grad_weight_vd += dz.t() @ hidden_nd[rows]
        grad_weight_vd = grad_weight_vd.to(weight_vd.dtype) if grad_weight_vd is not None else None
        return grad_hidden_nd, grad_weight_vd, None, None


def _row_blocks(hidden_nd, weight_vd, temperature):
    """(rows, their logits z at the temperature, an empty block like z) for blocks of about LOGIT_CHUNK elements.

    The two blocks are allocated once: on a CPU fresh memory of this size costs more (page faults) than the softmax in
    it.
    """
    N, V = len(hidden_nd), len(weight_vd)
    step = max(1, min(N, LOGIT_CHUNK // V))
    block_rv = hidden_nd.new_empty(step, V, dtype=wide(hidden_nd.dtype))
    other_rv = torch.empty_like(block_rv)
    for first in range(0, N, step):
        rows = slice(first, min(first + step, N))
        z, other = block_rv[:rows.stop - first], other_rv[:rows.stop - first]
        if z.dtype == hidden_nd.dtype:
            torch.mm(hidden_nd[rows], weight_vd.t(), out=z)
        else:
            z.copy_(hidden_nd[rows] @ weight_vd.t())
        yield rows, z.div_(temperature), other


def linear_logp(hidden_nd, weight_vd, target_n, temperature=1.0, impl=None):
    """log softmax(hidden weight^T / temperature)[target] and that distribution's entropy, in nats: logp_n, entropy_n.

    float32 (float64 for float64 inputs); the entropy carries no gradient. Peak extra memory is a few blocks of
    LOGIT_CHUNK elements plus the gradients, whatever N is.
    """
    assert impl in (None, "torch"), f"impl {impl!r} is unknown; there is only 'torch' so far"
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    assert hidden_nd.shape[0] == target_n.shape[0] and hidden_nd.shape[1] == weight_vd.shape[1], \
        (hidden_nd.shape, weight_vd.shape, target_n.shape)
    return _LinearLogp.apply(hidden_nd, weight_vd, target_n, temperature)
