"""demo.py and the embedded default, small: the same code and options but for the sizes of the data and the model and
the number of steps. Oracles: the judgements that were written, scored again; the second run; the files that are
left."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import demo
import distill
import grpo
from data import toy
from data.pairs import read_pairs
from model import Model
from reward import benchmark_verdict
from benchmarks.scores import pairs as score
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = toy.MODEL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16}
KEYS = ["untrained", "answer_only", "distilled", "grpo", "grpo_sampled", "seconds"]


@pytest.fixture
def small(monkeypatch):
    """A narrower model, less data, fewer steps. What the demo asks for is otherwise left as it is."""
    write_data, sft, rl = toy.write_data, distill.main, grpo.main
    monkeypatch.setattr(toy, "MODEL", TINY)
    monkeypatch.setattr(toy, "write_data",
                        lambda folder, seed: write_data(folder, seed, n_distill=320, n_rl=16, n_heldout=24))
    monkeypatch.setattr(distill, "main", lambda cfg: sft(replace(cfg, max_steps=80, epochs=8, lr=2e-2)))
    monkeypatch.setattr(grpo, "main", lambda cfg: rl(replace(cfg, steps=2, n_prompts=8, mini_prompts=4, eval_pairs=4)))


def numbers(row):
    """The percentages of a row of the table: all, reasoning, chat."""
    return [float(word) for word in row[26:].split() if "(" not in word and ")" not in word][:3]


def test_the_demo_prints_what_it_judged_and_replaces_its_own_folder(small, tmp_path, capsys):
    """One model after another: its two judgement files, scored again, are its two rows. The second run is the first,
    number for number, and nothing of the first is left."""
    cfg, outputs = demo.Config(out=str(tmp_path / "demo"), threads=1, pairs=20), []
    for _ in range(2):
        demo.main(cfg)
        assert not (tmp_path / "demo/stray.txt").exists()
        (tmp_path / "demo/stray.txt").touch()
        outputs.append(capsys.readouterr().out.splitlines())
    summary, again = (json.loads(lines[-1]) for lines in outputs)
    assert list(summary) == KEYS and summary.pop("seconds") > 0 and again.pop("seconds") > 0
    assert summary == again and any(0 < x < 100 for x in summary.values()), summary

    pairs = read_pairs(tmp_path / "demo/data/heldout.jsonl")[:20]
    for name, title in demo.TITLES.items():
        for how in ("greedy", "sampled"):
            judged = tmp_path / f"demo/judgements/{name}-{how}"
            assert read_pairs(judged / "pairs.jsonl") == pairs and (judged / "scores.json").exists()
            lines = (judged / "judgements.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            assert [r["id"] for r in records] == [pair.id for pair in pairs]
            assert [r["verdict"] for r in records] == [benchmark_verdict(r["votes"][0]["text"]) for r in records]
            scores = {r["name"]: r["score"] for r in score(records)}
            row, = (line for line in outputs[1] if line.startswith(f"{title:17} {how:8}"))
            shown = [f"{100 * scores[part]:.1f}" for part in ("all", "reasoning", "chat")]
            assert numbers(row) == [float(x) for x in shown], row
            key = name if how == "greedy" else f"{name}_sampled"
            if key in summary:
                assert summary[key] == round(100 * scores["all"], 1)
    for stage in ("answer_only", "distilled", "grpo"):
        assert Model.from_pretrained(tmp_path / f"demo/{stage}/model").config.hidden_size == 32
    assert json.loads((tmp_path / "demo/demo.json").read_text()).items() >= summary.items()


def test_a_folder_that_no_demo_made_is_refused_with_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter-1.txt").write_text("It was a dark night.")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path / "thesis")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "demo.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ")
    assert f"{tmp_path / 'thesis'}: is there and was not made by a demo" in error
    assert (tmp_path / "thesis/chapter-1.txt").read_text() == "It was a dark night."


# Run in a temporary directory: `python grpo.py` as a user would, but for the sizes of the fixture above.
SMALL = """
import runpy, sys
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
import distill
from data import toy
write_data, sft = toy.write_data, distill.main
toy.MODEL = {model}
toy.write_data = lambda folder, seed: write_data(folder, seed, n_distill=64, n_rl=16, n_heldout=8)
distill.main = lambda cfg: sft(replace(cfg, max_steps=2, eval_pairs=4, eval_tokens=8))
sys.argv = ["grpo.py", "--steps", "2", "--n-prompts", "4", "--mini-prompts", "2", "--eval-pairs", "4",
            "--max-new-tokens", "8", "--threads", "1"]
runpy.run_path("{root}/grpo.py", run_name="__main__")
"""


@pytest.mark.parametrize("launch", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]],
                         ids=["python", "two ranks"])
def test_grpo_without_a_model_makes_its_own_first_stage(launch, tmp_path):
    """The default paths are relative: data, untrained model, distillation and GRPO all appear under the directory that
    the command ran in."""
    (tmp_path / "small.py").write_text(SMALL.format(model=repr(TINY), root=ROOT))
    done = subprocess.run([sys.executable, *launch, "small.py", str(ROOT)], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs/toy"
    assert {path.name for path in folder.iterdir()} == {"data", "untrained", "distill", "grpo"}
    assert {path.name for path in tmp_path.iterdir()} == {"small.py", "runs"}
    for stage in ("distill", "grpo"):
        rows = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2] and "eval_accuracy" in rows[-1]
        options = json.loads((folder / stage / "config.json").read_text())["options"]
        assert options["out"] == f"runs/toy/{stage}"
    assert options["model"] == "runs/toy/distill/model" and options["data"] == "runs/toy/data/rl.jsonl"
    judge, tokenizer = Model.from_pretrained(folder / "grpo/model"), Tokenizer(folder / "grpo/model")
    assert judge.config.vocab_size == tokenizer.n_vocab and (folder / "grpo/model/prompt.txt").exists()
    before = Model.from_pretrained(folder / "untrained").parameters()
    assert not all(torch.equal(x, y) for x, y in
                   zip(before, Model.from_pretrained(folder / "distill/model").parameters(), strict=True))
