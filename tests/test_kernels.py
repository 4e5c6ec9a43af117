"""Oracles: attention and decode_attention against a naive softmax over a [N, N] mask written from the visibility rule,
and linear_logp against torch.log_softmax, all in float64. Lower precisions may err at most twice as much as plain torch
does."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import attention, decode_attention, linear_logp

torch.set_num_threads(1)


def error(x, oracle):
    """Relative Frobenius error."""
    x, oracle = x.double(), oracle.double()
    assert x.shape == oracle.shape
    return float((x - oracle).norm() / oracle.norm().clamp(min=1e-30))


def assert_no_worse_than_torch(ours, plain, oracle, times=2.0):
    """Each of ours errs at most `times` as much as plain torch in the same dtype, both against float64."""
    for i, (x, y, z) in enumerate(zip(ours, plain, oracle, strict=True)):
        error_x, error_y = error(x, z), error(y, z)
        assert error_x <= times * error_y + 1e-8, f"output {i}: ours {error_x:.2e}, torch's {error_y:.2e}"


# ------------------------------------------------------------------------------------------------------------ attention


def table(*trees):
    """[S, 3] segments of (prompt length, response lengths...) trees, packed one after another."""
    rows, start = [], 0
    for prompt, *responses in trees:
        parent = len(rows)
        for length, above in [(prompt, -1)] + [(n, parent) for n in responses]:
            rows.append((start, length, above))
            start += length
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
                         for i, s in enumerate(owner)])


def dense(q_nhc, k_nkc, v_nkc, visible_nn, softmax=torch.softmax):
    """The oracle: every score, minus infinity where unseen, one softmax; query head h reads key/value head
    h // (H / K)."""
    share = q_nhc.shape[1] // k_nkc.shape[1]
    k_nhc, v_nhc = k_nkc.repeat_interleave(share, 1), v_nkc.repeat_interleave(share, 1)
    score_hnn = torch.einsum("nhc,mhc->hnm", q_nhc, k_nhc) / math.sqrt(q_nhc.shape[2])
    weight_hnn = softmax(score_hnn.masked_fill(~visible_nn, -math.inf), -1)
    return torch.einsum("hnm,mhc->nhc", weight_hnn, v_nhc)


def qkv(N, heads, kv_heads, head_dim, peak=1.0, seed=0):
    """Float64 q, k, v and the output's gradient. Values that float32 holds exactly, so that dtypes compare alike."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v, grad = (torch.randn(N, n, head_dim, generator=rng).double() for n in (heads, kv_heads, kv_heads, heads))
    return (q * peak).float().double(), k, v, grad


def with_gradients(f, dtype, inputs, grad):
    """f(*inputs) and the gradient of each input, all in dtype."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check_attention(segments, heads, kv_heads, head_dim, peak=1.0):
    N = int(segments[:, 1].sum())
    q, k, v, grad = qkv(N, heads, kv_heads, head_dim, peak)
    seen = visible(segments)
    oracle = with_gradients(lambda *x: dense(*x, seen), torch.float64, (q, k, v), grad)
    ours = with_gradients(lambda *x: attention(*x, segments), torch.float64, (q, k, v), grad)
    assert max(map(error, ours, oracle)) < 1e-12
    single = with_gradients(lambda *x: attention(*x, segments), torch.float32, (q, k, v), grad)
    plain = with_gradients(lambda *x: dense(*x, seen), torch.float32, (q, k, v), grad)
    assert single[0].dtype == torch.float32
    assert_no_worse_than_torch(single, plain, oracle)


@pytest.mark.parametrize("forest", FORESTS)
def test_attention_sees_what_the_segments_say(forest):
    """Oracle: dense softmax over the [N, N] mask; outputs and the gradients of q, k, v."""
    check_attention(FORESTS[forest], heads=4, kv_heads=2, head_dim=32)


@pytest.mark.parametrize("heads,kv_heads,head_dim,peak", [
    (3, 3, 64, 1), (4, 2, 80, 1), (8, 2, 32, 1), (5, 1, 128, 1), (14, 2, 64, 1), (8, 1, 128, 1), (16, 2, 32, 1),
    (4, 2, 64, 20), (7, 1, 128, 20), (2, 2, 80, 20)])
def test_attention_of_head_shapes_and_peaked_softmax(heads, kv_heads, head_dim, peak):
    """Oracle: dense softmax over the [N, N] mask; peak multiplies q until one key takes nearly all the weight."""
    check_attention(table((37, 9, 33), (5,), (3, 40)), heads, kv_heads, head_dim, peak)


def test_attention_docstring_example():
    """Oracle: the table in attention's docstring. Rows of v are one-hot, q is zero: the output is uniform over what is
    seen."""
    lines = attention.__doc__.splitlines()
    segments = torch.tensor(eval(next(line for line in lines if "segments =" in line).split("=")[1]))
    seen = re.sub(r"\|", " ", next(line for line in lines if line.split()[:1] == ["sees"])).split()[1:]
    out = attention(torch.zeros(7, 1, 8), torch.zeros(7, 1, 8), torch.eye(7, 8)[:, None], segments)[:, 0]
    for row, digits in zip(out, seen, strict=True):
        columns = [int(d) for d in digits]
        assert row.nonzero()[:, 0].tolist() == columns
        assert torch.allclose(row[columns], torch.tensor(1 / len(columns)))


def test_attention_refuses_grandparents():
    """A programmer's mistake, not a silent wrong answer: a parent must be parentless."""
    x = torch.randn(6, 1, 8)
    with pytest.raises(AssertionError, match="parentless"):
        attention(x, x, x, torch.tensor([(0, 2, -1), (2, 2, 0), (4, 2, 1)]))


def test_attention_of_nothing_and_of_one_token():
    """No segments, or only empty ones: an empty output, not an error. One token: its own value, by hand, and only v
    learns."""
    x = torch.randn(0, 2, 8)
    for segments in (torch.zeros(0, 3, dtype=torch.int64), table((0, 0))):
        assert attention(x, x, x, segments).shape == (0, 2, 8)
    q, k, v, grad = qkv(1, 4, 2, 32)
    out, *grads = with_gradients(lambda *x: attention(*x, table((1,))), torch.float64, (q, k, v), grad)
    assert torch.allclose(out, v.repeat_interleave(2, 1), rtol=1e-14)
    assert grads[0].abs().max() < 1e-14 and grads[1].abs().max() < 1e-14
    assert torch.allclose(grads[2], grad.view(1, 2, 2, 32).sum(2), rtol=1e-14)


def test_attention_never_holds_all_scores():
    """16 trees: the largest tensor of forward and backward is far from [N, N]."""
    segments = table(*[(64, 20, 20)] * 16)
    N = int(segments[:, 1].sum())
    q, k, v, grad = qkv(N, 2, 1, 8)
    with Largest() as largest:
        with_gradients(lambda *x: attention(*x, segments), torch.float32, (q, k, v), grad)
    assert largest.numel < N * N / 8, (largest.numel, N)


@pytest.mark.parametrize("heads,kv_heads,head_dim,peak", [(4, 4, 32, 1), (8, 2, 80, 1), (14, 2, 64, 1),
                                                              (8, 1, 128, 20)])
def test_decode_attention_is_the_last_row_of_attention(heads, kv_heads, head_dim, peak):
    """Oracle: the last row of dense causal attention over each slot's first length entries; the cache beyond is
    garbage."""
    lengths, T = [1, 2, 17, 32, 33, 48], 48
    rng = torch.Generator().manual_seed(1)
    q = torch.randn(len(lengths), heads, head_dim, generator=rng) * peak
    k, v = torch.randn(2, len(lengths), kv_heads, T, head_dim, generator=rng)
    for b, length in enumerate(lengths):
        k[b, :, length:], v[b, :, length:] = 1e3, 1e3

    def rows(dtype):
        def row(b, n):
            return dense(q[b:b + 1].to(dtype), k[b, :, :n].to(dtype).transpose(0, 1),
                         v[b, :, :n].to(dtype).transpose(0, 1), torch.ones(1, n, dtype=torch.bool))
        return torch.cat([row(b, n) for b, n in enumerate(lengths)])

    length_b = torch.tensor(lengths)
    oracle = rows(torch.float64)
    assert error(decode_attention(q.double(), k.double(), v.double(), length_b), oracle) < 1e-12
    assert_no_worse_than_torch([decode_attention(q, k, v, length_b)], [rows(torch.float32)], [oracle])


# ------------------------------------------------------------------------------------------ log-probabilities of tokens


def dense_logp(hidden_nd, weight_vd, target_n, temperature):
    """The oracle: every logit, one log_softmax in float32 or wider, autograd."""
    logits_nv = (hidden_nd @ weight_vd.t()).to(torch.promote_types(hidden_nd.dtype, torch.float32)) / temperature
    logp_nv = logits_nv.log_softmax(1)
    return logp_nv.gather(1, target_n[:, None])[:, 0], -(logp_nv.exp() * logp_nv).sum(1).detach()


def logp_problem(dtype, N=11, D=24, V=50, peak=1.0, seed=0):
    """hidden, weight, target, gradient of logp; rounded to dtype, then held in float64. Targets repeat, 0 and V - 1
    occur."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=rng) * peak, torch.randn(V, D, generator=rng) / math.sqrt(D) * 2
    target = torch.randint(V, (N,), generator=rng)
    target[:4] = torch.tensor([0, V - 1, V // 2, V // 2])
    return hidden.to(dtype).double(), weight.to(dtype).double(), target, torch.randn(N, generator=rng).double()


def logp_and_gradients(f, dtype, problem, temperature):
    """logp, entropy, and the gradients of hidden and weight; hidden and weight in dtype."""
    hidden, weight, target, grad = problem
    hidden, weight = (x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    logp, entropy = f(hidden, weight, target, temperature)
    assert logp.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32) and not entropy.requires_grad
    return [logp.detach(), entropy, *torch.autograd.grad(logp, (hidden, weight), grad.to(logp.dtype))]


@pytest.mark.parametrize("chunk", [1, 50, 150, 2**25])  # rows per block: 1, 1, 3 with a remainder of 2, all 11
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_linear_logp_is_log_softmax(monkeypatch, chunk, temperature):
    """Oracle: log_softmax of the whole logits in float64: values, entropy, gradients of hidden and weight."""
    monkeypatch.setattr(kernels, "LOGIT_CHUNK", chunk)
    problem = logp_problem(torch.float64)
    ours = logp_and_gradients(linear_logp, torch.float64, problem, temperature)
    oracle = logp_and_gradients(dense_logp, torch.float64, problem, temperature)
    assert max(map(error, ours, oracle)) < 1e-12


@pytest.mark.parametrize("peak", [1, 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logp_in_low_precision(monkeypatch, dtype, temperature, peak):
    """Oracle: log_softmax in float64; at most twice the error of torch's own log_softmax in the same dtype."""
    monkeypatch.setattr(kernels, "LOGIT_CHUNK", 301 * 40)  # blocks of 40 rows, the last of 20
    problem = logp_problem(dtype, N=100, D=64, V=301, peak=peak)
    ours = logp_and_gradients(linear_logp, dtype, problem, temperature)
    plain = logp_and_gradients(dense_logp, dtype, problem, temperature)
    assert_no_worse_than_torch(ours, plain, logp_and_gradients(dense_logp, torch.float64, problem, temperature))


def test_linear_logp_adds_many_blocks_in_float32(monkeypatch):
    """Oracle: log_softmax in float64. 2,000 blocks of one row in bfloat16: the weight's gradient must not be summed
    there."""
    monkeypatch.setattr(kernels, "LOGIT_CHUNK", 1)
    problem = logp_problem(torch.bfloat16, N=2000, D=8, V=5)
    ours = logp_and_gradients(linear_logp, torch.bfloat16, problem, 1.0)
    plain = logp_and_gradients(dense_logp, torch.bfloat16, problem, 1.0)
    assert_no_worse_than_torch(ours, plain, logp_and_gradients(dense_logp, torch.float64, problem, 1.0))


def test_linear_logp_gradcheck(monkeypatch):
    """Oracle: finite differences in float64, over several blocks."""
    monkeypatch.setattr(kernels, "LOGIT_CHUNK", 2 * 7)
    hidden, weight, _, _ = logp_problem(torch.float64, N=5, D=4, V=7)
    target = torch.tensor([0, 6, 3, 3, 1])
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_logp(h, w, target, 0.8)[0], inputs)


def test_linear_logp_of_a_sliced_head(monkeypatch):
    """Oracle: log_softmax over the slice. As Model.head_vd gives it (the first rows), and with strides that are not
    contiguous; one gradient arrives in the whole weight, zero outside the slice; a frozen side gets none."""
    monkeypatch.setattr(kernels, "LOGIT_CHUNK", 100)
    hidden, weight, target, grad = logp_problem(torch.float64)
    for cut in (lambda w: torch.cat([w, w + 9])[:50], lambda w: w.t().contiguous().t(),
                lambda w: w.repeat_interleave(2, 0)[::2]):
        problem = torch.stack([hidden, hidden], 1).flatten(0, 1)[::2], weight, target, grad
        ours = logp_and_gradients(lambda h, w, *rest: linear_logp(h, cut(w), *rest), torch.float64, problem, 0.7)
        assert max(map(error, ours, logp_and_gradients(dense_logp, torch.float64, problem, 0.7))) < 1e-12
    whole = torch.cat([weight, weight + 9]).requires_grad_()
    linear_logp(hidden, whole[:50], target)[0].sum().backward()
    assert whole.grad[:50].abs().sum() > 0 and not whole.grad[50:].any()
    assert not linear_logp(hidden, weight, target)[0].requires_grad
    hidden.requires_grad_()
    linear_logp(hidden, weight, target)[0].sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


def test_linear_logp_hand_worked():
    """Oracle: by hand. Logits (0, ln 3) at temperature 1: probabilities 1/4 and 3/4; at 1/2 they are 1/10 and 9/10."""
    hidden, weight = torch.ones(2, 1, dtype=torch.float64), torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    for temperature, p in ((1.0, (1 / 4, 3 / 4)), (0.5, (1 / 10, 9 / 10))):
        logp, entropy = linear_logp(hidden, weight, torch.tensor([0, 1]), temperature)
        assert logp.tolist() == pytest.approx([math.log(x) for x in p], rel=1e-14)
        assert entropy.tolist() == pytest.approx([-sum(x * math.log(x) for x in p)] * 2, rel=1e-14)


def test_linear_logp_of_nothing_and_of_certainty():
    """No rows: empty outputs and zero gradients. One token certain: logp and entropy are exactly zero, nothing is
    NaN."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    logp, entropy = linear_logp(hidden, weight, torch.zeros(0, dtype=torch.int64))
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and hidden.grad.shape == (0, 4) and not weight.grad.any()
    logp, entropy = linear_logp(torch.full((1, 1), 300.0), torch.tensor([[1.0], [-1.0]]), torch.tensor([0]))
    assert logp.item() == 0 and entropy.item() == 0
    with pytest.raises(AssertionError, match="temperature"):
        linear_logp(hidden, weight, torch.zeros(0, dtype=torch.int64), 0.0)


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation inside makes, in elements; forward and backward."""
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_linear_logp_never_holds_all_logits(monkeypatch):
    """N x V logits would be 1.2 million elements; the largest tensor of forward and backward is the weight, 40,000.
    That the recorder sees what it should is checked on the dense oracle."""
    N, D, V = 600, 20, 2000
    monkeypatch.setattr(kernels, "LOGIT_CHUNK", 30_000)
    problem = logp_problem(torch.float32, N, D, V)
    with Largest() as dense_largest:
        logp_and_gradients(dense_logp, torch.float32, problem, 1.0)
    with Largest() as ours:
        logp_and_gradients(linear_logp, torch.float32, problem, 1.0)
    assert dense_largest.numel == N * V and ours.numel == V * D
