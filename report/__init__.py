"""The page to read judgements and training runs on: one HTML file that needs no server and no network.

    python -m report runs/eval                                  # an evaluation: runs/eval/report.html
    python -m report runs/demo-s0 --out demo.html               # all that lies in a folder: evaluations, training runs
    python -m report runs/eval-7b runs/eval-14b runs/grpo       # several, side by side

What is taken from a folder, at any depth: judgements.jsonl (or what a run has written of it so far) and any other file
of judgement records, each one model's evaluation, with scores.json and pairs.jsonl beside it if they are there;
metrics.jsonl, each a training run, with config.json and samples.jsonl beside it. Judgements without a pairs.jsonl of
their own get their texts from any file of pairs in the folders named, where id, source, domain and winner agree.
checkpoints/ and model/ are not searched.

The page is report.html with the data put in, in two forms. An *index* of numbers and names, from which the browser
draws the scores and the list: JSON in a script tag of a type that is not run, every "<" written as \\u003c. And
*chunks* of texts, deflated and in base64, unpacked when a judgement in them is read or searched: so 40,000 judgements
open at once. The page's own script never makes markup of a text, and its Content-Security-Policy names that script by
its hash and allows nothing else to run or to load.
"""

import base64
import hashlib
import json
import os
import re
import sys
import zlib
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks.records import TITLES
from data.pairs import SIDES, SWAPPED
from reward import END_OF_TURN, after_thinking, parse
from benchmarks.scores import section

TEMPLATE = Path(__file__).with_name("page.html")
CHUNK_ITEMS, CHUNK_BYTES = 128, 1 << 18       # a chunk ends at whichever comes first; its bytes before deflating
OUTCOMES = ["right", "wrong", "none", "tie", "unlabelled"]      # the page counts on this order, and on that of TYPES
UNFINISHED = "judgements.jsonl.partial"       # as sample.py writes it: the settings, then judgements
OWN = ("judgements.jsonl", UNFINISHED)        # the judgements that pairs.jsonl in the same folder belongs to
TYPES = ["Chat", "Reasoning", None]
PREVIEW = 100                                 # characters of a question in the list
COLUMNS = ("id", "model", "benchmark", "section", "subset", "outcome", "type", "verdict", "label", "swapped", "pair",
           "tokens", "chars", "votes")        # what the list knows of a judgement


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # folders of evaluations or training runs, folders that hold such, or judgements .jsonl files
    out: str | None = None  # the page to write; without it, report.html in the first folder


# ---- what is on disk

def records(path):
    """Yields ("file:line", object) for every line of a JSON lines file; of one that is still being written, for every
    whole line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as e:
                    if not line.endswith(b"\n"):
                        return
                    raise ValueError(f"{place}: not JSON ({e}): mend or delete the line") from None
                if not isinstance(record, dict):
                    raise ValueError(f"{place}: not a JSON object: mend or delete the line")
                yield place, record


def read_object(path):
    """The object in a small .json file, or {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = finite(json.loads(path.read_bytes()))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e}): delete the file or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object: delete the file or write it again")
    return value


def take(record, key, kinds, place):
    """record[key]; ValueError if it is missing or of another type."""
    if key not in record or not isinstance(record[key], kinds):
        found = repr(record[key])[:40] if key in record else "missing"
        names = " or ".join("null" if k is type(None) else k.__name__
                            for k in (kinds if type(kinds) is tuple else (kinds,)))
        raise ValueError(f"{place}: {key!r} is {found}, need {names}: is this one of our files?")
    return record[key]


def side(record, key, place):
    if take(record, key, (str, type(None)), place) not in SIDES:
        raise ValueError(f"{place}: {key!r} is {record[key]!r}, need 'a', 'b' or null")
    return record[key]


def take_step(record, place):
    step = take(record, "step", (int, float), place)
    if not -2**53 < step < 2**53:  # false for NaN too; a browser counts no further
        raise ValueError(f"{place}: 'step' is {step!r:.40}, need a number below 2**53: mend or delete the line")
    return step


def number(record, key):
    """record[key] where it is a number of a sensible size, else None: a count or a time that was not taken."""
    x = record[key] if key in record else None
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) and -1e15 < x < 1e15 else None


def finite(x):
    """x with NaN, the infinities and what a browser takes for one as strings: it cannot read them as numbers."""
    if isinstance(x, (int, float)) and not -sys.float_info.max <= x <= sys.float_info.max:
        return "NaN" if x != x else "Infinity" if x > 0 else "-Infinity"
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    return [finite(value) for value in x] if isinstance(x, list) else x


@dataclass(frozen=True)
class Found:
    evaluations: list         # (folder, judgements file or None)
    runs: list                # folders with metrics.jsonl
    pairs: list               # files of pairs that are no evaluation's own


def find(paths):
    """What there is to report under the paths; ValueError if a path has nothing."""
    evaluations, runs, pairs = {}, {}, {}
    for path in map(Path, paths):
        before = len(evaluations) + len(runs) + len(pairs)
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder: check the path")
        for file in [path] if path.is_file() else files_under(path):
            key = file.resolve()
            if file.name == "metrics.jsonl":
                runs[key] = file.parent
            elif file.name == "scores.json" and not file.with_name("judgements.jsonl").exists():
                if "rows" in read_object(file):
                    evaluations[key] = file.parent, None
            elif file.name == UNFINISHED:
                evaluations[key] = file.parent, file
            elif file.suffix == ".jsonl" and file.name != "samples.jsonl":
                keys = first_keys(file)
                if file.name == "judgements.jsonl" or "votes" in keys or file == path and "answer_a" not in keys:
                    evaluations[key] = file.parent, file
                elif "answer_a" in keys and "answer_b" in keys and file.name != "pairs.jsonl":
                    pairs[key] = file
        known = any(key.is_relative_to(path.resolve()) for key in [*evaluations, *runs, *pairs])
        if before == len(evaluations) + len(runs) + len(pairs) and not known:
            raise ValueError(f"{path}: nothing to report there: no judgements.jsonl, scores.json or metrics.jsonl; "
                             "name a folder that evaluate.py, sample.py, distill.py or grpo.py wrote")
    if not evaluations and not runs:
        raise ValueError(f"{paths[0]}: pairs, but no judgements: name the judgements too")
    return Found(list(evaluations.values()), list(runs.values()), list(pairs.values()))


def files_under(folder):
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in ("checkpoints", "model"))
        yield from (Path(here) / name for name in sorted(names))


def first_keys(file):
    """The keys of a file's first record, () if it has none: enough to tell what kind of file it is."""
    with open(file, "rb") as f:
        try:
            record = json.loads(f.readline())
        except (ValueError, RecursionError):
            return ()
    return tuple(record) if isinstance(record, dict) else ()


# ---- a judgement's parts

def parts(text):
    """What the page shows of a judgement's text: {"thinking", "type", "rubric": [(criterion, weight, description)] or
    text, "justify", "solution", "evaluation", "rest", "well_formed"}, without those that are missing. "rest" is all
    that is in no other part, so nothing written is lost: the whole text of a judge that writes no tags."""
    judged, chain = parse(text), after_thinking(text)
    thinking = text[:len(text) - len(chain)]
    rest = chain
    start, end = rest.find("<eval>"), rest.rfind("</eval>")
    if judged.evaluation is not None:
        rest = rest[:start] + "\n" + rest[end + len("</eval>"):]
    for tag in ("type", "rubric", "solution"):
        if getattr(judged, tag) is not None:
            head, _, tail = rest.partition(f"<{tag}>")
            rest = head + tail.partition(f"</{tag}>")[2]
    for ending in END_OF_TURN + (f"<answer>[[{(judged.verdict or '-').upper()}]]</answer>",):
        rest = rest.rstrip().removesuffix(ending)
    found = {"thinking": re.sub(r"^\s*<think>|</think>\s*$", "", thinking).strip(), **asdict(judged),
             "rest": rest.strip()}
    if judged.rubric:
        found["rubric"] = rubric_items(judged.rubric) or judged.rubric
    return {key: value for key, value in found.items() if value and key != "verdict"}


HEAD = re.compile(r"(\s*)[#*_ ]{0,8}?(?:(\d{1,2})[.)]|([-*\u2022]))(?:\*\*|__)?\s+(?=\S)")
WEIGHT = (re.compile(r"\s*[(\[]\s*(?:weight\w*\s*[:=]?\s*)?(\d{1,3}(?:\.\d{1,4})?\s*(?:%|points?|percent)?)"
                     r"(?:\s*weight\w*)?\s*[)\]]", re.I),
          re.compile(r"[\s,;:\u2013\u2014-]*\bweight\w*\s*[:=]?\s*(\d{1,3}(?:\.\d{1,4})?\s*%?)", re.I),
          re.compile(r"(?:\s*[:\u2013\u2014-])?\s+(\d{1,3}(?:\.\d{1,4})?\s*%)(?=\s*$|\s+[\u2013\u2014-]\s)"))


def rubric_items(text):
    """[(criterion, weight as written or None, description)] of a rubric, [] where it has no list to be found.

        1. Accuracy (40%): no errors     ->  ("Accuracy", "40%", "no errors")
        - **Tone** - warm [weight: 2]    ->  ("Tone", "2", "warm")
         Hey 1 river 2 Peace 4           ->  ("Hey", "1", ""), ("river", "2", ""), ("Peace", "4", "")     (data/toy.py)

    Lines that begin no item belong to the one before; text before the first is an item without a criterion.
    """
    words, weights = text.split()[::2], text.split()[1::2]
    one_line = "\n" not in text.strip() and len(words) == len(weights) > 0
    if one_line and all(weight.isdigit() and len(weight) < 4 for weight in weights):
        return [(word, weight, "") for word, weight in zip(words, weights)]
    text = re.sub(r"</?(?:rubric|list|ul|ol)>", "", re.sub(r"<(item|criterion|li)>", "\n- ", text))
    lines = re.sub(r"</(item|criterion|li)>", "\n", text).split("\n")
    heads = [HEAD.match(line) for line in lines]
    of_kind = [m for m in heads if m and m[2]] or [m for m in heads if m]     # bullets below numbers are details
    if of_kind:
        indent = min(len(m[1]) for m in of_kind)
        starts = [m is not None and (m[2] is not None) == (of_kind[0][2] is not None) and len(m[1]) <= indent
                  for m in heads]
    else:
        starts = [any(w.search(line[:200]) for w in WEIGHT) for line in lines]
    items = []
    for line, head, starting in zip(lines, heads, starts):
        if starting:
            items.append(list(_item(line[head.end():] if head else line)))
        elif line.strip():
            items = items or [["", None, ""]]
            items[-1][2] += ("\n" if items[-1][2] else "") + line.strip()
    return [tuple(item) for item in items] if any(starts) else []


def _item(line):
    """The start of a criterion, cut into (criterion, weight or None, description)."""
    before, weight, after = line.strip(), None, ""
    for i, pattern in enumerate(WEIGHT):
        found = pattern.search(before[:300]) if i < 2 else pattern.search(re.split(r":(?!\s*\d)", before[:200])[0])
        if found:
            before, weight, after = before[:found.start()], " ".join(found[1].split()), before[found.end():]
            break
    cut = re.search(r":(?=\s|$|\*\*)|\s[\u2013\u2014-](?=\s)", before)
    name, description = (before[:cut.start()], before[cut.end():]) if cut else (before, "")
    description = f"{description} {after}" if description.strip(" *") else after.lstrip("* :-\u2013\u2014")
    return name.strip("* :-\u2013\u2014"), weight, re.sub(r"^\s*\*\*\s", "", description).strip()


def outcome(record):
    """Which of OUTCOMES a judgement record is. A tie is a verdict that the votes did not agree on."""
    verdicts = [vote["verdict"] for vote in record["votes"]]
    if not verdicts and "recorded" in record and record["recorded"] is not None:
        return "right" if record["recorded"] else "wrong"
    if record["winner"] is None:
        return "unlabelled"
    if record["verdict"] is None:
        return "tie" if any(verdicts) else "none"
    return "right" if record["verdict"] == record["winner"] else "wrong"


# ---- the page's data

def page_json(x):
    """JSON for a script tag: ASCII, so that U+2028 and lone surrogates survive, and without "<", so that no text can
    end the tag or open a comment."""
    return json.dumps(x, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


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
        self.models, self.runs, self.previews, self.pair_of = [], [], [], {}
        self.names = {"benchmark": {}, "section": {}, "subset": {}}       # name -> its number in the columns
        self.columns = {key: [] for key in COLUMNS}
        self.chunks = {kind: Chunks(kind) for kind in ("pair", "judgement", "sample")}

    def pair(self, record, place):
        """The number of a pair; one that several models have judged is kept once. None has no texts."""
        kinds = (str, list)
        prompt = [messages(take(record, "prompt", list, place), place),
                  *(answer if isinstance(answer, str) else messages(answer, place)
                    for answer in (take(record, f"answer_{x}", kinds, place) for x in "ab"))]
        item = dict(zip(("prompt", "a", "b"), prompt))
        if "rendered" in record and record["rendered"] is not None:
            item["rendered"] = messages(take(record, "rendered", list, place), place)
        asked = [m[1] for m in item.get("rendered", item["prompt"]) if m[0] == "user"] or [""]
        return self._pair((take(record, "id", str, place), json.dumps(item)), item, asked[0])

    def _pair(self, key, item, asked):
        key = hashlib.sha256(repr(key).encode()).digest()
        if key not in self.pair_of:
            self.pair_of[key] = self.chunks["pair"].add(item)
            self.previews.append(" ".join(asked[:4 * PREVIEW].split())[:PREVIEW])
        return self.pair_of[key]

    def evaluation(self, folder, file, loose_pairs):
        """Adds one model's judgements; loose_pairs: id -> pair record, for those without a pairs.jsonl beside."""
        own = file is None or file.name in OWN
        scores = read_object(folder / "scores.json") if own and (file is None or file.name != UNFINISHED) else {}
        own_name = folder.resolve().name if own else file.stem
        name = scores["model"] if "model" in scores and isinstance(scores["model"], str) else own_name
        name = "/".join(name.rstrip("/").split("/")[-2:])
        taken = [model["name"] for model in self.models]
        others = (f"{name} ({own_name} {i})" for i in range(2, 10**6))
        name = next(x for x in (name, f"{name} ({own_name})", *others) if x not in taken)
        m = len(self.models)
        tables = {key: scores[key] for key in scores if key not in ("model", "models")}
        self.models.append({**tables, "name": name, "folder": str(folder)})
        if file is None:
            return
        own_pairs, pair_numbers, seen = {}, {}, {}     # a pair that nobody has judged stays out of the page
        if (folder / "pairs.jsonl").exists() and own:
            own_pairs = {take(record, "id", str, place): (place, record)
                         for place, record in records(folder / "pairs.jsonl")}
        for place, record in records(file):
            if file.name == UNFINISHED and place.endswith(":1"):
                continue
            r = check_judgement(record, place)
            if r["id"] in seen:
                raise ValueError(f"{place}: id {r['id'][:60]!r} is also at {seen[r['id']]}: delete one of the lines")
            seen[r["id"]] = place
            swapped = "swapped" in r and bool(r["swapped"])
            base = r["id"].removesuffix(SWAPPED) if swapped else r["id"]
            if base not in pair_numbers:
                at, texts = own_pairs[base] if base in own_pairs else loose_pairs.get(base, (None, None))
                if base in own_pairs or texts and all(texts[key] == r[key] for key in ("source", "domain", "winner")):
                    pair_numbers[base] = self.pair(texts, at)
                else:
                    pair_numbers[base] = self._pair(("no texts", r["source"], base), None, "")
            self._judgement(m, r, pair_numbers[base], swapped)

    def _judgement(self, m, r, pair, swapped):
        votes = [{"text": v["text"], "verdict": v["verdict"], "n_tokens": number(v, "n_tokens"),
                  "seconds": number(v, "seconds"),
                  "finished": v["finished"] if "finished" in v and isinstance(v["finished"], bool) else None,
                  **({"at": v["at"]} if "at" in v else {}), "parts": parts(v["text"])} for v in r["votes"]]
        types = [v["parts"]["type"] for v in votes if "type" in v["parts"]]
        tokens = [v["n_tokens"] for v in votes]
        mean = {"tokens": round(sum(tokens) / len(tokens)) if tokens and None not in tokens else None,
                "chars": round(sum(len(v["text"]) for v in votes) / len(votes)) if votes else None}
        named = {"benchmark": TITLES.get(r["source"], r["source"]), "section": section(r),
                 "subset": r["subset"] if "subset" in r else ""}
        row = {"id": r["id"], "model": m, "outcome": OUTCOMES.index(outcome(r)), "swapped": int(swapped), "pair": pair,
               "type": TYPES.index(types[0] if types else None), "votes": len(votes), **mean,
               "verdict": SIDES.index(r["verdict"]), "label": SIDES.index(r["winner"]),
               **{key: self.names[key].setdefault(value, len(self.names[key])) for key, value in named.items()}}
        for key, value in row.items():
            self.columns[key].append(value)
        self.chunks["judgement"].add({"votes": votes, "n_prompt_tokens": number(r, "n_prompt_tokens"),
                                      "item": r["item"] if "item" in r else None})

    def run(self, folder):
        """Adds a training run: its rows as columns, its samples as judgements of one vote."""
        columns, n = {}, 0
        for n, (place, row) in enumerate(records(folder / "metrics.jsonl"), 1):
            take_step(row, place)
            for key, value in row.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    column = columns.setdefault(key, [])
                    column += [None] * (n - 1 - len(column)) + [finite(value)]  # None in the rows that lack the key
        columns = {key: column + [None] * (n - len(column)) for key, column in columns.items()}
        steps, first = [], self.chunks["sample"].n
        for place, r in records(folder / "samples.jsonl") if (folder / "samples.jsonl").exists() else ():
            steps.append(take_step(r, place))
            if "judgement" in r:
                vote = {"text": take(r, "judgement", str, place), "verdict": side(r, "verdict", place)}
                r = r | {"votes": [vote], "source": "", "domain": ""}
            r = check_judgement(r, place)
            votes = [{"text": v["text"], "parts": parts(v["text"])} for v in r["votes"]]
            shown = ("step", "id", "prompt", "winner", "verdict", "reward", "advantage")
            facts = {key: finite(r[key]) for key in shown if key in r and not isinstance(r[key], (list, dict))}
            self.chunks["sample"].add({**facts, "votes": votes, "outcome": OUTCOMES.index(outcome(r))})
        self.runs.append({"name": str(folder), "n": n, "config": read_object(folder / "config.json"),
                          "columns": columns, "samples": {"first": first, "steps": steps}})

    def data(self):
        names = {key: list(numbers) for key, numbers in self.names.items()}
        starts = {}
        for kind, chunks in self.chunks.items():
            chunks.close()
            starts[kind] = chunks.starts
        common = os.path.commonpath([run["name"] for run in self.runs]) if len(self.runs) > 1 else ""
        runs = [{**run, "name": shown_name(run["name"], common)} for run in self.runs]
        return {"models": self.models, "names": names, "columns": self.columns, "previews": self.previews,
                "chunks": starts, "runs": runs}


def shown_name(folder, common):
    """A run's folder, without what all the runs' folders begin with."""
    return os.path.relpath(folder, common) if common else Path(folder).name or folder


def messages(value, place):
    """[(role, content)] of a list of messages."""
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"{place}: a message is not an object with role and content")
    return [(take(m, "role", str, place), take(m, "content", str, place)) for m in value]


def check_judgement(record, place):
    """The record, if it has all that the page needs."""
    for key in ("id", "source", "domain"):
        take(record, key, str, place)
    for key in ("subset", "item"):
        if key in record:
            take(record, key, str, place)
    for key in ("verdict", "winner"):
        side(record, key, place)
    for vote in take(record, "votes", list, place):
        if not isinstance(vote, dict):
            raise ValueError(f"{place}: a vote is not an object")
        take(vote, "text", str, place)
        side(vote, "verdict", place)
        for budget in take(vote, "at", dict, place) if "at" in vote else ():
            side(vote["at"], budget, place)
    return record


def build(found):
    """The Page of all that was found."""
    page, loose, wanted = Page(), {}, set()
    for folder, file in found.evaluations:
        if found.pairs and file and not (file.name in OWN and (folder / "pairs.jsonl").exists()):
            wanted |= {take(record, "id", str, place).removesuffix(SWAPPED) for place, record in records(file)}
    for file in found.pairs if wanted else ():
        for place, record in records(file):
            if all(key in record for key in ("id", "source", "domain", "winner")) and str(record["id"]) in wanted:
                loose.setdefault(str(record["id"]), (place, record))
    for folder, file in found.evaluations:
        page.evaluation(folder, file, loose)
    for folder in found.runs:
        page.run(folder)
    return page


def write(page, out):
    """Writes the page under a temporary name first. Chunks of the kinds alternate: the first texts come first."""
    template, data = TEMPLATE.read_text(encoding="utf-8"), page_json(page.data())
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", template, re.S)[1].encode()
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        template = template.replace(f"{tag.upper()}_HASH", f"sha256-{digest}")
    before, middle, after = re.split("<!--INDEX-->|<!--CHUNKS-->", template)
    part = Path(f"{out}.{os.getpid()}.tmp")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(f'{before}<script type="application/json" id="index">{data}</script>{middle}')
            for tags in zip_longest(*(chunks.tags for chunks in page.chunks.values()), fillvalue=""):
                file.writelines(tags)
            file.write(after)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)


def main(cfg):
    page = build(find(cfg.runs))
    first = Path(cfg.runs[0])
    out = Path(cfg.out) if cfg.out else (first if first.is_dir() else first.parent) / "report.html"
    write(page, out)
    counted = {"judgement": page.chunks["judgement"].n, "model": len(page.models), "training run": len(page.runs)}
    judged, models, runs = (f"{n} {name}{'' if n == 1 else 's'}" for name, n in counted.items())
    print(f"{out}: {judged} of {models}, {runs}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
