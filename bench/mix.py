"""data/mix.py on a made-up pool: seconds and peak memory.

    python -m bench.mix --pairs 10000 80000 --tokenizer DIR
    python -m bench.mix --pairs 10000                            prompts are not measured; words are made-up letters

A pair has 7.5 KB on average, its parts' lengths lognormal: an eighth math, an eighth code, the rest chats, of which a
quarter are conversations. Words are drawn by Zipf's law, with a tokenizer from its vocabulary, so that a word is about
a token. 2 of 100 pairs repeat an earlier one, 2 more repeat it with every 100th word another; the benchmark has 3,000
prompts, one for 500 pairs being theirs. mix.py runs as a process of its own; its peak is what the system counts. There
is no peer; JSON line last.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS_OF = {"prompt": 180, "chosen": 525, "rejected": 525}  # on average, of six letters or so


def vocabulary(tokenizer, rng):
    """15,000 words, each with a space before it."""
    if tokenizer is None:
        letters = np.array(list("etaoinshrdlucmfwypvbgk"))
        return [" " + "".join(letters[rng.integers(0, len(letters), rng.integers(2, 10))]) for _ in range(15_000)]
    pieces = (tokenizer.decode([i]) for i in range(tokenizer.n_vocab))
    return [piece for piece in pieces if re.fullmatch(" [a-z]{2,12}", piece)][:15_000]


def texts(words, rng):
    """Yields lists of words of the lengths of a prompt and two answers, by turns."""
    weights = 1 / np.arange(10, len(words) + 10)
    cumulative = np.cumsum(weights / weights.sum())
    words = np.array(words)
    while True:
        for mean in WORDS_OF.values():
            n = max(3, int(rng.lognormal(np.log(mean) - 0.32, 0.8)))  # the mean of a lognormal is exp(mu + 0.32)
            yield words[np.minimum(np.searchsorted(cumulative, rng.random(n)), len(words) - 1)]


def make(folder, n, words, rng):
    """The sources' files, named as data/fetch.py names them, and a benchmark's; returns their options."""
    made, names = texts(words, rng), ("math-step-dpo", "code-preference-pairs", "skywork-80k")
    files = [open(folder / f"{name}.jsonl", "w") for name in names]
    repeated, planted = None, []
    for i in range(n):
        which = (0, 1, 2, 2, 2, 2, 2, 2)[i % 8]
        place = i % 50
        if place == 25:                   # what came eight pairs before, in the same source
            parts = repeated
        elif place == 33:
            parts = [np.where(rng.random(len(part)) < 0.01, " other", part) for part in repeated]
        else:
            parts = [next(made) for _ in WORDS_OF]
            repeated = parts if place == 17 else repeated
        prompt, chosen, rejected = ("".join(part.tolist()).strip() for part in parts)
        planted += [prompt] if i % 500 == 100 else []
        record = {"id": f"{names[which]}/{i}", "source": names[which], "domain": ("math", "code", "chat")[which]}
        if which < 2:
            record |= {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        else:
            record["source"] = "helpsteer2"
            talk = [prompt[:80], "Yes.", prompt[80:] or "And?"] if i % 4 == 3 else [prompt]
            for key, last in (("chosen", chosen), ("rejected", rejected)):
                record[key] = [{"role": ("user", "assistant")[k % 2], "content": text}
                               for k, text in enumerate([*talk, last])]
        files[which].write(json.dumps(record) + "\n")
    for file in files:
        file.close()
    with open(folder / "bench.jsonl", "w") as file:
        for prompt in planted + ["".join(next(made).tolist()) for _ in range(3000 - len(planted))]:
            file.write(json.dumps({"prompt": prompt, "chosen": "x", "rejected": "y"}) + "\n")
    return ["--math", f"{folder}/{names[0]}.jsonl", "--code", f"{folder}/{names[1]}.jsonl",
            "--skywork", f"{folder}/{names[2]}.jsonl", "--benchmarks", f"{folder}/bench.jsonl"]


def measure(options):
    """(seconds, peak resident MB) of one process."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / "data" / "mix.py"), *options],
                               env=os.environ | {"TQDM_DISABLE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: data/mix.py ended with {status}")
    return time.perf_counter() - began, usage.ru_maxrss / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000])
    parser.add_argument("--tokenizer", help="a model's folder: measure prompts with it, too")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    words = vocabulary(args.tokenizer and Tokenizer(args.tokenizer), rng)
    lengths = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    rows = []
    for n in args.pairs:
        with tempfile.TemporaryDirectory() as name:
            options = make(Path(name), n, words, rng)
            n_bytes = sum(f.stat().st_size for f in Path(name).iterdir())
            seconds, peak_mb = measure([*options, *lengths, "--out", f"{name}/out"])
        rows.append({"pairs": n, "mb": n_bytes / 1e6, "seconds": seconds, "per_10000_s": 1e4 * seconds / n,
                     "peak_mb": peak_mb})
        print(f"{n} pairs, {n_bytes / 1e6:.0f} MB: {seconds:.1f} s, {1e4 * seconds / n:.1f} s per 10,000; "
              f"peak {peak_mb:.0f} MB")
    print(json.dumps({"bench": "mix", "device": "cpu", "threads": os.cpu_count(), "tokenizer": bool(args.tokenizer),
                      "runs": [{key: round(value, 2) for key, value in row.items()} for row in rows]}))


if __name__ == "__main__":
    main()
