"""The admin listener's application: what operators see, on a port of its own, and nothing that changes anything.

It asks for no key, so it listens where only operators are: on loopback by default. A web page that somebody opens in
the same browser could still ask it things under a name that its owner points at 127.0.0.1 (DNS rebinding); so a request
must name this machine in its Host. No answer may be read, framed or embedded by other sites, and ours run no script.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from gateway import rollout_page
from gateway.asgi import Receive, Scope, Send
from telemetry.errors import StateError

STYLE = Path(__file__).parent / "pages" / "admin" / "rollout.css"
PAGE = "/ui/rollout"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
EVERYWHERE = ("0.0.0.0", "::", "")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]@/\s]+)(:[0-9]{1,5})?")
_SAFE = [
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]

Report = Callable[[float], Sequence[Mapping[str, Any]]]
"""Rows of all routes as of a time; may be called from several threads, raises `StateError`s."""


class Named:
    """By which names requests may ask for this machine."""

    def __init__(self, host: str) -> None:
        """`host`: the address that is listened on. Where it is every one, any plain address will do, too: what a
        browser is made to believe about names does not make it send an address."""
        self._names = set(LOOPBACK)
        self._any_address = host in EVERYWHERE
        if self._any_address:
            self._names.add(socket.gethostname().lower())
        else:
            self._names.add(f"[{host.lower()}]" if ":" in host else host.lower())

    def allow(self, header: str) -> bool:
        """Whether a Host header names this machine; its port may be any, as of a tunnel."""
        found = _HOST.fullmatch(header.lower())
        if found is None:
            return False
        return found[1] in self._names or (self._any_address and _is_address(found[1].strip("[]")))


def build(report: Report, named: Named, close: Callable[[], None] = lambda: None) -> Guarded:
    """The application; `close` is called when it ends."""

    def page(request: Request) -> Response:
        live, now = request.query_params.get("live") != "off", time.time()
        try:
            body, status = rollout_page.page(report(now), now, live), 200
        except StateError as error:
            body, status = rollout_page.trouble(str(error), live), 503
        return Response(body, status, media_type="text/html")

    def rows(request: Request) -> Response:
        now = time.time()
        try:
            body, status = msgspec.json.encode({"at": now, "routes": report(now)}), 200
        except StateError as error:
            body, status = msgspec.json.encode({"error": {"message": str(error), "type": "server_error"}}), 503
        return Response(body, status, media_type="application/json")

    def to_page(request: Request) -> Response:
        return RedirectResponse(PAGE)

    style = STYLE.read_bytes()

    def sheet(request: Request) -> Response:
        return Response(style, media_type="text/css")

    def health(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        close()

    endpoints = {"/": to_page, "/ui": to_page, "/ui/": to_page, PAGE: page, f"{PAGE}.css": sheet}
    endpoints |= {"/admin/rollout": rows, "/healthz": health}
    app = Starlette(routes=[Route(path, one, methods=["GET"]) for path, one in endpoints.items()], lifespan=lifespan)
    app.router.redirect_slashes = False
    return Guarded(app, named)


class Guarded:
    """An application that answers only to this machine's names, with headers that keep other sites out."""

    def __init__(self, app: Starlette, named: Named) -> None:
        self._app, self._named = app, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def safely(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_SAFE]}
            await send(message)

        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        app: Any = self._app
        if len(hosts) != 1 or not self._named.allow(hosts[0]):
            said = "this listener answers to localhost and to the address of `admin.host`, not to the name asked for\n"
            app = PlainTextResponse(said, 421)
        await app(scope, receive, safely)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
