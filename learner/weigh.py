"""How much each example counts. Pure.

The weight of the word of those who gave it (`learner.curate`) is multiplied by four corrections:

    arm        inverse propensity: an arm that was seldom drawn is heard as if all had been drawn alike
    cohort     inverse of how often a cohort's requests become examples: the loud do not speak for the quiet
    category   task types count as the square root of their examples, so that a rare one is not drowned
    length     preferred answers that are longer and those that are shorter get the same total weight

The first two together are cut at `clip`. Weights of a kind average 1 in the end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from learner.examples import Example
from learner.people import Cohort, cohort

BALANCED = 2.0
"""Most by which category and length each change a weight, up or down."""
LEVEL = 0.1
"""Answers whose lengths differ by less than this share are as long as each other."""


def weigh(examples: Sequence[Example], requests: Mapping[Cohort, int], clip: float) -> list[Example]:
    """The examples with their final weights. `requests`: how many each cohort sent."""
    heard = _against_loudness(examples, requests)
    corrections: list[Callable[[Example], float]] = [
        lambda one: max(1 / clip, min(clip, heard[cohort(one)] / max(one.propensity, 1e-9))),
        _by_category(examples),
        _by_length(examples),
    ]
    weights = [one.weight * _product(correct(one) for correct in corrections) for one in examples]
    totals: dict[str, list[float]] = defaultdict(list)
    for one, weight in zip(examples, weights, strict=True):
        totals[one.kind].append(weight)
    means = {kind: sum(own) / len(own) for kind, own in totals.items()}
    return [
        msgspec.structs.replace(one, weight=round(weight / means[one.kind], 9))
        for one, weight in zip(examples, weights, strict=True)
    ]


def _product(factors: Iterable[float]) -> float:
    found = 1.0
    for factor in factors:
        found *= factor
    return found


def _against_loudness(examples: Iterable[Example], requests: Mapping[Cohort, int]) -> dict[Cohort, float]:
    """By cohort, how seldom its requests become examples, against all requests; 1 where nothing is known."""
    counts = Counter(cohort(one) for one in examples)
    asked = sum(requests.get(name, 0) for name in counts)
    overall = sum(counts.values()) / asked if asked else 0.0
    return {
        name: overall / (count / requests[name]) if requests.get(name) and overall else 1.0
        for name, count in counts.items()
    }


def _by_category(examples: Sequence[Example]) -> Callable[[Example], float]:
    counts = Counter(one.task_type for one in examples)
    typical = (len(examples) / max(1, len(counts))) ** 0.5
    return lambda one: _bounded(typical / counts[one.task_type] ** 0.5)


def _by_length(examples: Sequence[Example]) -> Callable[[Example], float]:
    sides = Counter[int]()
    for one in examples:
        sides[longer(one)] += 1
    half = (sides[1] + sides[-1]) / 2
    return lambda one: _bounded(half / sides[longer(one)]) if longer(one) and half else 1.0


def longer(example: Example) -> int:
    """1 where what was preferred is longer than what was not, -1 where it is shorter, else 0."""
    if example.chosen is None or example.rejected is None:
        return 0
    one, other = len(example.chosen), len(example.rejected)
    return 0 if abs(one - other) <= LEVEL * max(one, other) else (1 if one > other else -1)


def _bounded(factor: float) -> float:
    return max(1 / BALANCED, min(BALANCED, factor))


def shares(examples: Iterable[Example], key: Callable[[Example], str]) -> dict[str, dict[str, float]]:
    """By what `key` gives: examples, and share of the weight, to see what a dataset is made of."""
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for one in examples:
        counts[key(one)] += 1
        weights[key(one)] += one.weight  # type: ignore[assignment]
    total = sum(weights.values()) or 1.0
    return {
        name: {"examples": counts[name], "weight_share": round(weights[name] / total, 6)} for name in sorted(counts)
    }
