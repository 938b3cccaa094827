"""Near-duplicates of a prompt never stand on both sides of the split. Pure.

Who is held out is decided before examples are made (`learner.curate`). Where people of both sides asked the same, the
side that has more of it keeps it and the others are left out; if too little were held out then, the prompts that cost
least change sides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from learner.curate import Signatures, asked
from learner.examples import Example

SAME_PROMPT = 0.7
COMMON = 0.2
"""Share of the prompts in which a sentence stands that is not any one's own."""
MANY = 10
_SENTENCE = re.compile(r"(?<=[.!?:])\s+|\n+")
ENOUGH = 0.5
"""Share of the examples meant to be held out that must be."""


class Divided(NamedTuple):
    examples: list[Example]
    left_out: list[Example]
    """Their prompt is held by the other side."""


def divide(examples: Sequence[Example], held_out: float) -> Divided:
    """`examples` of both sides, without those whose prompt (or nearly it) is on the other one."""
    places = prompt_clusters(examples)
    aside = [one.split == "held_out" for one in examples]
    counts: dict[int, list[int]] = {}
    for place, out in zip(places, aside, strict=True):
        counts.setdefault(place, [0, 0])[out] += 1
    held = {place for place, (train, out) in counts.items() if out > train}
    wanted = ENOUGH * held_out * len(examples)
    have = sum(counts[place][1] for place in held)
    both = [place for place, (train, out) in counts.items() if place not in held and out]
    for place in sorted(both, key=lambda place: (counts[place][0] - counts[place][1], place)):
        if have >= wanted:
            break
        if counts[place][0] <= held_out * len(examples):  # else it would cost more than it is worth
            held.add(place)
            have += counts[place][1]
    kept: list[Example] = []
    left_out: list[Example] = []
    for one, place, out in zip(examples, places, aside, strict=True):
        (kept if out == (place in held) else left_out).append(one)
    return Divided(kept, left_out)


def prompt_clusters(examples: Sequence[Example]) -> list[int]:
    """Of each example the cluster that its prompt is in; what many prompts have in common tells none apart."""
    prompts = {asked(one) for one in examples}
    own = _without_the_common(prompts)
    cluster = Signatures().clusters(own.values(), SAME_PROMPT)
    return [cluster[own[asked(one)]] for one in examples]


def _without_the_common(prompts: Collection[str]) -> dict[str, str]:
    """By prompt what is its own: without sentences that stand in many, as templates and documents do."""
    pieces = {prompt: [piece for piece in _SENTENCE.split(prompt) if piece.strip()] for prompt in prompts}
    times = Counter(piece for found in pieces.values() for piece in set(found))
    most = max(MANY, COMMON * len(prompts))
    own = {prompt: " ".join(piece for piece in found if times[piece] <= most) for prompt, found in pieces.items()}
    return {prompt: text if text.strip() else prompt for prompt, text in own.items()}
