"""common.py. Oracles: schedules and micro-batches worked by hand; a naive search for what a micro-batch split may and
may not do; the whole model's gradients."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from common import (Ranks, Tally, flops_utilization, init_ranks, learning_rate, make_optimizers, micro_batches,
                    optimizer_step)
from files import one_line_errors
from model import Model, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"))
QWEN3 = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=40, hidden_size=16,
             intermediate_size=24,
             num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-6,
             tie_word_embeddings=True, attention_bias=True)


def test_one_line_errors(capsys, monkeypatch):
    monkeypatch.delenv("RM_TRACEBACK", raising=False)
    for error, code, text in ((ValueError("a.jsonl:3: two\n  lines"), 2, "error: a.jsonl:3: two lines\n"),
                              (KeyboardInterrupt(), 130, "interrupted\n"),
                              (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file\n"),
                              (OSError("no name"), 2, "error: no name\n")):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            raise error
        assert stop.value.code == code and capsys.readouterr().err == text
    with pytest.raises(AssertionError), one_line_errors():  # the programmer's mistakes keep their traceback
        raise AssertionError
    monkeypatch.setenv("RM_TRACEBACK", "1")
    with pytest.raises(ValueError), one_line_errors():
        raise ValueError


# ---- micro-batches, tally, schedule

def test_micro_batches_worked_by_hand():
    assert micro_batches([9, 3, 2], 6, 2) == [[[0], [1]], [[2], []]]  # the docstring's example
    assert micro_batches([3, 3, 3], 100, 1) == [[[0, 1, 2]]]
    assert micro_batches([2, 5, 3], 5, 2) == [[[1], [2, 0]]]
    assert micro_batches([4], 5, 3) == [[[0], [], []]]
    assert micro_batches([], 5, 2) == []


def test_items_that_are_all_over_the_limit_go_alone():
    """Once the search began at ceil(tokens / limit) steps, more than there are items, and found none at all."""
    assert micro_batches([100, 100], 10, 1) == [[[0]], [[1]]]
    assert micro_batches([100], 1, 4) == [[[0], [], [], []]]


def test_micro_batches_hold_every_item_once_within_the_limit():
    rng = random.Random(0)
    for _ in range(400):
        world, limit = rng.randint(1, 4), rng.randint(1, 60)
        sizes = [rng.randint(1, 40) for _ in range(rng.randint(0, 30))]
        steps = micro_batches(sizes, limit, world)
        assert sorted(i for step in steps for share in step for i in share) == list(range(len(sizes)))
        assert all(len(step) == world for step in steps)  # every rank makes every step
        assert all(sum(sizes[i] for i in share) <= limit or len(share) == 1 for step in steps for share in step)
        assert steps == micro_batches(sizes, limit, world)  # ranks work it out apart: it must be a function
        # longest-processing-time: no bin exceeds another by more than its smallest item
        loads = [(sum(sizes[i] for i in share), min((sizes[i] for i in share), default=0)) for step in steps
                 for share in step]
        assert all(load - smallest <= min(other for other, _ in loads) for load, smallest in loads)


def test_micro_batches_make_no_more_steps_than_needed():
    rng = random.Random(1)
    for _ in range(100):
        sizes, world = [rng.randint(1, 10) for _ in range(40)], rng.randint(1, 3)
        steps, least = micro_batches(sizes, 30, world), math.ceil(sum(sizes) / (30 * world))
        assert least <= len(steps) <= least + 1, (len(steps), least)


def test_tally_divides_sums_by_counts_once():
    tally = Tally()
    tally.add("x", torch.tensor(6.0, requires_grad=True), 2)
    tally.add("x", 3.0, 4)  # 9 over 6, not the mean of 3 and 0.75
    tally.add("y", 5.0, 0)
    tally.add("y", 0.0, 10)
    tally.add("nothing", 0.0, 0)
    tally.add("one", 7)
    assert tally.means(ALONE) == {"x": 1.5, "y": 0.5, "nothing": None, "one": 7.0}
    assert Tally().means(ALONE) == {}


def test_learning_rate_worked_by_hand():
    warm = [learning_rate(step, 10, 8.0, 4) for step in range(10)]
    assert warm == [2.0, 4.0, 6.0, 8.0] + [8.0] * 6  # without a final fraction it stays
    cosine = [learning_rate(step, 7, 1.0, 2, 0.2) for step in range(7)]
    assert cosine == pytest.approx([0.5, 1.0, 1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6,
                                    0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2, 0.2])
    assert [learning_rate(step, 3, 1.0, 0, 0.1) for step in range(3)] == pytest.approx([1.0, 0.55, 0.1])
    assert learning_rate(0, 1, 5.0, 0, 0.1) == 5.0 and learning_rate(9, 5, 1.0, 0, 0.1) == pytest.approx(0.1)
    assert learning_rate(1, 2, 5.0, 2, 0.1) == 5.0  # all steps warm up


# ---- optimizers

def small_model(seed=0, **changes):
    return Model.random(ModelConfig.from_dict(QWEN3 | changes), seed)


def train(model, optimizers, steps):
    """Some optimizer steps on losses that only the step number decides; returns the gradient norms."""
    norms = []
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        loss = sum((x * torch.randn(x.shape, generator=rng)).sum() + x.square().sum() for x in model.parameters())
        loss.backward()
        norms.append(optimizer_step(model, optimizers, 0.01 * (step + 1), 1.0, float(loss.detach())))
    return norms


def test_who_optimizes_what():
    model = small_model(tie_word_embeddings=False)
    name_of = {x: name for name, x in model.named_parameters()}
    adamw, = make_optimizers(model, "adamw", 1e-3, (0.9, 0.95), 0.1)
    assert [(g["weight_decay"], g["betas"]) for g in adamw.param_groups] == [(0.1, (0.9, 0.95)), (0.0, (0.9, 0.95))]
    decayed, plain = ({name_of[x] for x in group["params"]} for group in adamw.param_groups)
    assert plain == {n for n in name_of.values() if "norm" in n or n.endswith("bias")} and len(plain) == 2 * (4 + 4) + 1
    assert decayed == set(name_of.values()) - plain and "lm_head.weight" in decayed

    adamw, muon = make_optimizers(model, "muon", 1e-3, (0.9, 0.95), 0.1)
    matrices = {name_of[x] for group in muon.param_groups for x in group["params"]}
    assert matrices == {n for n in name_of.values() if "_proj.weight" in n} and len(matrices) == 2 * 7
    assert {name_of[x] for x in adamw.param_groups[0]["params"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name_of[x] for x in adamw.param_groups[1]["params"]} == plain
    assert muon.param_groups[0]["weight_decay"] == 0.1


def test_moments_that_wait_on_the_host_make_the_same_steps(monkeypatch):
    """Bit for bit; each block's leave their memory for its own step only, and come back to it."""
    plain, offloaded = small_model(), small_model()
    train(plain, make_optimizers(plain, "adamw", 1e-2, (0.9, 0.95), 0.1), range(4))
    optimizers = make_optimizers(offloaded, "adamw", 1e-2, (0.9, 0.95), 0.1, offload=True)
    train(offloaded, optimizers, range(2))
    n_weights = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
    assert len(optimizers) == 2 + 2 and n_weights == len(list(offloaded.parameters()))  # blocks, embedding, norm

    def places():
        return {(x, key): slots[key].data_ptr() for optimizer in optimizers for x, slots in optimizer.state.items()
                for key in ("exp_avg", "exp_avg_sq")}
    home, away, step = places(), [], torch.optim.AdamW.step

    def look(self):
        away.append({x for (x, key), place in places().items() if place != home[x, key]})
        step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    train(offloaded, optimizers, range(2, 4))
    assert away == 2 * [{x for group in optimizer.param_groups for x in group["params"]} for optimizer in optimizers]
    assert places() == home
    for x, y in zip(plain.parameters(), offloaded.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_step_clips_the_whole_models_gradient_and_clears_it():
    """Against the norm over all gradients as one vector, and SGD's update with the gradient scaled to max_norm."""
    model = small_model()
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for x in model.parameters():
        x.grad = torch.full_like(x, 0.5)
    n = sum(x.numel() for x in model.parameters())
    norm = optimizer_step(model, [torch.optim.SGD(model.parameters(), lr=99.0)], 0.1, 2.0, 1.0)
    assert norm == pytest.approx(0.5 * math.sqrt(n), rel=1e-5)
    for name, x in model.named_parameters():
        assert x.grad is None
        torch.testing.assert_close(x.detach(), before[name] - 0.1 * 2.0 / math.sqrt(n), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient, loss", [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, -math.inf)])
def test_a_step_whose_loss_or_gradient_is_not_finite_is_left_out(gradient, loss):
    """Once it was made, and every weight was NaN from then on. The moments stay as they were, too."""
    model = small_model()
    optimizers = make_optimizers(model, "muon", 1e-2, (0.9, 0.95), 0.1)
    train(model, optimizers, range(2))
    state = [dict(slots) for optimizer in optimizers for slots in optimizer.state.values()]
    before = [x.detach().clone() for x in [*model.parameters(), *(v for slots in state for v in slots.values())]]
    for x in model.parameters():
        x.grad = torch.full_like(x, 0.5)
    next(model.parameters()).grad[0, 0] = gradient
    assert math.isnan(optimizer_step(model, optimizers, 0.1, 2.0, loss))
    after = [*model.parameters(), *(v for slots in state for v in slots.values())]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(x.grad is None for x in model.parameters())


RANKS = """
import json, os, sys, torch
sys.path.insert(0, sys.argv[1])
from common import Ranks, Tally, full, init_ranks, interleave, shard
from model import Model, ModelConfig, pack
from sample import filled_copy
ranks, raw = init_ranks(1), json.loads(sys.argv[2])
assert (ranks.rank, ranks.world, ranks.main) == (int(os.environ["RANK"]), 2, os.environ["RANK"] == "0")
assert ranks.gather({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
assert interleave(ranks.gather("abc"[ranks.rank::2])) == ["a", "b", "c"]

def read():
    if ranks.rank == 1:
        raise ValueError("line 7")
    return "lines"
try:
    ranks.agree(read)
except ValueError as e:
    assert str(e) == "line 7"
else:
    assert False, "a mistake of rank 1 was kept from rank 0"
assert ranks.agree(lambda: ranks.rank) == [0, 1]
x = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
assert ranks.sum(x).tolist() == [3.0, 30.0] and x.tolist() == [ranks.rank + 1.0, 10 * (ranks.rank + 1.0)]
tally = Tally()
tally.add("b", 4.0 * ranks.rank, 3 * ranks.rank)
tally.add("a", 1.0, 1)
assert tally.means(ranks) == {"a": 1.0, "b": 4 / 3}

def gradients(model, rows):
    loss = sum(-model(pack([(ids, [])]), torch.arange(1, len(ids)))[0].sum() for ids in rows)
    loss.backward()
    return {name: full(p.grad) for name, p in model.named_parameters()}
rows = [[1, 2, 3, 4, 5], [7, 8, 9], [30, 1]]
whole = Model.random(ModelConfig.from_dict(raw))
want = gradients(whole, rows)
model = shard(Model.random(ModelConfig.from_dict(raw)), ranks, torch.float32)
copy = filled_copy(model, torch.float32)
assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), copy.parameters()))
gradients(model, rows[:1] if ranks.main else rows[1:2])     # gradients are added up over ranks and micro-batches
got = gradients(model, rows[2:] if ranks.main else [rows[2][:1]])
for name in want:
    torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)

def fails_on_1():
    if ranks.rank == 1:
        raise OSError(28, "No space left on device", "x")
    return ranks.rank
assert ranks.agree(lambda: ranks.rank) == [0, 1]
try:
    ranks.agree(fails_on_1)
    raise AssertionError
except OSError as e:
    assert (e.errno, e.filename) == (28, "x")
ranks.barrier()
print("fine", flush=True)
"""


def test_two_ranks_add_up_sums_and_gradients(tmp_path):
    """Sums by hand; sharded gradients against the whole model's; one rank's error is raised on both."""
    (tmp_path / "ranks.py").write_text(RANKS)
    done = torchrun(tmp_path / "ranks.py", ROOT, json.dumps(QWEN3))
    assert done.returncode == 0 and done.stdout.count("fine") == 2, done.stderr[-3000:]


def torchrun(*command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env={**common.os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=120)


def test_flops_utilization_worked_by_hand(monkeypatch):
    """Two H100 could have done 2 x 3 x 989e12 operations in 3 seconds. An unknown card, or a CPU, has no peak."""
    names = iter(["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    two = Ranks(0, 2, torch.device("cuda", 0))
    assert flops_utilization(2 * 989e12, 3.0, two) == pytest.approx(1 / 3)
    assert flops_utilization(312e12, 2.0, Ranks(0, 1, torch.device("cuda", 0))) == 0.5
    assert flops_utilization(1e12, 1.0, two) is None
    assert flops_utilization(1e12, 1.0, Ranks(0, 1, torch.device("cpu"))) is None


@pytest.mark.parametrize("given, left", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1"),
                                         ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, None)])
def test_what_a_user_says_of_the_allocator_stands(given, left, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    init_ranks()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == left
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
