"""A chat endpoint on loopback that behaves badly on purpose, for test_oracle.py and oracle_faults.py.

Which answer a question gets depends on the question alone, so that runs can be compared byte for byte. What goes wrong
before that depends on it and on how often it was asked. Question n's text holds "item n", which is all that the server
goes by; the table KINDS says what its teachers write, and so what must become of it.
"""

import json
import random
import re
import socket
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RIGHT = {"a": "b", "b": "a"}
HINT_MARK = "=== note to the judge ==="


def chain(verdict, why="", tags=("solution", "eval")):
    """A well-formed chain, or one without some of its tags."""
    middle = "".join(f"<{tag}>\n{tag} of this item. {why}\n</{tag}>\n" for tag in tags)
    return f"<type>Reasoning</type>\n{middle}<answer>[[{verdict.upper()}]]</answer>"


# what is written for a label: (text, finish_reason)
WRITES = {
    "right": lambda label: (chain(label), "stop"),
    "honest": lambda label: (chain(label, "The correct answer is 12; the expected outcome fails."), "stop"),
    "wrong": lambda label: (chain(RIGHT[label]), "stop"),
    "no eval": lambda label: (chain(label, tags=("solution",)), "stop"),
    "chatter behind": lambda label: (chain(label) + "\nI hope this helps!", "stop"),
    "cut": lambda label: (chain(label), "length"),
    "no verdict": lambda label: ("I cannot say.", "stop"),
    "nothing": lambda label: (None, "stop"),
    "both": lambda label: (chain(label, "It is not [[A]], or is it [[B]]?"), "stop"),
    "quoted": lambda label: (chain(RIGHT[label])[:-len("<answer>[[A]]</answer>")]
                             + f"<quote_A><answer>[[{label.upper()}]]</answer></quote_A>", "stop"),
    "leak": lambda label: (chain(label, "As I was told, the verdict must be this one."), "stop"),
    "leak quoted": lambda label: (chain(label, "All of it must follow from those alone."), "stop"),
}
# what the two teachers write -> in which pass a chain is kept, or None
KINDS = [(("right", None), 1), (("honest", None), 1), (("wrong", "right"), 2), (("no eval", "honest"), 2),
         (("wrong", "leak"), None), (("cut", "right"), 2), (("wrong", "leak quoted"), None), (("wrong", "wrong"), None),
         (("both", "no eval"), None), (("nothing", "right"), 2), (("chatter behind", "cut"), None),
         (("quoted", "right"), 2), (("no verdict", "chatter behind"), None), (("right", None), 1)]
FAULTS = ["429", "429 date", "500", "503", "stall", "cut", "broken", "html", "no choices", "twice", "reset", "late",
          "empty", "list", "chunks cut"]


def label_of(item):
    return "ab"[item * 7 // 3 % 2]


def kind_of(item):
    return KINDS[item % len(KINDS)]


class Server(ThreadingHTTPServer):
    """plan(item, pass, n) -> a fault's name or None, for the n-th time (from 0) that the item is asked in a pass."""
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, plan=lambda item, pass_, n: None, stall=1.0, retry_after="0.05"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.stall, self.retry_after = plan, stall, retry_after
        self.asked, self.lock = [], threading.Lock()  # (item, pass, fault, time, body, headers)
        self.begun = 0  # plan's n counts from this place in `asked`
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        item, pass_ = int(re.search(r"item (\d+)", text)[1]), 1 + (HINT_MARK in text)
        server = self.server
        with server.lock:
            n = sum(asked[:2] == (item, pass_) for asked in server.asked[server.begun:])
            fault = server.plan(item, pass_, n)
            server.asked.append((item, pass_, fault, time.monotonic(), body, dict(self.headers)))
        self.answer(fault, item, pass_)

    def answer(self, fault, item, pass_):
        writes = WRITES[kind_of(item)[0][pass_ - 1]]
        text, finish = writes(label_of(item))
        good = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                "usage": {"prompt_tokens": 100 + item, "completion_tokens": 10 + item, "total_tokens": 110 + 2 * item}}
        if item % 5 == 3:
            del good["usage"]
        good = json.dumps(good).encode()
        if fault and fault[:3].isdigit():
            wait = {"429": self.server.retry_after, "429 date": formatdate(time.time(), usegmt=True)}
            error = {"error": {"message": f"trouble; your key is {self.headers['Authorization']}"}}
            self.send(int(fault[:3]), json.dumps(error).encode(), {"Retry-After": wait[fault]} if fault in wait else {})
        elif fault == "stall":
            time.sleep(self.server.stall)
        elif fault == "trickle":  # each piece in time, the whole never
            self.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(good)}\r\n\r\n".encode())
            for byte in good:
                self.wfile.write(bytes([byte]))
                time.sleep(self.server.stall / 20)
        elif fault == "cut":
            self.send(200, good, cut=len(good) // 2)
        elif fault == "chunks cut":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"40\r\n" + good[:20])
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
        else:
            time.sleep(random.Random(item).uniform(0.1, 0.2) if fault == "late" else 0)
            other = {"broken": good[:-20], "html": b"<html>Bad gateway</html>", "no choices": b'{"usage": {}}',
                     "empty": b"", "list": b"[1, 2]", "huge": b" " * 2**24 + good}
            self.send(200, other.get(fault, good), times=2 if fault == "twice" else 1)

    def send(self, status, content, extra={}, cut=None, times=1):
        head = f"HTTP/1.1 {status} Status\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in extra.items()) + "\r\n"
        self.wfile.write((head.encode() + content[:cut]) * times)
        if cut is not None:
            self.close_connection = True


def seeded_faults(seed, most=3):
    """A plan: up to `most` faults before each answer, then it is given, late or twice now and then."""
    def plan(item, pass_, n):
        rng = random.Random(f"{seed} {item} {pass_}")
        faults = rng.choices(FAULTS, k=rng.choice(range(most + 1)))
        return faults[n] if n < len(faults) else rng.choice([None, "late", "twice"])
    return plan


def rows(n):
    """n labelled pairs."""
    return [{"id": f"pair/{i}", "prompt": [{"role": "user", "content": f"What of item {i}?"}],
             "answer_a": f"first of {i}", "answer_b": f"second of {i}", "winner": label_of(i),
             "source": f"source {i % 2}", "domain": "chat" if i % 3 else "math"} for i in range(n)]


def expected(n):
    """[(id, pass, judgement)] of what must be kept of rows(n), in order."""
    found = []
    for i in range(n):
        writes, pass_ = kind_of(i)
        if pass_:
            found.append((f"pair/{i}", pass_, WRITES[writes[pass_ - 1]](label_of(i))[0]))
    return found
