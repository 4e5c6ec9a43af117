"""How good judgements are as texts: whole chains, quotations that occur, weights that sum to 100, balance, lengths.

    python data/quality.py runs/data/rm-r1-distill-sft.jsonl --tokenizer runs/data/Qwen/Qwen2.5-7B-Instruct
    python data/quality.py first-pass.jsonl second-pass.jsonl --out quality.json            side by side

A file holds chains in any form that data/pairs.py reads (RM-R1's logs too), or judgements of judge.py or evaluate.py,
where each vote is a text of its own. `python -m report FILE` shows the same table on the page. What is counted:

well formed     as reward.py:parse has it, and what first keeps the others of a kind from it
quotations      what stands in <quote_A> or <quote_B>, in the answer that it is said to be from. Three rules, each of
                which lets more pass: letter for letter; but for white space; but for capitals, markdown and quotation
                marks, where an ellipsis may leave a part out (the page marks those). Of rows that show the answers only
                inside the messages, the messages are searched; where the answers are not known, nothing is.
weights         of a rubric: those in per cent should sum to 100, to within 1
verdicts        by both rules of reward.py, training's and the benchmarks', against the label where there is one

A .jsonl file is read a line at a time: memory holds counts, the ids, and where the pairs stand that lie beside
judgements (pairs.jsonl); a .json file is read as a whole.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only data/ itself would be searched
from files import NotJson, one_line_errors, parse_json, refuse_existing, write_whole  # noqa: E402
from options import parse_config  # noqa: E402
from reward import after_thinking, benchmark_verdict, parse, training_verdict  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from data.fields import Bad, at, need, need_object, need_side, need_text  # noqa: E402
from data.pairs import SWAPPED, Pair, Place, chains_in, json_files, pairs_in, stream_records, swapped  # noqa: E402
from data.pairs import texts_of  # noqa: E402
from data.rubric import rubric_items  # noqa: E402

KINDS = ("Chat", "Reasoning", "no type")
FOUND = ("letter for letter", "but for white space", "but for capitals, markdown, quotation marks, ellipses")
RULES = {"training": ("Verdicts by training's rule", training_verdict),
         "benchmarks": ("Verdicts by the benchmarks' rule", benchmark_verdict)}
GROUPS = ("Texts", "Well formed", "Not well formed, of those with a type", "Quotations found in the answer",
          "Quotations found in the messages", "Quotations of answers that are not known", "Rubrics",
          *(group for group, _ in RULES.values()), "Labels", "Characters", "Tokens")
FOLD = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "‐": "-", "‑": "-", **dict.fromkeys("*`#_")})
LEFT_OUT = re.compile(r'\[\s*(?:\.{3,}|…)\s*\]|\.{3,}|…|" "|",? and "')     # also between two quotations


@dataclass(frozen=True)
class Config:
    files: tuple[str, ...]  # chains or judgements, .jsonl or .json; each is a column of the table
    tokenizer: str | None = None  # a model's folder: lengths in tokens, too
    out: str | None = None  # a .json file for the table
    skip_bad: bool = False  # skip unusable records and count them, instead of stopping at the first


# ---- one text

def quotations(text):
    """[("A" or "B", what is quoted)] of a text behind its thinking; a tag that is never closed quotes nothing."""
    found = []
    for side in "AB":
        for piece in after_thinking(text).split(f"<quote_{side}>")[1:]:
            inside, closed, _ = piece.partition(f"</quote_{side}>")
            found += [(side, inside.strip())] if closed else []
    return found


def place_of(quotation, texts):
    """The first of FOUND by which a quotation stands in one of the texts, or None. The last is the page's rule,
    report/judgement.js:locate."""
    if quotation and any(quotation in text for text in texts):
        return FOUND[0]
    if quotation and any(spaced(quotation) in spaced(text) for text in texts):
        return FOUND[1]
    whole, texts = bare(spaced(quotation.translate(FOLD).lower())), [spaced(x.translate(FOLD).lower()) for x in texts]
    pieces = [piece for piece in map(bare, LEFT_OUT.split(whole)) if len(piece) > 1]
    if whole and any(whole in text for text in texts):
        return FOUND[2]
    return FOUND[2] if pieces and all(any(piece in text for text in texts) for piece in pieces) else None


def spaced(text):
    return " ".join(text.split())


def bare(text):
    return text.strip(" \t\n\"'")


def percents(items):
    """The weights of a rubric's items that are given in per cent."""
    weights = [weight for _, weight, _ in items if weight and re.search("%|percent", weight, re.I)]
    return [float(re.match(r"[\d.]+", weight)[0]) for weight in weights]


# ---- many texts

@dataclass
class Tally:
    """The counts of many texts."""
    n: Counter = field(default_factory=Counter)            # (what, which): how many
    characters: Counter = field(default_factory=Counter)   # length: how many
    tokens: Counter = field(default_factory=Counter)

    def add(self, text, winner, searched, texts_of_side, n_tokens=None):
        """searched: "answer", "messages", or "nothing" where nothing is known; texts_of_side: "A" and "B": texts."""
        judgement = parse(text)
        kind = judgement.type or "no type"
        self.n["kind", kind] += 1
        self.n["well formed", kind] += judgement.well_formed
        if judgement.type and judgement.fault:
            self.n["fault", judgement.fault] += 1
        for side, quotation in quotations(text):
            how = None if searched == "nothing" else place_of(quotation, texts_of_side[side])
            self.n[searched, how] += 1
        if judgement.rubric:
            items = rubric_items(judgement.rubric)
            shares = percents(items)
            self.n["rubric", "all"] += 1
            self.n["rubric", "weights"] += any(weight for _, weight, _ in items)
            self.n["rubric", "percents"] += bool(shares)
            self.n["rubric", "sum to 100"] += bool(shares) and abs(sum(shares) - 100) <= 1
        for rule, (_, verdict_of) in RULES.items():
            verdict = verdict_of(text)
            self.n[rule, verdict] += 1
            self.n[rule, "right"] += verdict is not None and verdict == winner
        self.n["label", winner] += 1
        self.characters[len(text)] += 1
        if n_tokens is not None:
            self.tokens[n_tokens] += 1

    def rows(self):
        """The table: [{"group", "name", "n", "of"}], of being None where n is no share."""
        n, total, rows = self.n, self.characters.total(), []
        typed, labelled = total - n["kind", "no type"], n["label", "a"] + n["label", "b"]

        def add(group, name, count, of=None):
            rows.append({"group": group, "name": name, "n": count, "of": of})
        add("Texts", "all", total)
        add("Texts", "records skipped as unreadable", n["skipped", ""])
        for kind in KINDS:
            add("Well formed", kind, n["well formed", kind], n["kind", kind])
        for fault in sorted(name for what, name in n if what == "fault"):
            add("Not well formed, of those with a type", fault, n["fault", fault], typed)
        for searched in ("answer", "messages"):
            known = sum(n[searched, how] for how in (*FOUND, None))
            for i, how in enumerate(FOUND):
                count = sum(n[searched, stricter] for stricter in FOUND[:i + 1])
                add(f"Quotations found in the {searched}", how, count, known)
            add(f"Quotations found in the {searched}", "not at all", n[searched, None], known)
        add("Quotations of answers that are not known", "all", n["nothing", None])
        add("Rubrics", "give weights", n["rubric", "weights"], n["rubric", "all"])
        add("Rubrics", "give weights in per cent", n["rubric", "percents"], n["rubric", "all"])
        add("Rubrics", "whose per cents sum to 100", n["rubric", "sum to 100"], n["rubric", "percents"])
        for rule, (group, _) in RULES.items():
            for verdict, name in (("a", "A"), ("b", "B"), (None, "none")):
                add(group, name, n[rule, verdict], total)
            add(group, "right, of those with a label", n[rule, "right"], labelled)
        add("Labels", "A", n["label", "a"], labelled)
        add("Labels", "B", n["label", "b"], labelled)
        for group, lengths in (("Characters", self.characters), ("Tokens", self.tokens)):
            if lengths:
                mean = sum(length * count for length, count in lengths.items()) / lengths.total()
                add(group, "mean", round(mean, 1))
                for share in (5, 50, 95):
                    add(group, f"{share} % are no longer than", quantile(lengths, share / 100))
                add(group, "longest", max(lengths))
        return rows


def quantile(lengths, share):
    """The smallest length that at least this share of {length: how many} does not exceed."""
    seen, wanted = 0, share * lengths.total()
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= wanted:
            return length


def side_by_side(tables):
    """[(group, [(name, [a cell for each table])])] of several tables, without lines that are empty in all."""
    rows_of = [{(row["group"], row["name"]): row for row in rows} for rows in tables]
    keys = dict.fromkeys(key for rows in rows_of for key in rows)
    kept = [key for key in keys if any(key in rows and (rows[key]["n"] or rows[key]["of"]) for rows in rows_of)]
    lines = {group: [(key[1], [cell(rows.get(key)) for rows in rows_of]) for key in kept if key[0] == group]
             for group in GROUPS}
    return [(group, lines[group]) for group in GROUPS if lines[group]]


def cell(row):
    if row is None or row["of"] == 0:
        return "-"
    if row["of"] is None:
        return f"{row['n']:,}"
    return f"{row['n']:,} of {row['of']:,} {100 * row['n'] / row['of']:6.1f} %"


def table_text(tables):
    """The tables as text, a numbered column each."""
    groups = side_by_side(tables)
    left = 2 + max(len(name) for _, lines in groups for name, _ in lines)
    widths = [3 + max(len(cells[i]) for _, lines in groups for _, cells in lines) for i in range(len(tables))]
    out = [" " * left + "".join(f"{f'[{i + 1}]':>{width}}" for i, width in enumerate(widths))]
    for group, lines in groups:
        out += ["", group]
        out += [f"  {name:{left - 2}}" + "".join(f"{x:>{width}}" for x, width in zip(cells, widths))
                for name, cells in lines]
    return "\n".join(out)


# ---- files

def measure(file, tokenizer=None, skip_bad=False):
    """The Tally of a file; the first record that cannot be read raises ValueError, "file:line: what, what to do"."""
    tally, find = Tally(), pairs_beside(file)

    def convert(record, place):
        return votes_in(record, find) if "votes" in record else chains_in(record, place)
    for texts in tqdm(stream_records(file, convert, skip_bad), desc=Path(file).name, unit=" records", leave=False):
        tally.n["skipped", ""] += not texts
        for pair, text in texts:
            tally.add(text, pair.winner, *where_to_search(pair), len(tokenizer.encode(text)) if tokenizer else None)
    return tally


def votes_in(record, find):
    """[(pair, text)] of each vote of a judgement record; find(id) is its pair as first shown, or None."""
    name, winner = need(record, "id", str), need_side(record, "winner")
    texts = [need_text(vote, "text") for vote in need(record, "votes", list, of=(dict,))]
    if not texts:
        raise Bad("only an outcome was recorded here, no text: leave the record out")
    exchanged = "swapped" in record and need(record, "swapped", bool)
    pair = find(name.removesuffix(SWAPPED) if exchanged else name) or Pair(name, [], "", "", None, "", "")
    pair = swapped(pair) if exchanged else pair
    return [(replace(pair, id=name, winner=winner), text) for text in texts]


def where_to_search(pair):
    """What of a pair its quotations are looked for in, and its texts for either side."""
    if pair.rendered is not None:
        texts = [message["content"] for message in pair.rendered]
        return "messages", {"A": texts, "B": texts}
    if not pair.prompt:
        return "nothing", {}
    return "answer", {"A": texts_of(pair.answer_a), "B": texts_of(pair.answer_b)}


def pairs_beside(file):
    """id -> the Pair in the pairs.jsonl that lies beside a file of judgements, or None; memory holds their places."""
    path, places = Path(file).with_name("pairs.jsonl"), {}
    if path == Path(file) or not path.exists():
        return lambda name: None

    def pair_in(line, number):
        with at(f"{path}:{number}"):
            try:
                record = need_object(parse_json(line))
            except NotJson as e:
                raise Bad(f"{e.fault}: repair or remove the record") from None
            need(record, "answer_a", str, list)
            (pair, _), = pairs_in(record, Place(path, "", Counter()))
            return pair

    with open(path, "rb") as lines:
        offset = 0
        for number, line in enumerate(lines, 1):
            places[pair_in(line, number).id] = offset, number
            offset += len(line)

    def find(name):
        if name not in places:
            return None
        offset, number = places[name]
        with open(path, "rb") as lines:
            lines.seek(offset)
            return pair_in(lines.readline(), number)
    return find


def main(cfg):
    for file in cfg.files:
        if Path(file).is_dir():
            raise ValueError(f"{file}: is a folder: name the files in it")
        json_files(file)
    if len({Path(file).resolve() for file in cfg.files}) < len(cfg.files):
        raise ValueError("a file is named twice: name it once")
    if cfg.out:
        refuse_existing(cfg.out)
    tokenizer = Tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    tables = [measure(file, tokenizer, cfg.skip_bad).rows() for file in cfg.files]
    for i, file in enumerate(cfg.files):
        print(f"[{i + 1}] {file}")
    print(table_text(tables))
    if cfg.out:
        files = [{"file": file, "rows": rows} for file, rows in zip(cfg.files, tables)]
        write_whole(Path(cfg.out), json.dumps(files, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
