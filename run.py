"""The folder of a training run: what a run writes, how it is resumed, and why it stops."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from checkpoint import Checkpoints, check_whole, numbered, save_model
from files import append, parse_json, refuse_file, write_records, write_whole
from options import PLANNING, flag_of, saved_options
from tracking import check_trackers, open_trackers

MAX_SKIPPED = 3  # optimizer steps in a row without a finite loss and gradient, and the run ends
ROUNDING = "sums are added in another order, so it is not bit for bit the run without the change"
NO_MATTER = {  # options of both loops that may change on --resume, and what changes with them
    "micro_tokens": ROUNDING, "threads": ROUNDING, "eval_data": "", "eval_pairs": "", "eval_every": "", "n_samples": "",
    "save_every": "", "keep": "", "keep_best": "", "wandb": "", "tensorboard": "", "offload": "",
}


class Run:
    """runs/NAME/: config.json, metrics.jsonl (a flat row a step), samples.jsonl, checkpoints/step-N/. Rank 0 writes."""

    def __init__(self, config, ranks, may_change=None):
        """Checks the folder config.out and writes nothing. A new run refuses a folder that already holds one; with
        config.resume other options than the run's own are refused, but for those of may_change: {name: what changes
        with it, or ""}."""
        self.folder, self.ranks, self.config = Path(config.out), ranks, config
        self.before, self.changed, self.trackers = None, {}, []
        check_trackers(config.wandb, config.tensorboard)
        refuse_file(self.folder)
        if config.resume:
            self.before = saved_options(type(config), self.folder)
            self.changed = self.changes(may_change or {})
            for name in ("metrics.jsonl", "samples.jsonl"):
                rows_until(self.folder / name, math.inf)  # a damaged one is told before any work
        else:
            refuse_taken(self.folder)
        found = numbered(self.folder / "checkpoints") if config.resume else []
        self.found = ranks.gather(found)[0]  # rank 0's: a file system that is shared may show another one less
        self.checkpoint = self.found[-1] if self.found else None

    def changes(self, may_change):
        """{name: [before, now]} of the options that have changed; ValueError if one of them may not."""
        options = dataclasses.asdict(self.config)
        changed = {}
        for name, value in options.items():
            # what an earlier version of a script did not have, its runs had at the default
            before = self.before[name] if name in self.before else getattr(type(self.config), name)
            if name in ("resume", "out", *PLANNING) or value == before:
                continue
            if name not in may_change:
                raise ValueError(f"{self.folder / 'config.json'}: the run was started with {flag_of(name)} {before}, "
                                 f"not {value}; leave the option out to go on with the run's own")
            changed[name] = [before, value]
            if may_change[name] and self.ranks.main:
                print(f"note: {flag_of(name)} was {before}, is {value} from here on: {may_change[name]}")
        return changed

    def weights(self):
        """The folder to begin from: --model, or the newest checkpoint, if all of its files are as they were written."""
        if self.checkpoint is None:
            return self.config.model
        before = self.found[-2] if len(self.found) > 1 else "the beginning"
        try:
            check_whole(self.checkpoint, self.ranks)
        except ValueError as e:
            raise ValueError(f"{e}; with {self.checkpoint} moved away, --resume goes on from {before}") from None
        return self.checkpoint

    def begin(self, step, n_steps):
        """Before the first step that this process makes, `step` being done: writes config.json, and drops the rows
        that an interrupted run wrote after its last checkpoint."""
        if step > n_steps:
            raise ValueError(f"{self.folder}: {step} steps are done already, so it cannot end after {n_steps}")
        if self.ranks.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / "config.json"
            options, start = dataclasses.asdict(self.config), {"command": sys.argv, **machine(self.ranks)}
            options = {name: value for name, value in options.items() if name not in PLANNING}
            record = {"options": options, **start}
            if self.before is not None:
                first = parse_json(file.read_bytes())
                record = first | {"options": options | {"resume": False}}
                record["resumed"] = first.get("resumed", []) + [{"step": step, "changed": self.changed, **start}]
                print(f"{self.folder}: goes on after step {step} of {n_steps}")
            write_whole(file, json.dumps(record, indent=2))
            self.truncate(step)
            self.trackers = open_trackers(self.config.wandb, self.config.tensorboard, self.folder, options)
        self.ranks.barrier()
        self.best = self.best_accuracy()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.keep, self.ranks)

    def close(self):
        for tracker in self.trackers:
            tracker.close(0)

    def row(self, file, row):
        """Adds a row; a number that is not finite is null in it, since JSON has no other word for it."""
        if self.ranks.main:
            finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
            append(self.folder / file, finite)
            if file == "metrics.jsonl":
                for tracker in self.trackers:
                    tracker.log(finite)

    def truncate(self, step):
        """Drops rows past `step`, and a half-written line."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (self.folder / name).exists():
                write_whole(self.folder / name, b"".join(line + b"\n" for line in rows_until(self.folder / name, step)))

    def best_accuracy(self):
        """The best eval_accuracy so far, if the model that had it was kept; else -1."""
        metrics = self.folder / "metrics.jsonl"
        if not (self.folder / "best").exists() or not metrics.exists():
            return -1.0
        rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
        return max((row["eval_accuracy"] for row in rows if "eval_accuracy" in row), default=-1.0)

    def keep_if_best(self, row, model, add_files, dtype):
        """With --keep-best, keeps the model of this row as best/ if it was evaluated and none before was as good."""
        if not self.config.keep_best or row.get("eval_accuracy", -1) <= self.best:
            return
        self.best = row["eval_accuracy"]

        def add_accuracy(folder):
            (folder / "best.json").write_text(json.dumps({key: row[key] for key in ("step", "eval_accuracy")}))
            add_files(folder)
        save_model(self.folder / "best", model, self.ranks, add_accuracy, dtype)

    def leave(self, step, *state):
        """After SIGTERM: saves, as Checkpoints.save does, and ends the run."""
        self.checkpoints.save(step, *state)
        self.checkpoints.wait()
        if self.ranks.main:
            print(f"{self.folder}: asked to stop (SIGTERM): step {step} is saved, --resume goes on")
        self.close()

    def stop(self, why, batch=()):
        """Ends the run with one line and no model/; the batch that it could not take is kept in stopped.jsonl."""
        self.checkpoints.wait()
        if batch and self.ranks.main:
            write_records(self.folder / "stopped.jsonl", batch)
            why += f" (the last one's texts are in {self.folder / 'stopped.jsonl'})"
        kept = [self.config.model, *numbered(self.folder / "checkpoints")]
        raise ValueError(f"{self.folder}: stopped, {why}; no model/ is written, the last good weights are in "
                         f"{kept[-1]}: start another run from there, with a lower --lr")


def machine(ranks):
    """What a reader needs to repeat a run: commit, versions, device."""
    def git(*args):
        if shutil.which("git") is None:
            return None
        out = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
        return out.stdout.strip() if out.returncode == 0 else None
    changes = git("status", "--porcelain")
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes),
            "torch": torch.__version__, "python": sys.version.split()[0], "device": device, "ranks": ranks.world,
            "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def refuse_taken(folder):
    """Before a new run: it would go among another's files, or take the place of a model's config.json, say."""
    if (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder}: already holds a run; --resume continues it, --out chooses another folder")
    config = folder / "config.json"
    ours = config.is_file() and b'"options"' in config.read_bytes()  # of a run that was ended before its first row
    for name in ("config.json", "samples.jsonl", "checkpoints", "model", "best"):
        if (folder / name).exists() and not (ours and name == "config.json"):
            raise ValueError(f"{folder / name}: is already there, and is no part of a run; choose another --out")


def rows_until(path, step):
    """The whole lines, as bytes, of a run's rows up to a step; none if there is no such file."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else (), 1):
        try:
            rows += [line] if parse_json(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: is no row of a run; mend the line, or take it out") from None
    return rows
