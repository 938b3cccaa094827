"""Spans leave as the conventions say, to a real OTLP/HTTP receiver; a dead one costs a count and nothing else."""

from __future__ import annotations

from fake_collector import Collector

from telemetry.events import Answerer, Interaction
from telemetry.otel import Spans

FACT = Interaction(
    event_id="e1",
    at=1_700_000_000.0,
    request_id="r1",
    route="assistant",
    tenant="acme",
    session="s1",
    answerer=Answerer("challenger", "assistant-v7-3f9c", propensity=0.25, policy="thompson"),
    response_id="chatcmpl-r1",
    trace_id="0af7651916cd43dd8448eb211c80319c",
    span_id="b7ad6b7169203331",
    parent_span_id="00f067aa0ba902b7",
    stream=True,
    status=200,
    finish_reason="stop",
    tokens_in=12,
    tokens_out=34,
    first_byte=0.1,
    duration=1.5,
    messages=[{"role": "user", "content": "a secret"}],
    answer="another secret",
)


def test_one_span_an_answer_by_the_conventions() -> None:
    with Collector() as collector:
        spans = Spans(collector.url)
        spans.answered(FACT)
        spans.close()
    [span] = collector.spans()
    attributes = collector.attributes(span)
    assert span.name == "chat assistant"
    assert span.trace_id.hex() == FACT.trace_id
    assert span.span_id.hex() == FACT.span_id
    assert span.parent_span_id.hex() == FACT.parent_span_id
    assert span.end_time_unix_nano - span.start_time_unix_nano == 1_500_000_000
    assert attributes["gen_ai.response.model"] == "assistant-v7-3f9c"
    assert attributes["gen_ai.request.model"] == "assistant"
    assert attributes["gen_ai.usage.output_tokens"] == 34
    assert [v.string_value for v in attributes["gen_ai.response.finish_reasons"].values] == ["stop"]
    assert attributes["understudy.propensity"] == 0.25
    assert b"secret" not in b"".join(collector.bodies)


def test_a_dead_collector_costs_a_count() -> None:
    dropped: list[int] = []
    spans = Spans("http://127.0.0.1:9", dropped.append)
    spans.answered(FACT)
    spans.close()
    assert sum(dropped) == 1
