"""RewardBench, RM-Bench and RMB as they are judged, and outputs that were recorded on these and other benchmarks.

read_benchmark makes a benchmark's pairs of its own files, in the order in which the published runs formatted them:
RewardBench's rows as they stand; RM-Bench's items sorted by "<domain>/<number>" as text, whether they come in one file
or in one a domain, nine pairs each; RMB's files sorted by path, a pair for each loser of a best-of-n item.

read_recorded reads outputs back, to be scored without a model: a judgements.jsonl of ours, RM-R1's logs (a file, or
the folder of a model with all its logs), a table of outcomes {"columns": [...], "rows": [[...]...]}, or a file of
JudgeBench's outputs.
"""

import re
from pathlib import Path

import numpy as np

from benchmarks import judge_bench, reward_bench_2
from benchmarks.rows import output_record
from data.fields import Bad, clean, count_or_none, need, need_keys, need_side, need_text
from data.pairs import (REWARD_BENCH_2_SUBSETS, RM_BENCH_DOMAINS, SECTION_OF, SWAPPED, Pair, balanced_order, json_files,
                        logged_pair, pairs_in, read_pairs, read_records, rm_bench_pair, swapped)
from reward import benchmark_verdict, majority

TITLES = {"reward-bench": "RewardBench", "rm-bench": "RM-Bench", "rmb": "RMB", **judge_bench.TITLES,
          **reward_bench_2.TITLES}
DOMAINS = {"rm-bench": RM_BENCH_DOMAINS, "rmb": ("Helpfulness", "Harmlessness"), **judge_bench.SIZE,
           **dict.fromkeys(reward_bench_2.TITLES, REWARD_BENCH_2_SUBSETS)}
# What follows the item in a pair's id
ENDINGS = {"rm-bench": "[012][012]", reward_bench_2.PAIRWISE: r"\d+(-\d+of\d{1,4})?",
           reward_bench_2.RATINGS: r"[cr]\d+of\d{1,4}"}
SCORE_FILES = ("final_result.json", "final_score.json", "META_RESULT.json")  # RM-R1's, beside its logs
CHOSEN_IS_B = "Is_Chosen_Answer_Shuffled_toPositionB"
STYLES = 3  # of each answer in RM-Bench
# RM-R1's logs of RM-Bench: one file for each rotation of the rejected answers, told apart by their names only
ROTATION = re.compile(r"total_dataset_([123])(?=\D|$)")


def styles_of(name):
    """(the chosen answer's style, the rejected one's) of an RM-Bench pair: the digits that its id ends in."""
    return int(name[-2]), int(name[-1])


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
    if "judgments" in record:
        return judge_bench.judge_bench_outputs(record, place)
    if "text_chosen" in record:
        return [_output(logged_pair(record, place), need_text(record, "answers"), need(record, "results", int))]
    if "output" in record and "rejected" in record:
        return _rm_bench_outputs(record, place)
    if record.keys() == {"columns", "rows"}:
        return _outcomes(need(record, "columns", list, of=(str,)), need(record, "rows", list, of=(list,)))
    raise Bad("no recorded output: its keys are none of a judgements.jsonl, a log of RM-R1, an output of JudgeBench or "
              "a table of outcomes; --skip-bad leaves it out")


def _own(record):
    """The pair, without its texts, and the record of a judgement of ours, its verdicts read again."""
    need_keys(record, "id", "winner", "verdict", "source")
    name, source = need(record, "id", str), need(record, "source", str)
    sides = reward_bench_2.sides_of(source)
    winner = need_side(record, "winner", sides)
    verdict = need_side(record, "verdict", sides)
    if source not in TITLES:
        record = {"subset": "", "item": ""} | record  # older files lack them
    pair = Pair(name, [], "", "", winner, source, need(record, "domain", str),
                subset=need(record, "subset", str), item=need(record, "item", str))
    if fault := _misplaced(pair):
        raise Bad(f"{fault}: this is no judgement of {TITLES[pair.source]}")
    votes = [_own_vote(vote, source, sides) for vote in need(record, "votes", list, of=(dict,))]
    if votes:
        again = majority([vote["verdict"] for vote in votes])
        record = record | {"recorded": int(verdict == winner), "votes": votes, "verdict": again}
    elif need(record, "recorded", int) not in (0, 1):
        raise Bad(f'"recorded" is {record["recorded"]}: it must be 1 (right) or 0')
    return pair, record


def _own_vote(vote, source, sides):
    verdict = _verdict_again(vote, source)
    n_tokens = count_or_none(vote, "n_tokens")
    seconds = count_or_none(vote, "seconds")
    if "at" in vote and not all(n.isdecimal() and v in sides for n, v in need(vote, "at", dict).items()):
        raise Bad('"at" must give "a", "b" or null for numbers of tokens')
    return vote | {"verdict": verdict, "n_tokens": n_tokens, "seconds": seconds}


def _verdict_again(vote, source):
    text = need_text(vote, "text")
    if source == reward_bench_2.FOUR_WAY:
        return reward_bench_2.four_way_verdict(text)
    if source == reward_bench_2.RATINGS:
        return None
    return judge_bench.game_verdict(vote) if "judge" in vote else benchmark_verdict(text)


def _misplaced(pair):
    """What in a pair names no place in its benchmark, or None."""
    source, ending = pair.source, pair.id.removesuffix(SWAPPED).removeprefix(pair.item + "/")
    if source == "reward-bench" and pair.subset not in SECTION_OF:
        return f"subset {pair.subset[:60]!r}"
    if source in DOMAINS and pair.domain not in DOMAINS[source]:
        return f"domain {pair.domain[:60]!r}"
    if source in reward_bench_2.TITLES and pair.subset != pair.domain:
        return f"subset {pair.subset[:60]!r} of domain {pair.domain[:60]!r}"
    if source in ENDINGS and not re.fullmatch(ENDINGS[source], ending):
        return f"id {pair.id.removesuffix(SWAPPED)[:60]!r} of item {pair.item[:60]!r}"
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
        found[name] = pair, output_record(pair, [], None, need(row, "results", int))
    return list(found.values())


def _output(pair, text, recorded):
    verdict = benchmark_verdict(text)
    vote = {"text": text, "n_tokens": None, "finished": None, "verdict": verdict, "seconds": None}
    return pair, output_record(pair, [vote], verdict, recorded)
