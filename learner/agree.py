"""Do people agree: weighted majority of the votes on an item, and how far votes agree at all. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

V = TypeVar("V", bound=Hashable)


def majority(votes: Iterable[tuple[V, float]]) -> tuple[V | None, float]:
    """What most of the weight is for, and its share of all weight; (None, share) where two lead alike, or none voted.

    `votes`: (value, weight > 0) each.
    """
    weights: dict[V, float] = {}
    for value, weight in votes:
        weights[value] = weights.get(value, 0.0) + weight
    total = sum(weights.values())
    if total <= 0:
        return None, 0.0
    (best, most), *others = sorted(weights.items(), key=lambda row: -row[1])
    tied = bool(others) and others[0][1] > most - 1e-9 * total
    return (None if tied else best), most / total


def pairwise_agreement(items: Iterable[Sequence[Hashable]]) -> float | None:
    """Share of pairs of votes on one item that are equal, over all items; None without a pair."""
    equal = pairs = 0
    for votes in items:
        n = len(votes)
        pairs += n * (n - 1) // 2
        equal += sum(count * (count - 1) // 2 for count in Counter(votes).values())
    return equal / pairs if pairs else None


def alpha(items: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's α for nominal values and any number of votes an item; None where it is not defined.

    1 is full agreement, 0 what chance gives. Items with one vote say nothing. From the coincidence matrix as in
    Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011).
    """
    totals: Counter[Hashable] = Counter()
    disagreed = 0.0
    for votes in items:
        n = len(votes)
        if n < 2:
            continue
        counts = Counter(votes)
        totals.update(counts)
        disagreed += sum(count * (n - count) for count in counts.values()) / (n - 1)
    n = sum(totals.values())
    expected = sum(count * (n - count) for count in totals.values()) / (n - 1) if n > 1 else 0.0
    return 1.0 - disagreed / expected if expected else None
