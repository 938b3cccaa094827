"""`understudy rebuild`: all sums anew from the journal, compared with those in the store, and put in their place.

    journal → sessions → each one's contribution, as far as the controller has come → sums

The controller counts facts as they come; here each session is counted once, from all of its facts. That both make the
same sums is what the store's being a cache of the journal means.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

from router.arms import Cell, Sums
from router.controller import LEASE_SECONDS, Controller, contribution, matured
from router.plan import RoutePlan
from router.reward import Session, by_session
from router.store import Change, Store, session_key
from telemetry.errors import StateError
from telemetry.events import Interaction
from telemetry.journal import Journal

PAGE = 1000
TOLERANCE = 1e-9


def recount(plan: RoutePlan, store: Store, journal: Journal) -> Iterator[list[Change]]:
    """What each session of the route contributes, as far as the store's marks say that the controller has come."""
    end, mark = store.marked("journal"), store.marked(matured(plan.reward.window))
    seen: set[Session] = set()
    after = 0
    while facts := [(seq, fact) for seq, fact in journal.read(after, PAGE) if seq <= end]:
        after = facts[-1][0]
        keys = {(i.tenant, i.session): None for _, i in facts if isinstance(i, Interaction) and i.route == plan.name}
        found = journal.sessions([key for key in keys if key not in seen], dict(facts))
        seen |= keys.keys()
        sessions = {key: [(seq, i) for seq, i in rows if seq <= end] for key, rows in found.items()}
        signals = journal.heard_about((i for rows in sessions.values() for _, i in rows), end)
        yield [
            Change(session_key(*key), *contribution(plan, sessions[key], heard, mark))
            for key, heard in by_session(sessions, signals).items()
        ]


def compare(plans: list[RoutePlan], store: Store, journal: Journal) -> list[dict[str, Any]]:
    """Each route: how many sessions the journal has, and the largest difference from what the store holds."""
    return [_difference(plan, store, journal) for plan in plans]


def replace(plans: list[RoutePlan], store: Store, journal: Journal) -> None:
    """Clear the store's sums and count the whole journal. Raises `StateError` while a controller works."""
    lease = store.lease("rebuild", LEASE_SECONDS, time.time())
    if lease is None:
        holder = store.holder()
        raise StateError(f"{holder.owner if holder else 'a controller'} is at work: stop `understudy serve` first")
    for plan in plans:
        store.clear(plan.name, lease.token)
        for changes in recount(plan, store, journal):
            store.lease("rebuild", LEASE_SECONDS, time.time())
            store.apply(plan.name, changes, lease.token)
    controller = Controller(plans, journal, store, "rebuild")
    while controller.step(time.time()):  # what no controller has come to yet
        pass
    store.release("rebuild")


def _difference(plan: RoutePlan, store: Store, journal: Journal) -> dict[str, Any]:
    new: dict[Cell, Sums] = {}
    for change in chain.from_iterable(recount(plan, store, journal)):
        for cell, sums in change.cells.items():
            new[cell] = new.get(cell, Sums()).plus(sums)
    old, largest = store.sums(plan.name), 0.0
    for cell in old.keys() | new.keys():
        a, b = old.get(cell, Sums()), new.get(cell, Sums())
        largest = max(largest, abs(a.n - b.n), abs(a.s - b.s), abs(a.ss - b.ss))
    sessions = sum(v.n for cell, v in new.items() if not cell.metric)
    return {"route": plan.name, "sessions": sessions, "largest_difference": largest, "same": largest <= TOLERANCE}
