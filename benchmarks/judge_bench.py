"""JudgeBench: its pairs, the recorded outputs of its own judges, and its score, over both orders.

Its two files, answers by gpt-4o and answers by claude-3-5-sonnet, are scored apart, as its authors do. In the
*official* score a pair is judged twice, in the file's order and in the other one. A game votes +1 if its verdict is the
label, -1 if it is the opposite, 0 for a tie or none; the pair is right if the two votes add up to more than 0:

    votes       +1 +1    +1  0    +1 -1     0  0     0 -1    -1 -1
    pair        right    right    wrong    wrong    wrong    wrong

A score over one order is the official one of that name in the file's order only (--order published, or recorded). The
default shows half of each file's better answers as B, drawn by the seed, and is ours: in the file's order "always A"
scores 55.1 (gpt) and 53.0 (claude).
"""

import re

from benchmarks.rows import grouped, in_both_orders, in_first_order, is_right, make_row, output_record
from data.fields import Bad, need, need_text, text_or
from data.pairs import (JUDGE_BENCH, OTHER, SWAPPED, Pair, balanced_order, judge_bench_category, judge_bench_label,
                        judge_bench_pair, judge_bench_source, read_records, swapped)
from intervals import wilson

TITLES = {source: f"JudgeBench ({name})" for name, source in JUDGE_BENCH.items()}
SIZE = {"judgebench-gpt": {"Knowledge": 154, "Reasoning": 98, "Math": 56, "Coding": 42},
        "judgebench-claude": {"Knowledge": 154, "Reasoning": 51, "Math": 34, "Coding": 31}}
MMLU_PRO_SIZE = 11  # of each of Knowledge's 14 subjects; the other categories have one subset each
VERDICTS = {"A>B": "a", "B>A": "b"}  # of a recorded decision; a tie "A=B", null and any other text are none


def read_judge_bench(path, order="balanced", seed=0, skip_bad=False):
    """The pairs of either file, or of both in a folder. order "balanced": half of each file's pairs, drawn by the seed,
    have the better answer as B; "published": the file's order."""
    def convert(record, place):
        if "judgments" in record:
            raise Bad("a recorded output, no record of JudgeBench itself: give it as --from")
        if "response_A" not in record:
            raise Bad("not a record of JudgeBench: give the benchmark's own files, other pairs as --data")
        return [(judge_bench_pair(record), judge_bench_label(record))]

    found = read_records(path, convert, skip_bad)
    pairs = []
    for source in TITLES:
        members = [(pair, label) for pair, label in found if pair.source == source]
        if order == "published":
            better_is_b = {i for i, (_, label) in enumerate(members) if label == "b"}
        else:
            better_is_b = set(balanced_order(range(len(members)), seed))
        pairs += [swapped(pair) if i in better_is_b else pair for i, (pair, _) in enumerate(members)]
    return pairs


# ---- recorded outputs

def judge_bench_outputs(record, place):
    """[(pair, judgement record)] of the games that a line of JudgeBench's outputs/ records, one or two: the first in
    the file's order, the second in the other one. Without the answers in it, the pair has no texts."""
    judge, games = need(record, "judge_name", str), need(record, "judgments", list, of=(dict, type(None)))
    if len(games) not in (1, 2):
        raise Bad(f'"judgments" holds {len(games)} games: it must hold 1 or 2')
    label, subset = judge_bench_label(record), need_text(record, "source")
    if "response_A" in record:
        better_first = judge_bench_pair(record)
        pair = better_first if label == "a" else swapped(better_first)
    else:
        pair = Pair(need_text(record, "pair_id"), [], "", "", label, judge_bench_source(written_by(record, place)),
                    judge_bench_category(subset), subset=subset)
    outputs = [(pair, game_record(pair, judge, games[0]))]
    if len(games) == 2:
        second = Pair(pair.id + SWAPPED, [], "", "", OTHER[label], pair.source, pair.domain, subset=subset)
        outputs.append((second, game_record(second, judge, games[1]) | {"swapped": True}))
    return outputs


def written_by(record, place):
    """Who wrote the answers: by the record, or by the file's name (".../gpt.X.jsonl", "response_model=gpt-4o...")."""
    if "response_model" in record:
        return need_text(record, "response_model")
    found = re.search("(?:^|response_model=)(gpt|claude)", place.file.name)
    if not found:
        raise Bad('no "response_model", and the file\'s name does not begin with gpt or claude: add or rename it')
    return found[1]


def game_record(pair, judge, game):
    """The judgement record of one game; None is a call that failed."""
    judgment = {} if game is None else need(game, "judgment", dict)
    decision = None if game is None else need(game, "decision", str, type(None))
    if "scores" in judgment:
        scores = need(judgment, "scores", list, of=(int, float))
        text = " ".join(map(repr, scores))
    else:
        text = text_or(judgment, "response", "")
    vote = {"text": text, "n_tokens": None, "finished": None, "seconds": None, "judge": judge, "decision": decision}
    vote["verdict"] = game_verdict(vote)
    said = VERDICTS[decision] if decision in VERDICTS else None
    return output_record(pair, [vote], vote["verdict"], int(said == pair.winner))


def game_verdict(vote):
    """The verdict of a recorded game, read from its text again where the judge's rule is known.

    A reward model prefers the first answer if its score is larger, else the second, also where they are equal.
    arena_hard's judges end in one of [[A>>B]], [[A>B]], [[A=B]], [[B>A]], [[B>>A]]; two different ones are none.
    """
    judge, text, decision = need(vote, "judge", str), need_text(vote, "text"), need(vote, "decision", str, type(None))
    if judge == "reward_model" and text:
        try:
            one, other = map(float, text.split())
        except ValueError:
            raise Bad(f'"text" is {text[:40]!r}: a reward model has two scores') from None
        return "a" if one > other else "b"
    if judge == "arena_hard":
        labels = set(re.findall(r"\[\[([AB<>=]+)\]\]", text))
        decision = labels.pop().replace(">>", ">") if len(labels) == 1 else None
    return VERDICTS[decision] if decision in VERDICTS else None


# ---- scores

def judge_bench(records, order=None):
    """All pairs, the four categories, their subsets: over both orders, if there are two; then right in both orders,
    where no verdict loses, and one order by itself. order: of the first judgements, as in evaluate.py, if it is known.
    """
    alone = [[r] for r in in_first_order(records)]
    recorded = all("decision" in vote for [r] in alone for vote in r["votes"])
    one_order = "one order, official" if order == "published" or recorded else "one pass (ours)"
    both = [list(games) for games in in_both_orders(records)]
    if not both:
        return [_share("overall", one_order, alone), *_categories("section", alone), *_subsets(alone)]
    return [_share("overall", "both orders, official", both), *_categories("section", both), *_subsets(both),
            _share("right in both orders", "all pairs", both, right_in_both),
            _share(one_order, "all pairs", alone), *_categories(one_order, alone)]


def vote_of(record):
    """+1 for the label, -1 for the opposite, 0 for no verdict or a tie."""
    if record["verdict"] is None:
        return 0
    return 1 if record["verdict"] == record["winner"] else -1


def officially_right(games):
    return sum(vote_of(r) for r in games) > 0


def right_in_both(games):
    return all(is_right(r) for r in games)


def _share(kind, name, pairs, is_won=officially_right, of=None):
    """The share of these pairs, each a list of its one or two games, that are won."""
    n = len(pairs)
    right = sum(is_won(games) for games in pairs)
    low, high = wilson(right, n)
    source = pairs[0][0]["source"]
    of = sum(SIZE[source].values()) if of is None else of
    records = [r for games in pairs for r in games]
    return make_row(TITLES[source], kind, name, right / n, low, high, records, n=n, of=of, right=right)


def _categories(kind, pairs):
    groups = grouped(pairs, lambda games: games[0]["domain"])
    return [_share(kind, name, groups[name], of=of) for name, of in SIZE[pairs[0][0]["source"]].items()
            if name in groups]


def _subsets(pairs):
    groups = grouped(pairs, lambda games: games[0]["subset"])
    rows = []
    for name in sorted(groups):
        first = groups[name][0][0]
        of = MMLU_PRO_SIZE if first["domain"] == "Knowledge" else SIZE[first["source"]][first["domain"]]
        rows.append(_share("subset", name, groups[name], of=of))
    return rows
