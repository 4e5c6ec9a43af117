"""data/fetch.py. Oracles: a server of the tests plays the Hugging Face Hub and GitHub and counts what it is asked for;
parquet files that the tests write with the data sets' columns, read back through data/pairs.py and compared by hand."""

import ast
import hashlib
import json
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.judge_bench import read_judge_bench  # noqa: E402
from benchmarks.reward_bench_2 import read_pairwise  # noqa: E402
from data import fetch, rm_r1_prompts  # noqa: E402
from data.fetch import main, parse_options  # noqa: E402
from data.pairs import Pair, read_chains, read_pairs  # noqa: E402
from prompt import load_prompt  # noqa: E402

COMMIT = "0123456789abcdef" * 2 + "01234567"
MODEL = {"config.json": b'{"model_type": "qwen2"}', "model.safetensors": bytes(range(256)) * 1000,
         "tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "merges.txt": b"", "pytorch_model.bin": b"pickle",
         "training_args.pt": b"pickle", "README.md": b"x", "original/model.safetensors": b"another format"}


def git_sha1(body):
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


class Host(ThreadingHTTPServer):
    """The Hub and GitHub at once, and on another port the storage that the Hub redirects to."""

    def __init__(self, storage=None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.storage, self.files, self.token, self.paged = storage, {}, None, False
        self.asked, self.failures, self.cut, self.ranges = [], {}, {}, True
        self.listed = {}               # path: a checksum to list instead of the right one
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def downloads(self):
        return [(path, headers.get("Range")) for path, headers in self.asked if "/resolve/" in path or "/raw/" in path]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, body, status=200, headers=(), sent=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[:sent])
        if sent is not None:
            self.close_connection = True

    def do_GET(self):
        host, (path, _, query) = self.server, self.path.partition("?")
        host.asked.append((path, dict(self.headers)))
        if status := next(iter(host.failures.get(path, ())), None):
            host.failures[path].pop(0)
            return self.send(b"no", status)
        if host.token and self.headers["Authorization"] != f"Bearer {host.token}":
            return self.send(b"no", 401)
        if match := re.fullmatch("/api/(datasets/|models/)([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            if match[4] not in ("main", "refs%2Fconvert%2Fparquet", COMMIT):
                return self.send(b"no", 404)
            return self.revision() if match[3] == "revision" else self.hub_tree(query)
        if re.fullmatch("/api/repos/[^/]+/[^/]+/git/trees/.+", path):
            entries = [{"path": name, "type": "blob", "size": len(body), "sha": host.listed.get(name, git_sha1(body))}
                       for name, body in host.files.items()]
            tree = [{"path": "d", "type": "tree"}, *entries]
            return self.send(json.dumps({"truncated": False, "tree": tree}).encode())
        place = "(?:/datasets)?/[^/]+/[^/]+/resolve/[^/]+/(.+)|/raw/[^/]+/[^/]+/[^/]+/(.+)|/stored/(.+)"
        match = re.fullmatch(place, path)
        if not match:
            return self.send(b"no", 404)
        name = unquote(match[1] or match[2] or match[3])
        if host.storage and match[1] and name.endswith((".parquet", ".safetensors")):
            return self.send(b"", 302, [("Location", f"{host.storage.url}/stored/{name}")])
        body, start, headers = host.files[name], 0, ()
        if self.headers["Range"] and host.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers = [("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")]
        cut = host.cut[name].pop(0) if host.cut.get(name) else None
        self.send(body[start:], 206 if headers else 200, headers, cut)

    def revision(self):
        self.send(json.dumps({"sha": COMMIT}).encode())

    def hub_tree(self, query):
        host, entries = self.server, []
        for name, body in host.files.items():
            if "/" in name and "recursive" not in query:
                continue
            lfs = {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}}
            entry = {"type": "file", "path": name, "size": len(body), "oid": host.listed.get(name, git_sha1(body))}
            if name.endswith((".parquet", ".safetensors")):
                entry |= {**lfs, "oid": "f" * 40}
                entry["lfs"]["oid"] = host.listed.get(name, entry["lfs"]["oid"])
            entries.append(entry)
        half = len(entries) // 2
        if not host.paged:
            self.send(json.dumps([{"type": "directory", "path": "d", "size": 0, "oid": "0"}, *entries]).encode())
        elif "cursor" not in query:
            page = f"{host.url}{self.path}{'&' if query else '?'}cursor=2"
            self.send(json.dumps(entries[:half]).encode(), headers=[("Link", f'<{page}>; rel="next"')])
        else:
            self.send(json.dumps(entries[half:]).encode())


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setenv("HF_ENDPOINT", host.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(fetch, "PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(fetch, "GITHUB_API", f"http://localhost:{host.server_port}/api")    # not the Hub's name
    monkeypatch.setattr(fetch, "GITHUB_RAW", f"http://localhost:{host.server_port}/raw")
    host.files = dict(MODEL)
    yield host
    host.shutdown()
    host.server_close()


def run(tmp_path, *what, **options):
    main(what, out=str(tmp_path), **options)


def files_in(folder):
    """{path: content} without fetched.json, and nothing unfinished among it."""
    found = {f.relative_to(folder).as_posix(): f.read_bytes() for f in Path(folder).rglob("*") if f.is_file()}
    assert not [name for name in found if name.endswith((".part", ".tmp"))]
    return {name: body for name, body in found.items() if name != "fetched.json"}


WANTED = {name: MODEL[name] for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                         "merges.txt")}


# ---- downloading

@pytest.mark.parametrize("paged", [False, True])
def test_model_is_its_safetensors_and_json_and_nothing_pickled(host, tmp_path, capsys, paged):
    host.paged = paged
    run(tmp_path, "org/model")
    assert files_in(tmp_path / "org/model") == WANTED
    record = json.loads((tmp_path / "org/model/fetched.json").read_text())
    assert (record["repo"], record["revision"], record["commit"]) == ("org/model", "main", COMMIT)
    assert record["files"]["model.safetensors"] == {
        "size": 256_000, "checksum": hashlib.sha256(MODEL["model.safetensors"]).hexdigest()}
    assert record["files"]["config.json"]["checksum"] == git_sha1(MODEL["config.json"])
    assert all(f"/resolve/{COMMIT}/" in path for path, _ in host.downloads())    # not at a branch that may move
    assert "5 files of org/model" in capsys.readouterr().out


def test_a_second_start_downloads_what_is_not_whole(host, tmp_path):
    run(tmp_path, "org/model")
    host.asked.clear()
    run(tmp_path, "org/model")
    assert host.downloads() == []
    weights = tmp_path / "org/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")       # same size, other content
    (tmp_path / "org/model/config.json").write_bytes(b"{")
    run(tmp_path, "org/model", revision=COMMIT)
    assert sorted(path.split("/")[-1] for path, _ in host.downloads()) == ["config.json", "model.safetensors"]
    assert files_in(tmp_path / "org/model") == WANTED


def interrupted(tmp_path, monkeypatch):
    """A run that is killed after 100,000 bytes of the weights."""
    whole = fetch.chunks

    def killed(url, start=0):
        for response, offset, chunk in whole(url, start):
            yield response, offset, chunk[:100_000] if "safetensors" in url else chunk
            if "safetensors" in url:
                raise KeyboardInterrupt
    monkeypatch.setattr(fetch, "chunks", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "org/model")
    monkeypatch.setattr(fetch, "chunks", whole)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(host, tmp_path, monkeypatch, ranges):
    """The next start asks for the rest, and begins anew if the server sends all."""
    host.ranges = ranges
    interrupted(tmp_path, monkeypatch)
    weights = tmp_path / "org/model/model.safetensors"
    assert not weights.exists() and not (tmp_path / "org/model/fetched.json").exists()
    part, = weights.parent.glob("*.part")
    assert part.read_bytes() == MODEL["model.safetensors"][:100_000]
    host.asked.clear()
    run(tmp_path, "org/model")
    assert [byte_range for path, byte_range in host.downloads() if "safetensors" in path] == ["bytes=100000-"]
    assert files_in(tmp_path / "org/model") == WANTED


def test_bytes_of_another_revision_are_not_gone_on_with(host, tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch)
    host.files["model.safetensors"] = newer = MODEL["model.safetensors"][::-1]
    run(tmp_path, "org/model")
    assert (tmp_path / "org/model/model.safetensors").read_bytes() == newer


def test_connections_that_end_early_and_servers_that_fail_for_a_while(host, tmp_path):
    """Five cut connections, more than there are pauses: they do not count as long as bytes arrive."""
    host.cut = {"model.safetensors": [1000, 1000, 1000, 1000, 1000]}
    host.failures = {"/api/models/org/model/revision/main": [500, 503],
                     f"/org/model/resolve/{COMMIT}/config.json": [502]}
    run(tmp_path, "org/model")
    assert files_in(tmp_path / "org/model") == WANTED
    ranges = [byte_range for path, byte_range in host.downloads() if "safetensors" in path]
    assert ranges == [None] + [f"bytes={n}000-" for n in (1, 2, 3, 4, 5)]


def test_a_server_that_keeps_failing(host, tmp_path):
    path = "/api/models/org/model/revision/main"
    host.failures = {path: [500] * 4}
    with pytest.raises(ValueError, match="HTTP 500.*server failed"):
        run(tmp_path, "org/model")
    assert [asked for asked, _ in host.asked] == [path] * 4
    host.failures, host.cut = {}, {"config.json": [0] * 9}
    with pytest.raises(ValueError, match="config.json: the connection ended 23 bytes early"):
        run(tmp_path, "org/model")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])       # sha256; git's sha1
def test_a_corrupted_file_is_noticed_and_removed(host, tmp_path, name):
    host.listed = {name: "a" * (64 if name == "model.safetensors" else 40)}
    with pytest.raises(ValueError, match=f"{name}: what came has not the checksum") as e:
        run(tmp_path, "org/model")
    assert "\n" not in str(e.value)
    assert name not in files_in(tmp_path)
    host.listed = {}
    run(tmp_path, "org/model")
    assert files_in(tmp_path / "org/model") == WANTED


def test_the_token_opens_a_closed_repository_and_stays_with_the_hub(host, tmp_path, monkeypatch):
    host.token, host.storage = "secret", Host()
    host.storage.files = host.files
    with pytest.raises(ValueError, match="HTTP 401, no such repository, or a closed one.*HF_TOKEN"):
        run(tmp_path, "org/model")
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    run(tmp_path, "org/model")
    assert files_in(tmp_path / "org/model") == WANTED
    assert [path for path, _ in host.storage.asked] == ["/stored/model.safetensors"]
    assert not any("Authorization" in headers for _, headers in host.storage.asked)
    host.storage.shutdown()
    host.storage.server_close()


def test_a_redirect_within_the_hub_keeps_the_token(host, tmp_path, monkeypatch):
    host.token, host.storage = "secret", host
    monkeypatch.setenv("HF_TOKEN", "secret")
    run(tmp_path, "org/model")
    assert [headers.get("Authorization") for path, headers in host.asked if "/stored/" in path] == ["Bearer secret"]


def test_what_is_not_there(host, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="/revision/v9: HTTP 404, not found: check the name and --revision"):
        run(tmp_path, "org/model", revision="v9")
    assert len(host.asked) == 1                                 # and no second attempt
    host.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    with pytest.raises(ValueError, match=r"it has no \*.safetensors.*pickled weights are never fetched"):
        run(tmp_path, "org/model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")     # nobody listens
    with pytest.raises(ValueError, match="no answer .*refused.*check the network") as e:
        run(tmp_path, "org/model")
    assert "\n" not in str(e.value)


def test_a_page_instead_of_json(host, tmp_path, monkeypatch):
    monkeypatch.setattr(Answer, "revision", lambda self: self.send(b"<html>log in</html>"))
    with pytest.raises(ValueError, match="revision/main: the answer is not JSON: is a proxy"):
        run(tmp_path, "org/model")


@pytest.mark.parametrize("path", ["RMB_dataset/../../../escaped.json", "/RMB_dataset/x.json"])
def test_a_listed_path_cannot_leave_its_folder(host, tmp_path, monkeypatch, path):
    pattern = "*.json"
    monkeypatch.setitem(fetch.SOURCES, "rmb", fetch.Source("github", "o/r", (pattern,), revision=COMMIT))
    host.files = {path: b"{}"}
    with pytest.raises(ValueError, match="leads out of its folder"):
        run(tmp_path / "out", "rmb")
    assert not list(tmp_path.rglob("*.json"))


def test_github_benchmarks_come_at_their_commits_as_they_are(host, tmp_path, monkeypatch):
    """RMB keeps its tree, which data/pairs.py reads; RM-Bench its one file. Nothing else of the repositories comes,
    and the Hub's token does not go there."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    talk = [{"role": "user", "content": "Hi"}]
    pairwise = {"pair_uid": "u1", "conversation_input": talk, "category_path": "Pairwise_set/Helpfulness/Chat/X",
                "chosen": {"llm_name": "m", "answer": "Hello"}, "reject": {"llm_name": "n", "answer": "Go"}}
    best = {"bon_uid": "u2", "conversation_input": talk, "category_path": "BoN_set/Harmlessness/S1",
            "bon_best": {"llm_name": "m", "answer": "Hello"}, "loser_list": [{"llm_name": "n", "answer": "Go"}]}
    items = {"id": "chat/1", "prompt": "Hi", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "chat"}
    host.files = {"RMB_dataset/Pairwise_set/Helpfulness/Chat/Role Playing.json": json.dumps([pairwise]).encode(),
                  "RMB_dataset/BoN_set/Harmlessness/S1.json": json.dumps([best]).encode(), "eval/result.json": b"[]",
                  "data/total_dataset.json": json.dumps([items]).encode(), "data/chat_filtered.json": b"[]"}
    run(tmp_path, "rmb", "rm-bench")
    assert sorted(files_in(tmp_path / "rmb")) == ["RMB_dataset/BoN_set/Harmlessness/S1.json",
                                                  "RMB_dataset/Pairwise_set/Helpfulness/Chat/Role Playing.json"]
    assert [p.id for p in read_pairs(tmp_path / "rmb/RMB_dataset")] == ["u2/0", "u1"]
    assert len(read_pairs(tmp_path / "rm-bench/data/total_dataset.json")) == 9
    assert list(files_in(tmp_path / "rm-bench")) == ["data/total_dataset.json"]
    for name in ("rmb", "rm-bench"):
        assert json.loads((tmp_path / name / "fetched.json").read_text())["commit"] == fetch.SOURCES[name].revision
    assert not any("Authorization" in headers for _, headers in host.asked)
    commits = {path.split("/")[4] for path, _ in host.downloads()}
    assert commits == {"73c52d7b27b361621361ec959ac6c0eb9bb7a689", "2be3180857f2190b7ffa929d43190835627f1f4d"}


def test_judgebench_comes_as_its_two_files(host, tmp_path):
    line = {"original_id": None, "source": "livebench-math", "question": "Hi", "response_A": "Hello",
            "response_B": "Go", "label": "A>B"}
    for name, model in (("gpt", "gpt-4o-2024-05-13"), ("claude", "claude-3-5-sonnet-20240620")):
        record = line | {"pair_id": name, "response_model": model}
        host.files[f"data/{name}-00000-of-00001.jsonl"] = (json.dumps(record) + "\n").encode()
    run(tmp_path, "judgebench")
    assert sorted(files_in(tmp_path / "judgebench")) == ["data/claude-00000-of-00001.jsonl",
                                                         "data/gpt-00000-of-00001.jsonl"]
    found = read_judge_bench(tmp_path / "judgebench/data", "published")
    assert [(p.id, p.source) for p in found] == [("gpt", "judgebench-gpt"), ("claude", "judgebench-claude")]


def test_prompts_of_the_released_models_come_out_of_their_file(host, tmp_path, monkeypatch):
    """The file comes at its commit like the others, is read and not run; nothing of it that is read is a prompt."""
    monkeypatch.setattr(rm_r1_prompts, "SYSTEM_CHARS", 4)
    path = "eval/reward-bench/rewardbench/generative.py"
    names = [f"{turns}_TURN_{kind}" for kind in ("INSTRUCT", "REASONING") for turns in ("SINGLE", "MULTI")]
    texts = {"SINGLE": "{question}{answer_a}{answer_b}", "MULTI": "{conversation_1}{conversation_2}"}
    body = "raise SystemExit\nRM_R1_INSTRUCT_SYSTEM_PROMPT = 'S' + '\\n\\n\\n'\n"
    body += "".join(f"RM_R1_{name}_USER_PROMPT = '{name} {texts[name.split('_')[0]]}'\n" for name in names)
    host.files = {path: body.encode(), "eval/RM-Bench/rewardbench/generative.py": b"x", "setup.py": b"x"}
    run(tmp_path, "rm-r1-prompts")
    assert list(files_in(tmp_path / "rm-r1-prompts")) == [path]
    assert load_prompt(tmp_path / "rm-r1-instruct.txt").system == "S\n\n\n"
    reasoning = load_prompt(tmp_path / "rm-r1-reasoning.txt")
    assert reasoning.system is None and reasoning.user == "SINGLE_TURN_REASONING {question}{answer_a}{answer_b}"
    assert json.loads((tmp_path / "rm-r1-prompts/fetched.json").read_text())["commit"].startswith("d4c2542f")
    again = tmp_path / "again"
    run(again, "rm-r1-prompts", files=str(tmp_path / "rm-r1-prompts"))   # a folder with the file in it
    assert (again / "rm-r1-instruct.txt").read_bytes() == (tmp_path / "rm-r1-instruct.txt").read_bytes()
    with pytest.raises(ValueError, match="nothing: no file, and no folder with generative.py in it"):
        run(again, "rm-r1-prompts", files=str(tmp_path / "nothing"))


# ---- conversion

def messages(*turns):
    return [{"content": text, "role": role} for role, text in turns]


RENDERED = messages(("system", "Judge."), ("user", "Q, A and B \u2028 \U0001f600"))
TALK = messages(("user", "Hi"), ("assistant", "Hello"))
OTHER = messages(("user", "Hi"), ("assistant", "Go"))
ROWS = {   # with columns that are there and are not used
    "rm-r1-distill-sft": [{"context_messages": RENDERED, "winner": "<type>Chat</type> so", "ground_truth": "model_a"},
                          {"context_messages": RENDERED[1:], "winner": "why", "ground_truth": "model_b"}],
    "rm-r1-rlvr": [{"context_messages": RENDERED, "winner": "model_b"},
                   {"context_messages": RENDERED[1:], "winner": "model_a"}],
    "math-step-dpo": [{"dataset": "x", "prompt": "1+1?", "initial_reason_steps": "Step 1: ", "chosen": "c",
                       "rejected": "r", "full_chosen": "it is 2", "full_rejected": "it is 3", "answer": "2"},
                      {"dataset": "x", "prompt": "2+2?", "initial_reason_steps": "", "chosen": "c",
                       "rejected": "r", "full_chosen": "4", "full_rejected": "5", "answer": "4"}],
    "code-preference-pairs": [{"input": "Sort.", "accepted": "sorted(x)", "rejected": "x", "ID": 7},
                              {"input": "Sort.", "accepted": "sorted(x)", "rejected": "x", "ID": None}],
    "skywork-80k": [{"chosen": TALK, "rejected": OTHER, "source": "magpie_ultra"},
                    {"chosen": TALK + messages(("user", "u"), ("assistant", "x")), "source": "helpsteer2",
                     "rejected": TALK + messages(("user", "u"), ("assistant", "y"))}],
    "reward-bench": [{"prompt": "Hi", "chosen": "Hello", "chosen_model": "m", "rejected": "Go", "rejected_model": None,
                      "subset": subset, "id": 3692} for subset in ("donotanswer", "hep-python")],
    "reward-bench-2": [{"id": id, "prompt": "Hi", "chosen": chosen, "rejected": ["Go", "No", "So"], "subset": subset,
                        "num_correct": len(chosen), "num_incorrect": 3, "total_completions": 3 + len(chosen),
                        "models": ["m"], "additional_metadata": {"valid": 1.0}}
                       for id, subset, chosen in (("7", "Math", ["Hello"]), ("7", "Safety", ["Hello"]),
                                                  ("tied:0", "Ties", ["Hello", "Hey"]))]}
ROWS["rm-r1-reasoning-rlvr"] = ROWS["rm-r1-rlvr"]


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow", reason="pyarrow, which converts parquet, is not installed")
    import pyarrow.parquet
    return pyarrow


def save(parquet, path, rows, schema=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.parquet.write_table(parquet.Table.from_pylist(rows, schema=schema), path, **options)
    return path


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]   # a text has U+2028


def prompt_and_answers(pair):
    sides = (pair.answer_a, pair.answer_b) if pair.winner == "a" else (pair.answer_b, pair.answer_a)
    return (pair.prompt, *sides)


def converted(parquet, tmp_path, name, rows=None, **options):
    file = save(parquet, tmp_path / "in" / f"{name}.parquet", ROWS[name] if rows is None else rows)
    run(tmp_path, name, files=str(file), **options)
    return tmp_path / f"{name}.jsonl"


def test_rm_r1_sets(parquet, tmp_path):
    chains = read_chains(converted(parquet, tmp_path, "rm-r1-distill-sft"))
    assert [(c.pair.rendered, c.judgement, c.pair.winner) for c in chains] == [
        (RENDERED, "<type>Chat</type> so", None), (RENDERED[1:], "why", None)]
    for name in ("rm-r1-rlvr", "rm-r1-reasoning-rlvr"):
        assert read_pairs(converted(parquet, tmp_path, name)) == [
            Pair(f"{name}/1", [], "", "", "b", name, "", RENDERED),
            Pair(f"{name}/2", [], "", "", "a", name, "", RENDERED[1:])]
        assert "\u2028 \U0001f600" in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8")   # and no \\u escapes


@pytest.mark.parametrize("name, wanted", [
    ("math-step-dpo", [("1+1?", "Step 1: it is 2", "Step 1: it is 3"), ("2+2?", "4", "5")]),
    ("code-preference-pairs", [("Sort.", "sorted(x)", "x")] * 2)])
def test_source_sets(parquet, tmp_path, name, wanted):
    path = converted(parquet, tmp_path, name)
    found = read_pairs(path.rename(tmp_path / "renamed.jsonl"))
    assert [prompt_and_answers(p) for p in found] == [([{"role": "user", "content": q}], c, r) for q, c, r in wanted]
    assert [(p.id, p.source, p.domain) for p in found] == [
        (f"{name}/{n}", name, {"m": "math", "c": "code"}[name[0]]) for n in (1, 2)]


def test_skywork_keeps_every_row_with_its_source(parquet, tmp_path):
    found = read_pairs(converted(parquet, tmp_path, "skywork-80k"))
    assert [prompt_and_answers(p) for p in found] == [(TALK[:1], "Hello", "Go"),
                                                      (TALK + messages(("user", "u")), "x", "y")]
    assert [(p.id, p.source, p.domain) for p in found] == [("skywork-80k/1", "magpie_ultra", "chat"),
                                                           ("skywork-80k/2", "helpsteer2", "chat")]


def test_reward_bench(parquet, tmp_path):
    """The id 3692 is in two subsets of the released file."""
    path = converted(parquet, tmp_path, "reward-bench")
    found = read_pairs(path)
    assert [prompt_and_answers(p) for p in found] == [(TALK[:1], "Hello", "Go")] * 2
    assert [(p.source, p.domain, p.subset) for p in found] == [("reward-bench", "Safety", "donotanswer"),
                                                               ("reward-bench", "Reasoning", "hep-python")]
    assert [record["id"] for record in records(path)] == [3692, 3692]


def test_reward_bench_2(parquet, tmp_path, capsys):
    """Its lists of answers stay lists; ids repeat across subsets."""
    path = converted(parquet, tmp_path, "reward-bench-2")
    assert "reward-bench-2.jsonl: 3 rows" in capsys.readouterr().out
    assert [p.id for p in read_pairwise(path)] == [f"{subset}/7/{k}" for subset in ("Math", "Safety") for k in range(3)]
    assert len(read_pairwise(path, ties=True)) == 6 + 6
    assert records(path)[2] == {"id": "tied:0", "source": "reward-bench-2", "prompt": "Hi", "chosen": ["Hello", "Hey"],
                                "rejected": ["Go", "No", "So"], "num_correct": 2, "subset": "Ties"}


def test_arrow_types_become_plain_json(parquet, tmp_path):
    """large_string, dictionary-encoded strings, large_list, int32, several row groups and batches: the same lines."""
    pa = parquet
    talk = pa.large_list(pa.struct([("content", pa.large_string()), ("role", pa.string())]))
    schema = pa.schema([("chosen", talk), ("rejected", talk), ("source", pa.dictionary(pa.int32(), pa.large_string()))])
    rows = [{"chosen": TALK, "rejected": OTHER, "source": f"s{n % 3}"} for n in range(700)]
    plain = save(pa, tmp_path / "plain.parquet", rows)
    typed = save(pa, tmp_path / "typed.parquet", rows, schema, row_group_size=100)
    for file in (plain, typed):
        run(tmp_path / file.stem, "skywork-80k", files=str(file))
    lines = [(tmp_path / kind / "skywork-80k.jsonl").read_text(encoding="utf-8") for kind in ("plain", "typed")]
    assert lines[0] == lines[1]
    assert records(tmp_path / "typed/skywork-80k.jsonl") == [
        {"id": f"skywork-80k/{n + 1}", "domain": "chat", **row} for n, row in enumerate(rows)]
    texts = ("prompt", "chosen", "rejected", "subset")
    bench = pa.schema([(key, pa.large_string()) for key in texts] + [("id", pa.int32())])
    rows = [{key: row[key] for key in bench.names} for row in ROWS["reward-bench"]]
    file = save(pa, tmp_path / "b.parquet", rows, bench)
    run(tmp_path, "reward-bench", files=str(file))
    assert [p.id for p in read_pairs(tmp_path / "reward-bench.jsonl")] == ["donotanswer/3692", "hep-python/3692"]


def test_rows_are_read_a_batch_at_a_time(parquet, tmp_path):
    """Oracle: what pyarrow holds when the first of 8 MB of rows is out. A batch is 5.1 MB; 5.5 were measured, and 8.4
    with one batch for all, 13.3 where pyarrow reads the file ahead, as it does by default."""
    rng = random.Random(0)
    rows = [{"context_messages": messages(("user", rng.randbytes(10_000).hex())), "winner": "a"} for _ in range(400)]
    file = save(parquet, tmp_path / "x.parquet", rows, row_group_size=10, use_dictionary=False)
    before = parquet.total_allocated_bytes()
    stream = fetch.rows(file, ["context_messages", "winner"])
    assert next(stream) == rows[0]
    assert parquet.total_allocated_bytes() - before < 6.5e6
    assert list(stream) == rows[1:]


def test_downloaded_shards_are_converted_in_order(host, parquet, tmp_path):
    """Only the wanted split; ids count on over the shards; one set comes from the Hub's parquet branch."""
    for name, split in (("reward-bench", "filtered"), ("code-preference-pairs", "default/train")):
        rows = ROWS[name]
        if name == "reward-bench":
            paths = [f"data/filtered-0000{k}-of-00002.parquet" for k in range(2)] + ["data/raw-00000-of-00001.parquet"]
        else:
            paths = [f"default/train/000{k}.parquet" for k in range(2)] + ["default/test/0000.parquet"]
        shards = [rows[1:], rows[:1], rows]
        host.files = {path: save(parquet, tmp_path / "hub" / path, shard).read_bytes()
                      for path, shard in zip(paths, shards)}
        run(tmp_path / "out", name)
        assert sorted(files_in(tmp_path / "out" / name)) == paths[:2]
    assert [p.id for p in read_pairs(tmp_path / "out/reward-bench.jsonl")] == ["hep-python/3692", "donotanswer/3692"]
    assert [p.id for p in read_pairs(tmp_path / "out/code-preference-pairs.jsonl")] == [
        "code-preference-pairs/1", "code-preference-pairs/2"]
    record = json.loads((tmp_path / "out/code-preference-pairs/fetched.json").read_text())
    assert (record["revision"], record["commit"]) == ("refs/convert/parquet", COMMIT)


def test_a_folder_of_files_that_are_here(parquet, tmp_path):
    for path in ("data/filtered-0.parquet", "data/raw-0.parquet"):
        save(parquet, tmp_path / "here" / path, ROWS["reward-bench"])
    run(tmp_path, "reward-bench", files=str(tmp_path / "here"))
    assert len(read_pairs(tmp_path / "reward-bench.jsonl")) == 2
    with pytest.raises(ValueError, match=r"here: no file, and no folder with train-\*.parquet"):
        run(tmp_path, "skywork-80k", files=str(tmp_path / "here"))


@pytest.mark.parametrize("name, column, value, fault", [
    ("math-step-dpo", "full_chosen", None, '"full_chosen" is null'),
    ("reward-bench", "subset", "new", '"new" is no subset of RewardBench'),
    ("rm-r1-rlvr", "winner", "model_c", "neither \"model_a\" nor \"model_b\""),
    ("rm-r1-distill-sft", "winner", "model_a", "not a judgement"),
    ("rm-r1-rlvr", "context_messages", messages(("user", None)), '"content" is null'),
    ("skywork-80k", "chosen", TALK[:1], "an answer must start"),
    ("code-preference-pairs", "input", " ", "is empty")])
def test_bad_rows(parquet, tmp_path, capsys, name, column, value, fault):
    good, second = ROWS[name]
    rows = [good, {**second, column: value}, {**second, **({"subset": "hep-go"} if name == "reward-bench" else {})}]
    with pytest.raises(ValueError, match=f"in/{name}.parquet, row 2: .*{re.escape(fault)}") as e:
        converted(parquet, tmp_path, name, rows)
    assert "\n" not in str(e.value)
    assert [f.name for f in tmp_path.iterdir()] == ["in"]       # nothing half-written
    path = converted(parquet, tmp_path, name, rows, skip_bad=True)
    err = capsys.readouterr().err
    assert f"in/{name}.parquet, row 2: skipped: " in err and "skipped 1 bad rows of 3" in err
    read = read_chains if name == "rm-r1-distill-sft" else read_pairs
    assert len(read(path)) == 2
    if name != "reward-bench":
        assert [record["id"] for record in records(path)] == [f"{name}/1", f"{name}/3"]


def test_bytes_are_not_text(parquet, tmp_path):
    rows = [{"input": b"Sort.", "accepted": b"a", "rejected": b"b"}]
    with pytest.raises(ValueError, match="row 1: .*bytes"):
        converted(parquet, tmp_path, "code-preference-pairs", rows)


def test_files_that_cannot_be_converted(parquet, tmp_path):
    with pytest.raises(ValueError, match=r"no column full_chosen, .*, prompt \(it has context_messages, winner\)"):
        converted(parquet, tmp_path, "math-step-dpo", ROWS["rm-r1-rlvr"])
    file = tmp_path / "in/math-step-dpo.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="math-step-dpo.parquet: cannot be read as parquet") as e:
        run(tmp_path, "math-step-dpo", files=str(file))
    assert str(file) in str(e.value)
    schema = parquet.schema([(key, parquet.string()) for key in ("input", "accepted", "rejected")])
    empty = save(parquet, tmp_path / "in/empty.parquet", [], schema)
    with pytest.raises(ValueError, match="empty.parquet: no usable rows among 0"):
        run(tmp_path, "code-preference-pairs", files=str(empty))
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


def test_a_conversion_that_fails_leaves_the_old_lines(parquet, tmp_path):
    path = converted(parquet, tmp_path, "rm-r1-rlvr")
    before = path.read_text()
    with pytest.raises(ValueError):
        converted(parquet, tmp_path, "rm-r1-rlvr", ROWS["rm-r1-rlvr"] + [{"context_messages": None, "winner": None}])
    assert path.read_text() == before


# ---- command line

def script(*arguments, **environment):
    import os
    return subprocess.run([sys.executable, "data/fetch.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TQDM_DISABLE": "1", **environment})


def test_script_from_the_repository_root(host, parquet, tmp_path):
    out = script("org/model", "--out", str(tmp_path), HF_ENDPOINT=host.url)
    assert (out.returncode, out.stderr) == (0, "")
    assert files_in(tmp_path / "org/model") == WANTED
    file = save(parquet, tmp_path / "x.parquet", ROWS["reward-bench"])
    out = script("reward-bench", "--files", str(file), "--out", str(tmp_path))
    assert (out.returncode, out.stdout) == (0, f"{tmp_path}/reward-bench.jsonl: 2 pairs\n")
    host.token = "secret"
    out = script("org/model", "--out", str(tmp_path), HF_ENDPOINT=host.url)
    assert out.returncode == 2 and out.stderr.count("\n") == 1 and out.stderr.startswith("error: http")


def test_help_lists_every_name_and_repository():
    out = script("--help").stdout
    for name, source in fetch.SOURCES.items():
        assert re.search(rf"^    {name} +\S", out, re.M)
        assert name == "rmb" or source.repo in out
    for option in ("WHAT", "--out OUT", "--revision REVISION", "--files FILES", "--skip-bad", "default: runs/data"):
        assert option in " ".join(out.split())


def test_options_and_what_they_are_without_being_given():
    assert vars(parse_options(["rmb", "org/model"])) == {
        "what": ["rmb", "org/model"], "out": "runs/data", "revision": None, "files": None, "skip_bad": False}
    given = parse_options(["--files", "f", "--skip-bad", "--out", "x", "skywork-80k"])
    assert (given.what, given.out, given.files, given.skip_bad) == (["skywork-80k"], "x", "f", True)
    assert parse_options(["rmb", "--revision", "v1"]).revision == "v1"
    assert parse_options(["rm-r1-prompts", "--file", "f"]).files == "f"


@pytest.mark.parametrize("arguments, fault", [
    (["rewardbench"], "'rewardbench' is neither ORG/MODEL nor one of rm-r1-distill-sft"),
    (["../up"], "'../up' is neither"), (["org/.."], "'org/..' is neither"), (["a/b/c"], "'a/b/c' is neither"),
    ([], "WHAT"), (["org/model", "--rev", "x"], "unrecognized arguments: --rev"), (["--help-me", "rmb"], "--help-me"),
    (["org/model", "--files", "x"], "org/model is not converted"),
    (["rmb", "--files", "x", "--revision", "y"], "--revision is about what to download"),
    (["rmb", "rm-bench", "--revision", "x"], "name only that"), (["rmb", "--files", "x"], "rmb is not converted")])
def test_options_that_make_no_sense(capsys, arguments, fault):
    with pytest.raises(SystemExit) as e:
        parse_options(arguments)
    err = capsys.readouterr().err
    assert e.value.code == 2 and fault in err and err.count("\n") == 1


def test_without_pyarrow_nothing_is_downloaded(host, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        run(tmp_path, "reward-bench")
    assert host.asked == []


def test_the_data_need_no_torch():
    """What data/ reads, writes and downloads needs nothing of ours but files.py and prompt.py."""
    code = ("import sys; import data.pairs, data.fields, data.toy, data.fetch; "
            "print(*((name, getattr(module, '__file__', None)) for name, module in sys.modules.items()), sep='\\n')")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = dict(ast.literal_eval(line) for line in out.stdout.splitlines())
    assert "numpy" in loaded and "torch" not in loaded
    ours = [name for name, file in loaded.items() if file and Path(file).parent in (ROOT, ROOT / "data")]
    assert sorted(ours) == ["data", "data.fetch", "data.fields", "data.pairs", "data.rm_r1_prompts", "data.toy",
                            "files", "prompt"]
