"""Spans out: queued as facts after the last byte, written and posted in batches by one thread, as OTLP over HTTP.

Whoever queues one never waits. Spans are never the only copy of anything, so a dead collector costs a dropped span, and
those are counted. Resource, headers, certificates, compression, timeout and batches are what the variables say that
OpenTelemetry's SDK for Python reads (opentelemetry.io/docs/specs/otel/protocol/exporter), and what is refused for now
is sent again as the SDK does it.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import random
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
from msgspec.structs import replace
from opentelemetry.sdk.resources import Resource
from opentelemetry.util.re import parse_env_headers

from telemetry.events import Interaction, Signal
from telemetry.spans import answer_span, envelope, signal_span

log = logging.getLogger("understudy.spans")

MOST_WAITING = 2048
"""Spans that wait to be sent, those on their way included."""
PATIENCE = 5.0
"""Seconds that closing may take, and a batch where no variable says otherwise."""
AT_ONCE = 64
"""Spans written before others may have Python's lock, 0.5 ms: whoever answers would wait 4 ms for a batch."""
TRIES = 6
CREDENTIALS = "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER"
AGAIN = frozenset({429, 502, 503, 504})


class Spans:
    """Sends a span for each answer and each signal to the collector at `endpoint` (base URL, without /v1/traces).

    `dropped` is told how many were not sent, at once or later.
    """

    def __init__(self, endpoint: str, dropped: Callable[[int], None] = lambda _: None) -> None:
        self._collector = _Collector(f"{endpoint.rstrip('/')}/v1/traces")
        self._dropped = dropped
        self._batch = max(1, min(int(_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)), MOST_WAITING))
        self._delay = min(_number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000, threading.TIMEOUT_MAX)
        resource = Resource.create({"service.name": "understudy"})
        self._envelope = envelope(resource.attributes, resource.schema_url)
        self._queue: deque[tuple[Interaction, Signal | None]] = deque()
        self._room = MOST_WAITING
        self._wake, self._closing = threading.Event(), threading.Event()
        self._ends = float("inf")
        self._refusing = False
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    def answered(self, fact: Interaction) -> None:
        """Queue the span of one answer."""
        self._put(fact, None)

    def heard(self, signal: Signal, answer: Interaction) -> None:
        """Queue the span of one signal, about an answer."""
        self._put(answer, replace(signal, text=None, target=None))

    def close(self) -> None:
        """Send what is queued, for at most a few seconds."""
        self._room = 0
        self._ends = time.monotonic() + PATIENCE
        self._closing.set()
        self._wake.set()
        self._thread.join(PATIENCE + 0.2)
        if left := len(self._queue):
            self._dropped(left)

    def _put(self, answer: Interaction, signal: Signal | None) -> None:
        waiting = len(self._queue)
        if waiting >= self._room:
            self._dropped(1)
            return
        # What people wrote is large and no part of a span: it does not wait for a collector that hangs.
        self._queue.append((replace(answer, messages=None, answer=None, tool_calls=None), signal))
        if waiting + 1 >= self._batch and not self._wake.is_set():
            self._wake.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            if len(self._queue) < self._batch:
                self._wake.wait(self._delay)
            if self._queue:
                self._send_some()
            self._wake.clear()
        while self._queue and time.monotonic() < self._ends:
            self._send_some()
        self._collector.close()

    def _send_some(self) -> None:
        """Send what has waited longest. It stays in the queue meanwhile, where it counts as waiting."""
        taken = min(len(self._queue), self._batch)
        written = []
        for n in range(taken):
            if n % AT_ONCE == 0:
                time.sleep(0)
            if span := _written(*self._queue[n]):
                written.append(span)
        try:
            sent = len(written) if written and self._send(self._envelope(written)) else 0
        except Exception:  # whatever it is: the next ones may be taken
            log.exception("spans could not be sent; they are dropped and counted")
            sent = 0
        if sent or time.monotonic() < self._ends:  # else who closes counts them
            for _ in range(taken):
                self._queue.popleft()
            if taken > sent:
                self._dropped(taken - sent)

    def _send(self, body: bytes) -> bool:
        """Whether the collector took it, which is asked again while it is away or busy and there is time."""
        collector, ends = self._collector, time.monotonic() + self._collector.timeout
        packed = collector.pack(body)
        n = 0
        while True:
            n += 1
            ends = min(ends, self._ends)  # it may be closed meanwhile
            refused = collector.post(packed, ends - time.monotonic())
            if refused is None:
                self._refusing = False
                return True
            pause = 2 ** (n - 1) * random.uniform(0.8, 1.2) if refused.pause is None else refused.pause
            last = n == TRIES or (n > 1 and self._closing.is_set())
            if last or not refused.again or time.monotonic() + pause > ends:
                if not self._refusing:
                    log.warning("%s takes no spans: %s; they are dropped and counted", collector.host, refused.why)
                self._refusing = True
                return False
            self._closing.wait(pause)


class _Refused(NamedTuple):
    """Why a collector did not take a batch, whether it may the next time, and after how many seconds if it says so."""

    why: str
    again: bool
    pause: float | None = None


class _Collector:
    """Where batches are posted, with a connection that is kept."""

    def __init__(self, url: str) -> None:
        self._url, self.host = url, urlsplit(url).hostname
        self.timeout = _number(_named("TIMEOUT"), PATIENCE)
        self.pack, encoding = _packing((_said("COMPRESSION") or "none").strip().lower())
        if os.environ.get(CREDENTIALS) or os.environ.get(CREDENTIALS.replace("HTTP_", "HTTP_TRACES_")):
            log.warning("%s is not read here; say who we are by OTEL_EXPORTER_OTLP_HEADERS", CREDENTIALS)
        certificate, private = _said("CLIENT_CERTIFICATE"), _said("CLIENT_KEY")
        self._session = requests.Session()
        self._authorities = _said("CERTIFICATE")
        self._session.cert = (certificate, private) if certificate and private else certificate
        self._session.headers.update({"content-type": "application/x-protobuf", "user-agent": "understudy"})
        self._session.headers.update({**encoding, **parse_env_headers(_said("HEADERS") or "", liberal=True)})

    def post(self, body: bytes, timeout: float) -> _Refused | None:
        """What came of it; None if the collector took it."""
        try:
            answer = self._session.post(
                self._url, body, timeout=max(0.05, timeout), verify=self._authorities, allow_redirects=False
            )
        except requests.RequestException as error:  # its words may hold a header, or a URL that is a secret
            return _Refused(type(error).__name__, isinstance(error, (requests.ConnectionError, requests.Timeout)))
        except Exception as error:  # a file of certificates that is not there
            return _Refused(f"{type(error).__name__}: {error}", again=False)
        if answer.status_code < 300:
            return None
        return _Refused(
            f"it answered {answer.status_code}", answer.status_code in AGAIN, _pause(answer.headers.get("retry-after"))
        )

    def close(self) -> None:
        self._session.close()


def _written(answer: Interaction, signal: Signal | None) -> bytes | None:
    try:
        return answer_span(answer) if signal is None else signal_span(signal, answer)
    except Exception as error:  # one that cannot be written is no reason to lose the others
        log.warning("a span cannot be written: %s: %s", type(error).__name__, error)
        return None


def _packing(name: str) -> tuple[Callable[[bytes], bytes], dict[str, str]]:
    """How bodies are compressed, and the header that says so."""
    if name == "gzip":
        return partial(gzip.compress, compresslevel=1), {"content-encoding": name}
    if name == "deflate":
        return partial(zlib.compress, level=1), {"content-encoding": name}
    if name != "none":
        log.warning("OTEL_EXPORTER_OTLP_COMPRESSION: %r is not known; spans are not compressed", name)
    return bytes, {}


def _named(what: str) -> str:
    """The variable that says it of an exporter: the one for traces where that is set."""
    traces = f"OTEL_EXPORTER_OTLP_TRACES_{what}"
    return traces if os.environ.get(traces) else f"OTEL_EXPORTER_OTLP_{what}"


def _said(what: str) -> str | None:
    return os.environ.get(_named(what)) or None


def _number(name: str, default: float) -> float:
    """What a variable says if that is a number above 0."""
    written = os.environ.get(name)
    try:
        number = float(written or default)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        log.warning("%s: %r is no number above 0; it is %g", name, written, default)
        return default
    return number


def _pause(retry_after: str | None) -> float | None:
    """Seconds of a Retry-After (RFC 9110, 10.2.3)."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            at = parsedate_to_datetime(retry_after)
            seconds = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
