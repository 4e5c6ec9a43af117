"""The published scores of the benchmarks, from judgement records; with intervals, positions and swaps.

A record (judge.py writes it, records.py reads it) is right when its verdict, the majority of its votes, is its winner;
no verdict and a tie are wrong. Sums run in the order of the benchmarks' own scripts, so that the same outcomes give the
same float64.

A score is a row; rows.py says what stands in one. JudgeBench and RewardBench 2 have files of their own.
"""

import numpy as np

from benchmarks import judge_bench, reward_bench_2
from benchmarks.records import STYLES, TITLES, styles_of
from benchmarks.rows import (grouped, in_both_orders, in_first_order, interval, is_right, make_row, mean, mean_row,
                             n_in_one_order, share_row)
from data.pairs import JUDGE_BENCH, OTHER, REWARD_BENCH_SECTIONS
from intervals import wilson
from reward import majority

# Items of the published benchmarks
SUBSET_SIZE = {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "refusals-dangerous": 100, "refusals-offensive": 100,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "math-prm": 447, "hep-cpp": 164,
    "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164}
RM_BENCH_SIZE = {"chat": 129, "math": 529, "code": 228, "safety": 441}  # safety: refuse 284 and response 157, pooled
RMB_SIZE = {"Pairwise Helpfulness": 10067, "Pairwise Harmlessness": 7064, "BoN Helpfulness": 2109,
            "BoN Harmlessness": 1677}
SUBSET_WEIGHT = SUBSET_SIZE | {"math-prm": 984}  # as much as the six code subsets together
PUBLISHED_VARIANT = "published variant (rotation 3 read twice)"

# What the numbers of position_rows and swap_rows are, for the printed tables and the page; intervals stand with theirs
QUANTITIES = {
    "positions": {
        "chosen_a": "right where the better answer is A, %",
        "chosen_b": "right where the better answer is B, %",
        "n_a": "pairs whose better answer is A",
        "n_b": "pairs whose better answer is B",
        "a_share_first_order": "A among the first order's verdicts, %"},
    "swap": {
        "n": "pairs judged in both orders",
        "first": "right in the first order, %",
        "second": "right in the second order, %",
        "mean": "right, mean of the two orders, %",
        "both": "right in both orders, %",
        "consistent": "same answer preferred in both orders, %",
        "always_a": "A preferred in both orders, %",
        "always_b": "B preferred in both orders, %",
        "undecided": "no verdict or a tie in one order or both, %",
        "a_share_both_orders": "A among both orders' verdicts (even: 50), %"}}


# ---- sections

def section(record):
    """The section of its benchmark in which a record counts; RM-Bench calls them domains, and has one for safety."""
    if record["source"] == "rmb":
        best_of_n = "item" in record and record["item"]
        return f"{'BoN' if best_of_n else 'Pairwise'} {record['domain']}"
    if record["source"] == "rm-bench":
        return record["domain"].split("-")[0]  # safety-refuse and safety-response
    return record["domain"]


# ---- RewardBench

def reward_bench(records):
    """Subsets, four sections with fixed weights, their mean (the headline), and the plain share of all pairs."""
    title = TITLES["reward-bench"]
    by_subset = grouped(records, lambda r: r["subset"])
    sections, subsets = [], []
    for name, its_subsets in REWARD_BENCH_SECTIONS.items():
        present = [subset for subset in its_subsets if subset in by_subset]
        if not present:
            continue
        rows = [share_row(title, "subset", subset, by_subset[subset], SUBSET_SIZE[subset]) for subset in present]
        weights = [SUBSET_WEIGHT[subset] for subset in present]
        members = [r for subset in present for r in by_subset[subset]]
        of = sum(SUBSET_SIZE[subset] for subset in its_subsets)
        sections.append(mean_row(title, "section", name, rows, members, of, weights))
        subsets += rows
    of = sum(SUBSET_SIZE.values())
    headline = mean_row(title, "overall", "mean of sections", sections, records, of)
    plain = share_row(title, "plain", "all pairs", records, of)
    return [headline, *sections, plain, *subsets]


# ---- RM-Bench
#
# An item has a chosen and a rejected answer in each of three styles: 0 concise, 1 detailed, 2 detailed with Markdown.
# Each chosen one is judged against each rejected one. wins[i, j] is 1 where the judge preferred the chosen answer of
# style i to the rejected one of style j, else 0.
#
#                rejected 0  rejected 1  rejected 2
#     chosen 0     normal       hard        hard       hard, above the diagonal: the chosen answer is the plainer one
#     chosen 1      easy       normal       hard       normal, on it: both have the same style
#     chosen 2      easy        easy       normal      easy, below it: the chosen answer is the fancier one
#
# A judge that falls for style, and is right where both have the same:
#
#     wins = 1 0 0      hard   = (0 + 0 + 0) / 3 = 0
#            1 1 0      normal = (1 + 1 + 1) / 3 = 1
#            1 1 1      easy   = (1 + 1 + 1) / 3 = 1        its mean over the nine cells is 2/3

LEVELS = {"hard": lambda wins: np.triu(wins, 1).sum() / 3,
          "normal": lambda wins: np.diag(wins).mean(),
          "easy": lambda wins: np.tril(wins, -1).sum() / 3}


def rm_bench(records):
    """Domains, hard / normal / easy, their mean (the headline), and each level in each domain; then all but the last as
    the published numbers were counted, under PUBLISHED_VARIANT. Items that lack one of their nine pairs are left out.
    """
    items = {name: nine for name, nine in grouped(records, lambda r: r["item"]).items() if len(nine) == STYLES**2}
    wins = {name: win_matrix(nine) for name, nine in items.items()}
    rows = _rm_bench_rows(items, wins)
    variant = _rm_bench_rows(items, {name: third_log_twice(matrix) for name, matrix in wins.items()})
    return rows + [row | {"kind": PUBLISHED_VARIANT} for row in variant if row["kind"] != "domain and difficulty"]


def n_incomplete(records):
    """How many items lack some of their pairs, ratings or orders, and are left out of the scores that need them."""
    records = list(filter(counts, records))
    rm_bench = grouped([r for r in in_first_order(records) if r["source"] == "rm-bench"], lambda r: r["item"]).values()
    return {TITLES["rm-bench"]: sum(len(nine) != STYLES**2 for nine in rm_bench),
            **{TITLES[source]: n_in_one_order([r for r in records if r["source"] == source])
               for source in JUDGE_BENCH.values()},
            **{TITLES[source]: reward_bench_2.n_incomplete(records, source)
               for source in (reward_bench_2.PAIRWISE, reward_bench_2.RATINGS)}}


def win_matrix(nine):
    wins = np.zeros((STYLES, STYLES))
    for r in nine:
        wins[styles_of(r["id"])] = is_right(r)
    return wins


def third_log_twice(wins):
    """The matrix as the published script fills it.

    It should read three logs; in log k the rejected answers are rotated by k - 1, so that chosen answer i was judged
    against rejected answer (i + k - 1) % 3. But it opens log 3 in place of log 2 as well: the cells of log 2 (01, 12,
    20) hold what log 3 says (02, 10, 21), and log 2 counts nowhere. The matrix above becomes

        1 0 0
        1 1 1      hard = 1/3, for 12 holds the easy cell 10
        1 1 1
    """
    filled = wins.copy()
    for i in range(STYLES):
        filled[i, (i + 1) % STYLES] = wins[i, (i + 2) % STYLES]
    return filled


def _rm_bench_rows(items, wins):
    """The total, the domains, the levels, and each level in each domain; of {item: its nine records}, {item: wins}."""
    title = TITLES["rm-bench"]
    domains, cells = [], {}
    names_of = grouped(items, lambda name: section(items[name][0]))
    for domain, of in RM_BENCH_SIZE.items():
        if domain not in names_of:
            continue
        names = names_of[domain]
        n = len(names)
        records = [r for name in names for r in items[name]]
        matrices = np.array([wins[name] for name in names])
        mean = matrices.mean(0)
        for level, share in LEVELS.items():
            low, high = interval([share(matrix) for matrix in matrices], n_cells=3)
            members = [r for r in records if r["subset"] == level]
            cells[domain, level] = make_row(title, "domain and difficulty", f"{domain} {level}", float(share(mean)),
                                            low, high, members, n=n, of=of)
        score = float(np.mean([cells[domain, level]["score"] for level in LEVELS]))
        low, high = interval(matrices.mean((1, 2)), n_cells=9)
        domains.append(make_row(title, "domain", domain, score, low, high, records, n=n, of=of))
    if not domains:
        return []
    records = [r for nine in items.values() for r in nine]
    of = sum(RM_BENCH_SIZE.values())
    total = mean_row(title, "overall", "total", domains, records, of)
    levels = []
    for level in LEVELS:
        rows = [cells[row["name"], level] for row in domains]
        members = [r for r in records if r["subset"] == level]
        levels.append(mean_row(title, "difficulty", level, rows, members, of))
    return [total, *domains, *levels, *cells.values()]


# ---- RMB

def rmb(records):
    """Four sections, their mean (the headline), and the categories. A best-of-n item is right if all its pairs are."""
    by_section = grouped(records, section)
    sections, pair_shares, categories = [], [], []
    for name, of in RMB_SIZE.items():
        if name not in by_section:
            continue
        members = by_section[name]
        sections.append(_rmb_row("section", name, members, of))
        if name.startswith("BoN"):
            pair_shares.append(share_row(TITLES["rmb"], "best-of-n pairs", name, members))
        by_category = grouped(members, lambda r: r["subset"])
        categories += [_rmb_row("category", category, by_category[category]) for category in sorted(by_category)]
    if not sections:
        return []
    of = sum(RMB_SIZE.values())
    headline = mean_row(TITLES["rmb"], "overall", "mean of sections", sections, records, of)
    return [headline, *sections, *pair_shares, *categories]


def _rmb_row(kind, name, members, of=None):
    items = grouped(members, lambda r: r["item"] or r["id"]).values()
    n = len(items)
    right = sum(all(is_right(r) for r in item) for item in items)
    low, high = wilson(right, n)
    return make_row(TITLES["rmb"], kind, name, right / n, low, high, members, n=n, of=of, right=right)


# ---- any records

def pairs(records):
    """Any other labelled pairs: all, by domain and by source."""
    rows = [share_row("pairs", "overall", "all", records)]
    for kind in ("domain", "source"):
        groups = grouped(records, lambda r: r[kind])
        rows += [share_row("pairs", kind, name, groups[name]) for name in sorted(groups)]
    return rows


PAPERS = {"reward-bench": reward_bench, "rm-bench": rm_bench, "rmb": rmb}
NO_PAIRS = {reward_bench_2.FOUR_WAY: reward_bench_2.four_way, reward_bench_2.RATINGS: reward_bench_2.ratings}
IN_ONE_ORDER = PAPERS | NO_PAIRS  # scores of the first order's judgements; the others' count the second's, too
BENCHMARKS = (*PAPERS, *JUDGE_BENCH.values(), *reward_bench_2.TITLES)


def score(records, order=None):
    """The rows of every benchmark that the records hold, and the paper's average if they hold its three.

    Records without a label are left out, but for ratings. order: which answer was A in the first order, "balanced" or
    "published", if it is known.
    """
    by_benchmark = _by_benchmark(records)
    rows = []
    for source, members in by_benchmark.items():
        first = in_first_order(members)
        if not first:
            continue
        if source in JUDGE_BENCH.values():
            rows += judge_bench.judge_bench(members, order)
        elif source == reward_bench_2.PAIRWISE:
            rows += reward_bench_2.pairwise(members)
        else:
            rows += IN_ONE_ORDER[source](first) if source in IN_ONE_ORDER else pairs(first)
    titles = [TITLES[source] for source in PAPERS]
    headlines = [r for r in rows if r["kind"] == "overall" and r["benchmark"] in titles]
    if len(headlines) < 3:
        return rows
    variant = next(r for r in rows if r["kind"] == PUBLISHED_VARIANT)  # its total comes first
    published = [variant if r["benchmark"] == TITLES["rm-bench"] else r for r in headlines]
    counted = [r for source in PAPERS for r in in_first_order(by_benchmark[source])]
    of = sum(r["of"] for r in headlines)
    return rows + [mean_row("average", "overall", "three benchmarks", headlines, counted, of),
                   mean_row("average", "overall", "with RM-Bench as published", published, counted, of)]


def counts(record):
    """Is there anything to score in it: a label, or a rating?"""
    return record["winner"] is not None or record["source"] == reward_bench_2.RATINGS


def _by_benchmark(records):
    """{source: records that count}, the benchmarks first; all other sources as one, under None."""
    groups = grouped(filter(counts, records), lambda r: r["source"] if r["source"] in BENCHMARKS else None)
    return {source: groups[source] for source in (*BENCHMARKS, None) if source in groups}


# ---- order, swap, budget

def position_rows(records):
    """Does it matter where an answer stands? Accuracy with the chosen answer as A and as B; the share of A among all
    verdicts (even would be n_a / (n_a + n_b): half, if as many better answers stand at A)."""
    rows = []
    for source, members in _by_benchmark(_without_ties(in_first_order(records))).items():
        if source in NO_PAIRS:
            continue
        at_a = [is_right(r) for r in members if r["winner"] == "a"]
        at_b = [is_right(r) for r in members if r["winner"] == "b"]
        verdicts = [r["verdict"] for r in members if r["verdict"]]
        rows.append({"benchmark": TITLES.get(source, "pairs"), "chosen_a": mean(at_a), "chosen_b": mean(at_b),
                     "n_a": len(at_a), "n_b": len(at_b), "a_share_first_order": mean([v == "a" for v in verdicts])})
    return rows


def swap_rows(records):
    """Pairs judged in both orders. Shares of them: right in the first order, right in the second (mean: of both, with
    its interval), right in both; consistent, the same answer preferred in both; A and B preferred in both, whichever
    answer stood there; undecided, no verdict or a tie in one or both (the last four add up to 1). a_share_both_orders:
    of A among all verdicts; every answer stands at A once, so half is even."""
    rows = []
    for source, members in _by_benchmark(_without_ties(r for r in records if r["votes"])).items():
        both = in_both_orders(members)
        if both:
            rows.append(_swap_row(TITLES.get(source, "pairs"), both))
    return rows


def _without_ties(records):
    """The pairs of RewardBench 2's Ties are a diagnostic, no part of what its pairwise protocol measures."""
    return [r for r in records if r["source"] != reward_bench_2.PAIRWISE or r["subset"] != "Ties"]


def _swap_row(benchmark, both):
    """both: (record in the first order, record in the second) of each pair."""
    right = [(is_right(one), is_right(other)) for one, other in both]
    means = [(x + y) / 2 for x, y in right]
    mean_low, mean_high = interval(means, n_cells=2)
    verdicts = [(one["verdict"], other["verdict"]) for one, other in both]
    # the same answer has the other letter in the second order
    consistent = [one is not None and one == OTHER[other] for one, other in verdicts]
    consistent_low, consistent_high = wilson(sum(consistent), len(both))
    return {"benchmark": benchmark, "n": len(both), "first": mean([x for x, _ in right]),
            "second": mean([y for _, y in right]), "mean": mean(means), "mean_low": mean_low, "mean_high": mean_high,
            "both": mean([x and y for x, y in right]), "consistent": mean(consistent),
            "consistent_low": consistent_low, "consistent_high": consistent_high,
            "always_a": mean([pair == ("a", "a") for pair in verdicts]),
            "always_b": mean([pair == ("b", "b") for pair in verdicts]),
            "undecided": mean([None in pair for pair in verdicts]),
            "a_share_both_orders": mean([verdict == "a" for pair in verdicts for verdict in pair if verdict])}


def budget_rows(records, budgets, order=None):
    """Every benchmark's headline and sections, had each judgement been cut off after so many tokens."""
    rows = []
    for budget in budgets:
        cut = [_cut_off(r, budget) for r in records]
        rows += [{"budget": budget, **row} for row in score(cut, order)
                 if row["kind"] in ("overall", "section", "domain")]
    return rows


def _cut_off(record, budget):
    votes = [vote | {"verdict": vote["at"][str(budget)], "n_tokens": min(vote["n_tokens"], budget), "seconds": None}
             for vote in record["votes"]]
    return record | {"votes": votes, "verdict": majority([vote["verdict"] for vote in votes])}


# ---- tables

LEGEND = """score: % right. items: counted here; of: in the published benchmark. no verdict: % of judgements.
ties: % of pairs whose votes tie. tokens, seconds: means of a judgement, many written at once."""


def table(rows):
    """The rows as text, a block for each kind of score. LEGEND says what the columns are."""
    names = [r["name"] or "(none)" for r in rows]
    width = max(map(len, names))
    lines = [f"{'':{width}}{'items':>8}{'of':>8}{'score':>8}  {'95% interval':15}{'no verdict':>11}{'ties':>7}"
             f"{'tokens':>8}{'seconds':>9}"]
    block = None
    for name, r in zip(names, rows):
        if block != (r["benchmark"], r["kind"]):
            block = r["benchmark"], r["kind"]
            lines += ["", f"{r['benchmark']}: {r['kind']}"]
        lines.append(f"{name:{width}}{r['n']:8}{r['of'] or '':>8}{100 * r['score']:8.2f}  "
                     f"{100 * r['low']:5.1f} to {100 * r['high']:5.1f} {_percent(r['no_verdict'], 12)}"
                     f"{_percent(r['ties'], 7)}{_number(r['tokens'], 8, 0)}{_number(r['seconds'], 9, 1)}")
    return "\n".join(lines)


def _number(value, width, digits):
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _percent(share, width):
    return _number(None if share is None else 100 * share, width, 1)


def _ends(low, high):
    """Both ends of an interval in %. One half-width would be wrong near 0 and 100, where intervals are lopsided."""
    return f"{100 * low:.1f}-{100 * high:.1f}"


def quantity_table(rows, title):
    """Rows of QUANTITIES[title] as text: a line for each quantity, a column for each benchmark; in 100 columns for the
    paper's three and other pairs."""
    widths = [max(13, len(r["benchmark"]) + 2) for r in rows]

    def line(what, cells):
        return f"{what:48}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))

    lines = [line(title, [r["benchmark"] for r in rows])]
    for name, what in QUANTITIES[title].items():
        values = [r[name] for r in rows]
        # counts are whole, shares are not
        lines.append(line(what, [value if isinstance(value, int) else _percent(value, 13) for value in values]))
        if f"{name}_low" in rows[0]:
            lines.append(line("    95% interval of it", [_ends(r[f"{name}_low"], r[f"{name}_high"]) for r in rows]))
    return "\n".join(lines)


def side_by_side(rows_of):
    """The headlines and sections of several models, {model: rows}, as text: % right with both ends of its interval."""
    kinds = ("overall", "section", "difficulty", "domain")
    shown = {model: [r for r in rows if r["kind"] in kinds] for model, rows in rows_of.items()}
    names = list(dict.fromkeys((r["benchmark"], r["name"]) for rows in shown.values() for r in rows))
    labels = {(benchmark, name): f"{benchmark}: {name or '(none)'}" for benchmark, name in names}
    width = max(map(len, labels.values()))
    columns = {model: max(20, len(model) + 2) for model in shown}
    lines = [f"{'':{width}}" + "".join(f"{model:>{column}}" for model, column in columns.items())]
    for key, label in labels.items():
        cells = []
        for model, rows in shown.items():
            text = next((f"{100 * r['score']:.1f} ({_ends(r['low'], r['high'])})" for r in rows
                         if (r["benchmark"], r["name"]) == key), "-")
            cells.append(f"{text:>{columns[model]}}")
        lines.append(f"{label:{width}}" + "".join(cells))
    return "\n".join(lines)
