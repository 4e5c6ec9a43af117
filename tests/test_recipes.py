"""What every recipe combines: bfloat16 computation under FSDP (on one CPU a group of one), gradient checkpointing,
AdamW, checkpoints. Oracle: the uninterrupted run. In subprocesses, for the process groups."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

import distill
import grpo
from data import toy
from model import Model, ModelConfig

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
