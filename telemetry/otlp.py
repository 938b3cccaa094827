"""OTLP in: spans and log records that say something about an answer, so that instrumented apps need no SDK of ours.

A record is a signal if it carries `understudy.signal.kind`, or if it is the GenAI conventions' event
`gen_ai.evaluation.result` (a log record, an event on a span, or a span by that name). All others are not for us.

| field of the signal | attributes, the first that is there |
|---|---|
| kind | `understudy.signal.kind`; an evaluation's name if that is a kind, else `outcome`, without a number `survey` |
| value | `understudy.signal.value`, `gen_ai.evaluation.score.value`, `gen_ai.evaluation.score.label` |
| name | `understudy.signal.name`, `gen_ai.evaluation.name` |
| text | `understudy.signal.text`, `gen_ai.evaluation.explanation` |
| target | `understudy.signal.target`; a comparison's may be JSON in a string |
| event id | `understudy.signal.event_id`, `log.record.uid`; else made from the record's ids, so a resend has it again |
| user | `understudy.signal.user`, `user.id` |
| answer | `gen_ai.response.id` (a span event's: its own or its span's); else the span of the first link; |
| | else the session `understudy.signal.session`; else the record's own trace |

Sources: the OTLP specification 1.x (opentelemetry.io/docs/specs/otlp) and opentelemetry-proto. Its JSON is protobuf's
but for ids in hex, so it is read by structs with the messages' own field names, and one walk reads both encodings.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as traces

from telemetry.errors import Invalid
from telemetry.events import SIGNAL_KINDS

Service = Literal["traces", "logs"]
Encoding = Literal["protobuf", "json"]

OUR_SCOPE = "understudy"
"""The instrumentation scope of the spans that we send ourselves: one that comes back is not heard again."""
EVALUATION = "gen_ai.evaluation.result"
KIND = "understudy.signal.kind"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "kind": (KIND,),
    "value": ("understudy.signal.value", "gen_ai.evaluation.score.value", "gen_ai.evaluation.score.label"),
    "name": ("understudy.signal.name", "gen_ai.evaluation.name"),
    "text": ("understudy.signal.text", "gen_ai.evaluation.explanation"),
    "target": ("understudy.signal.target",),
    "event_id": ("understudy.signal.event_id", "log.record.uid"),
    "user": ("understudy.signal.user", "user.id"),
    "session_id": ("understudy.signal.session",),
    "response_id": ("gen_ai.response.id",),
}
_INHERITED = (*ATTRIBUTES["response_id"], *ATTRIBUTES["user"])
"""Of a span, what is true of its events too."""
MOST_RECORDS = 10_000
MOST_OBJECTS = 200_000
"""Objects in a body of JSON: to decode more would hold up whatever else the process does."""
_DEPTH = 8
"""Lists and maps deeper than this in an attribute are dropped: no convention has them, and readers may choke."""


@dataclass(frozen=True, slots=True)
class Said:
    """A record that is meant as a signal, not yet checked."""

    index: int
    """Which of the request's spans or log records it is (part of)."""
    place: str
    fields: dict[str, Any]
    """As `POST /v1/feedback` has them: kind, value, name, text, target, event_id, user, at, and what it is about."""
    problem: str = ""
    """Why it cannot be taken."""
    spans: frozenset[str] = frozenset()
    """Hex ids of spans one of which is the answer's, or its parent, where only a trace is named."""


def read(service: Service, encoding: Encoding, body: bytes) -> list[Said]:
    """What an export request's body says to us. Raises `Invalid` if it is no such request, or has too many records."""
    message, _, shape = _FORMS[service]
    if encoding == "json" and body.count(b"{") > MOST_OBJECTS:
        raise Invalid(f"the body has more than {MOST_OBJECTS:,} JSON objects; send smaller batches", "body")
    try:
        request = message.FromString(body) if encoding == "protobuf" else _decode(body, shape)
    except (DecodeError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"the body is no {message.DESCRIPTOR.name} in {encoding}: {error}") from None
    scopes = _scopes(request, service)
    records = (
        sum(1 + len(span.events) for s in scopes for span in s.spans)
        if service == "traces"
        else sum(len(s.log_records) for s in scopes)
    )
    if records > MOST_RECORDS:
        raise Invalid(f"the body has {records:,} records; send at most {MOST_RECORDS:,} at once", "body")
    return list(_spans(request) if service == "traces" else _log_records(request))


def _scopes(request: Any, service: Service) -> Iterator[Any]:
    resources = request.resource_spans if service == "traces" else request.resource_logs
    return (s for r in resources for s in (r.scope_spans if service == "traces" else r.scope_logs))


def answer(service: Service, encoding: Encoding, rejected: int = 0, why: str = "") -> bytes:
    """The body of a 200: empty of content, or a partial success that counts the rejected records and says why."""
    _, message, _ = _FORMS[service]
    counter = "rejected_spans" if service == "traces" else "rejected_log_records"
    if encoding == "protobuf":
        said = message(partial_success={counter: rejected, "error_message": why}) if rejected else message()
        return bytes(said.SerializeToString())
    camel = "rejectedSpans" if service == "traces" else "rejectedLogRecords"
    partial = {"partialSuccess": {camel: str(rejected), "errorMessage": why}}  # 64-bit numbers are strings in JSON
    return msgspec.json.encode(partial if rejected else {})


def status(encoding: Encoding, code: int, message: str) -> bytes:
    """The body of an error: a google.rpc.Status."""
    if encoding == "protobuf":
        return bytes(Status(code=code, message=message).SerializeToString())
    return msgspec.json.encode({"code": code, "message": message})


@dataclass(frozen=True, slots=True)
class _Record:
    """A span, a span's event or a log record that is for us, whichever way it was encoded."""

    index: int
    place: str
    attributes: Mapping[str, Any]
    event_id: str | None
    """Made from the record's own ids, for when its attributes name none."""
    at: float | None
    trace: str | None
    spans: frozenset[str]
    links: tuple[tuple[str | None, str | None], ...] = ()
    """(trace id, span id) of each."""


def _spans(request: Any) -> Iterator[Said]:
    index = -1
    for scope in _scopes(request, "traces"):
        for span in scope.spans:
            index += 1
            events = [(n, event) for n, event in enumerate(span.events) if _is_ours(event.name, event.attributes)]
            ours = _is_ours(span.name, span.attributes)
            if scope.scope.name == OUR_SCOPE or not (ours or events):
                continue
            place = f"span {_hex(span.span_id)[:32] or index}"
            try:
                trace, own = _id(span.trace_id, 16), _id(span.span_id, 8)
                near = frozenset(filter(None, (own, _id(span.parent_span_id, 8))))
                links = tuple((_id(link.trace_id, 16), _id(link.span_id, 8)) for link in span.links)
            except Invalid as error:
                yield Said(index, place, {}, str(error))
                continue
            said = _attributes(span.attributes)
            name = f"{trace}-{own}" if trace and own else None
            if ours:
                at = _seconds(span.end_time_unix_nano) or _seconds(span.start_time_unix_nano)
                yield _said(_Record(index, place, said, name, at, trace, near, links))
            inherited = {key: said[key] for key in _INHERITED if key in said}
            for n, event in events:
                at, more = _seconds(event.time_unix_nano), inherited | _attributes(event.attributes)
                yield _said(_Record(index, place, more, name and f"{name}-{n}", at, trace, near, links))


def _log_records(request: Any) -> Iterator[Said]:
    index = -1
    for scope in _scopes(request, "logs"):
        for record in scope.log_records:
            index += 1
            if scope.scope.name == OUR_SCOPE or not _is_ours(record.event_name, record.attributes):
                continue
            place = f"log record {index}"
            try:
                trace, own = _id(record.trace_id, 16), _id(record.span_id, 8)
            except Invalid as error:
                yield Said(index, place, {}, str(error))
                continue
            at = _seconds(record.time_unix_nano) or _seconds(record.observed_time_unix_nano)
            said = _attributes(record.attributes)
            known = repr((trace, own, at, sorted(said.items())))  # it has no id, and its span may emit several
            name = hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
            yield _said(_Record(index, place, said, name, at, trace, frozenset(filter(None, (own,)))))


def _said(record: _Record) -> Said:
    named = _named(record.attributes)
    if KIND in record.attributes:
        named.setdefault("kind", "")  # one that is no text is refused, not guessed
    fields = {"event_id": record.event_id, "at": record.at} | _evaluated(named)
    session = fields.pop("session_id", None)
    linked = next((link for link in record.links if link[0]), None)
    if "response_id" in fields:
        return Said(record.index, record.place, fields)
    if linked is not None:
        about, spans = {"trace_id": linked[0]}, frozenset(filter(None, linked[1:]))
    elif session is not None:
        about, spans = {"session_id": session}, frozenset()
    else:
        about, spans = {"trace_id": record.trace}, record.spans
    return Said(record.index, record.place, fields | about, spans=spans)


def _named(attributes: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        field: next((attributes[name] for name in names if attributes.get(name) is not None), None)
        for field, names in ATTRIBUTES.items()
    }
    return {field: value for field, value in found.items() if value is not None}


def _evaluated(fields: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's kind, and values as feedback has them: a score of 1.0 is a thumb's 1, a label no number."""
    value, name = fields.get("value"), fields.get("name")
    if isinstance(value, float) and value.is_integer():
        fields["value"] = value = int(value)
    if "kind" not in fields:
        if isinstance(name, str) and name in SIGNAL_KINDS:
            fields["kind"] = fields.pop("name")
        elif isinstance(value, int | float):
            fields["kind"] = "outcome"
        else:
            fields |= {"kind": "survey", "text": fields.get("text", value)}
    target = fields.get("target")
    if fields["kind"] == "comparison" and isinstance(target, str):
        with contextlib.suppress(msgspec.MsgspecError, RecursionError):  # what reads comparisons says what one is
            fields["target"] = msgspec.json.decode(target)
    return fields


def _is_ours(name: str, attributes: Any) -> bool:
    return name == EVALUATION or any(
        a.key == KIND or (a.key == "event.name" and a.value.string_value == EVALUATION) for a in attributes
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs}


def _plain(value: Any, depth: int = _DEPTH) -> Any:
    """The Python value of an AnyValue; None for bytes, for nothing, and for what is nested too deep."""
    kind = value.WhichOneof("value")
    if depth == 0 or kind is None or kind == "bytes_value":
        return None
    inner = getattr(value, kind)
    if kind == "array_value":
        return [_plain(item, depth - 1) for item in inner.values]
    if kind == "kvlist_value":
        return {pair.key: _plain(pair.value, depth - 1) for pair in inner.values}
    return _number(inner) if kind in ("int_value", "double_value") else inner


def _number(value: Any) -> Any:
    """JSON may write numbers as strings; the original where it is none."""
    if not isinstance(value, str):
        return value
    try:
        return int(value) if value.lstrip("-").isdecimal() else float(value)
    except ValueError:
        return value


def _seconds(nanoseconds: Any) -> float | None:
    number = _number(nanoseconds)
    return number / 1e9 if isinstance(number, int) and 0 < number < 1 << 64 else None


def _hex(value: bytes | str) -> str:
    return value.hex() if isinstance(value, bytes) else value.lower()


def _id(value: bytes | str, size: int) -> str | None:
    """An id of `size` bytes in hex; None for none (empty, or all zeros). Raises `Invalid`."""
    text = _hex(value)
    if text.strip("0") == "":
        return None
    if len(text) != 2 * size or not set(text) <= set("0123456789abcdef"):
        raise Invalid(f"{text[:64]!r} is no id of {size} bytes (in JSON, ids are hex, not base64)", "id")
    return text


# OTLP/JSON, as far as we read it; Python's names are those of the protobuf messages.


def _decode(body: bytes, shape: type[_Struct]) -> _Struct:
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.ValidationError:  # protobuf's JSON has null for a field that is not there
        return msgspec.convert(_without_nulls(msgspec.json.decode(body)), shape)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


class _Struct(msgspec.Struct, frozen=True, rename="camel"):
    pass


class _Any(_Struct, frozen=True):
    string_value: str | None = None
    bool_value: bool | None = None
    int_value: int | str | None = None
    double_value: float | str | None = None
    array_value: _Array | None = None
    kvlist_value: _Pairs | None = None

    def WhichOneof(self, _: str) -> str | None:
        return next((name for name in self.__struct_fields__ if getattr(self, name) is not None), None)


class _Pair(_Struct, frozen=True):
    key: str = ""
    value: _Any = _Any()


class _Array(_Struct, frozen=True):
    values: list[_Any] = []


class _Pairs(_Struct, frozen=True):
    values: list[_Pair] = []


class _Event(_Struct, frozen=True):
    time_unix_nano: int | str = 0
    name: str = ""
    attributes: list[_Pair] = []


class _Link(_Struct, frozen=True):
    trace_id: str = ""
    span_id: str = ""


class _Span(_Struct, frozen=True):
    trace_id: str = ""
    span_id: str = ""
    parent_span_id: str = ""
    name: str = ""
    start_time_unix_nano: int | str = 0
    end_time_unix_nano: int | str = 0
    attributes: list[_Pair] = []
    events: list[_Event] = []
    links: list[_Link] = []


class _LogRecord(_Struct, frozen=True):
    time_unix_nano: int | str = 0
    observed_time_unix_nano: int | str = 0
    event_name: str = ""
    attributes: list[_Pair] = []
    trace_id: str = ""
    span_id: str = ""


class _Scope(_Struct, frozen=True):
    name: str = ""


class _ScopeSpans(_Struct, frozen=True):
    scope: _Scope = _Scope()
    spans: list[_Span] = []


class _ScopeLogs(_Struct, frozen=True):
    scope: _Scope = _Scope()
    log_records: list[_LogRecord] = []


class _ResourceSpans(_Struct, frozen=True):
    scope_spans: list[_ScopeSpans] = []


class _ResourceLogs(_Struct, frozen=True):
    scope_logs: list[_ScopeLogs] = []


class _Traces(_Struct, frozen=True):
    resource_spans: list[_ResourceSpans] = []


class _Logs(_Struct, frozen=True):
    resource_logs: list[_ResourceLogs] = []


_FORMS: dict[str, tuple[Any, Any, type[_Struct]]] = {
    "traces": (traces.ExportTraceServiceRequest, traces.ExportTraceServiceResponse, _Traces),
    "logs": (logs.ExportLogsServiceRequest, logs.ExportLogsServiceResponse, _Logs),
}
