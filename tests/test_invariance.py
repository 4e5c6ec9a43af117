"""Batch invariance (impl="invariant"): a token's numbers are the same bits alone, in a batch, in a forest and decoded
one by one. Oracle: the same operation on the row, or the sequence, alone; torch.equal. In Triton's interpreter in
float32 and, mended (interpreter.py), in bfloat16; on a GPU in bfloat16 (RM_TEST_DEVICE=cuda). The control shows that
the default path differs: they can fail."""

import os

import pytest
import torch

import kernels
from kernels import attention, decode_attention, linear, linear_logp, rms_norm, rope, swiglu
from model import Model, ModelConfig, pack
from sample import Sampler, Sampling
from test_kernels import paged

DEVICE = os.environ.get("RM_TEST_DEVICE", "cpu")
DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
pytestmark = [pytest.mark.usefixtures("mended_interpreter"),
              pytest.mark.skipif(not kernels.runs_triton(DEVICE, torch.float32), reason="no GPU, no interpreter"),
              pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])]


def normal(dtype, *shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rows_alone(f, n):
    return torch.cat([f(slice(i, i + 1)) for i in range(n)])


@pytest.mark.parametrize("N,D,V", [(37, 40, 50), (70, 96, 33), (1, 17, 5)])
def test_rows_of_linear_alone(N, D, V, dtype):
    """Each row alone, and the rows in another order."""
    x, weight, bias = normal(dtype, N, D), normal(dtype, V, D, seed=1), normal(dtype, V, seed=2)
    for b in (bias, None):
        together = linear(x, weight, b, "invariant")
        assert torch.equal(together, rows_alone(lambda row: linear(x[row], weight, b, "invariant"), N))
        order = torch.randperm(N, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        assert torch.equal(together[order], linear(x[order], weight, b, "invariant"))


def test_rows_of_linear_logp_alone(dtype):
    """logp and entropy of each row alone, at a temperature; the vocabulary ends within a tile."""
    N, V = 37, 71
    hidden, weight, target = normal(dtype, N, 40), normal(dtype, V, 40, seed=1), torch.arange(N, device=DEVICE) * 5 % V
    together = linear_logp(hidden, weight, target, 0.7, "invariant")
    def alone(row):
        return torch.stack(linear_logp(hidden[row], weight, target[row], 0.7, "invariant"), 1)
    assert torch.equal(torch.stack(together, 1), rows_alone(alone, N))


def test_rows_of_pointwise_operations_alone(dtype):
    """rms_norm, add_rms_norm, rope with and without norm, swiglu."""
    N, D, H, C = 19, 48, 3, 32
    x, y, weight = normal(dtype, N, D), normal(dtype, N, D, seed=1), normal(dtype, D, seed=2)
    q, angle = normal(dtype, N, H, C), torch.randn(N, C // 2, device=DEVICE)
    cos, sin = angle.cos(), angle.sin()
    for f in (lambda row: rms_norm(x[row], weight, 1e-6, "invariant"),
              lambda row: torch.cat(kernels.add_rms_norm(x[row], y[row], weight, 1e-6, "invariant"), 1),
              lambda row: rope(q[row], cos[row], sin[row], None, 0.0, "invariant"),
              lambda row: rope(q[row], cos[row], sin[row], weight[:C], 1e-6, "invariant"),
              lambda row: swiglu(x[row], y[row], "invariant")):
        assert torch.equal(f(slice(None)), rows_alone(f, N))


@pytest.mark.parametrize("H,K,C,page_size", [(4, 2, 32, 16), (7, 1, 64, 32), (3, 3, 80, 64)])
def test_attention_in_a_forest_alone_and_decoded(H, K, C, page_size, dtype):
    """Trees of prompts and responses of odd lengths: each [prompt, response] alone as one causal sequence, and some of
    its tokens decoded against the prompt's pages and its own; a prompt alone."""
    trees = [(37, [9, 18, 1]), (5, [2]), (32, [4])]
    forest = pack([([0] * prompt, [[0] * n for n in responses]) for prompt, responses in trees])
    N, segments = len(forest.tokens_n), forest.segments_s3.tolist()
    q, k, v = normal(dtype, N, H, C), normal(dtype, N, K, C, seed=1), normal(dtype, N, K, C, seed=2)
    out = attention(q, k, v, forest.segments_s3, "invariant")
    for first, n, above in segments:
        p_first, p = segments[above][:2] if above >= 0 else (first, 0)
        rows = torch.tensor([*range(p_first, p_first + p), *range(first, first + n)], device=DEVICE)
        alone = attention(q[rows], k[rows], v[rows], torch.tensor([(0, p + n, -1)]), "invariant")
        assert torch.equal(out[rows], alone)
        if above < 0:
            continue
        kv_knc = torch.stack([k, v]).transpose(1, 2).cpu()
        prompt, nothing = kv_knc[:, :, p_first:p_first + p], kv_knc[:, :, :0]
        for i in range(0, n, 1 + n // 5):  # slots 0 and 1 share the prompt, 2 has it in its own pages
            own = kv_knc[:, :, first:first + i + 1]
            pool, tables = paged([own, own, torch.cat([prompt, own], 2)], [nothing, prompt], [[], [1, 0]], page_size)
            decoded = decode_attention(torch.stack([q[first + i]] * 3), *pool, tables, "invariant")
            assert torch.equal(decoded, torch.stack([out[first + i]] * 3))


def tiny(kind, dtype):
    """A model of two layers and 3 heads on one key/value head, with the biases or norms of its family."""
    raw = {"model_type": kind, "vocab_size": 101, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
           "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
           "tie_word_embeddings": kind == "qwen3"}
    model = Model.random(ModelConfig.from_dict(raw), seed=1, device=DEVICE, dtype=dtype).requires_grad_(False)
    for name, x in model.named_parameters():  # else biases and norms would hide mistakes
        if x.ndim == 1:
            x += normal(dtype, *x.shape, seed=len(name)) / 10
        else:
            x *= 8
    model.n_vocab = 97
    return model


PROMPTS = [[5, 6, 7, 8, 9] * 7, [11, 3], [1, 2, 3, 4, 9]]


def sampled_and_scored(model, n, n_slots, **options):
    """The sampler's log-probabilities of its rollouts, and the trainer's of the same tokens in one forest."""
    rollouts = Sampler(model, n_slots).generate(PROMPTS, Sampling(n, 3, **options))
    forest = pack([(ids, [r.ids for r in group]) for ids, group in zip(PROMPTS, rollouts)], DEVICE)
    scored = torch.cat([torch.arange(s, s + m) for s, m, above in forest.segments_s3.tolist() if above >= 0]).to(DEVICE)
    sampled = torch.tensor([x for group in rollouts for r in group for x in r.logps])
    return rollouts, sampled, model(forest, scored, options.get("temperature", 1.0) or 1.0)[0].cpu()


@pytest.mark.parametrize("kind", [pytest.param("qwen2", marks=pytest.mark.long), "qwen3"])
def test_the_sampler_gives_the_trainers_bits(kind, dtype):
    """Log-probabilities: sampled in groups of 2 with continuous batching, scored in a forest; then a rollout scored as
    a sequence of its own, and a group sampled again alone, and greedily: all the same bits."""
    model = tiny(kind, dtype)
    model.impl = "invariant"
    rollouts, sampled, scored = sampled_and_scored(model, 2, 4, temperature=0.8, seed=4)
    assert len(sampled) == 18 and sampled.min() > -20 and sampled.std() > 0.5
    assert torch.equal(sampled, scored)
    for i, ids in enumerate(PROMPTS):
        for r in rollouts[i][:1]:
            forest = pack([(ids + r.ids, [])], DEVICE)
            alone = model(forest, torch.arange(len(ids), len(ids + r.ids), device=DEVICE), 0.8)[0].cpu()
            assert torch.equal(alone, torch.tensor(r.logps))
    again = Sampler(model, 2).generate(PROMPTS[1:2], Sampling(2, 3, temperature=0.8, seed=4))
    assert [(r.ids, r.logps) for r in again[0]] == [(r.ids, r.logps) for r in rollouts[1]]
    _, sampled, scored = sampled_and_scored(model, 1, 2, temperature=0.0)
    assert torch.equal(sampled, scored)


def test_the_default_path_differs(dtype):
    """The control: the same comparison on the default path agrees to rounding, and not to the bit."""
    model = tiny("qwen2", dtype)
    model.impl = "torch"
    _, sampled, scored = sampled_and_scored(model, 3, 6, temperature=0.8, seed=4)
    assert len(sampled) == 27 and not torch.equal(sampled, scored)
    assert (sampled - scored).abs().max() < (1e-4 if dtype == torch.float32 else 0.3)
