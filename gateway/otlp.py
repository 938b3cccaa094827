"""POST /v1/traces and /v1/logs: signals from apps that speak OpenTelemetry (OTLP/HTTP; see `telemetry.otlp`).

authenticate → read → in one thread, so that telemetry costs requests neither the loop nor more than one unpacked
body: unpack, decode, judge as feedback is judged → journal → 200 once all that was accepted is on disk. What
cannot be taken is counted and named in a partial success, which senders do not send again.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass

import msgspec

from gateway.asgi import ClientLeft, Receive, Scope, Send, read_body, respond
from gateway.auth import Caller
from gateway.feedback import ITEM_LIMIT, Item, Problem, to_signal
from gateway.listening import Ears, later
from gateway.openai import ApiError
from telemetry.errors import Invalid, UnderstudyError
from telemetry.events import Signal
from telemetry.otlp import Encoding, Said, Service, answer, read, status

_TYPES: dict[bytes, Encoding] = {b"application/x-protobuf": "protobuf", b"application/json": "json"}
_KINDS = {encoding: kind for kind, encoding in _TYPES.items()}
_WINDOWS = {b"gzip": 31, b"deflate": 15}
"""Content encoding → `wbits` of zlib."""
_CODES = {401: 16, 403: 7, 408: 4, 413: 8, 503: 14}
"""HTTP status → google.rpc.Code; all others are INVALID_ARGUMENT."""
_REASONS = 3
MOST_MEMBERS = 64
"""Of a gzip file; each costs a look at all that follows."""


@dataclass(frozen=True, slots=True)
class _Taken:
    signals: list[Signal]
    rejected: int
    why: str


class Receiver:
    """The two endpoints."""

    def __init__(self, ears: Ears) -> None:
        self._ears = ears

    async def serve(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one export request; an ASGI endpoint."""
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        encoding = _TYPES.get(kind, "json")
        try:
            packing = _packing(headers.get(b"content-encoding", b""))
            if kind not in _TYPES:
                raise ApiError(415, "send application/x-protobuf or application/json")
            caller = self._ears.caller(headers)
            body = await read_body(headers, receive, self._ears.max_body)
            taken = await self._ears.look_up(self._take, service, encoding, packing, body, caller, time.time())
            await self._ears.keep(taken.signals)
        except ApiError as error:
            await _refuse(send, encoding, error)
            return
        except UnderstudyError as error:
            await _refuse(send, encoding, later(error))
            return
        except ClientLeft:
            return
        await respond(send, 200, answer(service, encoding, taken.rejected, taken.why), _KINDS[encoding])

    def _take(
        self, service: Service, encoding: Encoding, packing: int | None, body: bytes, caller: Caller, now: float
    ) -> _Taken:
        """Runs in the thread. Raises `ApiError` 400 or 413, and `StateError` if the journal cannot be read."""
        try:
            records = read(service, encoding, body if packing is None else unpacked(body, packing, self._ears.max_body))
        except Invalid as error:
            raise ApiError(400, str(error)) from None
        signals: list[Signal] = []
        problems: list[tuple[Said, Problem]] = []
        for said in records:
            judged = self._judge(said, caller, now) if len(signals) < ITEM_LIMIT else _too_many(said)
            if isinstance(judged, Signal):
                signals.append(judged)
            else:
                problems.append((said, judged))
                self._ears.refused(judged)
        reasons = [f"{said.place}: {problem.message}" for said, problem in problems[:_REASONS]]
        more = [f"and {len(problems) - _REASONS} more"] if len(problems) > _REASONS else []
        return _Taken(signals, len({said.index for said, _ in problems}), "; ".join(reasons + more))

    def _judge(self, said: Said, caller: Caller, now: float) -> Signal | Problem:
        if said.problem:
            return Problem(said.index, said.problem)
        try:
            item = msgspec.convert(said.fields, Item)
        except msgspec.ValidationError as error:
            return Problem(said.index, str(error))
        judged = to_signal(said.index, item, caller, None, self._ears.desk, now)
        if isinstance(judged, Problem):
            return judged
        return msgspec.structs.replace(self._exact(judged, said.spans), source="otlp")

    def _exact(self, signal: Signal, spans: frozenset[str]) -> Signal:
        """The signal by its answer's own name, where one answer of its trace has such a span: others may follow."""
        if signal.trace_id is None or not spans:
            return signal
        answers = self._ears.answers(signal)
        named = [fact for fact in answers if fact.span_id in spans] or [
            fact for fact in answers if fact.parent_span_id in spans
        ]
        if len(named) != 1:
            return signal
        return msgspec.structs.replace(signal, response_id=named[0].request_id)


def _too_many(said: Said) -> Problem:
    return Problem(said.index, f"more than {ITEM_LIMIT:,} signals in one request")


def unpacked(body: bytes, window: int, limit: int) -> bytes:
    """`body` decompressed (RFC 1950, or 1952 with all of its members). Raises `ApiError` 400, or 413 over `limit`.

    No more than `limit` + 1 bytes are ever made, whatever the body would become.
    """
    parts: list[bytes] = []
    room = limit + 1
    for _ in range(MOST_MEMBERS + 1):
        if not body:
            return b"".join(parts)
        inflate = zlib.decompressobj(window)
        try:
            parts.append(inflate.decompress(body, room))
        except zlib.error as error:
            raise ApiError(400, f"the body cannot be decompressed: {error}") from None
        room -= len(parts[-1])
        if room <= 0:
            raise ApiError(413, f"decompressed, the body is larger than {limit} bytes, the limit here")
        if not inflate.eof:
            raise ApiError(400, "the body cannot be decompressed: it ends too early")
        body = inflate.unused_data
    raise ApiError(400, f"the body has more than {MOST_MEMBERS} gzip members")


def _packing(name: bytes) -> int | None:
    """zlib's window for a content encoding, None for none. Raises `ApiError` 415."""
    name = name.strip().lower()
    if name not in (b"", b"identity", *_WINDOWS):
        accepted = ((b"accept-encoding", b", ".join(_WINDOWS)),)
        raise ApiError(415, "send the body as it is, or compressed by gzip or deflate", headers=accepted)
    return _WINDOWS.get(name)


async def _refuse(send: Send, encoding: Encoding, error: ApiError) -> None:
    body = status(encoding, _CODES.get(error.status, 3), str(error))
    await respond(send, error.status, body, _KINDS[encoding], error.headers)
