"""benchmarks/judge_bench.py. Oracles: SCORING2.md's rules by hand on made-up records; on the real sample (RM_SHARED,
default ../shared) what JudgeBench's own scripts counted, and the decisions that they recorded."""

import json
from collections import Counter

import numpy as np
import pytest
from test_benchmarks import BENCHMARKS, record, save, scores

from benchmarks.judge_bench import read_judge_bench
from benchmarks.records import read_benchmark, read_recorded
from benchmarks.rows import is_swapped
from data.pairs import read_pairs
from evaluate import Config, main

FOLDER = BENCHMARKS / "judgebench"
GPT, CLAUDE = "gpt-4o-2024-05-13", "claude-3-5-sonnet-20240620"
RECORDED = {"gpt.arena_hard.o1-mini-2024-09-12": 120, "gpt.reward_model.Skywork_Skywork-Reward-Gemma-2-27B": 120,
            "gpt.reward_model.internlm_internlm2-20b-reward": 120, "claude.arena_hard.claude-3-haiku-20240307": 80}
needs_judge_bench = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no records at {FOLDER}: set RM_SHARED")


def row(i, label="A>B", source="mmlu-pro-law", model=GPT, **more):
    return {"pair_id": f"p{i}", "original_id": None, "source": source, "question": f"q{i}", "response_model": model,
            "response_A": f"first {i}", "response_B": f"second {i}", "label": label, **more}


def rows(n=10):
    """n pairs of each file; seven of ten of gpt's are labelled A>B, three of ten of claude's."""
    kinds = ("mmlu-pro-law", "livebench-reasoning", "livebench-math", "livecodebench", "mmlu-pro-computer science")
    return ([row(i, "A>B" if i % 10 < 7 else "B>A", kinds[i % 5]) for i in range(n)] +
            [row(n + i, "A>B" if i % 10 < 3 else "B>A", kinds[i % 5], CLAUDE) for i in range(n)])


# ---- pairs

def test_pairs_in_the_files_order_and_in_a_balanced_one(tmp_path):
    """Each file by itself: half of its pairs have the better answer as B, by the draw that the seed gives."""
    given = rows()
    path = save(tmp_path / "both.jsonl", given)
    published = read_judge_bench(path, "published", seed=3)
    assert [(p.id, p.prompt, p.answer_a, p.answer_b, p.winner, p.subset, p.item) for p in published] == [
        (r["pair_id"], [{"role": "user", "content": r["question"]}], r["response_A"], r["response_B"],
         {"A>B": "a", "B>A": "b"}[r["label"]], r["source"], "") for r in given]
    assert [p.domain for p in published[:5]] == ["Knowledge", "Reasoning", "Math", "Coding", "Knowledge"]
    assert Counter(p.source for p in published) == {"judgebench-gpt": 10, "judgebench-claude": 10}
    balanced = read_judge_bench(path, seed=3)
    drawn = set(np.random.default_rng(3).permutation(10)[:5].tolist())
    assert [p.winner for p in balanced] == ["b" if i % 10 in drawn else "a" for i in range(20)]
    for one, other in zip(balanced, published):
        as_it_was = (one.answer_a, one.answer_b) == (other.answer_a, other.answer_b)
        assert as_it_was == (one.winner == other.winner) and {one.answer_a, one.answer_b} == {other.answer_a,
                                                                                             other.answer_b}
    assert Counter(p.source for p in read_pairs(path)) == {"judgebench-gpt": 10, "judgebench-claude": 10}  # as --data


@needs_judge_bench
def test_the_real_files_make_their_pairs():
    pairs = read_judge_bench(FOLDER / "gpt.sample60.jsonl", "published")
    pairs += read_judge_bench(FOLDER / "claude.sample40.jsonl", "published")
    lines = [json.loads(line) for name in ("gpt.sample60", "claude.sample40")
             for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(p.id, p.prompt[0]["content"], p.answer_a, p.answer_b, p.winner == "a", p.subset) for p in pairs] == [
        (r["pair_id"], r["question"], r["response_A"], r["response_B"], r["label"] == "A>B", r["source"])
        for r in lines]
    assert Counter(p.domain for p in pairs[:60]) == {"Knowledge": 28, "Reasoning": 12, "Math": 10, "Coding": 10}
    same, = (p for p in pairs if p.answer_a == p.answer_b)  # it stays
    assert same.id == "a28a8dae-78a7-51a7-a46f-84a6e502068d"
    balanced = read_judge_bench(FOLDER / "gpt.sample60.jsonl")
    assert sum(p.winner == "b" for p in balanced) == 30


# ---- the score

VOTES = [("aa", 1, 1), ("ax", 1, 0), ("ab", 0, 0), ("xx", 0, 0), ("xb", 0, 0), ("bb", 0, 0), ("xa", 1, 0), ("ba", 0, 0)]


def games(i, verdicts, winner="a", source="judgebench-gpt", domain="Math", subset="livebench-math"):
    """The records of a pair's one or two games; verdicts: a right, b wrong, x none, whatever the better answer's place
    is."""
    other = {"a": "b", "b": "a"}
    shown = {True: {"a": winner, "b": other[winner], "x": "x"}, False: {"a": other[winner], "b": winner, "x": "x"}}
    first = record(f"p{i}", winner, shown[True][verdicts[0]], source, domain, subset)
    if len(verdicts) == 1:
        return [first]
    second = record(f"p{i}/swapped", other[winner], shown[False][verdicts[1]], source, domain, subset, swapped=True)
    return [first, second]


@pytest.mark.parametrize("winner", ["a", "b"])
@pytest.mark.parametrize("verdicts, official, both", VOTES)
def test_the_table_of_votes(verdicts, official, both, winner):
    """1.2: a missing verdict beside a right one is right officially, and wrong by `right in both orders`."""
    found = {(r["kind"], r["name"]): r["right"] for r in scores.score(games(0, verdicts, winner))}
    assert found["overall", "both orders, official"] == found["section", "Math"] == official
    assert found["subset", "livebench-math"] == official
    assert found["right in both orders", "all pairs"] == both
    assert found["one pass (ours)", "all pairs"] == found["one pass (ours)", "Math"] == (verdicts[0] == "a")


def test_overall_counts_pairs_and_the_files_are_apart():
    """Micro: 3 of 4 in Math and 0 of 1 in Coding are 3 of 5. An empty category is left out."""
    members = [g for i, v in enumerate(["aa", "ax", "aa", "bb"]) for g in games(i, v)]
    members += games(4, "ab", domain="Coding", subset="livecodebench")
    members += games(5, "aa", source="judgebench-claude", domain="Knowledge", subset="mmlu-pro-law")
    found = scores.score(members)
    shown = [(r["benchmark"], r["kind"], r["name"], r["n"], r["of"], r["right"]) for r in found]
    assert shown[:5] == [("JudgeBench (gpt)", "overall", "both orders, official", 5, 350, 3),
                         ("JudgeBench (gpt)", "section", "Math", 4, 56, 3),
                         ("JudgeBench (gpt)", "section", "Coding", 1, 42, 0),
                         ("JudgeBench (gpt)", "subset", "livebench-math", 4, 56, 3),
                         ("JudgeBench (gpt)", "subset", "livecodebench", 1, 42, 0)]
    assert ("JudgeBench (claude)", "overall", "both orders, official", 1, 270, 1) in shown
    assert ("JudgeBench (claude)", "subset", "mmlu-pro-law", 1, 11, 1) in shown
    assert found[0]["score"] == .6 and not any(r["benchmark"] == "average" for r in found)
    swap = {r["benchmark"]: r for r in scores.swap_rows(members)}
    assert swap["JudgeBench (gpt)"]["both"] == 2 / 5 and swap["JudgeBench (claude)"]["both"] == 1


@pytest.mark.parametrize("order, name", [("published", "one order, official"), ("balanced", "one pass (ours)"),
                                         (None, "one pass (ours)")])
def test_one_order_by_itself_is_official_in_the_files_order_only(order, name):
    members = [g for i, v in enumerate("aabx") for g in games(i, v)]
    head, math, subset = scores.score(members, order)
    assert (head["kind"], head["name"], head["right"], head["n"]) == ("overall", name, 2, 4)
    assert (math["kind"], math["right"], subset["kind"]) == ("section", 2, "subset") and head["no_verdict"] == 1 / 4


# ---- recorded outputs

def output(i, decisions, texts=None, judge="arena_hard", **more):
    texts = texts or [f"so [[{d}]]" if d else "" for d in decisions]
    played = [None if t is None else {"judgment": {"judge_model": "m", "prompt": "p", "response": t}, "decision": d}
              for t, d in zip(texts, decisions)]
    return {"judge_name": judge, "judgments": played, **row(i, **more)}


def test_recorded_games_by_hand(tmp_path):
    """1.3: label A>B. The decisions are in the terms of what was shown, so B>A is right in the second game."""
    lines = [output(0, ["A>B", "B>A"]), output(1, ["A=B", "B>A"]), output(2, ["A>B", "A>B"]), output(3, [None, None]),
             output(4, ["A>B", None], ["[[A>>B]] I say [[A>>B]]", "[[A>>B]] or [[A>B]]"]),
             output(5, ["A>B", None], ["[[A>B]] [[x]]", None]),
             output(6, ["B>A", "B>A"], judge="reward_model") | {"judgments": [
                 {"judgment": {"judge_model": "m", "scores": [1.5, 1.5]}, "decision": "B>A"}] * 2},
             output(7, ["A>B"], ["says so"], judge="other"), output(8, ["B>A", "A>B"], label="B>A")]
    pairs, records = read_recorded(save(tmp_path / "outputs.jsonl", lines))
    assert [p.id for p in pairs] == [f"p{i}" for i in range(9)] and pairs[8].winner == "b"
    assert (pairs[8].answer_a, pairs[8].answer_b) == ("first 8", "second 8")
    verdicts = {r["id"]: (r["verdict"], r["winner"], r["recorded"]) for r in records}
    assert verdicts == {
        "p0": ("a", "a", 1), "p0/swapped": ("b", "b", 1), "p1": (None, "a", 0), "p1/swapped": ("b", "b", 1),
        "p2": ("a", "a", 1), "p2/swapped": ("a", "b", 0), "p3": (None, "a", 0), "p3/swapped": (None, "b", 0),
        "p4": ("a", "a", 1), "p4/swapped": (None, "b", 0), "p5": ("a", "a", 1), "p5/swapped": (None, "b", 0),
        "p6": ("b", "a", 0), "p6/swapped": ("b", "b", 1), "p7": ("a", "a", 1),
        "p8": ("b", "b", 1), "p8/swapped": ("a", "a", 1)}
    found = {(r["kind"], r["name"]): (r["right"], r["n"]) for r in scores.score(records)}
    assert found["overall", "both orders, official"] == (5, 8)      # 0, 1, 4, 5, 8
    assert found["right in both orders", "all pairs"] == (2, 8)     # 0, 8
    assert found["one order, official", "all pairs"] == (6, 9)      # 0, 2, 4, 5, 7, 8
    assert scores.swap_rows(records)[0]["n"] == 8
    assert {name: n for name, n in scores.n_incomplete(records).items() if n} == {"JudgeBench (gpt)": 1}   # 7
    assert not any(scores.n_incomplete([r for r in records if r["id"] != "p7"]).values())
    assert not any(scores.n_incomplete([r for r in records if not is_swapped(r)]).values())


@needs_judge_bench
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_scores_to_the_last_digit(tmp_path, name, capsys):
    """Every score of the pack, both orders and one; the pairs that are right; every decision, from the texts; the same
    once more from what evaluate.py --from has written."""
    expected = json.loads((FOLDER / "expected.json").read_text())["files"][f"judgements/{name}.jsonl"]
    out = tmp_path / "out"
    main(Config(from_=(str(FOLDER / f"judgements/{name}.jsonl"),), out=str(out)))
    main(Config(from_=(str(out),), out=str(tmp_path / "again")))
    saved = [json.loads((folder / "scores.json").read_text()) for folder in (out, tmp_path / "again")]
    assert saved[0]["rows"] == saved[1]["rows"] and saved[0]["swap"] == saved[1]["swap"]
    assert all(s["recorded"] == {"n": RECORDED[name], "same": RECORDED[name], "differ": []} for s in saved)
    _, records = read_recorded(FOLDER / f"judgements/{name}.jsonl")
    check(saved[0]["rows"], expected["both_orders"], "both orders, official")
    one_order = scores.score([r for r in records if "swapped" not in r])
    check(one_order, expected["single_order"], "one order, official")
    alone = {r["name"]: r["right"] for r in saved[0]["rows"] if r["kind"] == "one order, official"}
    assert alone.pop("all pairs") == expected["single_order"]["Overall"]["right"]
    assert alone == {category: expected["single_order"][category]["right"] for category in alone} and len(alone) == 4
    by_pair = {r["id"]: [r] for r in records if "swapped" not in r}
    for r in records:
        if "swapped" in r:
            by_pair[r["id"].removesuffix("/swapped")].append(r)
    right = [id for id, played in by_pair.items() if scores.score(played)[0]["right"]]
    assert right == expected["right_in_both_orders_protocol"]
    recorded = {"A>B": "a", "B>A": "b", "A=B": None, None: None}
    lines = [json.loads(line) for line in (FOLDER / f"judgements/{name}.jsonl").read_text().split("\n")[:-1]]
    assert [r["verdict"] for r in records] == [recorded[game["decision"]] for r in lines for game in r["judgments"]]
    assert f"{RECORDED[name]} of {RECORDED[name]} recorded outcomes came out again" in capsys.readouterr().out


def check(found, expected, headline):
    """Every cell of expected.json is a row, and there are no others."""
    names = {"Overall": ("overall", headline)}
    cells = {names[name] if name in names else ("subset", name.removeprefix("source ")) if name.startswith("source ")
             else ("section", name): (cell["n"], cell["right"], cell["score"]) for name, cell in expected.items()}
    found = [r for r in found if r["kind"] in ("overall", "section", "subset")]
    assert {(r["kind"], r["name"]): (r["n"], r["right"], 100 * r["right"] / r["n"]) for r in found} == cells
    assert all(r["score"] == r["right"] / r["n"] for r in found)


# ---- mistakes

@pytest.mark.parametrize("change, message", [
    ({"label": "A"}, '"label" is "A"'), ({"response_model": "llama"}, 'answers by "llama"'),
    ({"source": "mmlu"}, '"source" is "mmlu"'), ({"response_B": None}, '"response_B" is null'),
    ({"pair_id": "p0"}, 'id "p0" is also at'), ({"judgments": []}, "give it as --from")])
def test_bad_records(tmp_path, change, message):
    path = save(tmp_path / "x.jsonl", [row(0), row(1) | change])
    with pytest.raises(ValueError) as e:
        read_judge_bench(path)
    line, = str(e.value).split("\n")
    assert line.startswith(f"{path}:2: ") and message in line
    assert len(read_judge_bench(path, skip_bad=True)) == 1
    other = save(tmp_path / "y.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}])
    with pytest.raises(ValueError, match="y.jsonl:1: not a record of JudgeBench"):
        read_judge_bench(other)
    with pytest.raises(ValueError, match="not a record of RewardBench"):
        read_benchmark(save(tmp_path / "z.jsonl", [row(0)]), "reward-bench")


TRIMMED = {key: value for key, value in output(0, ["A>B"]).items()
           if key in ("pair_id", "source", "label", "judge_name", "judgments")}


@pytest.mark.parametrize("line, message", [
    (TRIMMED, 'no "response_model", and the file\'s name'), (output(0, []), '"judgments" holds 0 games'),
    (output(0, ["A>B"]) | {"judgments": [3]}, '"judgments" holds an integer'),
    (output(0, ["A>B"]) | {"judgments": [{"judgment": None, "decision": "A>B"}]}, '"judgment" is null'),
    (output(0, ["A>B"]) | {"judgments": [{"judgment": {"response": ""}}]}, 'no "decision"'),
    (output(0, ["A>B"], judge="reward_model") | {"judgments": [
        {"judgment": {"scores": [1.0]}, "decision": "A>B"}]}, "a reward model has two scores"),
    (record("p", "a", "a", "judgebench-gpt", "Maths", "livebench-math"), "domain 'Maths'")])
def test_bad_outputs(tmp_path, line, message):
    path = save(tmp_path / "outputs.jsonl", [line])
    with pytest.raises(ValueError) as e:
        read_recorded(path)
    said, = str(e.value).split("\n")
    assert said.startswith(f"{path}:1: ") and message in said
    assert read_recorded(save(tmp_path / "gpt.jsonl", [TRIMMED]))[1][0]["source"] == "judgebench-gpt"
    named = save(tmp_path / f"dataset=judgebench,response_model={CLAUDE},judge_name=x.jsonl", [TRIMMED])
    assert read_recorded(named)[1][0]["source"] == "judgebench-claude"
