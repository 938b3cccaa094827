"""`understudy rebuild`: all sums anew from the journal, compared with those in the store, and put in their place."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from router.arms import Sums
from router.controller import LEASE_SECONDS, Controller, RoutePlan
from router.store import Store
from router.store_sqlite import SqliteStore
from telemetry.errors import StateError
from telemetry.journal import Journal

TOLERANCE = 1e-9


def compare(plans: list[RoutePlan], store: Store, journal: Journal) -> list[dict[str, Any]]:
    """Each route: how many cells the journal makes, and the largest difference from what the store holds."""
    with tempfile.TemporaryDirectory(prefix="understudy-rebuild-") as folder:
        anew = SqliteStore(Path(folder) / "state.db")
        try:
            replay(Controller(plans, journal, anew, "rebuild"))
            return [_difference(plan.name, store, anew) for plan in plans]
        finally:
            anew.close()


def replace(plans: list[RoutePlan], store: Store, journal: Journal) -> None:
    """Clear the store's sums and count the whole journal again. Raises `StateError` while a controller works."""
    lease = store.lease("rebuild", LEASE_SECONDS, time.time())
    if lease is None:
        holder = store.holder()
        raise StateError(f"{holder.owner if holder else 'a controller'} is at work: stop `understudy serve` first")
    for plan in plans:
        store.clear(plan.name, lease.token)
    store.mark("journal", 0, lease.token)
    replay(Controller(plans, journal, store, "rebuild"))
    store.release("rebuild")


def replay(controller: Controller) -> None:
    while controller.step(time.time()):
        pass


def _difference(route: str, store: Store, anew: Store) -> dict[str, Any]:
    old, new = store.sums(route), anew.sums(route)
    largest = 0.0
    for cell in old.keys() | new.keys():
        a, b = old.get(cell, Sums()), new.get(cell, Sums())
        largest = max(largest, abs(a.n - b.n), abs(a.s - b.s), abs(a.ss - b.ss))
    sessions = sum(v.n for v in new.values())
    return {"route": route, "sessions": sessions, "largest_difference": largest, "same": largest <= TOLERANCE}
