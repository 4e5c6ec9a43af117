"""HTTP as it comes in from anybody: a request is whole, in time and not too large, or it is refused in one line.

Server(address, key, limits) has a thread for each connection, and begin(routes) begins: {path: (command, answer)}. For
each request it calls answer(exchange, body): the exchange sends what answers it (send_json, send_text, events) and
knows whether the client is still there (gone); body is bytes, None for a GET. Refused, raised there, becomes an error
as OpenAI's API words it: {"error": {"message", "type", "param", "code"}}.
"""

import hmac
import io
import json
import math
import re
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

SEND_S = 30.0  # a client that takes longer to take what is sent has gone
LINGER_S, LINGER_BYTES = 1.0, 2**24  # so much of what is not read any more is waited for, and thrown away
RDHUP = getattr(select, "POLLRDHUP", 0)  # Linux: the other side has closed, though bytes of it may still wait


@dataclass(frozen=True)
class Limits:
    max_connections: int
    max_body: int  # bytes
    receive_s: float  # for a whole request
    idle_s: float  # between two requests of a connection


class Refused(Exception):
    """A request that is not answered: its status, and one line that says why."""

    def __init__(self, status, message, param=None, code=None, retry_s=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_s = status, message, param, code, retry_s

    def content(self):
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = " ".join(self.message.split())
        if len(message) > 500:
            message = message[:500] + " ..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


class Gone(Exception):
    """The client has closed the connection, or does not take what it is sent."""


class TooSlow(Exception):
    """A request did not come in time."""


class Reader(io.RawIOBase):
    """A connection's bytes, until a deadline for all of them: with a limit for each alone, a sender could take forever,
    byte by byte."""

    def __init__(self, connection):
        self.connection, self.deadline = connection, math.inf

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise TooSlow
            self.connection.settimeout(left)
            return self.connection.recv_into(buffer)
        except TimeoutError:
            raise TooSlow from None
        finally:
            self.connection.settimeout(SEND_S)


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, key, limits):
        """Takes the address, but nobody's connection yet: `begin` does that. key: bytes, or None."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler, bind_and_activate=False)
        self.server_bind()
        self.key, self.limits, self.routes = key, limits, {}
        self.answered = Counter()  # (path, status) -> requests
        self.n_connections, self.n_active, self.lock = 0, 0, threading.Lock()

    def begin(self, routes):
        self.routes = routes
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def process_request(self, connection, address):
        if not self.count("n_connections", 1, self.limits.max_connections):
            with self.lock:
                self.answered["other", 503] += 1  # before its path could be read
            content = json.dumps(Refused(503, "too many connections").content()).encode()
            head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n" \
                   f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.send(head.encode() + content)  # a new connection's buffer takes it at once
            self.shutdown_request(connection)
            return
        try:
            super().process_request(connection, address)
        except BaseException:  # no thread could be started
            self.count("n_connections", -1)
            raise

    def process_request_thread(self, connection, address):
        try:
            super().process_request_thread(connection, address)
        finally:
            self.count("n_connections", -1)

    def count(self, name, step, most=math.inf):
        """Changes one of the counts, unless that would make it larger than `most`; has it?"""
        with self.lock:
            fits = getattr(self, name) + step <= most
            if fits:
                setattr(self, name, getattr(self, name) + step)
            return fits

    def handle_error(self, connection, address):
        if not isinstance(sys.exception(), OSError):  # a client that has gone
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    """A connection, and the exchange on it."""
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "nano-rm-r1", ""
    disable_nagle_algorithm = True

    # -- what comes in

    def setup(self):
        super().setup()
        self.connection.settimeout(SEND_S)
        self.incoming = Reader(self.connection)
        self.rfile = io.BufferedReader(self.incoming)

    def handle_one_request(self):
        self.route, self.status = "", None  # what is asked; what has been answered
        self.unread = True  # is there more of the request than was read?
        self.incoming.deadline = time.monotonic() + self.server.limits.idle_s
        try:
            if not self.rfile.peek(1):
                raise Gone
        except (Gone, TooSlow, OSError):
            self.close_connection = True
            return
        self.incoming.deadline = time.monotonic() + self.server.limits.receive_s
        try:
            super().handle_one_request()  # reads the head; calls do_GET or do_POST, or send_error
            if self.status is None:
                raise Refused(400, "a request begins with its command, not with a blank line")
        except Refused as refused:
            self.refuse(refused)
        except TooSlow:
            self.refuse(Refused(408, f"the request was not whole after {self.server.limits.receive_s:g} s"))
        except (Gone, OSError):
            self.close_connection = True

    def do_GET(self):
        self.respond()

    def do_POST(self):
        self.respond()

    def respond(self):
        self.route = self.path.partition("?")[0]
        self.server.count("n_active", 1)
        try:
            self.check_head()
            if self.route not in self.server.routes:
                raise Refused(404, f"there is no such path; there are {', '.join(self.server.routes)}")
            command, answer = self.server.routes[self.route]
            if self.command != command:
                raise Refused(405, f"{self.route} wants {command}")
            answer(self, self.read_body() if command == "POST" else None)
        except Refused as refused:
            self.refuse(refused)
        except (Gone, TooSlow, OSError):
            raise
        except Exception:  # a mistake of ours: this request is lost, the others are not
            traceback.print_exc()
            self.refuse(Refused(500, "an error in the server; its log says more"))
        finally:
            self.server.count("n_active", -1)

    def check_head(self):
        """Who asks, and is what follows the head what it says?"""
        if self.command == "GET" and not self.headers.defects:  # else where the next request begins is not known
            self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if self.server.key is None and "Origin" in self.headers:
            raise Refused(403, "without a key this server answers no pages in browsers, which send Origin")
        if self.server.key is not None and self.route != "/health":
            if not hmac.compare_digest(given, b"Bearer " + self.server.key):
                raise Refused(401, "a key is needed, as Authorization: Bearer KEY", code="invalid_api_key")
        if self.headers.defects:
            raise Refused(400, "the head of the request has a line that is no header")

    def read_body(self):
        lengths = set(self.headers.get_all("Content-Length", []))
        if "Transfer-Encoding" in self.headers or not lengths:
            raise Refused(411, "send the body whole, with Content-Length; it is not read in chunks")
        length = lengths.pop().strip()
        if lengths or not re.fullmatch("[0-9]{1,18}", length):
            raise Refused(400, "Content-Length is not a number")
        if int(length) > self.server.limits.max_body:
            raise Refused(413, f"the body has {int(length)} bytes; at most {self.server.limits.max_body} are read")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Gone
        self.unread = False
        return body

    def gone(self):
        """Has the client closed its end?"""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN | RDHUP)
        for _, event in poll.poll(0):
            if event & (select.POLLHUP | select.POLLERR | RDHUP):
                return True
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        return False

    # -- what goes out

    def send_json(self, status, content, headers={}):
        self.send(status, "application/json", json.dumps(content).encode(), headers)

    def send_text(self, status, text):
        self.send(status, "text/plain; version=0.0.4; charset=utf-8", text.encode(), {})

    def send(self, status, kind, content, headers):
        self.head(status, {"Content-Type": kind, "Content-Length": str(len(content))} | headers, self.unread)
        self.wfile.write(content)

    def head(self, status, headers, close):
        self.status = status
        self.request_version = "HTTP/1.1"  # else what is no request, or HTTP/0.9, would be answered without a head
        with self.server.lock:
            self.server.answered[self.route if self.route in self.server.routes else "other", status] += 1
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if close:
            self.send_header("Connection", "close")  # and sets close_connection
        self.end_headers()

    def events(self, contents):
        """Sends server-sent events, each a value for JSON or a text; the end of the connection is their end."""
        if self.status is None:
            self.head(200, {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}, close=True)
        lines = [content if isinstance(content, str) else json.dumps(content) for content in contents]
        self.wfile.write("".join(f"data: {line}\n\n" for line in lines).encode())

    def refuse(self, refused):
        if self.status is not None:  # in the middle of a stream
            self.events([refused.content()])
            return
        retry = {"Retry-After": str(refused.retry_s)} if refused.retry_s else {}
        self.send_json(refused.status, refused.content(), retry)
        if self.unread:
            self.linger()

    def linger(self):
        """To close while the client still sends would take the answer from it."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_WR)
        self.incoming.deadline = time.monotonic() + LINGER_S
        n_bytes = 0
        try:
            while n_bytes < LINGER_BYTES and (piece := self.rfile.read1(2**16)):
                n_bytes += len(piece)
        except TooSlow:
            pass

    def send_error(self, code, message=None, explain=None):
        """What the standard library finds wrong with the head of a request."""
        code = 405 if code == 501 else code  # a command that no path has
        self.refuse(Refused(code, message or self.responses[code][0]))

    def log_request(self, *args):  # /metrics counts them
        pass

    def log_message(self, *args):
        pass
