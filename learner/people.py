"""Who gives feedback: how often, how evenly, since when, and how far each is trusted. Pure.

A user is a pseudonym of one tenant; where an app names none, the session stands for them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, pstdev

from learner.examples import Example
from telemetry.events import DETECTED_ONLY, Fact, Interaction, Signal
from telemetry.journal import came

MINUTE = 60.0
DAY = 86400.0
EVEN = 20
"""Pieces of feedback whose pauses must all be alike before a user is taken for a machine."""
HASTE = 15.0
"""Seconds between them: who is slower than that does little harm, even as a machine."""
BURST = 600.0
CROWD = 10
"""People who speak for one item within `BURST` seconds, most of all who spoke then and all of them new: one person."""
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
class Person:
    """What a user's feedback looks like."""

    first: float = float("inf")
    verified: bool = False
    opinions: array[float] = field(default_factory=lambda: array("d"))
    """When each came."""


class People:
    """All users and cohorts of the facts that were added, in any order."""

    def __init__(self) -> None:
        self._people: dict[str, Person] = {}
        self.requests: Counter[Cohort] = Counter()
        self._times: list[float] | None = None

    def add(self, fact: Fact) -> None:
        if isinstance(fact, Interaction):
            self.requests[cohort(fact)] += 1
            self._seen(person(fact.tenant, fact.user, fact.session), fact.at)
        elif isinstance(fact, Signal) and fact.subject and fact.kind not in DETECTED_ONLY:
            one = self._seen(person(fact.tenant, fact.subject, ""), came(fact))
            one.verified = one.verified or fact.verified
            one.opinions.append(came(fact))
            self._times = None

    def _seen(self, name: str, at: float) -> Person:
        one = self._people.setdefault(name, Person())
        one.first = min(one.first, at)
        return one

    def machines(self, per_minute: float) -> set[str]:
        """Users who give more than `per_minute` pieces of feedback in a minute, or give them at a steady rhythm."""
        return {name for name, one in self._people.items() if _is_machine(sorted(one.opinions), per_minute)}

    def trust(self, name: str, until: float, agreed: Mapping[str, tuple[int, int]]) -> float:
        """How much a user's word counts, 0 to 1: by age, by agreement with others, by whether somebody vouches.

        `agreed`: of how many votes on things that others voted on too, how many were with the majority of these.
        """
        one = self._people.get(name, Person(first=until))
        age = min(1.0, max(0.0, until - one.first) / DAY)
        votes, with_others = agreed.get(name, (0, 0))
        agreement = min(1.0, (with_others + DOUBT) / (votes + DOUBT) / SOUND)
        return (0.5 + 0.5 * age) * agreement * (1.0 if one.verified or not one.opinions else UNVERIFIED)

    def is_burst(self, voters: Iterable[tuple[str, float]]) -> bool:
        """Whether the (user, time) who spoke for one item are a crowd that came for that."""
        said = sorted((at, name) for name, at in voters)
        for start, (begins, _) in enumerate(said):
            within = [row for row in said[start:] if row[0] <= begins + BURST]
            names = {name for _, name in within}
            if len(names) < CROWD:
                continue
            new = all(at - self._people.get(name, Person(first=at)).first <= NEW for at, name in within)
            if new and len(within) > 0.5 * self._opinions_in(begins, begins + BURST):
                return True
        return False

    def _opinions_in(self, begins: float, ends: float) -> int:
        if self._times is None:
            self._times = sorted(at for one in self._people.values() for at in one.opinions)
        return bisect_right(self._times, ends) - bisect_left(self._times, begins)


def _is_machine(times: list[float], per_minute: float) -> bool:
    most = int(per_minute)
    if any(later - earlier <= MINUTE for earlier, later in zip(times, times[most:], strict=False)):
        return True
    pauses = [later - earlier for earlier, later in pairwise(times)]
    return len(pauses) >= EVEN and 0 < fmean(pauses) <= HASTE and pstdev(pauses) <= 0.05 * fmean(pauses)


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
