"""grpo.py. Oracles: advantages and token losses worked by hand; the loss written out naively, each prompt + judgement
alone through model.logits in float64; the uninterrupted run; the run on one rank; the rollouts, against the log."""

import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import distill
import grpo
from common import Ranks, Tally, learning_rate, leave_ranks, micro_batches, shard
from data import toy
from data.pairs import Pair, read_pairs
from grpo import (Config, Group, MiniBatch, accumulate_gradients, advantages, make_micro, n_tree_tokens, score,
                  steps_pairs, token_losses, trees)
from model import Model, ModelConfig
from batch import Rollout
from sample import Sampling, filled_copy
from test_distill import flags
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"))
TINY = toy.MODEL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Qwen3 that has learned to write bare verdicts, either one or sometimes neither, and 11 labelled pairs."""
    folder = tmp_path_factory.mktemp("made")
    rows = [row | {"winner": "ab"[i % 2]} for i, row in enumerate(toy.make("distill", 60, seed=5))]
    write_rows(folder / "chains.jsonl", rows)
    write_rows(folder / "rl.jsonl", toy.make("rl", 11, seed=5))
    write_rows(folder / "a.jsonl", [row | {"winner": "a"} for row in toy.make("rl", 11, seed=5)])
    write_rows(folder / "heldout.jsonl", toy.make("heldout", 5, seed=5))
    n_vocab = toy.write_tokenizer(folder / "untrained")
    Model.random(ModelConfig.from_dict(TINY | {"vocab_size": n_vocab + 3}), 2).save_pretrained(folder / "untrained")
    distill.main(distill.Config(
        model=str(folder / "untrained"), data=str(folder / "chains.jsonl"), prompt="toy", out=str(folder / "distilled"),
        answer_only=True,
        batch_size=20, epochs=25, max_steps=0, max_length=200, micro_tokens=10_000, optimizer="adamw", lr=1e-2,
        warmup_frac=0.1, final_lr_frac=0.1,
        beta1=0.9, beta2=0.95, weight_decay=0.0, max_norm=1.0, dtype="float32", gradient_checkpointing=False,
        eval_data=None, save_every=0, seed=0, threads=1))
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(made, out, **changes):
    """Four pairs a step in two updates, four judgements each. Nothing is left to a default that may be tuned."""
    options = dict(model=str(made / "distilled/model"), data=str(made / "rl.jsonl"), prompt=None, out=str(out),
                   n_prompts=4, mini_prompts=2, group_size=4,
                   steps=3, temperature=1.0, max_prompt_tokens=200, max_new_tokens=8, clip=0.2, kl_coef=0.1,
                   skip_zero_spread=True, lr=3e-3,
                   warmup_steps=0, final_lr_frac=1.0, beta1=0.9, beta2=0.99, weight_decay=0.0, max_norm=1.0,
                   dtype="float32",
                   gradient_checkpointing=False, micro_tokens=120, n_slots=256, eval_data=None, eval_pairs=5,
                   eval_every=0, save_every=0, keep=0, n_samples=2,
                   seed=3, threads=1)
    return Config(**options | changes)


def metrics(out):
    """The logged rows but for the seconds; null, which pytest.approx cannot take, as -99."""
    return [{key: -99 if value is None else value for key, value in json.loads(line).items() if not key.endswith("_s")}
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def recorded(monkeypatch):
    """The groups of every step that runs, as main saw them."""
    steps, original = [], grpo.rollout

    def rollout(*args):
        groups = original(*args)
        steps.append(groups)
        return groups
    monkeypatch.setattr(grpo, "rollout", rollout)
    return steps


# ---- (2): advantages

def test_advantages_worked_by_hand():
    """[1, 1, -1]: mean 1/3, sum of squares 4/9 + 4/9 + 16/9, over 2: std sqrt(4/3). [1, -1]: std sqrt(2)."""
    got = advantages(torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]],
                                  dtype=torch.float64))
    x = 1 / math.sqrt(3)
    want = torch.tensor([[x, x, -2 * x], [-x, -x, 2 * x], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    assert float(got[0, 0]) == pytest.approx((2 / 3) / (math.sqrt(4 / 3) + 1e-6), rel=1e-12)
    torch.testing.assert_close(advantages(torch.tensor([[1.0, -1.0]])), torch.tensor([[1.0, -1.0]]) / math.sqrt(2),
                               rtol=2e-6, atol=0)
    # mean -5/7, std sqrt((12/7)^2/6 + (2/7)^2) = 2/sqrt(7)
    one_of_seven = advantages(torch.tensor([[1.0] + [-1.0] * 6]))
    torch.testing.assert_close(one_of_seven, torch.tensor([[6.0] + [-1.0] * 6]) / math.sqrt(7), rtol=1e-5, atol=0)
    assert advantages(torch.ones(2, 7)).abs().max() == 0 and advantages(-torch.ones(2, 7)).abs().max() == 0


# ---- (3) to (5): the loss of a token

@pytest.mark.parametrize("ratio, advantage, surrogate, clipped", [
    (1.0, 2.0, 2.0, 0), (1.0, -2.0, -2.0, 0), (1.1, 2.0, 2.2, 0), (0.9, -2.0, -1.8, 0),
    (1.5, 2.0, 2.4, 1),    # better already: no more than 1.2
    (1.5, -2.0, -3.0, 0),  # worse, and likelier: the whole of it counts
    (0.5, 2.0, 1.0, 0),
    (0.5, -2.0, -1.6, 1),  # rarer already: no less than 0.8
    (1.5, 0.0, 0.0, 0),
])
def test_the_clip_on_both_sides_for_both_signs(ratio, advantage, surrogate, clipped):
    logp = torch.tensor([math.log(ratio) - 3.0], dtype=torch.float64, requires_grad=True)
    old = ref = torch.tensor([-3.0], dtype=torch.float64)
    loss, _, is_clipped = token_losses(logp, old, ref, torch.tensor([advantage], dtype=torch.float64), 0.2, 0.0)
    assert loss.item() == pytest.approx(-surrogate) and is_clipped.item() == clipped
    loss.backward()  # d ratio / d logp = ratio
    assert logp.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_the_kl_term_worked_by_hand():
    """p = 1/2, ref = 1/4: 1/2 + ln 2 - 1; p = 1/4, ref = 1/2: 2 - ln 2 - 1; its slope in log p is 1 - ref / p."""
    logp = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64).log()
    loss, kl, _ = token_losses(logp, logp.detach(), ref, torch.zeros(3, dtype=torch.float64), 0.2, 0.1)
    torch.testing.assert_close(kl, torch.tensor([math.log(2) - 0.5, 1 - math.log(2), 0.0], dtype=torch.float64))
    torch.testing.assert_close(loss, 0.1 * kl)
    loss.sum().backward()
    torch.testing.assert_close(logp.grad, 0.1 * torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64))


# ---- groups and trees

PAIR = Pair("p", [], "", "", "a", "", "")


def group(prompt, sizes, rewards=None, rng=random.Random(0)):
    rollouts = [Rollout(np.array([rng.randrange(45) for _ in range(n)], np.int32),
                        np.array([-rng.random() * 4 for _ in range(n)], np.float32), "stop") for n in sizes]
    reward_g = torch.tensor(rewards or [1.0] + [-1.0] * (len(sizes) - 1))
    advantage_g = advantages(reward_g[None])[0]
    return Group(PAIR, np.array(prompt, np.int32), rollouts, [None] * len(sizes), reward_g, advantage_g)


def test_trees_worked_by_hand():
    g = group(list(range(10)), [5, 5, 5, 5, 5])
    assert [part for _, part in trees([g], 35)] == [[0, 1, 2, 3, 4]]
    assert [part for _, part in trees([g], 34)] == [[0, 1, 2, 3], [4]]
    assert [part for _, part in trees([g], 20)] == [[0, 1], [2, 3], [4]]
    assert [part for _, part in trees([g], 3)] == [[0], [1], [2], [3], [4]]  # nothing fits: each alone, none lost
    assert [n_tree_tokens(tree) for tree in trees([g], 20)] == [20, 20, 15]
    two = group([1], [9, 2, 2, 9])
    assert [part for _, part in trees([g, two], 10)] == [[0], [1], [2], [3], [4], [0], [1, 2], [3]]
    assert trees([], 10) == []


def test_trees_hold_every_rollout_once_within_the_limit():
    rng = random.Random(2)
    for _ in range(200):
        groups = [group([0] * rng.randint(1, 20), [rng.randint(1, 15) for _ in range(rng.randint(2, 8))])
                  for _ in range(3)]
        limit = rng.randint(1, 60)
        made = trees(groups, limit)
        for g in groups:
            parts = [part for owner, part in made if owner is g]
            assert sum(parts, []) == list(range(len(g.rollouts)))
        assert all(n_tree_tokens(tree) <= limit or len(tree[1]) == 1 for tree in made)


def naive(model, reference, groups, cfg, skip=()):
    """(5) as it is written, for each judgement alone; groups in `skip` give tokens to the denominator only. Returns the
    loss with its graph, and the sums of kl, entropy and clipped tokens."""
    logits = type(model).logits.__wrapped__  # without its no_grad
    n_tokens = sum(len(r.ids) for g in groups for r in g.rollouts)
    total, kl_sum, entropy_sum, n_clipped = 0.0, 0.0, 0.0, 0
    for g in groups:
        if any(g is s for s in skip):
            continue
        for r, a in zip(g.rollouts, g.advantage_g.tolist()):
            logp_tv = (logits(model, [*g.prompt_ids, *r.ids])[:, :model.n_vocab] / cfg.temperature).log_softmax(1)
            ref_tv = (reference.logits([*g.prompt_ids, *r.ids])[:, :model.n_vocab] / cfg.temperature).log_softmax(1)
            for t, (token, old) in enumerate(zip(r.ids, r.logps)):
                row = len(g.prompt_ids) + t - 1
                ratio = (logp_tv[row, token] - torch.tensor(old)).exp()
                log_ref = ref_tv[row, token] - logp_tv[row, token]
                kl = log_ref.exp() - log_ref - 1
                low, high = 1 - cfg.clip, 1 + cfg.clip
                objective = torch.stack([ratio * a, ratio.clamp(low, high) * a]).min()
                total = total - objective + cfg.kl_coef * kl
                kl_sum += float(kl.detach())
                entropy_sum -= float((logp_tv[row].exp() * logp_tv[row]).sum().detach())
                n_clipped += bool(a > 0 and ratio > high or a < 0 and ratio < low)
    return total / n_tokens, kl_sum, entropy_sum, n_clipped


def gradient(model):
    flat = torch.cat([x.grad.flatten() for x in model.parameters()])
    model.zero_grad()
    return flat


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_are_those_of_each_judgement_alone(temperature, made):
    """In float64, for every split of the groups into trees and of the trees into micro-batches. The group without
    spread is left out, and its tokens are not."""
    model = Model.random(ModelConfig.from_dict(TINY | {"vocab_size": 50}), 1, dtype=torch.float64)
    reference = Model.random(ModelConfig.from_dict(TINY | {"vocab_size": 50}), 2, dtype=torch.float64)
    model.n_vocab = reference.n_vocab = 47
    cfg = config(made, "", temperature=temperature)
    groups = [group(list(range(3, 12)), [4, 1, 7], [1.0, -1.0, 1.0]), group([5], [3, 3], [-1.0, 1.0]),
              group([7, 8, 9], [2, 5, 1], [-1.0] * 3)]
    for g in groups:  # old log-probabilities on both sides of the clip, exact in float32
        for r in g.rollouts:
            rows_tv = (model.logits([*g.prompt_ids, *r.ids])[len(g.prompt_ids) - 1:, :47] / temperature).log_softmax(1)
            shift_t = [0.2 * ((7 * t + len(r.ids)) % 5 - 2) for t in range(len(r.ids))]
            r.logps[:] = [float(rows_tv[t, r.ids[t]]) + shift_t[t] for t in range(len(r.ids))]
    n_tokens = sum(len(r.ids) for g in groups for r in g.rollouts)

    for skip in (groups[2:], []):
        want, kl, entropy, n_clipped = naive(model, reference, groups, cfg, skip)
        want.backward()
        want_grad, trained = gradient(model), [g for g in groups if not any(g is s for s in skip)]
        assert n_clipped >= 3
        for limit in (1, 12, 17, 1000):
            items = trees(trained, limit)
            sizes = [n_tree_tokens(item) for item in items]
            for bins in ([range(len(items))], [[i] for i in range(len(items))],
                         *(step for world in (1, 2) for step in [sum(micro_batches(sizes, 25, world), [])])):
                micros = [make_micro([items[i] for i in share], 1.0) for share in bins if share]
                mini_batch, tally = MiniBatch(micros, n_tokens, sum(sizes)), Tally()
                score(reference, [mini_batch], temperature, "cpu")
                loss, worst = accumulate_gradients(cfg, ALONE, model, mini_batch, tally, fresh=True)
                assert len(worst) == len(micros) and max(worst) <= 0.4 + 1e-6
                assert loss == pytest.approx(float(want.detach()), rel=1e-6)
                sums = {name: total for name, (total, _) in tally.pairs.items()}
                assert (sums["kl"], sums["entropy"], sums["clip_frac"]) == pytest.approx((kl, entropy, n_clipped),
                                                                                         rel=1e-9)
                torch.testing.assert_close(gradient(model), want_grad, rtol=1e-6, atol=1e-9)


def test_without_a_kl_term_there_is_no_reference(made, tmp_path, monkeypatch):
    """Neither loaded nor run; the same updates as with one that counts nothing."""
    read = []
    monkeypatch.setattr(grpo, "score", lambda *args: read.append(args) or score(*args))
    grpo.main(config(made, tmp_path / "tiny", kl_coef=1e-30))
    assert len(read) == 3 and metrics(tmp_path / "tiny")[2]["kl"] > 0
    loaded, load = [], grpo.load_sharded
    monkeypatch.setattr(grpo, "load_sharded", lambda *args: loaded.append(args) or load(*args))
    grpo.main(config(made, tmp_path / "none", kl_coef=0.0))
    assert len(read) == 3 and len(loaded) == 1 and {row["kl"] for row in metrics(tmp_path / "none")} == {-99}
    x, y = (load_file(tmp_path / name / "model/model.safetensors") for name in ("tiny", "none"))
    assert all(torch.equal(x[name], y[name]) for name in x)


# ---- data order, rollouts, rewards

def test_each_pass_is_a_permutation_without_its_last_partial_batch():
    pairs = list(range(11))
    steps = [steps_pairs(pairs, step, 4, seed=3) for step in range(6)]
    assert all(len(batch) == 4 for batch in steps)
    passes = [sum(steps[first:first + 2], []) for first in (0, 2, 4)]
    assert all(len(set(done)) == 8 and set(done) <= set(pairs) for done in passes)
    assert passes[0] != passes[1] != passes[2] and set(passes[0]) != set(passes[1])  # not the same three left out
    assert steps == [steps_pairs(pairs, step, 4, seed=3) for step in range(6)]
    assert steps != [steps_pairs(pairs, step, 4, seed=4) for step in range(6)]
    assert sorted(steps_pairs(pairs, 5, 11, 0)) == pairs


class Scripted:
    """A sampler that writes given judgements."""

    def __init__(self, rollouts):
        self.rollouts = rollouts

    def generate(self, prompts, sampling, on_token=None, bar=None):
        self.asked = prompts, sampling
        return [self.rollouts for _ in prompts]


def test_rewards_of_right_wrong_missing_and_unfinished_judgements(made):
    tokenizer, cfg = Tokenizer(made / "distilled/model"), config(made, "", group_size=5)

    def written(text, reason):
        ids = tokenizer.encode(text) + ([tokenizer.end_of_turn] if reason == "stop" else [])
        return Rollout(ids, [0.0] * len(ids), reason)
    a, b = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"
    sampler = Scripted([written(a, "stop"), written(b, "stop"), written("no idea", "stop"), written(a, "length"),
                        written(a + b, "stop")])
    pairs = [replace(PAIR, id="x"), replace(PAIR, id="y", winner="b")]
    groups = grpo.rollout(cfg, sampler, tokenizer, pairs, {"x": np.array([1, 2]), "y": np.array([3])}, 6, ALONE)
    # what was cut off earns -1
    assert [g.reward_g.tolist() for g in groups] == [[1, -1, -1, -1, -1], [-1, 1, -1, -1, -1]]
    assert groups[0].verdicts == ["a", "b", None, "a", None]
    assert [g.prompt_ids.tolist() for g in groups] == [[1, 2], [3]]
    for g in groups:
        assert [tokenizer.decode(r.ids) for r in g.rollouts] == [a, b, "no idea", a, a + b]
        assert {r.ids.dtype.name for r in g.rollouts} == {"int32"}
        assert {r.logps.dtype.name for r in g.rollouts} == {"float32"}
    assert sampler.asked == ([[1, 2], [3]], Sampling(n=5, max_new_tokens=8, temperature=1.0, stop=tokenizer.stop_ids,
                                                     seed=3_000_015))
    torch.testing.assert_close(groups[0].advantage_g, advantages(groups[0].reward_g[None])[0])
    n_tok = sum(len(r.ids) for r in sampler.rollouts) / 5
    assert grpo.rollout_metrics(groups) == pytest.approx({"reward": -0.6, "accuracy": 0.2, "frac_no_verdict": 0.4,
                                                          "frac_unfinished": 0.2, "frac_zero_spread": 0.0,
                                                          "judgement_tok": n_tok})


# ---- whole runs

KEYS = {"step", "reward", "accuracy", "frac_no_verdict", "frac_unfinished", "frac_zero_spread", "judgement_tok",
        "entropy", "kl", "clip_frac", "loss",
        "grad_norm", "mismatch", "mismatch_max", "n_updates", "lr", "rollout_s", "update_s", "update_tok_s",
        "prefill_s", "decode_s", "prefill_tok_s",
        "decode_tok_s"}


def test_the_log_says_what_the_rollouts_say(made, tmp_path, recorded, monkeypatch):
    """One update a step, so that the naive loss of the recorded rollouts, under the checkpoint that wrote them, is the
    row's. Also: each prompt is computed once in the update; what the samples file holds; when evaluations come."""
    monkeypatch.setattr(grpo, "is_finite", lambda model, probe: True)  # it runs the model, too
    n_run, run = [], Model.run

    def counting(self, tokens_n, *args):
        n_run.append((torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), len(tokens_n)))
        return run(self, tokens_n, *args)
    monkeypatch.setattr(Model, "run", counting)
    cfg = config(made, tmp_path / "run", mini_prompts=4, steps=4, save_every=1, eval_data=str(made / "heldout.jsonl"),
                 eval_every=3, n_samples=3,
                 micro_tokens=130, temperature=1.2, lr=5e-3)
    grpo.main(cfg)
    raw = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in raw] == [1, 2, 3, 4] and all(set(row) >= KEYS for row in raw)
    assert [row["step"] for row in raw if "eval_accuracy" in row] == [3, 4]
    assert any(0 < row["frac_zero_spread"] < 1 for row in raw), "the fixture should give a group without spread"
    n_trained = sum(len(g.prompt_ids) + sum(len(r.ids) for r in g.rollouts) for groups in recorded for g in groups
                    if g.has_spread)
    assert sum(n for grad, n in n_run if grad) == n_trained  # micro_tokens holds a whole group here
    assert sum(round(row["update_tok_s"] * row["update_s"]) for row in raw) == n_trained

    reference, tokenizer = Model.from_pretrained(cfg.model, dtype=torch.float64), Tokenizer(cfg.model)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert sum(row["frac_zero_spread"] < 1 for row in raw) >= 3
    for row, groups in zip(raw, recorded, strict=True):
        if row["frac_zero_spread"] == 1:
            continue
        before = tmp_path / f"run/checkpoints/step-{row['step'] - 1}" if row["step"] > 1 else cfg.model
        policy = Model.from_pretrained(before, dtype=torch.float64)
        policy.n_vocab = reference.n_vocab = tokenizer.n_vocab
        idle = [g for g in groups if not g.has_spread]
        loss, kl, entropy, n_clipped = naive(policy, reference, groups, cfg, idle)
        loss.backward()
        n = sum(len(r.ids) for g in groups if g.has_spread for r in g.rollouts)
        assert row["loss"] == pytest.approx(float(loss.detach()), abs=2e-6)
        assert row["grad_norm"] == pytest.approx(float(gradient(policy).norm()), rel=1e-3)
        assert row["kl"] == pytest.approx(kl / n, rel=1e-3, abs=1e-6)
        assert row["entropy"] == pytest.approx(entropy / n, rel=1e-4)
        # ratio 1: this policy wrote them
        assert row["clip_frac"] == n_clipped == 0 and row["mismatch"] <= row["mismatch_max"] < 1e-4
        rewards = torch.stack([g.reward_g for g in groups])
        assert row["reward"] == pytest.approx(rewards.mean().item())
        assert row["frac_zero_spread"] == len(idle) / 4 and row["n_updates"] == 1

        mine = [s for s in samples if s["step"] == row["step"]]
        assert [s["id"] for s in mine] == [g.pair.id for g in groups[:3]]
        for s, g in zip(mine, groups):
            k = [i for i, r in enumerate(g.rollouts)
                 if tokenizer.decode(r.ids) == s["judgement"] and g.reward_g[i] == s["reward"]]
            assert k and s["advantage"] == pytest.approx(g.advantage_g[k[0]].item()) and s["winner"] == g.pair.winner
            assert s["prompt"] == tokenizer.decode(g.prompt_ids, skip_control=False)
            assert (s["reward"] == 1.0) <= (s["verdict"] == s["winner"])
    assert raw[0]["kl"] == pytest.approx(0, abs=1e-6) and raw[-1]["kl"] > 1e-4


@pytest.mark.parametrize("changes", [{}, {"skip_zero_spread": False, "max_norm": 0.1, "weight_decay": 0.1}])
def test_the_micro_batch_split_does_not_change_a_run(changes, made, tmp_path):
    """All at once, against every judgement with its own prompt, to float32 rounding. The rollouts are the same."""
    runs = []
    for micro_tokens in (10_000, 1):
        grpo.main(config(made, tmp_path / str(micro_tokens), micro_tokens=micro_tokens, n_samples=4, clip=0.02,
                         **changes))
        runs.append(metrics(tmp_path / str(micro_tokens)))
    for one, other in zip(*runs, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    # the second of two updates is off-policy
    assert runs[0][0]["n_updates"] == 2 and any(row["clip_frac"] > 0 for row in runs[0])
    texts = [[json.loads(line)["judgement"] for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
             for name in ("10000", "1")]
    assert texts[0] == texts[1] and len(texts[0]) == 12


def test_an_interrupted_run_ends_as_if_it_had_not_been(made, tmp_path):
    """Oracle: the uninterrupted run, bit for bit; its second pass over the data (step 3 on) came after the crash."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    cfg = config(made, whole, steps=5, save_every=2, eval_data=str(made / "heldout.jsonl"), eval_every=2)
    grpo.main(cfg)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-2", "step-4", "step-5"]
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    (again / "checkpoints/step-5").rename(again / "checkpoints/step-5.tmp")  # died while these were written
    (again / "checkpoints/step-4").rename(again / "checkpoints/step-4.tmp")
    for name, per_step in (("metrics.jsonl", 1), ("samples.jsonl", 2)):
        rows = (again / name).read_text().splitlines(keepends=True)
        (again / name).write_text("".join(rows[:3 * per_step]) + rows[3 * per_step][:30])
    grpo.main(replace(cfg, out=str(again), resume=True))
    assert metrics(again) == metrics(whole) and len(metrics(again)) == 5
    for name in ("samples.jsonl", "model/model.safetensors", "model/prompt.txt",
                 "checkpoints/step-5/optimizer-00001-of-00001.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(again.rglob("*.tmp"))
    shutil.rmtree(again / "model")
    grpo.main(replace(cfg, out=str(again), resume=True))  # at its end already
    assert metrics(again) == metrics(whole)
    assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--clip 0.2, not 0.3"):
        grpo.main(replace(cfg, out=str(again), resume=True, clip=0.3))


def test_a_step_in_which_no_group_has_spread_changes_nothing(made, tmp_path):
    """An untrained model writes no verdict: every reward is -1. The rows have all their keys, some of them null."""
    cfg = config(made, tmp_path / "run", model=str(made / "untrained"), prompt="toy", steps=2, save_every=1,
                 max_new_tokens=3)
    grpo.main(cfg)
    for row in (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()):
        assert set(row) >= KEYS and row["frac_zero_spread"] == row["frac_no_verdict"] == 1
        assert row["reward"] == -1 and row["accuracy"] == 0
        assert row["loss"] == 0.0  # over all tokens, none of which was trained on
        assert [row[name] for name in ("kl", "entropy", "clip_frac", "mismatch")] == [None] * 4
        assert row["n_updates"] == row["grad_norm"] == 0
    for folder in ("model", "checkpoints/step-2"):
        assert all(torch.equal(x, y) for x, y in zip(Model.from_pretrained(made / "untrained").parameters(),
                                                     Model.from_pretrained(tmp_path / "run" / folder).parameters()))
    grpo.main(replace(cfg, resume=True))


def test_the_policy_learns_what_is_rewarded(made, tmp_path):
    """Where A is always better, twenty steps turn a judge that writes either verdict into one that writes A."""
    grpo.main(config(made, tmp_path / "run", data=str(made / "a.jsonl"), n_prompts=8, mini_prompts=8, group_size=7,
                     steps=20, kl_coef=1e-3, micro_tokens=10_000,
                     lr=4e-3, warmup_steps=2))
    accuracy = [row["accuracy"] for row in metrics(tmp_path / "run")]
    assert accuracy[0] < 0.6 and sum(accuracy[-3:]) / 3 > 0.9, accuracy


def test_steps_0_is_one_pass_over_the_data(made, tmp_path):
    grpo.main(config(made, tmp_path / "run", steps=0, max_new_tokens=2, n_samples=0))
    assert len(metrics(tmp_path / "run")) == 11 // 4 and not (tmp_path / "run/samples.jsonl").exists()


RUNS = """
import json, sys
sys.path.insert(0, ".")
import grpo
from options import parse_config
original, steps = grpo.rollout, []

def rollout(*args):
    groups = original(*args)
    steps.append([[g.pair.id, [[r.ids.tolist(), r.reason] for r in g.rollouts], g.reward_g.tolist()] for g in groups])
    return groups
grpo.rollout = rollout
for argv in json.loads(sys.argv[1]):
    sys.argv = ["grpo.py", *argv]
    steps.clear()
    cfg = parse_config(grpo.Config, grpo.RECIPES)
    grpo.main(cfg)
    out = [None, None]
    import torch.distributed as dist
    dist.all_gather_object(out, steps)
    assert out[0] == out[1]
    json.dump(steps, open(cfg.out + "/rollouts.json", "w"))
"""


def test_two_ranks_train_as_one_does(made, tmp_path, recorded):
    """Oracle: the same run on one rank. Three pairs are not shared evenly; of one pair, a rank has nothing to write and
    nothing to learn; a run of one rank goes on as a run of two."""
    cases = {"even": config(made, "", eval_data=str(made / "heldout.jsonl"), eval_every=2, micro_tokens=10_000),
             "odd": config(made, "", n_prompts=3, mini_prompts=3, micro_tokens=1, skip_zero_spread=False),
             "one": config(made, "", n_prompts=1, mini_prompts=1, micro_tokens=10_000),
             "resumed": config(made, "", save_every=2, n_samples=4)}
    argvs, rollouts = [], {}
    for name, cfg in cases.items():
        recorded.clear()
        grpo.main(replace(cfg, out=str(tmp_path / name / "1")))
        rollouts[name] = [[[g.pair.id, [[r.ids.tolist(), r.reason] for r in g.rollouts], g.reward_g.tolist()]
                           for g in groups] for groups in recorded]
        if name == "resumed":
            shutil.copytree(tmp_path / name / "1", tmp_path / name / "2")
            shutil.rmtree(tmp_path / name / "2/checkpoints/step-3")
        argvs.append(flags(replace(cfg, out=str(tmp_path / name / "2"), resume=name == "resumed")))
    (tmp_path / "runs.py").write_text(RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "runs.py"), json.dumps(argvs)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in cases:
        got = json.loads((tmp_path / name / "2/rollouts.json").read_text())
        assert got == (rollouts[name][2:] if name == "resumed" else rollouts[name]), name
        one, two = metrics(tmp_path / name / "1"), metrics(tmp_path / name / "2")
        for row, other in zip(one, two, strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-5), name
        assert sum(row["n_updates"] for row in one) > 0, name
        # Adam divides by the gradient's own size: where that is rounding, a step of either sign is right, and no single
        # number need agree. Of gradients off by e of their norm, a share e is so small: sqrt(e) of the way, e = 1e-5.
        start, x, y = (Model.from_pretrained(path).state_dict() for path in
                       (cfg.model, tmp_path / name / "1/model", tmp_path / name / "2/model"))
        apart, way = ({weight: float((a[weight] - b[weight]).norm()) for weight in x} for a, b in ((y, x), (x, start)))
        assert math.hypot(*apart.values()) < math.sqrt(1e-5) * math.hypot(*way.values()), name
        assert all(apart[weight] <= 0.1 * way[weight] for weight in x), name


# ---- runs that die, prompts that are false, runs that go on

def test_a_dead_run_ends_in_one_line_without_a_model(made, tmp_path):
    """Once a learning rate of 1e30 ended in "index 334 is out of bounds". The first update is made, each later one is
    skipped and counted; after the third in a row nothing is sampled from such a policy any more."""
    cfg = config(made, tmp_path / "run", lr=1e30, n_prompts=8, skip_zero_spread=False)
    with pytest.raises(ValueError, match="stopped, loss or gradient were not finite in 3 optimizer steps in a row .*; "
                                         f"no model/ is written, the last good weights are in {cfg.model}: start"):
        grpo.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "run/stopped.jsonl").read_text().splitlines()]
    assert len(rows) == cfg.mini_prompts * cfg.group_size and {row["reward"] for row in rows} <= {1.0, -1.0}
    row, = metrics(tmp_path / "run")
    assert (row["n_updates"], row["n_skipped"]) == (1, 3) and row["grad_norm"] > 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl",
                                                             "stopped.jsonl"}


@pytest.mark.parametrize("changes", [dict(steps=1), dict(save_every=1), dict(eval_every=1)], ids=str)
def test_a_dead_policy_is_neither_saved_nor_evaluated(changes, made, tmp_path):
    changes = {"eval_data": str(made / "heldout.jsonl")} | changes if "eval_every" in changes else changes
    with pytest.raises(ValueError, match="stopped, its policy gives no finite log-probabilities or gradient any more"):
        grpo.main(config(made, tmp_path / "run", lr=1e30, skip_zero_spread=False, **changes))
    row, = metrics(tmp_path / "run")
    assert (row["n_updates"], row["n_skipped"]) == (1, 1) and "eval_accuracy" not in row
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "samples.jsonl"}


def test_one_bad_update_is_skipped_and_the_run_goes_on(made, tmp_path, monkeypatch):
    """Oracle: the run in which that mini-batch had nothing to say. A third of the way down a gradient becomes NaN."""
    accumulate, make, n_calls = grpo.accumulate_gradients, grpo.make_mini_batch, []

    def with_a_bad_one(cfg, ranks, model, mini_batch, *rest, **named):
        done = accumulate(cfg, ranks, model, mini_batch, *rest, **named)
        n_calls.append(1)
        if len(n_calls) == 3:
            next(model.parameters()).grad[0, 0] = math.nan
        return done

    def without_the_third(*args):
        n_calls.append(1)
        mini_batch = make(*args)
        return replace(mini_batch, micros=[]) if len(n_calls) == 3 else mini_batch
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "accumulate_gradients", with_a_bad_one)
        grpo.main(config(made, tmp_path / "True", skip_zero_spread=False))
    n_calls.clear()
    monkeypatch.setattr(grpo, "make_mini_batch", without_the_third)
    grpo.main(config(made, tmp_path / "False", skip_zero_spread=False))
    skipped = metrics(tmp_path / "True")
    assert [row["n_skipped"] for row in skipped] == [0, 1, 0] and [row["n_updates"] for row in skipped] == [2, 1, 2]
    x, y = (load_file(tmp_path / name / "model/model.safetensors") for name in ("True", "False"))
    assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("given, kept", [(None, "direct"), ("toy", "direct"), ("own", None)])
def test_prompt_txt_is_the_prompt_that_ready_made_pairs_were_made_with(given, kept, made, tmp_path, capsys,
                                                                       monkeypatch):
    """Once it was --prompt, or the model's own: judge.py then asked another one than the policy was trained with. The
    evaluations in the run ask it, too (here the model's own, "toy", where none can be told)."""
    asked = []
    judge = grpo.HeldOut.judge
    monkeypatch.setattr(grpo.HeldOut, "judge", lambda self, *rest: asked.append(self.prompt.user) or judge(self, *rest))
    (tmp_path / "own.txt").write_text("[user]\nQ {question}\nA {answer_a}\nB {answer_b}\n")
    shown_by = grpo.load_prompt("direct" if given != "own" else str(tmp_path / "own.txt"))
    rows = [{"id": pair.id, "context_messages": grpo.render(shown_by, pair), "winner": f"model_{pair.winner}"}
            for pair in read_pairs(made / "rl.jsonl")]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    grpo.main(config(made, tmp_path / "run", data=str(data), prompt="direct" if given == "own" else given, steps=1,
                     max_prompt_tokens=2000, micro_tokens=2000, eval_data=str(made / "heldout.jsonl")))
    assert asked == [grpo.load_prompt("direct").user]
    saved = tmp_path / "run/model/prompt.txt"
    assert saved.exists() is (kept is not None)
    assert not kept or saved.read_text() == (ROOT / f"data/prompts/{kept}.txt").read_text()
    said = capsys.readouterr().out
    assert ("note: 11 of 11 rows bring their own messages" in said) is (kept is None)
    assert (", made by the prompt direct, not by" in said) is (kept is not None)  # not by --prompt, nor by the model's


def test_skips_in_a_row_are_counted_over_a_resume(made, tmp_path, monkeypatch):
    """Two skipped updates before the checkpoint and one after it are three. Oracle: the run without an interruption."""
    accumulate = grpo.accumulate_gradients

    def bad(*args, **kwargs):
        _, mismatches = accumulate(*args, **kwargs)
        return math.nan, mismatches
    cfg = config(made, tmp_path / "run", steps=1, save_every=1, skip_zero_spread=False)
    monkeypatch.setattr(grpo, "accumulate_gradients", bad)
    grpo.main(cfg)
    with pytest.raises(ValueError, match="were not finite in 3 optimizer steps in a row"):
        grpo.main(replace(cfg, steps=3, resume=True))
    assert [row["n_skipped"] for row in metrics(tmp_path / "run")] == [2, 1]


def test_evaluation_can_be_switched_off_on_resuming(made, tmp_path):
    cfg = config(made, tmp_path / "run", steps=2, save_every=1, eval_data=str(made / "heldout.jsonl"), eval_every=1)
    grpo.main(replace(cfg, steps=1, keep_best=True))
    resumed = replace(cfg, eval_data=None, keep_best=True, resume=True)
    grpo.main(resumed)
    assert ["eval_accuracy" in row for row in metrics(tmp_path / "run")] == [True, False]


def test_a_changed_number_of_slots_is_said_and_recorded(made, tmp_path, capsys):
    """Steps may be added, too: those made are as they were, and the new ones come behind them."""
    cfg = config(made, tmp_path / "run", steps=2, save_every=1)
    grpo.main(cfg)
    before = metrics(tmp_path / "run")
    capsys.readouterr()
    grpo.main(replace(cfg, steps=3, n_slots=4, resume=True))
    assert "note: --n-slots was 256, is 4 from here on: without --batch-invariant sums are added in another order" in \
        (said := capsys.readouterr().out) and "run: goes on after step 2 of 3" in said
    assert metrics(tmp_path / "run")[:2] == before and len(metrics(tmp_path / "run")) == 3
    resumed, = json.loads((tmp_path / "run/config.json").read_text())["resumed"]
    assert resumed["step"] == 2 and resumed["changed"] == {"n_slots": [256, 4], "steps": [2, 3]}
    with pytest.raises(ValueError, match="run: 3 steps are done already, so it cannot end after 2"):
        grpo.main(replace(cfg, steps=2, n_slots=4, resume=True))


def test_keep_best_keeps_the_policy_with_the_best_held_out_accuracy(made, tmp_path, monkeypatch):
    """Accuracies by hand; oracle: the checkpoint of that step."""
    accuracies = iter((0.4, 0.8, 0.6))
    monkeypatch.setattr(grpo.HeldOut, "judge", lambda self, *rest: ({"eval_accuracy": next(accuracies)}, []))
    grpo.main(config(made, tmp_path, eval_data=str(made / "heldout.jsonl"), eval_every=1, save_every=1, keep_best=True))
    assert json.loads((tmp_path / "best/best.json").read_text()) == {"step": 2, "eval_accuracy": 0.8}
    best, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "checkpoints/step-2"))
    assert all(torch.equal(best[name], wanted[name]) for name in wanted)


def test_the_folder_is_looked_at_before_anything_is_made(made, tmp_path, monkeypatch, capsys):
    """`grpo.py --out DIR --resume` once trained the embedded default's first stage for 98 seconds, and then refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distill, "main", None)
    (tmp_path / "file").write_text("")
    grpo.main(replace(config(made, tmp_path / "used"), steps=1))
    for argv, said in ((["--out", "none", "--resume"], "none/config.json is not there"),
                       (["--out", "file"], "is a file"),
                       (["--resume"], "runs/toy/grpo/config.json is not there"),
                       (["--out", "used"], "used: already holds a run; --resume continues it")):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *argv])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__")
        error = capsys.readouterr().err
        assert said in error.splitlines()[-1], error
    assert not (tmp_path / "runs").exists()


# ---- a user's mistakes

def test_mistakes_end_with_one_line(made, tmp_path, monkeypatch, capsys):
    unlabelled = write_rows(tmp_path / "unlabelled.jsonl",
                            [row | {"winner": None} for row in toy.make("rl", 6, seed=5)])
    for changed, named in (({"data": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file"),
                           ({"data": str(unlabelled)}, "0 usable pairs"),
                           ({"max_prompt_tokens": 5}, "0 usable pairs are fewer than --n-prompts 4"),
                           ({"model": str(tmp_path)}, "tokenizer.json"),
                           ({"model": str(made / "untrained")}, "--prompt is missing: give instruct, reasoning"),
                           ({"n_prompts": 12, "mini_prompts": 6}, "11 usable pairs")):
        monkeypatch.setattr(sys, "argv", ["grpo.py", *flags(config(made, tmp_path / "run", **changed))])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "grpo.py"), run_name="__main__")
        errors = [line for line in re.split("[\r\n]", capsys.readouterr().err)
                  if line.strip() and not line.startswith("tokenize: ")]
        assert stop.value.code == 2 and len(errors) == 1, errors
        assert errors[0].startswith("error: ") and named in errors[0], errors
    assert not (tmp_path / "run").exists()
    for options, named in (({"n_prompts": 0}, "--n-prompts"), ({"n_prompts": 5, "mini_prompts": 2}, "multiple"),
                           ({"group_size": 1}, "--group-size"),
                           ({"steps": -1}, "--steps"), ({"temperature": 0.0}, "--temperature"),
                           ({"dtype": "float16"}, "--dtype")):
        with pytest.raises(ValueError, match=named):
            config(made, tmp_path, **options)


def test_pairs_with_long_prompts_are_dropped_and_counted(made, tmp_path, capsys):
    tokenizer, prompt = Tokenizer(made / "distilled/model"), grpo.load_prompt(str(made / "distilled/model/prompt.txt"))
    longer = toy.make("rl", 3, seed=6)
    longer = [row | {"id": f"longer/{i}", "answer_a": row["answer_a"] + " and"} for i, row in enumerate(longer)]
    data = write_rows(tmp_path / "rl.jsonl", toy.make("rl", 5, seed=5) + longer)
    sizes = [len(tokenizer.chat(grpo.render(prompt, pair))) for pair in read_pairs(data)]
    limit, n = max(sizes) - 1, sum(size == max(sizes) for size in sizes)
    grpo.main(config(made, tmp_path / "run", data=str(data), max_prompt_tokens=limit, steps=1))
    assert f"dropped {n} of 8 pairs with over {limit} prompt tokens" in capsys.readouterr().out and 1 <= n <= 3


def test_pairs_with_a_rubric_are_trained_on_as_they_are_shown(made, tmp_path, recorded):
    """Each rollout answers the prompt that has its pair's rubric; a prompt without the section refuses by name."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text((made / "distilled/model/prompt.txt").read_text() + "\n[rubric]\nsay {rubric}\n")
    rows = [row | {"rubric": "silver" if i % 2 else "Peace"} for i, row in enumerate(toy.make("rl", 4, seed=5))]
    options = dict(data=str(write_rows(tmp_path / "rl.jsonl", rows)), steps=1)
    with pytest.raises(ValueError, match=r"has no section \[rubric\], and pair "):
        grpo.main(config(made, tmp_path / "refused", **options))
    grpo.main(config(made, tmp_path / "run", prompt=str(prompt), **options))
    tokenizer = Tokenizer(made / "distilled/model")
    for group in recorded[0]:
        asked = {row["id"]: f"{row['prompt'][0]['content']}\nA {row['answer_a']}\nB {row['answer_b']}\n\nsay "
                            f"{row['rubric']}" for row in rows}[group.pair.id]
        assert list(group.prompt_ids) == tokenizer.chat([{"role": "user", "content": asked}])
    assert (tmp_path / "run/model/prompt.txt").read_text() == prompt.read_text()


def test_the_papers_recipes():
    """Sizes and rates as in paper.md section 4."""
    rates = {"qwen2.5-7b": 1e-6, "qwen2.5-14b": 7e-7, "qwen2.5-32b": 5e-7, "deepseek-distill-7b": 1e-6,
             "deepseek-distill-14b": 1e-6, "deepseek-distill-32b": 8e-7}
    for name, lr in rates.items():
        cfg = Config("model", "data", **grpo.RECIPES[name])
        assert (cfg.lr, cfg.n_prompts, cfg.mini_prompts, cfg.group_size) == (lr, 1024, 128, 7)
        assert (cfg.max_prompt_tokens, cfg.max_new_tokens, cfg.temperature, cfg.steps) == (4096, 8192, 1.0, 0)
        assert (cfg.clip, cfg.kl_coef, cfg.max_norm, cfg.skip_zero_spread) == (0.2, 1e-3, 1.0, False)
        assert (cfg.beta1, cfg.beta2, cfg.weight_decay) == (0.9, 0.999, 0.01)
        schedule = [learning_rate(step, 60, cfg.lr, cfg.warmup_steps, cfg.final_lr_frac) for step in range(60)]
        assert schedule == [lr] * 60
        assert cfg.prompt == ("reasoning" if name.startswith("deepseek") else None)
    assert set(rates) | {"toy", "qwen2.5-7b-one-gpu"} == set(grpo.RECIPES)
    assert Config("model", "data") == Config("model", "data", **grpo.RECIPES["qwen2.5-7b"])


def test_batch_invariant_training_has_no_mismatch(made, tmp_path, mended_interpreter):
    """The trainer's log-probabilities are the sampler's bits, so mismatch is 0.0 and nothing is clipped; on the default
    path it is not 0, in the same step. Two groups of two, in Triton's interpreter."""
    small = dict(n_prompts=2, mini_prompts=2, group_size=2, steps=1, micro_tokens=400, max_new_tokens=6,
                 skip_zero_spread=False)
    grpo.main(config(made, tmp_path / "invariant", batch_invariant=True, **small))
    grpo.main(config(made, tmp_path / "default", **small))
    invariant, default = metrics(tmp_path / "invariant")[0], metrics(tmp_path / "default")[0]
    assert invariant["mismatch"] == invariant["mismatch_max"] == 0.0 < default["mismatch"] < 1e-5
    assert invariant["clip_frac"] == 0.0
    assert invariant["grad_norm"] == pytest.approx(default["grad_norm"], rel=1e-3) and invariant["grad_norm"] > 0


def test_batch_invariant_copy_and_refusal(made, tmp_path):
    """The sampler's copy of sharded weights keeps the choice; what Triton cannot run is refused before any work."""
    model = Model.from_pretrained(made / "distilled/model")
    model.impl = "invariant"
    try:
        assert filled_copy(shard(model, ALONE, torch.float16), torch.float16).impl == "invariant"
    finally:
        leave_ranks()
    with pytest.raises(ValueError, match="kernels are Triton's, which do not run bfloat16 on cpu"):
        grpo.main(config(made, tmp_path / "no", batch_invariant=True, dtype="bfloat16"))
    assert not (tmp_path / "no").exists()
