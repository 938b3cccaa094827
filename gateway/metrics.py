"""Prometheus metrics, by route and arm. Several workers share them through files (PROMETHEUS_MULTIPROC_DIR).

The exposition format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from telemetry.events import Interaction

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Build one a process, after PROMETHEUS_MULTIPROC_DIR is set (if several processes are to be added up)."""

    def __init__(self) -> None:
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry = CollectorRegistry()
        own = None if shared else self._registry
        by_arm = ("route", "arm")

        def counter(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"understudy_{name}", what, labels, registry=own)

        self.requests = counter("requests", "Requests that reached an arm.", (*by_arm, "status", "error"))
        self.refused = counter("refused", "Requests answered with an error of our own.", ("status",))
        self.tokens = counter("tokens", "Tokens.", (*by_arm, "direction"))
        self.retries = counter("upstream_retries", "Requests sent to a second replica.", ("route",))
        self.signals = counter("signals", "Signals taken in.", ("kind", "source"))
        self.feedback_refused = counter("feedback_refused", "Feedback items refused.", ("reason",))
        self.recalls_failed = counter("recalls_failed", "Session recalls that failed or took too long.")
        self.spans_dropped = counter("spans_dropped", "Spans that were not exported.")
        self.duration = Histogram(
            "understudy_request_seconds", "From request to last byte.", by_arm, buckets=_SECONDS, registry=own
        )
        self.first_byte = Histogram(
            "understudy_first_byte_seconds",
            "From request to first byte.",
            by_arm,
            buckets=_SECONDS,
            registry=own,
        )
        self.in_flight = Gauge(
            "understudy_in_flight",
            "Requests being answered.",
            ("route",),
            registry=own,
            multiprocess_mode="livesum",
        )
        self.journal_waiting = Gauge(
            "understudy_journal_waiting", "Facts not on disk yet.", registry=own, multiprocess_mode="livesum"
        )
        self.journal_dropped = Gauge(
            "understudy_journal_dropped",
            "Facts lost: the queue was full.",
            registry=own,
            multiprocess_mode="sum",
        )
        self.snapshot_version = Gauge(
            "understudy_snapshot_version",
            "Weights in use.",
            ("route",),
            registry=own,
            multiprocess_mode="livemin",
        )
        self.snapshot_age = Gauge(
            "understudy_store_seconds_since_seen",
            "Since the store last answered.",
            registry=own,
            multiprocess_mode="livemax",
        )
        self._arm = lru_cache(4096)(self._children)

    def _children(self, route: str, arm: str, status: int, error: str) -> tuple[Any, ...]:
        return (
            self.requests.labels(route, arm, str(status), error),
            self.duration.labels(route, arm),
            self.first_byte.labels(route, arm),
            self.tokens.labels(route, arm, "in"),
            self.tokens.labels(route, arm, "out"),
        )

    def answered(self, fact: Interaction) -> None:
        found = self._arm(fact.route, fact.answerer.arm, fact.status, fact.error or "")
        requests, duration, first_byte, tokens_in, tokens_out = found
        requests.inc()
        duration.observe(fact.duration)
        if fact.first_byte is not None:
            first_byte.observe(fact.first_byte)
        if fact.tokens_in:
            tokens_in.inc(fact.tokens_in)
        if fact.tokens_out:
            tokens_out.inc(fact.tokens_out)

    def page(self) -> bytes:
        """All workers' metrics as text."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
