"""Teachers, who write chains: a chat endpoint (Endpoint), or a model in a folder (Local).

    teacher.ask_all(questions, keep)

keep(question, result) is called as each result comes, one call at a time: a Reply, or the Failure of this record. What
would meet every other record too, such as a wrong key, is a ValueError.
"""

import email.utils
import http.client
import json
import math
import random
import re
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import timezone
from urllib.parse import urlsplit

from data.fields import is_of
from files import parse_json

LARGEST_REPLY = 2**24  # bytes; a judgement of 8,192 tokens has about 40,000
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 3600.0  # seconds that a Retry-After may ask for
STRANGERS = 3  # failures in a row after which an endpoint that has never answered is given up ...
OUTAGE = 10  # ... and one that has


@dataclass(frozen=True)
class Question:
    key: str  # of the pair's id and all that is asked
    id: str  # the pair's
    pass_: int  # 1 or 2
    number: int  # of the try, from 0
    messages: list[dict]


@dataclass(frozen=True)
class Reply:
    text: str
    finished: bool  # false: cut off by the token limit
    prompt_tokens: int | None  # as the endpoint counts them; None if it does not say
    tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Failure:
    reason: str
    then: str  # "retry"; "skip": this record cannot be answered; "stop": none can; "doubt": none, if none ever was
    wait: float = 0.0  # seconds that the endpoint asks for


# ---- over the network

class Endpoint:
    """A chat endpoint that speaks OpenAI's API (POST .../chat/completions)."""

    def __init__(self, url, key, fields, n_threads, timeout, retries, backoff, seed):
        """fields: of every request, beside the messages."""
        self.url, self.key, self.fields, self.seed = check_url(url), key, fields, seed
        self.n_threads, self.timeout, self.retries, self.backoff = n_threads, timeout, retries, backoff
        # Has it ever answered? Until it has, one question is asked at a time: a wrong address costs one request.
        self.spoke = False
        self.open_at = 0.0  # no request before, on the monotonic clock
        self.n_retries, self.stop, self.lock = 0, threading.Event(), threading.Lock()
        self.context = ssl.create_default_context()  # certificates are checked, against $SSL_CERT_FILE if it is set

    def ask_all(self, questions, keep):
        failed = []  # since the last reply

        def ask(question):
            if self.stop.is_set():
                return
            try:
                result = self.ask(question)
                with self.lock:
                    if isinstance(result, Reply):
                        for before in failed:
                            keep(*before)
                        failed.clear()
                        keep(question, result)
                        return
                    failed.append((question, result))
                    limit = OUTAGE if self.spoke else min(STRANGERS, len(questions))
                    if len(failed) >= limit and not self.stop.is_set():
                        raise ValueError(f"{self.url}: {len(failed)} records in a row failed, the last with: "
                                         f"{result.reason}; the same command goes on")
            except ValueError:
                self.stop.set()  # before another thread asks
                raise

        todo = list(questions)
        while todo and not self.spoke:
            ask(todo.pop(0))
        with ThreadPoolExecutor(self.n_threads) as pool:
            futures = [pool.submit(ask, question) for question in todo]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # Ctrl-C too: what is under way is paid for, and waited for
                self.stop.set()
                raise
        for before in failed:
            keep(*before)

    def ask(self, question):
        """The Reply, or the Failure of this record after all its tries."""
        rng = random.Random(f"{self.seed} {question.key}")
        for n in range(self.retries + 1):
            while (pause := self.open_at - time.monotonic()) > 0 and not self.stop.is_set():
                self.stop.wait(pause)
            result = self.request(question)
            if isinstance(result, Reply):
                self.spoke = True
                return result
            if result.then == "stop" or result.then == "doubt" and not self.spoke:
                raise ValueError(f"{self.url}: {result.reason}")
            if result.then == "skip" or n == self.retries or result.wait > LONGEST_WAIT:
                break
            with self.lock:
                self.n_retries += 1
                self.open_at = max(self.open_at, time.monotonic() + result.wait)  # for all threads
            if self.stop.wait(min(LONGEST_BACKOFF, self.backoff * 2**n) * rng.uniform(0.5, 1.5)):
                break  # the run ends
        return result

    def request(self, question):
        """Sends it once."""
        began, body = time.monotonic(), json.dumps(self.fields | {"messages": question.messages}).encode()
        try:
            status, headers, content = self.post(body)
        except ssl.SSLCertVerificationError as e:
            return Failure(f"its certificate is not trusted: {e.verify_message}", "stop")
        except (socket.gaierror, ConnectionRefusedError, ssl.SSLError) as e:
            return Failure(f"cannot be reached: {e.strerror or e}; check --endpoint", "doubt")
        except http.client.RemoteDisconnected as e:
            return Failure(str(e), "retry")
        except http.client.BadStatusLine:
            return Failure("does not speak HTTP; check --endpoint", "doubt")
        except (OSError, http.client.HTTPException) as e:
            return Failure(str(e) or type(e).__name__, "retry")
        if self.key:
            content = content.replace(self.key.encode(), b"[key]")  # some repeat it in what they say is wrong
        if status == 200:
            return read_reply(content, time.monotonic() - began) or Failure(
                f"its answer is no chat completion, but {said(content)}; check --endpoint", "doubt")
        reason = f"HTTP {status}: {said(content)}"
        if status in (400, 413, 422):
            return Failure(reason, "skip")
        if status in (408, 409, 425, 429) or status >= 500:
            return Failure(reason, "retry", retry_after(headers))
        if status in (401, 403) and not self.key:
            reason += " (no key was sent: put it into the environment variable that --key-env names)"
        elif status in (301, 302, 303, 307, 308):
            reason += f" (it moves to {headers['Location']}: give that)"
        return Failure(reason, "stop")

    def post(self, body):
        """(status, headers, content). Each request has its own connection: on one that is kept, what a server sends
        twice would be read as the answer to the next question."""
        deadline = time.monotonic() + self.timeout
        url = urlsplit(self.url)
        if url.scheme == "https":
            connection = http.client.HTTPSConnection(url.hostname, url.port, timeout=self.timeout,
                                                     context=self.context)
        else:
            connection = http.client.HTTPConnection(url.hostname, url.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", "Connection": "close", "User-Agent": "nano-rm-r1"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request("POST", url.path, body, headers)
            reply = connection.getresponse()
            content, n_expected = b"", reply.length  # None: until the connection ends, or in chunks
            while n_expected is None or len(content) < n_expected:
                part = reply.read1(2**16 if n_expected is None else min(2**16, n_expected - len(content)))
                content += part
                if len(content) > LARGEST_REPLY:
                    raise OSError(f"its answer is longer than {LARGEST_REPLY} bytes")
                if time.monotonic() > deadline:  # the socket's own time-out is for each piece
                    raise TimeoutError("timed out")
                if not part:
                    break
            if n_expected and len(content) < n_expected:
                raise OSError(f"its answer ends after {len(content)} of {n_expected} bytes")
            return reply.status, reply.headers, content
        finally:
            connection.close()


def check_url(endpoint):
    """The address of chat completions, from that or from the API's base, https://host/v1."""
    if re.search("[@?#]", endpoint):  # not shown: what stands there may be a password
        raise ValueError("--endpoint: give the address alone, without @, ? and #; --key-env names the environment "
                         "variable with the key")
    try:
        url = urlsplit(endpoint)
        sound = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        sound = False
    if not sound or re.search(r"[^\x21-\x7e]", endpoint):
        raise ValueError(f"--endpoint {endpoint}: is no address such as https://host/v1")
    base = url.path.rstrip("/").removesuffix("/chat/completions")
    return f"{url.scheme}://{url.netloc}{base}/chat/completions"


def check_key(key, variable):
    """The key, or None if there is none; what http.client refuses it would show, so it is refused here."""
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ValueError(f"the environment variable {variable} holds a blank or a character that no key has: set it "
                         "anew")
    return key or None


def read_reply(content, seconds):
    """The Reply in the body of a chat completion, or None if it is none."""
    try:
        answer = parse_json(content)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        finished = choice.get("finish_reason") != "length"
        usage = answer.get("usage")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if text is None:
        text = ""  # it declines, or has spent all its tokens on thinking; it is paid for
    if not isinstance(text, str):
        return None
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no text
    return Reply(text, finished, count(usage, "prompt_tokens"), count(usage, "completion_tokens"), round(seconds, 3))


def count(usage, name):
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if is_of(value, (int,)) and 0 <= value < 2**40 else None


def retry_after(headers):
    """The seconds that a header Retry-After asks for, as a number or as a date; 0 without one."""
    text = headers["Retry-After"] or ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
            seconds = (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(0.0, seconds) if not math.isnan(seconds) else 0.0


def said(content):
    """What a server says in an error, in a line."""
    text = content.decode(errors="replace")
    try:
        text = parse_json(content)["error"]["message"] + ""
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    text = "".join(c if c.isprintable() else " " for c in text[:1000])
    return " ".join(text.split())[:200] or "nothing"


# ---- on this machine

class Local:
    """A model's folder, read with our sampler whenever there is something to ask."""
    n_retries, spoke = 0, True

    def __init__(self, folder, device, dtype, n_slots, kv_gb, sampling):
        """sampling: as draw.Sampling takes it, for one rollout."""
        from folder import check_folder  # PyTorch takes seconds to import, and an endpoint needs none of it
        check_folder(folder)
        self.folder, self.device, self.dtype, self.n_slots, self.kv_gb = folder, device, dtype, n_slots, kv_gb
        self.sampling = sampling

    def ask_all(self, questions, keep):
        """All questions must be of the same try: its number makes the seed."""
        from draw import Sampling
        from sample import Sampler, load_model
        model, tokenizer = load_model(self.folder, self.device, self.dtype)
        context = model.config.raw.get("max_position_embeddings")
        prompts = [tokenizer.chat(question.messages) for question in questions]
        readable = [i for i, ids in enumerate(prompts) if not context or len(ids) < context]
        for i in sorted(set(range(len(prompts))) - set(readable)):
            reason = f"its prompt has {len(prompts[i])} tokens, the model can read {context}"
            keep(questions[i], Failure(reason, "skip"))
        # rollouts of another try are others: 1,024 tries lie between two seeds
        seed = self.sampling["seed"] * 1024 + questions[0].number
        sampling = Sampling(**self.sampling | {"seed": seed, "stop": tokenizer.stop_ids})
        sampler = Sampler(model, self.n_slots, self.kv_gb)
        for i, (rollout,) in sampler.stream([prompts[i] for i in readable], sampling):
            n_prompt, n_tokens = len(prompts[readable[i]]), len(rollout.ids)
            keep(questions[readable[i]], Reply(tokenizer.decode(rollout.ids), rollout.finished, n_prompt, n_tokens,
                                               round(rollout.seconds, 3)))
