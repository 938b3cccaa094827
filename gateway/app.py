"""The ASGI application, built from its parts. Hot routes are raw ASGI endpoints mounted in a Starlette app."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Match
from starlette.routing import Route as HttpRoute

from gateway import otlp, providers
from gateway.arms import Route
from gateway.asgi import Receive, Scope, Send, respond, send_error, send_json
from gateway.auth import TOKEN_KEYS, KeyRing, Pseudonyms, TokenSigner
from gateway.feedback import Desk
from gateway.limits import Allowance
from gateway.listening import PATH as FEEDBACK
from gateway.listening import Answers, Ears, Listening, preflight
from gateway.metrics import Metrics
from gateway.openai import ENDPOINTS, ApiError, error_body
from gateway.proxy import Proxy
from gateway.sessions import Sessions
from gateway.static import Pages
from gateway.upstream import Timeouts, UpstreamError
from router.arms import Snapshot
from router.policy import Reward
from router.segments import Segmenter
from router.store import ApiKey, Assignments, Store
from telemetry.errors import StateError
from telemetry.events import Interaction, Shadow
from telemetry.journal import Journal
from telemetry.otlp import Service
from telemetry.privacy import Captures
from telemetry.writer import JournalWriter

log = logging.getLogger("understudy.gateway")

Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BEHIND = 0.5
"""Seconds from one look for newer weights to the next at the most: a rollback must not wait for a slow policy."""
MOST_HEARD = 4 << 20
"""Bytes of a body of feedback or telemetry, where requests may not be larger anyway."""


class Answered(Protocol):
    """Hears of answers (`telemetry.otel.Spans`)."""

    def answered(self, fact: Interaction) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a gateway is built from. Routes hold their connections, so make one set for each event loop."""

    routes: Mapping[str, Route]
    snapshots: Mapping[str, Snapshot]
    """To draw from until the controller has published."""
    refresh: Mapping[str, float]
    """Route → seconds between looks for newer weights."""
    store: Store
    assignments: Assignments
    journal: Path
    captures: Captures
    rewards: Mapping[str, Reward]
    require_key: bool
    feedback_per_minute: float
    max_body: int
    try_page: bool = True
    spans: Callable[[Callable[[int], None]], Answered | None] = lambda _: None
    """Makes what is told of every answer, given what to tell of spans that were dropped; None for nobody."""


def build(parts: Parts) -> Starlette:
    """The gateway. Touches the store and the journal's file only once it is started (its lifespan)."""
    metrics = Metrics()
    keys = KeyRing(parts.require_key)
    sessions = Sessions(parts.store, parts.assignments, parts.snapshots)
    gateway = _Gateway(parts, metrics, keys, sessions)
    pages = Pages() if parts.try_page else None
    hot = {f"/v1/{name}": gateway.generate(name) for name in ENDPOINTS}
    endpoints: dict[str, dict[str, Endpoint]] = {path: {"POST": endpoint} for path, endpoint in hot.items()} | {
        "/v1/models": {"GET": gateway.models},
        FEEDBACK: {"POST": gateway.feedback, "OPTIONS": preflight},
        f"{FEEDBACK}/": {"GET": gateway.summary, "OPTIONS": preflight},
        "/v1/traces": {"POST": gateway.hear("traces")},
        "/v1/logs": {"POST": gateway.hear("logs")},
        **({path: {"GET": pages.get, "HEAD": pages.get} for path in pages.paths} if pages else {}),
        "/healthz": {"GET": gateway.health},
        "/readyz": {"GET": gateway.ready},
        "/metrics": {"GET": gateway.metrics_page},
    }
    app = _App(
        routes=[_Path(path, by_method) for path, by_method in endpoints.items()],
        lifespan=gateway.lifespan,
        exception_handlers={Exception: _internal_error},
    )
    app.hot = hot
    app.router.default = _not_found
    app.router.redirect_slashes = False
    return app


class _App(Starlette):
    """Starlette, whose middleware and router cost a request as much as all of our routing: hot paths go around them."""

    hot: Mapping[str, Endpoint]

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


class _Path(HttpRoute):
    """A path whose endpoints, by method, are raw ASGI callables (Starlette wraps functions).

    One that ends with a slash is the beginning of a path; what follows is the endpoint's to read.
    """

    def __init__(self, path: str, endpoints: Mapping[str, Endpoint]) -> None:
        super().__init__(path, _placeholder, methods=list(endpoints))
        self._path = path
        self._endpoints = endpoints

    def matches(self, scope: Any) -> tuple[Match, Any]:
        path = scope["path"] if scope["type"] == "http" else ""
        below = self._path.endswith("/") and path.startswith(self._path)
        return (Match.FULL if below or path == self._path else Match.NONE), {}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = self._endpoints.get(scope["method"])
        if endpoint is None:
            allowed = ", ".join(self._endpoints)
            allow = ((b"allow", allowed.encode()),)
            await send_error(send, ApiError(405, f"use {allowed} {scope['path'][:200]}", headers=allow))
            return
        await endpoint(scope, receive, send)


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

    pseudonyms: bytes
    tokens: dict[str, bytes]
    """Keys that sign feedback tokens, by id."""
    keys: list[ApiKey]
    snapshots: dict[str, Snapshot]
    segmenters: dict[str, Segmenter]


class _Gateway:
    """One worker's endpoints and what they share."""

    def __init__(self, parts: Parts, metrics: Metrics, keys: KeyRing, sessions: Sessions) -> None:
        self._parts = parts
        self._metrics = metrics
        self._keys = keys
        self._sessions = sessions
        self._tokens: TokenSigner
        self._proxy: Proxy
        self._listening: Listening
        self._otlp: otlp.Receiver
        self._journal: JournalWriter
        self._memory: Journal
        self._known: _Known
        self._spans: Answered | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Open the journal and the store, serve, and leave nothing unwritten."""
        parts = self._parts
        self._journal = JournalWriter(parts.journal, report=log.warning)
        self._memory = Journal(parts.journal)
        self._known = await asyncio.to_thread(self._begin)
        self._tokens = TokenSigner(self._known.tokens)
        pseudonyms = Pseudonyms(self._known.pseudonyms)
        reader = Journal(parts.journal)
        self._spans = parts.spans(self._metrics.spans_dropped.inc)
        self._proxy = Proxy(
            parts.routes,
            self._keys,
            self._sessions,
            self._tokens,
            pseudonyms,
            parts.captures,
            self._metrics,
            self._note,
            providers.ask,
            parts.max_body,
        )
        thread = ThreadPoolExecutor(1, "feedback")
        answers = Answers(reader, self._journal)
        ears = Ears(
            self._keys,
            Desk(self._tokens, pseudonyms, parts.captures, Allowance(parts.feedback_per_minute), answers),
            self._journal,
            reader,
            answers,
            thread,
            self._proxy.recorder,
            self._metrics,
            min(MOST_HEARD, parts.max_body),
        )
        self._listening = Listening(ears, parts.rewards)
        self._otlp = otlp.Receiver(ears)
        behind = [asyncio.create_task(self._keep_up()), asyncio.create_task(self._proxy.replicas.look_on())]
        try:
            yield
        finally:
            for task in behind:
                task.cancel()
            await self._proxy.recorder.close()
            self._metrics.flush()
            await self._proxy.shadows.close()
            await asyncio.to_thread(self._sessions.close)
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)
            await asyncio.to_thread(self._journal.close)
            reader.close()
            self._memory.close()
            for route in parts.routes.values():
                for replica in route.replicas:
                    replica.close()
            if self._spans is not None:
                await asyncio.to_thread(self._spans.close)

    def _begin(self) -> _Known:
        """What the store says; if it is away, what this machine knew last. Raises `StateError` if that is nothing."""
        last = self._remembered()
        try:
            return self._exchange(last)
        except StateError as error:
            if last is None:
                raise
            log.warning("%s; starting with the keys and weights known last", error)
            self._keys.refresh(last.keys)
            self._sessions.snapshots |= {k: v for k, v in last.snapshots.items() if k in self._parts.routes}
            self._sessions.segmenters |= last.segmenters
            return last

    def _remembered(self) -> _Known | None:
        body = self._memory.known("gateway")
        try:
            return msgspec.json.decode(body, type=_Known) if body else None
        except msgspec.ValidationError:  # another version's
            return None

    async def _keep_up(self) -> None:
        """For ever: push what the store should know, pull what we should."""
        pause = min([MOST_BEHIND, *self._parts.refresh.values()])
        complained = False
        while True:
            await asyncio.sleep(pause)
            try:
                self._metrics.flush()
                self._known = await asyncio.to_thread(self._exchange, self._known)
                self._tokens.refresh(self._known.tokens)
                self._proxy.shadows.drop_stale()
                complained = False
            except Exception as error:  # whatever it is, the next look may go well
                if not complained:
                    log.warning("%s; serving from the last weights", error, exc_info=not isinstance(error, StateError))
                complained = True

    def _exchange(self, last: _Known | None) -> _Known:
        self._sessions.exchange()
        keys = self._parts.store.list_keys()
        self._keys.refresh(keys)
        known = _Known(*self._secrets(last), keys, dict(self._sessions.snapshots), dict(self._sessions.segmenters))
        if known != last:
            self._memory.know("gateway", msgspec.json.encode(known))
        return known

    def _secrets(self, last: _Known | None) -> tuple[bytes, dict[str, bytes]]:
        """The key of pseudonyms and those of tokens. In a store that has none, or was emptied, they are put (back)."""
        store = self._parts.store
        kept = store.secrets()
        tokens = {name[len(TOKEN_KEYS) :]: key for name, key in kept.items() if name.startswith(TOKEN_KEYS)}
        if not tokens:
            ours = last.tokens if last else {"0": os.urandom(32)}
            tokens = {name: store.secret(TOKEN_KEYS + name, key) for name, key in ours.items()}
        pseudonyms = kept.get("pseudonyms")
        if pseudonyms is None:
            pseudonyms = store.secret("pseudonyms", last.pseudonyms if last else os.urandom(32))
        return pseudonyms, tokens

    def _note(self, fact: Interaction | Shadow) -> None:
        self._journal.put(fact)
        if self._spans is not None and isinstance(fact, Interaction):
            self._spans.answered(fact)

    def generate(self, name: str) -> Endpoint:
        return lambda scope, receive, send: self._proxy.serve(name, scope, receive, send)  # known once it is started

    def hear(self, service: Service) -> Endpoint:
        async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
            await self._otlp.serve(service, scope, receive, send)

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
                names += [f"{route.name}:{arm}" for arm in self._proxy.lineups.of(route.name).arms]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "understudy"} for name in names]
        await send_json(send, 200, {"object": "list", "data": data})

    async def feedback(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._listening.post(scope, receive, send)

    async def summary(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._listening.get(scope, receive, send)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, 200, {"status": "ok"})

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 if every route has a replica that answers and facts can be written."""
        replicas = {id(replica): replica for route in self._parts.routes.values() for replica in route.replicas}
        answers = dict(zip(replicas, await asyncio.gather(*map(_answers, replicas.values())), strict=True))
        problems = [
            f"route {route.name}: no upstream answers"
            for route in self._parts.routes.values()
            if route.replicas and not any(answers[id(replica)] for replica in route.replicas)
        ]
        if self._journal.failing is not None:
            problems.append(f"journal: {self._journal.failing}")
        status = "ready" if not problems else "not ready"
        await send_json(send, 503 if problems else 200, {"status": status, "problems": problems})

    async def metrics_page(self, scope: Scope, receive: Receive, send: Send) -> None:
        m = self._metrics
        await self._proxy.recorder.settled(0.0)
        m.flush()
        m.journal_waiting.set(len(self._journal) + len(self._proxy.recorder))
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
