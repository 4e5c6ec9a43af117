"""judge.py. Oracles: the sampler's own rollouts, put together by hand; an interrupted file of judgements against one
written in one go; the same judge in this process, for the command line."""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import judge as judging  # noqa: E402
import batch  # noqa: E402
from options import parse_config  # noqa: E402
from data import toy  # noqa: E402
from data.pairs import Pair, read_pairs, to_json, write_pairs  # noqa: E402
from judge import Config, Judge, judge_settings, load_judge, main, texts_from_options  # noqa: E402
from judgements import JudgementFile, encode_all, judge_file  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from prompt import load_prompt, render  # noqa: E402
from reward import benchmark_verdict, majority  # noqa: E402
from draw import Sampling, prompt_key  # noqa: E402
from sample import Sampler  # noqa: E402
from test_sample import QWEN2, SHARED, make_folder, tiny  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


# ---- judging: a folder with a tiny model, and a file of judgements


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def pairs():
    """Eight pairs; one id holds the characters at which str.splitlines would split a JSON line."""
    rows = [{k: v for k, v in row.items() if k != "judgement"} for row in toy.make("heldout", 8, 0)]
    rows[2] |= {"id": "x\u2028y\u0085\r\nz", "source": "u\u2029"}
    return [Pair(**row) for row in rows]


def config(folder, **options):
    standard = dict(max_new_tokens=24, votes=3, temperature=1.0, n_slots=6, threads=1)
    return Config(model=str(folder), **standard | options)


SECONDS = re.compile(r'"seconds": [0-9.]+')


def without_seconds(path):
    text = Path(path).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(SECONDS.sub('"seconds": 0', line)) for line in text[:-1].split("\n")]


def test_judgements_hold_what_scoring_needs(folder, pairs):
    """Each field from the rollouts and the pair; the verdict is the majority of the votes'."""
    judge = load_judge(config(folder, votes=9, max_new_tokens=100, temperature=2.0))
    assert judge.sampler.model.n_vocab == judge.tokenizer.n_vocab < judge.sampler.model.config.vocab_size
    records = dict(judge.judge(pairs))
    assert sorted(records) == list(range(8))
    prompts = [judge.tokenizer.chat(render(judge.prompt, pair)) for pair in pairs]
    groups = Sampler(judge.sampler.model).generate(prompts, Sampling(9, 100, 2.0, stop=judge.tokenizer.stop_ids))
    verdicts = Counter()
    for i, pair in enumerate(pairs):
        r, texts = records[i], [judge.tokenizer.decode(rollout.ids) for rollout in groups[i]]
        assert set(r) == {"id", "prompt_hash", "n_prompt_tokens", "votes", "verdict", "winner", "source", "domain",
                          "subset", "item", "seconds"}
        assert all(r[name] == getattr(pair, name) for name in ("id", "winner", "source", "domain", "subset", "item"))
        assert r["prompt_hash"] == f"{prompt_key(prompts[i]):016x}" and r["n_prompt_tokens"] == len(prompts[i])
        assert r["votes"] == [{"text": text, "n_tokens": len(rollout.ids), "finished": rollout.finished,
                               "verdict": benchmark_verdict(text), "seconds": vote["seconds"]}
                              for text, rollout, vote in zip(texts, groups[i], r["votes"])]
        assert 0 < r["seconds"] == max(vote["seconds"] for vote in r["votes"])
        assert r["verdict"] == majority(benchmark_verdict(text) for text in texts)
        verdicts.update(vote["verdict"] for vote in r["votes"])
    assert min(verdicts["a"], verdicts["b"], verdicts[None]) > 0, f"the case has lost its variety: {verdicts}"


def test_an_interrupted_file_goes_on_to_the_same_bytes(folder, pairs, tmp_path, monkeypatch):
    """Interrupted twice: at the fourth record, and within a line, in the middle of a character."""
    source, out = tmp_path / "pairs.jsonl", tmp_path / "deep" / "out.jsonl"
    write_pairs(source, pairs)
    cfg = config(folder, pairs=str(source), out=str(tmp_path / "whole.jsonl"))
    main(cfg)
    whole = without_seconds(cfg.out)
    assert [r["id"] for r in whole] == [pair.id for pair in pairs] and not Path(cfg.out + ".partial").exists()

    add = JudgementFile.add

    def add_three(self, record):
        if len(self.done) == 3:
            raise KeyboardInterrupt
        add(self, record)
    monkeypatch.setattr(JudgementFile, "add", add_three)
    cfg = replace(cfg, out=str(out))
    with pytest.raises(KeyboardInterrupt):
        main(cfg)
    monkeypatch.undo()
    partial = Path(cfg.out + ".partial")
    assert partial.read_bytes().count(b"\n") == 4 and not out.exists()
    with open(partial, "ab") as f:
        f.write(b'{"id": "\xe2\x80')

    prefilled, judge_it = [], Judge.judge
    monkeypatch.setattr(Judge, "judge",
                        lambda self, todo, **rest: (prefilled.extend(todo), judge_it(self, todo, **rest))[1])
    main(cfg)
    assert len(prefilled) == 5, "judged again what was done"
    assert without_seconds(out) == whole and not partial.exists()
    lines = [out.read_text(encoding="utf-8").split("\n"),
             (tmp_path / "whole.jsonl").read_text(encoding="utf-8").split("\n")]
    assert [SECONDS.sub("", x) for x in lines[0]] == [SECONDS.sub("", x) for x in lines[1]]
    with pytest.raises(ValueError, match="is already there; choose another --out"):
        main(cfg)


def test_everything_done_but_not_renamed(folder, pairs, tmp_path):
    """Interrupted after the last record: nothing is left to sample, the file is put in order and renamed."""
    judge, out = load_judge(config(folder)), tmp_path / "out.jsonl"
    encoded = encode_all(judge, pairs[:4])
    first = judge_file(judge, encoded, out, {"seed": 0})
    (tmp_path / "out.jsonl.partial").write_text("".join(json.dumps(x) + "\n" for x in [{"seed": 0}] + first[::-1]))
    out.unlink()
    judge.sampler.reset_stats()
    assert judge_file(judge, encoded, out, {"seed": 0}) == first and judge.sampler.n_prefilled == 0
    assert [r["id"] for r in without_seconds(out)] == [pair.id for pair in pairs[:4]]


def test_a_prompt_beyond_the_context_is_named_or_skipped_with_its_item(folder, pairs, capsys):
    """The toy reads 1024 tokens. The pairs of a best-of-n item go with the one that is too long."""
    judge = load_judge(config(folder))
    parts = [replace(pair, item="one" if i in (1, 3) else "") for i, pair in enumerate(pairs[:5])]
    parts[3] = replace(parts[3], answer_a="01234 " * 400)
    with pytest.raises(ValueError, match=f"pair {parts[3].id}: its prompt has [0-9]+ tokens, the model can read 1024"):
        encode_all(judge, parts)
    kept = encode_all(judge, parts, skip_bad=True)
    assert [pair.id for pair, _ in kept] == [parts[i].id for i in (0, 2, 4)]
    assert [list(ids) for _, ids in kept] == [judge.encode(parts[i]) for i in (0, 2, 4)]
    assert "skipped 2 of 5 pairs" in capsys.readouterr().err


def test_judgements_of_other_pairs_or_texts_are_not_dropped(folder, pairs, tmp_path):
    judge, out = load_judge(config(folder)), tmp_path / "out.jsonl"
    first = judge_file(judge, encode_all(judge, pairs[:3]), out, {"seed": 0})
    out.rename(tmp_path / "whole")
    begun = [json.dumps(x) + "\n" for x in [{"seed": 0}] + first]
    partial = tmp_path / "out.jsonl.partial"
    for now in (pairs[:2], [*pairs[:2], replace(pairs[2], answer_a=pairs[2].answer_b, answer_b=pairs[2].answer_a)]):
        partial.write_text("".join(begun))
        with pytest.raises(ValueError, match=f"partial: holds 1 judgements of pairs .* such as {pairs[2].id}: give"):
            judge_file(judge, encode_all(judge, now), out, {"seed": 0})
        assert partial.read_text() == "".join(begun)


def test_other_settings_are_refused_by_name(folder, pairs, tmp_path):
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    write_pairs(source, pairs)
    cfg = config(folder, pairs=str(source), out=str(out))
    judge = load_judge(cfg)
    settings = judge_settings(cfg, judge) | {"pairs": str(source)}
    JudgementFile(out, settings)
    for name, value in dict(votes=4, temperature=0.9, top_p=0.5, top_k=2, max_new_tokens=25, seed=1,
                            dtype="bfloat16").items():
        changed = replace(cfg, **{name: value})
        with pytest.raises(ValueError) as e:
            JudgementFile(out, judge_settings(changed, load_judge(changed)) | {"pairs": str(source)})
        assert f"{name}=" in str(e.value) and "\n" not in str(e.value)
    fewer = {k: v for k, v in settings.items() if k != "pairs"}
    for changed in (settings | {"pairs": "other.jsonl"}, settings | {"new": 1}, fewer):
        with pytest.raises(ValueError, match="begun with (pairs|new)="):
            JudgementFile(out, changed)
    JudgementFile(out, settings)  # the refusals have left it alone
    partial = tmp_path / "out.jsonl.partial"
    for line in (b"nonsense", b"[]", b'{"id": "x"}', b"\xff"):
        partial.write_bytes(json.dumps(settings).encode() + b"\n" + line + b"\n")
        with pytest.raises(ValueError, match=r"out\.jsonl\.partial:2: is no judgement; without this line"):
            JudgementFile(out, settings)
    partial.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial: does not begin with a judging run's settings"):
        JudgementFile(out, settings)
    partial.write_bytes(json.dumps(settings).encode()[:20])  # not even its first line is whole: begin anew
    assert JudgementFile(out, settings).done == {} and json.loads(partial.read_text()) == settings


def test_rendered_pairs_and_limit(folder, tmp_path, capsys):
    """RM-R1's rows bring their own messages, and those are what the judge is shown."""
    source, messages = tmp_path / "rows.jsonl", [{"role": "system", "content": "Judge."},
                                                 {"role": "user", "content": "A or B?"}]
    source.write_text("".join(json.dumps({"context_messages": messages, "winner": f"model_{x}"}) + "\n" for x in "aba"))
    main(config(folder, pairs=str(source), out=str(tmp_path / "out.jsonl"), limit=2))
    records = without_seconds(tmp_path / "out.jsonl")
    assert [r["winner"] for r in records] == ["a", "b"] and records[0]["votes"] == records[1]["votes"]
    assert {r["prompt_hash"] for r in records} == {f"{prompt_key(Tokenizer(folder).chat(messages)):016x}"}
    assert capsys.readouterr().out.startswith("2 pairs judged")


# ---- the command line


@pytest.mark.parametrize("argv, word", [
    (["--votes", "0"], "--votes"), (["--votes", "2"], "--temperature"), (["--temperature", "-1"], "--temperature"),
    (["--temperature", "nan"], "--temperature"), (["--top-p", "0"], "--top-p"), (["--top-p", "1.1"], "--top-p"),
    (["--top-k", "-1"], "--top-k"), (["--max-new-tokens", "0"], "--max-new-tokens"), (["--n-slots", "0"], "--n-slots"),
    (["--dtype", "float16"], "--dtype"), (["--device", "tpu"], "--device"), (["--limit", "-1"], "--limit"),
    (["--seed", "-1"], "--seed"), (["--seed", str(2**63)], "--seed"), (["--seed", "x"], "--seed"),
    (["--pairs", "x.jsonl"], "--out"), (["--out", "x.jsonl"], "--pairs"),
    (["--question", "q", "--question-file", "f"], "--question"),
    (["--answer-b", "q", "--answer-b-file", "f"], "--answer-b"),
    (["--pairs", "x", "--out", "y", "--answer-a", "z"], "--answer-a"), (["--quest", "q"], "--quest"),
], ids=" ".join)
def test_wrong_options_end_in_one_line(argv, word, capsys):
    with pytest.raises(SystemExit) as e:
        parse_config(Config, argv=["--model", "m", *argv])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and word in error and error.count("\n") == 1


def test_a_pair_from_files_is_the_pair_from_flags(folder, tmp_path):
    """A final newline and a byte order mark are the editor's, not the answer's; what is not there or not UTF-8 is
    named."""
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfsort 76915\n")
    (tmp_path / "a.txt").write_bytes(b"15679")
    (tmp_path / "b.txt").write_bytes(b"12568\n\n")
    files = {f"{name}_file": str(tmp_path / f"{x}.txt")
             for name, x in (("question", "q"), ("answer_a", "a"), ("answer_b", "b"))}
    names = ("question", "answer_a", "answer_b")
    texts = texts_from_options(config(folder, **files), names)
    assert texts == ["sort 76915", "15679", "12568\n"]
    assert texts == texts_from_options(config(folder, **dict(zip(names, texts))), names)
    (tmp_path / "a.txt").write_bytes(b"1567\xff")
    with pytest.raises(ValueError, match=r"a\.txt: byte 4 is not UTF-8"):
        texts_from_options(config(folder, **files), names)
    with pytest.raises(FileNotFoundError, match="none.txt"):
        texts_from_options(config(folder, **files | {"answer_a_file": str(tmp_path / "none.txt")}), names)


def test_a_judgement_is_streamed_as_it_is_written(folder, monkeypatch):
    """Whenever something is printed, all whole characters of the tokens drawn so far are out, and flushed."""
    drawn, printed, tokenizer = [], [], Tokenizer(folder)
    draw = batch.choose

    def choose_and_note(*args):
        ids, logps = draw(*args)
        drawn.append(int(ids[0]))
        return ids, logps

    def print_and_note(text, end="\n", flush=False):
        printed.append((len(drawn), text + end, flush))
    monkeypatch.setattr(batch, "choose", choose_and_note)
    monkeypatch.setattr(judging, "print", print_and_note, raising=False)
    main(config(folder, votes=1, temperature=1.0, max_new_tokens=40, question="sort 31", answer_a="13", answer_b="31",
                seed=4))
    text = "".join(text for n, text, _ in printed[:len(drawn)])
    flushed = [n for n, _, flush in printed[:len(drawn)] if flush]
    assert flushed == list(range(1, len(drawn) + 1)), "one flushed print per token"
    assert tokenizer.decode(drawn).startswith(text) and printed[-1][1].startswith("verdict: ")
    assert "".join(text for _, text, _ in printed[:-1]) == tokenizer.decode(drawn) + "\n"


def test_a_folder_whose_parts_do_not_fit(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(ValueError, match="no prompt.txt, so --prompt must say"):
        load_judge(config(tmp_path))
    load_judge(config(tmp_path, prompt="direct"))
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    tiny(QWEN2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer.json has \d+ tokens, but config.json's vocab_size is 61"):
        load_judge(config(tmp_path, prompt="direct"))


def command(*args):
    return subprocess.run([sys.executable, str(ROOT / "judge.py"), "--threads", "1", *map(str, args)],
                          cwd=tempfile.gettempdir(),
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_command_line_judges_a_pair(folder):
    """Oracle: the same judge in this process. From another folder than the repository."""
    done = command("--model", folder, "--question", "sort 76915", "--answer-a", "15679", "--answer-b", "12568",
                   "--votes", 5, "--temperature", 1, "--max-new-tokens", 60)
    judge = load_judge(config(folder, votes=5, max_new_tokens=60))
    pair = Pair("pair", [{"role": "user", "content": "sort 76915"}], "15679", "12568", None, "", "")
    (_, record), = judge.judge([pair])
    assert done.returncode == 0 and done.stderr == ""
    verdict, text = record["verdict"], record["votes"][0]["text"]
    assert done.stdout.startswith(text + "\nverdict: " + (verdict.upper() if verdict else "none") + " (A ")
    assert f"{sum(v['n_tokens'] for v in record['votes'])} tokens in " in done.stdout


def test_command_line_mistakes_end_in_one_line(tmp_path):
    done = command("--model", tmp_path / "none", "--question", "q", "--answer-a", "a", "--answer-b", "b")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'none'}: ") and done.stderr.count("\n") == 1


# ---- a real geometry


@pytest.mark.skipif(not (SHARED / "qwen2.5-tokenizer").is_dir() or not (SHARED / "benchmarks" / "rmb").is_dir(),
                    reason=f"no qwen2.5-tokenizer and RMB records at {SHARED}: set RM_SHARED")
def test_qwen_05b_width_judges_rmb_from_the_command_line():
    """Random weights in the shape of Qwen2.5-0.5B, 8 of its 24 layers, with its tokenizer, bfloat16; prompts of about
    950 tokens."""
    raw = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=151_936, hidden_size=896,
               intermediate_size=4864,
               num_hidden_layers=8, num_attention_heads=14, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6,
               max_position_embeddings=32_768, tie_word_embeddings=True)
    judged = sorted(read_pairs(SHARED / "benchmarks" / "rmb"), key=lambda pair: len(json.dumps(to_json(pair))))[:4]
    with tempfile.TemporaryDirectory() as path:  # 1 GB: not among the folders that pytest keeps
        path = Path(path)
        with torch.device("meta"):
            model = Model(ModelConfig.from_dict(raw))
        model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
        rng = torch.Generator().manual_seed(0)
        for x in model.parameters():  # matrices and biases of variance 0.02^2, uniform for speed; norms 1
            x.uniform_(-0.035, 0.035, generator=rng)
        for name, x in model.named_parameters():
            if "norm" in name:
                x.fill_(1)
        model.save_pretrained(path / "model")
        Tokenizer(SHARED / "qwen2.5-tokenizer").save(path / "model")
        del model
        write_pairs(path / "pairs.jsonl", judged)
        done = command("--model", path / "model", "--prompt", "instruct", "--pairs", path / "pairs.jsonl",
                       "--out", path / "out.jsonl", "--max-new-tokens", 8, "--dtype", "bfloat16")
        assert done.returncode == 0, done.stderr
        records = without_seconds(path / "out.jsonl")
    tokenizer, prompt = Tokenizer(SHARED / "qwen2.5-tokenizer"), load_prompt("instruct")
    assert len(records) == 4
    for pair, r in zip(judged, records):
        ids = tokenizer.chat(render(prompt, pair))
        assert (r["id"], r["winner"], r["source"]) == (pair.id, pair.winner, "rmb")
        assert r["prompt_hash"] == f"{prompt_key(ids):016x}" and r["n_prompt_tokens"] == len(ids) > 900
        vote, = r["votes"]
        assert vote["n_tokens"] == 8 and not vote["finished"] or vote["finished"] and vote["n_tokens"] <= 8
        assert r["verdict"] == vote["verdict"] == benchmark_verdict(vote["text"])


# ---- as a library


def test_readmes_ten_lines_run(folder, capsys):
    """Its example from Python, with this test's model in place of the demo's. Oracles: the trainer's log-probabilities
    are the sampler's; the printed judgement is the command line's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("From Python, in the"):].split("\n\n")[1]
    assert block.count("runs/demo/grpo/model") == 2
    names = {}
    exec(textwrap.dedent(block).replace("runs/demo/grpo/model", str(folder)), names)
    assert names["logp_m"].tolist() == pytest.approx(names["rollout"].logps, abs=1e-4)
    assert len(names["entropy_m"]) == len(names["rollout"].ids) > 0
    printed = capsys.readouterr().out
    main(config(folder, question="sort 40718", answer_a="01478", answer_b="01487", max_new_tokens=96, votes=1,
                temperature=0.0))
    judgement = capsys.readouterr().out.rpartition("\nverdict:")[0]
    assert printed.endswith(judgement + "\n") and judgement
