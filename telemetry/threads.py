"""Threads: which earlier answer a stateless request continues. Pure.

A client of chat completions sends the whole conversation each time, and nothing that says which answer it goes on
from. So each request leaves three keyed hashes of what it holds with its answer, and the same three of what it held up
to its last assistant turn; an earlier request whose own hashes are equal to those gave that turn:

    asked      all turns but instructions, without the answer      the client changed the answer before it came back
    said       … with the answer                                   the rule
    exchange   the last user turn and the answer alone             the client dropped the oldest turns

Instructions (system, developer) are left out: apps put the time of day into them. White space, Unicode composition and
stripped reasoning make no difference. The hashes are scoped by tenant, so nothing is ever linked across tenants; users
are compared where both are known. They are made by the gateway, which sees the text, and kept with the fact; so threads
are known even where no text is kept. An answer that an app names itself (`previous_response_id`) is taken at its word.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from telemetry.events import Interaction, Thread, answer_name

LATEST = 16
"""Requests of one key that are remembered: more that begin alike cannot be told apart anyway."""
MOST_TURNS = 2000
ALIKE = 0.2

_PLAIN = bytes(range(32, 127))
"""Text of nothing else has no white space but blanks."""

Part = tuple[str, bytes]
"""Role of a turn, and its canonical form."""


def thread_of(
    tenant: str,
    messages: Any,
    answer: str,
    tool_calls: Sequence[Mapping[str, Any]],
    key: bytes,
    others: Sequence[str] = (),
) -> Thread | None:
    """The hashes of a request and its answer; None where there are no messages to hash.

    `messages`: chat messages, or a Responses input of the same shape, decoded. `key`: a secret, at most 64 bytes.
    `others`: the texts of other choices that the app was given to go on from.
    """
    if not isinstance(messages, list) or not messages or len(messages) > MOST_TURNS:
        return None
    parts = [part for message in messages if isinstance(message, dict) and (part := _part(message)) is not None]
    last = next((n for n in range(len(parts) - 1, -1, -1) if parts[n][0] == "assistant"), None)
    hashed = hashlib.blake2b(tenant.encode(), key=key, digest_size=9)
    before = after = ""
    begun = 0
    if last is not None:
        before = _with(hashed, parts[:last])
        after = _with(hashed, parts[last : last + 1])
        begun = last + 1
    own = _turn("assistant", _content(answer, tool_calls, "assistant"))
    asked = _with(hashed, parts[begun:])
    chosen = [_with(hashed.copy(), [_turn("assistant", _content(text, (), "assistant"))]) for text in others]
    return Thread(
        others=tuple(chosen),
        asked=asked,
        said=_with(hashed, [own]),
        exchange=_exchange(tenant, parts, own, key),
        after_asked=before,
        after_said=after,
        after_exchange=_exchange(tenant, parts[:last], parts[last], key) if last is not None else "",
    )


class _Known(msgspec.Struct, frozen=True, gc=False):
    name: str
    at: float
    tenant: str
    session: str
    user: str | None


class _Memory:
    """Requests by their hashes and by the names of their answers."""

    def __init__(self) -> None:
        self.by_key: dict[str, tuple[_Known, ...]] = {}
        self.size = 0
        self.began = 0.0


class Threads:
    """The latest requests by their hashes: at most `limit` of them, none for longer than twice `lifetime` seconds.

    They are forgotten in two halves, the older one at once: each by itself would cost as much as remembering it.
    """

    def __init__(self, limit: int = 100_000, lifetime: float = 86400.0) -> None:
        self._limit = limit
        self._lifetime = lifetime
        self._old, self._new = _Memory(), _Memory()

    def __len__(self) -> int:
        return self._old.size + self._new.size

    def add(self, request: Interaction) -> None:
        """Remember a request."""
        if request.request_id in self._new.by_key or request.request_id in self._old.by_key:
            return
        if self._new.size >= self._limit // 2 or request.at > self._new.began + self._lifetime:
            self._old, self._new = self._new, _Memory()
            self._new.began = request.at
        known = _Known(request.request_id, request.at, request.tenant, request.session, request.user)
        alone, by_key = (known,), self._new.by_key
        for key in _keys(request):
            before = by_key.get(key)
            by_key[key] = (*before, known)[-LATEST:] if before else alone
        self._new.size += 1

    def find(self, new: Interaction, alike: Callable[[str], float] = lambda name: 1.0) -> str | None:
        """The id of the request whose answer `new` continues; None if it begins, or nothing is known of it.

        `alike`: how like a request's answer is to the last assistant turn of `new`, 0 to 1; asked only where that turn
        is nobody's answer as it was given. Less than `ALIKE` is another text, not an edit.
        """
        found = self._found(new, alike)
        return found.name if found else None

    def _found(self, new: Interaction, alike: Callable[[str], float]) -> _Known | None:
        thread = new.thread
        if new.previous is not None:
            own = self._nearest(answer_name(new.previous), new)
            return own or self._nearest(_named(new.tenant, new.previous), new)
        if thread is None or not thread.after_said:
            return None
        found = self._nearest(thread.after_said, new) or self._nearest(thread.after_exchange, new)
        if found is not None:
            return found
        edited = {known: alike(known.name) for known in self._candidates(thread.after_asked, new)}
        edited = {known: likeness for known, likeness in edited.items() if likeness >= ALIKE}
        return max(edited, key=lambda known: (edited[known], *_nearness(known, new)), default=None)

    def _nearest(self, key: str, new: Interaction) -> _Known | None:
        return max(self._candidates(key, new), key=lambda known: _nearness(known, new), default=None)

    def _candidates(self, key: str, new: Interaction) -> list[_Known]:
        knowns = (*self._old.by_key.get(key, ()), *self._new.by_key.get(key, ()))
        return [known for known in knowns[-LATEST:] if _may_follow(known, new)]


def _may_follow(known: _Known, new: Interaction) -> bool:
    same_user = known.user is None or new.user is None or known.user == new.user
    return known.name != new.request_id and known.at <= new.at and known.tenant == new.tenant and same_user


def _nearness(known: _Known, new: Interaction) -> tuple[bool, bool, float]:
    return known.session == new.session, known.user == new.user, known.at


def _keys(request: Interaction) -> list[str]:
    thread, given = request.thread, request.response_id
    keys = [request.request_id]
    if thread is not None:
        keys += (thread.said, thread.asked, *thread.others)
        if thread.exchange:
            keys.append(thread.exchange)
    if given and answer_name(given) != request.request_id:
        keys.append(_named(request.tenant, given))
    return keys


def _named(tenant: str, name: str) -> str:
    return f"{tenant}/{name}"


def _exchange(tenant: str, parts: Sequence[Part], answer: Part, key: bytes) -> str:
    """The last user turn before an answer, and all that came since, with it; "" where no user spoke."""
    start = next((n for n in range(len(parts) - 1, -1, -1) if parts[n][0] == "user"), None)
    if start is None:
        return ""
    hashed = hashlib.blake2b(tenant.encode(), key=key, digest_size=9, person=b"exchange")
    return _with(hashed, [*parts[start:], answer])


def _part(message: Mapping[str, Any]) -> Part | None:
    """A turn in canonical form; None for instructions."""
    role = message.get("role")
    role = role if isinstance(role, str) else str(message.get("type", ""))
    if role in ("system", "developer"):
        return None
    calls = message.get("tool_calls")
    content = message.get("content")
    body = _content(
        content if content is not None else message.get("refusal"), calls if isinstance(calls, list) else (), role
    )
    call = message.get("tool_call_id") or message.get("call_id")
    return _turn(role, body + (b"\x1e" + str(call).encode("utf-8", "surrogatepass") if call else b""))


def _turn(role: str, body: bytes) -> Part:
    return role, b"%b%d:%b" % (_ROLES.get(role) or _role(role), len(body), body)


def _content(content: Any, calls: Sequence[Any], role: str) -> bytes:
    if isinstance(content, list):
        texts = [_piece(piece) for piece in content]
        text = " ".join(texts)
    elif isinstance(content, str):
        text = content
    else:
        text = "" if content is None else _plain(content)
    if role == "assistant":
        text = _without_reasoning(text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    body = text.encode("utf-8", "surrogatepass")
    if body.translate(None, _PLAIN) or b"  " in body or body[:1] == b" " or body[-1:] == b" ":
        body = " ".join(text.split()).encode("utf-8", "surrogatepass")
    for call in calls:
        body += b"\x1d" + _call(call).encode("utf-8", "surrogatepass")
    return body


def _piece(piece: Any) -> str:
    if isinstance(piece, dict):
        text = piece.get("text")
        return text if isinstance(text, str) else _plain(piece)
    return piece if isinstance(piece, str) else _plain(piece)


def _call(call: Any) -> str:
    """A tool call, as clients send it back or as the gateway keeps it."""
    if not isinstance(call, dict):
        return _plain(call)
    function = call.get("function")
    function = function if isinstance(function, dict) else call
    arguments = function.get("arguments")
    return f"{call.get('id')} {function.get('name')} {''.join(str(arguments or '').split())}"


def _plain(value: Any) -> str:
    return msgspec.json.encode(value, order="deterministic").decode()


def _without_reasoning(text: str) -> str:
    """Without a `<think>…</think>` at its beginning, which clients strip."""
    if text.lstrip().startswith("<think>"):
        _, ended, rest = text.partition("</think>")
        return rest if ended else text
    return text


def _with(hashed: Any, parts: Sequence[Part]) -> str:
    """The hash once `parts` are added to it."""
    hashed.update(b"".join([part for _, part in parts]))
    return str(hashed.hexdigest())


def _role(role: str) -> bytes:
    return b"%d:%b:" % (len(role), role.encode("utf-8", "surrogatepass"))


_ROLES = {role: _role(role) for role in ("user", "assistant", "tool", "function")}
