"""The ASGI messages that our endpoints read and write (https://asgi.readthedocs.io, HTTP)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

import msgspec

from gateway.openai import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


PATIENCE = 60.0


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


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
