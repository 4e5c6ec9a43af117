"""The operations that decide the speed and the memory of everything else: Triton kernels, each beside plain PyTorch.

    attention           packed segments that see themselves causally and their parent whole   training, prefill
    decode_attention    one new token per slot against its own pages and its prompt's         sampling
    store               keys and values into pages                                            sampling, prefill
    linear_logp         log-probability and entropy of a token, straight from hidden states   SFT, policy, reference
    rms_norm, add_rms_norm, rope, swiglu    what stands between the matrix products           every layer
    linear, logits      the matrix product itself, in an order that no batch changes          batch invariance

Here are all names and the choice between the two; attention.py, decode.py, logp.py and pointwise.py hold, for each
operation, first the plain PyTorch, NAME_ref, then its kernels; tiles.py is what the kernels share.

`impl` chooses: None (Triton for CUDA tensors, else PyTorch), "torch", "triton", or "invariant": Triton with tiles,
splits and rounding that depend on nothing but a row's own sequence, so that a token's numbers are the same bits alone,
in any batch, in a forest and when decoded. Softmax statistics and sums are float32 (float64 for float64 inputs, which
PyTorch computes). No operation but `logits` holds [tokens, tokens] scores of a whole batch, or [tokens, vocabulary]
logits of more than a block: they are made in blocks, reduced and forgotten. Nothing uses atomics: every sum has one
order.

Letters: N packed tokens, S segments, B decode slots with T pages, P prompts with U pages and G slots each, X pages of I
tokens, H query heads, K key/value heads, C channels of a head, D width, F width of the MLP, V vocabulary. Query head h
reads key/value head h // (H / K). In the attention kernels, as usual, m counts query rows and n keys (m are scored
tokens in model.py and grpo.py). A query row is a (token, head) pair: the H / K heads that share a key/value head are
rows of one tile, so that keys are loaded once for all of them and their gradients need no sum over heads afterwards.
"""

import torch

# `kernels.attention` is the function below; `from kernels.attention import ...` still finds the module
from kernels.attention import AttentionTriton, attention_ref
from kernels.decode import NOBODY, Tables  # noqa: F401
from kernels.decode import decode_attention_ref, decode_invariant, decode_triton, store_ref, store_triton
from kernels.logp import LinearInvariant, LinearLogpChunked, LinearLogpTriton, launch_linear, logits_ref
from kernels.logp import linear_logp_ref  # noqa: F401
from kernels.logp import linear_ref, pack_weight_ref
from kernels.pointwise import AddRmsNormTriton, RopeTriton, SwigluTriton, add_rms_norm_ref, rope_ref, swiglu_ref
from kernels.pointwise import launch_add_rms_norm, launch_rope, launch_swiglu
from kernels.tiles import INTERPRETED, wide  # noqa: F401
from kernels.tiles import runs_triton


def use_triton(x, impl):
    """Whether an operation on x runs as Triton kernels: the choice of all of them."""
    assert impl in (None, "torch", "triton", "invariant"), f"impl is None, torch, triton or invariant, got {impl!r}"
    if impl is None:
        return x.is_cuda and runs_triton(x.device, x.dtype)
    return impl != "torch"


def attention(q_nhc, k_nkc, v_nkc, segments_s3, impl=None):
    """softmax(q k^T / sqrt(C)) v over a forest of segments; returns out_nhc.

    segments_s3 is an int64 CPU table of (start, length, parent). A token sees its own segment up to itself and, if
    parent is not -1, all of the parent segment. A parent is itself parentless, segments lie back to back, and children
    directly follow their parent. Example, a prompt of 3 tokens and two replies of 2:

        segments = [(0, 3, -1), (3, 2, 0), (5, 2, 0)]
        token      0  1  2 | 3  4 | 5  6
        sees       0  01 012 | 0123  01234 | 0125  01256
    """
    N, H = q_nhc.shape[:2]
    assert k_nkc.shape == v_nkc.shape and k_nkc.shape[0] == N and H % k_nkc.shape[1] == 0, (q_nhc.shape, k_nkc.shape)
    if not use_triton(q_nhc, impl):
        return attention_ref(q_nhc, k_nkc, v_nkc, segments_s3)
    return AttentionTriton.apply(q_nhc, k_nkc, v_nkc, segments_s3, impl == "invariant")


def decode_attention(q_bhc, k_xkic, v_xkic, tables, impl=None):
    """Attention of one token per slot over its prompt and its own tokens, the new one included; returns out_bhc.

    Keys and values lie in a pool of pages, and `tables` (a Tables) says which are whose. In the Triton path a program
    takes one split of a slot's keys, or of a prompt's keys for all the heads and slots that share them: a prompt is
    read once for its group, and one long sequence still fills the GPU. The grid depends on shapes alone.
    """
    assert q_bhc.shape[1] % k_xkic.shape[1] == 0, (q_bhc.shape, k_xkic.shape)
    if not use_triton(q_bhc, impl):
        return decode_attention_ref(q_bhc, k_xkic, v_xkic, tables)
    decode = decode_invariant if impl == "invariant" else decode_triton
    return decode(q_bhc, k_xkic, v_xkic, tables)


def store(k_xkic, v_xkic, k_nkc, v_nkc, page_n, offset_n, impl=None):
    """Writes the keys and values of packed tokens into a pool of pages: token n's to place offset_n of page_n."""
    if not use_triton(k_nkc, impl):
        store_ref(k_xkic, v_xkic, k_nkc, v_nkc, page_n, offset_n)
    else:
        store_triton(k_xkic, v_xkic, k_nkc, v_nkc, page_n, offset_n)


def linear_logp(hidden_nd, weight_vd, target_n, temperature=1.0, impl=None):
    """log softmax(hidden weight^T / temperature)[target] and that distribution's entropy, in nats: logp_n, entropy_n.

    float32 (float64 for float64 inputs); only logp carries a gradient. linear_logp_ref says it in three lines, with all
    logits at once: 4 x 16384 x 151936 bytes = 10 GB. In its place runs, in PyTorch, LinearLogpChunked: peak extra
    memory two blocks of LOGIT_CHUNK elements, whatever N and V are. In Triton it is 12 bytes per row and column tile
    forward (0.12 GB at N = 16384, V = 151936), GRADIENT_CHUNK elements and a float32 gradient of hidden backward. To
    both the gradients themselves are added.
    """
    assert temperature > 0, f"temperature must be positive, got {temperature}"
    assert hidden_nd.shape[0] == target_n.shape[0] and hidden_nd.shape[1] == weight_vd.shape[1], \
        (hidden_nd.shape, weight_vd.shape, target_n.shape)
    if not use_triton(hidden_nd, impl):
        return LinearLogpChunked.apply(hidden_nd, weight_vd, target_n, temperature)
    return LinearLogpTriton.apply(hidden_nd, weight_vd, target_n, temperature, impl == "invariant")


def linear(x_nd, weight_vd, bias_v=None, impl=None):
    """x weight^T + bias: PyTorch's own, unless impl is "invariant".

    A library picks tiles and splits by the number of rows, so a row's sum over D changes with the rows beside it. Here
    the tile is fixed and D is summed first to last; gradients are PyTorch's, since only the forward pass must agree.
    """
    if impl != "invariant":
        return linear_ref(x_nd, weight_vd, bias_v)
    if not torch.is_grad_enabled():
        return launch_linear(x_nd, weight_vd, bias_v, x_nd.dtype)
    return LinearInvariant.apply(x_nd, weight_vd, bias_v)


def pack_weight(weight_vd, impl=None):
    """A copy of the weight for many calls of `linear` or `logits` with it, which are faster so on a CPU; or None."""
    return None if impl == "invariant" else pack_weight_ref(weight_vd)


def logits(hidden_nd, weight_vd, impl=None):
    """hidden weight^T without gradient, float32 (float64 for float64 inputs): what the sampler draws from.

    On a GPU bfloat16 products are not rounded to bfloat16 on the way, like linear_logp's: rounded logits would put the
    sampler's log-probabilities 2e-2 off the trainer's.
    """
    if impl == "invariant":
        return launch_linear(hidden_nd, weight_vd, None, torch.float32)
    return logits_ref(hidden_nd, weight_vd)


def rms_norm(x_nd, weight_d, eps, impl=None):
    """weight x / sqrt(mean(x^2) + eps) over the last axis."""
    if not use_triton(x_nd, impl):
        return add_rms_norm_ref(x_nd, None, weight_d, eps)[1]
    if not torch.is_grad_enabled():
        return launch_add_rms_norm(x_nd, None, weight_d, eps)[1]
    return AddRmsNormTriton.apply(x_nd, None, weight_d, eps)


def add_rms_norm(x_nd, delta_nd, weight_d, eps, impl=None):
    """The residual stream x + delta, and its rms_norm, in one pass over memory."""
    if not use_triton(x_nd, impl):
        return add_rms_norm_ref(x_nd, delta_nd, weight_d, eps)
    if not torch.is_grad_enabled():
        return launch_add_rms_norm(x_nd, delta_nd, weight_d, eps)[:2]
    return AddRmsNormTriton.apply(x_nd, delta_nd, weight_d, eps)


def rope(x_nhc, cos_nc, sin_nc, weight_c=None, eps=0.0, impl=None):
    """Rotary embedding, after Qwen3's norm over the channels of a head if weight_c is given."""
    if not use_triton(x_nhc, impl):
        return rope_ref(x_nhc, cos_nc, sin_nc, weight_c, eps)
    if not torch.is_grad_enabled():
        return launch_rope(x_nhc, cos_nc, sin_nc, weight_c, eps)
    return RopeTriton.apply(x_nhc, cos_nc, sin_nc, weight_c, eps)


def swiglu(gate_nf, up_nf, impl=None):
    """silu(gate) up, elementwise: the MLP's middle."""
    if not use_triton(gate_nf, impl):
        return swiglu_ref(gate_nf, up_nf)
    if not torch.is_grad_enabled():
        return launch_swiglu(gate_nf, up_nf)
    return SwigluTriton.apply(gate_nf, up_nf)
