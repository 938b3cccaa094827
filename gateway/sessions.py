"""Which arm a session has: recalled if its conversation began earlier, else drawn from the route's snapshot.

The path of a request does no I/O here but one recall, and only when the request carries an earlier assistant turn
and this worker has not seen the session; it has a short timeout and fails open (the draw is by the session's hash,
so it mostly finds the same arm anyway). Assignments and snapshots travel in the background; where facts tell which arm
a session has, assignments are written only for answers that take longer than that.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from router.arms import Choice, Snapshot
from router.bandit import draw, unit_hash
from router.refit import segmenter_of
from router.segments import Segmenter
from router.store import REMEMBER_SECONDS, Assignment, Assignments, Store, session_key
from telemetry.errors import StateError

log = logging.getLogger("understudy.gateway")

RECALL_TIMEOUT = 0.05
CACHE = 100_000

_Key = tuple[str, str, str]
"""Route, tenant, session."""


class Sessions:
    """The arms of sessions, for one worker."""

    def __init__(self, store: Store, assignments: Assignments, snapshots: Mapping[str, Snapshot]) -> None:
        self.snapshots = dict(snapshots)
        self.segmenters: dict[str, Segmenter] = {}
        """By route whose segments are learned from prompts."""
        self.store_seen = time.monotonic()
        self.recalls_failed = 0
        self._store = store
        self._assignments = assignments
        self._cache: OrderedDict[_Key, Choice] = OrderedDict()
        self._new: dict[_Key, Choice] = {}
        self._exchanging = threading.Lock()
        self._threads = ThreadPoolExecutor(4, "store")

    async def choose(
        self,
        route: str,
        tenant: str,
        session: str,
        segment: Callable[[], str],
        *,
        begun: bool,
        snapshot: Snapshot,
        held: Container[str],
    ) -> tuple[Choice, bool]:
        """The session's arm on `route`, and whether it was recalled. `begun`: the request has an earlier answer.

        `segment` is asked for the segment of a session that draws, from `snapshot`: one that is new, or whose arm is
        none of those `held`, which sessions may keep.
        """
        key = route, tenant, session
        choice = self._cache.get(key)
        if choice is None and begun:
            choice = await self._recall(*key, held)
        if choice is not None and choice.arm in held:
            self._keep(key, choice)
            return choice, True
        choice = draw(snapshot, unit_hash(route, session_key(tenant, session)), segment())
        self._keep(key, choice)
        self._new[key] = choice
        return choice, False

    def answered(self, route: str, tenant: str, session: str) -> None:
        """A request of the session has ended, and leaves a fact that names the arm it drew."""
        if self._assignments.told_by_facts:
            self._new.pop((route, tenant, session), None)

    def _keep(self, key: _Key, choice: Choice) -> None:
        if key not in self._cache and len(self._cache) >= CACHE:
            self._cache.popitem(last=False)
        self._cache[key] = choice

    async def _recall(self, route: str, tenant: str, session: str, held: Container[str]) -> Choice | None:
        loop = asyncio.get_running_loop()
        asked = (route, tenant, session, held, time.time())
        try:
            recalling = loop.run_in_executor(self._threads, self._assignments.recall, *asked)
            return await asyncio.wait_for(recalling, RECALL_TIMEOUT)
        except (StateError, TimeoutError):
            self.recalls_failed += 1
            return None

    def exchange(self) -> None:
        """Push new assignments and pull newer snapshots. Blocks; raises `StateError` and loses nothing by it."""
        with self._exchanging:
            self._exchange()

    def _exchange(self) -> None:
        new, self._new = self._new, {}
        failed: StateError | None = None
        try:
            self._assign(new)
        except StateError as error:
            for key in list(islice(new, max(0, len(new) - CACHE))):
                del new[key]
            late, self._new = self._new, new  # from here on the event loop writes to this one
            new.update(late)
            failed = error  # what was decided must be known here though nothing can be written
        for name, snapshot in list(self.snapshots.items()):
            newer = self._store.snapshot(name)
            if newer is not None and newer.version != snapshot.version:
                self.snapshots[name] = snapshot = newer
            if snapshot.segmenter and snapshot.segmenter != getattr(self.segmenters.get(name), "version", ""):
                learned = segmenter_of(self._store, name)
                if learned is not None:
                    self.segmenters[name] = learned
        if failed is not None:
            raise failed
        self.store_seen = time.monotonic()

    def close(self) -> None:
        """Push what is left."""
        with self._exchanging:
            try:
                self._assign(self._new)
            except StateError as error:
                log.warning("%d session assignments were not stored: %s", len(self._new), error)
        self._threads.shutdown(wait=False)
        self._assignments.close()

    def _assign(self, new: Mapping[_Key, Choice]) -> None:
        if new:
            assignments: list[Assignment] = [(*key, choice) for key, choice in new.items()]
            self._assignments.assign(assignments, REMEMBER_SECONDS, time.time())
