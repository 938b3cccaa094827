"""Spans leave as the conventions say, to a real OTLP/HTTP receiver; a dead one costs a count and nothing else."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

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


@pytest.fixture
def collector() -> Iterator[Any]:
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.received = received  # type: ignore[attr-defined]
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    if kind == "array_value":
        return [value(v) for v in any_value.array_value.values]
    return getattr(any_value, kind)


def test_one_span_an_answer_by_the_conventions(collector: Any) -> None:
    spans = Spans(f"http://127.0.0.1:{collector.server_port}")
    spans.answered(FACT)
    spans.close()
    [resource] = collector.received[0].resource_spans
    [span] = resource.scope_spans[0].spans
    attributes = {a.key: value(a.value) for a in span.attributes}
    assert span.name == "chat assistant"
    assert span.trace_id.hex() == FACT.trace_id
    assert span.span_id.hex() == FACT.span_id
    assert span.parent_span_id.hex() == FACT.parent_span_id
    assert span.end_time_unix_nano - span.start_time_unix_nano == 1_500_000_000
    assert attributes["gen_ai.response.model"] == "assistant-v7-3f9c"
    assert attributes["gen_ai.request.model"] == "assistant"
    assert attributes["gen_ai.usage.output_tokens"] == 34
    assert attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert attributes["understudy.propensity"] == 0.25
    assert "secret" not in str(collector.received)


def test_a_dead_collector_costs_a_count() -> None:
    dropped: list[int] = []
    spans = Spans("http://127.0.0.1:9", dropped.append)
    spans.answered(FACT)
    spans.close()
    assert sum(dropped) == 1
