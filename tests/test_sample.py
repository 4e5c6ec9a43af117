"""sample.py. Oracles: the uncached model on the growing sequence, token by token; the trainer's own forest forward;
exact probabilities, by chi-square tests whose seeds are fixed and whose false-alarm probability is 1e-5; splitmix64 on
Python's integers; top-k and top-p in a few lines of numpy; an interrupted file of judgements against one written in one
go."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sample  # noqa: E402
from common import parse_config  # noqa: E402
from data import toy  # noqa: E402
from data.pairs import Pair, read_pairs, to_json, write_pairs  # noqa: E402
from kernels import INTERPRETED  # noqa: E402
from model import Model, ModelConfig, pack  # noqa: E402
from reward import benchmark_verdict, load_prompt, majority, prompt_path, render  # noqa: E402
from sample import Batch, Config, Judge, JudgementFile, Sampler, choose, judge_file, main  # noqa: E402
from sample import prompt_key, uniforms  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SHARED = (ROOT / os.environ.get("RM_SHARED", "../shared")).resolve()

QWEN2 = dict(model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000.0,
             tie_word_embeddings=True)
QWEN3 = QWEN2 | dict(model_type="qwen3", num_attention_heads=6, head_dim=8, tie_word_embeddings=False)
ONE_LAYER = QWEN2 | dict(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1)
PROMPTS = [[7] * 3, [1], list(range(40)), [5, 9, 2, 60, 3], [11, 12], list(range(60, 20, -2)), [3] * 9, [44, 1, 8, 30]]


def tiny(raw, dtype=torch.float32, seed=0):
    """A random model whose logits spread over several nats, biases included: at std 0.02 every distribution is flat."""
    model = Model.random(ModelConfig.from_dict(raw), seed, dtype=dtype).requires_grad_(False)
    rng = torch.Generator().manual_seed(seed + 1)
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            x.normal_(generator=rng)
        elif x.ndim == 2:
            x.mul_(0.5 / 0.02 if "embed" in name or "lm_head" in name else 0.2 / 0.02)
    return model


def exact(logits, temperature=1.0, top_p=1.0, top_k=0):
    """The sampling distribution of one row of logits, in float64, from the definitions."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    if top_k:
        z = np.where(z >= np.sort(z)[::-1][:top_k][-1], z, -np.inf)
    p = np.exp(z - z.max())
    p /= p.sum()
    kept, mass = np.zeros(len(p), dtype=bool), 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if mass >= top_p or p[i] == 0:
            break
        kept[i], mass = True, mass + p[i]
    p[~kept] = 0
    return p / p.sum()


def assert_follows(counts, p):
    """Chi-square: counts could be draws from p. Raises for one true case in 1e5; cells that expect under 5 are
    merged."""
    counts, p = np.asarray(counts, dtype=np.float64).ravel(), np.asarray(p, dtype=np.float64).ravel()
    assert counts[p == 0].sum() == 0, "drew what has probability 0"
    expected = counts.sum() * p
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    df, z = len(expected) - 1, 4.265  # the normal quantile of 1 - 1e-5, turned into chi-square's by Wilson and Hilferty
    limit = df * (1 - 2 / (9 * df) + z * math.sqrt(2 / (9 * df))) ** 3
    statistic = ((observed - expected) ** 2 / expected).sum()
    assert statistic < limit, f"chi-square {statistic:.1f} with {df} degrees of freedom, limit {limit:.1f}"


def before_each(monkeypatch, *methods, look):
    """look(batch) before every call of these methods of sample.Batch."""
    for name in methods:
        def call(self, *args, inner=getattr(Batch, name)):
            look(self)
            return inner(self, *args)
        monkeypatch.setattr(Batch, name, call)


def assert_naive(model, prompts, groups, seed):
    """The uncached model, given each rollout's tokens so far, draws its next one; exact, so in float64."""
    for prompt, rollouts in zip(prompts, groups, strict=True):
        for k, r in enumerate(rollouts):
            logits = model.logits(prompt + r.ids)[len(prompt) - 1:-1]
            key, index, token = (torch.tensor(x) for x in (prompt_key(prompt), k, range(len(r.ids))))
            ids, logps = choose(logits, uniforms(seed, key.expand(len(token)), index.expand(len(token)), token))
            assert ids.tolist() == r.ids
            np.testing.assert_allclose(r.logps, logps, atol=1e-10)


# ---- the cached sampler against the uncached model


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["Qwen2", "Qwen3"])
def test_greedy_equals_the_uncached_model_token_by_token(raw, monkeypatch):
    """Slots are refilled (3 for 8 prompts), the cache grows past its first size, and the last rollouts run alone."""
    model, n_new, sizes = tiny(raw, torch.float64), 110, []
    naive = []
    for prompt in PROMPTS:
        ids = list(prompt)
        while len(ids) < len(prompt) + n_new:
            ids.append(int(model.logits(ids)[-1].argmax()))
        naive.append(ids[len(prompt):])
    stop = {naive[0][4], naive[3][30]}
    expected = [ids[:next((i + 1 for i, x in enumerate(ids) if x in stop), n_new)] for ids in naive]
    assert len({len(ids) for ids in expected}) > 2 and max(map(len, expected)) == n_new, "the case has lost its variety"

    before_each(monkeypatch, "shrink", "step", look=lambda batch: sizes.append(batch.own.size))
    got = Sampler(model, n_slots=3, prefill_tokens=16).generate(PROMPTS, 1, n_new, temperature=0, stop=stop)
    for prompt, ids, (rollout,) in zip(PROMPTS, expected, got, strict=True):
        assert rollout.ids == ids
        assert (rollout.reason, rollout.finished) == (("stop", True) if ids[-1] in stop else ("length", False))
        logp = model.logits(prompt + ids)[len(prompt) - 1:-1].log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logps, logp, atol=1e-10)
    assert sizes[-1][0] < 3 and len({T for _, T in sizes}) > 1, f"no compaction or no growth: {sizes}"


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["Qwen2", "Qwen3"])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7), dict(top_k=4), dict(top_p=0.6),
                                     dict(temperature=1.3, top_p=0.9, top_k=7)], ids=str)
def test_logps_are_those_of_the_sampling_distribution(raw, options):
    """Oracle: the uncached model's logits, tempered, cut and renormalized by `exact`."""
    model = tiny(raw)
    done = Sampler(model, n_slots=6).generate(PROMPTS, 2, 20, **options, stop={17}, seed=3)
    for prompt, rollouts in zip(PROMPTS, done):
        for r in rollouts:
            rows = model.logits(prompt + r.ids)[len(prompt) - 1:-1].double().numpy()
            p = [exact(row, **options)[token] for row, token in zip(rows, r.ids, strict=True)]
            np.testing.assert_allclose(r.logps, np.log(p), atol=1e-5)


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["Qwen2", "Qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree(raw, temperature):
    """DESIGN: within 1e-4 in float32, of the same tokens; the trainer sees one forest, the sampler a cache and refilled
    slots."""
    model, n_new = tiny(raw), 80
    groups = Sampler(model, n_slots=8).generate(PROMPTS, 4, n_new, temperature=temperature, stop={17}, seed=5)
    forest = pack([(prompt, [r.ids for r in rollouts]) for prompt, rollouts in zip(PROMPTS, groups)])
    scored = [torch.arange(start, start + length) for start, length, parent in forest.segments_s3.tolist()
              if parent >= 0]
    logp, _ = model(forest, torch.cat(scored), temperature)
    sampled = torch.tensor([x for rollouts in groups for r in rollouts for x in r.logps])
    worst = (logp - sampled).abs().max().item()
    print(f"largest difference {worst:.1e} over {len(sampled)} tokens")
    assert worst < 1e-4


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the CPU with TRITON_INTERPRET=1 only")
@pytest.mark.parametrize("raw, temperature", [(QWEN2, 0.6), (QWEN3, 0.0)], ids=["Qwen2", "Qwen3 greedy"])
def test_invariant_sampler_has_the_trainers_bits(raw, temperature):
    model = tiny(raw)
    model.impl = "invariant"
    groups = Sampler(model, n_slots=5).generate(PROMPTS[:4], 2, 12, temperature=temperature, stop={17, 18}, seed=5)
    forest = pack([(prompt, [r.ids for r in rollouts]) for prompt, rollouts in zip(PROMPTS, groups)])
    scored = [torch.arange(start, start + length) for start, length, parent in forest.segments_s3.tolist()
              if parent >= 0]
    logp, _ = model(forest, torch.cat(scored), temperature or 1.0)
    assert logp.tolist() == [x for rollouts in groups for r in rollouts for x in r.logps]


# ---- prompts are stored once


def live_groups(batch):
    """How many rollouts of each prompt are being written."""
    return Counter(slot.prompt for slot in batch.slots if slot.rollout is not None)


def test_stragglers_of_many_groups_beside_new_ones(monkeypatch):
    """Five groups fill the slots, but more are alive, some by their last rollout, in slots and rows that others have
    left: as many rows as there ever were groups at once, over 72 prompts. Oracle: the uncached model."""
    model, n, seen = tiny(QWEN2, torch.float64), 3, []
    prompts = [ids + [x] for x in range(9) for ids in PROMPTS]

    def look(batch):
        assert set(live_groups(batch)) == set(batch.rows) == set(batch.groups)
        assert len(set(batch.rows.values())) == len(batch.rows)
    before_each(monkeypatch, "step", look=look)
    before_each(monkeypatch, "take_finished", look=lambda batch: seen.append(
        (len(batch.rows), batch.shared.size[0], batch.own.size[1])))
    groups = Sampler(model, n_slots=15).generate(prompts, n, 70, stop={17, 18, 19}, seed=4)
    assert_naive(model, prompts, groups, seed=4)
    live, rows, T = np.array(seen).T
    assert live.max() > 7 and rows.max() == live.max() and (rows <= np.maximum.accumulate(live)).all()
    assert rows[-1] < 4 and 64 < T.max() <= 70, "not shrunk, not grown, or grown beyond the longest rollout"


def test_shrinking_keeps_siblings_together(monkeypatch):
    """When slots are dropped, some prompts have two rollouts or more left, some one, some none."""
    model, left = tiny(QWEN3, torch.float64), []
    before_each(monkeypatch, "shrink", look=lambda batch: left.append([live_groups(batch)[i] for i in range(8)]))
    groups = Sampler(model).generate(PROMPTS, 4, 60, stop={17, 18, 19}, seed=1)
    assert_naive(model, PROMPTS, groups, seed=1)
    assert len(left) > 2 and any(min(x) == 0 and 1 in x and max(x) > 1 for x in left), f"no variety left: {left}"


def test_the_cache_holds_a_prompt_once_and_rollouts_no_longer_than_they_may_be(monkeypatch):
    model, sizes = tiny(QWEN2), []

    def look(batch):
        sizes.append(sum(x.numel() for cache in (batch.own, batch.shared) for x in cache.k + cache.v))
    before_each(monkeypatch, "step", look=look)
    Sampler(model).generate(PROMPTS[:3], 16, 5)
    layers_both_heads_channels = 2 * 2 * 2 * 8
    assert set(sizes) == {layers_both_heads_channels * (3 * 40 + 3 * 16 * 5)}


def test_what_empty_slots_and_rows_hold_reaches_nobody(monkeypatch):
    """They hold NaN, of which every zero weight would make a NaN, whenever prompts are admitted or a token is drawn."""
    model, prompts, filled = tiny(QWEN3), PROMPTS * 3, Counter()

    def run():
        return Sampler(model, n_slots=6).generate(prompts, 2, 40, stop={17, 18, 19}, seed=2)
    expected = run()

    def fill(batch):
        empty = sorted(set(range(batch.shared.size[0])) - set(batch.rows.values()))
        for cache, rows in ((batch.own, batch.free()), (batch.shared, empty)):
            filled[cache is batch.own] += len(rows)
            for x in cache.k + cache.v:
                x[rows] = torch.nan
    before_each(monkeypatch, "admit", "step", look=fill)
    for before, after in zip(expected, run(), strict=True):
        assert [(r.ids, r.logps) for r in before] == [(r.ids, r.logps) for r in after]
    assert min(filled[True], filled[False]) > 50


# ---- the distribution


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=3, top_p=0.8)], ids=str)
def test_tokens_follow_the_exact_probabilities(options):
    """First tokens, and first two jointly, of 20,000 rollouts of one prompt."""
    model, prompt, n = tiny(ONE_LAYER), [3, 1, 4, 1, 5], 20_000
    rollouts, = Sampler(model).generate([prompt], n, 2, **options, seed=11)
    first = exact(model.logits(prompt)[-1], **options)
    joint = first[:, None] * [exact(model.logits(prompt + [x])[-1], **options) for x in range(12)]
    counts = np.zeros((12, 12))
    for r in rollouts:
        counts[tuple(r.ids)] += 1
    assert_follows(counts.sum(1), first)
    assert_follows(counts, joint)
    if options:
        assert ((counts.sum(1) > 0) == (first > 0)).all() and 1 < (first > 0).sum() <= 3


@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.3), dict(top_k=1), dict(top_k=5), dict(top_k=40), dict(top_k=99), dict(top_p=1e-9),
    dict(top_p=0.5), dict(top_p=0.999), dict(temperature=2.0, top_k=9, top_p=0.7)], ids=str)
def test_choose_inverts_the_distribution(options):
    """Oracle: the first token whose cumulative exact probability is above u."""
    rng = np.random.default_rng(0)
    logits, u = 3 * rng.standard_normal((300, 40)), rng.random(300)
    ids, logps = choose(torch.tensor(logits), torch.tensor(u), **options)
    for row, x, i, logp in zip(logits, u, ids.tolist(), logps.tolist()):
        p = exact(row, **options)
        assert i == int(np.searchsorted(np.cumsum(p), x, side="right")) and abs(logp - math.log(p[i])) < 1e-12


def test_choose_keeps_ties_at_top_k_and_the_smallest_set_of_top_p():
    equal, u = torch.zeros(64, 4), (torch.arange(64).double() + 0.5) / 64

    def support(logits_bv, **options):
        ids, logps = choose(logits_bv, u, **options)
        # all cases here are uniform
        assert torch.allclose(logps, torch.tensor(-math.log(len(ids.unique()))), atol=1e-6)
        return ids.unique().tolist()
    assert support(equal, top_k=2) == [0, 1, 2, 3]  # all tie with the second
    assert support(equal, top_p=0.25) == [0] and support(equal, top_p=0.26) == [0, 1]
    assert support(equal, top_p=0.5) == [0, 1] and support(equal, top_p=0.75) == [0, 1, 2]
    assert support(torch.tensor([[1.0, 3, 3, 3]]).expand(64, 4), top_k=1) == [1, 2, 3]
    assert support(torch.tensor([[1.0, 3, 9, 3]]).expand(64, 4), top_k=1, top_p=0.1) == [2]
    assert support(torch.tensor([[5.0, 5, 1, 0]]).expand(64, 4), top_k=3, top_p=0.9) == [0, 1]


@pytest.mark.parametrize("V", [5, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choose_never_draws_what_has_no_probability(V, dtype):
    """At the ends of (0, 1), and beyond: the product u * total may round up to the total, which is past the last
    token."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(1, V, generator=rng, dtype=dtype)
    logits[0, [0, 1, V - 1]] = -torch.inf
    u = torch.tensor([0.0, 2.0**-53, 1e-300, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    ids, logps = choose(logits.expand(5, V), u)
    assert ids.tolist() == [2, 2, 2, V - 2, V - 2] and logps.isfinite().all()
    alone = torch.full((5, V), -torch.inf, dtype=dtype)
    alone[:, 3] = 1.0
    ids, logps = choose(alone, u, temperature=0.1, top_p=0.5, top_k=2)
    assert ids.tolist() == [3] * 5 and logps.tolist() == [0.0] * 5


def test_choose_is_exact_over_a_whole_vocabulary():
    """V equal tokens: u falls into token floor(u V). A sum of 151,936 float32 numbers would be off by several
    tokens."""
    V, u = 151_936, torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, logps = choose(torch.zeros(1, V).expand(64, V), u)
    assert ids.tolist() == (u * V).long().tolist() and torch.allclose(logps, torch.tensor(-math.log(V)))


# ---- random numbers

GOLDEN, M64 = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix(x):
    """One output of splitmix64 from the state before it, on Python's integers."""
    x = (x + GOLDEN) & M64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & M64
    return x ^ x >> 31


def unmix(y):
    """The state before an output: splitmix is a bijection."""
    def unshift(x, n):
        out = x
        for _ in range(64 // n):
            out = x ^ out >> n
        return out
    y = (unshift(y, 31) * pow(0x94D049BB133111EB, -1, 2**64)) & M64
    y = (unshift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64)) & M64
    return (unshift(y, 30) - GOLDEN) & M64


def signed(x):
    return x - 2**64 if x >> 63 else x


def test_uniforms_are_splitmix64_bit_for_bit():
    assert splitmix(0) == 0xE220A8397B1DCDAF, "the published first output of seed 0"
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**63, (3, 500))
    keys[1:, :400] %= 50
    for seed in (0, 1, 2**63 - 1, -1):
        got = uniforms(seed, *torch.tensor(keys))
        for u, (prompt, index, token) in zip(got.tolist(), keys.T.tolist()):
            x = splitmix(splitmix(splitmix(seed & M64) ^ prompt) ^ index) ^ token
            assert u == ((splitmix(x) >> 12) + 0.5) / 2**52


def test_uniforms_stay_inside_0_and_1():
    """The token index whose hash is all ones, found by running splitmix64 backwards: with 53 bits it gave 1.0, no
    token."""
    before = splitmix(splitmix(splitmix(9) ^ 8) ^ 7)
    assert splitmix(unmix(before)) == before
    for output, u in ((M64, 1 - 2.0**-53), (0, 2.0**-53)):
        token = signed(unmix(output) ^ before)
        assert uniforms(9, *torch.tensor([[8], [7], [token]])).tolist() == [u]


@pytest.mark.parametrize("moving", range(4), ids=["seed", "prompt", "sample", "token"])
def test_uniforms_are_uniform_and_neighbours_are_independent(moving):
    """Chi-square in 256 equal cells, and of neighbouring counters in 16 x 16 cells."""
    n = 20_001 if moving else 4_001
    keys = [torch.full((n,), k) for k in (123456789, 2, 30)]
    if moving == 0:
        u = torch.cat([uniforms(seed, *(k[:1] for k in keys)) for seed in range(n)]).numpy()
    else:
        keys[moving - 1] = torch.arange(n)
        u = uniforms(5, *keys).numpy()
    assert_follows(np.bincount((u * 256).astype(int), minlength=256), np.full(256, 1 / 256))
    cells = (u[:-1] * 16).astype(int) * 16 + (u[1:] * 16).astype(int)
    assert_follows(np.bincount(cells, minlength=256), np.full(256, 1 / 256))


# ---- what a rollout depends on


def test_a_rollout_depends_on_seed_prompt_and_index_alone():
    model = tiny(QWEN3)

    def run(prompts, n, n_slots=64, seed=0, **options):
        groups = Sampler(model, n_slots, **options).generate(prompts, n, 30, temperature=2.0, stop={17}, seed=seed)
        return {tuple(prompt): [(r.ids, r.reason) for r in group] for prompt, group in zip(prompts, groups)}
    base = run(PROMPTS, 5)
    assert run(PROMPTS[::-1], 5) == base
    assert run(PROMPTS, 5, n_slots=5) == base and run(PROMPTS, 5, n_slots=13, prefill_tokens=1) == base
    assert run(PROMPTS, 5, n_slots=1) == base  # n above n_slots: one group at a time
    assert run(PROMPTS + PROMPTS, 5) == base  # equal prompts, equal rollouts
    assert {p: group[:2] for p, group in base.items()} == run(PROMPTS, 2)
    for prompt in PROMPTS[:3]:
        assert run([prompt], 5)[tuple(prompt)] == base[tuple(prompt)]
    other = run(PROMPTS, 5, seed=1)
    assert all(other[p] != base[p] for p in base)
    assert all(len({tuple(ids) for ids, _ in group}) >= 4 for group in base.values()), "samples of a prompt differ"


def test_prompt_key_is_a_function_of_the_tokens():
    assert len({prompt_key(ids) for ids in PROMPTS + [[7] * 4, [7, 7], [3, 7]]}) == len(PROMPTS) + 3
    assert prompt_key([1, 2]) == prompt_key((1, 2)) and 0 <= prompt_key([1, 2]) < 2**63


# ---- work, ends, tokens


def test_a_prompt_is_computed_once_for_its_rollouts():
    """Counted at Model.run: with one new token there is nothing but prefill, in packs of at most prefill_tokens."""
    model, sizes = tiny(QWEN2), []
    run = model.run
    model.run = lambda tokens_n, *rest: (sizes.append(len(tokens_n)), run(tokens_n, *rest))[1]
    sampler = Sampler(model, n_slots=64, prefill_tokens=20)
    groups = sampler.generate(PROMPTS, 8, 1)
    assert [len(r.ids) for group in groups for r in group] == [1] * 8 * len(PROMPTS)
    assert sum(sizes) == sum(map(len, PROMPTS)) == sampler.n_prefilled and sampler.n_decoded == 0
    assert max(sizes) == 40 and sorted(sizes)[-2] <= 20  # the prompt of 40 has a pack of its own
    sizes.clear()
    sampler.generate(PROMPTS[:2], 8, 5)
    assert sizes == [4] + [16] * 4 and sampler.n_decoded == 64  # both prompts, then 16 slots at a time
    stats = sampler.stats()
    sampler.reset_stats()
    assert set(stats) == {"prefill_s", "decode_s", "prefill_tok_s", "decode_tok_s"} and min(stats.values()) > 0
    assert sampler.n_prefilled == sampler.n_decoded == 0


def test_ends():
    """A stop token ends a rollout and is part of it, also as the first token and as the last that was allowed."""
    model = tiny(QWEN2)
    free, = Sampler(model).generate([[5, 6]], 6, 12, seed=2)
    assert all(r.reason == "length" and not r.finished and len(r.ids) == len(r.logps) == 12 for r in free)
    for place in (0, 11):
        stop = {free[0].ids[place]}
        stopped, = Sampler(model).generate([[5, 6]], 6, 12, stop=stop, seed=2)
        for long, r in zip(free, stopped):
            n = next((i + 1 for i, x in enumerate(long.ids) if x in stop), 12)
            assert r.ids == long.ids[:n] and r.finished == (r.ids[-1] in stop) == (r.reason == "stop")
            np.testing.assert_allclose(r.logps, long.logps[:n], atol=1e-5)
    everything = Sampler(model, n_slots=2).generate(PROMPTS, 2, 12, stop=range(61))
    assert all(len(r.ids) == 1 and r.finished for group in everything for r in group)
    outside, = Sampler(model).generate([[5, 6]], 6, 12, stop={61, 10**6, -1}, seed=2)
    assert [r.ids for r in outside] == [r.ids for r in free]
    assert Sampler(model).generate([], 3, 5) == []


def test_rows_past_the_vocabulary_are_never_sampled():
    model = tiny(QWEN2)
    assert max(max(r.ids) for r in Sampler(model).generate([[1, 2]], 200, 5)[0]) >= 20
    model.n_vocab = 20
    rollouts, = Sampler(model).generate([[1, 2]], 200, 5)
    assert max(max(r.ids) for r in rollouts) == 19
    row = model.logits([1, 2])[-1].log_softmax(0)
    np.testing.assert_allclose([r.logps[0] for r in rollouts], [row[r.ids[0]] for r in rollouts], atol=1e-5)
    assert len(row) == 20


def test_on_token_sees_every_token_in_order_and_groups_come_when_they_are_done():
    model, heard = tiny(QWEN2), {}
    order = []

    def hear(i, k, token):
        heard.setdefault((i, k), []).append(token)
    for i, rollouts in Sampler(model, n_slots=4).stream(PROMPTS, 2, 15, stop={17, 18, 19}, on_token=hear):
        order.append(i)
        assert [heard[i, k] for k in range(2)] == [r.ids for r in rollouts]  # whole when it comes
        beyond = range(max(order) + 3, len(PROMPTS))
        assert not any((j, 0) in heard for j in beyond), "admitted more than the slots hold"
    assert sorted(order) == list(range(len(PROMPTS))) and len(heard) == 2 * len(PROMPTS)


# ---- judging: a folder with a tiny model, and a file of judgements


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Qwen3 with the toy tokenizer and more embedding rows than tokens, as published models have."""
    path = tmp_path_factory.mktemp("judge")
    n_vocab = toy.write_tokenizer(path)
    spec = json.loads((path / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]  # two tokens that no prompt has become whole verdicts: random text holds some
    vocabulary |= {"[[A]]": vocabulary.pop("\u0120looks"), "[[B]]": vocabulary.pop("\u0120better.")}
    (path / "tokenizer.json").write_text(json.dumps(spec))
    raw = toy.MODEL | dict(vocab_size=n_vocab + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           head_dim=8)
    tiny(raw).save_pretrained(path)
    (path / "prompt.txt").write_text(prompt_path("toy").read_text())
    return path


@pytest.fixture
def pairs():
    """Eight pairs; one id holds the characters at which str.splitlines would split a JSON line."""
    rows = [{k: v for k, v in row.items() if k != "judgement"} for row in toy.make("heldout", 8, 0)]
    rows[2] |= {"id": "x\u2028y\u0085\r\nz", "source": "u\u2029"}
    return [Pair(**row) for row in rows]


def config(folder, **options):
    standard = dict(max_new_tokens=24, votes=3, temperature=1.0, n_slots=6, threads=1)
    return Config(model=str(folder), **standard | options)


SECONDS = re.compile(r'"seconds": [0-9.]+')


def without_seconds(path):
    text = Path(path).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(SECONDS.sub('"seconds": 0', line)) for line in text[:-1].split("\n")]


def test_judgements_hold_what_scoring_needs(folder, pairs):
    """Each field from the rollouts and the pair; the verdict is the majority of the votes'."""
    judge = sample.load_judge(config(folder, votes=9, max_new_tokens=100, temperature=2.0))
    assert judge.sampler.model.n_vocab == judge.tokenizer.n_vocab < judge.sampler.model.config.vocab_size
    records = dict(judge.judge(pairs))
    assert sorted(records) == list(range(8))
    prompts = [judge.tokenizer.chat(render(judge.prompt, pair)) for pair in pairs]
    groups = Sampler(judge.sampler.model).generate(prompts, 9, 100, 2.0, stop=judge.tokenizer.stop_ids)
    verdicts = Counter()
    for i, pair in enumerate(pairs):
        r, texts = records[i], [judge.tokenizer.decode(rollout.ids) for rollout in groups[i]]
        assert set(r) == {"id", "prompt_hash", "n_prompt_tokens", "votes", "verdict", "winner", "source", "domain",
                          "subset", "item", "seconds"}
        assert all(r[name] == getattr(pair, name) for name in ("id", "winner", "source", "domain", "subset", "item"))
        assert r["prompt_hash"] == f"{prompt_key(prompts[i]):016x}" and r["n_prompt_tokens"] == len(prompts[i])
        assert r["votes"] == [{"text": text, "n_tokens": len(rollout.ids), "finished": rollout.finished,
                               "verdict": benchmark_verdict(text), "seconds": vote["seconds"]}
                              for text, rollout, vote in zip(texts, groups[i], r["votes"])]
        assert 0 < r["seconds"] == max(vote["seconds"] for vote in r["votes"])
        assert r["verdict"] == majority(benchmark_verdict(text) for text in texts)
        verdicts.update(vote["verdict"] for vote in r["votes"])
    assert min(verdicts["a"], verdicts["b"], verdicts[None]) > 0, f"the case has lost its variety: {verdicts}"


def test_an_interrupted_file_goes_on_to_the_same_bytes(folder, pairs, tmp_path, monkeypatch):
    """Interrupted twice: at the fourth record, and within a line, in the middle of a character."""
    source, out = tmp_path / "pairs.jsonl", tmp_path / "deep" / "out.jsonl"
    write_pairs(source, pairs)
    cfg = config(folder, pairs=str(source), out=str(tmp_path / "whole.jsonl"))
    main(cfg)
    whole = without_seconds(cfg.out)
    assert [r["id"] for r in whole] == [pair.id for pair in pairs] and not Path(cfg.out + ".partial").exists()

    add = JudgementFile.add

    def add_three(self, record):
        if len(self.done) == 3:
            raise KeyboardInterrupt
        add(self, record)
    monkeypatch.setattr(JudgementFile, "add", add_three)
    cfg = replace(cfg, out=str(out))
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    monkeypatch.undo()
    partial = Path(cfg.out + ".partial")
    assert partial.read_bytes().count(b"\n") == 4 and not out.exists()
    with open(partial, "ab") as f:
        f.write(b'{"id": "\xe2\x80')

    prefilled, judge_it = [], Judge.judge
    monkeypatch.setattr(Judge, "judge",
                        lambda self, todo, **rest: (prefilled.extend(todo), judge_it(self, todo, **rest))[1])
    main(cfg)
    assert len(prefilled) == 5, "judged again what was done"
    assert without_seconds(out) == whole and not partial.exists()
    lines = [out.read_text(encoding="utf-8").split("\n"),
             (tmp_path / "whole.jsonl").read_text(encoding="utf-8").split("\n")]
    assert [SECONDS.sub("", x) for x in lines[0]] == [SECONDS.sub("", x) for x in lines[1]]
    with pytest.raises(ValueError, match="already there and whole"):
        main(cfg)


def test_everything_done_but_not_renamed(folder, pairs, tmp_path):
    """Interrupted after the last record: nothing is left to sample, the file is put in order and renamed."""
    judge, out = sample.load_judge(config(folder)), tmp_path / "out.jsonl"
    encoded = sample.encode_all(judge, pairs[:4])
    first = judge_file(judge, encoded, out, {"seed": 0})
    (tmp_path / "out.jsonl.partial").write_text("".join(json.dumps(x) + "\n" for x in [{"seed": 0}] + first[::-1]))
    out.unlink()
    judge.sampler.reset_stats()
    assert judge_file(judge, encoded, out, {"seed": 0}) == first and judge.sampler.n_prefilled == 0
    assert [r["id"] for r in without_seconds(out)] == [pair.id for pair in pairs[:4]]


def test_a_prompt_beyond_the_context_is_named_or_skipped_with_its_item(folder, pairs, capsys):
    """The toy reads 1024 tokens. The pairs of a best-of-n item go with the one that is too long."""
    judge = sample.load_judge(config(folder))
    parts = [replace(pair, item="one" if i in (1, 3) else "") for i, pair in enumerate(pairs[:5])]
    parts[3] = replace(parts[3], answer_a="01234 " * 400)
    with pytest.raises(ValueError, match=f"pair {parts[3].id}: its prompt has [0-9]+ tokens, the model can read 1024"):
        sample.encode_all(judge, parts)
    kept = sample.encode_all(judge, parts, skip_bad=True)
    assert [pair.id for pair, _ in kept] == [parts[i].id for i in (0, 2, 4)]
    assert [list(ids) for _, ids in kept] == [judge.encode(parts[i]) for i in (0, 2, 4)]
    assert "skipped 2 of 5 pairs" in capsys.readouterr().err


def test_judgements_of_other_pairs_or_texts_are_not_dropped(folder, pairs, tmp_path):
    judge, out = sample.load_judge(config(folder)), tmp_path / "out.jsonl"
    first = judge_file(judge, sample.encode_all(judge, pairs[:3]), out, {"seed": 0})
    out.rename(tmp_path / "whole")
    begun = [json.dumps(x) + "\n" for x in [{"seed": 0}] + first]
    partial = tmp_path / "out.jsonl.partial"
    for now in (pairs[:2], [*pairs[:2], replace(pairs[2], answer_a=pairs[2].answer_b, answer_b=pairs[2].answer_a)]):
        partial.write_text("".join(begun))
        with pytest.raises(ValueError, match=f"partial: holds 1 judgements of pairs .* such as {pairs[2].id}: give"):
            judge_file(judge, sample.encode_all(judge, now), out, {"seed": 0})
        assert partial.read_text() == "".join(begun)


def test_other_settings_are_refused_by_name(folder, pairs, tmp_path):
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    write_pairs(source, pairs)
    cfg = config(folder, pairs=str(source), out=str(out))
    judge = sample.load_judge(cfg)
    settings = sample.judge_settings(cfg, judge) | {"pairs": str(source)}
    JudgementFile(out, settings)
    for name, value in dict(votes=4, temperature=0.9, top_p=0.5, top_k=2, max_new_tokens=25, seed=1,
                            dtype="bfloat16").items():
        changed = replace(cfg, **{name: value})
        with pytest.raises(ValueError) as e:
            JudgementFile(out, sample.judge_settings(changed, sample.load_judge(changed)) | {"pairs": str(source)})
        assert f"{name}=" in str(e.value) and "\n" not in str(e.value)
    fewer = {k: v for k, v in settings.items() if k != "pairs"}
    for changed in (settings | {"pairs": "other.jsonl"}, settings | {"new": 1}, fewer):
        with pytest.raises(ValueError, match="begun with (pairs|new)="):
            JudgementFile(out, changed)
    JudgementFile(out, settings)  # the refusals have left it alone
    partial = tmp_path / "out.jsonl.partial"
    for line in (b"nonsense", b"[]", b'{"id": "x"}', b"\xff"):
        partial.write_bytes(json.dumps(settings).encode() + b"\n" + line + b"\n")
        with pytest.raises(ValueError, match=r"out\.jsonl\.partial:2: is no judgement; delete this line"):
            JudgementFile(out, settings)
    partial.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial: does not begin with a judging run's settings"):
        JudgementFile(out, settings)
    partial.write_bytes(json.dumps(settings).encode()[:20])  # not even its first line is whole: begin anew
    assert JudgementFile(out, settings).done == {} and json.loads(partial.read_text()) == settings


def test_rendered_pairs_and_limit(folder, tmp_path, capsys):
    """RM-R1's rows bring their own messages, and those are what the judge is shown."""
    source, messages = tmp_path / "rows.jsonl", [{"role": "system", "content": "Judge."},
                                                 {"role": "user", "content": "A or B?"}]
    source.write_text("".join(json.dumps({"context_messages": messages, "winner": f"model_{x}"}) + "\n" for x in "aba"))
    main(config(folder, pairs=str(source), out=str(tmp_path / "out.jsonl"), limit=2))
    records = without_seconds(tmp_path / "out.jsonl")
    assert [r["winner"] for r in records] == ["a", "b"] and records[0]["votes"] == records[1]["votes"]
    assert {r["prompt_hash"] for r in records} == {f"{prompt_key(Tokenizer(folder).chat(messages)):016x}"}
    assert capsys.readouterr().out.startswith("2 pairs judged")


# ---- the command line


@pytest.mark.parametrize("argv, word", [
    (["--votes", "0"], "--votes"), (["--votes", "2"], "--temperature"), (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"), (["--top-p", "0"], "--top-p"), (["--top-p", "1.1"], "--top-p"),
    (["--top-k", "-1"], "--top-k"), (["--max-new-tokens", "0"], "--max-new-tokens"), (["--n-slots", "0"], "--n-slots"),
    (["--dtype", "float16"], "--dtype"), (["--device", "tpu"], "--device"), (["--limit", "-1"], "--limit"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2**63)], "--seed"), (["--seed", "x"], "--seed"),
    (["--pairs", "x.jsonl"], "--out"), (["--out", "x.jsonl"], "--pairs"),
    (["--question", "q", "--question-file", "f"], "--question"),
    (["--answer-b", "q", "--answer-b-file", "f"], "--answer-b"),
    (["--pairs", "x", "--out", "y", "--answer-a", "z"], "--answer-a"), (["--quest", "q"], "--quest"),
], ids=" ".join)
def test_wrong_options_end_in_one_line(argv, word, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, argv=argv)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and word in error and error.count("\n") == 1


def test_a_pair_from_files_is_the_pair_from_flags(folder, tmp_path):
    """A final newline and a byte order mark are the editor's, not the answer's; what is not there or not UTF-8 is
    named."""
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfsort 76915\n")
    (tmp_path / "a.txt").write_bytes(b"15679")
    (tmp_path / "b.txt").write_bytes(b"12568\n\n")
    files = {f"{name}_file": str(tmp_path / f"{x}.txt")
             for name, x in (("question", "q"), ("answer_a", "a"), ("answer_b", "b"))}
    pair = sample.pair_from_options(config(folder, **files))
    assert pair == sample.pair_from_options(config(folder, question="sort 76915", answer_a="15679", answer_b="12568\n"))
    (tmp_path / "a.txt").write_bytes(b"1567\xff")
    with pytest.raises(ValueError, match=r"a\.txt: byte 4 is not UTF-8"):
        sample.pair_from_options(config(folder, **files))
    with pytest.raises(FileNotFoundError, match="none.txt"):
        sample.pair_from_options(config(folder, **files | {"answer_a_file": str(tmp_path / "none.txt")}))


def test_a_judgement_is_streamed_as_it_is_written(folder, monkeypatch):
    """Whenever something is printed, all whole characters of the tokens drawn so far are out, and flushed."""
    drawn, printed, tokenizer = [], [], Tokenizer(folder)
    draw = sample.choose

    def choose_and_note(*args):
        ids, logps = draw(*args)
        drawn.append(int(ids[0]))
        return ids, logps

    def print_and_note(text, end="\n", flush=False):
        printed.append((len(drawn), text + end, flush))
    monkeypatch.setattr(sample, "choose", choose_and_note)
    monkeypatch.setattr(sample, "print", print_and_note, raising=False)
    main(config(folder, votes=1, temperature=1.0, max_new_tokens=40, question="sort 31", answer_a="13", answer_b="31",
                seed=4))
    text = "".join(text for n, text, _ in printed[:len(drawn)])
    flushed = [n for n, _, flush in printed[:len(drawn)] if flush]
    assert flushed == list(range(1, len(drawn) + 1)), "one flushed print per token"
    assert tokenizer.decode(drawn).startswith(text) and printed[-1][1].startswith("verdict: ")
    assert "".join(text for _, text, _ in printed[:-1]) == tokenizer.decode(drawn) + "\n"


def test_a_folder_whose_parts_do_not_fit(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ValueError, match="no prompt.txt, so --prompt must say"):
        sample.load_judge(config(tmp_path))
    sample.load_judge(config(tmp_path, prompt="direct"))
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    tiny(QWEN2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ tokens, but config.json's vocab_size is 61"):
        sample.load_judge(config(tmp_path, prompt="direct"))


def command(*args):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), "--threads", "1", *map(str, args)],
                          cwd=tempfile.gettempdir(),
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_command_line_judges_a_pair(folder):
    """Oracle: the same judge in this process. From another folder than the repository."""
    done = command("--model", folder, "--question", "sort 76915", "--answer-a", "15679", "--answer-b", "12568",
                   "--votes", 5, "--temperature", 1, "--max-new-tokens", 60)
    judge = sample.load_judge(config(folder, votes=5, max_new_tokens=60))
    pair = Pair("pair", [{"role": "user", "content": "sort 76915"}], "15679", "12568", None, "", "")
    (_, record), = judge.judge([pair])
    assert done.returncode == 0 and done.stderr == ""
    verdict, text = record["verdict"], record["votes"][0]["text"]
    assert done.stdout.startswith(text + "\nverdict: " + (verdict.upper() if verdict else "none") + " (A ")
    assert f"{sum(v['n_tokens'] for v in record['votes'])} tokens in " in done.stdout


def test_command_line_mistakes_end_in_one_line(tmp_path):
    done = command("--model", tmp_path / "none", "--question", "q", "--answer-a", "a", "--answer-b", "b")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}: ") and done.stderr.count("\n") == 1


# ---- a real geometry


@pytest.mark.skipif(not (SHARED / "qwen2.5-tokenizer").is_dir() or not (SHARED / "benchmarks" / "rmb").is_dir(),
                    reason=f"no qwen2.5-tokenizer and RMB records at {SHARED}: set RM_SHARED")
def test_qwen_05b_geometry_judges_rmb_from_the_command_line():
    """Random weights in Qwen2.5-0.5B's shape with its tokenizer, bfloat16; prompts of about 950 tokens."""
    raw = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=151_936, hidden_size=896,
               intermediate_size=4864,
               num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
               max_position_embeddings=32_768, tie_word_embeddings=True)
    judged = sorted(read_pairs(SHARED / "benchmarks" / "rmb"), key=lambda pair: len(json.dumps(to_json(pair))))[:4]
    with tempfile.TemporaryDirectory() as path:  # 1 GB: not among the folders that pytest keeps
        path = Path(path)
        with torch.device("meta"):
            model = Model(ModelConfig.from_dict(raw))
        model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
        rng = torch.Generator().manual_seed(0)
        for x in model.parameters():  # matrices and biases of variance 0.02^2, uniform for speed; norms 1
            x.uniform_(-0.035, 0.035, generator=rng)
        for name, x in model.named_parameters():
            if "norm" in name:
                x.fill_(1)
        model.save_pretrained(path / "model")
        Tokenizer(SHARED / "qwen2.5-tokenizer").save(path / "model")
        del model
        write_pairs(path / "pairs.jsonl", judged)
        done = command("--model", path / "model", "--prompt", "instruct", "--pairs", path / "pairs.jsonl",
                       "--out", path / "out.jsonl", "--max-new-tokens", 8, "--dtype", "bfloat16")
        assert done.returncode == 0, done.stderr
        records = without_seconds(path / "out.jsonl")
    tokenizer, prompt = Tokenizer(SHARED / "qwen2.5-tokenizer"), load_prompt("instruct")
    assert len(records) == 4
    for pair, r in zip(judged, records):
        ids = tokenizer.chat(render(prompt, pair))
        assert (r["id"], r["winner"], r["source"]) == (pair.id, pair.winner, "rmb")
        assert r["prompt_hash"] == f"{prompt_key(ids):016x}" and r["n_prompt_tokens"] == len(ids) > 900
        vote, = r["votes"]
        assert vote["n_tokens"] == 8 and not vote["finished"] or vote["finished"] and vote["n_tokens"] <= 8
        assert r["verdict"] == vote["verdict"] == benchmark_verdict(vote["text"])
