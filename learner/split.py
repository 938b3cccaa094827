"""Which examples are held out: by a hash of their user, so that evaluation meets only people who are new to the model.

Near-duplicates of a prompt never stand on both sides: where users of both sides asked the same, the side that has more
of it keeps it and the others are left out; if too little were held out then, the prompts that cost least change sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from learner.curate import Signatures, asked
from learner.examples import Example
from learner.people import who

SAME_PROMPT = 0.7
ENOUGH = 0.5
"""Share of the examples meant to be held out that must be."""


class Divided(NamedTuple):
    examples: list[Example]
    left_out: list[Example]
    """Their prompt is held by the other side."""


def divide(examples: Sequence[Example], held_out: float, salt: str) -> Divided:
    """`examples` with their `split`. A user, and a near-duplicate of a prompt, is on one side only."""
    places = prompt_clusters(examples)
    aside = [is_held_out(who(one), held_out, salt) for one in examples]
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
        held.add(place)
        have += counts[place][1]
    kept: list[Example] = []
    left_out: list[Example] = []
    for one, place, out in zip(examples, places, aside, strict=True):
        if out == (place in held):
            kept.append(msgspec.structs.replace(one, split="held_out" if out else "train"))
        else:
            left_out.append(one)
    # Somebody else may have judged an answer in a user's session.
    training = {(one.tenant, one.session) for one in kept if one.split == "train"}
    shared = {one.id for one in kept if one.split == "held_out" and (one.tenant, one.session) in training}
    left_out += [one for one in kept if one.id in shared]
    return Divided([one for one in kept if one.id not in shared], left_out)


def is_held_out(user: str, share: float, salt: str) -> bool:
    """The same answer for a user in every round, as long as salt and share are the same."""
    digest = hashlib.sha256(f"{salt}\0{user}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prompt_clusters(examples: Sequence[Example]) -> list[int]:
    """Of each example the cluster that its prompt is in."""
    cluster = Signatures().clusters((asked(one) for one in examples), SAME_PROMPT)
    return [cluster[asked(one)] for one in examples]
