"""What a request leaves: one `Interaction` fact to the journal's queue, made after its last byte.

Facts are made a few at a time: what is made together costs less, and no answer waits for it. They are made on the event
loop, which is never held for long, but large ones in a thread. Where that falls behind they are made on the loop after
all, so that callers wait and memory does not fill.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import msgspec

from gateway.asgi import count
from gateway.auth import Pseudonyms
from gateway.metrics import Metrics
from gateway.openai import prompt_in, read_answer, read_stream
from gateway.shadow import Shadows
from gateway.visit import COPY_LIMIT, Errand, Visit
from router.arms import Choice
from router.policy import Arm
from telemetry.events import Answerer, Interaction, Shadow, new_id
from telemetry.privacy import Capture, Captures, Kept
from telemetry.threads import thread_of

log = logging.getLogger("understudy.gateway")

SOON = 0.01
"""Seconds that a request which ended may wait for others to be recorded with."""
TOGETHER = 32
TURN = 0.002
"""Seconds after which others have a turn on the event loop."""
LARGE = 256 * 1024
"""Bytes of a prompt and its answer that are not read on the event loop: a millisecond's work."""
MASKING = 64
"""Bytes that are read as fast as one is masked."""
BEHIND = 32 * 1024 * 1024
"""Bytes that may wait for the thread."""
SHALLOW = 256
"""Brackets of a body that cannot be nested too deep for the journal's readers, whichever way they stand."""


class Recorder:
    """Makes the facts of one worker's requests. Belongs to its event loop."""

    def __init__(
        self,
        captures: Captures,
        pseudonyms: Pseudonyms,
        metrics: Metrics,
        journal: Callable[[Interaction | Shadow], None],
        shadows: Shadows,
    ) -> None:
        self._captures = captures
        self._pseudonyms = pseudonyms
        self._metrics = metrics
        self._journal = journal
        self._shadows = shadows
        self._ended: deque[tuple[Visit, Errand]] = deque()
        self._coming = False
        """A turn."""
        self._closed = False
        self._large: set[asyncio.Future[Interaction]] = set()
        self._behind = 0
        self._thread = ThreadPoolExecutor(1, "large-facts")

    def ended(self, visit: Visit, errand: Errand) -> None:
        """Nothing more will come of this request."""
        visit.duration = time.perf_counter() - visit.started
        if self._closed:
            self.record(visit, errand)
            return
        self._ended.append((visit, errand))
        if len(self._ended) >= TOGETHER:
            self._make_some()  # one at least, so that no more may wait than that
        if self._ended and not self._coming:
            self._coming = True
            asyncio.get_running_loop().call_later(SOON, self._turn)

    def __len__(self) -> int:
        """Facts that are still to be made."""
        return len(self._ended) + len(self._large)

    async def settled(self, seconds: float | None = None) -> None:
        """Until the facts of all requests that have ended are made, large ones for so long at most."""
        while self._ended:
            self._make(*self._ended.popleft())
        if self._large:
            await asyncio.wait(self._large, timeout=seconds)

    def record(self, visit: Visit, errand: Errand) -> None:
        """Make the fact of a request now, and leave it."""
        self._leave(visit, errand, partial(self._fact, visit, errand))

    async def close(self) -> None:
        """Until all facts are made."""
        self._closed = True
        await self.settled()
        self._thread.shutdown()

    def _turn(self) -> None:
        self._make_some()
        self._coming = bool(self._ended)
        if self._coming:
            asyncio.get_running_loop().call_soon(self._turn)

    def _make_some(self) -> None:
        until = time.perf_counter() + TURN
        while self._ended:
            self._make(*self._ended.popleft())
            if time.perf_counter() >= until:
                return

    def _make(self, visit: Visit, errand: Errand) -> None:
        size = visit.copied + len(prompt_in(errand.fields) or b"")
        quick = size < LARGE // MASKING or (size < LARGE and self._capture(errand).text != "redacted")
        if quick or self._behind + size > BEHIND:
            self.record(visit, errand)
        else:
            making = asyncio.get_running_loop().run_in_executor(self._thread, self._fact, visit, errand)
            self._large.add(making)
            self._behind += size
            making.add_done_callback(partial(self._leave_large, visit, errand, size))

    def _leave_large(self, visit: Visit, errand: Errand, size: int, made: asyncio.Future[Interaction]) -> None:
        self._large.discard(made)
        self._behind -= size
        self._leave(visit, errand, made.result)

    def _capture(self, errand: Errand) -> Capture:
        return self._captures.of(errand.route.name, errand.who.tenant, errand.who.metadata.consent)

    def _leave(self, visit: Visit, errand: Errand, made: Callable[[], Interaction]) -> None:
        try:
            fact = made()
            self._journal(fact)
            self._metrics.answered(fact)
            self._shadows.consider(errand.route, errand.ask, errand.fields, fact, visit.characters)
        except Exception:
            log.exception("the fact of a request could not be made")

    def _fact(self, visit: Visit, errand: Errand) -> Interaction:
        route, who, ask = errand.route, errand.who, errand.ask
        choice, recalled = _by(visit, errand)
        if choice.policy == "fallback":
            self._metrics.fallbacks.labels(route.name, errand.choice.arm).inc()
        arm = errand.lineup.arms.get(choice.arm) or Arm(model=choice.arm)
        copy = b"".join(visit.copy)
        answer = read_stream(copy) if visit.stream else read_answer(copy)
        visit.characters = len(answer.text)
        error = None if visit.error == "client_left" and answer.ended else visit.error  # SDKs hang up at [DONE]
        if error is None and (answer.failed or (answer.unreadable and visit.copied < COPY_LIMIT)):
            error = "upstream_error" if answer.failed else "upstream_garbage"
        messages, asked = _readable(prompt_in(errand.fields))
        said = who.metadata
        try:
            kept, redacted = self._capture(errand).keep(messages, answer.text, answer.tool_calls)
        except RecursionError:  # nested too deep to be masked
            kept, redacted = Kept(), ("off",)
        return Interaction(
            event_id=new_id(),
            at=visit.at,
            request_id=visit.request_id,
            route=route.name,
            tenant=who.tenant,
            session=who.session,
            answerer=Answerer(
                arm=choice.arm,
                model=arm.model,
                prompt_version=arm.prompt_version or said.prompt_version,
                policy=choice.policy,
                snapshot=choice.snapshot,
                segment=choice.segment,
                propensity=choice.propensity,
                holdout=choice.holdout,
                recalled=recalled,
                rollout=choice.rollout,
                rival=choice.rival,
                unopposed=visit.unopposed,
            ),
            endpoint=visit.endpoint,
            response_id=answer.id,
            trace_id=visit.trace_id,
            span_id=visit.span_id,
            parent_span_id=visit.parent_span_id,
            user=who.user,
            task_type=who.task_type,
            task_id=said.task_id,
            input_hash=self._pseudonyms.of(who.tenant, bytes(messages)) if messages else None,
            thread=thread_of(
                who.tenant, asked, answer.text, answer.tool_calls, self._pseudonyms.key, tuple(answer.others.values())
            ),
            choices=1 + len(answer.others),
            previous=ask.previous_response_id,
            turn=ask.assistant_turns,
            knowledge_version=said.knowledge_version,
            retrieval_ids=_ids(said.retrieval_ids),
            country=said.country,
            consent=said.consent,
            stream=visit.stream,
            status=visit.status,
            error=error,
            finish_reason=answer.finish_reason if error is None else "error",
            tokens_in=answer.tokens_in,
            tokens_out=answer.tokens_out,
            tokens_cached=answer.tokens_cached,
            first_byte=visit.first_byte,
            duration=visit.duration,
            escalated=b"x-understudy-escalation" in visit.headers,
            sdk_retry=count(visit.headers.get(b"x-stainless-retry-count")),
            upstream=visit.upstream,
            attempts=visit.attempts,
            redacted=redacted,
            messages=kept.messages,
            answer=kept.answer,
            tool_calls=kept.tool_calls,
        )


def _by(visit: Visit, errand: Errand) -> tuple[Choice, bool]:
    """The arm that truly answered, and whether the session had it already."""
    choice = errand.choice
    if visit.arm not in ("", choice.arm):
        return Choice(visit.arm, 1.0, choice.snapshot, choice.segment, policy="fallback"), False
    return choice, errand.recalled


def _readable(raw: msgspec.Raw | None) -> tuple[msgspec.Raw | None, Any]:
    """`raw` and what it says, or None if the journal's readers could not read it (1e999, or nested too deep)."""
    if raw is None:
        return None, None
    try:
        if bytes(raw).count(b"[") + bytes(raw).count(b"{") > SHALLOW:
            msgspec.json.decode(b"[" * 64 + bytes(raw) + b"]" * 64)  # they may stand deeper than we do
        return raw, msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError):
        return None, None


def _ids(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """OpenAI's metadata holds strings only, so lists come separated by commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value or ()
