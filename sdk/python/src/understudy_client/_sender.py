"""A bounded queue, and the one thread that empties it into POST /v1/feedback.

The order of what is said about one answer is kept, since of several votes the last to arrive counts:

    queue ──► batch ──► 202               kept, or refused by index, or limited by index
      ▲  ▲               429               all limited; nothing is sent for a while
      │  └── limited ◄───┘                 back when Retry-After is over; newer items about the same answers wait too
      └───────────────── no answer, 5xx    back to the front; nothing is sent for a while
                         other 4xx         refused; of a batch, its items are found by sending smaller ones

A batch is cut smaller on 4xx because its status is that of its first item: the others may be good. Everything sent has
an event id from here, so that what arrives twice counts once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

log = logging.getLogger("understudy_client")

ITEM_BYTES = 256 << 10
BATCH_BYTES = 1 << 20
REPLY_BYTES = 4 << 20
FIRST_PAUSE, LONGEST_PAUSE, LONGEST_TOLD = 0.25, 30.0, 3600.0
"""Seconds: after the first failure, after many, and at most as the gateway asks."""
LINGER = 10.0
"""Seconds that the thread stays with nothing to do."""
_PER_ITEM = (400, 401, 403, 413)
"""Statuses of a batch that need not hold for each of its items."""


class Item(NamedTuple):
    """One item of feedback as it will be sent."""

    number: int
    put_at: float
    about: str
    tokened: bool
    body: bytes


class Reply(NamedTuple):
    """What came back for a batch."""

    status: int
    body: Mapping[str, Any]
    retry_after: float | None = None
    """Seconds."""


class Verdict(NamedTuple):
    """What a reply means for a batch. Items in none of the lists are on the gateway's disk."""

    refused: Sequence[Item] = ()
    limited: Sequence[Item] = ()
    """To be sent again after Retry-After."""
    back: Sequence[Item] = ()
    """To be sent again before all others."""
    pause: bool = False
    """Nothing else may be sent for a while either."""
    smaller: bool = False
    why: str = ""


def judge(reply: Reply, batch: Sequence[Item]) -> Verdict:
    """What to do with the items of a batch."""
    status, body = reply.status, reply.body
    if status == 202 and isinstance(body.get("accepted"), int):
        problems = {problem["index"]: problem for problem in body.get("errors", [])}
        sorry = [(item, problems[i]["status"] == 429) for i, item in enumerate(batch) if i in problems]
        why = next((problem["message"] for problem in problems.values() if problem["status"] != 429), "")
        return Verdict([item for item, later in sorry if not later], [item for item, later in sorry if later], why=why)
    said = body.get("error")
    error: Mapping[str, Any] = said if isinstance(said, dict) else {}
    why = f"{status} {error.get('message', '')}".strip()
    if status == 429:
        return Verdict(limited=batch, pause=True, why=why)
    if status < 300 or status in (408, 425) or status >= 500:
        return Verdict(back=batch, pause=True, why=why)
    with_token = [item for item in batch if item.tokened]
    if status == 401 and error.get("code") == "invalid_api_key" and len(with_token) < len(batch):
        return Verdict(refused=[item for item in batch if not item.tokened], back=with_token, why=why)
    if status in _PER_ITEM and len(batch) > 1:
        return Verdict(back=batch, smaller=True, why=why)
    return Verdict(refused=batch, why=why)


def pause_after(failures: int, told: float | None, chance: float) -> float:
    """Seconds to wait after so many failures in a row; never less than was asked for. `chance`: from 0 to 1."""
    if told is not None:
        return max(FIRST_PAUSE, min(told, LONGEST_TOLD)) * (1.0 + 0.1 * chance)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 20)) * (0.5 + 0.5 * chance)


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds of a Retry-After header, which has seconds or a date (RFC 9110, 10.2.3); None if it has neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would become a GET, and the key would go elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Sender:
    """Sends what is put, from one daemon thread that lives while there is something to send."""

    def __init__(
        self, url: str, headers: Mapping[str, str], max_queue: int, batch: int, flush_every: float, timeout: float
    ) -> None:
        self.timeout = timeout
        self._url, self._headers = url, dict(headers)
        self.closed = False
        self._max_queue, self._batch, self._flush_every = max_queue, batch, flush_every
        self._reset()
        _watch(self)

    def _reset(self) -> None:
        """As new, in a forked child too: what the parent queued is the parent's to send."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._opener: urllib.request.OpenerDirector | None = None
        self._queue: deque[Item] = deque()
        self._limited: deque[Item] = deque()
        self._pending: dict[int, None] = {}  # numbers of all that is not settled, oldest first
        self._last = self._hurried = 0
        self._limited_until = self._resume_at = 0.0
        self._told = False
        self._failures, self._size = 0, self._batch
        self._complained: set[str] = set()
        self.accepted = self.dropped = self.refused = self.invalid = 0

    def __len__(self) -> int:
        return len(self._pending)

    def put(self, about: str, tokened: bool, body: bytes) -> None:
        """Queue one item; a full queue or a closed sender drops it."""
        with self._changed:
            if not self.closed and len(self._pending) < self._max_queue and self._alive():
                self._last += 1
                self._pending[self._last] = None
                self._queue.append(Item(self._last, time.monotonic(), about, tokened, body))
                if len(self._queue) in (1, self._batch):
                    self._changed.notify_all()
                return
            self.dropped += 1
        self.complain("dropped", "feedback is dropped: %s", "closed" if self.closed else "the queue is full")

    def reject(self, error: Exception) -> None:
        """Count what could not even be queued."""
        with self._changed:
            self.invalid += 1
        self.complain("invalid", "feedback is not sent: %s: %s", type(error).__name__, error)

    def flush(self, timeout: float) -> bool:
        """Send what is queued now without waiting for more; False if that took longer than `timeout` seconds."""
        with self._changed:
            mark = self._hurried = self._last
            if not self._told:
                self._resume_at = 0.0
            self._changed.notify_all()
            return self._changed.wait_for(lambda: next(iter(self._pending), mark + 1) > mark, timeout)

    def close(self, timeout: float) -> bool:
        """Flush; what is put from now on is dropped, and what is left after `timeout` seconds too. False if any was."""
        with self._changed:
            self.closed = True
        done = self.flush(timeout)
        with self._changed:
            left, thread = len(self._pending), self._thread
            self.dropped += left
            for waiting in (self._pending, self._queue, self._limited):
                waiting.clear()
            self._changed.notify_all()
        if left:
            self.complain("left", "%d items of feedback are dropped: they were not taken in time", left)
        elif thread is not None:
            thread.join(timeout)
        return done

    def complain(self, about: str, message: str, *values: object) -> None:
        """Warn of each sort of trouble once, and then whisper. An app's log handler must not stop us."""
        level = logging.DEBUG if about in self._complained else logging.WARNING
        self._complained.add(about)
        with contextlib.suppress(Exception):
            log.log(level, message, *values)

    def _alive(self) -> bool:
        """Whether the thread runs, or could be started (at the interpreter's end it cannot)."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="understudy-feedback", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
                self._thread = thread
        return self._thread is not None

    # For the thread.

    def _run(self) -> None:
        while batch := self._next():
            told = None
            try:
                reply = self._post(batch)
                told, verdict = reply.retry_after, judge(reply, batch)
            except Exception as error:  # no network, no HTTP, no gateway: whatever it is, the thread must live
                verdict = Verdict(back=batch, pause=True, why=f"{type(error).__name__}: {error}")
            self._settle(batch, verdict, told)

    def _next(self) -> list[Item]:
        """The next batch, when it is time for it; nothing when the thread may end."""
        with self._changed:
            while True:
                wait = self._wait(time.monotonic())
                if wait is None:
                    idle = self.closed or not self._changed.wait(LINGER)
                    if idle and not self._queue and not self._limited:
                        self._thread = None
                        return []
                elif wait > 0.0:
                    self._changed.wait(wait)
                elif batch := self._take(time.monotonic()):
                    return batch

    def _wait(self, now: float) -> float | None:
        """Seconds until there is something to send; None while there is nothing."""
        due = []
        if self._queue:
            first = self._queue[0]
            hurry = len(self._queue) >= self._size or first.number <= self._hurried
            due.append(now if hurry else first.put_at + self._flush_every)
        if self._limited:
            due.append(self._limited_until)
        return max(min(due), self._resume_at) - now if due else None

    def _take(self, now: float) -> list[Item]:
        if now >= self._limited_until:
            self._queue.extendleft(reversed(self._limited))
            self._limited.clear()
        held = {item.about for item in self._limited}
        batch: list[Item] = []
        size = 0
        while self._queue and len(batch) < self._size and size + len(self._queue[0].body) < BATCH_BYTES:
            item = self._queue.popleft()
            if item.about in held:
                self._limited.append(item)
            else:
                batch.append(item)
                size += len(item.body) + 1
        return batch

    def _post(self, batch: Sequence[Item]) -> Reply:
        body = b"[" + b",".join(item.body for item in batch) + b"]"
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        if self._opener is None:
            self._opener = urllib.request.build_opener(_NoRedirect)
        try:
            answer = self._opener.open(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            told = retry_after(answer.headers.get("retry-after"), time.time())
            return Reply(answer.status, _read(answer.read(REPLY_BYTES)), told)

    def _settle(self, batch: Sequence[Item], verdict: Verdict, told: float | None) -> None:
        now, chance = time.monotonic(), random.random()
        with self._changed:
            if not self._pending:  # closed meanwhile, and counted
                return
            again = {item.number for item in (*verdict.limited, *verdict.back)}
            settled = [item for item in batch if item.number not in again]
            for item in settled:
                del self._pending[item.number]
            kept = len(settled) - len(verdict.refused)
            self.accepted += kept
            self.refused += len(verdict.refused)
            self._queue.extendleft(reversed(verdict.back))
            if verdict.limited:
                self._limited.extend(verdict.limited)
                self._limited_until = now + pause_after(1, told or FIRST_PAUSE, chance)
            self._failures = self._failures + 1 if verdict.pause else 0
            self._told = verdict.pause and told is not None
            self._resume_at = now + pause_after(self._failures, told, chance) if verdict.pause else 0.0
            if verdict.smaller:
                self._size = len(batch) // 2
            elif kept:
                self._size = min(self._batch, 2 * self._size)
                self._complained.discard("away")
            self._changed.notify_all()
        if verdict.refused:
            self.complain("refused", "feedback is refused: %s", verdict.why)
        if verdict.pause:
            self.complain("away", "feedback waits, and is sent again: %s", verdict.why)


def _read(text: bytes) -> Mapping[str, Any]:
    """An answer's object; empty if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(text)
        if isinstance(body, dict):
            return body
    return {}


_senders: weakref.WeakSet[Sender] = weakref.WeakSet()
_watching = False


def _watch(sender: Sender) -> None:
    """Flush it when the interpreter ends, and empty it in a forked child."""
    global _watching
    if not _watching:
        _watching = True
        atexit.register(_leave)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_forked)
    _senders.add(sender)


def _leave() -> None:
    begun = time.monotonic()
    for sender in list(_senders):
        sender.close(max(0.0, begun + sender.timeout - time.monotonic()))


def _forked() -> None:
    for sender in list(_senders):
        sender._reset()
