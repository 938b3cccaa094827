"""OTLP in and out: what apps send is heard, what is hostile is refused, and every signal finds its answer."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import ROUTE, Gateway, MakeGateway, ask, eventually
from fake_collector import Collector
from fake_vllm import Behaviour, FakeVllm
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from gateway import listening
from gateway import otlp as gateway_otlp
from telemetry.events import Signal
from telemetry.otel import MOST_WAITING, Spans
from telemetry.writer import JournalWriter

PROTOBUF = {"content-type": "application/x-protobuf"}
JSON = {"content-type": "application/json"}


def answered(gw: Gateway, **headers: str) -> str:
    before = len(gw.interactions())
    name = str(gw.chat(headers=headers).json()["id"])
    gw.interaction(before + 1)
    return name


# From the OpenTelemetry SDK


@pytest.fixture
def tracing() -> Iterator[Any]:
    """Makes tracers that export at once to a gateway, as an instrumented app's do."""
    providers = []

    def tracer(gw: Gateway, compression: Compression = Compression.NoCompression, key: str | None = None) -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else None
        exporter = OTLPSpanExporter(endpoint=f"{gw.url}/v1/traces", compression=compression, headers=headers)
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        providers.append(provider)
        return provider.get_tracer("an app")

    yield tracer
    for provider in providers:
        provider.shutdown()


@pytest.mark.parametrize("compression", [Compression.NoCompression, Compression.Gzip, Compression.Deflate])
def test_a_span_of_an_instrumented_app_is_a_signal(
    gateway: MakeGateway, fake: FakeVllm, tracing: Any, compression: Compression
) -> None:
    gw = gateway(fake)
    name = answered(gw)
    attributes = {"understudy.signal.kind": "thumb", "understudy.signal.value": True, "gen_ai.response.id": name}
    with tracing(gw, compression).start_as_current_span("liked it", attributes=attributes | {"user.id": "ann"}):
        pass
    (signal,) = gw.signals()
    assert (signal.kind, signal.value, signal.source) == ("thumb", 1.0, "otlp")
    assert signal.response_id == gw.interaction().request_id
    assert signal.subject not in (None, "ann"), "a user is a pseudonym here too"
    assert gw.sums()["champion"].n == 1.0


def test_an_app_that_is_traced_needs_to_know_no_id(gateway: MakeGateway, fake: FakeVllm, tracing: Any) -> None:
    """The request carries the app's `traceparent`; what is said later in the same trace is about its answer."""
    gw = gateway(fake)
    tracer = tracing(gw)
    with tracer.start_as_current_span("handle a message") as span:
        context = span.get_span_context()
        answered(gw, traceparent=f"00-{context.trace_id:032x}-{context.span_id:016x}-01")
        with tracer.start_as_current_span("copied", attributes={"understudy.signal.kind": "copy"}):
            pass
    (signal,) = gw.signals()
    with gw.journal() as journal:
        ((_, answer),) = journal.answers(signal)
    assert answer.request_id == gw.interaction().request_id


def test_of_two_answers_in_a_trace_the_one_whose_span_is_near_is_meant(
    gateway: MakeGateway, fake: FakeVllm, tracing: Any
) -> None:
    gw = gateway(fake)
    tracer = tracing(gw)
    with tracer.start_as_current_span("agent"):
        for _ in range(2):
            with tracer.start_as_current_span("step") as step:
                context = step.get_span_context()
                answered(gw, traceparent=f"00-{context.trace_id:032x}-{context.span_id:016x}-01")
                step.add_event("gen_ai.evaluation.result", {"gen_ai.evaluation.name": "copy"})
    one, two = gw.wait_interactions(2)
    assert one.trace_id == two.trace_id
    assert [signal.response_id for signal in gw.signals("copy")] == [one.request_id, two.request_id]


def test_a_vote_right_after_the_second_answer_under_a_span_is_not_taken_for_the_first(
    gateway: MakeGateway, fake: FakeVllm, tracing: Any
) -> None:
    gw = gateway(fake)
    tracer = tracing(gw)
    with tracer.start_as_current_span("agent") as agent:
        context = agent.get_span_context()
        headers = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-01"}
        answered(gw, **headers)
        gw.chat(headers=headers)
        with tracer.start_as_current_span("copied", attributes={"understudy.signal.kind": "copy"}):
            pass
    (signal,) = gw.signals("copy")
    assert signal.response_id is None, "it is about the trace, whose last answer then is meant"
    with gw.journal() as journal:
        assert len(journal.answers(signal)) == 2


def test_a_link_says_what_a_span_is_about(gateway: MakeGateway, fake: FakeVllm, tracing: Any) -> None:
    gw = gateway(fake)
    answered(gw)
    answer = gw.interaction()
    assert answer.trace_id
    assert answer.span_id
    context = trace.SpanContext(int(answer.trace_id, 16), int(answer.span_id, 16), True, trace.TraceFlags(1))
    attributes = {"understudy.signal.kind": "rating", "understudy.signal.value": 4}
    with tracing(gw).start_as_current_span("rated", links=[trace.Link(context)], attributes=attributes):
        pass
    assert gw.signals()[0].trace_id == answer.trace_id
    assert gw.sums()["champion"].n == 1.0


def test_evaluations_by_the_conventions_are_outcomes_or_surveys(
    gateway: MakeGateway, fake: FakeVllm, tracing: Any
) -> None:
    gw = gateway(fake)
    name = answered(gw)
    with tracing(gw).start_as_current_span("chat", attributes={"gen_ai.response.id": name}) as span:
        span.add_event(
            "gen_ai.evaluation.result",
            {"gen_ai.evaluation.name": "relevance", "gen_ai.evaluation.score.value": 0.75},
        )
        span.add_event(
            "gen_ai.evaluation.result",
            {"gen_ai.evaluation.name": "tone", "gen_ai.evaluation.score.label": "kind"},
        )
        span.add_event("something else", {"gen_ai.evaluation.name": "no"})
    signals = gw.signals()
    assert [(s.kind, s.name, s.value, s.text) for s in signals] == [
        ("outcome", "relevance", 0.75, None),
        ("survey", "tone", None, "kind"),
    ]
    assert {s.response_id for s in signals} == {gw.interaction().request_id}


def test_a_log_record_is_a_signal_too(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name = answered(gw)
    provider = LoggerProvider()
    provider.add_log_record_processor(SimpleLogRecordProcessor(OTLPLogExporter(endpoint=f"{gw.url}/v1/logs")))
    attributes = {"understudy.signal.kind": "correction", "understudy.signal.text": "42", "gen_ai.response.id": name}
    record = LogRecord(
        timestamp=time.time_ns(),
        severity_number=SeverityNumber.INFO,
        body="corrected",
        event_name="understudy.signal",
        attributes=attributes,
    )
    provider.get_logger("an app").emit(record)
    provider.shutdown()
    (signal,) = gw.signals()
    assert (signal.kind, signal.text, signal.response_id) == ("correction", "42", gw.interaction().request_id)


def test_a_span_that_is_sent_again_counts_once(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    body = exported([span(answered(gw), kind="thumb", value=True)])
    for _ in range(3):
        assert gw.http.post("/v1/traces", content=body, headers=PROTOBUF).status_code == 200
    assert len({s.event_id for s in gw.signals()}) == 1
    assert gw.sums()["champion"].n == 1.0


def test_a_tenant_speaks_for_its_own_answers(gateway: MakeGateway, fake: FakeVllm, tracing: Any) -> None:
    gw = gateway(fake, auth={"require_key": True})
    acme, rival = gw.key("acme"), gw.key("rival")
    name = answered(gw, authorization=f"Bearer {acme}")
    attributes = {"understudy.signal.kind": "thumb", "understudy.signal.value": True, "gen_ai.response.id": name}
    with tracing(gw, key=rival).start_as_current_span("thumb", attributes=attributes):
        pass
    (signal,) = gw.signals("thumb")
    with gw.journal() as journal:
        assert journal.answers(signal) == []
    said = gw.http.post("/v1/traces", content=exported([]), headers=PROTOBUF)
    assert said.status_code == 401
    assert Status.FromString(said.content).code == 16


def test_an_instrumented_app_in_node_is_heard_as_well(gateway: MakeGateway, fake: FakeVllm) -> None:
    """It sends OTLP as JSON, where Python's SDK sends protobuf."""
    gw = gateway(fake)
    name = answered(gw)
    path = f"{os.environ['PATH']}:{Path(sys.executable).parent}"
    node = shutil.which("node", path=path)
    assert node, "Node.js is needed: `make test` installs it"
    done = subprocess.run(
        [node, str(Path(__file__).parent / "js" / "send_spans.js"), gw.url, name],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = gw.wait_interactions(2)
    signals = {s.kind: s for s in gw.signals()}
    assert set(signals) == {"copy", "thumb", "outcome"}
    with gw.journal() as journal:
        about = {kind: journal.answers(s)[-1][1].request_id for kind, s in signals.items()}
    assert about == {"copy": second.request_id, "thumb": first.request_id, "outcome": second.request_id}
    assert (signals["outcome"].name, signals["outcome"].value) == ("relevance", 1.0)


# What is refused


def attribute(name: str, value: object) -> KeyValue:
    kinds = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value", bytes: "bytes_value"}
    return KeyValue(key=name, value=AnyValue(**{kinds[type(value)]: value}))


def span(answer: str | None = None, **signal: object) -> Span:
    named = {f"understudy.signal.{name}": value for name, value in signal.items()}
    named |= {"gen_ai.response.id": answer} if answer else {}
    return Span(
        trace_id=b"\x01" * 16,
        span_id=random.randbytes(8),
        name="x",
        end_time_unix_nano=time.time_ns(),
        attributes=[attribute(name, value) for name, value in named.items()],
    )


def exported(spans: list[Span]) -> bytes:
    scope = ScopeSpans(spans=spans)
    return ExportTraceServiceRequest(resource_spans=[ResourceSpans(scope_spans=[scope])]).SerializeToString()


def test_bad_records_are_counted_and_named_and_the_good_are_kept(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name = answered(gw)
    spans = [
        span(name, kind="thumb", value=True),
        span(name, kind="rating", value=9),
        span(name, kind="nonsense"),
        span(),
        span(name, kind=b"\xff"),
    ]
    said = gw.http.post("/v1/traces", content=exported(spans), headers=PROTOBUF)
    assert said.status_code == 200
    partial = ExportTraceServiceResponse.FromString(said.content).partial_success
    assert partial.rejected_spans == 3
    assert "from 1 to 5" in partial.error_message
    assert "nonsense" in partial.error_message
    assert [s.kind for s in gw.signals()] == ["thumb"]


def test_the_same_in_json(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name = answered(gw)

    def said(kind: str, **more: object) -> dict[str, object]:
        named = {"understudy.signal.kind": {"stringValue": kind}, "gen_ai.response.id": {"stringValue": name}} | more
        return {
            "traceId": "0af7651916cd43dd8448eb211c80319c",
            "spanId": random.randbytes(8).hex(),
            "endTimeUnixNano": str(time.time_ns()),
            "attributes": [{"key": key, "value": value} for key, value in named.items()],
            "unknownField": None,
        }

    spans = [said("dwell", **{"understudy.signal.value": {"doubleValue": 2.5}}), said("nonsense")]
    body = {"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {"name": "app"}, "spans": spans}]}]}
    found = gw.http.post("/v1/traces", json=body)
    assert found.status_code == 200
    assert found.json()["partialSuccess"]["rejectedSpans"] == "1"
    assert [(s.kind, s.value) for s in gw.signals()] == [("dwell", 2.5)]
    records = [{"eventName": "x", "attributes": spans[0]["attributes"], "timeUnixNano": str(time.time_ns())}]
    logs = {"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}
    assert gw.http.post("/v1/logs", json=logs).json() == {}
    assert [s.kind for s in gw.signals()] == ["dwell", "dwell"]


BOMB = gzip.compress(b"\0" * 50_000_000)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"\xff\xff\xff", PROTOBUF, 400),
        (b"{", JSON, 400),
        (b"[]", JSON, 400),
        (b'{"resourceSpans": 7, "resourceLogs": 7}', JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {}, 415),
        (b"{}", JSON | {"content-encoding": "br"}, 415),
        (b"not gzip", JSON | {"content-encoding": "gzip"}, 400),
        (gzip.compress(b"{}")[:-4], JSON | {"content-encoding": "gzip"}, 400),
        (BOMB, JSON | {"content-encoding": "gzip"}, 413),
        (zlib.compress(b"\0" * 50_000_000), PROTOBUF | {"content-encoding": "deflate"}, 413),
        (b" " * 20_000_000, JSON, 413),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_no_telemetry_is_refused(
    gateway: MakeGateway, fake: FakeVllm, body: bytes, headers: dict[str, str], status: int
) -> None:
    gw = gateway(fake, listen={"max_body": "1MB"})
    for path in ("/v1/traces", "/v1/logs"):
        said = gw.http.post(path, content=body, headers=headers)
        assert said.status_code == status, said.text
        as_protobuf = headers.get("content-type") == PROTOBUF["content-type"]
        message = Status.FromString(said.content).message if as_protobuf else said.json()["message"]
        assert message
    assert gw.signals() == []
    assert gw.chat().status_code == 200


def test_a_signal_in_an_attribute_that_is_nested_without_end_is_harmless(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    name = answered(gw)
    deep = AnyValue(string_value="x")
    for _ in range(20):
        outer = AnyValue()
        outer.array_value.values.append(deep)
        deep = outer
    one = span(name, kind="comment", text="hi")
    one.attributes.append(KeyValue(key="understudy.signal.target", value=deep))
    assert gw.http.post("/v1/traces", content=exported([one]), headers=PROTOBUF).status_code == 200
    assert gw.signals()[0].text == "hi"


def test_thousands_of_spans_that_are_not_for_us_pass_by(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    said = gw.http.post("/v1/traces", content=exported([span() for _ in range(5000)]), headers=PROTOBUF)
    assert said.status_code == 200
    assert said.content == b""
    assert gw.signals() == []


def test_a_record_with_a_bad_id_is_refused_alone(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    good, bad = span(answered(gw), kind="copy"), span(kind="copy")
    bad.span_id = b"short"
    said = gw.http.post("/v1/traces", content=exported([bad, good]), headers=PROTOBUF)
    partial = ExportTraceServiceResponse.FromString(said.content).partial_success
    assert (said.status_code, partial.rejected_spans) == (200, 1)
    assert "no id of 8 bytes" in partial.error_message
    assert [s.kind for s in gw.signals()] == ["copy"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + b"{}," * 1_300_000 + b"{}]}]}]}", "json"),
        (exported([Span()] * 20_000), "x-protobuf"),
        (exported([Span(events=[Span.Event(name="gen_ai.evaluation.result")] * 20_000)]), "x-protobuf"),
    ],
    ids=["json", "protobuf", "events"],
)
def test_a_small_packed_body_of_very_many_records_is_refused_at_once(
    gateway: MakeGateway, fake: FakeVllm, body: bytes, kind: str
) -> None:
    gw = gateway(fake)
    packed = gzip.compress(body)
    assert len(packed) < 50_000
    headers = {"content-type": f"application/{kind}", "content-encoding": "gzip"}
    said = gw.http.post("/v1/traces", content=packed, headers=headers)
    assert said.status_code == 400
    assert b"at most" in said.content or b"smaller batches" in said.content


def test_a_file_of_very_many_members_is_refused(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake)
    for members, status in ((64, 200), (65, 400), (50_000, 400)):
        body = gzip.compress(b"{}") + gzip.compress(b" ") * (members - 1)
        said = gw.http.post("/v1/traces", content=body, headers=JSON | {"content-encoding": "gzip"})
        assert said.status_code == status


def test_logs_answer_in_their_own_words(gateway: MakeGateway, fake: FakeVllm) -> None:
    said = gateway(fake).http.post("/v1/logs", content=b"", headers=PROTOBUF)
    assert said.status_code == 200
    assert not ExportLogsServiceResponse.FromString(said.content).HasField("partial_success")


# Out


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as one:
        yield one


def test_every_request_has_a_span_and_every_signal_a_link_to_it(
    gateway: MakeGateway, fake: FakeVllm, collector: Collector
) -> None:
    gw = gateway(fake, otel={"endpoint": collector.url})
    names = [answered(gw), answered(gw, **{"x-understudy-session": "other"})]
    gw.http.post("/v1/chat/completions", json=ask("bye", stream=True))
    gw.feedback({"response_id": names[0], "kind": "thumb", "value": True, "user": "ann"})
    gw.feedback([{"response_id": names[1], "kind": kind} for kind in ("copy", "flag")])
    gw.wait_interactions(3)
    gw.settled()
    gw.stop()
    spans = collector.spans()
    answers = {s.span_id: s for s in spans if s.name == f"chat {ROUTE}"}
    signals = [s for s in spans if s.name.startswith("signal ")]
    assert len(answers) == 3
    assert sorted(s.name for s in signals) == ["signal copy", "signal flag", "signal thumb"]
    for one in signals:
        (link,) = one.links
        assert answers[link.span_id].trace_id == link.trace_id
        assert one.trace_id != link.trace_id
        (event,) = one.events
        assert event.name == "gen_ai.evaluation.result"
        said = collector.attributes(event)
        assert said["gen_ai.evaluation.name"] == said["understudy.signal.kind"]
        assert said["gen_ai.response.id"] == collector.attributes(answers[link.span_id])["gen_ai.response.id"]


def test_our_own_spans_that_come_back_are_not_heard_again(
    gateway: MakeGateway, fake: FakeVllm, collector: Collector
) -> None:
    gw = gateway(fake, otel={"endpoint": collector.url})
    gw.feedback({"response_id": answered(gw), "kind": "thumb", "value": True})
    gw.settled()
    gw.stop()
    assert any(s.name == "signal thumb" for s in collector.spans())
    again = gateway(fake)
    for body in collector.bodies:
        assert again.http.post("/v1/traces", content=body, headers=PROTOBUF).status_code == 200
    assert again.signals() == []


def test_a_stream_that_is_cut_has_its_span(gateway: MakeGateway, fake: FakeVllm, collector: Collector) -> None:
    gw = gateway(fake, otel={"endpoint": collector.url})
    fake.script(Behaviour("die_mid_stream", after=2))
    with gw.http.stream("POST", "/v1/chat/completions", json=ask(stream=True)) as said:
        said.read()
    fact = gw.interaction()
    gw.stop()
    (one,) = collector.spans()
    assert one.span_id.hex() == fact.span_id
    assert one.status.code == 2
    assert collector.attributes(one)["error.type"] == fact.error == "upstream_cut"


def test_every_signal_has_its_span_whoever_heard_it_and_whenever_its_answer_comes(
    gateway: MakeGateway, fake: FakeVllm, collector: Collector
) -> None:
    gw = gateway(fake, otel={"endpoint": collector.url}, reward={"window": "1s"})
    with gw.journal() as journal:
        early = Signal(event_id="e", at=time.time(), kind="copy", tenant="default", response_id="r" * 8)
        journal.append([early])
    gw.settled()
    answered(gw)
    answered(gw)  # the same again: a regeneration, which the controller hears
    late = msgspec.structs.replace(gw.interaction(), event_id="i", request_id="r" * 8, response_id=None, session="s9")
    with gw.journal() as journal:
        journal.append([late])
    eventually(lambda: gw.signals("regenerate"))
    gw.settled()
    gw.stop()
    spans = [s for s in collector.spans() if s.name.startswith("signal ")]
    assert sorted(s.name for s in spans) == ["signal copy", "signal regenerate"]
    assert {s.name: s.links[0].span_id.hex() for s in spans} == {
        "signal copy": late.span_id,
        "signal regenerate": gw.interaction().span_id,
    }


def test_spans_that_find_no_room_are_counted(gateway: MakeGateway, fake: FakeVllm) -> None:
    dropped: list[int] = []
    with Collector(hang=True) as collector:
        spans = Spans(collector.url, dropped.append)
        gw = gateway(fake)
        gw.chat()
        fact = gw.interaction()
        for _ in range(10_000):
            spans.answered(fact)
        assert sum(dropped) == 10_000 - MOST_WAITING
        collector.let_go()
        spans.close()
        assert len(collector.spans()) == MOST_WAITING
    assert sum(dropped) == 10_000 - MOST_WAITING


def test_a_collector_that_hangs_holds_up_nobody(gateway: MakeGateway, fake: FakeVllm) -> None:
    with Collector(hang=True) as collector:
        gw = gateway(fake, otel={"endpoint": collector.url})
        for _ in range(20):
            assert gw.chat().status_code == 200
        gw.feedback({"response_id": gw.interaction().request_id, "kind": "copy"})
        assert len(gw.wait_interactions(20)) == 20
        collector.let_go()
        gw.stop()


def test_while_nothing_can_be_kept_senders_are_told_to_come_again(
    gateway: MakeGateway, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JournalWriter, "PATIENCE", 0.3)
    gw = gateway(fake)
    name = answered(gw)
    blocker = sqlite3.connect(gw.settings.journal_path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    said = gw.http.post("/v1/traces", content=exported([span(name, kind="copy")]), headers=PROTOBUF)
    blocker.rollback()
    blocker.close()
    assert said.status_code == 503
    assert said.headers["retry-after"] == "1"
    assert Status.FromString(said.content).code == 14


def test_reading_is_off_the_loop(gateway: MakeGateway, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a body costs to unpack, decode and judge is no request's to wait for."""
    where: list[str] = []

    def noted(real: Any) -> Any:
        def reading(*args: Any, **named: Any) -> Any:
            where.append(threading.current_thread().name)
            return real(*args, **named)

        return reading

    for module, name in (
        (gateway_otlp, "unpacked"), (gateway_otlp, "read"), (listening, "read_items"), (listening, "summary"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    gw = gateway(fake)
    answer = answered(gw)
    packed = gzip.compress(exported([span(answer, kind="copy")]))
    assert gw.http.post("/v1/traces", content=packed, headers=PROTOBUF | {"content-encoding": "gzip"}).is_success
    assert gw.feedback({"response_id": answer, "kind": "copy"}).is_success
    assert gw.http.get(f"/v1/feedback/{answer}").is_success
    assert len(where) == 4
    assert all(name.startswith("feedback") for name in where)
