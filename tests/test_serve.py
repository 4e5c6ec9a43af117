"""serve.py and web.py. Oracles: judge.py's own records of the same pairs (float64, so that no rounding shows); OpenAI's
client; raw sockets that misbehave, each of which gets its status while the server lives on."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import judge as judging  # noqa: E402
import serve  # noqa: E402
from data import toy  # noqa: E402
from data.pairs import Pair, Question  # noqa: E402
from draw import Sampling  # noqa: E402
from judge import load_judge  # noqa: E402
from live import Live  # noqa: E402
from model import Model  # noqa: E402
from rank import rank_all, record_of  # noqa: E402
from reward import parse  # noqa: E402
from sample import Sampler  # noqa: E402
from serve import Config, Growing, before_stop, bind, key_for, load, routes_of  # noqa: E402
from test_live import assert_empty  # noqa: E402
from test_sample import make_folder  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("serve"))


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Models in float64."""
    def load_exact(folder, *_):
        model = Model.from_pretrained(folder, "cpu", torch.float64).requires_grad_(False)
        return model, Tokenizer(folder)
    monkeypatch.setattr(serve, "load_model", load_exact)
    monkeypatch.setattr(judging, "load_model", load_exact)


@contextmanager
def running(folder, key=None, **options):
    """A server as main runs it; its port is server.port, its service server.service."""
    standard = dict(port=0, max_new_tokens=24, n_slots=8, threads=1, receive_s=5.0, timeout_s=30.0, name="toy")
    cfg = Config(model=str(folder), **standard | options)
    server = bind(cfg, key and key.encode())
    server.service = load(cfg)
    server.begin(routes_of(server.service))
    server.port = server.server_address[1]
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        server.service.engine.end()


@pytest.fixture(scope="module")
def plain(folder):
    with running(folder, receive_s=0.5) as server:
        yield server


@pytest.fixture
def slow(monkeypatch):
    """A step takes 10 ms, and no rollout ends before its last token."""
    def step(self, inner=Live.step):
        time.sleep(0.01)
        return inner(self)
    monkeypatch.setattr(Live, "step", step)
    monkeypatch.setattr(Live, "reason_to_end", lambda self, slot, _: (
        "length" if len(slot.rollout.ids) == self.asked[slot.prompt].sampling.max_new_tokens else None))


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not become so"
        time.sleep(0.01)


def settled(engine):
    """Waits until whoever has asked is done or has left: a client may hear of it before."""
    until(lambda: engine.inbox.empty() and engine.n_done + engine.n_cancelled == engine.batch.n_joined)


def request(path, body=None, headers=""):
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode()
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def connect(server):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    return connection


def read_reply(file):
    """(status, headers, body) of one reply on a connection's file."""
    line = file.readline()
    assert re.match(rb"HTTP/1\.1 \d{3} ", line), line
    headers = {}
    while (header := file.readline().strip()):
        name, _, value = header.decode().partition(": ")
        headers[name] = value
    body = file.read(int(headers["Content-Length"])) if "Content-Length" in headers else file.read()
    return int(line.split()[1]), headers, body


def exchange(server, data):
    """What comes back for these bytes: (status, headers, value of the JSON)."""
    with connect(server) as connection, connection.makefile("rb") as file:
        connection.sendall(data)
        status, headers, body = read_reply(file)
    return status, headers, json.loads(body)


def post(server, path, body, headers=""):
    status, _, reply = exchange(server, request(path, body, headers))
    return status, reply


def error_of(server, path, body):
    """(status, message) of a refusal, whose form is OpenAI's."""
    status, reply = post(server, path, body)
    assert set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "param", "code"}, reply
    assert "\n" not in reply["error"]["message"]
    return status, reply["error"]["message"]


def at_once(calls):
    """The results of these calls, each in a thread of its own, all begun together."""
    found, gate = [None] * len(calls), threading.Barrier(len(calls))

    def run(i):
        gate.wait()
        found[i] = calls[i]()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


ROWS = [{key: value for key, value in row.items() if key != "judgement"} for row in toy.make("heldout", 64, 0)]


def without_seconds(record):
    votes = [{k: v for k, v in vote.items() if k not in ("seconds", "parsed")} for vote in record["votes"]]
    return record | {"votes": votes, "seconds": 0}


# ---- the same as judge.py, whoever else asks


def test_64_clients_at_once_get_what_judge_py_writes(folder):
    """Pairs with 1 or 3 votes, greedy or not, and a chat among them: nothing is lost and nothing mixed."""
    kinds = [dict(votes=3, temperature=1.0, seed=5), dict(votes=1, temperature=0.0, seed=0),
             dict(votes=2, temperature=0.7, top_p=0.9, seed=2**62)]
    expected = {}
    for k, kind in enumerate(kinds):
        rows = [(i, Pair(**row)) for i, row in enumerate(ROWS) if i % 4 == k]
        jury = load_judge(judging.Config(model=str(folder), max_new_tokens=24, n_slots=16, threads=1, **kind))
        for n, record in jury.judge([pair for _, pair in rows]):
            expected[rows[n][0]] = without_seconds(record)
    texts = [f"sort {i:05}" for i in range(3, 64, 4)]
    jury = load_judge(judging.Config(model=str(folder), threads=1))
    chats = [jury.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    groups = jury.sampler.generate(chats, Sampling(2, 20, stop=jury.tokenizer.stop_ids, seed=7))
    for i, group in zip(range(3, 64, 4), groups):
        expected[i] = [(jury.tokenizer.decode(r.ids), r.reason) for r in group]

    def ask(i):
        if i % 4 < 3:
            status, record = post(server, "/judge", ROWS[i] | kinds[i % 4])
            assert status == 200, record
            assert all(vote["parsed"] == vars(parse(vote["text"])) for vote in record["votes"])
            n_tokens = sum(vote["n_tokens"] for vote in record["votes"])
            assert record.pop("usage") == {"prompt_tokens": record["n_prompt_tokens"], "completion_tokens": n_tokens,
                                           "total_tokens": record["n_prompt_tokens"] + n_tokens}
            assert record.pop("model") == "toy"
            return without_seconds(record)
        status, reply = post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": f"sort {i:05}"}],
                                                              "n": 2, "seed": 7, "max_tokens": 20})
        assert status == 200, reply
        return [(choice["message"]["content"], choice["finish_reason"]) for choice in reply["choices"]]
    with running(folder) as server:
        found = at_once([lambda i=i: ask(i) for i in range(64)])
        assert dict(enumerate(found)) == expected
        settled(server.service.engine)
        assert_empty(server.service.engine.batch)
        until(lambda: server.n_active == 0)
        assert server.service.engine.n_taken == 0 and server.service.engine.n_done == 64
        _, headers, metrics = read_metrics(server)
        assert metrics['rm_requests_total{path="/judge",status="200"}'] == 48 and metrics["rm_done_total"] == 64
        n_tokens = sum(vote["n_tokens"] for record in found if isinstance(record, dict) for vote in record["votes"])
        assert metrics["rm_written_tokens_total"] == server.service.engine.n_written > n_tokens
        assert metrics["rm_writing"] == metrics["rm_waiting"] == 0 and metrics["rm_slots"] == 8
        assert metrics["rm_pages_free"] == metrics["rm_pages"] > 0


def read_metrics(server):
    with connect(server) as connection, connection.makefile("rb") as file:
        connection.sendall(request("/metrics"))
        status, headers, body = read_reply(file)
    lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
    return status, headers, {name: float(value) for name, value in lines}


def test_a_ranking_is_that_of_rank_py(folder):
    answers = [row["answer_a"] for row in ROWS[:5]] + [ROWS[0]["answer_a"]]
    question = Question("q7", [{"role": "user", "content": "sort 23697"}], answers)
    jury = load_judge(judging.Config(model=str(folder), max_new_tokens=24, votes=3, temperature=1.0, seed=3, threads=1))
    with running(folder) as server:
        for schedule, both_orders in (("swiss", True), ("all", False)):
            (_, found), = rank_all(jury, [question], schedule, both_orders, 3)
            expected = json.loads(json.dumps(record_of(question, found)))
            body = {"id": "q7", "question": "sort 23697", "answers": answers, "schedule": schedule, "votes": 3,
                    "both_orders": both_orders, "temperature": 1, "seed": 3}
            assert post(server, "/rank", body) == (200, expected | {"model": "toy"})
        settled(server.service.engine)
        assert_empty(server.service.engine.batch)
        for fault, words in [({"answers": ["x"]}, "from 2 to 64"), ({"schedule": "none"}, "swiss"),
                             ({"both_orders": 1}, "true or false"), ({"question": None}, "null")]:
            status, message = error_of(server, "/rank", body | fault)
            assert status == 400 and words in message


# ---- OpenAI's client


@pytest.fixture
def client(plain):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{plain.port}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_openai_client_completes_and_streams(client, plain):
    assert [model.id for model in client.models.list()] == ["toy"]
    tokenizer = plain.service.judge.tokenizer
    ids = tokenizer.chat([{"role": "system", "content": "Must"}, {"role": "user", "content": "sort\n40718"}])
    sampler = Sampler(plain.service.judge.sampler.model)
    group, = sampler.generate([ids], Sampling(3, 24, 0.9, 0.95, stop=tokenizer.stop_ids, seed=11))
    whole = [tokenizer.decode(rollout.ids) for rollout in group]
    stop = whole[0][len(whole[0]) // 2:][:3]  # in the middle of the first
    ask = dict(model="toy", n=3, temperature=0.9, top_p=0.95, seed=11, messages=[
        {"role": "system", "content": "Must"},
        {"role": "user", "content": [{"type": "text", "text": "sort"}, {"type": "text", "text": "40718"}]}])

    done = client.chat.completions.create(**ask, user="ignored", extra_body={"top_k": -1, "unknown": {"a": [1]}})
    assert [choice.message.content for choice in done.choices] == whole
    assert [choice.finish_reason for choice in done.choices] == [rollout.reason for rollout in group]
    n = sum(len(rollout.ids) for rollout in group)
    usage = {"prompt_tokens": len(ids), "completion_tokens": n, "total_tokens": len(ids) + n}
    assert done.usage.model_dump(exclude_none=True) == usage

    cut = client.chat.completions.create(**ask, stop=[stop, "never there"])
    assert [choice.message.content for choice in cut.choices] == [text.split(stop)[0] for text in whole]
    assert cut.choices[0].finish_reason == "stop" and cut.usage.completion_tokens < n

    for stops, expected in ((None, whole), ([stop], [text.split(stop)[0] for text in whole])):
        texts, reasons, usages, begun = [""] * 3, [None] * 3, [], []
        stream = client.chat.completions.create(**ask, stop=stops, stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            usages.append(chunk.usage)
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
                begun += [choice.index] if choice.delta.role == "assistant" else []
        assert texts == expected and None not in reasons and begun == [0, 1, 2]
        assert usages[-1].completion_tokens == (n if stops is None else cut.usage.completion_tokens)
        assert usages[:-1] == [None] * (len(usages) - 1)


def test_the_openai_client_understands_refusals(client, folder):
    import openai
    messages = [{"role": "user", "content": "sort"}]
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=messages)
    with pytest.raises(openai.BadRequestError, match="from 1 to 24"):
        client.chat.completions.create(model="toy", messages=messages, max_tokens=25)
    with pytest.raises(openai.BadRequestError, match="tokens") as found:
        client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "sort " * 2000}])
    assert found.value.code == "context_length_exceeded"
    with running(folder, KEY) as server:
        for key, refused in (("wrong", True), (KEY, False)):
            with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=0) as other:
                if refused:
                    with pytest.raises(openai.AuthenticationError):
                        other.models.list()
                else:
                    assert other.models.list().data[0].id == "toy"


# ---- what is asked wrongly


CHAT = {"messages": [{"role": "user", "content": "sort"}], "max_tokens": 2}
PAIR = {"question": "sort", "answer_a": "1", "answer_b": "2", "max_tokens": 2}


@pytest.mark.parametrize("path, body, words", [
    ("/v1/chat/completions", b"{", "malformed JSON"),
    ("/v1/chat/completions", b"[1]", "object must stand here"),
    ("/v1/chat/completions", b"[" * 200_000, "nested too deeply"),
    ("/v1/chat/completions", b'{"n": ' + b"9" * 10_000 + b"}", "number too long"),
    ("/v1/chat/completions", b'{"a": "\xff"}', "not UTF-8"),
    ("/v1/chat/completions", b"", "malformed JSON"),
    ("/v1/chat/completions", {}, '"messages"'),
    ("/v1/chat/completions", CHAT | {"messages": []}, "non-empty"),
    ("/v1/chat/completions", CHAT | {"messages": ["x"]}, "a string"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "tool", "content": "x"}]}, "unknown role"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ("/v1/chat/completions", CHAT | {"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ("/v1/chat/completions", CHAT | {"temperature": "1"}, '"temperature" is a string'),
    ("/v1/chat/completions", CHAT | {"temperature": True}, "true or false"),
    ("/v1/chat/completions", CHAT | {"temperature": float("nan")}, "nan"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "inf"),
    ("/v1/chat/completions", CHAT | {"temperature": 1e-9}, "at least 0.001"),
    ("/v1/chat/completions", CHAT | {"seed": 2**63}, '"seed"'),
    ("/v1/chat/completions", CHAT | {"n": 10**4000}, "from 1 to 8"),
    ("/v1/chat/completions", CHAT | {"n": 9}, "from 1 to 8"),
    ("/v1/chat/completions", CHAT | {"n": 2, "temperature": 0}, "greedy"),
    ("/v1/chat/completions", CHAT | {"top_p": 0}, "above 0"),
    ("/v1/chat/completions", CHAT | {"max_tokens": 0}, "from 1 to 24"),
    ("/v1/chat/completions", CHAT | {"max_completion_tokens": 1.5}, "an integer"),
    ("/v1/chat/completions", CHAT | {"stop": [""]}, '"stop"'),
    ("/v1/chat/completions", CHAT | {"stop": {"a": 1}}, '"stop" is an object'),
    ("/v1/chat/completions", CHAT | {"stream": "yes"}, '"stream" is a string'),
    ("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}}, "without"),
    ("/v1/chat/completions", CHAT | {"logprobs": True}, "not supported"),
    ("/v1/chat/completions", CHAT | {"model": 3}, '"model" is an integer'),
    *[("/v1/chat/completions", CHAT | {name: value}, f'"{name}" is not supported') for name, value in (
        ("min_tokens", 1), ("stop_token_ids", [3]), ("add_generation_prompt", False), ("continue_final_message", True),
        ("include_stop_str_in_output", True), ("skip_special_tokens", False), ("chat_template", ""), ("best_of", 2),
        ("chat_template_kwargs", {"enable_thinking": False}), ("top_logprobs", 1), ("tool_choice", "required"),
        ("modalities", ["audio"]), ("structured_outputs", {}), ("guided_json", {}), ("guided_regex", "a"),
        ("guided_choice", ["a"]), ("guided_grammar", "a"))],
    *[(path, PAIR | {"answers": ["1", "2"]} | field, "not supported") for path in ("/judge", "/rank") for field in (
        {"stream": True}, {"n": 2}, {"stop": "x"}, {"logprobs": True}, {"min_tokens": 1})],
    ("/judge", {"question": "sort", "answer_a": "1"}, '"answer_b"'),
    ("/judge", PAIR | {"answer_a": 1}, '"answer_a" is an integer'),
    ("/judge", PAIR | {"prompt": "sort"}, "both given"),
    ("/judge", PAIR | {"votes": 2}, "greedy"),
    ("/judge", PAIR | {"winner": "c"}, '"winner"'),
])
def test_a_wrong_body_is_refused_in_a_line(plain, path, body, words):
    status, message = error_of(plain, path, body)
    assert status == 400 and words in message and len(message) < 600


def test_fields_that_change_nothing_are_let_in(plain):
    """Each value that is neutral, and null, of every field; a judgement is the same with them."""
    expected = without_seconds(post(plain, "/judge", PAIR)[1])
    for neutral in ({}, serve.CHAT_ALONE):
        fields = serve.NEUTRAL | neutral
        for body in (dict.fromkeys(fields), {name: values[0] for name, values in fields.items() if values}):
            if neutral:
                status, record = post(plain, "/judge", PAIR | body | {"model": "toy"})
                assert status == 200 and without_seconds(record) == expected
            else:
                assert post(plain, "/v1/chat/completions", CHAT | body | {"model": "toy"})[0] == 200
    for path in ("/judge", "/rank"):
        assert error_of(plain, path, PAIR | {"answers": ["1", "2"], "model": "other"})[0] == 404


GOOD = request("/judge", PAIR)


@pytest.mark.parametrize("data, status", [
    (b"\r\n\r\n", 400), (b"nonsense\r\n\r\n", 400), (b"GET / HTTP/x\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\r\n", 400),
    (b"GET / HTTP/2.0\r\n\r\n", 505), (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", 431),
    (request("/nothing", {}), 404), (request("/health", {}), 405),
    (b"DELETE /judge HTTP/1.1\r\n\r\n", 405), (b"HEAD /health HTTP/1.1\r\n\r\n", 405),
    (request("/judge", PAIR, "Origin: http://evil\r\n"), 403),
    (request("/judge", PAIR, "no colon here\r\n"), 400),
    (b"POST /judge HTTP/1.1\r\n\r\n{}", 411),
    (b"POST /judge HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 411),
    (b"POST /judge HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}", 411),
    *[(b"POST /judge HTTP/1.1\r\nContent-Length: " + length + b"\r\n\r\n{}", 400)
      for length in (b"-1", b"+2", b"2x", b"", b"0x2", b"2, 2", b"9" * 30, b"2\r\nContent-Length: 3")],
    (b"POST /judge HTTP/1.1\r\nContent-Length : 2\r\n\r\n{}", 400),
    (b"POST /judge HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 3_000_000, 413),
])
def test_a_wrong_head_is_refused_and_the_connection_closed(plain, data, status):
    """Also what comes behind it is no request: nobody can hide one there."""
    with connect(plain) as connection, connection.makefile("rb") as file:
        connection.sendall(data + b"GET /health HTTP/1.1\r\n\r\n")
        found, headers, body = read_reply(file)
        assert found == status and headers["Connection"] == "close"
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert file.read() == b""
    assert exchange(plain, request("/health"))[2] == {"status": "ok"}


def test_connections_are_kept_and_pipelined_requests_answered_in_turn(plain):
    with connect(plain) as connection, connection.makefile("rb") as file:
        connection.sendall(GOOD + request("/judge", b"{") + request("/nothing") + request("/judge")
                           + request("/health") + GOOD)
        replies = [read_reply(file) for _ in range(6)]
        assert [status for status, _, _ in replies] == [200, 400, 404, 405, 200, 200]
        first, last = (json.loads(replies[k][2])["votes"][0]["text"] for k in (0, 5))
        assert first == last
    with connect(plain) as connection, connection.makefile("rb") as file:
        connection.sendall(GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert read_reply(file)[0] == 200 and file.read() == b""  # HTTP/1.0 closes
    with connect(plain) as connection, connection.makefile("rb") as file:
        connection.sendall(request("/health", None, "Content-Length: 30\r\n") + request("/nothing"))
        assert read_reply(file)[0] == 200 and file.read() == b""  # a GET's body is not read, nor taken for a request


def test_slow_senders_are_told_so(plain):
    """The whole request has 0.5 s; each byte of it comes in time. Nothing at all: closed without a word."""
    def trickle(data):
        with connect(plain) as connection, connection.makefile("rb") as file:
            began = time.monotonic()
            try:
                for byte in data:
                    connection.send(bytes([byte]))
                    time.sleep(0.02)
            except OSError:  # it has closed
                pass
            status, _, body = read_reply(file)
            return status, time.monotonic() - began
    head = b"POST /judge HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    results = at_once([lambda: trickle(b"GET /" + b"x" * 60), lambda: trickle(head + b" " * 30)])
    assert [status for status, _ in results] == [408, 408] and all(0.4 < seconds < 5 for _, seconds in results)
    with connect(plain) as connection:
        assert connection.recv(10) == b""
    until(lambda: plain.n_connections == 0)


# ---- who goes, who waits, who is too much


def test_a_client_that_goes_away_frees_its_slots(folder, slow):
    with running(folder, max_new_tokens=900) as server:
        batch, engine = server.service.engine.batch, server.service.engine
        chat = CHAT | {"max_tokens": 900, "n": 4}
        for n, body in enumerate([chat, chat | {"stream": True}]):
            with connect(server) as connection:
                connection.sendall(request("/v1/chat/completions", body))
                until(lambda: len(batch.slots) == 4)
            until(lambda: engine.n_cancelled == n + 1)
            assert_empty(batch)
        until(lambda: engine.n_taken == 0)
        answers = [str(i) for i in range(8)]
        with connect(server) as connection:
            connection.sendall(request("/rank", {"question": "x", "answers": answers}))
            until(lambda: len(batch.slots) == 8)
        until(lambda: engine.n_taken == 0)
        settled(engine)
        assert_empty(batch)
        assert server.answered == {("/v1/chat/completions", 200): 1}  # the stream had begun


def test_large_prompts_are_encoded_one_at_a_time_beside_all_others(plain, monkeypatch):
    """While one large prompt is encoded, for 0.3 s here, small ones are answered, and other large ones wait."""
    present, most, inner = [], [], Tokenizer.chat

    def chat(self, messages):
        large = len(messages[-1]["content"]) > serve.LARGE
        present.append(large)
        most.append(sum(present))
        if large:
            time.sleep(0.3)
        ids = inner(self, messages)
        present.remove(large)
        return ids
    monkeypatch.setattr(Tokenizer, "chat", chat)
    large = CHAT | {"messages": [{"role": "user", "content": "sort 1 " * 10_000}]}
    asked = [threading.Thread(target=error_of, args=(plain, "/v1/chat/completions", large)) for _ in range(3)]
    for thread in asked:
        thread.start()
    until(lambda: present == [True])
    assert post(plain, "/v1/chat/completions", CHAT)[0] == 200 and present == [True]
    for thread in asked:
        thread.join()
    assert most.count(1) == 4 and max(most) == 1  # three large ones, and the small one beside the first


def test_a_large_prompt_that_waits_for_its_turn_is_given_up(plain, monkeypatch):
    large = CHAT | {"messages": [{"role": "user", "content": "sort 1 " * 10_000}]}
    monkeypatch.setattr(plain.service, "timeout_s", 0.1)
    with plain.service.encoding:
        assert error_of(plain, "/v1/chat/completions", large)[0] == 504
    assert error_of(plain, "/v1/chat/completions", large)[0] == 400  # too long for the model, once it was read


def test_a_ranking_reads_its_pairs_as_they_are_asked(folder, slow, monkeypatch):
    """28 pairs, two at once: when the first two are written, the others have not been read."""
    n_read, inner = [], judging.Judge.encode
    monkeypatch.setattr(judging.Judge, "encode", lambda self, pair: n_read.append(1) or inner(self, pair))
    with running(folder, n_slots=2, max_new_tokens=900) as server:
        with connect(server) as connection:
            connection.sendall(request("/rank", {"question": "x", "answers": [str(i) for i in range(8)]}))
            until(lambda: len(server.service.engine.batch.slots) == 2)
            assert len(n_read) == 1 + 2  # the longest, to know whether it can be read, and these two
        until(lambda: server.service.engine.n_taken == 0)


def test_limits_of_queue_time_and_connections(folder, slow):
    openai = pytest.importorskip("openai")
    with running(folder, n_slots=2, max_waiting=1, max_connections=4, max_new_tokens=900) as server:
        engine, long = server.service.engine, CHAT | {"max_tokens": 900}
        with connect(server) as first, connect(server) as second:
            first.sendall(request("/v1/chat/completions", long | {"n": 2}))
            until(lambda: engine.n_taken == 2)
            second.sendall(request("/v1/chat/completions", long | {"stream": True}))
            until(lambda: engine.n_taken == 3)
            status, headers, reply = exchange(server, request("/judge", PAIR))
            assert status == 429 and int(headers["Retry-After"]) >= 1 and reply["error"]["type"] == "rate_limit_error"
            with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="x", max_retries=0) as client:
                with pytest.raises(openai.RateLimitError):
                    client.chat.completions.create(model="toy", messages=CHAT["messages"])
        until(lambda: engine.n_taken == 0)
        server.service.timeout_s = 0.2
        assert error_of(server, "/v1/chat/completions", long)[0] == 504
        with connect(server) as connection, connection.makefile("rb") as file:
            connection.sendall(request("/v1/chat/completions", long | {"stream": True}))
            status, _, body = read_reply(file)
        assert status == 200 and "time" in json.loads(body.split(b"data: ")[-1])["error"]["message"]
        settled(engine)
        assert_empty(engine.batch)
        until(lambda: server.n_connections == 0)
        open_ones = [connect(server) for _ in range(4)]
        until(lambda: server.n_connections == 4)
        with connect(server) as connection, connection.makefile("rb") as file:
            assert read_reply(file)[0] == 503
        assert server.answered["other", 503] == 1
        for connection in open_ones:
            connection.close()
        until(lambda: server.n_connections == 0)
        assert exchange(server, request("/health"))[0] == 200


def test_a_key_is_asked_for_everywhere_but_health(folder):
    with running(folder, KEY) as server:
        right = f"Authorization: Bearer {KEY}\r\n"
        for path, body in [("/judge", PAIR), ("/rank", {}), ("/v1/chat/completions", CHAT), ("/v1/models", None),
                           ("/metrics", None), ("/nothing", None)]:
            for wrong in ("", right.replace("f\r", "\r"), right.replace("Bearer ", ""), "Authorization: Bearer é\r\n"):
                assert exchange(server, request(path, body, wrong))[0] == 401
        assert exchange(server, request("/health"))[0] == 200
        assert exchange(server, request("/judge", PAIR, right))[0] == 200
        assert exchange(server, request("/v1/models", None, right))[0] == 200


def test_others_need_a_key(monkeypatch):
    monkeypatch.delenv("RM_API_KEY", raising=False)
    assert key_for("127.0.0.1") is key_for("localhost") is key_for("::1") is None
    for host in ("0.0.0.0", "192.168.1.2", "::", "example.org"):
        with pytest.raises(ValueError, match="RM_API_KEY"):
            key_for(host)
    monkeypatch.setenv("RM_API_KEY", KEY)
    assert key_for("0.0.0.0") == key_for("127.0.0.1") == KEY.encode()
    for bad in ("short", "a blank in the key", "0123456789abcdé!"):
        monkeypatch.setenv("RM_API_KEY", bad)
        with pytest.raises(ValueError, match="16 or more"):
            key_for("127.0.0.1")


# ---- texts that end


def test_stop_texts_end_a_growing_text_wherever_it_is_cut(folder):
    """Read in pieces of any size, what is sent is the text before the first stop text, and never more than that."""
    tokenizer = Tokenizer(folder)
    ids = tokenizer.encode("sort 40718 é silver silver lantern 9")
    for stops in ((), ("1",), ("8 é", "nothing"), ("silver silver", "ver"), ("é",), ("lantern 99", "9")):
        whole = tokenizer.decode(ids)
        expected = before_stop(whole, stops)
        assert all(stop not in expected for stop in stops)
        for size in (1, 2, 3, 100):
            growing, sent = Growing(tokenizer, stops), ""
            for n in range(size, len(ids) + size, size):
                sent += growing.more(ids[:n], False)
                assert expected.startswith(sent)
            assert sent + growing.more(ids, True) == expected
            assert stops or sent == expected


# ---- the whole program


@pytest.fixture
def process(folder):
    environment = os.environ | {"RM_API_KEY": ""}
    command = [sys.executable, "serve.py", "--model", str(folder), "--port", "0", "--max-new-tokens", "500",
               "--name", "toy"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=environment)
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_sigterm_finishes_what_runs(process):
    line = process.stdout.readline()
    process.port = int(re.search(r"toy at http://127\.0\.0\.1:(\d+)", line)[1])
    body = {"messages": [{"role": "user", "content": "sort"}], "max_tokens": 500, "n": 16}
    with connect(process) as one, connect(process) as other, one.makefile("rb") as file, other.makefile("rb") as file2:
        one.sendall(request("/v1/chat/completions", body))
        until(lambda: read_metrics(process)[2]["rm_writing"] > 0)
        process.send_signal(signal.SIGTERM)
        until(lambda: exchange(process, request("/health"))[0] == 503)
        other.sendall(request("/judge", PAIR))
        status, headers, _ = read_reply(file2)
        assert status == 503 and "Retry-After" in headers
        status, _, reply = read_reply(file)
        assert status == 200 and len(json.loads(reply)["choices"]) == 16
    assert process.wait(30) == 0 and process.stdout.read() == "ended\n"


def test_ctrl_c_ends_the_thread_that_computes(folder, slow, monkeypatch, capsys):
    """Python ends before its threads: one that computes then would abort the process."""
    services = []
    monkeypatch.setattr(serve, "load", lambda cfg, inner=load: services.append(inner(cfg)) or services[0])

    def interrupted():
        engine = services[0].engine
        engine.ask([5, 6], Sampling(1, 900, 0.0))
        until(lambda: engine.batch.slots)
        raise KeyboardInterrupt
    monkeypatch.setattr(serve, "asked_to_stop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve.main(Config(model=str(folder), port=0, n_slots=2, max_new_tokens=900, threads=1))
    assert not services[0].engine.thread.is_alive() and len(services[0].engine.batch.slots) == 1
    pool = services[0].engine.batch.pool
    assert f"room for {64 * (len(pool.free_x) - 1):,} tokens" in capsys.readouterr().out


def test_mistakes_on_the_command_line_are_one_line(folder, plain):
    for options, words in [(dict(host="0.0.0.0"), "RM_API_KEY"), (dict(port=plain.port), "in use"),
                           (dict(max_model_len=10**6), "--max-model-len")]:
        with pytest.raises(ValueError, match=words):
            serve.main(Config(model=str(folder), **{"port": 0} | options))
    for options, words in [(dict(port=70000), "--port"), (dict(max_body=0), "--max-body"), (dict(), "--model")]:
        with pytest.raises(ValueError, match=words):
            Config(**({} if not options else {"model": "x"}), **options)
