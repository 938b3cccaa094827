"""Who gives feedback: how often, how evenly, since when, and how far each is trusted. Pure.

A user is a pseudonym of one tenant; where an app names none, the session stands for them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import fmean, pstdev

from learner.examples import Example
from telemetry.events import Fact, Interaction, Signal
from telemetry.journal import came

MINUTE = 60.0
DAY = 86400.0
EVEN = 20
"""Pieces of feedback whose pauses must all be alike before a user is taken for a machine."""
HASTE = 15.0
"""Seconds between them: who is slower than that does little harm, even as a machine."""
BURST = 600.0
CROWD = 10
"""New people who speak for one item within `BURST` seconds, and are most of all who spoke then: one person."""
NEW = 3600.0
DOUBT = 2.0
"""Votes of agreement that everybody starts with."""
SOUND = 0.75
"""Who agrees with others in this share of votes is not doubted: tastes differ."""
UNVERIFIED = 0.7

Cohort = tuple[str, str | None, str | None]
"""Tenant, task type, country."""


def person(tenant: str, user: str | None, session: str) -> str:
    return f"{tenant}/{user}" if user else f"{tenant}//{session}"


def who(example: Example) -> str:
    return person(example.tenant, example.user, example.session)


def cohort(of: Example | Interaction) -> Cohort:
    return of.tenant, of.task_type, of.country


@dataclass(slots=True)
class Opinions:
    """What a user's feedback looks like."""

    times: dict[str, float] = field(default_factory=dict)
    """When each piece of it came, by its id."""
    verified: bool = True


class People:
    """All users and cohorts of the facts that were added, in any order, and of the opinions that were heard."""

    def __init__(self) -> None:
        self.requests: Counter[Cohort] = Counter()
        self._first: dict[str, float] = {}
        self._opinions: dict[str, Opinions] = {}
        self._times: list[float] = []

    def add(self, fact: Fact) -> None:
        if isinstance(fact, Interaction):
            self.requests[cohort(fact)] += 1
            self._seen(person(fact.tenant, fact.user, fact.session), fact.at)
        elif isinstance(fact, Signal) and fact.subject:
            self._seen(person(fact.tenant, fact.subject, ""), came(fact))

    def _seen(self, name: str, at: float) -> None:
        self._first[name] = min(self._first.get(name, at), at)

    def hear(self, opinions: Iterable[tuple[str, str, float, bool]]) -> None:
        """Opinions: (user, the signal's id, when, whether somebody vouches for the user)."""
        for name, signal, at, verified in opinions:
            one = self._opinions.setdefault(name, Opinions())
            one.times[signal] = at
            one.verified = one.verified and verified
        self._times = sorted(at for one in self._opinions.values() for at in one.times.values())

    def machines(self, per_minute: float) -> set[str]:
        """Users who give more than `per_minute` opinions in a minute, or give them at a steady, quick rhythm."""
        return {name for name, one in self._opinions.items() if _is_machine(sorted(one.times.values()), per_minute)}

    def trust(self, name: str, until: float, agreed: Mapping[str, tuple[int, int]]) -> float:
        """How much a user's word counts, 0 to 1: by age, by agreement with others, by whether somebody vouches.

        `agreed`: of how many votes on things that others voted on too, how many were with the majority of these.
        """
        age = min(1.0, max(0.0, until - self._first.get(name, until)) / DAY)
        votes, with_others = agreed.get(name, (0, 0))
        agreement = min(1.0, (with_others + DOUBT) / (votes + DOUBT) / SOUND)
        verified = self._opinions.get(name, Opinions()).verified
        return (0.5 + 0.5 * age) * agreement * (1.0 if verified else UNVERIFIED)

    def is_burst(self, voters: Iterable[tuple[str, float]]) -> bool:
        """Whether the (user, time) who spoke for one item were, within `BURST` seconds, a crowd that came for that."""
        fresh = sorted((at, name) for name, at in voters if at - self._first.get(name, at) <= NEW)
        inside: Counter[str] = Counter()
        begin = 0
        for end, (at, name) in enumerate(fresh):
            inside[name] += 1
            while fresh[begin][0] < at - BURST:
                inside[fresh[begin][1]] -= 1
                inside += Counter()  # without those that are gone
                begin += 1
            crowd = end - begin + 1
            if len(inside) >= CROWD and crowd > 0.5 * self._opinions_in(fresh[begin][0], at):
                return True
        return False

    def _opinions_in(self, begins: float, ends: float) -> int:
        return bisect_right(self._times, ends) - bisect_left(self._times, begins)


def _is_machine(times: list[float], per_minute: float) -> bool:
    most = max(1, ceil(per_minute))
    if any(later - earlier < MINUTE for earlier, later in zip(times, times[most:], strict=False)):
        return True
    pauses = [later - earlier for earlier, later in pairwise(times)]
    return len(pauses) >= EVEN and 0 < fmean(pauses) <= HASTE and pstdev(pauses) <= 0.05 * fmean(pauses)


def held_out_people(names: Iterable[str], share: float, salt: str) -> set[str]:
    """Those who are kept for evaluation: by a hash, so the same ones in every round; one of two at least."""
    ordered = sorted(set(names), key=lambda name: _place(name, salt))
    if len(ordered) < 2:
        return set()
    aside = [name for name in ordered if _place(name, salt) < share][: len(ordered) - 1]
    return set(aside or ordered[:1])


def _place(name: str, salt: str) -> float:
    """A number from 0 to 1 that is a user's own."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{name}".encode()).digest()[:7], "big") / 2**56


def agreement_of(items: Iterable[Iterable[tuple[str, Hashable]]]) -> dict[str, tuple[int, int]]:
    """By user: votes on items that others voted on too, and how many of these were as most of the others voted.

    `items`: the (user, value) votes on each.
    """
    found: dict[str, tuple[int, int]] = {}
    for item in items:
        votes = list(item)
        counts = Counter(value for _, value in votes)
        for name, value in votes if len(votes) > 1 else ():
            others = counts - Counter([value])
            most = max(others.values())
            leading = {other for other, count in others.items() if count == most}
            voted, agreed = found.get(name, (0, 0))
            found[name] = voted + 1, agreed + (leading == {value})
    return found
