"""What we write as spans is what OpenTelemetry's SDK writes, field by field, whatever the facts hold."""

from __future__ import annotations

from typing import Any

import pytest
from fake_collector import Collector
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from sdk_spans import sdk_answer, sdk_signal

from telemetry.events import OPERATIONS, Answerer, Interaction, Signal
from telemetry.otel import Spans
from telemetry.spans import answer_span, envelope, signal_span

FULL = Interaction(
    event_id="e1",
    at=1_700_000_000.123456,
    request_id="r1",
    route="assistant",
    tenant="acme",
    session="s1",
    answerer=Answerer("challenger", "assistant-v7-3f9c", "prompt-2", "thompson", 7, "de", 0.25),
    response_id="chatcmpl-r1",
    trace_id="0af7651916cd43dd8448eb211c80319c",
    span_id="b7ad6b7169203331",
    parent_span_id="00f067aa0ba902b7",
    user="ann" * 100,
    task_type="translation",
    stream=True,
    status=200,
    finish_reason="stop",
    tokens_in=12,
    tokens_out=34_567,
    tokens_cached=0,
    first_byte=0.1,
    duration=1.5,
    upstream="http://10.0.0.1:8000",
    messages=[{"role": "user", "content": "a secret"}],
    answer="another secret",
)
FEW = Interaction(
    event_id="e2", at=0.0, request_id="r2", route="", tenant="", session="", answerer=Answerer("base", "m")
)
FAILED = replace(FULL, parent_span_id=None, error="upstream_cut", status=0, upstream="openai", finish_reason=None)
UNARY = replace(FULL, stream=False, endpoint="embeddings", status=502, route="Übersetzer 译", response_id=None)
THUMB = Signal(
    event_id="t1", at=1_700_000_001.5, kind="thumb", tenant="acme", value=1.0, subject="ann", text="a secret"
)
FOUND = Signal("t2", 1_700_000_002.0, "rephrase", "acme", source="detected", detector="rephrase-2", confidence=0.75)
OUTCOME = Signal(event_id="t3", at=0.0, kind="outcome", tenant="", name="bought", value=-12.5)

ANSWERS = [FULL, FEW, FAILED, UNARY, FULL]
SIGNALS = [(THUMB, FULL), (FOUND, FEW), (OUTCOME, FAILED)]


def ordered(request: ExportTraceServiceRequest) -> ExportTraceServiceRequest:
    """With attributes in one order, which means nothing."""
    for resource in request.resource_spans:
        in_order(resource.resource)
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            for one in (span, *span.events, *span.links):
                in_order(one)
    return request


def in_order(has_attributes: Any) -> None:
    attributes = sorted(has_attributes.attributes, key=lambda attribute: str(attribute.key))
    del has_attributes.attributes[:]
    has_attributes.attributes.extend(attributes)


def from_sdk(resource: Resource) -> list[ReadableSpan]:
    return [sdk_answer(fact, resource) for fact in ANSWERS] + [sdk_signal(*one, resource) for one in SIGNALS]


@pytest.mark.parametrize("more", ["", "deployment.environment.name=test,service.name=ours,host.name=a%20b"])
def test_a_collector_is_sent_what_the_sdk_sends(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", more)
    with Collector() as collector:
        sdk = OTLPSpanExporter(endpoint=f"{collector.url}/v1/traces")
        sdk.export(from_sdk(Resource.create({"service.name": "understudy"})))
        sdk.shutdown()
        ours = Spans(collector.url)
        for fact in ANSWERS:
            ours.answered(fact)
        for signal, answer in SIGNALS:
            ours.heard(signal, answer)
        ours.close()
    theirs, own = (ordered(ExportTraceServiceRequest.FromString(body)) for body in collector.bodies)
    assert len(own.resource_spans[0].scope_spans[0].spans) == len(ANSWERS) + len(SIGNALS)
    assert str(own) == str(theirs)
    assert own == theirs
    assert b"secret" not in collector.bodies[1]
    assert collector.headers[0]["content-type"] == collector.headers[1]["content-type"]
    assert collector.headers[0].keys() == collector.headers[1].keys()


def test_a_service_has_the_name_that_the_environment_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    resource = Resource.create({"service.name": "understudy"})
    own = ExportTraceServiceRequest.FromString(envelope(resource.attributes, resource.schema_url)([answer_span(FEW)]))
    assert ordered(own) == ordered(encode_spans([sdk_answer(FEW, resource)]))


def test_a_resource_may_hold_whatever_detectors_find() -> None:
    attributes = {
        "process.command_args": ("a", "b" * 200),
        "up": True,
        "n": -5,
        "much": 2**62,
        "x": 0.5,
        "odds": (1, 2),
    }
    resource = Resource(attributes, "https://opentelemetry.io/schemas/1.36.0")
    own = ExportTraceServiceRequest.FromString(envelope(resource.attributes, resource.schema_url)([answer_span(FEW)]))
    assert ordered(own) == ordered(encode_spans([sdk_answer(FEW, resource)]))


def test_a_number_that_otlp_does_not_have_and_half_a_character_lose_no_span() -> None:
    fact = replace(FULL, tokens_in=1 << 80, session="\ud800")
    request = ExportTraceServiceRequest.FromString(envelope({}, "")([answer_span(fact), answer_span(FULL)]))
    odd, even = request.resource_spans[0].scope_spans[0].spans
    said = Collector.attributes(odd)
    assert said["gen_ai.usage.input_tokens"] == float(1 << 80)
    assert said["gen_ai.conversation.id"] == "?"
    assert Collector.attributes(even)["gen_ai.usage.input_tokens"] == 12


WORDS = st.text(max_size=300)
MAYBE = st.none() | WORDS
COUNTS = st.none() | st.integers(-(1 << 63), (1 << 63) - 1)
SECONDS = st.floats(0, 1e9)
IDS = st.none() | st.from_regex(r"[0-9a-f]{16}", fullmatch=True).filter(lambda name: int(name, 16) > 0)
FACTS = st.builds(
    Interaction,
    event_id=WORDS, at=SECONDS, request_id=WORDS, route=WORDS, tenant=WORDS, session=WORDS, response_id=MAYBE,
    answerer=st.builds(
        Answerer, arm=WORDS, model=WORDS, prompt_version=MAYBE, policy=WORDS, snapshot=st.integers(0, 1 << 40),
        propensity=st.floats(0, 1),
    ),
    endpoint=st.sampled_from(list(OPERATIONS)), trace_id=IDS, span_id=IDS, parent_span_id=IDS, user=MAYBE,
    task_type=MAYBE, stream=st.booleans(), status=st.integers(0, 599), error=MAYBE, finish_reason=MAYBE,
    tokens_in=COUNTS, tokens_out=COUNTS, tokens_cached=COUNTS, first_byte=st.none() | SECONDS,
    duration=SECONDS, upstream=MAYBE,
)  # fmt: skip
HEARD = st.builds(
    Signal,
    event_id=WORDS, at=SECONDS, kind=WORDS, tenant=WORDS, subject=MAYBE, value=st.none() | st.floats(allow_nan=False),
    name=MAYBE, source=WORDS, detector=MAYBE, confidence=st.floats(0, 1),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(FACTS, HEARD)
def test_whatever_a_fact_holds_is_written_as_the_sdk_writes_it(fact: Interaction, signal: Signal) -> None:
    resource = Resource({"service.name": "understudy"})
    request = envelope(resource.attributes, resource.schema_url)
    own = ExportTraceServiceRequest.FromString(request([answer_span(fact), signal_span(signal, fact)]))
    assert ordered(own) == ordered(encode_spans([sdk_answer(fact, resource), sdk_signal(signal, fact, resource)]))
