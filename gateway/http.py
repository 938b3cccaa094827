"""uvicorn's HTTP/1.1 protocol with what it lacks: limits on a request's head and on how long a client may take to send
it or to read an answer, errors in OpenAI's shape, and an ASGI extension, `understudy.client`: who made the request, to
be written to at once, and who tells at once when it leaves (`gateway.asgi.Client`).

A message to `send` costs a coroutine, and checks that bytes from a parsed answer do not need; a task that waits in
`receive` for the client to leave costs a sixth of the gateway's time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.asgi import EXTENSION, Headers
from gateway.openai import error_body


def protocol(
    max_header_bytes: int, head_seconds: float = 60.0, stall_seconds: float = 120.0
) -> type[HttpToolsProtocol]:
    """A protocol class that answers 431 to a head of more than `max_header_bytes`, and closes.

    It also closes when a head is not whole `head_seconds` after the connection was made (or after a later head began),
    and when a client that has more to read than the buffers hold reads next to nothing for `stall_seconds`.
    """
    limits = {"limit": max_header_bytes, "head_seconds": head_seconds, "stall_seconds": stall_seconds}
    return type("Protocol", (_Protocol,), limits)


class _HeadTooLarge(Exception):
    """Raised in a parser's callback, where it becomes the parser's error."""


class _Protocol(HttpToolsProtocol):
    limit = 64 * 1024
    head_seconds = 60.0
    stall_seconds = 120.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._unparsed = 0
        self._parsed = 0
        self._too_large = False
        self.running: RequestResponseCycle | None = None
        """Of pipelined requests the one that is answered; `cycle` is the last one that came."""
        self.told: Callable[[], None] | None = None
        """Whom to tell when the client leaves."""
        self.on_full: Callable[[bool], None] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.running is not None:
            self.running.disconnected = True
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        if self.told is not None:
            self.told()

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        super().data_received(data)
        # A name or a value without end reaches no callback, so what has come without completing a head counts too.
        if self._in_head and self._unparsed and not self.transport.is_closing():
            if self._unparsed > self.limit:
                self._too_large = True
                self.send_400_response("")
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # an earlier request is still being answered
            self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)
        elif not self.transport.is_closing():
            if self._unparsed:
                text = f"the request's head was not whole after {self.head_seconds:g} s"
                self._refuse(HTTPStatus.REQUEST_TIMEOUT, text)
            else:
                self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.on_full is not None:
            self.on_full(True)
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_full is not None:
            self.on_full(False)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def on_message_begin(self) -> None:
        self._in_head, self._parsed = True, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parsed += len(name) + len(value) + 4
        if self._parsed > self.limit:
            self._too_large = True
            raise _HeadTooLarge
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self.scope["extensions"] = {EXTENSION: self._client}  # type: ignore[dict-item]
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = cycle
        super()._start_asgi_task(cycle, app)

    def _client(self) -> Client:
        return Client(self)

    def on_message_complete(self) -> None:
        self._in_head, self._unparsed = True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        status, text = HTTPStatus.BAD_REQUEST, "this is not HTTP/1.1 as we know it"
        if self._too_large:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            text = f"the request's head is larger than {self.limit} bytes, the limit here (`listen.max_header_bytes`)"
        self._refuse(status, text)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        body = error_body(text, "invalid_request_error")
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Client:
    """The one whose request is being answered on a connection: what is written goes out at once."""

    __slots__ = ("_cycle", "_head", "_protocol", "_transport")

    def __init__(self, protocol: _Protocol) -> None:
        self._protocol = protocol
        self._transport = protocol.transport
        assert protocol.running is not None
        self._cycle = protocol.running
        self._head = b""

    @property
    def on_full(self) -> Callable[[bool], None] | None:
        return self._protocol.on_full

    @on_full.setter
    def on_full(self, told: Callable[[bool], None] | None) -> None:
        self._protocol.on_full = told

    @property
    def full(self) -> bool:
        return self._protocol.flow.write_paused

    def leaving(self, told: Callable[[], None] | None) -> None:
        self._protocol.told = told
        if told is not None and self._transport.is_closing():
            told()

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self._start(status, headers, b"content-length: %d\r\n" % len(body))
        self._out(self._head + body)
        self._complete()

    def begin(self, status: int, headers: Headers) -> None:
        self._start(status, headers, b"transfer-encoding: chunked\r\n")

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"%b%x\r\n%b\r\n" % (self._head, len(data), data))
        self._head = b""

    def end(self, data: bytes = b"") -> None:
        last = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        self._out(self._head + last)
        self._complete()

    async def finish(self) -> None:
        pass

    def _start(self, status: int, headers: Headers, framing: bytes) -> None:
        """Keep the head until there is something to send with it."""
        cycle = self._cycle
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        lines = [b"%b: %b\r\n" % line for line in cycle.default_headers]
        lines += [b"%b: %b\r\n" % line for line in headers]
        close = b"" if cycle.keep_alive else b"connection: close\r\n"
        self._head = b"%b%b%b%b\r\n" % (STATUS_LINE[status], b"".join(lines), framing, close)

    def _out(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def _complete(self) -> None:
        """As uvicorn's own `send` ends an answer."""
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()
