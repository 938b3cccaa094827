"""Which arm a session has, as the journal tells it: each request of the session left a fact that says so.

Where one machine serves a route, nothing else need be written for it. Machines that share no journal have it from
their store (`store_redis`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from router.arms import Choice
from router.store import REMEMBER_SECONDS, Assignment
from telemetry.journal import Journal

_NOT_DRAWN = frozenset(["pinned", "fallback"])


class JournalAssignments:
    """Assignments that need not be kept. May be asked from several threads; raises `StateError`s."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journal: Journal | None = None
        self._lock = threading.Lock()

    def assign(self, assignments: Sequence[Assignment], seconds: float, now: float) -> None:
        """Nothing to do: the facts will say it."""

    def recall(self, route: str, tenant: str, session: str, now: float) -> Choice | None:
        with self._lock:
            if self._journal is None:
                self._journal = Journal(self._path)
            facts = self._journal.latest(tenant, session, route)
        for fact in facts:
            by = fact.answerer
            if by.policy not in _NOT_DRAWN and fact.at > now - REMEMBER_SECONDS:
                return Choice(
                    by.arm, by.propensity, by.snapshot, by.segment, by.holdout, by.policy, by.rollout, by.rival
                )
        return None
