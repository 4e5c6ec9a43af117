"""Prompts in, rollouts out: KV cache, continuous batching, sampling. On the command line: texts in, completions out.

    python sample.py --model DIR --text "Which is larger, 9.9 or 9.11?"          streams the completion
    python sample.py --model DIR --texts FILE --out FILE --n 4                    JSON lines in, JSON lines out
    Sampler(model).generate([ids, ids], Sampling(n=7, stop=tokenizer.stop_ids))   a list of 7 rollouts for each prompt

The sampler runs the trainer's own model code (Model.run) with a cache for attention, so its log-probabilities are the
trainer's up to rounding. A prompt is computed once for its n rollouts. A rollout's random numbers come from (seed, the
prompt's tokens, sample index, token index) and nothing else: so the same rollout comes out alone or in any batch, up to
rounding (which with --batch-invariant does not depend on the batch either).

Letters: B slots (rollouts being written at once), A of them active, T cached positions of a slot, P prompts, G places
for a prompt's rollouts, U cached positions of a prompt, X rows of a cache (slots or prompts), K key/value heads, C
channels of a head, D width, V vocabulary.
"""

import hashlib
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from common import copy_weights
from files import NotJson, one_line_errors, parse_json, refuse_existing, write_records
from folder import check_folder
from kernels import Prompts, attention, decode_attention, linear_logp, logits, runs_triton
from model import Model, pack
from options import check_at_least, check_between, check_choice, parse_config, refuse_ranks
from tokenizer import StreamDecoder, Tokenizer

# ------------------------------------------------------------------------------------------- one token's random choice


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


@dataclass(frozen=True)
class Sampling:
    """How many rollouts each prompt gets, how their tokens are drawn, and when a rollout ends."""
    n: int = 1  # rollouts of each prompt
    max_new_tokens: int = 1024
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # draw from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # draw from so many likeliest tokens, 0 = all
    stop: frozenset[int] = frozenset()  # token ids that end a rollout
    seed: int = 0

    def __post_init__(self):
        for name, ok in (("n", self.n >= 1), ("max_new_tokens", self.max_new_tokens >= 1), ("top_k", self.top_k >= 0),
                         ("temperature", 0 <= self.temperature < math.inf), ("top_p", 0 < self.top_p <= 1)):
            if not ok:
                raise ValueError(f"Sampling: {name} is {getattr(self, name)}; n and max_new_tokens are at least 1, "
                                 "temperature and top_k at least 0, top_p in (0, 1]")


def uniforms(seed, prompt_b, sample_b, token_b):
    """One float64 in (0, 1) for each (seed, prompt id, sample index, token index), by hashing: no generator state.

    A generator's next number depends on who drew before, so on the batch. A hash of the rollout's own coordinates does
    not: token 5 of sample 2 of a prompt draws the same number alone, in any batch, after a restart. (The same prompt
    twice in a batch gets the same rollouts twice.)
    """
    increment = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's, as the int64 that has its bits
    x_b = torch.full_like(prompt_b, seed)
    for key_b in (prompt_b, sample_b, token_b):
        x_b = _mix(x_b + increment) ^ key_b
    bits_b = (_mix(x_b + increment) >> 12) & (2**52 - 1)
    return (bits_b.double() + 0.5) / 2**52  # 52 bits, not 53: the half must fit behind them, or the largest rounds to 1


def _mix(x):
    """The splitmix64 finalizer, in which every input bit reaches every output bit; int64 products wrap modulo 2^64."""
    def shift_right(x, bits):  # logical: int64's own shift repeats the sign bit
        return (x >> bits) & ((1 << (64 - bits)) - 1)
    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shift_right(x, 31)


def prompt_key(ids):
    """The prompt's id for its random numbers: 63 bits of a hash of its tokens."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def choose(logits_bv, uniform_b, temperature=1.0, top_p=1.0, top_k=0):
    """Draws one token per row by inverting the cumulative distribution at uniform_b; returns id_b and logp_b.

    Example: p = [0.5, 0.3, 0.2] has the cumulative sums [0.5, 0.8, 1.0]; 0.6 lies above the first, so token 1 is drawn.
    top_k keeps the k likeliest tokens (and ties with the k-th), then top_p the smallest set of the likeliest whose
    probability reaches top_p. Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        id_b = logits_bv.argmax(1)
        return id_b, _picked(logits_bv.log_softmax(1), id_b)
    logits_bv = logits_bv / temperature
    if 0 < top_k < logits_bv.shape[1]:
        kth_b1 = logits_bv.topk(top_k).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < kth_b1, -torch.inf)
    if top_p < 1:
        p_bv, order_bv = logits_bv.double().softmax(1).sort(dim=1, descending=True, stable=True)  # of ties the first
        beyond_bv = p_bv.cumsum(1) - p_bv >= top_p  # the likelier tokens reach top_p without this one
        beyond_bv = torch.zeros_like(beyond_bv).scatter(1, order_bv, beyond_bv)  # back in the vocabulary's order
        logits_bv = logits_bv.masked_fill(beyond_bv, -torch.inf)
    # float64, so that the draw does not depend on how a device orders the sum, which it may do by the number of rows
    cdf_bv = (logits_bv - logits_bv.amax(1, keepdim=True)).double().exp().cumsum(1)
    total_b = cdf_bv[:, -1]  # not 1: scaling the point by it is cheaper than dividing the row
    # the product may round up to the total, above which no token lies; just below it the last possible token does
    point_b = (uniform_b * total_b).minimum(total_b.nextafter(torch.zeros_like(total_b)))
    # the first token whose sum is ABOVE the point (right=True): one of probability 0 adds nothing and is passed over
    id_b = torch.searchsorted(cdf_bv, point_b[:, None], right=True)[:, 0]
    id_b = id_b.clamp(max=logits_bv.shape[1] - 1)  # of a row of NaN: its logp_b is NaN, which the caller sees
    return id_b, _picked(logits_bv.log_softmax(1), id_b)


def _picked(logp_bv, id_b):
    return logp_bv.gather(1, id_b[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------- cache and batch

DAMAGED = "the weights are damaged, or were trained with too high a learning rate"


class Cache:
    """Keys (rotated) and values, per layer: [X, K, T, C]. The rows X are slots or prompts, see Batch."""

    def __init__(self, config, X, T, device, dtype):
        shape = X, config.num_key_value_heads, T, config.head_dim
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]

    @property
    def size(self):
        """Rows X and positions T."""
        return self.k[0].shape[0], self.k[0].shape[2]

    def resize(self, kept, X, T):
        """Keeps these rows, as the first of X, with room for T positions."""
        def moved(x):
            out = x.new_zeros(X, x.shape[1], T, x.shape[3])
            out[:len(kept), :, :x.shape[2]] = x[kept, :, :T]
            return out
        for layer in range(len(self.k)):  # one layer at a time, so that only one exists twice
            self.k[layer] = moved(self.k[layer])
            self.v[layer] = moved(self.v[layer])

    def clear(self, rows):
        """Before rows are used again: a NaN in what an earlier rollout left would pass through attention as 0 * NaN."""
        for x in self.k + self.v:
            x[rows] = 0


@dataclass
class Slot:
    """A place in the batch: which rollout is being written there, or none."""
    prompt: int = -1
    sample: int = 0
    rollout: Rollout | None = None
    began: float = 0.0


class Batch:
    """The rollouts that are being written: B slots, of which A are active, their caches, and what a step needs.

    `own` holds a slot's own tokens; `shared` holds each live prompt once, in a row. A row is let go with the group's
    last rollout, so there may be more rows than B / n: the slots of the rollouts that ended first belong to others.
    Example, n = 2 and 4 slots. One rollout of prompt 0 has ended; slot 1 stays free until a whole group has room:

        slot  rollout              own tokens  row of `shared`
        0     prompt 0, sample 0   37          0
        1     none                 -           -
        2     prompt 1, sample 0   12          1
        3     prompt 1, sample 1   12          1
    """

    def __init__(self, model, prompts, n_slots, prefill_tokens, sampling, on_token=None):
        config, head_vd = model.config, model.head_vd
        self.model = model
        self.prompts = prompts
        self.prefill_tokens = prefill_tokens
        self.sampling = sampling
        self.on_token = on_token
        self.keys = [prompt_key(ids) for ids in prompts]
        self.device = head_vd.device
        self.slots = [Slot() for _ in range(n_slots)]
        self.own = Cache(config, n_slots, min(64, sampling.max_new_tokens), self.device, head_vd.dtype)
        self.shared = Cache(config, 0, 0, self.device, head_vd.dtype)
        self.token_b = torch.zeros(n_slots, dtype=torch.int64, device=self.device)  # the last token of each slot
        self.groups = {}  # prompt -> its n rollouts, while some of them are being written
        self.rows = {}    # prompt -> its row in `shared`, for as long
        self.ended = []   # the prompts of rollouts that ended since the last take_finished
        self.stale = True  # slots have changed hands since the last tabulate

    def free(self):
        return [b for b, slot in enumerate(self.slots) if slot.rollout is None]

    def tabulate(self):
        """Who is where, for the device. Between two calls only drawn_b changes, and that on the device.

        drawn_b counts the tokens drawn. The last of them is the next step's input: its position is last_b + drawn_b,
        last_b being the prompt's last, and it sees drawn_b of its own, itself included. Example: a prompt of 10 tokens
        (positions 0 to 9, last_b = 9) after 3 drawn tokens; the third is at position 12 and sees 10 + 3 keys.
        An empty slot is computed like the others; it sees itself alone, and nobody reads what comes of it.
        """
        B, n = len(self.slots), self.sampling.n
        n_rows = 1 + max(self.rows.values())
        drawn_b = np.ones(B, dtype=np.int64)
        last_b = np.zeros(B, dtype=np.int64)
        key_b = np.zeros(B, dtype=np.int64)
        sample_b = np.zeros(B, dtype=np.int64)
        place_b = np.full(B, -1)  # where the slot stands in slot_pg, counted through its rows
        slot_pg = np.full((n_rows, n), -1)  # the slots that continue each prompt
        length_p = np.zeros(n_rows, dtype=np.int64)
        self.active = [b for b, slot in enumerate(self.slots) if slot.rollout is not None]
        for b in self.active:
            slot = self.slots[b]
            row, n_prompt = self.rows[slot.prompt], len(self.prompts[slot.prompt])
            drawn_b[b] = len(slot.rollout.ids)
            last_b[b] = n_prompt - 1
            key_b[b] = self.keys[slot.prompt]
            sample_b[b] = slot.sample
            place_b[b] = row * n + slot.sample
            slot_pg[row, slot.sample] = b
            length_p[row] = n_prompt

        def uploaded(array):
            return torch.from_numpy(array).to(self.device)
        self.drawn_b = uploaded(drawn_b)
        self.last_b = uploaded(last_b)
        self.key_b = uploaded(key_b)
        self.sample_b = uploaded(sample_b)
        self.place_b = uploaded(place_b)
        self.slot_pg = uploaded(slot_pg)
        self.length_p = uploaded(length_p)
        self.active_a = uploaded(np.array(self.active, dtype=np.int64))
        self.longest_prompt = int(length_p.max())
        self.stale = False

    def admit(self, admitted):
        """Gives each of these prompts a row and n slots, computes it once, and draws its rollouts' first tokens."""
        n, began = self.sampling.n, time.perf_counter()
        taken = self.free()[:len(admitted) * n]
        unused_rows = sorted(set(range(len(self.rows) + len(admitted))) - set(self.rows.values()))
        for j, i in enumerate(admitted):
            self.rows[i] = unused_rows[j]
            self.groups[i] = [Rollout() for _ in range(n)]
            for sample, b in enumerate(taken[j * n:(j + 1) * n]):
                self.slots[b] = Slot(i, sample, self.groups[i][sample], began)
        self.tabulate()
        n_rows, n_positions = self.shared.size
        if n_rows < len(self.slot_pg) or n_positions < self.longest_prompt:
            rows_needed, positions_needed = max(n_rows, len(self.slot_pg)), max(n_positions, self.longest_prompt)
            self.shared.resize(list(range(n_rows)), rows_needed, positions_needed)
        self.own.clear(taken)
        self.shared.clear([self.rows[i] for i in admitted])
        packs = _packs([len(self.prompts[i]) for i in admitted], self.prefill_tokens)
        hidden_pd = torch.cat([self.prefill(admitted[first:last]) for first, last in packs])
        row_v = logits(hidden_pd[:1], self.model.head_vd, self.model.impl)[0]
        if row_v.max() == row_v.min() and len(row_v) > 1:  # weights so large that a norm of them has overflowed
            raise ValueError(f"{self.model.name}: its logits are all equal: {DAMAGED}")
        # the first tokens of all n rollouts are drawn from the same state: the prompt's last
        self.draw(hidden_pd.repeat_interleave(n, 0), taken, torch.tensor(taken, device=self.device))

    def prefill(self, admitted):
        """Computes prompts, keeps their keys and values in their rows; returns the hidden_pd of their last tokens."""
        forest = pack([(self.prompts[i], []) for i in admitted], self.device)

        def store_and_attend(layer, q_nhc, k_nkc, v_nkc):
            for i, (start, length, _) in zip(admitted, forest.segments_s3.tolist()):
                row, end = self.rows[i], start + length
                self.shared.k[layer][row, :, :length] = k_nkc[start:end].transpose(0, 1)
                self.shared.v[layer][row, :, :length] = v_nkc[start:end].transpose(0, 1)
            return attention(q_nhc, k_nkc, v_nkc, forest.segments_s3, impl=self.model.impl)
        hidden_nd = self.model.run(forest.tokens_n, forest.positions_n, store_and_attend)
        last_p = forest.segments_s3[:, 0] + forest.segments_s3[:, 1] - 1
        return hidden_nd[last_p.to(self.device)]

    def step(self):
        """Draws one more token for every rollout; returns how many."""
        if self.stale:
            self.tabulate()
        B, T = self.own.size
        longest = max(len(self.slots[b].rollout.ids) for b in self.active)
        if T < longest:  # doubling up to 1024, so that few tokens are copied few times; then by 1024
            self.own.resize(list(range(B)), B, min(2 * T, T + 1024, self.sampling.max_new_tokens))
        slot_b = torch.arange(B, device=self.device)
        new_b = self.drawn_b - 1  # the slot's first drawn token is its cache's position 0

        def store_and_attend(layer, q_bhc, k_bkc, v_bkc):
            k_bktc, v_bktc = self.own.k[layer], self.own.v[layer]
            k_bktc[slot_b, :, new_b] = k_bkc
            v_bktc[slot_b, :, new_b] = v_bkc
            P, U = len(self.slot_pg), self.longest_prompt
            prompts = Prompts(self.shared.k[layer][:P, :, :U], self.shared.v[layer][:P, :, :U], self.length_p,
                              self.slot_pg, self.place_b)
            return decode_attention(q_bhc, k_bktc[:, :, :longest], v_bktc[:, :, :longest], self.drawn_b, prompts,
                                    impl=self.model.impl)
        hidden_bd = self.model.run(self.token_b, self.last_b + self.drawn_b, store_and_attend)
        self.draw(hidden_bd[self.active_a], self.active, self.active_a)
        return len(self.active)

    def draw(self, hidden_ad, slots, slot_a):
        """Samples a token for each of these slots, records it, and frees the slots whose rollouts end with it."""
        how, head_vd, impl = self.sampling, self.model.head_vd, self.model.impl
        uniform_a = uniforms(how.seed, self.key_b[slot_a], self.sample_b[slot_a], self.drawn_b[slot_a])
        id_a, logp_a = choose(logits(hidden_ad, head_vd, impl), uniform_a, how.temperature, how.top_p, how.top_k)
        if impl == "invariant" and how.top_k == 0 and how.top_p == 1:  # the trainer's own operation: equal bits
            logp_a, _ = linear_logp(hidden_ad, head_vd, id_a, how.temperature or 1.0, impl=impl)
        self.token_b[slot_a] = id_a
        self.drawn_b[slot_a] += 1
        ids, logps = torch.stack([id_a.double(), logp_a.double()]).tolist()  # one wait for the device, not two
        for b, token, logp in zip(slots, map(int, ids), logps):
            if not math.isfinite(logp):
                raise ValueError(f"{self.model.name}: its logits are not finite (NaN or infinity): {DAMAGED}")
            slot = self.slots[b]
            slot.rollout.ids.append(token)
            slot.rollout.logps.append(logp)
            if self.on_token:
                self.on_token(slot.prompt, slot.sample, token)
            if token in how.stop or len(slot.rollout.ids) == how.max_new_tokens:
                self.end(b, "stop" if token in how.stop else "length")

    def end(self, b, reason):
        """The rollout in slot b is done: the slot is free for another."""
        slot = self.slots[b]
        slot.rollout.reason = reason
        slot.rollout.seconds = time.perf_counter() - slot.began
        self.ended.append(slot.prompt)
        self.slots[b] = Slot()
        self.stale = True

    def shrink(self):
        """Drops the empty slots, which are computed like the others, and the rows of prompts that are done."""
        active = [b for b, slot in enumerate(self.slots) if slot.rollout is not None]
        self.own.resize(active, len(active), self.own.size[1])
        longest_prompt = max(len(self.prompts[i]) for i in self.rows)
        self.shared.resize(list(self.rows.values()), len(self.rows), longest_prompt)
        self.rows = {i: row for row, i in enumerate(self.rows)}
        self.slots = [self.slots[b] for b in active]
        self.token_b = self.token_b[active]
        self.stale = True

    def take_finished(self):
        """(prompt, its rollouts) of the groups that have become whole; their rows are let go."""
        writing = {slot.prompt for slot in self.slots}
        finished = [i for i in dict.fromkeys(self.ended) if i not in writing]  # in the order in which they ended
        self.rows = {i: row for i, row in self.rows.items() if i in writing}
        self.ended = []
        return [(i, self.groups.pop(i)) for i in finished]


def _packs(sizes, limit):
    """Consecutive ranges (first, last) whose sizes add up to at most `limit`, or hold one item."""
    packs = []
    first, total = 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            packs.append((first, i))
            first, total = i, 0
        total += size
    return packs + [(first, len(sizes))]


# ---------------------------------------------------------------------------------------------------------- sampler


class Sampler:
    def __init__(self, model, n_slots=256, prefill_tokens=16384):
        """n_slots rollouts are written at once; prompts are computed in packs of about prefill_tokens."""
        self.model, self.n_slots, self.prefill_tokens = model, n_slots, prefill_tokens
        self.reset_stats()

    def generate(self, prompts, sampling, on_token=None):
        """For each prompt (a list of token ids) its rollouts, in order."""
        groups = dict(self.stream(prompts, sampling, on_token))
        return [groups[i] for i in range(len(groups))]

    @torch.inference_mode()
    def stream(self, prompts, sampling, on_token=None):
        """Yields (index of the prompt, its n rollouts) as groups finish. on_token(prompt index, sample index, token id)
        is told of every token as it is drawn.

        Continuous batching: slots that become free are taken by waiting prompts while the others go on. Whole groups
        are admitted, so that a prompt is computed once.
        """
        check_prompts(prompts, self.model.n_vocab)
        if not prompts:
            return
        n = sampling.n
        n_slots = min(max(self.n_slots // n * n, n), n * len(prompts))
        batch = Batch(self.model, prompts, n_slots, self.prefill_tokens, sampling, on_token)
        waiting = list(range(len(prompts)))
        while waiting or batch.groups:
            began, n_free = time.perf_counter(), len(batch.free())
            enough_free = n_free == n_slots or n_free >= max(n, n_slots // 8)  # not one by one: packs are faster
            if waiting and enough_free:
                admitted, waiting = waiting[:n_free // n], waiting[n_free // n:]
                batch.admit(admitted)
                self.n_prefilled += sum(len(prompts[i]) for i in admitted)
                self.prefill_s += time.perf_counter() - began
            else:
                if not waiting and 2 * n_free >= len(batch.slots):
                    batch.shrink()
                self.n_decoded += batch.step()
                self.decode_s += time.perf_counter() - began
            yield from batch.take_finished()

    def reset_stats(self):
        self.prefill_s, self.decode_s = 0.0, 0.0
        self.n_prefilled, self.n_decoded = 0, 0

    def stats(self):
        """{prefill_s, decode_s, prefill_tok_s, decode_tok_s} since the last reset_stats."""
        return {"prefill_s": self.prefill_s, "decode_s": self.decode_s,
                "prefill_tok_s": self.n_prefilled / max(self.prefill_s, 1e-9),
                "decode_tok_s": self.n_decoded / max(self.decode_s, 1e-9)}


def check_prompts(prompts, n_vocab):
    """ValueError unless each prompt is a list (or array) of one or more ids that the model has."""
    if not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts is {prompts!r:.40}: give a list of prompts, each the list of its token ids")
    for i, ids in enumerate(prompts):
        array = None if isinstance(ids, str) else np.asarray(ids)
        if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise ValueError(f"prompt {i} is {ids!r:.40}: give a list of prompts, each the list of its token ids, as "
                             "tokenizer.chat(messages) makes it")
        if array.min() < 0 or array.max() >= n_vocab:
            raise ValueError(f"prompt {i} has the token id {array.max() if array.min() >= 0 else array.min()}; the "
                             f"model's ids are 0 to {n_vocab - 1}")


def model_impl(batch_invariant, device, dtype):
    """Model.impl as --batch-invariant wants it; ValueError where its kernels cannot run."""
    if batch_invariant and not runs_triton(device, dtype):
        raise ValueError(f"--batch-invariant: its kernels are Triton's, which do not run {str(dtype)[6:]} on {device}; "
                         "use a GPU, or float32 with TRITON_INTERPRET=1 in the environment (slow: for tiny models)")
    return "invariant" if batch_invariant else None


def whole_model(model, dtype):
    """The policy as a sampler wants it: the model itself, or, if its weights are sharded, an empty whole copy of it.

    Fill the copy with `refresh`, on every rank at once.
    """
    weight = next(model.parameters())
    if not isinstance(weight, DTensor):
        return model
    with torch.device("meta"):
        copy = Model(model.config)
    copy = copy.to_empty(device=weight.device).to(dtype).requires_grad_(False)
    copy.n_vocab, copy.impl, copy.name = model.n_vocab, model.impl, model.name
    return copy


def refresh(copy, model):
    """Brings whole_model's copy up to date."""
    if copy is not model:
        copy_weights(model, copy)


def load_model(folder, device="auto", dtype="auto", batch_invariant=False):
    """A model to sample from and its tokenizer. auto: the GPU if there is one; bfloat16 there, float32 elsewhere."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    impl = model_impl(batch_invariant, device, dtype)
    check_folder(folder)
    tokenizer = Tokenizer(folder)
    model = Model.from_pretrained(folder, device, dtype).requires_grad_(False)
    model.impl = impl
    return model, tokenizer


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Config:
    model: str | None = None  # Hugging Face folder
    text: str | None = None  # a user's message to answer ...
    texts: str | None = None  # ... or a file of JSON lines, {"text": ...} or {"messages": [{"role", "content"}, ...]}
    out: str | None = None  # with --texts: the file to write, the same lines with their "completions"
    n: int = 1  # completions of each text
    max_new_tokens: int = 1024  # longest completion
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # sample from so many likeliest tokens, 0 = all
    n_slots: int = 64  # completions written at once
    seed: int = 0  # of the sampling
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a completion's bits do not depend on its neighbours; slower, needs a GPU

    def __post_init__(self):
        check_options(self)
        check_model(self)
        check_between(self, 1, 1024, "n")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("--n above 1 needs a --temperature above 0: greedy completions are all the same")
        if (self.text is None) == (self.texts is None) or bool(self.texts) != bool(self.out):
            raise ValueError("give either --text, or --texts FILE and --out FILE")


def check_model(cfg):
    if not cfg.model:
        raise ValueError("--model is missing: a Hugging Face folder, such as the model/ that a run has left")


def check_options(cfg):
    """The options that every script which samples has; ValueError names the one that cannot be."""
    check_at_least(cfg, 1, "max_new_tokens", "n_slots")
    check_at_least(cfg, 0, "top_k")
    if cfg.temperature != 0:  # 0 takes the likeliest token
        check_between(cfg, 1e-3, 100, "temperature")
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {cfg.top_p}")
    if cfg.temperature == 0 and (cfg.top_p < 1 or cfg.top_k):
        raise ValueError("--top-p and --top-k draw among the likeliest tokens: they need a --temperature above 0")
    check_between(cfg, 0, 4096, "threads")
    check_between(cfg, 0, 2**63 - 1, "seed")
    check_choice(cfg, "dtype", "auto", "float32", "bfloat16")
    check_choice(cfg, "device", "auto", "cpu", "cuda")


def sampling_of(cfg, n, tokenizer):
    """The Sampling that a script's options describe (this one's Config, judge.py's or evaluate.py's)."""
    return Sampling(n=n, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p,
                    top_k=cfg.top_k, stop=tokenizer.stop_ids, seed=cfg.seed)


def read_texts(path, tokenizer):
    """(the object, its prompt's ids) of every line of a file of texts."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line)
                messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["text"]}]
                rows.append((row, tokenizer.chat(messages)))
            except NotJson as e:
                raise ValueError(f'{path}:{number}: {e.fault}; each line is an object like {{"text": "..."}}') from None
            except (KeyError, TypeError):
                raise ValueError(f'{path}:{number}: is not {{"text": "..."}} or {{"messages": [...]}}') from None
            except ValueError as e:
                raise ValueError(f"{path}:{number}: {e}") from None
    if not rows:
        raise ValueError(f"{path}: is empty; give a line of JSON for each text")
    return rows


def main(cfg):
    refuse_ranks("sample.py")
    if cfg.out:
        refuse_existing(cfg.out)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = load_model(cfg.model, cfg.device, cfg.dtype, cfg.batch_invariant)
    sampler = Sampler(model, cfg.n_slots)
    sampling = sampling_of(cfg, cfg.n, tokenizer)
    if cfg.texts:
        rows = read_texts(cfg.texts, tokenizer)
        groups = sampler.generate([ids for _, ids in rows], sampling)
        write_records(cfg.out, [row | {"completions": [completion(r, tokenizer) for r in rollouts]}
                                for (row, _), rollouts in zip(rows, groups)])
        print(f"{len(rows)} texts, {cfg.n} completions each: {cfg.out}")
        return
    stream = StreamDecoder(tokenizer)

    def show(_, sample, token):  # the first completion is shown as it is written
        if sample == 0:
            print(stream.push(token), end="", flush=True)
    rollouts, = sampler.generate([tokenizer.chat([{"role": "user", "content": cfg.text}])], sampling, show)
    print(stream.flush())
    for rollout in rollouts[1:]:
        print("----", tokenizer.decode(rollout.ids), sep="\n")


def completion(rollout, tokenizer):
    return {"text": tokenizer.decode(rollout.ids), "n_tokens": len(rollout.ids), "finished": rollout.finished,
            "logp": sum(rollout.logps)}


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
