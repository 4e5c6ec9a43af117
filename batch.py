"""The rollouts that are being written: who waits, who has a slot, whose pages are where; and the step that writes on.

A step draws one token for every slot. What it reads is on the device before it begins (pages.StepInputs), and it looks
at no value on the host: so a CUDA graph can hold it. Between steps the host reads what was drawn, ends what has ended,
lets others in, and hands out pages.

Letters: B slots, A rows that are drawn for, T pages of a slot, P prompts, G places for a prompt's rollouts, X pages of
the pool, K key/value heads, C channels of a head, D width, V vocabulary.
"""

import functools
import math
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from draw import choose, prompt_key, uniforms
from kernels import attention, decode_attention, linear_logp, logits, pack_weight, store, use_triton
from model import pack
from pages import BIN, PAGE_SIZE, Pool, StepInputs, affordable, pages_for


@dataclass
class Rollout:
    """A sampled reply. logps[i]: log-probability, in nats, of ids[i] under the distribution it was drawn from
    (temperature, top_k and top_p applied); for greedy decoding, under the model's own distribution at temperature 1."""
    ids: list[int] = field(default_factory=list)  # the stop token included
    logps: list[float] = field(default_factory=list)
    reason: str = "length"  # "stop": ended with a stop token; "length": cut off at max_new_tokens
    seconds: float = 0.0  # from its admission, prefill included, to its last token

    @property
    def finished(self):
        return self.reason == "stop"


# ------------------------------------------------------------------------------------------------------------ a batch

DAMAGED = "the weights are damaged, or were trained with too high a learning rate"


@dataclass(eq=False)  # a slot is itself: comparing rollouts token by token would cost 4 ms a step at 256 slots
class Slot:
    """A rollout that is being written, and the pages that hold its own tokens."""
    prompt: int
    sample: int
    key: int  # the prompt's, for its random numbers
    rollout: Rollout
    pages: list[int]
    began: float


class Batch:
    """The rollouts of some prompts: which are waiting, which are being written, one a slot, and which are done.

    They start in the order of (prompt, sample), as slots and pages become free; a prompt is computed with the first of
    its rollouts, and its pages are let go with the last. When no page is left for the next token, what is idle goes
    first: a prompt of which only waiting rollouts are left. Then the youngest rollout is put back to the front of those
    waiting, with its tokens; their keys are computed again when its turn comes.
    """

    def __init__(self, model, prompts, sampling, n_slots, kv_gb=0.0, prefill_tokens=16384, page_size=PAGE_SIZE,
                 graphs=True, on_token=None):
        self.model, self.prompts, self.sampling, self.on_token = model, prompts, sampling, on_token
        self.keys = [prompt_key(ids) for ids in prompts]
        self.prefill_tokens, self.page_size = prefill_tokens, page_size
        self.n_slots = min(n_slots, sampling.n * len(prompts))
        self.device, dtype = model.head_vd.device, model.head_vd.dtype
        longest_prompt = max(len(ids) for ids in prompts)
        self.own_pages = pages_for(sampling.max_new_tokens, page_size)  # that a rollout may come to need
        prompt_pages = pages_for(longest_prompt, page_size)
        wanted = 1 + self.n_slots * self.own_pages + min(self.n_slots, len(prompts)) * prompt_pages
        n_pages = min(wanted, affordable(model.config, model.split, dtype, self.device, kv_gb, longest_prompt,
                                         sampling.max_new_tokens, page_size, self.work_bytes(dtype)))
        self.pool = Pool(model.config, n_pages, page_size, self.device, dtype)
        self.graphs = Graphs() if graphs and self.wants_graphs() else None
        most = bucket(self.n_slots) if self.graphs else self.n_slots
        n_members = min(sampling.n, self.n_slots)
        self.inputs = StepInputs(most, self.own_pages, prompt_pages, n_members, n_pages, page_size, self.device)
        # read by many steps, of several rows: for one row a step it would not pay
        self.packed_head_vd = pack_weight(model.padded_head_vd, model.impl) if self.n_slots > 2 else None
        self.out_2b = torch.zeros(2, most, dtype=torch.float64, device=self.device)  # drawn ids and their logps
        self.waiting = deque((i, sample) for i in range(len(prompts)) for sample in range(sampling.n))
        self.slots = []
        self.groups = {}  # prompt -> its n rollouts, from the first one's start until they are taken
        self.n_left = {}  # prompt -> how many of them are not done
        self.pages = {}   # prompt -> its pages, while they are held ...
        self.hidden = {}  # ... and the state that its rollouts' first tokens are drawn from
        self.finished = []  # prompts whose rollouts are all done, until they are taken
        self.stale = True  # slots have changed since the inputs were filled
        self.n_put_back = 0
        self.logits_differ = False  # of the first token of all

    def wants_graphs(self):
        return self.device.type == "cuda" and use_triton(self.model.head_vd, self.model.impl)

    def work_bytes(self, dtype):
        """About what a prefill and a draw hold at once: a layer's activations, and the logits of all slots, once as
        they are and once as weights; with top-p sorted in float64, too."""
        config, draws = self.model.config, 40 if self.sampling.top_p < 1 else 12
        per_token = (4 * config.intermediate_size + 8 * config.hidden_size) * dtype.itemsize
        return self.prefill_tokens * per_token + self.n_slots * config.vocab_size * draws

    # -- who is written next

    def fits(self):
        """Is there a slot, and are there pages, for the first of those waiting? Each rollout that is being written has
        a claim to its next page, so that nobody is let in who would soon be put back."""
        if not self.waiting or len(self.slots) == self.n_slots:
            return False
        prompt, sample = self.waiting[0]
        needed = self.pool.needed(self.n_tokens(prompt, sample))
        if prompt not in self.pages:
            needed += self.pool.needed(len(self.prompts[prompt]))
        needed += sum(len(slot.pages) < self.own_pages for slot in self.slots)  # their claims
        idle = self.idle(but=prompt)
        if self.pool.n_free + sum(len(self.pages[i]) for i in idle) < needed:
            return False
        while self.pool.n_free < needed:
            self.drop_prompt(idle.pop())
        return True

    def worth_admitting(self):
        """Is it time to let others in? Not one by one: packs are faster."""
        n_free = self.n_slots - len(self.slots)
        return (not self.slots or n_free >= max(1, self.n_slots // 8)) and self.fits()

    def n_tokens(self, prompt, sample):
        """How many tokens' keys a rollout has once it is written again: one at least."""
        return max(1, len(self.groups[prompt][sample].ids)) if prompt in self.groups else 1

    def admit(self):
        """Gives slots and pages to those waiting as far as they reach, computes what they need, and draws the first
        tokens; returns how many tokens were computed."""
        began, admitted, new_prompts = time.perf_counter(), [], []
        while self.fits():
            prompt, sample = self.waiting.popleft()
            if prompt not in self.pages:
                self.pages[prompt] = self.pool.take(self.pool.needed(len(self.prompts[prompt])), shared=True)
                new_prompts.append(prompt)
            if prompt not in self.groups:
                self.groups[prompt] = [Rollout() for _ in range(self.sampling.n)]
                self.n_left[prompt] = self.sampling.n
            pages = self.pool.take(self.pool.needed(self.n_tokens(prompt, sample)))
            slot = Slot(prompt, sample, self.keys[prompt], self.groups[prompt][sample], pages, began)
            self.slots.append(slot)
            admitted.append(slot)
        self.stale = True
        fresh = [slot for slot in admitted if not slot.rollout.ids]
        n_computed = self.prefill(new_prompts, [slot for slot in admitted if slot.rollout.ids])
        if fresh:
            hidden_ad = torch.stack([self.hidden[slot.prompt] for slot in fresh])
            self.logits_differ = self.logits_differ or self.check_logits(hidden_ad[:1])
            coordinates = [[slot.key for slot in fresh], [slot.sample for slot in fresh], [0] * len(fresh)]
            key_a, sample_a, drawn_a = torch.tensor(coordinates, device=self.device)
            self.record(fresh, self.draw(hidden_ad, key_a, sample_a, drawn_a).tolist())
        return n_computed

    def check_logits(self, hidden_1d):
        """ValueError if they are all equal: a norm of weights that are too large has overflowed."""
        row_v = self.logits(hidden_1d)[0]
        largest, smallest = self.model.split.first(torch.stack([row_v.max(), row_v.min()]))
        if largest == smallest and len(row_v) > 1:
            raise ValueError(f"{self.model.name}: its logits are all equal: {DAMAGED}")
        return True

    def idle(self, but=None):
        """The prompts that nobody is writing from, the youngest last. Let go of, they would be computed again for those
        of their rollouts that wait."""
        in_use = {slot.prompt for slot in self.slots} | {but}
        return sorted(prompt for prompt in self.pages if prompt not in in_use)

    def drop_prompt(self, prompt):
        self.pool.give_back(self.pages.pop(prompt))
        del self.hidden[prompt]

    def make_room(self):
        """A page for every slot whose last one is full; for that the youngest may have to be put back."""
        for slot in sorted(self.slots, key=age):
            if self.pool.needed(len(slot.rollout.ids)) > len(slot.pages) and slot in self.slots:
                if not self.pool.n_free and (idle := self.idle()):
                    self.drop_prompt(idle.pop())
                elif not self.pool.n_free:
                    self.put_back(max(self.slots, key=age))
                if slot in self.slots:
                    slot.pages += self.pool.take(1)
                    if not self.stale:
                        self.inputs.grow(self.slots.index(slot), slot.pages)

    def put_back(self, slot):
        self.leave(slot)
        self.waiting.appendleft((slot.prompt, slot.sample))  # in order: whoever waits is younger
        self.n_put_back += 1

    def leave(self, slot):
        """The slot is free, and so are its pages."""
        slot.rollout.seconds += time.perf_counter() - slot.began
        self.pool.give_back(slot.pages)
        self.slots.remove(slot)
        self.stale = True

    def end(self, slot, reason):
        slot.rollout.reason = reason
        self.leave(slot)
        self.n_left[slot.prompt] -= 1
        if self.n_left[slot.prompt] == 0:
            self.drop_prompt(slot.prompt)
            self.finished.append(slot.prompt)

    def take_finished(self):
        """(prompt, its rollouts) of the groups that have become whole."""
        finished, self.finished = self.finished, []
        return [(i, self.groups.pop(i)) for i in finished]

    # -- what is computed

    def prefill(self, new_prompts, resumed):
        """Computes prompts, and the tokens of rollouts that had been put back, and keeps their keys and values; returns
        how many tokens that were."""
        resumed_of = {prompt: [] for prompt in new_prompts}
        for slot in resumed:
            resumed_of.setdefault(slot.prompt, []).append(slot)
        trees, sizes = [], []  # a tree: a prompt and slots that continue it, of prefill_tokens at most
        for prompt, slots in resumed_of.items():
            n_each = [len(slot.rollout.ids) for slot in slots]
            for first, last in _packs(n_each, self.prefill_tokens - len(self.prompts[prompt])) or [(0, 0)]:
                trees.append((prompt, slots[first:last]))
                sizes.append(len(self.prompts[prompt]) + sum(n_each[first:last]))
        not_stored = set(new_prompts)
        for first, last in _packs(sizes, self.prefill_tokens):
            self.prefill_pack(trees[first:last], not_stored)
        return sum(sizes)

    def prefill_pack(self, trees, not_stored):
        """not_stored: the prompts whose pages are still empty; those of this pack are taken out."""
        # the last token of a rollout is the next step's input: its keys come then
        forest = pack([(self.prompts[i], [slot.rollout.ids[:-1] for slot in slots]) for i, slots in trees], self.device)
        page_n, offset_n, stored = [], [], []
        for i, slots in trees:
            stored.append(i if i in not_stored else None)
            # computed for its rollouts alone, while its own pages are here already
            prompt_pages = self.pages[i] if i in not_stored else [BIN] * len(self.pages[i])
            not_stored.discard(i)
            for pages, ids in [(prompt_pages, self.prompts[i])] + [(s.pages, s.rollout.ids[:-1]) for s in slots]:
                place_n = np.arange(len(ids))
                page_n.append(np.array(pages)[place_n // self.page_size])
                offset_n.append(place_n % self.page_size)
        page_n, offset_n = (torch.from_numpy(np.concatenate(x)).to(self.device) for x in (page_n, offset_n))

        def store_and_attend(layer, q_nhc, k_nkc, v_nkc):
            store(self.pool.k[layer], self.pool.v[layer], k_nkc, v_nkc, page_n, offset_n, self.model.impl)
            return attention(q_nhc, k_nkc, v_nkc, forest.segments_s3, self.model.impl)
        hidden_nd = self.model.run(forest.tokens_n, forest.positions_n, store_and_attend)
        start_s, length_s, parent_s = forest.segments_s3.numpy().T
        last_p = torch.from_numpy((start_s + length_s - 1)[parent_s < 0]).to(self.device)
        for i, hidden_d in zip(stored, hidden_nd[last_p]):
            if i is not None:
                self.hidden[i] = hidden_d.clone()  # not a view, which would keep all of the pack

    def step(self):
        """Draws one more token for every rollout that is being written; returns how many."""
        self.make_room()
        if self.stale:
            if not use_triton(self.model.head_vd, self.model.impl):
                self.tidy()
            self.inputs.fill(self.slots, self.pages, {i: len(self.prompts[i]) for i in self.pages})
            self.stale = False
        self.inputs.upload()
        slots = list(self.slots)
        self.compute(len(slots))
        ids, logps = self.out_2b[:, :len(slots)].tolist()  # one wait for the device
        self.inputs.advance(ids)
        self.record(slots, (ids, logps))
        return len(slots)

    def compute(self, n):
        if self.graphs:
            self.graphs.run(self.compute_step, n)
        else:
            self.compute_step(n)

    def compute_step(self, n, whole=False):
        """The step itself, for the first n slots: from `inputs` into out_2b, without a look at any value. whole: with
        shapes that n alone decides, for a CUDA graph."""
        column, tables = self.inputs.tables(n, whole)
        pool, impl = self.pool, self.model.impl

        def store_and_attend(layer, q_bhc, k_bkc, v_bkc):
            store(pool.k[layer], pool.v[layer], k_bkc, v_bkc, column["page"], column["offset"], impl)
            return decode_attention(q_bhc, pool.k[layer], pool.v[layer], tables, impl)
        hidden_bd = self.model.run(column["token"], column["position"], store_and_attend)
        self.out_2b[:, :n] = self.draw(hidden_bd, column["key"], column["sample"], column["length"])

    def draw(self, hidden_ad, key_a, sample_a, drawn_a):
        """Samples a token for each row: ids and log-probabilities, [2, A] float64."""
        how, impl = self.sampling, self.model.impl
        uniform_a = uniforms(how.seed, key_a, sample_a, drawn_a)
        logits_av = self.logits(hidden_ad)
        id_a, logp_a = choose(logits_av, uniform_a, how.temperature, how.top_p, how.top_k)
        if impl == "invariant" and how.top_k == 0 and how.top_p == 1:  # the trainer's own operation: equal bits
            logp_a, _ = linear_logp(hidden_ad, self.model.head_vd, id_a, how.temperature or 1.0, impl=impl)
        # of ranks that sample as one the first decides, or a rounding would part them; all they do besides is the same
        # because it follows from the same prompts, settings and draws
        return self.model.split.first(torch.stack([id_a.double(), logp_a.double()]))

    def logits(self, hidden_ad):
        # all rows of the head, padding included: their number suits the matrix units better than the tokenizer's
        head_vd = self.model.padded_head_vd if self.packed_head_vd is None else self.packed_head_vd
        return logits(hidden_ad, head_vd, self.model.impl)[:, :self.model.n_vocab]

    def record(self, slots, drawn):
        """Writes down what the slots have drawn, and ends the rollouts that end with it."""
        for slot, token, logp in zip(slots, *drawn):
            if not math.isfinite(logp):
                raise ValueError(f"{self.model.name}: its logits are not finite (NaN or infinity): {DAMAGED}")
            token = int(token)
            slot.rollout.ids.append(token)
            slot.rollout.logps.append(logp)
            if self.on_token:
                self.on_token(slot.prompt, slot.sample, token)
            if reason := self.reason_to_end(slot, token):
                self.end(slot, reason)

    def reason_to_end(self, slot, token):
        if token in self.sampling.stop:
            return "stop"
        return "length" if len(slot.rollout.ids) == self.sampling.max_new_tokens else None

    def tidy(self):
        """Moves the pages in use together where less than half of those that are walked are in use."""
        own, shared = [slot.pages for slot in self.slots], list(self.pages.values())
        last = max(max(pages) for pages in own)
        first = min(min(pages) for pages in shared)
        if last > 16 + 2 * sum(map(len, own)):
            self.pool.gather(own)
        if len(self.pool.free_x) - first > 16 + 2 * sum(map(len, shared)):
            self.pool.gather(shared, shared=True)


def age(slot):
    """Sorts slots from the oldest to the youngest."""
    return slot.prompt, slot.sample


def _packs(sizes, limit):
    """Consecutive ranges (first, last) whose sizes add up to at most `limit`, or hold one item."""
    packs = []
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            packs.append((first, i))
            first, total = i, 0
        total += size
    return packs + [(first, len(sizes))] if sizes else []


class Graphs:
    """A step as CUDA graphs: one launch for all kernels of all layers, where Python would need 5 ms for 28 layers. One
    for each bucket of slots; the slots beyond those in use are computed, and nobody looks. They live as long as the
    batch, whose memory they hold: a bucket costs two steps without a graph and a capture each time.

    Of ranks that sample as one the sums and the draw's broadcast are in them too: NCCL's calls can be captured, and all
    ranks capture and replay the same buckets. (Untested: it takes two GPUs.)

    (They do not hold the batch itself: it would hold itself then, and keep its memory.)
    """

    def __init__(self):
        self.graphs = {}
        self.memory = torch.cuda.graph_pool_handle()  # one for all: they never run at once

    def run(self, compute_step, n_used):
        n = bucket(n_used)
        if n not in self.graphs:
            self.graphs[n] = self.capture(compute_step, n)
        self.graphs[n].replay()

    def capture(self, compute_step, n):
        # first without a graph: kernels are compiled and libraries make room, which a capture forbids. A step that is
        # run again computes the same from the same inputs
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute_step(n, whole=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, NCCL's watchdog, may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self.memory, stream=stream, capture_error_mode="thread_local"):
            compute_step(n, whole=True)
        return graph


@functools.lru_cache
def _capture_stream():
    """One for the process: libraries keep a workspace for each stream."""
    return torch.cuda.Stream()


def bucket(n):
    """The number of slots that are computed for n: 1, 2, 4, 8, then multiples of 16, and above 64 of 32."""
    if n <= 8:
        return 2 ** math.ceil(math.log2(n))
    step = 16 if n <= 64 else 32
    return -(-n // step) * step
