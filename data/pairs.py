"""The pair (a prompt, two answers, which one is better), and readers for the forms in which people keep pairs.

read_pairs and read_chains take a .jsonl file, a .json file (a list, JSON lines, or lists under numbered keys) or a
folder of such files, walked in sorted order. The form of each record is recognized by its keys:

    ours            id, prompt, answer_a, answer_b, winner, source, domain; with "judgement" it is also a chain
    TRL             prompt, chosen, rejected; or chosen, rejected as whole conversations that share their start
    one answer      prompt, answer, reference: a pair without a label in either order, the second's id "ID/swapped"
    RM-R1           context_messages and winner: "model_a" or "model_b" for a pair, else a chain's judgement
    RMB             conversation_input with chosen, reject (one pair), or with bon_best, loser_list (a pair per loser)
    RM-Bench        prompt with three chosen and three rejected (nine pairs)
    RewardBench     prompt, chosen, rejected, subset, id
    RewardBench 2   the same with lists of answers, and num_correct (each chosen one with each rejected one)
    JudgeBench      pair_id, question, response_A, response_B, label, source, response_model
    RM-R1's logs    text_chosen, text_rejected, answers, Is_Chosen_Answer_Shuffled_toPositionB: a pair and a chain
    TRL             messages: only a chain, all before the last assistant turn being its prompt

Where a source says chosen/rejected, or has a label as JudgeBench's, ONE shuffle of the whole list read decides the
order: of n such pairs exactly n // 2 have the chosen answer as B, and numpy's default_rng(seed) decides which. So a
constant verdict scores 1/2, and the order in a pair depends on the seed and on the pair's place in the list, not on its
texts. RM-R1's logs keep the order they record.

Our records, TRL's, RewardBench's and those of one answer may have a "rubric": a text by which the pair is to be judged.
The other forms have no place for one.

A record without an id gets "<file>/<its number in the file, from 1>", <file> being relative to the path given.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from files import NotJson, parse_json, write_records
from data.fields import Bad, clean, keys_of, kind_of, need, need_keys, need_object, need_side, need_text, show, text_or

ROLES = ("system", "user", "assistant")
NO_REFERENCE = ("a judge of pairs says which of two answers is better, and cannot score one alone: give a reference "
                "answer to compare it with, or rank several answers (judge.py --rank), or ask a scalar reward model")
SWAPPED = "/swapped"  # ends the id of a pair's judgement in the other order
MOST_ANSWERS = 64  # of a question, to rank
OTHER = {"a": "b", "b": "a", None: None}  # a label or verdict with the answers in the other order
RM_BENCH_DOMAINS = ("chat", "code", "math", "safety-refuse", "safety-response")
REWARD_BENCH_SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": ("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst",
                  "llmbar-adver-GPTOut", "llmbar-adver-manual"),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
               "donotanswer"),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust")}
REWARD_BENCH_2_SUBSETS = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
JUDGE_BENCH = {"gpt": "judgebench-gpt", "claude": "judgebench-claude"}  # who wrote the answers: source
JUDGE_BENCH_CATEGORIES = {"mmlu-pro": "Knowledge", "livebench-reasoning": "Reasoning", "livebench-math": "Math",
                          "livecodebench": "Coding"}  # by what the subset begins with
SECTION_OF = {subset: section for section, subsets in REWARD_BENCH_SECTIONS.items() for subset in subsets}


@dataclass(frozen=True)
class Pair:
    id: str
    prompt: list[dict]                    # {"role", "content"} messages, the last one the user's
    answer_a: str | list[dict]            # a list starts and ends with an assistant message
    answer_b: str | list[dict]
    winner: str | None                    # "a", "b", or None where nobody has said
    source: str                           # a benchmark's (benchmarks/records.py:TITLES) is scored by its own rules
    domain: str
    rendered: list[dict] | None = None    # what the judge is shown, ready-made; then prompt and answers are empty
    subset: str = ""                      # RewardBench's subset, RMB's category, RM-Bench's hard, normal or easy, ...
    item: str = ""                        # what the pairs of one best-of-n or RM-Bench record share
    rubric: str = ""                      # what the judge is told to weigh by; "" leaves that to the judge


@dataclass(frozen=True)
class Chain:
    pair: Pair
    judgement: str


@dataclass(frozen=True)
class Question:
    """Something with answers to rank."""
    id: str
    prompt: list[dict]                    # as in a Pair
    answers: list[str | list[dict]]
    rubric: str = ""                      # as in a Pair


def read_pairs(path, seed=0, skip_bad=False):
    """All pairs under path. The first bad record raises ValueError, "file:line: what is wrong, what to do"; with
    skip_bad every bad record is reported on stderr instead, and one last line counts them."""
    found = read_records(path, pairs_in, skip_bad)
    to_draw = [i for i, (_, undecided) in enumerate(found) if undecided]
    to_swap = set(balanced_order(to_draw, seed))
    return [swapped(pair) if i in to_swap else pair for i, (pair, _) in enumerate(found)]


def balanced_order(candidates, seed):
    """Half of the candidates (rounded down), drawn by the seed: the pairs that show the chosen answer as B."""
    return np.random.default_rng(seed).permutation(candidates)[:len(candidates) // 2].tolist()


def swapped(pair):
    """The same pair with its answers in the other order."""
    return replace(pair, answer_a=pair.answer_b, answer_b=pair.answer_a, winner=OTHER[pair.winner])


def pair_of_texts(question, answer_a, answer_b, rubric="", item=""):
    """An unlabelled pair of two texts that answer one."""
    prompt = [{"role": "user", "content": question}]
    return Pair("pair", prompt, answer_a, answer_b, None, "", "", item=item, rubric=rubric)


def both_orders(pair):
    """The pair as it is, and with its answers in the other order."""
    return [pair, replace(swapped(pair), id=pair.id + SWAPPED)]


def with_rubric(items, rubric, say=True):
    """The same Pairs or Questions, to be judged by this rubric where they have none of their own; how many have is
    said. "" is no rubric, and changes nothing."""
    if not rubric:
        return items
    if ready_made := [item.id for item in items if isinstance(item, Pair) and item.rendered is not None]:
        raise ValueError(f"--rubric: pair {ready_made[0]} brings its own messages, which have no place for a rubric: "
                         "give the pairs that they were made of, or leave --rubric out")
    n_own = sum(item.rubric != "" for item in items)
    if n_own and say:
        print(f"note: {n_own} of {len(items)} records have a rubric of their own, and are judged by that and not by "
              "--rubric")
    return [item if item.rubric else replace(item, rubric=rubric) for item in items]


def read_chains(path, skip_bad=False):
    """All chains under path; errors as in read_pairs."""
    return [Chain(pair, judgement) for pair, judgement in read_records(path, chains_in, skip_bad)]


def read_questions(path, skip_bad=False):
    """All Questions under path, {"id", "prompt" or "question", "answers"}; errors as in read_pairs."""
    return [question for question, _ in read_records(path, questions_in, skip_bad)]


def without_equal_answers(items, path, drop, say):
    """The Pairs or Chains; with `drop`, only those whose two answers differ. A label between equal answers is a coin's,
    and teaches none but that: how many there are is said on stdout."""
    kept = [item for item in items if not equal_answers(item.pair if isinstance(item, Chain) else item)]
    n_equal = len(items) - len(kept)
    if n_equal and say:
        print(f"{path}: {n_equal} of {len(items)} have two equal answers, " +
              ("dropped" if drop else "and are trained on all the same; --skip-bad drops them"))
    if drop and not kept:
        raise ValueError(f"{path}: none is left: all {n_equal} have two equal answers")
    return kept if drop else items


def equal_answers(pair):
    return pair.rendered is None and pair.answer_a == pair.answer_b  # a ready-made pair's answers are not known


def note_one_label(labels, path):
    """Says so if all labels are the same: a judge that always says it would be right."""
    found = set(labels) - {None}
    if len(labels) > 1 and len(found) == 1:
        label = found.pop().upper()
        print(f"note: {path}: every label is {label}, and a judge that always says {label} is right each time; put "
              "the better answer first in half of the pairs (chosen and rejected are put in a random order here)")


def to_json(item):
    """The dict that stands for a Pair or a Chain on disk; reading it gives an equal Pair or Chain."""
    if isinstance(item, Chain):
        return {**to_json(item.pair), "judgement": item.judgement}
    optional = ("rendered", "subset", "item", "rubric")
    return {key: value for key, value in asdict(item).items() if value or key not in optional}


def write_pairs(path, pairs):
    """Writes Pairs (or Chains) as JSON lines."""
    write_records(path, (to_json(pair) for pair in pairs))


# ---- files to records

@dataclass(frozen=True)
class Place:
    file: Path
    default_id: str
    repeats: Counter                      # how often each best-of-n uid was met in this file


def json_files(path):
    """The file, or the .json and .jsonl files under the folder in sorted order."""
    root = Path(path)
    if not root.exists():
        raise ValueError(f"{path}: no such file or folder: check the path")
    if root.is_file() and root.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: not a .json or .jsonl file: convert it, or rename it if it is one")
    if root.is_file():
        return [root]
    return sorted(file for file in root.rglob("*") if file.suffix in (".json", ".jsonl") and file.is_file())


def read_records(path, convert, skip_bad=False, files=None):
    """[(pair, ...)] of all records under path (or of these files under it)."""
    return [item for items in stream_records(path, convert, skip_bad, files) for item in items]


def stream_records(path, convert, skip_bad=False, files=None):
    """Yields a list [(pair, ...)] for each record under path (or of these files under it), and [] for one that is
    skipped. `convert(record, place)` makes the list, or raises Bad. Of a .jsonl file one line is held at a time."""
    root, first_at = Path(path), {}
    n_records = n_bad = 0
    for file in json_files(path) if files is None else files:
        name = file.name if file == root else file.relative_to(root).as_posix()
        repeats = Counter()
        for number, (line, record) in enumerate(_records(file), 1):
            n_records += 1
            where = f"{file}:{line}"
            try:
                items = convert(_object(record), Place(file, f"{name}/{number}", repeats))
                for pair, _ in items:
                    if pair.id in first_at:
                        raise Bad(f'id {show(pair.id)} is also at {first_at[pair.id]}: remove or rename one of them')
            except Bad as bad:
                if not skip_bad:
                    raise ValueError(f"{where}: {bad}") from None
                n_bad += 1
                print(f"{where}: skipped: {bad}", file=sys.stderr)
                items = []
            for pair, _ in items:  # only now: a bad record leaves no id behind
                first_at[pair.id] = where
            yield items
    if n_bad:
        print(f"{path}: skipped {n_bad} bad records of {n_records}", file=sys.stderr)
    if n_bad == n_records:
        raise ValueError(f"{path}: no {'usable ' if n_bad else ''}records: give a file or folder of JSON records")


def _records(file):
    """(line, record) of every record of one file; what cannot be decoded comes as a Bad in the record's place."""
    if file.suffix == ".jsonl":
        with open(file, "rb") as lines:
            yield from _lines(lines)
        return
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    lines = data.rstrip().split(b"\n")
    if lines == [b""]:
        return
    if data.startswith(b"{") and len(lines) > 1 and lines[0].rstrip().endswith(b"}"):
        yield from _lines(lines)
        return
    line, value = _decode(data, 1)
    numbered = isinstance(value, dict) and value and all(
        key.isdigit() and isinstance(group, list) for key, group in value.items())
    if not isinstance(value, list) and not numbered:
        yield line, value
        return
    del value  # only now is the text known to be JSON; it is decoded again for the places
    text, before = data.decode("utf-8-sig"), 0
    for start, record in _elements(text):
        line += text.count("\n", before, start)
        before = start
        yield line, record


def _lines(lines):
    """The same for JSON lines in bytes, of a list or of a file: the latter breaks at \\n alone, as it must, since
    U+2028 may stand in a JSON string."""
    blank = []                            # numbers of blank lines; those at the end are none
    for line, raw in enumerate(lines, 1):
        raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
        if not raw.strip():
            blank.append(line)
            continue
        for number in blank:
            yield number, Bad("blank line: take it out")
        blank = []
        yield _decode(raw.removesuffix(b"\n"), line)


def _decode(raw, line):
    """(line, value) of the JSON in raw, which starts on `line`; where it is none, the line that breaks it and a Bad."""
    try:
        return line, parse_json(raw)
    except NotJson as e:
        return line + e.line - 1, Bad(f"{e.fault}: repair or remove the record")


_DECODER = json.JSONDecoder()
_GAP = re.compile(r"[ \t\r\n,]*")


def _elements(text):
    """(position, value) of every element of a JSON list, or of the lists in a JSON object; text must be valid."""
    pos = _skip(text, 0)
    if text[pos] == "[":
        yield from _array(text, pos)
        return
    pos = _skip(text, pos + 1)
    while text[pos] != "}":
        _, end_of_key = _DECODER.raw_decode(text, pos)
        end = yield from _array(text, text.index("[", end_of_key))
        pos = _skip(text, end)


def _array(text, pos):
    """The same for the one list that opens at pos; returns the position behind it."""
    pos = _skip(text, pos + 1)
    while text[pos] != "]":
        value, end = _DECODER.raw_decode(text, pos)
        yield pos, value
        pos = _skip(text, end)
    return pos + 1


def _skip(text, pos):
    """The position of what follows the spaces and commas at pos."""
    return _GAP.match(text, pos).end()


# ---- records to pairs

def pairs_in(record, place):
    """[(pair, undecided)]: an undecided pair has the chosen answer as A, and the shuffle may yet swap it."""
    if "text_chosen" in record or "text_rejected" in record:
        return [(logged_pair(record, place), False)]
    if "context_messages" in record:
        label = need(record, "winner", str, list)
        if label not in ("model_a", "model_b"):
            raise Bad('"winner" is neither "model_a" nor "model_b": correct it, or read a file of chains as chains')
        winner = label.removeprefix("model_")
        return [(_ready(record, place, record["context_messages"], "context_messages", winner), False)]
    if "answer_a" in record or "answer_b" in record:
        return [(_own(record), False)]
    if "conversation_input" in record:
        return [(pair, True) for pair in _rmb(record, place)]
    if "chosen" in record or "rejected" in record:
        chosen = record.get("chosen")
        if isinstance(chosen, list) and any(isinstance(answer, str) for answer in chosen):
            found = _reward_bench_2(record) if "num_correct" in record else _rm_bench(record, place)
            return [(pair, True) for pair in found]
        return [(_preference(record, place), True)]
    if "response_A" in record or "response_B" in record:
        return [(judge_bench_pair(record), True)]
    if "answer" in record or "reference" in record:
        return [(pair, False) for pair in _both_orders(record, place)]
    if "messages" in record:
        raise Bad('"messages" alone is a chain, not a pair: read it as a chain, or give prompt, chosen and rejected')
    raise Bad(f"unknown format, its keys are {keys_of(record)}: data/pairs.py lists the known ones")


def chains_in(record, place):
    """[(pair, judgement)] of one record."""
    if "text_chosen" in record or "text_rejected" in record:
        return [(logged_pair(record, place), _judgement(record, "answers"))]
    if "context_messages" in record:
        target = need(record, "winner", str, list)
        if target in ("model_a", "model_b"):
            raise Bad(f'"winner" is the label "{target}", not a judgement: read this file as pairs')
        if isinstance(target, str):
            target = [{"role": "assistant", "content": target}]
        turns = _messages(target, "winner")
        if [turn["role"] for turn in turns] != ["assistant"]:
            raise Bad('"winner" as a list must be one assistant message: correct it')
        pair = _ready(record, place, record["context_messages"], "context_messages", None)
        return [(pair, _judgement(turns[0], "content"))]
    if "messages" in record:
        turns = _messages(record["messages"], "messages")
        if not turns or turns[-1]["role"] != "assistant":
            raise Bad('"messages" must end with the assistant turn to learn: remove what follows it')
        return [(_ready(record, place, turns[:-1], "messages", None), _judgement(turns[-1], "content"))]
    if "judgement" in record:
        return [(_own(record), _judgement(record, "judgement"))]
    raise Bad(f"no judgement in this record, its keys are {keys_of(record)}: data/pairs.py lists the forms of chains")


def questions_in(record, place):
    """[(Question, None)] of one record."""
    if "prompt" in record and "question" in record:
        raise Bad('"prompt" and "question" are the same thing: remove one')
    name = "question" if "question" in record else "prompt"
    need_keys(record, name, "answers")
    value = need(record, name, str, list)
    prompt = _prompt([{"role": "user", "content": value}] if isinstance(value, str) else value, name)
    answers = [_answer(answer, prompt, True) for answer in need(record, "answers", list, of=(str, list))]
    if not 2 <= len(answers) <= MOST_ANSWERS:
        raise Bad(f'"answers" holds {len(answers)}: from 2 to {MOST_ANSWERS} can be ranked')
    if not any(text.strip() for answer in answers for text in texts_of(answer)):
        raise Bad("all answers are blank: remove the record")
    return [(Question(_id(record, place), prompt, answers, _rubric(record)), None)]


def _own(record):
    need_keys(record, "id", "prompt", "answer_a", "answer_b", "winner", "source", "domain")
    fields = {"winner": need_side(record, "winner"), "id": _id(record),
              "source": need_text(record, "source"), "domain": need_text(record, "domain"),
              "subset": text_or(record, "subset", ""), "item": text_or(record, "item", ""), "rubric": _rubric(record)}
    a, b = need(record, "answer_a", str, list), need(record, "answer_b", str, list)
    prompt = need(record, "prompt", list, str)
    if record.get("rendered") is None:
        return _pair(**fields, answer_a=a, answer_b=b, prompt=prompt, plain=False)
    if (prompt, a, b, fields["rubric"]) != ([], "", "", ""):
        raise Bad('with "rendered", the prompt must be [], the answers "", and no rubric there: empty them, or remove '
                  '"rendered"')
    return Pair(**fields, answer_a="", answer_b="", prompt=[], rendered=_prompt(record["rendered"], "rendered"))


def _ready(record, place, messages, name, winner):
    """A pair that is known only as the judge was shown it, in messages that came under this name."""
    if _rubric(record):
        raise Bad(f'"rubric" beside "{name}", messages in which it has no place any more: remove it')
    return Pair(_id(record, place), prompt=[], answer_a="", answer_b="", winner=winner,
                source=text_or(record, "source", place.file.stem), domain=text_or(record, "domain", ""),
                rendered=_prompt(messages, name), subset=text_or(record, "subset", ""))


def _preference(record, place):
    chosen, rejected = need(record, "chosen", str, list), need(record, "rejected", str, list)
    if "prompt" in record and "subset" in record and "id" in record:
        return _reward_bench(record, record["prompt"], chosen, rejected, "a")
    source, domain = text_or(record, "source", place.file.stem), text_or(record, "domain", "")
    if "prompt" in record:
        prompt = need(record, "prompt", str, list)
    elif isinstance(chosen, str) or isinstance(rejected, str):
        raise Bad('an answer is a string, and there is no "prompt": add it, or make both answers whole conversations')
    else:
        prompt, chosen, rejected = _split(chosen, rejected, "chosen", "rejected")
    return _pair(_id(record, place), prompt, chosen, rejected, "a", source, domain, rubric=_rubric(record))


def _both_orders(record, place):
    """One answer and its reference: the answer as A, then as B, an item that is judged whole or not at all."""
    if "reference" not in record:
        raise Bad(f'"answer" without "reference": {NO_REFERENCE}')
    answer, reference = need(record, "answer", str, list), need(record, "reference", str, list)
    name, prompt = _id(record, place), need(record, "prompt", str, list)
    if name.endswith(SWAPPED):
        raise Bad(f'"id" is {show(name)}: ids that end in {SWAPPED} are of the other order, rename it')
    source, domain = text_or(record, "source", place.file.stem), text_or(record, "domain", "")
    pair = _pair(name, prompt, answer, reference, None, source, domain, item=name, rubric=_rubric(record))
    return both_orders(pair)


def _reward_bench(record, prompt, chosen, rejected, winner):
    subset = need_text(record, "subset")
    if subset not in SECTION_OF:
        raise Bad(f'{show(subset)} is no subset of RewardBench: correct it; in other data, rename the key "subset"')
    name = f"{subset}/{_id(record)}"  # the released ids repeat: 3692 is in donotanswer and in hep-python
    a, b = _in_order(chosen, rejected, winner)
    return _pair(name, prompt, a, b, winner, "reward-bench", SECTION_OF[subset], subset=subset, rubric=_rubric(record))


def rm_bench_pair(record, place, row, column, rejected, winner="a"):
    """The pair of chosen style `row` and rejected style `column`; `rejected` is the text shown beside it."""
    _refuse_rubric(record, "RM-Bench")
    domain = text_or(record, "domain", place.file.name.split("_")[0])
    if domain not in RM_BENCH_DOMAINS:
        raise Bad(f'{show(domain)} is no domain of RM-Bench: add "domain", or name the file <domain>_..., '
                  f'with one of {", ".join(RM_BENCH_DOMAINS)}')
    item = f"{domain}/{_id(record).removeprefix(domain + '/')}"
    a, b = _in_order(need(record, "chosen", list)[row], rejected, winner)
    if row == column:
        subset = "normal"
    else:
        subset = "hard" if row < column else "easy"  # hard: the chosen answer is the plainer one
    return _pair(f"{item}/{row}{column}", need(record, "prompt", str), a, b, winner, "rm-bench", domain,
                 subset=subset, item=item)


def _rm_bench(record, place):
    chosen, rejected = need(record, "chosen", list), need(record, "rejected", list)
    if len(chosen) != 3 or len(rejected) != 3:
        raise Bad(f"{len(chosen)} chosen and {len(rejected)} rejected answers: RM-Bench has 3 of each, repair it")
    return [rm_bench_pair(record, place, row, column, rejected[column]) for row in range(3) for column in range(3)]


def judge_bench_pair(record):
    """A pair of JudgeBench with the better answer as A; its label says whether that is their order, too."""
    _refuse_rubric(record, "JudgeBench")
    winner = judge_bench_label(record)
    one, other = need(record, "response_A", str), need(record, "response_B", str)
    a, b = (one, other) if winner == "a" else (other, one)
    subset, written_by = need_text(record, "source"), need_text(record, "response_model")
    return _pair(_id(record, key="pair_id"), need(record, "question", str), a, b, "a", judge_bench_source(written_by),
                 judge_bench_category(subset), subset=subset)


def judge_bench_label(record):
    label = need(record, "label", str)
    if label not in ("A>B", "B>A"):
        raise Bad(f'"label" is {show(label)}: JudgeBench has "A>B" and "B>A"')
    return "a" if label == "A>B" else "b"


def judge_bench_source(written_by):
    """The two files are scored apart: both hold 91 of the questions, with other answers."""
    for name, source in JUDGE_BENCH.items():
        if written_by.startswith(name):
            return source
    raise Bad(f"answers by {show(written_by)}: JudgeBench has those of gpt-4o-2024-05-13 and "
              "claude-3-5-sonnet-20240620")


def judge_bench_category(subset):
    for begin, category in JUDGE_BENCH_CATEGORIES.items():
        if subset.startswith(begin):
            return category
    raise Bad(f'"source" is {show(subset)}: JudgeBench has {", ".join(JUDGE_BENCH_CATEGORIES)}')


def reward_bench_2_answers(record):
    """(subset, name, right answers, wrong answers) of a row of RewardBench 2; its ids repeat across subsets."""
    _refuse_rubric(record, "RewardBench 2")
    subset = need_text(record, "subset")
    if subset not in REWARD_BENCH_2_SUBSETS:
        raise Bad(f'{show(subset)} is no subset of RewardBench 2: correct it; in other data, take out "num_correct"')
    chosen, rejected = need(record, "chosen", list, of=(str,)), need(record, "rejected", list, of=(str,))
    counts = len(chosen), len(rejected)
    if subset == "Ties" and 0 in counts or subset != "Ties" and counts != (1, 3):
        wanted = "at least one of each" if subset == "Ties" else "1 and 3"
        raise Bad(f"{counts[0]} chosen and {counts[1]} rejected answers: {subset} has {wanted}, repair the record")
    if need(record, "num_correct", int, float) != len(chosen):
        raise Bad(f'"num_correct" is {record["num_correct"]}, "chosen" has {len(chosen)} answers: repair the record')
    name = _id(record)
    if subset == "Ties" and not re.fullmatch("ref:[0-9]+" if len(chosen) == 1 else "tied:[0-9]+", name):
        raise Bad(f'"id" is {show(name)}: in Ties it is ref:<n> with one chosen answer, tied:<n> with several')
    return subset, f"{subset}/{name}", chosen, rejected


def _reward_bench_2(record):
    """Each right answer with each wrong one; the id ends in the wrong one's number, in Ties in both numbers and how
    many pairs the row has: "Ties/tied:7/0-2of6"."""
    subset, item, chosen, rejected = reward_bench_2_answers(record)
    prompt = need(record, "prompt", str)
    pairs = []
    for i, right in enumerate(chosen):
        for k, wrong in enumerate(rejected):
            number = f"{i}-{k}of{len(chosen) * len(rejected)}" if subset == "Ties" else k
            pairs.append(_pair(f"{item}/{number}", prompt, right, wrong, "a", "reward-bench-2", subset, subset=subset,
                               item=item))
    return pairs


def _rmb(record, place):
    _refuse_rubric(record, "RMB")
    domain = _rmb_domain(record, place)
    if "bon_uid" not in record:
        uid = _id(record, key="pair_uid")
        chosen, rejected = (need(need(record, key, dict), "answer", str) for key in ("chosen", "reject"))
        prompt = need(record, "conversation_input", list)
        return [_pair(uid, prompt, chosen, rejected, "a", "rmb", domain, subset=_category(record, place))]
    uid = _id(record, key="bon_uid")
    best = need(need(record, "bon_best", dict), "answer", str)
    losers = [need(_object(loser), "answer", str) for loser in need(record, "loser_list", list)]
    if not losers:
        raise Bad('"loser_list" is empty: remove the record')
    prompt = need(record, "conversation_input", list)
    return [_pair(f"{uid}/{number}", prompt, best, loser, "a", "rmb", domain, subset=_category(record, place), item=uid)
            for number, loser in enumerate(losers)]


def logged_pair(record, place):
    """What RM-R1 was shown in a recorded run, in the order it was shown. Best-of-n logs do not say which loser a record
    is about: its place among those of the same uid in the file numbers it, as in the data set's own order."""
    name = item = ""
    if "bon_uid" in record:
        item = _id(record, key="bon_uid")
        place.repeats[item] += 1          # before any check, so that a bad record takes its number with it
        name = f"{item}/{place.repeats[item] - 1}"
    elif "pair_uid" in record:
        name = _id(record, key="pair_uid")
    _refuse_rubric(record, "RM-R1's logs")
    one, other = need(record, "text_chosen", list), need(record, "text_rejected", list)
    prompt, chosen, rejected = _split(one, other, "text_chosen", "text_rejected")
    winner = "b" if need(record, "Is_Chosen_Answer_Shuffled_toPositionB", bool) else "a"
    if not name:
        return _reward_bench(record, prompt, chosen, rejected, winner)
    a, b = _in_order(chosen, rejected, winner)
    return _pair(name, prompt, a, b, winner, "rmb", _rmb_domain(record, place), subset=_category(record, place),
                 item=item)


def _in_order(chosen, rejected, winner):
    return (chosen, rejected) if winner == "a" else (rejected, chosen)


def _rmb_domain(record, place):
    for text in (text_or(record, "category_path", ""), str(place.file)):
        for domain in ("Helpfulness", "Harmlessness"):
            if domain in text:
                return domain
    raise Bad('neither "category_path" nor the file\'s path says Helpfulness or Harmlessness: add "category_path"')


def _category(record, place):
    return text_or(record, "category_path", place.file.stem)


def _split(one, other, name, other_name):
    """Two conversations -> the prompt they share, ending with a user turn, and the rest of each."""
    one, other = _messages(one, name), _messages(other, other_name)
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    while n and one[n - 1]["role"] != "user":   # also where both are equal to the end: an answer must remain
        n -= 1
    return one[:n], one[n:], other[n:]


# ---- checks

def _pair(id, prompt, answer_a, answer_b, winner, source, domain, plain=True, subset="", item="", rubric=""):
    """A checked Pair; with `plain`, an answer of one message becomes its text (our own records keep their form)."""
    prompt = _prompt([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
    a, b = _answer(answer_a, prompt, plain), _answer(answer_b, prompt, plain)
    if not any(text.strip() for side in (a, b) for text in texts_of(side)):
        raise Bad("both answers are blank: remove the record")
    return Pair(id, prompt, a, b, winner, source, domain, subset=subset, item=item, rubric=rubric)


def _rubric(record):
    rubric = text_or(record, "rubric", "")
    if "rubric" in record and record["rubric"] is not None and not rubric.strip():
        raise Bad('"rubric" is blank: write one, or leave the key out')
    return rubric


def _refuse_rubric(record, form):
    """Before it would be dropped in silence."""
    if _rubric(record):
        raise Bad(f'"rubric" in a record of {form}, a form that has none: convert the record to ours, or remove it')


def texts_of(answer):
    """The texts of an answer's messages."""
    return [answer] if isinstance(answer, str) else [message["content"] for message in answer]


def _prompt(value, name):
    messages = _messages(value, name)
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise Bad(f'"{name}" is empty, no user turn has text: remove the record')
    if messages[-1]["role"] != "user":
        raise Bad(f'"{name}" ends with a turn of role {messages[-1]["role"]}: it must end with the user\'s turn')
    return messages


def _answer(value, prompt, plain):
    """A text, or messages; of a whole conversation that repeats the prompt, what follows the prompt."""
    if isinstance(value, str):
        return clean(value, "answer")
    messages = _messages(value, "answer")
    if messages and messages[0]["role"] != "assistant" and messages[:len(prompt)] == prompt:
        messages = messages[len(prompt):]
    if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise Bad("an answer must start, after the prompt or without it, and end with an assistant turn: repair it")
    return messages[0]["content"] if plain and len(messages) == 1 else messages


def _messages(value, name):
    if not isinstance(value, list):
        raise Bad(f'"{name}" is {kind_of(value)}: it must be a list of messages')
    for message in value:
        if need(_object(message), "role", str) not in ROLES:
            raise Bad(f'"{name}" has a message of role {show(message["role"])}: use {", ".join(ROLES)}')
    return [{"role": message["role"], "content": need_text(message, "content")} for message in value]


def _id(record, place=None, key="id"):
    """The record's id as text; without one, the place's, if a place is given."""
    if place is not None and record.get(key) is None:
        return place.default_id
    value = clean(str(need(record, key, str, int)), key)
    if not value.strip():
        raise Bad(f'"{key}" is blank: write one')
    return value


def _judgement(record, key):
    if not need_text(record, key).strip():
        raise Bad(f'the judgement ("{key}") is blank: remove the record')
    return record[key]


def _object(value):
    """value, if it is a JSON object (and the record in it, if it is one of the wrapped log records)."""
    if isinstance(value, Bad):
        raise value
    is_wrapped = need_object(value).keys() == {"source_index", "record"}
    return need(value, "record", dict) if is_wrapped else value
