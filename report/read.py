"""What there is to report: the files of evaluations and training runs in some folders, and their lines.

Taken from a folder, at any depth: judgements.jsonl (or what a run has written of it so far) and any other file of
judgement records, each one model's evaluation, with scores.json and pairs.jsonl beside it if they are there;
metrics.jsonl, each a training run, with config.json and samples.jsonl beside it; files of chains (.jsonl; a .json file
if it is named), whose quality is counted; other files of pairs, for judgements that have no pairs.jsonl of their own.
checkpoints/ and model/ are not searched.
"""

import os
import sys
from pathlib import Path

from files import NotJson, parse_json

UNFINISHED = "judgements.jsonl.partial"       # as judge.py writes it: the settings, then judgements


def lines(path):
    """Yields ("file:line", object) for every line of a JSON lines file; of one that is still being written, for every
    whole line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                record = parse_json(line)
            except NotJson as e:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{place}: not JSON ({e.fault}): mend that line") from None
            if not isinstance(record, dict):
                raise ValueError(f"{place}: not a JSON object: mend that line")
            yield place, record


def read_object(path):
    """The object in a small .json file, or {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = finite(parse_json(path.read_bytes()))
    except (NotJson, RecursionError) as e:
        fault = e.fault if isinstance(e, NotJson) else "JSON nested too deeply"
        raise ValueError(f"{path}: not JSON ({fault}): mend it, or report on another folder") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object: mend it, or report on another folder")
    return value


def finite(x):
    """x with NaN, the infinities and what a browser takes for one as strings: it cannot read them as numbers."""
    if isinstance(x, (int, float)) and not -sys.float_info.max <= x <= sys.float_info.max:
        return "NaN" if x != x else "Infinity" if x > 0 else "-Infinity"
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    return [finite(value) for value in x] if isinstance(x, list) else x


def find(paths):
    """{"evaluation": files of judgements (scores.json where the judgements are gone), "run": files metrics.jsonl,
    "chains": files of chains, "pairs": files of pairs that are no evaluation's own} under the paths; ValueError if a
    path has nothing."""
    kinds = {}  # file -> what it is; the same file is named once, whatever leads to it
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder: check the path")
        here = {os.path.realpath(file): (kind_of(file, file == path), file) for file in files_under(path)}
        if not any(kind for kind, _ in here.values()):
            raise ValueError(f"{path}: nothing to report there: no judgements.jsonl, scores.json, metrics.jsonl "
                             "or chains; name a folder that evaluate.py, judge.py, distill.py or grpo.py wrote")
        kinds |= here
    found = {wanted: [file for kind, file in kinds.values() if kind == wanted]
             for wanted in ("evaluation", "run", "chains", "pairs")}
    if not found["evaluation"] and not found["run"] and not found["chains"]:
        raise ValueError(f"{paths[0]}: pairs, but no judgements: name the judgements too")
    return found


def files_under(path):
    if path.is_file():
        yield path
    for here, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in ("checkpoints", "model"))
        yield from (Path(here) / name for name in sorted(names))


def kind_of(file, named):
    """"evaluation", "run", "chains", "pairs" or None; `named`: the user has named the file itself."""
    if file.name == "metrics.jsonl":
        return "run"
    if file.name in ("judgements.jsonl", UNFINISHED):
        return "evaluation"
    if file.name == "scores.json":
        alone = not file.with_name("judgements.jsonl").exists()
        return "evaluation" if alone and "rows" in read_object(file) else None
    if file.suffix == ".json":
        return "chains" if named else None
    if file.suffix != ".jsonl" or file.name == "samples.jsonl":
        return None
    record = first_record(file)
    if "votes" in record:
        return "evaluation"
    if is_chain(record):
        return "chains"
    if named and "answer_a" not in record:
        return "evaluation"
    return "pairs" if {"answer_a", "answer_b"} <= set(record) and file.name != "pairs.jsonl" else None


def is_chain(record):
    """Is this one of the forms of chains that data/pairs.py reads? RM-R1's pairs have a label for a judgement."""
    if "context_messages" in record:
        return "winner" in record and record["winner"] not in ("model_a", "model_b")
    return "messages" in record or "text_chosen" in record or {"answer_a", "judgement"} <= set(record)


def first_record(file):
    """A file's first record, or {}: enough to tell what kind of file it is."""
    with open(file, "rb") as f:
        try:
            record = parse_json(f.readline())
        except NotJson:
            return {}
    return record if isinstance(record, dict) else {}
