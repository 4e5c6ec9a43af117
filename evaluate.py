"""How often a judge is right: on RewardBench, RM-Bench, RMB, JudgeBench, RewardBench 2 by their own rules, or on any
labelled pairs.

    python evaluate.py --model DIR --rewardbench FILE --rmbench FILE --rmb FOLDER --out runs/eval
    python evaluate.py --model DIR --judgebench FOLDER --swap --out runs/judgebench             its official score
    python evaluate.py --model DIR --rewardbench2 FILE --protocol four-way --out runs/four      pairwise, ratings
    python evaluate.py --model DIR --data heldout.jsonl --votes 8 --temperature 1 --out runs/eval
    python evaluate.py --from eval/result/RM-R1-Qwen2.5-Instruct-32B --out runs/rescored      scores recorded outputs
    torchrun --nproc_per_node 8 evaluate.py ...                                               the pairs shared out
    torchrun --nproc_per_node 8 evaluate.py --sampler-ranks 4 ...          in two shares, the model split over 4 GPUs

Each pair is judged once, greedily, in a seeded A/B order that is recorded; a missing verdict is wrong. Written into
--out: pairs.jsonl (as they were shown), judgements.jsonl (every vote's text), scores.json (all that is printed).
Started again, it judges what is missing. `python -m report` makes a page of it.

Departures from RM-R1's evaluation:

1. The A/B order is balanced and seeded, and the same in every environment; --order published gives theirs.
2. RM-Bench's headline is the intended matrix; as the published one was counted, with one rotation's file read twice,
   stands beside it under its own name.
3. RMB's folder is walked in sorted order, not in the file system's.
4. A model is asked with the prompt that it was trained with, or the one given; never by the letters of its path.
5. JudgeBench and RewardBench 2 are none of RM-R1's; which of their scores are official and which ours, the rows say.
"""

import json
import os
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

from benchmarks import reward_bench_2, scores
from benchmarks.judge_bench import read_judge_bench
from benchmarks.records import read_benchmark, read_recorded
from common import init_ranks
from data.pairs import JUDGE_BENCH, SWAPPED, both_orders, note_one_label, read_pairs, with_rubric, write_pairs
from ending import together
from files import check_settings, one_line_errors, refuse_file, write_records, write_whole
from folder import read_json
from judge import check_judging, judge_settings, load_judge, prompt_for, rubric_of
from judgements import encode_all, judge_file, judged, key_of, refuse_others
from options import check_choice, check_sampler_ranks, flag_of, parse_config
from sample import make_split


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ()  # Hugging Face folder of the judge; several stand side by side
    rewardbench: str | None = None  # RewardBench's rows as JSON lines
    rmbench: str | None = None  # RM-Bench's total_dataset.json, or the file of a domain, or a folder of such
    rmb: str | None = None  # RMB's folder, with Pairwise_set and BoN_set in it
    judgebench: str | None = None  # a file of JudgeBench, or the folder with both, which are scored apart
    rewardbench2: str | None = None  # RewardBench 2's rows as JSON lines
    protocol: str = "pairwise"  # of RewardBench 2: pairwise (ours), four-way (one of four), ratings (each alone)
    ties: bool = False  # pairwise also for RewardBench 2's Ties, a diagnostic; only ratings give its score
    data: str | None = None  # labelled pairs in any format that data/pairs.py reads
    from_: tuple[str, ...] = ()  # score recorded outputs instead: judgements.jsonl, RM-R1's logs, JudgeBench's outputs
    out: str = "runs/eval"  # folder for pairs.jsonl, judgements.jsonl and scores.json
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    order: str = "balanced"  # which answer is A: balanced (seeded), or published, as in recorded runs
    rubric: str | None = None  # a file: what to weigh by, where a pair has no rubric of its own
    swap: bool = False  # judge every pair in the other order too: consistency and position bias
    limit: int = 0  # only the first so many records of each benchmark, 0 = all
    skip_bad: bool = False  # skip unreadable records and count them, instead of stopping before any work
    votes: int = 1  # judgements per pair; the verdict is their majority, a tie counts as wrong
    budgets: str | None = None  # e.g. 512,1024,2048: also the scores had judgements ended after so many tokens
    temperature: float = 0.0  # 0 takes the likeliest token; votes need more
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # sample from so many likeliest tokens, 0 = all
    max_new_tokens: int = 8192  # longest judgement
    n_slots: int = 64  # judgements written at once, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # GB of keys and values of what is written at once; 0 = what is free
    eager: bool = False  # on a GPU, write without CUDA graphs: slower, to look for a fault
    sampler_ranks: int = 1  # so many GPUs of a node write together, a part of the model on each: 1, 2, 4 or 8
    seed: int = 0  # of the sampling, and of the A/B order where a source has chosen and rejected
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a judgement's bits do not depend on what is judged beside it; slower, needs a GPU

    def __post_init__(self):
        check_judging(self)
        check_sampler_ranks(self, self.batch_invariant)
        check_choice(self, "order", "balanced", "published")
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        others = [name for name in changed if name not in ("from_", "out", "skip_bad", "threads")]
        if self.from_ and others:
            raise ValueError(f"--from scores what was recorded: {flag_of(others[0])} does not go with it")
        to_judge = [name for name in ("data", *PUBLISHED, "rewardbench2") if getattr(self, name)]
        if bool(self.model) != bool(to_judge):
            raise ValueError("--model and what it is to judge (--data, --rewardbench, --rmbench, --rmb, --judgebench "
                             "or --rewardbench2) need each other; without both, the generated task's")
        if self.order == "published" and (self.skip_bad or self.rewardbench2 or not set(PUBLISHED) & set(to_judge)):
            raise ValueError("--order published is of these benchmarks, and of all their records: give some of "
                             "--rewardbench, --rmbench, --rmb and --judgebench, without --skip-bad; RewardBench 2 has "
                             "none")
        check_protocol(self, to_judge)
        if max(budgets_of(self), default=0) > self.max_new_tokens:
            raise ValueError(f"--budgets: the largest is above --max-new-tokens {self.max_new_tokens}")


PUBLISHED = ("rewardbench", "rmbench", "rmb", "judgebench")  # whose A/B order is known


def check_protocol(cfg, to_judge):
    check_choice(cfg, "protocol", "pairwise", "four-way", "ratings")
    if cfg.ties and not (cfg.rewardbench2 and cfg.protocol == "pairwise"):
        raise ValueError("--ties is about the pairs of --rewardbench2; --protocol ratings has its Ties anyway")
    if cfg.protocol == "pairwise":
        return
    if to_judge != ["rewardbench2"]:
        raise ValueError(f"--protocol {cfg.protocol} judges no pairs: give --rewardbench2, and no others beside it")
    for name in ("swap", "budgets", "rubric"):
        if getattr(cfg, name):
            raise ValueError(f"{flag_of(name)} is about pairs: --protocol {cfg.protocol} has none")
    if cfg.protocol == "ratings" and cfg.votes > 1:
        raise ValueError("--votes is about verdicts, and --protocol ratings has none: one rating for each answer")


def budgets_of(cfg):
    parts = cfg.budgets.split(",") if cfg.budgets else []
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(f"--budgets: {cfg.budgets!r} is not a list of token counts like 512,1024")
    return tuple(sorted({int(part) for part in parts}))


def read_all(cfg):
    """The pairs of every file given, in the order in which they will be judged; in a protocol without pairs, Tasks."""
    files = {"reward-bench": cfg.rewardbench, "rm-bench": cfg.rmbench, "rmb": cfg.rmb}
    parts = [read_benchmark(path, source, cfg.order, cfg.seed, cfg.skip_bad) for source, path in files.items() if path]
    if cfg.data:
        parts.append(read_pairs(cfg.data, cfg.seed, cfg.skip_bad))
        if all(pair.winner is None for pair in parts[-1]):
            raise ValueError(f"{cfg.data}: no pair has a winner, nothing to score; judge.py judges unlabelled pairs")
    if cfg.judgebench:
        found = read_judge_bench(cfg.judgebench, cfg.order, cfg.seed, cfg.skip_bad)
        parts += [[pair for pair in found if pair.source == source] for source in JUDGE_BENCH.values()]
    if cfg.rewardbench2 and cfg.protocol == "pairwise":
        parts.append(reward_bench_2.read_pairwise(cfg.rewardbench2, cfg.seed, cfg.skip_bad, cfg.ties))
    elif cfg.rewardbench2 and cfg.protocol == "four-way":
        parts.append(reward_bench_2.read_four_way(cfg.rewardbench2, cfg.seed, cfg.skip_bad))
    elif cfg.rewardbench2:
        parts.append(reward_bench_2.read_to_rate(cfg.rewardbench2, cfg.skip_bad))
    pairs = []
    for part in parts:
        names = [pair.item or pair.id for pair in part]  # whole items: nine pairs, or a best-of-n
        items = list(dict.fromkeys(names))
        kept = set(items[:cfg.limit] if cfg.limit else items)
        pairs += [pair for pair, name in zip(part, names) if name in kept]
    if bad := [pair.id for pair in pairs if pair.id.endswith(SWAPPED)]:
        raise ValueError(f"pair {bad[0]}: ids that end in {SWAPPED} are of judgements in the other order: rename it")
    if len({pair.id for pair in pairs}) < len(pairs):
        raise ValueError("two of the files given have pairs of the same id; evaluate them one by one")
    return pairs


def judge_all(cfg, pairs, out, ranks, split):
    """Judges what out/judgements.jsonl does not hold yet; returns all records (on rank 0), what made them, and the
    sampler's statistics."""
    refuse_pairs(out)
    judge = load_judge(cfg, budgets_of(cfg), split)
    settings = judge_settings(cfg, judge) | {"order": cfg.order}
    shown = pairs
    if cfg.protocol != "pairwise":
        pairs = reward_bench_2.as_shown(pairs, judge.prompt)
        shown = [replace(pair, winner=None) for pair in pairs]  # one letter of four is no pair's label
        judge = replace(judge, verdict_of=reward_bench_2.VERDICT_OF[cfg.protocol])
        settings["protocol"] = cfg.protocol
    file = out / "judgements.jsonl"
    exchanged = [both_orders(pair)[1] for pair in pairs] if cfg.swap else []
    encoded = encode_all(judge, pairs + exchanged, cfg.skip_bad, quiet=not ranks.main)
    if ranks.main and file.exists():
        reopen(file, settings, {key_of(pair, ids) for pair, ids in encoded})

    def begin():
        write_whole(out / "settings.json", json.dumps(settings))
        write_pairs(out / "pairs.jsonl", shown)

    return judge_file(judge, encoded, file, settings, ranks, begin), settings, judge.sampler.stats()


def refuse_pairs(out):
    """Before pairs.jsonl is written: one that no evaluation has written is somebody's data."""
    for name in ("pairs.jsonl", "tokenizer.json"):
        if (out / name).exists() and not (out / "settings.json").exists():
            raise ValueError(f"{out / name}: is already there, and is no evaluation's; choose another --out")


def reopen(file, settings, wanted):
    """Turns a finished judgements file back into a partial one: what it lacks is judged, what it has is not."""
    beside = file.with_name("settings.json")
    check_settings(beside, beside.read_bytes() if beside.exists() else b"", settings)
    text = file.read_bytes()
    refuse_others(file, judged(file, text.split(b"\n")[:-1]), wanted)
    write_whole(f"{file}.partial", json.dumps(settings).encode() + b"\n" + text)
    file.unlink()


def save_recorded(source, out, pairs, records, settings):
    """Writes what was read from source into out, unless it lies there: then only the scores are new."""
    if Path(source).resolve() in (out.resolve(), (out / "judgements.jsonl").resolve()):
        return
    beside = out / "settings.json"
    ours = beside.exists() and read_json(beside) == settings
    if any(out.glob("judgements.jsonl*")) and not ours:
        raise ValueError(f"{out}: holds other judgements; choose another --out")
    refuse_pairs(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(beside, json.dumps(settings))
    if pairs:  # a table of outcomes has no texts
        write_pairs(out / "pairs.jsonl", pairs)
    write_records(out / "judgements.jsonl", records)


def compare_recorded(records):
    """How many outcomes, read from the texts again, are those that were recorded; and which are not."""
    again = [r for r in records if r["votes"] and "recorded" in r]
    differ = [r["id"] for r in again if scores.is_right(r) != (r["recorded"] == 1)]
    return {"n": len(again), "same": len(again) - len(differ), "differ": differ}


def write_scores(out, model, records, settings, extra):
    """Scores the records, writes out/scores.json and returns what stands in it; extra: what else is to stand there."""
    if not any(map(scores.counts, records)):
        raise ValueError(f"{out}: none of {len(records)} judgements has a label, nothing to score")
    votes = [vote for r in records for vote in r["votes"]]
    tokens = [vote["n_tokens"] for vote in votes]
    order = settings["order"] if "order" in settings else None
    result = {"model": model, "settings": settings, "rows": scores.score(records, order),
              "positions": scores.position_rows(records), "swap": scores.swap_rows(records),
              "budgets": scores.budget_rows(records, budgets_in(votes), order), "judgements": len(votes),
              "left_out": scores.n_incomplete(records), "tokens": None if None in tokens else sum(tokens)} | extra
    if not result["rows"]:
        raise ValueError(f"{out}: nothing to score among {len(records)} judgements: no item is whole")
    write_whole(out / "scores.json", json.dumps({key: value for key, value in result.items() if value != []}, indent=2))
    return result


def budgets_in(votes):
    """The budgets for which every one of these votes has a verdict."""
    budgets = [vote["at"] if "at" in vote else {} for vote in votes]
    return sorted(int(n) for n in budgets[0] if all(n in at for at in budgets)) if votes else []


def show(result):
    """Prints what is in scores.json."""
    print(f"\n{result['model']}\n\n{scores.table(result['rows'])}\n\n{scores.LEGEND}\n")
    for row in result["rows"]:
        if row["kind"] == "overall" and row["of"] and row["n"] < row["of"]:
            print(f"{row['benchmark']} is not whole: {row['n']} of {row['of']} items; means are over what is there\n")
    for benchmark, n in result["left_out"].items():
        if n:
            print(f"{benchmark}: {n} items lack some of their judgements and are left out where those count\n")
    for title in ("positions", "swap"):
        if result[title]:
            print(scores.quantity_table(result[title], title) + "\n")
    if result["budgets"]:
        print(scores.table([{**row, "kind": f"after {row['budget']} tokens"} for row in result["budgets"]]) + "\n")
    if "recorded" in result and result["recorded"]["n"]:
        again = result["recorded"]
        print(f"{again['same']} of {again['n']} recorded outcomes came out again" +
              (f"; not these: {' '.join(again['differ'][:20])}" if again["differ"] else ""))
    print(f"{result['judgements']} judgements" + (f", {result['tokens']} tokens" if result["tokens"] else ""))
    if "session" in result:
        print("this session: " + ", ".join(f"{name} {value:.1f}" for name, value in result["session"].items()))


def short_names(paths):
    """The last parts of each path, as few as tell them apart."""
    parts = [Path(os.path.abspath(path).removesuffix(".json").removesuffix(".jsonl")).parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["-".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names) and (n > 1 or "model" not in names):
            return names
    raise ValueError(f"{paths[0]}: is given twice")


def sources_of(path):
    """The folders that evaluate.py made of several models, or the one source."""
    below = sorted(file.parent for file in Path(path).glob("*/judgements.jsonl"))
    return [str(folder) for folder in below] if below and not Path(path, "judgements.jsonl").exists() else [path]


def evaluate_models(cfg, ranks):
    """Judges with one model after another; returns what stands in their scores.json (on rank 0)."""
    pairs, results = with_rubric(read_all(cfg), rubric_of(cfg), ranks.main), []
    if ranks.main:
        note_one_label([pair.winner for pair in pairs], cfg.data or "the pairs")
    for folder in cfg.model:
        # what is wrong is told before hours of judging with another model
        prompt = prompt_for(folder, cfg.prompt, cfg.rubric)
        if cfg.protocol != "pairwise":
            reward_bench_2.as_shown(pairs[:1], prompt)
    split = make_split(ranks, *cfg.model)
    for folder, name, out in places(cfg.model, cfg.out):
        began = time.perf_counter()
        records, settings, stats = judge_all(replace(cfg, model=folder), pairs, out, ranks, split)
        if ranks.main:
            session = {"wall_s": time.perf_counter() - began, **stats}  # of rank 0, since this start
            results.append(write_scores(out, name, records, settings, {"session": session}))
            show(results[-1])
    return results


def score_recorded(cfg):
    """Reads one source of recorded outputs after another; returns what stands in their scores.json."""
    sources, results = [source for path in cfg.from_ for source in sources_of(path)], []
    for source, name, out in places(sources, cfg.out):
        pairs, records = read_recorded(source, cfg.skip_bad)
        settings = {"from": str(Path(source).resolve())} | recorded_order(source)
        save_recorded(source, out, pairs, records, settings)
        results.append(write_scores(out, name, records, settings, {"recorded": compare_recorded(records)}))
        show(results[-1])
    return results


def recorded_order(source):
    """{"order": ...} of an evaluation of ours, {} of other outputs."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    settings = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    return {"order": settings["order"]} if "order" in settings else {}


def places(sources, out):
    """[(source, its name, the folder for its files)]: --out itself, or a folder in it for each of several."""
    names = short_names(sources)
    return [(source, name, Path(out, name) if len(sources) > 1 else Path(out)) for source, name in zip(sources, names)]


def main(cfg):
    refuse_file(cfg.out)
    if not (cfg.model or cfg.from_):  # the embedded default, as grpo.py leaves it
        cfg = replace(cfg, model=("runs/toy/grpo/model",), data="runs/toy/data/heldout.jsonl")
        if not Path(cfg.model[0]).exists():
            raise ValueError(f"{cfg.model[0]}: is not there; python grpo.py makes it, or give --model and --data")
    ranks = init_ranks(cfg.threads, cfg.sampler_ranks)
    if cfg.from_ and ranks.world > 1:
        raise ValueError("--from needs one process: start it with python, not torchrun")
    results = score_recorded(cfg) if cfg.from_ else evaluate_models(cfg, ranks)
    if len(results) > 1:
        print("\n" + scores.side_by_side({result["model"]: result["rows"] for result in results}))
        write_whole(Path(cfg.out) / "scores.json", json.dumps({"models": results}, indent=2))


if __name__ == "__main__":
    with one_line_errors(), together():
        main(parse_config(Config))
