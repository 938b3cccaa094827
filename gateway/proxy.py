"""The hot path: one request's way through the gateway, top to bottom.

authenticate → read and parse once → route → identity → arm → dress the body for the arm → ask a replica → relay
the bytes as they come, keeping a copy → and in any case, one `Interaction` fact to the journal's queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from gateway.arms import Lineup, Lineups, Route, dress
from gateway.asgi import Client, ClientLeft, Receive, Scope, Send, client_of, count, read_body, send_error
from gateway.auth import Caller, Identity, KeyRing, Pseudonyms, TokenSigner, identify
from gateway.metrics import Metrics
from gateway.openai import (
    ApiError,
    Ask,
    Fields,
    UsageFilter,
    error_body,
    parse_request,
    read_answer,
    read_stream,
)
from gateway.replicas import Reading, Replicas, Unserved
from gateway.sessions import Sessions
from gateway.shadow import Shadows
from gateway.upstream import Replica, Timeouts, UpstreamError
from router.arms import Choice
from router.bandit import unit_hash
from router.features import key_of
from router.policy import Arm
from router.segments import Segmenter, assign, prompt_of
from telemetry.events import Answerer, Interaction, Shadow, new_id, random_hex
from telemetry.privacy import Captures
from telemetry.threads import thread_of

__all__ = ["AskProvider", "Proxy", "Route", "Visit", "dress"]

log = logging.getLogger("understudy.gateway")

JSON = (b"content-type", b"application/json")
COPY_LIMIT = 4 * 1024 * 1024
"""Bytes of an answer that are kept to be read; a longer one is relayed whole and read in part."""
SHALLOW = 256
"""Brackets of a body that cannot be nested too deep for the journal's readers, whichever way they stand."""

_NOT_RELAYED = frozenset(
    b"connection keep-alive transfer-encoding upgrade te trailer proxy-authenticate content-length date server"
    b" set-cookie x-request-id".split()
)


class AskProvider(Protocol):
    """Asks a provider that is no OpenAI-compatible server of ours (`providers.ask`)."""

    async def __call__(
        self, endpoint: str, arm: Arm, fields: Fields, request_id: str, timeouts: Timeouts
    ) -> Reading: ...


@dataclass(slots=True)
class Errand:
    """What a request asks for, and of which arm."""

    route: Route
    lineup: Lineup
    choice: Choice
    ask: Ask
    fields: Fields
    """As the app sent them."""
    who: Identity


@dataclass(slots=True)
class Visit:
    """One request while it is here: what is known so far, for the fact that it leaves."""

    endpoint: str
    headers: Mapping[bytes, bytes]
    at: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)
    request_id: str = ""
    trace_id: str = ""
    span_id: str = ""
    parent_span_id: str | None = None
    left: bool = False
    """The client closed the connection before its answer was complete."""
    status: int = 0
    error: str | None = None
    first_byte: float | None = None
    attempts: int = 0
    upstream: str | None = None
    arm: str = ""
    """Who was asked last."""
    strip_usage: bool = False
    characters: int = 0
    """Of the answer's text."""
    stream: bool = False
    copy: list[bytes] = field(default_factory=list)
    copied: int = 0

    def begin_trace(self) -> None:
        """Join the caller's trace (W3C Trace Context), or begin one."""
        parent = self.headers.get(b"traceparent", b"").decode("latin-1").split("-")
        if len(parent) >= 4 and parent[0] != "ff" and _is_id(parent[1], 32) and _is_id(parent[2], 16):
            self.trace_id, self.parent_span_id = parent[1], parent[2]
        else:
            self.trace_id = new_id()  # ids that begin with the time keep the journal's index in one place
        self.span_id = random_hex()[:16]

    def head(self, replica: Replica) -> bytes:
        """Begin an attempt at a replica, under a request id of its own; the header lines that it gets."""
        self.request_id = new_id()
        self.upstream = replica.url
        self.attempts += 1
        return b"content-type: application/json\r\naccept: */*\r\nx-request-id: %b\r\ntraceparent: 00-%b-%b-01\r\n" % (
            self.request_id.encode(), self.trace_id.encode(), self.span_id.encode(),
        )  # fmt: skip

    def keep(self, data: bytes) -> None:
        if self.copied < COPY_LIMIT:
            self.copy.append(data)
            self.copied += len(data)


class Proxy:
    """Serves the OpenAI endpoints that generate. Holds no state of its own but its collaborators."""

    def __init__(
        self,
        routes: Mapping[str, Route],
        keys: KeyRing,
        sessions: Sessions,
        tokens: TokenSigner,
        pseudonyms: Pseudonyms,
        captures: Captures,
        metrics: Metrics,
        journal: Callable[[Interaction | Shadow], None],
        ask_provider: AskProvider,
        max_body: int,
    ) -> None:
        self.routes = routes
        self.lineups = Lineups(routes, sessions.snapshots)
        self.replicas = Replicas(routes, self.lineups, metrics.retries)
        self.shadows = Shadows(self.lineups, self.replicas, captures, metrics.shadow_dropped, journal)
        self._keys = keys
        self._sessions = sessions
        self._tokens = tokens
        self._pseudonyms = pseudonyms
        self._captures = captures
        self._metrics = metrics
        self._journal = journal
        self._ask_provider = ask_provider
        self._max_body = max_body

    async def serve(self, endpoint: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an ASGI endpoint."""
        visit = Visit(endpoint, dict(scope["headers"]))
        try:
            caller = self._keys.caller(visit.headers.get(b"authorization", b""))
            ask, fields = parse_request(await read_body(visit.headers, receive, self._max_body))
            route, pinned = self._find(ask.model, caller)
            who = identify(caller, visit.headers, ask, fields, self._pseudonyms)
        except ApiError as error:
            self._metrics.refused.labels(str(error.status)).inc()
            await send_error(send, error)
            return
        except ClientLeft:
            return
        lineup = self.lineups.of(route.name)
        choice, recalled = await self._choose(route, lineup, pinned, who, ask, fields)
        errand = Errand(route, lineup, choice, ask, fields, who)
        visit.begin_trace()
        self._metrics.begun[route.name] += 1
        self.shadows.busy += 1
        try:
            await self._answer(visit, errand, client_of(scope, receive, send))
        finally:
            self._metrics.begun[route.name] -= 1
            self.shadows.busy -= 1
            fact = self._leave_fact(visit, errand, recalled)
            self.shadows.consider(route, ask, fields, fact, visit.characters)

    def _find(self, model: str, caller: Caller) -> tuple[Route, Choice | None]:
        """The route that `model` names; an admin may name one arm of it as "route:arm"."""
        route = self.routes.get(model)
        if route is not None:
            return route, None
        name, _, arm = model.rpartition(":")
        if caller.role == "admin" and name in self.routes and arm in self.lineups.of(name).arms:
            return self.routes[name], Choice(arm, 1.0, policy="pinned")
        raise ApiError(
            404,
            f"The model `{model[:200]}` does not exist; GET /v1/models lists those that do",
            param="model",
            code="model_not_found",
        )

    async def _choose(
        self, route: Route, lineup: Lineup, pinned: Choice | None, who: Identity, ask: Ask, fields: Fields
    ) -> tuple[Choice, bool]:
        if pinned is not None:
            return pinned, False
        begun = ask.assistant_turns > 0 or ask.previous_response_id is not None

        def segment() -> str:
            return segment_of(route, who, fields, self._sessions.segmenters.get(route.name))

        return await self._sessions.choose(
            route.name, who.tenant, who.session, segment, begun=begun, snapshot=lineup.snapshot, held=lineup.held
        )

    async def _answer(
        self,
        visit: Visit,
        errand: Errand,
        client: Client,
    ) -> None:
        """Ask and relay, until the answer ends, the upstream fails or the client leaves."""
        task = asyncio.current_task()
        assert task is not None

        def leave() -> None:
            visit.left = True
            task.cancel()

        client.leaving(leave)
        reply: Reading | None = None
        try:
            reply = await self._ask(visit, errand)
            headers = self._headers(visit, reply, errand.who)
            if reply.streams:
                await self._relay_stream(visit, reply, headers, UsageFilter() if visit.strip_usage else None, client)
            else:
                await self._relay_whole(visit, reply, headers, client)
            await client.finish()
        except UpstreamError as error:
            visit.status, visit.error = error.status, error.kind
            client.leaving(None)
            refusal = ApiError(error.status, str(error), type="upstream_error", code=error.kind)
            client.respond(error.status, [JSON, *self._own(visit, errand.who)], refusal.body)
            await client.finish()
        except asyncio.CancelledError:
            if not visit.left:  # the server is being stopped
                visit.error = visit.error or "internal"
                raise
            task.uncancel()
            visit.error = "client_left"
        except Exception:
            visit.error = "internal"
            raise
        finally:
            client.leaving(None)
            if reply is not None:
                reply.abort()

    async def _ask(self, visit: Visit, errand: Errand) -> Reading:
        """Ask the session's arm; while no replica serves its model, one that stands in for it."""
        route, choice, who = errand.route, errand.choice, errand.who
        for name in errand.lineup.in_turn(choice):
            arm = errand.lineup.arms[name]
            fields = dict(errand.fields)
            visit.arm, visit.strip_usage = name, dress(fields, visit.endpoint, errand.ask, arm)
            if arm.provider is not None:
                visit.request_id = new_id()
                visit.upstream = arm.provider
                visit.attempts += 1
                return await self._ask_provider(visit.endpoint, arm, fields, visit.request_id, route.timeouts)
            u, body = unit_hash(who.tenant, who.session), msgspec.json.encode(fields)
            reply = await self.replicas.ask(route, arm.model, u, f"/v1/{visit.endpoint}", visit.head, body)
            if reply is not None:
                return reply
        visit.arm, visit.request_id = choice.arm, visit.request_id or new_id()
        raise Unserved(f"no upstream of route {route.name} serves {choice.arm} now; ask again in a while")

    async def _relay_stream(
        self,
        visit: Visit,
        reply: Reading,
        headers: list[tuple[bytes, bytes]],
        usage: UsageFilter | None,
        client: Client,
    ) -> None:
        """Pass on each piece as it comes. Its first piece is here already, so the head may go out."""

        def put(data: bytes) -> None:
            visit.keep(data)
            if usage is not None:
                data = usage.feed(data)
            if data:
                client.write(data)

        client.begin(reply.status, headers)
        visit.stream, visit.status = True, reply.status
        visit.first_byte = time.perf_counter() - visit.started
        try:
            await reply.relay(put, client)
            rest = usage.end() if usage is not None else b""
        except UpstreamError as error:
            visit.error = error.kind
            # Half an event that was held back is dropped; one that was already sent is ended by the blank line.
            rest = (b"" if usage is not None else b"\n\n") + b"data: %b\n\n" % error_body(
                str(error), "upstream_error", code=error.kind
            )
        client.end(rest)

    async def _relay_whole(
        self,
        visit: Visit,
        reply: Reading,
        headers: list[tuple[bytes, bytes]],
        client: Client,
    ) -> None:
        """Read all, then send: an upstream that dies in the middle still becomes a proper error."""
        body = await reply.read_all()
        visit.keep(body)
        visit.first_byte = time.perf_counter() - visit.started
        visit.status = reply.status
        if reply.status >= 400:
            visit.error = "upstream_error"
        client.respond(reply.status, headers, body)

    def _headers(self, visit: Visit, reply: Reading, who: Identity) -> list[tuple[bytes, bytes]]:
        return [(k, v) for k, v in reply.headers if k not in _NOT_RELAYED] + self._own(visit, who)

    def _own(self, visit: Visit, who: Identity) -> list[tuple[bytes, bytes]]:
        """The headers that we add to every answer of an arm."""
        token = self._tokens.issue(who.tenant, visit.request_id, who.user, visit.at)
        timing = f'traceparent;desc="00-{visit.trace_id}-{visit.span_id}-01"'
        return [
            (b"x-request-id", visit.request_id.encode()),
            (b"x-understudy-feedback-token", token.encode()),
            (b"server-timing", timing.encode()),
        ]

    def _leave_fact(self, visit: Visit, errand: Errand, recalled: bool) -> Interaction:
        """Leave the fact of a request, by the arm that truly answered."""
        route, lineup, choice = errand.route, errand.lineup, errand.choice
        if visit.arm not in ("", choice.arm):
            self._metrics.fallbacks.labels(route.name, choice.arm).inc()
            snapshot, segment = choice.snapshot, choice.segment
            choice, recalled = Choice(visit.arm, 1.0, snapshot, segment, policy="fallback"), False
        elif choice.rollout and all(lineup.snapshot.challenger in replica.missing for replica in route.replicas):
            # The challenger's sessions do not count while no replica serves it, so the control's must not either.
            choice = replace(choice, rollout="", rival=0.0)
        arm = lineup.arms.get(choice.arm) or Arm(model=choice.arm)
        fields = errand.fields
        messages = fields.get("messages") or fields.get("input") or fields.get("prompt")
        return self._record(visit, route, arm, choice, recalled, errand.who, errand.ask, messages)

    def _record(
        self,
        visit: Visit,
        route: Route,
        arm: Arm,
        choice: Choice,
        recalled: bool,
        who: Identity,
        ask: Ask,
        messages: msgspec.Raw | None,
    ) -> Interaction:
        """Leave the request's fact. After the last byte, whatever happened before."""
        copy = b"".join(visit.copy)
        answer = read_stream(copy) if visit.stream else read_answer(copy)
        visit.characters = len(answer.text)
        error = None if visit.error == "client_left" and answer.ended else visit.error  # SDKs hang up at [DONE]
        if error is None and (answer.failed or (answer.unreadable and visit.copied < COPY_LIMIT)):
            error = "upstream_error" if answer.failed else "upstream_garbage"
        messages, asked = _readable(messages)
        said = who.metadata
        capture = self._captures.of(route.name, who.tenant, said.consent)
        kept, redacted = capture.keep(messages, answer.text, answer.tool_calls)
        fact = Interaction(
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
            duration=time.perf_counter() - visit.started,
            escalated=b"x-understudy-escalation" in visit.headers,
            sdk_retry=count(visit.headers.get(b"x-stainless-retry-count")),
            upstream=visit.upstream,
            attempts=visit.attempts,
            redacted=redacted,
            messages=kept.messages,
            answer=kept.answer,
            tool_calls=kept.tool_calls,
        )
        self._journal(fact)
        self._metrics.answered(fact)
        return fact


def segment_of(route: Route, who: Identity, fields: Fields, segmenter: Segmenter | None) -> str:
    """Where a session that begins with this request is counted."""
    match route.segment_by:
        case "task_type":
            return who.task_type or ""
        case "tenant":
            return who.tenant
        case "features":
            return key_of(route.features, fields)
        case "prompt" if segmenter is not None:
            said = fields.get("messages") or fields.get("input") or fields.get("prompt")
            return assign(segmenter, prompt_of(said)) if said is not None else ""
        case _:
            return ""


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


def _is_id(text: str, length: int) -> bool:
    """An id as W3C Trace Context writes it: lower-case hex, not all zeros."""
    return len(text) == length and set(text) <= set("0123456789abcdef") and text.strip("0") != ""


def _ids(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """OpenAI's metadata holds strings only, so lists come separated by commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value or ()
