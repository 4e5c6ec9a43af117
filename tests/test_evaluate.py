"""evaluate.py. Oracles: scores.json counted again from judgements.jsonl; separate runs with the answers exchanged and
with smaller token limits; what an uninterrupted run wrote; the training loop's evaluation against the script's."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import Ranks  # noqa: E402
from options import parse_config  # noqa: E402
from data import toy  # noqa: E402
from data.pairs import Pair, read_pairs, swapped, write_pairs  # noqa: E402
import evaluate  # noqa: E402
from evaluate import Config, main, read_all, short_names  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from prompt import load_prompt, prompt_path  # noqa: E402
from reward import benchmark_verdict  # noqa: E402
from judge import Config as JudgeConfig, HeldOut, load_judge  # noqa: E402
from benchmarks.scores import LEGEND, pairs as score, quantity_table, table, wilson  # noqa: E402

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
    a, b = vocabulary.pop("\u0120right."), vocabulary.pop("\u0120wrong.")  # two tokens that no prompt has
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


def judged(out):
    return [json.loads(line) for line in (out / "judgements.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]


def saved_scores(out):
    return json.loads((out / "scores.json").read_text())


def config(folder, data, out, **options):
    return Config(**{"model": (str(folder),), "data": data and str(data), "out": str(out), "max_new_tokens": 2,
                     "threads": 1} | options)


def without_time(records):
    return [r | {"seconds": 0, "votes": [vote | {"seconds": 0} for vote in r["votes"]]} for r in records]


def test_main_scores_what_it_judged(folder, data, tmp_path, capsys):
    """scores.json, counted again from the votes' texts in judgements.jsonl; a second start judges nothing again, and
    refuses other settings and fewer pairs."""
    out = tmp_path / "eval"
    cfg = config(folder, data, out, votes=7, temperature=2.0)
    main(cfg)
    records, saved, pairs = judged(out), saved_scores(out), read_pairs(data)
    assert [r["id"] for r in records] == [pair.id for pair in pairs] and all(len(r["votes"]) == 7 for r in records)
    assert read_pairs(out / "pairs.jsonl") == pairs
    count = {name: Counter() for name in ("n", "right", "none", "ties", "tokens")}
    for pair, r in zip(pairs, records):
        verdicts = [benchmark_verdict(vote["text"]) for vote in r["votes"]]
        n_a, n_b = verdicts.count("a"), verdicts.count("b")
        for name in (("overall", "all"), ("domain", pair.domain), ("source", pair.source)) if pair.winner else ():
            count["n"][name] += 1
            count["right"][name] += n_a > n_b and pair.winner == "a" or n_b > n_a and pair.winner == "b"
            count["none"][name] += verdicts.count(None)
            count["ties"][name] += n_a == n_b > 0
            count["tokens"][name] += sum(vote["n_tokens"] for vote in r["votes"])
    n, right, none = count["n"], count["right"], count["none"]
    everything = ("overall", "all")
    assert n[everything] == 38 > right[everything] > 0 < none[everything] and count["ties"][everything]
    rows = {(r["kind"], r["name"]): r for r in saved["rows"]}
    assert set(rows) == set(n) and saved["settings"]["votes"] == 7 and saved["session"]["prefill_tok_s"] > 0
    for name, row in rows.items():
        assert row["seconds"] > 0
        assert {k: v for k, v in row.items() if k != "seconds"} == pytest.approx({
            "benchmark": "pairs", "kind": name[0], "name": name[1], "n": n[name], "of": None, "right": right[name],
            "score": right[name] / n[name], **dict(zip(("low", "high"), wilson(right[name], n[name]))),
            "no_verdict": none[name] / n[name] / 7, "ties": count["ties"][name] / n[name],
            "tokens": count["tokens"][name] / n[name] / 7})
    shown = capsys.readouterr().out
    assert table(saved["rows"]) in shown and LEGEND in shown
    assert quantity_table(saved["positions"], "positions") in shown
    assert sorted(os.listdir(out)) == ["judgements.jsonl", "pairs.jsonl", "scores.json", "settings.json"]

    (out / "scores.json").unlink()  # the run ended between judging and scoring: only that is done again
    main(cfg)
    again = saved_scores(out)
    assert again["rows"] == saved["rows"] and again["session"]["prefill_tok_s"] == 0 and judged(out) == records
    with pytest.raises(ValueError, match="settings.json: was begun with seed=0, not 1"):
        main(replace(cfg, seed=1))
    with pytest.raises(ValueError, match="judgements.jsonl: holds 31 judgements of pairs that are not given now"):
        main(replace(cfg, limit=9))
    assert judged(out) == records
    with pytest.raises(ValueError, match="none: is no folder here"):  # told before the first model judges
        main(config(folder, data, tmp_path / "two", model=(str(folder), str(tmp_path / "none"))))
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("kept", [0, 1, 17, 40])
def test_an_interrupted_run_goes_on_at_any_record(folder, data, tmp_path, kept, capsys):
    """Judgements of the first `kept` pairs and half a line more are on disk: the others are judged, and all is as if
    it had never stopped. What was done is not done again: a mark in its records survives."""
    main(config(folder, data, tmp_path / "whole"))
    main(config(folder, data, tmp_path / "out"))
    whole, out = judged(tmp_path / "whole"), tmp_path / "out"
    lines = [json.dumps(r | {"seconds": 1234.0}) for r in whole[:kept]] + [json.dumps(whole[-1])[:50]]
    settings = (out / "settings.json").read_text()
    (out / "judgements.jsonl").unlink()
    (out / "judgements.jsonl.partial").write_text("\n".join([settings, *lines]))
    if kept > 9:
        with pytest.raises(ValueError, match=f"partial: holds {kept - 9} judgements of pairs that are not given now"):
            main(config(folder, data, out, limit=9))
    main(config(folder, data, out))
    assert [r["seconds"] == 1234.0 for r in judged(out)] == [i < kept for i in range(40)]
    assert without_time(judged(out)) == without_time(whole)
    corrected = [replace(pair, winner="ab"[pair.winner == "a"]) for pair in read_pairs(data)]
    write_pairs(tmp_path / "corrected.jsonl", corrected)
    main(config(folder, tmp_path / "corrected.jsonl", out))  # labels may change: they are no part of a judgement
    assert [r["winner"] for r in judged(out)] == [pair.winner for pair in corrected]
    assert sorted(os.listdir(out)) == ["judgements.jsonl", "pairs.jsonl", "scores.json", "settings.json"]


def test_more_can_be_judged_later(folder, data, tmp_path, capsys):
    """A few pairs first, then all, then all in the other order too; what was judged before stays as it is."""
    main(config(folder, data, tmp_path, limit=5))
    first = judged(tmp_path)
    assert [r["id"] for r in first] == [pair.id for pair in read_pairs(data)[:5]]
    main(config(folder, data, tmp_path))
    second = judged(tmp_path)
    assert len(second) == 40 and second[:5] == first
    main(config(folder, data, tmp_path, swap=True))
    assert len(judged(tmp_path)) == 80 and judged(tmp_path)[:40] == second


def test_swap_equals_a_run_on_exchanged_answers(folder, data, tmp_path, capsys):
    pairs, exchanged = read_pairs(data), tmp_path / "exchanged.jsonl"
    write_pairs(exchanged, [swapped(pair) for pair in pairs])
    main(config(folder, data, tmp_path / "both", swap=True))
    main(config(folder, exchanged, tmp_path / "second"))
    both, second = judged(tmp_path / "both"), judged(tmp_path / "second")
    assert [r["id"] for r in both] == [pair.id for pair in pairs] + [f"{pair.id}/swapped" for pair in pairs]
    as_second = [{key: value for key, value in r.items() if key != "swapped"} | {"id": r["id"].removesuffix("/swapped")}
                 for r in both[40:]]
    assert read_pairs(tmp_path / "both" / "pairs.jsonl") == pairs  # the first order only
    assert all(r["swapped"] for r in both[40:]) and without_time(as_second) == without_time(second)
    row, = saved_scores(tmp_path / "both")["swap"]
    labelled = [(one, other) for one, other in zip(both, second) if one["winner"]]
    same = sum(one["verdict"] is not None and {one["verdict"], other["verdict"]} == {"a", "b"}
               for one, other in labelled)
    assert row["n"] == 38 and row["consistent"] == same / 38
    accuracy = [saved_scores(tmp_path / name)["rows"][0]["score"] for name in ("both", "second")]
    assert [row["first"], row["second"]] == accuracy and row["mean"] == pytest.approx(sum(accuracy) / 2)
    assert "same answer preferred in both orders, %" in capsys.readouterr().out


def test_budgets_equal_runs_with_those_limits(folder, data, tmp_path, capsys):
    """One sampling pass of 4 tokens tells what limits of 1, 2 and 4 would have scored, votes and ties included."""
    how = dict(votes=3, temperature=2.0)
    main(config(folder, data, tmp_path / "all", budgets="4,1,2", max_new_tokens=4, **how))
    rows = saved_scores(tmp_path / "all")["budgets"]
    assert {row["budget"] for row in rows} == {1, 2, 4}
    for budget in (1, 2, 4):
        main(config(folder, data, tmp_path / str(budget), max_new_tokens=budget, **how))
        wanted = [r for r in saved_scores(tmp_path / str(budget))["rows"] if r["kind"] in ("overall", "domain")]
        got = [{key: value for key, value in row.items() if key != "budget"} for row in rows if row["budget"] == budget]
        assert [r | {"seconds": 0} for r in got] == [r | {"seconds": 0} for r in wanted]
    assert len({row["score"] for row in rows if row["name"] == "all"}) > 1, "the case has lost its variety"
    assert "after 2 tokens" in capsys.readouterr().out


def test_models_side_by_side(folder, data, tmp_path, capsys):
    other = tmp_path / "other"
    other.symlink_to(folder)
    main(config(folder, data, tmp_path / "out", model=(str(folder), str(other))))
    main(config(folder, data, tmp_path / "alone"))
    shown, alone = capsys.readouterr().out, saved_scores(tmp_path / "alone")["rows"]
    for name in (folder.name, "other"):
        assert [r | {"seconds": 0} for r in saved_scores(tmp_path / "out" / name)["rows"]] == [
            r | {"seconds": 0} for r in alone]
        assert without_time(judged(tmp_path / "out" / name)) == without_time(judged(tmp_path / "alone"))
    assert [m["model"] for m in saved_scores(tmp_path / "out")["models"]] == [folder.name, "other"]
    line, = (line for line in shown.split("\n") if line.startswith("pairs: all"))
    assert line.split()[2::2] == [f"{100 * alone[0]['score']:.1f}"] * 2
    assert short_names(["a/x/model", "a/y/model"]) == ["x-model", "y-model"] and short_names(["a/b"]) == ["b"]
    assert short_names(["runs/demo/grpo/model"]) == ["grpo-model"] and short_names(["x/Qwen2.5-7B"]) == ["Qwen2.5-7B"]
    assert short_names(["x/a.b.json", "x/c.jsonl"]) == ["a.b", "c"]
    with pytest.raises(ValueError, match="is given twice"):
        short_names(["a/b", "./a/b"])


def test_recorded_judgements_are_scored_without_a_model(folder, data, tmp_path, capsys, monkeypatch):
    """In place and elsewhere: the same scores, budgets and swaps, from the texts; a verdict that the file has wrong is
    told, and a folder that holds other judgements is left alone."""
    main(config(folder, data, tmp_path / "run", swap=True, budgets="1,2"))
    first, files = saved_scores(tmp_path / "run"), sorted(os.listdir(tmp_path / "run"))
    for source, out in (("run", "copy"), ("run/judgements.jsonl", "copy2"), ("copy", "copy"), ("run", "run")):
        main(Config(from_=(str(tmp_path / source),), out=str(tmp_path / out)))
        again = saved_scores(tmp_path / out)
        assert all(again[key] == first[key] for key in ("rows", "swap", "positions", "budgets")), (source, out)
        assert again["recorded"] == {"n": 80, "same": 80, "differ": []}
        assert sorted(os.listdir(tmp_path / out)) == files
        assert (tmp_path / out / "pairs.jsonl").read_text() == (tmp_path / "run/pairs.jsonl").read_text()
    main(config(folder, data, tmp_path / "run", swap=True, budgets="1,2"))  # the run itself can still go on
    records = judged(tmp_path / "run")
    right = next(i for i, r in enumerate(records) if r["verdict"] and r["verdict"] == r["winner"])
    records[right]["verdict"] = None
    monkeypatch.setattr(evaluate, "init_ranks", lambda threads, together: Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="--from needs one process"):
        main(Config(from_=(str(tmp_path / "run"),), out=str(tmp_path / "ranks")))
    monkeypatch.undo()
    (tmp_path / "wrong.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    main(Config(from_=(str(tmp_path / "wrong.jsonl"),), out=str(tmp_path / "wrong")))
    wrong = saved_scores(tmp_path / "wrong")
    assert wrong["budgets"] == first["budgets"]
    assert wrong["rows"] == first["rows"] and wrong["recorded"]["differ"] == [records[right]["id"]]
    with pytest.raises(ValueError, match="holds other judgements"):
        main(Config(from_=(str(tmp_path / "wrong.jsonl"),), out=str(tmp_path / "copy")))
    del records[7]["votes"][0]["at"]["1"]  # a budget that one vote lacks is no budget of all
    (tmp_path / "at.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    main(Config(from_=(str(tmp_path / "at.jsonl"),), out=str(tmp_path / "at")))
    assert {row["budget"] for row in saved_scores(tmp_path / "at")["budgets"]} == {2}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/judgements.jsonl.partial").write_text("{}\n")  # an interrupted run of a model
    with pytest.raises(ValueError, match="begun: holds other judgements"):
        main(Config(from_=(str(tmp_path / "run"),), out=str(tmp_path / "begun")))
    (tmp_path / "several").mkdir()
    for name in ("run", "copy"):
        (tmp_path / name).rename(tmp_path / "several" / name)
    main(Config(from_=(str(tmp_path / "several"),), out=str(tmp_path / "both")))  # a folder of several models' folders
    assert sorted(os.listdir(tmp_path / "both")) == ["copy", "run", "scores.json"]


def test_a_refused_run_leaves_an_interrupted_one_alone(folder, data, tmp_path):
    """Other settings, or judgements no longer wanted: nothing in the folder changes. Damaged lines are named."""
    main(config(folder, data, tmp_path))
    whole = tmp_path / "judgements.jsonl"
    lines = [(tmp_path / "settings.json").read_text(), *whole.read_text().split("\n")[:20]]
    whole.unlink()
    (tmp_path / "judgements.jsonl.partial").write_text("\n".join(lines) + "\n")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    exchanged = tmp_path.parent / "exchanged.jsonl"
    write_pairs(exchanged, [swapped(pair) for pair in read_pairs(data)])
    for cfg, said in ((config(folder, data, tmp_path, seed=3), "was begun with seed=0, not 3"),
                      (config(folder, data, tmp_path, limit=5, skip_bad=True), "holds 15 judgements of pairs"),
                      (config(folder, exchanged, tmp_path), "holds 20 judgements of pairs")):
        with pytest.raises(ValueError, match=f"partial: {said}"):
            main(cfg)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    main(config(folder, data, tmp_path))
    lines = whole.read_text().split("\n")
    whole.write_text("\n".join([*lines[:2], '{"x": 1}', *lines[3:]]))
    with pytest.raises(ValueError, match="judgements.jsonl:3: is no judgement; without this line"):
        main(config(folder, data, tmp_path))
    whole.write_text("\n".join([*lines[:2], *lines[3:]]))
    main(config(folder, data, tmp_path))
    assert [r["id"] for r in judged(tmp_path)] == [pair.id for pair in read_pairs(data)]


def test_two_ranks_share_the_pairs(folder, data, tmp_path):
    """torchrun with two processes writes what one writes; one process goes on where two were stopped."""
    argv = ["--data", data, "--model", folder, "--max-new-tokens", "2", "--threads", "1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for run, out in (([sys.executable], "one"), (two, "two")):
        done = subprocess.run([*run, ROOT / "evaluate.py", *argv, "--out", tmp_path / out], capture_output=True,
                              text=True, env=env)
        assert done.returncode == 0, done.stderr
        assert f"{40 if out == 'one' else 20}/" in done.stderr.rpartition("judge: 100%")[2]  # rank 0's share
    one, both = judged(tmp_path / "one"), judged(tmp_path / "two")
    assert without_time(one) == without_time(both)
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(tmp_path / "two"))

    out = tmp_path / "two"  # as if both had been killed: each left its share
    (out / "judgements.jsonl").unlink()
    settings = (out / "settings.json").read_text()
    for rank in range(2):
        lines = [json.dumps(r | {"seconds": 1234.0}) for r in one[rank::2][:12]]
        (out / f"judgements.jsonl.partial.{rank}").write_text("\n".join([settings, *lines]) + "\n")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", *argv, "--out", out], capture_output=True, text=True,
                          env=env)
    assert done.returncode == 0, done.stderr
    assert without_time(judged(out)) == without_time(one)
    assert [r["seconds"] == 1234.0 for r in judged(out)] == [i < 24 for i in range(40)]
    assert sorted(os.listdir(tmp_path / "one")) == sorted(os.listdir(out))


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """The three benchmarks in their own files and forms, but about sorting: a few records of each."""
    path = tmp_path_factory.mktemp("benchmarks")
    texts = [(row["prompt"][0]["content"], row["answer_a"], row["answer_b"]) for row in toy.make("heldout", 21, 0)]
    (path / "filtered.jsonl").write_text("".join(json.dumps(
        {"prompt": q, "chosen": x, "rejected": y, "subset": subset, "id": i // 3, "chosen_model": "m"}) + "\n"
        for i, ((q, x, y), subset) in enumerate(zip(texts, ["alpacaeval-easy", "math-prm", "hep-go"] * 7))))
    (path / "total_dataset.json").write_text(json.dumps([
        {"id": f"{domain}/{i}", "domain": domain, "prompt": q, "chosen": [x, f"{x} {x}", x],
         "rejected": [y, y, f"{y} {y}"]}
        for domain in ("chat", "code", "math", "safety-refuse", "safety-response")
        for i, (q, x, y) in enumerate(texts[:2])]))
    turn = [{"role": role, "content": "12", "language": "en"} for role in ("user", "assistant", "user")]
    for section in ("Helpfulness/Code/Debugging", "Harmlessness/S1"):
        for kind in ("Pairwise_set", "BoN_set"):
            file, path_of = path / "RMB" / kind / f"{section}.json", f"{kind}/{section}"
            file.parent.mkdir(parents=True, exist_ok=True)
            answers = [{"llm_name": "m", "answer": x} for x in ("12", "21", "11 22")]
            file.write_text(json.dumps([{"conversation_input": turn[2 * (i % 2):], "category_path": path_of} | (
                {"pair_uid": f"{section[:3]}{i}", "chosen": answers[0], "reject": answers[1]} if kind[0] == "P" else
                {"bon_uid": f"{section[:3]}b{i}", "bon_best": answers[0], "loser_list": answers[1:]})
                for i in range(3)]))
    return path


@pytest.mark.parametrize("order", ["balanced", "published"])
def test_three_benchmarks_at_once(folder, benchmarks, tmp_path, order, capsys):
    """Every pair is judged, in the recorded order; the headline numbers counted again from the verdicts."""
    cfg = config(folder, None, tmp_path, rewardbench=str(benchmarks / "filtered.jsonl"), order=order,
                 rmbench=str(benchmarks / "total_dataset.json"), rmb=str(benchmarks / "RMB"), prompt="direct")
    main(cfg)
    records, rows = judged(tmp_path), saved_scores(tmp_path)["rows"]
    count = Counter(r["source"] for r in records)
    assert count == {"reward-bench": 21, "rm-bench": 90, "rmb": 6 + 12}
    pairs = {pair.id: pair for pair in read_pairs(tmp_path / "pairs.jsonl")}
    assert [r["id"] for r in records] == list(pairs) and all(r["winner"] == pairs[r["id"]].winner for r in records)
    flags = [pair.winner for pair in read_pairs(tmp_path / "pairs.jsonl")]
    assert ([pair.winner for pair in read_all(replace(cfg, seed=5))] != flags) == (order == "balanced")
    with pytest.raises(ValueError, match=f"was begun with order='{order}', not"):
        main(replace(cfg, order="published" if order == "balanced" else "balanced"))
    chosen_is_b = Counter(r["source"] for r in records if r["winner"] == "b")
    if order == "balanced":
        assert chosen_is_b == {"reward-bench": 10, "rm-bench": 45, "rmb": 9}
    else:
        flags = np.random.RandomState(0).rand(21) > 0.5
        assert [r["winner"] == "b" for r in records if r["source"] == "reward-bench"] == flags.tolist()
    score_of = {(r["benchmark"], r["kind"], r["name"]): r["score"] for r in rows}
    right = {r["id"]: r["verdict"] == r["winner"] for r in records}
    assert 0 < sum(right.values()) < len(right), "the case has lost its variety"

    def share(names):
        return sum(right[name] for name in names) / len(names)
    easy, math, code = (share([r["id"] for r in records if r["subset"] == s])
                        for s in ("alpacaeval-easy", "math-prm", "hep-go"))
    assert score_of["RewardBench", "section", "Reasoning"] == pytest.approx((984 * math + 164 * code) / (984 + 164))
    assert score_of["RewardBench", "overall", "mean of sections"] == pytest.approx(
        (easy + score_of["RewardBench", "section", "Reasoning"]) / 2)
    domains = [share([name for name in right if name.startswith(d)]) for d in ("chat/", "math/", "code/", "safety-")]
    assert score_of["RM-Bench", "overall", "total"] == pytest.approx(sum(domains) / 4)
    best = [all(right[f"{section}b{i}/{k}"] for k in range(2)) for section in ("Hel", "Har") for i in range(3)]
    assert score_of["RMB", "section", "BoN Helpfulness"] == sum(best[:3]) / 3
    overall = [score_of[b, "overall", n] for b, n in (("RewardBench", "mean of sections"), ("RM-Bench", "total"),
                                                      ("RMB", "mean of sections"))]
    assert score_of["average", "overall", "three benchmarks"] == pytest.approx(sum(overall) / 3)
    shown = capsys.readouterr().out
    for said in ("RewardBench is not whole: 21 of 2985 items", "RM-Bench is not whole: 10 of 1327 items"):
        assert said in shown
    for row in rows:
        assert f"\n{row['name']} " in shown and f"{100 * row['score']:.2f}" in shown


def test_a_bad_record_stops_before_any_work_or_is_left_out(folder, benchmarks, tmp_path, capsys):
    lines = (benchmarks / "filtered.jsonl").read_text().splitlines()
    bad = tmp_path / "filtered.jsonl"
    bad.write_text("\n".join([*lines[:3], '{"prompt": 3}', *lines[3:6], lines[0]]) + "\n")
    cfg = config(folder, None, tmp_path / "out", rewardbench=str(bad), prompt="direct")
    with pytest.raises(ValueError, match="filtered.jsonl:4: "):
        main(cfg)
    assert not (tmp_path / "out").exists()
    main(replace(cfg, skip_bad=True))
    assert len(judged(tmp_path / "out")) == 6 and "skipped 2 bad records of 8" in capsys.readouterr().err


def test_held_out_equals_the_script(folder, data, tmp_path, capsys):
    """Greedy judgements of the labelled pairs, whole and limited; two ranks share them out and get the same numbers."""
    judge = load_judge(JudgeConfig(model=str(folder), threads=1))
    sampler, tokenizer, one = judge.sampler, judge.tokenizer, Ranks(0, 1, torch.device("cpu"))
    main(config(folder, data, tmp_path))
    rows = {r["name"]: r | {"seconds": 0} for r in saved_scores(tmp_path)["rows"]}
    expected = {f"eval_{short}": rows["all"][name]
                for short, name in (("accuracy", "score"), ("no_verdict", "no_verdict"), ("tokens", "tokens"))}
    expected |= {f"eval_accuracy_{domain}": rows[domain]["score"] for domain in ("chat", "reasoning")}
    assert 0 < expected["eval_accuracy"] < 1 and 0 < expected["eval_no_verdict"] < 1, "the case has lost its variety"
    scores, records = HeldOut(data, 100, load_prompt("toy"), 2, tokenizer, one).judge(sampler)
    assert scores.pop("eval_s") > 0 and scores == expected
    assert score([r for r in records if r["winner"]])[0] | {"seconds": 0} == rows["all"]

    class OfTwo(Ranks):
        """Rank 0 leaves its records on the shelf, rank 1 finds them there."""
        def gather(self, x):
            shelf.append(x)
            return [*shelf]
    for n_pairs in (5, 1):  # with one pair, rank 1 has nothing to judge
        shelf = []
        for rank in range(2):
            ranks = OfTwo(rank, 2, torch.device("cpu"))
            shared, _ = HeldOut(data, n_pairs, load_prompt("toy"), 2, tokenizer, ranks).judge(sampler)
        alone = HeldOut(data, n_pairs, load_prompt("toy"), 2, tokenizer, one)
        assert [pair.id for pair in alone.pairs] == [pair.id for pair in read_pairs(data) if pair.winner][:n_pairs]
        assert sorted(r["id"] for part in shelf for r in part) == sorted(pair.id for pair in alone.pairs)
        scores, _ = alone.judge(sampler)
        assert shared.pop("eval_s") > 0 and shared == pytest.approx({k: v for k, v in scores.items() if k != "eval_s"})


def test_without_options_the_embedded_default_is_evaluated(monkeypatch, tmp_path):
    """And a model or pairs of one's own are not mixed with its pairs or model."""
    seen = []
    monkeypatch.setattr(evaluate, "evaluate_models", lambda cfg, ranks: seen.append(cfg) or [])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^runs/toy/grpo/model: is not there; python grpo.py makes it, or give --model"):
        main(Config())
    Path("runs/toy/grpo/model").mkdir(parents=True)
    main(Config(out=str(tmp_path)))
    assert seen == [Config(model=("runs/toy/grpo/model",), data="runs/toy/data/heldout.jsonl", out=str(tmp_path))]
    for options in ({"model": ("x",)}, {"data": "x"}, {"rmb": "x"}):
        with pytest.raises(ValueError, match="--model and what it is to judge .* need each other"):
            Config(**options)


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    unlabelled = tmp_path / "pairs.jsonl"
    write_pairs(unlabelled, [Pair("1", [{"role": "user", "content": "sort 21"}], "12", "21", None, "", "")])
    with pytest.raises(ValueError, match="no pair has a winner"):
        main(config(folder, unlabelled, tmp_path / "out"))
    with pytest.raises(ValueError, match="no labelled pairs"):
        HeldOut(unlabelled, 5, load_prompt("toy"), 2, None, Ranks(0, 1, torch.device("cpu")))
    for argv in (["--votes", "2"], ["--limit", "-1"], ["--pairs", "x"], ["--order", "mine"], ["--budgets", "512,x"],
                 ["--budgets", "16384"], ["--from", "x", "--swap"], ["--from", "x", "--limit", "5"],
                 ["--order", "published", "--data", "x"], ["--order", "published", "--rmb", "x", "--skip-bad"]):
        with pytest.raises(SystemExit) as e:
            parse_config(Config, argv=argv)
        error = capsys.readouterr().err
        assert e.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file, where --out needs a folder"):
        main(config(folder, unlabelled, tmp_path / "file"))
    bad_id = tmp_path / "bad_id.jsonl"
    write_pairs(bad_id, [Pair("1/swapped", [{"role": "user", "content": "sort 21"}], "12", "21", "a", "", "")])
    with pytest.raises(ValueError, match="pair 1/swapped: ids that end in /swapped"):
        main(config(folder, bad_id, tmp_path / "out"))
    argv = [sys.executable, ROOT / "evaluate.py", "--model", folder, "--data", tmp_path / "none.jsonl",
            "--out", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "none.jsonl: no such file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_rubric_for_every_pair(folder, data, tmp_path, capsys):
    """--rubric gives what a file gives whose pairs have it; without a section for it, nothing is begun."""
    (tmp_path / "r.txt").write_text("silver\n")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text((folder / "prompt.txt").read_text() + "\n[rubric]\nsay {rubric}\n")
    write_pairs(tmp_path / "told.jsonl", [replace(pair, rubric="silver") for pair in read_pairs(data)])
    given = config(folder, data, tmp_path / "given", prompt=str(prompt), rubric=str(tmp_path / "r.txt"))
    main(given)
    main(config(folder, tmp_path / "told.jsonl", tmp_path / "told", prompt=str(prompt)))
    assert without_time(judged(tmp_path / "given")) == without_time(judged(tmp_path / "told"))
    assert (tmp_path / "given/pairs.jsonl").read_bytes() == (tmp_path / "told.jsonl").read_bytes()
    assert saved_scores(tmp_path / "given")["settings"]["rubric"] == "silver"
    with pytest.raises(ValueError, match=r"prompt.txt has no section \[rubric\], which --rubric needs"):
        main(replace(given, prompt=None, out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()
