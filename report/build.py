"""All that was found, packed into one HTML file that needs no server and no network.

The page is page.html with the style, the scripts and the data put in, the data in two forms. An *index* of numbers and
names, from which the browser draws the scores and the list: JSON in a script tag of a type that is not run, every "<"
written as \\u003c. And *chunks* of texts, deflated and in base64, unpacked when a judgement in them is read or
searched: so 40,000 judgements open at once. The page's own script never makes markup of a text, and its
Content-Security-Policy names that script by its hash and allows nothing else to run or to load.
"""

import base64
import hashlib
import json
import os
import re
import zlib
from itertools import chain, count, zip_longest
from pathlib import Path

from benchmarks.records import TITLES
from benchmarks.reward_bench_2 import sides_of
from benchmarks.scores import NO_PAIRS, QUANTITIES, section, wilson
from data.fields import LETTERS, at, is_of, need, need_side, text_or
from data.pairs import SWAPPED
from data.quality import Tally, measure, side_by_side
from files import whole
from report.judgement import OUTCOMES, outcome, parts
from report.read import UNFINISHED, finite, lines, read_object

SCRIPTS = ("page.js", "judgement.js", "plots.js", "scores.js", "training.js", "frame.js")   # in this order one script
CHUNK_ITEMS, CHUNK_BYTES = 128, 1 << 18       # a chunk ends at whichever comes first; its bytes before deflating
OWN = ("judgements.jsonl", UNFINISHED, "scores.json")   # files that pairs.jsonl in the same folder belongs to
TYPES = ["Chat", "Reasoning", None]           # the page counts on this order
TABLES = ("rows", "budgets", "swap", "positions")       # of scores.json
RENAMED = {"positions": {"a_share": "a_share_first_order"}, "swap": {"a_share": "a_share_both_orders"}}  # older files
INDEX = '<script type="application/json" id="index">'    # begins the data; by it a page of ours is known
PREVIEW = 100                                 # characters of a question in the list
NAMED = ("benchmark", "section", "subset")    # columns of numbers of names
COLUMNS = ("id", "model", *NAMED, "outcome", "type", "verdict", "label", "swapped", "pair", "tokens", "chars", "votes")


# ---- records, checked and as the page keeps them

def pair_item(record):
    item = {"prompt": messages(record, "prompt")}
    if rubric := text_or(record, "rubric", ""):
        item["prompt"].append(("rubric", rubric))  # the page names each message's role
    for key in ("a", "b"):
        answer = need(record, f"answer_{key}", str, list)
        item[key] = answer if isinstance(answer, str) else messages(record, f"answer_{key}")
    if "rendered" in record and record["rendered"] is not None:
        item["rendered"] = messages(record, "rendered")
    return item


def messages(record, key):
    return [(need(m, "role", str), need(m, "content", str)) for m in need(record, key, list, of=(dict,))]


def vote_items(record):
    """The votes of a judgement record, whose own verdict and label are checked too."""
    sides = sides_of(record["source"] if "source" in record else "")
    need_side(record, "verdict", sides)
    need_side(record, "winner", sides)
    votes = []
    for v in need(record, "votes", list, of=(dict,)):
        vote = {"text": need(v, "text", str), "verdict": need_side(v, "verdict", sides),
                "n_tokens": number(v, "n_tokens"), "seconds": number(v, "seconds"), "finished": None,
                "parts": parts(v["text"])}
        if "finished" in v and isinstance(v["finished"], bool):
            vote["finished"] = v["finished"]
        if "at" in v:
            vote["at"] = {budget: need_side(v["at"], budget, sides) for budget in need(v, "at", dict)}
        votes.append(vote)
    return votes


def where_to_search(item, exchanged):
    """What of a pair as the page keeps it quotations are looked for in, for Tally.add."""
    if item is None:
        return "nothing", {}
    if "rendered" in item:
        texts = [content for _, content in item["rendered"]]
        return "messages", {"A": texts, "B": texts}
    one, other = ([answer] if isinstance(answer, str) else [content for _, content in answer]
                  for answer in (item["a"], item["b"]))
    return "answer", {"A": other, "B": one} if exchanged else {"A": one, "B": other}


def number(record, key):
    """record[key] where it is a number of a sensible size, else None: a count or a time that was not taken."""
    x = record[key] if key in record else None
    return x if is_of(x, (int, float)) and -1e15 < x < 1e15 else None


def step_of(record, place):
    with at(place):
        step = need(record, "step", int, float)
    if not -2**53 < step < 2**53:  # false for NaN too; a browser counts no further
        raise ValueError(f"{place}: 'step' is {step!r:.40}, need a number below 2**53: mend that line")
    return step


# ---- the page's data

class Chunks:
    """Items of one kind, packed many to a script tag; starts[k] is the number of the first item of chunk k."""

    def __init__(self, kind):
        self.kind, self.starts, self.tags, self.n = kind, [], [], 0
        self._open, self._size = [], 0

    def add(self, item):
        """The item's number."""
        text = json.dumps(item, separators=(",", ":"), allow_nan=False)
        if self._open and (len(self._open) == CHUNK_ITEMS or self._size + len(text) > CHUNK_BYTES):
            self.close()
        self._open.append(text)
        self._size += len(text)
        self.n += 1
        return self.n - 1

    def close(self):
        if self._open:
            packed = base64.b64encode(zlib.compress(f"[{','.join(self._open)}]".encode(), 6)).decode()
            name = f"{self.kind}{len(self.starts)}"
            self.tags.append(f'<script type="application/octet-stream" id="{name}">{packed}</script>\n')
            self.starts.append(self.n - len(self._open))
            self._open, self._size = [], 0


class Page:
    """Gathers evaluations and runs; data() is the index, and the chunks hold the texts."""

    def __init__(self):
        self.models, self.runs, self.rows, self.previews, self.pair_of = [], [], [], [], {}
        self.quality = {}       # name of a model or a file of chains -> the rows of data/quality.py
        self.names = {key: {} for key in NAMED}       # name -> its number in the columns
        self.chunks = {kind: Chunks(kind) for kind in ("pair", "judgement", "sample")}

    def pair(self, key, item):
        """The number of a pair; one that several models have judged is kept once. None has no texts."""
        key = hashlib.sha256(repr(key).encode()).digest()
        if key not in self.pair_of:
            self.pair_of[key] = self.chunks["pair"].add(item)
            shown = (item["rendered"] if "rendered" in item else item["prompt"]) if item else ()
            asked = next((content for role, content in shown if role == "user"), "")
            self.previews.append(" ".join(asked[:4 * PREVIEW].split())[:PREVIEW])
        return self.pair_of[key]

    def evaluation(self, file, loose):
        """Adds one model's judgements; loose: id -> (place, pair), for those without a pairs.jsonl beside them."""
        own, model = file.name in OWN, len(self.models)
        scores = read_object(file.with_name("scores.json")) if own and file.name != UNFINISHED else {}
        tables = {key: scores[key] for key in scores if key not in ("model", "models")}
        tables |= {key: table_rows(scores, key) for key in TABLES}
        name = self.free_name(scores, file.parent.resolve().name if own else file.stem)
        self.models.append({**tables, "name": name, "folder": str(file.parent)})
        own_pairs, judged, seen, tally = {}, {}, {}, Tally()      # a pair that nobody has judged stays out of the page
        for place, record in lines(pairs_beside(file)) if pairs_beside(file) else ():
            with at(place):
                own_pairs[need(record, "id", str)] = place, record
        for place, r in lines(file) if file.name != "scores.json" else ():
            if file.name == UNFINISHED and place.endswith(":1"):
                continue
            with at(place):
                id, swapped = need(r, "id", str), "swapped" in r and bool(r["swapped"])
                row = {"id": id, "model": model, "swapped": int(swapped), **self.judgement(r)}
            if id in seen:
                raise ValueError(f"{place}: id {id[:60]!r} is also at {seen[id]}: give each its own")
            seen[id] = place
            base = id.removesuffix(SWAPPED) if swapped else id
            if base not in judged:
                judged[base] = self.pair_for(base, r, own_pairs, loose)
            pair, item = judged[base]
            self.rows.append(row | {"pair": pair})
            for vote in r["votes"] if r["source"] not in NO_PAIRS else ():
                tally.add(vote["text"], r["winner"], *where_to_search(item, swapped))
        if tally.characters:
            self.quality[name] = tally.rows()
        if not tables["rows"]:
            self.models[model] |= {"rows": self.counted_rows(model), "counted": True}

    def free_name(self, scores, own_name):
        """A model's name: the last two parts of what scores.json calls it, made different from all before."""
        name = scores["model"] if "model" in scores and isinstance(scores["model"], str) else own_name
        name = "/".join(name.rstrip("/").split("/")[-2:])
        taken = [model["name"] for model in self.models]
        numbered = (f"{name} ({own_name} {i})" for i in count(2))
        return next(x for x in chain([name, f"{name} ({own_name})"], numbered) if x not in taken)

    def pair_for(self, name, r, own_pairs, loose):
        """The number of a judgement's pair, and its item: of the file beside it, or of another where they agree; or
        without texts, and None."""
        place, pair = own_pairs[name] if name in own_pairs else loose.get(name, (None, None))
        if name in own_pairs or pair and all(pair[key] == r[key] for key in ("source", "domain", "winner")):
            with at(place):
                item = pair_item(pair)
            return self.pair((name, json.dumps(item)), item), item
        return self.pair(("no texts", r["source"], name), None), None

    def judgement(self, r):
        """Adds a judgement's texts; what the list knows of it."""
        for key in ("source", "domain"):
            need(r, key, str)
        texts = {key: need(r, key, str) if key in r else None for key in ("subset", "item")}
        votes = vote_items(r)
        types = [v["parts"]["type"] for v in votes if "type" in v["parts"]]
        tokens = [v["n_tokens"] for v in votes]
        named = {"benchmark": TITLES.get(r["source"], r["source"]), "section": section(r),
                 "subset": texts["subset"] or ""}
        self.chunks["judgement"].add({"votes": votes, "n_prompt_tokens": number(r, "n_prompt_tokens"),
                                      "item": texts["item"]})
        return {**{key: self.names[key].setdefault(name, len(self.names[key])) for key, name in named.items()},
                "outcome": OUTCOMES.index(outcome(r)), "type": TYPES.index(types[0] if types else None),
                "verdict": LETTERS.index(r["verdict"]), "label": LETTERS.index(r["winner"]), "votes": len(votes),
                "tokens": round(sum(tokens) / len(tokens)) if tokens and None not in tokens else None,
                "chars": round(sum(len(v["text"]) for v in votes) / len(votes)) if votes else None}

    def counted_rows(self, model):
        """Rows as in scores.json for a model without one: the share right in the first order, by benchmark, section."""
        benchmarks, sections, groups = list(self.names["benchmark"]), list(self.names["section"]), {}
        for row in self.rows:
            found, benchmark = OUTCOMES[row["outcome"]], benchmarks[row["benchmark"]]
            if row["model"] == model and found != "unlabelled" and not row["swapped"]:
                groups.setdefault(("all pairs", "overall", "overall"), []).append(found)
                groups.setdefault((benchmark, "overall", "overall"), []).append(found)
                groups.setdefault((benchmark, "section", sections[row["section"]]), []).append(found)
        if len({benchmark for benchmark, _, _ in groups}) == 2:  # "all pairs" and a single benchmark: the same
            del groups["all pairs", "overall", "overall"]
        rows = []
        for (benchmark, kind, name), found in groups.items():
            n, right = len(found), found.count("right")
            low, high = wilson(right, n)
            rows.append({"benchmark": benchmark, "kind": kind, "name": name, "n": n, "right": right,
                         "score": right / n, "low": low, "high": high, "no_verdict": found.count("none") / n,
                         "ties": found.count("tie") / n})
        return rows

    def chains(self, file):
        """Adds the quality of a file of chains; what cannot be read in it is counted."""
        self.quality["/".join(file.parts[-2:])] = measure(file, skip_bad=True).rows()

    def run(self, file):
        """Adds a training run: its rows as columns, its samples as judgements of one vote."""
        rows = []
        for place, row in lines(file):
            step_of(row, place)
            # a key without a number is told from a key that the row does not have
            rows.append({key: "null" if x is None else finite(x) for key, x in row.items()
                         if x is None or is_of(x, (int, float))})
        columns = {key: [row[key] if key in row else None for row in rows] for key in dict.fromkeys(chain(*rows))}
        folder, steps, first = file.parent, [], self.chunks["sample"].n
        for place, r in lines(folder / "samples.jsonl") if (folder / "samples.jsonl").exists() else ():
            steps.append(step_of(r, place))
            with at(place):
                if "judgement" in r:
                    r = r | {"votes": [{"text": need(r, "judgement", str), "verdict": need_side(r, "verdict")}]}
                need(r, "id", str)
                votes = vote_items(r)
            shown = ("step", "id", "prompt", "winner", "verdict", "reward", "advantage")
            facts = {key: finite(r[key]) for key in shown if key in r and not isinstance(r[key], (list, dict))}
            self.chunks["sample"].add({**facts, "votes": votes, "outcome": OUTCOMES.index(outcome(r))})
        self.runs.append({"name": str(folder), "n": len(rows), "config": read_object(folder / "config.json"),
                          "columns": columns, "samples": {"first": first, "steps": steps}})

    def data(self):
        for chunks in self.chunks.values():
            chunks.close()
        # a run is called by its folder, without what all the runs' folders begin with
        common = os.path.commonpath([run["name"] for run in self.runs]) if len(self.runs) > 1 else ""
        shown = [os.path.relpath(run["name"], common) if common else Path(run["name"]).name for run in self.runs]
        runs = [{**run, "name": name or run["name"]} for name, run in zip(shown, self.runs)]
        return {"models": self.models, "names": {key: list(numbers) for key, numbers in self.names.items()},
                "columns": {key: [row[key] for row in self.rows] for key in COLUMNS}, "previews": self.previews,
                "quantities": QUANTITIES, "runs": runs,
                "quality": {"of": list(self.quality), "groups": side_by_side(list(self.quality.values()))},
                "chunks": {kind: chunks.starts for kind, chunks in self.chunks.items()}}


def table_rows(scores, key):
    """The rows of a table of scores.json that are rows: objects, whose names are texts. With the keys of today."""
    rows = scores[key] if key in scores and isinstance(scores[key], list) else []
    rows = [row for row in rows if isinstance(row, dict) and all(
        row[name] is None or isinstance(row[name], str) for name in ("benchmark", "kind", "name") if name in row)]
    today = RENAMED.get(key, {})
    return [{today.get(name, name): x for name, x in row.items()} for row in rows]


def pairs_beside(file):
    """The pairs.jsonl of an evaluation, or None."""
    path = file.with_name("pairs.jsonl")
    return path if file.name in OWN and path.exists() else None


def build(found):
    """The Page of all that was found."""
    page, loose, wanted = Page(), {}, set()
    pairs = found["pairs"] + [file for file in found["chains"] if file.suffix == ".jsonl"]    # ours have the texts
    for file in found["evaluation"] if pairs else ():
        if file.name != "scores.json" and not pairs_beside(file):
            wanted |= {str(record["id"]).removesuffix(SWAPPED) for _, record in lines(file) if "id" in record}
    for file in pairs if wanted else ():
        for place, record in lines(file):
            if all(key in record for key in ("id", "source", "domain", "winner")) and str(record["id"]) in wanted:
                loose.setdefault(str(record["id"]), (place, record))
    for file in found["evaluation"]:
        page.evaluation(file, loose)
    for file in found["chains"]:
        page.chains(file)
    for file in found["run"]:
        page.run(file)
    return page


# ---- the file

def page_json(x):
    """JSON for a script tag: ASCII, so that U+2028 and lone surrogates survive, and without "<", so that no text can
    end the tag or open a comment."""
    return json.dumps(x, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write(page, out):
    """Writes the page. Chunks of the kinds alternate: the first texts come first."""
    skeleton, style, *scripts = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                                 for name in ("page.html", "page.css", *SCRIPTS))
    for tag, text in (("style", "\n" + style), ("script", "\n" + "\n".join(scripts))):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        skeleton = skeleton.replace(f"{tag.upper()}_HASH", f"sha256-{digest}")
        skeleton = skeleton.replace(f"<!--{tag.upper()}-->", f"<{tag}>{text}</{tag}>")
    before, middle, after = re.split("<!--INDEX-->|<!--CHUNKS-->", skeleton)
    data = page_json(page.data())
    with whole(out) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"{before}{INDEX}{data}</script>{middle}")
        for tags in zip_longest(*(chunks.tags for chunks in page.chunks.values()), fillvalue=""):
            file.writelines(tags)
        file.write(after)
