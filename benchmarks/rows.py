"""Rows of scores: a share or a mean with its interval, and the few things that every benchmark's score is made of.

A row is {"benchmark", "kind", "name", "n" (items counted), "of" (items in the published benchmark, or None), "score",
"low", "high" (95% interval), "right" (items, where a score counts them), "no_verdict" (share of votes), "ties" (share
of records), "tokens", "seconds" (means over votes)}. Shares are in [0, 1].
"""

import math

import numpy as np

from data.fields import Bad
from data.pairs import SWAPPED
from intervals import wilson

# ---- judgement records

def is_swapped(record):
    """Is this a judgement in the other order (--swap)?"""
    return "swapped" in record and bool(record["swapped"])


def in_first_order(records):
    return [r for r in records if not is_swapped(r)]


def in_both_orders(records):
    """[(record in the first order, record in the second)] of the pairs that were judged in both."""
    first = {r["id"]: r for r in in_first_order(records)}
    second = {r["id"].removesuffix(SWAPPED): r for r in records if is_swapped(r)}
    return [(first[name], second[name]) for name in second if name in first]


def n_in_one_order(records):
    """How many pairs were judged in one order only, where any was judged in the other."""
    if not any(map(is_swapped, records)):
        return 0
    names = {r["id"].removesuffix(SWAPPED) for r in records}
    return len(names) - len(in_both_orders(records))


def output_record(pair, votes, verdict, recorded):
    """The judgement record of somebody else's output, which was counted as right (1) or not (0)."""
    if recorded not in (0, 1):
        raise Bad(f"{pair.id} was counted as {recorded}: it must be 1 (right) or 0: remove the record")
    return {"id": pair.id, "prompt_hash": None, "n_prompt_tokens": None, "votes": votes, "verdict": verdict,
            "winner": pair.winner, "source": pair.source, "domain": pair.domain, "subset": pair.subset,
            "item": pair.item, "seconds": None, "recorded": recorded}


# ---- intervals

def interval(values, n_cells=1):
    """95% interval of the mean of independent items' values, each the mean of n_cells yes-or-no outcomes.

    The outcomes within an item go together, so n items are worth between n and n * n_cells outcomes: Wilson's interval
    for as many as would give the variance seen between items.
    """
    n = len(values)
    p = float(np.mean(values))
    spread = p * (1 - p) / max(float(np.var(values)), 1e-12)  # 1 for single outcomes, n_cells for independent ones
    worth = n * min(max(spread, 1.0), n_cells)
    return wilson(p * worth, worth)


def combined(parts):
    """(score, low, high) of a weighted mean of independent scores: parts are (weight, score, low, high).

    The distances to the ends add up like standard deviations (Zou and Donner 2008).
    """
    total = sum(weight for weight, _, _, _ in parts)
    mean = 0.0
    for weight, score, _, _ in parts:  # not sum(), which carries rounding errors along since Python 3.12
        mean += weight * score
    mean /= total
    down = math.sqrt(sum((weight / total * (low - score)) ** 2 for weight, score, low, _ in parts))
    up = math.sqrt(sum((weight / total * (high - score)) ** 2 for weight, score, _, high in parts))
    return mean, max(0.0, mean - down), min(1.0, mean + up)


# ---- rows

def is_right(record):
    """By its verdict; an outcome without texts by what was recorded."""
    return record["verdict"] == record["winner"] if record["votes"] else record["recorded"] == 1


def make_row(benchmark, kind, name, score, low, high, records, n, of=None, right=None):
    """A row as above; the shares and means over votes and records are those of `records`."""
    votes = [vote for r in records for vote in r["votes"]]
    # undecided though some vote had a verdict
    ties = [r["verdict"] is None and any(vote["verdict"] for vote in r["votes"]) for r in records if r["votes"]]
    return {"benchmark": benchmark, "kind": kind, "name": name, "n": n, "of": of, "score": score, "low": low,
            "high": high, "right": right, "no_verdict": mean([vote["verdict"] is None for vote in votes]),
            "ties": mean(ties), "tokens": mean([vote["n_tokens"] for vote in votes]),
            "seconds": mean([vote["seconds"] for vote in votes])}


def mean(values):
    return sum(values) / len(values) if values and None not in values else None


def share_row(benchmark, kind, name, records, of=None):
    """The share of these records that are right."""
    n = len(records)
    right = sum(is_right(r) for r in records)
    low, high = wilson(right, n)
    return make_row(benchmark, kind, name, right / n, low, high, records, n=n, of=of, right=right)


def mean_row(benchmark, kind, name, rows, records, of=None, weights=None):
    """The weighted mean of rows, by default the plain one."""
    weights = weights or [1] * len(rows)
    score, low, high = combined([(weight, r["score"], r["low"], r["high"]) for weight, r in zip(weights, rows)])
    n = sum(r["n"] for r in rows)
    return make_row(benchmark, kind, name, score, low, high, records, n=n, of=of)


def grouped(records, key):
    groups = {}
    for r in records:
        groups.setdefault(key(r), []).append(r)
    return groups
