"""How much each example counts. Pure.

The weight of the word of those who gave it (`learner.curate`) is multiplied by four corrections:

    arm        inverse propensity: an arm that was seldom drawn is heard as if all had been drawn alike
    cohort     inverse of how often a cohort's requests become examples: the loud do not speak for the quiet
    category   task types count as the square root of their examples, so that a rare one is not drowned
    length     preferred answers that are longer and those that are shorter get the same total weight

The first two together are cut at `clip`, up and down, and so are the others, each. Weights of a kind average 1 over
what is trained on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from learner.examples import Example
from learner.people import Cohort, cohort

LEVEL = 0.1
"""Answers whose lengths differ by less than this share are as long as each other."""


def weigh(examples: Sequence[Example], requests: Mapping[Cohort, int], clip: float) -> list[Example]:
    """The examples with their final weights. `requests`: how many each cohort sent."""
    heard = _against_loudness(examples, requests)
    categories = Counter(one.task_type for one in examples)
    typical = (len(examples) / max(1, len(categories))) ** 0.5
    weights = [
        one.weight
        * _cut(heard[cohort(one)] / max(one.propensity, 1e-9), clip)
        * _cut(typical / categories[one.task_type] ** 0.5, clip)
        for one in examples
    ]
    sides: dict[tuple[str, int], float] = defaultdict(float)
    for one, weight in zip(examples, weights, strict=True):
        sides[one.split, longer(one)] += weight
    weights = [weight * _cut(_level(sides, one), clip) for one, weight in zip(examples, weights, strict=True)]
    totals: dict[tuple[str, str], list[float]] = defaultdict(list)
    for one, weight in zip(examples, weights, strict=True):
        totals[one.split, one.kind].append(weight)
    means = {key: sum(own) / len(own) for key, own in totals.items()}
    return [
        msgspec.structs.replace(one, weight=round(weight / means[one.split, one.kind], 9))
        for one, weight in zip(examples, weights, strict=True)
    ]


def _level(sides: Mapping[tuple[str, int], float], example: Example) -> float:
    """What brings the two lengths of a split to the same total."""
    own, other = sides[example.split, longer(example)], sides.get((example.split, -longer(example)), 0.0)
    return (own + other) / 2 / own if longer(example) and other else 1.0


def _cut(factor: float, most: float) -> float:
    return max(1 / most, min(most, factor))


def _against_loudness(examples: Iterable[Example], requests: Mapping[Cohort, int]) -> dict[Cohort, float]:
    """By cohort, how seldom its requests become examples, against all requests; 1 where nothing is known."""
    counts = Counter(cohort(one) for one in examples)
    asked = sum(requests.get(name, 0) for name in counts)
    overall = sum(counts.values()) / asked if asked else 0.0
    return {
        name: overall / (count / requests[name]) if requests.get(name) and overall else 1.0
        for name, count in counts.items()
    }


def longer(example: Example) -> int:
    """1 where what was preferred is longer than what was not, -1 where it is shorter, else 0."""
    if example.chosen is None or example.rejected is None:
        return 0
    one, other = len(example.chosen), len(example.rejected)
    return 0 if abs(one - other) <= LEVEL * max(one, other) else (1 if one > other else -1)


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
