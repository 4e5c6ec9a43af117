"""batch.py and pages.py: who is written when and where, and that nothing of it shows. Oracles: the uncached model,
token by token, in float64; the same rollouts under other settings; the pages, counted from outside."""

import gc
import io
import math
import sys
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pages  # noqa: E402
import sample  # noqa: E402
from batch import Batch, bucket  # noqa: E402
from draw import Sampling, choose, prompt_key, uniforms  # noqa: E402
from pages import BIN, page_bytes  # noqa: E402
from sample import Sampler  # noqa: E402
from test_sample import PROMPTS, QWEN2, QWEN3, before_each, make_folder, tiny  # noqa: E402


def assert_naive(model, prompts, groups, how):
    """The uncached model, given each rollout's tokens so far, draws its next one; exact, so in float64."""
    for prompt, rollouts in zip(prompts, groups, strict=True):
        for k, r in enumerate(rollouts):
            logits = model.logits(prompt + r.ids)[len(prompt) - 1:-1]
            key, index, token = (torch.tensor(x) for x in (prompt_key(prompt), k, range(len(r.ids))))
            uniform = uniforms(how.seed, key.expand(len(token)), index.expand(len(token)), token)
            ids, logps = choose(logits, uniform, how.temperature, how.top_p, how.top_k)
            assert ids.tolist() == r.ids
            np.testing.assert_allclose(r.logps, logps, atol=1e-10)


def assert_same(groups, others):
    """Equal tokens and reasons; log-probabilities up to float64's rounding."""
    for rollouts, again in zip(groups, others, strict=True):
        for r, q in zip(rollouts, again, strict=True):
            assert (r.ids, r.reason) == (q.ids, q.reason)
            np.testing.assert_allclose(r.logps, q.logps, atol=1e-11)


def gb(model, n_pages, page_size):
    """The bound that allows just so many pages."""
    return n_pages * page_bytes(model.config, page_size, model.head_vd.dtype) / 1e9


class Buckets:
    """What Graphs does, without graphs: the step of a bucket of slots, over tables of a fixed size."""

    def run(self, compute_step, n):
        compute_step(bucket(n), whole=True)


@pytest.fixture
def in_buckets(monkeypatch):
    """Turns them on, as on a GPU."""
    def begin(self, *args, inner=Batch.__init__):
        self.wants_graphs = lambda: True
        inner(self, *args)
    monkeypatch.setattr("batch.Graphs", Buckets)
    return lambda: monkeypatch.setattr(Batch, "__init__", begin)


# ---- what a rollout depends on


@pytest.mark.parametrize("raw, how", [(QWEN2, dict(n=3)), (QWEN3, dict(n=2, temperature=0.7, top_p=0.9)),
                                      (QWEN3, dict(temperature=0.0))], ids=["3", "2, top-p", "greedy"])
def test_slots_pages_bound_order_and_buckets_change_nothing(raw, how, monkeypatch, in_buckets):
    """Settings drawn at random, half of them with too little memory for all slots. Oracle: the uncached model."""
    model, rng, seen = tiny(raw, torch.float64), np.random.default_rng(0), Counter()
    sampling = Sampling(max_new_tokens=40, stop=frozenset({17, 18}), seed=4, **how)
    expected = Sampler(model).generate(PROMPTS, sampling)
    assert_naive(model, PROMPTS, expected, sampling)
    before_each(monkeypatch, "drop_prompt", look=lambda batch: seen.update(["dropped"]))
    for trial in range(8):
        if trial == 5:
            in_buckets()
        page_size, n_slots, n_pages = int(rng.choice([4, 8, 16, 64])), int(rng.integers(1, 20)), 0
        if trial % 2:  # hardly more than one rollout may need
            page_size, n_slots = [4, 8, 4, 16][trial // 2], 12
            n_pages = 1 + 2 * -(-40 // page_size) + int(rng.integers(0, 4))
        order = rng.permutation(len(PROMPTS))
        sampler = Sampler(model, n_slots, gb(model, n_pages, page_size), int(rng.integers(1, 100)), page_size)
        groups = sampler.generate([PROMPTS[i] for i in order], sampling)
        assert_same([expected[i] for i in order], groups)
        seen["put back"] += sampler.n_put_back
    assert seen["put back"] > 2 and seen["dropped"] >= 8 * len(PROMPTS), seen


def test_what_nobody_owns_reaches_nobody(monkeypatch):
    """Free pages, the bin, and what lies beyond each rollout's last token hold large numbers at every step."""
    model, filled = tiny(QWEN3), Counter()

    def run():
        return Sampler(model, 6, page_size=16).generate(PROMPTS * 2, Sampling(2, 40, stop={17, 18, 19}, seed=2))
    expected = run()

    def fill(batch):
        beyond = [(slot.pages[-1], len(slot.rollout.ids) - 16 * (len(slot.pages) - 1) - 1) for slot in batch.slots]
        beyond += [(batch.pages[i][-1], len(PROMPTS[i % 8]) - 16 * (len(batch.pages[i]) - 1)) for i in batch.pages]
        for x in batch.pool.k + batch.pool.v:
            x[torch.from_numpy(batch.pool.free_x)] = 1e4
            x[BIN] = -1e4
            for page, used in beyond:
                x[page, :, used:] = 1e4
        filled.update(free=int(batch.pool.free_x.sum()), beyond=len(beyond))
    before_each(monkeypatch, "admit", "step", look=fill)
    for before, after in zip(expected, run(), strict=True):
        assert [(r.ids, r.logps) for r in before] == [(r.ids, r.logps) for r in after]
    assert min(filled.values()) > 500


# ---- pages


def check_pages(batch):
    """Every page is free, the bin, or of one rollout or prompt; and there are just as many as their tokens need."""
    size = batch.page_size
    owned = [page for slot in batch.slots for page in slot.pages] + [page for x in batch.pages.values() for page in x]
    assert sorted(owned + np.flatnonzero(batch.pool.free_x).tolist() + [BIN]) == list(range(len(batch.pool.free_x)))
    assert batch.pool.n_free == batch.pool.free_x.sum()
    for slot in batch.slots:  # the last token's keys are not there yet
        assert size * (len(slot.pages) - 1) < len(slot.rollout.ids) <= size * len(slot.pages) + 1
        assert slot.prompt in batch.pages
    for prompt, held in batch.pages.items():
        assert size * (len(held) - 1) < len(batch.prompts[prompt]) <= size * len(held)
    # held while rollouts are written or wait, gone with the last one
    assert set(batch.pages) <= {i for i, n in batch.n_left.items() if n}
    assert batch.waiting == type(batch.waiting)(sorted(batch.waiting)), "the oldest waits first"
    assert not batch.slots or not batch.waiting or max((s.prompt, s.sample) for s in batch.slots) < batch.waiting[0]


@pytest.mark.parametrize("n_pages", [0, 12], ids=["all the memory there is", "too little"])
def test_every_page_has_one_owner(n_pages, monkeypatch):
    """Before every step, over 72 prompts whose rollouts are put back when the memory is too small."""
    model, prompts, looked = tiny(QWEN2, torch.float64), [ids + [x] for x in range(9) for ids in PROMPTS], Counter()
    before_each(monkeypatch, "step", "take_finished", look=lambda batch: (
        check_pages(batch), looked.update(["looks", f"{len(batch.groups) > 5 and 'many groups'}"])))
    sampler, how = Sampler(model, 15, gb(model, n_pages, 16), page_size=16), Sampling(3, 70, stop={17, 18, 19}, seed=4)
    groups = sampler.generate(prompts, how)
    assert_naive(model, prompts[::7], groups[::7], how)
    assert looked["looks"] > 200 and (sampler.n_put_back > 20 if n_pages else looked["many groups"] > 20)


def test_pages_move_together_when_most_are_free(monkeypatch):
    """The PyTorch path walks all pages up to the last one in use: of 32 rollouts a few go on alone."""
    model, moved, gather = tiny(QWEN3, torch.float64), Counter(), pages.Pool.gather

    def counted(self, lists, shared=False):
        gather(self, lists, shared)
        moved[shared] += 1
        assert sorted(x for held in lists for x in held) == sorted(
            range(1, 1 + sum(map(len, lists))) if not shared else range(len(self.free_x) - sum(map(len, lists)),
                                                                        len(self.free_x)))
    monkeypatch.setattr(pages.Pool, "gather", counted)
    how = Sampling(4, 60, stop={17, 18, 19}, seed=1)
    assert_naive(model, PROMPTS, Sampler(model, page_size=2).generate(PROMPTS, how), how)
    assert moved[False] and moved[True], moved


def test_memory_is_taken_for_what_is_written(monkeypatch):
    """3 prompts of 3, 1 and 40 tokens, 4 rollouts each, pages of 16: 5 prompt pages, and one more for each rollout's
    every 16 tokens, whatever the others have."""
    model, used, steps = tiny(QWEN2), [], []
    before_each(monkeypatch, "take_finished", look=lambda batch: used.append(
        (~batch.pool.free_x).sum() - 1 if batch.slots else 0))
    Sampler(model, page_size=16).generate(PROMPTS[:3], Sampling(4, 40))
    assert used == [5 + 12 * max(1, -(-n // 16)) for n in range(39)] + [0]  # n tokens' keys are there


def test_a_group_starts_and_goes_on_in_parts(monkeypatch):
    """7 rollouts in 3 slots: the prompt is computed once, held while some of them wait, and let go with the last."""
    model, held = tiny(QWEN2, torch.float64), []
    before_each(monkeypatch, "step", look=lambda batch: held.append((len(batch.slots), sorted(batch.pages))))
    sampler, how = Sampler(model, n_slots=3), Sampling(7, 30, stop={17, 18, 19}, seed=1)
    groups = sampler.generate(PROMPTS[2:4], how)
    assert_naive(model, PROMPTS[2:4], groups, how)
    assert sampler.n_prefilled == len(PROMPTS[2] + PROMPTS[3])
    assert max(held)[0] == 3 and [0, 1] in [x for _, x in held] and held[-1][1] == [1]


def test_put_back_rollouts_keep_their_tokens(monkeypatch):
    """Nothing is drawn twice: on_token hears of each token once, in order."""
    model, heard = tiny(QWEN2, torch.float64), {}
    sampler = Sampler(model, 8, gb(model, 1 + 3 + 3 + 5, 16), page_size=16)
    groups = sampler.generate(PROMPTS, Sampling(2, 40, seed=3), lambda i, k, x: heard.setdefault((i, k), []).append(x))
    assert sampler.n_put_back > 3
    assert heard == {(i, k): r.ids for i, group in enumerate(groups) for k, r in enumerate(group)}
    assert sampler.n_prefilled > sum(map(len, PROMPTS)), "their keys were computed again"


def test_a_bound_too_small_for_one_rollout_names_the_least():
    """40 prompt tokens and 100 new ones are 3 + 7 pages of 16, and one for the bin; and the least that is named
    works."""
    model, how = tiny(QWEN2), Sampling(2, 100)
    one = 2 * 2 * 2 * 8 * 4 * 16  # keys and values, layers, heads, channels, bytes, tokens
    said = r"--kv-gb 1e-06: .* 100 tokens after the longest prompt, 40, needs \S+ GB"
    with pytest.raises(ValueError, match=said) as e:
        Sampler(model, kv_gb=1e-6, page_size=16).generate(PROMPTS[:3], how)
    least = float(str(e.value).split()[-2])
    assert least == math.ceil(11 * one / 1e6) / 1e3
    Sampler(model, kv_gb=least, page_size=16).generate(PROMPTS[:3], how)
    Sampler(model, kv_gb=11 * one / 1e9, page_size=16).generate(PROMPTS[:3], how)
    with pytest.raises(ValueError):
        Sampler(model, kv_gb=10.9 * one / 1e9, page_size=16).generate(PROMPTS[:3], how)


def test_the_pool_is_no_larger_than_all_could_need(monkeypatch):
    """4 slots of 100 tokens, 3 prompts of at most 40: 1 + 4 x 7 + 3 x 3 pages of 16, though half of memory is free."""
    model, sizes = tiny(QWEN2), []
    before_each(monkeypatch, "step", look=lambda batch: sizes.append(len(batch.pool.free_x)))
    Sampler(model, 4, page_size=16).generate(PROMPTS[:3], Sampling(2, 100, stop={1, 2, 3, 4, 5}))
    assert set(sizes) == {1 + 4 * 7 + 3 * 3}


def test_a_batch_lets_go_of_its_memory(monkeypatch):
    """Without waiting for the garbage collector: on a GPU the next one would not fit beside it."""
    model, alive = tiny(QWEN2), []
    before_each(monkeypatch, "admit", look=lambda batch: alive.append(weakref.ref(batch)))
    gc.disable()
    try:
        Sampler(model).generate(PROMPTS, Sampling(2, 5))
    finally:
        gc.enable()
    assert [ref() for ref in alive] == [None]


def test_a_pool_takes_memory_as_it_is_written(monkeypatch):
    """On a CPU: room for 64 rollouts of 100,000 tokens, 1.6 GB, of which hardly anything is used."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc to read this process's memory")

    def resident():
        return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1])
    before, seen = resident(), []
    before_each(monkeypatch, "step", look=lambda batch: seen.append((resident() - before, batch.pool.gb)))
    Sampler(tiny(QWEN2), n_slots=64).generate([[1, x % 61] for x in range(64)],
                                              Sampling(1, 100_000, stop=set(range(20, 40))))
    assert seen and max(seen)[0] < 0.3e9 < 1e9 < 1e9 * seen[0][1]


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 60, 64, 65, 96, 100, 256)] == [
        1, 2, 4, 8, 8, 16, 16, 32, 64, 64, 96, 96, 128, 256]


# ---- what the user sees


def test_the_progress_bar_tells_who_is_where(capsys):
    """Updated within a stream, not only when a group is done."""
    screen, sampler = io.StringIO(), Sampler(tiny(QWEN2), n_slots=3)
    with tqdm(total=8, file=screen, disable=False) as bar:
        for _ in range(2):
            sampler.generate(PROMPTS, Sampling(2, 5), bar=bar)
    shown = screen.getvalue()
    for words in ("prefill_tok_s=", "decode_tok_s=", "writing=3, waiting=13, done=0, put_back=0, cache="):
        assert words in shown, shown
    # 1 + 3 x (1 + 1) pages of 64 tokens; 2 layers, keys and values, 2 heads of 8 channels, 4 bytes; once
    assert capsys.readouterr().err == f"keys and values: room for 448 tokens, {448 * 256 / 1e9:.3g} GB; 3 slots\n"


def test_interrupted_texts_are_kept(tmp_path, monkeypatch, capsys):
    """Ctrl-C after some texts: those are on disk, the message counts them, and nothing overwrites them."""
    folder, out = make_folder(tmp_path / "model"), tmp_path / "out.jsonl"
    (tmp_path / "texts.jsonl").write_text('{"text": "sort 40718"}\n' * 5)
    cfg = sample.Config(model=str(folder), texts=str(tmp_path / "texts.jsonl"), out=str(out), n_slots=1,
                        max_new_tokens=3, threads=1)
    take = Batch.take_finished

    def interrupted(self):
        if not self.waiting and not self.slots:
            raise KeyboardInterrupt
        return take(self)
    monkeypatch.setattr(Batch, "take_finished", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"4 of 5 texts are done, and kept in {out}.partial"):
        sample.main(cfg)
    monkeypatch.setattr(Batch, "take_finished", take)
    kept = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert len(kept) == 4 and not out.exists()
    with pytest.raises(ValueError, match="interrupted run has finished; move it away"):
        sample.main(cfg)
    (tmp_path / "out.jsonl.partial").rename(tmp_path / "kept.jsonl")
    sample.main(cfg)
    assert out.read_text().splitlines()[:4] == kept and not (tmp_path / "out.jsonl.partial").exists()
