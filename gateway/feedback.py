"""POST /v1/feedback: what people and business systems say about answers.

`read_items` is pure: a body becomes signals and a list of what was wrong with the others. Whoever may not speak for
an answer is refused; what was accepted is on disk before 202 is sent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from gateway.auth import Caller, Pseudonyms, Token, TokenSigner
from gateway.limits import Allowance
from gateway.openai import ApiError
from telemetry.events import DETECTED_ONLY, SIGNAL_KINDS, Interaction, Signal, answer_name, new_id
from telemetry.privacy import Captures

KINDS = SIGNAL_KINDS - DETECTED_ONLY
ITEM_LIMIT = 1000
TEXT_LIMIT = 32_768
NAME_LIMIT = 500
DEPTH_LIMIT = 32
_UP: dict[object, float] = {True: 1.0, False: 0.0, "up": 1.0, "down": 0.0}  # 1 and 0 are equal to True and False


class Item(msgspec.Struct, frozen=True):
    """One feedback item as clients send it."""

    kind: str
    response_id: str | None = None
    trace_id: str | None = None
    session_id: str | None = None
    value: Any = None
    name: str | None = None
    text: str | None = None
    target: Any = None
    event_id: str | None = None
    at: float | str | None = None
    user: str | None = None
    token: str | None = None


class Problem(msgspec.Struct, frozen=True):
    """Why an item of a batch was not taken."""

    index: int
    message: str
    param: str | None = None
    status: int = 400
    code: str | None = None
    retry_after: int | None = None
    """Seconds; where it may be sent again."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What is needed to judge feedback."""

    tokens: TokenSigner
    pseudonyms: Pseudonyms
    captures: Captures
    allowance: Allowance
    answers: Callable[[Signal], list[Interaction]]
    """The journaled answers that a signal is about."""


def read_items(body: bytes) -> list[Item | Problem]:
    """The items of a body that is one object or a list. Raises `ApiError` if it is neither, or too many."""
    try:
        is_list = body.lstrip()[:1] == b"["
        items = (
            msgspec.json.decode(body, type=list[msgspec.Raw])
            if is_list
            else [msgspec.json.decode(body, type=msgspec.Raw)]
        )
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not items:
        raise ApiError(400, "the list is empty: send at least one feedback item")
    if len(items) > ITEM_LIMIT:
        raise ApiError(413, f"{len(items)} items; send at most {ITEM_LIMIT} at once", code="too_large")
    return [_read_item(index, bytes(item)) for index, item in enumerate(items)]


def _read_item(index: int, body: bytes) -> Item | Problem:
    try:
        return msgspec.json.decode(body, type=Item)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason, _, path = str(error).partition(" - at `$")
        return Problem(index, f"{reason}{' in ' + path.strip('`.') if path else ''}", path.strip("`.") or None)


def to_signal(
    index: int, item: Item, caller: Caller | None, token: str | None, desk: Desk, now: float
) -> Signal | Problem:
    """The signal that `item` is, or why it is none. `caller` is None where no API key was needed or given."""
    try:
        signal = _signal(item, caller, token, desk, now)
    except ApiError as error:
        return Problem(index, str(error), error.param, error.status, error.code)
    wait = desk.allowance.take(_whose(signal), now)
    if not wait:
        return signal
    message = "too much feedback at once from this user, or on this answer; nothing of this item was kept"
    return Problem(index, message, None, 429, "rate_limited", math.ceil(wait))


def _whose(signal: Signal) -> str:
    """Whose allowance it is: the user's, or where none is said that of what it is about."""
    about = signal.subject or signal.response_id or signal.trace_id or signal.session
    return f"{len(signal.tenant)}:{signal.tenant}/{about}"


def _signal(item: Item, caller: Caller | None, token: str | None, desk: Desk, now: float) -> Signal:
    if item.kind not in KINDS:
        raise ApiError(400, f"unknown kind `{item.kind[:50]}`; one of {', '.join(sorted(KINDS))}", param="kind")
    token = item.token or token
    if not (item.response_id or item.trace_id or item.session_id or token):
        raise ApiError(400, "name what it is about: response_id, trace_id or session_id", param="response_id")
    for field in ("response_id", "trace_id", "session_id", "event_id", "name", "user"):
        if len(getattr(item, field) or "") > NAME_LIMIT:
            raise ApiError(400, f"{field} is longer than {NAME_LIMIT} characters", param=field)
    if not _shallow(item.target):
        raise ApiError(400, f"target is nested more than {DEPTH_LIMIT} deep", param="target")
    if len(_text(item) or "") > TEXT_LIMIT:
        raise ApiError(400, f"text is longer than {TEXT_LIMIT} characters", param="text")
    claims = _claims(item, token, desk, now) if token else None
    if claims and caller and caller.keyed and caller.role != "admin" and caller.tenant != claims.tenant:
        raise forbidden("the feedback token is of another tenant than the API key", "token")
    if claims is None and caller is None:
        raise ApiError(
            401,
            "an API key or the answer's feedback token is needed",
            type="authentication_error",
            code="invalid_api_key",
        )
    tenant = claims.tenant if claims else caller.tenant  # type: ignore[union-attr]
    name, value = _value(item)
    subject = claims.subject if claims else (desk.pseudonyms.of(tenant, item.user) if item.user else None)
    signal = Signal(
        event_id=_event_id(item, tenant, desk),
        at=_when(item.at, now),
        received_at=now,
        kind=item.kind,
        tenant=tenant,
        response_id=claims.request_id if claims else item.response_id and answer_name(item.response_id),
        trace_id=None if claims else item.trace_id,
        session=desk.pseudonyms.session(tenant, item.session_id)
        if item.session_id and not (claims or item.response_id or item.trace_id)
        else None,
        subject=subject,
        value=value,
        name=name,
        target=_comparison(item) if item.kind == "comparison" else None,
        source="token" if claims else "callback",
        verified=claims is not None or (caller is not None and caller.keyed),
    )
    if _text(item) is None and item.target is None and name is None:
        return signal
    capture = desk.captures.of_any([(i.route, i.consent) for i in desk.answers(signal)], tenant)
    target = item.target if item.kind != "comparison" and capture.text == "full" else signal.target
    name = capture.label(name) if item.kind == "outcome" or capture.text != "off" else None
    return msgspec.structs.replace(signal, text=capture.line(_text(item)), target=target, name=name)


def _event_id(item: Item, tenant: str, desk: Desk) -> str:
    """The app's own id of the event, by a hash where it could hold what may not be kept."""
    if not item.event_id:
        return new_id()
    return item.event_id if desk.captures.whole else desk.pseudonyms.of(tenant, "event", item.event_id)


def _answer_of(tenant: str, response_id: str, desk: Desk) -> str | None:
    """Our request id of an answer, if it is journaled."""
    found = desk.answers(Signal(event_id="", at=0, kind="", tenant=tenant, response_id=response_id))
    return found[0].request_id if found else None


def _claims(item: Item, token: str, desk: Desk, now: float) -> Token:
    """The token's claims, if it is about this very answer and kind."""
    claims = desk.tokens.verify(token, now)
    about = item.response_id
    named = (
        about is None
        or about == claims.request_id
        or about.endswith(("-" + claims.request_id, "_" + claims.request_id))
    )
    if not named and _answer_of(claims.tenant, about or "", desk) != claims.request_id:
        raise forbidden("the feedback token is for another answer", "response_id")
    if item.session_id is not None and about is None:
        raise forbidden("a feedback token speaks for one answer, not for a session", "session_id")
    if item.kind not in claims.kinds if claims.kinds else item.kind == "outcome":
        raise forbidden(f"the feedback token does not allow `{item.kind}`; use an API key", "kind")
    return claims


def forbidden(message: str, param: str | None = None) -> ApiError:
    """Who speaks may not say or see this."""
    return ApiError(403, message, type="permission_error", param=param, code="forbidden")


def _value(item: Item) -> tuple[str | None, float | None]:
    """(name, number) of an item, checked against its kind."""
    value = item.value
    match item.kind:
        case "thumb":
            if not isinstance(value, bool | int | str) or value not in _UP:
                raise _wrong("a thumb's value is true (up) or false (down)")
            return None, _UP[value]
        case "rating":
            number = _number(value)
            if number is None or not 1 <= number <= 5:
                raise _wrong("a rating's value is a number from 1 to 5")
            return None, number
        case "correction":
            if not _text(item):
                raise ApiError(400, "a correction needs `text`: the answer as it should have been", param="text")
            return None, None
        case "dwell" | "first_action":
            number = _number(value)
            if number is None or number < 0:
                raise _wrong(f"the value of {item.kind} is a number of seconds, at least 0")
            return None, number
        case "outcome":
            named = value if isinstance(value, dict) else {"name": item.name, "value": value}
            number, name = _number(named.get("value")), named.get("name")
            if number is None or not isinstance(name, str) or not name:
                raise _wrong('an outcome has a name and a number: {"name": "resolved", "value": 1}')
            return name[:200], number
        case "comparison":
            return None, None
        case _:
            number = _number(value)
            if value is not None and number is None and item.kind not in ("survey", "flag", "escalation", "comment"):
                raise _wrong(f"the value of {item.kind} is a number, or left out")
            return item.name, number


def _shallow(value: object, depth: int = DEPTH_LIMIT) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_shallow(one, depth - 1) for one in inner)


def _text(item: Item) -> str | None:
    """What was written; a correction may stand in `value` as well."""
    return item.value if item.kind == "correction" and not item.text and isinstance(item.value, str) else item.text


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max:
        return float(value)
    return None


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, param="value")


def _comparison(item: Item) -> dict[str, object]:
    """{"winner", "loser"}, {"tie": [a, b]} or {"both_bad": [a, b]}, from `value` or `target`."""
    said = item.value if isinstance(item.value, dict) else item.target
    if item.value in ("tie", "both_bad") and isinstance(item.target, list):
        said = {item.value: item.target}
    if isinstance(said, dict):
        winner, loser = said.get("winner"), said.get("loser")
        if isinstance(winner, str) and isinstance(loser, str) and winner and loser and winner != loser:
            return {"winner": winner, "loser": loser}
        for verdict in ("tie", "both_bad"):
            pair = said.get(verdict)
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p for p in pair):
                return {verdict: pair}
    raise _wrong('a comparison is {"winner": id, "loser": id}, {"tie": [id, id]} or {"both_bad": [id, id]}')


def _when(at: float | str | None, now: float) -> float:
    """Unix seconds of a number or an RFC 3339 string; a time ahead of ours is cut to now."""
    if isinstance(at, str):
        try:
            at = datetime.fromisoformat(at).timestamp()
        except (ValueError, OverflowError):
            raise ApiError(400, "`at` is Unix seconds or an RFC 3339 time", param="at") from None
    if at is None or not math.isfinite(at) or at <= 0:
        return now
    return min(at, now)
