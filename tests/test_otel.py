"""Spans leave as the conventions say, to a real OTLP/HTTP receiver; a dead one costs a count and nothing else."""

from __future__ import annotations

import sys
import time

import pytest
from conftest import eventually
from fake_collector import Collector
from msgspec.structs import replace

from telemetry.events import Answerer, Interaction
from telemetry.otel import MOST_WAITING, PATIENCE, Spans

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


def test_a_dead_collector_costs_a_count_and_no_time() -> None:
    dropped: list[int] = []
    spans = Spans("http://127.0.0.1:9", dropped.append)
    for _ in range(MOST_WAITING):
        spans.answered(FACT)
    began = time.monotonic()
    spans.close()
    assert time.monotonic() - began < 2
    assert sum(dropped) == MOST_WAITING


def test_a_collector_that_hangs_holds_up_closing_for_a_few_seconds() -> None:
    dropped: list[int] = []
    with Collector(hang=True) as collector:
        spans = Spans(collector.url, dropped.append)
        for _ in range(MOST_WAITING + 100):
            spans.answered(FACT)
        assert sum(dropped) == 100
        began = time.monotonic()
        spans.close()
        assert time.monotonic() - began < PATIENCE + 1
        assert sum(dropped) == MOST_WAITING + 100


def test_closing_sends_what_is_queued_and_takes_no_more() -> None:
    dropped: list[int] = []
    with Collector() as collector:
        spans = Spans(collector.url, dropped.append)
        for _ in range(1300):
            spans.answered(FACT)
        spans.close()
        assert len(collector.spans()) == 1300
        assert dropped == []
        spans.answered(FACT)
        assert dropped == [1]


def test_a_batch_leaves_when_it_is_full_or_has_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector() as collector:
        many = Spans(collector.url)
        for _ in range(512):
            many.answered(FACT)
        eventually(lambda: len(collector.spans()) == 512)
        assert len(collector.bodies) == 1
        many.close()
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
        few = Spans(collector.url)
        few.answered(FACT)
        eventually(lambda: len(collector.spans()) == 513)
        for _ in range(25):
            few.answered(FACT)
        eventually(lambda: len(collector.spans()) == 538)
        few.close()
        assert len(collector.bodies) >= 5


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_collector_that_is_busy_is_asked_again(status: int) -> None:
    dropped: list[int] = []
    with Collector(refuse=[status, status], retry_after="0.01") as collector:
        spans = Spans(collector.url, dropped.append)
        for _ in range(512):
            spans.answered(FACT)
        eventually(lambda: len(collector.spans()) == 512)
        spans.close()
        assert len(collector.headers) == 3
    assert dropped == []


@pytest.mark.parametrize("odd", ["Fri, 01 Jan 99999999999999999999 00:00:00 GMT", "inf", "nan", "soon", "-3", "1e999"])
def test_a_collector_that_asks_for_an_odd_pause_is_asked_again(odd: str) -> None:
    with Collector(refuse=[503], retry_after=odd) as collector:
        spans = Spans(collector.url)
        for _ in range(512):
            spans.answered(FACT)
        eventually(lambda: len(collector.spans()) == 512)
        spans.close()


def test_a_delay_of_ages_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1e15")
    with Collector() as collector:
        spans = Spans(collector.url)
        time.sleep(0.1)
        spans.answered(FACT)
        spans.close()
        assert len(collector.spans()) == 1


def test_a_collector_that_asks_for_more_time_than_there_is_costs_a_count() -> None:
    dropped: list[int] = []
    with Collector(refuse=[503], retry_after="Fri, 01 Jan 2100 00:00:00 -0000") as collector:
        spans = Spans(collector.url, dropped.append)
        for _ in range(512):
            spans.answered(FACT)
        eventually(lambda: sum(dropped) == 512)
        spans.close()
        assert len(collector.headers) == 1


@pytest.mark.parametrize("status", [302, 400, 413, 500])
def test_what_a_collector_will_never_take_is_not_sent_again(status: int, caplog: pytest.LogCaptureFixture) -> None:
    dropped: list[int] = []
    with Collector(refuse=[status]) as collector:
        spans = Spans(collector.url, dropped.append)
        spans.answered(FACT)
        spans.close()
        assert len(collector.headers) == 1
    assert dropped == [1]
    assert f"127.0.0.1 takes no spans: it answered {status}" in caplog.text


@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_the_environment_says_how_spans_are_sent(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_COMPRESSION", how)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20k,x-team=one two")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3")
    with Collector() as collector:
        spans = Spans(collector.url)
        for _ in range(100):
            spans.answered(FACT)
        spans.close()
        [headers] = collector.headers
        assert headers["content-encoding"] == how
        assert headers["authorization"] == "Bearer k"
        assert headers["x-team"] == "one two"
        assert int(headers["content-length"]) < 10_000
        assert len(collector.spans()) == 100


def test_a_timeout_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.2")
    with Collector(hang=True) as collector:
        spans = Spans(collector.url, dropped.append)
        began = time.monotonic()
        for _ in range(512):
            spans.answered(FACT)
        eventually(lambda: sum(dropped) == 512)
        assert 0.2 <= time.monotonic() - began < 2
        collector.let_go()
        spans.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "0"),
    ],
)
def test_a_variable_that_says_nothing_sensible_is_told_of_and_spans_are_sent(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with Collector() as collector:
        spans = Spans(collector.url)
        spans.answered(FACT)
        spans.close()
        assert len(collector.spans()) == 1
    assert name in caplog.text
    assert value in caplog.text


def test_a_certificate_that_is_not_there_costs_a_count_and_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dropped: list[int] = []
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "/nowhere/ca.pem")
    spans = Spans("https://127.0.0.1:9", dropped.append)
    spans.answered(FACT)
    spans.close()
    assert dropped == [1]
    assert "/nowhere/ca.pem" in caplog.text


def test_one_span_that_cannot_be_written_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    dropped: list[int] = []
    with Collector() as collector:
        spans = Spans(collector.url, dropped.append)
        spans.answered(FACT)
        spans.answered(replace(FACT, trace_id="no id"))
        spans.answered(FACT)
        spans.close()
        assert len(collector.spans()) == 2
    assert dropped == [1]
    assert "a span cannot be written: ValueError" in caplog.text


def test_what_people_wrote_does_not_wait_for_a_collector() -> None:
    wrote = {"role": "user", "content": "a secret"}
    with Collector(hang=True) as collector:
        spans = Spans(collector.url)
        before = sys.getrefcount(wrote)
        spans.answered(replace(FACT, messages=wrote))
        assert sys.getrefcount(wrote) == before
        collector.let_go()
        spans.close()
