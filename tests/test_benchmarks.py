"""benchmarks/records.py: releases made up here in the shapes of SCORING.md, every pair and output in them known;
RM-R1's own logs (RM_SHARED, default ../shared) with the verdicts and orders recorded in them."""

import json
import os
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import scores  # noqa: E402
from benchmarks.records import published_order, read_benchmark, read_recorded  # noqa: E402
from data.pairs import SWAPPED, Pair, swapped, write_pairs  # noqa: E402

BENCHMARKS = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no records at {BENCHMARKS}: set RM_SHARED")
REWARD_BENCH, OUTPUTS = BENCHMARKS / "reward_bench", BENCHMARKS / "rm_r1_outputs"
QWEN, DEEPSEEK = "RM-R1-Qwen2.5-Instruct-32B", "RM-R1-DeepSeek-Distilled-Qwen-32B"

# SCORING.md 2.1 and 2.2: the subsets in the data set's order, with their rows
ROWS = {"alpacaeval-easy": 100, "alpacaeval-hard": 95, "alpacaeval-length": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40, "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46, "refusals-dangerous": 100,
        "refusals-offensive": 100, "xstest-should-respond": 250, "xstest-should-refuse": 154, "donotanswer": 136,
        "hep-python": 164, "hep-go": 164, "hep-cpp": 164, "hep-js": 164, "hep-rust": 164, "hep-java": 164,
        "math-prm": 447}
ITEMS = {"chat": 129, "code": 228, "math": 529, "safety-refuse": 284, "safety-response": 157}   # 3.1
FLAG = "Is_Chosen_Answer_Shuffled_toPositionB"


# ---- made-up releases

def judgement(right, chosen_is_b, rng):
    """A random text that earns this outcome; a wrong one is for the other side, for both, or for neither."""
    own, other = ("[[B]]", "[[A]]") if chosen_is_b else ("[[A]]", "[[B]]")
    verdict = own if right else rng.choice([other] * 4 + [f"{own} or {other}?", "<answer>A</answer>", "[B] [[C]]"])
    before, after = (" ".join(rng.choices(["so", "\n", "A", "[[", "better", "é"], k=rng.randrange(9))) for _ in "ab")
    return f"{before} {verdict} {after}"


def reward_bench_rows(rows=ROWS):
    """Ids count up through the rows, but 3692 is in two subsets, as in the published file."""
    subsets = [subset for subset, n in rows.items() for _ in range(n)]
    first = {subsets.index(subset) for subset in ("donotanswer", "hep-python") if subset in subsets}
    return [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}", "subset": subset,
             "chosen_model": "m", "rejected_model": "n", "id": 3692 if i in first else i}
            for i, subset in enumerate(subsets)]


def reward_bench_logs(rows, results, flags, rng):
    user = [[{"content": row["prompt"], "role": "user"}] for row in rows]
    return [{"text_chosen": said + [{"content": row["chosen"], "role": "assistant"}],
             "text_rejected": said + [{"content": row["rejected"], "role": "assistant"}], "results": result,
             "answers": judgement(result, flag, rng), FLAG: flag, "subset": row["subset"], "id": row["id"]}
            for said, row, result, flag in zip(user, rows, results, flags)]


def rm_bench_items(rng, items=ITEMS):
    names = sorted(f"{domain}/{i}" for domain, n in items.items() for i in rng.sample(range(3 * n), n))
    return [{"id": name, "prompt": f"q {name}", "chosen": [f"{name} good {s}" for s in "012"],
             "rejected": [f"{name} bad {s}" for s in "012"], "domain": name.split("/")[0]} for name in names]


def rm_bench_logs(items, rng):
    """The three runs, each a process of its own: slots in turn, items in order, one draw of a fresh seed 0 each."""
    runs = []
    for turned in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        draws, flags = np.random.RandomState(0), {}
        for slot in range(3):
            for item in items:
                flags[slot, item["id"]] = bool(draws.rand() > 0.5)
        runs.append([])
        for item in items:
            flag = [flags[slot, item["id"]] for slot in range(3)]
            result = [int(rng.random() < 0.6 + 0.1 * (slot - turned[slot])) for slot in range(3)]
            runs[-1].append(item | {"rejected": [item["rejected"][i] for i in turned], "result": result,
                                    "output": [judgement(r, f, rng) for r, f in zip(result, flag)], FLAG: flag})
    return runs


def rmb_files(rng, sizes):
    """{path in RMB_dataset: records}, sizes = {path: items}; some dialogues have three or five messages, best-of-n
    items have two to six losers, every 20th pair has identical answers."""
    files, uid = {}, 0
    for path, n in sizes.items():
        files[path] = []
        for _ in range(n):
            uid += 1
            turns = [{"role": "assistant" if i % 2 else "user", "content": f"{uid} says {i}", "language": "English"}
                     for i in range(rng.choice([1, 1, 1, 3, 5]))]
            best, *losers = [{"llm_name": "m", "answer": f"answer {uid} {i if uid % 20 else ''}"} for i in range(7)]
            record = {"conversation_input": turns, "category_path": path.removesuffix(".json")}
            files[path].append(record | (
                {"bon_uid": str(uid), "bon_best": best, "loser_list": losers[:rng.choice([2, 2, 2, 3, 4, 5, 6])]}
                if path.startswith("BoN") else {"pair_uid": str(uid), "chosen": best, "reject": losers[0]}))
    return files


RMB_SIZES = {f"{kind}_set/{name}.json": n for kind in ("Pairwise", "BoN") for name, n in {
    "Helpfulness/Chat/Casual": 13, "Helpfulness/Chat/Role": 40, "Helpfulness/Code": 29, "Helpfulness/Chat-2/Old": 7,
    "Harmlessness/S1": 31, "Harmlessness/S10": 8, "Harmlessness/S2": 1}.items()}


def rmb_logs(files, rng):
    """{section: logs}: a process for each section, its files walked in sorted order, a pair for each loser."""
    sections = {}
    for path in sorted(files, key=lambda path: path.split("/")):
        kind, domain, *_ = path.split("/")
        logs = sections.setdefault(f"{kind}_{domain}", [])
        for i, record in enumerate(files[path]):
            uid = {key: record[key] for key in ("bon_uid", "pair_uid") if key in record}
            best, losers = (record["bon_best"], record["loser_list"]) if "bon_uid" in uid else \
                (record["chosen"], [record["reject"]])
            said = [{"content": turn["content"], "role": turn["role"]} for turn in record["conversation_input"]]
            logs += [{**uid, "category_path": record["category_path"], "idx": i, "results": int(rng.random() < 0.8),
                      "text_chosen": said + [{"content": best["answer"], "role": "assistant"}],
                      "text_rejected": said + [{"content": loser["answer"], "role": "assistant"}]} for loser in losers]
    for logs in sections.values():
        draws = np.random.RandomState(0)
        for log in logs:
            log[FLAG] = bool(draws.rand() > 0.5)
            log["answers"] = judgement(log["results"], log[FLAG], rng)
    return sections


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if path.suffix == ".jsonl" else json.dumps(value))
    return path


def save_model(folder, reward_bench, rm_bench, rmb):
    """The folder of one model, with the score files that stand in it beside the logs."""
    save(folder / "reward_bench/log_result/logs.json", reward_bench)
    for n, run in enumerate(rm_bench, 1):
        save(folder / f"RM-Bench/logs/total_dataset_{n}_{QWEN}.json", run)
    for section, logs in rmb.items():
        there, bon = folder / "RMB" / section / "log_result", section.startswith("BoN")
        save(there / ("raw_logs.json" if bon else "logs.json"), logs)
        if bon:
            save(there / "group_by_same_id_logs.json", {"0": logs})
        save(folder / "RMB" / section / "score_result/Final_score.json", [{"Overall_accuracy": 0.5}, {}])
    for name in ("reward_bench/score_result/main_score.json", "RMB/META_RESULT.json", "RM-Bench/final_score.json",
                 "RM-Bench/logs/final_result.json"):
        save(folder / name, {"Chat": 0.5})
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(the benchmarks' own files, a model's folder, its logs), in full size but for RMB."""
    folder, rng = tmp_path_factory.mktemp("released"), random.Random(0)
    rows, items, files = reward_bench_rows(), rm_bench_items(rng), rmb_files(rng, RMB_SIZES)
    flags = (np.random.RandomState(0).rand(len(rows)) > 0.5).tolist()
    logs = (reward_bench_logs(rows, [int(rng.random() < 0.9) for _ in rows], flags, rng), rm_bench_logs(items, rng),
            rmb_logs(files, rng))
    for path, records in files.items():
        save(folder / "rmb" / path, records)
    own = {"reward-bench": save(folder / "filtered.jsonl", rows), "rmb": folder / "rmb",
           "rm-bench": save(folder / "rm/total_dataset.json", items)}
    return own, save_model(folder / QWEN, *logs), logs


def in_order(pairs):
    """Every pair with its chosen answer as A."""
    return [pair if pair.winner == "a" else swapped(pair) for pair in pairs]


# ---- a benchmark's pairs

def test_reward_bench_pairs_are_its_rows(released):
    pairs = read_benchmark(released[0]["reward-bench"], "reward-bench")
    assert len(pairs) == 2985
    assert [(p.id, p.subset, p.prompt[0]["content"], p.answer_a, p.answer_b, p.item) for p in in_order(pairs)] == [
        (f"{row['subset']}/{row['id']}", row["subset"], f"q{i}", f"good {i}", f"bad {i}", "")
        for i, row in enumerate(reward_bench_rows())]
    assert [p.domain for p in pairs if p.id.endswith("/3692")] == ["Safety", "Reasoning"]


def test_rm_bench_pairs_are_nine_an_item_sorted_as_text(released):
    pairs = read_benchmark(released[0]["rm-bench"], "rm-bench")
    items = json.loads(released[0]["rm-bench"].read_text())
    wanted = [(f"{item['id']}/{i}{j}", item["chosen"][i], item["rejected"][j], item["domain"], item["id"],
               "easy" if i > j else "normal" if i == j else "hard")
              for item in sorted(items, key=lambda item: item["id"]) for i in range(3) for j in range(3)]
    assert [(p.id, p.answer_a, p.answer_b, p.domain, p.item, p.subset) for p in in_order(pairs)] == wanted
    assert len(pairs) == 9 * 1327


@pytest.mark.parametrize("order", ["balanced", "published"])
def test_rm_bench_is_the_same_from_a_file_a_domain(released, tmp_path, order):
    """The released folder has the whole, a file a domain in numeric order, rotated copies: read once in any case."""
    items = json.loads(released[0]["rm-bench"].read_text())
    whole = read_benchmark(released[0]["rm-bench"], "rm-bench", order, seed=5)
    for domain in ITEMS:
        mine = [{key: item[key] for key in ("prompt", "chosen", "rejected")} | {"id": int(item["id"].split("/")[1])}
                for item in items if item["domain"] == domain]
        save(tmp_path / f"{domain}_filtered.json", sorted(mine, key=lambda item: item["id"]))
    assert read_benchmark(tmp_path, "rm-bench", order, seed=5) == whole
    rotated = [item | {"rejected": item["rejected"][1:] + item["rejected"][:1]} for item in items]
    for name, copy in (("total_dataset_2", rotated), ("total_dataset_3", rotated), ("total_dataset_1", items[::-1])):
        save(tmp_path / f"{name}.json", copy)
        assert read_benchmark(tmp_path, "rm-bench", order, seed=5) == whole
    assert read_benchmark(tmp_path / "total_dataset_1.json", "rm-bench", order, seed=5) == whole
    (tmp_path / "total_dataset_1.json").rename(tmp_path / "total_dataset.json")
    assert read_benchmark(tmp_path, "rm-bench", order, seed=5) == whole
    with pytest.raises(ValueError, match="total_dataset_2.json: the rejected answers are rotated"):
        read_benchmark(tmp_path / "total_dataset_2.json", "rm-bench")


def test_rmb_is_walked_in_sorted_order_with_a_pair_for_each_loser(released):
    pairs = in_order(read_benchmark(released[0]["rmb"], "rmb"))
    logs, wanted = released[2][2], []
    for section in sorted(logs):
        for log in logs[section]:
            wanted.append((log["text_chosen"][:-1], log["text_chosen"][-1]["content"],
                           log["text_rejected"][-1]["content"], log["category_path"], section.split("_")[2],
                           log.get("bon_uid", "")))
    assert [(p.prompt, p.answer_a, p.answer_b, p.subset, p.domain, p.item) for p in pairs] == wanted
    assert {len(p.prompt) for p in pairs} == {1, 3, 5} and any(p.answer_a == p.answer_b for p in pairs)
    losers = Counter(p.item for p in pairs if p.item)
    assert set(losers.values()) == {2, 3, 4, 5, 6}
    assert [p.id for p in pairs if p.item] == [f"{uid}/{k}" for uid, n in losers.items() for k in range(n)]


@needs_benchmarks
def test_real_files_make_their_pairs():
    pairs = read_benchmark(BENCHMARKS / "rmb", "rmb")
    assert Counter((p.domain, p.item != "") for p in pairs) == {
        ("Helpfulness", False): 83 + 52, ("Harmlessness", False): 317, ("Helpfulness", True): 42 + 36 + 36,
        ("Harmlessness", True): 194}
    assert len({p.item for p in pairs}) - 1 == 17 + 14 + 15 + 83
    pairs = read_benchmark(BENCHMARKS / "rm_bench", "rm-bench")
    assert Counter(p.domain for p in pairs) == dict.fromkeys(["chat", "code", "safety-refuse", "safety-response"], 540)
    assert [p.item for p in pairs] == sorted(p.item for p in pairs)


# ---- A/B order

@pytest.mark.parametrize("source", ["reward-bench", "rm-bench", "rmb"])
def test_balanced_order_is_exact_seeded_and_blind_to_texts(released, source):
    path = released[0][source]
    first, again, other = (read_benchmark(path, source, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and in_order(first) == in_order(other)
    assert sum(p.winner == "b" for p in first) == sum(p.winner == "b" for p in other) == len(first) // 2
    drawn = set(np.random.default_rng(0).permutation(len(first))[:len(first) // 2].tolist())
    assert [p.winner for p in first] == ["b" if i in drawn else "a" for i in range(len(first))]


@pytest.mark.parametrize("source", ["reward-bench", "rm-bench", "rmb"])
def test_published_order_shows_what_the_logs_say_was_shown(released, source):
    """Whole pairs, texts included: the benchmark's file in the published order, against the logs of those runs."""
    shown = {p.id: p for p in read_recorded(released[1])[0] if p.source == source}
    pairs = read_benchmark(released[0][source], source, order="published", seed=3)
    assert {p.id: p for p in pairs} == shown and len(pairs) == len(shown)
    assert 0.4 < np.mean([p.winner == "b" for p in pairs]) < 0.6


@needs_benchmarks
def test_published_order_is_the_recorded_one(tmp_path):
    table = json.loads((REWARD_BENCH / f"{DEEPSEEK}.outcome_table.json").read_text())
    recorded = sorted((dict(zip(table["columns"], row)) for row in table["rows"]), key=lambda row: row["source_index"])
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y", "subset": r["subset"], "id": r["id"]} for r in recorded]
    pairs = read_benchmark(save(tmp_path / "filtered.jsonl", rows), "reward-bench", order="published")
    flags = [p.winner == "b" for p in pairs]
    assert flags == [r[FLAG] for r in recorded] and (len(flags), sum(flags)) == (2985, 1494)
    assert Counter(r["subset"] for r in recorded) == ROWS and list(dict.fromkeys(p.subset for p in pairs)) == list(ROWS)
    for model in (QWEN, DEEPSEEK):
        sample = json.loads((REWARD_BENCH / f"{model}.logs.sample40.json").read_text())
        assert [flags[s["source_index"]] for s in sample] == [s["record"][FLAG] for s in sample]
        pairs, _ = read_recorded(OUTPUTS / model)
        assert published_order(pairs) == set(range(8)) and [p.winner for p in pairs] == ["b"] * 8


# ---- recorded outputs

def test_a_models_folder_gives_every_verdict_again(released):
    pairs, records = read_recorded(released[1])
    reward_bench, runs, rmb = released[2]
    assert len(pairs) == len(records) == 2985 + 9 * 1327 + sum(map(len, rmb.values()))
    by_id, wanted = {r["id"]: r for r in records}, {}
    for log in reward_bench:
        wanted[f"{log['subset']}/{log['id']}"] = log["results"], log[FLAG], log["answers"]
    for run, turned in zip(runs, ("012", "120", "201")):
        for log in run:
            for i, outcome in enumerate(zip(log["result"], log[FLAG], log["output"])):
                wanted[f"{log['id']}/{i}{turned[i]}"] = outcome
    for section, logs in rmb.items():
        met = Counter()
        for log in logs:
            name = f"{log['bon_uid']}/{met[log['bon_uid']]}" if "bon_uid" in log else log["pair_uid"]
            met[log.get("bon_uid")] += 1
            wanted[name] = log["results"], log[FLAG], log["answers"]
    assert by_id.keys() == wanted.keys()
    for name, (result, flag, text) in wanted.items():
        record = by_id[name]
        assert record["recorded"] == result == scores.is_right(record)
        assert record["winner"] == ("b" if flag else "a") and [v["text"] for v in record["votes"]] == [text]
    assert any(r["verdict"] is None for r in records)
    for pair in pairs:
        record = by_id[pair.id]
        assert (pair.source, pair.domain, pair.subset, pair.item, pair.winner) == tuple(
            record[key] for key in ("source", "domain", "subset", "item", "winner"))


def test_parts_of_a_release(released, tmp_path):
    part = released[1] / "RMB/BoN_set_Helpfulness/log_result"
    grouped, raw = read_recorded(part / "group_by_same_id_logs.json"), read_recorded(part / "raw_logs.json")
    assert grouped == raw == read_recorded(part) == read_recorded(part.parent)
    alone = save(tmp_path / "x/group_by_same_id_logs.json", {"0": released[2][2]["BoN_set_Helpfulness"]})
    assert read_recorded(alone.parent) == raw
    assert len(read_recorded(released[1] / f"RM-Bench/logs/total_dataset_2_{QWEN}.json")[1]) == 3 * 1327


def test_what_the_file_says_stands_beside_what_the_text_says(released, tmp_path):
    log = released[2][0][0]
    for text, flag, says, right in (("[[A]]", False, 0, True), ("[[A]]", True, 1, False), ("[[A]] [[B]]", True, 1, 0)):
        path = save(tmp_path / "logs.json", [log | {"answers": text, FLAG: flag, "results": says}])
        record, = read_recorded(path)[1]
        assert record["recorded"] == says and scores.is_right(record) == right


def test_own_judgements_come_back(released, tmp_path):
    pairs, records = read_recorded(released[1] / "RMB")
    extra = [record(f"p{i}{SWAPPED * s}", winner, verdicts, **({"swapped": True} if s else {}))
             for i, (winner, verdicts) in enumerate([("a", "ab"), ("b", "bbx"), (None, "a")]) for s in (0, 1)]
    save(tmp_path / "judgements.jsonl", records + extra)
    save(tmp_path / "scores.json", {"rows": []})
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    for path in (tmp_path, tmp_path / "judgements.jsonl"):
        again, read = read_recorded(path)
        assert again == pairs
        assert [r | {"recorded": None} for r in read] == [r | {"recorded": None} for r in records + extra]
        assert all(r["recorded"] == scores.is_right(r) for r in read)
        assert scores.score(read) == scores.score(records + extra)
    assert read_recorded(save(tmp_path / "alone/judgements.jsonl", extra))[0] == []


def test_own_verdicts_are_read_again_from_the_texts(tmp_path):
    """recorded is what the file counted, by its verdict; the votes' and the record's verdicts are the texts'."""
    said = record("p", "a", "aab") | {"verdict": "b"}
    said["votes"][2]["verdict"] = "a"
    older = {k: v for k, v in record("q", "b", "b").items() if k not in ("subset", "item")}
    read = read_recorded(save(tmp_path / "judgements.jsonl", [said, older]))[1]
    assert read == [record("p", "a", "aab") | {"recorded": 0}, record("q", "b", "b") | {"recorded": 1}]


def test_a_table_of_outcomes_has_no_texts(tmp_path):
    rows = [[7, True, 1, "hep-go"], ["x", False, 0, "donotanswer"]]
    pairs, records = read_recorded(save(tmp_path / "t.json", TABLE | {"rows": rows}))
    found = [tuple(r[key] for key in ("id", "winner", "recorded", "votes", "verdict", "domain")) for r in records]
    assert found == [("hep-go/7", "b", 1, [], None, "Reasoning"), ("donotanswer/x", "a", 0, [], None, "Safety")]
    assert pairs == []
    assert [scores.is_right(r) for r in records] == [True, False]
    out = save(tmp_path / "out/judgements.jsonl", records)   # as evaluate.py --from writes them, and reads them back
    assert read_recorded(out.parent)[1] == records


@needs_benchmarks
@pytest.mark.parametrize("model", [QWEN, DEEPSEEK])
def test_recorded_verdicts_of_rm_r1(model):
    """Every output in the released samples: 40 of RewardBench, wrapped with their place, and 2 of each RMB section."""
    for path, n in ((REWARD_BENCH / f"{model}.logs.sample40.json", 40), (OUTPUTS / model, 8)):
        pairs, records = read_recorded(path)
        assert [p.id for p in pairs] == [r["id"] for r in records] and len(records) == n
        assert all(scores.is_right(r) == (r["recorded"] == 1) and r["votes"] for r in records)
    assert Counter((r["domain"], r["item"] != "") for r in records) == {
        (domain, bon): 2 for domain in ("Helpfulness", "Harmlessness") for bon in (True, False)}


@needs_benchmarks
def test_the_broken_file_of_the_release_is_named_by_its_line():
    broken = OUTPUTS / QWEN / "RMB/BoN_set_Helpfulness/log_result/group_by_same_id_logs.json"
    with pytest.raises(ValueError) as e:
        read_recorded(broken)
    assert str(e.value).startswith(f"{broken}:62: malformed JSON")


def record(name, winner, verdicts, source="other", domain="d", subset="", item="", **more):
    """A judgement record with a vote of each letter's verdict ("x": none), as judge.py writes it."""
    texts = {"a": "so [[A]]", "b": "so [[B]]", "x": "[[A]] [[B]]"}
    votes = [{"text": texts[v], "n_tokens": 10 * i + 10, "finished": v != "x", "verdict": v if v != "x" else None,
              "seconds": 0.5 * i} for i, v in enumerate(verdicts)]
    ahead = verdicts.count("a") - verdicts.count("b")
    return {"id": name, "prompt_hash": "0" * 16, "n_prompt_tokens": 9, "votes": votes,
            "verdict": "a" if ahead > 0 else "b" if ahead < 0 else None, "winner": winner, "source": source,
            "domain": domain, "subset": subset, "item": item, "seconds": 1.0, **more}


# ---- mistakes

ROW, = reward_bench_rows({"hep-go": 1})
LOG, = reward_bench_logs([ROW], [1], [True], random.Random(1))
ITEM = rm_bench_items(random.Random(1), {"chat": 1})[0]
RUN = rm_bench_logs([ITEM], random.Random(1))[0][0]
TABLE = {"columns": ["id", FLAG, "results", "subset"], "rows": [[7, True, 1, "hep-go"]]}
(PAIRWISE,), = rmb_files(random.Random(1), {"Pairwise_set/Harmlessness/S1.json": 1}).values()


@pytest.mark.parametrize("source, records, message", [
    ("rmb", [PAIRWISE, ROW], "not a record of RMB: give the benchmark's own files"),
    ("reward-bench", [ROW, PAIRWISE], "not a record of RewardBench"),
    ("rm-bench", [ITEM, ROW], "not a record of RM-Bench"),
    ("reward-bench", [ROW, {k: v for k, v in ROW.items() if k != "subset"}], "not a record of RewardBench"),
    ("reward-bench", [ROW, LOG | {"id": 9, FLAG: False}], "a recorded output, no record of RewardBench itself"),
    ("reward-bench", [ROW, ROW | {"subset": "hep-golf"}], '"hep-golf" is no subset of RewardBench'),
    ("reward-bench", [ROW, ROW | {"prompt": "other"}], 'id "hep-go/0" is also at'),
    ("rm-bench", [ITEM, ITEM | {"id": "chat/9", "rejected": ["x", "y"]}], "3 chosen and 2 rejected answers"),
    ("rm-bench", [ITEM, ITEM | {"id": "chat/9", "chosen": list("vwxy")}], "4 chosen and 3 rejected answers"),
    ("rm-bench", [ITEM, ITEM | {"id": "chat/9", "domain": "chats"}], '"chats" is no domain of RM-Bench'),
    ("rm-bench", [ITEM, ITEM], "/00\" is also at"),
    ("rmb", [PAIRWISE, {k: v for k, v in PAIRWISE.items() if k != "reject"} | {"pair_uid": "2"}], 'no "reject"'),
    ("rmb", [PAIRWISE, PAIRWISE | {"pair_uid": "2", "category_path": "S1"}], 'neither "category_path" nor'),
])
def test_bad_benchmark_files(tmp_path, source, records, message):
    path = save(tmp_path / "x.jsonl", records)
    with pytest.raises(ValueError) as e:
        read_benchmark(path, source)
    line, = str(e.value).split("\n")
    assert message in line and line.startswith(f"{path}:2: ")
    assert len(read_benchmark(path, source, skip_bad=True)) == (9 if source == "rm-bench" else 1)


@pytest.mark.parametrize("name, records, message", [
    ("logs.json", [{k: v for k, v in LOG.items() if k != "answers"}], 'no "answers"'),
    ("logs.json", [{k: v for k, v in LOG.items() if k != "results"}], 'no "results"'),
    ("logs.json", [LOG | {"results": "1"}], '"results" is a string'),
    ("logs.json", [LOG | {FLAG: 1}], f'"{FLAG}" is an integer'),
    ("logs.json", [LOG | {"subset": "hep-golf"}], '"hep-golf" is no subset of RewardBench'),
    ("logs.json", [LOG, LOG], 'id "hep-go/0" is also at'),
    ("logs.json", [ROW], "no recorded output: its keys are none of"),
    ("final_result.json", {"chat": 0.5}, "no recorded output: its keys are none of"),
    ("logs.json", [RUN], "an RM-Bench log, and its name does not say which"),
    ("total_dataset_4_x.json", [RUN], "an RM-Bench log, and its name does not say which"),
    ("total_dataset_12_x.json", [RUN], "an RM-Bench log, and its name does not say which"),
    ("total_dataset_1_x.json", [RUN | {"result": [1, 1]}], "need 3 values each"),
    ("total_dataset_1_x.json", [RUN | {"chosen": RUN["chosen"][:2]}], "need 3 values each"),
    ("total_dataset_1_x.json", [{k: v for k, v in RUN.items() if k != FLAG}], f'no "{FLAG}"'),
    ("total_dataset_1_x.json", [RUN | {FLAG: ["no", "no", "yes"]}], FLAG),
    ("total_dataset_1_x.json", [RUN | {"result": [1, "x", 0]}], "result"),
    ("total_dataset_1_x.json", [RUN | {"result": [1, None, 0]}], "result"),
    ("total_dataset_1_x.json", [RUN | {"output": ["[[A]]", None, "[[B]]"]}], "output"),
    ("t.json", TABLE | {"rows": [[7, True, 1, "hep-golf"]]}, "'hep-golf' is no subset of RewardBench"),
    ("t.json", TABLE | {"rows": [[7, True, 1]]}, 'no "subset"'),
    ("t.json", TABLE | {"rows": [[7, 1, 1, "hep-go"]]}, f'"{FLAG}" is an integer'),
    ("t.json", TABLE | {"rows": [7]}, "row"),
    ("t.json", TABLE | {"rows": TABLE["rows"] * 2}, 'hep-go/7'),
    ("judgements.jsonl", [{"id": "p", "votes": []}], 'no "winner"'),
    ("judgements.jsonl", [record("p", "a", "a") | {"votes": [{"n_tokens": 1}]}], 'no "text"'),
    ("judgements.jsonl", [record("p", "a", "a") | {"votes": [7]}], "votes"),
    ("judgements.jsonl", [record("p", "A", "a")], "winner"),
    ("judgements.jsonl", [record("p", "a", "")], "recorded"),
    ("judgements.jsonl", [record("p", "a", "a")] * 2, 'id "p" is also at'),
    ("judgements.jsonl", [record("p", "a", "a", "reward-bench", "Chat", "easy")], "subset 'easy'"),
    ("judgements.jsonl", [record("p", "a", "a", "rmb", "Chat", "easy")], "domain 'Chat'"),
    ("judgements.jsonl", [record("chat/1/13", "a", "a", "rm-bench", "chat", "hard", "chat/1")], "id 'chat/1/13'"),
    ("judgements.jsonl", [record("chat/1/01", "a", "a", "rm-bench", "chats", "hard", "chat/1")], "domain 'chats'"),
    ("judgements.jsonl", [record("p", "a", "") | {"recorded": 7}], '"recorded" is 7'),
    *(("judgements.jsonl", [record("p", "a", "a") | {"votes": [{"text": "", **vote}]}], said) for vote, said in (
        ({"n_tokens": "7"}, "\"n_tokens\" is '7'"), ({"n_tokens": 10**400}, '"n_tokens" is'),
        ({"seconds": True}, "\"seconds\" is 'True'"), ({"seconds": float("nan")}, '"seconds" is'),
        ({"at": None}, '"at" is null'), ({"at": {"x": "a"}}, '"at" must give'),
        ({"at": {"7": "A"}}, '"at" must give'))),
])
def test_bad_recorded_outputs(tmp_path, name, records, message):
    path = save(tmp_path / name, records)
    with pytest.raises(ValueError) as e:
        read_recorded(path)
    line, = str(e.value).split("\n")
    assert line.startswith(f"{path}:") and message in line


def test_bad_outputs_can_be_skipped(tmp_path, capsys):
    path = save(tmp_path / "logs.jsonl", [LOG, LOG | {"id": 5, "results": None}, LOG | {"id": 6}])
    assert [r["id"] for r in read_recorded(path, skip_bad=True)[1]] == ["hep-go/0", "hep-go/6"]
    assert f'{path}:2: skipped: "results" is null' in capsys.readouterr().err
    with pytest.raises(ValueError, match="no such file"):
        read_recorded(tmp_path / "none")


def test_swapped_is_its_own_inverse():
    pair = Pair("p", [{"role": "user", "content": "q"}], "x", "y", "a", "s", "d", subset="t", item="i")
    assert swapped(pair) == replace(pair, answer_a="y", answer_b="x", winner="b") and swapped(swapped(pair)) == pair
    assert swapped(replace(pair, winner=None)).winner is None
