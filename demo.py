"""The whole story on two CPU cores: an untrained model, three ways of training it, one table.

    python demo.py                        what `make demo` runs
    python demo.py --seed 1 --out runs/demo-1

A 0.49M-parameter model learns to judge generated pairs (data/toy.py): half are reasoning tasks with one right answer,
half are chats to be judged by a weighted rubric. Stages: supervised fine-tuning on the bare verdicts; distillation of
an oracle's chains, most of which do not check the answers; GRPO from the distilled model, paid by verdicts alone. The
last line is JSON.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

import distill
import grpo
from data import toy
from data.pairs import read_pairs, write_pairs
from draw import Sampling
from evaluate import write_scores
from files import one_line_errors, refuse_file, write_records, write_whole
from judge import Judge
from options import check_between, parse_config, refuse_ranks
from prompt import load_prompt
from sample import Sampler, load_model

TITLES = {"untrained": "untrained", "answer_only": "answer-only SFT", "distilled": "distilled",
          "grpo": "distilled + GRPO"}
MARK = "demo.json"  # a folder with this file was made by a demo, and the next demo may replace it


@dataclass(frozen=True)
class Config:
    out: str = "runs/demo"  # folder of the demo; an earlier demo there is replaced
    seed: int = 0  # of the data, the initial weights, the data order and the rollouts
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    pairs: int = 800  # held-out pairs that every model judges

    def __post_init__(self):
        check_between(self, 20, 800, "pairs")
        check_between(self, 0, 4096, "threads")
        check_between(self, 0, 2**40 - 1, "seed")


def judge_all(model_folder, pairs, temperature, seed, out):
    """Judges the pairs, leaves a folder like evaluate.py's; returns the scores by name, and the shares of judgements
    that begin with the right solution or rubric and that check both answers."""
    model, tokenizer = load_model(model_folder, "cpu", "float32")
    sampling = Sampling(max_new_tokens=64, temperature=temperature, stop=tokenizer.stop_ids, seed=seed)
    judge = Judge(Sampler(model, n_slots=400), tokenizer, load_prompt("toy"), sampling)
    done = dict(tqdm(judge.judge(pairs), f"judge {out.name}", len(pairs), leave=False))
    records = [done[i] for i in range(len(pairs))]
    out.mkdir(parents=True)
    write_pairs(out / "pairs.jsonl", pairs)
    write_records(out / "judgements.jsonl", records)
    settings = {"model": str(model_folder), "temperature": temperature, "seed": seed}
    result = write_scores(out, out.name, records, settings, {"session": judge.sampler.stats()})
    texts = [record["votes"][0]["text"] for record in records]
    grounded = sum(toy.is_grounded(pair.prompt[0]["content"], text) for pair, text in zip(pairs, texts)) / len(texts)
    careful = sum(toy.is_careful(text) for text in texts) / len(texts)
    return {row["name"]: row for row in result["rows"]}, grounded, careful


def main(cfg):
    began = time.perf_counter()
    out = Path(cfg.out)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    refuse_ranks("demo.py")
    refuse_file(out)
    if out.exists():
        if not (out / MARK).exists():
            raise ValueError(f"{out}: is there and was not made by a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text("{}")
    distill.make_embedded_default(out, cfg.seed)
    data = {name: str(out / "data" / f"{name}.jsonl") for name in ("distill", "rl", "heldout")}

    sft = replace(distill.Config(**distill.RECIPES["toy"]), model=str(out / "untrained"), data=data["distill"],
                  eval_data=None, save_every=0, seed=cfg.seed, threads=cfg.threads)
    rl = replace(grpo.Config(**grpo.RECIPES["toy"]), model=str(out / "distilled/model"), data=data["rl"],
                 eval_data=data["heldout"], save_every=0, seed=cfg.seed, threads=cfg.threads)
    few = out / "data" / "answer_only.jsonl"  # a seventh: from step 40 on its loss stands at that of a coin
    with open(data["distill"], "rb") as file:
        write_whole(few, b"".join(islice(file, 100 * sft.batch_size)))
    stages = [("answer_only", distill.main, replace(sft, answer_only=True, data=str(few))),
              ("distilled", distill.main, sft),
              ("grpo", grpo.main, rl)]
    seconds = {"untrained": 0.0}
    for name, train, stage in stages:
        start = time.perf_counter()
        train(replace(stage, out=str(out / name)))
        seconds[name] = time.perf_counter() - start

    pairs = read_pairs(data["heldout"])[:cfg.pairs]
    lines, accuracy = [], {}
    for name, title in TITLES.items():
        folder = out / name if name == "untrained" else out / name / "model"
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            judged = out / "judgements" / f"{name}-{how}"
            # an untrained model writes no verdict, and never ends: a hundred of that are enough
            shown = pairs[:100] if name == "untrained" else pairs
            scores, grounded, careful = judge_all(folder, shown, temperature, cfg.seed, judged)
            everything = scores["all"]
            lines.append(f"{title:17} {how:8}{percent(everything):>19}{percent(scores['reasoning']):>20}"
                         f"{percent(scores['chat']):>20}{everything['tokens']:8.1f}{100 * grounded:9.1f}"
                         f"{100 * careful:9.1f}{seconds[name]:9.0f}")
            accuracy[name, how] = round(100 * everything["score"], 1)
    print(f"\nAccuracy in % (95% interval) on {len(pairs)} held-out pairs (untrained: {min(len(pairs), 100)}). tokens: "
          "mean judgement length.\nsolves: % of judgements that begin with the right solution or the right weights. "
          "checks: % that check both\nanswers. seconds: training of the stage.\n")
    print(f"{'':26}{'all':>19}{'reasoning':>20}{'chat':>20}{'tokens':>8}{'solves':>9}{'checks':>9}{'seconds':>9}")
    print("\n".join(lines))
    print(f"\nJudge a pair of your own:  .venv/bin/python judge.py --model {out}/grpo/model "
          "--question 'sort 40718' --answer-a 01478 --answer-b 01487\n"
          f"Read the judgements and runs:  .venv/bin/python -m report {out}\n")
    summary = {name: accuracy[name, "greedy"] for name in TITLES} | {"grpo_sampled": accuracy["grpo", "sampled"]}
    summary["seconds"] = round(time.perf_counter() - began, 1)
    (out / MARK).write_text(json.dumps(summary | {"seed": cfg.seed, "stage_seconds": seconds}))
    print(json.dumps(summary))


def percent(row):
    return f"{100 * row['score']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"


if __name__ == "__main__":
    os.environ.setdefault("TQDM_MININTERVAL", "0.5")
    with one_line_errors():
        main(parse_config(Config))
