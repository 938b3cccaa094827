"""Composition: settings become stores, routes, a gateway and a controller. The only place that knows all of them.

What only one of the processes needs is imported where it is built: each pays for its own, in time and in memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from learner.registry import Registry
from router.plan import RoutePlan
from router.policy import Learned, Linear
from router.recall import JournalAssignments
from router.store import Assignments, Store
from router.store_sqlite import SqliteStore
from telemetry.events import Interaction, Signal
from telemetry.journal import Journal
from telemetry.privacy import Capture, Captures
from understudy.settings import Settings

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from gateway.admin import Guarded
    from router.controller import Controller
    from router.store_redis import RedisStore
    from telemetry.otel import Spans
    from telemetry.webhook import Webhook


def open_store(settings: Settings) -> Store:
    """The store that `state` names. Raises `StateError`."""
    path = settings.sqlite_path
    if path is not None:
        return SqliteStore(path)
    return _redis(settings)


def open_shared(settings: Settings) -> tuple[Store, Assignments]:
    """The store, and which arms sessions have: several machines know it from Redis, one from its own journal."""
    if settings.sqlite_path is not None:
        return SqliteStore(settings.sqlite_path), JournalAssignments(settings.journal_path)
    store = _redis(settings)
    return store, store


def _redis(settings: Settings) -> RedisStore:
    from router.store_redis import RedisStore

    return RedisStore(settings.state)


def route_plans(settings: Settings) -> list[RoutePlan]:
    return [
        RoutePlan(name, route.arms, route.policy, route.reward, route.rollout)
        for name, route in settings.routes.items()
    ]


def build_controller(
    settings: Settings,
    owner: str,
    told: Callable[[Signal, Interaction], None] | None = None,
    alert: Callable[[str, Mapping[str, Any]], None] = lambda *_: None,
) -> Controller:
    from router.controller import Controller

    store = open_store(settings)
    plans, journal = route_plans(settings), Journal(settings.journal_path)
    return Controller(plans, journal, store, owner, told, Registry(store), alert)


def build_spans(settings: Settings, dropped: Callable[[int], None] = lambda _: None) -> Spans | None:
    """What sends spans, where there is a collector to send them to."""
    if settings.otel.endpoint is None:
        return None
    from telemetry.otel import Spans  # costs time and memory, and not everyone wants it

    return Spans(settings.otel.endpoint, dropped)


class Alerts:
    """Tells each route's webhook, where it has one, what happened to its rollout."""

    def __init__(self, settings: Settings) -> None:
        hooks = {
            name: route.rollout.webhook
            for name, route in settings.routes.items()
            if route.rollout is not None and route.rollout.webhook
        }
        self._by_url: dict[str, Webhook] = {}
        if hooks:
            from telemetry.webhook import Webhook

            self._by_url = {url: Webhook(url) for url in hooks.values()}
        self._of = {name: self._by_url[url] for name, url in hooks.items()}

    def tell(self, route: str, what: Mapping[str, Any]) -> None:
        """`what` has `about`: `decision` or `guardrail`. Returns at once and raises nothing."""
        if hook := self._of.get(route):
            hook.tell({**what, "route": route})

    def close(self) -> None:
        for hook in self._by_url.values():
            hook.close()


def build_admin(settings: Settings) -> Guarded:
    """The admin listener's ASGI application. Raises `StateError`s."""
    from gateway import admin
    from understudy.rollout_report import rollout_report

    store, journal = open_store(settings), Journal(settings.journal_path)
    plans, turn = route_plans(settings), threading.Lock()

    def report(now: float) -> Sequence[Mapping[str, Any]]:
        with turn:  # the journal is one thread's at a time
            return rollout_report(plans, store, journal, now)

    def close() -> None:
        store.close()
        journal.close()

    return admin.build(report, admin.Named(settings.admin.host if settings.admin else ""), close)


def build_gateway(settings: Settings) -> Starlette:
    """One worker's ASGI application."""
    from gateway import app
    from gateway.arms import Route
    from gateway.upstream import Replica, Timeouts
    from router.controller import initial_snapshot

    named = {(one.url, one.api_key) for route in settings.routes.values() for one in route.upstreams}
    replicas = {one: Replica(*one) for one in named}  # routes that share one share its connections
    routes = {
        name: Route(
            name,
            route.arms,
            [replicas[upstream.url, upstream.api_key] for upstream in route.upstreams],
            Timeouts(route.timeouts.connect, route.timeouts.first_byte, route.timeouts.idle),
            route.policy.segment_by if isinstance(route.policy, Learned) else None,
            route.policy.features if isinstance(route.policy, Linear) else (),
        )
        for name, route in settings.routes.items()
    }
    store, assignments = open_shared(settings)
    return app.build(
        app.Parts(
            routes=routes,
            snapshots={plan.name: initial_snapshot(plan, time.time()) for plan in route_plans(settings)},
            refresh={name: route.policy.refresh for name, route in settings.routes.items()},
            store=store,
            assignments=assignments,
            journal=settings.journal_path,
            captures=Captures(
                Capture(settings.capture.text, settings.capture.redact),
                {name: route.capture for name, route in settings.routes.items() if route.capture is not None},
                settings.capture.tenants,
            ),
            rewards={name: route.reward for name, route in settings.routes.items()},
            require_key=settings.auth.require_key,
            feedback_per_minute=settings.auth.feedback_per_minute,
            max_body=settings.listen.max_body,
            try_page=settings.listen.try_page,
            spans=partial(build_spans, settings),
        )
    )
