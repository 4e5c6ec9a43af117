"""The training pool: pairs of several sources, cleaned, in a balanced order, in two parts for the two stages.

    python data/fetch.py math-step-dpo code-preference-pairs skywork-80k        the paper's three sources
    python data/mix.py --math runs/data/math-step-dpo.jsonl --code runs/data/code-preference-pairs.jsonl \\
        --skywork runs/data/skywork-80k.jsonl --tokenizer runs/data/Qwen/Qwen2.5-7B-Instruct \\
        --benchmarks runs/data/reward-bench.jsonl runs/data/rmb/RMB_dataset --out runs/data/mix

Each of the three may be left out, and --others adds pairs in any form that data/pairs.py reads. A pair is dropped for
the first of these reasons that holds (REASONS): its source is magpie_ultra; it has no label; its answers are equal; its
prompt stands in a benchmark; another pair has the same texts and the opposite label; an earlier pair has the same
texts; its prompt is too long; it is much like an earlier pair; it was not drawn (8,000 of code, --limit). Only then is it
decided which answer is shown as A. The folder --out gets distill.jsonl and rl.jsonl, which share no question, and
mix.json: the options, the inputs' checksums, a table by source of what was read, dropped and kept, and examples of what
was dropped.

The inputs are read once, a line at a time, and what is fit goes to a working file beside the output, as large as the
pool; that file is read again to measure prompts, to compare what may be alike, and to write. Memory holds numbers
alone, some 400 bytes a pair (but a .json input is read as a whole, unlike .jsonl). All draws are the seed's. Sources
come in the order of their names, and so do the files of a folder: how they were listed does not matter.

Departures from the original pool:

1. In its pairs of several turns a slip marks the label: where the chosen answer is A, the other dialogue is headed
   "Chabot B". Here prompt.render puts the same words around the answers in either order.
2. There the chosen answer is A in every second pair, counted through the sources. Here it is A in half of the pairs, to
   one pair, of the pool, of each part, and of each source's pairs of a single turn and of several; the seed draws it.
3. There duplicates, contradictions and pairs of the benchmarks stay in.
4. Code's 8,000 are drawn from those that are otherwise kept; there, from all.
5. Both parts are shuffled. Which 12 % were distilled there is not published; here whole questions are drawn, source by
   source.
"""

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only data/ itself would be searched
from files import one_line_errors, refuse_file, whole, write_records, write_whole  # noqa: E402
from options import check_at_least, check_between, parse_config, refuse_ranks  # noqa: E402
from prompt import load_prompt, missing_section, prompt_path  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from data.fetch import SOURCES  # noqa: E402
from data.fields import Bad, keys_of  # noqa: E402
from data.pairs import json_files, pairs_in, stream_records, swapped, to_json  # noqa: E402
from data.pool import REASONS, Benchmarks, Pool, column, draw, drop_equal, drop_long, drop_near, unfit  # noqa: E402

FETCHED = {"math": "math-step-dpo", "code": "code-preference-pairs", "skywork": "skywork-80k"}


@dataclass(frozen=True)
class Config:
    math: str | None = None  # math-step-dpo.jsonl of data/fetch.py
    code: str | None = None  # code-preference-pairs.jsonl of data/fetch.py
    skywork: str | None = None  # skywork-80k.jsonl of data/fetch.py; its magpie_ultra is left out
    others: tuple[str, ...] = ()  # more pairs, each as NAME:DOMAIN:FILE_OR_FOLDER; no DOMAIN keeps the records' own
    benchmarks: tuple[str, ...] = ()  # files or folders whose prompts may not stand in the pool
    ngram: int = 13  # words in a row that a prompt and a benchmark's prompt share; of a shorter prompt all its words
    max_overlap: float = 0.0  # share of a prompt's n-grams that may stand in the benchmarks
    near: float = 0.8  # Jaccard similarity of prompts and of answers (word 5-grams) from which two pairs are alike
    tokenizer: str | None = None  # the model's folder; without it prompts of any length are kept
    prompt: str = "instruct"  # name in data/prompts or a file: how pairs will be shown
    max_prompt_tokens: int = 4096  # longest prompt as it is shown; needs --tokenizer
    n_code: int = 8000  # so many pairs of --code are drawn, 0 = all
    limit: int = 0  # at most so many pairs in all, drawn, each source by its share; 0 = all
    distill_frac: float = 0.12  # share of each source's pairs for distillation, whole questions; the rest is for RL
    seed: int = 0  # of all draws
    out: str = "runs/data/mix"  # folder for distill.jsonl, rl.jsonl and mix.json
    skip_bad: bool = False  # skip unusable records and count them, instead of stopping at the first

    def __post_init__(self):
        check_at_least(self, 1, "ngram", "max_prompt_tokens")
        check_at_least(self, 0, "n_code", "limit")
        check_between(self, 0.5, 1, "near")
        check_between(self, 0, 1, "max_overlap", "distill_frac")
        check_between(self, 0, 2**40 - 1, "seed")
        if not sources_of(self):
            raise ValueError("nothing to mix: give --math, --code, --skywork or --others")
        if not self.tokenizer and (self.max_prompt_tokens, self.prompt) != (4096, "instruct"):
            raise ValueError("--max-prompt-tokens and --prompt are about tokens: they need --tokenizer")


@dataclass(frozen=True)
class Source:
    name: str
    domain: str
    path: str
    fetched: bool  # one of FETCHED


def sources_of(cfg):
    """The sources in the order in which they are read: of two equal pairs the first is kept."""
    sources = [Source(name, SOURCES[name].domain, getattr(cfg, option), True)
               for option, name in FETCHED.items() if getattr(cfg, option)]
    names = list(FETCHED.values())
    for text in sorted(cfg.others):
        name, *rest = text.split(":", 2)
        if len(rest) < 2 or not re.fullmatch(r"[\w.-]+", name) or not rest[1]:
            raise ValueError(f"--others: {text!r} is not NAME:DOMAIN:FILE; NAME is of letters, digits, '.', '_', '-'")
        if name in names:
            raise ValueError(f"--others: the name {name!r} is taken: give each source its own")
        names.append(name)
        sources.append(Source(name, *rest, False))
    return sources


# ---- reading

def reader_of(source, prompt):
    """The function that makes pairs of one of the source's records; `prompt` is None if nothing will be measured."""
    def convert(record, place):
        if source.fetched and (set(record) != {"id", "source", "domain", *SOURCES[source.name].keys}
                               or record["domain"] != source.domain):
            raise Bad(f"not a line of data/fetch.py's {source.name}.jsonl, its keys are {keys_of(record)}: give that "
                      "file here, and other pairs as --others NAME:DOMAIN:FILE")
        found = []
        for pair, undecided in pairs_in(record, place):
            if pair.rendered is not None:
                raise Bad("a ready-made prompt, whose answers cannot change places: give the pairs that it was made of")
            if prompt and (lacking := missing_section(prompt, pair)):
                kind = "a pair with a rubric" if lacking == "rubric" else "a conversation"
                raise Bad(f"{kind}, and the prompt {prompt.name} has no section [{lacking}]: add one")
            if not source.fetched:
                pair = replace(pair, id=f"{source.name}/{pair.id}", source=source.name,
                               domain=source.domain or pair.domain)
            found.append((swapped(pair) if pair.winner == "b" else pair, undecided))
        return found
    return convert


def open_sources(cfg, prompt):
    """[(source, its records)]: of each the first record has been read, so that no work begins with a wrong file."""
    opened = []
    for source in sources_of(cfg):
        records = stream_records(source.path, reader_of(source, prompt), cfg.skip_bad)
        opened.append((source, itertools.chain([next(records)], records)))
    return opened


def read_pool(opened, benchmarks, max_overlap, path):
    """The Pool of all pairs that are fit by themselves, with its texts at path; the others are counted in it."""
    pool = Pool(path)
    for source, records in opened:
        for pairs in tqdm(records, desc=source.name, unit=" records"):
            if not pairs:
                bad = pool.row_of(source.name, source.name)
                pool.counts[bad] += Counter(["read", "bad record"])
            for pair, _ in pairs:
                row = pool.row_of(source.name, pair.source)
                pool.counts[row]["read"] += 1
                reason, why = unfit(pair, benchmarks, max_overlap)
                if reason:
                    pool.counts[row][reason] += 1
                    pool.show(reason, pair, why)
                else:
                    pool.add(pair, row)
    return pool


def shares(counts, total):
    """Whole numbers that add up to `total` and are in proportion to the counts, by largest remainder."""
    exact = np.array(counts) * total / sum(counts)
    floor = exact.astype(int)
    largest = np.argsort(floor - exact, kind="stable")
    floor[largest[:total - floor.sum()]] += 1
    return floor.tolist()


def draw_all(pool, cfg, rng):
    """--n-code, then --limit."""
    kept = pool.kept()
    names = np.array([source for source, _ in pool.rows])
    of_code = kept[names[column(pool.row)[kept]] == FETCHED["code"]]
    if 0 < cfg.n_code < len(of_code):
        draw(pool, of_code, cfg.n_code, rng)
    kept = pool.kept()
    if 0 < cfg.limit < len(kept):
        members = [kept[column(pool.row)[kept] == row] for row in range(len(pool.rows))]
        for numbers, n in zip(members, shares([len(numbers) for numbers in members], cfg.limit)):
            draw(pool, numbers, n, rng)


# ---- the two parts, and the order

def split(question_n, row_n, frac, rng):
    """bool [N]: the pairs for distillation: whole questions, drawn until each row's share is reached as nearly as whole
    questions allow, and never more."""
    n_rows = row_n.max() + 1
    quota = np.floor(np.bincount(row_n) * frac + 0.5)
    questions, question_n = np.unique(question_n, return_inverse=True)
    by_question = np.argsort(question_n, kind="stable")
    ends = np.cumsum(np.bincount(question_n))
    starts = ends - np.bincount(question_n)
    taken, is_distill = np.zeros(n_rows), np.zeros(len(row_n), dtype=bool)
    for q in rng.permutation(len(questions)):
        members = by_question[starts[q]:ends[q]]
        wanted = np.bincount(row_n[members], minlength=n_rows)
        if (taken + wanted <= quota).all():
            taken += wanted
            is_distill[members] = True
    return is_distill


def chosen_first(is_distill, row_n, is_multi, rng):
    """bool [N]: is the chosen answer shown as A?

    In each cell, a row's pairs of a single turn or of several, half are, in each part. Of an odd number one pair is
    over. A cell that is odd in both parts gives it to A in one and to B in the other. Cells that are odd in the same
    parts give it to A and to B by turns, and the three kinds of them begin so that what is over cancels out in each
    part and in the pool:

        cell         distill  rl    chosen is A in, if the draw says so
        chat         4        21    2 and 11
        chat, turns  3         3    2 and  1
        math         5        30    2 and 15
        all         12        54    6 and 27
    """
    is_first = np.zeros(len(row_n), dtype=bool)
    lean = bool(rng.integers(2))
    leans = {(1, 1): lean, (1, 0): not lean, (0, 1): lean, (0, 0): False}
    cell_n = row_n * 2 + is_multi
    for cell in np.unique(cell_n):
        parts = [rng.permutation(np.flatnonzero((cell_n == cell) & (is_distill == part))) for part in (True, False)]
        kind = tuple(len(part) % 2 for part in parts)
        over = [leans[kind], leans[kind] != (kind == (1, 1))]  # odd in both: the two parts lean to different sides
        for part, odd, extra in zip(parts, kind, over):
            is_first[part[:len(part) // 2 + (odd and extra)]] = True
        leans[kind] = not leans[kind]
    return is_first


# ---- what comes out

def write_part(path, pool, numbers, is_first):
    """Writes the pairs of these numbers in this order; those that are not is_first show the chosen answer as B."""
    pairs = ((pool.pair(i), first) for i, first in zip(tqdm(numbers, desc=path.stem, unit=" pairs"), is_first))
    write_records(path, (to_json(pair if first else swapped(pair)) for pair, first in pairs))


def table_of(pool, row_n, is_multi, is_distill, is_first):
    """A dict for each row, and one of all: what was read, dropped and why, and what of the kept pairs is what."""
    table = []
    for row, (source, own) in enumerate(pool.rows):
        here = row_n == row
        count = pool.counts[row]
        order = {kind: {"a": int((here & turns & is_first).sum()), "b": int((here & turns & ~is_first).sum())}
                 for kind, turns in (("single-turn", ~is_multi), ("multi-turn", is_multi))}
        table.append({"source": own if own == source else f"{source}/{own}", "read": count["read"],
                      "dropped": {reason: count[reason] for reason in REASONS if count[reason]},
                      "kept": int(here.sum()), "distill": int((here & is_distill).sum()),
                      "rl": int((here & ~is_distill).sum()), "chosen_is": order})
    total = {name: sum(row[name] for row in table) for name in ("read", "kept", "distill", "rl")}
    dropped = sum((Counter(row["dropped"]) for row in table), Counter())
    order = {kind: {side: sum(row["chosen_is"][kind][side] for row in table) for side in "ab"}
             for kind in ("single-turn", "multi-turn")}
    return [*table, {"source": "all", "dropped": {r: dropped[r] for r in REASONS if dropped[r]}, "chosen_is": order,
                     **total}]


def as_text(table):
    """The table in print: a column for each reason that dropped any."""
    reasons = list(table[-1]["dropped"])
    lines = [["source", "read", *reasons, "kept", "distill", "rl", "multi-turn", "chosen is A"]]
    for row in table:
        n_multi = sum(row["chosen_is"]["multi-turn"].values())
        n_first = sum(order["a"] for order in row["chosen_is"].values())
        lines.append([row["source"], row["read"], *(row["dropped"].get(reason, 0) for reason in reasons), row["kept"],
                      row["distill"], row["rl"], n_multi, n_first])
    widths = [max(len(str(line[k])) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(str(value).ljust(width) if k == 0 else str(value).rjust(width)
                               for k, (value, width) in enumerate(zip(line, widths))) for line in lines)


def checksums(cfg):
    """{file: size and checksum} of all that the pool depends on."""
    files = [file for source in sources_of(cfg) for file in json_files(source.path)]
    files += [file for path in cfg.benchmarks for file in json_files(path)]
    if cfg.tokenizer:
        files += [prompt_path(cfg.prompt), *sorted(Path(cfg.tokenizer).glob("tokenizer*.json"))]
    found = {}
    for path in files:
        with open(path, "rb") as file:
            found[str(path)] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return found


def main(cfg):
    refuse_ranks("data/mix.py")
    refuse_file(cfg.out)
    if Path(cfg.out).exists():
        raise ValueError(f"{cfg.out}: is already there; choose another --out")
    tokenizer = prompt = None
    if cfg.tokenizer:
        tokenizer, prompt = Tokenizer(cfg.tokenizer), load_prompt(cfg.prompt)
        tokenizer.chat([{"role": "user", "content": ""}])  # a folder without a template is told now
    opened = open_sources(cfg, prompt)
    inputs = checksums(cfg)
    benchmarks = Benchmarks(cfg.benchmarks, cfg.ngram, cfg.skip_bad)

    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with whole(cfg.out) as folder:
        folder.mkdir()
        pool = read_pool(opened, benchmarks, cfg.max_overlap, folder / "pool")
        drop_equal(pool)
        if tokenizer:
            drop_long(pool, tokenizer, prompt, cfg.max_prompt_tokens)
        drop_near(pool, cfg.near)
        rng = np.random.default_rng(cfg.seed)  # one stream: two that begin alike would tie the parts to the order
        draw_all(pool, cfg, rng)

        numbers = pool.kept()
        if not len(numbers):
            raise ValueError("no pair is left; dropped: " + str(dict(sum(pool.counts, Counter()))))
        row_n, is_multi = column(pool.row)[numbers].astype(int), column(pool.is_multi)[numbers] > 0
        is_distill = split(column(pool.question)[numbers], row_n, cfg.distill_frac, rng)
        is_first = chosen_first(is_distill, row_n, is_multi, rng)
        for name, part in (("distill", is_distill), ("rl", ~is_distill)):
            shuffled = rng.permutation(np.flatnonzero(part))
            if len(shuffled):
                write_part(folder / f"{name}.jsonl", pool, numbers[shuffled], is_first[shuffled])

        table = table_of(pool, row_n, is_multi, is_distill, is_first)
        record = {"seed": cfg.seed, "options": asdict(cfg), "inputs": inputs, "table": table,
                  "examples": {reason: found for reason, found in pool.examples.items() if found}}
        write_whole(folder / "mix.json", json.dumps(record, indent=1, ensure_ascii=False))
        pool.file.close()
        (folder / "pool").unlink()
    print(as_text(table))
    for name, part in (("distill", is_distill), ("rl", ~is_distill)):
        said = f"{part.sum()} pairs, the chosen answer is A in {is_first[part].sum()}"
        print(f"{cfg.out}/{name}.jsonl: {said if part.any() else 'not written: no question fell to it'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
