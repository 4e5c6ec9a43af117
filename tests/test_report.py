"""report/ and its page. Oracles: rubrics cut by hand; the page's data unpacked again in Python; in headless Chromium,
filters against counts made from the records, and a record full of markup that must be shown, letter by letter, and not
run. Browser tests need playwright and a Chromium on PATH."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.scores import QUANTITIES, section, wilson  # noqa: E402
from data.quality import place_of, quotations  # noqa: E402
from data.rubric import rubric_items  # noqa: E402
from report.__main__ import Config, main  # noqa: E402
from report.build import Chunks, build, page_json, write  # noqa: E402
from report.judgement import outcome, parts  # noqa: E402
from report.read import find  # noqa: E402

SHARED = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared"))
QWEN = SHARED / "benchmarks/reward_bench/RM-R1-Qwen2.5-Instruct-32B.logs.sample40.json"

# ---- records made for the tests

CHAIN = """<type>Chat</type>
<rubric>
1. Accuracy (60%): says what is true
2. **Tone** (40%) - is friendly
<justify>Because facts matter most.</justify>
</rubric>
<eval>
1. Accuracy:
<quote_A>"The  moon\nis made of rock"</quote_A> is right, but <quote_B>It is ... green cheese</quote_B> is not.
<quote_A>cheese from France</quote_A>
<quote_B>made of rock</quote_B>
<summary_B>B jokes.</summary_B>
</eval>
<answer>[[A]]</answer>"""
HOSTILE = ('<script>window.__pwned=1</script></script><img src=x onerror="window.__pwned=2"><!--<script>&lt;b&gt;&amp;'
           '<a href="javascript:window.__pwned=3">x</a><svg onload=window.__pwned=4>\u2028\u2029\x00\x07\U0001f600'
           '\ud83d\u202eabc\u05d0\u05d1<style>*{display:none}</style></textarea></title>'
           '<base href="http://example.invalid/">')


def pair(i, source="reward-bench", domain="Chat", subset="easy", winner="a", **more):
    return {"id": f"{source}/{i}", "prompt": [{"role": "user", "content": f"Question {i}: what is the moon made of?"}],
            "answer_a": "I think: the moon is made of rock. Fine?", "answer_b": "It is, they say, green cheese.",
            "winner": winner, "source": source, "domain": domain, "subset": subset, "item": str(i), **more}


def judgement(p, verdicts="a", text=CHAIN, tokens=100, **more):
    known = [v for v in verdicts if v in "ab"]
    verdict = None if known.count("a") == known.count("b") else max("ab", key=known.count)
    votes = [{"text": text if i == 0 else f"Vote {i}. <answer>[[{v.upper()}]]</answer>", "n_tokens": tokens + i,
              "finished": v != "-", "verdict": v if v in "ab" else None, "seconds": 1.5}
             for i, v in enumerate(verdicts)]
    return {"id": p["id"], "prompt_hash": "0" * 16, "n_prompt_tokens": 50, "votes": votes, "verdict": verdict,
            **{key: p[key] for key in ("winner", "source", "domain", "subset", "item")}, "seconds": 1.5, **more}


def swapped(p, verdicts, **more):
    other = {"a": "b", "b": "a", None: None}
    return judgement(p, verdicts, **more) | {"id": p["id"] + "/swapped", "swapped": True, "winner": other[p["winner"]]}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(folder, pairs, judgements, scores=None):
    write_lines(folder / "pairs.jsonl", pairs)
    write_lines(folder / "judgements.jsonl", judgements)
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores))
    return folder


def unpack(html):
    """(index, {"pair": [...], "judgement": [...], "sample": [...]}) of a page, as the browser reads it."""
    index = json.loads(re.search(r'<script type="application/json" id="index">(.*?)</script>', html, re.S)[1])
    items = {}
    for kind, starts in index["chunks"].items():
        items[kind] = []
        for k, start in enumerate(starts):
            assert start == len(items[kind])
            packed = re.search(f'<script type="application/octet-stream" id="{kind}{k}">(.*?)</script>', html, re.S)[1]
            items[kind] += json.loads(zlib.decompress(base64.b64decode(packed)))
    return index, items


# ---- a judgement's parts

@pytest.mark.parametrize("text, items", [
    ("1. Accuracy (40%): no errors\n2. Tone of voice (60%)",
     [("Accuracy", "40%", "no errors"), ("Tone of voice", "60%", "")]),
    ("**1. Name (40%)**: text: more\n**2. Other (60%):** x", [("Name", "40%", "text: more"), ("Other", "60%", "x")]),
    ("- **Tone** - warm [weight: 2]\n* Depth: deep, weight 0.5", [("Tone", "2", "warm"), ("Depth", "0.5", "deep")]),
    ("1. Depth (25%)\n   - how deep\n   - and (5%) wide\n\n2) Care (75%)",
     [("Depth", "25%", "- how deep\n- and (5%) wide"), ("Care", "75%", "")]),
    ("### 1. Clarity \u2014 40%\nIt reads well.\n### 2. Depth: 60%",
     [("Clarity", "40%", "It reads well."), ("Depth", "60%", "")]),
    ("<item>A (30%): b</item><item>C: d</item>", [("A", "30%", "b"), ("C", None, "d")]),
    ("1. Must be 100% right (40%): x", [("Must be 100% right", "40%", "x")]),
    ("1. Says that 5% is too much: x", [("Says that 5% is too much", None, "x")]),
    ("1. **Care:** with __init__ and 2**3 (5%)", [("Care", "5%", "with __init__ and 2**3")]),
    ("1. Brevity (10%) in few words", [("Brevity", "10%", "in few words")]),
    ("Accuracy (40%): a\nTone (60%): b", [("Accuracy", "40%", "a"), ("Tone", "60%", "b")]),
    ("These matter:\n1. A (30%): b\nmore of it", [("", None, "These matter:"), ("A", "30%", "b\nmore of it")]),
    (" Hey 4 river 2 Peace 1", [("Hey", "4", ""), ("river", "2", ""), ("Peace", "1", "")]),
    ("No list at all, only prose about quality.", []), ("", []), ("\n\n", []),
])
def test_rubric_items_by_hand(text, items):
    assert rubric_items(text) == items


def test_rubrics_lose_no_word():
    """Whatever the form, each word of a rubric is in some cell."""
    for text in (CHAIN.split("<rubric>")[1].split("<justify>")[0], "Intro\n1. A (3%): b - c\n - d\n2. E: f",
                 "<item>x (2): y</item> z"):
        words = set(re.findall(r"[A-Za-z]{2,}", re.sub(r"</?item>", "", text)))
        assert words <= set(re.findall(r"[A-Za-z]{2,}", " ".join(f"{a} {c}" for a, _, c in rubric_items(text))))


def test_parts_of_a_chain():
    found = parts("<think>hm, 1+1</think>\n" + CHAIN + "<|im_end|>")
    assert found["thinking"] == "hm, 1+1" and found["type"] == "Chat" and "fault" not in found
    assert found["rubric"] == [("Accuracy", "60%", "says what is true"), ("Tone", "40%", "is friendly")]
    assert found["justify"] == "Because facts matter most." and found["evaluation"].startswith("1. Accuracy:")
    assert "rest" not in found and "solution" not in found


def test_parts_keep_what_is_in_no_part():
    assert parts("B is better. <answer>[[B]]</answer>") == {"rest": "B is better."}
    assert parts("<type>Reasoning</type>x<solution>42</solution>\n<eval>A is") == {
        "type": "Reasoning", "solution": "42", "fault": "no evaluation", "rest": "x\n<eval>A is"}
    assert parts("no verdict") == {"rest": "no verdict"} and parts("") == {} == parts("<answer>[[A]]</answer>")
    assert parts("only thoughts</think><answer>[[A]]</answer>") == {"thinking": "only thoughts"}
    assert parts("<type>Chat</type><rubric>prose</rubric>") == {
        "type": "Chat", "rubric": "prose", "fault": "no evaluation"}


@pytest.mark.parametrize("text", ["<item>" * 40_000, "#" * 200_000, " " * 200_000 + "x", "1. " + "9" * 200_000,
                                  "1. a" + " " * 200_000 + ":", "**" * 100_000 + "\n- (" * 1000, "<eval>" * 40_000])
def test_parts_take_linear_time(text):
    """A judge may write anything. Quadratic work on these would take minutes."""
    began = time.process_time()
    parts("<type>Chat</type><rubric>" + text + "</rubric>")
    rubric_items(text)
    assert time.process_time() - began < 20


@pytest.mark.parametrize("verdicts, winner, more, expected", [
    ("a", "a", {}, "right"), ("b", "a", {}, "wrong"), ("-", "a", {}, "none"), ("ab", "a", {}, "tie"),
    ("ab-", "b", {}, "tie"), ("aab", "a", {}, "right"), ("a", None, {}, "unlabelled"), ("-", None, {}, "unlabelled"),
    ("", "a", {"recorded": 1}, "right"), ("", None, {"recorded": 0}, "wrong"), ("", "a", {}, "none"),
    ("b", "a", {"recorded": 1}, "wrong")])
def test_outcome_by_hand(verdicts, winner, more, expected):
    assert outcome(judgement(pair(1, winner=winner), verdicts, **more)) == expected


@pytest.mark.parametrize("source, domain, item, name", [
    ("reward-bench", "Chat Hard", "7", "Chat Hard"), ("rm-bench", "safety-refuse", "7", "safety"),
    ("rm-bench", "math", "7", "math"), ("rmb", "Helpfulness", "", "Pairwise Helpfulness"),
    ("rmb", "Harmlessness", "7", "BoN Harmlessness"), ("ours", "well-being", "7", "well-being")])
def test_sections_have_the_names_of_scores(source, domain, item, name):
    assert section(judgement(pair(1, source, domain, item=item))) == name


# ---- the file

def test_chunks_round_trip():
    """Items of all sizes come back, in order, from tags that hold base64 only; no chunk is far above its size."""
    chunks, items = Chunks("pair"), [{"x": HOSTILE * (i % 7) ** 3, "i": i} for i in range(700)]
    assert [chunks.add(item) for item in items] == list(range(700))
    chunks.close()
    chunks.close()
    assert len(chunks.tags) == len(chunks.starts) > 6 and chunks.starts[0] == 0
    back = []
    for k, tag in enumerate(chunks.tags):
        packed = re.fullmatch(rf'<script type="application/octet-stream" id="pair{k}">([A-Za-z0-9+/=]*)</script>\n',
                              tag)[1]
        assert chunks.starts[k] == len(back)
        back += json.loads(zlib.decompress(base64.b64decode(packed)))
    assert back == items


def test_verdicts_of_four_letters_and_ratings(tmp_path):
    """Questions with four answers, shown as the judge saw them; a rating has no label. Neither counts in the quality
    of texts, which is about A and B. The scores keep their names."""
    found, shown = [], []
    for i, (winner, verdict) in enumerate((("c", "c"), ("d", "a"), ("a", None))):
        p = pair(i, "reward-bench-2-four-way", "Math", "Math", winner, item="")
        shown.append(p | {"prompt": [], "answer_a": "", "answer_b": "", "winner": None,
                          "rendered": [{"role": "user", "content": f"four answers {i}"}]})
        vote = {"text": f"[[{verdict}]]", "n_tokens": 9, "finished": True, "verdict": verdict, "seconds": 1.0}
        found.append(judgement(p) | {"votes": [vote], "verdict": verdict})
    rated = pair(3, "reward-bench-2-ratings", "Ties", "Ties", None)
    found.append(judgement(rated, "-", "so 7"))
    games = [pair(i, f"judgebench-{name}", "Coding", "livecodebench") for i, name in enumerate(("gpt", "claude"))]
    found += [judgement(p) for p in games] + [swapped(games[0], "b")]
    evaluation(tmp_path, [*shown, rated, *games], found)
    main(Config(runs=(str(tmp_path),)))
    data, items = unpack((tmp_path / "report.html").read_text())
    columns, names = data["columns"], data["names"]
    assert [names["benchmark"][k] for k in columns["benchmark"]] == [
        *["RewardBench 2, four-way"] * 3, "RewardBench 2, ratings", "JudgeBench (gpt)", "JudgeBench (claude)",
        "JudgeBench (gpt)"]
    assert [names["section"][k] for k in columns["section"]] == ["Math"] * 3 + ["Ties"] + ["Coding"] * 3
    assert [("a", "b", None, "c", "d")[k] for k in columns["verdict"]] == ["c", "a", None, None, "a", "a", "b"]
    assert [("a", "b", None, "c", "d")[k] for k in columns["label"]] == ["c", "d", "a", None, "a", "a", "b"]
    assert columns["outcome"] == [0, 1, 2, 4, 0, 0, 0]
    assert items["pair"][0]["rendered"] == [["user", "four answers 0"]]
    assert dict(data["quality"]["groups"])["Texts"] == [["all", ["3"]]]


def test_page_json_survives_a_script_tag():
    text = page_json({HOSTILE: [HOSTILE]})
    assert "<" not in text and text.isascii() and text.isprintable() and json.loads(text) == {HOSTILE: [HOSTILE]}


def test_page_holds_all_and_names_its_scripts(tmp_path):
    """Two models of the same pairs: the pairs are kept once. The policy names the page's own script and style."""
    pairs = [pair(1), pair(2, "rm-bench", "math", "m", winner="b"), pair(3, "rmb", "Helpfulness", "x")]
    evaluation(tmp_path / "one", pairs, [judgement(p) for p in pairs] + [swapped(pairs[0], "b")],
               {"model": "/runs/x/model", "rows": []})
    evaluation(tmp_path / "two", pairs, [judgement(p, "bba") for p in pairs], {"model": "b"})
    main(Config(runs=(str(tmp_path),)))
    html = (tmp_path / "report.html").read_text()
    index, items = unpack(html)
    assert [m["name"] for m in index["models"]] == ["x/model", "b"]
    assert len(items["pair"]) == 3 and len(items["judgement"]) == 7
    assert index["columns"]["pair"] == [0, 1, 2, 0, 0, 1, 2]
    assert index["names"]["section"] == ["Chat", "math", "BoN Helpfulness"]
    assert index["columns"]["outcome"] == [0, 1, 0, 0, 1, 0, 1] and index["columns"]["swapped"] == [0, 0, 0, 1, 0, 0, 0]
    assert index["names"]["benchmark"] == ["RewardBench", "RM-Bench", "RMB"] and index["columns"]["tokens"][4] == 101
    assert items["judgement"][0]["votes"][0]["text"] == CHAIN and items["pair"][0]["a"] == pairs[0]["answer_a"]
    policy = re.search(r'http-equiv="Content-Security-Policy"\s+content="(.*?)"', html)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", html, re.S)[1]
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|DOMParser|srcdoc",
                         html)
    assert sorted(os.listdir(tmp_path)) == ["one", "report.html", "two"], "a temporary file was left behind"


def test_long_names_and_files_of_judgements(tmp_path):
    """Judgement files without a pairs.jsonl beside them find their texts in other files of pairs; but not where a label
    differs. Equal model names are told apart."""
    pairs = [pair(1), pair(2)]
    write_lines(tmp_path / "data" / "heldout.jsonl", [pairs[0], pairs[1] | {"winner": "b"}])
    for name in ("greedy", "sampled"):
        write_lines(tmp_path / "judged" / f"{name}.jsonl", [judgement(p) for p in pairs])
    index, items = unpack(built(tmp_path, tmp_path / "r.html"))
    assert [m["name"] for m in index["models"]] == ["greedy", "sampled"] and index["columns"]["pair"] == [0, 1, 0, 1]
    assert items["pair"][0]["a"] == pairs[0]["answer_a"] and items["pair"][1] is None
    assert index["previews"] == ["Question 1: what is the moon made of?", ""]
    for name in ("e1", "e2"):
        evaluation(tmp_path / name, pairs, [judgement(p) for p in pairs], {"model": "Qwen/Q"})
    names = [m["name"] for m in unpack(built(tmp_path, tmp_path / "r.html"))[0]["models"]]
    assert names == ["Qwen/Q", "Qwen/Q (e2)", "greedy", "sampled"]


def built(path, out):
    write(build(find([str(path)])), out)
    return Path(out).read_text()


def test_outcome_tables_and_scores_without_judgements(tmp_path):
    rows = [judgement(pair(i), "", recorded=i % 2) for i in range(4)]
    write_lines(tmp_path / "a" / "judgements.jsonl", rows)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "scores.json").write_text('{"model": "m", "rows": [{"benchmark": "x", "score": NaN}]}')
    index, items = unpack(built(tmp_path, tmp_path / "r.html"))
    assert index["columns"]["outcome"] == [1, 0, 1, 0] and index["columns"]["tokens"] == [None] * 4
    assert items["pair"] == [None] * 4
    assert index["models"][1]["rows"] == [{"benchmark": "x", "score": "NaN"}]


def test_shares_are_counted_where_there_is_no_scores_json(tmp_path):
    """Counted by hand: right, wrong, a tie and no verdict in one section, right in another; no label does not count,
    and no pair counts twice that was judged in both orders."""
    pairs = [pair(i, domain="Safety" if i == 4 else "Chat", winner=None if i == 5 else "a") for i in range(6)]
    verdicts = ["a", "b", "ab", "-", "a", "a"]
    first = [judgement(p, v) for p, v in zip(pairs, verdicts)]
    write_lines(tmp_path / "one" / "judgements.jsonl", first + [swapped(pairs[0], "b"), swapped(pairs[1], "b")])
    write_lines(tmp_path / "two" / "judgements.jsonl", [judgement(pair(1)), judgement(pair(1, "rmb"), "b")])
    one, two = unpack(built(tmp_path, tmp_path / "r.html"))[0]["models"]
    low, high = wilson(2, 5)
    assert one["counted"] and one["rows"] == [
        {"benchmark": "RewardBench", "kind": "overall", "name": "overall", "n": 5, "right": 2, "score": .4, "low": low,
         "high": high, "no_verdict": .2, "ties": .2},
        {"benchmark": "RewardBench", "kind": "section", "name": "Chat", "n": 4, "right": 1, "score": .25,
         "low": wilson(1, 4)[0], "high": wilson(1, 4)[1], "no_verdict": .25, "ties": .25},
        {"benchmark": "RewardBench", "kind": "section", "name": "Safety", "n": 1, "right": 1, "score": 1.0,
         "low": wilson(1, 1)[0], "high": 1.0, "no_verdict": 0.0, "ties": 0.0}]
    assert [(r["benchmark"], r["name"], r["score"]) for r in two["rows"]] == [
        ("all pairs", "overall", .5), ("RewardBench", "overall", 1), ("RewardBench", "Chat", 1), ("RMB", "overall", 0),
        ("RMB", "BoN Chat", 0)]


def test_training_rows_with_nan_and_gaps(tmp_path):
    run = tmp_path / "grpo"
    run.mkdir()
    (run / "metrics.jsonl").write_text("""{"step": 1, "reward": NaN, "note": "x", "flag": true}
{"step": 2, "reward": 0.5, "kl": Infinity}
{"step": 3, "reward": null, "late": -Infinity}
""")
    (run / "config.json").write_text('{"options": {"lr": 1e-6}, "command": ["grpo.py"]}')
    write_lines(run / "samples.jsonl", [
        {"step": 1, "id": "x", "prompt": "<|im_start|>q", "judgement": CHAIN, "winner": "a", "verdict": "b",
         "reward": -1.0, "advantage": float("nan")},
        {"step": 2, **judgement(pair(1))}])
    index, items = unpack(built(run, tmp_path / "r.html"))
    assert index["runs"][0]["columns"] == {"step": [1, 2, 3], "reward": ["NaN", 0.5, "null"],
                                           "kl": [None, "Infinity", None], "late": [None, None, "-Infinity"]}
    assert index["runs"][0]["samples"] == {"first": 0, "steps": [1, 2]} and index["runs"][0]["name"] == "grpo"
    assert [x["outcome"] for x in items["sample"]] == [1, 0] and items["sample"][0]["advantage"] == "NaN"


@pytest.mark.parametrize("file, text, said", [
    ("judgements.jsonl", '{"id": "x"}\n', 'judgements.jsonl:1: no "source" (found "id"): add it'),
    ("judgements.jsonl", json.dumps(judgement(pair(1))) + "\n{nope\n", "judgements.jsonl:2: not JSON"),
    ("judgements.jsonl", "\n[1]\n", "judgements.jsonl:2: not a JSON object"),
    ("judgements.jsonl", "[" * 100_000 + "\n", "judgements.jsonl:1: not JSON"),
    ("judgements.jsonl", (json.dumps(judgement(pair(1))) + "\n") * 2,
     "judgements.jsonl:2: id 'reward-bench/1' is also at"),
    ("judgements.jsonl", json.dumps(judgement(pair(1)) | {"verdict": "A"}),
     'judgements.jsonl:1: "verdict" is "A": write "a", "b" or null'),
    ("judgements.jsonl", json.dumps(judgement(pair(1)) | {"votes": [7]}),
     'judgements.jsonl:1: "votes" holds an integer: it may only hold an object'),
    ("judgements.jsonl", b'{"id": "\xff"}\n', "judgements.jsonl:1: not JSON"),
    ("pairs.jsonl", json.dumps(pair(1) | {"answer_a": 5}),
     'pairs.jsonl:1: "answer_a" is an integer: it must be a string or a list'),
    ("pairs.jsonl", json.dumps(pair(1) | {"prompt": ["x"]}),
     'pairs.jsonl:1: "prompt" holds a string: it may only hold an object'),
    ("metrics.jsonl", '{"step": 1}\n{"reward": 2}\n', 'metrics.jsonl:2: no "step" (found "reward"): add it'),
    ("metrics.jsonl", '{"step": 1}\n{"st\n', "metrics.jsonl:2: not JSON"),
    ("metrics.jsonl", '{"step": NaN}\n', "metrics.jsonl:1: 'step' is nan, need a number below 2**53"),
    ("metrics.jsonl", '{"step": 1}\n{"step": 100000000000000000}', "metrics.jsonl:2: 'step' is 100000000000000000"),
    ("judgements.jsonl", json.dumps(judgement(pair(1)) | {"item": {}}),
     'judgements.jsonl:1: "item" is an object: it must be a string'),
    ("judgements.jsonl", json.dumps(judgement(pair(1))).replace('"n_tokens"', '"at": {"512": {}}, "n_tokens"'),
     'judgements.jsonl:1: "512" is an object: it must be a string or null'),
    ("scores.json", '{"settings": ' + "[" * 990 + "]" * 990 + "}", "scores.json: not JSON (JSON nested too deeply"),
    ("scores.json", "{", "scores.json: not JSON"),
    ("notes.txt", "hello", "nothing to report there"),
])
def test_faults_end_with_one_line(tmp_path, file, text, said):
    if file in ("pairs.jsonl", "scores.json"):
        write_lines(tmp_path / "judgements.jsonl", [judgement(pair(1))])
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        main(Config(runs=(str(tmp_path),)))
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("report*"))
    assert "delete" not in str(caught.value), "nobody has checked that it is ours"


def test_numbers_no_browser_has(tmp_path):
    """Counts of an absurd size or none are unknown; a metric of such a size is infinite, as a browser would have it."""
    row = judgement(pair(1), "aaa") | {"n_prompt_tokens": float("nan")}
    for vote, n in zip(row["votes"], (10**400, float("inf"), True)):
        vote |= {"n_tokens": n, "seconds": n, "finished": n if n is True else float("nan")}
    write_lines(tmp_path / "judgements.jsonl", [row])
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "huge": 10**400}])
    index, items = unpack(built(tmp_path, tmp_path / "r.html"))
    votes = items["judgement"][0]["votes"]
    assert [v["n_tokens"] for v in votes] == [v["seconds"] for v in votes] == [None] * 3
    assert [v["finished"] for v in votes] == [None, None, True] and items["judgement"][0]["n_prompt_tokens"] is None
    assert index["columns"]["tokens"] == [None] and index["runs"][0]["columns"]["huge"] == ["Infinity"]


def test_pairs_that_nobody_has_judged_stay_out(tmp_path):
    pairs = [pair(i) for i in range(50)]
    scores = {"model": "m", "name": "not this", "folder": "nor this", "rows": []}
    evaluation(tmp_path, pairs, [swapped(pairs[31], "a"), judgement(pairs[7])], scores)
    index, items = unpack(built(tmp_path, tmp_path / "r.html"))
    assert [p["prompt"][0][1] for p in items["pair"]] == [pairs[i]["prompt"][0]["content"] for i in (31, 7)]
    assert index["columns"]["pair"] == [0, 1] and len(index["previews"]) == 2
    assert index["models"][0]["name"] == "m" and index["models"][0]["folder"] == str(tmp_path)


def test_a_pairs_rubric_stands_below_its_question(tmp_path):
    pairs = [pair(1, rubric="be brief"), pair(2)]
    evaluation(tmp_path, pairs, [judgement(p) for p in pairs])
    _, items = unpack(built(tmp_path, tmp_path / "r.html"))
    asked = [("user", p["prompt"][0]["content"]) for p in pairs]
    assert [[tuple(m) for m in p["prompt"]] for p in items["pair"]] == [[asked[0], ("rubric", "be brief")], [asked[1]]]


def test_files_are_known_as_chains_by_their_first_record(tmp_path):
    """The forms of data/pairs.py; RM-R1's pairs, ours, and a file that ends with its first bracket are none."""
    shown, said = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    forms = {"ours": pair(1) | {"judgement": "j"}, "sft": {"context_messages": [shown], "winner": "j"},
             "trl": {"messages": [shown, said]}, "log": {"text_chosen": [shown, said], "answers": "j"}}
    others = {"rl": {"context_messages": [shown], "winner": "model_b"}, "pairs": pair(1), "samples": forms["ours"]}
    for name, record in (forms | others).items():
        write_lines(tmp_path / f"{name}.jsonl", [record])
    (tmp_path / "broken.jsonl").write_text("[")
    (tmp_path / "list.json").write_text(json.dumps([forms["sft"]]))
    found = find([str(tmp_path)])
    assert sorted(file.stem for file in found["chains"]) == sorted(forms)
    assert [file.name for file in find([str(tmp_path / "list.json")])["chains"]] == ["list.json"]


def test_chains_give_their_texts_to_judgements_without(tmp_path):
    write_lines(tmp_path / "chains.jsonl", [pair(1) | {"judgement": CHAIN}])
    write_lines(tmp_path / "j.jsonl", [judgement(pair(1))])
    built(tmp_path, tmp_path / "r.html")
    _, items = unpack((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert items["pair"][0]["a"] == pair(1)["answer_a"]


def test_runs_that_are_still_being_written(tmp_path):
    """Judgements so far, from the file that sample.py renames at the end, and training rows; half lines are not yet."""
    pairs = [pair(i) for i in range(3)]
    lines = [json.dumps(x) for x in ({"model": "the settings"}, judgement(pairs[0]), judgement(pairs[1], "b"))]
    write_lines(tmp_path / "e/pairs.jsonl", pairs)
    (tmp_path / "e/judgements.jsonl.partial").write_text("\n".join([*lines, lines[1][:70]]))
    write_lines(tmp_path / "more.jsonl", [pair(9)])  # with other pairs in sight too, the settings are no judgement
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    index, items = unpack(built(tmp_path, tmp_path / "r.html"))
    assert index["columns"]["id"] == ["reward-bench/0", "reward-bench/1"] and index["columns"]["outcome"] == [0, 1]
    assert [m["name"] for m in index["models"]] == ["e"] and len(items["pair"]) == 2
    assert index["runs"][0]["columns"] == {"step": [1], "reward": [0.5]}


def test_command_line(tmp_path):
    def run(*args):
        command = [sys.executable, "-m", "report", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    folder = evaluation(tmp_path / "e", [pair(1)], [judgement(pair(1))])
    out = tmp_path / "page.html"
    write(build({"evaluation": [], "run": [], "chains": [], "pairs": []}), out)  # the page before
    assert "reward-bench/1" not in out.read_text()
    done = run(folder, folder / "judgements.jsonl", "--out", out)
    assert done.returncode == 0 and done.stdout.startswith(f"{out}: 1 judgement of 1 model, 0 training runs, ")
    assert "reward-bench/1" in out.read_text()
    missing = run(tmp_path / "nowhere")
    assert missing.returncode == 2
    assert missing.stderr == f"error: {tmp_path}/nowhere: no such file or folder: check the path\n"


def test_no_file_but_a_page_of_ours_is_replaced(tmp_path):
    """A typing mistake in --out must not cost anybody their data; nor a report.html that is someone else's."""
    folder = evaluation(tmp_path / "e", [pair(1)], [judgement(pair(1))])
    before = (folder / "pairs.jsonl").read_text()
    (tmp_path / "taken").mkdir()
    (folder / "report.html").write_text("<!doctype html><p>my own report")
    not_ours, no_file = "is not a page of this program", "is a folder; --out is the file to write"
    for out, said in ((folder / "pairs.jsonl", not_ours), (None, not_ours), (tmp_path / "taken", no_file),
                      (tmp_path / "no/page.html", "no such folder; make it")):
        with pytest.raises(ValueError, match=said) as caught:
            main(Config(runs=(str(folder),), out=out and str(out)))
        assert "delete" not in str(caught.value)
    assert (folder / "pairs.jsonl").read_text() == before and "my own" in (folder / "report.html").read_text()
    assert sorted(os.listdir(tmp_path)) == ["e", "taken"], "a temporary file was left behind"


# ---- in the browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"laptop": (1366, 768), "tall": (1366, 6000), "phone": (390, 800)}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api",
                              reason="the page is tested with playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def contexts(browser):
    return {scheme: browser.new_context(color_scheme=scheme) for scheme in ("light", "dark")}


@pytest.fixture
def visit(browser, contexts):
    """visit(file, hash, size, scheme) opens a page. At the end: no request but the file, no error, nothing run."""
    opened = []

    def visit(file, hash="", size="laptop", scheme="light"):
        page = contexts[scheme].new_page()
        page.set_viewport_size(dict(zip(("width", "height"), SIZES[size])))
        page.set_default_timeout(10_000)
        requests, said = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append("dialog"))
        page.goto(f"file://{file}{hash}")
        opened.append((page, file, requests, said))
        return page
    yield visit
    for page, file, requests, said in opened:
        assert not said and {url.split("#")[0] for url in requests} == {f"file://{file}"}
        assert page.evaluate("typeof window.__pwned") == "undefined"
        page.close()


def variety():
    """[(pair, [judgement of model one, of model two], swapped judgement or None)]: every outcome, type, length."""
    out = []
    for i in range(30):
        source, winner = ("reward-bench", "rm-bench", "rmb")[i % 3], None if i == 11 else "ab"[i % 2]
        p = pair(i, source, ("Chat", "Safety")[i // 3 % 2], f"subset {i % 5}", winner, item=str(i) if i % 4 else "")
        if i == 7:
            p["prompt"][0]["content"] += " An AARDVARK asks."
        if i == 8:
            p["answer_b"] += " Zebrafish!"
        right, wrong = ("ab", "ba")[i % 2]
        text = [CHAIN, CHAIN.replace("Chat", "Reasoning").replace("rubric", "solution"),
                "Prose. <answer>[[A]]</answer>"][i % 3]
        one = judgement(p, ["-", right + wrong, right, wrong, right][i % 5], text + ("" if i != 9 else " quokka"),
                        10 * i)
        two = judgement(p, right, text, 1000 + i)
        out.append((p, [one, two], swapped(p, wrong, tokens=5000) if i % 4 == 0 else None))
    return out


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(file, rows): a page of two models, and what its list should hold, in order: [(model, id, record)]."""
    folder, records, rows = tmp_path_factory.mktemp("report"), variety(), []
    scores = {"model": None, "settings": {"votes": 1}, "rows": [
        {"benchmark": b, "kind": kind, "name": name, "n": 10, "of": 2985, "score": .75, "low": .5, "high": .9,
         "right": 7, "no_verdict": .1, "ties": 0.0, "tokens": 99.0, "seconds": None, "novelty": 5}
        for b, kinds in (("RewardBench", (("overall", "overall"), ("section", "Chat"), ("subset", "subset 1"))),
                         ("RMB", (("overall", "overall"), ("section", "BoN Chat"), ("subset", "subset 1"))))
        for kind, name in kinds],
        "budgets": [{"budget": n, "benchmark": "RMB", "kind": kind, "name": name, "n": 9, "of": 99,
                     "score": n / 4096 * share, "low": 0, "high": 1, "no_verdict": .5}
                    for n in (512, 2048) for kind, name, share in (("overall", "mean of sections", 1),
                                                                   ("section", "BoN Chat", .5), ("domain", "x", .25))],
        "swap": [{"benchmark": "RMB", "n": 9, "first": .5, "second": .25, "consistent": .625}],
        "positions": [{"benchmark": "RMB", "chosen_a": .375, "chosen_b": .5, "a_share": .5}],
        "judgements": 1234, "tokens": None, "left_out": 0, "session": {"commit": "abcdef"}}
    for m, model in enumerate(("one", "two")):
        judged = [x[1][m] for x in records] + ([x[2] for x in records if x[2]] if m == 0 else [])
        evaluation(folder / model, [x[0] for x in records], judged, scores | {"model": model})
        rows += [(model, r["id"], r) for r in judged]
    write(build(find([str(folder)])), folder / "report.html")
    return folder / "report.html", rows


def listed(page):
    """[(model, id)] of the list, from its links; the window must be tall enough for all."""
    return page.evaluate("""() => [...document.querySelectorAll("a.row")].map(a => {
        const p = new URLSearchParams(a.getAttribute("href").slice(1)); return [p.get("of"), p.get("j")]; })""")


def wait_listed(page, expected):
    expected = [list(x[:2]) for x in expected]
    deadline = time.monotonic() + 10
    while (found := listed(page)) != expected and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert found == expected


def shown(page):
    """The id of the judgement in the reader."""
    return page.locator("#permalink").text_content()


def wait_shown(page, id):
    page.wait_for_function("id => document.querySelector('#permalink')?.textContent === id", arg=id)


CELLS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
QUOTES = "quotes => quotes.map(x => [x.dataset.found || '', x.querySelector('.who').textContent])"


def has_text(record, pairs, needle):
    p = pairs[record["id"].removesuffix("/swapped")]
    texts = [record["id"], *(m["content"] for m in p["prompt"]), p["answer_a"], p["answer_b"],
             *(v["text"] for v in record["votes"])]
    return any(needle.lower() in text.lower() for text in texts)


FILTERS = [
    ("#by-model", "two", lambda m, r: m == "two"),
    ("#by-benchmark", "RM-Bench", lambda m, r: r["source"] == "rm-bench"),
    ("#by-section", "Safety", lambda m, r: r["domain"] == "Safety" and r["source"] != "rmb"),
    ("#by-section", "BoN Safety", lambda m, r: r["domain"] == "Safety" and r["source"] == "rmb" and r["item"]),
    ("#by-subset", "subset 3", lambda m, r: r["subset"] == "subset 3"),
    ("#by-type", "Chat", lambda m, r: "<type>Chat" in r["votes"][0]["text"]),
    ("#by-type", "Reasoning", lambda m, r: "<type>Reasoning" in r["votes"][0]["text"]),
    ("#by-type", "unknown", lambda m, r: "<type>" not in r["votes"][0]["text"]),
    ("#by-order", "swapped", lambda m, r: "swapped" in r),
    ("#by-order", "as first shown", lambda m, r: "swapped" not in r)]


@pytest.mark.parametrize("box, name, keeps", FILTERS, ids=[f"{box} {name}" for box, name, _ in FILTERS])
def test_each_filter_keeps_what_it_says(visit, report, box, name, keeps):
    file, rows = report
    page = visit(file, "#view=read", "tall")
    wait_listed(page, rows)
    label = next(x for x in page.locator(f"{box} option").all_text_contents() if x.startswith(name))
    kept = [row for row in rows if keeps(row[0], row[2])]
    assert 0 < len(kept) < len(rows) and int(label.split()[-1]) == len(kept)
    options = page.locator(f"{box} option").all_text_contents()
    page.select_option(box, label=label)
    wait_listed(page, kept)
    assert page.locator("#count b").text_content() == str(len(kept))
    assert page.locator(f"{box} option").all_text_contents() == options, "the other choices keep their counts"


def test_what_has_no_subset_can_be_filtered_too(visit, tmp_path):
    pairs = [pair(i, subset=("", "easy", "\ud83d")[i % 3]) for i in range(9)]
    rows = [("m", p["id"]) for p in pairs]
    evaluation(tmp_path, pairs, [judgement(p) for p in pairs], {"model": "m"})
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    page = visit(tmp_path / "r.html", "#view=read", "tall")
    for start, name in ((0, "(none)"), (1, "easy"), (2, "\ufffd")):
        page.select_option("#by-subset", label=f"{name}  3")
        kept = [[None, id] for _, id in rows[start::3]]
        wait_listed(page, kept)
        wait_listed(visit(tmp_path / "r.html", page.evaluate("location.hash"), "tall"), kept)


@pytest.mark.parametrize("kinds", [["right"], ["wrong"], ["none"], ["tie"], ["unlabelled"], ["wrong", "tie"]],
                         ids="+".join)
def test_outcomes(visit, report, kinds):
    file, rows = report
    page = visit(file, "#view=read", "tall")
    for kind in kinds:
        page.click(f"[data-is={kind}]")
    kept = [row for row in rows if outcome(row[2]) in kinds]
    assert kept
    wait_listed(page, kept)
    page.click("#clear")
    wait_listed(page, rows)


def test_length_and_order(visit, report):
    file, rows = report
    page = visit(file, "#view=read", "tall")
    mean = {row[:2]: round(sum(v["n_tokens"] for v in row[2]["votes"]) / len(row[2]["votes"])) for row in rows}
    page.fill("#min", "60")
    page.fill("#max", "1003")
    kept = [row for row in rows if 60 <= mean[row[:2]] <= 1003]
    wait_listed(page, kept)
    page.select_option("#sort", "long")
    wait_listed(page, sorted(kept, key=lambda row: -mean[row[:2]]))
    page.select_option("#sort", "short")
    wait_listed(page, sorted(kept, key=lambda row: mean[row[:2]]))
    page.select_option("#sort", "file")
    page.fill("#min", "-5")
    page.fill("#max", "1e2")
    wait_listed(page, [row for row in rows if mean[row[:2]] <= 100])
    page.wait_for_function("() => location.hash.includes('max=100')")
    page.evaluate("() => { location.hash = '#view=read&max=60'; }")      # the field has the focus still
    wait_listed(page, [row for row in rows if mean[row[:2]] <= 60])
    assert page.input_value("#max") == "60" and page.input_value("#min") == ""


@pytest.mark.parametrize("needle", ["aardvark", "ZEBRAFISH", "Quokka", "rmb/17", "moon", "no such text", "the", ".*",
                                    "Vote 1."])
def test_search_finds_every_text(visit, report, needle):
    """Question, answers, every vote, id; capitals do not matter; the pattern is a text, not an expression."""
    file, rows = report
    pairs = {p["id"]: p for p, _, _ in variety()}
    page = visit(file, "#view=read", "tall")
    page.keyboard.press("/")
    page.keyboard.type(needle)
    wait_listed(page, [row for row in rows if has_text(row[2], pairs, needle)])
    page.wait_for_selector("#progress:has-text('all texts searched')")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    wait_listed(page, rows)


def test_filters_and_search_combine_and_are_in_the_address(visit, report):
    """Model, outcome, length and search together; the address alone brings the same list; a filter set during a search
    is kept to."""
    file, rows = report
    pairs = {p["id"]: p for p, _, _ in variety()}
    page = visit(file, "#view=read", "tall")
    page.fill("#q", "PROSE")
    page.select_option("#by-model", value="0")
    page.click("[data-is=right]")
    page.click("[data-is=none]")
    page.fill("#max", "250")
    kept = [row for row in rows if row[0] == "one" and outcome(row[2]) in ("right", "none")
            and sum(v["n_tokens"] for v in row[2]["votes"]) <= 250 and has_text(row[2], pairs, "prose")]
    assert len(kept) > 2
    wait_listed(page, kept)
    page.wait_for_function("() => location.hash.includes('max=250')")
    again = visit(file, page.evaluate("location.hash"), "tall")
    wait_listed(again, kept)
    assert again.input_value("#q") == "PROSE"
    assert again.locator("[data-is=none]").get_attribute("aria-pressed") == "true"


def test_keys(visit, report):
    file, rows = report
    page = visit(file, "#view=read&model=one")
    wait_shown(page, rows[0][1])
    for key, at in (("j", 1), ("j", 2), ("k", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("k", 0), ("k", 0)):
        page.keyboard.press(key)
        wait_shown(page, rows[at][1])
    page.keyboard.press("r")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("jk?rt")                     # letters typed into the search are no commands
    assert page.input_value("#q") == "jk?rt" and not page.locator("#help").is_visible()
    page.wait_for_selector("#reader:has-text('No judgement passes')")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    wait_shown(page, rows[0][1])
    page.keyboard.press("t")
    assert page.locator(".raw .text").text_content() == rows[0][2]["votes"][0]["text"]
    page.keyboard.press("t")
    page.wait_for_selector(".evaluation")
    page.keyboard.press("1")
    assert page.locator("#scores").is_visible() and not page.locator("#read").is_visible()


def test_the_intervals_of_the_page_are_those_of_the_scores(visit, report):
    """Wilson's formula stands twice, for filters need it in the browser; here the two are held together."""
    grid = [(right, n) for n in (0, 1, 2, 7, 30, 800, 2985) for right in sorted({0, n // 3, n // 2, n - 1, n} - {-1})]
    found = visit(report[0]).evaluate("grid => grid.map(([right, n]) => wilson(right, n))", grid)
    assert found == [pytest.approx(wilson(right, n), abs=1e-15) for right, n in grid]


def test_link_to_one_judgement_reload_and_back(visit, report):
    file, rows = report
    wanted = next(row for row in rows if row[:2] == ("two", "rmb/17"))
    page = visit(file, "#j=rmb%2F17&of=two")
    wait_shown(page, "rmb/17")
    assert "two" in page.locator(".facts").first.text_content() and wanted[2]["votes"][0]["text"]
    page.reload()
    wait_shown(page, "rmb/17")
    row = page.locator("a.row[aria-current=true]").bounding_box()
    assert row["y"] > 0 and row["y"] + row["height"] <= 768, "the list is scrolled to it"
    href = page.get_attribute("#permalink", "href")
    page.click("#next")
    wait_shown(page, "reward-bench/18")
    page.wait_for_function("() => location.hash.includes('reward-bench')")
    page.go_back()
    wait_shown(page, "rmb/17")
    page.go_forward()
    wait_shown(page, "reward-bench/18")
    wait_shown(visit(file, href), "rmb/17")
    wait_shown(visit(file, "#j=rmb/17"), "rmb/17")
    # a link wins over the filters beside it
    outside = visit(file, "#view=read&benchmark=RewardBench&j=rmb/17&of=two")
    wait_shown(outside, "rmb/17")
    assert outside.locator(".place").text_content() == "not in this list"


def test_keys_replace_the_address_and_clicks_add_to_the_history(visit, report):
    page = visit(report[0], "#view=read&model=one")
    wait_shown(page, report[1][0][1])
    before = page.evaluate("history.length")
    for n in range(1, 4):
        page.keyboard.press("j")
        wait_shown(page, report[1][n][1])
        page.wait_for_timeout(150)
    assert page.evaluate("history.length") == before and "j=reward-bench%2F3" in page.evaluate("location.hash")
    page.locator("a.row").nth(5).click()
    page.wait_for_function("n => history.length === n", arg=before + 1)


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_a_link_to_what_is_not_there_says_so(visit, report, size):
    for hash in ("#j=no/such", "#j=rmb/17&of=three", "#j=reward-bench/0/swapped&of=two"):
        page = visit(report[0], hash, size)
        id = hash[3:].split("&")[0]
        assert page.locator("#reader").text_content().endswith(f"No judgement {id} in this report.")
        page.keyboard.press("t")
        page.keyboard.press("v")
    if size == "phone":
        page.click("#back")
        page.keyboard.press("t")
        page.keyboard.press("v")
    page.locator("a.row").nth(1).click()
    wait_shown(page, report[1][1][1])


def test_views_that_a_page_does_not_have(visit, report, training):
    assert visit(report[0], "#view=training").locator("#scores h2").count()
    for hash in ("#view=read&j=x", "#view=scores"):
        assert visit(training, hash).locator("#training h2").count()


def test_one_judgement_in_full(visit, report):
    """Sides and badges, the rubric as a table, quotations found, found in pieces, misattributed and invented."""
    file, rows = report
    page = visit(file, "#j=reward-bench/3&of=two")         # its label and its verdict are B
    wait_shown(page, "reward-bench/3")
    assert page.locator(".question .text").text_content() == "Question 3: what is the moon made of?"
    marked = [page.locator(f".side-{x}") for x in "ab"]
    assert [x.locator(".labelled").count() for x in marked] == [0, 1] == [x.locator(".chosen").count() for x in marked]
    assert [x.locator(".text").evaluate("el => el.textContent") for x in marked] == [
        "I think: the moon is made of rock. Fine?", "It is, they say, green cheese."]
    found = page.locator(".evaluation .quote").evaluate_all(QUOTES)
    assert found == [["all", "A 1"], ["all", "B 2"], ["none", "not found in answer A"],
                     ["none", "not found in answer B, but in A"], ["", "B, in short"]]
    marks = page.locator(".sides mark").evaluate_all("m => m.map(x => [x.className, x.dataset.q, x.textContent])")
    assert marks == [["a", "1", "the moon is made of rock"], ["b", "2", "It is"], ["b", "2", "green cheese"]]
    page.locator(".quote[data-n='2']").click()
    assert page.locator("mark.flash").text_content() == "It is"
    page.locator("mark[data-q='1']").click()
    assert page.locator(".quote.flash").get_attribute("data-n") == "1"


def test_rubric_table_solution_and_prose(visit, report):
    file, rows = report
    page = visit(file, "#j=reward-bench/0&of=two")
    page.wait_for_selector("table.rubric")
    cells = page.locator("table.rubric tbody tr").evaluate_all(CELLS)
    assert cells == [["Accuracy", "60%", "says what is true"], ["Tone", "40%", "is friendly"]]
    assert page.locator(".justify").text_content() == "Because facts matter most."
    page = visit(file, "#j=rm-bench/1&of=two")
    page.wait_for_selector(".solution")
    assert "Accuracy (60%)" in page.locator(".solution").text_content() and page.locator("table.rubric").count() == 0
    page = visit(file, "#j=rmb/2&of=two")
    wait_shown(page, "rmb/2")
    assert page.locator(".judged .rest .text").text_content() == "Prose."


def test_swapped_record_shows_the_answers_exchanged(visit, report):
    file, rows = report
    page = visit(file, "#j=reward-bench/0/swapped&of=one")
    wait_shown(page, "reward-bench/0/swapped")
    assert page.locator(".side-a .text").text_content() == "It is, they say, green cheese."
    assert page.locator(".side-b .labelled").count() == 1 and "swapped" in page.locator(".facts").first.text_content()
    page.click(".twins a:has-text('as first shown')")
    wait_shown(page, "reward-bench/0")
    assert page.locator(".side-a .text").text_content().startswith("I think: the moon")


def test_votes(visit, report):
    file, rows = report
    page = visit(file, "#j=rmb/26&of=one")
    wait_shown(page, "rmb/26")
    assert page.locator(".badge").text_content() == "= tie" and page.locator(".votes button").count() == 2
    assert [x.split(": ")[1] for x in page.locator(".votes button").all_text_contents()] == ["A \u2713", "B \u2717"]
    page.locator(".votes button").nth(1).click()
    page.wait_for_selector(".rest:has-text('Vote 1.')")
    assert page.evaluate("location.hash").endswith("vote=2")
    page.reload()
    page.wait_for_selector(".rest:has-text('Vote 1.')")
    page.keyboard.press("t")
    page.wait_for_selector(".raw:has-text('<answer>')")
    again = visit(file, page.evaluate("location.hash"))
    again.wait_for_selector(".raw:has-text('Vote 1. <answer>')")
    page.keyboard.press("t")
    page.keyboard.press("v")
    page.wait_for_selector(".rest:has-text('Prose.')")
    page.keyboard.press("v")
    page.wait_for_selector(".rest:has-text('Vote 1.')")
    page.keyboard.press("k")
    page.wait_for_function("() => !location.hash.includes('vote')")


def test_scores_page(visit, report):
    """Both models beside each other, generic tables with a key nobody foresaw, a name that leads to its judgements."""
    file, rows = report
    page = visit(file)
    text = page.locator("#scores").text_content()
    for wanted in ("RewardBench", "10 of 2,985", "75.0", "50.0 to 90.0", "token budget", "62.5", "37.5", "abcdef",
                   "1234", "counted"):
        assert wanted in text, wanted
    budgets = page.locator(".plot", has=page.locator("h3:text-is('RMB')"))
    assert budgets.locator("path.curve").count() == 2 and budgets.locator("circle").count() == 4
    assert budgets.locator(".read").text_content() == "last:  one 50 ·  two 50"
    budgets.locator("svg[tabindex]").focus()
    page.keyboard.press("ArrowRight")
    assert budgets.locator(".read").text_content() == "512:  one 12.5 ·  two 12.5", "the headline's, not a section's"
    assert page.locator(".dots circle").count() == page.locator(".dots rect").count() == 4
    page.locator("select:has(option:text('novelty'))").first.select_option("novelty")
    assert page.locator("table:has(a)").first.locator("tbody td").all_text_contents() == ["Chat", "10", "5", "5"]
    page.locator("a:text-is('BoN Chat')").last.click()
    kept = [r["id"] for m, i, r in rows if r["source"] == "rmb" and r["domain"] == "Chat" and r["item"]]
    wait_shown(page, kept[0])
    assert page.locator("#count b").text_content() == str(len(kept))


def test_quality_of_texts_has_a_column_for_each_model_and_file_of_chains(visit, tmp_path):
    """Counted by hand; with chains alone the page has this table and nothing else."""
    swap = swapped(pair(2), "b")
    evaluation(tmp_path / "m", [pair(1), pair(2)], [judgement(pair(1), "ab"), judgement(pair(2), "a"), swap])
    chain = {key: x for key, x in pair(3).items() if key not in ("subset", "item")} | {"judgement": CHAIN + "</eval>"}
    write_lines(tmp_path / "m" / "chains.jsonl", [chain, {"id": 3}])
    write_lines(tmp_path / "m" / "labels.jsonl", [{"context_messages": [], "winner": "model_a"}])     # pairs: no chains
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html", "#view=scores")
    table = page.locator("table.quality")
    assert table.locator("thead th").all_text_contents() == ["", "m", "m/chains.jsonl"]
    lines = {line[0]: line[1:] for line in table.locator("tbody tr").evaluate_all(CELLS)}
    assert lines["all"] == ["4", "1"] and lines["records skipped as unreadable"] == ["0", "1"]
    assert lines["Chat"] == ["3 of 3  100.0 %", "0 of 1    0.0 %"] and lines["no type"] == ["0 of 1    0.0 %", "-"]
    # of the four quotations two are in their answers, but for a capital and for an ellipsis; with the answers exchanged
    # neither is, but "made of rock" is then in B, letter for letter
    assert lines["letter for letter"] == ["1 of 12    8.3 %", "0 of 4    0.0 %"]
    assert lines["but for capitals, markdown, quotation marks, ellipses"] == ["5 of 12   41.7 %", "2 of 4   50.0 %"]
    assert lines["whose per cents sum to 100"] == ["3 of 3  100.0 %", "1 of 1  100.0 %"]
    assert [lines[f"{share} % are no longer than"][1] for share in (5, 95)] == [f"{len(CHAIN) + 7}"] * 2
    groups = table.locator("th.group").all_text_contents()
    assert groups[:2] == ["Texts", "Well formed"] and "Tokens" not in groups
    alone = tmp_path / "m" / "chains.jsonl"
    write_lines(alone, [chain])
    built(alone, tmp_path / "alone.html")
    page = visit(tmp_path / "alone.html")
    assert page.locator("#scores h2").all_text_contents() == ["Quality of the texts"]
    assert page.locator("nav button:visible").all_text_contents() == ["Scores"]
    assert page.locator("#title").text_content() == "m/chains.jsonl" and "undefined" not in page.content()


@pytest.mark.parametrize("size", ["laptop", "phone"])
def test_both_ends_of_an_interval_are_shown(visit, tmp_path, size):
    """91.2 to 100 is not 100 plus or minus 4.4; a score without an interval gets none; a phone shows the ends too."""
    row = {"benchmark": "pairs", "kind": "domain", "name": "chat", "n": 40, "score": 1.0, "low": .912, "high": 1.0}
    rows = [row, row | {"name": "", "score": .5, "low": None, "high": None}]
    evaluation(tmp_path, [pair(1)], [judgement(pair(1))], {"model": "m", "rows": rows})
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html", size=size)
    numbers = page.locator(".dots div.num")
    assert numbers.all_text_contents() == ["100.0 [91.2, 100.0]", "50.0"]
    assert numbers.first.inner_text() == "100.0 [91.2, 100.0]", "all of it is in sight"
    assert page.locator(".dots > div.data").all_text_contents() == ["chat", "(none)", ""]
    assert "\u00b1" not in page.locator("#scores").text_content()
    if size == "phone":
        assert page.locator(".dots > svg").first.bounding_box()["width"] > 150


def test_positions_and_swaps_in_words(visit, tmp_path):
    """A line for each quantity, in the words of scores.py, with its interval; a scores.json of before has a_share in
    both tables, and each is shown as what it was."""
    swap = {"benchmark": "RMB", "n": 8, "first": .5, "second": .375, "mean": .4375, "mean_low": .2, "mean_high": .7,
            "both": .125, "consistent": .25, "consistent_low": .07, "consistent_high": .59, "always_a": .25,
            "always_b": .125, "undecided": .375, "a_share": .75}
    place = {"benchmark": "RMB", "chosen_a": .375, "chosen_b": None, "n_a": 8, "n_b": 0, "a_share": .5, "odd": 7}
    old = {"rows": [], "swap": [swap], "positions": [place, place | {"benchmark": "pairs", "n_a": 9}]}
    evaluation(tmp_path / "one", [pair(1)], [judgement(pair(1))], {"model": "one"} | old)
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html")

    def lines(heading, n=0):
        tables = page.locator(f"h2:text-is('{heading}') ~ *").locator("xpath=descendant-or-self::table")
        return tables.nth(n).locator("tr").evaluate_all(CELLS)
    words = QUANTITIES["swap"]
    numbers = ["8", "50.0", "37.5", "43.8 [20.0, 70.0]", "12.5", "25.0 [7.0, 59.0]", "25.0", "12.5", "37.5", "75.0"]
    assert lines("Both orders of the answers") == [["", "RMB"], *map(list, zip(words.values(), numbers))]
    words, numbers = QUANTITIES["positions"], [["37.5"] * 2, ["\u2013"] * 2, ["8", "9"], ["0", "0"], ["50.0"] * 2]
    places = [["", "RMB", "pairs"], *([what, *two] for what, two in zip(words.values(), numbers)), ["odd", "7", "7"]]
    assert lines("Where the better answer stands") == places
    assert "a share" not in page.locator("#scores").text_content()

    new = {"swap": [{k if k != "a_share" else "a_share_both_orders": x for k, x in swap.items()} | {"n": 7}]}
    evaluation(tmp_path / "two", [pair(1)], [judgement(pair(1))], {"model": "two"} | new)
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html")  # of several models a table for each benchmark
    both = lines("Both orders of the answers")
    assert both[0] == ["", " one", " two"] and both[1][1:] == ["8", "7"] and both[-1][1:] == ["75.0", "75.0"]
    assert page.locator("section.card h3:text-is('RMB')").count() == 2


def test_models_that_counted_different_numbers_of_pairs(visit, tmp_path):
    """The number counted is each model's own, not the first one's."""
    for model, n in (("one", 10), ("two", 2985)):
        row = {"benchmark": "RewardBench", "n": n, "of": 2985, "score": .5, "low": .4, "high": .6}
        rows = [row | {"kind": "overall", "name": "mean"}, row | {"kind": "section", "name": "Chat"}]
        evaluation(tmp_path / model, [pair(1)], [judgement(pair(1))], {"model": model, "rows": rows})
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html")
    cells = page.locator(".headline tr").evaluate_all(CELLS)
    assert cells[1:] == [[" one", "50.040.0 to 60.010 of 2,985 counted"], [" two", "50.040.0 to 60.02,985 counted"]]
    assert "counted" not in cells[0][1]
    assert page.locator("table:has(:text-is('Chat')) tbody td").nth(1).text_content() == "10 / 2,985"


def test_names_of_rm_bench_lead_to_their_judgements(visit, tmp_path):
    """A cell is a section and a subset; the published variant's rows have no judgements of their own."""
    pairs = [pair(i, "rm-bench", domain, subset) for i, (domain, subset) in enumerate(
        (d, s) for d in ("chat", "safety-refuse", "safety-response") for s in ("hard", "easy"))]
    kinds = (("domain", "safety"), ("difficulty", "hard"), ("domain and difficulty", "safety hard"),
             ("published variant (rotation 3 read twice)", "chat"))
    rows = [{"benchmark": "RM-Bench", "kind": kind, "name": name, "n": 1, "score": .5} for kind, name in kinds]
    rows += [rows[0] | {"name": f"domain {i}"} for i in range(50)]
    evaluation(tmp_path, pairs, [judgement(p) for p in pairs], {"model": "m", "rows": rows})
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    page = visit(tmp_path / "r.html")
    assert page.locator("#scores a").all_text_contents() == ["safety", "hard", "safety hard"]
    assert "and 12 more in the tables" in page.locator(".dots").text_content()
    for name, n in (("safety", 4), ("hard", 3), ("safety hard", 2)):
        page.locator(f"#scores a:text-is('{name}')").click()
        page.wait_for_function("n => document.querySelector('#count b')?.textContent === n", arg=str(n))
        page.go_back()


ACTIVE = """() => { const x = document.activeElement; return [x.id, ...["is", "j", "vote", "by"].map(k => x.dataset[k])]
    .filter(Boolean).join() || x.textContent.trim() || x.tagName; }"""


def test_keyboard_alone(visit, report):
    """What is drawn anew keeps the focus, the list is one stop for Tab, and all that a click does a key does too."""
    page = visit(report[0], "#j=rmb/26&of=one")
    wait_shown(page, "rmb/26")
    for selector, key in (("[data-is=right]", "is"), ("#next", "next"), ("#raw", "raw"), ("#raw", "raw")):
        page.locator(selector).focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        assert page.evaluate(ACTIVE) == {"is": "right"}.get(key, key)
    page.keyboard.press("Escape")
    row = page.locator("a.row[tabindex='0']")
    assert row.count() == 1 and row.get_attribute("aria-current") == "true"
    row.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("!document.querySelector('#list').contains(document.activeElement)")
    page = visit(report[0], "#j=rmb/26&of=one")
    page.locator("[data-vote='1']").press("Enter")
    page.wait_for_selector(".rest:has-text('Vote 1.')")
    assert page.evaluate(ACTIVE) == "1"
    page = visit(report[0], "#j=reward-bench/3&of=two")
    page.locator(".quote[data-n='2']").press("Enter")
    assert page.locator("mark.flash").text_content() == "It is" == page.evaluate(ACTIVE)
    page.keyboard.press("Enter")
    assert page.locator(".quote.flash").get_attribute("data-n") == "2" and page.locator(".flash").count() == 1
    page = visit(report[0])
    page.locator("th button:has-text('budget')").press("Enter")
    page.wait_for_selector("th[aria-sort=descending]:has-text('token budget \u2193')")
    page.keyboard.press("Enter")
    page.wait_for_selector("th[aria-sort=ascending]:has-text('token budget \u2191')")


def test_names_and_values_that_javascript_has_its_own_of(visit, tmp_path):
    """Metrics and columns named as what every object has; objects where texts are due."""
    odd = {"toString": 1, "nodeType": 1}
    for name, more in (("g1", {"constructor": 3, "__proto__": 4}), ("g2", {"toString": 5, "reward": 1e308})):
        write_lines(tmp_path / name / "metrics.jsonl", [{"step": i, "reward": -1e308 * i} | more for i in range(3)])
    write_lines(tmp_path / "g1" / "samples.jsonl", [{"step": 1, "id": "x", "prompt": odd, "judgement": "J",
                                                     "winner": "a", "verdict": "a", "reward": odd}])
    (tmp_path / "g1" / "config.json").write_text(json.dumps({"commit": odd, "command": [odd], "__proto__": "p"}))
    row = {"benchmark": "B", "kind": "section", "n": 1, "score": .5}
    rows = [row | {"name": "one", "constructor": odd}, row | {"name": "two", "__proto__": .25}, row | {"name": odd}]
    rows.append(row | {"kind": "overall", "name": "all", "score": 1e308, "low": "NaN", "high": 1e308})
    evaluation(tmp_path / "e", [pair(1)], [judgement(pair(1))], {"model": "m", "settings": {"toString": odd},
                                                                 "rows": rows, "swap": [{"benchmark": odd}, odd]})
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    page = visit(tmp_path / "r.html", "#view=training")
    page.wait_for_selector(".sample:has-text('J')")
    titles = page.locator(".plot h3").all_text_contents()
    assert titles == ["Reward", "__proto__", "constructor", "toString"]
    assert page.locator(".plot:has-text('constructor') .read").text_content() == "last: 3"
    page = visit(tmp_path / "r.html")
    table = page.locator("table:has(:text-is('one'))")
    cells = table.locator("tbody tr").evaluate_all(CELLS)
    assert [x[:3] for x in cells] == [["1", "50.0", "one"], ["1", "50.0", "two"]]
    assert [cells[0][4], cells[1][3]] == ["\u2013"] * 2 and "toString" in cells[0][3] and cells[1][4] == "25.0"
    for button in table.locator("th button").all():
        button.click()


def test_search_hits_are_marked(visit, report):
    page = visit(report[0], "#j=reward-bench/3&of=two&q=MOON")
    hits = "n => CSS.highlights.get('searched')?.size === n"
    page.wait_for_function(hits, arg=3)            # question, answer A, and the quotation, of which a break is no part
    page.keyboard.press("t")
    page.wait_for_selector(".raw")
    page.wait_for_function(hits, arg=3)
    page.keyboard.press("Escape")
    page.wait_for_function(hits, arg=0)


def test_markdown_does_not_matter_in_quotations(visit, tmp_path):
    p = pair(1, answer_a="Well: **The moon** is `made` of\n# rock_solid stone.")
    text = "<type>Chat</type><eval><quote_A>the moon is *made* of rock_solid</quote_A></eval><answer>[[A]]</answer>"
    evaluation(tmp_path, [p], [judgement(p, "a", text)])
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    page = visit(tmp_path / "r.html", "#j=reward-bench/1")
    page.wait_for_selector(".quote")
    assert page.locator(".side-a mark").text_content() == "The moon** is `made` of\n# rock_solid"


@pytest.mark.skipif(not QWEN.exists(), reason=f"no recorded outputs at {QWEN}: set RM_SHARED")
def test_quotations_are_found_here_and_in_data_quality_alike(visit, report):
    """The rule stands in JavaScript and in Python: the same of some made up and of all recorded ones are found."""
    texts = ["# The **Moon** isn\u2019t\n\nmade of \u201ccheese\u201d, they say.", "Second message, with_underscores."]
    cases = [(quotation, texts) for quotation in (
        '"the moon isn\'t"', "Moon ... cheese", "Moon ... sun", "the moon [\u2026] second", '"moon" and "cheese"', "...",
        "**Moon** isn\u2019t made", "'Moon'", "the moon was")]
    for row in json.loads(QWEN.read_text(encoding="utf-8")):
        record = row["record"]
        answers = [record[key][-1]["content"] for key in ("text_chosen", "text_rejected")]
        answers = answers[::-1] if record["Is_Chosen_Answer_Shuffled_toPositionB"] else answers
        cases += [(quotation, [answers["AB".index(side)]]) for side, quotation in quotations(record["answers"])]
    page = visit(report[0])
    here = page.evaluate("cases => cases.map(([q, texts]) => locate(q, texts.map(normal)).found === 'all')", cases)
    assert len(cases) == 115 and here == [place_of(*case) is not None for case in cases]
    assert here[:9] == [True, True, False, True, True, False, True, True, False]


def test_print_less_motion_and_no_script(visit, browser, report):
    page = visit(report[0], "#j=reward-bench/3&of=two")
    page.emulate_media(media="print", reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.querySelector('#read')).display") == "block"
    page.locator(".quote[data-n='2']").click()
    assert page.evaluate("""() => { const x = getComputedStyle(document.querySelector(".flash"));
        return [x.animationName, x.outlineStyle]; }""") == ["none", "solid"]
    page = browser.new_page(java_script_enabled=False)
    page.goto(f"file://{report[0]}")
    assert page.locator("noscript").text_content().startswith("This page draws itself with JavaScript")
    page.close()


def test_conversations_rendered_pairs_and_missing_texts(visit, tmp_path):
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Moon?"}]
    many = pair(1, prompt=talk, answer_b=[{"role": "assistant", "content": "Cheese."},
                                          {"role": "user", "content": "Sure?"},
                                          {"role": "assistant", "content": "It is ... made of rock"}])
    ready = pair(2, rendered=[{"role": "user", "content": "Judge: the moon is made of rock"}], prompt=[], answer_a="",
                 answer_b="")
    rows = [judgement(many), judgement(ready), judgement(pair(3), "-")]
    evaluation(tmp_path / "e", [many, ready], rows)
    write_lines(tmp_path / "f" / "judgements.jsonl", [judgement(pair(4), "", recorded=1)])
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    page = visit(tmp_path / "r.html", "#j=reward-bench/1")
    wait_shown(page, "reward-bench/1")
    assert page.locator(".question .role").all_text_contents() == ["system", "user", "assistant", "user"]
    assert page.locator(".side-b .role").all_text_contents() == ["assistant", "user", "assistant"]
    page = visit(tmp_path / "r.html", "#j=reward-bench/2")
    wait_shown(page, "reward-bench/2")
    assert page.locator(".rendered mark").all_text_contents() == ["the moon is ", "made of rock"]    # A's, A's and B's
    assert page.locator(".sides").count() == 0
    page = visit(tmp_path / "r.html", "#j=reward-bench/3")
    wait_shown(page, "reward-bench/3")
    assert "not on disk" in page.locator(".no-texts").text_content() and page.locator(".cut").count() > 0
    page = visit(tmp_path / "r.html", "#j=reward-bench/4")
    wait_shown(page, "reward-bench/4")
    assert "Only the outcome was recorded" in page.locator("#reader").text_content()


def test_hostile_texts_are_shown_and_never_run(visit, tmp_path):
    """Markup in every place that data can fill. visit() checks that none of it ran or loaded anything."""
    quoted = f"<quote_A>{HOSTILE[:60]}</quote_A> and <quote_B>not there {HOSTILE}</quote_B>"
    rubric = f"1. {HOSTILE} (40%): {HOSTILE}\n2. x (60%)<justify>{HOSTILE}</justify>"
    text = f"<type>Chat</type><rubric>{rubric}</rubric>\n" \
           f"<eval>{HOSTILE} {quoted}</eval><answer>[[A]]</answer>"
    p = pair(1, HOSTILE, HOSTILE, HOSTILE, prompt=[{"role": HOSTILE, "content": HOSTILE},
                                                   {"role": "user", "content": HOSTILE}],
             answer_a=HOSTILE, answer_b="b " + HOSTILE, item=HOSTILE) | {"id": HOSTILE}
    records = [judgement(p, "a", text, prompt_hash=HOSTILE), swapped(p, "ab", text=HOSTILE)]
    row = {"benchmark": HOSTILE, "kind": HOSTILE, "name": HOSTILE, "n": 1, "score": .5, "low": .1, "high": .9,
           HOSTILE: HOSTILE}
    tables = {name: [row, {}, 7] for name in ("swap", "positions", "budgets")}
    tables["rows"] = [row, row | {"kind": "overall"}, {}, None, {"benchmark": "x", "kind": "overall", "score": None}]
    name = HOSTILE.replace("/", "|")                          # a path is shown by its last two parts
    for i in range(2):
        evaluation(tmp_path / f"e{i}", [p], records, tables | {"model": name, "settings": {HOSTILE: HOSTILE},
                                                               "run": {HOSTILE: HOSTILE}})
    write_lines(tmp_path / "<img src=x onerror=__pwned=5>" / "metrics.jsonl",
                [{"step": i, HOSTILE: i, "reward": .5} for i in range(3)])
    write_lines(tmp_path / "<img src=x onerror=__pwned=5>" / "samples.jsonl", [
        {"step": 1, "id": HOSTILE, "prompt": HOSTILE, "judgement": text, "winner": "a", "verdict": "a",
         "reward": HOSTILE}])
    (tmp_path / "<img src=x onerror=__pwned=5>" / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    ours = """() => ["script", "style", "img, base, iframe, object, textarea, form"]
        .map(selector => document.querySelectorAll(selector).length)"""
    same = """([selector, text]) => {
        const shown = JSON.parse(text).replace(/\\u0000/g, "\\u2400").replace(/\\u0007/g, "\\u2407");
        return [...document.querySelectorAll(selector)].filter(el => el.textContent.includes(shown)).length; }"""
    for view in ("scores", "training", "read"):
        page = visit(tmp_path / "r.html", "#view=" + view)
        page.wait_for_selector(f"#{view} .card")
        scripts = page.evaluate(ours)
        assert scripts == [1 + 3, 1, 1]                       # the page's own, a chunk of each kind; the help's form
        assert page.evaluate(same, [f"#{view}", json.dumps(HOSTILE)])
    for selector in (".question .text", ".side-a .text", ".side-b .text", ".justify", ".evaluation .text",
                     ".quote.lost", "#permalink", ".facts"):
        assert page.evaluate(same, [selector, json.dumps(HOSTILE)]), selector
    for selector in ("table.rubric td:first-child", "a.row > div", "#by-model option", "#title"):
        assert page.evaluate(same, [selector, json.dumps(name[:50] if "#" in selector else HOSTILE[:50])]), selector
    assert page.locator(".side-a mark").count() == 1
    page.keyboard.press("t")
    page.wait_for_selector(".raw")
    assert page.evaluate(same, [".raw .text", json.dumps(text)])
    page.fill("#q", "onerror=")
    page.wait_for_selector("#progress:has-text('all texts searched')")
    assert page.locator("#count b").text_content() == "4"
    page.evaluate("() => { document.querySelector('#permalink').click(); }")
    page.wait_for_function("() => location.hash.includes('j=')")
    page.reload()
    page.wait_for_selector(".side-a")
    assert page.evaluate(ours)[2] == 1


def test_policy_stops_what_is_injected(browser, report):
    """Were there a hole after all: a script tag put into the page is not run, an image is not fetched."""
    page = browser.new_page()
    requests = []
    page.on("requestfinished", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: requests.append(request.failure))
    page.goto(f"file://{report[0]}")
    page.evaluate("""() => {
        const script = document.createElement("script"), image = document.createElement("img");
        script.textContent = "window.__pwned = 1";
        image.setAttribute("onerror", "window.__pwned = 2");
        image.src = "http://example.invalid/x.png";
        document.body.append(script, image);
        document.body.setAttribute("onclick", "window.__pwned = 3");
        document.body.click(); }""")
    page.wait_for_timeout(200)
    assert page.evaluate("typeof window.__pwned") == "undefined"
    assert requests == [f"file://{report[0]}", "csp"]
    page.close()


@pytest.mark.parametrize("view", ["scores", "read", "read&j=rmb/17", "training"])
def test_phone_has_no_sideways_scroll(visit, report, training, view):
    page = visit(training if view == "training" else report[0], "#view=" + view, "phone")
    page.wait_for_selector("main > section:not([hidden])")
    page.wait_for_timeout(150)
    wide = page.evaluate("""() => [...document.querySelectorAll("html, main > section, #reader, aside")]
        .filter(el => el.scrollWidth > el.clientWidth + 1).map(el => el.id || el.tagName)""")
    assert wide == [] and page.evaluate("document.documentElement.scrollWidth") <= 390


def test_phone_reads_in_two_screens(visit, report):
    file, rows = report
    page = visit(file, "#view=read", "phone")
    assert page.locator("#list").is_visible() and not page.locator("#reader").is_visible()
    page.locator("a.row").nth(2).click()
    wait_shown(page, rows[2][1])
    assert not page.locator("#list").is_visible()
    a, b = (page.locator(f".side-{x}").bounding_box() for x in "ab")
    assert b["y"] >= a["y"] + a["height"] and a["x"] == b["x"], "the answers stand one below the other"
    page.click("#back")
    assert page.locator("#list").is_visible()


def test_light_and_dark(visit, report):
    """Either follows the system; the button turns it over, for the next visit too. Contrast of text at least 4.5."""
    background = "() => getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
    light, dark = (visit(report[0], "#view=read", scheme=scheme) for scheme in ("light", "dark"))
    assert min(light.evaluate(background)) > 200 and max(dark.evaluate(background)) < 60
    dark.click("#theme")
    assert dark.evaluate(background) == light.evaluate(background) and dark.locator("#theme").text_content() == "Dark"
    dark.reload()
    assert dark.evaluate(background) == light.evaluate(background)
    dark.click("#theme")
    assert max(dark.evaluate(background)) < 60

    def luminance(color):
        parts = [x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4
                 for x in map(float, re.findall(r"[0-9.]+", color)[:3])]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
    pressed = visit(report[0], "#view=read&is=right&j=reward-bench/3&of=two")
    for page in (light, pressed, visit(report[0], "#j=reward-bench/3&of=two", scheme="dark")):
        page.wait_for_selector(".quote")
        colours = page.evaluate("""() => [...document.querySelectorAll("#read *")].filter(el => el.offsetParent &&
            [...el.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(el => {
                let under = el, colour = x => getComputedStyle(x).backgroundColor;
                while (colour(under) === "rgba(0, 0, 0, 0)") under = under.parentElement;
                return [el.className || el.tagName, getComputedStyle(el).color, colour(under)]; })""")
        for name, ink, ground in colours:
            high, low = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (high + .05) / (low + .05) >= 4.5, (name, ink, ground)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Two GRPO runs, one of them with NaN and a gap, and an SFT run; a page of them."""
    folder = tmp_path_factory.mktemp("training")
    for name, n in (("grpo-1", 40), ("grpo-2", 300)):
        rows = [{"step": i + 1, "reward": i / n, "accuracy": i / n, "kl": .01 * i, "mismatch": 10.0 ** (-8 + i % 5),
                 "decode_tok_s": 1e4 + i, "loss": float("nan") if name == "grpo-1" and i == 5 else .5, "oddity": i,
                 **({"eval_accuracy": .5, "eval_accuracy_chat": .25} if i % 10 == 0 else {})} for i in range(n)]
        write_lines(folder / name / "metrics.jsonl", rows)
    write_lines(folder / "grpo-1" / "samples.jsonl", [
        {"step": step, "id": f"rl/{step}/{i}", "prompt": "<|im_start|>user\nQ: the moon is made of rock<|im_end|>",
         "judgement": CHAIN, "winner": "a", "verdict": "a", "reward": 1.0, "advantage": .5}
        for step in (1, 20, 40) for i in range(2)])
    write_lines(folder / "sft" / "metrics.jsonl", [{"step": i + 1, "loss": 5 / (i + 1), "lr": 1e-3} for i in range(20)])
    write_lines(folder / "sft" / "samples.jsonl", [{"step": 7, **judgement(pair(1))}])
    (folder / "sft" / "config.json").write_text('{"options": {"lr": 0.001, "model": "m"}, "command": ["distill.py"]}')
    write(build(find([str(folder)])), folder / "report.html")
    return folder / "report.html"


def test_training_page(visit, training):
    page = visit(training)
    assert page.locator("#training").is_visible() and not page.locator("#to-scores").is_visible()
    titles = page.locator(".plot h3").all_text_contents()
    for wanted in ("Reward", "Accuracy", "Held-out accuracy", "Held-out: chat", "KL", "Mismatch", "Decoding speed",
                   "Loss", "Learning rate", "oddity"):
        assert wanted in titles, wanted
    reward = page.locator(".plot", has=page.locator("h3:text-is('Reward')"))
    assert reward.locator("path.curve").count() == 3                     # a run of 40 points; one of 300 and its mean
    assert "0.975" in reward.locator(".read").text_content() and "0.997" in reward.locator(".read").text_content()
    loss = page.locator(".plot", has=page.locator("h3:text-is('Loss')")).first
    assert "1 not finite" in loss.text_content() and loss.locator("text.bad").count() == 1
    ticks = page.locator(".plot", has=page.locator("h3:text-is('Mismatch')")).locator("text").all_text_contents()
    assert "1e-8" in ticks and "1e-4" in ticks
    reward.locator("svg[tabindex]").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert reward.locator(".read").text_content().startswith("3:")
    kl = page.locator(".plot", has=page.locator("h3:text-is('KL')"))
    assert kl.locator(".read").text_content().startswith("3:"), "one cursor for all"
    page.locator("summary:has-text('more')").first.click()
    page.locator("label:has-text('grpo-2') input").focus()
    page.keyboard.press("Space")
    assert page.evaluate("document.activeElement.type") == "checkbox"
    assert page.locator(".plot", has=page.locator("h3:text-is('oddity')")).is_visible()
    assert page.locator(".plot", has=page.locator("h3:text-is('Reward')")).locator("path.curve").count() == 1


def test_axes_show_no_sign_that_no_value_has(visit, training):
    """By hand: 6 % of the range as air, but not across 0; constants from 0; shares and percentages in their ends."""
    cases = [([0, 0], 0, [0, 1.06]), ([7, 7], 0, [0, 7.42]), ([1e-6], 0, [0, 1.06e-6]), ([-.5, -.5], 0, [-.53, 0]),
             ([0], 1, [0, 1]), ([1, 1], 1, [0, 1]), ([.02], 1, [0, .05]), ([100], 100, [0, 100]),
             ([2, 4], 0, [1.88, 4.12]), ([0, 1], 0, [0, 1.06]), ([.05, 1], 0, [.05, 1.057]), ([-1, 0], 0, [-1.06, 0]),
             ([-4, -2], 0, [-4.12, -1.88]), ([-1, 1], 0, [-1.12, 1.12]), ([90, 100], 100, [89.4, 100]),
             ([.98, .99], 1, [.9406, .9906]), ([], 0, [0, 1.06])]
    given = [[ys, False, top] for ys, top, _ in cases]
    found = visit(training).evaluate("cases => cases.map(x => yRange(...x))", given)
    assert found == [pytest.approx(wanted) for _, _, wanted in cases]


def ticks(page, title):
    """The numbers on the left of a plot."""
    return page.locator(f".plot:has(h3:text-is('{title}')) text[text-anchor=end]").all_text_contents()


def test_curves_that_are_constant(visit, tmp_path):
    """Zeros once had an axis from -0.5 to 0.5; counts have no ticks between whole numbers."""
    row = {"reward": -1.0, "frac_no_verdict": 0.0, "n_skipped": 0, "lr": 1e-6, "mismatch": 0.0, "accuracy": 1.0,
           "entropy": .5}
    write_lines(tmp_path / "metrics.jsonl", [{"step": i} | row for i in range(5)])
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html")
    for title in ("No verdict", "Skipped steps", "Mismatch", "Accuracy"):
        assert ticks(page, title) == ["0", "1"], title
    assert ticks(page, "Reward") == ["-1", "0"]
    assert ticks(page, "Learning rate") == ["0", "5e-7", "1e-6"] and ticks(page, "Entropy") == ["0", "0.2", "0.4"]
    assert "skipped, at" not in page.locator("#training").text_content()


def test_gaps_and_skipped_steps(visit, tmp_path):
    """null in a row is a gap in the curve, and of loss and gradient norm it was not finite; a key that rows lack (an
    evaluation every other step) is none. Steps that were skipped are told, with their number."""
    rows = [{"step": i + 1, "loss": .5, "grad_norm": 1.5, "entropy": .1 * i, "n_skipped": 0} for i in range(9)]
    for i, n in ((3, 2), (8, 1)):
        rows[i] |= {"loss": None, "grad_norm": None, "n_skipped": n}
    rows[5]["entropy"] = None
    for i in range(0, 9, 2):
        rows[i]["eval_accuracy"] = i / 10
    write_lines(tmp_path / "run" / "metrics.jsonl", rows)
    write_lines(tmp_path / "well" / "metrics.jsonl", [{"step": 1, "loss": .5, "n_skipped": 0}])
    write_lines(tmp_path / "long" / "metrics.jsonl", [
        {"step": i, "reward": None if i in (200, 250, 251) else i, "n_skipped": int(i < 20)} for i in range(300)])
    built(tmp_path, tmp_path / "r.html")
    page = visit(tmp_path / "r.html")
    plot = {title: page.locator(f".plot:has(h3:text-is('{title}'))") for title in
            ("Loss", "Gradient norm", "Entropy", "Held-out accuracy", "Reward")}
    n_pieces = "paths => paths.map(path => path.getAttribute('d').match(/M/g).length)"
    curve = {title: plot[title].locator("path.curve").evaluate_all(n_pieces) for title in plot}
    assert curve == {"Loss": [2], "Gradient norm": [2], "Entropy": [2], "Held-out accuracy": [1], "Reward": [3, 3]}
    marks = [plot[title].locator("text.bad title").all_text_contents() for title in plot]
    assert marks == [["not finite at 4", "not finite at 9"]] * 2 + [[], [], []]
    assert "\u00d7 2 not finite" in plot["Loss"].text_content() and "finite" not in plot["Entropy"].text_content()
    assert "run not finite" in plot["Loss"].locator(".read").text_content()      # the last row's, not the last number
    plot["Entropy"].locator("svg[tabindex]").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    assert plot["Entropy"].locator(".read").text_content() == "6: none"
    assert page.locator("#training p.wrong").all_text_contents() == [
        "\u00d7 long: 20 optimizer steps skipped, at step 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 \u2026: loss or "
        "gradient was not finite",
        "\u00d7 run: 3 optimizer steps skipped, at step 4, 9: loss or gradient was not finite"]


def test_samples_over_time(visit, training):
    page = visit(training)
    page.wait_for_selector(".sample")
    assert page.locator(".steps .place").text_content() == "step 40" and page.locator(".sample").count() == 2
    assert all(x in page.locator(".sample").first.text_content() for x in ("reward +1", "advantage +0.5"))
    assert page.locator(".sample").first.locator("table.rubric tbody tr").count() == 2
    assert page.locator(".sample").first.locator(".prompt mark").all_text_contents() == ["the moon is ", "made of rock"]
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".sample:has-text('rl/20/0')")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".sample:has-text('rl/1/1')")
    page.locator("button[aria-label=later]").press("Enter")
    page.wait_for_selector(".sample:has-text('rl/20/0')")
    page.keyboard.press("Enter")
    page.wait_for_selector(".sample:has-text('rl/40/0')")
    page.keyboard.press("Enter")
    assert page.locator(".sample").count() == 2 and page.locator(".steps .place").text_content() == "step 40"
    page.select_option("select[aria-label=run]", label="sft")
    page.wait_for_selector(".sample:has-text('reward-bench/1')")
    assert page.locator(".steps .place").text_content() == "step 7"


def test_ten_thousand_judgements_stay_light(visit, tmp_path):
    """The number of elements does not grow with that of judgements; the last one is reached by scrolling, by search."""
    pairs = [pair(i, subset=f"subset {i % 9}") for i in range(10_000)]
    evaluation(tmp_path, pairs, [judgement(p, "ab"[i % 2], f"J {i} <answer>[[A]]</answer>")
                                 for i, p in enumerate(pairs)])
    write(build(find([str(tmp_path)])), tmp_path / "r.html")
    page = visit(tmp_path / "r.html", "#view=read")
    wait_shown(page, "reward-bench/0")
    assert page.evaluate("document.querySelectorAll('body *:not(script)').length") < 500
    page.evaluate("() => { const list = document.querySelector('#list'); list.scrollTop = list.scrollHeight; }")
    page.wait_for_selector("a.row[data-j='9999']")
    page.locator("a.row[data-j='9999']").click()
    wait_shown(page, "reward-bench/9999")
    assert page.locator("a.row").count() < 60 and page.locator("#count b").text_content() == "10,000"
    page.fill("#q", "J 9876 ")
    page.wait_for_selector("#progress:has-text('all texts searched')")
    assert page.locator("a.row").count() == 1
    wait_shown(page, "reward-bench/9876")
