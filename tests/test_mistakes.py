"""A newcomer's mistakes: options, files and folders, each told in one line before any work.

Oracle: the table below. A row is a command and, after |, words that its one line must hold: what is wrong, where, what
to do. Status 2, nothing else on stderr, and the folder afterwards as it was before. Mistakes that other tests make are
not repeated here.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import distill  # noqa: E402
import files  # noqa: E402
from common import Ranks  # noqa: E402
from data import toy  # noqa: E402
from data.pairs import Chain, Pair, swapped  # noqa: E402
from folder import check_context  # noqa: E402
from judge import HeldOut, note_verdicts  # noqa: E402
from model import Model  # noqa: E402
from prompt import load_prompt  # noqa: E402
from test_sample import make_folder  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

SHORT = {  # a row's first word stands for this; of an option that is given twice the last one counts
    "distill": "distill.py --model model --data chains.jsonl --prompt toy --out new",
    "resume": "distill.py --resume --out",
    "grpo": "grpo.py --model model --data pairs.jsonl --n-prompts 2 --mini-prompts 1 --out new",
    "judge": "judge.py --model model --pairs pairs.jsonl --out new",
    "sample": "sample.py --model model --text hello",
    "evaluate": "evaluate.py --model model --data pairs.jsonl --out new",
    "fetch": "data/fetch.py reward-bench --files pairs.jsonl --out new",
    "toy": "data/toy.py --out new",
    "figure": "docs/figure.py figure --out new.svg",
    "demo": "demo.py --out new",
}
TABLE = r"""
# options: what cannot be, what is mistyped, what does not go together, what would have no effect
distill --lr 0                         | --lr must be above 0
distill --lr 1,5e-5                    | --lr: invalid float value: '1,5e-5'
distill --batch-size 1e3               | --batch-size: invalid int value: '1e3'
distill --batch-size 99999999999999999999 | --batch-size must be at most 1099511627776
distill --epochs 0                     | --epochs must be at least 1
distill --max-length 1                 | --max-length must be at least 2
distill --warmup-frac nan              | --warmup-frac must be from 0 to 1, got nan
distill --beta2 nan                    | --beta2 must be at least 0 and below 1
distill --max-norm nan                 | --max-norm must be above 0
distill --weight-decay inf             | --weight-decay must be at least 0 and finite
distill --dtype ""                     | --dtype is empty: give a value
distill --out " "                      | --out is empty
distill --threads 5000                 | --threads must be from 0 to 4096
distill --gradient-checkpointing true  | unrecognized arguments: true
distill --resume=yes                   | --resume | ignored explicit argument 'yes'
distill --eval-every 2                 | --eval-every 2 needs --eval-data
distill --learning-rate 1e-5           | --learning-rate | --help lists the options
distill --recipe 7b                    | --recipe: invalid choice: '7b' (choose from | qwen2.5-7b
distill --data chains.jsonl pairs.jsonl | unrecognized arguments: pairs.jsonl
distill.py --recipe qwen2.5-7b         | --model is missing | --data
grpo --kl-coef inf                     | --kl-coef must be at least 0 and finite
grpo --clip -0.1                       | --clip must be at least 0
grpo --temperature 1e-30               | --temperature must be from 0.001 to 100
grpo --group-size 99999                | --group-size must be from 2 to 1024
grpo --max-new-tokens 99999999999999999999 | --max-new-tokens must be at most
grpo --eval-every 5                    | --eval-every 5 needs --eval-data
grpo --tensorboard=1                   | --tensorboard
judge --temperature 1e-320 --votes 2   | --temperature must be from 0.001 to 100
judge --top-k 5                        | --top-k | need a --temperature above 0
judge --device cuda:0                  | --device is auto or cpu or cuda, got 'cuda:0'
judge --model model another            | unrecognized arguments: another
judge.py --model model --question q --answer-a a --answer-b b --limit 5 | --limit | --pairs
judge.py --model model --question "" --answer-a a --answer-b b | --question is missing
sample --n 3 --temperature 0           | --n above 1 needs a --temperature above 0
sample --top-p nan                     | --top-p must be above 0 and at most 1
sample --seed 99999999999999999999     | --seed must be from 0
sample --out new                       | give either --text, or --texts FILE and --out FILE
evaluate --model ""                    | --model: one of its values is empty
evaluate --budgets 0                   | --budgets: '0' is not a list of token counts like 512,1024
evaluate --votes 4                     | --votes above 1 needs a --temperature above 0
evaluate.py --from "" --out new        | --from: one of its values is empty
evaluate.py                            | runs/toy/grpo/model: is not there; python grpo.py makes it, or give --model
demo --pairs 801                       | --pairs must be from 20 to 800
fetch --out ""                         | --out is empty
fetch --files ""                       | --files is empty
toy --seed -1                          | --seed must be from 0
toy --careful nan                      | --careful must be from 0 to 1, got nan
toy --care 0.5                         | --care 0.5 | --help lists the options
toy --out ""                           | --out is empty
docs/figure.py                         | required: run
figure --ou x                          | --ou x

# the environment
RANK=1 distill                         | RANK=1, WORLD_SIZE=None | start with torchrun
WORLD_SIZE=2 grpo                      | RANK=None, WORLD_SIZE=2 | start with torchrun
RANK=x WORLD_SIZE=2 evaluate           | RANK=x | start with torchrun
RANK=3 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=localhost MASTER_PORT=2 distill | RANK=3, | start with torchrun
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=2 judge | judge.py needs one process | python, not
RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=localhost MASTER_PORT=2 demo | demo.py needs one process
HF_ENDPOINT=mirror data/fetch.py Qwen/Qwen2.5-7B-Instruct --out new | HF_ENDPOINT is 'mirror' | https://

# --model
distill --model Qwen/Qwen2.5-7B-Instruct | Qwen/Qwen2.5-7B-Instruct: is no folder here | python data/fetch.py
sample --model model/model.safetensors | model/model.safetensors: is a file; --model is a Hugging Face one
grpo --model run                       | run: has no tokenizer.json | take run/model
distill --model lora                   | lora: has no config.json, model.safetensors; it is a LoRA adapter: merge it
judge --model gguf                     | gguf: has no config.json | GGUF is not read: take the model's safetensors
sample --model pickled                 | pickled: has no model.safetensors; pickled weights are not read: save
evaluate --model model pickled         | pickled: has no model.safetensors
evaluate --model model untold          | untold: has no prompt.txt, so --prompt must say how
grpo --model pointer                   | pointer/model.safetensors: not a readable safetensors file | download it again
evaluate --model model cut             | cut/model.safetensors: not a readable safetensors file
distill --model wide                   | wide/model.safetensors: tensor | take config.json and weights of one model
distill --model dead                   | dead: its log-probabilities are not finite: take other weights
distill --model narrow                 | the 8 tokens that narrow was made to read (max_position_embeddings)
grpo --model narrow                    | 12 of 12 prompts (see --max-prompt-tokens) are longer than the 8 tokens
sample --model templates               | no chat template in tokenizer_config.json | an instruct model
sample --model eos                     | eos/tokenizer_config.json: eos_token is {'x': 5}; it must be a string
sample --model ids                     | ids/tokenizer.json: not a BPE tokenizer
sample --model jinja                   | jinja/chat_template.jinja: is not UTF-8
sample --model html                    | html/config.json: not valid JSON | download it again
grpo --model promptless                | promptless/prompt.txt: no section [user]

# --data and other files
distill --data pairs.jsonl             | pairs.jsonl:1: no judgement in this record | data/pairs.py lists the forms
distill --data zipped.jsonl            | zipped.jsonl:1: byte 2 of the line, 0x8b, is not UTF-8
distill --data utf16.jsonl             | utf16.jsonl:1: | is not UTF-8 (convert a file in another encoding)
distill --data pairs.parquet           | pairs.parquet: not a .json or .jsonl file: convert it
distill --data empty                   | empty: no records: give a file or folder
distill --data unlabelled.jsonl --answer-only | unlabelled.jsonl: --answer-only needs a winner in every row; add it
grpo --data messages.jsonl             | messages.jsonl:1: "messages" alone is a chain, not a pair
grpo --data cut.jsonl                  | cut.jsonl:12: malformed JSON | repair or remove
grpo --data upper.jsonl                | upper.jsonl:1: "winner" is "B": write "a", "b" or null
grpo --data same.jsonl                 | same.jsonl:2: id "x" is also at same.jsonl:1: remove or rename
grpo --data unlabelled.jsonl           | 0 usable pairs are fewer than --n-prompts 2: of 12, 0 have a winner | give more
grpo --data long.jsonl                 | 0 usable pairs | of 12, 12 have a winner, 0 of them a prompt within --max-pr
grpo --eval-data unlabelled.jsonl      | unlabelled.jsonl: no labelled pairs to evaluate on
judge --pairs judged.jsonl             | judged.jsonl:1: unknown format | data/pairs.py lists the known ones
judge --pairs long.jsonl               | tokens, the model can read 1024; or --skip-bad leaves such pairs out
judge.py --model model --question-file void.txt --answer-a a --answer-b b | void.txt: is empty; --question-file is
distill --prompt "Which is better?"    | Which is better?.txt: no such prompt file: give one of direct, instruct
grpo --prompt jinja.txt                | jinja.txt: section [user] lacks {answer_a} | the top of prompt.py
sample.py --model model --texts void.txt --out new | void.txt: is empty; give a line of JSON for each text
sample.py --model model --texts jinja.txt --out new | jinja.txt:1: malformed JSON | like {"text": "..."}
evaluate --rmb empty                   | empty
fetch                                  | pairs.jsonl: cannot be read as parquet
figure --start empty                   | empty/judgements.jsonl: no such file
figure --start eval                    | eval/judgements.jsonl: not all of its lines are judgements; name another
docs/figure.py run --out new.svg       | run: holds no finished grpo.py run with --eval-data; name another
docs/figure.py model --out new.svg     | model/metrics.jsonl: no such file; name the folder of a grpo.py run

# --out
distill --out model                    | model/config.json: is already there, and is no part of a run
distill --out .                        | model: is already there, and is no part of a run; choose another --out
distill --out link                     | link: is a link to nothing, where --out needs a folder; choose another
grpo --out pairs.jsonl/new             | pairs.jsonl: is a file, where --out needs a folder
judge --out pairs.jsonl/new            | pairs.jsonl: is a file, where --out needs a folder
sample.py --model model --texts texts.jsonl --out texts.jsonl | texts.jsonl: is already there; choose another --out
evaluate --out mine                    | mine/pairs.jsonl: is already there, and is no evaluation
evaluate --out model                   | model/tokenizer.json: is already there, and is no evaluation's
evaluate --out eval                    | eval/settings.json: does not begin with a judging run's settings
toy --out toys                         | toys/rl.jsonl: is already there; choose another --out
fetch --out pairs.jsonl                | pairs.jsonl: is a file, where --out needs a folder
figure --out pairs.jsonl               | pairs.jsonl: is there and is no SVG; choose another --out
figure --out no/new.svg                | no/new.svg: --out is a file to write
report run --out no/new.html           | no: no such folder; make it, or choose another --out

# --resume
resume nostate                         | nostate/checkpoints/step-1/state.json: is damaged | goes on from the beginning
resume badstate                        | badstate/checkpoints/step-1/state.json: is damaged | malformed JSON | moved away
resume liststate                       | liststate/checkpoints/step-1/state.json: is damaged (it has no step)
resume early                           | early/checkpoints/step-1/state.json: is damaged (it has no step)
resume otherstep                       | otherstep/checkpoints/step-1/state.json: is damaged (its checksum is another)
resume cutmoments                      | step-1/optimizer-00001-of-00001.safetensors: is damaged (its | moved away
resume bitflip                         | bitflip/checkpoints/step-2/model.safetensors: is damaged | bitflip/checkpoints/step-2 moved away, --resume goes on from bitflip/checkpoints/step-1
resume othermoments                    | othermoments/checkpoints/step-1: | are not of this model and optimizer, see
resume fewmoments                      | fewmoments/checkpoints/step-1: | are not of this model and optimizer, see
resume gap                             | gap/checkpoints/step-1: | are not of this model and optimizer, see
resume noweights                       | noweights/checkpoints/step-1/model.safetensors: no such file; with
resume badrows                         | badrows/metrics.jsonl:2: is no row of a run; mend the line
resume moved                           | nowhere: is no folder here; --model is
resume model                           | model/config.json: is not the config.json of a run
resume run --max-steps 1               | run: 2 steps are done already, so it cannot end after 1
"""
MOMENTS = "optimizer-00001-of-00001.safetensors"
LINES = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
ROWS = [[part.strip() for part in line.split(" | ")] for line in LINES]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_models(home):
    """Folders that are almost a model's; each is named in the table."""
    def almost(name, *without, **config):
        folder = shutil.copytree(home / "model", home / name)
        for file in without:
            (folder / file).unlink()
        raw = json.loads((home / "model/config.json").read_text())
        if config:
            (folder / "config.json").write_text(json.dumps(raw | config))
        return folder
    weights = load_file(home / "model/model.safetensors")
    template = json.loads((home / "model/tokenizer_config.json").read_text())
    tokenizer = json.loads((home / "model/tokenizer.json").read_text())
    (almost("lora", "config.json", "model.safetensors") / "adapter_config.json").write_text("{}")
    (home / "gguf").mkdir()
    (home / "gguf/model.Q4_K_M.gguf").write_bytes(b"GGUF")
    (almost("pickled", "model.safetensors") / "pytorch_model.bin").write_bytes(b"PK")
    almost("untold", "prompt.txt")
    (almost("pointer") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 12345\n")
    cut = almost("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-64])
    almost("wide", hidden_size=64)
    almost("narrow", max_position_embeddings=8)
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"] * float("nan")},
              almost("dead") / "model.safetensors")
    (almost("templates") / "tokenizer_config.json").write_text(json.dumps(template | {"chat_template": [{"x": 1}]}))
    (almost("eos") / "tokenizer_config.json").write_text(json.dumps(template | {"eos_token": {"x": 5}}))
    tokenizer["added_tokens"][0]["id"] = "many"
    (almost("ids") / "tokenizer.json").write_text(json.dumps(tokenizer))
    (almost("jinja") / "chat_template.jinja").write_bytes(b"\xff\xfe")
    (almost("html") / "config.json").write_text("<html>404")
    (almost("promptless") / "prompt.txt").write_text("")


def make_data(home):
    chains = toy.make("distill", 12, 0)
    pairs = [{key: value for key, value in row.items() if key != "judgement"} for row in toy.make("rl", 12, 0)]
    write_rows(home / "chains.jsonl", chains)
    write_rows(home / "pairs.jsonl", pairs)
    write_rows(home / "unlabelled.jsonl", [row | {"winner": None} for row in chains])
    write_rows(home / "upper.jsonl", [row | {"winner": row["winner"].upper()} for row in pairs])
    write_rows(home / "same.jsonl", [row | {"id": "x"} for row in pairs])
    write_rows(home / "long.jsonl", [row | {"answer_a": "0 " * 4500} for row in pairs])
    write_rows(home / "messages.jsonl", [{"messages": [{"role": "user", "content": "A or B?"},
                                                       {"role": "assistant", "content": "<answer>[[A]]</answer>"}]}])
    write_rows(home / "judged.jsonl", [{"id": "1", "votes": [], "verdict": "a", "winner": "a"}])
    write_rows(home / "texts.jsonl", [{"text": "hello"}])
    text = (home / "pairs.jsonl").read_text()
    (home / "cut.jsonl").write_text(text[:-40])
    (home / "zipped.jsonl").write_bytes(b"\x1f\x8b\x08\x00")
    (home / "utf16.jsonl").write_text(text, encoding="utf-16")
    (home / "pairs.parquet").write_bytes(b"PAR1")
    (home / "void.txt").write_text("")
    (home / "jinja.txt").write_text("[user]\n{{ question }} {{ answer_a }} {{ answer_b }}\n")
    for folder in ("empty", "mine", "toys", "eval", "figure"):
        (home / folder).mkdir()
    shutil.copy(home / "pairs.jsonl", home / "mine")
    shutil.copy(home / "pairs.jsonl", home / "toys/rl.jsonl")
    write_rows(home / "eval/judgements.jsonl", [{"id": "1"}])
    write_rows(home / "figure/metrics.jsonl", [{"step": 1, "accuracy": 0.5, "judgement_tok": 3, "eval_accuracy": 0.5,
                                                "eval_tokens": 3}])
    (home / "figure/config.json").write_text('{"options": {"eval_pairs": 4}}')
    (home / "link").symlink_to("nowhere")


def make_runs(home):
    """A distillation of two steps; and copies of it that were ended after the first, each damaged in its own way."""
    options = dict(model="model", data="chains.jsonl", out="run", eval_data=None, max_steps=2, batch_size=4,
                   save_every=1, threads=1)
    distill.main(distill.Config(**distill.RECIPES["toy"] | options))

    def ended(name):
        shutil.copytree(home / "run", home / name)
        shutil.rmtree(home / name / "checkpoints/step-2")
        return home / name / "checkpoints/step-1"
    (ended("nostate") / "state.json").unlink()
    (ended("badstate") / "state.json").write_text("{")
    (ended("liststate") / "state.json").write_text("[]")
    (ended("early") / "state.json").write_text('{"step": -3}')
    state = ended("otherstep") / "state.json"
    state.write_text(state.read_text().replace('"step": 1', '"step": 2'))
    moments = ended("cutmoments") / MOMENTS
    moments.write_bytes(moments.read_bytes()[:-64])
    shutil.copytree(home / "run", home / "bitflip")
    weights = home / "bitflip/checkpoints/step-2/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 4
    weights.write_bytes(content)
    whole = load_file(home / "run/checkpoints/step-1" / MOMENTS)
    for name, moments in {"othermoments": {name: x[:1].clone() if x.ndim else x for name, x in whole.items()},
                          "fewmoments": {name: x for name, x in whole.items() if "layers.1" not in name},
                          "gap": whole}.items():
        metadata = {"model.norm.weight/exp_avg": "2"} if name == "gap" else None
        save_file(moments, ended(name) / MOMENTS, metadata)
        (home / name / "checkpoints/step-1/state.json").write_text('{"step": 1}')  # as before there were checksums
    (ended("noweights") / "model.safetensors").unlink()
    ended("badrows")
    (home / "badrows/metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    ended("moved")
    record = json.loads((home / "moved/config.json").read_text())
    record["options"]["model"] = "nowhere"
    (home / "moved/config.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with all that the table names."""
    home = tmp_path_factory.mktemp("mistakes")
    (home / "model").mkdir()
    make_folder(home / "model")
    before = Path.cwd()
    os.chdir(home)
    try:
        make_models(home)
        make_data(home)
        make_runs(home)
    finally:
        os.chdir(before)
    return home


def contents(home):
    """All that lies in the folder, with sizes and times."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in home.rglob("*")}


def run(words, monkeypatch):
    """Runs a script in this process as from the command line; the status with which it ends."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("="))
    script, *argv = [*shlex.split(SHORT.get(words[0], words[0])), *words[1:]]
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stop:
        if script == "report":
            runpy.run_module("report", run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    return stop.value.code


@pytest.mark.parametrize("command, said", [(row[0], row[1:]) for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_mistake_is_one_line_and_nothing_is_written(command, said, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = contents(home)
    status = run(shlex.split(command), monkeypatch)
    out, err = capsys.readouterr()
    lines = [line for line in re.split("[\r\n]", err) if line.strip() and not re.match("(tokenize|read|judge): ", line)]
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), err
    for words in said:
        assert words in lines[0]
    assert contents(home) == before


def test_the_table_is_long():
    assert len(ROWS) >= 120 and len({row[0] for row in ROWS}) == len(ROWS) and min(map(len, ROWS)) >= 2


@pytest.mark.parametrize("command", ["distill", "grpo", "judge", "evaluate"])
def test_a_place_that_cannot_be_written_is_told_before_any_work(command, home, monkeypatch, capsys):
    """The tests run as root, who may write everywhere: the system's answer is played."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    assert run([command], monkeypatch) == 2
    assert ": cannot be written to (read-only, or another user's); choose another --out" in capsys.readouterr().err


# ---- what is no mistake in itself, and is said

def test_what_will_be_learned_is_said(home, capsys):
    """Labels that are all one, judgements without a verdict or against the label, pairs trained on and held out, texts
    beyond the model's context. Counted here by hand."""
    def chain(verdict, winner):
        pair = Pair("1", [{"role": "user", "content": "q"}], "x", "y", winner, "", "")
        return Chain(pair, f"<answer>[[{verdict}]]</answer>" if verdict else "Both are fine.")
    cases = {(("A", "a"), ("B", "b")): "", (("A", None), ("B", None)): "",
             (("A", "a"), ("B", "a"), (None, "b")): "note: f: of 3 judgements 1 do not end in a verdict such as "
             "<answer>[[A]]</answer>, 1 in another than the label; they are learned as they are\n",
             (("B", None), ("B", "b")): "note: f: every label is B, and a judge that always says B is right each"}
    for rows, said in cases.items():
        note_verdicts([chain(*row) for row in rows], "f", False)
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)
    note_verdicts([chain("A", "a"), chain("B", "a")], "f", True)  # --answer-only learns the labels
    assert "note: f: every label is A" in capsys.readouterr().out

    tokenizer, model = Tokenizer(home / "model"), Model.from_pretrained(home / "model")  # made to read 1,024 tokens
    held_out = HeldOut(home / "pairs.jsonl", 5, load_prompt("toy"), 2, tokenizer, Ranks(0, 1, torch.device("cpu")))
    held_out.check(model, held_out.pairs[:0])
    assert capsys.readouterr().out == ""
    one, other = held_out.pairs[3:5]
    held_out.check(model, [one, swapped(other), replace(one, prompt=[{"role": "user", "content": "other"}])])
    assert capsys.readouterr().out.startswith("note: 2 of 5 pairs of --eval-data are trained on, too: eval_accur")

    for lengths, said in (([], ""), ([1024], ""), ([1025, 3], "1 of 2 chains are longer than the 1024 tokens")):
        check_context(model, lengths, "chains", True)
        assert said in (out := capsys.readouterr().out) and bool(said) == bool(out)
    with pytest.raises(ValueError, match="2 of 2 chains are longer than the 1024 tokens that .*model was made to read"):
        check_context(model, [1025, 2000], "chains", True)


# ---- two ranks

def test_a_mistake_that_one_rank_sees_ends_all(home, tmp_path):
    """Rank 0 alone opens the judgements file; the other must not wait for it for four hours."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/judgements.jsonl.partial").write_text("nonsense\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "evaluate.py"), "--model", "model", "--data", "pairs.jsonl", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(errors) == 1, done.stderr[-3000:]
    assert "judgements.jsonl.partial: does not begin with a judging run's settings; choose another --out" in errors[0]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["judgements.jsonl.partial"]
