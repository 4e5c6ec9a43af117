"""A judge of pairs makes a ranking: which pairs of N answers are judged, and what follows from the verdicts.

    schedule    comparisons of N answers
    all         N (N - 1) / 2      every pair
    circular    N (1 if N is 2)    the answers in a ring, in an order drawn by the seed, each against the next
    swiss       N/2 log2 N         log2 N rounds, rounded up; in each, neighbours by score that have not met

A comparison is one judgement, or with both_orders two, one in each order of the answers. A win needs a verdict, with
both_orders two that prefer the same answer; anything else is a tie. An answer's score is (wins - losses) / comparisons.
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby

import numpy as np

from data.pairs import MOST_ANSWERS, Pair, Question, texts_of
from intervals import wilson

SCHEDULES = ("all", "circular", "swiss")

# ---------------------------------------------------------------------------------------------------- the tournament


@dataclass(frozen=True)
class Comparison:
    """What came out between answers i and j, i being A where it was judged in one order."""
    i: int
    j: int
    winner: int | None  # i, j, or None: a tie
    fault: str | None = None  # why it is one: "no_verdict" (of one order or both), or "orders", which contradict


@dataclass(frozen=True)
class Ranking:
    """scores to intervals: lists with one element for each answer, in the order in which the answers were given."""
    order: list[int]  # the answers, best first; those of equal score in the order given, and said in ties
    ties: list[list[int]]  # groups of answers whose scores are equal: their order says nothing
    scores: list[float]  # (wins - losses) / comparisons, from -1 to 1; 0 without comparisons
    wins: list[int]
    losses: list[int]
    comparisons: list[int]  # what is neither won nor lost is a tie
    win_rates: list[float]  # a tie counts half: (score + 1) / 2
    intervals: list[tuple[float, float]]  # 95%, of the win rate among such comparisons
    inconsistent: dict  # see inconsistencies
    judgements: list = field(default_factory=list)  # (i, j, judgement record) with i shown as A, if a judge made them


def tournament(n, schedule="all", both_orders=False, seed=0):
    """A generator that asks for judgements and returns the Ranking of n answers (StopIteration.value).

    It yields a round, a list of (i, j): answer i is shown as A, j as B; and is sent the list of their verdicts, each
    "a", "b" or None. The seed (any that numpy's default_rng takes) decides who meets whom first, and the places: each
    answer is A as often as B, give or take one. A swiss tournament evens them out as far as its meetings allow: where
    the judge always says the same letter, those of equal score have had the same places, and the two numbers come to
    differ by up to one a round (6 at 64 answers); take both_orders for such a judge.
    """
    assert schedule in SCHEDULES and 1 <= n <= MOST_ANSWERS, (schedule, n)
    rng = np.random.default_rng(seed)
    ring = rng.permutation(n).tolist()
    comparisons = []
    for _ in range(n_rounds(n, schedule)):
        if schedule == "swiss":
            pairs = swiss_round(ring, comparisons, rng)
        else:
            pairs = ring_pairs(ring, n // 2 if schedule == "all" else 1)
        if both_orders:
            verdicts = yield pairs + [(j, i) for i, j in pairs]
            first, second = verdicts[:len(pairs)], verdicts[len(pairs):]
            comparisons += [compare_both(i, j, *two) for (i, j), *two in zip(pairs, first, second, strict=True)]
        else:
            verdicts = yield pairs
            comparisons += [compare(i, j, verdict) for (i, j), verdict in zip(pairs, verdicts, strict=True)]
    return ranking(*tally(n, comparisons), inconsistencies(n, comparisons))


def n_rounds(n, schedule):
    if schedule == "swiss":
        return math.ceil(math.log2(n))
    return 1 if n > 1 else 0


def n_comparisons(n, schedule):
    """How many pairs of n answers a schedule compares."""
    if schedule == "all":
        return n * (n - 1) // 2
    if schedule == "circular":
        return n if n > 2 else n - 1
    return n // 2 * n_rounds(n, schedule)


def n_judgements(question, schedule, both_orders):
    """How many judgements the ranking of a Question takes; equal answers count once."""
    return n_comparisons(1 + max(places_of(question.answers)), schedule) * (2 if both_orders else 1)


def compare(i, j, verdict):
    if verdict is None:
        return Comparison(i, j, None, "no_verdict")
    return Comparison(i, j, i if verdict == "a" else j)


def compare_both(i, j, verdict, exchanged):
    """exchanged: the verdict with j as A and i as B."""
    one, other = compare(i, j, verdict), compare(j, i, exchanged)
    if None in (verdict, exchanged):
        return Comparison(i, j, None, "no_verdict")
    if one.winner != other.winner:
        return Comparison(i, j, None, "orders")
    return one


# --------------------------------------------------------------------------------------------------------- schedules


def ring_pairs(ring, n_steps):
    """Each against the next, the one after it, and so on up to n_steps further on: once A and once B at every step, but
    half way round, where a pair would be met from both ends."""
    n, pairs = len(ring), []
    for step in range(1, n_steps + 1):
        n_starts = n // 2 if 2 * step == n else n
        pairs += [(ring[k], ring[(k + step) % n]) for k in range(n_starts)]
    return pairs


def swiss_round(ring, comparisons, rng):
    """Pairs of neighbours by score that have not met; of an odd number one sits out, nobody twice.

    There always are such pairs: log2 n rounds are so few that everybody has yet to meet half of the others or more.
    """
    n = len(ring)
    wins, losses, played = tally(n, comparisons)
    met = {i: {c.i + c.j - i for c in comparisons if i in (c.i, c.j)} for i in range(n)}
    standing = sorted(ring, key=lambda i: -score_of(wins[i], losses[i], played[i]))
    if n % 2:
        met |= {i: met[i] | {None} for i in range(n) if played[i] < max(played)}  # has sat out: it met nobody
        standing.append(None)
    as_a = [sum(c.i == i for c in comparisons) - sum(c.j == i for c in comparisons) for i in range(n)]
    pairs = []
    for i, j in neighbours(standing, met):
        if j is not None:
            i_first = as_a[i] < as_a[j] or as_a[i] == as_a[j] and rng.random() < 0.5
            pairs.append((i, j) if i_first else (j, i))
    return pairs


def neighbours(standing, met):
    """Pairs of all who stand in this order: the first with the next whom it has not met, and so on; or None."""
    if not standing:
        return []
    first, *others = standing
    for other in others:
        if other not in met[first]:
            rest = neighbours([i for i in others if i != other], met)
            if rest is not None:
                return [(first, other), *rest]
    return None


# ----------------------------------------------------------------------------------------------------------- scores


def tally(n, comparisons):
    """Each answer's wins, losses and comparisons."""
    wins, losses, played = [0] * n, [0] * n, [0] * n
    for c in comparisons:
        played[c.i] += 1
        played[c.j] += 1
        if c.winner is not None:
            wins[c.winner] += 1
            losses[c.i + c.j - c.winner] += 1
    return wins, losses, played


def score_of(won, lost, of):
    return (won - lost) / of if of else 0.0


def ranking(wins, losses, comparisons, inconsistent):
    """The Ranking that these make."""
    n = len(wins)
    scores = [score_of(wins[i], losses[i], comparisons[i]) for i in range(n)]
    points = [(comparisons[i] + wins[i] - losses[i]) / 2 for i in range(n)]
    order = sorted(range(n), key=lambda i: -scores[i])
    groups = [list(group) for _, group in groupby(order, lambda i: scores[i])]
    return Ranking(order=order, ties=[group for group in groups if len(group) > 1], scores=scores, wins=wins,
                   losses=losses, comparisons=comparisons, win_rates=[(score + 1) / 2 for score in scores],
                   intervals=[wilson(points[i], comparisons[i]) for i in range(n)], inconsistent=inconsistent)


def inconsistencies(n, comparisons):
    """{"orders": pairs whose two orders contradict each other, "no_verdict": pairs that lack one, "cycles": triples
    (x, y, z) in which x won against y, y against z and z against x, "triples": how many triples were decided in all}.
    """
    beat, met = [set() for _ in range(n)], [set() for _ in range(n)]  # of each answer, by decided comparisons
    for c in comparisons:
        if c.winner is not None:
            beat[c.winner].add(c.i + c.j - c.winner)
            met[c.i].add(c.j)
            met[c.j].add(c.i)
    cycles = [(x, y, z) for x in range(n) for y in sorted(beat[x]) if y > x
              for z in sorted(beat[y]) if z > x and x in beat[z]]  # each once, from its first answer on
    n_triples = sum(len(met[x] & met[y]) for x in range(n) for y in met[x]) // 6
    faults = {fault: [(c.i, c.j) for c in comparisons if c.fault == fault] for fault in ("orders", "no_verdict")}
    return faults | {"cycles": cycles, "triples": n_triples}


# -------------------------------------------------------------------------------------------------- questions, judged


def rank(judge, question, answers, schedule="all", both_orders=False, seed=0):
    """The Ranking of the answers to one question; judge: a judge.Judge, question: a text or messages."""
    prompt = [{"role": "user", "content": question}] if isinstance(question, str) else question
    (_, found), = rank_all(judge, [Question("question", prompt, answers)], schedule, both_orders, seed)
    return found


def rank_all(judge, questions, schedule="all", both_orders=False, seed=0, bar=None):
    """Yields (index, Ranking) of the Questions as they are done.

    A round of all questions is judged together, so that the sampler's batch stays full. What is drawn depends on the
    seed and the question's id. Of equal answers one is compared, and the others have its score. judge: a judge.Judge,
    or anything whose judge(pairs, bar=...) yields (index, record with a "verdict"). bar: a tqdm that counts judgements.
    """
    contests = {index: Contest(question, schedule, both_orders, seed) for index, question in enumerate(questions)}
    for index in [index for index, contest in contests.items() if contest.ranking]:  # all answers are equal
        yield index, contests.pop(index).ranking
    while contests:
        jobs = [(index, k) for index, contest in contests.items() for k in range(len(contest.asked))]
        pairs = [contests[index].pair(k) for index, k in jobs]
        for number, record in judge.judge(pairs, bar=bar):
            index, k = jobs[number]
            contests[index].take(k, record)
            if bar is not None:
                bar.update()
            if contests[index].ranking:
                yield index, contests.pop(index).ranking


class Contest:
    """One question's tournament while it goes on: `asked` is the round to judge, `ranking` is there at its end."""

    def __init__(self, question, schedule, both_orders, seed):
        self.question, self.places, self.judgements, self.ranking = question, places_of(question.answers), [], None
        self.first = [self.places.index(k) for k in range(1 + max(self.places))]  # of each different answer
        seed = [seed, zlib.crc32(question.id.encode())]
        self.tournament = tournament(len(self.first), schedule, both_orders, seed)
        self.go_on(None)

    def go_on(self, verdicts):
        try:
            self.asked = [(self.first[i], self.first[j]) for i, j in self.tournament.send(verdicts)]
            self.records = [None] * len(self.asked)
        except StopIteration as end:
            self.ranking = replace(with_copies(end.value, self.places), judgements=self.judgements)

    def pair(self, k):
        return pair_of(self.question, *self.asked[k])

    def take(self, k, record):
        """The judgement of pair k; the last one of a round makes the next."""
        self.records[k] = record
        if None not in self.records:
            self.judgements += [(i, j, record) for (i, j), record in zip(self.asked, self.records)]
            self.go_on([record["verdict"] for record in self.records])


def pair_of(question, i, j):
    """The pair that shows answer i as A and j as B."""
    return Pair(f"{question.id}/{i}-{j}", question.prompt, question.answers[i], question.answers[j], None, "", "",
                item=question.id, rubric=question.rubric)


def places_of(answers):
    """Each answer's place among the different ones: [x, y, x] -> [0, 1, 0]."""
    different = []
    for answer in answers:
        if answer not in different:
            different.append(answer)
    return [different.index(answer) for answer in answers]


def with_copies(found, places):
    """The Ranking of all answers from that of the different ones."""
    wins, losses, comparisons = ([of[k] for k in places] for of in (found.wins, found.losses, found.comparisons))
    inconsistent = dict(found.inconsistent)
    for name in ("orders", "no_verdict", "cycles"):
        inconsistent[name] = [tuple(places.index(k) for k in group) for group in inconsistent[name]]
    return ranking(wins, losses, comparisons, inconsistent)


# ------------------------------------------------------------------------------------------------ records and tables


def record_of(question, found):
    """What is kept of a Ranking: enough to make it again without the model. Answers are numbered from 0."""
    judgements = [{"a": i, "b": j, "prompt_hash": record["prompt_hash"], "verdict": record["verdict"],
                   "votes": [without_seconds(vote) for vote in record["votes"]]} for i, j, record in found.judgements]
    n_tokens = sum(vote["n_tokens"] for judgement in judgements for vote in judgement["votes"])
    lists = asdict(replace(found, judgements=[]))
    del lists["judgements"]
    return {"id": question.id, "n_answers": len(question.answers), **lists, "n_judgements": len(judgements),
            "n_tokens": n_tokens, "judgements": judgements}


def without_seconds(vote):
    """So that the same judgements make the same file."""
    return {key: value for key, value in vote.items() if key != "seconds"}


def table(found, answers):
    """A Ranking for people: the answers, best first, and what was inconsistent."""
    lines = ["answer  score  win rate (95 %)     won  lost  tied  begins with"]
    for i in found.order:
        (low, high), tied = found.intervals[i], found.comparisons[i] - found.wins[i] - found.losses[i]
        share = f"{found.win_rates[i]:.2f} ({low:.2f}-{high:.2f})"
        lines.append(f"{i:6}  {found.scores[i]:5.2f}  {share:17}  {found.wins[i]:4}  {found.losses[i]:4}  {tied:4}  "
                     f"{start_of(answers[i])}")
    for group in found.ties:
        lines.append(f"answers {', '.join(map(str, group))} tie" +
                     (", their texts are equal" if all(answers[i] == answers[group[0]] for i in group) else ""))
    faults = found.inconsistent
    if faults["orders"]:
        lines.append(f"the two orders contradict each other: {show_groups(faults['orders'])}")
    if faults["no_verdict"]:
        lines.append(f"no verdict: {show_groups(faults['no_verdict'])}")
    if faults["cycles"]:
        lines.append(f"circles, each won against the next: {show_groups(faults['cycles'])} "
                     f"({len(faults['cycles'])} of {faults['triples']} triples)")
    return "\n".join(lines)


def start_of(answer):
    return json.dumps(texts_of(answer)[0][:40], ensure_ascii=False)


def show_groups(groups):
    return ", ".join("-".join(map(str, group)) for group in groups[:10]) + (" ..." if len(groups) > 10 else "")
