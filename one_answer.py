"""One answer, judged against a reference answer: better, worse, or undecided.

A judge of pairs has no score for one answer alone. It can compare it with a reference, and since it may favour a place
it does so in both orders: only what both orders say counts, as in rank.py. The two judgement records of an answer (the
answer is A in the first, B in the second, which is "swapped") have the same "outcome".
"""

from collections import Counter

from data.pairs import SWAPPED, both_orders, pair_of_texts
from rank import compare_both

OUTCOMES = {0: "better", 1: "worse", None: "undecided"}


def judge_answer(judge, question, answer, reference, rubric=""):
    """The two judgement records of one answer, all texts."""
    records = dict(judge.judge(answer_pairs(question, answer, reference, rubric)))
    return with_outcomes([records[0], records[1]])


def answer_pairs(question, answer, reference, rubric=""):
    """The answer as A and the reference as B, and the other order."""
    return both_orders(pair_of_texts(question, answer, reference, rubric, item="pair"))


def outcome(verdict, exchanged):
    """verdict: with the answer as A and the reference as B; exchanged: in the other order."""
    return OUTCOMES[compare_both(0, 1, verdict, exchanged).winner]


def with_outcomes(records):
    """The judgement records; those of an answer's two orders have their outcome, the others stay as they are."""
    verdicts = {record["id"]: record["verdict"] for record in records}
    return [record | {"outcome": outcome(verdicts[record["item"]], verdicts[record["item"] + SWAPPED])}
            if is_of_answer(record, verdicts) else record for record in records]


def is_of_answer(record, ids):
    """Is this a record of one answer and its reference? Then the item is the id, and the other order is there too."""
    item = record["item"]
    return item != "" and record["id"] in (item, item + SWAPPED) and item in ids and item + SWAPPED in ids


def in_words(records):
    """What the two records of an answer say."""
    first, second = (record["verdict"] for record in records)
    said = records[0]["outcome"]
    if None in (first, second):
        return "undecided: there is no verdict in " + ("both orders" if first == second else "one of the two orders")
    if said == "undecided":
        return f"undecided: the orders disagree, in both of them {first.upper()} is said to be the better one"
    return f"{said} than the reference, in both orders"


def counts_in_words(records):
    """Of all answers in a file, or "" where there are none."""
    counts = Counter(record["outcome"] for record in records if "outcome" in record and "swapped" not in record)
    if not counts:
        return ""
    return (f"{counts.total()} answers: {counts['better']} better than their reference, {counts['worse']} worse, "
            f"{counts['undecided']} undecided")
