"""rank.py and judge.py --rank. Oracles: tournaments worked by hand; wins, losses and circles counted again from what
was asked and answered; an interrupted file of rankings against one written in one go."""

import json
import random
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import judge as judging  # noqa: E402
from data.pairs import Question, read_questions  # noqa: E402
from data import toy  # noqa: E402
from docs.ranking_figure import PANELS, figure  # noqa: E402
from experiments.rank_schedules import measure, share_found, simulated, toy_questions  # noqa: E402
from files import one_line_errors  # noqa: E402
from judge import Config, main  # noqa: E402
from judgements import JudgementFile  # noqa: E402
from options import parse_config  # noqa: E402
from rank import SCHEDULES, Comparison, n_comparisons, rank, rank_all, ranking, record_of, table, tally  # noqa: E402
from rank import inconsistencies, swiss_round, tournament  # noqa: E402
from test_figure import SVG, to_numbers  # noqa: E402
from test_sample import make_folder  # noqa: E402


def play(n, schedule, verdict, both_orders=False, seed=0):
    """(the rounds asked for, the Ranking) of a tournament in which verdict(i, j) says who wins, i being A."""
    rounds, contest, answered = [], tournament(n, schedule, both_orders, seed), None
    try:
        while True:
            rounds.append(contest.send(answered))
            answered = [verdict(i, j) for i, j in rounds[-1]]
    except StopIteration as end:
        return rounds, end.value


def lower(i, j):
    """The verdict of a judge who prefers the lower number."""
    return "a" if i < j else "b"


# ---- tournaments


def test_a_ranking_worked_by_hand():
    """0 beats 1, 1 beats 2, 2 beats 0: a circle; 3 loses to 0 and 1, and has no verdict against 2. So 0 has 2 wins and
    1 loss of 3, as has 1; 2 has 1 and 1 and a tie; 3 none, 2 losses and a tie."""
    won = {(0, 1): 0, (1, 2): 1, (0, 2): 2, (0, 3): 0, (1, 3): 1, (2, 3): None}

    def verdict(i, j):
        winner = won[min(i, j), max(i, j)]
        return None if winner is None else "a" if winner == i else "b"
    rounds, found = play(4, "all", verdict)
    assert len(rounds) == 1 and {frozenset(pair) for pair in rounds[0]} == {frozenset(pair) for pair in won}
    assert (found.wins, found.losses, found.comparisons) == ([2, 2, 1, 0], [1, 1, 1, 2], [3, 3, 3, 3])
    assert found.scores == [1 / 3, 1 / 3, 0, -2 / 3]
    assert (found.order, found.ties) == ([0, 1, 2, 3], [[0, 1]])
    assert found.win_rates == pytest.approx([2 / 3, 2 / 3, 1 / 2, 1 / 6])
    assert found.intervals[0] == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson's published one of 2 in 3
    assert found.intervals[2][0] + found.intervals[2][1] == pytest.approx(1)
    assert found.inconsistent["cycles"] == [(0, 1, 2)] and found.inconsistent["orders"] == []
    assert [set(pair) for pair in found.inconsistent["no_verdict"]] == [{2, 3}]
    assert found.inconsistent["triples"] == 2  # 0 1 2 and 0 1 3; the others hold the pair 2 3


def test_both_orders_make_a_win_only_if_they_agree():
    """Of 0 and 1 the judge says A in either order, of 0 and 2 it prefers 0, of 1 and 2 it lacks one verdict."""
    said = {(0, 1): "a", (1, 0): "a", (0, 2): "a", (2, 0): "b", (1, 2): "a", (2, 1): None}
    (asked,), found = play(3, "all", lambda i, j: said[i, j], both_orders=True)
    assert sorted(asked) == sorted(said)
    assert (found.wins, found.losses, found.comparisons) == ([1, 0, 0], [0, 0, 1], [2, 2, 2])
    assert (found.order, found.scores) == ([0, 1, 2], [0.5, 0, -0.5])
    faults = found.inconsistent
    assert [set(pair) for pair in faults["orders"]] == [{0, 1}]
    assert [set(pair) for pair in faults["no_verdict"]] == [{1, 2}]


def test_the_count_is_that_of_what_was_asked():
    """All sizes that matter; the schedule's number of comparisons, no pair twice, places in balance, and the numbers
    of the Ranking counted again from the verdicts."""
    for n in (2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 16, 17):
        promised = {"all": n * (n - 1) // 2, "circular": 1 if n == 2 else n,
                    "swiss": n // 2 * next(r for r in range(9) if 2 ** r >= n)}
        for schedule in SCHEDULES:
            for both_orders in (False, True):
                for seed in range(3):
                    check_count(n, schedule, both_orders, seed, promised[schedule])


def check_count(n, schedule, both_orders, seed, promised):
    rng, log = random.Random(seed), {}

    def verdict(i, j):
        log[i, j] = rng.choice(["a", "a", "b", "b", None])
        return log[i, j]
    rounds, found = play(n, schedule, verdict, both_orders, seed)
    asked = [pair for its_round in rounds for pair in its_round]
    assert len(asked) == len(log), "a pair was asked twice"
    met = {frozenset(pair) for pair in asked}
    assert len(met) == promised == n_comparisons(n, schedule) == len(asked) / (2 if both_orders else 1)
    for i in range(n):
        as_a, as_b = sum(a == i for a, _ in asked), sum(b == i for _, b in asked)
        assert abs(as_a - as_b) <= (0 if both_orders else 3 if schedule == "swiss" else 1)
        assert as_a + as_b > 0

    def preferred(i, j):
        """Who won between i and j, from the log."""
        sides = {"a": 0, "b": 1}
        judged = [pair for pair in ((i, j), (j, i)) if pair in log]
        said = [None if log[pair] is None else pair[sides[log[pair]]] for pair in judged]
        return said[0] if len(set(said)) == 1 else None
    beats = {(i, j) for i in range(n) for j in range(n) if {i, j} in met and preferred(i, j) == i}
    wins, losses = Counter(i for i, _ in beats), Counter(j for _, j in beats)
    for i in range(n):
        assert (found.wins[i], found.losses[i]) == (wins[i], losses[i])
        assert found.comparisons[i] == sum(i in pair for pair in met)
        assert found.scores[i] == (wins[i] - losses[i]) / found.comparisons[i]
    assert found.order == sorted(range(n), key=lambda i: (-found.scores[i], i))
    cycles = {t for t in permutations(range(n), 3) if t[0] == min(t)
              and {(t[0], t[1]), (t[1], t[2]), (t[2], t[0])} <= beats}
    assert set(found.inconsistent["cycles"]) == cycles and len(found.inconsistent["cycles"]) == len(cycles)
    tied = sum(len(found.inconsistent[name]) for name in ("orders", "no_verdict"))
    assert tied == len(met) - len(beats)


def test_circular_is_one_ring():
    (asked,), _ = play(9, "circular", lower, seed=5)
    assert sorted(i for i, _ in asked) == sorted(j for _, j in asked) == list(range(9)), "each once A and once B"
    after, at = dict(asked), 0
    walked = [at := after[at] for _ in range(9)]
    assert sorted(walked) == list(range(9)), "it falls into several rings"


def test_swiss_pairs_neighbours_and_finds_the_best():
    """16 answers under a perfect judge: in four rounds those who have won all meet each other, so that one is left; 0,
    the best, is it. Nobody meets one who has won two more or two less."""
    for seed in range(5):
        rounds, found = play(16, "swiss", lower, seed=seed)
        wins = Counter()
        for its_round in rounds:
            assert all(wins[i] == wins[j] or max(wins[i], wins[j]) < max(wins.values()) for i, j in its_round)
            assert all(abs(wins[i] - wins[j]) <= 1 for i, j in its_round)
            wins.update(min(pair) for pair in its_round)
        assert [len(its_round) for its_round in rounds] == [8] * 4
        assert found.order[0] == 0 and found.scores[0] == 1 and found.scores.count(1) == 1


def test_swiss_looks_further_where_neighbours_have_met():
    """0 has beaten 1, 2 has beaten 3, and 4 has beaten 5. By score, then by the ring from 0 to 5: 0 2 4 1 3 5. So 0
    meets 2, 4 meets 1, and 3 meets 5. Had these two met before (as had 0 and 4, and 1 and 2, all without a verdict,
    which leaves the order): 4 meets 3, and 1 meets 5."""
    first = [Comparison(0, 1, 0), Comparison(2, 3, 2), Comparison(4, 5, 4)]
    rng = random.Random(0)
    pairs = {frozenset(pair) for pair in swiss_round(list(range(6)), first, rng)}
    assert pairs == {frozenset(pair) for pair in ((0, 2), (4, 1), (3, 5))}
    second = first + [Comparison(3, 5, None), Comparison(0, 4, None), Comparison(1, 2, None)]
    pairs = {frozenset(pair) for pair in swiss_round(list(range(6)), second, rng)}
    assert pairs == {frozenset(pair) for pair in ((0, 2), (4, 3), (1, 5))}


def test_of_an_odd_number_each_sits_out_once_at_most():
    for n in (3, 5, 7, 9, 13):
        rounds, found = play(n, "swiss", lower, seed=n)
        assert set(found.comparisons) <= {len(rounds), len(rounds) - 1}
        assert found.comparisons.count(len(rounds) - 1) == len(rounds)


@pytest.mark.parametrize("n, n_rounds", [(8, 3), (13, 4), (16, 4), (33, 6), (64, 6)])
def test_swiss_places_under_a_judge_that_always_says_a(n, n_rounds):
    """The winners of a round were all A and meet each other, so of a power of two one is A in every round."""
    rounds, _ = play(n, "swiss", lambda i, j: "a", seed=n)
    balance = Counter()
    for its_round in rounds:
        balance.update([i for i, _ in its_round])
        balance.subtract([j for _, j in its_round])
    assert len(rounds) == n_rounds and max(map(abs, balance.values())) <= n_rounds
    if n in (8, 16, 64):
        assert max(balance.values()) == n_rounds, "the bound that the docstring gives is met"


def test_the_seed_decides_places_and_meetings_evenly():
    assert play(8, "swiss", lower, seed=3) == play(8, "swiss", lower, seed=3)
    first_rounds = [play(8, "swiss", lower, seed=seed)[0][0] for seed in range(400)]
    assert 150 < sum(any(i == 0 for i, _ in pairs) for pairs in first_rounds) < 250  # sd 10
    partners = Counter(next(sum(pair) for pair in pairs if 0 in pair) for pairs in first_rounds)
    assert sorted(partners) == [1, 2, 3, 4, 5, 6, 7] and min(partners.values()) > 30  # 57 each, sd 7


# ---- questions, judged by a judge that is known


class Known:
    """Prefers the larger number; counts how often it is called, with how many pairs."""

    def __init__(self):
        self.calls, self.seen = [], []

    def judge(self, pairs, bar=None):
        self.calls.append(len(pairs))
        self.seen += [pair.id for pair in pairs]
        for i, pair in reversed(list(enumerate(pairs))):  # in any order
            verdict = "a" if int(pair.answer_a) > int(pair.answer_b) else "b"
            vote = {"text": verdict, "n_tokens": 3, "finished": True, "verdict": verdict, "seconds": random.random()}
            yield i, {"verdict": verdict, "prompt_hash": "0", "votes": [vote]}


def question(name, *answers):
    return Question(name, [{"role": "user", "content": "the largest?"}], list(answers))


def test_rounds_of_many_questions_are_judged_together():
    questions = [question("x", *"3164"), question("y", *"52"), question("z", *"73819246")]
    judge = Known()
    found = dict(rank_all(judge, questions, "swiss"))
    assert judge.calls == [2 + 1 + 4, 2 + 4, 4]  # 2, 1 and 3 rounds
    assert len(judge.seen) == len(set(judge.seen))
    assert (found[0].order[0], found[1].order, found[2].order[0]) == (2, [0, 1], 4)
    alone = rank_all(Known(), questions[2:], "swiss")
    assert record_of(questions[2], dict(alone)[0]) == record_of(questions[2], found[2]), "what is beside it matters"
    for i, j, record in found[2].judgements:
        assert record["verdict"] == ("a" if questions[2].answers[i] > questions[2].answers[j] else "b")


def test_one_question():
    found = rank(Known(), "the largest?", ["2", "9", "5"])
    assert found.order == [1, 2, 0] and found.scores == [-1, 1, 0] and len(found.judgements) == 3


def test_equal_answers_are_compared_once_and_tie():
    judge = Known()
    q = question("x", "2", "7", "2", "5", "7")
    (_, found), = rank_all(judge, [q])
    assert len(judge.seen) == 3 and found.order == [1, 4, 3, 0, 2] and found.ties == [[1, 4], [0, 2]]
    assert found.scores == [-1, 1, -1, 0, 1] and found.comparisons == [2] * 5
    assert {i for i, _, _ in found.judgements} | {j for _, j, _ in found.judgements} == {0, 1, 3}
    assert "answers 1, 4 tie, their texts are equal" in table(found, q.answers)
    (_, found), = rank_all(judge, [question("x", "2", "2")])
    assert len(judge.seen) == 3 and found.scores == [0, 0] and found.ties == [[0, 1]]
    assert found.intervals == [(0, 1)] * 2


def test_the_table_says_what_was_inconsistent():
    comparisons = [Comparison(0, 1, 0), Comparison(1, 2, 1), Comparison(2, 0, 2), Comparison(3, 0, None, "orders"),
                   Comparison(1, 3, None, "no_verdict")]
    text = table(ranking(*tally(4, comparisons), inconsistencies(4, comparisons)), ["x", "y\ny", "z", "w"])
    assert text.split("\n")[1] == '     0   0.00  0.50 (0.13-0.87)      1     1     1  "x"'
    assert '"y\\ny"' in text and "answers 0, 1, 2, 3 tie\n" in text
    assert text.endswith("the two orders contradict each other: 3-0\nno verdict: 1-3\n"
                         "circles, each won against the next: 0-1-2 (1 of 1 triples)")


# ---- files and the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("rank"))


def config(folder, **options):
    return Config(**dict(model=str(folder), max_new_tokens=6, temperature=1.0, n_slots=8, threads=1) | options)


@pytest.fixture
def source(tmp_path):
    rows = [{"id": "x\u2028/1", "prompt": "sort 40718", "answers": ["01478", "01487", "40718", "87410", "01478"]},
            {"question": "flip 123", "answers": [[{"role": "assistant", "content": "876"}], "867", "123"]},
            {"id": "z", "prompt": [{"role": "user", "content": "step 1"}], "answers": ["2", "3", "4", "5", "6", "7"]}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def by_text(monkeypatch):
    """An untrained model writes no verdicts: let every text be one, so that the later rounds depend on the first."""
    monkeypatch.setattr(judging, "benchmark_verdict", lambda text: ("a", "b", None)[zlib.crc32(text.encode()) % 3])


@pytest.mark.parametrize("schedule, both_orders, n_judged", [("swiss", False, 4 + 2 + 9), ("all", True, 12 + 6 + 30)])
def test_an_interrupted_file_goes_on_to_the_same_bytes(folder, source, by_text, tmp_path, monkeypatch, schedule,
                                                       both_orders, n_judged):
    """Interrupted at every third judgement, and once within a line."""
    cfg = config(folder, rank=str(source), schedule=schedule, both_orders=both_orders, votes=2,
                 out=str(tmp_path / "whole.jsonl"))
    main(cfg)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    out, partial, add, n_added = tmp_path / "deep/out.jsonl", tmp_path / "deep/out.jsonl.partial", JudgementFile.add, []

    def add_three(self, record):
        if len(n_added) % 4 == 3:
            n_added.append("interrupted")
            raise KeyboardInterrupt
        n_added.append(record["id"])
        add(self, record)
    monkeypatch.setattr(JudgementFile, "add", add_three)
    for n_before in range(0, n_judged, 3):
        assert not out.exists() and (not n_before or partial.read_bytes().count(b"\n") == 1 + n_before)
        if n_before < n_judged - 3:
            with pytest.raises(KeyboardInterrupt, match=f"{n_before + 3} of {n_judged} judgements are made, and kept"):
                main(replace(cfg, out=str(out)))
            with open(partial, "ab") as file:
                file.write(b'{"id": "\xe2\x80' if n_before == 3 else b"")
    monkeypatch.setattr(JudgementFile, "add", add)
    main(replace(cfg, out=str(out)))
    assert out.read_bytes() == whole and not partial.exists()

    records = [json.loads(line) for line in whole.decode().split("\n")[:-1]]
    assert [record["id"] for record in records] == ["x\u2028/1", "questions.jsonl/2", "z"]
    assert [record["n_answers"] for record in records] == [5, 3, 6]
    assert sum(record["n_judgements"] for record in records) == n_judged
    for record in records:
        votes = [vote for judgement in record["judgements"] for vote in judgement["votes"]]
        assert len(votes) == 2 * record["n_judgements"]
        assert record["n_tokens"] == sum(vote["n_tokens"] for vote in votes)
        assert record["scores"] == [(won - lost) / of for won, lost, of in
                                    zip(record["wins"], record["losses"], record["comparisons"])]
    with pytest.raises(ValueError, match="is already there; choose another --out"):
        main(replace(cfg, out=str(out)))


def test_judgements_of_other_answers_or_settings_are_refused(folder, source, by_text, tmp_path, monkeypatch):
    cfg = config(folder, rank=str(source), out=str(tmp_path / "out.jsonl"), schedule="circular")
    partial, finish = tmp_path / "out.jsonl.partial", JudgementFile.finish
    monkeypatch.setattr(JudgementFile, "finish", lambda self, records: None)
    main(cfg)
    kept = partial.read_bytes()
    for name, value in (("schedule", "all"), ("both_orders", True), ("seed", 1)):
        with pytest.raises(ValueError, match=f"partial: was begun with {name}="):
            main(replace(cfg, **{name: value}))
    text = source.read_text()
    for other, lost in ((text.replace('"867"', '"866"'), 2), (text.replace('"z"', '"zz"'), 6)):
        source.write_text(other)
        with pytest.raises(ValueError, match=f"partial: holds {lost} judgements of pairs that are not given now"):
            main(cfg)
    assert partial.read_bytes() == kept
    source.write_text(text)
    monkeypatch.setattr(JudgementFile, "finish", finish)
    main(cfg)
    assert not partial.exists()


def test_bad_questions_are_named_or_skipped(folder, tmp_path, capsys):
    good = {"id": "good", "question": "sort 321", "answers": ["123", "132"]}
    bad = {'no "prompt"': {"answers": ["1", "2"]}, "the same thing": good | {"prompt": "x"},
           '"answers" is a string': good | {"answers": "12"}, '"answers" holds 1: from 2': good | {"answers": ["1"]},
           '"answers" holds 65': good | {"answers": ["1"] * 65}, "may only hold": good | {"answers": ["1", 2]},
           "all answers are blank": good | {"answers": ["", " "]}, "is also at": good,
           "must end with the user": good | {"question": [{"role": "assistant", "content": "1"},
                                                          {"role": "user", "content": "2"},
                                                          {"role": "assistant", "content": "3"}]}}
    path = tmp_path / "questions.jsonl"
    for words, row in bad.items():
        path.write_text(json.dumps(good) + "\n" + json.dumps({"id": "bad"} | row) + "\n")
        with pytest.raises(ValueError, match=f"jsonl:2: .*{words}"):
            read_questions(path)
    long = good | {"id": "long", "answers": ["1", "1 " * 800, "1 " * 799]}
    cfg = config(folder, rank=str(path), out=str(tmp_path / "out.jsonl"), temperature=0.0)
    with pytest.raises(ValueError, match="jsonl:2: "):
        main(cfg)
    path.write_text(json.dumps(long) + "\n{\n" + json.dumps(good) + "\n")
    main(replace(cfg, skip_bad=True))
    said = capsys.readouterr().err
    assert "jsonl:2: skipped" in said and "skipped: pair long/2-1: its prompt has" in said
    record, = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record["id"] == "good"
    path.write_text(json.dumps(long) + "\n")
    with pytest.raises(ValueError, match="pair long/2-1: its prompt has [0-9]+ tokens, the model can read 1024"):
        main(replace(cfg, out=str(tmp_path / "other.jsonl")))
    assert list(tmp_path.glob("other*")) == []


def test_a_conversation_among_the_answers_is_looked_at_before_the_work(folder, tmp_path, capsys):
    """The two longest answers are texts, which the prompt can show; the third is a conversation, which it cannot. A
    long answer that comes twice is never compared with itself."""
    good = {"id": "good", "question": "sort 321", "answers": ["123", "132"]}
    talk = [{"role": "assistant", "content": "1"}, {"role": "user", "content": "x"},
            {"role": "assistant", "content": "2"}]
    twice = {"id": "twice", "question": "sort 321", "answers": ["1 " * 260, "1 " * 260, "1"]}
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (
        good, {"id": "talk", "question": "sort 321", "answers": ["123 123 123", talk, "132 132 132"]}, twice)))
    cfg = config(folder, rank=str(path), out=str(tmp_path / "out.jsonl"), temperature=0.0)
    with pytest.raises(ValueError, match=r"no section \[user multi-turn\], and pair talk/[0-2]-1 is a conversation"):
        main(cfg)
    assert not list(tmp_path.glob("out*"))
    main(replace(cfg, skip_bad=True))
    assert "skipped: prompt " in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").open()] == ["good", "twice"]


def test_who_is_shown_first_differs_from_question_to_question():
    """Two models' answers to 200 questions, and a judge that always says A: a coin decides, not the model's number."""
    class AlwaysA:
        def judge(self, pairs, bar=None):
            return ((k, {"verdict": "a"}) for k in range(len(pairs)))
    won = sum(rank(AlwaysA(), f"question {k}", ["one", "two"]).order[0] == 0 for k in range(200))
    assert 70 < won < 130
    with pytest.raises(ValueError, match="65 answers by schedule 'all': give 1 to 64, and one of all, circular, swiss"):
        rank(AlwaysA(), "question", [str(k) for k in range(65)])


def test_one_question_on_the_command_line(folder, by_text, tmp_path, capsys):
    (tmp_path / "1.txt").write_text("01478\n")
    (tmp_path / "2.txt").write_text("87410")
    for options in ({"answers": ("01478", "87410")},
                    {"answer_files": (str(tmp_path / "1.txt"), str(tmp_path / "2.txt"))}):
        main(config(folder, question="sort 40718", both_orders=True, **options))
    with pytest.raises(ValueError, match="prompt 0 has [0-9]+ tokens; the model can read 1024"):
        main(config(folder, question="sort 1", answers=("1", "1 " * 1200, "2"), schedule="swiss"))
    first, second = capsys.readouterr().out.split("answer  score")[1:]
    assert first == second and '"01478"' in first and '"87410"' in first and "\n2 judgements, " in first


@pytest.mark.parametrize("argv, words", [
    (["--rank", "x"], "need each other"), (["--rank", "x", "--pairs", "y", "--out", "z"], "--pairs and --rank"),
    (["--rank", "x", "--out", "y", "--question", "q"], "--rank and --question are both given"),
    (["--rank", "x", "--out", "y", "--answers", "1", "2"], "--rank and answers to rank are both given"),
    (["--question", "q", "--answers", "1"], "answers to rank: 1 given, it takes 2 to 64"),
    (["--question", "q", "--answers", *map(str, range(65))], "65 given"),
    (["--question", "q", "--answers", "1", "2", "--answer-files", "3", "4"], "--answers and --answer-files"),
    (["--question", "q", "--answers", "1", "2", "--answer-a", "3"], "--answer-a is one of a pair"),
    (["--question", "q", "--answer-a", "1", "--answer-b", "2", "--both-orders"], "--both-orders are about answers"),
    (["--rank", "x", "--out", "y", "--schedule", "knockout"], "--schedule is all or circular or swiss"),
    (["--question", "q", "--answers", "1", "", "2"], "one of its values is empty"),
    (["--answers", "1", "2"], "--question is missing"),
    (["--question", "q", "--answer-files", "/nowhere/1", "/nowhere/2"], "/nowhere/1: No such file"),
    (["--rank", "/nowhere.jsonl", "--out", "/tmp/never"], "/nowhere.jsonl: no such file")])
def test_mistakes_are_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as end, one_line_errors():
        main(parse_config(Config, argv=["--model", "m", *argv]))
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and words in said


# ---- experiments/rank_schedules.py


def test_the_experiments_answers_have_the_merit_it_says():
    questions, best = toy_questions(40, 1)
    assert len({q.id for q in questions}) == 40
    for q, b in zip(questions, best):
        domain, facts = toy.read_question(q.prompt[0]["content"])
        assert toy.split_of(q.prompt[0]["content"]) == "heldout" and len(set(q.answers)) == 8
        if domain == "chat":
            assert sorted(toy.total(facts, answer) for answer in q.answers) == list(range(8))
            assert toy.total(facts, q.answers[b]) == 7
        else:
            assert q.answers[b] == toy.join(facts[1])
    assert len(set(best)) == 8, "the best has its place by chance"


def test_the_simulated_judge_errs_as_it_says():
    for by_place in (False, True):
        questions, verdicts = simulated([30] * 10, 0.8, by_place, 0)
        pairs = [(f"{k}/{i}-{j}", f"{k}/{j}-{i}") for k in range(10) for j in range(30) for i in range(j)]
        first = [verdicts.by_id[x] == "a" for x, _ in pairs]
        second = [verdicts.by_id[y] == "b" for _, y in pairs]
        n = len(pairs)
        assert n == 4350 and abs(sum(first) / n - 0.8) < 0.02 and abs(sum(second) / n - 0.8) < 0.02  # 3 sd
        both = sum(x and y for x, y in zip(first, second)) / n
        neither = sum(not x and not y for x, y in zip(first, second)) / n
        assert abs(both - (0.6 if by_place else 0.64)) < 0.025 and abs(neither - (0 if by_place else 0.04)) < 0.01


def test_the_experiment_counts_as_by_hand():
    """A perfect judge of four answers: all and swiss find the best; a ring does, unless two win both their pairs, which
    happens in one ring of three: 0 and 1 opposite, where they share the first place."""
    questions, verdicts = simulated([4] * 60, 1.0, False, 0)
    rows = {(row["schedule"], row["both_orders"]): row for row in measure("x", questions, [0] * 60, verdicts, 10, 0)}
    assert [rows[schedule, False]["judgements"] for schedule in SCHEDULES] == [6, 4, 4]
    assert [rows[schedule, True]["judgements"] for schedule in SCHEDULES] == [12, 8, 8]
    assert rows["all", False]["found"] == rows["swiss", True]["found"] == 1
    assert abs(rows["circular", False]["found"] - (2 / 3 + 1 / 3 / 2)) < 0.04  # sd 0.01
    comparisons = [Comparison(0, 1, 0), Comparison(2, 3, 2)]
    tied = ranking(*tally(4, comparisons), inconsistencies(4, comparisons))
    assert [share_found(tied, k) for k in range(4)] == [0.5, 0, 0.5, 0]


def test_the_pictures_points_are_where_its_axes_say():
    rng = random.Random(0)
    rows = [{"task": task, "schedule": schedule, "both_orders": both, "judgements": (3 + k) * (1 + both),
             "found": rng.random(), "low": 0.1, "high": 0.9}
            for task, _ in PANELS for k, schedule in enumerate(SCHEDULES) for both in (True, False)]
    groups = list(ElementTree.fromstring(figure(rows)).iter(f"{SVG}g"))
    for number, (task, title) in enumerate(PANELS):
        panel, = (group for group in groups if group.get("id") == f"panel-{number}")
        assert title in [text.text for text in panel.iter(f"{SVG}text")]
        read = to_numbers(panel)
        for schedule in SCHEDULES:
            lines, = (group for group in panel.iter(f"{SVG}g") if group.get("class") == schedule)
            dots = {dot.get("class"): read(dot.get("cx"), dot.get("cy")) for dot in lines.iter(f"{SVG}circle")}
            for row in rows:
                if (row["task"], row["schedule"]) == (task, schedule):
                    dot = dots["both" if row["both_orders"] else "one"]
                    assert dot == pytest.approx((row["judgements"], 100 * row["found"]), abs=0.1)
    with pytest.raises(ValueError, match="0 rows are of the task 'grpo: reasoning', not 6"):
        figure(rows[6:])
