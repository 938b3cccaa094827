"""Arms at providers that do not speak OpenAI's wire format (Anthropic, Bedrock, Vertex, …), by litellm.

litellm takes seconds and hundreds of MB to import: it is imported here, when such an arm is first asked, off the
event loop. Its answers are OpenAI-shaped objects, which become the same bytes that a vLLM would have sent.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from gateway.openai import ApiError, Fields, error_body
from gateway.upstream import Cut, Reader, TimedOut, Timeouts, UpstreamError
from router.policy import Arm

_CALLS = {"chat/completions": "acompletion", "completions": "atext_completion", "embeddings": "aembedding"}
_PREFIXES = {"chat/completions": "chatcmpl-", "completions": "cmpl-", "embeddings": "embd-"}


async def ask(endpoint: str, arm: Arm, fields: Fields, request_id: str, timeouts: Timeouts) -> Reply:
    """Ask `arm`'s provider. An error that the provider answered is a reply with its status, as from any upstream."""
    if endpoint not in _CALLS:
        return Reply(404, error_body(f"/v1/{endpoint} is not served by provider arms", "invalid_request_error"))
    try:
        litellm = await asyncio.to_thread(importlib.import_module, "litellm")
    except ImportError:
        raise UpstreamError("this arm needs litellm: pip install 'understudy[providers]'") from None
    request: dict[str, Any] = {name: msgspec.json.decode(raw) for name, raw in fields.items()}
    request |= {
        "model": f"{arm.provider}/{arm.model}",
        "api_key": arm.api_key,
        "api_base": arm.api_base,
        "num_retries": 0,
        "extra_headers": {"x-request-id": request_id},
    }
    try:
        async with asyncio.timeout(timeouts.first_byte):
            answer = await getattr(litellm, _CALLS[endpoint])(**request)
            if not request.get("stream"):
                return Reply(200, _whole(answer, _PREFIXES[endpoint] + request_id))
            chunks = _events(answer, _PREFIXES[endpoint] + request_id)
            first = await anext(chunks, b"")
            return Reply(200, first, chunks, timeouts.idle)
    except TimeoutError:
        raise TimedOut(f"{arm.provider} sent nothing within {timeouts.first_byte:g} s") from None
    except (ApiError, UpstreamError):
        raise
    except Exception as error:  # litellm's errors share no base but their `status_code`
        status = getattr(error, "status_code", None)
        if not isinstance(status, int) or status < 400:
            raise UpstreamError(f"{arm.provider} failed: {type(error).__name__}") from error
        message = getattr(error, "message", None) or type(error).__name__
        reply = Reply(status, error_body(str(message), "upstream_error"))
        retry_after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after")
        if retry_after:
            reply.headers.append((b"retry-after", str(retry_after).encode("latin-1")))
        return reply


def _whole(answer: Any, answer_id: str) -> bytes:
    body = answer.model_dump(exclude_none=True)
    body["id"] = answer_id
    return msgspec.json.encode(body)


async def _events(answer: AsyncIterator[Any], answer_id: str) -> AsyncIterator[bytes]:
    async for chunk in answer:
        body = chunk.model_dump(exclude_none=True)
        body["id"] = answer_id
        yield b"data: " + msgspec.json.encode(body) + b"\n\n"
    yield b"data: [DONE]\n\n"


class Reply:
    """As `upstream.Reply`: status, headers, and a body to be read piece by piece."""

    def __init__(self, status: int, first: bytes, rest: AsyncIterator[bytes] | None = None, idle: float = 60.0) -> None:
        kind = b"application/json" if rest is None else b"text/event-stream; charset=utf-8"
        self.status = status
        self.headers: list[tuple[bytes, bytes]] = [(b"content-type", kind)]
        self.streams = rest is not None
        self._first = first
        self._rest = rest
        self._idle = idle

    async def read(self) -> bytes:
        first, self._first = self._first, b""
        if first or self._rest is None:
            return first
        try:
            async with asyncio.timeout(self._idle):
                return await anext(self._rest, b"")
        except TimeoutError:
            raise TimedOut(f"the provider was silent for {self._idle:g} s in the middle of its answer") from None
        except Exception as error:
            raise Cut(f"the provider broke off its answer: {type(error).__name__}") from error

    async def relay(self, put: Callable[[bytes], None], reader: Reader) -> None:
        """Have every piece `put`, no faster than `reader` takes it."""
        free = asyncio.Event()
        reader.on_full = lambda full: free.clear() if full else free.set()
        try:
            async for part in self._parts():
                put(part)
                if reader.full:
                    await free.wait()
        finally:
            reader.on_full = None

    async def read_all(self) -> bytes:
        return b"".join([part async for part in self._parts()])

    async def _parts(self) -> AsyncIterator[bytes]:
        while part := await self.read():
            yield part

    def abort(self) -> None:
        closing = getattr(self._rest, "aclose", None)
        if closing is not None:
            task = asyncio.ensure_future(closing())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._rest = None
