"""The judge as a service: chats as OpenAI's API has them, judgements of pairs, rankings.

    python serve.py --model DIR                                  at http://127.0.0.1:8000, for this machine alone
    RM_API_KEY=... python serve.py --model DIR --host 0.0.0.0    for others, with a key
    curl -s localhost:8000/judge -d '{"question": "sort 40718", "answer_a": "01478", "answer_b": "01487"}'

POST /v1/chat/completions, /judge, /rank; GET /v1/models, /health, /metrics. All requests share one sampler: they join
and leave its batch while it runs (live.py). A judgement's tokens are those that judge.py writes of the pair with the
same settings and seed. SIGTERM finishes what has been asked, then ends. docs/serve.md has the rest.
"""

import ipaddress
import os
import re
import threading
import time
import uuid
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

from data.fields import Bad, need, need_object, show
from data.pairs import Place, pairs_in, questions_in
from draw import Sampling
from ending import asked_to_stop, together
from files import NotJson, one_line_errors, parse_json
from judge import Judge, longest_pairs, prompt_for
from live import Busy, Engine, Live
from options import check_at_least, check_between, parse_config, refuse_ranks
from rank import SCHEDULES, n_judgements, named_by_content, rank_all, record_of
from reward import parse
from sample import Sampler, check_model, check_options, load_model, sampling_of
from tokenizer import StreamDecoder
from web import Gone, Limits, Refused, Server

LOOK_S = 0.5  # how often a request that waits looks whether its client is still there
STREAM_S = 0.1  # how often a stream sends what has been written
LARGE = 2**16  # bytes of a body from which on its prompt is encoded behind a lock
PAIR_FIELDS = ("id", "prompt", "answer_a", "answer_b", "winner", "source", "domain", "subset", "item",
               "rubric")
# What clients may set to these values, since they change nothing; other values are refused.
NEUTRAL = {"logprobs": (False,), "tools": ([],), "functions": ([],), "logit_bias": ({},), "frequency_penalty": (0,),
           "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "response_format": ({"type": "text"},),
           "ignore_eos": (False,), "echo": (False,), "min_tokens": (0,), "stop_token_ids": ([],), "best_of": (1,),
           "top_logprobs": (0,), "tool_choice": ("none", "auto"), "modalities": (["text"],), "chat_template": (),
           "chat_template_kwargs": ({},), "add_generation_prompt": (True,), "continue_final_message": (False,),
           "skip_special_tokens": (True,), "include_stop_str_in_output": (False,), "structured_outputs": (),
           "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": ()}
# What chats have, but judgements and rankings have not.
CHAT_ALONE = {"stream": (False,), "n": (1,), "stop": ([],)}


@dataclass
class Service:
    judge: Judge
    engine: Engine
    name: str  # the model's
    timeout_s: float
    ending: bool = False
    seconds: float = 1.0  # of a request, lately
    encoding: threading.Lock = field(default_factory=threading.Lock)  # of large prompts, one at a time


# ------------------------------------------------------------------------------------------------- fields of a request


@contextmanager
def refusing():
    """What is wrong with a request's fields is a 400."""
    try:
        yield
    except ValueError as e:
        raise Refused(400, str(e)) from None


def read_object(body):
    try:
        return need_object(parse_json(body))
    except NotJson as e:
        raise Bad(f"the body is not JSON: line {e.line}, {e.fault}") from None


def check_fields(service, body, neutral):
    """Refuses fields that would change the reply and are not there, and another model's name."""
    for name, values in neutral.items():
        if body.get(name) is not None and body[name] not in values:
            raise Refused(400, f'"{name}" is not supported', param=name)
    if (asked_for := take(body, "model", service.name, str)) != service.name:
        raise Refused(404, f"there is no model {asked_for!r:.100}; there is {service.name}", "model",
                      "model_not_found")


def take(body, name, default, *kinds, of=()):
    """body[name], or the default if it is not there or null."""
    return default if body.get(name) is None else need(body, name, *kinds, of=of)


def take_number(body, name, default, low, high, *kinds):
    value = take(body, name, default, *kinds)
    if not low <= value <= high:  # true of NaN
        raise Bad(f'"{name}" is {value!r:.40}: it must be from {low} to {high}')
    return value


def sampling_in(body, name, standard, n_prompt, batch):
    """The Sampling that a request asks for. name: of the field that says how many rollouts; standard: what holds where
    it says nothing; n_prompt: its prompt's tokens."""
    n = take_number(body, name, standard.n, 1, batch.most_n, int)
    temperature = take_number(body, "temperature", standard.temperature, 0, 100, int, float)
    if 0 < temperature < 1e-3:
        raise Bad(f'"temperature" is {temperature}: it must be 0 or at least 0.001')
    if n > 1 and temperature == 0:
        raise Bad(f'"{name}" above 1 needs a "temperature" above 0: greedy ones are all the same')
    top_p = take_number(body, "top_p", standard.top_p, 0, 1, int, float)
    if top_p == 0:
        raise Bad('"top_p" is 0: it must be above 0')
    top_k = max(0, take_number(body, "top_k", standard.top_k, -1, 2**31, int))  # vLLM's clients write -1 for all
    seed = take_number(body, "seed", standard.seed, 0, 2**63 - 1, int)
    if n_prompt >= batch.max_model_len:
        raise Refused(400, f"the prompt has {n_prompt} tokens; with its reply it may have {batch.max_model_len}",
                      code="context_length_exceeded")
    most = min(standard.max_new_tokens, batch.max_model_len - n_prompt)
    field = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    n_new = take_number(body, field, most, 1, most, int)
    return Sampling(n, n_new, float(temperature), float(top_p), top_k, standard.stop, seed)


def messages_in(body):
    """The messages; a content in parts, as OpenAI's API allows, becomes one text."""
    messages = []
    for message in need(body, "messages", list, of=(dict,)):
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text":
                    raise Bad('"content" has a part that is no text: this model reads nothing else')
            content = "\n".join(need(part, "text", str) for part in content)
        messages.append(message | {"content": content})
    return messages


def stops_in(body):
    texts = take(body, "stop", [], str, list)
    texts = [texts] if isinstance(texts, str) else texts
    if len(texts) > 16 or not all(isinstance(text, str) and 1 <= len(text) <= 1000 for text in texts):
        raise Bad('"stop" must be a text or up to 16 of them, each of 1 to 1000 characters')
    return tuple(texts)


def pair_in(body):
    """The Pair of a request: fields of a line in a file of pairs; "question" stands for a prompt of one message."""
    record = {"id": "pair", "winner": None, "source": "", "domain": ""}
    record |= {name: body[name] for name in PAIR_FIELDS if name in body}
    if "question" in body:
        if "prompt" in body:
            raise Bad('"question" and "prompt" are both given: give one')
        record["prompt"] = need(body, "question", str)
    for name in ("prompt", "answer_a", "answer_b"):
        if name not in record:
            raise Bad(f'no "{name}": a pair has a "question" (or "prompt"), "answer_a" and "answer_b"')
    (pair, _), = pairs_in(record, Place(Path("request"), "pair", {}))
    return pair


# ------------------------------------------------------------------------------------------------- waiting for rollouts


@contextmanager
def room(service, n):
    """For n rollouts at once."""
    began = time.monotonic()
    with ExitStack() as stack:
        try:
            stack.enter_context(service.engine.room(n))
        except Busy:
            retry_s = min(60, 1 + int(service.seconds))
            raise Refused(429, "too many requests are waiting", retry_s=retry_s) from None
        yield
    service.seconds += 0.1 * (time.monotonic() - began - service.seconds)


@contextmanager
def encoding(service, exchange, content):
    """The turn of a large prompt: to encode it takes a hundred times its bytes, so side by side they would take all
    memory. Small ones need not wait for it."""
    with ExitStack() as stack:
        if len(content) > LARGE:
            until = time.monotonic() + service.timeout_s
            while not service.encoding.acquire(timeout=LOOK_S):
                check_wanted(service, exchange, until)
            stack.callback(service.encoding.release)
        yield


def check_time(service, until):
    if time.monotonic() > until:
        raise Refused(504, f"the time for a request is over, {service.timeout_s:g} s")


def check_wanted(service, exchange, until):
    """Is there still somebody who waits, and something to wait for?"""
    check_time(service, until)
    if service.engine.failed:
        raise Refused(500, "the sampler has failed; the server ends")
    if exchange.gone():
        raise Gone


def next_done(service, exchange, box, until, pause=LOOK_S):
    """The next request in the box, or None if there is none after the pause."""
    check_time(service, until)  # even where there is always one
    try:
        return box.get(timeout=pause)
    except Empty:
        check_wanted(service, exchange, until)
        return None


def write(service, exchange, ids, sampling, stops=()):
    """The rollouts of one prompt. If that fails, or the client has gone, they are given up."""
    until = time.monotonic() + service.timeout_s
    asked = service.engine.ask(ids, sampling, stops)
    try:
        while not next_done(service, exchange, asked.box, until):
            pass
    finally:
        service.engine.cancel(asked)
    return asked.rollouts


def usage_of(n_prompt, rollouts):
    n = sum(len(rollout.ids) for rollout in rollouts)
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


# -------------------------------------------------------------------------------------------------------------- a chat


def chat(service, exchange, content):
    with refusing():
        body = read_object(content)
        check_fields(service, body, NEUTRAL)
        tokenizer, stops = service.judge.tokenizer, stops_in(body)
        with encoding(service, exchange, content):
            ids = tokenizer.chat(messages_in(body))
        standard = replace(service.judge.sampling, n=1, temperature=1.0, top_p=1.0, top_k=0)  # OpenAI's
        sampling = sampling_in(body, "n", standard, len(ids), service.engine.batch)
        streamed, options = take(body, "stream", False, bool), take(body, "stream_options", {}, dict)
        with_usage = take(options, "include_usage", False, bool)
        if options and not streamed:
            raise Bad('"stream_options" is given without "stream"')
    reply = {"id": "chatcmpl-" + uuid.uuid4().hex, "object": "chat.completion", "created": int(time.time()),
             "model": service.name}
    with room(service, sampling.n):
        if streamed:
            reply["object"] = "chat.completion.chunk"
            stream_chat(service, exchange, reply, ids, sampling, stops, with_usage)
            return
        rollouts = write(service, exchange, ids, sampling, stops)
    texts = [before_stop(tokenizer.decode(rollout.ids), stops) for rollout in rollouts]
    choices = [{"index": i, "message": {"role": "assistant", "content": text}, "logprobs": None,
                "finish_reason": rollout.reason} for i, (text, rollout) in enumerate(zip(texts, rollouts))]
    exchange.send_json(200, reply | {"choices": choices, "usage": usage_of(len(ids), rollouts)})


def stream_chat(service, exchange, reply, ids, sampling, stops, with_usage):
    until = time.monotonic() + service.timeout_s
    texts = [Growing(service.judge.tokenizer, stops) for _ in range(sampling.n)]
    without = {"usage": None} if with_usage else {}

    def chunk(i, delta, reason=None):
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": reason}
        return reply | {"choices": [choice]} | without
    asked = service.engine.ask(ids, sampling, stops)
    try:
        exchange.events([chunk(i, {"role": "assistant", "content": ""}) for i in range(sampling.n)])
        done = None
        while not done:
            done = next_done(service, exchange, asked.box, until, STREAM_S)
            chunks = []
            for i, (text, rollout) in enumerate(zip(texts, asked.rollouts)):
                if more := text.more(rollout.ids, done):
                    chunks.append(chunk(i, {"content": more}))
            if chunks:
                exchange.events(chunks)
    finally:
        service.engine.cancel(asked)
    last = [chunk(i, {}, rollout.reason) for i, rollout in enumerate(asked.rollouts)]
    if with_usage:
        last.append(reply | {"choices": [], "usage": usage_of(len(ids), asked.rollouts)})
    exchange.events(last + ["[DONE]"])


class Growing:
    """The text of a rollout that is being written. Its end is held back: it may be the beginning of a stop text."""

    def __init__(self, tokenizer, stops):
        self.stream, self.stops = StreamDecoder(tokenizer), stops
        self.n_held = max(map(len, stops), default=1) - 1
        self.n_ids, self.text = 0, ""  # what has been read; what has been read but not sent

    def more(self, ids, done):
        """What can be sent now of the text of these ids; done: there will be no others."""
        new = ids[self.n_ids:]
        self.n_ids += len(new)
        self.text += "".join(self.stream.push(token) for token in new)
        if done:
            self.text = before_stop(self.text + self.stream.flush(), self.stops)
        n = len(self.text) if done else max(0, len(self.text) - self.n_held)
        n = min(n, len(before_stop(self.text, self.stops)))
        sent, self.text = self.text[:n], self.text[n:]
        return sent


def before_stop(text, stops):
    """The text before the first of the stop texts in it."""
    return text[:min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


# ------------------------------------------------------------------------------------------------------------- a pair


def judge_pair(service, exchange, content):
    """A judgement record as judge.py's files have it; beside each vote's text, its parts."""
    with refusing():
        body, jury = read_object(content), service.judge
        check_fields(service, body, NEUTRAL | CHAT_ALONE)
        pair = pair_in(body)
        with encoding(service, exchange, content):
            ids = jury.encode(pair)
        sampling = sampling_in(body, "votes", jury.sampling, len(ids), service.engine.batch)
    with room(service, sampling.n):
        rollouts = write(service, exchange, ids, sampling)
    record = jury.record(pair, ids, [jury.vote(rollout) for rollout in rollouts])
    for vote in record["votes"]:
        vote["parsed"] = asdict(parse(vote["text"]))
    exchange.send_json(200, record | {"model": service.name, "usage": usage_of(len(ids), rollouts)})


# ------------------------------------------------------------------------------------------------------------ a ranking


def rank_answers(service, exchange, content):
    """A ranking record as the files of judge.py --rank have it."""
    with refusing():
        body, jury = read_object(content), service.judge
        check_fields(service, body, NEUTRAL | CHAT_ALONE)
        (question, _), = questions_in(body, Place(Path("request"), "question", {}))
        if "id" not in body:
            question = named_by_content(question.prompt, question.answers, question.rubric)
        schedule, both_orders = take(body, "schedule", "all", str), take(body, "both_orders", False, bool)
        if schedule not in SCHEDULES:
            raise Bad(f'"schedule" is {show(schedule)}: it must be {" or ".join(SCHEDULES)}')
        with encoding(service, exchange, content):
            n_prompt = max(len(jury.encode(pair)) for pair in longest_pairs(jury, question))
        sampling = sampling_in(body, "votes", jury.sampling, n_prompt, service.engine.batch)
    n_at_once = min(n_judgements(question, schedule, both_orders), max(1, service.engine.batch.n_slots // sampling.n))
    with room(service, n_at_once * sampling.n):
        several = Several(service, exchange, sampling, n_at_once)
        (_, found), = rank_all(several, [question], schedule, both_orders, sampling.seed)
    exchange.send_json(200, record_of(question, found) | {"model": service.name})


class Several:
    """Judges pairs for rank_all, some at once, so that other requests come in between."""

    def __init__(self, service, exchange, sampling, n_at_once):
        self.service, self.exchange, self.sampling, self.n_at_once = service, exchange, sampling, n_at_once
        self.until = time.monotonic() + service.timeout_s

    def judge(self, pairs, bar=None):
        engine, jury = self.service.engine, self.service.judge
        coming, box, present = deque(range(len(pairs))), SimpleQueue(), {}
        try:
            while coming or present:
                while coming and len(present) < self.n_at_once:
                    check_wanted(self.service, self.exchange, self.until)  # long pairs take a while to encode
                    number = coming.popleft()
                    ids = jury.encode(pairs[number])
                    present[engine.ask(ids, self.sampling, box=box)] = number
                if asked := next_done(self.service, self.exchange, box, self.until):
                    number = present.pop(asked)
                    votes = [jury.vote(rollout) for rollout in asked.rollouts]
                    yield number, jury.record(pairs[number], asked.ids, votes)
        finally:
            for asked in present:
                engine.cancel(asked)


# ---------------------------------------------------------------------------------------------------------- the server


def models(service, exchange, _):
    model = {"id": service.name, "object": "model", "created": 0, "owned_by": "nano-rm-r1",
             "max_model_len": service.engine.batch.max_model_len}
    exchange.send_json(200, {"object": "list", "data": [model]})


def health(service, exchange, _):
    exchange.send_json(503 if service.ending else 200, {"status": "ending" if service.ending else "ok"})


def metrics(service, exchange, _):
    """Prometheus' text format; docs/serve.md says what each is."""
    engine, server = service.engine, exchange.server
    batch = engine.batch
    counters = {"done": engine.n_done, "cancelled": engine.n_cancelled, "written_tokens": engine.n_written,
                "prefill_tokens": engine.n_prefilled, "prefill_seconds": engine.prefill_s,
                "decode_tokens": engine.n_decoded, "decode_seconds": engine.decode_s, "put_back": batch.n_put_back}
    gauges = {"writing": len(batch.slots), "waiting": len(batch.waiting), "slots": batch.n_slots,
              "pages_free": batch.pool.n_free, "pages": len(batch.pool.free_x) - 1,  # one is the bin
              "connections": server.n_connections}
    lines = []
    for name, value in counters.items():
        lines += [f"# TYPE rm_{name}_total counter", f"rm_{name}_total {value}"]
    for name, value in gauges.items():
        lines += [f"# TYPE rm_{name} gauge", f"rm_{name} {value}"]
    lines.append("# TYPE rm_requests_total counter")
    with server.lock:
        answered = sorted(server.answered.items())
    lines += [f'rm_requests_total{{path="{path}",status="{status}"}} {n}' for (path, status), n in answered]
    exchange.send_text(200, "\n".join(lines) + "\n")


def routes_of(service):
    """{path: (command, the function that answers)}."""
    def when_open(answer):
        def call(exchange, content):
            if service.ending:
                raise Refused(503, "the server is ending", retry_s=5)
            answer(service, exchange, content)
        return call
    work = {"/v1/chat/completions": chat, "/judge": judge_pair, "/rank": rank_answers}
    looks = {"/v1/models": models, "/health": health, "/metrics": metrics}
    routes = {path: ("POST", when_open(answer)) for path, answer in work.items()}
    return routes | {path: ("GET", partial(answer, service)) for path, answer in looks.items()}


@dataclass(frozen=True)
class Config:
    model: str | None = None  # Hugging Face folder of the judge
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    name: str | None = None  # the model's name in the API; without it, --model as it is given
    host: str = "127.0.0.1"  # address to listen at; one that others can reach needs a key in RM_API_KEY
    port: int = 8000  # 0 = any that is free; it is printed
    temperature: float = 0.0  # of /judge and /rank, where a request says nothing; 0 takes the likeliest token
    top_p: float = 1.0  # likewise: sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # likewise: sample from so many likeliest tokens, 0 = all
    seed: int = 0  # of every request that names none
    max_new_tokens: int = 8192  # longest reply that may be asked for
    max_model_len: int = 0  # longest prompt with its reply, in tokens; 0 = what the model can read
    n_slots: int = 64  # replies written at once, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # GB of keys and values of what is written at once; 0 = what is free
    max_waiting: int = 256  # replies that may wait for a slot; then 429
    max_connections: int = 512  # connections at once; then 503
    max_body: int = 4194304  # bytes of a request; then 413
    receive_s: float = 30.0  # seconds in which a request must be whole; then 408
    timeout_s: float = 600.0  # seconds in which a request must be answered; then 504
    eager: bool = False  # on a GPU, write without CUDA graphs: slower, to look for a fault
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a reply's bits do not depend on what is written beside it; slower, needs a GPU

    def __post_init__(self):
        check_options(self)
        check_model(self)
        check_between(self, 0, 65535, "port")
        check_at_least(self, 0, "max_model_len", "max_waiting")
        check_at_least(self, 1, "max_connections", "max_body")
        check_between(self, 0.1, 86400, "receive_s", "timeout_s")


def key_for(host):
    """The key that requests must bring, as bytes, or None."""
    key = os.environ.get("RM_API_KEY") or None
    if key and not re.fullmatch("[\x21-\x7e]{16,}", key):
        raise ValueError("RM_API_KEY: a key has 16 or more characters of ASCII, none of them blank, such as openssl "
                         "rand -hex 16 prints")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False  # a name that may be anybody's
    if not loopback and not key:
        raise ValueError(f"--host {host}: others can reach it: set the key that they must send in the environment "
                         "variable RM_API_KEY")
    return key.encode() if key else None


def load(cfg):
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    prompt = prompt_for(cfg.model, cfg.prompt)
    model, tokenizer = load_model(cfg.model, cfg.device, cfg.dtype, cfg.batch_invariant)
    context = model.config.raw.get("max_position_embeddings")
    longest = cfg.max_model_len or context
    if not longest or longest < 2 or context and longest > context:
        raise ValueError(f"--max-model-len {cfg.max_model_len}: give a number of tokens from 2 to what {cfg.model} can "
                         f"read, {context or 'which its config.json does not say'}")
    n_new = min(cfg.max_new_tokens, longest - 1)
    sampling = replace(sampling_of(cfg, 1, tokenizer), max_new_tokens=n_new)
    with torch.inference_mode():
        batch = Live(model, tokenizer, cfg.n_slots, cfg.kv_gb, longest, n_new, not cfg.eager)
    judge = Judge(Sampler(model), tokenizer, prompt, sampling)
    return Service(judge, Engine(batch, cfg.max_waiting), cfg.name or cfg.model, cfg.timeout_s)


def bind(cfg, key):
    limits = Limits(cfg.max_connections, cfg.max_body, cfg.receive_s, idle_s=cfg.receive_s)
    try:
        return Server((cfg.host, cfg.port), key, limits)
    except (OSError, OverflowError) as e:
        raise ValueError(f"--host {cfg.host} --port {cfg.port}: {getattr(e, 'strerror', None) or e}; choose another "
                         "(--port 0 takes any that is free)") from None


def main(cfg):
    refuse_ranks("serve.py")
    server = bind(cfg, key_for(cfg.host))  # before the model is read: it may take minutes
    with together(until_saved=True):
        service = load(cfg)
        server.begin(routes_of(service))
        host = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
        batch = service.engine.batch
        n_tokens = batch.pool.n_tokens - batch.pool.page_size  # without the bin's page
        try:
            print(f"{service.name} at http://{host}:{server.server_address[1]}: {batch.n_slots} slots, room for "
                  f"{n_tokens:,} tokens ({batch.pool.gb:.3g} GB)", flush=True)
            while not asked_to_stop() and not service.engine.failed:
                time.sleep(0.1)
            service.ending = True
            while server.n_active and not service.engine.failed:
                time.sleep(0.02)
        finally:  # at Ctrl-C, too: a thread that computes while Python ends would abort it
            service.engine.end()
        if service.engine.failed:
            raise service.engine.failed
        server.shutdown()
    print("ended", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
