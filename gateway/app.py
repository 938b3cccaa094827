"""The ASGI application, built from its parts. Hot routes are raw ASGI endpoints mounted in a Starlette app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Match
from starlette.routing import Route as HttpRoute

from gateway import feedback, providers
from gateway.asgi import ClientLeft, Receive, Scope, Send, read_body, respond, send_error, send_json
from gateway.auth import Caller, KeyRing, Pseudonyms, TokenSigner
from gateway.metrics import Metrics
from gateway.openai import ENDPOINTS, ApiError, error_body
from gateway.proxy import Proxy, Route
from gateway.sessions import Sessions
from gateway.upstream import Timeouts, UpstreamError
from router.arms import Snapshot
from router.store import ApiKey, Store
from telemetry.errors import StateError, UnderstudyError
from telemetry.events import Interaction, Signal
from telemetry.journal import Journal, JournalWriter
from telemetry.privacy import Capture

log = logging.getLogger("understudy.gateway")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a gateway is built from. Routes hold their connections, so make one set for each event loop."""

    routes: Mapping[str, Route]
    snapshots: Mapping[str, Snapshot]
    """To draw from until the controller has published."""
    refresh: Mapping[str, float]
    """Route → seconds between looks for newer weights."""
    store: Store
    journal: Path
    capture: Capture
    require_key: bool
    max_body: int
    otel_endpoint: str | None = None


def build(parts: Parts) -> Starlette:
    """The gateway. Touches the store and the journal's file only once it is started (its lifespan)."""
    metrics = Metrics()
    keys = KeyRing(parts.require_key)
    sessions = Sessions(parts.store, parts.snapshots)
    gateway = _Gateway(parts, metrics, keys, sessions)
    endpoints: dict[str, tuple[str, Callable[[Scope, Receive, Send], Awaitable[None]]]] = {
        f"/v1/{name}": ("POST", gateway.generate(name)) for name in ENDPOINTS
    }
    endpoints |= {
        "/v1/models": ("GET", gateway.models),
        "/v1/feedback": ("POST", gateway.feedback),
        "/healthz": ("GET", gateway.health),
        "/readyz": ("GET", gateway.ready),
        "/metrics": ("GET", gateway.metrics_page),
    }
    app = _App(
        routes=[_Exact(path, *endpoint) for path, endpoint in endpoints.items()],
        lifespan=gateway.lifespan,
        exception_handlers={Exception: _internal_error},
    )
    app.hot = {f"/v1/{name}": endpoints[f"/v1/{name}"][1] for name in ENDPOINTS}
    app.router.default = _not_found
    app.router.redirect_slashes = False
    return app


class _App(Starlette):
    """Starlette, whose middleware and router cost a request as much as all of our routing: hot paths go around them."""

    hot: Mapping[str, Callable[[Scope, Receive, Send], Awaitable[None]]]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = self.hot.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        try:
            await endpoint(scope, receive, send)
        except Exception as error:
            log.exception("a request failed in the gateway")
            await send_error(send, ApiError(500, _failed(error), type="server_error"))


class _Exact(HttpRoute):
    """A route of one path and one method whose endpoint is a raw ASGI callable (Starlette wraps functions)."""

    def __init__(self, path: str, method: str, endpoint: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        super().__init__(path, _placeholder, methods=[method])
        self._method = method
        self._path = path
        self._endpoint = endpoint

    def matches(self, scope: Any) -> tuple[Match, Any]:
        if scope["type"] == "http" and scope["path"] == self._path:
            return Match.FULL, {}
        return Match.NONE, {}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] != self._method:
            allow = ((b"allow", self._method.encode()),)
            await send_error(send, ApiError(405, f"use {self._method} {self._path}", headers=allow))
            return
        await self._endpoint(scope, receive, send)


async def _placeholder(_: Any) -> Response:  # pragma: no cover
    raise AssertionError


async def _internal_error(_: Any, error: Exception) -> Response:
    return Response(error_body(_failed(error), "server_error"), 500, media_type="application/json")


def _failed(error: Exception) -> str:
    return f"the gateway failed: {type(error).__name__}; its log has more"


async def _not_found(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        message = f"there is no {scope['method']} {scope['path'][:200]} here; see GET /v1/models for a start"
        await send_error(send, ApiError(404, message, code="not_found"))


class _Known(msgspec.Struct, frozen=True):
    """What a worker learned from the store, kept on this machine for a start while the store is away."""

    secret: bytes
    keys: list[ApiKey]
    snapshots: dict[str, Snapshot]


class _Gateway:
    """One worker's endpoints and what they share."""

    def __init__(self, parts: Parts, metrics: Metrics, keys: KeyRing, sessions: Sessions) -> None:
        self._parts = parts
        self._metrics = metrics
        self._keys = keys
        self._sessions = sessions
        self._proxy: Proxy
        self._desk: feedback.Desk
        self._journal: JournalWriter
        self._reader: Journal
        self._memory: Journal
        self._known: _Known
        self._spans: Any = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open the journal and the store, serve, and leave nothing unwritten."""
        parts = self._parts
        self._journal = JournalWriter(parts.journal, report=log.warning)
        self._reader = Journal(parts.journal)
        self._memory = Journal(parts.journal)
        self._known = await asyncio.to_thread(self._begin)
        tokens = TokenSigner({"k1": self._known.secret})
        pseudonyms = Pseudonyms(self._known.secret)
        if parts.otel_endpoint:
            from telemetry.otel import Spans  # costs 0.3 s and 20 MB, and not everyone wants it

            self._spans = Spans(parts.otel_endpoint, self._metrics.spans_dropped.inc)
        self._desk = feedback.Desk(tokens, pseudonyms, parts.capture, self._request_of)
        self._proxy = Proxy(
            parts.routes,
            self._keys,
            self._sessions,
            tokens,
            pseudonyms,
            parts.capture,
            self._metrics,
            self._note,
            providers.ask,
            parts.max_body,
        )
        refreshing = asyncio.create_task(self._keep_up())
        try:
            yield
        finally:
            refreshing.cancel()
            await asyncio.to_thread(self._sessions.close)
            await asyncio.to_thread(self._journal.close)
            self._reader.close()
            self._memory.close()
            for route in parts.routes.values():
                for replica in route.replicas:
                    replica.close()
            if self._spans is not None:
                await asyncio.to_thread(self._spans.close)

    def _begin(self) -> _Known:
        """What the store says; if it is away, what this machine knew last. Raises `StateError` if that is nothing."""
        try:
            return self._exchange(self._parts.store.secret("signing", os.urandom(32)))
        except StateError as error:
            known = self._memory.known("gateway")
            if known is None:
                raise
            log.warning("%s; starting with the keys and weights known last", error)
            last = msgspec.json.decode(known, type=_Known)
            self._keys.refresh(last.keys)
            self._sessions.snapshots |= {k: v for k, v in last.snapshots.items() if k in self._parts.routes}
            return last

    async def _keep_up(self) -> None:
        """For ever: push what the store should know, pull what we should."""
        pause = min(self._parts.refresh.values(), default=1.0)
        complained = False
        while True:
            await asyncio.sleep(pause)
            try:
                self._known = await asyncio.to_thread(self._exchange, self._known.secret)
                complained = False
            except StateError as error:
                if not complained:
                    log.warning("%s; serving from the last weights", error)
                complained = True

    def _exchange(self, secret: bytes) -> _Known:
        self._sessions.exchange()
        keys = self._parts.store.list_keys()
        self._keys.refresh(keys)
        known = _Known(secret, keys, dict(self._sessions.snapshots))
        if known != getattr(self, "_known", None):
            self._memory.know("gateway", msgspec.json.encode(known))
        return known

    def _note(self, fact: Interaction) -> None:
        self._journal.put(fact)
        if self._spans is not None:
            self._spans.answered(fact)

    def _request_of(self, tenant: str, response_id: str) -> str | None:
        about = Signal(event_id="", at=0, kind="", tenant=tenant, response_id=response_id)
        found = self._reader.answers(about)
        return found[0][1].request_id if found else None

    def generate(self, name: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
            await self._proxy.serve(name, scope, receive, send)

        return endpoint

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Routes as models; for admins, each route's arms too, as "route:arm"."""
        try:
            caller = self._keys.caller(dict(scope["headers"]).get(b"authorization", b""))
        except ApiError as error:
            await send_error(send, error)
            return
        names = []
        for route in self._parts.routes.values():
            names.append(route.name)
            if caller.role == "admin":
                names += [f"{route.name}:{arm}" for arm in route.arms]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "understudy"} for name in names]
        await send_json(send, 200, {"object": "list", "data": data})

    async def feedback(self, scope: Scope, receive: Receive, send: Send) -> None:
        """202 once all that was accepted is on disk; a single bad item, or nothing but bad ones, is an error."""
        headers = dict(scope["headers"])
        now = time.time()
        try:
            caller = self._feedback_caller(headers)
            token = headers.get(b"x-understudy-feedback-token", b"").decode("latin-1") or None
            read = feedback.read_items(await read_body(headers, receive, self._parts.max_body))
            judged = [
                item
                if isinstance(item, feedback.Problem)
                else feedback.to_signal(index, item, caller, token, self._desk, now)
                for index, item in enumerate(read)
            ]
            problems = [p for p in judged if isinstance(p, feedback.Problem)]
            signals = [s for s in judged if isinstance(s, Signal)]
            for problem in problems:
                self._metrics.feedback_refused.labels(str(problem.status)).inc()
            if problems and not signals:
                first = problems[0]
                where = f"item {first.index}: " if len(judged) > 1 else ""
                kind = {401: "authentication_error", 403: "permission_error"}.get(first.status, "invalid_request_error")
                raise ApiError(first.status, where + first.message, type=kind, param=first.param, code=first.code)
            await self._journal.put_durably(signals)
        except ApiError as error:
            await send_error(send, error)
            return
        except UnderstudyError as error:
            again = ((b"retry-after", b"1"),)
            await send_error(send, ApiError(503, f"{error}; send it again", type="server_error", headers=again))
            return
        except ClientLeft:
            return
        for signal in signals:
            self._metrics.signals.labels(signal.kind, signal.source).inc()
        body: dict[str, Any] = {"accepted": len(signals), "ids": [signal.event_id for signal in signals]}
        if problems:
            body["errors"] = problems
        await send_json(send, 202, body)

    def _feedback_caller(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        """Who sends feedback; None if nobody with a key does, and a token must speak instead."""
        try:
            return self._keys.caller(headers.get(b"authorization", b""))
        except ApiError:
            return None

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"status": "ok"})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if every route has a replica that answers and facts can be written."""
        problems = []
        for route in self._parts.routes.values():
            answers = await asyncio.gather(*(_answers(replica) for replica in route.replicas))
            if route.replicas and not any(answers):
                problems.append(f"route {route.name}: no upstream answers")
        if self._journal.failing is not None:
            problems.append(f"journal: {self._journal.failing}")
        status = "ready" if not problems else "not ready"
        await send_json(send, 503 if problems else 200, {"status": status, "problems": problems})

    async def metrics_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        m = self._metrics
        m.journal_waiting.set(len(self._journal))
        m.journal_dropped.set(self._journal.dropped)
        m.snapshot_age.set(time.monotonic() - self._sessions.store_seen)
        for name, snapshot in self._sessions.snapshots.items():
            m.snapshot_version.labels(name).set(snapshot.version)
        page = await asyncio.to_thread(m.page)
        await respond(send, 200, page, b"text/plain; version=0.0.4; charset=utf-8")


async def _answers(replica: Any) -> bool:
    try:
        reply = await replica.get("/health", Timeouts(1.0, 2.0, 2.0))
        await reply.read_all()
    except UpstreamError:
        return False
    return True
