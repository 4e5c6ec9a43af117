"""run.py. Oracles: rows, options and notes written by hand; the files that are there afterwards."""

import json
import math
from dataclasses import asdict, dataclass

import pytest
import torch

from common import Ranks
from options import saved_options
from run import Run

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Options:
    n_steps: int = 3  # how many
    lr: float = 1e-3  # peak
    model: str = "start"  # a folder
    out: str = "run"  # a folder
    keep: int = 2  # checkpoints
    wandb: str | None = None  # a project
    tensorboard: bool = False  # events
    resume: bool = False  # go on


def test_a_new_run_writes_its_options_and_refuses_a_used_folder(tmp_path):
    out = tmp_path / "a/b"
    options = Options(n_steps=4, out=str(out))
    run = Run(options, ALONE)
    assert not out.exists() and run.checkpoint is None  # it has only looked
    run.begin(0, 4)
    record = json.loads((out / "config.json").read_text())
    assert record["options"] == asdict(options)
    assert record["torch"] == torch.__version__ and record["ranks"] == 1 and "resumed" not in record
    assert {"command", "commit", "dirty", "python", "device", "threads"} <= set(record)
    Run(options, ALONE).begin(0, 4)  # nothing was logged yet: there is nothing to lose
    run.row("metrics.jsonl", {"step": 1})
    with pytest.raises(ValueError, match="already holds a run; --resume continues it, --out chooses another folder$"):
        Run(options, ALONE)
    for folder in (out / "config.json", out / "config.json/deeper"):
        with pytest.raises(ValueError, match=f"{out}/config.json: is a file, where --out needs a folder"):
            Run(Options(out=str(folder)), ALONE)


def test_a_resumed_run_has_its_own_options_but_for_some_and_records_them(tmp_path, capsys):
    def run(may_change=None, out=tmp_path, **options):
        return Run(Options(**options, out=str(out), resume=True), ALONE, may_change)
    Run(Options(n_steps=4, out=str(tmp_path)), ALONE).begin(0, 4)
    run(n_steps=4).begin(0, 4)
    assert capsys.readouterr().out == f"{tmp_path}: goes on after step 0 of 4\n"
    (tmp_path / "checkpoints/step-2").mkdir(parents=True)
    changed = run({"n_steps": "the rates are others", "lr": ""}, n_steps=5, lr=1e-2)
    assert changed.checkpoint == tmp_path / "checkpoints/step-2"
    changed.begin(2, 5)
    assert "note: --n-steps was 4, is 5 from here on: the rates are others\n" in (said := capsys.readouterr().out)
    assert "--lr" not in said
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["options"] == asdict(Options(n_steps=5, lr=1e-2, out=str(tmp_path)))
    changes = [(r["step"], r["changed"]) for r in record["resumed"]]
    assert changes == [(0, {}), (2, {"n_steps": [4, 5], "lr": [1e-3, 1e-2]})]
    assert all({"command", "commit", "ranks", "started"} <= set(r) for r in record["resumed"])

    with pytest.raises(ValueError, match=r"config.json: the run was started with --n-steps 5, not 6; leave the option"):
        run({"lr": ""}, n_steps=6, lr=1e-2)
    with pytest.raises(ValueError, match="--lr 0.01, not 0.02"):
        run({"n_steps": ""}, n_steps=5, lr=2e-2)
    with pytest.raises(ValueError, match="there is no run to resume") as e:
        run(out=tmp_path / "elsewhere")
    assert "delete" not in str(e.value) and not (tmp_path / "elsewhere").exists()
    with pytest.raises(ValueError, match="2 steps are done already, so it cannot end after 1"):
        run(n_steps=5, lr=1e-2).begin(2, 1)


def test_an_option_that_earlier_runs_did_not_have_was_at_its_default(tmp_path):
    options = asdict(Options())
    del options["n_steps"]
    (tmp_path / "config.json").write_text(json.dumps({"options": options}))
    Run(Options(out=str(tmp_path), resume=True), ALONE)
    with pytest.raises(ValueError, match="--n-steps 3, not 4"):
        Run(Options(n_steps=4, out=str(tmp_path), resume=True), ALONE)


def test_a_run_from_before_there_was_keep_loses_no_checkpoint(tmp_path):
    options = asdict(Options())
    del options["keep"]
    (tmp_path / "config.json").write_text(json.dumps({"options": options}))
    assert saved_options(Options, tmp_path)["keep"] == 0
    with pytest.raises(ValueError, match="--keep 0, not 2"):
        Run(Options(out=str(tmp_path), resume=True), ALONE)
    assert Run(Options(out=str(tmp_path), resume=True), ALONE, {"keep": ""}).changed == {"keep": [0, 2]}


def test_a_damaged_checkpoint_is_named_with_the_one_before(tmp_path):
    for step in (8, 9, 10):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step}/state.json").write_text('{"step": 5}' if step < 10 else "{")
    (tmp_path / "config.json").write_text(json.dumps({"options": asdict(Options())}))

    def run():
        return Run(Options(out=str(tmp_path), resume=True), ALONE)
    newest = tmp_path / "checkpoints/step-10"
    with pytest.raises(ValueError, match=f"^{newest}/state.json: is damaged .*; with {newest} moved away, --resume "
                                         f"goes on from {tmp_path}/checkpoints/step-9$"):
        run().weights()
    newest.rename(tmp_path / "checkpoints/step-10.bad")
    assert run().weights() == run().checkpoint == tmp_path / "checkpoints/step-9"
    assert Run(Options(out=str(tmp_path / "new")), ALONE).weights() == "start"


def test_a_number_that_is_not_finite_is_null_in_a_row(tmp_path):
    run = Run(Options(out=str(tmp_path)), ALONE)
    run.row("metrics.jsonl", {"step": 1, "loss": math.nan, "grad_norm": -math.inf, "lr": 0.5, "kl": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5, "kl": null}\n'


def test_the_best_accuracy_counts_if_its_model_was_kept(tmp_path):
    run = Run(Options(out=str(tmp_path)), ALONE)
    assert run.best_accuracy() == -1
    for step, accuracy in enumerate((0.5, None, 0.75, 0.25), 1):
        run.row("metrics.jsonl", {"step": step} | ({} if accuracy is None else {"eval_accuracy": accuracy}))
    assert run.best_accuracy() == -1
    (tmp_path / "best").mkdir()
    assert run.best_accuracy() == 0.75


def test_a_stopped_run_names_its_last_good_weights(tmp_path):
    run = Run(Options(out=str(tmp_path)), ALONE)
    run.begin(0, 9)
    with pytest.raises(ValueError, match=f"^{tmp_path}: stopped, too bad; no model/ is written, .* are in start"):
        run.stop("too bad")
    (tmp_path / "checkpoints/step-7").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoints/step-7: start another run from there, with a"):
        run.stop("too bad")


def test_truncate_drops_later_rows_and_a_half_written_line(tmp_path):
    run = Run(Options(out=str(tmp_path)), ALONE)
    run.truncate(0)  # nothing there
    for step in range(1, 5):
        run.row("metrics.jsonl", {"step": step, "text": "zwölf\u2028[[A]]\n"})
    run.row("samples.jsonl", {"step": 4})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "te')
    run.truncate(4)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run.truncate(2)
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().split("\n")[:-1]] == \
        [{"step": step, "text": "zwölf\u2028[[A]]\n"} for step in (1, 2)]
    assert (tmp_path / "samples.jsonl").read_text() == ""
    assert not list(tmp_path.glob("*.tmp"))


def test_only_rank_0_writes(tmp_path):
    rank_1 = Ranks(1, 1, torch.device("cpu"))
    run = Run(Options(out=str(tmp_path / "run")), rank_1)
    run.begin(0, 1)
    run.row("metrics.jsonl", {"step": 1})
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.iterdir()) == []
    assert run.ranks is rank_1
