"""How often a judge agrees with people: RewardBench, RM-Bench, RMB by their own rules, or any labelled pairs.

    python evaluate.py --model DIR --rewardbench FILE --rmbench FILE --rmb FOLDER --out runs/eval
    python evaluate.py --model DIR --data heldout.jsonl --votes 8 --temperature 1 --out runs/eval
    python evaluate.py --from eval/result/RM-R1-Qwen2.5-Instruct-32B --out runs/rescored      scores recorded outputs
    torchrun --nproc_per_node 8 evaluate.py ...                                               the pairs shared out

Each pair is judged once, greedily, in a seeded A/B order that is recorded; a missing verdict is wrong. Written into
--out: pairs.jsonl (as they were shown), judgements.jsonl (every vote's text), scores.json (all that is printed).
Started again, it judges what is missing. report.py makes a page of it.

Departures from RM-R1's evaluation:

1. The A/B order is balanced and seeded, and the same in every environment; --order published gives theirs.
2. RM-Bench's headline is the intended matrix; as the published one was counted, with one rotation's file read twice,
   stands beside it under its own name.
3. RMB's folder is walked in sorted order, not in the file system's.
4. A model is asked with the prompt that it was trained with, or the one given; never by the letters of its path.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import scores
from benchmarks import read_benchmark, read_recorded
from common import init_ranks, one_line_errors, parse_config, write_whole
from data.pairs import SWAPPED, read_pairs, swapped, write_pairs
from model import read_json
from reward import load_prompt
from sample import (Judge, Sampler, check_sampling, judge_file, judge_settings, load_judge, refuse_others,
                    write_records)


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ("runs/toy/grpo/model",)  # Hugging Face folder of the judge; several stand side by side
    rewardbench: str | None = None  # RewardBench's rows as JSON lines
    rmbench: str | None = None  # RM-Bench's total_dataset.json, or the file of a domain, or a folder of such
    rmb: str | None = None  # RMB's folder, with Pairwise_set and BoN_set in it
    data: str | None = None  # labelled pairs in any format that data/pairs.py reads; by default the generated task's
    from_: tuple[str, ...] = ()  # score recorded outputs instead: judgements.jsonl, RM-R1's logs (a file or a folder)
    out: str = "runs/eval"  # folder for pairs.jsonl, judgements.jsonl and scores.json
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    order: str = "balanced"  # which answer is A: balanced (seeded), or published, as in RM-R1's recorded runs
    swap: bool = False  # judge every pair in the other order too: consistency and position bias
    limit: int = 0  # only the first so many records of each file, 0 = all
    skip_bad: bool = False  # skip unreadable records and count them, instead of stopping before any work
    votes: int = 1  # judgements per pair; the verdict is their majority, a tie counts as wrong
    budgets: str | None = None  # e.g. 512,1024,2048: also the scores had judgements ended after so many tokens
    temperature: float = 0.0  # 0 takes the likeliest token; votes need more
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # sample from so many likeliest tokens, 0 = all
    max_new_tokens: int = 8192  # longest judgement
    n_slots: int = 64  # judgements written at once
    seed: int = 0  # of the sampling, and of the A/B order where a source has chosen and rejected
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a judgement's bits do not depend on what is judged beside it; slower, needs a GPU

    def __post_init__(self):
        check_sampling(self)
        if self.order not in ("balanced", "published"):
            raise ValueError(f"--order is balanced or published, got {self.order}")
        given = [flag for flag in ("rewardbench", "rmbench", "rmb", "data") if getattr(self, flag)]
        if self.from_ and (given or self.swap or self.budgets or self.votes > 1):
            raise ValueError("--from scores what was recorded; it goes with --out and --skip-bad only")
        if max(budgets_of(self), default=0) > self.max_new_tokens:
            raise ValueError(f"--budgets: the largest is above --max-new-tokens {self.max_new_tokens}")


def budgets_of(cfg):
    parts = cfg.budgets.split(",") if cfg.budgets else []
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--budgets: {cfg.budgets!r} is not a list of token counts like 512,1024")
    return tuple(sorted({int(part) for part in parts}))


class HeldOut:
    """The evaluation inside a training loop: greedy judgements of some pairs, shared out over the ranks."""

    def __init__(self, path, n_pairs, prompt, max_new_tokens, tokenizer, ranks):
        self.pairs = [pair for pair in read_pairs(path) if pair.winner is not None][:n_pairs]
        if not self.pairs:
            raise ValueError(f"{path}: no labelled pairs to evaluate on")
        self.prompt, self.max_new_tokens, self.tokenizer = load_prompt(prompt), max_new_tokens, tokenizer
        self.ranks = ranks

    def judge(self, model):
        """({"eval_accuracy", "eval_accuracy_DOMAIN", "eval_no_verdict", "eval_tokens", "eval_s"}, the records)."""
        began = time.perf_counter()
        judge = Judge(Sampler(model), self.tokenizer, self.prompt, self.max_new_tokens)
        mine = [record for _, record in judge.judge(self.pairs[self.ranks.rank::self.ranks.world])]
        records = [record for share in self.ranks.gather(mine) for record in share]
        everything, *rows = scores.pairs(records)
        domains = {f"eval_accuracy_{r['name']}": r["score"] for r in rows if r["kind"] == "domain"}
        return {"eval_accuracy": everything["score"], **domains, "eval_no_verdict": everything["no_verdict"],
                "eval_tokens": everything["tokens"], "eval_s": time.perf_counter() - began}, records


def read_all(cfg):
    """The pairs of every file given, in the order in which they will be judged."""
    files = {"reward-bench": cfg.rewardbench, "rm-bench": cfg.rmbench, "rmb": cfg.rmb}
    parts = [read_benchmark(path, source, cfg.order, cfg.seed, cfg.skip_bad) for source, path in files.items() if path]
    if cfg.data or not parts:
        path = cfg.data or "runs/toy/data/heldout.jsonl"
        parts.append(read_pairs(path, cfg.seed, cfg.skip_bad))
        if all(pair.winner is None for pair in parts[-1]):
            raise ValueError(f"{path}: no pair has a winner, nothing to score; sample.py judges unlabelled pairs")
    pairs = []
    for part in parts:
        kept = set(list(dict.fromkeys(pair.item or pair.id for pair in part))[:cfg.limit or None])
        pairs += [pair for pair in part if (pair.item or pair.id) in kept]
    if len({pair.id for pair in pairs}) < len(pairs):
        raise ValueError("two of the files given have pairs of the same id; evaluate them one by one")
    return pairs


def judge_all(cfg, pairs, out, ranks):
    """Judges what out/judgements.jsonl does not hold yet; returns all records (on rank 0), what made them, and the
    sampler's statistics."""
    judge = replace(load_judge(cfg), budgets=budgets_of(cfg))
    settings, whole = judge_settings(cfg, judge), out / "judgements.jsonl"
    to_judge = pairs + [replace(swapped(pair), id=pair.id + SWAPPED) for pair in pairs] if cfg.swap else pairs
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
        if whole.exists():
            reopen(whole, settings, {pair.id for pair in to_judge}, cfg.skip_bad)
        (out / "settings.json").write_text(json.dumps(settings))
        write_pairs(out / "pairs.jsonl", pairs)
    return judge_file(judge, to_judge, whole, settings, cfg.skip_bad, ranks), settings, judge.sampler.stats()


def reopen(whole, settings, wanted, skip_bad):
    """Turns a finished judgements file back into a partial one: what it lacks is judged, what it has is not."""
    if read_json(whole.with_name("settings.json")) != settings:
        raise ValueError(f"{whole}: was judged with other settings (settings.json beside it); choose another --out")
    text = whole.read_text(encoding="utf-8")
    if not skip_bad:
        refuse_others(whole, [json.loads(line)["id"] for line in text.split("\n")[:-1]], wanted)
    write_whole(f"{whole}.partial", json.dumps(settings) + "\n" + text)
    whole.unlink()


def rescore(cfg, source, out):
    """Scores recorded outputs; returns (the rows, how many recorded verdicts came out again)."""
    pairs, records = read_recorded(source, cfg.skip_bad)
    again, settings = [r for r in records if r["votes"] and "recorded" in r], {"from": str(Path(source).resolve())}
    differ = [r["id"] for r in again if scores.is_right(r) != (r["recorded"] == 1)]
    reproduced = {"n": len(again), "same": len(again) - len(differ), "differ": differ}
    whole, own = (out / "judgements.jsonl").resolve(), Path(source).resolve()
    if whole not in (own, own / "judgements.jsonl"):  # scored again where they lie, only the scores are new
        if whole.exists() and read_json(out / "settings.json") != settings:
            raise ValueError(f"{out}: holds other judgements; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").write_text(json.dumps(settings))
        if pairs:  # a table of outcomes has no texts
            write_pairs(out / "pairs.jsonl", pairs)
        write_records(whole, records)
    return records, settings, {"reproduced": reproduced}


def write_scores(out, model, records, settings, run):
    """Scores the records, writes out/scores.json and returns what stands in it."""
    if not any(r["winner"] for r in records):
        raise ValueError(f"{out}: none of {len(records)} judgements has a label, nothing to score")
    budgets = set.intersection(*({int(n) for n in vote.get("at", {})} for r in records for vote in r["votes"] or [{}]))
    result = {"model": model, "settings": settings, "rows": scores.score(records),
              "positions": scores.position_rows(records), "swap": scores.swap_rows(records),
              "budgets": scores.budget_rows(records, sorted(budgets)), "run": run}
    if not result["rows"]:
        raise ValueError(f"{out}: nothing to score: no item of RM-Bench has all nine of its pairs")
    write_whole(out / "scores.json", json.dumps({key: value for key, value in result.items() if value != []}, indent=2))
    return result


def show(result):
    """Prints everything that is in scores.json, but for the settings."""
    print(f"\n{result['model']}\n\n{scores.table(result['rows'])}\n")
    for title in ("positions", "swap"):
        if result[title]:
            print(scores.wide_table(result[title], title) + "\n")
    if result["budgets"]:
        print(scores.table([{**row, "kind": f"after {row['budget']} tokens"} for row in result["budgets"]]) + "\n")
    again = result["run"].get("reproduced")
    if again and again["n"]:
        print(f"{again['same']} of {again['n']} recorded outcomes came out again" +
              (f"; not these: {' '.join(again['differ'][:20])}" if again["differ"] else "") + "\n")
    print(", ".join(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in result["run"].items() if name != "reproduced"))


def short_names(paths):
    """The last parts of each path, as few as tell them apart."""
    parts = [Path(os.path.abspath(path).removesuffix(".json").removesuffix(".jsonl")).parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["-".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names) and (n > 1 or "model" not in names):
            return names
    raise ValueError(f"{paths[0]}: is given twice")


def main(cfg):
    ranks = init_ranks(cfg.threads)
    sources, pairs = cfg.from_ or cfg.model, [] if cfg.from_ else read_all(cfg)
    results = []
    for folder in () if cfg.from_ else cfg.model:
        read_json(Path(folder) / "config.json")  # a wrong path is told before hours of judging with another model
    for source, name in zip(sources, short_names(sources)):
        out, began = Path(cfg.out) / name if len(sources) > 1 else Path(cfg.out), time.perf_counter()
        records, settings, run = (rescore(cfg, source, out) if cfg.from_ else
                                  judge_all(replace(cfg, model=source), pairs, out, ranks))
        if ranks.main:
            tokens = [vote["n_tokens"] for r in records for vote in r["votes"]]
            run = {"judgements": len(tokens), "tokens": None if None in tokens else sum(tokens),
                   "wall_s": time.perf_counter() - began} | run
            results.append(write_scores(out, name, records, settings, run))
            show(results[-1])
    if len(results) > 1:
        print("\n" + scores.side_by_side({r["model"]: r["rows"] for r in results}))
        write_whole(Path(cfg.out) / "scores.json", json.dumps({"models": results}, indent=2))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
