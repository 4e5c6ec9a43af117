"""data/mix.py, data/pool.py, data/grams.py. Oracles: small sources whose every record's fate was decided by hand, sets
of Python's tuples of words for the hashed n-grams, counting for the balance and the parts."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import grams, mix, pool, toy  # noqa: E402
from data.pairs import read_pairs, swapped  # noqa: E402
from prompt import load_prompt, render  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

BENCHMARKS = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no records at {BENCHMARKS}: set RM_SHARED")
WORDS = [a + b for a in ("ba", "co", "du", "fi", "ge", "ha", "ki") for b in "lmnrstxz"]


def text(rng, n_words):
    return " ".join(rng.choices(WORDS, k=n_words))


def line(name, number, prompt, chosen, rejected):
    """A line of data/fetch.py for math or code."""
    domain = {"math-step-dpo": "math", "code-preference-pairs": "code"}[name]
    return {"id": f"{name}/{number}", "source": name, "domain": domain, "prompt": prompt, "chosen": chosen,
            "rejected": rejected}


def talk(number, own, chosen, rejected):
    """A line of data/fetch.py for skywork: conversations as lists of texts, the user's first."""
    chosen, rejected = ([{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(side)]
                        for side in (chosen, rejected))
    return {"id": f"skywork-80k/{number}", "source": own, "domain": "chat", "chosen": chosen, "rejected": rejected}


def save(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def run(out, **options):
    """(the distillation part's pairs, the RL part's, mix.json) of a mix."""
    mix.main(mix.Config(out=str(out), **options))
    files = [out / "distill.jsonl", out / "rl.jsonl"]
    parts = [read_pairs(file) if file.exists() else [] for file in files]
    return *parts, json.loads((out / "mix.json").read_text())


def dropped(record):
    """{row: its dropped counts} of a mix.json, rows without any left out."""
    return {row["source"]: row["dropped"] for row in record["table"] if row["dropped"]}


def unswapped(pair):
    return pair if pair.winner == "a" else swapped(pair)


# ---- words and n-grams

def test_words_and_plain_text_by_hand():
    assert grams.words("Don't  STOP,\n(x_1+y)= ² ｆｕｌｌ") == ["don", "t", "stop", "x_1", "y", "2", "full"]
    assert grams.words("你好 world再见") == ["你", "好", "world", "再", "见"]
    assert grams.words("?! 🙂") == []
    assert grams.plain(" e\u0301\u00a0x\r\n\ty ") == "é x y"
    assert grams.plain("x²") != grams.plain("x2")          # NFC: an exponent stays one
    assert grams.digest("é") == int.from_bytes(hashlib.blake2b(b"\xc3\xa9", digest_size=8).digest(), "big")


def tuples(content, n):
    """A text's n-grams as Python's own sets, from words split here."""
    found = content.lower().split()
    n = min(n, len(found))
    return {tuple(found[k:k + n]) for k in range(len(found) - n + 1)}


@pytest.mark.parametrize("n", [1, 2, 5])
def test_grams_and_jaccard_against_sets_of_tuples(n):
    rng = random.Random(n)
    for _ in range(60):
        one = text(rng, rng.choice([1, 2, 3, 8, 40]))
        other = " ".join(rng.choice([word, "zzz"]) if rng.random() < 0.2 else word for word in one.split())
        wanted = [tuples(content, n) for content in (one, other)]
        found = [grams.grams(content, n) for content in (one, other)]
        assert [len(x) for x in found] == [len(x) for x in wanted]
        assert grams.jaccard(*found) == len(wanted[0] & wanted[1]) / len(wanted[0] | wanted[1])
    assert len(grams.grams("", n)) == 1 and grams.jaccard(grams.grams("", n), grams.grams("x", n)) == 0


def test_bands_agree_as_often_as_the_jaccard_similarity_says():
    """Oracle: 1 - (1 - J^5)^25 for sets of 400 numbers that share 2 J / (1 + J) of them; 300 draws, 4.5 deviations."""
    rng = np.random.default_rng(0)
    for similarity in (0.3, 0.5, 0.6, 0.8):
        n_shared = round(400 * 2 * similarity / (1 + similarity))
        hits = 0
        for _ in range(300):
            numbers = rng.integers(0, 2**64, 800 - n_shared, dtype=np.uint64)
            hits += (grams.bands(numbers[:400]) == grams.bands(numbers[400 - n_shared:])).any()
        wanted = 1 - (1 - similarity ** 5) ** 25
        assert abs(hits / 300 - wanted) <= 4.5 * (wanted * (1 - wanted) / 300) ** 0.5 + 0.002, similarity


def test_bands_of_a_long_text_do_not_depend_on_the_blocks(monkeypatch):
    gram_set = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    whole = grams.bands(gram_set)
    monkeypatch.setattr(grams, "BLOCK", 7)
    assert (grams.bands(gram_set) == whole).all() and (grams.bands(gram_set[::-1]) == whole).all()


def edited(rng, content, rate):
    return " ".join(rng.choice(WORDS) if rng.random() < rate else word for word in content.split())


def test_near_duplicates_are_those_of_true_jaccard_similarity(tmp_path):
    """Oracle: every pair of pairs compared by sets of tuples of words, the first that stays taking the later ones.
    The edits put a third of the similarities between 0.6 and 0.9, so that a wrong threshold shows."""
    rng = random.Random(1)
    records, wanted, stay = [], [], []
    for number in range(220):
        if number % 4 == 0:
            base = [text(rng, n) for n in (40, 120, 120)]
        rates = [rng.choice([0, 0.01, 0.02, 0.03]) for _ in base]
        records.append(line("math-step-dpo", number, *(edited(rng, part, rate) for part, rate in zip(base, rates))))
    similarities = []
    for record in records:
        of_prompt = tuples(record["prompt"], 5)
        of_answers = tuples(record["chosen"], 5) | tuples(record["rejected"], 5)
        like = [min(len(of_prompt & prompt) / len(of_prompt | prompt),
                    len(of_answers & answers) / len(of_answers | answers)) for prompt, answers in stay]
        similarities += [s for s in like if s > 0.1]
        if max(like, default=0) >= 0.8:
            wanted.append(record["id"])
        else:
            stay.append((of_prompt, of_answers))
    assert 0.2 < np.mean([0.6 < s < 0.9 for s in similarities]) and 30 < len(wanted) < 150
    distilled, rl, record = run(tmp_path / "out", math=save(tmp_path / "m.jsonl", records))
    exact = dropped(record)["all"].get("duplicate", 0)
    assert dropped(record)["all"]["near duplicate"] + exact == len(wanted)
    assert {pair.id for pair in distilled + rl} == {r["id"] for r in records} - set(wanted)
    example = record["examples"]["near duplicate"][0]
    assert example["id"] in wanted and example["why"].removeprefix("much like ") not in wanted


def test_a_long_shared_text_does_not_make_two_questions_alike(tmp_path):
    """A document with two questions: prompts 0.97 alike, answers not at all; and one answer under two prompts."""
    rng = random.Random(0)
    document, one, other = text(rng, 500), text(rng, 30), text(rng, 30)
    path = save(tmp_path / "m.jsonl", [line("math-step-dpo", 1, document + " why", one, "x"),
                                       line("math-step-dpo", 2, document + " how", other, "y"),
                                       line("math-step-dpo", 3, text(rng, 30), one, "x")])
    assert dropped(run(tmp_path / "out", math=path)[2]) == {}


def test_pairs_that_differ_in_their_rubric_are_different_pairs(tmp_path):
    """The same texts: with rubrics apart, they are not against each other; with one rubric, they are."""
    rng = random.Random(0)
    row = line("math-step-dpo", 0, text(rng, 40), text(rng, 40), text(rng, 40)) | {"source": "s"}
    turned = row | {"chosen": row["rejected"], "rejected": row["chosen"]}
    rows = [row | {"id": "1", "rubric": "be brief"}, turned | {"id": "2", "rubric": "be kind"}, turned | {"id": "3"},
            row | {"id": "4", "rubric": "be  brief"}, row | {"id": "5", "rubric": "be just"},
            turned | {"id": "6", "rubric": "be just"}]
    chains, pairs, record = run(tmp_path / "out", others=(f"mine:chat:{save(tmp_path / 'm.jsonl', rows)}",))
    assert {(pair.id, pair.rubric) for pair in chains + pairs} == {
        ("mine/1", "be brief"), ("mine/2", "be kind"), ("mine/3", "")}
    assert dropped(record)["mine"] == {"duplicate": 1, "contradictory": 2}


# ---- every reason, by hand

def hand_made(folder):
    """{option: file} of a pool in which each record's fate is known. Prompts are long, so that none is like another."""
    rng = random.Random(2)
    p = [text(rng, 30) for _ in range(20)]
    math = [line("math-step-dpo", 1, p[0], "right one", "wrong one"),
            line("math-step-dpo", 2, p[0].replace(" ", " \n "), "right\u00a0one ", "wrong one"),    # 1 again
            line("math-step-dpo", 3, p[1], "same", "same"),                                         # equal answers
            line("math-step-dpo", 4, p[2], "e\u0301t", "x"),
            line("math-step-dpo", 5, p[2], "x", "\u00e9t")]                                         # against 4
    code = [line("code-preference-pairs", 1, p[0], "wrong one", "right two"),                       # its own answers
            line("code-preference-pairs", 2, "see: " + " ".join(p[18].upper().split()[3:16]) + "!", "x", "y"),
            line("code-preference-pairs", 3, " ".join(p[18].split()[3:15]) + " no", "x", "y"),      # 12 words of it
            line("code-preference-pairs", 4, "Hi, you!", "x", "y"),                                 # the short one
            line("code-preference-pairs", 5, "Hi you there", "x", "y")]
    sky = [talk(1, "magpie_ultra", [p[3], "x"], [p[3], "y"]),
           talk(2, "helpsteer2", [p[4], "x"], [p[4], "y"]),
           talk(3, "helpsteer2", [p[5], p[18], "more", "x"], [p[5], p[18], "more", "y"]),               # a model
           talk(4, "offset_bias", [p[6], "x", "more", "z"], [p[6], "y", "more", "z"])]
    own = {"prompt": [{"role": "user", "content": p[7]}], "answer_a": "u", "answer_b": "v", "source": "s",
           "domain": "d"}
    mine = [{**own, "id": "x1", "winner": "b"}, {**own, "id": "x2", "winner": None},
            {**own, "id": "x3", "winner": "a", "answer_a": "v", "answer_b": "u"}]                   # x1 again
    bench = [{"prompt": p[18], "chosen": "1", "rejected": "2"}, {"prompt": "hi YOU", "chosen": "1", "rejected": "2"}]
    return {"math": save(folder / "m.jsonl", math), "code": save(folder / "c.jsonl", code),
            "skywork": save(folder / "s.jsonl", sky), "others": (f"mine:chat:{save(folder / 'own.jsonl', mine)}",),
            "benchmarks": (save(folder / "bench.jsonl", bench),)}


def test_every_reason_by_hand(tmp_path, capsys):
    distilled, rl, record = run(tmp_path / "out", **hand_made(tmp_path), distill_frac=0.3)
    wanted = {"math-step-dpo": {"equal answers": 1, "contradictory": 2, "duplicate": 1},
              "code-preference-pairs": {"benchmark": 2}, "skywork-80k/magpie_ultra": {"excluded": 1},
              "mine": {"no label": 1, "duplicate": 1}}
    total = sum((Counter(counts) for counts in wanted.values()), Counter())
    assert dropped(record) == wanted | {"all": total}
    kept = {pair.id: unswapped(pair) for pair in distilled + rl}
    assert set(kept) == {"math-step-dpo/1", *(f"code-preference-pairs/{n}" for n in (1, 3, 5)),
                         *(f"skywork-80k/{n}" for n in (2, 3, 4)), "mine/x1"}
    assert [(kept["mine/x1"].answer_a, kept["mine/x1"].source, kept["mine/x1"].domain)] == [("v", "mine", "chat")]
    assert len(kept["skywork-80k/3"].prompt) == 3 and len(kept["skywork-80k/4"].prompt) == 1
    assert kept["skywork-80k/2"].source == "helpsteer2" and kept["skywork-80k/2"].domain == "chat"

    rows = {row["source"]: row for row in record["table"]}
    shown = Counter((pair.source, pair.winner) for pair in distilled + rl)
    for row in record["table"][:-1]:
        for side in "ab":
            n_side = sum(sides[side] for sides in row["chosen_is"].values())
            assert n_side == shown[row["source"].removeprefix("skywork-80k/"), side]
    assert [row["read"] for row in record["table"]] == [5, 5, 1, 2, 1, 3, 17]
    for row in record["table"]:
        assert row["read"] == row["kept"] + sum(row["dropped"].values())
        n_shown = sum(sum(sides.values()) for sides in row["chosen_is"].values())
        assert row["kept"] == row["distill"] + row["rl"] == n_shown
    assert rows["all"]["chosen_is"] == {"single-turn": {"a": 3, "b": 3}, "multi-turn": {"a": 1, "b": 1}}
    assert (rows["all"]["distill"], rows["all"]["rl"]) == (len(distilled), len(rl))

    examples = record["examples"]
    planted = json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[0])["prompt"].split()[3:16]
    assert examples["benchmark"][0] == {"id": "code-preference-pairs/2", "prompt": f"see: {' '.join(planted).upper()}!",
                                        "why": "50% of its 13-grams stand in benchmarks, one of them in "
                                               "bench bench.jsonl/1"}
    assert examples["benchmark"][1]["why"] == (
        "100% of its 13-grams stand in benchmarks, one of them in bench bench.jsonl/2")
    assert [e["why"] for e in examples["contradictory"]] == ["against math-step-dpo/5", "against math-step-dpo/4"]
    assert [e["why"] for e in examples["duplicate"]] == ["the same as math-step-dpo/1", "the same as mine/x1"]
    printed = capsys.readouterr().out.splitlines()
    assert re.split("  +", printed[0]) == ["source", "read", "excluded", "no label", "equal answers", "benchmark",
                                           "contradictory", "duplicate", "kept", "distill", "rl", "multi-turn",
                                           "chosen is A"]
    assert printed[7].split() == f"all 17 1 1 1 2 2 2 8 {len(distilled)} {len(rl)} 2 4".split()


def test_the_benchmark_threshold_is_a_share_of_the_prompts_grams(tmp_path):
    """14 words have two 13-grams, of which one is in the benchmark."""
    options = hand_made(tmp_path)
    for max_overlap, n in ((0.49, 2), (0.5, 1), (1.0, 0)):
        record = run(tmp_path / f"out{n}", **options, max_overlap=max_overlap)[2]
        assert dropped(record)["all"].get("benchmark", 0) == n
    assert dropped(run(tmp_path / "12", **options, ngram=12)[2])["all"]["benchmark"] == 3


@needs_benchmarks
def test_prompts_of_the_real_benchmarks_are_found(tmp_path):
    """Oracle: prompts that this test takes from the raw files and puts, with words around, among made-up ones."""
    folders = [BENCHMARKS / "rmb" / "Pairwise_set", BENCHMARKS / "rm_bench" / "chat_filtered.first60.json"]
    asked = {}                                             # several records of RMB may have one prompt
    for record in json.loads((folders[0] / "Helpfulness/Rewrite/Paraphrasing.json").read_text()):
        asked.setdefault(record["conversation_input"][-1]["content"], f"rmb {record['pair_uid']}")
    chat = json.loads(folders[1].read_text())[5]
    found = pool.Benchmarks(map(str, folders), 13)
    prompt, name = list(asked.items())[3]
    assert found.overlap(f"Please help. {prompt.upper()}\nThanks.")[1] == name
    assert found.overlap(chat["prompt"]) == (1.0, f"rm-bench chat/{chat['id']}/00")
    assert found.overlap(text(random.Random(0), 50)) == (0.0, "")


# ---- lengths

@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.write_tokenizer(folder)
    return folder


def test_lengths_are_those_of_the_prompts_as_rendered(tmp_path, tokens):
    """Oracle: chat(render()) of each pair in both orders, one by one. Prompts differ by a token or two, so the limit
    falls among them; every second one is a conversation."""
    rng = random.Random(3)
    starts = [[text(rng, 30), *["a", "b"] * (n % 2)] for n in range(60)]
    records = [talk(n, "helpsteer2", [*start, f"x{n}"], [*start, f"y{n}"]) for n, start in enumerate(starts)]
    path = save(tmp_path / "s.jsonl", records)
    tokenizer, prompt = Tokenizer(tokens), load_prompt("instruct")
    everything = sum(run(tmp_path / "all", skywork=path)[:2], [])
    longest = {pair.id: max(len(tokenizer.chat(render(prompt, p))) for p in (pair, swapped(pair)))
               for pair in everything}
    limit = sorted(longest.values())[30]
    distilled, rl, record = run(tmp_path / "out", skywork=path, tokenizer=str(tokens), max_prompt_tokens=limit)
    assert {pair.id for pair in distilled + rl} == {name for name, n in longest.items() if n <= limit}
    example = record["examples"]["too long"][0]
    assert example["why"] == f"{longest[example['id']]} tokens"
    messages = [render(prompt, pair) for pair in everything]
    assert tokenizer.lengths(messages) == [len(tokenizer.chat(m)) for m in messages]


def test_a_pair_that_is_too_long_in_the_other_order_alone_is_dropped(tmp_path, tokens, monkeypatch):
    """Oracle: lengths of 40 tokens as first shown and 41 with the answers exchanged, against limits of 40 and 41."""
    path = save(tmp_path / "m.jsonl", [line("math-step-dpo", 1, "q", "good", "poor"),
                                       line("math-step-dpo", 2, "q2", "", "poor")])
    monkeypatch.setattr(Tokenizer, "lengths", lambda self, messages: [
        40 + ("2" not in m[-1]["content"] and m[-1]["content"].index("poor") < m[-1]["content"].index("good"))
        for m in messages])
    monkeypatch.setattr(pool, "render", lambda prompt, pair: [
        {"content": f"{pair.prompt} {pair.answer_a} {pair.answer_b}"}])
    for limit, ids in ((40, ["math-step-dpo/2"]), (41, ["math-step-dpo/1", "math-step-dpo/2"])):
        distilled, rl, _ = run(tmp_path / f"{limit}", math=path, tokenizer=str(tokens), max_prompt_tokens=limit)
        assert sorted(pair.id for pair in distilled + rl) == ids


# ---- order and parts

def test_order_is_balanced_in_every_cell_part_and_pool():
    """Oracle: counting, for 300 random pools of up to 6 rows: A and B differ by at most the odd pair. And it is drawn:
    over the seeds every pair is shown either way."""
    rng = random.Random(0)
    for seed in range(300):
        cells = [(row, multi, part) for row in range(rng.randint(1, 6)) for multi in (0, 1) for part in (False, True)]
        where = np.array([cell for cell in cells for _ in range(rng.randint(0, 5))] or [(0, 0, True)])
        row_n, is_multi, is_distill = where.T
        is_first = mix.chosen_first(is_distill > 0, row_n, is_multi, np.random.default_rng(seed))
        groups = [np.ones(len(where), bool), is_distill == 0, is_distill == 1]
        groups += [(row_n == row) & (is_multi == multi) & here for row, multi, _ in cells for here in groups[:3]]
        for group in groups:
            assert abs(2 * is_first[group].sum() - group.sum()) == group.sum() % 2
    draws = [mix.chosen_first(np.array([True, False, False]), np.zeros(3, int), np.zeros(3, int),
                              np.random.default_rng(seed)) for seed in range(60)]
    assert all(0.2 < share < 0.8 for share in np.mean(draws, axis=0))


def test_the_example_of_the_docstring():
    cells = re.findall(r"^ +(\w[\w, ]*?) +(\d+) +(\d+) +(\d+) and +(\d+)$", mix.chosen_first.__doc__, re.M)
    (*rows, (_, *total)) = [(name, *map(int, numbers)) for name, *numbers in cells]
    assert len(rows) == 3
    names = {name: (0, 0) if name == "chat" else (0, 1) if name == "chat, turns" else (1, 0) for name, *_ in rows}
    where = np.array([(*names[name], part) for name, n_distill, n_rl, *_ in rows
                      for part, n in ((1, n_distill), (0, n_rl)) for _ in range(n)])
    row_n, is_multi, part = where.T
    found = []
    for seed in range(20):
        is_first = mix.chosen_first(part == 1, row_n, is_multi, np.random.default_rng(seed))
        found.append([tuple(int(is_first[(row_n == row) & (is_multi == multi) & (part == p)].sum()) for p in (1, 0))
                      for row, multi in names.values()])
        assert [int(is_first[part == p].sum()) for p in (1, 0)] == total[2:]
    assert [(row[3], row[4]) for row in rows] in found
    assert total == [sum(row[k] for row in rows) for k in (1, 2, 3, 4)]


def test_split_takes_whole_questions_and_each_rows_share():
    """Oracle: counting. 1,000 pairs of 3 rows, questions of one to four pairs, some in two rows."""
    rng = np.random.default_rng(0)
    question_n, row_n = rng.integers(0, 500, 1000).astype(np.uint64), rng.integers(0, 3, 1000)
    is_distill = mix.split(question_n, row_n, 0.12, np.random.default_rng(1))
    assert not set(question_n[is_distill]) & set(question_n[~is_distill])
    for row in range(3):
        assert is_distill[row_n == row].sum() == np.floor((row_n == row).sum() * 0.12 + 0.5)
    assert (is_distill != mix.split(question_n, row_n, 0.12, np.random.default_rng(2))).any()
    assert not mix.split(question_n, row_n, 0.0, rng).any() and mix.split(question_n, row_n, 1.0, rng).all()
    one = mix.split(np.zeros(10, np.uint64), np.zeros(10, int), 0.12, rng)
    assert not one.any()                                   # one question is not torn apart


def test_questions_of_a_pool_are_on_one_side(tmp_path):
    """The same first question in two sources, in other letters and punctuation, alone and at the head of a talk."""
    rng = random.Random(4)
    questions = [text(rng, 12) for _ in range(40)]
    math = [line("math-step-dpo", n, q, f"m{n}", f"w{n}") for n, q in enumerate(questions)]
    sky = [talk(n, "helpsteer2", [q.upper() + "?", f"a{n}", f"b{n}", f"c{n}"], [q.upper() + "?", f"a{n}", f"b{n}", "d"])
           for n, q in enumerate(questions)]
    distilled, rl, _ = run(tmp_path / "out", math=save(tmp_path / "m.jsonl", math), distill_frac=0.5,
                           skywork=save(tmp_path / "s.jsonl", sky))
    firsts = [{pair.prompt[0]["content"].lower().strip("?") for pair in part} for part in (distilled, rl)]
    assert len(distilled) == len(rl) == 40 and len(firsts[0]) == len(firsts[1]) == 20 and not firsts[0] & firsts[1]


def varied(folder, n=120):
    """{option: file} of a pool in which nothing is dropped."""
    rng = random.Random(5)
    sky = [talk(k, ("helpsteer2", "wildguard")[k % 2], [text(rng, 9), *[text(rng, 3), text(rng, 4)] * (k % 3 > 0),
                                                        text(rng, 6)], [text(rng, 9), text(rng, 6)])
           for k in range(n)]
    for record in sky:
        record["rejected"][:-1] = record["chosen"][:-1]
    mine = [{"prompt": text(rng, 9), "chosen": text(rng, 5), "rejected": text(rng, 5)} for _ in range(n)]
    math = [line("math-step-dpo", k, text(rng, 9), text(rng, 6), text(rng, 6)) for k in range(n)]
    return {"skywork": save(folder / "s.jsonl", sky), "math": save(folder / "m.jsonl", math),
            "others": (f"one:chat:{save(folder / 'one/b.jsonl', mine[:n // 3])}",
                       f"two::{save(folder / 'two/a.jsonl', mine[n // 3:])}")}


def test_nothing_but_the_label_tells_the_two_orders_apart(tmp_path):
    """Each pair that comes out is one that went in, answers exchanged or not; and rendered either way it is the same
    text once the answers are put in each other's place. In the original pool a talk's heading told them apart."""
    options = varied(tmp_path)
    went_in = {}
    for path in (options["math"], options["skywork"]):
        went_in |= {pair.id: unswapped(pair) for pair in read_pairs(path)}
    for name, domain, path in (text.split(":", 2) for text in options["others"]):
        went_in |= {f"{name}/{pair.id}": replace(unswapped(pair), id=f"{name}/{pair.id}", source=name, domain=domain)
                    for pair in read_pairs(path)}
    distilled, rl, _ = run(tmp_path / "out", **options)
    prompt = load_prompt("instruct")
    n_checked = Counter()
    for pair in distilled + rl:
        assert unswapped(pair) == went_in[pair.id]
        marked = replace(pair, answer_a="\x01", answer_b="\x02")
        shown, other = render(prompt, marked), render(prompt, swapped(marked))
        exchanged = other[-1]["content"].translate({1: "\x02", 2: "\x01"})
        assert shown[:-1] == other[:-1] and shown[-1]["content"] == exchanged
        n_checked[len(pair.prompt) > 1, pair.winner] += 1
    assert sum(n_checked.values()) == 360 and min(n_checked.values()) >= 40
    assert len({pair.source for pair in rl[:20]}) >= 3   # shuffled
    for part in (distilled, rl):                # neither the place in the file nor the id tells the label
        labels = "".join(pair.winner for pair in part)
        assert "aa" in labels and "bb" in labels
        assert abs(labels[::2].count("a") - labels[1::2].count("a")) < 5 * len(labels) ** 0.5 / 2


def test_the_seed_alone_decides(tmp_path, monkeypatch):
    """The same bytes with sources named in another order and a folder listed in another; others with another seed."""
    options = varied(tmp_path)
    both = {"others": (f"mine:chat:{tmp_path / 'both'}", *options["others"])}
    for name in ("b.jsonl", "a.jsonl"):
        rng = random.Random(name)
        save(tmp_path / "both" / name, [{"prompt": text(rng, 9), "chosen": text(rng, 5), "rejected": text(rng, 5)}
                                        for _ in range(20)])
    first = run(tmp_path / "first", **options | both)
    listing = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(sorted(listing(self, pattern))))
    again = run(tmp_path / "again", **options | {"others": both["others"][::-1]})
    for name in ("distill.jsonl", "rl.jsonl"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert first[2]["table"] == again[2]["table"] and first[2]["inputs"] == again[2]["inputs"]
    other = run(tmp_path / "other", **options | both, seed=1)
    assert {p.id for p in other[0]} != {p.id for p in first[0]} and other[2]["seed"] == 1
    winners = [{pair.id: pair.winner for pair in found[0] + found[1]} for found in (first, other)]
    n_other = sum(winner != winners[1][name] for name, winner in winners[0].items())
    assert winners[0].keys() == winners[1].keys() and 100 < n_other < 300


def test_mix_json_names_the_inputs(tmp_path):
    """Oracle: sha256sum."""
    options = hand_made(tmp_path)
    record = run(tmp_path / "out", **options)[2]
    paths = [options["math"], options["code"], options["skywork"], options["others"][0].split(":", 2)[2],
             *options["benchmarks"]]
    assert list(record["inputs"]) == paths
    said = subprocess.run(["sha256sum", *paths], capture_output=True, text=True, check=True).stdout.split()[::2]
    assert [entry["sha256"] for entry in record["inputs"].values()] == said
    assert record["options"]["math"] == paths[0] and record["options"]["near"] == 0.8 and record["seed"] == 0
    assert {f.name for f in (tmp_path / "out").iterdir()} <= {"distill.jsonl", "mix.json", "rl.jsonl"}


def test_draws_of_code_and_the_limit(tmp_path):
    """Oracle: by hand: 40 of 90 code pairs; then 51 of 40 + 60, by largest remainder 20.4 and 30.6."""
    rng = random.Random(6)
    code = [line("code-preference-pairs", n, text(rng, 9), text(rng, 6), text(rng, 6)) for n in range(90)]
    math = [line("math-step-dpo", n, text(rng, 9), text(rng, 6), text(rng, 6)) for n in range(60)]
    options = {"code": save(tmp_path / "c.jsonl", code), "math": save(tmp_path / "m.jsonl", math), "n_code": 40}
    table = run(tmp_path / "a", **options)[2]["table"]
    assert [row["kept"] for row in table] == [60, 40, 100] and table[1]["dropped"] == {"not drawn": 50}
    distilled, rl, record = run(tmp_path / "b", **options, limit=51)
    assert [row["kept"] for row in record["table"]] == [31, 20, 51]
    numbers = [int(pair.id.split("/")[1]) for pair in distilled + rl if pair.source.startswith("code")]
    assert len(set(numbers)) == 20 and max(numbers) > 60    # drawn, not the first
    assert mix.shares([10, 0, 3, 7], 5) == [2, 0, 1, 2] and mix.shares([1, 1, 1], 2) == [1, 1, 0]


def test_no_distillation_part_if_none_is_wanted(tmp_path, capsys):
    _, rl, record = run(tmp_path / "out", **varied(tmp_path), distill_frac=0.0)
    assert len(rl) == 360 == record["table"][-1]["rl"] and not (tmp_path / "out" / "distill.jsonl").exists()
    assert "distill.jsonl: not written: no question fell to it" in capsys.readouterr().out


# ---- memory

def test_texts_are_not_held(tmp_path):
    """Four times the texts add less than a tenth of what they add on disk to the most that is held at once."""
    rng = random.Random(0)
    long = [text(rng, 4000) for _ in range(4)]

    def peak(n):
        path = save(tmp_path / f"{n}.jsonl", (line("math-step-dpo", k, text(rng, 20), f"{k} {long[k % 4]}",
                                                   f"{long[k % 3]} {k}") for k in range(n)))
        tracemalloc.start()
        mix.main(mix.Config(math=path, out=str(tmp_path / f"out{n}")))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held, Path(path).stat().st_size
    (few, few_bytes), (many, many_bytes) = peak(6), peak(30)
    assert many_bytes - few_bytes > 7e5 and many - few < (many_bytes - few_bytes) / 10, (few, many)


# ---- mistakes

GOOD = line("math-step-dpo", 1, "q", "x", "y")
READY = {"context_messages": [{"role": "user", "content": "Q, A, B"}], "winner": "model_a"}


@pytest.mark.parametrize("option, records, message", [
    ("math", [line("code-preference-pairs", 1, "q", "x", "y")], ":1: not a line of data/fetch.py's math-step-dpo"),
    ("skywork", [GOOD], ':1: not a line of data/fetch.py\'s skywork-80k.jsonl, its keys are "id", "source"'),
    ("math", [GOOD, {key: GOOD[key] for key in GOOD if key != "rejected"}], ":2: not a line of"),
    ("math", [GOOD, {**GOOD, "id": "2", "chosen": 3}], ':2: "chosen" is an integer'),
    ("math", [GOOD, GOOD], ':2: id "math-step-dpo/1" is also at'),
    ("math", [], "no records: give a file or folder"),
    ("others", [READY], ":1: a ready-made prompt, whose answers cannot change places"),
])
def test_bad_sources_are_told_in_one_line(tmp_path, option, records, message):
    path = save(tmp_path / "x.jsonl", records)
    value = (f"mine:chat:{path}",) if option == "others" else path
    with pytest.raises(ValueError) as error:
        run(tmp_path / "new" / "out", **{option: value})
    assert str(error.value).startswith(path) and message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new" / "out").exists() and not list(tmp_path.glob("**/*.tmp"))


def test_skip_bad_counts_the_records(tmp_path, capsys):
    path = Path(save(tmp_path / "x.jsonl", [GOOD]))
    path.write_text("\n".join(["x", json.dumps(GOOD), '{"id": 1}', json.dumps({**GOOD, "id": "2", "prompt": "r"}),
                               "{broken"]))
    _, rl, record = run(tmp_path / "out", math=str(path), skip_bad=True)
    assert record["table"][0]["read"] == 5 and record["table"][0]["dropped"] == {"bad record": 3}
    assert len(rl) == record["table"][0]["kept"] == 2
    assert f"{path}: skipped 3 bad records of 5" in capsys.readouterr().err


def test_a_ready_made_benchmark_and_a_prompt_without_turns_are_refused(tmp_path, tokens):
    path = save(tmp_path / "m.jsonl", [GOOD])
    with pytest.raises(ValueError, match="a ready-made prompt, which does not say"):
        run(tmp_path / "out", math=path, benchmarks=(save(tmp_path / "b.jsonl", [READY]),))
    (tmp_path / "short.txt").write_text("[user]\n{question}\n{answer_a}\n{answer_b}\n")
    sky = save(tmp_path / "s.jsonl", [talk(1, "helpsteer2", ["q", "a", "b", "c"], ["q", "a", "b", "d"])])
    with pytest.raises(ValueError, match=r"s.jsonl:1: a conversation, and the prompt .* has no section"):
        run(tmp_path / "out", skywork=sky, tokenizer=str(tokens), prompt=str(tmp_path / "short.txt"))
    told = save(tmp_path / "t.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", "rubric": "r"}])
    with pytest.raises(ValueError, match=r"t.jsonl:1: a pair with a rubric, and the prompt .* has no section \[rubric\]"):
        run(tmp_path / "out", others=(f"mine:chat:{told}",), tokenizer=str(tokens), prompt=str(tmp_path / "short.txt"))
    with pytest.raises(ValueError, match="no pair is left"):
        run(tmp_path / "out", math=save(tmp_path / "e.jsonl", [{**GOOD, "chosen": "y"}]))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("words, message", [
    ("", "nothing to mix: give --math, --code, --skywork or --others"),
    ("--math m.jsonl --nope 1", "unrecognized arguments: --nope 1"),
    ("--math nowhere.jsonl", "nowhere.jsonl: no such file or folder"),
    ("--math m.jsonl --others mine:m.jsonl", "--others: 'mine:m.jsonl' is not NAME:DOMAIN:FILE"),
    ("--math m.jsonl --others a::m.jsonl a::m.jsonl", "the name 'a' is taken"),
    ("--math m.jsonl --others math-step-dpo:x:m.jsonl", "the name 'math-step-dpo' is taken"),
    ("--math m.jsonl --near 0.2", "--near must be from 0.5 to 1"),
    ("--math m.jsonl --distill-frac nan", "--distill-frac must be from 0 to 1"),
    ("--math m.jsonl --ngram 0", "--ngram must be at least 1"),
    ("--math m.jsonl --max-prompt-tokens 9", "they need --tokenizer"),
    ("--math m.jsonl --tokenizer nowhere", "no tokenizer.json there"),
    ("--math m.jsonl --benchmarks nowhere", "nowhere: no such file or folder"),
    ("--math m.jsonl --out .", ".: is already there; choose another --out"),
    ("--math m.jsonl --out m.jsonl/x", "m.jsonl: is a file, where --out needs a folder"),
])
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, words, message):
    import runpy
    save(tmp_path / "m.jsonl", [GOOD])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mix.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "data" / "mix.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said, said
    assert [f.name for f in tmp_path.iterdir()] == ["m.jsonl"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    options = varied(tmp_path, 20)
    before = sorted(tmp_path.rglob("*"))
    for step in ("drop_near", "write_part", "as_text"):
        with monkeypatch.context() as patch:
            patch.setattr(mix, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                mix.main(mix.Config(out=str(tmp_path / "out"), **options))
        if step != "as_text":                  # by then all is written
            assert sorted(tmp_path.rglob("*")) == before
    assert len(read_pairs(tmp_path / "out" / "rl.jsonl")) + len(read_pairs(tmp_path / "out" / "distill.jsonl")) == 60
