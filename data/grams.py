"""Texts as sets of word n-grams: how much two texts share, and which of many texts may share much.

A word is a run of letters and digits, in lower case after Unicode's NFKC, or one character of a script that is written
without spaces; so punctuation and line breaks make no difference. An n-gram is a 64-bit hash of n words in a row,
equal on every machine; a text of fewer words is one gram as a whole. The Jaccard similarity of two sets is the size of
their intersection over that of their union.

A MinHash is the smallest value that a hash function takes on a set: two sets have the same one with a probability that
is their Jaccard similarity J. bands() hashes BANDS times ROWS of them, so two sets agree in at least one band with the
probability 1 - (1 - J^ROWS)^BANDS: 0.99995 at J = 0.8, 0.55 at 0.5, 0.06 at 0.3. Sets that agree in a band are worth a
comparison; which of them are alike is jaccard()'s to say.
"""

import re
import unicodedata
import zlib
from hashlib import blake2b

import numpy as np

UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"  # Thai and Lao, Japanese, Chinese characters
WORD = re.compile(f"[{UNSPACED}]|[^\\W{UNSPACED}]+")
BANDS, ROWS = 25, 5
BLOCK = 4096                          # grams hashed at once: 4 MB, however long a text is
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it modulo 2^64 loses nothing
_DRAWN = np.random.default_rng(0).integers(0, 2**64, (2, BANDS * ROWS), dtype=np.uint64)
MULTIPLIERS, OFFSETS = _DRAWN[0] | np.uint64(1), _DRAWN[1]  # hash function k takes x to x * MULTIPLIERS[k] + OFFSETS[k]


def digest(text):
    """A 64-bit number for a text, equal on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def plain(text):
    """The text up to what no reader sees: Unicode's NFC, and one space for every run of white space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def words(text):
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def grams(text, n):
    """The set of a text's n-grams: sorted 64-bit numbers."""
    word_hashes = [zlib.crc32(word.encode()) for word in words(text)]
    n = min(n, len(word_hashes))
    hash_w = np.array(word_hashes, dtype=np.uint64)
    n_grams = len(word_hashes) - n + 1
    gram = np.full(n_grams, n, dtype=np.uint64)
    for k in range(n):
        gram = gram * FACTOR + hash_w[k:k + n_grams]
    gram ^= gram >> np.uint64(32)         # a product's low bits depend on its factors' low bits alone
    return np.unique(gram * FACTOR)


def jaccard(one, other):
    """Of two sets of grams."""
    n_shared = len(np.intersect1d(one, other, assume_unique=True))
    return n_shared / (len(one) + len(other) - n_shared)


def bands(gram_set):
    """BANDS 32-bit numbers; two sets that have the same one at the same place may be alike."""
    least = np.full(BANDS * ROWS, 2**64 - 1, dtype=np.uint64)
    for start in range(0, len(gram_set), BLOCK):
        hashed_kg = MULTIPLIERS[:, None] * gram_set[start:start + BLOCK]
        hashed_kg += OFFSETS[:, None]
        least = np.minimum(least, hashed_kg.min(axis=1))
    band = np.zeros(BANDS, dtype=np.uint64)
    for row_b in least.reshape(BANDS, ROWS).T:
        band = (band ^ row_b) * FACTOR
        band ^= band >> np.uint64(29)
    return (band >> np.uint64(32)).astype(np.uint32)


def candidates(band_nb):
    """[N, BANDS] numbers -> [N, BANDS] int32: which bucket of a band a row shares with other rows, or -1 if none."""
    bucket_nb = np.full(band_nb.shape, -1, dtype=np.int32)
    for b in range(band_nb.shape[1]):
        _, bucket, count = np.unique(band_nb[:, b], return_inverse=True, return_counts=True)
        shared = count[bucket] > 1
        bucket_nb[shared, b] = bucket[shared]
    return bucket_nb


def alike(band_nb, similarity, threshold):
    """int64 [N]: for each row the first earlier row that stays and is at least `threshold` similar, or -1 if it stays
    itself. similarity(i, j) is asked only where two rows share a band."""
    bucket_nb = candidates(band_nb)
    like_n = np.full(len(band_nb), -1)
    stayed = {}                           # (band, bucket) -> the rows that stay in it
    for i in np.flatnonzero((bucket_nb >= 0).any(axis=1)).tolist():
        buckets = [(b, bucket) for b, bucket in enumerate(bucket_nb[i].tolist()) if bucket >= 0]
        earlier = sorted({j for bucket in buckets for j in stayed.get(bucket, ())})
        like_n[i] = next((j for j in earlier if similarity(i, j) >= threshold), -1)
        if like_n[i] < 0:
            for bucket in buckets:
                stayed.setdefault(bucket, []).append(i)
    return like_n
