"""The ASGI messages that our endpoints read and write (https://asgi.readthedocs.io, HTTP), and the client behind them.

A generated answer does not go through `send`: each message there is a coroutine, and one for each word of a stream is
what makes a gateway slow. It goes to a `Client`. Our own server offers one that writes to the connection at once
(`gateway.http`, the extension `understudy.client`); before any other server it is a `Plain` one, over `send`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Protocol, cast

import msgspec

from gateway.openai import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

EXTENSION = "understudy.client"
PATIENCE = 60.0
HIGH_WATER = 64 * 1024
"""Bytes that wait for a plain server, above which no more should be written."""


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


class Client(Protocol):
    """Who waits for an answer. Nothing here waits but `finish`; what is written to one that left is dropped."""

    on_full: Callable[[bool], None] | None
    """Told True when no more should be written for now, False when it may be."""

    @property
    def full(self) -> bool: ...

    def leaving(self, told: Callable[[], None] | None) -> None:
        """Call `told` when the client closes the connection, at once if it has; None to call nobody."""

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer; its length is added to the headers."""

    def begin(self, status: int, headers: Headers) -> None:
        """The head of an answer whose body is to be written piece by piece."""

    def write(self, data: bytes) -> None: ...

    def end(self, data: bytes = b"") -> None:
        """The last piece."""

    async def finish(self) -> None:
        """Until all has been handed over to the server, or the client has left."""


def client_of(scope: Scope, receive: Receive, send: Send) -> Client:
    """Who is behind a request whose body has been read."""
    offered = (scope.get("extensions") or {}).get(EXTENSION)
    return cast(Client, offered()) if offered is not None else Plain(receive, send)


class Plain:
    """A client before a server that knows nothing but ASGI."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self.on_full: Callable[[bool], None] | None = None
        self._receive, self._send = receive, send
        self._waiting: deque[MutableMapping[str, Any]] = deque()
        self._bytes = 0
        self._left = False
        self._failed: Exception | None = None
        self._sending: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._told: Callable[[], None] | None = None

    @property
    def full(self) -> bool:
        return self._bytes > HIGH_WATER

    def leaving(self, told: Callable[[], None] | None) -> None:
        self._told = told
        if told is None and self._watching is not None:
            self._watching.cancel()
        elif told is not None and self._watching is None:
            self._watching = asyncio.ensure_future(self._watch())

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.begin(status, [*headers, (b"content-length", b"%d" % len(body))])
        self.end(body)

    def begin(self, status: int, headers: Headers) -> None:
        self._put({"type": "http.response.start", "status": status, "headers": headers})

    def write(self, data: bytes) -> None:
        self._put({"type": "http.response.body", "body": data, "more_body": True})

    def end(self, data: bytes = b"") -> None:
        self.leaving(None)  # servers say that it left once its answer is complete
        self._put({"type": "http.response.body", "body": data})

    async def finish(self) -> None:
        if self._sending is not None:
            await self._sending
        if self._failed is not None and not isinstance(self._failed, OSError):
            raise self._failed

    def _put(self, message: MutableMapping[str, Any]) -> None:
        if self._left:
            return
        self._waiting.append(message)
        self._bytes += len(message.get("body", b""))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.ensure_future(self._send_all())
        if self.full and self.on_full is not None:
            self.on_full(True)

    async def _send_all(self) -> None:
        while self._waiting:
            message, was_full = self._waiting.popleft(), self.full
            try:
                await self._send(message)
            except Exception as error:  # an OSError says that the client left
                self._failed = error
                self._leave()
                return
            self._bytes -= len(message.get("body", b""))
            if was_full and not self.full and self.on_full is not None:
                self.on_full(False)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._sending is not None:
            self._sending.cancel()
        self._leave()

    def _leave(self) -> None:
        """Nothing can be sent any more."""
        self._left = True
        self._waiting.clear()
        self._bytes = 0
        if self.on_full is not None:
            self.on_full(False)
        if self._told is not None:
            self._told()


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit: int, patience: float = PATIENCE) -> bytes:
    """The request's body. Raises `ApiError` 413 before more than `limit` bytes are held, and `ClientLeft`.

    `patience`: seconds to wait for each piece after the first; then it raises `ApiError` 408.
    """
    if count(headers.get(b"content-length")) > limit:
        raise _too_large(limit)
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientLeft
    body: bytes = message.get("body", b"")
    if not message.get("more_body") and len(body) <= limit:
        return body
    parts, size = [body], len(body)
    while message.get("more_body"):
        if size > limit:
            break
        try:
            async with asyncio.timeout(patience):
                message = await receive()
        except TimeoutError:
            raise _too_slow(patience) from None
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


def _too_slow(patience: float) -> ApiError:
    close = ((b"connection", b"close"),)  # or the rest of the body could go on trickling in
    return ApiError(408, f"no byte of the body came for {patience:g} s", code="too_slow", headers=close)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is larger than {limit} bytes, the limit here (`listen.max_body`)", code="too_large")


def count(value: bytes | None) -> int:
    """A header's whole number, 0 if it is none."""
    return int(value[:18]) if value is not None and value.isdigit() else 0


async def send_error(send: Send, error: ApiError, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(error.body)),
                *error.headers,
                *(headers or ()),
            ],
        }
    )
    await send({"type": "http.response.body", "body": error.body})


async def send_json(send: Send, status: int, body: object, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    await respond(send, status, msgspec.json.encode(body), b"application/json", headers)


async def respond(send: Send, status: int, body: bytes, kind: bytes, more: Iterable[tuple[bytes, bytes]] = ()) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
