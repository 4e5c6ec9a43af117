"""split.py, and the sampler over several ranks. Oracles: slices worked by hand; the same rollouts, runs and scores of
one rank; every rank of a group against the others."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import batch  # noqa: E402
import distill  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
import pages  # noqa: E402
import sample  # noqa: E402
from common import Ranks, init_ranks, shard  # noqa: E402
from data import toy  # noqa: E402
from draw import Sampling  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from pages import affordable, page_bytes  # noqa: E402
from ranks import on_ranks  # noqa: E402
from sample import Sampler, filled_copy, make_split  # noqa: E402
from split import Split  # noqa: E402
from test_distill import flags, write_rows  # noqa: E402
from test_evaluate import folder, judged, without_time  # noqa: E402, F401
from test_grpo import metrics  # noqa: E402
from test_sample import PROMPTS, QWEN2, QWEN3, tiny  # noqa: E402

# ---- which part is whose


def test_parts_by_hand():
    """A layer of width 32 with 8 query and 4 key/value heads of 6 channels and an MLP of 20, over 4 ranks: two query
    heads, one key/value head and 5 columns each."""
    second = Split(1, 4)
    wanted = {"q_proj.weight": ((48, 32), (slice(12, 24), slice(0, 32))), "q_proj.bias": ((48,), (slice(12, 24),)),
              "k_proj.weight": ((24, 32), (slice(6, 12), slice(0, 32))), "v_proj.bias": ((24,), (slice(6, 12),)),
              "o_proj.weight": ((32, 48), (slice(0, 32), slice(12, 24))), "o_proj.bias": ((32,), (slice(0, 32),)),
              "gate_proj.weight": ((20, 32), (slice(5, 10), slice(0, 32))),
              "up_proj.weight": ((20, 32), (slice(5, 10), slice(0, 32))),
              "down_proj.weight": ((32, 20), (slice(0, 32), slice(5, 10))), "q_norm.weight": ((6,), (slice(0, 6),)),
              "input_layernorm.weight": ((32,), (slice(0, 32),))}
    for name, (shape, slices) in wanted.items():
        assert second.part(f"model.layers.1.module.{name}", shape) == slices, name
        assert Split().part(f"model.layers.1.module.{name}", shape) == tuple(slice(0, size) for size in shape)
    assert second.part("lm_head.weight", (61, 32)) == (slice(0, 61), slice(0, 32))
    assert second.part("model.embed_tokens.weight", (61, 32)) == (slice(0, 61), slice(0, 32))


def test_every_number_is_one_ranks_or_all_ranks():
    """The parts of 2 ranks, loaded from a folder: side by side they are the whole, or each is."""
    config = ModelConfig.from_dict(QWEN2)
    whole = Model.random(config)
    for name, x in whole.named_parameters():
        parts = [x[Split(rank, 2).part(name, x.shape)] for rank in range(2)]
        axis = next((i for i in range(x.ndim) if parts[0].shape[i] < x.shape[i]), None)
        assert torch.equal(torch.cat(parts, axis) if axis is not None else parts[1], x), name
        assert parts[0].shape == Model(config, Split(0, 2)).get_parameter(name).shape, name


@pytest.mark.parametrize("changes, n, said", [
    ({}, 4, "num_key_value_heads is 2, which --sampler-ranks 4 does not divide; 2 is the largest that divides this"),
    (dict(num_key_value_heads=1), 2, "num_key_value_heads is 1, which --sampler-ranks 2 does not divide; 1 is the lar"),
    (dict(num_attention_heads=6, head_dim=8, num_key_value_heads=3), 2, "num_key_value_heads is 3, which --sampler-ran"),
    (dict(intermediate_size=49), 2, "intermediate_size is 49, which --sampler-ranks 2 does not divide; 1 is the larg"),
    (dict(num_key_value_heads=4, intermediate_size=42), 4, "intermediate_size is 42, .* 2 is the largest that divides"),
])
def test_what_does_not_divide_is_refused_by_name(changes, n, said, tmp_path):
    """With config.json alone: before any weights are read."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | changes))
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: {said}"):
        make_split(Ranks(0, n, torch.device("cpu"), n), tmp_path)


def test_ranks_that_do_not_divide_are_refused(monkeypatch):
    """Groups lie within a node: 2 nodes of 4 hold no group of 8, and 6 ranks of a node none of 4."""
    for world, on_node, n in ((8, 4, 8), (6, 6, 4), (1, 1, 2), (3, 3, 2)):
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", on_node),
                            ("MASTER_ADDR", "localhost"), ("MASTER_PORT", 1)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match=f"--sampler-ranks {n} does not divide the {on_node} ranks of a node"):
            init_ranks(0, n)
    for n in (0, 3, 16):
        with pytest.raises(ValueError, match=f"--sampler-ranks is 1, 2, 4 or 8, got {n}"):
            distill.Config("model", "data", sampler_ranks=n)
    for config in (grpo.Config("model", "data"), evaluate.Config(("model",), data="data")):
        with pytest.raises(ValueError, match="--batch-invariant and --sampler-ranks above 1 do not go together: ranks"):
            replace(config, sampler_ranks=2, batch_invariant=True)


def test_shares_of_ranks_that_sample_as_one():
    """6 ranks, two together: three shares, and what became of them from ranks 0, 2 and 4."""
    class Shelf(Ranks):
        def gather(self, x):
            shelf.append(x)
            return shelf
    shelf, shares = [], []
    for rank in range(6):
        ranks = Shelf(rank, 6, torch.device("cpu"), 2)
        shares.append(ranks.share(range(7)))
        results = ranks.gather_shares(f"of {rank}")
    assert [list(x) for x in shares] == [[0, 3, 6], [0, 3, 6], [1, 4], [1, 4], [2, 5], [2, 5]]
    assert results == ["of 0", "of 2", "of 4"]


# ---- rollouts, on ranks that are forks of this process

HEADS = dict(num_attention_heads=8, num_key_value_heads=4)
MODELS = {"biases": QWEN2 | HEADS, "norms, all biases, its own head": QWEN3 | HEADS | dict(attention_bias=True)}
PLAIN = Sampling(3, 8, stop=frozenset({17, 18}), seed=4)
GREEDY = Sampling(1, 8, 0.0, stop=frozenset({17}))
CUT = Sampling(3, 8, 0.7, 0.9, seed=5)
FEW_PAGES = dict(n_slots=12, page_size=2, prefill_tokens=30, n_pages=28)


def rollouts(model, ranks, how, n_pages=0, page_size=64, **options):
    """(tokens, log-probabilities, reason) of this rank's share of PROMPTS, and how many had to be put back."""
    kv_gb = n_pages * page_bytes(model.config, page_size, model.head_vd.dtype) / 1e9
    sampler = Sampler(model, kv_gb=kv_gb, page_size=page_size, **options)
    groups = sampler.generate(ranks.share(PROMPTS), how)
    return [[(r.ids, r.logps, r.reason) for r in group] for group in groups], sampler.n_put_back


def agreed(ranks, x):
    """x, which is equal on all ranks of the group."""
    of_all, first = ranks.gather(x), ranks.rank // ranks.together * ranks.together
    assert all(other == of_all[first] for other in of_all[first:first + ranks.together])
    return x


def check_rollouts(ranks, split):
    """Equal tokens, log-probabilities to 1e-5; with few pages the same ones are put back."""
    for raw, how, options in ((MODELS["biases"], GREEDY, {}), (MODELS["biases"], CUT, FEW_PAGES),
                              (MODELS["norms, all biases, its own head"], PLAIN, {})):
        whole = tiny(raw)
        part = filled_copy(whole, torch.float32, split)
        assert (part.config.num_attention_heads, part.config.num_key_value_heads) == (8 // split.n, 4 // split.n)
        expected, n_put_back = rollouts(whole, ranks, how, **options)
        got, again = agreed(ranks, rollouts(part, ranks, how, **options))
        assert again == n_put_back and (n_put_back > 1) == bool(options), n_put_back
        for group, others in zip(expected, got, strict=True):
            for (ids, logps, reason), (other, other_logps, other_reason) in zip(group, others, strict=True):
                assert ids == other and reason == other_reason
                torch.testing.assert_close(torch.tensor(other_logps), torch.tensor(logps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_ranks, n", [(4, 2), (4, 4)])
def test_split_rollouts_are_those_of_one_rank(n_ranks, n):
    """Oracle: the whole model's, on each rank. Two groups of two have a share of the prompts each."""
    on_ranks(n_ranks, lambda ranks: check_rollouts(ranks, make_split(ranks)), n)


def check_agreement(ranks, split):
    whole = tiny(MODELS["biases"])
    part = filled_copy(whole, torch.float32, split)
    undisturbed = rollouts(part, ranks, PLAIN)[0]
    choose, sizes = batch.choose, []

    def other_draw(*args):
        ids, logps = choose(*args)
        return (ids if split.rank == 0 else ids * 0), logps - split.rank
    batch.choose = other_draw
    pages.free_bytes = lambda device: 1e6 * (10 - split.rank)  # the last rank has least
    batch.Batch.work_bytes = lambda self, dtype: 0
    inner = batch.Batch.admit
    batch.Batch.admit = lambda self: sizes.append(len(self.pool.free_x)) or inner(self)
    got = rollouts(part, ranks, replace(PLAIN, max_new_tokens=30_000, stop=frozenset(range(6, 61))))[0]
    assert set(sizes) == {int(1e6 * (11 - split.n) / page_bytes(part.config, 64, torch.float32))}
    assert all(ids == other[:len(ids)] for group, others in zip(got, undisturbed)
               for (ids, _, _), (other, _, _) in zip(group, others))

    # the same bound holds n times as many tokens
    room = [affordable(model.config, model.split, torch.float32, torch.device("cpu"), 1.0, 10, 10, 64)
            for model in (whole, part)]
    assert 0 <= room[1] - split.n * room[0] < split.n
    # one rank's damage is told by all
    part.model.layers[1].mlp.down_proj.weight.fill_(float("nan") if split.rank == split.n - 1 else 0.0)
    with pytest.raises(ValueError, match="not finite"):
        rollouts(part, ranks, PLAIN)

    # a sharded model's copy has the whole one's bits, and is cast before it is gathered; in bfloat16 all agree, too
    gathered, full = [], sample.full
    sample.full = lambda x: gathered.append(x.dtype) or full(x)
    copy = filled_copy(shard(tiny(MODELS["biases"]), ranks, torch.float32), torch.bfloat16, split)
    for name, x in whole.to(torch.bfloat16).named_parameters():
        assert torch.equal(copy.get_parameter(name), x[split.part(name, x.shape)]), name
    assert set(gathered) == {torch.bfloat16} and copy.model.layers[0].mlp.fused.dtype == torch.bfloat16
    pages.free_bytes = lambda device: 1e9
    agreed(ranks, rollouts(copy, ranks, PLAIN))


def test_the_ranks_of_a_group_agree():
    """Where they could differ, the first rank's draw and the least free memory hold, by construction: the others are
    made to draw other tokens, and to have less memory."""
    on_ranks(2, lambda ranks: check_agreement(ranks, make_split(ranks)), 2)


# ---- whole runs

RUNS = """
import gc, json, runpy, sys
from torch.multiprocessing.reductions import StorageWeakRef
import distill, grpo
from common import Ranks
from options import parse_config

copies, lent = [], []  # the memory of every copy, by weak references; how many were seen while they were sampled from

def noted(*args, inner=grpo.filled_copy):
    copy = inner(*args)
    fused = [x for block in copy.model.layers for x in (*block.self_attn.fused, block.mlp.fused) if x is not None]
    copies.append([StorageWeakRef(x.untyped_storage()) for x in [*copy.parameters(), *fused]])
    assert copy is not args[0] and len(fused) == 2 * len(copy.model.layers) and copy.config.num_key_value_heads == 1
    return copy

def sampling(self, x, inner=Ranks.gather_shares):
    assert not any(memory.expired() for memory in copies[-1])
    lent.append(len(copies))
    return inner(self, x)

def training(*args, inner=grpo.optimizer_step):
    assert all(memory.expired() for copy in copies for memory in copy)
    return inner(*args)

Ranks.gather_shares = sampling
for script in distill, grpo:
    script.filled_copy, script.optimizer_step = noted, training
distill_argv, grpo_argv, evaluate_argv = json.loads(sys.argv[1])
gc.disable()  # it is let go of, not found later
distill.main(parse_config(distill.Config, argv=distill_argv))
assert len(copies) == 2 == len(lent)
grpo.main(parse_config(grpo.Config, argv=grpo_argv))
assert len(copies) == 2 + 4 and lent == [1, 2, 3, 4, 5, 6]
gc.enable()
del Ranks.gather_shares
sys.argv = ["evaluate.py", *evaluate_argv]
runpy.run_path("evaluate.py", run_name="__main__")
"""


def test_runs_with_a_split_sampler_are_those_of_one_rank(folder, tmp_path):  # noqa: F811
    """distill.py and evaluate.py with equal judgements, grpo.py with equal rollouts; each copy's memory is free before
    the next optimizer step. Oracle: the same on one rank, where the copy is the model itself."""
    write_rows(tmp_path / "chains.jsonl", toy.make("distill", 8, seed=3))
    pairs = str(write_rows(tmp_path / "pairs.jsonl", toy.make("rl", 8, seed=5)))
    both = dict(model=str(folder), eval_data=pairs, eval_every=1, dtype="float32", gradient_checkpointing=False,
                save_every=0, threads=1)
    cases = {"distill": (distill, distill.Config(data=str(tmp_path / "chains.jsonl"), prompt="toy", batch_size=4,
                                                 eval_tokens=2, lr=1e-3, **both)),
             "grpo": (grpo, grpo.Config(data=pairs, n_prompts=4, mini_prompts=2, group_size=4, steps=2, lr=1e-4,
                                        max_new_tokens=2, kl_coef=0.1, n_samples=4, n_slots=6, **both)),
             "evaluate": (evaluate, evaluate.Config(model=(str(folder),), data=pairs, max_new_tokens=2, threads=1))}
    argvs = []
    for name, (script, cfg) in cases.items():
        script.main(replace(cfg, out=str(tmp_path / name / "1")))
        argvs.append(flags(replace(cfg, out=str(tmp_path / name / "2"), sampler_ranks=2)))
    argvs[-1] = ["--model", str(folder), "--data", pairs, "--max-new-tokens", "2", "--threads", "1", "--out",
                 str(tmp_path / "evaluate/2"), "--sampler-ranks", "2"]
    (tmp_path / "runs.py").write_text(RUNS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "runs.py"), json.dumps(argvs)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("distill", "grpo"):
        one, two = metrics(tmp_path / name / "1"), metrics(tmp_path / name / "2")
        for row, other in zip(one, two, strict=True):
            assert other == pytest.approx(row, rel=1e-4, abs=1e-5), name
        assert 0 < sum(row["eval_accuracy"] for row in one) < 2, "the case has lost its variety"
    assert [row["n_updates"] for row in one] == [2, 2] and max(row["mismatch_max"] for row in two) < 1e-5
    texts = [[json.loads(line)["judgement"] for line in (tmp_path / "grpo" / n / "samples.jsonl").open()] for n in "12"]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert without_time(judged(tmp_path / "evaluate/1")) == without_time(judged(tmp_path / "evaluate/2"))
    assert sorted(os.listdir(tmp_path / "evaluate/1")) == sorted(os.listdir(tmp_path / "evaluate/2"))
