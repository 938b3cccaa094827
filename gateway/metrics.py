"""Prometheus metrics, by route and arm. Several workers share them through files (PROMETHEUS_MULTIPROC_DIR).

What the conventions for generative AI have a metric for has their name (gen_ai.server.request.duration and so on, with
dots as underscores, and their buckets); all else begins with understudy_. The exposition format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from telemetry.events import OPERATIONS, Interaction

# The boundaries that the conventions advise.
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_GEN_AI = ("gen_ai_operation_name", "gen_ai_request_model", "gen_ai_response_model", "arm")
"""The request's model is the route, the response's the version that answered."""


class _Histogram(Histogram):
    def take_in(self, seen: _Seen) -> None:
        """Add what was seen, and begin anew."""
        self._sum.inc(seen.total)
        for bucket, count in zip(self._buckets, seen.counts, strict=True):
            if count:
                bucket.inc(count)
        seen.clear()


class _Seen:
    """Values on their way to a histogram: a lock and a write to a shared file for each would cost more than a draw."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.clear()

    def clear(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class _Answers:
    """What was seen of answers that have all labels in common, and where it goes."""

    __slots__ = ("duration", "first_byte", "n", "requests", "to", "tokens_in", "tokens_out")

    def __init__(self, requests: Counter, *to: _Histogram) -> None:
        self.n = 0
        self.requests, self.to = requests, to
        self.duration, self.first_byte = _Seen(_DURATION), _Seen(_FIRST)
        self.tokens_in, self.tokens_out = _Seen(_TOKENS), _Seen(_TOKENS)

    def flush(self) -> None:
        if self.n:
            self.requests.inc(self.n)
            self.n = 0
            for histogram, seen in zip(
                self.to, (self.duration, self.first_byte, self.tokens_in, self.tokens_out), strict=True
            ):
                histogram.take_in(seen)


class Metrics:
    """Build one a process, after PROMETHEUS_MULTIPROC_DIR is set (if several processes are to be added up).

    What is counted for each request is kept aside, and is in the page from the next `flush` on.
    """

    def __init__(self) -> None:
        shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry = CollectorRegistry()
        own = None if shared else self._registry
        by_arm = ("route", "arm")

        def counter(name: str, what: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"understudy_{name}", what, labels, registry=own)

        self.requests = counter("requests", "Requests that reached an arm.", (*by_arm, "status", "error"))
        self.refused = counter("refused", "Requests answered with an error of our own.", ("status",))
        self.retries = counter("upstream_retries", "Requests sent to a second replica.", ("route",))
        self.fallbacks = counter("fallbacks", "Requests that another arm answered: no replica served theirs.", by_arm)
        self.shadow_dropped = counter("shadow_dropped", "Copies for a challenger that were not answered.", ("route",))
        self.signals = counter("signals", "Signals taken in.", ("kind", "source"))
        self.feedback_refused = counter("feedback_refused", "Feedback items refused.", ("reason",))
        self.recalls_failed = counter("recalls_failed", "Session recalls that failed or took too long.")
        self.spans_dropped = counter("spans_dropped", "Spans that were not exported.")
        self.duration = _Histogram(
            "gen_ai_server_request_duration_seconds",
            "From request to last byte.",
            (*_GEN_AI, "error_type"),
            buckets=_DURATION,
            registry=own,
        )
        self.first_byte = _Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From request to first byte.",
            _GEN_AI,
            buckets=_FIRST,
            registry=own,
        )
        self.tokens = _Histogram(
            "gen_ai_client_token_usage_token",
            "Tokens of a request and of its answer.",
            (*_GEN_AI, "gen_ai_token_type"),
            buckets=_TOKENS,
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
        self.begun: Tally[str] = Tally()
        """Requests being answered, by route."""
        self._seen: dict[tuple[str, str, str, str, int, str], _Answers] = {}

    def _answers(self, route: str, arm: str, model: str, endpoint: str, status: int, error: str) -> _Answers:
        gen_ai = (OPERATIONS.get(endpoint, endpoint), route, model, arm)
        return _Answers(
            self.requests.labels(route, arm, str(status), error),
            self.duration.labels(*gen_ai, error),
            self.first_byte.labels(*gen_ai),
            self.tokens.labels(*gen_ai, "input"),
            self.tokens.labels(*gen_ai, "output"),
        )

    def answered(self, fact: Interaction) -> None:
        by = fact.answerer
        labels = fact.route, by.arm, by.model, fact.endpoint, fact.status, fact.error or ""
        found = self._seen.get(labels)
        if found is None:
            found = self._seen[labels] = self._answers(*labels)
        found.n += 1
        found.duration.add(fact.duration)
        if fact.first_byte is not None:
            found.first_byte.add(fact.first_byte)
        if fact.tokens_in:
            found.tokens_in.add(fact.tokens_in)
        if fact.tokens_out:
            found.tokens_out.add(fact.tokens_out)

    def flush(self) -> None:
        """Put what was counted where the page is made from. On the event loop that counts."""
        for route, count in self.begun.items():
            self.in_flight.labels(route).set(count)
        for seen in self._seen.values():
            seen.flush()

    def page(self) -> bytes:
        """All workers' metrics as text."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
