"""A batch that requests join and leave while it runs, and the thread that runs it: the only one that uses the model.

    engine = Engine(Live(model, tokenizer, n_slots, kv_gb, max_model_len, max_new_tokens), max_waiting)
    with engine.room(sampling.n):
        asked = engine.ask(ids, sampling)
        asked.box.get()                    # waits; then asked.rollouts are whole

Each request has its own Sampling. A rollout's random numbers come from (seed, the prompt's tokens, sample index, token
index) as in sample.py, so its tokens are those that Sampler.generate draws with the same Sampling, whoever else is
being written, up to rounding.
"""

import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch

from batch import Batch, Rollout
from draw import Sampling, choose, prompt_key, uniforms
from pages import PAGE_SIZE
from tokenizer import StreamDecoder

MOST_ROLLOUTS = 32  # of one prompt: the tables that a step reads have a column for each


@dataclass(eq=False)
class Asked:
    """A request. Its rollouts are written by the engine's thread; others may read what is there of them."""
    ids: list[int]  # the prompt's
    sampling: Sampling
    stop_texts: tuple[str, ...]
    box: SimpleQueue  # the request is put there once it is done
    rollouts: list[Rollout] = field(default_factory=list)
    number: int | None = None  # in the batch
    done: bool = False


class Live(Batch):
    """A Batch without a beginning: prompts get numbers as they come, and nothing is kept of them when they have gone.

    Its memory is laid out for the longest prompt and reply that are let in, as far as kv_gb reaches.
    """

    def __init__(self, model, tokenizer, n_slots, kv_gb, max_model_len, max_new_tokens, graphs=True,
                 page_size=PAGE_SIZE):
        """max_model_len: of a prompt and its reply together."""
        # as if each slot's prompt and rollout were of the longest; top_p: as if all drew in the way that takes most
        self.most_n = min(n_slots, MOST_ROLLOUTS)
        largest = Sampling(n=self.most_n, max_new_tokens=max_new_tokens, top_p=0.5)
        super().__init__(model, [range(max_model_len)] * n_slots, largest, n_slots, kv_gb, page_size=page_size,
                         graphs=graphs)
        self.waiting.clear()
        self.prompts, self.keys, self.asked = {}, {}, {}  # by number, as are Batch's groups, n_left, pages and hidden
        self.stops = {}  # number -> a StopTexts for each of its rollouts, if it has stop texts
        self.tokenizer, self.max_model_len, self.n_joined = tokenizer, max_model_len, 0
        self.in_step = False  # is a step being computed?
        width, dtype = model.config.hidden_size, model.head_vd.dtype
        self.kept_bd = torch.zeros(self.out_2b.shape[1], width, device=self.device, dtype=dtype)  # its hidden states

    def join(self, asked):
        number = asked.number = self.n_joined  # a later one is younger, as Batch wants it
        self.n_joined += 1
        asked.rollouts = [Rollout() for _ in range(asked.sampling.n)]
        self.asked[number], self.prompts[number], self.keys[number] = asked, asked.ids, prompt_key(asked.ids)
        self.groups[number], self.n_left[number] = asked.rollouts, asked.sampling.n
        if asked.stop_texts:
            self.stops[number] = [StopTexts(self.tokenizer, asked.stop_texts) for _ in asked.rollouts]
        self.waiting.extend((number, sample) for sample in range(asked.sampling.n))

    def cancel(self, number):
        """A request that is not done leaves; its slots and pages are free."""
        for slot in [slot for slot in self.slots if slot.prompt == number]:
            self.leave(slot)
        self.waiting = deque(place for place in self.waiting if place[0] != number)
        if number in self.pages:
            self.drop_prompt(number)
        self.forget(number)
        del self.groups[number]

    def take_done(self):
        """The requests whose rollouts are all written."""
        return [self.forget(number) for number, _ in self.take_finished()]

    def forget(self, number):
        del self.prompts[number], self.keys[number], self.n_left[number]
        self.stops.pop(number, None)
        return self.asked.pop(number)

    # -- each request draws in its own way

    def compute(self, n):
        """A step as Batch computes it, but drawn behind it: a CUDA graph cannot hold the settings of those who come
        and go."""
        self.in_step = True
        super().compute(n)
        self.in_step = False
        column, _ = self.inputs.tables(n, whole=False)
        coordinates = column["key"], column["sample"], column["length"]
        self.out_2b[:, :n] = self.draw_each(self.slots, self.kept_bd[:n], *coordinates)

    def draw(self, hidden_ad, key_a, sample_a, drawn_a):
        """What Batch calls: for the first tokens of those just admitted, and within a step."""
        if self.in_step:
            self.kept_bd[:len(hidden_ad)] = hidden_ad
            return torch.zeros_like(self.out_2b[:, :len(hidden_ad)])
        fresh = [slot for slot in self.slots if not slot.rollout.ids]  # in the order in which admit has them
        return self.draw_each(fresh, hidden_ad, key_a, sample_a, drawn_a)

    def draw_each(self, slots, hidden_ad, key_a, sample_a, drawn_a):
        """Batch.draw, in which each row has its own Sampling; rows that draw in the same way are drawn together."""
        how = [self.asked[slot.prompt].sampling for slot in slots]
        seed_a = torch.tensor([sampling.seed for sampling in how], device=self.device)
        uniform_a = uniforms(seed_a, key_a, sample_a, drawn_a)
        logits_av = self.logits(hidden_ad)
        rows_of = {}
        for row, sampling in enumerate(how):
            rows_of.setdefault((sampling.temperature, sampling.top_p, sampling.top_k), []).append(row)
        out_2a = torch.empty(2, len(slots), dtype=torch.float64, device=self.device)
        for (temperature, top_p, top_k), rows in rows_of.items():
            rows = slice(None) if len(rows_of) == 1 else rows
            id_a, logp_a = choose(logits_av[rows], uniform_a[rows], temperature, top_p, top_k)
            out_2a[:, rows] = torch.stack([id_a.double(), logp_a.double()])
        return out_2a

    def reason_to_end(self, slot, token):
        sampling = self.asked[slot.prompt].sampling
        if token in sampling.stop:
            return "stop"
        if slot.prompt in self.stops and self.stops[slot.prompt][slot.sample].push(token):
            return "stop"
        return "length" if len(slot.rollout.ids) == sampling.max_new_tokens else None


class StopTexts:
    """Looks for some texts in a rollout as it grows."""

    def __init__(self, tokenizer, texts):
        self.stream, self.texts, self.tail = StreamDecoder(tokenizer), texts, ""
        self.longest = max(map(len, texts))

    def push(self, token):
        """Does one of the texts stand there now?"""
        self.tail += self.stream.push(token)
        found = any(text in self.tail for text in self.texts)
        self.tail = self.tail[-self.longest:]
        return found


# ---------------------------------------------------------------------------------------------------------- the engine


class Busy(Exception):
    """As many rollouts as there is room for are asked for already."""


class Engine:
    """Runs a Live batch in a thread of its own. Other threads ask and cancel; they look at counts, and change none."""

    def __init__(self, batch, max_waiting):
        """max_waiting: rollouts that may wait, beside those that are written."""
        self.batch, self.n_room = batch, batch.n_slots + max_waiting
        self.n_taken, self.lock = 0, threading.Lock()
        self.inbox = SimpleQueue()  # (request, does it come?), or None: to end
        self.failed = None  # the exception that has ended the thread
        self.n_prefilled, self.n_decoded, self.prefill_s, self.decode_s = 0, 0, 0.0, 0.0
        self.n_done, self.n_cancelled = 0, 0  # requests ...
        self.n_written = 0  # ... and the tokens of those done
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @contextmanager
    def room(self, n):
        """Room for so many rollouts at once, while the block lasts; Busy if there is none."""
        with self.lock:
            if self.n_taken + n > self.n_room:
                raise Busy
            self.n_taken += n
        try:
            yield
        finally:
            with self.lock:
                self.n_taken -= n

    def ask(self, ids, sampling, stop_texts=(), box=None):
        asked = Asked(ids, sampling, stop_texts, box or SimpleQueue())
        self.inbox.put((asked, True))
        return asked

    def cancel(self, asked):
        if not asked.done:
            self.inbox.put((asked, False))

    def end(self):
        self.inbox.put(None)
        self.thread.join()

    def run(self):
        try:
            with torch.inference_mode():
                while self.listen():
                    self.work()
        except Exception as error:  # whatever it is, those who wait must hear of it, and main ends with it
            self.failed = error

    def listen(self):
        """Lets requests in and out, and waits for one if there is nothing to do. False: it is to end."""
        idle = not self.batch.waiting and not self.batch.slots
        while True:
            try:
                order = self.inbox.get(block=idle)
            except Empty:
                return True
            if order is None:
                return False
            asked, comes = order
            idle = False
            if comes:
                self.batch.join(asked)
            elif not asked.done:
                self.batch.cancel(asked.number)
                asked.done = True
                self.n_cancelled += 1

    def work(self):
        """Lets those in who have waited, or writes a token for everybody."""
        batch, began = self.batch, time.perf_counter()
        if batch.worth_admitting():
            self.n_prefilled += batch.admit()
            self.prefill_s += time.perf_counter() - began
        elif batch.slots:
            self.n_decoded += batch.step()
            self.decode_s += time.perf_counter() - began
        for asked in batch.take_done():
            asked.done = True
            self.n_done += 1
            self.n_written += sum(len(rollout.ids) for rollout in asked.rollouts)
            asked.box.put(asked)
