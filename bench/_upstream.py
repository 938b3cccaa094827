"""An upstream that answers as vLLM does and costs little: asyncio protocols over uvloop.

    python _upstream.py PORT

How it answers is chosen by the beginning of the request's `user`: "delayed50-…" thinks for 50 ms first, "spaced-…"
writes a chunk each millisecond, "paced200-…" writes 200 chunks, one each 50 ms, each with the time when it was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import httptools
import uvloop
from _clock import Clock

CHUNKS = 64
GAP = 0.001
"""Seconds between the chunks of a spaced stream."""
PACE = 0.05
"""Seconds between the chunks of a paced stream."""
WORDS = "The quick brown fox jumps over the lazy dog while the gateway counts its microseconds. "


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


def event(request_id: str, more: dict[str, Any]) -> bytes:
    head = {"id": f"chatcmpl-{request_id}", "object": "chat.completion.chunk", "created": 1760000000, "model": "base"}
    return b"data: %b\n\n" % json.dumps(head | more, separators=(",", ":")).encode()


def choice(delta: dict[str, str], ends: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ends}]}


def events(request_id: str, usage: bool) -> list[bytes]:
    """The server-sent events of a stream of `CHUNKS` chunks, then usage if asked for, then [DONE]."""
    said = WORDS.split()
    bodies: list[dict[str, Any]] = []
    for n in range(CHUNKS):
        delta = {"content": f" {said[n % len(said)]}"} if n else {"role": "assistant", "content": ""}
        bodies.append(choice(delta, "stop" if n == CHUNKS - 1 else None))
    if usage:
        counts = {"prompt_tokens": 64, "total_tokens": 128, "completion_tokens": 64}
        bodies.append({"choices": [], "usage": counts})
    return [event(request_id, body) for body in bodies] + [b"data: [DONE]\n\n"]


_ID, _AT = "@request-id-goes-here@", "@time-goes-here@"
_WHOLE = answer(_ID).split(_ID.encode())
_STREAMS = {usage: [one.split(_ID.encode()) for one in events(_ID, usage)] for usage in (False, True)}
_STAMPED = event(_ID, choice({"content": f" at={_AT};"}, None)).split(_ID.encode())
_BEHAVIOUR = re.compile(r"(delayed|paced|spaced)(\d*)-")
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_END = b"0\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection of the server."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
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
        if self._url.startswith(b"/v1/traces"):  # the collector of spans
            self._reply(b"application/x-protobuf", b"")
        elif self._url.startswith(b"/v1/chat/completions/render"):  # vllm-router asks for the tokens first
            self._reply(b"application/json", self._id.join(_WHOLE))
        elif self._url.startswith(b"/v1/chat/completions"):
            self._chat(json.loads(self._body), self._id)
        elif self._url.startswith(b"/v1/models"):
            self._reply(b"application/json", b'{"object":"list","data":[{"id":"base","object":"model"}]}')
        else:
            self._reply(b"application/json", b"{}")

    def _chat(self, asked: dict[str, Any], name: bytes) -> None:
        found = _BEHAVIOUR.search(json.dumps(asked.get("user")))
        kind, number = (found[1], int(found[2] or 0)) if found else ("", 0)
        if kind == "delayed":
            self._clock.at(time.monotonic() + number / 1e3, self._answer, asked, name)
        elif kind == "paced":
            self._transport.write(_HEAD)
            self._pace(name, number, time.monotonic())
        elif kind == "spaced":
            self._transport.write(_HEAD)
            self._pour(iter(self._chunks(asked, name)), self._loop.time())
        else:
            self._answer(asked, name)

    def _chunks(self, asked: dict[str, Any], name: bytes) -> list[bytes]:
        usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        return [_chunk(name.join(one)) for one in _STREAMS[usage]]

    def _answer(self, asked: dict[str, Any], name: bytes) -> None:
        if self._transport.is_closing():
            return
        if asked.get("stream"):
            self._transport.write(_HEAD + b"".join(self._chunks(asked, name)) + _END)
        else:
            self._reply(b"application/json", name.join(_WHOLE))

    def _pour(self, chunks: Iterator[bytes], due: float) -> None:
        """Write a chunk each `GAP`; one that is late does not delay the next."""
        if self._transport.is_closing():
            return
        chunk = next(chunks, None)
        if chunk is None:
            self._transport.write(_END)
            return
        self._transport.write(chunk)
        self._loop.call_at(due + GAP, self._pour, chunks, due + GAP)

    def _pace(self, name: bytes, left: int, due: float) -> None:
        """Write a chunk each `PACE`, with the time when it was due; the last one ends the stream."""
        if self._transport.is_closing():
            return
        chunk = _chunk(name.join(_STAMPED).replace(_AT.encode(), b"%.6f" % due))
        if left > 1:
            self._transport.write(chunk)
            self._clock.at(due + PACE, self._pace, name, left - 1, due + PACE)
        else:
            self._transport.write(chunk + _chunk(b"data: [DONE]\n\n") + _END)

    def _reply(self, kind: bytes, body: bytes) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)
        )


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve(port: int) -> None:
    clock = Clock()
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(clock), "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(int(sys.argv[1])))
