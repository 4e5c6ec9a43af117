"""The published scores of RewardBench, RM-Bench and RMB, from judgement records; with intervals, positions and swaps.

A record (sample.py, benchmarks.py) is right when its verdict, the majority of its votes, is its winner; no verdict and
a tie are wrong. Sums run in the order of the benchmarks' own scripts, so that the same outcomes give the same float64.

A score is a row: {"benchmark", "kind", "name", "n" (items counted), "of" (items in the published benchmark, or None),
"score", "low", "high" (95% interval), "right" (items, where a score counts them), "no_verdict" (share of votes), "ties"
(share of records), "tokens", "seconds" (means over votes)}. Shares are in [0, 1].
"""

import math

import numpy as np

from benchmarks.records import TITLES
from data.pairs import OTHER, REWARD_BENCH_SECTIONS, SWAPPED
from reward import majority

SUBSET_SIZE = {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "refusals-dangerous": 100, "refusals-offensive": 100,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "math-prm": 447, "hep-cpp": 164,
    "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164}
SUBSET_WEIGHT = SUBSET_SIZE | {"math-prm": 984}  # as much as the six code subsets together
RM_BENCH_SIZE = {"chat": 129, "math": 529, "code": 228, "safety": 441}  # safety: refuse 284 and response 157, pooled
RMB_SIZE = {"Pairwise Helpfulness": 10067, "Pairwise Harmlessness": 7064, "BoN Helpfulness": 2109,
            "BoN Harmlessness": 1677}
PUBLISHED_VARIANT = "published variant (rotation 3 read twice)"


# ---- intervals

def wilson(right, n, z=1.96):
    """95% interval of a share, (low, high) in [0, 1] (Wilson 1927): honest near 0 and 1, unlike +-z sqrt(pq/n)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(values, n_cells=1):
    """95% interval of the mean of independent items' values, each the mean of n_cells yes-or-no outcomes.

    The outcomes within an item go together, so n items are worth between n and n * n_cells outcomes: Wilson's interval
    for as many as would give the variance seen between items.
    """
    n, p = len(values), float(np.mean(values))
    spread = p * (1 - p) / max(float(np.var(values)), 1e-12)  # 1 for single outcomes, n_cells for independent ones
    worth = n * min(max(spread, 1.0), n_cells)
    return wilson(p * worth, worth)


def combined(parts):
    """(score, low, high) of a weighted mean of independent scores: parts are (weight, score, low, high).

    The distances to the ends add up like standard deviations (Zou and Donner 2008).
    """
    total, mean = sum(weight for weight, *_ in parts), 0.0
    for weight, score, *_ in parts:  # not sum(), which carries rounding errors along since Python 3.12
        mean += weight * score
    mean /= total
    down = math.sqrt(sum((weight / total * (low - score)) ** 2 for weight, score, low, _ in parts))
    up = math.sqrt(sum((weight / total * (high - score)) ** 2 for weight, score, _, high in parts))
    return mean, max(0.0, mean - down), min(1.0, mean + up)


# ---- rows

def is_right(record):
    return record["verdict"] == record["winner"] if record["votes"] else record["recorded"] == 1


def make_row(benchmark, kind, name, score, low, high, records, n, of=None, right=None):
    votes = [vote for r in records for vote in r["votes"]]
    ties = [r["verdict"] is None and any(vote["verdict"] for vote in r["votes"]) for r in records if r["votes"]]
    return {"benchmark": benchmark, "kind": kind, "name": name, "n": n, "of": of, "score": score, "low": low,
            "high": high, "right": right, "no_verdict": _mean([vote["verdict"] is None for vote in votes]),
            "ties": _mean(ties), "tokens": _mean([vote["n_tokens"] for vote in votes]),
            "seconds": _mean([vote["seconds"] for vote in votes])}


def _mean(values):
    return sum(values) / len(values) if values and None not in values else None


def share_row(benchmark, kind, name, records, of=None):
    """The share of these records that are right."""
    n, right = len(records), sum(map(is_right, records))
    return make_row(benchmark, kind, name, right / n, *wilson(right, n), records, n, of, right)


def mean_row(benchmark, kind, name, rows, records, of=None, weights=None):
    """The weighted mean of rows, by default the plain one."""
    parts = [(weight, r["score"], r["low"], r["high"]) for weight, r in zip(weights or [1] * len(rows), rows)]
    return make_row(benchmark, kind, name, *combined(parts), records, sum(r["n"] for r in rows), of)


def grouped(records, key):
    groups = {}
    for r in records:
        groups.setdefault(key(r), []).append(r)
    return groups


# ---- the benchmarks

def section(record):
    """The section of its benchmark in which a record counts; RM-Bench calls them domains, and has one for safety."""
    if record["source"] == "rmb":
        return f"{'BoN' if 'item' in record and record['item'] else 'Pairwise'} {record['domain']}"
    return record["domain"].split("-")[0] if record["source"] == "rm-bench" else record["domain"]


def reward_bench(records):
    """Subsets, four sections with fixed weights, their mean (the headline), and the plain share of all pairs."""
    by_subset = grouped(records, lambda r: r["subset"])
    subsets, sections = [], []
    for title, names in REWARD_BENCH_SECTIONS.items():
        rows = [share_row("RewardBench", "subset", t, by_subset[t], SUBSET_SIZE[t]) for t in names if t in by_subset]
        if rows:
            sections.append(mean_row("RewardBench", "section", title, rows,
                                     [r for t in names for r in by_subset.get(t, [])],
                                     sum(SUBSET_SIZE[t] for t in names), [SUBSET_WEIGHT[r["name"]] for r in rows]))
        subsets += rows
    of = sum(SUBSET_SIZE.values())
    return [mean_row("RewardBench", "overall", "mean of sections", sections, records, of), *sections,
            share_row("RewardBench", "plain", "all pairs", records, of), *subsets]


LEVELS = {"hard": lambda m: np.triu(m, 1).sum() / 3, "normal": lambda m: np.diag(m).mean(),
          "easy": lambda m: np.tril(m, -1).sum() / 3}


def rm_bench(records):
    """Domains, hard / normal / easy, their mean (the headline), from the nine cells of each item; then the same as the
    published numbers were counted, under that name.

    M[row][column] is the share of items right with the chosen answer in style row, the rejected one in style column.
    Items that lack one of their nine pairs are left out.
    """
    items = {item: members for item, members in grouped(records, lambda r: r["item"]).items() if len(members) == 9}
    cells = {item: _matrix(members) for item, members in items.items()}
    kinds = "overall", "domain", "difficulty", "domain and difficulty"
    intended, details = _rm_bench_rows(items, cells, kinds)
    variant, _ = _rm_bench_rows(items, {item: _read_twice(m) for item, m in cells.items()}, [PUBLISHED_VARIANT] * 4)
    return intended + details + variant


def n_incomplete(records):
    """How many of RM-Bench's items lack one of their nine pairs."""
    members = [r for r in records if r["source"] == "rm-bench" and r["winner"] and not r.get("swapped")]
    return sum(len(group) != 9 for group in grouped(members, lambda r: r["item"]).values())


def _rm_bench_rows(items, cells, kinds):
    """(rows of total, domains and levels; rows of each level in each domain) of items' matrices."""
    by_level, domains = {level: [] for level in LEVELS}, []
    of_domain = grouped(items, lambda item: section(items[item][0]))
    for domain, of in RM_BENCH_SIZE.items():
        if domain not in of_domain:
            continue
        matrices = np.array([cells[item] for item in of_domain[domain]])
        records = [r for item in of_domain[domain] for r in items[item]]
        mean, n = matrices.sum(0) / len(matrices), len(matrices)
        for level, of_matrix in LEVELS.items():
            by_level[level].append(make_row(
                "RM-Bench", kinds[3], f"{domain} {level}", float(of_matrix(mean)),
                *interval([of_matrix(m) for m in matrices], 3), [r for r in records if r["subset"] == level], n, of))
        three = [rows[-1]["score"] for rows in by_level.values()]
        domains.append(make_row("RM-Bench", kinds[1], domain, float(np.mean(three)),
                                *interval(matrices.mean((1, 2)), 9), records, n, of))
    if not domains:
        return [], []
    records, of = [r for members in items.values() for r in members], sum(RM_BENCH_SIZE.values())
    levels = [mean_row("RM-Bench", kinds[2], level, rows, [r for r in records if r["subset"] == level], of)
              for level, rows in by_level.items()]
    return ([mean_row("RM-Bench", kinds[0], "total", domains, records, of), *domains, *levels],
            [row for rows in zip(*by_level.values()) for row in rows])


def _matrix(members):
    """[3][3] outcomes of one item: row, the chosen answer's style; column, the rejected one's."""
    cells = np.zeros((3, 3))
    for r in members:
        cells[int(r["id"][-2]), int(r["id"][-1])] = is_right(r)
    return cells


def _read_twice(cells):
    """The matrix as the published script filled it: the third rotation's outcomes in place of the second's too."""
    out = cells.copy()
    out[0, 1], out[1, 2], out[2, 0] = cells[0, 2], cells[1, 0], cells[2, 1]
    return out


def rmb(records):
    """Four sections, their mean (the headline), and the categories. A best-of-n item is right if all its pairs are."""
    rows, categories, extra, by_section = [], [], [], grouped(records, section)
    for name, of in RMB_SIZE.items():
        if name not in by_section:
            continue
        members = by_section[name]
        rows.append(_rmb_row("section", name, members, of))
        if name.startswith("BoN"):
            extra.append(share_row("RMB", "best-of-n pairs", name, members))
        categories += [_rmb_row("category", category, group)
                       for category, group in sorted(grouped(members, lambda r: r["subset"]).items())]
    if not rows:
        return []
    return [mean_row("RMB", "overall", "mean of sections", rows, records, sum(RMB_SIZE.values())), *rows, *extra,
            *categories]


def _rmb_row(kind, name, members, of=None):
    items = list(grouped(members, lambda r: r["item"] or r["id"]).values())
    right = sum(all(map(is_right, item)) for item in items)
    return make_row("RMB", kind, name, right / len(items), *wilson(right, len(items)), members, len(items), of, right)


def pairs(records):
    """Any other labelled pairs: all, by domain and by source."""
    groups = grouped(records, lambda r: ("overall", "all"))
    for kind in ("domain", "source"):
        groups |= dict(sorted(grouped(records, lambda r: (kind, r[kind])).items()))
    return [share_row("pairs", *name, members) for name, members in groups.items()]


BENCHMARKS = {"reward-bench": reward_bench, "rm-bench": rm_bench, "rmb": rmb}


def score(records):
    """The rows of every benchmark that the records hold, and the paper's average if they hold all three.

    Records without a label are left out; so are judgements in the swapped order, which swap_rows counts.
    """
    by_benchmark = _by_benchmark(r for r in records if not r.get("swapped"))
    rows = [row for source, members in by_benchmark.items() for row in BENCHMARKS.get(source, pairs)(members)]
    overall = [r for r in rows if r["kind"] == "overall" and r["benchmark"] != "pairs"]
    if len(overall) == 3:
        variant = next(r for r in rows if r["kind"] == PUBLISHED_VARIANT)  # its total comes first
        published = [variant if r["benchmark"] == "RM-Bench" else r for r in overall]
        counted = [r for source in BENCHMARKS for r in by_benchmark[source]]
        for name, three in (("three benchmarks", overall), ("with RM-Bench as published", published)):
            rows.append(mean_row("average", "overall", name, three, counted, sum(r["of"] for r in three)))
    return rows


def _by_benchmark(records):
    """{source: labelled records}, the benchmarks first; all other sources as one, under None."""
    groups = grouped((r for r in records if r["winner"]), lambda r: r["source"] if r["source"] in BENCHMARKS else None)
    return {source: groups[source] for source in (*BENCHMARKS, None) if source in groups}


# ---- order, swap, budget

def position_rows(records):
    """Does it matter where an answer stands? Accuracy with the chosen answer as A and as B; the share of A among all
    verdicts (1/2 would be even, if as many chosen answers stand at A)."""
    rows = []
    for source, members in _by_benchmark(r for r in records if not r.get("swapped")).items():
        by_place = {side: [is_right(r) for r in members if r["winner"] == side] for side in "ab"}
        verdicts = [r["verdict"] for r in members if r["verdict"]]
        rows.append({"benchmark": TITLES.get(source, "pairs"),
                     **{f"chosen_{side}": _mean(by_place[side]) for side in "ab"},
                     **{f"n_{side}": len(by_place[side]) for side in "ab"},
                     "a_share": _mean([v == "a" for v in verdicts])})
    return rows


def swap_rows(records):
    """Pairs judged in both orders. Shares of them: right in the first order, right in the second (mean: of both, with
    its interval), right in both; consistent, the same answer preferred in both; A and B preferred in both, whichever
    answer stood there; undecided, no verdict in one or both. a_share: of A among all verdicts."""
    rows = []
    for source, members in _by_benchmark(r for r in records if r["votes"]).items():
        first = {r["id"]: r for r in members if not r.get("swapped")}
        second = [(r["id"].removesuffix(SWAPPED), r) for r in members if r.get("swapped")]
        both = [(first[name], r) for name, r in second if name in first]
        if not both:
            continue
        pairs = [(one["verdict"], other["verdict"]) for one, other in both]
        right = [(is_right(one), is_right(other)) for one, other in both]
        low, high = interval([(x + y) / 2 for x, y in right], 2)
        consistent = [one is not None and one == OTHER[other] for one, other in pairs]
        rows.append({
            "benchmark": TITLES.get(source, "pairs"), "n": len(both), "first": _mean([x for x, _ in right]),
            "second": _mean([y for _, y in right]), "mean": _mean([(x + y) / 2 for x, y in right]), "mean_low": low,
            "mean_high": high, "both": _mean([x and y for x, y in right]), "consistent": _mean(consistent),
            **dict(zip(("consistent_low", "consistent_high"), wilson(sum(consistent), len(both)))),
            "always_a": _mean([pair == ("a", "a") for pair in pairs]),
            "always_b": _mean([pair == ("b", "b") for pair in pairs]),
            "undecided": _mean([None in pair for pair in pairs]),
            "a_share": _mean([v == "a" for pair in pairs for v in pair if v])})
    return rows


def budget_rows(records, budgets):
    """Every benchmark's headline and sections, had each judgement been cut off after so many tokens."""
    rows = []
    for budget in budgets:
        cut = []
        for r in records:
            votes = [vote | {"verdict": vote["at"][str(budget)], "n_tokens": min(vote["n_tokens"], budget),
                             "seconds": None} for vote in r["votes"]]
            cut.append(r | {"votes": votes, "verdict": majority([vote["verdict"] for vote in votes])})
        rows += [{"budget": budget, **row} for row in score(cut) if row["kind"] in ("overall", "section", "domain")]
    return rows


# ---- tables

def table(rows):
    """The rows as text, a block for each kind of score."""
    width = max(len(r["name"]) for r in rows)
    lines = [f"{'':{width}}{'items':>8}{'of':>8}{'score':>8}  {'95% interval':15}{'no verdict':>11}{'ties':>7}"
             f"{'tokens':>8}{'seconds':>9}"]
    for i, r in enumerate(rows):
        if i == 0 or (r["benchmark"], r["kind"]) != (rows[i - 1]["benchmark"], rows[i - 1]["kind"]):
            lines += ["", f"{r['benchmark']}: {r['kind']}"]
        lines.append(f"{r['name']:{width}}{r['n']:8}{r['of'] or '':>8}{100 * r['score']:8.2f}  "
                     f"{100 * r['low']:5.1f} to {100 * r['high']:5.1f} {_cell(r['no_verdict'], 100, 12, 1)}"
                     f"{_cell(r['ties'], 100, 7, 1)}{_cell(r['tokens'], 1, 8, 0)}{_cell(r['seconds'], 1, 9, 1)}")
    return "\n".join(lines)


def _cell(value, factor, width, digits):
    return f"{'-':>{width}}" if value is None else f"{factor * value:{width}.{digits}f}"


def wide_table(rows, title):
    """Rows of other shares (positions, swaps) as text, one line each, in %."""
    names = [name for name in rows[0] if name != "benchmark"]
    lines = [f"{title:16}" + "".join(f"{name.replace('_', ' '):>{len(name) + 2}}" for name in names)]
    for r in rows:
        cells = [f"{r[name]:{len(name) + 2}}" if isinstance(r[name], int) else _cell(r[name], 100, len(name) + 2, 1)
                 for name in names]  # counts are whole, shares are not
        lines.append(f"{r['benchmark']:16}" + "".join(cells))
    return "\n".join(lines)


def side_by_side(scores_of):
    """The headlines and sections of several models, {model: rows}, as text, in % with half the interval's width."""
    kinds = ("overall", "section", "difficulty", "domain")
    names = list(dict.fromkeys((r["benchmark"], r["name"]) for rows in scores_of.values() for r in rows
                               if r["kind"] in kinds))
    width = max(len(f"{benchmark}: {name}") for benchmark, name in names)
    columns = {model: max(16, len(model) + 2) for model in scores_of}
    lines = [f"{'':{width}}" + "".join(f"{model:>{columns[model]}}" for model in scores_of)]
    for benchmark, name in names:
        cells = []
        for model, rows in scores_of.items():
            row = [r for r in rows if (r["benchmark"], r["name"]) == (benchmark, name) and r["kind"] in kinds]
            text = f"{100 * row[0]['score']:.1f} +-{50 * (row[0]['high'] - row[0]['low']):.1f}" if row else "-"
            cells.append(f"{text:>{columns[model]}}")
        lines.append(f"{f'{benchmark}: {name}':{width}}" + "".join(cells))
    return "\n".join(lines)
