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
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from telemetry.events import Interaction, Thread

LATEST = 16
"""Requests of one key that are remembered: more that begin alike cannot be told apart anyway."""
MOST_TURNS = 2000
ALIKE = 0.2

Part = tuple[str, bytes]
"""Role and canonical content of a turn."""


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
    for n, part in enumerate(parts):
        if n == last:
            before = _key(hashed)
        _add(hashed, part)
        if n == last:
            after = _key(hashed)
    own = ("assistant", _content(answer, tool_calls, "assistant"))
    asked = _key(hashed)
    chosen = []
    for text in others:
        other = hashed.copy()
        _add(other, ("assistant", _content(text, (), "assistant")))
        chosen.append(_key(other))
    _add(hashed, own)
    return Thread(
        others=tuple(chosen),
        asked=asked,
        said=_key(hashed),
        exchange=_exchange(tenant, parts, own, key),
        after_asked=before,
        after_said=after,
        after_exchange=_exchange(tenant, parts[:last], parts[last], key) if last is not None else "",
    )


class _Known(NamedTuple):
    at: float
    session: str
    user: str | None
    keys: tuple[str, ...]


class Threads:
    """The latest requests by their hashes: at most `limit` of them, none older than `lifetime` seconds."""

    def __init__(self, limit: int = 100_000, lifetime: float = 86400.0) -> None:
        self._limit = limit
        self._lifetime = lifetime
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._by_key: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, request: Interaction) -> None:
        """Remember a request."""
        if request.request_id in self._known:
            return
        known = _Known(request.at, request.session, request.user, _keys(request))
        self._known[request.request_id] = known
        for key in known.keys:
            self._by_key[key] = (*self._by_key.get(key, ()), request.request_id)[-LATEST:]
        while len(self._known) > self._limit or next(iter(self._known.values())).at < request.at - self._lifetime:
            self._forget(*self._known.popitem(last=False))

    def find(self, new: Interaction, alike: Callable[[str], float] = lambda name: 1.0) -> str | None:
        """The id of the request whose answer `new` continues; None if it begins, or nothing is known of it.

        `alike`: how like a request's answer is to the last assistant turn of `new`, 0 to 1; asked only where that turn
        is nobody's answer as it was given. Less than `ALIKE` is another text, not an edit.
        """
        thread = new.thread
        if new.previous is not None:
            return self._nearest(_named(new.tenant, new.previous), new)
        if thread is None:
            return None
        found = self._nearest(thread.after_said, new) or self._nearest(thread.after_exchange, new)
        if found is not None:
            return found
        edited = {name: alike(name) for name in self._candidates(thread.after_asked, new)}
        edited = {name: likeness for name, likeness in edited.items() if likeness >= ALIKE}
        return max(edited, key=lambda name: (edited[name], *self._nearness(name, new)), default=None)

    def _nearest(self, key: str, new: Interaction) -> str | None:
        return max(self._candidates(key, new), key=lambda name: self._nearness(name, new), default=None)

    def _candidates(self, key: str, new: Interaction) -> list[str]:
        return [name for name in self._by_key.get(key, ()) if self._may_follow(name, new)]

    def _may_follow(self, name: str, new: Interaction) -> bool:
        known = self._known[name]
        same_user = known.user is None or new.user is None or known.user == new.user
        return name != new.request_id and known.at <= new.at and same_user

    def _nearness(self, name: str, new: Interaction) -> tuple[bool, bool, float]:
        known = self._known[name]
        return known.session == new.session, known.user == new.user, known.at

    def _forget(self, name: str, known: _Known) -> None:
        for key in known.keys:
            left = tuple(one for one in self._by_key.get(key, ()) if one != name)
            if left:
                self._by_key[key] = left
            else:
                self._by_key.pop(key, None)


def _keys(request: Interaction) -> tuple[str, ...]:
    thread = request.thread
    hashes = (thread.said, thread.exchange, thread.asked, *thread.others) if thread else ()
    names = filter(None, (request.request_id, request.response_id))
    return *filter(None, hashes), *(_named(request.tenant, name) for name in names)


def _named(tenant: str, name: str) -> str:
    return f"{tenant}/{name}"


def _exchange(tenant: str, parts: Sequence[Part], answer: Part, key: bytes) -> str:
    """The last user turn before an answer, and all that came since, with it; "" where no user spoke."""
    start = next((n for n in range(len(parts) - 1, -1, -1) if parts[n][0] == "user"), None)
    if start is None:
        return ""
    hashed = hashlib.blake2b(tenant.encode(), key=key, digest_size=9, person=b"exchange")
    for part in (*parts[start:], answer):
        _add(hashed, part)
    return _key(hashed)


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
    return role, body + (b"\x1e" + str(call).encode("utf-8", "surrogatepass") if call else b"")


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
    if not text.isprintable() or "  " in text or text[:1] == " " or text[-1:] == " ":  # else it is as it would be
        text = " ".join(text.split())
    body = text.encode("utf-8", "surrogatepass")
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


def _add(hashed: Any, part: Part) -> None:
    role, body = part
    hashed.update(b"%b%d:%b" % (_ROLES.get(role) or _role(role), len(body), body))


def _role(role: str) -> bytes:
    return b"%d:%b:" % (len(role), role.encode("utf-8", "surrogatepass"))


_ROLES = {role: _role(role) for role in ("user", "assistant", "tool", "function")}


def _key(hashed: Any) -> str:
    return str(hashed.hexdigest())
