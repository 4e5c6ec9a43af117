"""Every operation of kernels/, in PyTorch and in Triton, against plain formulas in float64.

Oracles: attention and decode_attention against a naive softmax over a [N, N] mask written from the visibility rule,
linear_logp against linear_logp_ref, the pointwise operations against their PyTorch references, which hand-worked
numbers check. How far an answer may be off, gradients included, is derived from its dtype's rounding and from the
problem, below: never from what another library reaches on this processor. What kernels/ allocates holds NaN and is
fenced, and so are its inputs: using what nobody wrote, or what lies beyond an end, spoils a result; writing beyond one
is found. tests/mutants.py lists mistakes that these tests must notice.

On the CPU the kernels run in Triton's interpreter, mended for bfloat16 (interpreter.py), in tiles of 32 by 16;
RM_TEST_DEVICE=cuda: see conftest.py.
"""

import contextlib
import dataclasses
import inspect
import math
import os
import re
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import (NOBODY, Tables, add_rms_norm, attention, decode_attention, linear, linear_logp, linear_logp_ref,
                     logits, pack_weight, rms_norm, rope, store, swiglu, wide)
from kernels.attention import _key_tiles, _padded_segments, _query_tiles

DEVICE = os.environ["RM_TEST_DEVICE"]
LONGER = 1 if DEVICE == "cpu" else 4  # a GPU's tiles are larger than the interpreter's: so are the problems
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LOW = [F32, F16, BF16]
KERNELS = [(impl, dtype) for impl in ("triton", "invariant") for dtype in LOW]
PLAIN = [("torch", F64), ("torch", F32)]
EVERY = PLAIN + KERNELS
ONE_OF_EACH = PLAIN + [("triton", F32), ("triton", BF16), ("invariant", F32), ("invariant", BF16)]
FENCE = 1024  # elements before and after a tensor

pytestmark = [pytest.mark.usefixtures("mended_interpreter"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # NaN in free slots, which nobody reads
              pytest.mark.filterwarnings("ignore::RuntimeWarning:interpreter")]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="compiled kernels need a GPU: RM_TEST_DEVICE=cuda")


def shown(x):
    """Test names: triton-float16."""
    return str(x)[6:] if isinstance(x, torch.dtype) else None


def error(x, oracle):
    """Relative Frobenius error."""
    x, oracle = x.double(), oracle.double()
    assert x.shape == oracle.shape
    return float((x - oracle).norm() / oracle.norm().clamp(min=1e-30))


# ----------------------------------------------------------------------------------------- how far off an answer may be
#
# Every error here is the relative one, in the Frobenius norm. u is the largest relative error of one rounding to a
# dtype: 2^-24 in float32, 2^-11 in float16, 2^-8 in bfloat16. Inputs are numbers that the dtype holds; products, sums,
# norms and softmax are computed in the wide dtype (float32; float64 for float64), whose u is called w. Four rules:
#
#   roundings     n in a row of one number: n u at most.
#   sums          The roundings of a sum of n terms are as good as independent: sqrt(n) w, in any order of addition.
#                 (Of random terms in a plain loop, a quarter of it: most roundings are smaller than w, and the first
#                 additions are of small numbers. In a library's blocks, less.)
#   exponents     exp turns the absolute error of a score into the relative error of a weight. The largest score Z is a
#                 sum of C products, is scaled, meets the constants of exp2 and has a maximum subtracted:
#                 sqrt(C + 4) w Z.
#   differences   What is left of a difference has the error of what was subtracted: times the norm of the terms over
#                 the norm of what is left, both known from float64.
#
# So a float32 softmax with scores of 80 over 128 channels may be off by 5e-5, one with scores of 5 by 3e-6.


def unit(dtype):
    """u: the largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def rms(x):
    return float(x.square().mean().sqrt())


def assert_within(ours, exact, bounds):
    """Each of ours is as close to what float64 gives as its bound says."""
    for i, (x, y, bound) in enumerate(zip(ours, exact, bounds, strict=True)):
        assert error(x, y) <= bound, f"output {i}: error {error(x, y):.2e}, bound {bound:.2e}"


def fenced(x, inside=None):
    """Memory like x, holding `inside` or else x, between two fences of NaN: whoever reads them spoils the result."""
    room = torch.full((x.numel() + 2 * FENCE,), math.nan, dtype=x.dtype, device=x.device)
    y = room.as_strided(x.shape, x.stride() if inside is not None else x.contiguous().stride(), FENCE)
    return y.fill_(inside) if inside is not None else y.copy_(x)


@contextlib.contextmanager
def poisoned():
    """Inside, floating-point memory from torch.empty, empty_like and new_empty holds NaN, and lies between fences that
    must still stand at the end."""
    made = []

    def poison(x):
        if not x.is_floating_point() or x.numel() == 0:
            return x
        made.append(fenced(x, inside=math.nan))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, lambda *args, make=getattr(owner, name), **kwargs: poison(make(*args, **kwargs)))
        yield
    for x in made:
        room = x.detach().as_strided((x.numel() + 2 * FENCE,), (1,), 0)
        assert room[:FENCE].isnan().all() and room[-FENCE:].isnan().all(), f"written outside a tensor of {x.shape}"


def with_gradients(f, dtype, inputs, grads):
    """The outputs of f(*inputs), then the gradient of each input; grads are those of f's first outputs; all in dtype.
    """
    leaves = [fenced(x.to(DEVICE, dtype)).requires_grad_() for x in inputs]
    with poisoned():
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        grads = [g.to(x.device, x.dtype) for g, x in zip(grads, out)]
        return [x.detach() for x in out] + list(torch.autograd.grad(out[:len(grads)], leaves, grads))


def check(op, dtype, inputs, grads, oracle, bounds):
    """op in dtype against oracle in float64, on inputs that dtype holds exactly; bounds of outputs, then of gradients.
    """
    inputs, grads = ([x.to(dtype).double() for x in xs] for xs in (inputs, grads))
    ours, exact = with_gradients(op, dtype, inputs, grads), with_gradients(oracle, F64, inputs, grads)
    assert_within(ours, exact, bounds)


def randn(*shape, seed=0):
    """Float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def assert_same_bits(*runs):
    """Two runs gave the same, bit for bit, and no NaN."""
    first, second = ([x.cpu() for x in run] for run in runs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------------------------ attention


def table(*trees):
    """[S, 3] segments of (prompt length, response lengths...) trees, packed one after another."""
    rows, start = [], 0
    for prompt, *responses in trees:
        parent = len(rows)
        for length, above in [(prompt, -1)] + [(n, parent) for n in responses]:
            rows.append((start, length * LONGER, above))
            start += length * LONGER
    return torch.tensor(rows)


FORESTS = {
    "one sequence": table((45,)),
    "packed sequences": table((5,), (33,), (32,), (31,), (1,), (64,)),
    "one response": table((40, 9)),
    "a group of 2": table((7, 3, 35)),
    "a group of 7": table((33, 1, 2, 31, 32, 33, 5, 5)),
    "prompts of 31, 32, 33": table((31, 4, 6), (32, 4, 6), (33, 4, 6)),  # two of one padded size with one larger
    "same size, other prompt": table((20, 5, 5), (13, 5, 5), (29, 2)),
    "empty response": table((10, 0, 4), (3, 0)),
    "empty prompt": table((6,), (0, 5, 3), (4, 2)),
    "empty everything": table((0,), (3, 2), (0, 0)),
    "mixed": table((70, 20, 1), (12,), (9, 40), (50,)),
}


def visible(segments_s3):
    """[N, N] bool, straight from the rule: a token sees its own segment up to itself, and its parent segment whole."""
    starts, lengths, parents = segments_s3.t().tolist()
    owner = [s for s, n in enumerate(lengths) for _ in range(n)]
    assert [starts[s] for s in dict.fromkeys(owner)] == [owner.index(s) for s in dict.fromkeys(owner)]
    return torch.tensor([[own == s and j <= i or own == parents[s] for j, own in enumerate(owner)]
                         for i, s in enumerate(owner)], device=DEVICE)


def dense(q_nhc, k_mkc, v_mkc, visible_nm):
    """The oracle: every score, minus infinity where unseen, one softmax; query head h reads key/value head
    h // (H / K)."""
    share = q_nhc.shape[1] // k_mkc.shape[1]
    k_mhc, v_mhc = k_mkc.repeat_interleave(share, 1), v_mkc.repeat_interleave(share, 1)
    score_hnm = torch.einsum("nhc,mhc->hnm", q_nhc, k_mhc) / math.sqrt(q_nhc.shape[2])
    return torch.einsum("hnm,mhc->nhc", score_hnm.masked_fill(~visible_nm, -math.inf).softmax(-1), v_mhc)


def qkv(N, heads, kv_heads, head_dim, peak=1.0):
    """q, k, v and the output's gradient."""
    k, v = randn(N, kv_heads, head_dim, seed=1), randn(N, kv_heads, head_dim, seed=2)
    return randn(N, heads, head_dim) * peak, k, v, randn(N, heads, head_dim, seed=3)


def attention_bounds(dtype, q_nhc, k_mkc, v_mkc, seen_nm, grad_nhc=None):
    """For out: its weights are rounded to the dtype, and so is it (2 u); the weights' exponents, as far as the softmax
    is undecided, since it divides by their sum; the sum over the keys.

    For the gradients: backward, weights come from the scores once more and the log-sum-exp, and nothing is divided. Of
    v: 2 u again, a sum over queries. Of q and k: grad_score = weight (pull - delta), with pull = grad v^T and delta =
    sum_c grad out, is rounded, and so are they (2 u); delta is made of a rounded out (u), and both are sums over C:
    times what cancels, since where one key has all the weight, pull is delta.
    """
    u, w = unit(dtype), unit(wide(dtype))
    M, K, C = k_mkc.shape
    share = q_nhc.shape[1] // K
    q, k, v = q_nhc.to(DEVICE), *(x.to(DEVICE).repeat_interleave(share, 1) for x in (k_mkc, v_mkc))
    score_hnm = torch.einsum("nhc,mhc->hnm", q, k) / math.sqrt(C)
    weight_hnm = score_hnm.masked_fill(~seen_nm, -math.inf).softmax(-1)
    exponent = sqrt(C + 4) * w * float(score_hnm.masked_fill(~seen_nm, 0).abs().max())
    undecided = float((weight_hnm * (1 - weight_hnm)).norm() / weight_hnm.norm())
    sums = sqrt(max(M, len(q) * share)) * w
    out = 2 * u + 2 * undecided * exponent + sums
    if grad_nhc is None:
        return [out]
    term_hnm = weight_hnm * torch.einsum("nhc,mhc->hnm", grad_nhc.to(DEVICE), v)
    left_hnm = term_hnm - weight_hnm * term_hnm.sum(-1, keepdim=True)
    grad_qk = 2 * u + float(term_hnm.norm() / left_hnm.norm()) * (u + sqrt(C) * w) + exponent + sums
    return [out, grad_qk, grad_qk, 2 * u + exponent + sums]


def check_attention(impl, dtype, segments, heads, kv_heads, head_dim, peak=1.0):
    """Outputs and the gradients of q, k, v."""
    *inputs, grad = qkv(int(segments[:, 1].sum()), heads, kv_heads, head_dim, peak)
    seen = visible(segments)
    check(lambda *x: attention(*x, segments, impl=impl), dtype, inputs, [grad], lambda *x: dense(*x, seen),
          attention_bounds(dtype, *inputs, seen, grad))


@pytest.mark.parametrize("impl,dtype,forest", [
    *[(*how, forest) for how in EVERY[:3] for forest in FORESTS],
    *[(*how, forest) for how in EVERY[3:] for forest in FORESTS if LONGER > 1 or forest in ("a group of 2", "mixed")],
    ("triton", BF16, "same size, other prompt")], ids=shown)
def test_attention_sees_what_the_segments_say(impl, dtype, forest):
    """Oracle: dense softmax over the [N, N] mask."""
    check_attention(impl, dtype, FORESTS[forest], *((4, 2) if impl == "torch" else (2, 1)), head_dim=32)


HEADS = [(3, 3, 64, 1), (4, 2, 80, 1), (8, 2, 32, 1), (5, 1, 128, 1), (14, 2, 64, 1), (8, 1, 128, 1), (16, 2, 32, 1),
         (4, 2, 64, 20), (7, 1, 128, 20), (2, 2, 80, 20), (2, 1, 96, .01), (2, 1, 256, 1)]


@pytest.mark.parametrize("dtype", [F64, F32], ids=shown)
@pytest.mark.parametrize("heads,kv_heads,head_dim,peak", HEADS)
def test_attention_of_head_shapes_and_peaked_softmax(heads, kv_heads, head_dim, peak, dtype):
    """Oracle: dense softmax over the [N, N] mask; peak multiplies q until one key takes nearly all the weight, or all
    weigh alike."""
    check_attention("torch", dtype, table((37, 9, 33), (5,), (3, 40)), heads, kv_heads, head_dim, peak)


@pytest.mark.parametrize("impl,dtype,heads,kv_heads,head_dim,peak", [
    *[(*how, *heads) for how in KERNELS for heads in HEADS if LONGER > 1],
    ("triton", F32, 3, 3, 64, 20), ("triton", F16, 2, 2, 80, 20), ("triton", F32, 4, 2, 80, 1),
    ("triton", F16, 4, 1, 32, 1), ("triton", F32, 5, 1, 128, .01), ("triton", F16, 7, 1, 64, 1),
    ("triton", F32, 7, 1, 96, 20), ("triton", F32, 8, 1, 32, 1), ("triton", F16, 2, 1, 256, 1),
    ("triton", BF16, 4, 2, 80, 1), ("triton", BF16, 7, 1, 128, 20), ("triton", BF16, 3, 3, 64, .01),
    ("triton", BF16, 2, 1, 256, 1), ("invariant", F32, 14, 2, 32, 1), ("invariant", BF16, 2, 2, 80, 20)], ids=shown)
def test_attention_kernels_of_head_shapes_and_peaked_softmax(impl, dtype, heads, kv_heads, head_dim, peak):
    """Oracle: dense softmax over the [N, N] mask. Pairs of everything; 5 or 7 heads leave rows of a tile unused."""
    check_attention(impl, dtype, table((18, 3, 8), (3, 16)), heads, kv_heads, head_dim, peak)


@pytest.mark.parametrize("impl,dtype", [("torch", F32), ("triton", F32), ("triton", BF16)], ids=shown)
def test_attention_of_views(impl, dtype):
    """Oracle: dense softmax. As projections give them: q, k and v are slices of one [N, (H + 2 K) C] product; or heads
    come first in memory, q's and the gradient's too."""
    segments = table((9, 8, 17))
    N = int(segments[:, 1].sum())
    *_, grad = qkv(N, 4, 2, 32)
    seen = visible(segments)
    for shape, split in (((N, 8 * 32), lambda x: x.unflatten(1, (8, 32)).split([4, 2, 2], 1)),
                         ((8, N, 32), lambda x: x.transpose(0, 1).split([4, 2, 2], 1)),
                         ((32, N, 8), lambda x: x.permute(1, 2, 0).split([4, 2, 2], 1))):
        x = randn(*shape)
        out_bound, *grad_bounds = attention_bounds(dtype, *split(x), seen, grad)
        check(lambda x: attention(*split(x), segments, impl=impl).transpose(0, 1), dtype, [x],
              [grad.transpose(0, 1).contiguous()], lambda x: dense(*split(x), seen).transpose(0, 1),
              [out_bound, max(grad_bounds)])


@pytest.mark.parametrize("impl,dtype", ONE_OF_EACH[1:], ids=shown)
def test_attention_docstring_example(impl, dtype):
    """Oracle: the table in attention's docstring. Rows of v are one-hot, q is zero: the output is uniform over what is
    seen."""
    lines = attention.__doc__.splitlines()
    segments = torch.tensor(eval(next(line for line in lines if "segments =" in line).split("=")[1]))
    seen = re.sub(r"\|", " ", next(line for line in lines if line.split()[:1] == ["sees"])).split()[1:]
    zero, v = torch.zeros(7, 1, 8).to(DEVICE, dtype), torch.eye(7, 8)[:, None].to(DEVICE, dtype)
    out = attention(zero, zero, v, segments, impl)[:, 0].cpu()
    for row, digits in zip(out, seen, strict=True):
        columns = [int(d) for d in digits]
        assert row.nonzero()[:, 0].tolist() == columns
        assert torch.equal(row[columns], torch.full((len(columns),), 1 / len(columns), dtype=dtype))


def test_tables_of_the_docstrings():
    """Oracle: the examples in the docstrings of _query_tiles, _key_tiles and _padded_segments."""
    segments = torch.tensor([(0, 3, -1), (3, 2, 0), (5, 2, 0)]).numpy().tobytes()
    for tiles in (_query_tiles, _key_tiles):
        rows = [list(eval(row)) for row in re.findall(r"\(\d[\d, ]+\)", tiles.__doc__)]
        assert len(rows) == 4 and tiles(segments, 2, torch.device("cpu")).tolist() == rows
    *_, (query_st, key_su, _, _) = _padded_segments(torch.tensor([(0, 2, -1), (2, 3, 0), (5, 2, 0)]), "cpu")
    examples = re.findall(r"_s[tu] is (\[\[.*?\]\])", _padded_segments.__doc__)
    assert [query_st.tolist(), key_su.tolist()] == [eval(x) for x in examples]


def test_attention_refuses_grandparents():
    """A programmer's mistake, not a silent wrong answer: a parent must be parentless."""
    x = torch.randn(6, 1, 8)
    for impl in ("torch", "triton"):
        with pytest.raises(AssertionError, match="parentless"):
            attention(x, x, x, torch.tensor([(0, 2, -1), (2, 2, 0), (4, 2, 1)]), impl)


@pytest.mark.parametrize("segments,message", [
    ([(0, 2, -1), (3, 3, -1)], "back to back"), ([(0, 2, -1), (2, 3, -1)], "back to back"),
    ([(2, 4, -1), (0, 2, -1)], "back to back"), ([(0, 2, -1), (2, 2, -1), (4, 2, 0)], "follow"),
    ([(0, 2, 1), (2, 4, -1)], "follow")])
def test_attention_kernels_refuse_other_orders(segments, message):
    """The tables that the kernels would answer wrongly: gaps, tokens left over, wrong order, children elsewhere than
    after their parent; and one that is not int64."""
    x = torch.randn(6, 1, 8, device=DEVICE)
    with pytest.raises(AssertionError, match=message):
        attention(x, x, x, torch.tensor(segments), "triton")
    with pytest.raises(AssertionError, match="int32"):
        attention(x, x, x, torch.tensor([(0, 6, -1)], dtype=torch.int32), "triton")


@pytest.mark.parametrize("impl,dtype", ONE_OF_EACH[:4], ids=shown)
def test_attention_of_nothing_and_of_one_token(impl, dtype):
    """No segments, or only empty ones: an empty output, not an error. One token: its own value, by hand, and only v
    learns."""
    x = torch.randn(0, 2, 8, device=DEVICE)
    for segments in (torch.zeros(0, 3, dtype=torch.int64), table((0, 0))):
        assert attention(x, x, x, segments, impl).shape == (0, 2, 8)
    q, k, v, grad = (x.to(dtype).float() for x in qkv(1, 4, 2, 32))
    out, *grads = with_gradients(lambda *x: attention(*x, torch.tensor([(0, 1, -1)]), impl), dtype, (q, k, v), [grad])
    out, *grads = (x.cpu().float() for x in (out, *grads))
    assert torch.equal(out, v.repeat_interleave(2, 1))
    # sums over 32 channels, of numbers near 1, that cancel; less the one weight, which is as good as its exponent
    assert grads[0].abs().max() < 32 * unit(wide(dtype)) and grads[1].abs().max() < 64 * unit(wide(dtype))
    assert error(grads[2], grad.view(1, 2, 2, 32).sum(2)) < unit(dtype) + 8 * unit(F32)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation inside makes, in elements; forward and backward."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():  # the interpreter copies bytes
                self.numel = max(self.numel, x.numel())
        return out


def test_attention_never_holds_all_scores():
    """16 trees: the largest tensor of forward and backward is far from [N, N]."""
    segments = table(*[(64, 20, 20)] * 16)
    N = int(segments[:, 1].sum())
    *inputs, grad = qkv(N, 2, 1, 8)
    with Largest() as largest:
        with_gradients(lambda *x: attention(*x, segments), F32, inputs, [grad])
    assert largest.numel < N * N / 8, (largest.numel, N)


# ----------------------------------------------------------------------------------------------------- decode attention


def places(slot_pg, B):
    """Tables.place_b: where each of B slots stands in slot_pg, or -1."""
    found = {slot: place for place, slot in enumerate(slot_pg.flatten().tolist())}
    return torch.tensor([found.get(b, -1) for b in range(B)], device=slot_pg.device)


def paged(own, shared, slots, page_size, junk=1e3, unused=0):
    """The keys and values of each slot and of each prompt, [2, K, n, C], in a pool [2, X, K, I, C]; and its Tables.

    slots: those that continue each prompt. Pages lie in any order, with holes among them, and the tables are views,
    with room for so many unused tokens and -1 where no page is. All that no token fills is junk; so is page 0, which
    slots of length 0 name.
    """
    (_, K, _, C), I = own[0].shape, page_size
    rng = torch.Generator().manual_seed(len(own))

    def spread(items, first):
        """The items' pages, in a table, from page `first` on; and how many pages that takes, with 2 holes."""
        n_pages = [-(-x.shape[2] // I) for x in items]
        page_xt = torch.full((len(items), 2 - (-(max(x.shape[2] for x in items) + unused) // I)), -1, dtype=torch.int32)
        pages = first + torch.randperm(sum(n_pages) + 2, generator=rng)
        for row, found in zip(page_xt, pages.split([*n_pages, 2])):
            row[:len(found)] = found
        return page_xt[:, :-2], len(pages)

    page_bt, n_own = spread(own, 1)
    page_pu, n_shared = spread(shared, n_own + 2)  # page n_own + 1 is nobody's
    X = n_own + 2 + n_shared
    pool = torch.full((2, X, K, I, C), junk, dtype=own[0].dtype)
    owner_x, first_x = torch.zeros(X, dtype=torch.int64), torch.full((X,), NOBODY)
    for items, page_xt, sign in ((own, page_bt, 1), (shared, page_pu, -1)):
        for i, x in enumerate(items):
            for first in range(0, x.shape[2], I):
                page, tokens = page_xt[i, first // I], x[:, :, first:first + I]
                pool[:, page, :, :tokens.shape[2]] = tokens
                owner_x[page], first_x[page] = i if sign == 1 else -1 - i, first
    length_b, length_p = (torch.tensor([x.shape[2] for x in items]) for items in (own, shared))
    page_bt[length_b == 0, 0] = 0
    slot_pg = torch.full((len(slots), max([1, *map(len, slots)])), -1)
    for row, members in zip(slot_pg, slots):
        row[:len(members)] = torch.tensor(members)
    room = torch.full((2, X + 4, K, I, C), math.nan, dtype=pool.dtype, device=DEVICE)  # pages -1 and -2 are NaN
    on_device = [fenced_table(x.to(DEVICE)) for x in (page_bt, length_b.clamp(min=1), page_pu, length_p, slot_pg)]
    return room[:, 2:-2].copy_(pool), Tables(*on_device, places(slot_pg, len(own)).to(DEVICE), owner_x.to(DEVICE),
                                             first_x.to(DEVICE), X - 1, X - 1, I)  # walks may overlap


def fenced_table(x):
    """A view of a larger one, which holds -2 around it."""
    room = torch.full([n + 2 for n in x.shape], -2, dtype=x.dtype, device=x.device)
    view = room[tuple(slice(1, -1) for _ in x.shape)]
    return view.copy_(x)


def check_decode(impl, dtype, lengths, prompts, heads, kv_heads, head_dim, peak=1.0, page_size=16, unused=3):
    """Oracle: the last row of dense causal attention over a slot's prompt and its own tokens.

    lengths: each slot's own tokens, 0 for a free slot. prompts: (length, its slots), no slots for a free row. What
    lies beyond the lengths, in free slots and in free rows is NaN; finite for PyTorch, whose zero weights multiply it.
    """
    B, K, C, junk = len(lengths), kv_heads, head_dim, 1e3 if impl == "torch" else math.nan
    q = (randn(B, heads, C) * peak).to(dtype)
    q[[b for b, length in enumerate(lengths) if length == 0]] = junk
    own = [randn(2, K, n, C, seed=10 + b).to(dtype) for b, n in enumerate(lengths)]
    shared = [randn(2, K, n, C, seed=60 + p).to(dtype) if slots else torch.full((2, K, n, C), junk, dtype=dtype)
              for p, (n, slots) in enumerate(prompts)]
    oracle, bounds = {}, []
    for b, length in enumerate(lengths):
        prefix = [shared[p] for p, (_, slots) in enumerate(prompts) if b in slots]
        k_kuc, v_kuc = torch.cat([*prefix, own[b]], 2)
        if length:
            seen = torch.ones(1, k_kuc.shape[1], dtype=torch.bool, device=DEVICE)
            row = [x.to(DEVICE, F64) for x in (q[b:b + 1], k_kuc.transpose(0, 1), v_kuc.transpose(0, 1))]
            oracle[b] = dense(*row, seen)
            bounds += attention_bounds(dtype, *row, seen)
    live = list(oracle)
    pool, tables = paged(own, shared, [slots for _, slots in prompts], page_size, junk, unused)
    with poisoned():
        ours = decode_attention(fenced(q.to(DEVICE)), *pool, tables, impl)[live]
    assert_within([ours], [torch.cat(list(oracle.values()))], [max(bounds)])


@pytest.mark.parametrize("impl,dtype", EVERY, ids=shown)
@pytest.mark.parametrize("heads,kv_heads,head_dim,peak,page_size", [
    (4, 4, 32, 1, 16), (8, 2, 80, 1, 32), (14, 2, 64, 1, 64), (8, 1, 128, 20, 32), (5, 1, 96, 1, 16),
    (2, 1, 256, .01, 64)])
def test_decode_attention_is_the_last_row_of_attention(heads, kv_heads, head_dim, peak, page_size, impl, dtype):
    """Lengths on both sides of a page's, a block's and a split's end, and a free slot; the only prompt is nobody's."""
    check_decode(impl, dtype, [1, 2, 17, 0, 33, 48], [(4, [])], heads, kv_heads, head_dim, peak, page_size)


@pytest.mark.parametrize("impl,dtype", EVERY, ids=shown)
@pytest.mark.parametrize("lengths,prompts,heads,kv_heads,head_dim,peak,page_size,unused", [
    # prompts of 7, 2 and 1 slots, a free row, slot 10 without prompt, slot 3 free
    ([3, 1, 16, 0, 9, 17, 1, 1, 2, 5, 20, 1], [(37, [11, 0, 2, 5, 4, 9, 8]), (5, []), (16, [6, 1]), (1, [7])],
     4, 2, 32, 1, 16, 3),
    ([1, 4, 33], [(0, [1]), (70, [2, 0])], 7, 1, 80, 4, 32, 0),  # an empty prompt; tables no wider than needed
    ([6, 129], [(40, [1]), (3, [0])], 2, 1, 64, 1, 64, 180),  # 8 splits, full and a rest, or most of them empty
    ([2, 3, 0, 1, 1, 4, 2, 1, 1, 30, 2], [(21, [9, 1, 0, 3, 4, 5, 6, 7, 8, 10])], 8, 1, 32, 1, 32, 1),  # two tiles
    ([5], [(2, []), (9, [])], 2, 2, 32, 1, 64, 3),  # nobody's prompts
    ])
def test_decode_attention_with_shared_prompts(lengths, prompts, heads, kv_heads, head_dim, peak, page_size, unused,
                                              impl, dtype):
    """The prompt is read once for its slots; each slot's answer is as if it had it alone."""
    check_decode(impl, dtype, lengths, prompts, heads, kv_heads, head_dim, peak, page_size, unused)


@pytest.mark.parametrize("impl,dtype", [("torch", F32), ("triton", F32), ("invariant", F32)], ids=shown)
def test_tables_of_the_docstring(impl, dtype):
    """Oracle: dense attention over the tokens where the example's tables say that they lie, 64 a page; and the pages'
    side of them, counted from the slots' side."""
    names = "page_bt", "length_b", "page_pu", "length_p", "slot_pg", "place_b", "owner_x", "first_x"
    page_bt, lengths, page_pu, (n_prompt,), slot_pg, place_b, owner_x, first_x = rows = [
        eval(re.search(rf"{name} += (\[[^a-z]*\])", Tables.__doc__)[1]) for name in names]
    assert places(torch.tensor(slot_pg), 3).tolist() == place_b
    counted = {page: (i, 64 * t) for i, row in enumerate(page_bt) for t, page in enumerate(row) if page >= 0}
    counted |= {page: (-1 - i, 64 * u) for i, row in enumerate(page_pu) for u, page in enumerate(row) if page >= 0}
    assert [counted.get(x, (0, NOBODY)) for x in range(9)] == list(zip(owner_x, first_x))
    on_device = [torch.tensor(x, dtype=torch.int32 if name.startswith("page") else torch.int64, device=DEVICE)
                 for name, x in zip(names, rows)]
    tables = Tables(*on_device, n_own=4, n_shared=2, page_size=64)
    q, pool = randn(3, 4, 32).to(DEVICE, dtype), randn(2, 9, 2, 64, 32, seed=1).to(DEVICE, dtype)
    ours, exact, bounds = decode_attention(q, *pool, tables, impl), [], []
    for b, length in enumerate(lengths):
        lies = [(page_pu[0][t // 64], t % 64) for t in range(n_prompt if place_b[b] >= 0 else 0)]
        lies += [(page_bt[b][t // 64], t % 64) for t in range(length)]
        page_n, offset_n = torch.tensor(lies, device=DEVICE).T
        k_nkc, v_nkc = pool[:, page_n, :, offset_n].transpose(0, 1).double()
        seen = torch.ones(1, len(lies), dtype=torch.bool, device=DEVICE)
        exact.append(dense(q[b:b + 1].double(), k_nkc, v_nkc, seen))
        bounds += attention_bounds(dtype, q[b:b + 1].double(), k_nkc, v_nkc, seen)
    assert_within([ours], [torch.cat(exact)], [max(bounds)])


@pytest.mark.parametrize("impl,dtype", ONE_OF_EACH[1:], ids=shown)
def test_decode_attention_of_a_view(impl, dtype):
    """Oracle: the same numbers in dense memory. Here queries lie heads first and pages too, in one of two layers."""
    own, shared = ([randn(2, 2, n, 32, seed=n) for n in lengths] for lengths in ([9, 21, 4], [19, 5]))
    pool, tables = paged(own, shared, [[1], [0, 2]], 16)
    q, pool = randn(4, 3, 32).to(DEVICE, dtype).transpose(0, 1), pool.to(dtype)
    k, v = torch.stack([pool, pool], 1).transpose(2, 3).contiguous().transpose(2, 3)[:, 1]
    assert k.stride(0) < k.stride(1) and q.stride(0) < q.stride(1)
    copy = decode_attention(q.contiguous(), *pool, tables, impl)
    assert error(decode_attention(q, k, v, tables, impl), copy) < 8 * unit(F32)


@needs_cuda
@pytest.mark.parametrize("impl", ["triton", "invariant"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode_in_a_cuda_graph(page_size, impl):
    """Oracle: the same calls without a graph, bit for bit. Captured once, replayed with other lengths, members, pages
    and contents: the new tokens are stored, and then seen."""
    B, H, K, C, P, U, T, X = 9, 14, 2, 64, 3, 700 // page_size, 300 // page_size, 9 * 20 * 64 // page_size
    rng = torch.Generator("cuda").manual_seed(0)

    def contents(slots):
        pool, q, new = (torch.randn(*shape, generator=rng, device="cuda", dtype=BF16)
                        for shape in ((2, X, K, page_size, C), (B, H, C), (2, B, K, C)))
        pages = torch.randperm(X, generator=rng, device="cuda").int()
        page_bt, page_pu = pages[:B * T].view(B, T).clone(), pages[B * T:][:P * U].view(P, U).clone()
        length_b = torch.randint(1, T * page_size + 1, (B,), generator=rng, device="cuda")
        length_p = torch.randint(1, U * page_size + 1, (P,), generator=rng, device="cuda")
        slot_pg = torch.tensor(slots, device="cuda")
        return [pool, q, new, page_bt, length_b, page_pu, length_p, slot_pg, places(slot_pg, B)]

    def step(pool, q, new, *held):
        page_bt, length_b = held[:2]
        page_b = page_bt.gather(1, ((length_b - 1) // page_size)[:, None])[:, 0].long()
        store(*pool, *new, page_b, (length_b - 1) % page_size, impl)
        return decode_attention(q, *pool, Tables(*held, length_b, length_b, 0, 0, page_size), impl)

    held = contents([[0, 1, 2, 3], [8, -1, -1, -1], [-1] * 4])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles
        step(*held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*held)
    for slots in ([[0, 1, 2, 3], [8, -1, -1, -1], [-1] * 4], [[7, 3, -1, -1], [2, 0, 4, 5], [6, 1, -1, -1]],
                  [[-1] * 4] * 3):
        for old, new in zip(held, contents(slots)):
            old.copy_(new)
        copies = [x.clone() for x in held]
        graph.replay()
        assert_same_bits([out, held[0]], [step(*copies), copies[0]])


@pytest.mark.parametrize("impl,dtype", EVERY, ids=shown)
def test_store(impl, dtype):
    """Oracle: one by one. Keys and values are columns of wider products, in rows of different lengths; tokens 1 and 3
    go to one place of page 0, the bin, where either may lie. All else stays as it is."""
    N, K, C, I = 5, 3, 24, 16
    wide_nd, k_nd = randn(N, 7 * C).to(DEVICE, dtype), randn(N, 4 * C, seed=1).to(DEVICE, dtype)
    k_nkc, v_nkc = k_nd[:, C:].unflatten(1, (K, C)), wide_nd[:, 2 * C:5 * C].unflatten(1, (K, C))
    page_n, offset_n = torch.tensor([[4, 0, 1, 0, 4], [15, 0, 7, 0, 2]], device=DEVICE)
    expected = randn(2, 6, K, I, C, seed=2).to(DEVICE, dtype)
    k_xkic, v_xkic = pool = fenced(expected)
    store(k_xkic, v_xkic, fenced(k_nd)[:, C:].unflatten(1, (K, C)), v_nkc, page_n, offset_n, impl)
    for n in (0, 1, 2, 4):
        for kv in range(K):
            expected[0, page_n[n], kv, offset_n[n]] = k_nkc[n, kv]
            expected[1, page_n[n], kv, offset_n[n]] = v_nkc[n, kv]
    assert all(torch.equal(x, y[1]) or torch.equal(x, y[3]) for x, y in zip(pool[:, 0, :, 0], (k_nkc, v_nkc)))
    pool[:, 0, :, 0] = expected[:, 0, :, 0]
    assert_same_bits([pool], [expected])
    room = pool.as_strided((pool.numel() + 2 * FENCE,), (1,), 0)
    assert room[:FENCE].isnan().all() and room[-FENCE:].isnan().all(), "written outside the pool"
    store(k_xkic, v_xkic, k_nkc[:0], v_nkc[:0], page_n[:0], offset_n[:0], impl)  # nothing
    assert_same_bits([pool], [expected])


# ------------------------------------------------------------------------------------------ log-probabilities of tokens


def logp_problem(N=11, D=24, V=50, peak=1.0, seed=0):
    """hidden, weight, target, gradient of logp. Targets repeat, 0 and V - 1 occur."""
    target = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    target[:4] = torch.tensor([0, V - 1, V // 2, V // 2])
    return randn(N, D, seed=seed) * peak, randn(V, D, seed=seed + 1) / math.sqrt(D) * 2, target, randn(N, seed=seed + 2)


def logp_bounds(dtype, hidden_nd, weight_vd, target_n, temperature, rounded, grad_n=None):
    """For logp and entropy, sums of numbers of either sign, the absolute error over their own size. Logits of at
    most Z at the temperature are off by sqrt(D + 4) w Z, as an attention's scores, and by u Z more if they are
    `rounded` to the dtype on the way, as PyTorch's are. A logit moves the entropy by p |log p + entropy|. The sum over
    V adds sqrt(V) w to a logarithm.

    For the gradients, grad (onehot - p): the logits' are rounded, and so are each chunk's product and the whole (3 u;
    2 u for the weight, which has no chunks). p is exp of a logit made once more, perhaps in another order, less the
    log-sum-exp: nothing is divided; but the rounded logit is the same one, and counts as far as p is undecided. Last,
    the sums over V and N.
    """
    u, w = unit(dtype), unit(wide(dtype))
    (N, D), V = hidden_nd.shape, len(weight_vd)
    largest = float((hidden_nd @ weight_vd.t()).abs().max()) / temperature
    product, rounding = sqrt(D + 4) * w * largest, u * rounded * largest
    logp_n, entropy_n = linear_logp_ref(hidden_nd, weight_vd, target_n, temperature)
    logp_nv = (hidden_nd @ weight_vd.t() / temperature).log_softmax(1)
    p_nv = logp_nv.exp()
    slope_n = (p_nv * (logp_nv + entropy_n[:, None])).abs().sum(1)
    logp = (product + rounding + sqrt(V) * w) / rms(logp_n)
    entropy = (rms(slope_n) * (product + rounding) + sqrt(V) * w) / rms(entropy_n)
    if grad_n is None:
        return [logp, entropy]
    grad_n1 = grad_n.to(DEVICE)[:, None]
    left = rms(grad_n1 * (F.one_hot(target_n, V) - p_nv))
    softmax = rms(grad_n1 * p_nv) / left * product + 2 * rms(grad_n1 * p_nv * (1 - p_nv)) / left * rounding
    softmax += sqrt(max(V, N)) * w
    return [logp, entropy, 3 * u + softmax, 2 * u + softmax]


def check_logp(impl, dtype, problem, temperature=1.0, cut=lambda weight: weight):
    """logp, entropy, and the gradients of hidden and weight against linear_logp_ref."""
    hidden, weight, target, grad = problem
    target = target.to(DEVICE)

    def op(hidden, weight):
        out = linear_logp(hidden, cut(weight), target, temperature, impl)
        assert {x.dtype for x in out} == {wide(dtype)} and [x.requires_grad for x in out] == [True, False]
        return out

    bounds = logp_bounds(dtype, hidden.to(DEVICE), cut(weight.to(DEVICE)), target, temperature, impl == "torch", grad)
    check(op, dtype, [hidden, weight], [grad], lambda h, w: linear_logp_ref(h, cut(w), target, temperature), bounds)


@pytest.mark.parametrize("chunk", [1, 50, 150, 2**25])  # columns per block: 1, 4, 13 with a rest of 11, all 50
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_linear_logp_is_log_softmax(monkeypatch, chunk, temperature):
    """Oracle: log_softmax of the whole logits in float64: values, entropy, gradients of hidden and weight."""
    monkeypatch.setattr(kernels.logp, "LOGIT_CHUNK", chunk)
    check_logp("torch", F64, logp_problem(), temperature)


@pytest.mark.parametrize("peak", [1, 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=shown)
def test_linear_logp_in_low_precision(monkeypatch, dtype, temperature, peak):
    """Oracle: log_softmax in float64."""
    monkeypatch.setattr(kernels.logp, "LOGIT_CHUNK", 100 * 120)  # blocks of 120 columns, the last of 61
    check_logp("torch", dtype, logp_problem(N=100, D=64, V=301, peak=peak), temperature)


@pytest.mark.parametrize("impl,dtype", KERNELS, ids=shown)
@pytest.mark.parametrize("N,D,V,temperature,peak,chunk", [
    (4, 8, 257, 1.0, 1, 2**27), (45, 50, 101, 0.5, 1, 2**27), (64, 32, 48, 1.7, 20, 32 * 64), (33, 65, 130, 0.7, 20, 1),
    (40, 24, 5, 1.0, 1, 2**27)])
def test_linear_logp_kernels(monkeypatch, N, D, V, temperature, peak, chunk, impl, dtype):
    """Oracle: log_softmax in float64. Vocabularies of tiles and a rest, of whole tiles, of less than a tile; all
    columns' gradients at once, in chunks of whole tiles with a rest, and a tile at a time."""
    monkeypatch.setattr(kernels.logp, "GRADIENT_CHUNK", chunk)
    check_logp(impl, dtype, logp_problem(N * LONGER, D * LONGER, V, peak), temperature)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_linear_logp_adds_many_blocks_in_float32(monkeypatch, impl):
    """Oracle: log_softmax in float64. 2,000 blocks of one column, or 125 of a tile, in bfloat16: the gradient of the
    hidden states must not be summed there."""
    monkeypatch.setattr(kernels.logp, "LOGIT_CHUNK", 1)
    monkeypatch.setattr(kernels.logp, "GRADIENT_CHUNK", 1)
    check_logp(impl, BF16, logp_problem(N=5, D=8, V=2000))


def test_linear_logp_gradcheck(monkeypatch):
    """Oracle: finite differences in float64, over several blocks."""
    monkeypatch.setattr(kernels.logp, "LOGIT_CHUNK", 2 * 7)
    hidden, weight, target, _ = logp_problem(N=5, D=4, V=7)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logp(h, w, target, 0.8)[0], inputs)


@pytest.mark.parametrize("impl,dtype", [("torch", F64), ("triton", F32), ("triton", BF16)], ids=shown)
def test_linear_logp_of_a_sliced_head(monkeypatch, impl, dtype):
    """Oracle: log_softmax over the slice. As Model.head_vd gives it (the first rows), and with strides that are not
    contiguous; one gradient arrives in the whole weight, zero outside the slice; a frozen side gets none."""
    monkeypatch.setattr(kernels.logp, "LOGIT_CHUNK", 100)
    hidden, weight, target, grad = logp_problem()
    for cut in (lambda w: torch.cat([w, w + 9])[:50], lambda w: w.t().contiguous().t(),
                lambda w: w.repeat_interleave(2, 0)[::2]):
        check_logp(impl, dtype, (torch.stack([hidden, hidden], 1).flatten(0, 1)[::2], weight, target, grad), 0.7, cut)
    hidden, weight, target = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)
    whole = torch.cat([weight, weight + 9]).requires_grad_()
    linear_logp(hidden, whole[:50], target, impl=impl)[0].sum().backward()
    assert whole.grad[:50].abs().sum() > 0 and not whole.grad[50:].any()
    assert not linear_logp(hidden, weight, target, impl=impl)[0].requires_grad
    hidden.requires_grad_()
    linear_logp(hidden, weight, target, impl=impl)[0].sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


@pytest.mark.parametrize("impl,dtype", ONE_OF_EACH, ids=shown)
def test_linear_logp_hand_worked(impl, dtype):
    """Oracle: by hand. Logits (0, ln 3) at temperature 1: probabilities 1/4 and 3/4; at 1/2 they are 1/10 and 9/10. In
    bfloat16, where there is no ln 3, as the sum of three of its products."""
    parts = [torch.tensor(0.0, dtype=F64)]
    for _ in range(3):  # ln 3, then what rounding left of it
        parts.append((math.log(3) - sum(parts)).to(dtype).to(F64))
    hidden, weight = torch.ones(2, 3).to(DEVICE, dtype), torch.tensor([[0, 0, 0], parts[1:]]).to(DEVICE, dtype)
    for temperature, p in ((1.0, (1 / 4, 3 / 4)), (0.5, (1 / 10, 9 / 10))):
        logp, entropy = linear_logp(hidden, weight, torch.tensor([0, 1], device=DEVICE), temperature, impl)
        assert logp.tolist() == pytest.approx([math.log(x) for x in p], rel=1e-6)
        assert entropy.tolist() == pytest.approx([-sum(x * math.log(x) for x in p)] * 2, rel=1e-6)


@pytest.mark.parametrize("impl,dtype", [("torch", F32), ("triton", F32), ("triton", BF16)], ids=shown)
def test_linear_logp_of_nothing_and_of_certainty(impl, dtype):
    """No rows: empty outputs and zero gradients. One token certain: logp and entropy are exactly zero, nothing is
    NaN."""
    hidden, weight = (torch.ones(n, 4, dtype=dtype, requires_grad=True, device=DEVICE) for n in (0, 9))
    nothing, zero = torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.tensor([0], device=DEVICE)
    logp, entropy = linear_logp(hidden, weight, nothing, impl=impl)
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and hidden.grad.shape == (0, 4) and not weight.grad.any()
    certain = torch.full((1, 1), 300.0).to(DEVICE, dtype), torch.tensor([[1.0], [-1.0]]).to(DEVICE, dtype)
    logp, entropy = linear_logp(*certain, zero, impl=impl)
    assert logp.item() == 0 and entropy.item() == 0
    with pytest.raises(AssertionError, match="temperature"):
        linear_logp(hidden, weight, nothing, 0.0, impl)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_linear_logp_never_holds_all_logits(monkeypatch, impl):
    """N x V logits would be 48,000 elements; the largest tensor of forward and backward is the weight, 8,000, or three
    numbers for each row and tile. That the recorder sees what it should is checked on the dense oracle."""
    N, D, V = 120, 20, 400
    monkeypatch.setattr(kernels.logp, "LOGIT_CHUNK", 4000)  # two blocks in one tensor
    monkeypatch.setattr(kernels.logp, "GRADIENT_CHUNK", 6000)
    *inputs, target, grad = logp_problem(N, D, V)
    target = target.to(DEVICE)
    numel = []
    for f in (linear_logp_ref, lambda *x: linear_logp(*x, impl=impl)):
        with Largest() as largest:
            with_gradients(lambda *x: f(*x, target, 1.0)[:1], F32, inputs, [grad])
        numel.append(largest.numel)
    assert numel[0] == N * V and numel[1] <= max(V * D, 3 * N * math.ceil(V / 16)) + 2 * FENCE


# --------------------------------------------------------------------------------------------- everything between these


def norm_bounds(dtype, x_xd, weight_d, grad_xd):
    """Of rms_norm's output and of the gradients of x and weight, all rounded once (u). rstd is a sum over D and a root;
    x's gradient is the difference of rstd weight grad and a multiple of x."""
    u, w, D = unit(dtype), unit(wide(dtype)), x_xd.shape[-1]
    rstd_x1 = (x_xd.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    term_xd, h_xd = rstd_x1 * weight_d * grad_xd, rstd_x1 * x_xd
    left_xd = term_xd - h_xd * (term_xd * h_xd).mean(-1, keepdim=True)
    sums = sqrt(D + 4) * w
    return [u + sums, u + float(term_xd.norm() / left_xd.norm()) * sums, u + sums + sqrt(x_xd.numel() // D) * w]


def check_rope(impl, dtype, N, heads, head_dim, normed, first=0):
    """Oracle: rope_ref. The heads are a slice of a larger product, from head `first` on."""
    angle = randn(N, head_dim // 2, seed=4).to(DEVICE)
    cos, sin = angle.cos().float(), angle.sin().float()

    def op(impl):
        return lambda x, weight=None: rope(x[:, first:first + heads], cos.to(wide(x.dtype)), sin.to(wide(x.dtype)),
                                           weight, 1e-3, impl)
    x, weight, grad = randn(N, heads + 2 * first, head_dim), randn(head_dim, seed=1), randn(N, heads, head_dim, seed=2)
    u, w = unit(dtype), unit(wide(dtype))
    out_bound, grad_x, grad_weight = norm_bounds(dtype, x[:, first:first + heads], weight, grad)
    bounds = [out_bound, grad_x, grad_weight] if normed else [u + 4 * w] * 2
    check(op(impl), dtype, [x, weight][:1 + normed], [grad], op("torch"), bounds)


def check_norm(impl, dtype, N, D):
    """Oracle: add_rms_norm_ref; both outputs' gradients reach both inputs."""
    x, weight, grad = randn(N, D), randn(D, seed=1), randn(N, D, seed=2)
    check(lambda *x: rms_norm(*x, 1e-3, impl), dtype, [x, weight], [grad], lambda *x: rms_norm(*x, 1e-3, "torch"),
          norm_bounds(dtype, x, weight, grad))
    delta, grad_sum, u = randn(N, D, seed=3), randn(N, D, seed=4), unit(dtype)
    out_bound, grad_x, grad_weight = norm_bounds(dtype, x + delta, weight, grad)
    check(lambda *x: add_rms_norm(*x, 1e-3, impl), dtype, [x, delta, weight], [grad_sum, grad],
          lambda *x: add_rms_norm(*x, 1e-3, "torch"),
          [u, u + out_bound, 3 * u + grad_x, 3 * u + grad_x, u + grad_weight])


@pytest.mark.parametrize("impl,dtype", KERNELS, ids=shown)
@pytest.mark.parametrize("N,D", [(37, 50), (5, 128), (70, 1)])
def test_norm_kernels(N, D, impl, dtype):
    """Oracle: add_rms_norm_ref in float64. Width 1 is all eps."""
    check_norm(impl, dtype, N, D)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=shown)
def test_norms_of_more_rows_than_programs(monkeypatch, dtype):
    """Oracle: the references in float64. Backward, 1024 programs share the rows; here 4 programs share 11."""
    monkeypatch.setattr(kernels.pointwise, "min", lambda *x: min(*x, 4), raising=False)  # `min(N, 1024)`
    check_norm("triton", dtype, 11, 40)
    check_rope("triton", dtype, 11, 3, 24, normed=True)
    check_rope("triton", dtype, 11, 3, 24, normed=False)


@pytest.mark.parametrize("impl,dtype", KERNELS, ids=shown)
@pytest.mark.parametrize("N,heads,head_dim,normed,first", [
    (9, 5, 24, True, 0), (13, 4, 64, False, 2), (7, 3, 80, True, 1), (30, 1, 2, False, 0)])
def test_rope_kernels(N, heads, head_dim, normed, first, impl, dtype):
    """Oracle: rope_ref in float64, with and without Qwen3's norm; of a slice."""
    check_rope(impl, dtype, N, heads, head_dim, normed, first)


@pytest.mark.parametrize("impl,dtype", KERNELS, ids=shown)
def test_swiglu_kernels(impl, dtype):
    """Oracle: swiglu_ref in float64, over more than one block of a row, of two parts of one product with a column
    between them; gates that close and open fully."""
    def op(impl):
        return lambda x: swiglu(x[:, :1030], x[:, 1031:], impl)
    bound = unit(dtype) + 8 * unit(wide(dtype))  # one rounding to the dtype, at most 8 to float32
    check(op(impl), dtype, [randn(5, 2061) * 4], [randn(5, 1030, seed=1)], op("torch"), [bound] * 2)


@pytest.mark.parametrize("impl,dtype", KERNELS, ids=shown)
def test_rope_of_heads_apart(impl, dtype):
    """Oracle: rope_ref in float64, of every other head, as where keys and values alternate in a product."""
    angle, x = randn(6, 12, seed=4).to(DEVICE), randn(6, 8, 24).to(DEVICE, dtype)
    cos, sin = angle.cos().float(), angle.sin().float()
    exact = rope(x[:, ::2].double(), cos.double(), sin.double(), impl="torch")
    for grad in (False, True):  # without gradients nothing is copied
        with torch.set_grad_enabled(grad):
            ours = rope(x[:, ::2], cos, sin, impl=impl)
        assert_within([ours], [exact], [unit(dtype) + 4 * unit(wide(dtype))])


@pytest.mark.parametrize("dtype", LOW, ids=shown)
@pytest.mark.parametrize("N,D,V", [(37, 50, 33), (4, 32, 80), (70, 8, 5), (0, 8, 5)])
def test_invariant_linear(N, D, V, dtype):
    """Oracle: torch's linear in float64, with bias and without; the rows are every second of a tensor."""
    u, w = unit(dtype), unit(wide(dtype))
    bounds = [u + sqrt(n) * w for n in (D + 1, V, N, N)]  # out, x, weight, bias: one rounding, and sums of so many
    for n_inputs in (2, 3):
        check(lambda x, *rest: linear(x[::2], *rest, impl="invariant"), dtype,
              [randn(2 * N, D), randn(V, D, seed=1), randn(V, seed=2)][:n_inputs], [randn(N, V, seed=3)],
              lambda x, *rest: F.linear(x[::2], *rest), bounds[:n_inputs + 1])


@pytest.mark.parametrize("impl,dtype", EVERY, ids=shown)
def test_logits(impl, dtype):
    """Oracle: the product in float64. Wide, whatever the inputs are; the invariant kernel does not round half-precision
    products to half precision on the way: its error is float32's. No gradient."""
    hidden, weight = (randn(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate([(37, 50), (33, 50)]))
    out = logits(hidden, weight, impl)
    exact = hidden.double() @ weight.double().t()
    assert out.dtype == wide(dtype) and not out.requires_grad
    rounded = dtype in (F16, BF16) and impl != "invariant" and DEVICE == "cpu"
    assert_within([out], [exact], [sqrt(50) * unit(wide(dtype)) + (unit(dtype) if rounded else 0)])


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN's products are the CPU's")
@pytest.mark.parametrize("N", [0, 1, 7, 56])
def test_large_products_without_gradient(N):
    """Oracle: float64. Rows and weights that are parts of a tensor, or transposed; with bias and without; packed. They
    are oneDNN's where this PyTorch has it; NaN and infinity stay in their row."""
    with torch.no_grad():
        whole, bias = randn(2100, 300, seed=1).to(F32), randn(2100, seed=2).to(F32)
        for x in (randn(N, 300), randn(2 * N, 300)[::2], randn(300, N).t(), randn(N, 600)[:, 300:]):
            for weight in (whole, whole[50:2000], randn(300, 2100, seed=1).to(F32).t()):
                weights = [w for w in (weight, pack_weight(weight)) if w is not None]
                for b in (None, bias[:len(weight)]):
                    exact = F.linear(x.double(), weight.double(), b if b is None else b.double())
                    assert_within([linear(x.to(F32), w, b) for w in weights], [exact] * len(weights),
                                  [sqrt(302) * unit(F32)] * len(weights))
        if N > 1:
            x = randn(N, 300).to(F32)
            x[0, 3], x[1, 4] = math.nan, math.inf
            for out in linear(x, whole), logits(x, whole):
                assert not out[:2].isfinite().any() and out[2:].isfinite().all()
    assert (pack_weight(whole) is not None) == torch.backends.mkldnn.is_available()
    assert pack_weight(whole, "invariant") is None and pack_weight(whole[:9]) is None


@pytest.mark.parametrize("impl,dtype", KERNELS, ids=shown)
def test_linear_logp_of_a_large_vocabulary(monkeypatch, impl, dtype):
    """Oracle: log_softmax in float64 over Qwen2.5's 151,665 tokens, which end within a tile of the kernel."""
    for op in ("logp", "linear_invariant"):
        monkeypatch.setitem(kernels.tiles.INTERPRETER_TILES, op, (16, 4096))
    V = 151_665
    hidden, weight = randn(5, 24).to(DEVICE, dtype), randn(V, 24, seed=1).to(DEVICE, dtype)
    target = torch.tensor([0, V - 1, V - 2, 77_777, 4096], device=DEVICE)
    problem = hidden.double(), weight.double(), target, 0.7
    ours = linear_logp(hidden, weight, target, 0.7, impl)
    assert_within(ours, linear_logp_ref(*problem), logp_bounds(dtype, *problem, rounded=False))


@pytest.mark.parametrize("impl,dtype", [("torch", F32), ("triton", F32), ("triton", BF16)], ids=shown)
def test_pointwise_by_hand(impl, dtype):
    """Oracle: by hand. (3, 4) has mean square 12.5; so has (1, 0) + (2, 4). A quarter turn takes (1, 2 | 3, 4), whose
    pairs are (1, 3) and (2, 4), to (-3, -4 | 1, 2). silu(0) = 0, silu(ln 3) = 3/4 ln 3."""
    def close(x, y):
        return torch.allclose(x.cpu().float(), torch.tensor(y), rtol=16 * unit(dtype), atol=16 * unit(dtype))

    def tensor(*numbers):
        return torch.tensor(numbers).to(DEVICE, dtype)
    x, delta, weight, seven = tensor([3.0, 4]), tensor([2.0, 4]), tensor(2.0, 10), tensor([7.0, 2])
    assert close(rms_norm(x, weight, 0.0, impl), [[6 / 12.5**.5, 40 / 12.5**.5]])
    assert close(rms_norm(x, weight, 12.5, impl), [[6 / 5, 40 / 5]])
    total, normed = add_rms_norm(x - delta, delta, weight, 0.0, impl)
    assert close(total, [[3.0, 4]]) and close(normed, [[6 / 12.5**.5, 40 / 12.5**.5]])
    turn, x = torch.ones(1, 2, device=DEVICE), tensor([[1.0, 2, 3, 4]])
    assert close(rope(x, 0 * turn, turn, impl=impl), [[[-3.0, -4, 1, 2]]])
    assert close(rope(x, 0 * turn, turn, tensor(1.0, 2, 3, 4), 0.0, impl),
                 [[[-9 / 7.5**.5, -16 / 7.5**.5, 1 / 7.5**.5, 4 / 7.5**.5]]])
    assert close(swiglu(tensor([0.0, math.log(3)]), seven, impl), [[0, 1.5 * math.log(3)]])


# --------------------------------------------------------------------------------------------------------- all kernels


def one_of_each(impl):
    """name -> (operation, inputs, gradients of its first outputs)."""
    segments, target = table((17, 9, 8), (3,)), torch.arange(37, device=DEVICE) * 7 % 50
    N = int(segments[:, 1].sum())
    angle = randn(37, 12, seed=9).to(DEVICE).float()
    cos, sin = angle.cos(), angle.sin()
    own, shared = ([randn(2, 2, n, 32, seed=n) for n in lengths] for lengths in ([9, 1, 20], [30, 3]))
    (k_xkic, v_xkic), tables = paged(own, shared, [[2, 0], []], 16)
    page_n, offset_n = torch.tensor([[3, 1, 0], [5, 0, 15]], device=DEVICE)

    def stored(k_xkic, v_xkic, k_nkc, v_nkc):
        pool = k_xkic.clone(), v_xkic.clone()
        store(*pool, k_nkc, v_nkc, page_n, offset_n, impl)
        return torch.stack(pool)

    *qkv_, grad = qkv(N, 4, 2, 32)
    x, y, weight, head = randn(37, 24), randn(37, 24, seed=1), randn(24, seed=2), randn(50, 24, seed=3)
    return {
        "attention": (lambda *x: attention(*x, segments, impl), qkv_, [grad]),
        "decode_attention": (lambda q, k, v: decode_attention(q, k, v, dataclasses.replace(tables), impl),
                             [randn(3, 4, 32), k_xkic, v_xkic], []),
        "store": (stored, [k_xkic, v_xkic, randn(3, 2, 32), randn(3, 2, 32, seed=1)], []),
        "linear_logp": (lambda *x: linear_logp(*x, target, 0.7, impl), [x, head], [randn(37, seed=4)]),
        "linear": (lambda *x: linear(*x, impl="invariant"), [x, head, randn(50, seed=4)], [randn(37, 50, seed=5)]),
        "rms_norm": (lambda *x: rms_norm(*x, 1e-3, impl), [x, weight], [y]),
        "add_rms_norm": (lambda *x: add_rms_norm(*x, 1e-3, impl), [x, y, weight], [y, x]),
        "rope": (lambda x: rope(x, cos, sin, impl=impl), [randn(37, 3, 24)], [randn(37, 3, 24, seed=1)]),
        "normed rope": (lambda x, w: rope(x, cos, sin, w, 1e-3, impl), [randn(37, 3, 24), weight],
                        [randn(37, 3, 24, seed=1)]),
        "swiglu": (lambda *x: swiglu(*x, impl), [x, y], [y]),
    }


NAMES = ["attention", "decode_attention", "store", "linear_logp", "linear", "rms_norm", "add_rms_norm", "rope",
         "normed rope", "swiglu"]


def test_every_operation_is_listed():
    """The names that the following tests run over."""
    assert list(one_of_each("triton")) == NAMES


@pytest.mark.parametrize("impl,dtype", [("triton", BF16), ("invariant", F32)], ids=shown)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_deterministic(name, impl, dtype):
    """Oracle: a second run, from other garbage in memory, gives the same bits, gradients included."""
    assert_same_bits(*[with_gradients_or_without(*one_of_each(impl)[name], dtype) for _ in range(2)])


def with_gradients_or_without(op, inputs, grads, dtype):
    """decode_attention and store have no backward."""
    if grads:
        return with_gradients(op, dtype, inputs, grads)
    with poisoned():
        return [op(*[fenced(x.to(DEVICE, dtype)) for x in inputs])]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=shown)
def test_pointwise_kernels_of_nothing(dtype):
    """No rows: empty outputs, zero gradients of the weights."""
    for name in ("rms_norm", "add_rms_norm", "normed rope", "swiglu"):
        op, inputs, grads = one_of_each("triton")[name]
        rows = [x[:0] if len(x) == 37 else x for x in inputs]
        if name == "normed rope":
            cos = torch.zeros(0, 12, device=DEVICE)
            op = lambda x, w: rope(x, cos, cos, w, 1e-3, "triton")  # noqa: E731
        out = with_gradients(op, dtype, rows, [g[:0] for g in grads])
        assert [x.shape for x in out[-len(rows):]] == [x.shape for x in rows] and not any(x.any() for x in out)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=shown)
@pytest.mark.parametrize("name", ["linear", "rms_norm", "rope", "normed rope", "swiglu"])
def test_results_are_rounded_once(name, dtype):
    """Oracle: float64, rounded. What lies between is float32: an element goes the other way only if it is in the middle
    of two numbers to one part in 4,000 (float16) or 30,000. A second rounding moves one element in eight or more."""
    op, inputs, grads = one_of_each("triton")[name]
    oracle = one_of_each("torch")[name][0] if name != "linear" else F.linear
    inputs, grads = ([x.to(dtype).double() for x in xs] for xs in (inputs, grads))
    ours, exact = with_gradients(op, dtype, inputs, grads), with_gradients(oracle, F64, inputs, grads)
    n_products = 1 if name == "linear" else None  # its gradients are PyTorch's
    for i, (x, y) in enumerate(zip(ours[:n_products], exact)):
        assert (x != y.to(dtype)).double().mean() < 0.01, f"output {i}"


@pytest.mark.parametrize("dtype", LOW, ids=shown)
def test_add_rms_norm_norms_the_sum_it_returns(dtype):
    """Oracle: bits. The sum is rounded once, and then it is that number whose norm is taken."""
    x, delta, weight = (randn(*shape, seed=i).to(DEVICE, dtype) for i, shape in enumerate([(37, 50), (37, 50), (50,)]))
    total, normed = add_rms_norm(x, delta, weight, 1e-3, "triton")
    assert_same_bits([total, normed], [x + delta, rms_norm(x + delta, weight, 1e-3, "triton")])


@pytest.mark.parametrize("dtype,lower", [(F32, F16), (F16, BF16)], ids=shown)
def test_bounds_are_not_loose(monkeypatch, dtype, lower):
    """The control: what the next lower precision makes of a problem is beyond every bound, outputs and gradients."""
    beyond, right = [], with_gradients
    monkeypatch.setitem(globals(), "with_gradients",
                        lambda f, its, *rest: right(f, lower if its == dtype else its, *rest))
    monkeypatch.setitem(globals(), "assert_within", lambda ours, exact, bounds: beyond.extend(
        error(x, y) > bound for x, y, bound in zip(ours, exact, bounds, strict=True)))
    check_attention("triton", dtype, FORESTS["a group of 2"], 2, 1, 32)
    check_logp("triton", dtype, logp_problem(45, 50, 101), 0.5)
    check_norm("triton", dtype, 37, 50)
    check_rope("triton", dtype, 9, 5, 24, normed=False)
    check_rope("triton", dtype, 9, 5, 24, normed=True)
    test_swiglu_kernels("triton", dtype)
    test_invariant_linear(37, 50, 33, dtype)
    assert len(beyond) == 4 + 4 + 3 + 5 + 2 + 3 + 2 + 3 + 4 and all(beyond), beyond


@pytest.mark.parametrize("dtype", [F32, BF16], ids=shown)
def test_invariant_kernels_have_one_order(dtype):
    """Oracle: bits, alone and in company; test_invariance.py has the whole of it. A row of linear; the last token of a
    response in a forest, and decoded with its prompt."""
    x, weight = randn(37, 50).to(DEVICE, dtype), randn(33, 50, seed=1).to(DEVICE, dtype)
    assert_same_bits([linear(x, weight, impl="invariant")[5:6]], [linear(x[5:6], weight, impl="invariant")])
    q, k, v, _ = (x.to(DEVICE, dtype) for x in qkv(90, 2, 1, 32))
    out = attention(q, k, v, torch.tensor([(0, 70, -1), (70, 11, 0), (81, 9, 0)]), "invariant")
    kv_kuc = torch.stack([k, v]).transpose(1, 2).cpu()
    pool, tables = paged([kv_kuc[:, :, 81:]], [kv_kuc[:, :, :70]], [[0]], 16, math.nan)
    decoded = decode_attention(q[-1:], *pool, tables, "invariant")
    assert_same_bits([out[-1:]], [decoded])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=shown)
@pytest.mark.parametrize("name", ["linear", "rms_norm", "add_rms_norm", "rope", "normed rope", "swiglu"])
def test_without_gradients_the_same_bits(name, dtype):
    """Oracle: the same operation where a gradient is wanted, whose results the tests above hold against float64."""
    op, inputs, _ = one_of_each("triton")[name]
    inputs = [x.to(DEVICE, dtype) for x in inputs]
    outputs = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad), poisoned():
            out = op(*[fenced(x).requires_grad_(grad) for x in inputs])
            outputs.append(out if isinstance(out, tuple) else (out,))
    assert all(x.grad_fn is None for x in outputs[0]) and all(x.grad_fn is not None for x in outputs[1])
    assert_same_bits(*outputs)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_refuse_what_they_cannot_multiply(monkeypatch, name):
    """bfloat16 in the interpreter as it is shipped, which would multiply its bit patterns; float64; two dtypes in one
    call; a CPU without the interpreter."""
    monkeypatch.setattr(kernels.tiles, "runs_triton", kernels.runs_triton)  # not the mended one's
    for dtype in [F64] + [BF16] * (DEVICE == "cpu"):
        with pytest.raises(AssertionError, match=str(dtype)):
            with_gradients_or_without(*one_of_each("triton")[name], dtype)
    op, inputs, _ = one_of_each("triton")[name]
    if len(inputs) > 1:
        with pytest.raises(AssertionError, match="float16"):
            op(*[x.to(DEVICE, F32 if i else F16) for i, x in enumerate(inputs)])
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels.tiles, "runs_triton", inspect.unwrap(kernels.runs_triton))  # not what it remembers
        monkeypatch.setattr(kernels.tiles, "INTERPRETED", False)
        with pytest.raises(AssertionError, match="on cpu"):
            op(*[x.float() for x in inputs])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "linear"])
def test_default_implementation(name):
    """Oracle: the named implementation's bits. No impl means Triton on a GPU, unless in float64, and PyTorch elsewhere.
    """
    here = "torch" if DEVICE == "cpu" else "triton"
    for dtype, impl in ((F32, here), (BF16, here), (F64, "torch")):
        runs = [with_gradients_or_without(*one_of_each(how)[name], dtype) for how in (None, impl)]
        assert_same_bits(*runs)
    with pytest.raises(AssertionError, match="impl is"):
        with_gradients_or_without(*one_of_each("cuda")[name], F32)
