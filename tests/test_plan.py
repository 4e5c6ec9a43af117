"""A run's plan: its numbers against arithmetic by hand, against the live tensors of a real step, and against the real
code at full width on fake tensors; what --plan prints, what a run that does not fit is told, docs/memory.md."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distill
import grpo
from common import Ranks
from options import parse_config, saved_options
from plan import check_fits, make_plan, phases_of, sizes_of
from plan_table import suggested
from run import Run

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from bench import memory  # noqa: E402
from bench.twins import geometry  # noqa: E402

CPU = torch.device("cpu")
GB80 = 80.0


def recipe(script, name, **changes):
    return script.Config(model="-", data="-", **script.RECIPES[name] | changes)


@pytest.fixture
def no_group():
    """Whatever process group another test has left."""
    if dist.is_initialized():
        dist.destroy_process_group()


def test_sizes_by_hand():
    """Qwen2.5-7B has 7,615,616,512 parameters; two ranks of the sampler share its projections, and no more."""
    config = memory.qwen("7b")
    D, F, V, KV = 3584, 18944, 152064, 512
    projections = 2 * D * D + 2 * D * KV + 3 * D * F + D + 2 * KV  # with q's, k's and v's biases
    sizes = sizes_of(config, 8, 2)
    assert sizes.total == 7_615_616_512 and sizes.block == projections + 2 * D and sizes.root == 2 * V * D + D
    assert sizes.shard * 8 == sizes.total and sizes.part == sizes.total - 28 * projections // 2
    assert sizes_of(config, 16, 1).part == sizes.total
    # 4 ranks, 10 rows: 3 each. Embedding; q, k, v with their biases, o; gate, up, down; three norms
    uneven = 3 * 8 + (2 * 8 + 2) + 2 * (8 + 1) + 2 * 8 + 2 * 3 * 8 + 2 * 9 + 3 * 2
    assert sizes_of(geometry(1, 8, 2, 1, 9, 10), 4, 1).shard == uneven


def test_phases_hold_what_they_need():
    """Masters are 4 bytes a parameter over the ranks, moments 8, the reference 2. Gradients live in the update, the
    copy in the rollout; with --offload moments are in no phase but the optimizer's step, and there a block's."""
    config, P = memory.qwen("7b"), 7_615_616_512
    work = grpo.work_of(recipe(grpo, "qwen2.5-7b"))
    phases = phases_of(config, work, sizes_of(config, 8, 1), 8)
    assert list(phases) == ["load", "rollout", "score", "update", "optimizer", "save"]
    assert all(parts["masters"] * 8 == 4 * P and parts["reference"] * 8 == 2 * P for parts in phases.values())
    assert all(parts["moments"] * 8 == 8 * P for phase, parts in phases.items() if phase != "load")
    assert {phase for phase, parts in phases.items() if "gradients" in parts} == {"update", "optimizer"}
    assert [phase for phase, parts in phases.items() if "sampler's copy" in parts] == ["rollout"]
    assert phases["rollout"]["sampler's copy"] == 2 * P
    away = phases_of(config, replace(work, offload=True), sizes_of(config, 8, 1), 8)
    assert [phase for phase, parts in away.items() if "moments" in parts] == ["optimizer"]
    assert away["optimizer"]["moments"] == 8 * 152064 * 3584 / 8
    alone = phases_of(config, replace(work, offload=True), sizes_of(config, 1, 1), 1)
    assert {phase for phase, parts in alone.items() if "reference" in parts} == {"load", "score"}
    without = phases_of(config, replace(work, reference=False), sizes_of(config, 8, 1), 8)
    assert "score" not in without and all("reference" not in parts for parts in without.values())


def test_keys_and_values_are_what_is_left():
    """7B: 56 KiB a token. What is free less a tenth; it fits if a group of 7 x 8,192 tokens and its prompt do."""
    config, work = memory.qwen("7b"), grpo.work_of(recipe(grpo, "qwen2.5-7b"))
    plan = make_plan(config, work, 8, GB80)
    room = plan.phases["rollout"]["keys and values"]
    others = plan.peak("rollout") - room
    assert room == int(0.9 * (80e9 - 2e9 - others)) and plan.n_kept == room // (56 * 1024)
    group = 56 * 1024 * (4096 + 7 * 8192)
    least = (others + group / 0.9 + 2e9) / 1e9
    assert make_plan(config, work, 8, least + 0.01).n_kept >= 4096 + 7 * 8192
    assert not make_plan(config, work, 8, (others + group + 2e9) / 1e9 - 0.01).fits
    assert make_plan(config, replace(work, sampler_ranks=2), 8, GB80).n_kept > 2 * plan.n_kept
    assert make_plan(config, replace(work, kv_gb=10.0), 8, GB80).n_kept == int(10e9) // (56 * 1024)


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b", "deepseek-distill-7b",
                                  "deepseek-distill-14b", "deepseek-distill-32b"])
def test_the_papers_recipes_fit_one_node(name):
    work = grpo.work_of(recipe(grpo, name))
    plan = make_plan(memory.qwen(name.split("-")[-1]), work, 8, GB80)
    assert plan.fits and plan.line.startswith("fits: update"), plan.line
    assert suggested(memory.qwen(name.split("-")[-1]), work, 8, GB80).sampler_ranks <= work.sampler_ranks


def test_what_does_not_fit():
    """32B without --offload or with a whole copy, and 7B on one GPU without --offload, do not; the line says where."""
    config, work = memory.qwen("32b"), grpo.work_of(recipe(grpo, "qwen2.5-32b"))
    assert make_plan(config, replace(work, offload=False), 8, GB80).line.startswith("does not fit: update takes 97")
    assert make_plan(config, replace(work, sampler_ranks=1), 8, GB80).line.startswith("does not fit: rollout takes")
    one = grpo.work_of(recipe(grpo, "qwen2.5-7b-one-gpu"))
    assert make_plan(memory.qwen("7b"), one, 1, GB80).fits
    assert not make_plan(memory.qwen("7b"), replace(one, offload=False), 1, GB80).fits
    assert suggested(config, work, 1, GB80) is None
    with pytest.raises(ValueError, match="--sampler-ranks 4 does not divide the 6 GPUs"):
        make_plan(config, work, 6, GB80)


SMALL = replace(memory.WORK, micro_tokens=512, group_size=8, prompt_tokens=8, new_tokens=30, n_slots=32)
SMALL_DISTILL = replace(memory.WORK_DISTILL, micro_tokens=512, longest=64, new_tokens=56, n_slots=memory.N_GROUPS)


@pytest.mark.parametrize("work", [SMALL, SMALL_DISTILL], ids=["grpo", "distill"])
def test_a_real_step_holds_what_is_planned(no_group, work):
    """Oracle: the tensors alive in a step of a small model, one process, float32. Within a tenth."""
    config = geometry(2, 128, 4, 2, 384, 4096)
    rows = memory.compared(config, work, 1, memory.measure(config, work, Ranks(0, 1, CPU)))
    phases = ["load", "rollout", "sampler's copy", "score", "update", "optimizer", "save"]
    assert [part for part, *_ in rows] == [part for part in phases if part != "score" or work.reference]
    assert all(0.9 < ratio < 1.1 for *_, ratio in rows), rows


@pytest.mark.parametrize("work", [memory.FULL, memory.FULL_DISTILL], ids=["grpo", "distill"])
def test_the_real_code_at_full_width_holds_what_is_planned(no_group, work):
    """Oracle: FSDP2, the kernels' autograd functions, the optimizer and the sampler's copy of three layers of 14B, rank
    0 of 8, on fake tensors."""
    config, work = memory.qwen("14b", 3), replace(work, n_slots=14, sampler_ranks=2, offload=True)
    rows = memory.compared(config, work, 8, memory.simulate(config, work, 8))
    assert all(0.9 < ratio < 1.1 for *_, ratio in rows), rows
    assert {part: found for part, _, found, _ in rows}["update"] > 10


def test_plan_prints_and_ends(tmp_path, capsys, monkeypatch):
    """--plan needs a config.json and no data; it writes nothing."""
    (tmp_path / "config.json").write_text(json.dumps(memory.qwen("32b").raw))
    monkeypatch.chdir(tmp_path)
    for script in (grpo, distill):
        script.main(parse_config(script.Config, script.RECIPES, ["--plan", "--recipe", "qwen2.5-32b", "--gpus", "8",
                                                                 "--gpu-gb", "80", "--model", str(tmp_path)]))
        said = capsys.readouterr().out
        work = script.work_of(recipe(script, "qwen2.5-32b"))
        plan = make_plan(memory.qwen("32b"), work, 8, GB80)
        assert said.startswith(plan.line) and f"| peak | {plan.peak('load') / 1e9:.1f} |" in said
        assert "the least that fits: --sampler-ranks" in said and "page-locked 262" in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ValueError, match="--rates are four numbers"):
        grpo.Config(model="-", data="-", rates="1 2 3")


def test_a_run_that_does_not_fit_stops_before_it_loads(tmp_path):
    """On a CPU only if --gpu-gb says what there is. The folder has no weights: they were not looked for."""
    (tmp_path / "config.json").write_text(json.dumps(geometry(2, 64, 4, 2, 96, 512).raw))
    work = memory.WORK
    check_fits(tmp_path, work, Ranks(0, 1, CPU), 0.0)
    check_fits(tmp_path, work, Ranks(0, 1, CPU), 1.0)
    with pytest.raises(ValueError, match="does not fit: .* of 0.001 GB on each GPU, 1 in all; --plan shows"):
        check_fits(tmp_path, work, Ranks(0, 1, CPU), 0.001)


def test_planning_options_are_no_options_of_a_run(tmp_path):
    """A run's record does not have them, and --resume takes any."""
    cfg = grpo.Config(model="-", data="-", out=str(tmp_path / "run"), gpu_gb=80.0, gpus=8)
    Run(cfg, Ranks(0, 1, CPU)).begin(0, 1)
    saved = saved_options(grpo.Config, cfg.out)
    assert not {"plan", "gpus", "gpu_gb", "rates"} & set(saved) and saved["n_prompts"] == 1024
    again = Run(replace(cfg, resume=True, gpu_gb=40.0, gpus=0), Ranks(0, 1, CPU), grpo.MAY_CHANGE)
    assert again.changed == {}


def test_the_docs_tables_are_the_plans():
    """docs/memory.md has what python -m bench.memory --tables prints now."""
    assert memory.tables() in (ROOT / "docs/memory.md").read_text(encoding="utf-8")
