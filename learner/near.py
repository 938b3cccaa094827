"""Near-duplicates among many texts: MinHash signatures, and clusters of those that agree. Pure.

The share of equal places in two signatures estimates the Jaccard likeness of the texts' sets of 5-grams (Broder 1997).
Two texts are compared only where a whole band of their signatures is equal: 24 bands of 4 find a pair that is 0.7 alike
with probability 0.9986, one that is 0.8 alike with 0.999998.

The same texts in the same order give the same clusters on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from telemetry.wording import canonical

GRAM = 5
BANDS = 24
ROWS = 4
MOST = 4000
"""Characters of a text that are looked at: its last ones."""
_COMPARED = 16
"""Members of a band's bucket that another one is compared with."""

Signature = NDArray[np.uint32]


def _constants() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    chance = np.random.Generator(np.random.PCG64(20_240_817))
    odd = chance.integers(0, 2**31, BANDS * ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return odd, chance.integers(0, 2**32, BANDS * ROWS, dtype=np.uint32)


_FACTORS, _OFFSETS = _constants()
_MIX = np.array([0x9E3779B97F4A7C15 ** (place + 1) % 2**64 for place in range(GRAM)], dtype=np.uint64)


def signature(text: str) -> Signature:
    """MinHash of a text: BANDS × ROWS numbers. Case, white space and marks of Markdown make no difference."""
    plain = canonical(text[-MOST:]).lower()
    codes = np.frombuffer(plain.ljust(GRAM).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, GRAM)
    grams = np.unique((windows @ _MIX) >> np.uint64(32)).astype(np.uint32)
    # The low bits of a product are poorly mixed, so they are folded into by the high ones.
    hashed = grams * _FACTORS[:, None] + _OFFSETS[:, None]
    least: Signature = (hashed ^ (hashed >> np.uint32(15))).min(axis=1)
    return least


def likeness(one: Signature, other: Signature) -> float:
    """Estimate of the Jaccard likeness, ± 0.05."""
    return float(np.mean(one == other))


def clusters(signatures: Sequence[Signature], threshold: float) -> list[int]:
    """Of each text the place of its cluster's first member. Likeness is passed on: a chain is one cluster."""
    parent = list(range(len(signatures)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for band in range(BANDS):
        buckets: dict[bytes, list[int]] = {}
        for place, one in enumerate(signatures):
            bucket = buckets.setdefault(one[band * ROWS : (band + 1) * ROWS].tobytes(), [])
            joined = False
            for other in bucket:
                mine, its = root(place), root(other)
                if mine != its and likeness(one, signatures[other]) >= threshold:
                    parent[max(mine, its)] = min(mine, its)
                    joined = True
                joined = joined or mine == its
            if len(bucket) < _COMPARED or not joined:
                bucket.append(place)
                if len(bucket) > 4 * _COMPARED:
                    bucket.pop(0)
    return [root(place) for place in range(len(signatures))]
