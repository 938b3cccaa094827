"""uvicorn's HTTP/1.1 protocol with what it lacks: a limit on a request's head, errors in OpenAI's shape, and an ASGI
extension `understudy.leaving` that tells at once when the client leaves (a task that waits in `receive` for each
request costs a sixth of the gateway's time)."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.openai import error_body


def protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """A protocol class that answers 431 to a head of more than `max_header_bytes`, and closes."""
    return type("Protocol", (_Protocol,), {"limit": max_header_bytes})


class _HeadTooLarge(Exception):
    """Raised in a parser's callback, where it becomes the parser's error."""


class _Protocol(HttpToolsProtocol):
    limit = 64 * 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._unparsed = 0
        self._parsed = 0
        self._too_large = False
        self._told: Callable[[], None] | None = None

    def leaving(self, told: Callable[[], None] | None) -> None:
        """Call `told` when the client closes the connection; None to call nobody. One request at a time asks."""
        self._told = told

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._told is not None:
            self._told()

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        super().data_received(data)
        # A name or a value without end reaches no callback, so what has come without completing a head counts too.
        if self._in_head and self._unparsed > self.limit and not self.transport.is_closing():
            self._too_large = True
            self.send_400_response("")

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
        body = error_body(text, "invalid_request_error")
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
