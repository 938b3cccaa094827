"""What we say in spans: one for each answer and one for each signal, written from facts as OTLP's protobuf.

The conventions for generative AI (semantic-conventions-genai, status Development) name the attributes; `_USUAL`, `_OWN`
and `_SIGNAL` are the tables that map our fields to them. A signal is a span in a trace of its own, with one link to its
answer's span and the event `gen_ai.evaluation.result`.

The bytes are written here since a span of OpenTelemetry's SDK costs seven times as much, and one of protobuf's messages
four times: most of what is said of an answer was said of the one before, and is written once (`_usual`). Numbers of
fields: opentelemetry-proto 1.x, `trace.proto`. The order of attributes means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any

from telemetry.events import OPERATIONS, Interaction, Signal
from telemetry.protobuf import field, key, pair, text

_USUAL: dict[str, Callable[[Interaction], Any]] = {
    "gen_ai.operation.name": lambda i: OPERATIONS[i.endpoint],
    "gen_ai.provider.name": lambda i: "vllm" if (i.upstream or "").startswith("http") else i.upstream,
    "gen_ai.request.model": lambda i: i.route,
    "gen_ai.request.stream": lambda i: i.stream,
    "gen_ai.response.model": lambda i: i.answerer.model,
    "gen_ai.response.finish_reasons": lambda i: (i.finish_reason,) if i.finish_reason else None,
    "error.type": lambda i: i.error,
    "http.response.status_code": lambda i: i.status or None,
    "understudy.tenant": lambda i: i.tenant,
    "understudy.arm": lambda i: i.answerer.arm,
    "understudy.policy": lambda i: i.answerer.policy,
    "understudy.snapshot": lambda i: i.answerer.snapshot,
    "understudy.prompt_version": lambda i: i.answerer.prompt_version,
    "understudy.task_type": lambda i: i.task_type,
}
"""What is said of many answers alike."""
_OWN: dict[str, Callable[[Interaction], Any]] = {
    "gen_ai.response.id": lambda i: i.response_id or i.request_id,
    "gen_ai.response.time_to_first_chunk": lambda i: i.first_byte if i.stream else None,
    "gen_ai.usage.input_tokens": lambda i: i.tokens_in,
    "gen_ai.usage.output_tokens": lambda i: i.tokens_out,
    "gen_ai.usage.cache_read.input_tokens": lambda i: i.tokens_cached,
    "gen_ai.conversation.id": lambda i: i.session,
    "user.id": lambda i: i.user,
    "understudy.propensity": lambda i: i.answerer.propensity,
}
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
_USUAL_FIELDS = [(key(name), read) for name, read in _USUAL.items()]
_OWN_FIELDS = [(key(name), read) for name, read in _OWN.items()]
_SIGNAL_FIELDS = [(key(name), read) for name, read in _SIGNAL.items()]

_TIMES = Struct("<BQBQ").pack
_INTERNAL, _CLIENT = b"\x30\x01", b"\x30\x03"
_UNSET, _ERROR = b"\x7a\x00", b"\x18\x02"
_HERE, _REMOTE = b"\x85\x01\x00\x01\x00\x00", b"\x85\x01\x00\x03\x00\x00"
"""Flags of a span: whether its parent is of another process is known, and whether it is."""
_LINK_HERE = b"\x35\x00\x01\x00\x00"


def answer_span(fact: Interaction) -> bytes:
    """The span of an answer, as a field of ScopeSpans. Raises ValueError or OverflowError for ids that are no ids."""
    start = int(fact.at * 1e9)
    parts = [
        _ids(fact),
        text(b"\x2a", f"{OPERATIONS[fact.endpoint]} {fact.route}"),
        _CLIENT,
        _TIMES(0x39, start, 0x41, start + int(fact.duration * 1e9)),
        _usual(tuple([read(fact) for _, read in _USUAL_FIELDS])),
    ]
    for written_key, read in _OWN_FIELDS:
        if (value := read(fact)) is not None:
            parts.append(field(b"\x4a", pair(written_key, value)))
    if fact.parent_span_id:
        parts += (b"\x22\x08", _bytes(fact.parent_span_id, 8), _REMOTE)
    else:
        parts.append(_HERE)
    parts.append(field(b"\x7a", text(b"\x12", fact.error) + _ERROR) if fact.error else _UNSET)
    return field(b"\x12", b"".join(parts))


def signal_span(signal: Signal, answer: Interaction) -> bytes:
    """The span of a signal about an answer, as a field of ScopeSpans. Raises as `answer_span` does."""
    at = int(signal.at * 1e9)
    said = [(written_key, read(signal, answer)) for written_key, read in _SIGNAL_FIELDS]
    pairs = [pair(written_key, value) for written_key, value in said if value is not None]
    event = _EVALUATION + b"".join([field(b"\x1a", one) for one in pairs])
    known = hashlib.blake2b(f"{signal.tenant}\x1f{signal.event_id}".encode(errors="replace"), digest_size=24).digest()
    parts = [
        b"\x0a\x10" + known[:16] + b"\x12\x08" + known[16:],  # the same ids for a signal that is sent again
        text(b"\x2a", f"signal {signal.kind}"),
        _INTERNAL,
        _TIMES(0x39, at, 0x41, at),
        *[field(b"\x4a", one) for one in pairs],
        field(b"\x5a", _TIME(0x09, at) + event),
        field(b"\x6a", _ids(answer) + _LINK_HERE),
        _HERE,
        _UNSET,
    ]
    return field(b"\x12", b"".join(parts))


_TIME = Struct("<BQ").pack
_EVALUATION = text(b"\x12", "gen_ai.evaluation.result")


def envelope(resource: Mapping[str, Any], schema_url: str) -> Callable[[Iterable[bytes]], bytes]:
    """Makes an ExportTraceServiceRequest of spans, all of the resource with these attributes and of our scope."""
    about = b"".join([field(b"\x0a", pair(key(name), value)) for name, value in resource.items()])
    scope = field(b"\x0a", text(b"\x0a", "understudy"))
    before, after = field(b"\x0a", about), text(b"\x1a", schema_url)

    def request(spans: Iterable[bytes]) -> bytes:
        return field(b"\x0a", before + field(b"\x12", scope + b"".join(spans)) + after)

    return request


@lru_cache(1024)
def _usual(values: tuple[Any, ...]) -> bytes:
    """The attributes of `_USUAL` with these values."""
    said = zip(_USUAL_FIELDS, values, strict=True)
    return b"".join([field(b"\x4a", pair(written_key, value)) for (written_key, _), value in said if value is not None])


def _ids(fact: Interaction) -> bytes:
    """Of its trace and its span; a link has both under the same numbers."""
    return b"\x0a\x10" + _bytes(fact.trace_id or "1", 16) + b"\x12\x08" + _bytes(fact.span_id or "1", 8)


def _bytes(name: str, length: int) -> bytes:
    return int(name, 16).to_bytes(length, "big")
