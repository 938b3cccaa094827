"""uvicorn's HTTP/1.1 protocol with what it lacks: limits on a request's head and on how long a client may take to send
it or to read an answer, errors in OpenAI's shape, and an ASGI extension `understudy.leaving` that tells at once when
the client leaves (a task that waits in `receive` for each request costs a sixth of the gateway's time)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
        self._told: Callable[[], None] | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def leaving(self, told: Callable[[], None] | None) -> None:
        """Call `told` when the client closes the connection, at once if it has; None to call nobody.

        One request at a time asks.
        """
        self._told = told
        if told is not None and self.transport.is_closing():
            told()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        if self._told is not None:
            self._told()

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
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
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
        self.scope["extensions"] = {"understudy.leaving": self.leaving}  # type: ignore[dict-item]
        super().on_headers_complete()

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
