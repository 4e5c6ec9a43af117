"""distill.py. Oracles: the trained tokens of one chain written out; log-softmax of model.logits, sequence by sequence
in float64; the uninterrupted run; the run on one rank; transformers on the finished folder; RM-R1's records."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import distill
from common import Ranks, micro_batches
from data import toy
from data.pairs import Chain, Pair, read_chains, read_pairs, write_pairs
from distill import Config, Example, batch_of_step, encode_chain, read_examples, sft_loss
from model import Model, ModelConfig
from options import PLANNING
from prompt import load_prompt, render
from reward import benchmark_verdict
from sample import Sampler, Sampling
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ALONE = Ranks(0, 1, torch.device("cpu"))
SHARED = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared"))
TINY = toy.MODEL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16}
QWEN2 = TINY | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}


def write_model(folder, raw=TINY, seed=0):
    n_vocab = toy.write_tokenizer(folder)
    Model.random(ModelConfig.from_dict(raw | {"vocab_size": n_vocab + 3}),
                 seed).save_pretrained(folder)  # more rows than ids
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Qwen3 and 14 chains of the toy task."""
    folder = tmp_path_factory.mktemp("made")
    write_rows(folder / "chains.jsonl", toy.make("distill", 14, seed=3))
    write_rows(folder / "heldout.jsonl", toy.make("heldout", 3, seed=3))
    write_model(folder / "model")
    return folder


def config(made, out, **changes):
    """14 chains in batches of 4: steps of 4, 4, 4 and 2 chains. Nothing is left to a default that may be tuned."""
    options = dict(model=str(made / "model"), data=str(made / "chains.jsonl"), prompt="toy", out=str(out), batch_size=4,
                   epochs=2, max_steps=0,
                   max_length=200, micro_tokens=150, optimizer="adamw", lr=1e-2, warmup_frac=0.25, final_lr_frac=0.1,
                   beta1=0.9, beta2=0.95,
                   weight_decay=0.1, max_norm=1.0, dtype="float32", gradient_checkpointing=False, eval_data=None,
                   eval_pairs=3, eval_every=0,
                   eval_tokens=4, save_every=0, keep=0, seed=7, threads=1)
    return Config(**options | changes)


def metrics(out, *dropped):
    dropped += ("train_mfu",)  # null on a CPU
    return [{key: value for key, value in json.loads(line).items() if not key.endswith("_s") and key not in dropped}
            for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def flags(cfg):
    """The command line that gives cfg."""
    out = []
    for name, value in asdict(cfg).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            out.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            out += [flag, "" if value is None else str(value)]
    return out


# ---- what is trained on

PAIR = Pair("1", [{"role": "user", "content": "sort 76915"}], "15679", "12568", "a", "", "")
JUDGEMENT = ("<type>Reasoning</type><solution>15679</solution><eval> Overall A looks better.</eval>"
             "<answer>[[A]]</answer>")


class Recorder:
    """Stands in for a model: notes what it is asked to score."""

    def __call__(self, forest, scored_m):
        self.forest, self.scored = forest, scored_m.tolist()
        return torch.zeros(len(scored_m)), torch.zeros(len(scored_m))


def test_exactly_the_judgement_and_its_end_of_turn_are_trained_on(made):
    tokenizer = Tokenizer(made / "model")

    def spell(ids):
        return [tokenizer.decode([i], skip_control=False) for i in ids]
    example = encode_chain(Chain(PAIR, JUDGEMENT), load_prompt("toy"), tokenizer, False)
    trained = ["<type>Reasoning</type><solution>", "1", "5", "6", "7", "9", "</solution><eval>", " Overall", " A",
               " looks better.</eval><answer>[[", "A]]</answer>", "<|im_end|>"]
    prompt = ["<|im_start|>", "user\n", "sort ", "7", "6", "9", "1", "5", "\nA ", "1", "5", "6", "7", "9", "\nB ", "1",
              "2", "5", "6", "8", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]
    assert spell(example.ids[:example.n_prompt]) == prompt
    assert spell(example.ids[example.n_prompt:]) == trained

    model = Recorder()  # packed behind and before another example
    sft_loss(model, [Example([1, 2, 3], 2), example, Example([4, 5, 6], 1)], "cpu")
    tokens, previous = model.forest.tokens_n.tolist(), model.forest.previous_n.tolist()
    assert spell(tokens[i] for i in model.scored[1:-2]) == trained
    # the header's last token predicts the first
    assert spell(tokens[previous[i]] for i in model.scored[1:-2]) == ["assistant\n"] + trained[:-1]
    assert [tokens[i] for i in (model.scored[0], *model.scored[-2:])] == [3, 5, 6] and len(model.scored) == 1 + 12 + 2


def test_answer_only_trains_on_the_bare_verdict(made):
    tokenizer = Tokenizer(made / "model")
    for winner in "ab":
        pair = replace(PAIR, winner=winner)
        example = encode_chain(Chain(pair, JUDGEMENT), load_prompt("toy"), tokenizer, True)
        assert tokenizer.decode(example.ids[example.n_prompt:],
                                skip_control=False) == f"<answer>[[{winner.upper()}]]</answer><|im_end|>"
        whole = encode_chain(Chain(pair, JUDGEMENT), load_prompt("toy"), tokenizer, False)
        assert example.ids[:example.n_prompt].tolist() == whole.ids[:example.n_prompt].tolist()


def test_chains_that_are_too_long_are_dropped_and_counted(made, tmp_path, capsys):
    tokenizer = Tokenizer(made / "model")
    lengths = [len(e.ids) for e in read_examples(config(made, tmp_path), tokenizer, ALONE)[0]]
    assert len(lengths) == 14 and "dropped" not in capsys.readouterr().out
    limit = sorted(lengths)[9]
    kept, _ = read_examples(config(made, tmp_path, max_length=limit), tokenizer, ALONE)
    assert [len(e.ids) for e in kept] == [n for n in lengths if n <= limit] and 10 <= len(kept) < 14
    assert f"dropped {14 - len(kept)} of 14 chains longer than {limit} tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="chains.jsonl: all 14 chains are longer than --max-length 20"):
        read_examples(config(made, tmp_path, max_length=20), tokenizer, ALONE)
    rows = [json.loads(line) | {"winner": None} for line in (made / "chains.jsonl").read_text().splitlines()]
    with pytest.raises(ValueError, match="--answer-only needs a winner"):
        read_examples(config(made, tmp_path, data=str(write_rows(tmp_path / "rows.jsonl", rows)), answer_only=True),
                      tokenizer, ALONE)


def test_each_epoch_is_a_permutation_in_batches():
    steps = [batch_of_step(step, 14, 4, seed=7).tolist() for step in range(8)]
    assert [len(batch) for batch in steps] == [4, 4, 4, 2] * 2
    epochs = [sum(steps[:4], []), sum(steps[4:], [])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(14)) and epochs[0] != epochs[1]
    assert epochs[0] != sum((batch_of_step(step, 14, 4, seed=8).tolist() for step in range(4)), [])
    # a batch larger than the data
    assert batch_of_step(1, 3, 5, 0).tolist() != [] and len(batch_of_step(1, 3, 5, 0)) == 3


# ---- the loss

EXAMPLES = [Example(list(range(2, 2 + n)), n_prompt) for n, n_prompt in ((9, 4), (30, 29), (5, 1), (40, 12), (17, 16))]


def naive_nll(model, example):
    logits_tv = model.logits(example.ids)[:, :model.n_vocab]
    return -sum(logits_tv[i - 1].log_softmax(0)[example.ids[i]] for i in range(example.n_prompt, len(example.ids)))


def test_the_loss_is_that_of_each_sequence_alone():
    for raw in (TINY, QWEN2):
        model = Model.random(ModelConfig.from_dict(raw | {"vocab_size": 50}), 1, dtype=torch.float64)
        model.n_vocab = 47
        nll, entropy = sft_loss(model, EXAMPLES, "cpu")
        assert float(nll.detach()) == pytest.approx(float(sum(naive_nll(model, e) for e in EXAMPLES)), rel=1e-12)
        logp = [model.logits(e.ids)[i - 1, :47].log_softmax(0) for e in EXAMPLES for i in range(e.n_prompt, len(e.ids))]
        assert float(entropy) == pytest.approx(float(-sum((l.exp() * l).sum() for l in logp)), rel=1e-12)


def test_the_gradient_is_the_same_however_the_batch_is_split_and_ordered():
    """Against autograd through the logits of one sequence after another; in float64, so that only mistakes differ."""
    model = Model.random(ModelConfig.from_dict(TINY | {"vocab_size": 50}), 1, dtype=torch.float64)
    n_tokens = sum(len(e.ids) - e.n_prompt for e in EXAMPLES)

    def gradient(bins):
        model.zero_grad()
        for examples in bins:
            (sft_loss(model, examples, "cpu")[0] / n_tokens).backward()
        return torch.cat([x.grad.flatten() for x in model.parameters()])

    model.zero_grad()
    whole = type(model).logits.__wrapped__  # without its no_grad
    for e in EXAMPLES:
        logp_tv = whole(model, e.ids).log_softmax(1)
        (-sum(logp_tv[i - 1, e.ids[i]] for i in range(e.n_prompt, len(e.ids))) / n_tokens).backward()
    naive = torch.cat([x.grad.flatten() for x in model.parameters()])
    splits = [[EXAMPLES], [EXAMPLES[::-1]], [[e] for e in EXAMPLES]]
    splits += [[[EXAMPLES[i] for i in share] for step in micro_batches([len(e.ids) for e in EXAMPLES], limit, 1)
                for share in step]
               for limit in (10, 45, 60)]
    for split in splits:
        torch.testing.assert_close(gradient(split), naive, rtol=1e-10, atol=1e-13)


# ---- whole runs

@pytest.mark.parametrize("raw", [TINY, QWEN2], ids=["Qwen3", "Qwen2"])
def test_a_run_learns_and_leaves_a_model_that_transformers_loads(raw, made, tmp_path):
    """Oracles: the naive loss of the first batch; transformers' logits; the schedule's ends."""
    write_model(tmp_path / "model", raw)
    cfg = config(made, tmp_path / "run", model=str(tmp_path / "model"), epochs=12,
                 eval_data=str(made / "heldout.jsonl"), eval_every=30)
    start, tokenizer = Model.from_pretrained(cfg.model, dtype=torch.float64), Tokenizer(cfg.model)
    assert start.n_vocab == tokenizer.n_vocab
    batch = [read_examples(cfg, tokenizer, ALONE)[0][i] for i in batch_of_step(0, 14, 4, cfg.seed)]
    n_tokens = sum(len(e.ids) - e.n_prompt for e in batch)
    distill.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 49))
    assert rows[0]["loss"] == pytest.approx(float(sum(naive_nll(start, e) for e in batch)) / n_tokens, rel=1e-5)
    assert rows[0]["n_tokens"] == n_tokens
    assert rows[-1]["loss"] < 0.4 * rows[0]["loss"]
    assert rows[0]["lr"] == pytest.approx(1e-2 / 12)
    assert max(row["lr"] for row in rows) == 1e-2 and rows[-1]["lr"] == pytest.approx(1e-3)
    assert all(set(row) >= {"loss", "entropy", "lr", "grad_norm", "n_tokens", "step_s", "train_tok_s"} for row in rows)
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [30, 48]
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    judged = [pair.id for pair in read_pairs(made / "heldout.jsonl")]
    assert sorted((s["step"], s["id"]) for s in samples) == sorted((step, name) for step in (30, 48) for name in judged)
    assert not (tmp_path / "run/checkpoints").exists()

    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "run/model"
    assert (folder / "prompt.txt").read_text() == (ROOT / "data/prompts/toy.txt").read_text()
    assert not list(folder.parent.glob("*.tmp"))
    ours, theirs = Model.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder,
                                                                                                    dtype=torch.float32)
    ids = tokenizer.chat([{"role": "user", "content": "sort 76915\nA 15679\nB 12568"}])
    if raw is TINY:  # for a Qwen2, transformers takes Qwen's own pre-tokenizer, whatever tokenizer.json says
        assert ids == transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": "sort 76915\nA 15679\nB 12568"}], add_generation_prompt=True,
            return_dict=False)
    with torch.no_grad():
        wanted_tv = theirs(torch.tensor([ids])).logits[0, :, :ours.n_vocab]
        torch.testing.assert_close(ours.logits(ids), wanted_tv, rtol=1e-4, atol=1e-4)


def interrupt(out, last_kept):
    """Makes of a finished run what a crash would have left: later checkpoints gone, a row too many and half of one."""
    shutil.rmtree(out / "model")
    for path in (out / "checkpoints").iterdir():
        if int(path.name[5:]) > last_kept:
            path.rename(path.with_name(path.name + ".tmp"))  # died while it was written
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:last_kept + 1]) + rows[last_kept + 1][:30])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(optimizer, made, tmp_path):
    """Oracle: the uninterrupted run, bit for bit. The second epoch begins at step 5: the data's place is kept too."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    cfg = config(made, whole, optimizer=optimizer, save_every=3, eval_data=str(made / "heldout.jsonl"), eval_every=4)
    distill.main(cfg)
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-3", "step-6", "step-8"]
    shutil.copytree(whole, again)
    interrupt(again, 3)
    distill.main(replace(cfg, out=str(again), resume=True, micro_tokens=cfg.micro_tokens))
    assert metrics(again) == metrics(whole) and len(metrics(again)) == 8
    for name in ("model/model.safetensors", "model/config.json", "model/tokenizer.json",
                 "checkpoints/step-8/optimizer-00001-of-00001.safetensors",
                 "checkpoints/step-6/model.safetensors"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(again.rglob("*.tmp"))

    shutil.rmtree(again / "model")  # resumed at its end, it only writes the model
    distill.main(replace(cfg, out=str(again), resume=True))
    assert metrics(again) == metrics(whole)
    assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    if optimizer == "adamw":
        with pytest.raises(ValueError, match="--lr 0.01, not 0.02"):
            distill.main(replace(cfg, out=str(again), resume=True, lr=0.02))
        with pytest.raises(ValueError, match="already holds a run"):
            distill.main(replace(cfg, out=str(again)))
        shutil.rmtree(again / "checkpoints")  # killed before its first checkpoint, it begins again
        shutil.rmtree(again / "model")
        distill.main(replace(cfg, out=str(again), resume=True))
        assert metrics(again) == metrics(whole)
        assert (again / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_the_micro_batch_split_does_not_change_a_run(made, tmp_path):
    """One packed forward per step, against one per example (micro_tokens below every length), to float32 rounding."""
    runs = []
    for micro_tokens in (10_000, 1):
        distill.main(config(made, tmp_path / str(micro_tokens), micro_tokens=micro_tokens, max_steps=5))
        runs.append(metrics(tmp_path / str(micro_tokens)))
    for one, other in zip(*runs, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_bfloat16_computation_keeps_float32_masters(made, tmp_path):
    """The first loss is float32's to bfloat16's rounding; the checkpoint is float32, the finished model bfloat16."""
    from safetensors.torch import load_file
    try:
        distill.main(config(made, tmp_path / "half", dtype="bfloat16", max_steps=2, save_every=1))
    finally:
        common.leave_ranks()
    distill.main(config(made, tmp_path / "full", max_steps=2))
    half, full = metrics(tmp_path / "half"), metrics(tmp_path / "full")
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=2e-3)
    assert half[0]["grad_norm"] == pytest.approx(full[0]["grad_norm"], rel=5e-2)
    assert half[0]["loss"] != full[0]["loss"]
    for name, dtype in (("checkpoints/step-2", torch.float32), ("model", torch.bfloat16)):
        assert {x.dtype for x in load_file(tmp_path / "half" / name / "model.safetensors").values()} == {dtype}


RUNS = """
import json, runpy, sys
sys.path.insert(0, ".")
for argv in json.loads(sys.argv[1]):
    sys.argv = ["distill.py", *argv]
    runpy.run_path("distill.py", run_name="__main__")
"""


@pytest.mark.long
def test_two_ranks_train_as_one_does(made, tmp_path):
    """Oracle: the same command on one rank. The last batch of an epoch is one chain, so that a rank is idle; a run of
    one rank goes on as a run of two; the bare verdicts are learned by Muon."""
    # the last batch has one chain: a rank without work
    data = write_rows(tmp_path / "13.jsonl", toy.make("distill", 13, seed=3))
    cases = {"plain": config(made, "", data=str(data), eval_data=str(made / "heldout.jsonl"), eval_every=4,
                             keep_best=True),
             "resumed": config(made, "", data=str(data), save_every=3, max_steps=6),
             "muon": config(made, "", data=str(data), optimizer="muon", answer_only=True, max_steps=4)}
    argvs = []
    for name, cfg in cases.items():
        distill.main(replace(cfg, out=str(tmp_path / name / "one")))
        two = tmp_path / name / "two"
        if name == "resumed":
            shutil.copytree(tmp_path / name / "one", two)
            interrupt(two, 3)
        argvs.append(flags(replace(cfg, out=str(two), resume=name == "resumed", micro_tokens=cfg.micro_tokens)))
    (tmp_path / "runs.py").write_text(RUNS)
    done = torchrun(tmp_path / "runs.py", json.dumps(argvs))
    assert done.returncode == 0, done.stderr[-3000:]
    for name in cases:
        one, two = metrics(tmp_path / name / "one"), metrics(tmp_path / name / "two")
        rel = 5e-2 if name == "muon" else 1e-5  # Muon orthogonalizes in bfloat16
        for row, other in zip(one, two, strict=True):
            assert other == pytest.approx(row, rel=rel, abs=1e-6), name
        x, y = (Model.from_pretrained(tmp_path / name / ranks / "model").state_dict() for ranks in ("one", "two"))
        for weight in x:
            torch.testing.assert_close(y[weight], x[weight], rtol=0, atol=2e-2 if name == "muon" else 2e-4,
                                       msg=f"{name} {weight}")
    best = [json.loads((tmp_path / "plain" / ranks / "best/best.json").read_text()) for ranks in ("one", "two")]
    assert best[0] == best[1] and Model.from_pretrained(tmp_path / "plain/two/best")


def torchrun(*command):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               *map(str, command)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)


@pytest.mark.long
def test_a_narrow_model_learns_recorded_judgements_by_heart(tmp_path):
    """Real input: RM-R1's two shortest recorded judgements, Qwen2.5's tokenizer with its 151,665 ids. Trained through
    distill.py until the loss is below a tenth of its start, a random model reproduces both records greedily, verdicts
    included. (43 s of one core, nearly all in the head; AdamW needs several times as many steps. The instruct model's
    shortest judgement is longer: its loss was still 0.7 after 30 such steps, and it was not reproduced.)"""
    logs = SHARED / "benchmarks/reward_bench/RM-R1-DeepSeek-Distilled-Qwen-32B.logs.sample40.json"
    tokenizer_folder = SHARED / "qwen2.5-tokenizer"
    if not logs.exists() or not tokenizer_folder.exists():
        pytest.skip(f"no {logs} or no {tokenizer_folder}: set RM_SHARED")
    recorded = sorted(read_chains(logs), key=lambda chain: len(chain.judgement))[:2]
    write_pairs(tmp_path / "chains.jsonl", recorded)
    raw = QWEN2 | {"vocab_size": 151_936, "hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4,
                   "head_dim": 32, "rope_theta": 10_000.0, "max_position_embeddings": 4096, "tie_word_embeddings": True}
    Model.random(ModelConfig.from_dict(raw)).save_pretrained(tmp_path / "model")
    for file in tokenizer_folder.iterdir():
        shutil.copyfile(file, tmp_path / "model" / file.name)
    distill.main(config(tmp_path, tmp_path / "run", data=str(tmp_path / "chains.jsonl"), prompt="reasoning",
                        batch_size=2, epochs=28, max_length=4096, micro_tokens=4096, optimizer="muon", lr=0.1,
                        warmup_frac=0.05, weight_decay=0.0))
    losses = [row["loss"] for row in metrics(tmp_path / "run")]
    assert losses[0] > 11 and losses[-1] < 0.1 * losses[0], losses

    tokenizer, model = Tokenizer(tmp_path / "run/model"), Model.from_pretrained(tmp_path / "run/model")
    prompt = load_prompt(str(tmp_path / "run/model/prompt.txt"))
    prompts = [tokenizer.chat(render(prompt, chain.pair)) for chain in recorded]
    sampled = Sampler(model).generate(prompts, Sampling(max_new_tokens=700, temperature=0, stop=tokenizer.stop_ids))
    for (rollout,), chain in zip(sampled, recorded, strict=True):
        text = tokenizer.decode(rollout.ids)
        assert rollout.finished and text == chain.judgement
        assert benchmark_verdict(text) == benchmark_verdict(chain.judgement) is not None


def command(*args, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / "distill.py", *map(str, args)], cwd=cwd, capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)


def test_own_data_is_trained_with_the_papers_numbers_and_resumed_without_repeating_them(made, tmp_path):
    """From the command line. Once it failed on runs/toy/data/heldout.jsonl, an option that nobody gave, and would have
    trained with Muon and a learning rate of 4e-3. Here another cadence is asked for on resuming, and recorded."""
    chains = write_rows(tmp_path / "chains.jsonl", toy.make("distill", 14, seed=3))
    done = command("--model", made / "model", "--data", chains, "--prompt", "toy", "--out", "run", "--save-every", 1,
                   "--batch-size", 7, "--seed", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "run/config.json").read_text())
    options = asdict(Config(str(made / "model"), str(chains), "toy", "run", batch_size=7, seed=3, save_every=1))
    assert record["options"] == {name: value for name, value in options.items() if name not in PLANNING}
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]
    first = load_file(tmp_path / "run/model/model.safetensors")
    shutil.rmtree(tmp_path / "run/model")
    shutil.rmtree(tmp_path / "run/checkpoints/step-2")
    done = command("--out", "run", "--resume", "--save-every", 0, "--threads", 1, cwd=tmp_path)
    assert done.returncode == 0 and "run: goes on after step 1 of 2" in done.stdout, done.stderr[-2000:]
    assert "note: --threads was 0, is 1 from here on: sums are added in another order" in done.stdout
    again = load_file(tmp_path / "run/model/model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    resumed, = json.loads((tmp_path / "run/config.json").read_text())["resumed"]
    assert resumed["step"] == 1 and resumed["changed"] == {"save_every": [1, 0], "threads": [0, 1]}
    refused = command("--out", "run", "--resume", "--batch-size", 8, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--batch-size 7, not 8" in refused.stderr


def test_the_embedded_default_is_made_from_nothing(tmp_path, monkeypatch):
    write_data = toy.write_data
    monkeypatch.setattr(toy, "write_data", lambda folder,
                        seed: write_data(folder, seed, n_distill=20, n_rl=5, n_heldout=4))
    distill.make_embedded_default(tmp_path, seed=1)
    model, tokenizer = Model.from_pretrained(tmp_path / "untrained"), Tokenizer(tmp_path / "untrained")
    assert model.config.vocab_size == tokenizer.n_vocab
    assert load_prompt(str(tmp_path / "untrained/prompt.txt")).user == load_prompt("toy").user
    assert [len(read_chains(tmp_path / "data/distill.jsonl")),
            *(len(read_pairs(tmp_path / f"data/{name}.jsonl")) for name in ("rl", "heldout"))] == [20, 5, 4]


# ---- runs that die

def dying(made, out, **changes):
    """A learning rate that makes the weights so large, in the first step, that no gradient is finite from then on."""
    return config(made, out, lr=1e30, warmup_frac=0.0, epochs=9, **changes)


def test_a_dead_run_stops_after_three_skipped_steps_without_a_model(made, tmp_path):
    """Once it logged NaN to its end, exited with 0 and left a model/ that writes "!!!!!"."""
    with pytest.raises(ValueError, match="stopped, loss or gradient were not finite in 3 steps in a row .*; no model/ "
                                         f"is written, the last good weights are in {made}/model: start another run"):
        distill.main(dying(made, tmp_path / "run"))
    kept = [json.loads(line) for line in (tmp_path / "run/stopped.jsonl").read_text().splitlines()]
    assert kept and all(row["judgement"].endswith("<|im_end|>") for row in kept)
    rows = metrics(tmp_path / "run")
    assert [row["n_skipped"] for row in rows] == [0, 1, 1, 1] and rows[0]["loss"] > 0
    assert rows[0]["grad_norm"] > 0 and all(row["grad_norm"] is None for row in rows[1:])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl", "stopped.jsonl"}


@pytest.mark.parametrize("changes", [dict(max_steps=1), dict(save_every=1), dict(max_steps=2, save_every=2),
                                     dict(eval_every=1)], ids=str)
def test_a_dead_model_is_neither_saved_nor_evaluated(changes, made, tmp_path):
    """Wherever a run ends, saves or judges: before that the model must be able to give one chain a probability."""
    changes = {"eval_data": str(made / "heldout.jsonl")} | changes if "eval_every" in changes else changes
    with pytest.raises(ValueError, match="stopped, its model gives no finite log-probabilities or gradient any more"):
        distill.main(dying(made, tmp_path / "run", **changes))
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json", "metrics.jsonl"}
    assert not any("eval_accuracy" in row for row in metrics(tmp_path / "run"))


def test_the_last_good_checkpoint_stays(made, tmp_path):
    """Resumed with an optimizer whose moments are 1e38 times too large, so that its next step kills the model."""
    distill.main(config(made, tmp_path / "run", save_every=2, max_steps=4))
    good = (tmp_path / "run/checkpoints/step-2/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    shutil.rmtree(tmp_path / "run/model")
    step_2 = tmp_path / "run/checkpoints/step-2"
    moments = load_file(step_2 / "optimizer-00001-of-00001.safetensors")
    save_file({name: x * 1e38 if name.endswith("exp_avg") else x for name, x in moments.items()},
              step_2 / "optimizer-00001-of-00001.safetensors")
    (step_2 / "state.json").write_text('{"step": 2}')  # as before there were checksums
    with pytest.raises(ValueError, match="(any more|in a row); .* in .*checkpoints/step-2: start another run"):
        distill.main(config(made, tmp_path / "run", save_every=2, max_steps=4, resume=True))
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-2"]
    assert (tmp_path / "run/checkpoints/step-2/model.safetensors").read_bytes() == good


# ---- the prompt that is saved

def ready_made(made, path, prompt):
    """The chains as {"messages": ...} rows, shown by a prompt."""
    chains = read_chains(made / "chains.jsonl")
    write_rows(path, [{"id": chain.pair.id, "messages": [*render(load_prompt(prompt), chain.pair),
                                                         {"role": "assistant", "content": chain.judgement}]}
                      for chain in chains])
    return str(path)


@pytest.mark.parametrize("made_by, given, kept", [
    ("toy", "toy", "toy"), ("toy", None, None), ("direct", None, "direct"), ("direct", "instruct", "direct"),
    ("own", None, None), ("own", "own", "own")])
def test_prompt_txt_is_the_prompt_that_the_rows_were_made_with(made_by, given, kept, made, tmp_path, capsys):
    """Once it was --prompt, which ready-made rows do not follow; then the later scripts asked another one."""
    (tmp_path / "own.txt").write_text("[user]\nQ {question}\nA {answer_a}\nB {answer_b}\n")
    names = {"own": str(tmp_path / "own.txt")}
    data = ready_made(made, tmp_path / "chains.jsonl", names.get(made_by, made_by))
    distill.main(config(made, tmp_path / "run", data=data, prompt=names.get(given, given), max_steps=1,
                        max_length=2000))
    saved, said = tmp_path / "run/model/prompt.txt", capsys.readouterr().out
    assert ("note: 14 of 14 rows bring their own messages" in said) is (kept is None)
    assert ("note: the rows bring their own messages, made by the prompt" in said) is (given not in (None, kept))
    assert saved.exists() is (kept is not None)
    if kept:
        source = Path(names[kept]) if kept in names else ROOT / f"data/prompts/{kept}.txt"
        assert saved.read_text() == source.read_text()


def test_rows_that_need_a_prompt_ask_for_it(made, tmp_path):
    with pytest.raises(ValueError, match="^--prompt is missing: give instruct, reasoning, direct or a file"):
        distill.main(config(made, tmp_path / "run", prompt=None))
    assert not (tmp_path / "run").exists()


def test_equal_answers_are_said_and_dropped(made, tmp_path, capsys):
    rows = toy.make("distill", 14, seed=3)
    rows[3] = rows[3] | {"answer_b": rows[3]["answer_a"]}
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    for skip, n in ((False, 14), (True, 13)):
        cfg = config(made, tmp_path, data=data, skip_bad=skip)
        examples, pairs = read_examples(cfg, Tokenizer(made / "model"), ALONE)
        assert len(examples) == len(pairs) == n and "1 of 14 have two equal answers" in capsys.readouterr().out


# ---- what is kept beside the last model

def test_keep_best_keeps_the_model_with_the_best_held_out_accuracy(made, tmp_path, monkeypatch):
    """Accuracies by hand: 0.2, 0.6, 0.6, 0.4. The first of the best is kept, also where a run was interrupted between;
    oracle: the checkpoint of its step."""
    accuracies = {2: 0.2, 4: 0.6, 6: 0.6, 8: 0.4}
    steps, copies = [], []

    def judge(self, sampler, bar=None):
        steps.append(len(metrics(steps_of)) + 1)
        return {"eval_accuracy": accuracies[steps[-1]]}, []
    monkeypatch.setattr(distill.HeldOut, "judge", judge)
    filled_copy = distill.filled_copy

    def counted(*args):
        copies.append(1)
        return filled_copy(*args)
    monkeypatch.setattr(distill, "filled_copy", counted)
    cfg = config(made, tmp_path / "whole", save_every=2, eval_data=str(made / "heldout.jsonl"), eval_every=2,
                 keep_best=True)
    steps_of = tmp_path / "whole"
    distill.main(cfg)
    assert steps == [2, 4, 6, 8] and len(metrics(steps_of)) == 8 and len(copies) == 4
    best = load_file(tmp_path / "whole/best/model.safetensors")
    wanted = load_file(tmp_path / "whole/checkpoints/step-4/model.safetensors")
    assert all(torch.equal(best[name], wanted[name]) for name in wanted)
    assert (tmp_path / "whole/best/prompt.txt").exists() and Tokenizer(tmp_path / "whole/best")
    assert json.loads((tmp_path / "whole/best/best.json").read_text()) == {"step": 4, "eval_accuracy": 0.6}

    for last_kept in (2, 6):
        steps_of = tmp_path / f"again-{last_kept}"
        shutil.copytree(tmp_path / "whole", steps_of)
        interrupt(steps_of, last_kept)
        distill.main(replace(cfg, out=str(steps_of), resume=True))
        again = load_file(steps_of / "best/model.safetensors")
        assert all(torch.equal(best[name], again[name]) for name in best)


# ---- a user's mistakes

def test_mistakes_end_with_one_line(made, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "bad.jsonl"
    lines = (made / "chains.jsonl").read_text().splitlines()
    bad.write_text("\n".join(lines[:2] + ['{"id": "x", "judgement": 5}'] + lines[2:]))
    for changed, named in (({"data": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file"),
                           ({"data": str(bad)}, f"{bad}:3: "),
                           ({"model": str(tmp_path)}, "tokenizer.json"),
                           ({"prompt": "poem"}, "poem.txt: no such prompt"),
                           ({"eval_data": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file")):
        monkeypatch.setattr(sys, "argv", ["distill.py", *flags(config(made, tmp_path / "run", **changed))])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "distill.py"), run_name="__main__")
        errors = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.strip()
                  and not line.startswith("tokenize: ")]
        assert stop.value.code == 2 and len(errors) == 1, errors
        assert errors[0].startswith("error: ") and named in errors[0], errors
    assert not (tmp_path / "run/metrics.jsonl").exists()
    with pytest.raises(ValueError, match="--batch-size must be at least 1"):
        config(made, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="--max-steps must be at least 0"):
        config(made, tmp_path, max_steps=-1)
    with pytest.raises(ValueError, match="--optimizer is adamw or muon"):
        config(made, tmp_path, optimizer="sgd")

    done = subprocess.run([sys.executable, "distill.py", "--recipe", "qwen2.5-8b"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "qwen2.5-7b" in done.stderr and done.stdout == ""


def test_the_papers_recipes():
    """Sizes and rates as in paper.md section 4. The options' own defaults are the 7B's; a prompt must be said."""
    assert Config("model", "data") == Config("model", "data", **distill.RECIPES["qwen2.5-7b"] | {"prompt": None})
    for size, lr in (("7b", 5e-6), ("14b", 3e-6), ("32b", 2e-6)):
        cfg = Config("model", "data", **distill.RECIPES[f"qwen2.5-{size}"])
        assert (cfg.lr, cfg.batch_size, cfg.epochs, cfg.max_length, cfg.warmup_frac,
                cfg.final_lr_frac) == (lr, 128, 1, 12288, 0.03, 0.1)
        assert (cfg.optimizer, cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.max_norm,
                cfg.prompt) == ("adamw", 0.9, 0.95, 0.0, 1.0, "instruct")
