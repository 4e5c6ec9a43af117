"""oracle.py, teachers.py, traces.py, against a real HTTP server on loopback that behaves badly (oracle_server.py).

Oracles: the server's own log of what was sent and when; its table of what each teacher writes and what must become of
it (KINDS); a run without an interruption, byte for byte; our sampler, for a local teacher. oracle_faults.py is the same
at length: more records, more kills.
"""

import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import oracle  # noqa: E402
from data.pairs import read_chains, read_pairs  # noqa: E402
from draw import Sampling  # noqa: E402
from files import write_records  # noqa: E402
from oracle import Config, Recipe, fault_of, follow, main  # noqa: E402
from oracle_faults import killed_and_resumed  # noqa: E402
from oracle_server import KINDS, RIGHT, WRITES, Server, chain, expected, kind_of, rows, seeded_faults  # noqa: E402
from prompt import load_prompt, render  # noqa: E402
from sample import Sampler, load_model  # noqa: E402
from teachers import Failure, Local, Question, Reply, retry_after  # noqa: E402
from test_sample import make_folder  # noqa: E402
from traces import trace_of  # noqa: E402

SHARED = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
HINT = oracle.HINT.read_text(encoding="utf-8")
KEY = "sk-test-0123456789"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config(server, n, ...): a Config for n of the server's pairs, with short waits."""
    monkeypatch.setenv("ORACLE_KEY", KEY)

    def make(server, n=6, **options):
        write_records(tmp_path / "pairs.jsonl", rows(n))
        url = server if isinstance(server, str) else server.url
        standard = dict(data=str(tmp_path / "pairs.jsonl"), out=str(tmp_path / "run"), endpoint=url, teacher="great-1",
                        timeout=5.0, backoff=0.01, concurrency=16)
        return Config(**standard | options)
    return make


def kept(cfg):
    with open(Path(cfg.out) / "chains.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(record["id"], record["pass"], record["judgement"]) for record in records]


def asked(server, pass_=None):
    """The items asked, in the order in which the questions came."""
    return [item for item, p, *_ in server.asked if pass_ in (None, p)]


def fails(cfg):
    with pytest.raises(ValueError) as caught:
        main(cfg)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---- a whole run


def test_a_run_among_all_faults_keeps_what_it_must_and_counts_it(config, tmp_path, capsys):
    """Each fault somewhere; what is kept, in which pass and why not, is as the table says; so are the sums."""
    n = 2 * len(KINDS)
    with Server(seeded_faults(1), stall=0.6) as server:
        cfg = config(server, n, timeout=0.4, price_in=2.0, price_out=10.0)
        main(cfg)
    seen = {fault for _, _, fault, *_ in server.asked}
    assert {"429", "429 date", "500", "stall", "cut", "chunks cut", "broken", "html", "twice", "late", "reset"} <= seen
    assert kept(cfg) == expected(n)
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    chains = read_chains(tmp_path / "run/chains.jsonl")  # as distill.py reads them: the pair as it was, no hint
    assert [c.pair for c in chains] == [p for p in pairs if p.id in {name for name, _, _ in expected(n)}]
    assert all(headers["Authorization"] == f"Bearer {KEY}" for *_, headers in server.asked)
    out = capsys.readouterr()
    everything = out.out + out.err + "".join(f.read_text() for f in (tmp_path / "run").iterdir())
    assert KEY not in everything and f"{len(chains)} of {n} pairs have a chain" in out.out

    report = json.loads((tmp_path / "run/report.json").read_text())
    first_wrong = [i for i in range(n) if kind_of(i)[0][1] is not None]
    for row, items in zip(report["passes"], (range(n), first_wrong)):
        counted = [i for i in items if i % 5 != 3]  # the others come without usage
        n_read, n_written = sum(100 + i for i in counted), sum(10 + i for i in counted)
        assert (row["answers"], row["prompt_tokens"], row["tokens"]) == (len(items), n_read, n_written)
        assert row["without_usage"] == len(items) - len(counted)
        assert row["cost"] == round((2 * n_read + 10 * n_written) / 1e6, 4)
    assert report["passes"][0]["faults"] == {
        "none, kept": 6, "wrong verdict": 10, "malformed": 4, "cut off": 2, "both labels": 2, "no verdict": 4}
    assert report["dropped"] == {"wrong verdict": 2, "malformed": 4, "cut off": 2, "trace of the hint, it was told": 2,
                                 "trace of the hint, the hint's own words": 2}
    for row in report["rows"]:
        kind, _, name = row["name"].partition(" ")
        mine = [p for p in pairs if kind == "all" or getattr(p, kind) == name]
        good = [c for c in chains if c.pair in mine]
        assert (row["pairs"], row["kept"], row["kept_1"] + row["kept_2"]) == (len(mine), len(good), len(good)), row
        assert row["kept_a"] == sum(c.pair.winner == "a" for c in good)
        assert row["mean_characters"] == pytest.approx(sum(len(c.judgement) for c in good) / len(good), abs=0.051)
        assert row["name"] in out.out
    n_asked = len(server.asked)
    assert report["session"]["retries"] == n_asked - n - len(first_wrong)
    assert n_asked >= n + len(first_wrong) + sum(x not in (None, "late", "twice") for _, _, x, *_ in server.asked)

    main(cfg)  # again: nothing is asked
    assert len(server.asked) == n_asked and kept(cfg) == expected(n)


def test_killed_and_resumed(tmp_path):
    """SIGKILL at drawn points, lines cut in half: no question that has an answer on disk is asked again, and the file
    is the uninterrupted run's."""
    report = killed_and_resumed(tmp_path, n=21, n_kills=2, seed=5)
    assert report["kills"] == 2 and report["halved"] == 1 and report["faults"] > 60, report


def test_answers_of_one_question_are_never_anothers(config):
    """A server that sends each answer twice: on a connection that is kept, the copy would answer the next question."""
    with Server(lambda item, pass_, n: "twice") as server:
        main(config(server, 12, concurrency=1))
    assert len(server.asked) == 12 + sum(kind_of(i)[0][1] is not None for i in range(12))
    assert kept(config(server, 12)) == expected(12)


# ---- what is sent


def test_pass_1_is_not_told_the_label(config, tmp_path):
    """What is sent is the prompt and nothing else; with all labels turned round it is the same to the byte."""
    bodies = []
    with Server() as server:
        cfg = config(server, 8, attempts=0, concurrency=1, body='{"max_tokens": null, "max_completion_tokens": 99}')
        main(cfg)
        turned = [row | {"winner": RIGHT[row["winner"]]} for row in rows(8)]
        write_records(tmp_path / "pairs.jsonl", turned)
        main(replace(cfg, out=str(tmp_path / "turned")))
    bodies = [body for *_, body, _ in server.asked]
    assert len(bodies) == 16 and bodies[:8] == bodies[8:]
    prompt = load_prompt("instruct")
    for pair, body in zip(read_pairs(tmp_path / "pairs.jsonl"), bodies):
        assert body == {"model": "great-1", "max_completion_tokens": 99, "temperature": 1.0,
                        "messages": render(prompt, pair)}


def test_pass_2_is_shown_the_verdict_and_the_wrong_chain_and_has_its_own_teacher(config, monkeypatch):
    """The hint stands behind the clean prompt. Another endpoint gets its own model, body and key, and not pass 1's."""
    monkeypatch.setenv("OTHER_KEY", "other")
    with Server() as first, Server() as second:
        for n, key_env2, sent in ((3, None, None), (4, "OTHER_KEY", "Bearer other")):
            cfg = config(first, n, endpoint2=second.url, teacher2="strong-2", key_env2=key_env2, body2='{"top_p": 0.5}')
            main(cfg)
            assert sorted(asked(first)) == list(range(n)) and sorted(asked(second)) == list(range(2, n))
            *_, body, headers = second.asked[-1]
            assert headers.get("Authorization") == sent
    assert (body["model"], body["top_p"], "top_p" in first.asked[-1][4]) == ("strong-2", 0.5, False)
    pair = read_pairs(cfg.data)[3]
    clean = render(load_prompt("instruct"), pair)
    system, user = body["messages"]
    wrong = WRITES["no eval"](pair.winner)[0]
    hint = HINT.strip().replace("{chain}", wrong).replace("{verdict}", pair.winner.upper())
    assert system == clean[0] and user["content"] == clean[1]["content"] + "\n\n" + hint
    assert [(c["pass"], c["teacher"]) for c in map(json.loads, open(Path(cfg.out) / "chains.jsonl"))] == [
        (1, "great-1"), (1, "great-1"), (2, "strong-2"), (2, "strong-2")]


def test_more_attempts_are_made_until_one_is_kept(config):
    with Server() as server:
        cfg = config(server, 8, samples=2, attempts=3)
        main(cfg)
    tries = {(i, p): sum(a == (i, p) for a in [x[:2] for x in server.asked]) for i in range(8) for p in (1, 2)}
    for i in range(8):
        pass_ = kind_of(i)[1]
        assert tries[i, 1] == (1 if pass_ == 1 else 2)
        assert tries[i, 2] == {1: 0, 2: 1, None: 3}[pass_]


# ---- what is kept


def test_the_first_good_sample_is_kept_not_the_shortest():
    """By hand: of a wrong, a malformed, a long and a short right one it is the long one; nothing more is asked."""
    pair = read_row(0)
    texts = [chain(RIGHT[pair.winner]), chain(pair.winner, tags=("eval",)), chain(pair.winner, "long " * 20),
             chain(pair.winner)]
    recipe = Recipe(load_prompt("instruct"), HINT, [(1, i) for i in range(4)] + [(2, 0)])
    answers = {}
    for i, text in enumerate(texts[:3]):
        standing = follow(pair, recipe, answers)
        assert standing.chain is None and (standing.question.pass_, standing.question.number) == (1, i)
        answers[standing.question.key] = Reply(f"<think>hm [[A]]</think>\n{text}\n", True, 1, 1, 0.0)
    standing = follow(pair, recipe, answers)
    assert standing.question is None and standing.chain == texts[2]
    assert [fault for _, _, fault in standing.tries] == ["wrong verdict", "malformed", None]


def read_row(i):
    row = rows(i + 1)[i]
    return oracle.Pair(**row)


@pytest.mark.parametrize("writes,fault", [
    ("right", None), ("honest", None), ("wrong", "wrong verdict"), ("no eval", "malformed"), ("cut", "cut off"),
    ("chatter behind", "malformed"), ("no verdict", "no verdict"), ("both", "both labels"),
    ("quoted", "wrong verdict")])
def test_faults(writes, fault):
    for label in "ab":
        text, finish = WRITES[writes](label)
        assert fault_of(text, finish != "length", label) == fault
        assert fault_of(text + "<|im_end|>", True, label) not in (None, fault) or fault


LEAKS = """As I was told, the correct verdict is B.
Given the label provided, chatbot A must be better.
I was given the verdict in advance, so A it is.
Since we are told that chatbot B is better, we look for its merits.
The provided verdict favours A.
The ground truth label is A, so the evaluation must show this.
Knowing that Answer A is the winner, I look again.
It is already established that chatbot B wins.
The ground-truth answer is [[A]].
The outcome has been fixed already.
To justify the given verdict, consider the second step.
This is consistent with the known outcome.
The previous judgement overlooked the sign error.
My earlier verdict was wrong.
The initial judgment missed this mistake.
Unlike the rejected draft, this evaluation checks the units.
The draft overlooked that B refuses.
Here is the corrected judgement.
A revised evaluation follows.
The note says that A is better.
According to the hint, B is right.
The panel of experts confirmed that chatbot A did better.
As experts have determined, answer B is preferable.
In the previous attempt the rubric was left out.
A colleague's draft came to another verdict.
I have been informed which chatbot is better.
The expected verdict is [[B]].
So all of it must follow from those alone.
I do not start from the outcome and reason backwards.
THE CORRECT
LABEL is B.""".replace("CORRECT\nLABEL", "CORRECT\tLABEL").split("\n")
HONEST = """We are given a triangle with sides 3, 4 and 5.
We are told that Anna has five apples more than Ben.
The correct answer is 12, and only chatbot A reaches it.
Chatbot B's first attempt at the integral fails, its second succeeds.
The final verdict rests on accuracy.
The expected outcome of the program is an empty list.
Its draft of the letter is too long; the draft email lacks a greeting.
The user gives a hint: the number is even.
Experts have found that vitamin D matters, which answer A says.
Answer A is better, because its reasoning is correct.
B repeats an earlier claim of the conversation.
The user's stated preference was for short replies.
The model's labels are given in a list.
A's initial analysis is wrong but it corrects itself.
The given information does not determine the age.
Both are consistent with the given constraints.
It is known that the Earth orbits the Sun.
The right choice is to decline politely.
The corrected code compiles.
A wrong conclusion follows from the flawed premise.
The correct option is C, which both answers miss.
The outcome and the question alone decide.""".split("\n")


def test_traces_are_found_and_honest_text_is_not_one():
    assert [text for text in LEAKS if trace_of(f"Some words. {text} More.", HINT, "") is None] == []
    assert [(text, trace_of(text, HINT, "")) for text in HONEST if trace_of(text, HINT, "")] == []
    # what the pair itself says may be quoted, however it is broken into lines
    assert trace_of('It asks of "the correct\nverdict".', HINT, "What was the  correct verdict?") is None
    # every sentence of the hint, and none of what our prompts say
    sentences = [s for s in re.split(r"[.:,]\s|\n", re.sub(r"\{\w+\}", "B", HINT)) if len(s.split()) > 5]
    assert len(sentences) >= 8 and all(trace_of(s, HINT, "") for s in sentences)
    for name in ("instruct", "reasoning", "direct"):
        assert trace_of((ROOT / f"data/prompts/{name}.txt").read_text(), HINT, "") is None


def test_recorded_honest_judgements_have_no_trace():
    """RM-R1's and JudgeBench's recorded outputs, whose writers had no hint: 96 and 200 here."""
    if not SHARED.exists():
        pytest.skip(f"no {SHARED}")
    files = [*SHARED.glob("rm_r1_outputs/*/RMB/*/log_result/*logs.json"), *SHARED.glob("reward_bench/*.sample40.json")]
    chains = [c for file in files if "group" not in file.name for c in read_chains(file)]
    texts = [(c.judgement, json.dumps([c.pair.prompt, c.pair.answer_a, c.pair.answer_b])) for c in chains]
    pairs, games = {}, []
    for file in SHARED.glob("judgebench/*.jsonl"):
        pairs |= {row["pair_id"]: json.dumps(row) for row in map(json.loads, file.read_text().splitlines())}
    for file in SHARED.glob("judgebench/judgements/*arena_hard*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            games += [(game["judgment"].get("response"), pairs[row["pair_id"]]) for game in row["judgments"] if game]
    texts += [(text, shown) for text, shown in games if text]
    assert len(texts) == 296 and [trace_of(text, HINT, shown) for text, shown in texts] == [None] * 296


# ---- on disk


def test_the_same_command_goes_on_and_another_is_refused_by_name(config, tmp_path):
    with Server() as server:
        cfg = config(server, 6)
        main(replace(cfg, limit=2))
        main(cfg)
        assert sorted(asked(server, 1)) == [0, 1, 2, 3, 4, 5] and kept(cfg) == expected(6)
        n = len(server.asked)
        shutil.copyfile(tmp_path / "pairs.jsonl", tmp_path / "other.jsonl")
        for name, value in (("samples", 2), ("attempts", 0), ("seed", 1), ("prompt", "toy"), ("temperature", 0.5),
                            ("teacher", "other"), ("max_new_tokens", 5), ("data", str(tmp_path / "other.jsonl"))):
            said = fails(replace(cfg, **{name: value}))
            assert "was begun with" in said and "same settings, or choose another --out" in said, said
        main(replace(cfg, concurrency=1, retries=0, timeout=9.0, price_in=1.0))
    assert len(server.asked) == n
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    assert "is there and no oracle run's" in fails(replace(cfg, out=str(tmp_path / "mine")))
    with oracle.open_folder(tmp_path / "held", {}):
        assert "another oracle.py writes it" in fails(replace(cfg, out=str(tmp_path / "held")))


def test_answers_twice_in_half_and_broken(config, tmp_path):
    """A line that stands twice counts once, the first; half a line is asked again; a broken one is named."""
    with Server() as server:
        cfg = config(server, 2, attempts=0)
        main(cfg)
        file = tmp_path / "run/answers.jsonl"
        first, second = file.read_text().splitlines(keepends=True)
        before = (tmp_path / "run/chains.jsonl").read_bytes()
        item = int(json.loads(second)["id"][-1])
        file.write_text(first + first.replace("[[", "[") + second[:-9])
        main(cfg)
        assert asked(server)[2:] == [item] and (tmp_path / "run/chains.jsonl").read_bytes() == before
        for bad in ("{\n", "[]\n", '{"key": "x", "pass": 1, "text": null, "finished": true}\n'):
            file.write_text(first + bad + second)
            assert fails(cfg).startswith(f"{file}:2: is no answer (")
    assert len(server.asked) == 3


# ---- when it goes wrong


def test_an_endpoint_that_is_none_is_told_in_a_line_before_work(config):
    import socket
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for url, words in ((f"http://127.0.0.1:{port}", "cannot be reached: Connection refused"),
                       ("http://no-such-host.invalid/v1", "cannot be reached: "),
                       (f"https://127.0.0.1:{port}", "cannot be reached: Connection refused")):
        assert words in fails(config(url, retries=3, backoff=5.0))
    for url in ("ftp://host/v1", "host/v1", "http://", "http://host:x/v1", "http://[::1/v1", "http://ho st/v1"):
        with pytest.raises(ValueError, match="is no address such as https://host/v1"):
            config(url)
    for url in ("https://me:secret@host/v1", "https://host/v1?key=secret", "https://host/v1#secret"):
        with pytest.raises(ValueError, match="give the address alone") as caught:
            config(url)
        assert "secret" not in str(caught.value)
    for fault, words in (("html", "is no chat completion, but <html>Bad gateway</html>; check --endpoint"),
                         ("list", "is no chat completion"), ("401", "HTTP 401: trouble; your key is Bearer [key]"),
                         ("403", "HTTP 403"), ("404", "HTTP 404"), ("301", "HTTP 301")):
        with Server(lambda item, pass_, n: fault) as server:
            assert words in fails(config(server)) and len(server.asked) == 1
    with Server(lambda item, pass_, n: "400") as server:
        assert "3 records in a row failed, the last with: HTTP 400" in fails(config(server))
        assert len(server.asked) == 3 and not (Path(config(server).out) / "answers.jsonl").read_text()


def test_a_wrong_key_stops_a_run_that_goes_on_later(config, monkeypatch):
    """Half-way the key is withdrawn: the requests under way fail, no further ones are sent, nothing is lost."""
    withdrawn = [True]
    with Server(lambda item, pass_, n: "401" if item >= 20 and withdrawn else None) as server:
        cfg = config(server, 40, concurrency=4, attempts=0)
        assert "HTTP 401" in fails(cfg)
        assert 20 < len(server.asked) <= 20 + 4
        n, on_disk = len(server.asked), len(Path(cfg.out, "answers.jsonl").read_text().splitlines())
        assert on_disk == 20
        withdrawn.clear()
        main(cfg)
    assert sorted(asked(server)[n:]) == list(range(20, 40))
    with Server(lambda item, pass_, n: "401") as server:
        monkeypatch.delenv("ORACLE_KEY")
        assert "no key was sent" in fails(config(server, out=cfg.out + "2"))
        assert "Authorization" not in server.asked[0][5]
    for key in ("two words", "line\n", "schl\u00fcssel"):
        monkeypatch.setenv("ORACLE_KEY", key)
        said = fails(config(server, out=cfg.out + "3"))
        assert "ORACLE_KEY holds a blank" in said and key not in said


def test_a_record_that_is_refused_is_counted_and_not_asked_again(config):
    """Also the first one, when nobody knows yet whether the endpoint answers at all."""
    with Server(lambda item, pass_, n: "400" if item in (0, 4) or (item, pass_) == (2, 2) else None) as server:
        cfg = config(server, 8)
        for _ in range(2):
            main(cfg)
            assert kept(cfg) == [row for row in expected(8) if row[0] not in ("pair/0", "pair/2", "pair/4")]
            assert json.loads(Path(cfg.out, "report.json").read_text())["dropped"]["refused"] == 3
    assert sorted(asked(server, 1)) == list(range(8)) and asked(server, 2).count(2) == 1


def test_a_record_without_an_answer_is_told_and_asked_by_the_next_run(config, capsys):
    ill = [True]
    with Server(lambda item, pass_, n: "500" if item == 3 and ill else None) as server:
        cfg = config(server, 6, retries=2, attempts=0)
        main(cfg)
        assert "1 of 6 got no answer, the last: HTTP 500: trouble" in capsys.readouterr().out
        assert json.loads(Path(cfg.out, "report.json").read_text())["dropped"]["no answer"] == 1
        assert asked(server).count(3) == 3
        ill.clear()
        main(cfg)
    assert sorted(asked(server)) == [0, 1, 2, 3, 3, 3, 3, 4, 5]


def test_an_endpoint_that_goes_down_ends_the_run(config):
    with Server(lambda item, pass_, n: "503" if item >= 5 else None) as server:
        cfg = config(server, 60, retries=1, attempts=0, concurrency=2)
        assert "10 records in a row failed, the last with: HTTP 503" in fails(cfg)
    assert len(set(asked(server))) <= 5 + 10 + 2
    assert len(Path(cfg.out, "answers.jsonl").read_text().splitlines()) == 5


def test_interrupted_it_waits_for_what_is_under_way(config, tmp_path):
    """Ctrl-C: nothing further is asked, the requests that were sent are answered and kept, one line says so."""
    with Server(lambda item, pass_, n: "late") as server:
        cfg = config(server, 240)
        command = [sys.executable, ROOT / "oracle.py", "--data", cfg.data, "--out", cfg.out, "--teacher", "great-1"]
        process = subprocess.Popen([*command, "--endpoint", cfg.endpoint, "--concurrency", "4"], text=True,
                                   stderr=subprocess.PIPE, env=os.environ | {"TQDM_DISABLE": "1"},
                                   # what a shell starts in the background ignores Ctrl-C, and so does what it starts
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while len(server.asked) < 9:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=10)
    n = len(Path(cfg.out, "answers.jsonl").read_text().splitlines())
    assert process.returncode == 130 and n == len(server.asked) < 240
    assert said == f"interrupted: {n} answers are kept in {cfg.out}/answers.jsonl; the same command goes on\n"


def test_slow_and_huge_answers_are_given_up_and_asked_again(config):
    """A trickle, each byte of which is in time; sixteen megabytes; silence."""
    faults = {1: "trickle", 2: "huge", 3: "stall"}
    with Server(lambda item, pass_, n: faults.get(item) if n == 0 else None, stall=1.5) as server:
        cfg = config(server, 5, timeout=0.4, attempts=0)
        main(cfg)
    assert all(asked(server).count(item) >= 2 for item in faults)
    assert kept(cfg) == [row for row in expected(5) if row[1] == 1]


def test_retry_after_holds_for_all_threads(config):
    """A 429 that asks for 0.4 s: what is under way comes, then nothing for so long."""
    with Server(lambda item, pass_, n: "429" if (item, n) == (4, 0) else "late", retry_after="0.4") as server:
        main(config(server, 16, concurrency=4, attempts=0))
    times = [at for *_, at, _, _ in server.asked]
    told = next(at for _, _, fault, at, *_ in server.asked if fault == "429")
    assert sorted(asked(server)) == sorted([4, *range(16)])
    # at most what the other three threads had sent before it was read; without the pause there are eight or more
    assert sum(told < at < told + 0.4 for at in times) <= 3


def test_retry_after_in_seconds_and_as_a_date():
    now = time.time()
    for text, seconds in (("7", 7), ("0.25", 0.25), (formatdate(now + 90, usegmt=True), 90), ("-5", 0), ("soon", 0),
                          (formatdate(now - 90, usegmt=True), 0), ("nan", 0), ("", 0), (None, 0),
                          ("Sun, 06 Nov 1994 08:49:37 GMT", 0), ("Fri, 99 Nov 9999 99:99:99 GMT", 0)):
        assert retry_after({"Retry-After": text}) == pytest.approx(seconds, abs=2 if seconds > 9 else 0), text
    assert retry_after({"Retry-After": "inf"}) > 3600


def test_certificates_are_checked(config, tmp_path, monkeypatch):
    made = shutil.which("openssl") and subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", tmp_path / "key.pem", "-out",
         tmp_path / "cert.pem"], capture_output=True).returncode == 0
    if not made:
        pytest.skip("openssl cannot make a certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Server() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        cfg = config(server.url.replace("http", "https"), 3)
        assert "its certificate is not trusted: self" in fails(cfg) and not server.asked
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        main(cfg)
    assert kept(cfg) == expected(3)


def test_options_that_cannot_be():
    good = dict(data="pairs.jsonl", teacher="t", endpoint="http://h/v1")
    Config(**good)
    for options, words in (({"data": None}, "--data is missing"), ({"teacher": None}, "--teacher is missing"),
                           ({"endpoint2": "http://h2"}, "--endpoint2 needs --teacher2"),
                           ({"prompt": "direct"}, "asks for a verdict, not for a chain"),
                           ({"body": "[1]"}, "is not a JSON object"), ({"body2": "{"}, "is not a JSON object"),
                           ({"body": "{}", "endpoint": None}, "it needs an --endpoint"),
                           ({"temperature": 0.0, "samples": 2}, "greedy judgements are all the same"),
                           ({"timeout": 0.0}, "--timeout must be at least"), ({"samples": 0}, "--samples must be from"),
                           ({"price_in2": -1.0}, "--price-in2 must be")):
        with pytest.raises(ValueError, match=re.escape(words)):
            Config(**good | options)


def test_the_command_line_says_it_in_a_line_with_status_2(tmp_path):
    write_records(tmp_path / "pairs.jsonl", [row | {"winner": None} for row in rows(2)])
    done = subprocess.run([sys.executable, ROOT / "oracle.py", "--data", "pairs.jsonl", "--teacher", "t", "--endpoint",
                           "http://127.0.0.1:9/v1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "runs").exists()
    assert done.stderr == ("error: pairs.jsonl: no pair has a winner, and without one nobody knows which judgement is "
                           "right\n")


# ---- a local teacher


def test_a_local_teacher_writes_what_the_sampler_writes(tmp_path):
    """Rollout for rollout; another try is another draw; a prompt that is too long is refused."""
    folder = make_folder(tmp_path)
    messages = [[{"role": "user", "content": f"sort 4071{i}"}] for i in range(3)]
    too_long = [{"role": "user", "content": "sort " * 2000}]
    teacher = Local(folder, "cpu", "float32", 4, 0.0, {"max_new_tokens": 9, "temperature": 1.0, "seed": 3})
    model, tokenizer = load_model(folder, "cpu", "float32")
    texts = []
    for number in (0, 1):
        results = {}
        teacher.ask_all([Question(str(i), "", 1, number, m) for i, m in enumerate([*messages, too_long])],
                        lambda question, result: results.update({question.key: result}))
        sampling = Sampling(1, 9, stop=tokenizer.stop_ids, seed=3 * 1024 + number)
        groups = Sampler(model).generate([tokenizer.chat(m) for m in messages], sampling)
        refused = results.pop("3")
        assert isinstance(refused, Failure) and refused.then == "skip" and "the model can read" in refused.reason
        for i, (rollout,) in enumerate(groups):
            text, n_prompt = tokenizer.decode(rollout.ids), len(tokenizer.chat(messages[i]))
            wanted = Reply(text, rollout.finished, n_prompt, len(rollout.ids), results[str(i)].seconds)
            assert results[str(i)] == wanted
        texts.append([results[str(i)].text for i in range(3)])
    assert texts[0] != texts[1]


# ---- the experiment


def test_self_distillation_compares_like_with_like(tmp_path, monkeypatch):
    """The teacher is scripted, and training and judging are only looked at. Of the rl pairs the first right judgement
    is taken; the three trainings begin with one model, have equally many steps, and see no held-out pair."""
    from data import toy
    from experiments import self_distill
    toy.write_data(tmp_path / "base/data", n_distill=50, n_rl=12, n_heldout=20)
    oracles = {row["id"]: row for row in toy.make("rl", 12, 0)}

    def write(teacher, questions, keep):
        """Pair i's judgement number i % 4 is its oracle's, those before say the other side."""
        for question in questions:
            row = oracles[question.id]
            text = row["judgement"]
            if question.number < int(question.id.removeprefix("rl/")) % 4:
                text = text[:-len("<answer>[[A]]</answer>")] + f"<answer>[[{RIGHT[row['winner']].upper()}]]</answer>"
            keep(question, Reply(text, True, 30, 40, 0.1))

    trained, judged = {}, {}
    monkeypatch.setattr(Local, "__init__", lambda self, *options: None)
    monkeypatch.setattr(Local, "ask_all", write)
    monkeypatch.setattr(oracle, "settings_of", lambda *options: {})
    monkeypatch.setattr(self_distill.distill, "main", lambda cfg: trained.update({Path(cfg.out).name: cfg}))

    def judge_all(folder, pairs, temperature, seed, out):
        judged[out.name] = (folder, pairs)
        return {"all": {"score": 0.5, "low": 0.4, "high": 0.6, "tokens": 9.0}}, 0.5, 0.5
    monkeypatch.setattr(self_distill, "judge_all", judge_all)
    (tmp_path / "base/distilled/model").mkdir(parents=True)
    shutil.copyfile(ROOT / "data/prompts/toy.txt", tmp_path / "base/distilled/model/prompt.txt")
    self_distill.main(self_distill.Config(out=str(tmp_path / "out"), base=str(tmp_path / "base"), samples=3, steps=5,
                                          pairs=20))
    own = [(name, row["judgement"]) for name, row in oracles.items() if int(name.removeprefix("rl/")) % 4 < 3]
    given = {name: [(c.pair.id, c.judgement) for c in read_chains(cfg.data)] for name, cfg in trained.items()}
    original = [(row["id"], row["judgement"]) for row in toy.make("distill", 50, 0)]
    assert len(own) == 9 and given == {"original": original, "own": own, "mixed": own + original[:9]}
    starts = {(cfg.model, cfg.max_steps, cfg.lr, cfg.batch_size, cfg.seed) for cfg in trained.values()}
    assert starts == {(str(tmp_path / "base/distilled/model"), 5, 1e-3, 32, 0)}
    for name, cfg in trained.items():
        assert cfg.epochs * -(-len(given[name]) // 32) >= 5  # so max_steps ends it
        assert judged[f"{name}-greedy"][0] == tmp_path / "out" / name / "model"
    heldout = read_pairs(tmp_path / "base/data/heldout.jsonl")
    assert len(judged) == 8 and all(pairs == heldout for _, pairs in judged.values())
