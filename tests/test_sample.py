"""sample.py. Oracles: the uncached model on the growing sequence, token by token; the trainer's own forest forward;
exact probabilities, by chi-square tests whose seeds are fixed and whose false-alarm probability is 1e-5; splitmix64 on
Python's integers; top-k and top-p in a few lines of numpy."""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from options import parse_config  # noqa: E402
from data import toy  # noqa: E402
from kernels import INTERPRETED  # noqa: E402
from model import Model, ModelConfig, pack  # noqa: E402
from prompt import prompt_path  # noqa: E402
from batch import Batch  # noqa: E402
from draw import Sampling, choose, prompt_key, uniforms  # noqa: E402
from sample import Config, Sampler, load_model, read_texts  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SHARED = (ROOT / os.environ.get("RM_SHARED", "../shared")).resolve()

QWEN2 = dict(model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1000.0,
             tie_word_embeddings=True)
QWEN3 = QWEN2 | dict(model_type="qwen3", num_attention_heads=6, head_dim=8, tie_word_embeddings=False)
ONE_LAYER = QWEN2 | dict(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1)
LARGE = dict(vocab_size=4200, hidden_size=64, intermediate_size=4200)  # weights above kernels.logp.ONEDNN_ELEMENTS
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


def make_folder(path):
    """A random Qwen3 with the toy tokenizer and more embedding rows than tokens, as published models have."""
    n_vocab = toy.write_tokenizer(path)
    spec = json.loads((path / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]  # two tokens that no prompt has become whole verdicts: random text holds some
    vocabulary |= {"[[A]]": vocabulary.pop("\u0120total"), "[[B]]": vocabulary.pop("\u0120Overall")}
    (path / "tokenizer.json").write_text(json.dumps(spec))
    raw = toy.MODEL | dict(vocab_size=n_vocab + 7, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           head_dim=8)
    tiny(raw).save_pretrained(path)
    (path / "prompt.txt").write_text(prompt_path("toy").read_text())
    return path


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
    """look(batch) before every call of these methods of Batch."""
    for name in methods:
        def call(self, *args, inner=getattr(Batch, name)):
            look(self)
            return inner(self, *args)
        monkeypatch.setattr(Batch, name, call)


# ---- the cached sampler against the uncached model


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["Qwen2", "Qwen3"])
def test_greedy_equals_the_uncached_model_token_by_token(raw, monkeypatch):
    """Slots are refilled (3 for 8 prompts), rollouts take a second page, and the last ones run alone."""
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

    before_each(monkeypatch, "step", look=lambda batch: sizes.append(
        (len(batch.slots), max(len(slot.pages) for slot in batch.slots))))
    got = Sampler(model, n_slots=3, prefill_tokens=16).generate(PROMPTS, Sampling(1, n_new, temperature=0, stop=stop))
    for prompt, ids, (rollout,) in zip(PROMPTS, expected, got, strict=True):
        assert rollout.ids == ids
        assert (rollout.reason, rollout.finished) == (("stop", True) if ids[-1] in stop else ("length", False))
        logp = model.logits(prompt + ids)[len(prompt) - 1:-1].log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        np.testing.assert_allclose(rollout.logps, logp, atol=1e-10)
    assert sizes[-1][0] < 3 and {T for _, T in sizes} == {1, 2}, f"no lone rollout or no growth: {sizes}"


@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["Qwen2", "Qwen3"])
@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7), dict(top_k=4), dict(top_p=0.6),
                                     dict(temperature=1.3, top_p=0.9, top_k=7)], ids=str)
def test_logps_are_those_of_the_sampling_distribution(raw, options):
    """Oracle: the uncached model's logits, tempered, cut and renormalized by `exact`."""
    model = tiny(raw, torch.float64)
    done = Sampler(model, n_slots=6).generate(PROMPTS, Sampling(2, 20, **options, stop={17}, seed=3))
    for prompt, rollouts in zip(PROMPTS, done):
        for r in rollouts:
            rows = model.logits(prompt + r.ids)[len(prompt) - 1:-1].double().numpy()
            p = [exact(row, **options)[token] for row, token in zip(rows, r.ids, strict=True)]
            np.testing.assert_allclose(r.logps, np.log(p), atol=1e-10)


@pytest.mark.parametrize("raw", [QWEN2, QWEN3, QWEN2 | LARGE], ids=["Qwen2", "Qwen3", "Qwen2-large"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree(raw, temperature):
    """DESIGN: within 1e-4 in float32, of the same tokens; the trainer sees one forest, the sampler a cache, refilled
    slots, and, of large weights, other products (kernels.logp.linear_ref)."""
    model, n_new = tiny(raw), 80
    groups = Sampler(model, n_slots=8).generate(PROMPTS, Sampling(4, n_new, temperature=temperature, stop={17}, seed=5))
    forest = pack([(prompt, [r.ids for r in rollouts]) for prompt, rollouts in zip(PROMPTS, groups)])
    scored = [torch.arange(start, start + length) for start, length, parent in forest.segments_s3.tolist()
              if parent >= 0]
    logp, _ = model(forest, torch.cat(scored), temperature)
    sampled = torch.tensor([x for rollouts in groups for r in rollouts for x in r.logps])
    worst = (logp - sampled).abs().max().item()
    print(f"largest difference {worst:.1e} over {len(sampled)} tokens")
    assert worst < 1e-4


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on the CPU with TRITON_INTERPRET=1 only")
@pytest.mark.parametrize("raw, temperature", [
    pytest.param(QWEN2, 0.6, id="Qwen2"), pytest.param(QWEN3, 0.0, id="Qwen3 greedy", marks=pytest.mark.long)])
def test_invariant_sampler_has_the_trainers_bits(raw, temperature, mended_interpreter, monkeypatch):
    """Weights fused for sampling, groups in parts, some rollouts put back and computed again."""
    model, steps = tiny(raw), []
    model.impl = "invariant"
    sampling = Sampling(2, 12, temperature=temperature, stop={17, 18}, seed=5)

    def put_back(batch):
        steps.append(len(batch.slots))
        if len(steps) == 4:
            for _ in range(2):
                batch.put_back(max(batch.slots, key=lambda slot: (slot.prompt, slot.sample)))
    before_each(monkeypatch, "step", look=put_back)
    sampler = Sampler(model.fuse(), n_slots=5, page_size=16)
    groups = sampler.generate(PROMPTS[:4], sampling)
    assert sampler.n_put_back == 2
    model = tiny(raw)
    model.impl = "invariant"
    forest = pack([(prompt, [r.ids for r in rollouts]) for prompt, rollouts in zip(PROMPTS, groups)])
    scored = [torch.arange(start, start + length) for start, length, parent in forest.segments_s3.tolist()
              if parent >= 0]
    logp, _ = model(forest, torch.cat(scored), temperature or 1.0)
    assert logp.tolist() == [x for rollouts in groups for r in rollouts for x in r.logps]


# ---- the distribution


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=3, top_p=0.8)], ids=str)
def test_tokens_follow_the_exact_probabilities(options):
    """First tokens, and first two jointly, of 20,000 rollouts of one prompt."""
    model, prompt, n = tiny(ONE_LAYER), [3, 1, 4, 1, 5], 20_000
    rollouts, = Sampler(model).generate([prompt], Sampling(n, 2, **options, seed=11))
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


def test_choose_at_the_borders_of_its_chunks():
    """Points at, and one rounding beside, the sums of all tokens before a chunk, whose first token is impossible: where
    the sums span many magnitudes, what is left of the point within the chunk may round below 0."""
    logits = 12 * torch.randn(400, 2048, generator=torch.Generator().manual_seed(0))
    logits[:, ::512] = -torch.inf
    weights = ((logits - logits.amax(1, keepdim=True)) * math.log2(math.e)).exp2()
    sums = weights.view(400, 4, 512).sum(2).double().cumsum(1)
    for chunk in range(3):
        border = sums[:, chunk] / sums[:, -1]
        for u in (border, *(border.nextafter(torch.tensor(x).double()) for x in (0.0, 1.0))):
            _, logps = choose(logits, u)
            assert logps.isfinite().all()


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
        sampling = Sampling(n, 30, temperature=2.0, stop={17}, seed=seed)
        groups = Sampler(model, n_slots, **options).generate(prompts, sampling)
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
    groups = sampler.generate(PROMPTS, Sampling(8, 1))
    assert [len(r.ids) for group in groups for r in group] == [1] * 8 * len(PROMPTS)
    assert sum(sizes) == sum(map(len, PROMPTS)) == sampler.n_prefilled and sampler.n_decoded == 0
    assert max(sizes) == 40 and sorted(sizes)[-2] <= 20  # the prompt of 40 has a pack of its own
    sizes.clear()
    sampler.generate(PROMPTS[:2], Sampling(8, 5))
    assert sizes == [4] + [16] * 4 and sampler.n_decoded == 64  # both prompts, then 16 slots at a time
    stats = sampler.stats()
    sampler.reset_stats()
    assert set(stats) == {"prefill_s", "decode_s", "prefill_tok_s", "decode_tok_s"} and min(stats.values()) > 0
    assert sampler.n_prefilled == sampler.n_decoded == 0


def test_ends():
    """A stop token ends a rollout and is part of it, also as the first token and as the last that was allowed."""
    model = tiny(QWEN2)
    free, = Sampler(model).generate([[5, 6]], Sampling(6, 12, seed=2))
    assert all(r.reason == "length" and not r.finished and len(r.ids) == len(r.logps) == 12 for r in free)
    for place in (0, 11):
        stop = {free[0].ids[place]}
        stopped, = Sampler(model).generate([[5, 6]], Sampling(6, 12, stop=stop, seed=2))
        for long, r in zip(free, stopped):
            n = next((i + 1 for i, x in enumerate(long.ids) if x in stop), 12)
            assert r.ids == long.ids[:n] and r.finished == (r.ids[-1] in stop) == (r.reason == "stop")
            np.testing.assert_allclose(r.logps, long.logps[:n], atol=1e-5)
    everything = Sampler(model, n_slots=2).generate(PROMPTS, Sampling(2, 12, stop=range(61)))
    assert all(len(r.ids) == 1 and r.finished for group in everything for r in group)
    outside, = Sampler(model).generate([[5, 6]], Sampling(6, 12, stop={61, 10**6, -1}, seed=2))
    assert [r.ids for r in outside] == [r.ids for r in free]
    assert Sampler(model).generate([], Sampling(3, 5)) == []


def test_rows_past_the_vocabulary_are_never_sampled():
    model = tiny(QWEN2)
    assert max(max(r.ids) for r in Sampler(model).generate([[1, 2]], Sampling(200, 5))[0]) >= 20
    model.n_vocab = 20
    rollouts, = Sampler(model).generate([[1, 2]], Sampling(200, 5))
    assert max(max(r.ids) for r in rollouts) == 19
    row = model.logits([1, 2])[-1].log_softmax(0)
    np.testing.assert_allclose([r.logps[0] for r in rollouts], [row[r.ids[0]] for r in rollouts], atol=1e-5)
    assert len(row) == 20


def test_a_padded_model_loaded_by_itself_draws_ids_that_exist(tmp_path):
    """Published models have more rows than their tokenizers have ids. Once those rows were drawn, too, by whoever did
    not know that model.n_vocab had to be set. Oracle: the tokenizer."""
    folder = make_folder(tmp_path)
    model, tokenizer = Model.from_pretrained(folder), Tokenizer(folder)
    assert model.n_vocab == tokenizer.n_vocab == model.config.vocab_size - 7
    rollouts, = Sampler(model).generate([[1, 2]], Sampling(100, 5))
    assert all(tokenizer.decode(r.ids, skip_control=False) for r in rollouts)
    both = load_model(str(folder), dtype="float32")
    torch.testing.assert_close(both[0].logits([1, 2]), model.logits([1, 2]), rtol=1e-4, atol=1e-4)  # its q, k, v fused
    assert both[1].n_vocab == tokenizer.n_vocab
    (folder / "tokenizer.json").unlink()
    assert Model.from_pretrained(folder).n_vocab == model.config.vocab_size


@pytest.mark.parametrize("prompts, said", [
    ("hello", "prompt 0 is 'h': give a list of prompts, each the list of its token ids"),
    ([1, 2], "prompt 0 is 1: give"),
    (["hello"], "prompt 0 is 'hello': give"), ([[1], []], "prompt 1 is []: give"), ([[1.0]], "prompt 0 is [1.0]: give"),
    ([[[1]]], "prompt 0 is [[1]]: give"), ([[1, 61]], "prompt 0 has the token id 61; the model's ids are 0 to 60"),
    ([[-1, 1]], "prompt 0 has the token id -1"), ([None], "prompt 0 is None: give"), (None, "prompts is None: give"),
    (5, "prompts is 5: give"),
])
def test_what_is_no_list_of_prompts_is_told_what_is_wanted(prompts, said):
    with pytest.raises(ValueError) as e:
        Sampler(tiny(QWEN2)).generate(prompts, Sampling(1, 5))
    assert said in str(e.value)


def test_prompts_may_be_any_lists_of_integers():
    sampler, how = Sampler(tiny(QWEN2)), Sampling(2, 5)
    kinds = [[5, 6], (5, 6), array("i", [5, 6]), np.array([5, 6]), torch.tensor([5, 6])]
    ids = [[r.ids for r in sampler.generate([prompt], how)[0]] for prompt in kinds]
    assert ids == ids[:1] * len(kinds)


@pytest.mark.parametrize("options", [{"n": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan},
                                     {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_a_sampling_that_draws_nothing_is_refused_by_name(options):
    (name, value), = options.items()
    with pytest.raises(ValueError, match=f"^Sampling: {name} is {value};"):
        Sampling(**options)


@pytest.mark.parametrize("how", [Sampling(2, 5), Sampling(1, 5, temperature=0.0), Sampling(2, 5, top_p=0.9),
                                 Sampling(2, 5, top_k=3)], ids=["sampled", "greedy", "top_p", "top_k"])
@pytest.mark.parametrize("name, value", [("model.norm.weight", math.nan), ("model.embed_tokens.weight", math.inf),
                                         ("model.layers.1.mlp.down_proj.weight", math.inf)])
def test_a_dead_model_is_refused_by_name(how, name, value, tmp_path):
    """Once it wrote "!!!!!", or ended in an index that was out of bounds."""
    folder = make_folder(tmp_path)
    model, _ = load_model(str(folder), dtype="float32")
    model.get_parameter(name).data.fill_(value)
    with pytest.raises(ValueError, match=f"^{folder}: its logits are not finite"):
        Sampler(model).generate([[1, 2]], how)


def test_a_model_whose_logits_are_all_equal_is_refused(tmp_path):
    """Weights of 1e30, as one step at such a learning rate leaves: a norm of them overflows, and everything becomes 0.
    It wrote "!!!!!", the first id."""
    folder = make_folder(tmp_path)
    model, _ = load_model(str(folder), dtype="float32")
    for x in model.parameters():
        x.data.fill_(1e30)
    assert model.logits([1, 2]).isfinite().all()
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"^{folder}: its logits are all equal: the weights are damaged"):
            Sampler(model).generate([[1, 2]], Sampling(2, 5, temperature=temperature))


def test_on_token_sees_every_token_in_order_and_groups_come_when_they_are_done():
    model, heard = tiny(QWEN2), {}
    order = []

    def hear(i, k, token):
        heard.setdefault((i, k), []).append(token)
    for i, rollouts in Sampler(model, n_slots=4).stream(PROMPTS, Sampling(2, 15, stop={17, 18, 19}), on_token=hear):
        order.append(i)
        assert [heard[i, k] for k in range(2)] == [r.ids for r in rollouts]  # whole when it comes
        beyond = range(max(order) + 3, len(PROMPTS))
        assert not any((j, 0) in heard for j in beyond), "admitted more than the slots hold"
    assert sorted(order) == list(range(len(PROMPTS))) and len(heard) == 2 * len(PROMPTS)


# ---- command line

def command(*args):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), "--threads", "1", *map(str, args)],
                          cwd=tempfile.gettempdir(), capture_output=True, text=True,
                          env=os.environ | {"TQDM_DISABLE": "1"})


def test_command_line_completes_texts(tmp_path):
    """Oracle: the same sampler in this process, on the same chat prompts."""
    folder = make_folder(tmp_path)
    model, tokenizer = load_model(folder)
    rows = [{"text": "sort 76915", "n": 7}, {"messages": [{"role": "user", "content": "step\u2028 31"}]}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                                          encoding="utf-8")
    done = command("--model", folder, "--texts", tmp_path / "texts.jsonl", "--out", tmp_path / "out.jsonl", "--n", 3,
                   "--max-new-tokens", 12, "--seed", 5)
    assert done.returncode == 0 and re.fullmatch(r"keys and values: room for .* slots\n", done.stderr), done.stderr
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in ("sort 76915", "step\u2028 31")]
    sampling = Sampling(3, 12, stop=tokenizer.stop_ids, seed=5)
    groups = Sampler(model).generate(prompts, sampling)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    for line, row, rollouts in zip(lines, rows, groups, strict=True):
        assert json.loads(line) == row | {"completions": [
            {"text": tokenizer.decode(r.ids), "n_tokens": len(r.ids), "finished": r.finished,
             "logp": pytest.approx(sum(r.logps), abs=1e-4)} for r in rollouts]}
    again = command("--model", folder, "--texts", tmp_path / "texts.jsonl", "--out", tmp_path / "out.jsonl")
    assert again.returncode == 2 and "out.jsonl: is already there" in again.stderr
    one = command("--model", folder, "--text", "sort 76915", "--n", 3, "--max-new-tokens", 12, "--seed", 5)
    assert one.stdout == "\n----\n".join(tokenizer.decode(r.ids) for r in groups[0]) + "\n"


@pytest.mark.parametrize("argv, said", [
    ([], "--text"), (["--text", "x", "--texts", "y", "--out", "z"], "--text"), (["--texts", "y"], "--out"),
    (["--text", "x", "--n", "0"], "--n must be from 1 to 1024"), (["--text", "x", "--top-p", "0"], "--top-p"),
    (["--text", "x", "--temperature", "inf"], "--temperature"), (["--text", "x", "--dtype", "int8"], "--dtype"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_wrong_options_end_in_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, argv=["--model", "m", *argv])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize("data", [b'{"text": 3}', b'{"messages": "hi"}', b'{"messages": []}', b"{}", b"[]", b"no json",
                                  b'{"messages": [{"role": "judge", "content": "x"}]}', b'{"text": "\\ud83d"}',
                                  b'{"text": "\xff"}', b'{"text": "sort 31"}\n{"tex": "b"}'], ids=str)
def test_a_bad_line_of_texts_is_named(tmp_path, data):
    """File and line stand first, before anything is sampled."""
    toy.write_tokenizer(tmp_path)
    (tmp_path / "texts.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=rf"texts.jsonl:{data.count(10) + 1}: [a-z]"):
        read_texts(tmp_path / "texts.jsonl", Tokenizer(tmp_path))
