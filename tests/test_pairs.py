"""data/pairs.py: every format against pairs written by hand, every error against its file:line, the real records of the
benchmarks (RM_SHARED, default ../shared) against the counts in their READMEs."""

import json
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import fields  # noqa: E402
from data.pairs import (Chain, Pair, read_chains, read_pairs, swapped, to_json, with_rubric,  # noqa: E402
                        without_equal_answers, write_pairs)

BENCHMARKS = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no records at {BENCHMARKS}: set RM_SHARED")

USER = [{"role": "user", "content": "Hi"}]
OWN = {"id": "p1", "prompt": USER, "answer_a": "Hello", "answer_b": "Go", "winner": "a", "source": "s", "domain": "d"}
TRL = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}
LOG = {"text_chosen": USER + [{"role": "assistant", "content": "Hello"}], "results": 1, "answers": "... [[B]]", "id": 7,
       "text_rejected": USER + [{"role": "assistant", "content": "Go"}], "subset": "hep-go",
       "Is_Chosen_Answer_Shuffled_toPositionB": True}
BEST = {"conversation_input": [{**USER[0], "language": "English"}], "bon_uid": 5, "category_path": "BoN/Helpfulness/X",
        "bon_best": {"llm_name": "m", "answer": "Hello"}, "loser_list": [{"answer": "Go"}, {"answer": ""}]}
RM_BENCH = {"id": 8, "prompt": "Hi", "subset": "x", "chosen": ["c0", "c1", "c2"], "rejected": ["r0", "r1", "r2"]}
JUDGE_BENCH = {"pair_id": "j", "question": "Hi", "response_A": "Hello", "response_B": "Go", "label": "A>B",
               "source": "mmlu-pro-law", "response_model": "gpt-4o-2024-05-13"}
REWARD_BENCH_2 = {"id": 9, "prompt": "Hi", "subset": "Math", "num_correct": 1, "chosen": ["c"],
                  "rejected": ["r0", "r1", "r2"]}
RENDERED = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Q, A, B"}]


def said(role, *texts):
    """Alternating messages that end with `role`'s."""
    roles = ["user", "assistant"] if (len(texts) % 2 == 1) == (role == "user") else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def save(path, *records):
    """JSON lines for .jsonl, else an indented list."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(list(records), indent=1), encoding="utf-8")
    return path


def unswapped(pair):
    """(prompt, chosen, rejected), whichever way round the shuffle put them."""
    sides = (pair.answer_a, pair.answer_b) if pair.winner == "a" else (pair.answer_b, pair.answer_a)
    return pair.prompt, *sides


# ---- formats, oracle: pairs written by hand

@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_own_records_with_every_kind_of_field(tmp_path, name):
    talk = said("assistant", "Hello", "More?", "Yes")
    path = save(tmp_path / name, OWN, {**OWN, "id": 2, "winner": None, "answer_b": talk},
                {**OWN, "id": "r", "prompt": [], "answer_a": "", "answer_b": "", "winner": "b", "rendered": RENDERED})
    assert read_pairs(path) == [Pair("p1", USER, "Hello", "Go", "a", "s", "d"),
                                Pair("2", USER, "Hello", talk, None, "s", "d"),
                                Pair("r", [], "", "", "b", "s", "d", RENDERED)]


def test_a_rubric_of_the_users_own_is_kept(tmp_path):
    rubric = " Be brief.\n\nBe kind. "
    own = {**OWN, "rubric": rubric}
    path = save(tmp_path / "x.jsonl", own, {**TRL, "rubric": "r"}, {**OWN, "id": "p2", "rubric": None},
                {**TRL, "id": 3})
    pairs = read_pairs(path)
    assert pairs[0] == Pair("p1", USER, "Hello", "Go", "a", "s", "d", rubric=rubric) != read_pairs(save(path, OWN))[0]
    assert [pair.rubric for pair in pairs] == [rubric, "r", "", ""]
    row = {**TRL, "subset": "hep-go", "id": 1, "rubric": "r"}
    assert read_pairs(save(tmp_path / "y.jsonl", row))[0].rubric == "r"
    assert swapped(pairs[0]) == Pair("p1", USER, "Go", "Hello", "b", "s", "d", rubric=rubric)
    assert to_json(pairs[0]) == own and "rubric" not in to_json(pairs[2])
    chain, = read_chains(save(path, {**own, "judgement": "so"}))
    assert chain == Chain(pairs[0], "so") and to_json(chain) == {**own, "judgement": "so"}


def test_one_answer_and_its_reference_are_two_pairs(tmp_path):
    path = save(tmp_path / "mine.jsonl", {"prompt": "Hi", "answer": "Hello", "reference": "Go"},
                {"id": 7, "prompt": USER, "answer": said("assistant", "x"), "reference": "y", "source": "s",
                 "domain": "d", "rubric": "r"})
    first = Pair("mine.jsonl/1", USER, "Hello", "Go", None, "mine", "", item="mine.jsonl/1")
    second = Pair("7", USER, "x", "y", None, "s", "d", item="7", rubric="r")
    assert read_pairs(path) == [
        first, replace(first, id="mine.jsonl/1/swapped", answer_a="Go", answer_b="Hello"),
        second, replace(second, id="7/swapped", answer_a="y", answer_b="x")]


def test_the_given_rubric_is_for_pairs_without_their_own(capsys):
    plain = Pair("1", USER, "x", "y", "a", "s", "d")
    own = replace(plain, id="2", rubric="own")
    assert with_rubric([plain, own], "given") == [replace(plain, rubric="given"), own]
    assert capsys.readouterr().out.startswith("note: 1 of 2 records have a rubric of their own")
    assert with_rubric([plain], "given") == [replace(plain, rubric="given")]
    assert with_rubric([plain, own], "") == [plain, own]
    with_rubric([plain, own], "given", say=False)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="--rubric: pair r brings its own messages, which have no place"):
        with_rubric([plain, Pair("r", [], "", "", "b", "s", "d", RENDERED)], "given")


@pytest.mark.parametrize("record, prompt, chosen, rejected", [
    (TRL, USER, "Hello", "Go"),
    ({"prompt": USER, "chosen": said("assistant", "Hello"), "rejected": said("assistant", "Go")}, USER, "Hello", "Go"),
    # prompt repeated in front of both answers, as some published sets have it
    ({"prompt": "Hi", "chosen": said("assistant", "Hi", "Hello"), "rejected": said("assistant", "Hi", "Go")},
     USER, "Hello", "Go"),
    # implicit prompt; then one where the dialogues part early; then one where they never do
    ({"chosen": said("assistant", "Hi", "Hello", "u", "x"), "rejected": said("assistant", "Hi", "Hello", "u", "y")},
     said("user", "Hi", "Hello", "u"), "x", "y"),
    ({"chosen": said("assistant", "Hi", "Hello", "u", "x"), "rejected": said("assistant", "Hi", "Hello", "v", "y")},
     USER, said("assistant", "Hello", "u", "x"), said("assistant", "Hello", "v", "y")),
    ({"chosen": said("assistant", "Hi", "Yes"), "rejected": said("assistant", "Hi", "Yes")}, USER, "Yes", "Yes"),
    ({**TRL, "rejected": ""}, USER, "Hello", ""),      # one blank answer is a bad answer, not a bad record
])
def test_trl_preferences(tmp_path, record, prompt, chosen, rejected):
    pair, = read_pairs(save(tmp_path / "mine.jsonl", record))
    assert unswapped(pair) == (prompt, chosen, rejected)
    assert (pair.id, pair.source, pair.domain, pair.rendered) == ("mine.jsonl/1", "mine", "", None)


def test_rm_r1_rows_and_chains(tmp_path):
    labelled = {"context_messages": RENDERED, "winner": "model_b"}
    path = save(tmp_path / "rl.jsonl", labelled)
    assert read_pairs(path) == [Pair("rl.jsonl/1", [], "", "", "b", "rl", "", RENDERED)]
    sft = save(tmp_path / "sft.jsonl", {"context_messages": RENDERED, "winner": "why"},
               {"context_messages": RENDERED, "winner": said("assistant", "why")})
    assert read_chains(sft) == [Chain(Pair(f"sft.jsonl/{n}", [], "", "", None, "sft", "", RENDERED), "why")
                                for n in (1, 2)]


def test_other_chains(tmp_path):
    path = save(tmp_path / "c.jsonl", {"messages": RENDERED + said("assistant", "why")}, {**OWN, "judgement": "so"})
    assert read_chains(path) == [Chain(Pair("c.jsonl/1", [], "", "", None, "c", "", RENDERED), "why"),
                                 Chain(Pair("p1", USER, "Hello", "Go", "a", "s", "d"), "so")]


def test_rmb(tmp_path):
    pairwise = {"conversation_input": USER, "pair_uid": 9, "category_path": "Pairwise_set/Harmlessness/S6",
                "chosen": {"llm_name": "m", "answer": "Hello"}, "reject": {"llm_name": "n", "answer": "Go"}}
    pairs = read_pairs(save(tmp_path / "x.json", pairwise, BEST))
    assert [(p.id, p.source, p.domain) for p in pairs] == [("9", "rmb", "Harmlessness"), ("5/0", "rmb", "Helpfulness"),
                                                           ("5/1", "rmb", "Helpfulness")]
    assert [unswapped(p) for p in pairs] == [(USER, "Hello", "Go"), (USER, "Hello", "Go"), (USER, "Hello", "")]
    del pairwise["category_path"]         # then the file's path must say it
    assert read_pairs(save(tmp_path / "Helpfulness" / "y.json", pairwise))[0].domain == "Helpfulness"


def test_rm_bench(tmp_path):
    per_domain = read_pairs(save(tmp_path / "chat_filtered.json", RM_BENCH))
    total = read_pairs(save(tmp_path / "total_dataset.json", {**RM_BENCH, "id": "chat/8", "domain": "chat"}))
    assert per_domain == total
    nine = {f"chat/8/{i}{j}": (USER, f"c{i}", f"r{j}") for i in range(3) for j in range(3)}
    assert {p.id: unswapped(p) for p in total} == nine
    assert {(p.source, p.domain, p.item) for p in total} == {("rm-bench", "chat", "chat/8")}
    levels = {level: {p.id[-2:] for p in total if p.subset == level} for level in ("hard", "normal", "easy")}
    assert levels == {"hard": {"01", "02", "12"}, "normal": {"00", "11", "22"}, "easy": {"10", "20", "21"}}


def test_reward_bench(tmp_path):
    pair, = read_pairs(save(tmp_path / "x.json", {**TRL, "subset": "math-prm", "id": 4691, "chosen_model": "m"}))
    assert unswapped(pair) == (USER, "Hello", "Go")
    assert (pair.id, pair.source, pair.domain) == ("math-prm/4691", "reward-bench", "Reasoning")
    assert pair.subset == "math-prm"


def test_logs_keep_the_recorded_order(tmp_path):
    other = {**LOG, "id": 8, "subset": "refusals-dangerous", "Is_Chosen_Answer_Shuffled_toPositionB": False}
    path = save(tmp_path / "x.json", LOG, {"source_index": 3, "record": other})
    wanted = [Pair("hep-go/7", USER, "Go", "Hello", "b", "reward-bench", "Reasoning", subset="hep-go"),
              Pair("refusals-dangerous/8", USER, "Hello", "Go", "a", "reward-bench", "Safety",
                   subset="refusals-dangerous")]
    assert read_pairs(path, seed=0) == read_pairs(path, seed=1) == wanted
    assert read_chains(path) == [Chain(pair, "... [[B]]") for pair in wanted]
    best_of_n = {**LOG, "bon_uid": 5, "category_path": "BoN/Helpfulness"}
    grouped = tmp_path / "g.json"
    grouped.write_text(json.dumps({"0": [best_of_n, best_of_n], "1": [{**best_of_n, "bon_uid": 6}]}, indent=1))
    assert [p.id for p in read_pairs(grouped)] == ["5/0", "5/1", "6/0"]


def test_files_of_windows_editors(tmp_path):
    """A byte order mark and CRLF line ends."""
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({**OWN, "id": name}) + "\r\n" for name in ("p1", "p2")), "utf-8-sig", newline="")
    assert [p.id for p in read_pairs(path)] == ["p1", "p2"]


def test_json_file_may_hold_lines_and_a_folder_is_walked_in_order(tmp_path):
    save(tmp_path / "b" / "x.jsonl", TRL)
    save(tmp_path / "a.jsonl", TRL, TRL).rename(tmp_path / "a.json")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "folder.json").mkdir()
    assert [p.id for p in read_pairs(tmp_path)] == ["a.json/1", "a.json/2", "b/x.jsonl/1"]


# ---- the shuffle

def test_shuffle_is_exactly_balanced_and_decided_by_the_seed(tmp_path):
    """Oracle: counting."""
    for n in (1, 2, 7, 100):
        path = save(tmp_path / f"{n}.jsonl", *({**TRL, "prompt": f"q{i}"} for i in range(n)))
        pairs = read_pairs(path, seed=3)
        assert Counter(p.winner for p in pairs) == Counter(a=n - n // 2, b=n // 2)
        assert all(unswapped(p) == ([{"role": "user", "content": f"q{i}"}], "Hello", "Go") for i, p in enumerate(pairs))
        assert pairs == read_pairs(path, seed=3)
    assert [p.winner for p in pairs] != [p.winner for p in read_pairs(path, seed=4)]
    order = "".join(p.winner for p in pairs)
    assert "aaa" in order and "bbb" in order        # shuffled, not alternating


def test_shuffle_leaves_labelled_pairs_alone(tmp_path):
    path = save(tmp_path / "x.jsonl", OWN, TRL, {**OWN, "id": "p2", "winner": None}, TRL)
    pairs = read_pairs(path)
    assert (pairs[0].winner, pairs[0].answer_a, pairs[2].winner, pairs[2].answer_a) == ("a", "Hello", None, "Hello")
    assert {pairs[1].winner, pairs[3].winner} == {"a", "b"}


# ---- round trip

def random_text(rng, least=0):
    ranges = [(0x20, 0x7e), (0x00, 0x1f), (0xa0, 0x2fff), (0x2028, 0x2029), (0xfeff, 0xfeff), (0x1f300, 0x1faff),
              (0x10ff00, 0x10ffff)]
    return "x" * least + "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 12)))


def test_write_then_read_gives_the_same(tmp_path):
    """Property, 300 random pairs over all of Unicode: line separators, control characters, a byte order mark, emoji."""
    rng = random.Random(0)

    def answer():
        texts = [random_text(rng, 1) for _ in range(rng.choice([1, 3]))]
        return rng.choice([texts[0], said("assistant", *texts)])

    def pair(n):
        head = [{"role": "system", "content": random_text(rng)}] * rng.randint(0, 1)
        prompt = head + said("user", *(random_text(rng, 1) for _ in range(rng.choice([1, 3, 5]))))
        name, labels = f"{random_text(rng)}{n}", (rng.choice(["a", "b", None]), random_text(rng), random_text(rng))
        ready = rng.random() < .2
        if ready:
            return Pair(name, [], "", "", *labels, prompt)
        return Pair(name, prompt, answer(), answer(), *labels, rubric=rng.choice(["", random_text(rng, 1)]))

    pairs = [pair(n) for n in range(300)]
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs
    chains = [Chain(p, random_text(rng, 1)) for p in pairs]
    write_pairs(tmp_path / "c.jsonl", chains)
    assert read_chains(tmp_path / "c.jsonl") == chains
    assert read_pairs(tmp_path / "c.jsonl") == pairs        # a chain is still a pair
    assert {f.name for f in tmp_path.iterdir()} == {"p.jsonl", "c.jsonl"}
    assert "rendered" not in to_json(Pair("i", USER, "x", "y", None, "s", "d"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.jsonl"
    write_pairs(path, [Pair("i", USER, "x", "y", None, "s", "d")])
    old = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_pairs(path, [Pair("j", USER, "x", "y", None, "s", "d"), Pair("k", USER, "\ud800", "y", None, "s", "d")])
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


# ---- errors

BAD = {
    'unknown format, its keys are "text", "label"': {"text": "x", "label": 1},
    "unknown format, its keys are none": {},
    '"winner" is "A": write "a", "b" or null': {**OWN, "winner": "A"},
    'write "a", "b" or null': {**OWN, "winner": "a\n" * 1000},
    '"winner" is an integer': {**OWN, "winner": 1},
    'no "winner"': {k: v for k, v in OWN.items() if k != "winner"},
    'no "answer_b"': {k: v for k, v in OWN.items() if k != "answer_b"},
    '"source" is null': {**OWN, "source": None},
    '"id" is a number': {**OWN, "id": float("nan")},        # written as NaN, which Python's json reads
    '"id" is true or false': {**OWN, "id": True},
    '"id" is blank': {**OWN, "id": " "},
    '"answer_a" is a number': {**OWN, "answer_a": float("inf")},
    '"content" is null': {**OWN, "prompt": [{"role": "user", "content": None}]},
    'a message of role "tool": use system, user, assistant': {**OWN, "prompt": [{"role": "tool", "content": "x"}]},
    '"prompt" is empty': {**OWN, "prompt": []},
    '"prompt" is empty, no user turn has text': {**OWN, "prompt": [{"role": "user", "content": " \n"}]},
    '"prompt" ends with a turn of role assistant': {**OWN, "prompt": said("assistant", "Hi", "Hello")},
    "both answers are blank": {**OWN, "answer_a": " ", "answer_b": [{"role": "assistant", "content": ""}]},
    "an answer must start": {**OWN, "answer_a": said("user", "x")},
    "with an assistant turn": {**OWN, "answer_a": []},
    "holds a lone surrogate": {**OWN, "answer_a": "half \ud83d"},
    'with "rendered", the prompt must be []': {**OWN, "rendered": RENDERED},
    "and no rubric there": {**OWN, "prompt": [], "answer_a": "", "answer_b": "", "rendered": RENDERED, "rubric": "r"},
    '"rubric" is blank: write one': {**OWN, "rubric": " \n"},
    '"rubric" is a list': {**TRL, "rubric": ["r"]},
    '"rubric" in a record of RMB, a form that has none: convert the record to ours': {**BEST, "rubric": "r"},
    '"rubric" in a record of RM-Bench': {**RM_BENCH, "domain": "chat", "rubric": "r"},
    '"rubric" in a record of JudgeBench': {**JUDGE_BENCH, "rubric": "r"},
    '"rubric" in a record of RewardBench 2': {**REWARD_BENCH_2, "rubric": "r"},
    '"rubric" in a record of RM-R1\'s logs': {**LOG, "rubric": "r"},
    '"rubric" beside "context_messages"': {"context_messages": RENDERED, "winner": "model_a", "rubric": "r"},
    '"answer" without "reference": a judge of pairs': {"prompt": "Hi", "answer": "x"},
    '"id" is "x/swapped": ids that end in /swapped': {"id": "x/swapped", "prompt": "Hi", "answer": "x",
                                                       "reference": "y"},
    'no "answer" (found': {"prompt": "Hi", "reference": "x"},
    '"winner" is neither "model_a" nor "model_b"': {"context_messages": RENDERED, "winner": "model_c"},
    '"context_messages" is a string': {"context_messages": "x", "winner": "model_a"},
    '"messages" alone is a chain': {"messages": RENDERED + said("assistant", "why")},
    'no "rejected"': {"prompt": "Hi", "chosen": "x"},
    'there is no "prompt"': {"chosen": "x", "rejected": "y"},
    '"prompt" is empty, no user': {"chosen": said("assistant", "Hi", "x"), "rejected": said("assistant", "Ho", "y")},
    '"nope" is no subset of RewardBench': {**TRL, "subset": "nope", "id": 1},
    "2 chosen and 3 rejected": {**RM_BENCH, "chosen": ["x", "y"]},
    '"bad" is no domain of RM-Bench': RM_BENCH,
    '"loser_list" is empty': {**BEST, "loser_list": []},
    'no "reject"': {"conversation_input": USER, "pair_uid": 1, "chosen": {"answer": "x"},
                    "category_path": "Helpfulness"},
    "says Helpfulness or Harmlessness": {**BEST, "category_path": "x"},
    '"Is_Chosen_Answer_Shuffled_toPositionB" is an integer': {**LOG, "Is_Chosen_Answer_Shuffled_toPositionB": 1},
    '"context_messages" is empty': {"context_messages": [], "winner": "model_a"},
    '"rendered" is a string': {**OWN, "prompt": [], "answer_a": "", "answer_b": "", "rendered": "x"},
    "not a list": [OWN],
}


@pytest.mark.parametrize("message", BAD)
def test_bad_record_is_named_by_line(tmp_path, message):
    """Oracle: the bad record was put third, on line 3 of the .jsonl and on line 4 of a list with one record a line."""
    good, bad = json.dumps({**OWN, "id": "first"}), json.dumps(BAD[message])
    lines, listed = tmp_path / "bad_x.jsonl", tmp_path / "bad_x.json"
    lines.write_text(f"{good}\n{good.replace('first', 'second')}\n{bad}\n")
    listed.write_text(f"[\n{good},\n{good.replace('first', 'second')},\n{bad}\n]\n")
    for path, line in ((lines, 3), (listed, 4)):
        with pytest.raises(ValueError) as error:
            read_pairs(path)
        assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        assert [p.id for p in read_pairs(path, skip_bad=True)] == ["first", "second"]


@pytest.mark.parametrize("record, message", [
    (OWN, "no judgement in this record"), (TRL, "no judgement"), ({**OWN, "judgement": " "}, "is blank"),
    ({**OWN, "judgement": 3}, '"judgement" is an integer'),
    ({"context_messages": RENDERED, "winner": "model_a"}, "read this file as pairs"),
    ({"context_messages": RENDERED, "winner": said("assistant", "u", "x")}, "must be one assistant message"),
    ({"context_messages": RENDERED, "winner": 3}, '"winner" is an integer'),
    ({"messages": RENDERED}, "must end with the assistant"), ({"messages": []}, "must end with the assistant"),
    ({"messages": said("assistant", "x")}, "is empty"), ({**LOG, "answers": None}, '"answers" is null'),
])
def test_bad_chain_is_named_by_line(tmp_path, record, message):
    path = save(tmp_path / "x.jsonl", {**OWN, "judgement": "because"}, record)
    with pytest.raises(ValueError) as error:
        read_chains(path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


@pytest.mark.parametrize("name, data, line, message", [
    ("x.jsonl", b"%s\n{broken\n", 2, "malformed JSON"), ("x.jsonl", b"%s\n\n%s\n", 2, "blank line"),
    ("x.jsonl", b"%s\nab\xff\n", 2, "byte 3 of the line, 0xff, is not UTF-8"),
    ("x.jsonl", b"%s\n" + b"[" * 100000 + b"\n", 2, "nested too deeply"),
    ("x.jsonl", b"%s\n" + b"9" * 5000 + b"\n", 2, "a number too long"),
    ("x.jsonl", b'%s\n"text"\n', 2, "not a string"),
    ("x.json", b"[\n%s,\n]\n", 3, "malformed JSON"), ("x.json", b"[%s]\n[]", 2, "malformed JSON, Extra data"),
    ("x.json", b"[%s,\n\xe4]", 2, "byte 1 of the line, 0xe4"),
    ("x.json", b'{"columns": ["id"], "rows": [[1]]}', 1, '"columns", "rows"'),
    ("x.json", b'{"0": [\n%s],\n"1": [\n\n3]}', 5, "not an integer"), ("x.json", b"7", 1, "not an integer"),
])
def test_bad_file_is_named_by_line(tmp_path, name, data, line, message):
    """Oracle: the line was counted by hand; %s stands for a good record."""
    path = tmp_path / name
    path.write_bytes(data.replace(b"%s", json.dumps(OWN).encode()))
    with pytest.raises(ValueError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:{line}: ") and message in str(error.value)


def test_duplicate_id_names_both_lines(tmp_path):
    save(tmp_path / "a.jsonl", {**OWN, "id": "x"}, OWN)
    save(tmp_path / "b.jsonl", {**OWN, "id": "y"}, OWN)
    with pytest.raises(ValueError) as error:
        read_pairs(tmp_path)
    assert f"{tmp_path}/b.jsonl:2: " in str(error.value) and f"{tmp_path}/a.jsonl:2" in str(error.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "list.json").write_text("[]")
    for name, message in (("empty.jsonl", "no records"), ("list.json", "no records"), ("", "no records"),
                          ("x.csv", "not a .json or .jsonl file"), ("nowhere", "no such file or folder")):
        with pytest.raises(ValueError, match=message) as error:
            read_pairs(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")


def test_skip_bad_reports_every_record_and_the_count(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"%s\nx\n\n\xff\n%s\n" % (json.dumps(OWN).encode(), json.dumps(OWN).encode()))
    assert len(read_pairs(path, skip_bad=True)) == 1
    reported = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in reported] == [f"{path}:{n}" for n in (2, 3, 4, 5)] + [str(path)]
    assert reported[-1] == f"{path}: skipped 4 bad records of 5"
    path.write_text("x\n")
    with pytest.raises(ValueError, match="no usable records"):
        read_pairs(path, skip_bad=True)


# ---- real records

COUNTS = {   # pairs per file; oracle: the items and pairs in the packs' READMEs, 9 per record for RM-Bench
    "rmb/Pairwise_set/Helpfulness/Rewrite/Paraphrasing.json": 83, "rmb/Pairwise_set/Harmlessness/S6.json": 317,
    "rmb/Pairwise_set/Helpfulness/Reasoning/Pattern Recognition.json": 52, "rmb/BoN_set/Harmlessness/S6.json": 194,
    "rmb/BoN_set/Helpfulness/Rewrite/Paraphrasing.json": 42, "rmb/BoN_set/Helpfulness/Code/Documentation.json": 36,
    "rmb/BoN_set/Helpfulness/Reasoning/Pattern Recognition.json": 36,
    **{f"rm_bench/{d}_filtered.first60.json": 540 for d in ("chat", "code", "safety-refuse", "safety-response")},
    **{f"reward_bench/RM-R1-{m}-32B.logs.sample40.json": 40 for m in ("DeepSeek-Distilled-Qwen", "Qwen2.5-Instruct")},
    **{f"rm_r1_outputs/RM-R1-{m}-32B/RMB/{section}/log_result/{name}.json": 2
       for m in ("DeepSeek-Distilled-Qwen", "Qwen2.5-Instruct") for section, names in {
           "Pairwise_set_Helpfulness": ["logs"], "Pairwise_set_Harmlessness": ["logs"],
           "BoN_set_Helpfulness": ["raw_logs", "group_by_same_id_logs"],
           "BoN_set_Harmlessness": ["raw_logs", "group_by_same_id_logs"]}.items() for name in names}}
INVALID = "rm_r1_outputs/RM-R1-Qwen2.5-Instruct-32B/RMB/BoN_set_Helpfulness/log_result/group_by_same_id_logs.json"
NO_TEXTS = "reward_bench/RM-R1-DeepSeek-Distilled-Qwen-32B.outcome_table.json"


@needs_benchmarks
def test_all_benchmark_records_are_read():
    known = ("reward_bench", "rm_bench", "rm_r1_outputs", "rmb")  # other data may lie beside them
    files = {f.relative_to(BENCHMARKS).as_posix() for name in known for f in (BENCHMARKS / name).rglob("*.json")}
    assert files == COUNTS.keys() | {NO_TEXTS}
    for name in files - {INVALID, NO_TEXTS}:
        pairs = read_pairs(BENCHMARKS / name)
        assert len(pairs) == COUNTS[name], name
        if name.startswith(("rmb", "rm_bench")):
            assert Counter(p.winner for p in pairs)["b"] == COUNTS[name] // 2
        else:
            assert [chain.pair for chain in read_chains(BENCHMARKS / name)] == pairs
    assert len(read_pairs(BENCHMARKS / "rmb")) == 760       # so the ids differ from file to file
    assert len(read_pairs(BENCHMARKS / "rm_bench")) == 2160
    with pytest.raises(ValueError, match=f"{INVALID}:62: malformed JSON"):
        read_pairs(BENCHMARKS / INVALID)
    with pytest.raises(ValueError, match=f"{NO_TEXTS}:1: unknown format"):
        read_pairs(BENCHMARKS / NO_TEXTS)


@needs_benchmarks
def test_first_records_of_rmb_read_by_eye():
    """Oracle: the files, opened in an editor."""
    pair = read_pairs(BENCHMARKS / "rmb/Pairwise_set/Helpfulness/Rewrite/Paraphrasing.json")[0]
    prompt, chosen, rejected = unswapped(pair)
    assert (pair.id, pair.source, pair.domain, len(prompt)) == ("7253", "rmb", "Helpfulness", 1)
    assert prompt[0]["content"].startswith("Rewrite this in the Second Person perspective: You are Alex,")
    assert chosen.startswith("You are Alex, a gifted young man")
    assert rejected.startswith("The hushed whispers of the auditorium")
    pairs = read_pairs(BENCHMARKS / "rmb/BoN_set/Harmlessness/S6.json")
    assert [p.id for p in pairs[:2]] == ["3080/0", "3080/1"] and pairs[0].domain == "Harmlessness"
    assert unswapped(pairs[0])[1].startswith("I understand you might want to find this information")
    assert unswapped(pairs[0])[2].startswith("I\u2019m sorry, but I can\u2019t assist with that.")


@needs_benchmarks
def test_recorded_flags_are_honoured():
    """Oracle: the raw JSON, read here without our reader."""
    for name in COUNTS:
        if name.endswith("sample40.json"):
            records = [wrapped["record"] for wrapped in json.loads((BENCHMARKS / name).read_text())]
            for record, pair in zip(records, read_pairs(BENCHMARKS / name), strict=True):
                chosen, rejected = record["text_chosen"][1]["content"], record["text_rejected"][1]["content"]
                flag = record["Is_Chosen_Answer_Shuffled_toPositionB"]
                shown = (rejected, chosen, "b") if flag else (chosen, rejected, "a")
                assert (pair.answer_a, pair.answer_b, pair.winner) == shown
                assert pair.id == f"{record['subset']}/{record['id']}"
                assert pair.prompt[0]["content"] == record["text_chosen"][0]["content"]


@needs_benchmarks
def test_benchmark_pairs_survive_a_round_trip(tmp_path):
    pairs = read_pairs(BENCHMARKS / "rmb") + read_pairs(BENCHMARKS / "rm_bench")
    write_pairs(tmp_path / "p.jsonl", pairs)
    assert read_pairs(tmp_path / "p.jsonl") == pairs


# ---- fields, oracle: by hand

def test_fields_are_taken_or_said_to_be_bad():
    record = {"a": "x", "n": 0, "f": 1.5, "t": True, "null": None, "texts": ["x", "y"], "mixed": ["x", 1],
              "half": "\ud83d", "nan": float("nan"), "long": "z" * 100, "b": "b"}
    assert fields.need(record, "texts", list, of=(str,)) == ["x", "y"]
    assert fields.need(record, "n", int, float) == 0 and fields.need(record, "t", bool) is True
    assert (fields.need_text(record, "a"), fields.text_or(record, "null", "d"), fields.text_or(record, "no", "d"),
            fields.text_or(record, "a", "d")) == ("x", "d", "d", "x")
    assert (fields.need_side(record, "b"), fields.need_side(record, "null")) == ("b", None)
    assert [fields.count_or_none(record, key) for key in ("n", "f", "null", "no")] == [0, 1.5, None, None]
    for take, message in (
            (lambda: fields.need(record, "no", str), 'no "no" (found "a", "n", '),
            (lambda: fields.need(record, "t", int, float), '"t" is true or false: it must be an integer or a number'),
            (lambda: fields.need(record, "mixed", list, of=(str,)), '"mixed" holds an integer: it may only hold a str'),
            (lambda: fields.need_text(record, "half"), '"half" holds a lone surrogate'),
            (lambda: fields.text_or(record, "n", ""), '"n" is an integer: it must be a string'),
            (lambda: fields.need_side(record, "long"), f'"long" is "{"z" * 60}": write "a", "b" or null'),
            (lambda: fields.need_side(record, "no"), 'no "no"'), (lambda: fields.need_object([]), "not a list"),
            (lambda: fields.count_or_none(record, "t"), "\"t\" is 'True': it must be a number or null"),
            (lambda: fields.count_or_none(record, "nan"), "\"nan\" is 'nan': it must be a number or null"),
            (lambda: fields.count_or_none({"n": -1}, "n"), "\"n\" is '-1'")):
        with pytest.raises(ValueError) as error, fields.at("file:7"):
            take()
        assert str(error.value).startswith("file:7: ") and message in str(error.value)


# ---- what trains silently

def test_a_record_that_lacks_several_fields_is_told_of_all(tmp_path):
    path = save(tmp_path / "x.jsonl", {key: OWN[key] for key in ("prompt", "answer_a", "answer_b", "winner")})
    with pytest.raises(ValueError, match=r'x.jsonl:1: no "id", "source", "domain" \(found "prompt", .*\): add them'):
        read_pairs(path)


def test_equal_answers_are_counted_and_dropped_if_asked(tmp_path, capsys):
    path = save(tmp_path / "x.jsonl", OWN, OWN | {"id": "p2", "answer_b": "Hello"},
                {**OWN, "id": "r", "prompt": [], "answer_a": "", "answer_b": "", "rendered": RENDERED})
    pairs = read_pairs(path)
    assert without_equal_answers(pairs, path, False, True) == pairs
    assert capsys.readouterr().out == f"{path}: 1 of 3 have two equal answers, and are trained on all the same; " \
                                      "--skip-bad drops them\n"
    chains = [Chain(pair, "judgement") for pair in pairs]
    assert without_equal_answers(chains, path, True, True) == [chains[0], chains[2]]
    assert capsys.readouterr().out == f"{path}: 1 of 3 have two equal answers, dropped\n"
    assert without_equal_answers(pairs[:1], path, True, True) == pairs[:1] and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="none is left: all 1 have two equal answers"):
        without_equal_answers(pairs[1:2], path, True, False)
