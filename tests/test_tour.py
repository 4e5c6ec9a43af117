"""docs/tour.md, as it stands: its commands run in order, on a tiny judge in the place of the demo's. Oracles: the
judgements that they should agree on, counts of the files that they leave, and the one error that the page shows."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import distill
from data import toy
from files import write_records
from model import Model, ModelConfig
from test_own_data import commands

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```\n(.*?)^```\n", re.M | re.S)
SHOWN, STEPS = FENCE.findall(PAGE), FENCE.sub("", PAGE)  # what the page shows below its commands; all the rest
SMALL = "--sft-steps 2 --steps 1 --n-prompts 2 --group-size 2 --questions 20".split()  # of the TRL run


def make_demo(here):
    """runs/demo/ with 100 held-out pairs, and a judge that has learned to end in a verdict."""
    demo = here / "runs/demo"
    n_vocab = toy.write_tokenizer(demo / "untrained")
    small = dict(vocab_size=n_vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=16)
    Model.random(ModelConfig.from_dict(toy.MODEL | small), 0).save_pretrained(demo / "untrained")
    (demo / "data").mkdir()
    write_records(demo / "data/distill.jsonl", toy.make("distill", 40, 0))
    write_records(demo / "data/heldout.jsonl", toy.make("heldout", 100, 0))
    distill.main(distill.Config(**distill.RECIPES["toy"] | dict(
        model=str(demo / "untrained"), data=str(demo / "data/distill.jsonl"), out=str(demo / "grpo"), eval_data=None,
        answer_only=True, batch_size=20, epochs=30, max_steps=0, lr=1e-2, save_every=0, threads=1)))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port, server):
    until = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until and server.poll() is None, "no server"
            time.sleep(0.05)


def run_here(words):
    """(status, what it printed, its errors) of a script or module, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    module = words[1] == "-m"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[2:] if module else words[1:])
        try:
            if module:
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        except SystemExit as e:
            status = e.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """(the folder, [(words or source, status, output, errors)] of each command but make, source, mkdir, pip, TRL)."""
    here, port, done, server = tmp_path_factory.mktemp("tour"), free_port(), [], None
    make_demo(here)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.syspath_prepend(str(ROOT))
        for kind, what in commands(STEPS.replace("8000", str(port))):
            if kind == "python":
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(what, {})
                done.append((what, 0, out.getvalue(), ""))
            elif what[0] == "mkdir":
                subprocess.run(what, check=True)
            elif what[-1] == "&":
                server = subprocess.Popen([sys.executable, str(ROOT / what[1]), *what[2:-1]], text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          env=os.environ | {"OMP_NUM_THREADS": "1"})
                wait_for(port, server)
            elif what[0] == "curl":
                if shutil.which("curl"):
                    asked = subprocess.run(what, capture_output=True, text=True, timeout=60)
                    done.append((what, asked.returncode, asked.stdout, asked.stderr))
            elif what == ["kill", "%1"]:
                server.terminate()
                done.append((what, server.wait(timeout=60), server.stdout.read(), ""))
            elif what[0] == "python" and "experiments.trl_reward" not in what:
                done.append((what, *run_here(what)))
    return here / "runs/tour", done


def outputs(done, *words):
    return [out for what, status, out, _ in done if isinstance(what, list) and set(words) <= set(what)]


def test_every_command_of_the_page_is_one_that_the_test_knows():
    ran = [what[:2] if what[0] == "python" else what[:1] for kind, what in commands(STEPS) if kind == "run"]
    assert ran == [["make"], ["source"], ["mkdir"], *[["python", "judge.py"]] * 3, ["python", "-m"],
                   *[["python", "judge.py"]] * 3, ["python", "serve.py"], *[["curl"]] * 3, ["kill"], ["pip"],
                   ["python", "-m"]]
    assert sum(kind == "python" for kind, _ in commands(STEPS)) == 4


def test_the_commands_end_well_but_for_the_one_that_is_refused(tour):
    _, done = tour
    refused = [(what, status, err) for what, status, _, err in done if status != 0]
    (what, status, error), = refused
    assert "--rubric" in what and status == 2
    assert error == next(text for text in SHOWN if text.startswith("error: "))


def test_the_same_pair_is_judged_alike_everywhere(tour):
    """By judge.py, by both requests to the server, and by the chat."""
    if not shutil.which("curl"):
        pytest.skip("no curl")
    _, done = tour
    text, verdict, _ = outputs(done, "--answer-a", "sort 40718")[0].split("\n")
    judged, ranked, chat = (json.loads(out) for out in outputs(done, "curl"))
    assert verdict.startswith(f"verdict: {(judged['verdict'] or 'none').upper()}, ")
    assert judged["votes"][0]["text"] == chat["choices"][0]["message"]["content"] == text
    again, = (j for j in ranked["judgements"] if {j["a"], j["b"]} == {0, 1})
    if (again["a"], again["b"]) == (0, 1):
        assert again["votes"][0]["text"] == text
    assert sorted(ranked["order"]) == [0, 1, 2] and ranked["n_judgements"] == 3


def test_what_is_printed_has_the_form_that_the_page_shows(tour):
    _, done = tour
    table = outputs(done, "--answers")[0].splitlines()
    on_page = next(text for text in SHOWN if text.startswith("answer  score")).splitlines()
    assert table[0] == on_page[0] and len([line for line in table if re.match(r" +\d  ", line)]) == 4
    answer = outputs(done, "--reference")[0].splitlines()
    assert [line.split(":")[0] for line in answer if re.match("answer as|reference as|verdict", line)] == [
        "answer as A, reference as B", "verdict", "reference as A, answer as B", "verdict"]
    assert re.match("the answer is (worse|better|undecided)", answer[-1])
    assert outputs(done, "--pairs")[0].startswith("100 pairs judged, ")


def test_the_files_are_there_and_counted_right(tour):
    folder, done = tour
    assert len((folder / "judgements.jsonl").read_text().splitlines()) == 100
    assert (folder / "report.html").stat().st_size > 10_000
    rankings = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert all(q["answers"][7] == "".join(sorted(q["prompt"].removeprefix("sort "))) for q in questions)
    first = sum(max(range(8), key=lambda i: (r["scores"][i], -i)) == 7 for r in rankings)
    n = sum(len(r["judgements"]) for r in rankings)
    printed = [out for what, _, out, _ in done if isinstance(what, str) and "rankings" in what]
    assert printed == [f"the right answer is first in {first} of 20, with {n} judgements\n"]


def test_rewards_of_a_prompt_add_up_to_nothing(tour):
    _, done = tour
    out, = (out for what, _, out, _ in done if isinstance(what, str) and "policy_reward" in what)
    one, two, three, four = json.loads(out)
    assert one == -three and two == -four and {abs(one), abs(two)} <= {0.0, 1.0}


def test_trl_trains_with_the_reward(tour, monkeypatch):
    """The page's command with less of everything."""
    pytest.importorskip("trl")
    folder, _ = tour
    words, = (what for kind, what in commands(STEPS) if kind == "run" and "experiments.trl_reward" in what)
    monkeypatch.chdir(folder.parents[1])
    done = subprocess.run([sys.executable, *words[1:], *SMALL], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) and (folder / "trl").is_dir()
