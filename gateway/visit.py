"""One request while it is here: what it asks for, and what came of it. Each leaves a fact (`gateway.recorder`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.arms import Lineup, Route
from gateway.auth import Identity
from gateway.openai import Ask, Fields
from gateway.upstream import Replica
from router.arms import Choice
from telemetry.events import new_id, random_hex

COPY_LIMIT = 4 * 1024 * 1024
"""Bytes of an answer that are kept to be read; a longer one is relayed whole and read in part."""


@dataclass(slots=True)
class Errand:
    """What a request asks for, and of which arm."""

    route: Route
    lineup: Lineup
    choice: Choice
    ask: Ask
    fields: Fields
    """As the app sent them."""
    who: Identity
    recalled: bool = False
    """The session had its arm already."""


@dataclass(slots=True)
class Visit:
    """One request while it is here: what is known so far, for the fact that it leaves."""

    endpoint: str
    headers: Mapping[bytes, bytes]
    at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    request_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    parent_span_id: str | None = None
    left: bool = False
    """The client closed the connection before its answer was complete."""
    status: int = 0
    error: str | None = None
    first_byte: float | None = None
    duration: float = 0.0
    attempts: int = 0
    upstream: str | None = None
    arm: str = ""
    """Who was asked last."""
    strip_usage: bool = False
    unopposed: bool = False
    """As `Answerer` has it."""
    characters: int = 0
    """Of the answer's text."""
    stream: bool = False
    copy: list[bytes] = field(default_factory=list)
    copied: int = 0

    def begin_trace(self) -> None:
        """Join the caller's trace (W3C Trace Context), or begin one."""
        parent = self.headers.get(b"traceparent", b"").decode("latin-1").split("-")
        if len(parent) >= 4 and parent[0] != "ff" and _is_id(parent[1], 32) and _is_id(parent[2], 16):
            self.trace_id, self.parent_span_id = parent[1], parent[2]
        else:
            self.trace_id = new_id()  # ids that begin with the time keep the journal's index in one place
        self.span_id = random_hex()[:16]

    def head(self, replica: Replica) -> bytes:
        """Begin an attempt at a replica, under a request id of its own; the header lines that it gets."""
        self.request_id = new_id()
        self.upstream = replica.url
        self.attempts += 1
        return b"content-type: application/json\r\naccept: */*\r\nx-request-id: %b\r\ntraceparent: 00-%b-%b-01\r\n" % (
            self.request_id.encode(), self.trace_id.encode(), self.span_id.encode(),
        )  # fmt: skip

    def keep(self, data: bytes) -> None:
        if self.copied < COPY_LIMIT:
            self.copy.append(data)
            self.copied += len(data)


def _is_id(text: str, length: int) -> bool:
    """An id as W3C Trace Context writes it: lower-case hex, not all zeros."""
    return len(text) == length and set(text) <= set("0123456789abcdef") and text.strip("0") != ""
