"""Mistakes that the tests of kernels/ must notice: each is made in a copy of it, and a test that names it must fail.

    python tests/mutants.py [part of a name]    one line each; exit code 1 if any survives
    python tests/mutants.py --bfloat16          all that tests in float32 catch, by the same tests in bfloat16
    python tests/mutants.py --every 8           each eighth

A mistake is caught if every failure of its tests is an AssertionError, or an expected exception that did not come: one
that merely does not run is an error of this list. Torch, Triton and pytest are imported once; a forked process per
mistake imports its kernels.
"""

import contextlib
import gc
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", RM_TEST_DEVICE="cpu", OMP_NUM_THREADS="1",
                  PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")

import pytest  # noqa: E402
import torch  # noqa: E402
import triton.runtime.interpreter  # noqa: E402, F401

HERE = Path(__file__).resolve().parent

# The tests that fail: small ones.
SEES, HEADS = "test_attention_sees_what_the_segments_say", "test_attention_kernels_of_head_shapes_and_peaked_softmax"
GROUP, OTHER = f"{SEES}[triton-float32-a group of 2]", f"{SEES}[triton-float32-same size, other prompt]"
GQA = f"{HEADS}[triton-float32-4-2-80-1]"
DECODE = "test_decode_attention_is_the_last_row_of_attention[8-2-80-1-32-triton-float32]"
SHARED = "test_decode_attention_with_shared_prompts"
MEMBERS, INVARIANT = (f"{SHARED}[lengths0-prompts0-4-2-32-1-16-3-{impl}-float32]" for impl in ("triton", "invariant"))
SPLITS, TILES = (f"{SHARED}[{x}-triton-float32]" for x in ("lengths2-prompts2-2-1-64-1-64-180",
                                                            "lengths3-prompts3-8-1-32-1-32-1"))
LOGP = "test_linear_logp_kernels[45-50-101-0.5-1-134217728-triton-float32]"
CHUNKS = "test_linear_logp_kernels[64-32-48-1.7-20-2048-triton-float32]"
LINEAR = "test_invariant_linear[37-50-33-float32]"
NORM, MORE_ROWS = "test_norm_kernels[5-128-triton-float32]", "test_norms_of_more_rows_than_programs"
ODD_NORM = "test_norm_kernels[37-50-triton-float32]"
ROPE, ROPE_NORM = (f"test_rope_kernels[{x}-triton-float32]" for x in ("13-4-64-False-2", "7-3-80-True-1"))
PLAINLY = {name: f"test_without_gradients_the_same_bits[{name}-float32]" for name in
           ("linear", "rms_norm", "add_rms_norm", "normed rope", "swiglu")}
APART = "test_rope_of_heads_apart[triton-float32]"
SWIGLU, BY_HAND = "test_swiglu_kernels[triton-float32]", "test_pointwise_by_hand[torch-float32]"
LOGITS = "test_logits[invariant-float16]"
LOGP_BF16 = LOGP.replace("float32", "bfloat16")
PEAKED_DECODE = f"{SHARED}[lengths1-prompts1-7-1-80-4-32-0-triton-bfloat16]"
PEAKED = f"{HEADS}[triton-bfloat16-7-1-128-20]"
BLOCKS = "test_linear_logp_adds_many_blocks_in_float32"
NORM_OF_SUM = "test_add_rms_norm_norms_the_sum_it_returns[bfloat16]"
ONCE = {name: f"test_results_are_rounded_once[{name}-bfloat16]" for name in
        ("linear", "rms_norm", "rope", "normed rope", "swiglu")}
STORE = "test_store[triton-float32]"
ORDER, REFUSE = "test_invariant_kernels_have_one_order", "test_kernels_refuse_what_they_cannot_multiply[swiglu]"
TORCH, TORCH_OTHER = (f"{SEES}[torch-float64-{x}]" for x in ("prompts of 31, 32, 33", "same size, other prompt"))
TORCH_MEMBERS = f"{SHARED}[lengths0-prompts0-4-2-32-1-16-3-torch-float64]"
TORCH_LOGP = "test_linear_logp_is_log_softmax[0.5-150]"

# (name, function or class where, old text that occurs there once, new text, tests)
MUTANTS = [
    # attention, forward
    ("no causal mask", "_attention_fwd_kernel", "(position + token_m)[:, None], 0.0",
     "n_keys + token_m[:, None], 0.0", [GROUP]),
    ("a token sees the next", "_attention_fwd_kernel", "<= (position + token_m)[:, None]",
     "<= (position + token_m)[:, None] + 1", [GROUP]),
    ("no parent", "_query_tiles", "length[above], 0)", "0 * above, 0)", [GROUP]),
    ("the first segment is everyone's parent", "_query_tiles", "start[above], 0)", "0 * above, 0)", [OTHER]),
    ("positions start after the prompt", "_query_tiles", "n_prefix + offset", "offset", [GROUP]),
    ("sum keeps its old maximum", "_attention_fwd_kernel", "sum_m * keep_m +", "sum_m +", [GROUP]),
    ("output keeps its old maximum", "_attention_fwd_kernel", "acc_mc * keep_m[:, None]", "acc_mc", [GROUP]),
    ("no scale", "_attention_fwd_kernel", "score_mn * (scale * LOG2E)", "score_mn * LOG2E", [GROUP]),
    ("natural exponent", "_attention_fwd_kernel", "weight_mn = tl.exp2(", "weight_mn = tl.exp(", [GROUP]),
    ("keys beyond the sequence", "_attention_fwd_kernel", "key_n < n_keys", "key_n < n_keys + BLOCK_N", [GROUP]),
    ("the diagonal is clear", "_attention_fwd_kernel", "(position + 1) //", "n_keys //", [GROUP]),
    ("every block is clear", "_attention_fwd_kernel", "start >= n_clear", "start >= n_keys", [GROUP]),
    ("heads interleaved", "_attention_fwd_kernel", "kv * SHARE + r % SHARE", "r % SHARE * n_kv + kv", [GQA]),
    ("log-sum-exp without its sum", "_attention_fwd_kernel", "max_m + tl.log2(sum_m)", "max_m", [GROUP]),
    ("padded channels are stored", "_attention_fwd_kernel", "real_m[:, None] & (c < C)[None, :]", "real_m[:, None]",
     [GQA]),
    ("padded channels are loaded", "load_rows", "real_r[:, None] & (c < C)[None, :]", "real_r[:, None]", [GQA]),
    # attention, backward
    ("grad_q without delta", "_attention_bwd_q_kernel", "(grad_weight_mn - delta_m[:, None])",
     "grad_weight_mn", [GROUP]),
    ("grad_q without mask", "_attention_bwd_q_kernel", "(position + token_m)[:, None], 0.0",
     "n_keys + token_m[:, None], 0.0", [GROUP]),
    ("grad_q: every block is clear", "_attention_bwd_q_kernel", "start >= n_clear", "start >= n_keys", [GROUP]),
    ("grad_q: the diagonal is clear", "_attention_bwd_q_kernel", "(position + 1) //", "n_keys //", [GROUP]),
    ("grad_q without scale", "_attention_bwd_q_kernel", "grad_q_mc * scale", "grad_q_mc", [GROUP]),
    ("delta from grad_out alone", "_attention_bwd_q_kernel", "* out_mc.to", "* grad_out_mc.to", [GROUP]),
    ("grad_k without delta", "_attention_bwd_kv_kernel", "(grad_weight_nm - delta_m[None, :])",
     "grad_weight_nm", [GROUP]),
    ("grad_k, grad_v off by one", "_attention_bwd_kv_kernel", "j[:, None] <= token_m", "j[:, None] < token_m", [GROUP]),
    ("grad_k without scale", "_attention_bwd_kv_kernel", "grad_k_nc * scale", "grad_k_nc", [GROUP]),
    ("grad_k, grad_v of some heads", "_attention_bwd_kv_kernel", "(until - first) * SHARE", "until - first", [GROUP]),
    ("grad_k, grad_v from other heads", "_attention_bwd_kv_kernel", "kv * SHARE + r % SHARE",
     "r % SHARE * n_kv + kv", [GQA]),
    ("children are not heard", "_key_tiles", "until[child].copy())", "0)", [GROUP]),
    ("the next tree is heard", "_attention_bwd_kv_kernel", "r < n_rows", "r >= 0", [OTHER]),
    ("short diagonal", "_attention_bwd_kv_kernel", "tl.cdiv(n_tile_keys * SHARE, BLOCK_M) * BLOCK_M", "BLOCK_M",
     [GROUP]),
    ("gradients of keys beyond the tile", "_attention_bwd_kv_kernel", "real_n[:, None] & (c < C)", "(c < C)", [GROUP]),
    # decode attention
    ("decode without scale", "_decode_split_kernel", "(scale * LOG2E)", "LOG2E", [DECODE]),
    ("decode: keys beyond the split", "_decode_split_kernel", "tl.where(real_n[:, None], score_nm,",
     "tl.where(real_n[:, None] | (j >= 0)[:, None], score_nm,", [DECODE]),
    ("decode: sum keeps its old maximum", "_decode_split_kernel", "sum_m * keep_m +", "sum_m +", [DECODE]),
    ("decode: output keeps its old maximum", "_decode_split_kernel", "acc_cm * keep_m[None, :]", "acc_cm", [DECODE]),
    ("decode: heads interleaved", "_decode_split_kernel", "kv * SHARE + r % SHARE", "r % SHARE * n_kv + kv", [DECODE]),
    ("decode: log-sum-exp without its sum", "_decode_split_kernel", "max_m + tl.log2(sum_m)", "max_m", [MEMBERS]),
    ("decode: last split runs over", "_decode_split_kernel", "tl.minimum(begin + n_split_keys, n_keys)",
     "begin + n_split_keys", [SPLITS]),
    ("decode: splits round down", "_decode_split_kernel", "tl.cdiv(n_keys, n_splits)", "(n_keys // n_splits)",
     [SPLITS]),
    ("decode: second tile of members is the first", "_decode_split_kernel", "tl.program_id(0) % n_row_tiles * BLOCK_M",
     "0", [TILES]),
    ("decode: prompts overwrite own parts", "_decode_split_kernel", "first_split + split", "split", [MEMBERS]),
    ("merge: splits weigh alike", "_decode_merge_kernel", "tl.exp2(lse_s - tl.max(lse_s, 0))",
     "tl.where(lse_s > float('-inf'), 1.0, 0.0)", [MEMBERS]),
    ("merge: empty splits are read", "_decode_merge_kernel", 'lse_s > float("-inf"))', "s < n_all_splits)", [SPLITS]),
    ("merge: all have a prompt", "_decode_merge_kernel", "n_all_splits, n_own_splits)", "n_all_splits, n_all_splits)",
     [MEMBERS]),
    ("merge: the place of another slot", "_decode_merge_kernel", "place_ptr + row // n_heads", "place_ptr", [MEMBERS]),
    ("decode: an empty split is not said to be", "_decode_split_kernel", 'float("-inf"), tl.float32), mask=real_m)',
     "0.0, tl.float32), mask=real_m)", [SPLITS]),
    ("decode: all blocks from the first page", "_decode_split_kernel", "page_ptr + start // I", "page_ptr", [DECODE]),
    ("decode: every block from its page's beginning", "_decode_split_kernel", "(start % I + j)", "j", [DECODE]),
    ("decode: a page's place is not its token's", "_decode_split_kernel", "(start % I + j)", "(start + j)", [DECODE]),
    ("decode: pages of the first item", "_decode_split_kernel", "page_ptr += item * stride_page", "page_ptr += 0",
     [DECODE]),
    ("decode: tables as wide as what is used", "_plan", "page_xt.stride(0),",
     "page_xt.shape[1],", [DECODE]),
    ("decode: members as wide as what is used", "_plan", "slot_xg.stride(0), K", "slot_xg.shape[1], K", [SPLITS]),
    ("decode: the last page is full", "_decode_split_kernel", "n_keys = tl.load(length_ptr + item).to(tl.int32)",
     "n_keys = tl.cdiv(tl.load(length_ptr + item).to(tl.int32), I) * I", [DECODE]),
    ("decode: splits end within a block", "_decode_split_kernel",
     "tl.cdiv(tl.cdiv(n_keys, n_splits), BLOCK_N) * BLOCK_N", "tl.cdiv(n_keys, n_splits)", [SPLITS]),
    ("decode: lengths of other items", "_decode_split_kernel", "length_ptr + item", "length_ptr", [MEMBERS]),
    ("decode: heads lie beside the page's tokens", "_plan", "K, slot_xg.shape[1]", "1, slot_xg.shape[1]", [MEMBERS]),
    ("pages: all from the first", "in_pages", "page_ptr + token_n // I", "page_ptr + 0 * token_n",
     [MEMBERS, INVARIANT]),
    ("pages: a place is not its token's", "in_pages", "token_n % I", "token_n", [MEMBERS, INVARIANT]),
    ("pages: the next one", "in_pages", "token_n // I", "(token_n + 1) // I", [MEMBERS, INVARIANT]),
    ("pages: heads of another stride", "in_pages", "page_n * stride_kx", "page_n * (stride_kx + I)",
     [MEMBERS, INVARIANT]),
    ("store: values where keys lie", "_store_kernel", "tl.store(v_pool_ptr + place", "tl.store(k_pool_ptr + place",
     [STORE]),
    ("store: in a dense product", "_store_kernel", "token * stride_vn", "token * stride_kn", [STORE]),
    ("store: all in the page's first place", "_store_kernel", " + tl.load(offset_ptr + token) * stride_i", "", [STORE]),
    ("store: all in the first token's page", "_store_kernel", "page_ptr + token", "page_ptr", [STORE]),
    ("store: heads beside each other", "_store_kernel", "place + kv * stride_h + c, k_kc", "place + kv * C + c, k_kc",
     [STORE]),
    ("store: heads that are not there", "_store_kernel", "(kv < K) & (c < C)", "(kv >= 0) & (c < C)", [STORE]),
    ("store: channels that are not there", "_store_kernel", "(kv < K) & (c < C)", "(kv < K) & (c >= 0)", [STORE]),
    ("merge: not divided", "_decode_merge_kernel", " / tl.sum(weight_s, 0)", "", [MEMBERS]),
    # batch invariance
    ("invariant decode: sees one more", "Tables", "n_prefix_b + self.length_b - 1", "n_prefix_b + self.length_b",
     [INVARIANT]),
    ("invariant decode: slot for prompt", "Tables", "prompt_b = self.place_b.clamp(min=0) // self.slot_pg.shape[1]",
     "prompt_b = self.place_b.clamp(min=0) % len(self.slot_pg)", [INVARIANT]),
    ("invariant decode: all have a prompt", "Tables", "n_prefix_b = torch.where(self.place_b >= 0,",
     "n_prefix_b = torch.where(self.place_b >= -1,", [INVARIANT]),
    ("invariant decode: tables as wide as what is used", "Tables", "self.page_bt.stride(0)", "self.page_bt.shape[1]",
     [INVARIANT]),
    ("invariant decode: prompts' tables too", "Tables", "self.page_pu.stride(0)", "self.page_pu.shape[1]", [INVARIANT]),
    ("invariant decode: own keys from the prompt's end", "_attention_fwd_kernel", "key_n, key_n - n_prefix)",
     "key_n, key_n)", [INVARIANT]),
    ("invariant decode: the prompt in the slot's pages", "_attention_fwd_kernel", "prefix_page_ptr + prefix_row,",
     "own_page_ptr + own_row,", [INVARIANT]),
    ("invariant decode in splits", "decode_attention", "decode_invariant if impl", "decode_triton if impl", [ORDER]),
    ("invariant linear is the library's", "linear", "if impl != \"invariant\"", "if impl", [ORDER]),
    # linear_logp
    ("logits without temperature", "_logp_fwd_kernel", "z_nv *= inverse_temperature", "z_nv *= 1", [LOGP]),
    ("vocabulary ends with its tile", "_logp_fwd_kernel", "(col_v < V)[None, :], z_nv", "(col_v >= 0)[None, :], z_nv",
     [LOGP]),
    ("every tile writes the target's logit", "_logp_fwd_kernel", "target_n >= col_tile * BLOCK_V", "target_n >= 0",
     [LOGP]),
    ("zero times infinity", "_logp_fwd_kernel", "tl.maximum(z_nv - max_n[:, None], -1e4)", "z_nv - max_n[:, None]",
     [LOGP]),
    ("merge: moment keeps its old maximum", "_logp_merge_kernel", "(moment_n + sum_n * down_n)", "moment_n", [LOGP]),
    ("merge: sum keeps its old maximum", "_logp_merge_kernel", "sum_n = keep_n * sum_n", "sum_n = sum_n", [LOGP]),
    ("logp without its sum", "_logp_merge_kernel", "(logit_n - max_n) - log_sum_n", "logit_n - max_n", [LOGP]),
    ("entropy without its moment", "_logp_merge_kernel", " - moment_n / sum_n", "", [LOGP]),
    ("gradient without temperature", "_logp_bwd_kernel", "(grad_n * inverse_temperature)", "grad_n", [LOGP]),
    ("gradient at another temperature", "_logp_bwd_kernel", "z_nv *= inverse_temperature", "z_nv *= 1", [LOGP]),
    ("gradient without softmax", "_logp_bwd_kernel", "(hit_nv - p_nv)", "hit_nv", [LOGP]),
    ("gradient without target", "_logp_bwd_kernel", "(hit_nv - p_nv)", "(0.0 - p_nv)", [LOGP]),
    ("gradient: softmax without its sum", "_logp_bwd_kernel", " - log_sum_n[:, None])", ")", [LOGP]),
    ("gradient: every chunk is the first", "_logp_bwd_kernel", "first_col + within_v", "within_v", [CHUNKS]),
    ("gradient: the last chunk counts", "LinearLogpTriton", "grad_hidden_nd += ", "grad_hidden_nd = ", [CHUNKS]),
    ("the backward pass gets the sum, not its logarithm", "_logp_merge_kernel", "row_n, log_sum_n, mask",
     "row_n, sum_n, mask", [LOGP]),
    ("the backward pass gets the first tile's maximum", "_logp_merge_kernel", "tl.store(max_ptr + row_n, max_n,",
     "tl.store(max_ptr + row_n, tl.load(max_ptr + row_n, mask=real_n),", [LOGP]),
    # linear
    ("columns of the next row", "_product_tile", "tl.load(x_ptr, mask=(d < D - first)[None, :], other=0.0)",
     "tl.load(x_ptr)", [LOGP]),
    ("a tile too few", "_tile_of", "tl.minimum(n_row_tiles - first, GROUP)", "GROUP", [LINEAR]),
    ("no bias", "_linear_kernel", "if BIAS:", "if D < 0:", [LINEAR]),
    ("columns beyond V are stored", "_linear_kernel", " & (col_v < V)[None, :]", "", [LINEAR]),
    ("bias learns from one row", "LinearInvariant", "grad_nv.sum(0)", "grad_nv[0]", [LINEAR]),
    # pointwise operations
    ("norm without eps", "_rms_norm_fwd_kernel", " / D + eps", " / D", [NORM, ONCE["rms_norm"]]),
    ("mean over the block", "_rms_norm_fwd_kernel", " / D + eps", " / BLOCK_D + eps", [ODD_NORM]),
    ("norm's gradient without mean", "_rms_norm_bwd_kernel", "(grad_d - h_d * (tl.sum(grad_d * h_d, 0) / D))", "grad_d",
     [NORM]),
    ("the residual's gradient is lost", "_rms_norm_bwd_kernel", "if ADD:", "if D < 0:", [NORM]),
    ("weight in the weight's gradient", "_rms_norm_bwd_kernel", "part_d += grad_d * h_d",
     "part_d += grad_d * h_d * weight_d", [NORM]),
    ("norm: a program has one row", "_rms_norm_bwd_kernel", "N, tl.num_programs(0)", "N, N", [MORE_ROWS]),
    ("the sum is not stored", "AddRmsNormTriton", "(sum_nd, out_nd) if", "(x_nd + 0, out_nd) if", [NORM]),
    ("rotates the other way", "_rope_fwd_kernel", "a_hc * cos_c - b_hc * sin_c", "a_hc * cos_c + b_hc * sin_c", [ROPE]),
    ("gradient rotates on", "_rope_bwd_kernel", "turned_a_hc * cos_c + turned_b_hc * sin_c",
     "turned_a_hc * cos_c - turned_b_hc * sin_c", [ROPE]),
    ("rope's norm without eps", "_rope_fwd_kernel", "(2 * HALF) + eps", "(2 * HALF)",
     [ROPE_NORM, ONCE["normed rope"]]),
    ("rope's norm without mean", "_rope_bwd_kernel", "(grad_a_hc - a_hc * mean_h[:, None])", "grad_a_hc", [ROPE_NORM]),
    ("rope's weight learns from one head", "_rope_bwd_kernel", "tl.sum(grad_b_hc * b_hc, 0)",
     "tl.max(grad_b_hc * b_hc, 0)", [ROPE_NORM]),
    ("heads that are not there", "_rope_fwd_kernel", "(h < H)[:, None] & ", "", [ROPE_NORM]),
    ("swiglu without sigmoid", "_swiglu_fwd_kernel", "gate * tl.sigmoid(gate) * up", "gate * up", [SWIGLU]),
    ("silu's derivative is its slope at large x", "_swiglu_bwd_kernel", " * (1 + gate * (1 - s))", "", [SWIGLU]),
    ("swiglu beyond its end", "_swiglu_fwd_kernel", "to(out_ptr.dtype.element_ty), mask=real)",
     "to(out_ptr.dtype.element_ty))", [SWIGLU]),
    ("swiglu: a row has one block", "_swiglu_fwd_kernel", "tl.program_id(1) * BLOCK", "0", [SWIGLU]),
    ("swiglu: gate's rows are dense", "_swiglu_fwd_kernel", "row * stride_gate", "row * F", [SWIGLU]),
    ("swiglu: up's rows are dense", "_swiglu_fwd_kernel", "row * stride_up", "row * F", [SWIGLU]),
    ("swiglu bwd: a row has one block", "_swiglu_bwd_kernel", "tl.program_id(1) * BLOCK", "0", [SWIGLU]),
    ("swiglu bwd: gate's rows are dense", "_swiglu_bwd_kernel", "row * stride_gate", "row * F", [SWIGLU]),
    ("swiglu bwd: up's rows are dense", "_swiglu_bwd_kernel", "row * stride_up", "row * F", [SWIGLU]),
    ("rope: heads are dense", "_rope_fwd_kernel", "h[:, None] * stride_xh", "h[:, None] * 2 * HALF", [APART]),
    # without gradients
    ("no gradient: the sum alone", "rms_norm", "launch_add_rms_norm(x_nd, None, weight_d, eps)[1]",
     "launch_add_rms_norm(x_nd, None, weight_d, eps)[0]", [PLAINLY["rms_norm"]]),
    ("no gradient: the norm twice", "add_rms_norm", "eps)[:2]", "eps)[1:2] * 2", [PLAINLY["add_rms_norm"]]),
    ("no gradient: rope without its norm", "rope", "launch_rope(x_nhc, cos_nc, sin_nc, weight_c, eps)",
     "launch_rope(x_nhc, cos_nc, sin_nc, None, eps)", [PLAINLY["normed rope"]]),
    ("no gradient: the halves swapped", "swiglu", "launch_swiglu(gate_nf, up_nf)", "launch_swiglu(up_nf, gate_nf)",
     [PLAINLY["swiglu"]]),
    ("no gradient: no bias", "linear", "weight_vd, bias_v, x_nd.dtype)", "weight_vd, None, x_nd.dtype)",
     [PLAINLY["linear"]]),
    # what launchers refuse
    ("bfloat16 in the interpreter", "check_launch", "assert runs_triton(device, dtype)", "assert True", [REFUSE]),
    ("children anywhere", "_check_segments", "assert first_or_next[has_parent].all()", "assert True",
     ["test_attention_kernels_refuse_other_orders[segments3-follow]"]),
    # masks of what is beyond an end, and other terms of each kernel
    ("bwd_q: rows beyond stored", "_attention_bwd_q_kernel", "grad_q_mc, mask=real_m[:, None] & (c < C)[None, :]",
     "grad_q_mc, mask=(c < C)[None, :]", [GROUP]),
    ("bwd_q: delta beyond stored", "_attention_bwd_q_kernel", "delta_m, mask=real_m)", "delta_m)", [GROUP]),
    ("bwd_q: keys beyond", "_attention_bwd_q_kernel", "key_n < n_keys\n", "key_n < n_keys + BLOCK_N\n", [GROUP]),
    ("bwd_q: channels stored", "_attention_bwd_q_kernel", "grad_q_mc, mask=real_m[:, None] & (c < C)[None, :]",
     "grad_q_mc, mask=real_m[:, None]", [GQA]),
    ("fwd: rows beyond", "_attention_fwd_kernel", "mask=real_m[:, None] & (c < C)[None, :])",
     "mask=(c < C)[None, :])", [GROUP]),
    ("fwd: lse beyond", "_attention_fwd_kernel", "max_m + tl.log2(sum_m), mask=real_m)", "max_m + tl.log2(sum_m))",
     [GROUP]),
    ("bwd_kv: children only first", "_attention_bwd_kv_kernel", "n_rows if CLEAR else n_diagonal",
     "n_rows - BLOCK_M if CLEAR else n_diagonal", [GROUP]),
    ("decode: rows stored", "_decode_split_kernel", "mask=real_m[None, :] & (c < C)[:, None])",
     "mask=(c < C)[:, None])", [MEMBERS]),
    ("decode merge: channel mask", "_decode_merge_kernel", "mask=c < C)", "mask=c >= 0)", [DECODE]),
    ("decode merge: split mask", "_decode_merge_kernel", "mask=s < n_splits, other", "mask=s >= 0, other",
     [SPLITS, MEMBERS]),
    ("logp fwd: max row mask", "_logp_fwd_kernel", "max_n, mask=row_n < N)", "max_n)", [LOGP]),
    ("logp fwd: moment row mask", "_logp_fwd_kernel", "tl.sum(weight_nv * below_nv, 1), mask=row_n < N)",
     "tl.sum(weight_nv * below_nv, 1))", [LOGP]),
    ("logp fwd: target mask", "_logp_fwd_kernel", "mask=row_n < N, other=-1", "mask=row_n >= 0, other=-1", [LOGP]),
    ("logp merge: rows", "_logp_merge_kernel", "(logit_n - max_n) - log_sum_n, mask=real_n)",
     "(logit_n - max_n) - log_sum_n)", [LOGP]),
    ("logp bwd: columns", "_logp_bwd_kernel", "mask=real_n[:, None] & (within_v < n_cols)[None, :]",
     "mask=real_n[:, None]", [LOGP, CHUNKS]),
    ("linear rows", "_linear_kernel", "(row_n < N)[:, None] & ", "", [LINEAR]),
    ("product: w mask", "_product_tile", "tl.load(w_ptr, mask=(d < D - first)[None, :], other=0.0)",
     "tl.load(w_ptr)", [LINEAR, LOGP]),
    ("rms fwd store mask", "_rms_norm_fwd_kernel", "out_d.to(out_ptr.dtype.element_ty), mask=d < D)",
     "out_d.to(out_ptr.dtype.element_ty))", [ODD_NORM]),
    ("rms fwd load mask", "_rms_norm_fwd_kernel", "x_d = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)",
     "x_d = tl.load(x_ptr + row * D + d)", [ODD_NORM]),
    ("rms bwd store mask", "_rms_norm_bwd_kernel", "grad_x_d.to(grad_x_ptr.dtype.element_ty), mask=d < D)",
     "grad_x_d.to(grad_x_ptr.dtype.element_ty))", [ODD_NORM]),
    ("rms bwd part mask", "_rms_norm_bwd_kernel", "part_d, mask=d < D)", "part_d)", [ODD_NORM]),
    ("rms bwd mean block", "_rms_norm_bwd_kernel", "(tl.sum(grad_d * h_d, 0) / D)",
     "(tl.sum(grad_d * h_d, 0) / BLOCK_D)", [ODD_NORM]),
    ("rope bwd heads", "_rope_bwd_kernel", "(h < H)[:, None] & ", "", [ROPE, ROPE_NORM]),
    ("rope bwd channels", "_rope_bwd_kernel", " & (c < HALF)[None, :]", "", [ROPE_NORM]),
    ("rope fwd channels", "_rope_fwd_kernel", " & (c < HALF)[None, :]", "", [ROPE_NORM]),
    ("rope bwd part a", "_rope_bwd_kernel", "part_a_c += tl.sum(grad_a_hc * a_hc, 0)",
     "part_a_c += tl.sum(grad_a_hc, 0)", [ROPE_NORM]),
    ("rope stride", "_rope_fwd_kernel", "row * stride_xn", "row * H * 2 * HALF", [ROPE, ROPE_NORM]),
    ("swiglu bwd mask", "_swiglu_bwd_kernel", "grad_up.to(grad_up_ptr.dtype.element_ty), mask=real)",
     "grad_up.to(grad_up_ptr.dtype.element_ty))", [SWIGLU]),
    ("swiglu bwd mask2", "_swiglu_bwd_kernel",
     "grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=real)",
     "grad_gate.to(grad_gate_ptr.dtype.element_ty))", [SWIGLU]),
    ("query tiles: tokens beyond segment", "_query_tiles", "np.minimum(length[segment] - offset, tokens_per_tile)",
     "tokens_per_tile + 0 * offset", [GROUP]),
    ("triton logp temperature", "LinearLogpTriton", "1 / ctx.temperature", "1.0", [LOGP]),
    ("logits rounded", "logits", "torch.float32)", "hidden_nd.dtype)", [LOGITS]),
    # roundings to bfloat16 where there is none
    ("bfloat16: a product's sum", "_product_tile", 'acc_nv, input_precision="ieee")',
     'acc_nv, input_precision="ieee").to(x_nd.dtype).to(tl.float32)', [LOGP_BF16]),
    ("bfloat16: scores", "_attention_fwd_kernel", 'tl.dot(q_mc, k_nc.T, mask_mn, input_precision="ieee")',
     'tl.dot(q_mc, k_nc.T, mask_mn, input_precision="ieee").to(q_mc.dtype).to(tl.float32)', [PEAKED]),
    ("bfloat16: log-sum-exp", "launch_attention", "new_empty(N, H, dtype=torch.float32)", "new_empty(N, H)", [PEAKED]),
    ("bfloat16: decode's scores", "_decode_split_kernel", 'tl.dot(k_nc, q_mc.T, input_precision="ieee")',
     'tl.dot(k_nc, q_mc.T, input_precision="ieee").to(q_mc.dtype)', [PEAKED_DECODE]),
    ("bfloat16: sum of the chunks' gradients", "LinearLogpTriton",
     "torch.zeros_like(hidden_nd, dtype=torch.float32)", "torch.zeros_like(hidden_nd)", [f"{BLOCKS}[triton]"]),
    ("bfloat16: product before its bias", "_linear_kernel", "out_nv += tl.load(",
     "out_nv = out_nv.to(out_ptr.dtype.element_ty).to(tl.float32) + tl.load(", [ONCE["linear"]]),
    ("bfloat16: the norm of a sum not rounded", "_rms_norm_fwd_kernel", "other=0.0)).to(x_d.dtype)", "other=0.0))",
     [NORM_OF_SUM]),
    ("bfloat16: rstd", "launch_add_rms_norm", "new_empty(N, dtype=torch.float32)", "new_empty(N)", [ONCE["rms_norm"]]),
    ("bfloat16: sum of the weight's gradient", "_rms_norm_bwd_kernel", "part_d += grad_d * h_d",
     "part_d = (part_d + grad_d * h_d).to(grad_ptr.dtype.element_ty).to(tl.float32)", [ONCE["rms_norm"]]),
    ("bfloat16: a cosine", "_rope_fwd_kernel", "(a_hc * cos_c - b_hc * sin_c)",
     "(a_hc * cos_c.to(out_ptr.dtype.element_ty) - b_hc * sin_c)", [ONCE["rope"]]),
    ("bfloat16: silu", "_swiglu_fwd_kernel", "(gate * tl.sigmoid(gate) * up)",
     "((gate * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty) * up)", [ONCE["swiglu"]]),
    # PyTorch
    ("torch: a token sees less", "_padded_segments", "row_t[None, :, None] >= row_t", "row_t[None, :, None] > row_t",
     [TORCH]),
    ("torch: padding of the prompt", "_padded_segments", "(prefix_u < parent_length_s1)",
     "(prefix_u < parent_length_s1 + 32)", [TORCH]),
    ("torch: another prompt", "_padded_segments", "start[parent] * has_parent", "0 * start[parent]", [TORCH_OTHER]),
    ("torch decode: one key too many", "Tables", ">= n_left_x", "> n_left_x", [TORCH_MEMBERS]),
    ("torch decode: own and shared under two maxima", "decode_attention_ref", "sub_(max_bkr[slot_x][..., None])",
     "sub_(0 * max_bkr[slot_x][..., None])", [TORCH_MEMBERS]),
    ("torch decode: another slot's pages", "decode_attention_ref", "q_bkrc[slot_x]", "q_bkrc[slot_x * 0]",
     [TORCH_MEMBERS]),
    ("torch decode: a page's tokens from its first", "Tables", "self.length_b[slot_x] - first_x",
     "self.length_b[slot_x]", [TORCH_MEMBERS]),
    ("torch decode: a prompt's page is a slot's, too", "Tables", "first_x, owner_x >= 0)", "first_x, owner_x >= -9)",
     [TORCH_MEMBERS]),
    ("torch decode: a slot's page is a prompt's, too", "Tables", "first_x, owner_x < 0)", "first_x, owner_x < 9)",
     [TORCH_MEMBERS]),
    ("torch decode: slots alone have a prompt", "decode_attention_ref", ".masked_fill(alone_b, 0)", "",
     [TORCH_MEMBERS]),
    ("torch store: values where keys lie", "store_ref", "v_xkic.view(", "k_xkic.view(",
     ["test_store[torch-float64]"]),
    ("logp by three lines: no temperature", "linear_logp_ref", " / temperature, 1)", ", 1)", [TORCH_LOGP]),
    ("torch logp: no temperature in the gradient", "LinearLogpChunked", "grad_n / ctx.temperature", "grad_n",
     [TORCH_LOGP]),
    ("torch logp: no target in the gradient", "LinearLogpChunked", "-= scale_n1[rows, 0]", "-= 0", [TORCH_LOGP]),
    ("torch logp: the last block counts", "LinearLogpChunked", "grad_hidden_nd.addmm_(",
     "grad_hidden_nd.zero_().addmm_(", [TORCH_LOGP]),
    ("torch logp: bfloat16 sums", "LinearLogpChunked", "torch.zeros_like(hidden_nd, dtype=grad_n.dtype)",
     "torch.zeros_like(hidden_nd)", [f"{BLOCKS}[torch]"]),
    ("torch logp: moment keeps its old maximum", "LinearLogpChunked", "(moment_n + sum_n * down_n)", "moment_n",
     [TORCH_LOGP]),
    ("torch logp: sum keeps its old maximum", "LinearLogpChunked", "keep_n * sum_n", "sum_n", [TORCH_LOGP]),
    ("torch norm: no eps", "add_rms_norm_ref", "keepdim=True) + eps", "keepdim=True)", [BY_HAND]),
    ("torch rope: the other way", "rope_ref", "a * cos - b * sin", "a * cos + b * sin", [BY_HAND]),
    ("torch swiglu: the halves swapped", "swiglu_ref", "functional.silu(gate_nf) * up_nf",
     "gate_nf * functional.silu(up_nf)", [BY_HAND]),
]


def mutated(sources, where, old, new):
    """The package {file name: text} with old replaced in the function or class `where`."""
    places = [(name, text.find(f"\n{words}")) for name, text in sources.items()
              for words in (f"def {where}(", f"class {where}(", f"class {where}:")]
    places = [(name, start) for name, start in places if start >= 0]
    assert len(places) == 1, f"{where}: not in kernels/, or ambiguous"
    [(name, start)] = places
    text = sources[name]
    ends = [i for i in (text.find(f"\n{word}", start + 1) for word in ("def ", "class ", "@", "# ---")) if i >= 0]
    body = text[start:min(ends, default=len(text))]
    assert body.count(old) == 1, f"{where} has {body.count(old)} times: {old}"
    return sources | {name: text[:start] + body.replace(old, new) + text[start + len(body):]}


class Failures:
    """Keeps the exceptions that fail tests."""
    def __init__(self):
        self.types = []

    def pytest_exception_interact(self, call):
        self.types.append(call.excinfo.type)


def run(folder, sources, tests, seconds=60):
    """Runs these tests of the copy in folder against this package {file name: text} of kernels, in a child process:
    "passed", "caught", or what went wrong."""
    place = Path(tempfile.mkdtemp(dir=folder))
    (place / "kernels").mkdir()
    for name, text in sources.items():
        (place / "kernels" / name).write_text(text)
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        with open(place / "log", "w") as log:
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        os.chdir(folder)
        sys.path.insert(0, str(place))
        failures = Failures()
        code = pytest.main([*[f"tests/test_kernels.py::{test}" for test in tests], "-x", "-q", "-p", "no:cacheprovider",
                            f"--rootdir={folder}"], plugins=[failures])
        print(failures.types, flush=True)
        ran = all(issubclass(t, (AssertionError, pytest.fail.Exception)) for t in failures.types)
        os._exit(int(code) if ran else 70)
    status = os.waitpid(pid, 0)[1]
    outcome = {0: "passed", 1: "caught"}.get(os.waitstatus_to_exitcode(status))
    return outcome or f"ERROR {os.waitstatus_to_exitcode(status)}: " + (place / "log").read_text()[-1500:]


def import_all():
    """What every child would import otherwise, first uses of autograd and pytest included; and nothing that its garbage
    collector need look at."""
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x * 2, x, torch.ones(1))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pytest.main(["--version"])
    gc.freeze()


def in_bfloat16(tests):
    """The same tests of the kernels in bfloat16, and those that are anyway; none if none is in float32."""
    kernels = [test for test in tests if ("-float32" in test or "[float32" in test) and "[torch" not in test]
    already = [test for test in tests if "bfloat16" in test]
    return [test.replace("float32", "bfloat16") for test in kernels] + already if kernels else []


def main(part="", step="1"):
    sources = {path.name: path.read_text() for path in sorted((HERE.parent / "kernels").glob("*.py"))}
    mutants = [(name, mutated(sources, *change), tests) for name, *change, tests in MUTANTS]
    if part == "--bfloat16":
        mutants = [(name, changed, in_bfloat16(tests)) for name, changed, tests in mutants if in_bfloat16(tests)]
    elif part == "--every":
        mutants = mutants[::int(step)]
    else:
        mutants = [row for row in mutants if part in row[0]]
    assert len({name for name, *_ in MUTANTS}) == len(MUTANTS), "two mutants have one name"
    wrong = 0
    import_all()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tests").mkdir()
        for name in ("test_kernels.py", "interpreter.py", "conftest.py"):
            shutil.copy(HERE / name, Path(folder) / "tests")
        everything = list(dict.fromkeys(test for _, _, tests in mutants for test in tests))
        for name, changed, tests in [("(no mistake)", sources, everything), *mutants]:
            start, expected = time.perf_counter(), "passed" if changed == sources else "caught"
            seconds = 60 if changed != sources else 600  # every test that is named here, on a busy machine
            outcome = run(folder, changed, tests, seconds)
            wrong += outcome != expected
            verdict = "SURVIVED" if outcome == "passed" != expected else outcome
            print(f"{time.perf_counter() - start:5.1f} s  {verdict:8s}  {name}", flush=True)
            if name == "(no mistake)" and wrong:
                sys.exit("the tests fail without a mistake")
    gc.unfreeze()
    print(f"{len(mutants) - wrong} of {len(mutants)} caught")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
