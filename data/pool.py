"""The pairs of a training pool while it is mixed: a few numbers of each in memory, the texts in a file; and the reasons
for which a pair is dropped.
"""

import json
from array import array
from collections import Counter
from functools import lru_cache

import numpy as np
from tqdm import tqdm

from data import grams
from data.fields import Bad
from data.pairs import Pair, equal_answers, pairs_in, stream_records, swapped, texts_of, to_json
from files import json_line
from prompt import is_single_turn, render

EXCLUDED = "magpie_ultra"
REASONS = ("bad record", "excluded", "no label", "equal answers", "benchmark", "contradictory", "duplicate", "too long",
           "near duplicate", "not drawn")
N_EXAMPLES = 3        # of each reason, in mix.json
NEAR_GRAM = 5         # words
BATCH = 64            # prompts measured at once
SEAM = 64             # tokens: the order of the answers moves a prompt's length by less, at the seams of its texts


class Pool:
    """The pairs that may be kept, with the chosen answer as A: their texts in a file, and of each pair some numbers."""

    def __init__(self, path):
        self.file = open(path, "w+b")
        self.offset = array("Q")          # where a pair's line begins
        self.row = array("H")             # its row of the table
        self.is_multi = array("B")        # shown as conversations
        self.texts = array("Q")           # equal for two pairs that have the same texts, up to plain()
        self.side = array("B")            # which of the two answers, by their digests, is the chosen one
        self.question = array("Q")        # equal for two pairs of one question
        self.band = array("I")            # grams.BANDS numbers
        self.is_dropped = array("B")
        self.rows = []                    # (source, the pairs' own source), a row of the table each
        self.counts = []                  # Counter of "read" and REASONS, of each row
        self.examples = {reason: [] for reason in REASONS}

    def row_of(self, source, own):
        if (source, own) not in self.rows:
            self.rows.append((source, own))
            self.counts.append(Counter())
        return self.rows.index((source, own))

    def add(self, pair, row):
        self.offset.append(self.file.tell())
        self.file.write(json_line(to_json(pair)).encode())
        answers = [grams.digest("\0".join(map(grams.plain, texts_of(side)))) for side in (pair.answer_a, pair.answer_b)]
        prompt = "\0".join(f"{m['role']} {grams.plain(m['content'])}" for m in pair.prompt)
        self.row.append(row)
        self.is_multi.append(not is_single_turn(pair))
        self.texts.append(grams.digest(f"{prompt}\0{min(answers)} {max(answers)}\0{grams.plain(pair.rubric)}"))
        self.side.append(answers[0] > answers[1])
        self.question.append(question_of(pair))
        of_prompt, of_answers, _ = gram_sets(pair)
        both = np.concatenate([of_prompt, ~of_answers])  # ~: the same words in both are two things; of both together,
        self.band.frombytes(grams.bands(both).tobytes())  # since many prompts have one answer, and the reverse
        self.is_dropped.append(False)

    def pair(self, i):
        self.file.seek(self.offset[i])
        return Pair(**json.loads(self.file.readline()))

    def kept(self):
        """The numbers of the pairs that are not dropped."""
        return np.flatnonzero(column(self.is_dropped) == 0)

    def drop(self, numbers, reason, why):
        """Drops pairs; why(i) says what is in pair i's way."""
        for i in numbers.tolist():
            self.is_dropped[i] = True
            self.counts[self.row[i]][reason] += 1
        for i in numbers[:N_EXAMPLES].tolist():
            self.show(reason, self.pair(i), why(i))

    def show(self, reason, pair, why):
        """Keeps a dropped pair as an example, if there are not enough yet."""
        if len(self.examples[reason]) < N_EXAMPLES:
            self.examples[reason].append({"id": pair.id, "prompt": user_text(pair)[:200], "why": why})


def column(values):
    """An array.array as numpy sees it: the same memory."""
    return np.frombuffer(values, dtype=values.typecode)


def user_text(pair):
    return "\n".join(m["content"] for m in pair.prompt if m["role"] == "user")


def question_of(pair):
    """Equal for two pairs whose user begins with the same words."""
    first = next(m["content"] for m in pair.prompt if m["role"] == "user" and m["content"].strip())
    return grams.digest(" ".join(grams.words(first)) or grams.plain(first))


def gram_sets(pair):
    """(the grams of a pair's prompt, those of its two answers together, those of its rubric)"""
    of_prompt = grams.grams("\n".join(m["content"] for m in pair.prompt), NEAR_GRAM)
    of_answers = [grams.grams("\n".join(texts_of(side)), NEAR_GRAM) for side in (pair.answer_a, pair.answer_b)]
    return of_prompt, np.union1d(*of_answers), grams.grams(pair.rubric, NEAR_GRAM)


def unfit(pair, benchmarks, max_overlap):
    """(reason, why) for which a pair cannot be kept, whatever else is in the pool; or (None, "")."""
    if pair.source == EXCLUDED:
        return "excluded", f"source {EXCLUDED}"
    if pair.winner is None:
        return "no label", "nobody has said which answer is better"
    if equal_answers(pair):
        return "equal answers", "both answers are the same"
    share, where = benchmarks.overlap(user_text(pair))
    if share > max_overlap:
        return "benchmark", f"{share:.0%} of its {benchmarks.ngram}-grams stand in benchmarks, one of them in {where}"
    return None, ""


def benchmark_prompt(record, place):
    """The first of the pairs that a record makes: all of them have its prompt."""
    (pair, undecided), *_ = pairs_in(record, place)
    if pair.rendered is not None:
        raise Bad("a ready-made prompt, which does not say what of it is the question: give the benchmark's own files")
    return [(pair, undecided)]


class Benchmarks:
    """The n-grams of the benchmarks' prompts: of what their users say."""

    def __init__(self, paths, ngram, skip_bad=False):
        self.ngram, self.names, sets = ngram, [], []
        for path in paths:
            for pairs in stream_records(path, benchmark_prompt, skip_bad):
                for pair, _ in pairs:
                    self.names.append(f"{pair.source} {pair.id}")
                    sets.append(grams.grams(user_text(pair), ngram))
        owner = np.repeat(np.arange(len(sets)), [len(gram_set) for gram_set in sets])
        found = np.concatenate([np.empty(0, np.uint64), *sets])
        order = np.argsort(found, kind="stable")
        self.grams, self.owner = found[order], owner[order]

    def overlap(self, text):
        """(share of the text's n-grams that stand in the benchmarks, the name of a record that has one of them)"""
        gram_set = grams.grams(text, self.ngram)
        first = np.searchsorted(self.grams, gram_set)
        is_found = np.searchsorted(self.grams, gram_set, side="right") > first
        if not is_found.any():
            return 0.0, ""
        return float(is_found.mean()), self.names[self.owner[first[is_found][0]]]


# ---- what only the whole pool tells

def drop_equal(pool):
    """Of pairs with the same texts the first stays; if their labels differ, none."""
    side = column(pool.side)
    _, first, group = np.unique(column(pool.texts), return_index=True, return_inverse=True)
    n_of_side = [np.bincount(group, weights=side == value) for value in (0, 1)]
    is_split = (n_of_side[0] > 0) & (n_of_side[1] > 0)
    contradictory = is_split[group]
    duplicate = ~contradictory & (first[group] != np.arange(len(group)))

    def opposite(i):
        return int(np.flatnonzero((group == group[i]) & (side != side[i]))[0])
    pool.drop(np.flatnonzero(contradictory), "contradictory", lambda i: f"against {pool.pair(opposite(i)).id}")
    pool.drop(np.flatnonzero(duplicate), "duplicate", lambda i: f"the same as {pool.pair(int(first[group[i]])).id}")


def drop_long(pool, tokenizer, prompt, limit):
    """Drops the pairs that have a prompt of more than `limit` tokens in either order."""
    numbers = pool.kept()
    n_tok = np.zeros(len(numbers), dtype=np.int32)
    for start in tqdm(range(0, len(numbers), BATCH), desc="lengths", unit_scale=BATCH, unit=" pairs"):
        pairs = [pool.pair(i) for i in numbers[start:start + BATCH]]
        lengths = tokenizer.lengths([render(prompt, pair) for pair in pairs])
        close = [k for k, length in enumerate(lengths) if limit - SEAM < length <= limit]
        others = tokenizer.lengths([render(prompt, swapped(pairs[k])) for k in close]) if close else []
        for k, length in zip(close, others):
            lengths[k] = max(lengths[k], length)
        n_tok[start:start + BATCH] = lengths
    pool.drop(numbers[n_tok > limit], "too long", lambda i: f"{n_tok[np.searchsorted(numbers, i)]} tokens")


def drop_near(pool, threshold):
    """Drops each pair that is like an earlier one which stays: in its prompt, in its answers and in its rubric."""
    numbers = pool.kept()

    @lru_cache(maxsize=256)
    def sets_of(i):
        return gram_sets(pool.pair(i))

    def similarity(i, j):
        return min(map(grams.jaccard, sets_of(numbers[i]), sets_of(numbers[j])))
    band_nb = column(pool.band).reshape(-1, grams.BANDS)[numbers]
    like_n = grams.alike(band_nb, similarity, threshold)

    def other(i):
        return pool.pair(numbers[like_n[np.searchsorted(numbers, i)]])
    pool.drop(numbers[like_n >= 0], "near duplicate", lambda i: f"much like {other(i).id}")


def draw(pool, numbers, n, rng):
    """Keeps n of these pairs."""
    drawn = rng.permutation(numbers)
    pool.drop(np.sort(drawn[n:]), "not drawn", lambda i: f"{n} of {len(numbers)} were drawn")
