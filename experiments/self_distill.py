"""Does a judge get better by imitating its own right judgements?

The embedded default's distilled model (distill.py --recipe toy) judges the rl split's 3,200 labelled pairs, up to
--samples times each; the first judgement that is right and well formed is kept (oracle.py with a local teacher and no
second pass: rejection sampling, or one round of expert iteration). From the distilled model three models are then
trained, for equally many steps of equally many chains and with the same learning rates:

    original    on the original oracle's chains again: the control, what further training alone does
    own         on the model's own chains, which replace the others
    mixed       on both, half and half

Held-out pairs are only judged. The distilled model's faults are habits of its oracle (data/toy.py): it rarely checks,
and weighs words alike. A judgement that checks is right more often, so it should be more frequent among those that are
kept.

    python -m experiments.self_distill --out runs/self-0 --seed 0              four minutes on two CPU cores
    python -m experiments.self_distill --out runs/self-0 --base runs/demo      with the demo's data and distilled model

The last line is JSON.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import distill
import oracle
from data import toy
from data.pairs import read_chains, read_pairs, write_pairs
from demo import judge_all, percent
from files import one_line_errors, refuse_existing_folder
from options import check_at_least, check_between, parse_config, refuse_ranks


@dataclass(frozen=True)
class Config:
    out: str = "runs/self-distill"  # folder, which must not be there yet
    base: str | None = None  # a demo's folder: take its data/ and distilled/model; without it they are made
    samples: int = 8  # judgements of a pair at most
    steps: int = 200  # optimizer steps of each of the three trainings, 32 chains a step
    lr: float = 1e-3  # their peak; the distillation's was 5e-3
    pairs: int = 800  # held-out pairs that every model judges
    seed: int = 0  # of the data, the first model, the samples and the data order

    def __post_init__(self):
        check_between(self, 1, 1024, "samples")
        check_at_least(self, 1, "steps")
        check_at_least(self, 1e-9, "lr")
        check_between(self, 20, 800, "pairs")
        check_between(self, 0, 2**40 - 1, "seed")


def make_base(out, seed):
    """Data and distilled model, as the demo makes them."""
    distill.make_embedded_default(out, seed)
    distill.main(replace(distill.Config(**distill.RECIPES["toy"]), model=str(out / "untrained"),
                         data=str(out / "data/distill.jsonl"), out=str(out / "distilled"), eval_data=None, save_every=0,
                         seed=seed))


def habits(chains):
    """Shares of the chains that check both answers, and that begin with the right solution or weights."""
    checks = sum(toy.is_careful(c.judgement) for c in chains) / len(chains)
    solves = sum(toy.is_grounded(c.pair.prompt[0]["content"], c.judgement) for c in chains) / len(chains)
    return checks, solves


def main(cfg):
    began = time.perf_counter()
    refuse_ranks("self_distill.py")
    out = Path(cfg.out)
    refuse_existing_folder(out)
    base = Path(cfg.base) if cfg.base else out / "base"
    if not cfg.base:
        make_base(base, cfg.seed)
    model, data = base / "distilled/model", base / "data"
    pairs = read_pairs(data / "heldout.jsonl")[:cfg.pairs]

    oracle.main(oracle.Config(data=str(data / "rl.jsonl"), teacher=str(model), samples=cfg.samples, attempts=0,
                              max_new_tokens=96, n_slots=400, seed=cfg.seed, out=str(out / "oracle")))
    own = read_chains(out / "oracle/chains.jsonl")
    original = read_chains(data / "distill.jsonl")
    arms = {"original": original, "own": own, "mixed": own + original[:len(own)]}

    folders = {"distilled": model}
    for name, chains in arms.items():
        write_pairs(out / f"{name}.jsonl", chains)
        epochs = 1 + cfg.steps * 32 // len(chains)  # enough: max_steps ends it
        distill.main(replace(distill.Config(**distill.RECIPES["toy"]), model=str(model),
                             data=str(out / f"{name}.jsonl"), out=str(out / name), eval_data=None, save_every=0,
                             epochs=epochs, max_steps=cfg.steps, lr=cfg.lr, seed=cfg.seed))
        folders[name] = out / name / "model"

    lines, summary = [], {"seed": cfg.seed}
    for name, folder in folders.items():
        for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            scores, solves, checks = judge_all(folder, pairs, temperature, cfg.seed, out / f"judgements/{name}-{how}")
            row = scores["all"]
            lines.append(f"{name:10}{how:8}{percent(row):>19}{row['tokens']:8.1f}{100 * solves:9.1f}"
                         f"{100 * checks:9.1f}")
            summary[f"{name}_{how}"] = round(100 * row["score"], 1)
    print(f"\n{'':18}{'all':>19}{'tokens':>8}{'solves':>9}{'checks':>9}")
    print("\n".join(lines))
    print(f"\nAccuracy in % (95% interval) on {len(pairs)} held-out pairs; solves, checks: as in the demo's table.\n")
    for name, chains in arms.items():
        checks, solves = habits(chains)
        print(f"the chains {name}: {len(chains)}, of which {100 * checks:.1f} % check and {100 * solves:.1f} % solve")
        summary[f"{name}_checks"] = round(100 * checks, 1)
    summary |= {"kept": len(own), "steps": cfg.steps, "lr": cfg.lr, "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(summary))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
