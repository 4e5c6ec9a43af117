"""Runs that are killed, told to stop, or fail on one rank; then what `--resume` makes of what they left.

    python tests/faults.py [--kills 20] [--seed 0]      up to eight minutes: a command of its own, not part of the tests

The oracle is the uninterrupted run on as many ranks: the metrics but for the seconds, the samples, and every bit of the
final weights. Two ranks on the CPU, a tiny model, a checkpoint a step; each fault at a random moment.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import toy  # noqa: E402
from model import Model, ModelConfig  # noqa: E402

TINY = toy.MODEL | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16}
COMMON = ["--prompt", "toy", "--dtype", "float32", "--save-every", "1", "--threads", "1", "--micro-tokens", "400"]
LOOPS = {
    "distill": [*COMMON, "--data", "distill.jsonl", "--model", "untrained", "--batch-size", "16", "--max-steps", "8",
                "--epochs", "9", "--optimizer", "muon", "--lr", "1e-2", "--eval-data", "heldout.jsonl",
                "--eval-every", "3", "--eval-tokens", "8"],
    "grpo": [*COMMON, "--data", "rl.jsonl", "--model", "distill-whole/model", "--n-prompts", "8", "--mini-prompts", "4",
             "--group-size", "4", "--steps", "8", "--max-new-tokens", "24", "--lr", "1e-3", "--eval-data",
             "heldout.jsonl", "--eval-every", "3"],
}
# A loop in which rank 1 does something to its second mini-batch
FAULTY = """
import math, os, sys
sys.path.insert(0, {root!r})
import grpo
from ending import together
from files import one_line_errors
from options import parse_config

accumulate, n_calls = grpo.accumulate_gradients, []

def accumulate_with_a_fault(cfg, ranks, model, *rest, **named):
    done = accumulate(cfg, ranks, model, *rest, **named)
    n_calls.append(1)
    if ranks.rank == 1 and {when}:
        {fault}
    return done
grpo.accumulate_gradients = accumulate_with_a_fault
with one_line_errors(), together(until_saved=True):
    grpo.main(parse_config(grpo.Config, grpo.RECIPES, embedded="toy"))
"""
NAN = "next(model.parameters()).grad.to_local().fill_(math.nan)"


def start(folder, script, out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script),
               *options, "--out", out]
    log = open(folder / f"{out}.log", "ab")
    return subprocess.Popen(command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
                            stdout=log, stderr=log, start_new_session=True)


def workers(process):
    """The ranks' processes, which torchrun has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == process.pid:
            found.append(int(stat.parent.name))
    return sorted(found)


def run(folder, loop, out):
    """To its end: from the beginning, or, if it was begun, from its newest checkpoint."""
    begun = (folder / out / "config.json").exists()
    process = start(folder, ROOT / f"{loop}.py", out, *(["--resume"] if begun else LOOPS[loop]))
    assert process.wait(timeout=300) == 0, (folder / f"{out}.log").read_text()[-3000:]


def rows(path):
    """Without what a clock says."""
    def untimed(pairs):
        return {key: value for key, value in pairs if not key.endswith(("_s", "seconds"))}
    return [json.loads(line, object_pairs_hook=untimed) for line in path.read_text().splitlines()]


def compare(folder, out, whole):
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(folder / out / name) == rows(folder / whole / name), f"{out}: {name}"
    x, y = (load_file(folder / name / "model/model.safetensors") for name in (out, whole))
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x), f"{out}: weights"


def kills(folder, loop, rng, n, seconds):
    """n times SIGKILL, to one rank or to all, each at a random moment of a run that the next one goes on with."""
    done, trial = 0, 0
    while done < n:
        trial += 1
        out, n_killed = f"{loop}-killed-{trial}", 0
        while done < n:
            begun = (folder / out / "config.json").exists()
            process = start(folder, ROOT / f"{loop}.py", out, *(["--resume"] if begun else LOOPS[loop]))
            try:
                process.wait(timeout=rng.uniform(0.2, 1.0) * seconds)
                break  # it was faster
            except subprocess.TimeoutExpired:
                pass
            ranks = workers(process)
            if rng.random() < 0.5 and ranks:
                os.kill(rng.choice(ranks), signal.SIGKILL)
                process.wait(timeout=60)  # torchrun, and the other rank
            else:
                for pid in [process.pid, *ranks]:  # torchrun first, which would tell the others
                    os.kill(pid, signal.SIGKILL)
                process.wait()
            n_killed, done = n_killed + 1, done + 1
        if not (folder / out / "model").exists():
            run(folder, loop, out)
        compare(folder, out, f"{loop}-whole")
        print(f"{loop}: equal after {n_killed} SIGKILLs", flush=True)


def stopped(folder, loop, rng):
    """SIGTERM to both ranks: they save, and end with 0."""
    out = f"{loop}-stopped"
    process = start(folder, ROOT / f"{loop}.py", out, *LOOPS[loop])
    while not (folder / out / "metrics.jsonl").exists():
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 1.0))  # less than the rest of the run takes
    for pid in workers(process):
        os.kill(pid, signal.SIGTERM)
    status = process.wait(timeout=60)
    said = (folder / f"{out}.log").read_text()
    assert status == 0, said[-3000:]
    n_rows = len(rows(folder / out / "metrics.jsonl"))
    assert "asked to stop (SIGTERM)" in said and n_rows < 8, (n_rows, said[-1000:])
    run(folder, loop, out)
    compare(folder, out, f"{loop}-whole")
    print(f"{loop}: equal after SIGTERM, after {n_rows} of 8 steps", flush=True)


def damaged(folder, loop, rng):
    """A bit of the newest checkpoint is another, or a file's end is missing: it is named, and so is the one before."""
    for what in ("flipped", "cut"):
        out = f"{loop}-{what}"
        shutil.copytree(folder / f"{loop}-stopped", folder / out)
        shutil.rmtree(folder / out / "model")
        newest = folder / out / "checkpoints/step-8"
        file = rng.choice(sorted(newest.glob("*.safetensors")))
        content = bytearray(file.read_bytes())
        if what == "cut":
            del content[rng.randrange(len(content)):]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        process = start(folder, ROOT / f"{loop}.py", out, "--resume")
        assert process.wait(timeout=60) != 0
        errors = [line for line in (folder / f"{out}.log").read_text().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and file.name in errors[0] and "step-7" in errors[0], errors
        newest.rename(folder / out / "moved")
        run(folder, loop, out)
        compare(folder, out, f"{loop}-whole")
        print(f"{loop}: {file.name} {what}: named; equal from the checkpoint before", flush=True)


def one_rank(folder):
    """An exception, and gradients that are not finite, on rank 1 alone."""
    def faulty(name, when, fault, *options):
        script = folder / f"{name}.py"
        script.write_text(FAULTY.format(root=str(ROOT), when=when, fault=fault))
        began = time.time()
        process = start(folder, script, name, *LOOPS["grpo"], *options)
        status = process.wait(timeout=120)
        return status, (folder / f"{name}.log").read_text(), time.time() - began
    status, said, seconds = faulty("raises", "len(n_calls) == 2", 'raise ValueError("rank 1 has no more of it")')
    errors = re.findall("error: .*", said)  # behind another rank's bar, perhaps
    assert status != 0 and errors == ["error: rank 1 has no more of it"], said[-3000:]
    print(f"an exception on one rank: both gone, with its line, {seconds:.0f} s after the start", flush=True)

    status, said, _ = faulty("one-nan", "len(n_calls) == 2", NAN)
    skipped = [row["n_skipped"] for row in rows(folder / "one-nan/metrics.jsonl")]
    assert status == 0 and skipped == [1] + 7 * [0], (skipped, said[-3000:])
    status, said, _ = faulty("all-nan", "len(n_calls) > 1", NAN)
    errors = re.findall("error: .*", said)  # behind another rank's bar, perhaps
    batch = rows(folder / "all-nan/stopped.jsonl")
    assert status != 0 and len(errors) == 1 and "3 optimizer steps in a row" in errors[0], said[-3000:]
    assert len(batch) == 4 * 4 and "judgement" in batch[0]
    print("gradients that are not finite on one rank: skipped on both; after three the run stopped, its batch kept")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy.write_data(folder, 1, n_distill=64, n_rl=40, n_heldout=10)
        n_vocab = toy.write_tokenizer(folder / "untrained")
        Model.random(ModelConfig.from_dict(TINY | {"vocab_size": n_vocab}), 1).save_pretrained(folder / "untrained")
        for loop in LOOPS:
            began = time.time()
            run(folder, loop, f"{loop}-whole")
            seconds = time.time() - began
            print(f"{loop}: {seconds:.0f} s uninterrupted", flush=True)
            kills(folder, loop, rng, args.kills // 2, seconds)
            stopped(folder, loop, rng)
            damaged(folder, loop, rng)
        one_rank(folder)


if __name__ == "__main__":
    main()
