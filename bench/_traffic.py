"""The crowd of clients before a measured gateway: raw HTTP/1.1 over keep-alive connections, asyncio over uvloop.

    python _traffic.py

A process of its own, which reads a JSON `Load` a line on stdin and prints a JSON `Tally` a line on stdout.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import httptools
import uvloop
from _clock import Clock
from _upstream import CHUNKS, WORDS

CONNECTIONS = 32
STALL = 30.0
"""Seconds without any answer after which a load gives up: what is unanswered counts as errors."""
_STAMP = re.compile(rb"at=([0-9.]+);")


@dataclass(slots=True)
class Load:
    """What is to be sent, and where. `rate` 0 keeps every connection busy; else requests a second, open loop."""

    port: int
    model: str
    shape: str
    requests: int
    rate: float = 0.0
    salt: str = ""
    key: str = "none"
    connections: int = CONNECTIONS
    delay_ms: int = 0
    """How long the upstream thinks before it answers."""
    chunks: int = CHUNKS
    """Of a stream whose `shape` is "stream_paced"."""
    routes: int = 1
    """More than 1: requests go round `model`-0, `model`-1, …"""


@dataclass(slots=True)
class Tally:
    """What came back, in seconds.

    `p50`, `p99`: from the time a request was due to its last byte; `first_…`: to its first; `late_…`: from the time a
    chunk of a paced stream was due at the upstream to when it came.
    """

    answered: int = 0
    errors: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    p50: float = math.nan
    p99: float = math.nan
    first_p50: float = math.nan
    first_p99: float = math.nan
    chunks: int = 0
    late_p50: float = math.nan
    late_p99: float = math.nan
    late_max: float = math.nan

    def fail(self, reason: str) -> None:
        self.errors += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


class Client(asyncio.Protocol):
    """One connection of the load generator; it asks `next_request` for work whenever it is free."""

    def __init__(self, crowd: Crowd) -> None:
        self._crowd = crowd
        self._parser: Any = None
        self._transport: asyncio.Transport | None = None
        self._due = 0.0
        self.busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def ask(self, request: bytes, due: float) -> None:
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._due, self.busy, self._size, self._tail = due, True, 0, b""
        self._chunks, self._rest, self._first = 0, b"", 0.0
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._first = self._first or time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}"[:80])

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        self._tail = (self._tail + data)[-32:]
        if self._crowd.load.shape == "stream_paced":
            self._hear(data)

    def _hear(self, data: bytes) -> None:
        """Chunks that say when they were due; one may come in two pieces."""
        now = time.monotonic()
        text, ended, self._rest = (self._rest + data).rpartition(b"\n\n")
        if ended:
            found = _STAMP.findall(text)
            self._chunks += len(found)
            self._crowd.late.extend([now - float(due) for due in found])

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"status {status}")
        elif self._crowd.load.shape == "unary":
            self._end(None if self._size > 500 else f"{self._size} bytes only")
        elif not self._tail.rstrip().endswith(b"data: [DONE]"):
            self._end("a stream without [DONE]")
        elif self._crowd.load.shape == "stream_paced" and self._chunks != self._crowd.load.chunks:
            self._end(f"{self._chunks} chunks of {self._crowd.load.chunks}")
        else:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self.busy:
            self._end("connection lost")

    def _end(self, reason: str | None) -> None:
        if self.busy:
            self.busy = False
            self._crowd.answered(self, self._due, self._first, reason)

    @property
    def connected(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Crowd:
    """All connections of one load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.tally = Tally()
        self.late: list[float] = []
        self._latencies: list[float] = []
        self._firsts: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._free: list[Client] = []
        self._clients: list[Client] = []
        self._due: deque[float] = deque()
        self._sent = 0
        self._done = self._loop.create_future()

    async def run(self) -> Tally:
        load = self.load
        for _ in range(min(load.connections, load.requests)):
            self._free.append(await self._connect())
        clock, began = Clock(), time.monotonic()
        if load.rate:
            clock.at(began, self._pace, clock, began, 0)
        else:
            for client in list(self._free):
                self._free.remove(client)
                self._send(client, time.monotonic())
        await self._finish()
        clock.close()
        tally = self.tally
        tally.seconds, tally.chunks = time.monotonic() - began, len(self.late)
        tally.p50, tally.p99, _ = quantiles(self._latencies)
        tally.first_p50, tally.first_p99, _ = quantiles(self._firsts)
        tally.late_p50, tally.late_p99, tally.late_max = quantiles(self.late)
        for client in self._clients:
            client.close()
        return self.tally

    def _pace(self, clock: Clock, began: float, n: int) -> None:
        """The n-th request is due; the next one will be."""
        if n + 1 < self.load.requests:
            clock.at(began + (n + 1) / self.load.rate, self._pace, clock, began, n + 1)
        self._is_due(began + n / self.load.rate)

    async def _connect(self) -> Client:
        _, client = await self._loop.create_connection(lambda: Client(self), "127.0.0.1", self.load.port)
        self._clients.append(client)
        return client

    async def _finish(self) -> None:
        seen = -1
        while not self._done.done():
            done, _ = await asyncio.wait([self._done], timeout=STALL)
            if done:
                break
            if self.tally.answered + self.tally.errors == seen:
                while self.tally.answered + self.tally.errors < self.load.requests:
                    self.tally.fail("no answer")
                break
            seen = self.tally.answered + self.tally.errors

    def _is_due(self, due: float) -> None:
        if self._free:
            self._send(self._free.pop(), due)
        else:
            self._due.append(due)

    def _send(self, client: Client, due: float) -> None:
        n, self._sent = self._sent, self._sent + 1
        client.ask(request(self.load, n), due)

    def answered(self, client: Client, due: float, first: float, reason: str | None) -> None:
        if reason is None:
            self.tally.answered += 1
            self._latencies.append(time.monotonic() - due)
            self._firsts.append(first - due)
        else:
            self.tally.fail(reason)
        if self.tally.answered + self.tally.errors >= self.load.requests:
            if not self._done.done():
                self._done.set_result(None)
        elif not client.connected:
            self._loop.create_task(self._replace())
        else:
            self._next(client)

    async def _replace(self) -> None:
        try:
            client = await self._connect()
        except OSError:
            return
        self._next(client)

    def _next(self, client: Client) -> None:
        if self._due:
            self._send(client, self._due.popleft())
        elif not self.load.rate and self._sent < self.load.requests:
            self._send(client, time.monotonic())
        else:
            self._free.append(client)


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 99th percentile, largest."""
    if not values:
        return math.nan, math.nan, math.nan
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))], ordered[-1]


def behaviour(load: Load) -> str:
    """What the upstream is asked to do; see `_upstream`."""
    if load.delay_ms:
        return f"delayed{load.delay_ms}"
    return {"stream_spaced": "spaced", "stream_paced": f"paced{load.chunks}"}.get(load.shape, "user")


def request(load: Load, n: int) -> bytes:
    """A chat of about 0.4 KB; each is a conversation of its own."""
    body: dict[str, Any] = {
        "model": load.model if load.routes == 1 else f"{load.model}-{n % load.routes}",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. " + WORDS},
            {"role": "user", "content": f"Question {load.shape}-{load.salt}-{n}: {WORDS}What does it count?"},
        ],
        "max_tokens": 128,
        "temperature": 0.7,
        "user": f"{behaviour(load)}-{n % 500}",
    }
    if load.shape != "unary":
        body["stream"] = True
    raw = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer %b\r\naccept: application/json\r\nuser-agent: bench\r\n"
        b"content-length: %d\r\n\r\n%b" % (load.key.encode(), len(raw), raw)
    )


def answer_loads() -> None:
    """The load generator's process: a JSON `Load` a line on stdin, a JSON `Tally` a line on stdout."""
    for line in sys.stdin:
        load = Load(**json.loads(line))

        async def run(load: Load = load) -> Tally:
            return await Crowd(load).run()

        try:
            tally = uvloop.run(run())
        except OSError as error:
            tally = Tally(errors=load.requests, reasons={str(error): load.requests})
        print(json.dumps(asdict(tally)), flush=True)


if __name__ == "__main__":
    answer_loads()
