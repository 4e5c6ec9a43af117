"""One token's random choice: how it is drawn (Sampling), its random number (uniforms), the draw itself (choose)."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch

CHUNK = 512  # columns of a chunk, see choose


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
    twice in a batch gets the same rollouts twice.) seed: one for all, or a tensor.
    """
    increment = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's, as the int64 that has its bits
    x_b = torch.zeros_like(prompt_b) + seed
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
    The sums are taken in two levels, of 151,936 numbers 297 chunks': the chunk is found first, then the token in it.
    top_k keeps the k likeliest tokens (and ties with the k-th), then top_p the smallest set of the likeliest whose
    probability reaches top_p. Temperature 0 takes the likeliest token.
    """
    if temperature == 0:
        id_b1 = logits_bv.argmax(1, keepdim=True)
        return id_b1[:, 0], logits_bv.log_softmax(1).gather(1, id_b1)[:, 0]
    if temperature != 1:
        logits_bv = logits_bv / temperature
    if 0 < top_k < logits_bv.shape[1]:
        kth_b1 = logits_bv.topk(top_k).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < kth_b1, -torch.inf)
    if top_p < 1:
        p_bv, order_bv = logits_bv.double().softmax(1).sort(dim=1, descending=True, stable=True)  # of ties the first
        beyond_bv = p_bv.cumsum(1) - p_bv >= top_p  # the likelier tokens reach top_p without this one
        beyond_bv = torch.zeros_like(beyond_bv).scatter(1, order_bv, beyond_bv)  # back in the vocabulary's order
        logits_bv = logits_bv.masked_fill(beyond_bv, -torch.inf)

    B, V = logits_bv.shape
    max_b1 = logits_bv.amax(1, keepdim=True)
    n_chunks = -(-V // CHUNK)
    weight_bv = logits_bv.new_empty(B, n_chunks * CHUNK)
    weight_bv[:, V:] = 0
    # exp2 because PyTorch's exp takes ten times as long where it underflows
    torch.sub(logits_bv, max_b1, out=weight_bv[:, :V]).mul_(math.log2(math.e)).exp2_()
    weight_bnc = weight_bv.view(B, n_chunks, CHUNK)
    sum_bn = weight_bnc.sum(2).double()  # float64, or the sums of sums would be off by tokens
    cdf_bn = sum_bn.cumsum(1)
    point_b1 = uniform_b[:, None] * cdf_bn[:, -1:]  # not of 1: scaling the point is cheaper than dividing the row
    chunk_b1 = _first_above(cdf_bn, point_b1)
    before_b1 = cdf_bn.gather(1, chunk_b1) - sum_bn.gather(1, chunk_b1)
    weight_bc = weight_bnc.gather(1, chunk_b1[..., None].expand(B, 1, CHUNK))[:, 0]
    id_b1 = chunk_b1 * CHUNK + _first_above(weight_bc.double().cumsum(1), (point_b1 - before_b1).clamp(min=0))
    id_b1 = id_b1.clamp(max=V - 1)  # of a row of NaN: its logp_b is NaN, which the caller sees
    logp_b1 = logits_bv.gather(1, id_b1) - max_b1 - cdf_bn[:, -1:].log()
    return id_b1[:, 0], logp_b1[:, 0].to(logits_bv.dtype)


def _first_above(cdf_bn, point_b1):
    """The first entry ABOVE the point: one of probability 0 adds nothing to the sum before it, and is passed over.

    Rounding may put the point at the last sum or beyond, above which there is none: just below it the last possible
    entry is.
    """
    total_b1 = cdf_bn[:, -1:]
    point_b1 = point_b1.minimum(total_b1.nextafter(torch.zeros_like(total_b1)))
    return torch.searchsorted(cdf_bn, point_b1, right=True).clamp(max=cdf_bn.shape[1] - 1)
