"""The endpoints of feedback: POST /v1/feedback takes it, GET /v1/feedback/{response_id} says what has come so far.

A page of any origin may call them: what it says is vouched for by the answer's token or by a key, never by a cookie.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar
from urllib.parse import parse_qs

from gateway.asgi import ClientLeft, Receive, Scope, Send, read_body, send_error, send_json
from gateway.auth import Caller, KeyRing, tenant_of
from gateway.feedback import Desk, Item, Problem, forbidden, read_items, to_signal
from gateway.metrics import Metrics
from gateway.openai import ApiError
from gateway.recorder import Recorder
from gateway.summary import summary
from router.policy import Reward
from telemetry.errors import StateError, StateUnavailable, UnderstudyError
from telemetry.events import Interaction, Signal
from telemetry.journal import Journal
from telemetry.writer import JournalWriter

P = ParamSpec("P")
T = TypeVar("T")

PATH = "/v1/feedback"
TOKEN = b"x-understudy-feedback-token"

ANY_ORIGIN = [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", b"retry-after")]
_PREFLIGHT = [
    *ANY_ORIGIN,
    (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
    (b"access-control-allow-headers", b"authorization, content-type, x-understudy-tenant, " + TOKEN),
    (b"access-control-max-age", b"86400"),
]
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Answers:
    """The answers that a signal is about, those of a moment ago too, whose facts are not on disk yet.

    Belongs to one thread. The writer is hurried at most once for a piece of work, however many answers it asks for, and
    not again soon after it could not write: others wait in this thread.
    """

    PATIENCE, PAUSE = 0.5, 1.0
    """Seconds."""

    def __init__(self, reader: Journal, writer: JournalWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._hurried = True
        self._next = 0.0

    def begin(self) -> None:
        """A new piece of work begins: what was put since the last one may not be on disk."""
        self._hurried = False

    def __call__(self, signal: Signal) -> list[Interaction]:
        """In the order of the journal. Raises `StateError` if it cannot be read, or not be brought up to date."""
        found = [fact for _, fact in self._reader.answers(signal)]
        if self._hurried or (found and signal.response_id):  # a trace or a session may have more
            return found
        if time.monotonic() < self._next or not self._writer.flush(self.PATIENCE):
            self._next = time.monotonic() + self.PAUSE
            raise StateUnavailable(f"the journal cannot be written: {self._writer.failing or 'too slow'}")
        self._hurried = True
        return [fact for _, fact in self._reader.answers(signal)]


@dataclass(frozen=True, slots=True)
class Ears:
    """What every way in for signals needs. Facts are looked up in `thread` only, so no request waits for the disk."""

    keys: KeyRing
    desk: Desk
    writer: JournalWriter
    reader: Journal
    answers: Answers
    thread: ThreadPoolExecutor
    recorder: Recorder
    metrics: Metrics
    max_body: int
    """Bytes, as sent and unpacked; to read more takes so long that requests would notice."""

    async def look_up(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns, done in the thread, with every answer to be found that this worker gave before."""
        await self.recorder.settled(Answers.PATIENCE)

        def begin() -> T:
            self.answers.begin()
            return work(*args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self.thread, begin)

    def caller(self, headers: Mapping[bytes, bytes]) -> Caller:
        """Who speaks, for the tenant that it speaks for. Raises `ApiError` 401."""
        caller = self.keys.caller(headers.get(b"authorization", b""))
        return replace(caller, tenant=tenant_of(caller, headers))

    def refused(self, problem: Problem) -> None:
        self.metrics.feedback_refused.labels(problem.code or "invalid").inc()

    async def keep(self, signals: Sequence[Signal]) -> None:
        """On return the signals are on disk. Raises `StateError` if they cannot be."""
        if signals:
            await self.writer.put_durably(signals)
        for signal in signals:
            self.metrics.signals.labels(signal.kind, signal.source).inc()


class Listening:
    """The two endpoints. `rewards`: each route's terms, for the summary."""

    def __init__(self, ears: Ears, rewards: Mapping[str, Reward]) -> None:
        self._ears = ears
        self._rewards = rewards

    async def post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """202 once all that was accepted is on disk; a single bad item, or nothing but bad ones, is an error."""
        headers = dict(scope["headers"])
        try:
            sent = await read_body(headers, receive, self._ears.max_body)
            items, judged = await self._ears.look_up(self._judge, sent, headers, time.time())
            problems = [p for p in judged if isinstance(p, Problem)]
            signals = [s for s in judged if isinstance(s, Signal)]
            if problems and not signals:
                raise _refusal(problems[0], among=len(judged))
            await self._ears.keep(signals)
        except ApiError as error:
            await send_error(send, error, ANY_ORIGIN)
            return
        except UnderstudyError as error:
            await send_error(send, later(error), ANY_ORIGIN)
            return
        except ClientLeft:
            return
        ids = [
            (isinstance(item, Item) and item.event_id) or one.event_id
            for item, one in zip(items, judged, strict=True)
            if isinstance(one, Signal)
        ]
        body: dict[str, Any] = {"accepted": len(signals), "ids": ids}
        if problems:
            body["errors"] = problems
        wait = max((p.retry_after for p in problems if p.retry_after is not None), default=None)
        more = [] if wait is None else [(b"retry-after", b"%d" % wait)]
        await send_json(send, 202, body, ANY_ORIGIN + more)

    def _judge(
        self, body: bytes, headers: Mapping[bytes, bytes], now: float
    ) -> tuple[list[Item | Problem], list[Signal | Problem]]:
        """Runs in the thread. Raises `ApiError` if the body is no feedback, `StateError` if the journal is away."""
        items = read_items(body)
        try:
            caller: Caller | None = self._ears.caller(headers)
        except ApiError:
            caller = None  # then a token must speak
        token = headers.get(TOKEN, b"").decode("latin-1") or None
        judged = [
            item if isinstance(item, Problem) else to_signal(index, item, caller, token, self._ears.desk, now)
            for index, item in enumerate(items)
        ]
        for one in judged:
            if isinstance(one, Problem):
                self._ears.refused(one)
        return items, judged

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The summary of an answer, for its tenant's keys and whoever holds its token.

        With `?text=1` also what people wrote, for keys that may read it; each time is put on record.
        """
        name = scope["path"][len(PATH) + 1 :]
        text = parse_qs(scope["query_string"].decode("latin-1")).get("text", ["0"])[-1] in ("1", "true")
        try:
            found = await self._ears.look_up(self._summary, name, dict(scope["headers"]), text, time.time())
        except ApiError as error:
            await send_error(send, error, ANY_ORIGIN)
        except StateError as error:
            await send_error(send, later(error), ANY_ORIGIN)
        else:
            await send_json(send, 200, found, ANY_ORIGIN)

    def _summary(self, name: str, headers: Mapping[bytes, bytes], text: bool, now: float) -> dict[str, Any]:
        """Runs in the thread."""
        reader, desk = self._ears.reader, self._ears.desk
        said = headers.get(TOKEN, b"").decode("latin-1")
        claims = desk.tokens.verify(said, now) if said else None
        caller = None if claims else self._ears.caller(headers)
        tenant = claims.tenant if claims else caller.tenant  # type: ignore[union-attr]
        if text and (caller is None or not caller.text):
            raise forbidden("what people wrote may be read with keys for that only (`understudy keys create --text`)")
        answers = desk.answers(Signal(event_id="", at=0, kind="", tenant=tenant, response_id=name))
        if claims and answers and answers[-1].request_id != claims.request_id:
            raise forbidden("the feedback token is for another answer")
        if not answers:
            message = f"no answer {name[:100]!r} is known here; it may not be journaled yet, or be another tenant's"
            raise ApiError(404, message, code="not_found")
        answer: Interaction = answers[-1]
        session = [i for _, i in reader.interactions_of(answer.tenant, answer.session) if i.route == answer.route]
        if text and caller:
            reader.note_read(now, caller.id, f"feedback of {answer.request_id}")
        terms = self._rewards.get(answer.route, Reward())
        return summary(answer, session, reader.heard_about(session), terms, now, text=text)


async def preflight(scope: Scope, receive: Receive, send: Send) -> None:
    """What a browser asks before it sends (the Fetch standard's CORS preflight); an ASGI endpoint."""
    await send({"type": "http.response.start", "status": 204, "headers": _PREFLIGHT})
    await send({"type": "http.response.body", "body": b""})


def _refusal(problem: Problem, among: int) -> ApiError:
    where = f"item {problem.index}: " if among > 1 else ""
    kind = _TYPES.get(problem.status, "invalid_request_error")
    again = () if problem.retry_after is None else ((b"retry-after", b"%d" % problem.retry_after),)
    message = where + problem.message
    return ApiError(problem.status, message, type=kind, param=problem.param, code=problem.code, headers=again)


def later(error: UnderstudyError) -> ApiError:
    """Nothing was kept, and it may be sent again."""
    return ApiError(503, f"{error}; send it again", type="server_error", headers=((b"retry-after", b"1"),))
