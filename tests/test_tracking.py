"""Trackers. Oracle: the rows that were logged, against what the packages' own files hold when they are read back."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tracking
from data import toy
from test_distill import write_model

ROOT = Path(tracking.__file__).parent
ROWS = [{"step": step, "loss": 1 / step, "kl": None if step == 2 else 0.5 * step, "n_tokens": 100 + step}
        for step in range(1, 8)]  # thirds and sevenths: a value that went through float32 would not come back


def known(row):
    return {key: value for key, value in row.items() if value is not None}


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_missing_package_is_one_line(monkeypatch, tmp_path):
    tracking.check_trackers(None, False)
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    tracking.check_trackers(None, False)
    with pytest.raises(ValueError, match="^--wandb needs the package wandb: pip install wandb$"):
        tracking.check_trackers("project", False)
    with pytest.raises(ValueError, match="^--tensorboard needs the package tensorboard: pip install tensorboard$"):
        tracking.check_trackers(None, True)


def test_a_folder_named_wandb_is_not_the_package(monkeypatch, tmp_path):
    """Python takes any folder on its path for a package; wandb makes one of its own name where it is used."""
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="pip install wandb"):
        tracking.check_trackers("project", False)


def test_a_project_that_wandb_refuses_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: SimpleNamespace(origin="there"))
    tracking.check_trackers("my project-1", False)
    with pytest.raises(ValueError, match="got 'team/project'.*WANDB_ENTITY"):
        tracking.check_trackers("team/project", False)


def test_nothing_is_imported_unless_asked_for(tmp_path):
    code = ("import sys, tracking; tracking.check_trackers(None, False); "
            "assert tracking.open_trackers(None, False, sys.argv[1], {}) == []; "
            "print({'wandb', 'tensorboard', 'torch'} & set(sys.modules))")
    out = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "set()\n" and list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- wandb, by the file it writes

LOGS = """
import json, sys, tracking
rows, options = json.loads(sys.argv[2]), json.loads(sys.argv[3])
tracker, = tracking.open_trackers("judges", False, sys.argv[1], options)
for row in rows:
    tracker.log(row)
"""
FAILS = LOGS + "raise SystemExit(2)\n"  # as a run ends that fails with one line
ENDS = LOGS + "tracker.close(0)\n"


def run_offline(script, folder, rows, options):
    """Runs the script in a process of its own; returns the records of the file that wandb wrote."""
    before = set(folder.glob("wandb/offline-run-*/*.wandb"))
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script, folder, json.dumps(rows), json.dumps(options)], cwd=folder,
                          env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if script == FAILS else 0), done.stderr
    assert "Traceback" not in done.stderr and "WARNING" not in done.stderr and done.stdout == "", done.stderr
    new, = set(folder.glob("wandb/offline-run-*/*.wandb")) - before
    return list(read_records(new))


def read_records(path):
    """wandb's offline file is LevelDB's log format: after 7 bytes, blocks of 32 KiB with pieces of records in them."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:  # no room for a piece's head
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7:place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the whole of a record, its last piece
            yield Record.FromString(record)
            record = b""


def history(records):
    """[(step, row)] without the keys that wandb adds."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            rows.append((record.history.step.num, {k: v for k, v in items.items() if not k.startswith("_")}))
    return rows


def only(records, kind):
    found, = [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]
    return found


def test_wandb_holds_the_rows_and_a_resumed_run_lacks_none(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed (requirements-dev.txt)")
    folder = tmp_path / "grpo-7"
    write_rows(folder, [])
    options = {"lr": 0.001, "out": "runs/x", "eval_data": None, "model": ["a", "b"]}
    records = run_offline(FAILS, folder, ROWS[:5], options)
    assert history(records) == [(row["step"], known(row)) for row in ROWS[:5]]
    first = only(records, "run")
    assert (first.project, first.display_name) == ("judges", "grpo-7")
    config = {item.key: json.loads(item.value_json) for item in first.config.update if item.key != "_wandb"}
    assert config == options
    axis = only(records, "metric")
    assert (axis.glob_name, axis.step_metric) == ("*", "step")
    assert only(records, "exit").exit_code == 1

    # resumed from the checkpoint of step 3: 4 and 5 come again, and the file holds the whole run
    write_rows(folder, ROWS[:3])
    records = run_offline(ENDS, folder, ROWS[3:], options)
    assert history(records) == [(row["step"], known(row)) for row in ROWS]
    assert only(records, "run").run_id == first.run_id == (folder / "wandb-id").read_text()
    assert only(records, "exit").exit_code == 0


# ---------------------------------------------------------------------------------- wandb, by what it is asked to do


class FakeRun:
    def __init__(self, starting_step):
        self.starting_step, self.logged, self.codes, self.is_dead = starting_step, [], [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row, step, commit):
        if self.is_dead:
            raise ConnectionResetError("Connection lost")  # as wandb 0.31 does when its helper process was killed
        assert commit and step == row["step"] >= self.starting_step
        self.logged.append(step)

    def finish(self, exit_code):
        if self.is_dead:
            raise ConnectionResetError("Connection lost")
        self.codes.append(exit_code)


def open_fake(monkeypatch, folder, run):
    fake = SimpleNamespace(Error=RuntimeError, Settings=SimpleNamespace, init=lambda **options: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tracker, = tracking.open_trackers("judges", False, folder, {})
    return tracker


def test_a_server_gets_the_rows_that_it_lacks(monkeypatch, tmp_path):
    """Killed after step 5, whose row and 4's had not been sent; or after step 5 with a checkpoint of step 3."""
    write_rows(tmp_path, ROWS[:5])
    run = FakeRun(starting_step=4)
    open_fake(monkeypatch, tmp_path, run).log(ROWS[5])
    assert run.logged == [4, 5, 6]

    write_rows(tmp_path, ROWS[:3])
    run = FakeRun(starting_step=6)
    tracker = open_fake(monkeypatch, tmp_path, run)
    for row in ROWS[3:]:
        tracker.log(row)
    assert run.logged == [6, 7]
    tracker.close(0)
    tracker.close(1)  # at the exit of a process whose run came to its end
    assert run.codes == [0]


def test_a_dead_tracker_does_not_end_the_training(monkeypatch, tmp_path, capsys):
    run = FakeRun(starting_step=0)
    tracker = open_fake(monkeypatch, tmp_path, run)
    tracker.log(ROWS[0])
    run.is_dead = True
    for row in ROWS[1:]:
        tracker.log(row)
    tracker.close(0)
    assert run.logged == [1]
    assert capsys.readouterr().err == "--wandb: Connection lost; nothing more is logged there, metrics.jsonl goes on\n"


def test_a_server_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    fake = SimpleNamespace(Error=RuntimeError, Settings=SimpleNamespace)

    def init(**options):
        raise RuntimeError("No API key configured.")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(ValueError, match=r"^--wandb: No API key configured. \(WANDB_MODE=offline"):
        tracking.open_trackers("judges", False, tmp_path, {})


# -------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_holds_the_rows_and_a_resumed_run_supersedes(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="tensorboard is not installed (requirements-dev.txt)")
    float32 = struct.Struct("<f")  # what an event stores

    first, = tracking.open_trackers(None, True, tmp_path, {})
    for row in ROWS[:5]:
        first.log({**row, "loss": -row["loss"]} if row["step"] > 3 else row)  # 4 and 5 will come again, otherwise
    write_rows(tmp_path, ROWS[:3])  # neither is closed before the files are read: a killed run closes nothing
    second, = tracking.open_trackers(None, True, tmp_path, {})
    for row in ROWS[3:]:
        second.log(row)

    events = reader.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})  # 0: keep them all
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "kl", "n_tokens"}
    for key in ("loss", "kl", "n_tokens"):
        expected = [(row["step"], float32.unpack(float32.pack(row[key]))[0]) for row in ROWS if row[key] is not None]
        assert [(event.step, event.value) for event in events.Scalars(key)] == expected
    first.close(1)
    second.close(0)


# ---- in a training run

def test_a_training_run_logs_what_is_in_its_metrics(tmp_path):
    """distill.py from the command line, with both; then a step more. Oracle: metrics.jsonl."""
    pytest.importorskip("wandb", reason="wandb is not installed (requirements-dev.txt)")
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (requirements-dev.txt)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    write_model(tmp_path / "model")
    (tmp_path / "chains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy.make("distill", 6, seed=3)))
    env = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    options = ["--model", "model", "--data", "chains.jsonl", "--prompt", "toy", "--wandb", "judges", "--tensorboard",
               "--dtype", "float32", "--batch-size", "2", "--max-steps", "2", "--threads", "1"]
    for argv in ([*options, "--out", "run"], ["--out", "run", "--resume", "--max-steps", "3"]):
        done = subprocess.run([sys.executable, ROOT / "distill.py", *argv], cwd=tmp_path, env=env, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["n_skipped"] == 0 for row in rows)
    newest = max((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    records = list(read_records(newest))
    assert history(records) == [(row["step"], known(row)) for row in rows] and only(records, "exit").exit_code == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for key in known(rows[0]).keys() - {"step"}:
        logged = {event.step: event.value for event in events.Scalars(key)}
        assert logged == pytest.approx({row["step"]: row[key] for row in rows}, rel=1e-6), key
