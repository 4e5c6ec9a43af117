"""What every recipe combines: bfloat16 computation under FSDP (on one CPU a group of one), gradient checkpointing,
AdamW, checkpoints. Oracle: the uninterrupted run. In subprocesses, for the process groups. And docs/recipes.md, against
the scripts' own options and recipes and the paper's table."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distill
import grpo
from data import fetch, toy
from model import Model, ModelConfig
from options import flag_of, parse_config

ROOT = Path(__file__).resolve().parent.parent
TINY = toy.MODEL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16}
RECIPE = "qwen2.5-7b"
COMMON = dict(prompt="toy", micro_tokens=400, save_every=4, keep=3, threads=1)  # several micro-batches a step
SFT = dict(COMMON, batch_size=20, max_steps=60, epochs=30, max_length=200, lr=1e-2, answer_only=True, save_every=20)
RL = dict(COMMON, n_prompts=8, mini_prompts=4, group_size=7, steps=20, max_new_tokens=8, lr=4e-3, n_samples=1)
DISTILL_KEYS = {"step", "loss", "entropy", "lr", "grad_norm", "n_tokens", "step_s", "train_tok_s"}
GRPO_KEYS = {"step", "reward", "accuracy", "frac_no_verdict", "frac_unfinished", "frac_zero_spread", "judgement_tok",
             "loss", "entropy", "kl", "clip_frac", "mismatch", "mismatch_max", "grad_norm", "n_updates", "lr",
             "rollout_s", "update_s", "update_tok_s", "prefill_tok_s", "decode_tok_s"}

RUN = """
import json, runpy, sys
sys.path.insert(0, ".")
for script, *argv in json.loads(sys.argv[1]):
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")
"""


def command(script, options):
    """The command line of the recipe with these options changed."""
    out = [script, "--recipe", RECIPE]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        out += [flag] if value is True else [flag, str(value)]
    return out


def run(*commands):
    done = subprocess.run([sys.executable, "-c", RUN, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


def interrupt(out, last_kept):
    """What a crash just after the checkpoint of step last_kept would have left, and a row too many."""
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").iterdir():
        if int(path.name[5:]) > last_kept:
            shutil.rmtree(path)
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:last_kept + 1]))


def test_the_recipes_combination_learns_and_resumes(tmp_path):
    """SFT on bare verdicts, then GRPO where A is always better: the loss falls, the accuracy rises, and the same
    commands, interrupted after a checkpoint, end with the same rows and the same weights."""
    for name in ("distill", "rl"):
        rows = toy.make(name, 60, seed=5)
        rows = [row | {"winner": "ab"[i % 2] if name == "distill" else "a"} for i, row in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    n_vocab = toy.write_tokenizer(tmp_path / "untrained")
    Model.random(ModelConfig.from_dict(TINY | {"vocab_size": n_vocab + 3}), 2).save_pretrained(tmp_path / "untrained")
    sft = SFT | dict(model=tmp_path / "untrained", data=tmp_path / "distill.jsonl", out=tmp_path / "sft")
    rl = RL | dict(model=tmp_path / "sft/model", data=tmp_path / "rl.jsonl", out=tmp_path / "rl")
    run(command("distill.py", sft), command("grpo.py", rl))

    for out, module in ((tmp_path / "sft", distill), (tmp_path / "rl", grpo)):
        options = json.loads((out / "config.json").read_text())["options"]
        assert options["dtype"] == "bfloat16" and options["gradient_checkpointing"] and options["save_every"]
        assert options.get("optimizer", "adamw") == "adamw"
        assert options["weight_decay"] == (0 if module is distill else 0.01)
        shutil.copytree(out, again := out.with_name(out.name + "-again"))
        interrupt(again, 40 if module is distill else 12)
    sft_rows, rl_rows = metrics(tmp_path / "sft"), metrics(tmp_path / "rl")
    assert [row["step"] for row in sft_rows] == list(range(1, 61)) and all(set(row) >= DISTILL_KEYS for row in sft_rows)
    assert sft_rows[-1]["loss"] < 0.2 * sft_rows[0]["loss"]
    assert [row["step"] for row in rl_rows] == list(range(1, 21)) and all(set(row) >= GRPO_KEYS for row in rl_rows)
    assert all(isinstance(row[key], (int, float)) for row in sft_rows for key in DISTILL_KEYS)
    assert all(isinstance(row[key], (int, float)) for row in rl_rows for key in GRPO_KEYS)
    accuracy = [row["accuracy"] for row in rl_rows]
    assert accuracy[0] < 0.7 and sum(accuracy[-3:]) / 3 > 0.9, accuracy
    assert all(row["n_updates"] == 2 and row["mismatch"] <= row["mismatch_max"] < 0.1 for row in rl_rows), rl_rows

    run(*(command(script, options | dict(out=f"{options['out']}-again", resume=True))
          for script, options in (("distill.py", sft), ("grpo.py", rl))))
    for name, last in (("sft", 60), ("rl", 20)):
        whole, again = tmp_path / name, tmp_path / f"{name}-again"
        assert untimed(metrics(again)) == untimed(metrics(whole))
        for file, dtype in ((f"checkpoints/step-{last}/model.safetensors", torch.float32),
                            ("model/model.safetensors", torch.bfloat16)):
            x, y = load_file(whole / file), load_file(again / file)
            assert all(torch.equal(x[key], y[key]) for key in x) and {v.dtype for v in y.values()} == {dtype}, file


# ---- docs/recipes.md

PAGE = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
PAPER = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "paper.md"
GIVEN = {"model": "m", "data": "d"}


def table_rows(header):
    """The cells of the page's table whose header line starts so."""
    lines = PAGE[PAGE.index(header):].split("\n\n")[0].split("\n")
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[:1] + lines[2:]]


def recipe_of(name):
    kind, size = name.removeprefix("RM-R1-").rsplit("-", 1)
    return {"Qwen2.5-Instruct": "qwen2.5-", "DeepSeek-Distilled-Qwen": "deepseek-distill-"}[kind] + size.lower()


def page_commands():
    """[(section, words)] of the page's commands, in order."""
    found, section = [], ""
    for block in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        section, _, text = block.partition("\n")
        lines = re.findall(r"^    (.*)$", text, re.M)
        for line in "\n".join(lines).replace("\\\n", " ").split("\n"):
            found.append((section, shlex.split(line)))
    return found


def parsed(words):
    """(script, options) of a command; SystemExit or ValueError if its script would refuse it."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    starter, name, argv = words[:script], words[script], words[script + 1:]
    assert starter == ["python"] or starter[0] == "torchrun" and "--nproc_per_node" in starter, words
    argv = [word.replace("$FIRST", "https://first/v1").replace("$SECOND", "https://second/v1") for word in argv]
    module = importlib.import_module(name.removesuffix(".py").replace("/", "."))
    if name == "data/fetch.py":
        return name, module.parse_options(argv)
    return name, parse_config(module.Config, getattr(module, "RECIPES", None), argv)


def test_every_command_of_the_page_is_one_that_its_script_takes():
    """And what a command reads, one before it has written, in its section or in the first."""
    made = {}
    for section, words in page_commands():
        if not any((ROOT / word).exists() for word in words if word.endswith(".py")):
            continue                                              # a script that this checkout does not have
        name, options = parsed(words)
        own = made.setdefault(section, set(made.get("Once, for all of them", ())))
        read = []
        if name == "data/fetch.py":
            for what in options.what:
                source = fetch.source_of(what)
                own |= {f"{options.out}/{what}"} | ({f"{options.out}/{what}.jsonl"} if source.keys else set())
            if "rm-r1-prompts" in options.what:
                own |= {f"{options.out}/rm-r1-{kind}.txt" for kind in ("instruct", "reasoning")}
        elif name == "data/mix.py":
            read = [options.math, options.code, options.skywork, options.tokenizer, *options.benchmarks]
            own |= {f"{options.out}/rl.jsonl"} | ({f"{options.out}/distill.jsonl"} if options.distill_frac else set())
        elif name == "oracle.py":
            read, own = [options.data], own | {f"{options.out}/chains.jsonl"}
        elif name == "data/quality.py":
            read = [*options.files, options.tokenizer]
        elif name == "evaluate.py":
            read = [*options.model, options.rewardbench, options.rmbench, options.rmb, options.prompt]
        else:
            read, own = [options.model, options.data], own | {f"{options.out}/model"}
        made[section] = own
        if (ROOT / "oracle.py").exists() or "runs/oracle/chains.jsonl" not in read:
            for path in filter(None, read):
                assert any(path == x or path.startswith(x + "/") for x in own), f"{section}: nothing makes {path}"


def test_each_section_trains_and_scores_its_model():
    sections = {}
    for section, words in page_commands():
        sections.setdefault(section, []).append(" ".join(words))
    names = [row[0] for row in table_rows("| model | starts from")[1:]]
    assert list(sections) == ["Once, for all of them", *names] and len(set(names)) == 6
    for name, base, *_ in table_rows("| model | starts from")[1:]:
        commands = "\n".join(sections[name])
        recipe, instruct = recipe_of(name), "Instruct" in name
        assert (f"distill.py --recipe {recipe}" in commands) == instruct == ("distill.py" in commands)
        assert f"grpo.py --recipe {recipe} " in commands and f"runs/data/{base}" in commands
        assert f"runs/{recipe}/grpo/model" in commands and f"--model runs/data/gaotang/{name} " in commands
        prompt = "instruct" if instruct else "reasoning"
        assert f"--prompt runs/data/rm-r1-{prompt}.txt --order published" in sections[name][-1]
    assert PAGE.count("Not run here.") == 6


def test_the_numbers_of_the_page_are_those_of_the_recipes():
    for name, _, sft_lr, grpo_lr, *_ in table_rows("| model | starts from")[1:]:
        recipe = recipe_of(name)
        assert float(grpo_lr) == grpo.Config(**GIVEN | grpo.RECIPES[recipe]).lr
        assert (sft_lr == "none") == (recipe not in distill.RECIPES)
        if recipe in distill.RECIPES:
            assert float(sft_lr) == distill.Config(**GIVEN | distill.RECIPES[recipe]).lr
    shared = table_rows("| option | distillation")[1:]
    assert len(shared) == 17
    for column, module in ((1, distill), (2, grpo)):
        for recipe in module.RECIPES:
            if recipe != "toy":
                cfg = module.Config(**GIVEN | module.RECIPES[recipe])
                given = {row[0]: float(row[column]) for row in shared if row[column]}
                assert given == {flag_of(name): getattr(cfg, name) for name in vars(cfg) if flag_of(name) in given}


@pytest.mark.skipif(not PAPER.exists(), reason=f"no paper's tables at {PAPER}: set RM_SHARED")
def test_the_scores_of_the_page_are_the_papers():
    """The paper calls the instruct models RM-R1-Qwen-Instruct, its repository RM-R1-Qwen2.5-Instruct."""
    text = PAPER.read_text(encoding="utf-8")
    paper = {row[0].replace("Qwen-Instruct", "Qwen2.5-Instruct"): row[1:5] for row in
             ([cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")) if len(row) == 5}
    for name, *_, reward_bench, rm_bench, rmb, average in table_rows("| model | starts from")[1:]:
        assert [reward_bench, rm_bench, rmb, average] == paper[name]
        said = f"RewardBench {reward_bench}, RM-Bench {rm_bench}, RMB {rmb}, average {average}. Not run here."
        assert f"## {name}\n\nExpected: {said}" in PAGE
