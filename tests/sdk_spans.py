"""The spans that OpenTelemetry's own SDK makes of our facts: what ours are compared with."""

from __future__ import annotations

import hashlib
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from telemetry.events import OPERATIONS, Interaction, Signal

SCOPE = InstrumentationScope("understudy")


def sdk_answer(fact: Interaction, resource: Resource) -> ReadableSpan:
    start, who = int(fact.at * 1e9), fact.answerer
    parent = SpanContext(context(fact).trace_id, int(fact.parent_span_id or "1", 16), True, TraceFlags(1))
    return ReadableSpan(
        name=f"{OPERATIONS[fact.endpoint]} {fact.route}",
        context=context(fact),
        parent=parent if fact.parent_span_id else None,
        resource=resource,
        attributes=known(
            {
                "gen_ai.operation.name": OPERATIONS[fact.endpoint],
                "gen_ai.provider.name": "vllm" if (fact.upstream or "").startswith("http") else fact.upstream,
                "gen_ai.request.model": fact.route,
                "gen_ai.request.stream": fact.stream,
                "gen_ai.response.model": who.model,
                "gen_ai.response.id": fact.response_id or fact.request_id,
                "gen_ai.response.finish_reasons": (fact.finish_reason,) if fact.finish_reason else None,
                "gen_ai.response.time_to_first_chunk": fact.first_byte if fact.stream else None,
                "gen_ai.usage.input_tokens": fact.tokens_in,
                "gen_ai.usage.output_tokens": fact.tokens_out,
                "gen_ai.usage.cache_read.input_tokens": fact.tokens_cached,
                "gen_ai.conversation.id": fact.session,
                "error.type": fact.error,
                "http.response.status_code": fact.status or None,
                "user.id": fact.user,
                "understudy.tenant": fact.tenant,
                "understudy.arm": who.arm,
                "understudy.policy": who.policy,
                "understudy.propensity": who.propensity,
                "understudy.snapshot": who.snapshot,
                "understudy.prompt_version": who.prompt_version,
                "understudy.task_type": fact.task_type,
            }
        ),
        kind=SpanKind.CLIENT,
        status=Status(StatusCode.ERROR, fact.error) if fact.error else Status(StatusCode.UNSET),
        start_time=start,
        end_time=start + int(fact.duration * 1e9),
        instrumentation_scope=SCOPE,
    )


def sdk_signal(signal: Signal, answer: Interaction, resource: Resource) -> ReadableSpan:
    at = int(signal.at * 1e9)
    attributes = known(
        {
            "gen_ai.evaluation.name": signal.name or signal.kind,
            "gen_ai.evaluation.score.value": signal.value,
            "gen_ai.response.id": answer.response_id or answer.request_id,
            "gen_ai.response.model": answer.answerer.model,
            "gen_ai.conversation.id": answer.session,
            "user.id": signal.subject,
            "understudy.tenant": signal.tenant,
            "understudy.arm": answer.answerer.arm,
            "understudy.signal.kind": signal.kind,
            "understudy.signal.event_id": signal.event_id,
            "understudy.signal.source": signal.source,
            "understudy.signal.detector": signal.detector,
            "understudy.signal.confidence": signal.confidence,
        }
    )
    ids = hashlib.blake2b(f"{signal.tenant}\x1f{signal.event_id}".encode(), digest_size=24).digest()
    return ReadableSpan(
        name=f"signal {signal.kind}",
        context=SpanContext(int.from_bytes(ids[:16], "big"), int.from_bytes(ids[16:], "big"), False, TraceFlags(1)),
        resource=resource,
        attributes=attributes,
        events=(Event("gen_ai.evaluation.result", attributes, at),),
        links=(Link(context(answer)),),
        kind=SpanKind.INTERNAL,
        status=Status(StatusCode.UNSET),
        start_time=at,
        end_time=at,
        instrumentation_scope=SCOPE,
    )


def context(fact: Interaction) -> SpanContext:
    return SpanContext(int(fact.trace_id or "1", 16), int(fact.span_id or "1", 16), False, TraceFlags(1))


def known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
