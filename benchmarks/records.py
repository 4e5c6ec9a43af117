"""RewardBench, RM-Bench and RMB as they are judged, and outputs that were recorded on them.

read_benchmark makes a benchmark's pairs of its own files, in the order in which the published runs formatted them:
RewardBench's rows as they stand; RM-Bench's items sorted by "<domain>/<number>" as text, whether they come in one file
or in one a domain, nine pairs each; RMB's files sorted by path, a pair for each loser of a best-of-n item.

read_recorded reads outputs back, to be scored without a model: a judgements.jsonl of ours, RM-R1's logs (a file, or
the folder of a model with all its logs), or a table of outcomes {"columns": [...], "rows": [[...]...]}.
"""

import re
from pathlib import Path

import numpy as np

from data.fields import SIDES, Bad, clean, count_or_none, need, need_side, need_text
from data.pairs import (RM_BENCH_DOMAINS, SECTION_OF, SWAPPED, Pair, balanced_order, json_files, logged_pair, pairs_in,
                        read_pairs, read_records, rm_bench_pair, swapped)
from reward import benchmark_verdict, majority

TITLES = {"reward-bench": "RewardBench", "rm-bench": "RM-Bench", "rmb": "RMB"}
SCORE_FILES = ("final_result.json", "final_score.json", "META_RESULT.json")  # RM-R1's, beside its logs
CHOSEN_IS_B = "Is_Chosen_Answer_Shuffled_toPositionB"
STYLES = 3  # of each answer in RM-Bench
# RM-R1's logs of RM-Bench: one file for each rotation of the rejected answers, told apart by their names only
ROTATION = re.compile(r"total_dataset_([123])(?=\D|$)")


def styles_of(name):
    """(the chosen answer's style, the rejected one's) of an RM-Bench pair: the digits that its id ends in."""
    return int(name[-2]), int(name[-1])


def is_swapped(record):
    """Is this a judgement in the other order (--swap)?"""
    return "swapped" in record and bool(record["swapped"])


# ---- the benchmarks' own files

def read_benchmark(path, source, order="balanced", seed=0, skip_bad=False):
    """The pairs of one benchmark ("reward-bench", "rm-bench" or "rmb"), each in its A/B order.

    order "balanced": half of the pairs, drawn by the seed, have the chosen answer as B. "published": the order of
    RM-R1's recorded runs, which is theirs only for whole files without a bad record; see published_order.
    """
    files = json_files(path)
    if source == "rm-bench":
        files = _unrotated(path, files)

    def convert(record, place):
        found = pairs_in(record, place)
        for pair, undecided in found:
            if pair.source != source:
                raise Bad(f"not a record of {TITLES[source]}: give the benchmark's own files, other pairs as --data")
            if not undecided:
                raise Bad(f"a recorded output, no record of {TITLES[source]} itself: give it as --from")
        return found

    pairs = [pair for pair, _ in read_records(path, convert, skip_bad, files)]
    if source == "rm-bench":
        pairs.sort(key=lambda pair: (pair.item, pair.id))
    chosen_is_b = published_order(pairs) if order == "published" else set(balanced_order(range(len(pairs)), seed))
    return [swapped(pair) if i in chosen_is_b else pair for i, pair in enumerate(pairs)]


def _unrotated(path, files):
    """The released folder has the whole benchmark in one file, again in one file a domain, and in rotated copies."""
    rotated = [f for f in files if (match := ROTATION.match(f.name)) and match[1] != "1"]
    kept = [f for f in files if f not in rotated]
    if not kept:
        raise ValueError(f"{path}: the rejected answers are rotated in this copy: give total_dataset.json")
    for name in ("total_dataset.json", "total_dataset_1.json"):
        whole = [f for f in kept if f.name == name]
        if whole:
            return whole[:1]
    return kept


def published_order(pairs):
    """The indices of the pairs of one benchmark that RM-R1's recorded runs showed with the chosen answer as B.

    Each process drew u from MT19937 with seed 0, one a pair in its order, and put the chosen answer at B if u > 0.5.
    RM-Bench was judged by three processes, whose draws of slot s (the chosen style) come after those of slot s - 1: an
    item's chosen style stands at the same place against all three rejected ones. RMB: a process for each of its four
    sections.
    """
    if pairs[0].source == "rm-bench":
        items = list(dict.fromkeys(pair.item for pair in pairs))
        draws_si = _draws(STYLES * len(items)).reshape(STYLES, len(items))
        number = {item: i for i, item in enumerate(items)}
        return {i for i, pair in enumerate(pairs) if draws_si[styles_of(pair.id)[0], number[pair.item]]}
    processes = {}
    for i, pair in enumerate(pairs):
        process = (pair.domain, pair.item != "") if pair.source == "rmb" else "all"
        processes.setdefault(process, []).append(i)
    chosen_is_b = set()
    for members in processes.values():
        chosen_is_b |= {i for i, drawn in zip(members, _draws(len(members))) if drawn}
    return chosen_is_b


def _draws(n):
    return np.random.RandomState(0).rand(n) > 0.5


# ---- recorded outputs

def read_recorded(path, skip_bad=False):
    """(pairs, records): what was judged, as far as its texts are known, and one judgement record for each output.

    A record's verdict is read from its text again. "recorded", where the source has it, is what the source counted: 1
    right, 0 not. The outputs of a table have no text: they have no votes, and "recorded" stands alone.
    """
    files = _output_files(path)
    found = read_records(path, _outputs_in, skip_bad, files)
    pairs = [pair for pair, _ in found if pair.prompt]
    texts = files[0].with_name("pairs.jsonl")
    if not pairs and files[0].suffix == ".jsonl" and texts.exists():
        pairs = read_pairs(texts)
    return pairs, [record for _, record in found]


def _output_files(path):
    """The file, or of a folder its judgements.jsonl if it has one, else all logs in it."""
    root, files = Path(path), json_files(path)
    if root / "judgements.jsonl" in files:
        return [root / "judgements.jsonl"]
    # the grouped copy of best-of-n logs repeats raw_logs.json; scores stand in files of their own
    copies = [f for f in files if f.name == "group_by_same_id_logs.json" and f.with_name("raw_logs.json") in files]
    scores = [f for f in files if f.parent.name == "score_result" or f.name in SCORE_FILES]
    return [f for f in files if f == root or f not in copies + scores]


def _outputs_in(record, place):
    """[(pair, judgement record)] of a line of judgements.jsonl, a record of a log, or a whole table of outcomes."""
    if "votes" in record:
        return [_own(record)]
    if "text_chosen" in record:
        return [_output(logged_pair(record, place), need_text(record, "answers"), need(record, "results", int))]
    if "output" in record and "rejected" in record:
        return _rm_bench_outputs(record, place)
    if record.keys() == {"columns", "rows"}:
        return _outcomes(need(record, "columns", list, of=(str,)), need(record, "rows", list, of=(list,)))
    raise Bad("no recorded output: its keys are none of a judgements.jsonl, a log of RM-R1 or a table of outcomes; "
              "--skip-bad leaves it out")


def _own(record):
    """The pair, without its texts, and the record of a judgement of ours, its verdicts read again."""
    name = need(record, "id", str)
    winner = need_side(record, "winner")
    verdict = need_side(record, "verdict")
    if need(record, "source", str) not in TITLES:
        record = {"subset": "", "item": ""} | record  # older files lack them
    pair = Pair(name, [], "", "", winner, need(record, "source", str), need(record, "domain", str),
                subset=need(record, "subset", str), item=need(record, "item", str))
    if fault := _misplaced(pair):
        raise Bad(f"{fault}: this is no judgement of {TITLES[pair.source]}")
    votes = [_own_vote(vote) for vote in need(record, "votes", list, of=(dict,))]
    if votes:
        again = majority([vote["verdict"] for vote in votes])
        record = record | {"recorded": int(verdict == winner), "votes": votes, "verdict": again}
    elif need(record, "recorded", int) not in (0, 1):
        raise Bad(f'"recorded" is {record["recorded"]}: it must be 1 (right) or 0')
    return pair, record


def _own_vote(vote):
    verdict = benchmark_verdict(need_text(vote, "text"))
    n_tokens = count_or_none(vote, "n_tokens")
    seconds = count_or_none(vote, "seconds")
    if "at" in vote and not all(n.isdecimal() and v in SIDES for n, v in need(vote, "at", dict).items()):
        raise Bad('"at" must give "a", "b" or null for numbers of tokens')
    return vote | {"verdict": verdict, "n_tokens": n_tokens, "seconds": seconds}


def _misplaced(pair):
    """What in a pair names no place in its benchmark, or None."""
    if pair.source == "reward-bench" and pair.subset not in SECTION_OF:
        return f"subset {pair.subset[:60]!r}"
    if pair.source == "rmb" and pair.domain not in ("Helpfulness", "Harmlessness"):
        return f"domain {pair.domain[:60]!r}"
    name = pair.id.removesuffix(SWAPPED)
    styles = name.removeprefix(pair.item + "/")
    if pair.source == "rm-bench" and not (pair.domain in RM_BENCH_DOMAINS and re.fullmatch("[012][012]", styles)):
        return f"id {name[:60]!r} of item {pair.item[:60]!r}, domain {pair.domain[:60]!r}"
    return None


def _rm_bench_outputs(record, place):
    """The three outputs of a log's record: output i is of chosen style i against the i-th rejected answer, and the file
    has those rotated: in total_dataset_2_... they stand in the order of styles 1, 2, 0."""
    rotation = ROTATION.match(place.file.name)
    if not rotation:
        raise Bad("an RM-Bench log, and its name does not say which: name the files total_dataset_1_..., "
                  "total_dataset_2_... and total_dataset_3_..., by the rotation of the rejected answers")
    shift = int(rotation[1]) - 1
    kinds = {"chosen": (str,), "rejected": (str,), "output": (str,), "result": (int, float), CHOSEN_IS_B: (bool,)}
    for key, kind in kinds.items():
        need(record, key, list, of=kind)
    if any(len(record[key]) != STYLES for key in kinds):
        raise Bad(f"{', '.join(kinds)} need {STYLES} values each: repair or remove the record")
    outputs = []
    for i in range(STYLES):
        winner = "b" if record[CHOSEN_IS_B][i] else "a"
        pair = rm_bench_pair(record, place, i, (i + shift) % STYLES, record["rejected"][i], winner)
        outputs.append(_output(pair, clean(record["output"][i], "output"), record["result"][i]))
    return outputs


def _outcomes(columns, rows):
    """The outcomes of RewardBench in a table: which were right, and no texts."""
    found = {}
    for number, row in enumerate(rows, 1):
        row = dict(zip(columns, row))
        subset = need(row, "subset", str)
        winner = "b" if need(row, CHOSEN_IS_B, bool) else "a"
        if subset not in SECTION_OF:
            raise Bad(f"row {number}: {subset!r} is no subset of RewardBench: correct it")
        name = f"{subset}/{need(row, 'id', str, int)}"
        if name in found:
            raise Bad(f"row {number}: {name} was there before: remove one of them")
        pair = Pair(name, [], "", "", winner, "reward-bench", SECTION_OF[subset], subset=subset)
        found[name] = pair, _record(pair, [], None, need(row, "results", int))
    return list(found.values())


def _output(pair, text, recorded):
    verdict = benchmark_verdict(text)
    vote = {"text": text, "n_tokens": None, "finished": None, "verdict": verdict, "seconds": None}
    return pair, _record(pair, [vote], verdict, recorded)


def _record(pair, votes, verdict, recorded):
    if recorded not in (0, 1):
        raise Bad(f"{pair.id} was counted as {recorded}: it must be 1 (right) or 0: remove the record")
    return {"id": pair.id, "prompt_hash": None, "n_prompt_tokens": None, "votes": votes, "verdict": verdict,
            "winner": pair.winner, "source": pair.source, "domain": pair.domain, "subset": pair.subset,
            "item": pair.item, "seconds": None, "recorded": recorded}
