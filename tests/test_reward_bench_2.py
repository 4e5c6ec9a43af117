"""benchmarks/reward_bench_2.py. Oracles: the figures of SCORING2.md by hand; the vectors (RM_SHARED, default ../shared)
of what the official functions return; scores counted again as plain loops; a judge that only knows a few verdicts."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import test_evaluate
from test_benchmarks import BENCHMARKS, record, save, scores
from test_evaluate import config, judged, saved_scores

from benchmarks import reward_bench_2
from benchmarks.records import read_recorded
from benchmarks.reward_bench_2 import (best_share, four_way_official, four_way_result, four_way_verdict, rating,
                                       read_four_way, read_pairwise, read_to_rate, ties_score)
from data.pairs import read_pairs
from evaluate import Config, main
from prompt import load_prompt, prompt_file, render_answers

FOLDER = BENCHMARKS / "reward_bench_2"
needs_vectors = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no vectors at {FOLDER}: set RM_SHARED")
folder = test_evaluate.folder   # a fixture: a model that writes verdicts at random
FIVE = ("Factuality", "Precise IF", "Math", "Safety", "Focus")


def row(subset, name, n_right=1, n_wrong=3):
    return {"id": name, "prompt": f"{subset} {name}?", "subset": subset, "num_correct": n_right,
            "chosen": [f"{subset} {name} right {i}" for i in range(n_right)],
            "rejected": [f"{subset} {name} wrong {k}" for k in range(n_wrong)]}


def rows(n=4):
    """n items of each of the five, with the same ids in all; three numbers of Ties."""
    ties = [row("Ties", f"{kind}:{i}", n_right, 2 + i) for i in range(3) for kind, n_right in (("ref", 1), ("tied", 3))]
    return [row(subset, str(i)) for subset in FIVE for i in range(n)] + ties


# ---- the official functions

@needs_vectors
def test_vectors():
    """Every value of every case, to the last digit."""
    cases = json.loads((FOLDER / "vectors.json").read_text())["cases"]
    assert Counter(case["kind"] for case in cases) == {"ties": 5, "ties_from_ratings": 1, "four_way": 2, "ratings": 3,
                                                       "scores": 1}
    for case in cases:
        if case["kind"].startswith("ties"):
            check_ties(case)
            continue
        results = []
        for item in case["items"]:
            expected = item["expected"]
            if case["kind"] == "four_way":
                letter = four_way_official(item["judgement"])
                assert ("error" if letter is None else letter.upper()) == expected["verdict"]
                results.append(four_way_result(item["judgement"], item["chosen_at"].lower()))
            elif case["kind"] == "ratings":
                ratings = [rating(text) for text in item["judgements"]]
                assert [-1 if x is None else x for x in ratings] == expected["ratings"]
                results.append(best_share(ratings))
            else:
                results.append(best_share(item["scores"]))
            assert results[-1] == expected["result"]
        assert float(np.mean(results)) == case["expected_subset_score"]


def check_ties(case):
    given, expected = {}, case["expected"]
    for i, r in enumerate(case["rows"]):
        if "judgements" in r:
            found = [-1 if rating(text) is None else rating(text) for text in r["judgements"]]
            assert found == expected["scores"][i]
        else:
            found = [x[0] if isinstance(x, list) else x for x in r["scores"]]
        given[r["id"]] = found[:r["num_correct"]], found[r["num_correct"]:]
    result = ties_score(given)
    assert (result.score, result.tied_accuracy, result.ref_accuracy, result.preferred, result.preferred_hard,
            result.margin) == tuple(expected[key] for key in (
                "score", "tied_accuracy", "ref_accuracy", "correctness_preferred", "correctness_preferred_hard",
                "correctness_margin_score"))


def test_the_worked_example_of_ties():
    """2.4: AT = AR = 2/3, P = H = 1/3, T = -0.35079, Ties = 0.52983."""
    given = {"ref:0": ([7], [3, 1]), "tied:0": ([6, 5, 4.5], [2, 1]), "ref:1": ([2], [1.5, 0]),
             "tied:1": ([5, 3], [1, .5]), "ref:2": ([1], [1, 0]), "tied:2": ([4, 4], [5, 1])}
    result = ties_score(given)
    margin = (math.tanh(2.5 / 1.5 - 1) + math.tanh(.5 / 2 - 1) - 1) / 3
    assert (result.ref_accuracy, result.tied_accuracy) == (2 / 3, 2 / 3)
    assert (result.preferred, result.preferred_hard, round(result.margin, 5)) == (1 / 3, 1 / 3, round(margin, 5))
    assert round(result.score, 5) == .52983
    low, high = reward_bench_2.ties_interval(given)
    assert low < result.score < high and (low, high) == reward_bench_2.ties_interval(given)
    sure = {name: scores for i in range(9) for name, scores in ((f"ref:{i}", ([9], [1])), (f"tied:{i}", ([8, 8], [2])))}
    assert ties_score(sure).score == pytest.approx(1.01) == reward_bench_2.ties_interval(sure)[0]


@pytest.mark.parametrize("text, read", [
    ("8/10", 10), ("7.5", 5), ("-2", 2), ("9.", None), ("**9**", None), ("8.0", None), ("11", None), ("06", None),
    ("0", None), ("a 10 \n", 10), ("x7", None), ("_7", None), ("", None)])
def test_ratings_by_hand(text, read):
    assert rating(text) == read


@pytest.mark.parametrize("text, ours, official", [
    ("[[A]]", "a", "a"), ("[[D]]", "d", "d"), ("not [[D]] but [[C]]", None, "c"), ("[[B]] [[B]]", "b", "b"),
    ("[[E]]", None, None), ("[[a]]", None, None), ("", None, None)])
def test_four_way_verdicts_by_hand(text, ours, official):
    assert (four_way_verdict(text), four_way_official(text)) == (ours, official)
    assert four_way_result(text, "b") == (.25 if official is None else float(official == "b"))


# ---- rows to what is judged

def test_pairs_are_the_right_answer_with_each_wrong_one(tmp_path):
    """2.6: ids repeat across subsets; each pair has its own order, and Ties' pairs do not disturb the others'."""
    path = save(tmp_path / "rows.jsonl", rows())
    pairs = read_pairwise(path, seed=5)
    wanted = [(f"{r['subset']}/{r['id']}/{k}", r["chosen"][0], wrong, f"{r['subset']}/{r['id']}", r["subset"])
              for r in rows() if r["subset"] != "Ties" for k, wrong in enumerate(r["rejected"])]
    drawn = set(np.random.default_rng(5).permutation(60)[:30].tolist())
    assert [p.winner for p in pairs] == ["b" if i in drawn else "a" for i in range(60)]
    shown = [(p.answer_a, p.answer_b) if p.winner == "a" else (p.answer_b, p.answer_a) for p in pairs]
    assert [(p.id, *answers, p.item, p.subset) for p, answers in zip(pairs, shown)] == wanted
    assert all(p.domain == p.subset and p.source == "reward-bench-2" for p in pairs)
    more = read_pairwise(path, seed=5, ties=True)
    assert more[:60] == pairs and len(more) == 60 + 4 * (2 + 3 + 4) and more[60].id == "Ties/ref:0/0-0of2"
    assert sum(p.winner == "b" for p in more[60:]) == 18
    assert {(p.answer_a.split()[-2], p.answer_b.split()[-2]) for p in more} == {("right", "wrong"), ("wrong", "right")}
    assert {p.id for p in read_pairs(path)} == {p.id for p in more}     # as pairs of --data, or to keep out of a pool


def test_four_answers_change_places_with_a_drawn_letter(tmp_path):
    """Each letter as often; the answer displaced by the right one becomes A."""
    path = save(tmp_path / "rows.jsonl", rows())
    tasks, again, other = (read_four_way(path, seed) for seed in (0, 0, 1))
    assert tasks == again and [t.winner for t in tasks] != [t.winner for t in other]
    assert Counter(t.winner for t in tasks) == dict.fromkeys("abcd", 5)
    for task, r in zip(tasks, rows()):
        one, *wrong = r["chosen"] + r["rejected"]
        places = {"a": [one, *wrong], "b": [wrong[0], one, *wrong[1:]], "c": [wrong[1], wrong[0], one, wrong[2]],
                  "d": [wrong[2], wrong[0], wrong[1], one]}
        assert task.answers == places[task.winner] and task.id == f"{r['subset']}/{r['id']}"
    assert len(tasks) == 20


def test_every_answer_is_rated_alone(tmp_path):
    tasks = read_to_rate(save(tmp_path / "rows.jsonl", rows()))
    assert [t.id for t in tasks[:5]] == ["Factuality/0/c0of4", "Factuality/0/r0of4", "Factuality/0/r1of4",
                                         "Factuality/0/r2of4", "Factuality/1/c0of4"]
    assert tasks[-1].id == "Ties/tied:2/r3of7" and len(tasks) == 80 + 2 * 9 + 3 + 9
    assert all(len(t.answers) == 1 and t.winner is None for t in tasks)


# ---- scores

def judged_pairs(item, outcomes, subset="Math", swapped=False):
    """The records of an item's three pairs: a right, b wrong, x none; the right answers stand at A, A and B."""
    found = []
    for k, outcome in enumerate(outcomes):
        winner = "aab"[k] if not swapped else "bba"[k]
        verdict = {"a": winner, "b": {"a": "b", "b": "a"}[winner], "x": "x"}[outcome]
        name = f"{subset}/{item}/{k}" + ("/swapped" if swapped else "")
        found.append(record(name, winner, verdict, "reward-bench-2", subset, subset, f"{subset}/{item}",
                            **({"swapped": True} if swapped else {})))
    return found


def cells(found):
    return {(r["kind"], r["name"]): r["score"] for r in found}


def test_the_example_of_the_pairwise_protocol():
    """2.6: won (1,1,1), (1,1,0), (1,None,1), (0,0,0): 1/4 beat all three, win rate 7/12."""
    members = [r for i, won in enumerate(("aaa", "aab", "axa", "bbb")) for r in judged_pairs(i, won)]
    found = scores.score(members)
    assert cells(found) == {("overall", "beats all three, mean without Ties"): 1 / 4, ("section", "Math"): 1 / 4,
                            ("win rate", "mean without Ties"): 7 / 12, ("win rate", "Math"): 7 / 12}
    assert (found[0]["n"], found[0]["of"], found[1]["of"], found[1]["right"]) == (4, 1763, 183, 1)
    assert found[0]["benchmark"] == "RewardBench 2, pairwise (ours)" and found[0]["no_verdict"] == 1 / 12
    safe = judged_pairs(0, "aaa", "Safety")
    found = scores.score(members + safe)         # a mean of subsets, not of items
    assert cells(found)["overall", "beats all three, mean without Ties"] == (1 / 4 + 1) / 2


def test_items_that_lack_a_pair_are_left_out_and_counted():
    members = judged_pairs(0, "aaa") + judged_pairs(1, "bbb")[:2]
    assert cells(scores.score(members))["section", "Math"] == 1
    members += [rated("Math/7/c0of4", "1"), rated("Math/7/r0of4", "1")]
    assert left_out(members) == {"RewardBench 2, pairwise (ours)": 1, "RewardBench 2, ratings": 1}
    in_both = members + judged_pairs(0, "aaa", swapped=True)
    assert left_out(in_both) == left_out(members)
    lacking = members + judged_pairs(0, "aaa", swapped=True)[1:]    # left out of both orders, not of the first
    assert cells(scores.score(lacking))["section", "Math"] == 1
    assert not any(r["kind"] == "both orders" for r in scores.score(lacking))
    assert left_out(lacking)["RewardBench 2, pairwise (ours)"] == 2


def test_rows_of_ties_that_lack_an_answer_are_left_out_and_counted(tmp_path):
    """Number 0 lacks its worst wrong answer, and would win without it: the score is that of number 1 alone."""
    tasks = [t for t in read_to_rate(save(tmp_path / "rows.jsonl", rows())) if t.item[-1] in "01"]
    shown = {"Ties/ref:0": "9 9 1", "Ties/tied:0": "8 8 8 9 1", "Ties/ref:1": "9 3 1 1", "Ties/tied:1": "8 7 6 2 1 1"}
    text = {name: iter(given.split()) for name, given in shown.items()}
    members = [rated(t.id, next(text[t.item]), "Ties") for t in tasks if t.subset == "Ties"]
    whole, = [r for r in scores.score(members) if r["kind"] == "section"]
    assert whole["n"] == 4 and left_out(members) == {}
    trimmed = [r for r in members if r["id"] not in ("Ties/ref:0/r0of3", "Ties/tied:0/r0of5")]
    one, = [r for r in scores.score(trimmed) if r["kind"] == "section"]
    alone = ties_score({"ref:1": ([9], [3, 1, 1]), "tied:1": ([8, 7, 6], [2, 1, 1])}).score
    assert (one["n"], one["score"]) == (2, alone) and left_out(trimmed) == {"RewardBench 2, ratings": 2}
    pairs = [p for p in read_pairwise(tmp_path / "rows.jsonl", ties=True) if p.subset == "Ties"]
    members = [record(p.id, p.winner, p.winner if p.item != "Ties/tied:1" else "x", p.source, "Ties", "Ties", p.item)
               for p in pairs]
    kind = "Ties, every pair won (a diagnostic)"
    assert cells(scores.score(members)) == {(kind, "ref rows"): 1, (kind, "tied rows"): 2 / 3}
    trimmed = [r for r in members if r["id"] != "Ties/tied:0/2-1of6"]
    assert cells(scores.score(trimmed)) == {(kind, "ref rows"): 1, (kind, "tied rows"): 1 / 2}
    assert left_out(trimmed) == {"RewardBench 2, pairwise (ours)": 1}


def left_out(members):
    return {name: n for name, n in scores.n_incomplete(members).items() if n}


def test_both_orders_of_the_pairwise_protocol():
    """Item 0 wins all six, item 1 the first order's three, item 2 the second's."""
    members = []
    for i, (first, second) in enumerate((("aaa", "aaa"), ("aaa", "aba"), ("bab", "aaa"))):
        members += judged_pairs(i, first) + judged_pairs(i, second, swapped=True)
    found = cells(scores.score(members))
    assert found["overall", "beats all three, mean without Ties"] == 2 / 3
    assert {name.split(",")[0]: score for (kind, name), score in found.items() if kind == "both orders"} == {
        "first order": 2 / 3, "second order": 2 / 3, "all six won": 1 / 3}
    assert scores.swap_rows(members)[0]["both"] == (3 + 2 + 1) / 9


def test_ties_pairs_are_a_diagnostic_and_no_part_of_the_mean():
    members = judged_pairs(0, "aaa")
    for name, verdicts in (("ref:0", "aa"), ("tied:0", "aaab"), ("tied:1", "aaaa")):
        for i, verdict in enumerate(verdicts):
            members.append(record(f"Ties/{name}/{i // 2}-{i % 2}of{len(verdicts)}", "a", verdict, "reward-bench-2",
                                  "Ties", "Ties", f"Ties/{name}"))
    found = scores.score(members)
    assert cells(found) | {("overall", "beats all three, mean without Ties"): 1.0,
                           ("Ties, every pair won (a diagnostic)", "ref rows"): 1.0,
                           ("Ties, every pair won (a diagnostic)", "tied rows"): .5} == cells(found)
    assert not any(r["name"] == "Ties" for r in found) and left_out(members) == {}
    members += judged_pairs(0, "aab", swapped=True)
    members += [r | {"id": r["id"] + "/swapped", "swapped": True} for r in members if r["subset"] == "Ties"]
    place, = scores.position_rows(members)
    assert left_out(members) == left_out(members[:-1]) == {}    # the diagnostic is of the first order
    assert (place["n_a"], place["n_b"], place["a_share_first_order"]) == (2, 1, 2 / 3)
    assert [(r["n"], r["both"]) for r in scores.swap_rows(members)] == [(3, 2 / 3)]


def test_four_way_scores_are_ours_and_beside_them_the_official_rule():
    """Several letters and none earn nothing in ours; officially the alphabet decides, and none earns 1/4."""
    texts = ["[[C]]", "[[B]]", "[[D]] or [[C]]", "none", "[[C]] or [[A]]"]
    members = [record(f"Math/{i}", "c", "x", "reward-bench-2-four-way", "Math", "Math") for i in range(5)]
    for r, text in zip(members, texts):
        r["votes"][0] |= {"text": text, "verdict": four_way_verdict(text)}
        r["verdict"] = four_way_verdict(text)
    found = scores.score(members)
    assert cells(found) == {("overall", "right of four, mean without Ties (ours)"): 1 / 5, ("section", "Math"): 1 / 5,
                            ("official rule", "mean without Ties"): (1 + 0 + 1 + .25 + 0) / 5,
                            ("official rule", "Math"): 2.25 / 5}
    assert scores.position_rows(members) == [] and scores.swap_rows(members) == []


NUMBERS = ("c0of4", "r0of4", "r1of4", "r2of4")


def rated(name, text, subset="Math"):
    r = record(name, None, "x", "reward-bench-2-ratings", subset, subset, name.rpartition("/")[0])
    return r | {"votes": [r["votes"][0] | {"text": text, "verdict": None}]}


def test_ratings_count_as_the_official_functions_do():
    """Math: alone best, best with one other, none read. Ties: the worked example, its scores doubled and rounded."""
    texts = {"Math/0": "9 8 7 1", "Math/1": "8 8 7 1", "Math/2": "? ? ? ?"}
    members = [rated(f"{item}/{number}", text) for item, given in texts.items()
               for number, text in zip(NUMBERS, given.split())]
    random.Random(0).shuffle(members)
    found = scores.score(members)
    assert cells(found) == {("overall", "mean of 1 of six subsets"): (1 + .5 + .25) / 3,
                            ("section", "Math"): (1 + .5 + .25) / 3}
    assert found[0]["no_verdict"] == 4 / 12 and found[0]["of"] == 1865
    ties = {"ref:0": ([9], [3, 1]), "tied:0": ([8, 7, 6], [2, None]), "ref:1": ([None], [2, 1])}
    members += [rated(f"Ties/{name}/{kind}{i}of{sum(map(len, sides))}", "?" if x is None else f"so {x}", "Ties")
                for name, sides in ties.items() for kind, given in zip("cr", sides) for i, x in enumerate(given)]
    members += [rated(f"{s}/0/{number}", text, s) for s in FIVE if s != "Math"
                for number, text in zip(NUMBERS, "4321")]
    found = scores.score(members)
    wanted = ties_score({"ref:0": ([9], [3, 1]), "tied:0": ([8, 7, 6], [2, -1]), "ref:1": ([-1], [2, 1])}).score
    assert cells(found)["section", "Ties"] == wanted
    assert cells(found)["overall", "mean of all six, official rule"] == pytest.approx((4 + 1.75 / 3 + wanted) / 6)
    assert {r["name"]: r["no_verdict"] for r in found} == dict.fromkeys(FIVE, 0) | {
        "Math": 4 / 12, "Ties": 2 / 11, "mean of all six, official rule": 6 / 39}


# ---- prompts

FOUR = ("[user]\n{question} A {answer_a} B {answer_b}\n\n[four answers]\n{question}\nA {answer_a}\nB {answer_b}\n"
        "C {answer_c}\nD {answer_d}\n\n[rating]\n{question}\nrate {answer}\n")


def test_the_sections_of_a_prompt(tmp_path):
    """One pass, as for pairs; they are shown without [system]; their placeholders are literal in [user]."""
    (tmp_path / "p.txt").write_text("[system]\nYou judge pairs.\n\n" + FOUR.replace("B {answer_b}\n\n", "B {answer_b} "
                                                                                  "{answer} {answer_c}\n\n", 1))
    prompt = load_prompt(tmp_path / "p.txt")
    [shown] = render_answers(prompt, "four answers", "q {answer_a}", ["w", "x {question}", "y", "z"])
    assert shown == {"role": "user", "content": "q {answer_a}\nA w\nB x {question}\nC y\nD z"}
    assert render_answers(prompt, "rating", "q", ["w {answer}"])[0]["content"] == "q\nrate w {answer}"
    assert prompt.user.endswith("{answer} {answer_c}")
    (tmp_path / "again.txt").write_text(prompt_file(prompt))
    again = load_prompt(tmp_path / "again.txt")
    assert (again.four_answers, again.rating, again.user) == (prompt.four_answers, prompt.rating, prompt.user)
    ours = load_prompt("instruct")
    for section, n in (("four answers", 4), ("rating", 1)):
        [message] = render_answers(ours, section, "QUESTION", ["ONE", "TWO", "THREE", "FOUR"][:n])
        assert all(message["content"].count(text) == 1 for text in ("QUESTION", "ONE", "TWO", "THREE", "FOUR")[:n + 1])
    assert rating(ours.rating) is None and four_way_verdict(ours.four_answers) is None
    with pytest.raises(ValueError, match=r"prompt direct has no section \[rating\]: add it"):
        render_answers(load_prompt("direct"), "rating", "q", ["x"])
    (tmp_path / "bad.txt").write_text(FOUR.replace("D {answer_d}", ""))
    with pytest.raises(ValueError, match=r"section \[four answers\] lacks \{answer_d\}"):
        load_prompt(tmp_path / "bad.txt")


# ---- end to end

def shown_rows():
    """Four items of two subsets, whose words vary enough for the random judge to change its mind, and a number of Ties.
    """
    words = ["yes", "no", "maybe", "none"]
    made = [{"id": str(i), "subset": subset, "prompt": f"sort 2 1 {i}", "num_correct": 1, "chosen": [words[i]],
             "rejected": words[i + 1:] + words[:i]} for subset in ("Math", "Focus") for i in range(4)]
    ties = [{"id": f"{kind}:1", "subset": "Ties", "prompt": "sort 1", "num_correct": n, "chosen": words[:n],
             "rejected": words[n:]} for kind, n in (("ref", 1), ("tied", 2))]
    return made + ties


def test_pairwise_and_its_ties_end_to_end(folder, tmp_path, capsys):
    path = save(tmp_path / "rows.jsonl", shown_rows())
    main(config(folder, None, tmp_path / "out", rewardbench2=str(path), swap=True, ties=True, prompt="direct"))
    records, found = judged(tmp_path / "out"), saved_scores(tmp_path / "out")
    assert len(records) == 2 * (24 + 3 + 4) and found["rows"] == scores.score(records)
    assert "RewardBench 2, pairwise (ours) is not whole: 8 of 1763 items" in capsys.readouterr().out
    main(Config(from_=(str(tmp_path / "out"),), out=str(tmp_path / "again")))
    assert saved_scores(tmp_path / "again")["rows"] == found["rows"]
    main(config(folder, None, tmp_path / "two", rewardbench2=str(path), limit=2, prompt="direct"))
    assert [r["item"] for r in judged(tmp_path / "two")] == ["Math/0"] * 3 + ["Math/1"] * 3


@pytest.mark.parametrize("protocol, n", [("four-way", 8), ("ratings", 8 * 4 + 4 + 4)])
def test_the_official_protocols_end_to_end(folder, tmp_path, protocol, n, capsys):
    """Judged, interrupted and gone on with, scored again from the texts: the same; the label is in the record."""
    (tmp_path / "p.txt").write_text(FOUR)
    path = save(tmp_path / "rows.jsonl", shown_rows())
    cfg = config(folder, None, tmp_path / "out", rewardbench2=str(path), protocol=protocol,
                 prompt=str(tmp_path / "p.txt"), max_new_tokens=1)
    main(cfg)
    records, found = judged(tmp_path / "out"), saved_scores(tmp_path / "out")
    assert len(records) == n and found["rows"] == scores.score(records)
    tasks = read_four_way(path) if protocol == "four-way" else read_to_rate(path)
    assert [(r["id"], r["winner"]) for r in records] == [(t.id, t.winner) for t in tasks]
    shown, prompt = read_pairs(tmp_path / "out/pairs.jsonl"), load_prompt(tmp_path / "p.txt")
    section = "four answers" if protocol == "four-way" else "rating"
    assert [p.rendered for p in shown] == [render_answers(prompt, section, t.question, t.answers) for t in tasks]
    if protocol == "four-way":
        right = [r["votes"][0]["text"] == f"[[{r['winner'].upper()}]]" for r in records]
        assert 0 < sum(right) < 8, "the case has lost its variety"
        assert cells(found["rows"])["overall", "right of four, mean without Ties (ours)"] == sum(right) / 8
    lines = (tmp_path / "out/judgements.jsonl").read_text().split("\n")
    (tmp_path / "out/judgements.jsonl").unlink()
    settings = (tmp_path / "out/settings.json").read_text()
    (tmp_path / "out/judgements.jsonl.partial").write_text("\n".join([settings, *lines[:3]]) + "\n")
    main(cfg)
    main(Config(from_=(str(tmp_path / "out"),), out=str(tmp_path / "again")))
    for out in ("out", "again"):
        assert [r | {"seconds": 0} for r in saved_scores(tmp_path / out)["rows"]] == [
            r | {"seconds": 0} for r in found["rows"]]
    assert found["settings"]["protocol"] == protocol
    assert saved_scores(tmp_path / "again")["settings"]["order"] == "balanced"


@pytest.mark.parametrize("options, message", [
    ({"protocol": "four-way"}, r"has no section \[four answers\]"),
    ({"protocol": "ratings"}, r"has no section \[rating\]")])
def test_a_prompt_without_the_section_is_refused_before_any_work(folder, tmp_path, options, message):
    path = save(tmp_path / "rows.jsonl", shown_rows())
    with pytest.raises(ValueError, match=message):
        main(config(folder, None, tmp_path / "out", rewardbench2=str(path), prompt="direct", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, message", [
    ({"protocol": "best-of-4"}, "protocol"), ({"protocol": "four-way", "rmb": "x"}, "judges no pairs"),
    ({"protocol": "four-way", "swap": True}, "--swap is about pairs"),
    ({"protocol": "ratings", "budgets": "1"}, "--budgets is about pairs"),
    ({"protocol": "ratings", "votes": 3, "temperature": 1.0}, "--votes is about verdicts"),
    ({"ties": True, "protocol": "ratings"}, "--ties is about the pairs"),
    ({"order": "published"}, "RewardBench 2 has none"), ({"order": "published", "rmb": "x"}, "RewardBench 2 has none")])
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"model": ("m",), "rewardbench2": "x"} | options)


@pytest.mark.parametrize("change, message", [
    ({"subset": "Maths"}, '"Maths" is no subset of RewardBench 2'), ({"chosen": ["x", "y"]}, "2 chosen and 3 rejected"),
    ({"rejected": ["x"]}, "1 chosen and 1 rejected answers: Math has 1 and 3"),
    ({"num_correct": 2}, '"num_correct" is 2'),
    ({"chosen": "x"}, '"chosen" is a string'), ({"subset": "Ties"}, "ref:<n> with one chosen answer"),
    ({"subset": "Ties", "id": "tied:3"}, "ref:<n> with one chosen answer"), ({"id": "0"}, 'id "Math/0'),
    ({"subset": "Ties", "id": "ref:3", "rejected": []}, "Ties has at least one of each")])
def test_bad_rows(tmp_path, change, message):
    path = save(tmp_path / "x.jsonl", [row("Math", "0"), row("Math", "1") | change])
    for read in (read_pairwise, read_four_way, lambda path: read_to_rate(path)):
        with pytest.raises(ValueError) as e:
            read(path)
        line, = str(e.value).split("\n")
        assert line.startswith(f"{path}:2: ") and message in line
    with pytest.raises(ValueError, match="not a record of RewardBench 2"):
        read_pairwise(save(tmp_path / "y.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"}]))
    with pytest.raises(ValueError, match="has rows of Ties only"):
        read_pairwise(save(tmp_path / "z.jsonl", [row("Ties", "ref:1")]))


@pytest.mark.parametrize("change, message", [
    ({"domain": "Chat", "subset": "Chat"}, "domain 'Chat'"), ({"subset": "Safety"}, "subset 'Safety' of domain 'Math'"),
    ({"id": "Math/0/x"}, "id 'Math/0/x' of item 'Math/0'"),
    ({"id": "Math/0/0-0"}, "id 'Math/0/0-0' of item 'Math/0'"),
    ({"winner": "c"}, '"winner" is "c": write "a", "b" or null')])
def test_judgements_that_have_no_place(tmp_path, change, message):
    path = save(tmp_path / "judgements.jsonl", [judged_pairs(0, "aaa")[0] | change])
    with pytest.raises(ValueError, match=f"judgements.jsonl:1: {message}"):
        read_recorded(path)
