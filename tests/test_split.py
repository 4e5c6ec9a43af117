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
import distill  # noqa: E402
import evaluate  # noqa: E402
import grpo  # noqa: E402
from common import Ranks, init_ranks  # noqa: E402
from data import toy  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from sample import make_split  # noqa: E402
from split import Split  # noqa: E402
from test_distill import flags, metrics, write_rows  # noqa: E402
from test_sample import QWEN2, make_folder  # noqa: E402

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


# ---- rollouts

ROLLOUTS = """
import sys
import torch
import batch, pages, sample
from common import init_ranks, shard
from draw import Sampling
from pages import affordable, page_bytes
from sample import Sampler, filled_copy, make_split
from test_sample import PROMPTS, QWEN2, QWEN3, tiny

ranks = init_ranks(1, int(sys.argv[1]))
split = make_split(ranks)
n, cpu = split.n, torch.device("cpu")
heads = dict(num_attention_heads=8, num_key_value_heads=4)
raws = {"biases": QWEN2 | heads, "norms, all biases, a head of its own": QWEN3 | heads | dict(attention_bias=True)}
HOWS = [(Sampling(1, 20, 0.0, stop={17}), {}),
        (Sampling(3, 30, stop={17, 18}, seed=4), {}),
        (Sampling(2, 40, 0.7, 0.9, seed=5), dict(n_slots=12, page_size=4, prefill_tokens=30, n_pages=28))]

def rollouts(model, how, n_pages=0, page_size=64, **options):
    kv_gb = n_pages * page_bytes(model.config, page_size, model.head_vd.dtype) / 1e9
    sampler = Sampler(model, kv_gb=kv_gb, page_size=page_size, **options)
    groups = sampler.generate(ranks.share(PROMPTS), how)
    return [[(r.ids, r.logps, r.reason) for r in group] for group in groups], sampler.n_put_back

def agreed(x):
    for_all = ranks.gather(x)
    mine = ranks.rank // n * n
    assert all(other == for_all[mine] for other in for_all[mine:mine + n])
    return x

for name, raw in raws.items():
    whole = tiny(raw)
    part = filled_copy(whole, torch.float32, split)
    assert part.config.num_key_value_heads * n == part.config.num_attention_heads // 2 * n == 4, part.config
    for how, options in HOWS:
        expected, put_back = rollouts(whole, how, **options)
        got, again = agreed(rollouts(part, how, **options))
        assert again == put_back and (put_back > 1) == bool(options), (put_back, name)
        for group, others in zip(expected, got, strict=True):
            for (ids, logps, reason), (other, other_logps, other_reason) in zip(group, others, strict=True):
                assert ids == other and reason == other_reason, (name, how)
                torch.testing.assert_close(torch.tensor(other_logps), torch.tensor(logps), rtol=0, atol=1e-5)

# the same memory holds n times as many tokens
room = [affordable(model.config, split, torch.float32, cpu, 1.0, 10, 10, 64) for model in (whole, part)]
assert 0 <= room[1] - n * room[0] < n

# the copy of a sharded model has the whole one's bits, and what is gathered has the copy's dtype
gathered, full = [], sample.full
sample.full = lambda x: gathered.append(x.dtype) or full(x)
sharded = shard(tiny(raw), ranks, torch.float32)
copy = filled_copy(sharded, torch.bfloat16, split)
for name, x in whole.to(torch.bfloat16).named_parameters():
    assert torch.equal(copy.get_parameter(name), x[split.part(name, x.shape)]), name
assert set(gathered) == {torch.bfloat16} and copy.model.layers[0].mlp.fused.dtype == torch.bfloat16
agreed(rollouts(copy, HOWS[1][0]))

# the first rank's draw counts, whatever the others would have drawn, and the least memory of all bounds the pool
choose, sizes = batch.choose, []
def other_draw(*args):
    ids, logps = choose(*args)
    return (ids if split.rank == 0 else ids * 0), logps - split.rank
def other_bytes(device):
    return 1e6 * (10 - split.rank)
batch.choose, pages.free_bytes = other_draw, other_bytes
batch.Batch.work_bytes = lambda self, dtype: 0
inner = batch.Batch.admit
batch.Batch.admit = lambda self: sizes.append(len(self.pool.free_x)) or inner(self)
long = Sampling(3, 30_000, stop=frozenset(range(10, 61)), seed=4)
got = agreed(rollouts(part, long)[0])
assert set(agreed(sizes)) == {int(1e6 * (11 - n) / page_bytes(part.config, 64, torch.float32))}
batch.choose = choose
assert got == agreed(rollouts(part, long)[0]), "the first rank's draws are those of an undisturbed run"

# one rank's damage is told by all
part.model.layers[1].mlp.down_proj.weight.fill_(float("nan") if split.rank == n - 1 else 0.0)
try:
    rollouts(part, long)
except ValueError as e:
    assert "not finite" in str(e)
    ranks.barrier()
    print("fine", flush=True)
"""


def torchrun(n_ranks, *command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_ranks),
               *map(str, command)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("n_ranks, n", [(4, 2), (4, 4)])
def test_split_rollouts_are_those_of_one_rank(n_ranks, n, tmp_path):
    """Equal tokens, log-probabilities to 1e-5 in float32, put back or not; two groups of two have two shares."""
    (tmp_path / "rollouts.py").write_text(ROLLOUTS)
    assert torchrun(n_ranks, tmp_path / "rollouts.py", n).count("fine") == n_ranks
