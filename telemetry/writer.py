"""What stands between an event loop and the journal's disk: one thread that writes what was put, in batches.

It takes what was put since its last commit and writes it in one transaction, so that a request never waits for a disk
and a thousand facts cost one sync. A fact is made into its row when it is put: what waits is small, and the thread does
nothing that needs Python's lock. While the disk fails or another program locks the file, facts wait in memory (at
most `limit`; then interactions are dropped and counted, and durable puts are refused).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from telemetry.errors import StateUnavailable
from telemetry.events import Fact
from telemetry.journal import Journal
from telemetry.schema import Row, row


class JournalWriter:
    """A thread that writes what is put, in batches. `put` never blocks; `put_durably` resolves once on disk."""

    LINGER, LONGER = 0.05, 0.25
    """Seconds a batch of interactions may wait for company, and where much comes; durable puts do not wait."""
    MUCH, BATCH = 32, 2000
    """A row of a large batch costs half of one of a small one: fewer pages are written twice."""
    PATIENCE = 5.0
    """Seconds that a durable put may take."""

    def __init__(self, path: Path, *, limit: int = 100_000, report: Callable[[str], None] = lambda _: None) -> None:
        self.dropped = 0
        self.failing: str | None = None
        """Why the last write failed; None while writes succeed."""
        self._journal = Journal(path)
        self._limit = limit
        self._report = report
        self._queue: deque[tuple[list[Row], Future[None] | None]] = deque()
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, fact: Fact) -> None:
        if len(self._queue) >= self._limit:
            self.dropped += 1
            return
        self._queue.append(([row(fact)], None))
        if not self._wake.is_set():
            self._wake.set()

    async def put_durably(self, facts: Sequence[Fact], timeout: float | None = None) -> None:
        """Return when `facts` are on disk; StateUnavailable after `timeout` (or `PATIENCE`) seconds without that."""
        if len(self._queue) >= self._limit:
            raise StateUnavailable(f"the journal's queue is full: {self.failing or 'the disk is too slow'}")
        done = self._put_in_a_hurry([row(fact) for fact in facts])
        try:
            await asyncio.wait_for(asyncio.wrap_future(done), self.PATIENCE if timeout is None else timeout)
        except TimeoutError:
            raise StateUnavailable(f"the journal cannot be written: {self.failing or 'too slow'}") from None

    def flush(self, timeout: float) -> bool:
        """Wait until all that was put is on disk; False if it is not after `timeout` seconds. Not for event loops."""
        if self.failing is not None:
            return False
        done = self._put_in_a_hurry([])
        try:
            done.result(timeout)
        except TimeoutError:
            return not done.cancel()
        return True

    def _put_in_a_hurry(self, rows: list[Row]) -> Future[None]:
        done: Future[None] = Future()
        self._queue.append((rows, done))
        self._hurry.set()
        self._wake.set()
        return done

    def close(self, timeout: float = 10.0) -> None:
        """Write all that is queued, then stop."""
        self._closing = True
        self._hurry.set()
        self._wake.set()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._journal.close()

    def _run(self) -> None:
        while not (self._closing and not self._queue):
            self._wake.wait()
            if not (self._closing or self._hurry.wait(self.LINGER)) and self.MUCH < len(self._queue) < self.BATCH:
                self._hurry.wait(self.LONGER - self.LINGER)
            self._hurry.clear()
            self._wake.clear()
            self._drain()

    def _drain(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(self.BATCH, len(self._queue)))]
            # A caller who stopped waiting was told 503 and will send again; what it sent is not kept twice.
            batch = [(rows, done) for rows, done in batch if done is None or not done.cancelled()]
            try:
                if rows := [row for rows, _ in batch for row in rows]:
                    self._journal.write(rows)
            except Exception as error:  # of whatever kind: a thread that ended would write nothing more
                self._queue.extendleft(reversed(batch))
                if self.failing is None:
                    self._report(f"journal: {error}; {len(self._queue)} facts wait in memory")
                self.failing = str(error)
                if self._closing:
                    self._report(f"journal: closed with {len(self._queue)} facts unwritten")
                    self._queue.clear()
                    return
                time.sleep(0.2)
                continue
            self.failing = None
            for _, done in batch:
                if done is not None and done.set_running_or_notify_cancel():
                    done.set_result(None)
