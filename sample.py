"""Prompts in, rollouts out: KV cache, continuous batching, sampling. On the command line: judge a pair, or a file.

    python sample.py --model DIR --question "..." --answer-a "..." --answer-b "..."    streams the judgement
    python sample.py --model DIR --pairs pairs.jsonl --out judgements.jsonl            resumable: started again, goes on

The sampler runs the trainer's own model code (Model.run) with a cache for attention, so its log-probabilities are the
trainer's up to rounding. A prompt is computed once for its n rollouts. A rollout's random numbers come from (seed, the
prompt's tokens, sample index, token index) and nothing else: the same rollout comes out alone or in any batch.

Letters: B slots (rollouts being written at once), A of them active, T cached positions of a slot, P prompts, U cached
positions of a prompt, K key/value heads, C channels of a head, D width, V vocabulary.
"""

import hashlib
import json
import sys
import time
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from common import Ranks, copy_weights, fail, one_line_errors, parse_config, write_whole
from data.pairs import SWAPPED, Pair, read_pairs
from kernels import Prompts, attention, decode_attention, linear_logp, logits, runs_triton
from model import Model, pack
from reward import benchmark_verdict, load_prompt, majority, render
from tokenizer import StreamDecoder, Tokenizer

# ------------------------------------------------------------------------------------------------------------- sampling


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


def _mix(x):
    """The splitmix64 finalizer, in which every input bit reaches every output bit; int64 products wrap modulo 2^64."""
    def shift_right(x, n):  # logical: int64's own shift repeats the sign bit
        return (x >> n) & ((1 << (64 - n)) - 1)
    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shift_right(x, 31)


def uniforms(seed, prompt_b, sample_b, token_b):
    """One float64 in (0, 1) for each (seed, prompt id, sample index, token index), by hashing: no generator state."""
    x = torch.full_like(prompt_b, seed)
    for key in (prompt_b, sample_b, token_b):
        x = _mix(x + (0x9E3779B97F4A7C15 - 2**64)) ^ key
    # 52 bits, not 53: the half must fit behind them, or the largest rounds to 1
    return (((_mix(x + (0x9E3779B97F4A7C15 - 2**64)) >> 12) & (2**52 - 1)).double() + 0.5) / 2**52


def prompt_key(ids):
    """The prompt's id for its random numbers: 63 bits of a hash of its tokens."""
    digest = hashlib.blake2b(np.asarray(ids, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def choose(logits_bv, uniform_b, temperature=1.0, top_p=1.0, top_k=0):
    """Draws one token per row by inverting the cumulative distribution at uniform_b; returns id_b and logp_b.

    top_k keeps the k likeliest tokens (and ties with the k-th), then top_p the smallest set of the likeliest whose
    probability reaches top_p. Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        logp_bv = logits_bv.log_softmax(1)
        id_b = logits_bv.argmax(1)
        return id_b, logp_bv.gather(1, id_b[:, None])[:, 0]
    logits_bv = logits_bv / temperature
    if 0 < top_k < logits_bv.shape[1]:
        logits_bv = logits_bv.masked_fill(logits_bv < logits_bv.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        # of equally likely ones the first
        p_bv, order_bv = logits_bv.double().softmax(1).sort(dim=1, descending=True, stable=True)
        beyond = p_bv.cumsum(1) - p_bv >= top_p  # the likelier tokens reach top_p without this one
        logits_bv = logits_bv.masked_fill(torch.zeros_like(beyond).scatter(1, order_bv, beyond), -torch.inf)
    logp_bv = logits_bv.log_softmax(1)
    # float64, so that the draw does not depend on how a device orders the sum, which it may do by the number of rows
    cdf_bv = (logits_bv - logits_bv.amax(1, keepdim=True)).double().exp().cumsum(1)
    total_b = cdf_bv[:, -1]
    # below the total, to which the product may round up; then the first token whose sum is above has a p that is not 0
    point_b = (uniform_b * total_b).minimum(total_b.nextafter(torch.zeros_like(total_b)))
    id_b = torch.searchsorted(cdf_bv, point_b[:, None], right=True)[:, 0]
    return id_b, logp_bv.gather(1, id_b[:, None])[:, 0]


class Cache:
    """Keys (rotated) and values, per layer: [X, K, T, C]. The rows X are slots or prompts, see Batch."""

    def __init__(self, config, X, T, device, dtype):
        shape = X, config.num_key_value_heads, T, config.head_dim
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]

    @property
    def size(self):
        return self.k[0].shape[0], self.k[0].shape[2]

    def resize(self, kept, X, T):
        """Keeps these rows, as the first of X, with room for T positions."""
        def moved(x):
            out = x.new_zeros(X, x.shape[1], T, x.shape[3])
            out[:len(kept), :, :x.shape[2]] = x[kept, :, :T]
            return out
        for layer in range(len(self.k)):  # one layer at a time, so that only one exists twice
            self.k[layer], self.v[layer] = moved(self.k[layer]), moved(self.v[layer])

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


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a rollout ends; see Sampler.stream."""
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: frozenset
    seed: int
    on_token: object


class Batch:
    """The rollouts that are being written: B slots, of which A are active, their caches, and what a step needs.

    `own` holds a slot's own tokens; `shared` holds each live prompt once, in a row. A row is let go with the group's
    last rollout, so there may be more rows than B / n: the slots of the rollouts that ended first belong to others.
    """

    def __init__(self, model, prompts, n, B, prefill_tokens, sampling):
        self.model, self.prompts, self.n = model, prompts, n
        self.prefill_tokens, self.sampling = prefill_tokens, sampling
        self.keys = [prompt_key(ids) for ids in prompts]
        self.device = model.head_vd.device
        self.slots = [Slot() for _ in range(B)]
        self.own = Cache(model.config, B, min(64, sampling.max_new_tokens), self.device, model.head_vd.dtype)
        self.shared = Cache(model.config, 0, 0, self.device, model.head_vd.dtype)
        self.token_b = torch.zeros(B, dtype=torch.int64, device=self.device)
        self.groups = {}  # prompt -> its n rollouts, while some of them are being written
        self.rows = {}    # prompt -> its row in `shared`, as long
        self.ended = []   # the prompts of rollouts that ended since the last take_finished
        self.stale = True  # slots have changed hands since the last tabulate

    def free(self):
        return [b for b, slot in enumerate(self.slots) if slot.rollout is None]

    def tabulate(self):
        """Who is where, for the device, in one copy; between two calls only drawn_b changes, and that on the device.

        drawn_b counts the tokens drawn. The last of them is the next step's input: its position is last_b + drawn_b,
        last_b being the prompt's last, and it sees drawn_b of its own, itself included. An empty slot sees itself.
        """
        self.active = [b for b, slot in enumerate(self.slots) if slot.rollout is not None]
        slot_pm, place_b = np.full((1 + max(self.rows.values()), self.n), -1), np.full(len(self.slots), -1)
        length_p, table_bx = np.zeros(len(slot_pm), dtype=np.int64), [(1, 0, 0, 0)] * len(self.slots)
        for b in self.active:
            slot, ids = self.slots[b], self.prompts[self.slots[b].prompt]
            row = self.rows[slot.prompt]
            slot_pm[row, slot.sample], place_b[b], length_p[row] = b, row * self.n + slot.sample, len(ids)
            table_bx[b] = len(slot.rollout.ids), len(ids) - 1, self.keys[slot.prompt], slot.sample
        parts = [*np.array(table_bx).T, place_b, np.array(self.active), length_p, slot_pm]
        flat = torch.from_numpy(np.concatenate(parts, axis=None)).to(self.device).split([x.size for x in parts])
        self.drawn_b, self.last_b, self.key_b, self.sample_b, self.place_b, self.active_a, self.length_p, slot_pm = flat
        self.slot_pm, self.U, self.stale = slot_pm.view(-1, self.n), int(length_p.max()), False

    def admit(self, admitted):
        """Gives each of these prompts a row and n slots, computes it once, and draws its rollouts' first tokens."""
        taken, began = self.free()[:len(admitted) * self.n], time.perf_counter()
        unused = sorted(set(range(len(self.rows) + len(admitted))) - set(self.rows.values()))
        for j, i in enumerate(admitted):
            self.rows[i], self.groups[i] = unused[j], [Rollout() for _ in range(self.n)]
            for sample, b in enumerate(taken[j * self.n:(j + 1) * self.n]):
                self.slots[b] = Slot(i, sample, self.groups[i][sample], began)
        self.tabulate()
        P, U = np.maximum(self.shared.size, (len(self.slot_pm), self.U)).tolist()
        if (P, U) != self.shared.size:
            self.shared.resize(list(range(self.shared.size[0])), P, U)
        self.own.clear(taken)
        self.shared.clear([self.rows[i] for i in admitted])
        packs = _packs([len(self.prompts[i]) for i in admitted], self.prefill_tokens)
        hidden_pd = torch.cat([self.prefill(admitted[first:last]) for first, last in packs])
        self.draw(hidden_pd.repeat_interleave(self.n, 0), taken, torch.tensor(taken, device=self.device))

    def prefill(self, admitted):
        """Computes prompts, keeps their keys and values in their rows; returns the hidden_pd of their last tokens."""
        forest = pack([(self.prompts[i], []) for i in admitted], self.device)

        def attend(layer, q_nhc, k_nkc, v_nkc):
            for i, (start, length, _) in zip(admitted, forest.segments_s3.tolist()):
                self.shared.k[layer][self.rows[i], :, :length] = k_nkc[start:start + length].transpose(0, 1)
                self.shared.v[layer][self.rows[i], :, :length] = v_nkc[start:start + length].transpose(0, 1)
            return attention(q_nhc, k_nkc, v_nkc, forest.segments_s3, impl=self.model.impl)
        hidden_nd = self.model.run(forest.tokens_n, forest.positions_n, attend)
        return hidden_nd[(forest.segments_s3[:, :2].sum(1) - 1).to(self.device)]

    def step(self):
        """Draws one more token for every rollout; returns how many."""
        if self.stale:
            self.tabulate()
        (B, T), longest = self.own.size, max(len(self.slots[b].rollout.ids) for b in self.active)
        if T < longest:
            self.own.resize(list(range(B)), B, min(2 * T, T + 1024, self.sampling.max_new_tokens))
        hidden_bd = self.model.run(self.token_b, self.last_b + self.drawn_b, self.attend(longest))
        self.draw(hidden_bd[self.active_a], self.active, self.active_a)
        return len(self.active)

    def attend(self, T):
        """The attention of one decode step: stores the new keys and values; no slot has more than T of its own."""
        slot_b, new_b = torch.arange(len(self.slots), device=self.device), self.drawn_b - 1

        def attend(layer, q_bhc, k_bkc, v_bkc):
            k, v = self.own.k[layer], self.own.v[layer]
            k[slot_b, :, new_b], v[slot_b, :, new_b] = k_bkc, v_bkc
            shared = (x[layer][:len(self.slot_pm), :, :self.U] for x in (self.shared.k, self.shared.v))
            prompts = Prompts(*shared, self.length_p, self.slot_pm, self.place_b)
            return decode_attention(q_bhc, k[:, :, :T], v[:, :, :T], self.drawn_b, prompts, impl=self.model.impl)
        return attend

    def shrink(self):
        """Drops the empty slots, which are computed like the others, and the rows of prompts that are done."""
        active = [b for b, slot in enumerate(self.slots) if slot.rollout is not None]
        self.own.resize(active, len(active), self.own.size[1])
        self.shared.resize(list(self.rows.values()), len(self.rows), max(len(self.prompts[i]) for i in self.rows))
        self.rows = {i: row for row, i in enumerate(self.rows)}
        self.slots, self.token_b, self.stale = [self.slots[b] for b in active], self.token_b[active], True

    def draw(self, hidden_ad, slots, slot_a):
        """Samples a token for each of these slots, records it, and frees the slots whose rollouts end with it."""
        how, head_vd, impl = self.sampling, self.model.head_vd, self.model.impl
        uniform_a = uniforms(how.seed, self.key_b[slot_a], self.sample_b[slot_a], self.drawn_b[slot_a])
        id_a, logp_a = choose(logits(hidden_ad, head_vd, impl), uniform_a, how.temperature, how.top_p, how.top_k)
        if impl == "invariant" and how.top_k == 0 and how.top_p == 1:  # the trainer's own operation: equal bits
            logp_a, _ = linear_logp(hidden_ad, head_vd, id_a, how.temperature or 1.0, impl=impl)
        self.token_b[slot_a] = id_a
        self.drawn_b[slot_a] += 1
        for b, token, logp in zip(slots, *torch.stack([id_a.double(), logp_a.double()]).tolist()):  # one device sync
            slot, token = self.slots[b], int(token)
            rollout = slot.rollout
            rollout.ids.append(token)
            rollout.logps.append(logp)
            if how.on_token:
                how.on_token(slot.prompt, slot.sample, token)
            if token in how.stop or len(rollout.ids) == how.max_new_tokens:
                rollout.reason = "stop" if token in how.stop else "length"
                rollout.seconds = time.perf_counter() - slot.began
                self.ended.append(slot.prompt)
                self.slots[b], self.stale = Slot(), True

    def take_finished(self):
        """(prompt, its rollouts) of the groups that have become whole."""
        ended, self.ended = self.ended, []
        writing = {slot.prompt for slot in self.slots}
        self.rows = {i: row for i, row in self.rows.items() if i in writing}
        return [(i, self.groups.pop(i)) for i in dict.fromkeys(ended) if i not in writing]


class Sampler:
    def __init__(self, model, n_slots=256, prefill_tokens=16384):
        """n_slots rollouts are written at once; prompts are computed in packs of about prefill_tokens."""
        self.model, self.n_slots, self.prefill_tokens = model, n_slots, prefill_tokens
        self.reset_stats()

    def generate(self, prompts, n=1, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, stop=(), seed=0,
                 on_token=None):
        """For each prompt (a list of token ids) its n rollouts, in order. The options are those of `stream`."""
        out = [None] * len(prompts)
        for i, rollouts in self.stream(prompts, n, max_new_tokens, temperature, top_p, top_k, stop, seed, on_token):
            out[i] = rollouts
        return out

    @torch.inference_mode()
    def stream(self, prompts, n=1, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, stop=(), seed=0,
               on_token=None):
        """Yields (index of the prompt, its n rollouts) as groups finish.

        stop: token ids that end a rollout. on_token(prompt index, sample index, token id) is told of every token as it
        is drawn. Continuous batching: whole groups are admitted when enough slots are free, so that a prompt is
        computed once.
        """
        assert n >= 1 and max_new_tokens >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0
        assert all(prompts), "a prompt must have at least one token"
        B = min(max(self.n_slots // n * n, n), n * len(prompts))
        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, frozenset(stop), seed, on_token)
        batch = Batch(self.model, prompts, n, B, self.prefill_tokens, sampling) if prompts else None
        waiting = list(range(len(prompts)))
        while waiting or batch and batch.groups:
            began, n_free = time.perf_counter(), len(batch.free())
            if waiting and (n_free == B or n_free >= max(n, B // 8)):  # not one by one: packs are faster
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
        self.prefill_s, self.decode_s, self.n_prefilled, self.n_decoded = 0.0, 0.0, 0, 0

    def stats(self):
        """{prefill_s, decode_s, prefill_tok_s, decode_tok_s} since the last reset_stats."""
        return {"prefill_s": self.prefill_s, "decode_s": self.decode_s,
                "prefill_tok_s": self.n_prefilled / max(self.prefill_s, 1e-9),
                "decode_tok_s": self.n_decoded / max(self.decode_s, 1e-9)}


def _packs(sizes, limit):
    """Consecutive ranges (first, last) whose sizes add up to at most `limit`, or hold one item."""
    packs, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            packs.append((first, i))
            first, total = i, 0
        total += size
    return packs + [(first, len(sizes))]


def model_impl(batch_invariant, device, dtype):
    """Model.impl as --batch-invariant wants it; ValueError where its kernels cannot run."""
    if batch_invariant and not runs_triton(device, dtype):
        raise ValueError(f"--batch-invariant: its kernels are Triton's, which do not run {str(dtype)[6:]} on {device}; "
                         "use a GPU, or float32 with TRITON_INTERPRET=1 in the environment (slow: for tiny models)")
    return "invariant" if batch_invariant else None


def whole_model(model, dtype):
    """The policy as a sampler wants it: the model itself, or, if its weights are sharded, an empty whole copy of it.

    Fill the copy with common.copy_weights, on every rank at once.
    """
    weight = next(model.parameters())
    if not isinstance(weight, DTensor):
        return model
    with torch.device("meta"):
        copy = Model(model.config)
    copy = copy.to_empty(device=weight.device).to(dtype).requires_grad_(False)
    copy.n_vocab, copy.impl = model.n_vocab, model.impl
    return copy


def refresh(copy, model):
    """Brings whole_model's copy up to date."""
    if copy is not model:
        copy_weights(model, copy)


# -------------------------------------------------------------------------------------------------------------- judging


def prompt_hash(ids):
    """prompt_key as it stands in judgement files."""
    return f"{prompt_key(ids):016x}"


ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Judge:
    """A sampler with everything that turns a pair into a judgement record."""
    sampler: Sampler
    tokenizer: Tokenizer
    prompt: object  # reward.Prompt
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    votes: int = 1
    seed: int = 0
    budgets: tuple[int, ...] = ()  # also record the verdict that each vote's first so many tokens hold

    def encode(self, pair):
        return self.tokenizer.chat(render(self.prompt, pair))

    def judge(self, pairs, on_token=None, prompts=None):
        """Yields (index, judgement record) as they are done; verdicts by the benchmarks' rule. prompts: the pairs'
        token ids, if they are known."""
        prompts = [self.encode(pair) for pair in pairs] if prompts is None else prompts
        done = self.sampler.stream(prompts, self.votes, self.max_new_tokens, self.temperature, self.top_p, self.top_k,
                                   self.tokenizer.stop_ids, self.seed, on_token)
        for i, rollouts in done:
            votes = []
            for r in rollouts:
                text = self.tokenizer.decode(r.ids)
                at = {str(n): benchmark_verdict(self.tokenizer.decode(r.ids[:n])) for n in self.budgets}
                votes.append({"text": text, "n_tokens": len(r.ids), "finished": r.finished,
                              "verdict": benchmark_verdict(text), "seconds": round(r.seconds, 3),
                              **({"at": at} if at else {})})
            pair = pairs[i]
            yield i, {"id": pair.id, "prompt_hash": prompt_hash(prompts[i]),
                      "n_prompt_tokens": len(prompts[i]), "votes": votes,
                      "verdict": majority([v["verdict"] for v in votes]), "winner": pair.winner,
                      "source": pair.source, "domain": pair.domain, "subset": pair.subset, "item": pair.item,
                      "seconds": max(v["seconds"] for v in votes),
                      **({"swapped": True} if pair.id.endswith(SWAPPED) else {})}


class JudgementFile:
    """Judgements on disk, one JSON line a pair. Written to OUT.partial as they come, put in order and renamed when
    whole.

    OUT.partial begins with the settings that made it; started again with the same ones it goes on, with others it
    refuses. Several ranks write OUT.partial.RANK each, which the next one to open OUT.partial takes in.
    """

    def __init__(self, out, settings):
        self.out, self.partial = Path(out), Path(f"{out}.partial")
        refuse_existing(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        shares = [f for f in self.out.parent.glob("*.partial.*") if f.stem == self.partial.name and f.suffix != ".tmp"]
        self.done, lines = {}, [json.dumps(settings).encode()]
        for file in [self.partial, *shares] if self.partial.exists() else shares:
            # up to the last line break: an interrupted run may have left half a line
            first, *rest = file.read_bytes().rpartition(b"\n")[0].split(b"\n")
            if first:
                check_settings(file, first, settings)
            self.done |= judged(file, rest, 2)
            lines += rest
        write_whole(self.partial, b"\n".join(lines) + b"\n")
        for file in shares:
            file.unlink()

    def add(self, record):
        self.done[record["id"], record["prompt_hash"]] = record
        append(self.partial, record)

    def finish(self, records):
        """Writes these records under the final name."""
        write_records(self.out, records)
        self.partial.unlink()


def check_settings(file, text, settings):
    """ValueError if the JSON text of a file's settings is of others than these."""
    try:
        before = dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: does not begin with a judging run's settings; delete the file") from None
    for name in settings | before:
        if settings.get(name) != before.get(name):
            raise ValueError(f"{file}: was begun with {name}={before.get(name)!r}, not {settings.get(name)!r}; go on "
                             "with the same settings, or choose another --out")


def judged(file, lines, first=1):
    """{(id, prompt hash): record} of judgement lines; `first` is the number of the first one."""
    done = {}
    for number, line in enumerate(lines, first):
        try:
            record = json.loads(line)
            done[record["id"], record["prompt_hash"]] = record
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: is no judgement; delete this line, and its pair is judged "
                             "again") from None
    return done


def append(file, record):
    with open(file, "a", encoding="utf-8") as f:
        f.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_records(path, records):
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def refuse_others(file, judged, wanted):
    """Before judgements are lost because what they judged is not among what to judge now; both (id, prompt hash)."""
    if others := [name for name, key in judged if (name, key) not in wanted]:
        raise ValueError(f"{file}: holds {len(others)} judgements of pairs that are not given now, or not with these "
                         f"texts in this order, such as {others[0]}: give those too, or choose another --out")


def refuse_existing(out):
    if Path(out).exists():
        raise ValueError(f"{out}: already there and whole; delete it or choose another --out")


def encode_all(judge, pairs, skip_bad=False, quiet=False):
    """[(pair, its prompt's ids)] of the pairs that the prompt can show and the model can read.

    Another one (a conversation, say) stops the job before it begins, or is skipped and counted, with all pairs of its
    item: a best-of-n item that lacks its hardest pair would be scored too well.
    """
    context, encoded, bad_items = judge.sampler.model.config.raw.get("max_position_embeddings"), [], set()
    for pair in tqdm(pairs, "read", unit="pair", disable=quiet or len(pairs) < 1000):
        try:
            ids = array("i", judge.encode(pair))  # a list of integers takes nine times as much
            if context and len(ids) >= context:
                raise ValueError(f"pair {pair.id}: its prompt has {len(ids)} tokens, the model can read {context}")
            encoded.append((pair, ids))
        except ValueError as e:
            if not skip_bad:
                raise
            bad_items.add(pair.item)
            print(f"skipped: {e}", file=sys.stderr)
    encoded = [(pair, ids) for pair, ids in encoded if not (pair.item and pair.item in bad_items)]
    if len(encoded) < len(pairs):
        print(f"skipped {len(pairs) - len(encoded)} of {len(pairs)} pairs", file=sys.stderr)
    return encoded


def key_of(pair, ids):
    return pair.id, prompt_hash(ids)


def judge_file(judge, encoded, out, settings, ranks=ALONE, begin=lambda: None):
    """Judges the pairs of encode_all that OUT.partial does not hold yet; returns all records in the pairs' order (on
    rank 0, [] elsewhere). begin() is called on rank 0 once it is sure that OUT.partial may be gone on with.
    """
    keys = [key_of(*x) for x in encoded]
    file = JudgementFile(out, settings) if ranks.main else None
    if ranks.main:
        refuse_others(file.partial, file.done, set(keys))
        begin()
    done = ranks.gather(set(file.done) if ranks.main else None)[0]
    todo = [x for x, key in zip(encoded, keys) if key not in done][ranks.rank::ranks.world]
    n_done, share = len(keys[ranks.rank::ranks.world]) - len(todo), Path(f"{out}.partial.{ranks.rank}")
    if ranks.world > 1:
        share.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    bar = tqdm(total=n_done + len(todo), initial=n_done, desc="judge", unit="pair", disable=not ranks.main)
    for _, record in judge.judge([pair for pair, _ in todo], prompts=[ids for _, ids in todo]):
        file.add(record) if ranks.world == 1 else append(share, record)
        bar.update()
        stats = judge.sampler.stats()
        bar.set_postfix(prefill_tok_s=f"{stats['prefill_tok_s']:.0f}", decode_tok_s=f"{stats['decode_tok_s']:.0f}")
    bar.close()
    ranks.barrier()
    if not ranks.main:
        return []
    file = JudgementFile(out, settings) if ranks.world > 1 else file
    # the labels may have been corrected since an interrupted run
    records = [file.done[key] | {"winner": pair.winner} for (pair, _), key in zip(encoded, keys)]
    file.finish(records)
    return records


# --------------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Config:
    model: str = "runs/toy/grpo/model"  # Hugging Face folder of the judge
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    question: str | None = None  # judge one pair: the question ...
    answer_a: str | None = None  # ... the first answer ...
    answer_b: str | None = None  # ... and the second
    question_file: str | None = None  # read the question from a file
    answer_a_file: str | None = None  # read the first answer from a file
    answer_b_file: str | None = None  # read the second answer from a file
    pairs: str | None = None  # judge a file or folder of pairs, in any format that data/pairs.py reads ...
    out: str | None = None  # ... into this judgements file (JSON lines)
    limit: int = 0  # only the first so many pairs, 0 = all
    skip_bad: bool = False  # skip unreadable records and count them, instead of stopping before any work
    votes: int = 1  # judgements per pair; the verdict is their majority
    temperature: float = 0.0  # 0 takes the likeliest token; votes need more
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # sample from so many likeliest tokens, 0 = all
    max_new_tokens: int = 8192  # longest judgement
    n_slots: int = 64  # judgements written at once
    seed: int = 0  # of the sampling, and of the A/B order where a source has chosen and rejected
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a judgement's bits do not depend on what is judged beside it; slower, needs a GPU

    def __post_init__(self):
        check_sampling(self)
        for name in ("question", "answer_a", "answer_b"):
            if getattr(self, name) is not None and getattr(self, name + "_file") is not None:
                raise ValueError(f"--{name.replace('_', '-')} and its -file are both given; give one")
            if self.pairs and (getattr(self, name) is not None or getattr(self, name + "_file") is not None):
                raise ValueError(f"--pairs and --{name.replace('_', '-')} are both given; judge a file or one pair")
        if bool(self.pairs) != bool(self.out):
            raise ValueError("--pairs, the file to judge, and --out, the judgements file to write, need each other")


def check_sampling(cfg):
    if cfg.votes < 1 or cfg.max_new_tokens < 1 or cfg.n_slots < 1 or not 0 < cfg.top_p <= 1 or cfg.top_k < 0:
        raise ValueError("--votes, --max-new-tokens and --n-slots must be at least 1, --top-k at least 0, "
                         "--top-p in (0, 1]")
    if not 0 <= cfg.temperature < float("inf"):
        raise ValueError(f"--temperature must be a number, at least 0, got {cfg.temperature}")
    if cfg.limit < 0 or cfg.threads < 0 or not 0 <= cfg.seed < 2**63:
        raise ValueError("--limit and --threads must be at least 0, --seed in [0, 2^63)")
    if cfg.votes > 1 and cfg.temperature == 0:
        raise ValueError("--votes above 1 needs a --temperature above 0: greedy votes are all the same")
    if cfg.dtype not in ("auto", "float32", "bfloat16") or cfg.device not in ("auto", "cpu", "cuda"):
        raise ValueError("--dtype is auto, float32 or bfloat16; --device is auto, cpu or cuda")


def load_judge(cfg):
    """The Judge that a script's options describe (this script's Config or evaluate.py's)."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    dtype = torch.bfloat16 if cfg.dtype == "bfloat16" or cfg.dtype == "auto" and device == "cuda" else torch.float32
    impl = model_impl(cfg.batch_invariant, device, dtype)
    tokenizer = Tokenizer(cfg.model)
    own_prompt = Path(cfg.model) / "prompt.txt"
    if cfg.prompt is None and not own_prompt.exists():
        raise ValueError(f"{cfg.model}: has no prompt.txt, so --prompt must say how to ask it: instruct, reasoning, "
                         "direct or a file")
    model = Model.from_pretrained(cfg.model, device, dtype).requires_grad_(False)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{cfg.model}: tokenizer.json has {tokenizer.n_vocab} tokens, but config.json's vocab_size is "
                         f"{model.config.vocab_size}: they are not of the same model")
    model.n_vocab, model.impl = tokenizer.n_vocab, impl
    return Judge(Sampler(model, cfg.n_slots), tokenizer, load_prompt(cfg.prompt or str(own_prompt)), cfg.max_new_tokens,
                 cfg.temperature, cfg.top_p, cfg.top_k, cfg.votes, cfg.seed)


def judge_settings(cfg, judge):
    """What a judgements file depends on: it may only be continued with the same."""
    files = sorted(Path(cfg.model).glob("*.safetensors"))
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"model": str(Path(cfg.model).resolve()), "prompt": asdict(judge.prompt), "votes": cfg.votes,
            "temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k,
            "max_new_tokens": cfg.max_new_tokens, "seed": cfg.seed, "weights": weights,
            "batch_invariant": cfg.batch_invariant, **({"budgets": list(judge.budgets)} if judge.budgets else {}),
            "dtype": str(judge.sampler.model.head_vd.dtype).removeprefix("torch.")}


def pair_from_options(cfg):
    def text(name):
        if file := getattr(cfg, name + "_file"):
            try:
                return Path(file).read_text(encoding="utf-8-sig").removesuffix("\n")  # that ends its last line
            except UnicodeDecodeError as e:
                raise ValueError(f"{file}: byte {e.start} is not UTF-8: convert the file") from None
        if getattr(cfg, name) is None:
            fail(f"--{name.replace('_', '-')} is missing: give a question and two answers, or --pairs FILE --out FILE")
        return getattr(cfg, name)
    question = [{"role": "user", "content": text("question")}]
    return Pair("pair", question, text("answer_a"), text("answer_b"), None, "", "")


def main(cfg):
    if cfg.pairs:
        refuse_existing(cfg.out)
        pairs = read_pairs(cfg.pairs, cfg.seed, cfg.skip_bad)
        pairs = pairs[:cfg.limit] if cfg.limit else pairs
        judge = load_judge(cfg)
        settings = judge_settings(cfg, judge) | {"pairs": str(Path(cfg.pairs).resolve())}
        records = judge_file(judge, encode_all(judge, pairs, cfg.skip_bad), cfg.out, settings)
        n_none = sum(r["verdict"] is None for r in records)
        print(f"{len(records)} pairs judged, {n_none} without a verdict: {cfg.out}")
        return
    pair = pair_from_options(cfg)
    judge = load_judge(cfg)
    stream = StreamDecoder(judge.tokenizer)

    def show(_, sample, token):  # the first vote is shown as it is written
        if sample == 0:
            print(stream.push(token), end="", flush=True)
    (_, record), = judge.judge([pair], show)
    print(stream.flush())
    verdict = record["verdict"]
    counts = {v: sum(vote["verdict"] == v for vote in record["votes"]) for v in ("a", "b", None)}
    print(f"verdict: {verdict.upper() if verdict else 'none'}" +
          (f" (A {counts['a']}, B {counts['b']}, none {counts[None]})" if cfg.votes > 1 else "") +
          f", {sum(v['n_tokens'] for v in record['votes'])} tokens in {record['seconds']:.1f} s")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
