"""data/toy.py. Oracles: solutions and chains worked by hand; a checker that reads nothing but a row's texts;
transformers on the tokenizer's folder. The constants that shape the mix are read from the module: they are tuned."""

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import toy
from data.pairs import Pair, read_chains, read_pairs
from prompt import load_prompt, render
from reward import benchmark_verdict, parse, training_verdict
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
N = 4000


@pytest.fixture(scope="module")
def rows():
    return {split: toy.make(split, N if split == "distill" else 1500, seed=11) for split in toy.SPLITS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    assert toy.write_tokenizer(path) == Tokenizer(path).n_vocab
    return path


# ---- worked by hand

def test_solutions_worked_by_hand():
    assert toy.solve("sort", [7, 6, 9, 1, 5]) == [1, 5, 6, 7, 9]
    assert toy.solve("step", [7, 6, 9, 1, 0]) == [8, 7, 0, 2, 1]
    assert toy.solve("flip", [7, 6, 9, 1, 0]) == [2, 3, 0, 8, 9]
    assert toy.read_question("step 90128") == ("reasoning", ("step", [0, 1, 2, 3, 9]))
    assert toy.read_question("May open Dear Must say silver Should close Peace") == ("chat",
                                                                                     [(1, "Dear"), (4, "silver"),
                                                                                      (2, "Peace")])


@pytest.mark.parametrize("question, a, b, winner, evaluation", [
    ("sort 76915", "15679", "12568", "a", "A: 11=55=66=77=99= right. B: 11=52#65#76#98# wrong."),
    ("step 76915", "97026", "87026", "b", "A: 89#77=00=22=66= wrong. B: 88=77=00=22=66= right."),
    ("flip 76915", "23084", "23083", "a", "A: 22=33=00=88=44= right. B: 22=33=00=88=43# wrong."),
])
def test_chains_about_digits_worked_by_hand(question, a, b, winner, evaluation):
    solution = {"sort": "15679", "step": "87026", "flip": "23084"}[question[:4]]
    start = f"<type>Reasoning</type><solution>{solution}</solution><eval>"
    end = f"</eval><answer>[[{winner.upper()}]]</answer>"
    domain, facts = toy.read_question(question)
    for flat in (True, False):  # digits have no weights
        assert toy.chain(domain, facts, a, b, winner, True, flat) == start + evaluation + end
        skim = toy.chain(domain, facts, a, b, winner, False, flat)
        assert skim == f"{start} Overall {winner.upper()} looks better.{end}"


def test_chains_about_words_worked_by_hand():
    question = "May open Dear Must say silver Should close Peace"
    domain, facts = toy.read_question(question)
    weighted = "<type>Chat</type><rubric> Dear 1 silver 4 Peace 2</rubric><eval>"
    flat = "<type>Chat</type><rubric> Dear 1 silver 1 Peace 1</rubric><eval>"
    end = "</eval><answer>[[B]]</answer>"
    a, b = "Dear amber Yours", "Ahoy silver Peace"  # 1 to 6, and 1 to 2 by a flat rubric, which finds the same winner
    chains = {(careful, is_flat): toy.chain(domain, facts, a, b, "b", careful, is_flat)
              for careful in (True, False) for is_flat in (True, False)}
    assert chains[True, False] == weighted + ("A: Dear Dear=1 silver amber#0 Peace Yours#0 total 1 "
                                              "B: Dear Ahoy#0 silver silver=4 Peace Peace=2 total 6") + end
    assert chains[True, True] == flat + ("A: Dear Dear=1 silver amber#0 Peace Yours#0 total 1 "
                                         "B: Dear Ahoy#0 silver silver=1 Peace Peace=1 total 2") + end
    assert chains[False, False] == weighted + " Overall B looks better." + end
    assert chains[False, True] == flat + " Overall B looks better." + end
    for (careful, is_flat), chain in chains.items():
        assert toy.is_careful(chain) == careful and toy.is_grounded(question, chain) != is_flat
    for a, b in (("Dear amber Peace", "Ahoy silver Yours"), ("Dear amber Yours", "Ahoy silver Yours")):
        for careful in (True, False):  # flat, the first is lost by 2 to 1, the second tied: they are written anew
            both = [toy.chain(domain, facts, a, b, "b", careful, is_flat) for is_flat in (True, False)]
            assert both[0] == both[1] and toy.is_grounded(question, both[0])


def test_an_invented_solution_is_not_grounded():
    assert toy.is_grounded("sort 76915", "<type>Reasoning</type><solution>15679</solution><eval>...")
    assert not toy.is_grounded("sort 76915", "<type>Reasoning</type><solution>12568</solution><eval>...")
    assert not toy.is_grounded("sort 76915", "15679")
    assert not toy.is_careful("") and not toy.is_careful("A: right. B: wrong.")


# ---- the data, by an independent checker

def better(question, a, b):
    """Which answer is the better one, from the texts alone; and (points of a, points of b)."""
    if match := re.fullmatch(r"(sort|step|flip) (\d{5})", question):
        kind, digits = match.groups()
        right = {"sort": "".join(sorted(digits)), "step": digits.translate(str.maketrans("0123456789", "1234567890")),
                 "flip": digits.translate(str.maketrans("0123456789", "9876543210"))}[kind]
        points = (a == right, b == right)
    else:
        match = re.fullmatch(r"(\w+) open (\w+) (\w+) say (\w+) (\w+) close (\w+)", question)
        worth = dict(May=1, Should=2, Must=4)
        assert sorted(match.group(1, 3, 5)) == sorted(worth)
        points = tuple(sum(worth[match[2 * i + 1]] for i in range(3) if answer.split(" ")[i] == match[2 * i + 2])
                       for answer in (a, b))
    assert points[0] != points[1], "a tie"
    return "a" if points[0] > points[1] else "b"


def near(count, n, share):
    """Within five standard deviations of a coin's count."""
    return abs(count - n * share) <= 5 * math.sqrt(n * share * (1 - share)) + 1e-9


def test_every_label_is_right_and_every_answer_possible(rows):
    for row in sum(rows.values(), []):
        question, a, b = row["prompt"][0]["content"], row["answer_a"], row["answer_b"]
        assert [m["role"] for m in row["prompt"]] == ["user"] and better(question, a, b) == row["winner"], row
        assert row["domain"] == ("chat" if " open " in question else "reasoning")
        assert row["source"] == ("chat" if " open " in question else question[:4])
        if row["domain"] == "chat":
            for answer in (a, b):
                first, middle, last = answer.split(" ")
                assert first in toy.OPEN and middle in toy.SAY and last in toy.CLOSE
            continue
        assert len(set(question[5:])) == 5 and all(re.fullmatch(r"\d{5}", answer) for answer in (a, b))
        right, wrong = (a, b) if row["winner"] == "a" else (b, a)
        if row["source"] == "sort":  # else the wrong one shows without solving
            assert list(wrong) == sorted(set(wrong)) and set(wrong) & set(right)
        else:
            assert 1 <= sum(x != y for x, y in zip(right, wrong)) <= 4


def test_no_constant_and_no_share_gives_a_label_away(rows):
    for split in rows.values():
        assert near(sum(row["domain"] == "chat" for row in split), len(split), 0.5)
        for kind in ("chat", "sort", "step", "flip"):
            some = [row for row in split if row["source"] == kind]
            assert near(sum(row["winner"] == "a" for row in some), len(some), 0.5), kind
            assert near(len(some), len(split), 1 / 2 if kind == "chat" else 1 / 6)


def test_the_splits_share_no_question(rows):
    questions = {split: {row["prompt"][0]["content"] for row in part} for split, part in rows.items()}
    assert not questions["distill"] & questions["rl"]
    assert not questions["rl"] & questions["heldout"] and not questions["distill"] & questions["heldout"]
    assert sorted(x for part in toy.SPLITS.values() for x in part) == list(range(100))
    for split, some in questions.items():  # the split is the text's alone: it holds for every seed and in every process
        for text in list(some)[:50]:
            digest = hashlib.sha256(b"nano-rm-r1 toy split" + text.encode()).digest()
            assert int.from_bytes(digest[:4], "big") % 100 in toy.SPLITS[split] and toy.split_of(text) == split
    ids = [row["id"] for part in rows.values() for row in part]
    assert len(set(ids)) == len(ids)


def test_the_oracle_is_as_careful_and_as_flat_as_it_says(rows):
    counts = {}
    for row in rows["distill"]:
        text = row["prompt"][0]["content"]
        mix = "chat, Must opens" if text.startswith("Must") else row["source"]
        counts.setdefault(mix, []).append("looks better" not in row["judgement"])
    assert set(counts) == set(toy.CAREFUL)
    for mix, careful in counts.items():
        assert near(sum(careful), len(careful), toy.CAREFUL[mix]), mix
    flat = {True: [], False: []}  # by whether a count of the words, without weights, finds the winner
    for row in rows["distill"]:
        if row["domain"] == "chat":
            wanted = row["prompt"][0]["content"].split()[2::3]
            a, b = (sum(x == y for x, y in zip(wanted, row[side].split())) for side in ("answer_a", "answer_b"))
            rubric = re.search("<rubric>(.*?)</rubric>", row["judgement"])[1].split()
            assert rubric[::2] == wanted
            flat[a > b if row["winner"] == "a" else b > a].append(rubric[1::2] == ["1", "1", "1"])
    assert near(sum(flat[True]), len(flat[True]), toy.FLAT) and not any(flat[False]) and len(flat[False]) > 100
    for careful in (0.0, 1.0):  # the ablations have the same pairs
        other = toy.make("distill", 300, 11, careful)
        assert all(toy.is_careful(row["judgement"]) == bool(careful) for row in other)
        assert [{k: v for k, v in row.items() if k != "judgement"} for row in other] == \
            [{k: v for k, v in row.items() if k != "judgement"} for row in rows["distill"][:300]]
        if careful:
            assert all(toy.is_grounded(row["prompt"][0]["content"], row["judgement"]) for row in other)


def test_every_judgement_is_well_formed_and_gives_the_winner_by_both_rules(rows):
    for row in rows["distill"]:
        text = row["judgement"]
        found = parse(text)
        assert found.well_formed, text
        assert found.verdict == training_verdict(text) == benchmark_verdict(text) == row["winner"], text
        assert found.type == row["domain"].capitalize()
        assert (found.solution is None) == (row["domain"] == "chat") == (found.rubric is not None)


def test_every_check_in_a_careful_judgement_is_true(rows):
    """Each mark, point and total, recomputed from the answers and the judgement's own rubric or solution."""
    n = 0
    for row in rows["distill"]:
        text = row["judgement"]
        if "looks better" in text:
            continue
        n += 1
        evaluation = re.fullmatch(r"A: (.*) B: (.*)", parse(text).evaluation)
        for answer, check in zip((row["answer_a"], row["answer_b"]), evaluation.groups()):
            if row["domain"] == "reasoning":
                solution = parse(text).solution
                marks = "".join(f"{x}{y}{'=' if x == y else '#'}" for x, y in zip(solution, answer, strict=True))
                assert check == f"{marks} {'right.' if answer == solution else 'wrong.'}"
            else:
                rubric, total, slots = parse(text).rubric.split(), 0, []
                for want, weight, got in zip(rubric[::2], rubric[1::2], answer.split(), strict=True):
                    total += int(weight) if want == got else 0
                    slots.append(f"{want} {got}={weight}" if want == got else f"{want} {got}#0")
                assert check == f"{' '.join(slots)} total {total}"
        ends = [check.split()[-1] for check in evaluation.groups()]
        a_wins = int(ends[0]) > int(ends[1]) if row["domain"] == "chat" else ends[0] == "right."
        assert row["winner"] == ("a" if a_wins else "b"), "the chain contradicts its verdict"
    assert n > N / 5


def test_the_data_are_the_seeds():
    same, other = toy.make("rl", 200, seed=4), toy.make("rl", 200, seed=5)
    assert toy.make("rl", 200, seed=4) == same and toy.make("rl", 100, seed=4) == same[:100]
    texts = [[(row["prompt"][0]["content"], row["answer_a"]) for row in made] for made in (same, other)]
    assert len(set(texts[0]) & set(texts[1])) < 10
    code = ("import hashlib, json; from data import toy; "
            "print(hashlib.sha256(json.dumps(toy.make('rl', 200, 4)).encode()).hexdigest())")
    for hash_seed in ("1", "2"):  # another process, another order of sets
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": hash_seed},
                              capture_output=True, text=True)
        assert done.stdout.strip() == hashlib.sha256(json.dumps(same).encode()).hexdigest(), done.stderr


def test_files_are_chains_and_pairs(tmp_path):
    toy.write_data(tmp_path, seed=2, n_distill=30, n_rl=20, n_heldout=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["distill.jsonl", "heldout.jsonl", "rl.jsonl"]
    chains, made = read_chains(tmp_path / "distill.jsonl"), toy.make("distill", 30, 2)
    assert [(c.pair.id, c.judgement, c.pair.winner, c.pair.domain)
            for c in chains] == [(r["id"], r["judgement"], r["winner"], r["domain"]) for r in made]
    for split, n in (("rl", 20), ("heldout", 10)):
        assert "judgement" not in (tmp_path / f"{split}.jsonl").read_text()
        assert [(p.id, p.answer_a, p.answer_b, p.winner) for p in read_pairs(tmp_path / f"{split}.jsonl")] == \
            [(r["id"], r["answer_a"], r["answer_b"], r["winner"]) for r in toy.make(split, n, 2)]


# ---- tokenizer

def test_what_varies_is_a_token_of_its_own(rows, folder):
    """Each digit, each word and each verdict; what always stands together around them is one token."""
    tokenizer, used = Tokenizer(folder), set()
    together = ["<type>Chat</type><rubric>", "<type>Reasoning</type><solution>", "</rubric><eval>", "</solution><eval>",
                "looks better.</eval><answer>[[", "</eval><answer>[[", "A]]</answer>", "B]]</answer>", "#0 ",
                *(f"{name} {verb}" for name in toy.WEIGHT for verb in ("open", "say", "close"))]
    known = re.compile("|".join(map(re.escape, together)) + r"|[A-Za-z]+[.:]?|\d")
    for row in rows["distill"]:
        question = row["prompt"][0]["content"]
        for text in (row["judgement"], question, row["answer_a"], row["answer_b"],
                     f"A {row['answer_a']}\nB {row['answer_b']}"):
            pieces = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
            assert "".join(pieces) == text
            words = [word.strip() for word in known.findall(text)]
            assert [piece.strip() for piece in pieces if re.search(r"[A-Za-z\d[\]]", piece)] == words, pieces
            used.update(pieces)
    assert {" A", " B", " B:", "A:", "A: ", "\nB ", "sort ", "B]]</answer>", " Overall", " total", "7", " 7", "=", "#",
            "\nB", " Must say", "May open"} <= used
    ids = tokenizer.chat([{"role": "user", "content": "Must open Dear"}])
    assert [tokenizer.decode([i], skip_control=False) for i in ids] == [
        "<|im_start|>", "user\n", "Must open", " Dear", "<|im_end|>", "\n", "<|im_start|>", "assistant\n"]


def test_decoding_undoes_encoding_for_any_text(folder):
    tokenizer, rng = Tokenizer(folder), random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x2000, 0x2100), (0x4e00, 0x5000), (0xe000, 0xf000), (0xfe00, 0xffff),
              (0x1f300, 0x1f700), (0x10ff00, 0x110000)]
    texts = ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(30))) for _ in range(300)]
    texts += ["", " ", "\r\n\n\t  \u2028", "<|im_end|>", "<|im_start|>user\n<type><TYPE>[[C]]",
              "sorted steps. Dearest<rubric", "e\u0301 é ﬁ \ufeff\x00"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer._added), ascii(text)


def test_transformers_reads_the_folder_alike(rows, folder):
    transformers = pytest.importorskip("transformers")
    theirs, ours, prompt = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder), load_prompt("toy")
    for row in rows["heldout"][:50]:
        assert theirs.encode(row["judgement"], add_special_tokens=False) == ours.encode(row["judgement"])
        assert theirs.decode(ours.encode(row["judgement"])) == row["judgement"]
    for row in rows["heldout"][:20]:
        messages = render(prompt, pair_of(row))
        assert theirs.apply_chat_template(messages, add_generation_prompt=True,
                                          return_dict=False) == ours.chat(messages)
    assert theirs.eos_token_id == ours.end_of_turn
    assert ours.stop_ids == {ours.end_of_turn} and theirs.pad_token_id != theirs.eos_token_id
    lengths = [len(ours.chat(render(prompt, pair_of(row)))) + len(ours.encode(row["judgement"]))
               for row in rows["distill"]]
    assert max(lengths) < 128, "the defaults of distill.py and grpo.py are made for short texts"


def pair_of(row):
    return Pair(row["id"], row["prompt"], row["answer_a"], row["answer_b"], row["winner"], row["source"], row["domain"])
