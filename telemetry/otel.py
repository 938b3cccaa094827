"""Spans out: one for each answer and one for each signal, by OpenTelemetry's conventions for generative AI.

The conventions (semantic-conventions-genai, status Development) name the attributes; `_ATTRIBUTES` and `_SIGNAL` are
the tables that map our fields to them. A signal is a span in a trace of its own, with one link to its answer's span and
the event `gen_ai.evaluation.result`. Spans are built from facts after the last byte, in batches, by the SDK's own
OTLP/HTTP exporter; they are never the only copy of anything, so a dead collector costs a dropped span.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from telemetry.events import OPERATIONS, Interaction, Signal

_ATTRIBUTES: dict[str, Callable[[Interaction], Any]] = {
    "gen_ai.operation.name": lambda i: OPERATIONS[i.endpoint],
    "gen_ai.provider.name": lambda i: "vllm" if (i.upstream or "").startswith("http") else i.upstream,
    "gen_ai.request.model": lambda i: i.route,
    "gen_ai.request.stream": lambda i: i.stream,
    "gen_ai.response.model": lambda i: i.answerer.model,
    "gen_ai.response.id": lambda i: i.response_id or i.request_id,
    "gen_ai.response.finish_reasons": lambda i: (i.finish_reason,) if i.finish_reason else None,
    "gen_ai.response.time_to_first_chunk": lambda i: i.first_byte if i.stream else None,
    "gen_ai.usage.input_tokens": lambda i: i.tokens_in,
    "gen_ai.usage.output_tokens": lambda i: i.tokens_out,
    "gen_ai.usage.cache_read.input_tokens": lambda i: i.tokens_cached,
    "gen_ai.conversation.id": lambda i: i.session,
    "error.type": lambda i: i.error,
    "http.response.status_code": lambda i: i.status or None,
    "user.id": lambda i: i.user,
    "understudy.tenant": lambda i: i.tenant,
    "understudy.arm": lambda i: i.answerer.arm,
    "understudy.policy": lambda i: i.answerer.policy,
    "understudy.propensity": lambda i: i.answerer.propensity,
    "understudy.snapshot": lambda i: i.answerer.snapshot,
    "understudy.prompt_version": lambda i: i.answerer.prompt_version,
    "understudy.task_type": lambda i: i.task_type,
}

_EVALUATION = "gen_ai.evaluation.result"
_SIGNAL: dict[str, Callable[[Signal, Interaction], Any]] = {
    "gen_ai.evaluation.name": lambda s, _: s.name or s.kind,
    "gen_ai.evaluation.score.value": lambda s, _: s.value,
    "gen_ai.response.id": lambda _, i: i.response_id or i.request_id,
    "gen_ai.response.model": lambda _, i: i.answerer.model,
    "gen_ai.conversation.id": lambda _, i: i.session,
    "user.id": lambda s, _: s.subject,
    "understudy.tenant": lambda s, _: s.tenant,
    "understudy.arm": lambda _, i: i.answerer.arm,
    "understudy.signal.kind": lambda s, _: s.kind,
    "understudy.signal.event_id": lambda s, _: s.event_id,
    "understudy.signal.source": lambda s, _: s.source,
    "understudy.signal.detector": lambda s, _: s.detector,
    "understudy.signal.confidence": lambda s, _: s.confidence,
}

_SCOPE = InstrumentationScope("understudy")


MOST_WAITING = 2048
"""Spans that wait to be sent; the SDK's own queue is as long, and forgets without a word."""


class _Counting(SpanExporter):
    """The exporter, counting what waits for it and what could not be sent."""

    def __init__(self, exporter: SpanExporter, dropped: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._dropped = dropped
        self._waiting = 0
        self._lock = threading.Lock()

    def has_room(self) -> bool:
        """Whether one more span may wait, which is counted with this."""
        with self._lock:
            room = self._waiting < MOST_WAITING
            self._waiting += room
        if not room:
            self._dropped(1)
        return room

    def export(self, spans: Any) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        finally:
            with self._lock:
                self._waiting -= len(spans)
        if result is not SpanExportResult.SUCCESS:
            self._dropped(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class Spans:
    """Sends a span for each answer and each signal to the collector at `endpoint` (base URL, without /v1/traces).

    `dropped` is told how many were not sent, at once or later.
    """

    def __init__(self, endpoint: str, dropped: Callable[[int], None] = lambda _: None) -> None:
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._exporter = _Counting(exporter, dropped)
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=MOST_WAITING)
        self._resource = Resource.create({"service.name": "understudy"})

    def answered(self, fact: Interaction) -> None:
        """Queue the span of one answer."""
        if self._exporter.has_room():
            self._processor.on_end(self._span(fact))

    def heard(self, signal: Signal, answer: Interaction) -> None:
        """Queue the span of one signal, about an answer."""
        if self._exporter.has_room():
            self._processor.on_end(self._signal(signal, answer))

    def _span(self, fact: Interaction) -> ReadableSpan:
        start = int(fact.at * 1e9)
        attributes = {name: value for name, read in _ATTRIBUTES.items() if (value := read(fact)) is not None}
        context = _context(fact)
        parent = (
            SpanContext(context.trace_id, int(fact.parent_span_id, 16), True, TraceFlags(1))
            if fact.parent_span_id
            else None
        )
        return ReadableSpan(
            name=f"{attributes['gen_ai.operation.name']} {fact.route}",
            context=context,
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR, fact.error) if fact.error else Status(StatusCode.UNSET),
            start_time=start,
            end_time=start + int(fact.duration * 1e9),
            instrumentation_scope=_SCOPE,
        )

    def _signal(self, signal: Signal, answer: Interaction) -> ReadableSpan:
        at = int(signal.at * 1e9)
        attributes = {name: v for name, read in _SIGNAL.items() if (v := read(signal, answer)) is not None}
        known = hashlib.blake2b(f"{signal.tenant}\x1f{signal.event_id}".encode(), digest_size=24).digest()
        trace_id, span_id = int.from_bytes(known[:16], "big"), int.from_bytes(known[16:], "big")
        return ReadableSpan(
            name=f"signal {signal.kind}",
            context=SpanContext(trace_id, span_id, False, TraceFlags(1)),  # the same for a signal that is sent again
            resource=self._resource,
            attributes=attributes,
            events=(Event(_EVALUATION, attributes, at),),
            links=(Link(_context(answer)),),
            kind=SpanKind.INTERNAL,
            status=Status(StatusCode.UNSET),
            start_time=at,
            end_time=at,
            instrumentation_scope=_SCOPE,
        )

    def close(self) -> None:
        """Send what is queued, for at most a few seconds."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]


def _context(fact: Interaction) -> SpanContext:
    return SpanContext(int(fact.trace_id or "1", 16), int(fact.span_id or "1", 16), False, TraceFlags(1))
