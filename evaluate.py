"""How often a judge agrees with the labels: accuracy on a file of pairs, by domain and source, with 95% intervals.

    python evaluate.py --model runs/demo/grpo/model --data runs/demo/data/heldout.jsonl --out runs/eval
    python evaluate.py --model DIR --prompt instruct --data pairs.jsonl --votes 8 --temperature 1 --out runs/eval

Writes judgements.jsonl (every vote's text; resumable) and scores.json into --out, and prints the table.
"""

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from common import one_line_errors, parse_config
from data.pairs import read_pairs
from model import read_json
from reward import load_prompt
from sample import Judge, Sampler, check_sampling, judge_file, judge_settings, load_judge


@dataclass(frozen=True)
class Config:
    model: str = "runs/toy/grpo/model"  # Hugging Face folder of the judge
    data: str = "runs/toy/data/heldout.jsonl"  # labelled pairs, in any format that data/pairs.py reads
    out: str = "runs/eval"  # folder for judgements.jsonl and scores.json
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    limit: int = 0  # only the first so many pairs, 0 = all
    skip_bad: bool = False  # skip unreadable records and count them, instead of stopping before any work
    votes: int = 1  # judgements per pair; the verdict is their majority, a tie counts as wrong
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


def wilson(right, n, z=1.96):
    """95% interval of a share, (low, high) in [0, 1] (Wilson 1927): honest near 0 and 1, unlike +-z sqrt(pq/n)."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z * math.sqrt(p * (1 - p) / n + zz / (4 * n)) / (1 + zz)
    return max(0.0, middle - half), min(1.0, middle + half)


def score(records):
    """{"all": row, "domain X": row, "source Y": row}: n, right, accuracy, low, high, no_verdict (shares), n_tokens
    (mean a vote).

    A record is right when its majority verdict is its winner; none is wrong. Records without a label are left out.
    """
    groups = {}
    for r in records:
        if r["winner"] is not None:
            for name in ("all", f"domain {r['domain']}", f"source {r['source']}"):
                groups.setdefault(name, []).append(r)
    rows = {}
    for name, members in sorted(groups.items()):
        n, right = len(members), sum(r["verdict"] == r["winner"] for r in members)
        votes = [vote for r in members for vote in r["votes"]]
        rows[name] = {"n": n, "right": right, "accuracy": right / n, **dict(zip(("low", "high"), wilson(right, n))),
                      "no_verdict": sum(v["verdict"] is None for v in votes) / len(votes),
                      "n_tokens": sum(v["n_tokens"] for v in votes) / len(votes)}
    return rows


def table(rows):
    lines = [f"{'':24}{'pairs':>7}{'accuracy':>10}  {'95% interval':15}{'no verdict':>11}{'tokens':>8}"]
    for name, r in rows.items():
        lines.append(f"{name:24}{r['n']:7}{100 * r['accuracy']:10.1f}  {100 * r['low']:5.1f} to {100 * r['high']:5.1f} "
                     f"{100 * r['no_verdict']:12.1f}{r['n_tokens']:8.0f}")
    return "\n".join(lines)


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
        rows = score(records)
        domains = {f"eval_accuracy_{name[7:]}": r["accuracy"] for name, r in rows.items() if name.startswith("domain ")}
        return {"eval_accuracy": rows["all"]["accuracy"], **domains, "eval_no_verdict": rows["all"]["no_verdict"],
                "eval_tokens": rows["all"]["n_tokens"], "eval_s": time.perf_counter() - began}, records


def main(cfg):
    pairs = read_pairs(cfg.data, cfg.seed, cfg.skip_bad)
    pairs = pairs[:cfg.limit] if cfg.limit else pairs
    if all(pair.winner is None for pair in pairs):
        raise ValueError(f"{cfg.data}: no pair has a winner, nothing to score; sample.py judges unlabelled pairs")
    judge, out = load_judge(cfg), Path(cfg.out)
    settings = judge_settings(cfg, judge) | {"pairs": str(Path(cfg.data).resolve()), "limit": cfg.limit}
    whole = out / "judgements.jsonl"
    if not whole.exists():
        out.mkdir(parents=True, exist_ok=True)
        (out / "settings.json").write_text(json.dumps(settings))
        records = judge_file(judge, pairs, whole, settings, cfg.skip_bad)
    elif read_json(out / "settings.json") == settings:  # judged, but not scored: the run ended between the two
        records = [json.loads(line) for line in whole.read_text(encoding="utf-8").split("\n")[:-1]]
        pair_of = {pair.id: pair for pair in pairs}
        if not cfg.skip_bad and [r["id"] for r in records] != list(pair_of):
            raise ValueError(f"{whole}: judged other pairs than {cfg.data} holds now; choose another --out")
        records = [r | {"winner": pair_of[r["id"]].winner} for r in records if r["id"] in pair_of]  # perhaps corrected
    else:
        raise ValueError(f"{whole}: was judged with other settings (settings.json beside it); choose another --out")
    rows = score(records)
    temporary = out / "scores.json.tmp"
    temporary.write_text(json.dumps({"settings": settings, "scores": rows, **judge.sampler.stats()}, indent=2))
    os.replace(temporary, out / "scores.json")
    print(table(rows))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
