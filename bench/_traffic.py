"""The two ends of a measured gateway: an upstream that answers as vLLM does, and a crowd of clients.

Both are asyncio protocols over uvloop, run as processes of their own: `python _traffic.py upstream PORT`, which serves
until it is stopped, and `python _traffic.py load`, which reads a JSON `Load` a line and prints a JSON `Tally` a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import httptools
import uvloop

CONNECTIONS = 32
CHUNKS = 64
GAP = 0.001
"""Seconds between the chunks of a spaced stream."""
STALL = 30.0
"""Seconds without any answer after which a load gives up: what is unanswered counts as errors."""
WORDS = "The quick brown fox jumps over the lazy dog while the gateway counts its microseconds. "


# The upstream: answers like vLLM, costs little.


def answer(request_id: str) -> bytes:
    """A whole chat completion of about 1 KB."""
    body = {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": (WORDS * 7)[:600], "refusal": None, "tool_calls": []},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 64, "total_tokens": 192, "completion_tokens": 128, "prompt_tokens_details": None},
        "prompt_logprobs": None,
    }
    return json.dumps(body, separators=(",", ":")).encode()


def events(request_id: str, usage: bool) -> list[bytes]:
    """The server-sent events of a stream of `CHUNKS` chunks, then usage if asked for, then [DONE]."""
    head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion.chunk", "created": 1760000000, "model": "base"}
    said = WORDS.split()
    bodies: list[dict[str, Any]] = []
    for n in range(CHUNKS):
        delta = {"content": f" {said[n % len(said)]}"} if n else {"role": "assistant", "content": ""}
        ends = "stop" if n == CHUNKS - 1 else None
        bodies.append(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ends}]})
    if usage:
        counts = {"prompt_tokens": 64, "total_tokens": 128, "completion_tokens": 64}
        bodies.append(head | {"choices": [], "usage": counts})
    return [b"data: %b\n\n" % json.dumps(b, separators=(",", ":")).encode() for b in bodies] + [b"data: [DONE]\n\n"]


_ID = "@request-id-goes-here@"
_WHOLE = answer(_ID).split(_ID.encode())
_STREAMS = {usage: [event.split(_ID.encode()) for event in events(_ID, usage)] for usage in (False, True)}


class Upstream(asyncio.Protocol):
    """One connection of the server."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body, self._id = b"", b"", b"0"

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-request-id":
            self._id = value

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._url.startswith(b"/v1/traces"):  # the collector, for --otel
            self._reply(b"application/x-protobuf", b"")
        elif self._url.startswith(b"/v1/chat/completions"):
            self._chat(json.loads(self._body))
        elif self._url.startswith(b"/v1/models"):
            self._reply(b"application/json", b'{"object":"list","data":[{"id":"base","object":"model"}]}')
        else:
            self._reply(b"application/json", b"{}")

    def _chat(self, asked: dict[str, Any]) -> None:
        if not asked.get("stream"):
            self._reply(b"application/json", self._id.join(_WHOLE))
            return
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        chunks = [_chunk(self._id.join(event)) for event in _STREAMS[usage]]
        head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        if "spaced" in json.dumps(asked.get("user")):
            self._transport.write(head)
            self._pour(iter(chunks), self._loop.time())
        else:
            self._transport.write(head + b"".join(chunks) + b"0\r\n\r\n")

    def _pour(self, chunks: Iterator[bytes], due: float) -> None:
        """Write a chunk each `GAP`; one that is late does not delay the next."""
        if self._transport.is_closing():
            return
        chunk = next(chunks, None)
        if chunk is None:
            self._transport.write(b"0\r\n\r\n")
            return
        self._transport.write(chunk)
        self._loop.call_at(due + GAP, self._pour, chunks, due + GAP)

    def _reply(self, kind: bytes, body: bytes) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)
        )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve_upstream(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


# The load: raw HTTP/1.1 over keep-alive connections.


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


@dataclass(slots=True)
class Tally:
    """What came back. Latencies (`p50`, `p99`) are seconds, from the time a request was due to its last byte."""

    answered: int = 0
    errors: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    p50: float = math.nan
    p99: float = math.nan

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
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}"[:80])

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        self._tail = (self._tail + data)[-32:]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"status {status}")
        elif self._crowd.load.shape == "unary":
            self._end(None if self._size > 500 else f"{self._size} bytes only")
        else:
            self._end(None if self._tail.rstrip().endswith(b"data: [DONE]") else "a stream without [DONE]")

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self.busy:
            self._end("connection lost")

    def _end(self, reason: str | None) -> None:
        if self.busy:
            self.busy = False
            self._crowd.answered(self, self._due, reason)

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
        self._latencies: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._free: list[Client] = []
        self._clients: list[Client] = []
        self._due: list[float] = []
        self._sent = 0
        self._done = self._loop.create_future()

    async def run(self) -> Tally:
        load = self.load
        for _ in range(min(CONNECTIONS, load.requests) if not load.rate else CONNECTIONS):
            self._free.append(await self._connect())
        began, epoch = time.perf_counter(), self._loop.time()  # the loop's clock has steps of a millisecond
        if load.rate:
            for n in range(load.requests):
                after = n / load.rate
                self._loop.call_at(epoch + after, self._is_due, began + after)
        else:
            for client in list(self._free):
                self._free.remove(client)
                self._send(client, time.perf_counter())
        await self._finish()
        self.tally.seconds = time.perf_counter() - began
        if ordered := sorted(self._latencies):
            self.tally.p50, self.tally.p99 = (ordered[int(q * len(ordered))] for q in (0.50, 0.99))
        for client in self._clients:
            client.close()
        return self.tally

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

    def answered(self, client: Client, due: float, reason: str | None) -> None:
        now = time.perf_counter()
        if reason is None:
            self.tally.answered += 1
            self._latencies.append(now - due)
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
            self._send(client, self._due.pop(0))
        elif not self.load.rate and self._sent < self.load.requests:
            self._send(client, time.perf_counter())
        else:
            self._free.append(client)


def request(load: Load, n: int) -> bytes:
    """A chat of about 0.4 KB; each is a conversation of its own."""
    body: dict[str, Any] = {
        "model": load.model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. " + WORDS},
            {"role": "user", "content": f"Question {load.salt}-{n}: {WORDS}What does it count?"},
        ],
        "max_tokens": 128,
        "temperature": 0.7,
        "user": f"{'spaced' if load.shape == 'stream_spaced' else 'user'}-{n % 500}",
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
    if sys.argv[1] == "load":
        answer_loads()
    else:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(serve_upstream(int(sys.argv[2])))
