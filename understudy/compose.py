"""Composition: settings become stores, routes, a gateway and a controller. The only place that knows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from gateway import app
from gateway.proxy import Route
from gateway.upstream import Replica, Timeouts
from learner.registry import Registry
from router.controller import Controller, initial_snapshot
from router.plan import RoutePlan
from router.policy import Learned, Linear
from router.store import Store
from router.store_redis import RedisStore
from router.store_sqlite import SqliteStore
from telemetry.events import Interaction, Signal
from telemetry.journal import Journal
from telemetry.privacy import Capture, Captures
from understudy.settings import Settings

if TYPE_CHECKING:
    from telemetry.otel import Spans


def open_store(settings: Settings) -> Store:
    """The store that `state` names. Raises `StateError`."""
    path = settings.sqlite_path
    return SqliteStore(path) if path is not None else RedisStore(settings.state)


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
    store = open_store(settings)
    plans, journal = route_plans(settings), Journal(settings.journal_path)
    return Controller(plans, journal, store, owner, told, Registry(store), alert)


def build_spans(settings: Settings, dropped: Callable[[int], None] = lambda _: None) -> Spans | None:
    """What sends spans, where there is a collector to send them to."""
    if settings.otel.endpoint is None:
        return None
    from telemetry.otel import Spans  # costs 0.3 s and 20 MB, and not everyone wants it

    return Spans(settings.otel.endpoint, dropped)


def build_gateway(settings: Settings) -> Starlette:
    """One worker's ASGI application."""
    routes = {
        name: Route(
            name,
            route.arms,
            [Replica(upstream.url, upstream.api_key) for upstream in route.upstreams],
            Timeouts(route.timeouts.connect, route.timeouts.first_byte, route.timeouts.idle),
            route.policy.segment_by if isinstance(route.policy, Learned) else None,
            route.policy.features if isinstance(route.policy, Linear) else (),
        )
        for name, route in settings.routes.items()
    }
    return app.build(
        app.Parts(
            routes=routes,
            snapshots={plan.name: initial_snapshot(plan, time.time()) for plan in route_plans(settings)},
            refresh={name: route.policy.refresh for name, route in settings.routes.items()},
            store=open_store(settings),
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
