"""one_answer.py, and judge.py's --answer and --rubric. Oracles: outcomes by hand; the same pairs judged one by one with
the same judge; the prompt hash of the pair that a user would have written."""

import json
from dataclasses import replace

import pytest

import judge as judging
from data.pairs import Pair, pair_of_texts, swapped, write_pairs
from judge import Config, first_pairs, judge_settings, load_judge, main
from judgements import prompt_hash
from one_answer import counts_in_words, in_words, judge_answer, outcome, with_outcomes
from options import parse_config
from prompt import load_prompt, prompt_path
from test_judge import config, without_seconds
from test_sample import make_folder

TEXTS = dict(question="sort 31", answer="13", reference="31")
RUBRIC = "silver flowers\nand greetings"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, whose prompt has a section [rubric]."""
    path = make_folder(tmp_path_factory.mktemp("rubric"))
    (path / "prompt.txt").write_text(prompt_path("toy").read_text() + "\n[rubric]\nsay {rubric}\n")
    return path


def without_time(record):
    return record | {"seconds": 0, "votes": [vote | {"seconds": 0} for vote in record["votes"]]}


def test_outcomes_by_hand():
    """The first verdict is with the answer as A, the second with the answer as B."""
    assert outcome("a", "b") == "better" and outcome("b", "a") == "worse"
    for verdicts in (("a", "a"), ("b", "b"), (None, "b"), ("a", None), ("b", None), (None, "a"), (None, None)):
        assert outcome(*verdicts) == "undecided", verdicts


def records_of(name, first, second):
    return [{"id": name, "item": name, "verdict": first},
            {"id": f"{name}/swapped", "item": name, "verdict": second, "swapped": True}]


def test_only_the_two_orders_of_one_answer_have_an_outcome():
    """An RMB item and a pair judged by evaluate.py --swap have two orders too, but are no answers with a reference."""
    others = [{"id": "u/0", "item": "u", "verdict": "a"}, {"id": "u/0/swapped", "item": "u", "verdict": "b"},
              {"id": "p", "item": "", "verdict": "a"}, {"id": "p/swapped", "item": "", "verdict": "b"},
              {"id": "half", "item": "half", "verdict": "a"}]
    answers = records_of("x", "a", "b") + records_of("y", "b", "a") + records_of("z", "a", "a")
    found = with_outcomes(others + answers)
    assert found[:5] == others
    assert [record.pop("outcome") for record in found[5:]] == ["better"] * 2 + ["worse"] * 2 + ["undecided"] * 2
    assert found[5:] == answers
    assert counts_in_words(with_outcomes(others + answers)) == (
        "3 answers: 1 better than their reference, 1 worse, 1 undecided")
    assert counts_in_words(others) == ""


@pytest.mark.parametrize("verdicts, words", [
    ("ab", "better than the reference, in both orders"), ("ba", "worse than the reference, in both orders"),
    ("aa", "undecided: the orders disagree, in both of them A is said to be the better one"),
    ("bb", "undecided: the orders disagree, in both of them B is said to be the better one"),
    (["a", None], "undecided: there is no verdict in one of the two orders"),
    ([None, None], "undecided: there is no verdict in both orders"),
])
def test_what_is_said(verdicts, words):
    assert in_words(with_outcomes(records_of("x", *verdicts))) == words


def test_an_answer_is_its_pair_in_both_orders(folder, tmp_path, capsys):
    """Function, command line and a file of one record give the judgements that the two pairs have by themselves."""
    judge = load_judge(config(folder, seed=3))
    pair = replace(pair_of_texts("sort 31", "13", "31"), item="pair")
    wanted = []
    for shown in (pair, replace(swapped(pair), id="pair/swapped")):
        (_, record), = judge.judge([shown])
        wanted.append(without_time(record))
    wanted = with_outcomes(wanted)
    assert "swapped" not in wanted[0] and wanted[1]["swapped"] is True
    assert [without_time(r) for r in judge_answer(judge, "sort 31", "13", "31")] == wanted

    (tmp_path / "a.txt").write_text("13\n")
    files = TEXTS | {"answer": None, "answer_file": str(tmp_path / "a.txt")}
    main(config(folder, seed=3, out=str(tmp_path / "one.jsonl"), **files))
    assert without_seconds(tmp_path / "one.jsonl") == wanted
    shown = capsys.readouterr().out
    parts = [f"{heading}:\n{record['votes'][0]['text']}\nverdict: " for heading, record in
             zip(("answer as A, reference as B", "reference as A, answer as B"), wanted)]
    assert shown.startswith(parts[0]) and f"\n\n{parts[1]}" in shown
    assert shown.endswith(f"\n\nthe answer is {in_words(wanted)}\n")

    source = tmp_path / "answers.jsonl"
    source.write_text(json.dumps({"id": "pair", "prompt": "sort 31", "answer": "13", "reference": "31", "source": ""}))
    main(config(folder, seed=3, pairs=str(source), out=str(tmp_path / "file.jsonl")))
    assert without_seconds(tmp_path / "file.jsonl") == wanted
    assert capsys.readouterr().out.splitlines()[-1] == counts_in_words(wanted)


def test_a_limit_does_not_cut_an_answer_in_two():
    pairs = [Pair(name, [], "", "", None, "", "") for name in ("p", "x", "x/swapped", "y", "y/swapped")]
    assert [len(first_pairs(pairs, limit)) for limit in range(7)] == [5, 1, 3, 3, 5, 5, 5]


def test_an_answer_too_long_is_told_before_anything_is_shown(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="tokens; the model can read 1024, its reply included"):
        main(config(folder, question="sort 31", answer="13 " * 1100, reference="31", out=str(tmp_path / "one.jsonl")))
    assert capsys.readouterr().out == "" and not (tmp_path / "one.jsonl").exists()


def test_one_answer_alone_says_what_can_be_done(tmp_path, capsys):
    for argv, words in ((["--answer", "x"], "--answer needs --reference: a judge of pairs says which of two"),
                        (["--answer-file", "x"], "a reference answer to compare it with, or rank several answers"),
                        (["--reference", "x"], "--reference goes with --answer"),
                        (["--answer", "", "--reference", "x"], "--answer is missing or empty"),
                        (["--answer", "x", "--reference", "y", "--answer-b", "z"], "and with no other"),
                        (["--pairs", "x", "--out", "y", "--answer", "x", "--reference", "y"], "--pairs and --answer")):
        with pytest.raises(SystemExit) as e:
            parse_config(Config, argv=["--model", "m", *argv])
        error = capsys.readouterr().err
        assert e.value.code == 2 and words in error and error.count("\n") == 1
    with pytest.raises(SystemExit):  # the question
        main(Config(model="m", answer="x", reference="y"))
    assert "--question is missing" in capsys.readouterr().err


# ---- a rubric of the user's own

def test_a_rubric_is_in_the_prompt_and_the_settings(folder, tmp_path, capsys):
    """One pair with --rubric FILE is the pair that has this text as its rubric; in a file, a pair's own wins."""
    (tmp_path / "r.txt").write_text(RUBRIC + "\n")
    given = config(folder, rubric=str(tmp_path / "r.txt"), temperature=0.0, votes=1)
    plain = replace(given, rubric=None)
    judge = load_judge(given)
    told = judge.judge_one("sort 31", "13", "31", rubric=RUBRIC)
    untold = load_judge(plain).judge_one("sort 31", "13", "31")
    assert judge.judge_one("sort 31", "13", "31")["prompt_hash"] == told["prompt_hash"]  # the judge has it, too
    ids = judge.tokenizer.chat([{"role": "user", "content": f"sort 31\nA 13\nB 31\n\nsay {RUBRIC}"}])
    assert told["prompt_hash"] == prompt_hash(ids) != untold["prompt_hash"]
    assert told["votes"][0]["text"] != untold["votes"][0]["text"]
    texts = dict(question="sort 31", answer_a="13", answer_b="31")
    for cfg, record in ((given, told), (plain, untold)):
        main(replace(cfg, **texts))
        assert capsys.readouterr().out.startswith(record["votes"][0]["text"] + "\nverdict: ")
    main(replace(given, **TEXTS, out=str(tmp_path / "one.jsonl")))
    assert without_seconds(tmp_path / "one.jsonl")[0]["prompt_hash"] == told["prompt_hash"]

    pair = pair_of_texts("sort 31", "13", "31")
    write_pairs(tmp_path / "pairs.jsonl", [pair, replace(pair, id="own", rubric="say")])
    capsys.readouterr()
    main(replace(given, pairs=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "out.jsonl")))
    assert "note: 1 of 2 records have a rubric of their own" in capsys.readouterr().out
    own = judge.judge_one("sort 31", "13", "31", rubric="say")
    assert [r["prompt_hash"] for r in without_seconds(tmp_path / "out.jsonl")] == [told["prompt_hash"],
                                                                                  own["prompt_hash"]]
    assert judge_settings(given, judge) == judge_settings(plain, judge) | {"rubric": RUBRIC}


def test_answers_are_ranked_by_a_rubric(folder, tmp_path, capsys):
    """Each comparison is of pairs that have the rubric: the given one, or the question's own."""
    (tmp_path / "r.txt").write_text(RUBRIC)
    cfg = config(folder, rubric=str(tmp_path / "r.txt"), votes=1, temperature=0.0)
    rows = [{"id": "1", "prompt": "sort 31", "answers": ["13", "31"]},
            {"id": "2", "prompt": "sort 31", "answers": ["13", "31"], "rubric": "say"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(replace(cfg, rank=str(tmp_path / "questions.jsonl"), both_orders=True, out=str(tmp_path / "out.jsonl")))
    assert "note: 1 of 2 records have a rubric of their own" in capsys.readouterr().out
    judge = load_judge(cfg)
    for record, rubric in zip(without_seconds(tmp_path / "out.jsonl"), (RUBRIC, "say")):
        one, other = record["judgements"]
        assert {one["a"], other["a"]} == {0, 1}
        for judgement in (one, other):
            texts = [rows[0]["answers"][judgement[side]] for side in "ab"]
            assert judgement["prompt_hash"] == judge.judge_one("sort 31", *texts, rubric=rubric)["prompt_hash"]


def test_a_prompt_without_the_section_refuses_before_the_model_is_read(folder, tmp_path, monkeypatch):
    (tmp_path / "r.txt").write_text("be brief")
    (tmp_path / "empty.txt").write_text("\n")
    monkeypatch.setattr(judging, "load_model", None)
    with pytest.raises(ValueError, match=r"^prompt toy has no section \[rubric\], which --rubric needs: add it"):
        main(config(folder, prompt="toy", rubric=str(tmp_path / "r.txt"), question="q", answer_a="a", answer_b="b"))
    with pytest.raises(ValueError, match="empty.txt: is empty; --rubric is a file with the text"):
        main(config(folder, rubric=str(tmp_path / "empty.txt"), **TEXTS))
    assert load_prompt(folder / "prompt.txt").rubric == "say {rubric}"
