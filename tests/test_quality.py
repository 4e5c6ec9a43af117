"""data/quality.py. Oracles: texts made here whose every number is known; counts of RM-R1's recorded outputs made again
by other means (RM_SHARED, default ../shared). That the page finds the same quotations: tests/test_report.py."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import toy  # noqa: E402
from data.quality import (FOUND, Config, Tally, main, measure, percents, place_of, quantile, quotations,  # noqa: E402
                          side_by_side)
from data.rubric import rubric_items  # noqa: E402
from options import parse_config  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

LOGS = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
QWEN = LOGS / "reward_bench/RM-R1-Qwen2.5-Instruct-32B.logs.sample40.json"
needs_logs = pytest.mark.skipif(not QWEN.exists(), reason=f"no recorded outputs at {LOGS}: set RM_SHARED")

A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"
CHAT = f"""<type>Chat</type>
<rubric>
1. Truth (70%): is right
2. Tone (30%): is kind
<justify>so</justify>
</rubric>
<eval><quote_A>the moon is made</quote_A> <quote_A>"The   Moon"</quote_A> <quote_B>the moon is made</quote_B></eval>
{A}"""
MATH = f"<type>Reasoning</type><solution>4</solution><eval><quote_B>2 +\n2 = 5</quote_B></eval>{B}"
ANSWERS = {"A": ["They say the moon is made of rock."], "B": ["2 + 2 = 5"]}


def found(rows):
    return {(row["group"], row["name"]): row["n"] if row["of"] is None else (row["n"], row["of"]) for row in rows}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- the numbers

def test_a_table_by_hand():
    tally = Tally()
    texts = [(CHAT, "a"), (CHAT + "</eval>", "a"), (CHAT.replace("30%", "31.5%"), "b"), (MATH, "b"), (MATH, None),
             (CHAT.replace(" (70%)", "").replace(" (30%)", ", weight 2"), "a"), ("<think>[[A]]</think>" + B, "b"),
             ("<type>Chat</type><rubric>1. Truth\n2. Tone</rubric><eval>x</eval>", "a")]
    for text, winner in texts:
        tally.add(text, winner, "answer", ANSWERS)
    rows = found(tally.rows())
    assert rows["Texts", "all"] == 8 and rows["Texts", "records skipped as unreadable"] == 0
    assert [rows["Well formed", kind] for kind in ("Chat", "Reasoning", "no type")] == [(3, 5), (2, 2), (0, 1)]
    assert rows["Not well formed, of those with a type", "a tag too many, too few or misplaced"] == (1, 7)
    assert rows["Not well formed, of those with a type", "no verdict at the end"] == (1, 7)
    # four chats with three quotations each, of which one as it is, one in quotation marks, one of the other answer;
    # two solutions with one each, broken over lines
    group = "Quotations found in the answer"
    assert [rows[group, how] for how in (*FOUND, "not at all")] == [(4, 14), (6, 14), (10, 14), (4, 14)]
    assert rows["Quotations of answers that are not known", "all"] == 0
    assert rows["Rubrics", "give weights"] == (4, 5) and rows["Rubrics", "give weights in per cent"] == (3, 5)
    assert rows["Rubrics", "whose per cents sum to 100"] == (2, 3)
    training, benchmarks = "Verdicts by training's rule", "Verdicts by the benchmarks' rule"
    assert [rows[training, x] for x in ("A", "B", "none")] == [(4, 8), (3, 8), (1, 8)]
    assert [rows[benchmarks, x] for x in ("A", "B", "none")] == [(4, 8), (2, 8), (2, 8)]
    right = "right, of those with a label"
    assert rows[training, right] == (5, 7) and rows[benchmarks, right] == (4, 7)
    assert rows["Labels", "A"] == (4, 7) and rows["Labels", "B"] == (3, 7)
    lengths = sorted(len(text) for text, _ in texts)
    assert rows["Characters", "longest"] == lengths[-1] and rows["Characters", "50 % are no longer than"] == lengths[3]
    assert rows["Characters", "mean"] == pytest.approx(sum(lengths) / 8, abs=0.05)
    assert not any(group == "Tokens" for group, _ in rows)


def test_lengths_by_sorting():
    values = [7, 3, 3, 9, 1, 4, 4, 4, 8, 2] * 3
    counted = Tally().characters
    for value in values:
        counted[value] += 1
    for share in (0.05, 0.1, 0.5, 0.95, 1):
        assert quantile(counted, share) == sorted(values)[max(0, -int(-share * 30 // 1) - 1)]


@pytest.mark.parametrize("text, quoted", [
    ("<quote_A>x</quote_A><quote_B> y\n</quote_B>", [("A", "x"), ("B", "y")]), ("<quote_A>never closed", []),
    ("<think><quote_A>a</quote_A></think><quote_A>b</quote_A>", [("A", "b")]), ("<quote_C>x</quote_C>", []),
    ("<quote_A>a <quote_A>b</quote_A> c</quote_A>", [("A", "b")]), ("<quote_A></quote_A>", [("A", "")])])
def test_quotations_by_hand(text, quoted):
    assert quotations(text) == quoted


TEXTS = ["# The **Moon** isn’t\n\nmade of “cheese”, they say.", "Second message, with_underscores."]


@pytest.mark.parametrize("quotation, rule", [
    ("The **Moon** isn’t", 0), ("**Moon** isn’t made", 1), ('"the moon isn\'t"', 2), ("Moon ... cheese", 2),
    ("the moon [...] they say", 2), ("The Moon… second message", 2), ('"moon" and "cheese"', 2), ("Moon ... sun", None),
    ("the moon was", None), ("", None), ('""', None), ("...", None), ("Second message", 0), ("cheese, they say", None)])
def test_places_of_quotations_by_hand(quotation, rule):
    assert place_of(quotation, TEXTS) == (None if rule is None else FOUND[rule])


@pytest.mark.parametrize("rubric, weights", [
    ("1. A (40%): x\n2. B (60 %)", [40, 60]), ("1. A (40 percent)\n2. B - 2.5%", [40, 2.5]), ("1. A (40)\n2. B", []),
    ("- A, weight 0.5\n- B [weight: 50%]", [50]), (" Hello 4 river 2", []), ("prose, 50% of it", [])])
def test_weights_in_per_cent(rubric, weights):
    assert percents(rubric_items(rubric)) == weights


# ---- the files

PAIR = {"prompt": [{"role": "user", "content": "q"}], "answer_a": ANSWERS["A"][0], "answer_b": ANSWERS["B"][0],
        "winner": "a", "source": "s", "domain": "d"}
IN_ANSWER, IN_MESSAGES = "Quotations found in the answer", "Quotations found in the messages"


def shown(*answers):
    return [{"role": "system", "content": "judge"}, {"role": "user", "content": " | ".join(answers)}]


def test_chains_of_every_form(tmp_path):
    """The same chain four times: with its answers, twice as it was shown, and in RM-R1's log."""
    assistant = [{"role": "assistant", "content": CHAT}]
    talk = [[*PAIR["prompt"], {"role": "assistant", "content": PAIR[key]}] for key in ("answer_b", "answer_a")]
    ours = write(tmp_path / "ours.jsonl", [PAIR | {"id": "1", "judgement": CHAT}])
    sft = write(tmp_path / "sft.jsonl", [{"context_messages": shown(*ANSWERS["A"]), "winner": CHAT}])
    trl = write(tmp_path / "trl.jsonl", [{"messages": shown(*ANSWERS["A"]) + assistant}])
    log = tmp_path / "log.json"
    log.write_text(json.dumps([{
        "text_chosen": talk[0], "text_rejected": talk[1], "answers": CHAT, "results": 0, "subset": "hep-go", "id": 1,
        "Is_Chosen_Answer_Shuffled_toPositionB": True}]))
    for file, group, label in ((ours, IN_ANSWER, (1, 1)), (log, IN_ANSWER, (0, 1)), (sft, IN_MESSAGES, (0, 0)),
                               (trl, IN_MESSAGES, (0, 0))):
        rows, in_b = found(measure(file).rows()), group == IN_MESSAGES     # all is in the same messages
        assert rows["Well formed", "Chat"] == (1, 1), file
        assert [rows[group, how] for how in (*FOUND, "not at all")] == [
            (1 + in_b, 3), (1 + in_b, 3), (2 + in_b, 3), (1 - in_b, 3)]
        assert rows["Verdicts by training's rule", "right, of those with a label"] == label
        assert rows["Quotations of answers that are not known", "all"] == 0


def judgement(name, texts, winner="a", **more):
    return {"id": name, "votes": [{"text": text, "verdict": None} for text in texts], "verdict": None,
            "winner": winner} | more


def test_judgements_are_counted_by_vote_in_the_order_they_were_shown(tmp_path):
    """Pair 2 in both orders: what is quoted from A was answer A first, then answer B. Pair 3 is not on disk."""
    quoting = "<quote_A>the moon</quote_A>" + A
    file = write(tmp_path / "judgements.jsonl", [
        judgement("1", [CHAT, MATH, "no verdict"]), judgement("2", [quoting]), judgement("3", [quoting], None),
        judgement("2/swapped", [quoting], "b", swapped=True)])
    rows = found(measure(file).rows())
    assert rows["Texts", "all"] == 6 and rows["Quotations of answers that are not known", "all"] == 7
    write(tmp_path / "pairs.jsonl", [PAIR | {"id": "2"}, PAIR | {"id": "1"}])
    rows = found(measure(file).rows())
    assert rows["Quotations of answers that are not known", "all"] == 1
    assert [rows[IN_ANSWER, how] for how in (*FOUND, "not at all")] == [(2, 6), (3, 6), (4, 6), (2, 6)]
    assert rows["Verdicts by the benchmarks' rule", "right, of those with a label"] == (2, 5)
    assert rows["Labels", "A"] == (4, 5)


def test_a_file_is_read_a_line_at_a_time(tmp_path):
    """4 MB of chains, and as much of pairs beside judgements; peaks of 0.3 and 0.2 MB were measured."""
    long = "word " * 8_000
    chains = write(tmp_path / "chains.jsonl", (PAIR | {"id": str(i), "judgement": CHAT + long} for i in range(100)))
    write(tmp_path / "pairs.jsonl", (PAIR | {"id": str(i), "answer_a": long} for i in range(100)))
    judged = write(tmp_path / "judgements.jsonl", (judgement(str(i), [A]) for i in range(100)))
    for file in (chains, judged):
        tracemalloc.start()
        assert measure(file).characters.total() == 100
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1e6, (file, peak)


# ---- recorded outputs

@needs_logs
def test_recorded_outputs_counted_by_other_means():
    """48 texts of the instruct model, 48 of the reasoning model, in ten files. Well-formed: 37 of 48, of which in the
    40 of RewardBench 31 (they were read by hand for tests/test_reward.py)."""
    total = {}
    for file in sorted(LOGS.rglob("*logs*.json")):
        if file.name == "group_by_same_id_logs.json":
            continue
        records = [row.get("record", row) for row in json.loads(file.read_text(encoding="utf-8"))]
        texts, rows = [record["answers"] for record in records], found(measure(file).rows())
        model, n = "instruct" if "Instruct" in str(file) else "reasoning", len(texts)
        for kind in ("Chat", "Reasoning"):
            assert rows["Well formed", kind][1] == sum(text.startswith(f"<type>{kind}</type>") for text in texts)
        assert rows[IN_ANSWER, "not at all"][1] == sum(len(re.findall("</quote_[AB]>", text)) for text in texts)
        assert rows[IN_ANSWER, FOUND[0]][0] == sum(
            text.strip() in record[key][-1]["content"] for record in records for side, text in
            re.findall("<quote_([AB])>(.*?)</quote_", record["answers"], re.S) for key in
            [("text_rejected", "text_chosen")[(side == "B") == record["Is_Chosen_Answer_Shuffled_toPositionB"]]])
        rubrics = [re.findall(r"\((\d+)%\)", text.split("<justify>")[0]) for text in texts if "<rubric>" in text]
        assert rows["Rubrics", "give weights in per cent"] == (sum(map(bool, rubrics)), len(rubrics))
        assert rows["Rubrics", "whose per cents sum to 100"][0] == sum(sum(map(int, x)) == 100 for x in rubrics)
        assert rows["Verdicts by the benchmarks' rule", "right, of those with a label"] == (
            sum(record["results"] for record in records), n)
        assert rows["Verdicts by the benchmarks' rule", "none"] == (sum(
            ("[[A]]" in text) == ("[[B]]" in text) for text in texts), n)
        assert rows["Labels", "B"][0] == sum(record["Is_Chosen_Answer_Shuffled_toPositionB"] for record in records)
        assert rows["Characters", "longest"] == max(map(len, texts))
        total.setdefault(model, []).append(rows)
    well_formed = {model: sum(rows["Well formed", kind][0] for rows in all_rows for kind in ("Chat", "Reasoning"))
                   for model, all_rows in total.items()}
    assert well_formed == {"instruct": 37, "reasoning": 0} and sum(map(len, total.values())) == 10


# ---- command line

def run(capsys, *arguments):
    main(parse_config(Config, argv=[str(x) for x in arguments]))
    return capsys.readouterr().out


def test_files_stand_side_by_side_in_print_and_on_disk(tmp_path, capsys):
    toy.write_tokenizer(tmp_path / "model")
    one = write(tmp_path / "one.jsonl", [PAIR | {"id": "1", "judgement": CHAT}, PAIR | {"id": "2", "judgement": A}])
    two = write(tmp_path / "two.jsonl", [PAIR | {"id": "1", "judgement": MATH}])
    out = run(capsys, one, two, "--out", tmp_path / "out.json", "--tokenizer", tmp_path / "model")
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert lines[:3] == [[f"[1] {one}"], [f"[2] {two}"], ["[1]", "[2]"]]
    assert ["Chat", "1 of 1", "100.0 %", "-"] in lines and ["Reasoning", "-", "1 of 1", "100.0 %"] in lines
    assert ["no type", "0 of 1", "0.0 %", "-"] in lines and ["all", "2", "1"] in lines
    tokenizer = Tokenizer(tmp_path / "model")
    assert ["longest", *(f"{len(tokenizer.encode(text)):,}" for text in (CHAT, MATH))] in lines
    assert "skipped" not in out and len({len(line) for line in out.splitlines() if line.startswith("  ")}) == 1
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [entry["file"] for entry in saved] == [str(one), str(two)]
    assert [found(entry["rows"])["Texts", "all"] for entry in saved] == [2, 1]
    assert [x[0] for x in side_by_side([entry["rows"] for entry in saved])] == [
        line for line in out.splitlines()[3:] if line and not line.startswith(" ")]


@pytest.mark.parametrize("line, fault", [
    ("{", "malformed JSON"), ('{"id": 1}', "no judgement in this record"), ("[]", "a JSON object must stand here"),
    ('{"context_messages": [], "winner": "model_a"}', "read this file as pairs"), ("\udcff", "is not UTF-8"),
    ('{"id": "x", "votes": [], "winner": "a"}', "only an outcome was recorded"),
    ('{"id": "x", "votes": [{"text": 3}], "winner": "a"}', '"text" is an integer'),
    ('{"id": "x", "votes": [{"text": "t"}], "winner": "c"}', 'write "a", "b" or null'),
    (json.dumps(PAIR | {"id": "1", "judgement": "x"}), 'id "1" is also at')])
def test_bad_records(tmp_path, capsys, line, fault):
    file = tmp_path / "chains.jsonl"
    good = json.dumps(PAIR | {"id": "1", "judgement": CHAT})
    file.write_bytes(f"{good}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(fault)) as e:
        run(capsys, file, "--out", tmp_path / "out.json")
    assert str(e.value).startswith(f"{file}:2: ") and "\n" not in str(e.value)
    assert not (tmp_path / "out.json").exists()
    main(Config(files=(str(file),), skip_bad=True))
    out, err = capsys.readouterr()
    assert re.search(r"records skipped as unreadable +1\n", out) and "skipped 1 bad records of 2" in err


def test_what_cannot_be_done_is_told_before_any_work(tmp_path, capsys):
    good = write(tmp_path / "chains.jsonl", [PAIR | {"id": "1", "judgement": CHAT}])
    (tmp_path / "x.txt").write_text("")
    for arguments, fault in [((good, tmp_path / "none.jsonl"), "none.jsonl: no such file"), ((good, good), "named twice"),
                             ((good, tmp_path), "is a folder: name the files"),
                             ((tmp_path / "x.txt",), "not a .json or .jsonl file"),
                             ((good, "--out", good), "is already there"),
                             ((good, "--tokenizer", tmp_path), "no tokenizer.json there")]:
        with pytest.raises(ValueError, match=fault):
            run(capsys, *arguments)
    assert capsys.readouterr().out == ""
    judged = write(tmp_path / "judgements.jsonl", [judgement("1", [CHAT])])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR | {"id": "1"}) + "\n{\n")
    with pytest.raises(ValueError, match="pairs.jsonl:2: malformed JSON.*: repair or remove the record"):
        run(capsys, judged)


def test_script(tmp_path):
    file = write(tmp_path / "chains.jsonl", [PAIR | {"id": "1", "judgement": CHAT}, {"id": 2}])
    command = [sys.executable, "data/quality.py", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    assert done.returncode == 2 and done.stderr.startswith(f"error: {file}:2: ") and done.stderr.count("\n") == 1
