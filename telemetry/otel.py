"""Spans out: one for each answer, by OpenTelemetry's conventions for generative AI, over OTLP/HTTP.

The conventions (semantic-conventions-genai, status Development) name the attributes; `_ATTRIBUTES` is the one table
that maps our fields to them. Spans are built from facts after the last byte, in batches, by the SDK's own
exporter; they are never the only copy of anything, so a dead collector costs a dropped span.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from telemetry.events import Interaction

_OPERATIONS = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "responses": "chat",
    "embeddings": "embeddings",
}

_ATTRIBUTES: dict[str, Callable[[Interaction], Any]] = {
    "gen_ai.operation.name": lambda i: _OPERATIONS[i.endpoint],
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

_SCOPE = InstrumentationScope("understudy")


class _Counting(SpanExporter):
    """The exporter, counting what could not be sent."""

    def __init__(self, exporter: SpanExporter, dropped: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._dropped = dropped

    def export(self, spans: Any) -> SpanExportResult:
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._dropped(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


class Spans:
    """Sends a span for each interaction to the collector at `endpoint` (base URL, without /v1/traces)."""

    def __init__(self, endpoint: str, dropped: Callable[[int], None] = lambda _: None) -> None:
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._processor = BatchSpanProcessor(_Counting(exporter, dropped))
        self._resource = Resource.create({"service.name": "understudy"})

    def answered(self, fact: Interaction) -> None:
        """Queue the span of one answer."""
        self._processor.on_end(self._span(fact))

    def _span(self, fact: Interaction) -> ReadableSpan:
        start = int(fact.at * 1e9)
        attributes = {name: value for name, read in _ATTRIBUTES.items() if (value := read(fact)) is not None}
        trace_id = int(fact.trace_id or "1", 16)
        parent = (
            SpanContext(trace_id, int(fact.parent_span_id, 16), True, TraceFlags(1)) if fact.parent_span_id else None
        )
        return ReadableSpan(
            name=f"{attributes['gen_ai.operation.name']} {fact.route}",
            context=SpanContext(trace_id, int(fact.span_id or "1", 16), False, TraceFlags(1)),
            parent=parent,
            resource=self._resource,
            attributes=attributes,
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR, fact.error) if fact.error else Status(StatusCode.UNSET),
            start_time=start,
            end_time=start + int(fact.duration * 1e9),
            instrumentation_scope=_SCOPE,
        )

    def close(self) -> None:
        """Send what is queued, for at most a few seconds."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]
