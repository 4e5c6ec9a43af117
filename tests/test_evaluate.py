"""evaluate.py. Oracles: Newcombe's published Wilson intervals, the equation they solve and their exact binomial
coverage; scores counted by hand; scores.json counted again from judgements.jsonl; the training loop's evaluation
against the script's."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import Ranks, parse_config  # noqa: E402
from data import toy  # noqa: E402
from data.pairs import Pair, read_pairs, write_pairs  # noqa: E402
from evaluate import Config, HeldOut, main, score, table, wilson  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from reward import benchmark_verdict, majority, prompt_path  # noqa: E402
from sample import load_judge  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

torch.set_num_threads(1)

# ---- the interval


@pytest.mark.parametrize("right, n, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),  # Newcombe 1998, table I
    (50, 100, 0.4038, 0.5962), (8, 10, 0.4902, 0.9433), (20, 20, 0.8389, 1.0), (0, 0, 0.0, 1.0),
])
def test_wilson_equals_published_intervals(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_ends_solve_their_equation():
    """(share - p)^2 = z^2 p (1 - p) / n at both ends p; the ends mirror each other and lie in [0, 1]."""
    for n in (1, 2, 17, 3000):
        for right in {0, 1, n // 3, n - 1, n}:
            low, high = wilson(right, n)
            assert 0 <= low <= right / n <= high <= 1
            assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
            for p in (low, high):
                assert (right / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)


@pytest.mark.parametrize("n", [10, 40, 200])
def test_wilson_covers_the_truth_95_times_in_100(n):
    """Exactly, from the binomial: on average over true shares within 1 point of 95%, and nowhere in 0.05 .. 0.95
    below 89%."""
    ends, coverage = [wilson(right, n) for right in range(n + 1)], []
    for k in range(50, 951, 3):
        p = k / 1000
        coverage.append(sum(math.comb(n, right) * p**right * (1 - p) ** (n - right)
                            for right, (low, high) in enumerate(ends) if low <= p <= high))
    assert abs(sum(coverage) / len(coverage) - 0.95) < 0.01 and min(coverage) > 0.89


# ---- scores of hand-made records


def record(winner, verdicts, domain, source, n_tokens=10):
    return {"winner": winner, "domain": domain, "source": source, "verdict": majority(verdicts),
            "votes": [{"verdict": v, "n_tokens": n_tokens} for v in verdicts]}


RECORDS = [record("a", "aab", "chat", "x"), record("b", "bab", "chat", "y", 40),
           record("a", ["a", "b", None], "code", "x"),
           record("b", [None, None, None], "code", "x", 1), record("b", ["b", None, None], "code", "y"),
           record("a", "bba", "chat", "y"), record(None, "aaa", "chat", "x", 9999), record(None, "bbb", "none", "z")]


def test_score_counts_by_hand():
    """Right: the 1st, 2nd, 5th. A tie and no verdict at all are wrong; the last two have no label and count nowhere."""
    rows = score(RECORDS)
    assert list(rows) == ["all", "domain chat", "domain code", "source x", "source y"]
    assert {name: (r["n"], r["right"]) for name, r in rows.items()} == {
        "all": (6, 3), "domain chat": (3, 2), "domain code": (3, 1), "source x": (3, 1), "source y": (3, 2)}
    for r in rows.values():
        assert r["accuracy"] == r["right"] / r["n"] and (r["low"], r["high"]) == wilson(r["right"], r["n"])
    assert [rows[name]["no_verdict"] for name in ("all", "domain chat", "source y")] == [6 / 18, 0, 2 / 9]
    assert rows["all"]["n_tokens"] == (4 * 10 + 40 + 1) / 6 and rows["domain chat"]["n_tokens"] == 20
    assert score([]) == score(RECORDS[-2:]) == {}


def test_table_shows_every_row_once():
    lines = table(score(RECORDS)).split("\n")
    assert len(lines) == 6 and lines[1].split() == "all 6 50.0 18.8 to 81.2 33.3 14".split()
    names = [" ".join(line.split()[:3]) for line in lines[2:]]
    assert names == ["domain chat 3", "domain code 3", "source x 3", "source y 3"]


# ---- end to end, with a random model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights, a head that knows no tokens but the two verdicts: greedy or not, all three verdicts come out."""
    path = tmp_path_factory.mktemp("judge")
    n_vocab = toy.write_tokenizer(path)
    raw = toy.MODEL | dict(vocab_size=n_vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    model = Model.random(ModelConfig.from_dict(raw | {"tie_word_embeddings": False})).requires_grad_(False)
    for x in model.parameters():
        if x.ndim == 2:
            x.mul_(15)
    spec = json.loads((path / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    a, b = vocabulary.pop("\u0120looks"), vocabulary.pop("\u0120better.")  # two tokens that no prompt has
    vocabulary |= {"[[A]]": a, "[[B]]": b}  # now each a whole verdict
    (path / "tokenizer.json").write_text(json.dumps(spec))
    verdicts = model.head_vd[[a, b]].clone()
    model.head_vd.zero_()[[a, b]] = 4 * verdicts
    model.save_pretrained(path)
    (path / "prompt.txt").write_text(prompt_path("toy").read_text())
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty toy pairs, two of them without a label."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{k: v for k, v in row.items() if k != "judgement"} for row in toy.make("heldout", 40, 0)]
    rows[3]["winner"] = rows[7]["winner"] = None
    write_pairs(path, [Pair(**row) for row in rows])
    return path


def test_main_scores_what_it_judged(folder, data, tmp_path, capsys):
    """scores.json, counted again from the votes' texts in judgements.jsonl; a second start
    scores them again, and refuses them under other settings."""
    cfg = Config(model=str(folder), data=str(data), out=str(tmp_path / "eval"), votes=3, temperature=2.0,
                 max_new_tokens=2, threads=1)
    main(cfg)
    records = [json.loads(line) for line in (tmp_path / "eval" / "judgements.jsonl").read_text().split("\n")[:-1]]
    saved = json.loads((tmp_path / "eval" / "scores.json").read_text())
    pairs = read_pairs(data)
    assert [r["id"] for r in records] == [pair.id for pair in pairs] and all(len(r["votes"]) == 3 for r in records)
    n, right, none, tokens = Counter(), Counter(), Counter(), Counter()
    for pair, r in zip(pairs, records):
        verdicts = [benchmark_verdict(vote["text"]) for vote in r["votes"]]
        for name in ("all", f"domain {pair.domain}", f"source {pair.source}") if pair.winner else ():
            n[name] += 1
            right[name] += (verdicts.count("a") > verdicts.count("b") and pair.winner == "a"
                            or verdicts.count("b") > verdicts.count("a") and pair.winner == "b")
            none[name] += verdicts.count(None)
            tokens[name] += sum(vote["n_tokens"] for vote in r["votes"])
    assert n["all"] == 38 and 0 < right["all"] < 38 and 0 < none["all"], "the case has lost its variety"
    for name in n:
        low, high = wilson(right[name], n[name])
        assert saved["scores"][name] == pytest.approx({
            "n": n[name], "right": right[name], "accuracy": right[name] / n[name], "low": low, "high": high,
            "no_verdict": none[name] / n[name] / 3, "n_tokens": tokens[name] / n[name] / 3})
    assert set(saved["scores"]) == set(n) and saved["settings"]["votes"] == 3 and saved["prefill_tok_s"] > 0
    assert capsys.readouterr().out == table(saved["scores"]) + "\n"
    assert sorted(os.listdir(tmp_path / "eval")) == ["judgements.jsonl", "scores.json", "settings.json"]
    (tmp_path / "eval" / "scores.json").unlink()  # the run ended between judging and scoring: only that is done again
    main(cfg)
    assert json.loads((tmp_path / "eval" / "scores.json").read_text())["scores"] == saved["scores"]
    for changed in (replace(cfg, seed=1), replace(cfg, limit=9)):
        with pytest.raises(ValueError, match="judgements.jsonl: was judged with other settings"):
            main(changed)
    again = [json.loads(line) for line in (tmp_path / "eval" / "judgements.jsonl").read_text().split("\n")[:-1]]
    assert again == records


def test_held_out_equals_the_script(folder, data, tmp_path, capsys):
    """Greedy judgements of the labelled pairs, whole and limited; two ranks share them out and get the same numbers."""
    judge = load_judge(Config(model=str(folder), threads=1))
    model, tokenizer, one = judge.sampler.model, judge.tokenizer, Ranks(0, 1, torch.device("cpu"))
    main(Config(model=str(folder), data=str(data), out=str(tmp_path), max_new_tokens=2, threads=1))
    rows = json.loads((tmp_path / "scores.json").read_text())["scores"]
    expected = {f"eval_{short}": rows["all"][name]
                for short, name in (("accuracy", "accuracy"), ("no_verdict", "no_verdict"), ("tokens", "n_tokens"))}
    expected |= {f"eval_accuracy_{domain}": rows[f"domain {domain}"]["accuracy"] for domain in ("chat", "reasoning")}
    assert 0 < expected["eval_accuracy"] < 1 and 0 < expected["eval_no_verdict"] < 1, "the case has lost its variety"
    scores, records = HeldOut(data, 100, "toy", 2, tokenizer, one).judge(model)
    assert scores.pop("eval_s") > 0 and scores == expected and score(records)["all"] == rows["all"]

    class OfTwo(Ranks):
        """Rank 0 leaves its records on the shelf, rank 1 finds them there."""
        def gather(self, x):
            shelf.append(x)
            return [*shelf]
    for n_pairs in (5, 1):  # with one pair, rank 1 has nothing to judge
        shelf = []
        for rank in range(2):
            ranks = OfTwo(rank, 2, torch.device("cpu"))
            shared, _ = HeldOut(data, n_pairs, "toy", 2, tokenizer, ranks).judge(model)
        alone = HeldOut(data, n_pairs, "toy", 2, tokenizer, one)
        assert [pair.id for pair in alone.pairs] == [pair.id for pair in read_pairs(data) if pair.winner][:n_pairs]
        assert sorted(r["id"] for part in shelf for r in part) == sorted(pair.id for pair in alone.pairs)
        scores, _ = alone.judge(model)
        assert shared.pop("eval_s") > 0 and shared == pytest.approx({k: v for k, v in scores.items() if k != "eval_s"})


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    unlabelled = tmp_path / "pairs.jsonl"
    write_pairs(unlabelled, [Pair("1", [{"role": "user", "content": "sort 21"}], "12", "21", None, "", "")])
    with pytest.raises(ValueError, match="no pair has a winner"):
        main(Config(model=str(folder), data=str(unlabelled), out=str(tmp_path / "out")))
    with pytest.raises(ValueError, match="no labelled pairs"):
        HeldOut(unlabelled, 5, "toy", 2, None, Ranks(0, 1, torch.device("cpu")))
    for argv in (["--votes", "2"], ["--limit", "-1"], ["--pairs", "x"]):
        with pytest.raises(SystemExit) as e:
            parse_config(Config, argv=argv)
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    argv = [sys.executable, ROOT / "evaluate.py", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "none.jsonl: no such file" in done.stderr
    assert not (tmp_path / "out").exists()
