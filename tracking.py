"""Where else a run's rows go, if it is asked to: Weights & Biases (--wandb) and TensorBoard (--tensorboard).

Both packages are optional and imported where they are used. The run's record is metrics.jsonl: it is written first.
"""

import atexit
import importlib.util
import json
import secrets
import sys
from pathlib import Path

from files import write_whole


def check_trackers(project, tensorboard):
    """ValueError if a package asked for is not installed, or wandb will refuse the project's name."""
    for package, asked in (("wandb", project), ("tensorboard", tensorboard)):
        spec = importlib.util.find_spec(package) if asked else None
        if asked and (spec is None or spec.origin is None):  # no origin: a mere folder of that name; wandb makes one
            raise ValueError(f"--{package} needs the package {package}: pip install {package}")
    if project and set(project) & set("/\\#?%:"):
        raise ValueError(f"--wandb: a project's name has none of / \\ # ? % :, got {project!r} "
                         "(a team is named by WANDB_ENTITY)")


def open_trackers(project, tensorboard, folder, options):
    """The trackers asked for, each with log(row) and close(exit_code). Only the process that writes the folder opens
    them, when metrics.jsonl holds the rows that the run goes on from: none, or those up to the checkpoint it resumes.
    """
    folder, rows, trackers = Path(folder), [], []
    if (folder / "metrics.jsonl").exists():
        with open(folder / "metrics.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    if project:
        trackers.append(WandbTracker(project, folder, options, rows))
    if tensorboard:
        trackers.append(TensorboardTracker(folder, rows))
    return trackers


class WandbTracker:
    """One run of wandb for a run's folder, however often it is resumed: its id lies there, as wandb-id."""

    def __init__(self, project, folder, options, rows):
        import wandb
        id_file = folder / "wandb-id"
        if not id_file.exists():
            write_whole(id_file, secrets.token_hex(8))
        # wandb leaves stdout alone, and gives up a server that does not answer two minutes after the end of the run
        settings = wandb.Settings(console="off", quiet=True, finish_timeout=120)
        try:
            self.run = wandb.init(project=project, dir=folder, name=folder.resolve().name, config=options,
                                  id=id_file.read_text(), resume="allow", reinit="create_new", settings=settings)
        except wandb.Error as e:
            raise ValueError(f"--wandb: {e} (WANDB_MODE=offline logs without a server)") from None
        # A run that comes to its end closes with 0. Any other is marked as failed when the process exits: wandb's own
        # hook does not see a SystemExit, which errors of one line and Ctrl-C end in, and would say 0.
        atexit.register(self.close, 1)
        self.errors = (wandb.Error, OSError)
        self.run.define_metric("*", step_metric="step")  # the x axis of every chart
        self.first_step = self.run.starting_step  # the server has the rows before it; offline none are known
        for row in rows:  # what a killed run logged last had not been sent, and offline not been written
            self.log(row)

    def log(self, row):
        if self.run is None or row["step"] < self.first_step:  # wandb would drop the row too, with a warning for each
            return
        row = {key: value for key, value in row.items() if value is not None}
        # A network that is down raises nothing here: wandb keeps the rows on disk and sends them later. What raises is
        # that its helper process has died; the training goes on without it.
        try:
            self.run.log(row, step=row["step"], commit=True)  # uncommitted, a row would wait for the next one
        except self.errors as e:
            print(f"--wandb: {e}; nothing more is logged there, metrics.jsonl goes on", file=sys.stderr)
            self.run = None

    def close(self, exit_code):
        run, self.run = self.run, None
        try:
            if run is not None:
                run.finish(exit_code=exit_code)
        except self.errors as e:
            print(f"--wandb: {e}; the run is not closed there", file=sys.stderr)


class TensorboardTracker:
    """Event files in the run's folder. They lie on the disk of metrics.jsonl, and fail only where it fails."""

    def __init__(self, folder, rows):
        from torch.utils.tensorboard import SummaryWriter
        first_step = rows[-1]["step"] + 1 if rows else 1
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=first_step)  # what follows supersedes

    def log(self, row):
        for key, value in row.items():
            if key != "step" and value is not None:  # step is the axis
                self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()  # else a killed run would lack rows from before its checkpoint

    def close(self, exit_code):
        self.writer.close()
