"""The hot path: one request's way through the gateway, top to bottom.

authenticate → read and parse once → route → identity → arm → dress the body for the arm → ask a replica → relay
the bytes as they come, keeping a copy → and in any case, one `Interaction` fact to the journal's queue.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from gateway.arms import Lineup, Lineups, Route, dress
from gateway.asgi import Client, ClientLeft, Receive, Scope, Send, client_of, read_body, send_error
from gateway.auth import Caller, Identity, KeyRing, Pseudonyms, TokenSigner, identify
from gateway.metrics import Metrics
from gateway.openai import (
    ApiError,
    Ask,
    Fields,
    UsageFilter,
    error_body,
    parse_request,
    prompt_in,
)
from gateway.recorder import Recorder
from gateway.replicas import Reading, Replicas, Unserved
from gateway.sessions import Sessions
from gateway.shadow import Shadows
from gateway.upstream import Timeouts, UpstreamError
from gateway.visit import Errand, Visit
from router.arms import Choice
from router.features import key_of
from router.policy import Arm
from router.segments import Segmenter, assign, prompt_of
from telemetry.events import Interaction, Shadow, new_id
from telemetry.privacy import Captures

log = logging.getLogger("understudy.gateway")

JSON = (b"content-type", b"application/json")

_NOT_RELAYED = frozenset(
    b"connection keep-alive transfer-encoding upgrade te trailer proxy-authenticate content-length date server"
    b" set-cookie x-request-id".split()
)


class AskProvider(Protocol):
    """Asks a provider that is no OpenAI-compatible server of ours (`providers.ask`)."""

    async def __call__(
        self, endpoint: str, arm: Arm, fields: Fields, request_id: str, timeouts: Timeouts
    ) -> Reading: ...


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
        self.recorder = Recorder(captures, pseudonyms, metrics, journal, self.shadows)
        self._keys = keys
        self._sessions = sessions
        self._tokens = tokens
        self._pseudonyms = pseudonyms
        self._metrics = metrics
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
        errand = Errand(route, lineup, choice, ask, fields, who, recalled)
        visit.begin_trace()
        self._metrics.begun[route.name] += 1
        self.shadows.busy += 1
        try:
            await self._answer(visit, errand, client_of(scope, receive, send))
        finally:
            self._metrics.begun[route.name] -= 1
            self.shadows.busy -= 1
            if pinned is None and visit.arm in ("", choice.arm):
                self._sessions.answered(route.name, who.tenant, who.session)
            self.recorder.ended(visit, errand)

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
        if choice.rollout:  # the challenger's sessions do not count while nobody serves it: nor must the control's
            challenger = errand.lineup.snapshot.challenger
            visit.unopposed = all(challenger in replica.missing for replica in route.replicas)
        for name in errand.lineup.in_turn(choice):
            arm = errand.lineup.arms[name]
            fields = dict(errand.fields)
            visit.arm, visit.strip_usage = name, dress(fields, visit.endpoint, errand.ask, arm)
            if arm.provider is not None:
                visit.request_id = new_id()
                visit.upstream = arm.provider
                visit.attempts += 1
                return await self._ask_provider(visit.endpoint, arm, fields, visit.request_id, route.timeouts)
            session, body = (who.tenant, who.session), msgspec.json.encode(fields)
            reply = await self.replicas.ask(route, arm.model, session, f"/v1/{visit.endpoint}", visit.head, body)
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
            said = prompt_in(fields)
            return assign(segmenter, prompt_of(said)) if said is not None else ""
        case _:
            return ""
