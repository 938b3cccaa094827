"""Telling somebody's URL what happened: a bounded queue and one thread that posts JSON from it.

Whoever tells never waits and never sees an error. What is told is posted in order, each at most `TRIES` times, so a
receiver may see one twice (decisions carry an `event_id`); while it is away the newest `limit` wait and older ones are
dropped and counted. A URL may be a secret (Slack's and others' are), so nothing that is said of it names more than its
host.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

log = logging.getLogger("understudy.webhook")

TRIES = 3
BACKOFF = 1.0
"""Seconds before the second try; before the third four times that."""
TIMEOUT = 5.0
"""Seconds without a byte after which a try has failed."""
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class Webhook:
    """Posts to one URL. Starts its thread when first told something. Raises ValueError for what is no web URL."""

    def __init__(
        self,
        url: str,
        *,
        limit: int = 1000,
        backoff: float = BACKOFF,
        timeout: float = TIMEOUT,
        report: Callable[[str], None] = log.warning,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a webhook's URL must begin with http:// or https:// and name a host")
        self.posted = self.dropped = self.failed = 0
        """Told, left out since the queue was full (or at the end), given up after all tries."""
        self._url, self._host = url, parts.hostname
        self._backoff, self._timeout, self._report = backoff, timeout, report
        self._queue: deque[bytes] = deque()
        self._limit = limit
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._ends = float("inf")
        self._thread: threading.Thread | None = None
        self._opener = urllib.request.build_opener(_NoRedirect)

    def tell(self, what: Mapping[str, Any]) -> None:
        """Queue it. Returns at once, and raises nothing."""
        try:
            body = msgspec.json.encode(what)
        except Exception as error:  # whatever it is made of is no business of who tells it
            self.failed += 1
            self._report(f"webhook at {self._host}: cannot be written as JSON: {error}")
            return
        with self._lock:
            if self._closing.is_set():
                self.dropped += 1
                return
            if len(self._queue) >= self._limit:
                self._queue.popleft()
                self.dropped += 1
                if self.dropped == 1:
                    self._report(f"webhook at {self._host}: {self._limit} notices wait; the oldest are dropped")
            self._queue.append(body)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
                self._thread.start()
        self._wake.set()

    def close(self, patience: float = 3.0) -> None:
        """Post what waits, for `patience` seconds at most; then stop. What is left is counted as dropped."""
        with self._lock:
            self._ends = time.monotonic() + patience
            self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(patience + 0.1)
        left = len(self._queue)
        self._queue.clear()
        if left:
            self.dropped += left
            self._report(f"webhook at {self._host}: {left} notices were not posted before the end")

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._queue and time.monotonic() < self._ends:
                try:
                    body = self._queue.popleft()
                except IndexError:  # `tell` made room meanwhile
                    break
                self._post(body)
            if self._closing.is_set():
                return

    def _post(self, body: bytes) -> None:
        said = ""
        for attempt in range(TRIES):
            if attempt:
                self._closing.wait(self._backoff * 4 ** (attempt - 1))
            if time.monotonic() >= self._ends:
                break
            said, again = self._try(body)
            if not said:
                self.posted += 1
                return
            if not again:
                break
        self.failed += 1
        self._report(f"webhook at {self._host}: a notice was given up: {said or 'no time is left'}")

    def _try(self, body: bytes) -> tuple[str, bool]:
        """What went wrong ("" if nothing), and whether to try again."""
        left = max(0.1, min(self._timeout, self._ends - time.monotonic()))
        headers = {"content-type": "application/json", "user-agent": "understudy"}
        try:
            request = urllib.request.Request(self._url, body, headers, method="POST")
            with self._opener.open(request, timeout=left):
                return "", False
        except urllib.error.HTTPError as error:
            error.close()
            return f"it answered {error.code}", error.code in AGAIN
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            return f"{type(reason).__name__}: {reason}".replace(self._url, "…"), True
        except Exception as error:  # a URL that cannot be asked for: it will not get better
            return type(error).__name__, False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer that is no good: what was posted must not go where nobody wrote that it should."""

    def redirect_request(self, *_: Any) -> None:
        return None
