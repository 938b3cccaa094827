"""Which arm a session has, as the journal tells it: each request of the session left a fact that says so.

Where one machine serves a route, little else need be written for it. Machines that share no journal have it from
their store (`store_redis`).
"""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from itertools import islice
from pathlib import Path

import msgspec

from router.arms import Choice
from router.reward import NOT_DRAWN
from router.store import REMEMBER_SECONDS, Assignment
from telemetry.journal import Journal

MOST = 256
"""Requests of a session that are looked at: others wait meanwhile."""
_choice = msgspec.json.Decoder(Choice)


class JournalAssignments:
    """Assignments that the facts will tell. May be asked from several threads; raises `StateError`s.

    The journal is opened here: the first recall has no time for it.
    """

    told_by_facts = True

    def __init__(self, path: Path) -> None:
        self._reads, self._reading = Journal(path), threading.Lock()
        self._writes, self._writing = Journal(path), threading.Lock()  # no recall waits for a disk

    def close(self) -> None:
        with self._reading, self._writing:
            self._reads.close()
            self._writes.close()

    def assign(self, assignments: Sequence[Assignment], seconds: float, now: float) -> None:
        drawn = [(*key, now, msgspec.json.encode(choice)) for *key, choice in assignments]
        with self._writing:
            self._writes.draw(drawn, now - seconds)

    def recall(self, route: str, tenant: str, session: str, held: Container[str], now: float) -> Choice | None:
        since = now - REMEMBER_SECONDS
        with self._reading:
            for fact in islice(self._reads.latest(tenant, session, route), MOST):
                by = fact.answerer
                if fact.at <= since:
                    break
                if by.policy not in NOT_DRAWN and by.arm in held:
                    return Choice(
                        by.arm, by.propensity, by.snapshot, by.segment, by.holdout, by.policy, by.rollout, by.rival
                    )
            drawn = self._reads.drawn(route, tenant, session, since)
        choice = _choice.decode(drawn) if drawn is not None else None
        return choice if choice is not None and choice.arm in held else None
