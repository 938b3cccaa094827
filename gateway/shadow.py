"""Copies of real requests for a challenger whose answers nobody sees, beside those that were shown.

A copy is made after the client has its last byte, waits in a short queue, and leaves one `Shadow` fact. Real requests
come first: a copy that finds no room, or the worker busy, is dropped and counted. Nothing is executed: a tool call is
text here, so a copy has no effect but the work of writing its answer. Requests that would have one are not copied: the
upstream keeps the answer, or runs a tool of the Responses API itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace
from prometheus_client import Counter

from gateway.arms import Lineups, Route, dress
from gateway.openai import Answer, Ask, Fields, read_answer, read_stream
from gateway.replicas import Reading, Replicas
from gateway.upstream import Replica, UpstreamError
from router.bandit import unit_hash
from telemetry.events import Interaction, Shadow, new_id
from telemetry.privacy import Captures

log = logging.getLogger("understudy.gateway")

MOST_WAITING = 64
MOST_BYTES = 8 << 20
"""Of the bodies that wait."""
AT_ONCE = 2
BUSY = 200
"""Real requests in this worker at which copies give way."""
LONGEST = 120.0
"""Seconds that an answer may take, however steadily it comes, beyond twice those of the one that was shown."""
MOST_READ = 4 << 20
"""Bytes of a stream."""
"""Bytes of an answer that are read; a longer one is stopped, and is no worse for it."""


class _Tool(msgspec.Struct, frozen=True):
    type: str = ""


_tools = msgspec.json.Decoder(list[_Tool] | None)


@dataclass(frozen=True, slots=True)
class _Copy:
    route: Route
    path: str
    body: bytes
    consent: str | None
    shown: Shadow
    """The fact, as far as it is known: of the answer that was shown."""


class Shadows:
    """The copies of one worker. Belongs to its event loop."""

    def __init__(
        self,
        lineups: Lineups,
        replicas: Replicas,
        captures: Captures,
        dropped: Counter,
        journal: Callable[[Shadow], None],
    ) -> None:
        self.busy = 0
        """Real requests that are being answered now."""
        self._lineups = lineups
        self._replicas = replicas
        self._captures = captures
        self._dropped = dropped
        self._journal = journal
        self._waiting: deque[_Copy] = deque()
        self._bytes = 0
        self._answering: dict[asyncio.Task[None], _Copy] = {}

    def consider(self, route: Route, ask: Ask, fields: Fields, fact: Interaction, characters: int) -> None:
        """Copy the request that was answered, if it is one of the share. `fields`: as the app sent them."""
        lineup = self._lineups.of(route.name)
        snapshot = lineup.snapshot
        if snapshot.shadow <= 0.0 or unit_hash("shadow", fact.request_id) >= snapshot.shadow:
            return
        arm = lineup.arms.get(snapshot.challenger)
        if arm is None or fact.answerer.arm == snapshot.challenger or not _is_comparable(fact):
            return
        if self.busy > BUSY or len(self._waiting) >= MOST_WAITING:
            self._dropped.labels(route.name).inc()
            return
        copied = dict(fields)
        try:
            dress(copied, fact.endpoint, ask, arm)
        except msgspec.MsgspecError:  # messages that no system prompt can be put before: no replica would take them
            return
        if fact.endpoint == "responses":
            if _has_effects(ask, copied):
                return
            copied["store"] = msgspec.Raw(b"false")
        body = msgspec.json.encode(copied)
        if self._bytes + len(body) > MOST_BYTES:
            self._dropped.labels(route.name).inc()
            return
        shown = _shown(fact, characters, snapshot.rollout, snapshot.challenger)
        self._waiting.append(_Copy(route, f"/v1/{fact.endpoint}", body, fact.consent, shown))
        self._bytes += len(body)
        self._begin()

    def drop_stale(self) -> None:
        """Forget the copies for a challenger that is in the shadow no more, those being answered too."""
        if self._waiting and not all(self._wanted(copy) for copy in self._waiting):
            self._waiting = deque(copy for copy in self._waiting if self._wanted(copy))
            self._bytes = sum(len(copy.body) for copy in self._waiting)
        for task, copy in self._answering.items():
            if not self._wanted(copy):
                task.cancel()

    async def close(self) -> None:
        """Drop all of them."""
        self._waiting.clear()
        answering = list(self._answering)
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)

    def _wanted(self, copy: _Copy) -> bool:
        now = self._lineups.of(copy.route.name).snapshot
        return now.shadow > 0.0 and (now.rollout, now.challenger) == (copy.shown.rollout, copy.shown.model)

    def _begin(self) -> None:
        """Have as many answered as may be at once."""
        while self._waiting and len(self._answering) < AT_ONCE:
            copy = self._waiting.popleft()
            self._bytes -= len(copy.body)
            if self.busy > BUSY:
                self._dropped.labels(copy.route.name).inc()
            elif self._wanted(copy):
                task = asyncio.create_task(self._answer(copy))
                self._answering[task] = copy
                task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._answering[task]
        if not task.cancelled() and (failure := task.exception()) is not None:
            log.error("a copy of a request failed in the gateway", exc_info=failure)
        self._begin()

    async def _answer(self, copy: _Copy) -> None:
        """Ask the challenger, read what it says to the end, and leave the fact."""
        at, started = time.time(), time.perf_counter()
        answer, error, first_byte = Answer(), None, None
        try:
            async with asyncio.timeout(LONGEST + 2.0 * copy.shown.shown_duration):
                session, body = (copy.shown.of,), copy.body  # any replica is as good
                reply = await self._replicas.ask(copy.route, copy.shown.model, session, copy.path, _head, body)
                if reply is None:  # it is loaded nowhere now, which says nothing about its answers
                    self._dropped.labels(copy.route.name).inc()
                    return
                answer, first_byte = await _read(reply, started)
                error = "upstream_error" if reply.status >= 400 else _flaw(answer)
        except UpstreamError as failure:
            error = failure.kind
        except TimeoutError:
            error = "upstream_timeout"
        shown = copy.shown
        capture = self._captures.of(shown.route, shown.tenant, copy.consent)
        kept, redacted = capture.keep(None, answer.text, answer.tool_calls)
        fact = replace(
            shown,
            event_id=new_id(),
            at=at,
            error=error,
            duration=time.perf_counter() - started,
            first_byte=first_byte,
            tokens_out=answer.tokens_out,
            characters=len(answer.text),
            finish_reason=answer.finish_reason if error is None else "error",
            redacted=redacted,
            answer=kept.answer,
            tool_calls=kept.tool_calls,
        )
        self._journal(fact)


def _is_comparable(fact: Interaction) -> bool:
    """Whether another answer could stand beside the one that was shown.

    Failures that are the upstream's are compared too: without them the challenger alone could fail.
    """
    if fact.endpoint == "embeddings" or fact.answerer.policy == "pinned":
        return False
    return fact.error not in ("client_left", "internal") and not 400 <= fact.status < 500


def _has_effects(ask: Ask, fields: Fields) -> bool:
    """Whether a request to the Responses API changes what is kept at the upstream, or has it run tools."""
    if any(bytes(fields.get(name, b"")) == b"true" for name in ("store", "background")):
        return True
    try:
        tools = _tools.decode(fields.get("tools", b"null"))
    except msgspec.MsgspecError:
        return True
    run_there = any(tool.type not in ("function", "custom") for tool in tools or ())
    return run_there or ask.previous_response_id is not None or "conversation" in fields


def _shown(fact: Interaction, characters: int, rollout: str, challenger: str) -> Shadow:
    return Shadow(
        event_id="",
        at=0.0,
        route=fact.route,
        tenant=fact.tenant,
        rollout=rollout,
        model=challenger,
        of=fact.request_id,
        user=fact.user,
        shown_error=fact.error,
        shown_duration=fact.duration,
        shown_first_byte=fact.first_byte,
        shown_tokens_out=fact.tokens_out,
        shown_characters=characters,
    )


def _head(_: Replica) -> bytes:
    return b"content-type: application/json\r\naccept: */*\r\nx-request-id: %b\r\n" % new_id().encode()


async def _read(reply: Reading, started: float) -> tuple[Answer, float | None]:
    """What an answer says, and the seconds to its first byte; to its last, where it is no stream, as for real ones."""
    parts, size, first_byte = list[bytes](), 0, None
    try:
        while size < MOST_READ and (data := await reply.read()):
            if first_byte is None and reply.streams:
                first_byte = time.perf_counter() - started
            parts.append(data)
            size += len(data)
    finally:
        reply.abort()
    body = b"".join(parts)
    answer = read_stream(body) if reply.streams else read_answer(body)
    answer.unreadable = answer.unreadable and size < MOST_READ
    return answer, first_byte if reply.streams else time.perf_counter() - started


def _flaw(answer: Answer) -> str | None:
    if answer.failed:
        return "upstream_error"
    return "upstream_garbage" if answer.unreadable else None
