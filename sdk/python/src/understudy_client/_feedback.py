"""What an app can say about an answer, and to whom it says it."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, TypeVar
from urllib.parse import urlsplit

from understudy_client._sender import ITEM_BYTES, Sender

if TYPE_CHECKING:
    from typing_extensions import Unpack

FIELDS = {"response_id", "trace_id", "session_id", "value", "name", "text", "target", "user", "token", "at", "event_id"}
TOKENS_KEPT = 10_000


class HasId(Protocol):
    """An answer as `openai` returns it, or a piece of a stream."""

    @property
    def id(self) -> str: ...


Answer: TypeAlias = "str | HasId"
"""An answer, or its id."""


class More(TypedDict, total=False):
    """What may be said with any kind."""

    user: str | None
    """Who says it; one user has one vote of a kind on an answer."""
    token: str | None
    """The answer's feedback token, where there is no API key."""
    at: float | str | datetime | None
    """When: Unix seconds, RFC 3339 or a datetime; now if left out."""
    event_id: str | None
    """Yours; sent again, the last one counts, once."""


class Tokens:
    """The feedback tokens of the last answers, by request id; an answer's id ends with its request's."""

    def __init__(self, most: int = TOKENS_KEPT) -> None:
        self._most = most
        self._tokens: dict[str, str] = {}  # without a lock, which a fork could leave locked for ever

    def remember(self, request_id: str, token: str) -> None:
        self._tokens[request_id] = token
        while len(self._tokens) > self._most:
            self._tokens.pop(next(iter(self._tokens)), None)

    def of(self, answer_id: str) -> str | None:
        """The token of an answer, if it is among the last."""
        ends = [0, *(i + 1 for i, char in enumerate(answer_id[:100]) if char in "-_")]
        return next((token for i in ends if (token := self._tokens.get(answer_id[i:]))), None)


Self = TypeVar("Self", bound="Kinds")


class Kinds:
    """The kinds of feedback. Each method queues one item and returns its event id at once.

    None of them waits for the network or raises: what is wrong with an argument is logged, the first time as a warning,
    and counted in `invalid`. `answer`: an answer or its id. `more`: see `More`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        user: str | None = None,
        tenant: str | None = None,
        max_queue: int = 10_000,
        batch: int = 200,
        flush_every: float = 0.5,
        timeout: float = 5.0,
    ) -> None:
        """`base_url`: the gateway's, as for OpenAI, with `/v1`. `user`: who speaks unless a call says otherwise.

        `tenant`: for whom, where the API key is an admin's or none is needed. `max_queue`: items that may wait; more
        are dropped. `batch`: items in one request, 1 to 1000. `flush_every`: seconds that an item waits for others.
        `timeout`: seconds for each step of a request, and for all that is left at the interpreter's end.

        Raises ValueError if one of these cannot be.
        """
        if urlsplit(base_url).scheme not in ("http", "https") or not urlsplit(base_url).hostname:
            raise ValueError(f"base_url is an http(s) address that ends with /v1, not {base_url!r}")
        if not 1 <= batch <= 1000 or max_queue < 1 or not flush_every >= 0 or not timeout > 0:
            raise ValueError("batch is 1 to 1000, max_queue at least 1, flush_every and timeout are seconds")
        headers = {"Content-Type": "application/json", "User-Agent": "understudy-client"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        if tenant:
            headers["X-Understudy-Tenant"] = tenant
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            raise ValueError("api_key and tenant are printable ASCII")
        self._sender = Sender(f"{base_url.rstrip('/')}/feedback", headers, max_queue, batch, flush_every, timeout)
        self._keyed = bool(api_key)
        self._user = user
        self._session: str | None = None
        self._tokens = Tokens()

    def _on_behalf(self: Self, user: str | None, session: str | None, tokens: Tokens) -> Self:
        """The same queue, for one user and session."""
        other = copy.copy(self)
        other._user, other._session, other._tokens = user or self._user, session, tokens
        return other

    @property
    def closed(self) -> bool:
        """Whether all that is said is dropped."""
        return self._sender.closed

    @property
    def accepted(self) -> int:
        """Items that the gateway keeps."""
        return self._sender.accepted

    @property
    def waiting(self) -> int:
        """Items that are queued or being sent."""
        return len(self._sender)

    @property
    def dropped(self) -> int:
        """Items that were put into a full queue or after closing, or not sent in time at the end."""
        return self._sender.dropped

    @property
    def refused(self) -> int:
        """Items that the gateway did not take."""
        return self._sender.refused

    @property
    def invalid(self) -> int:
        """Items that could not be sent: a wrong field, or a value that JSON has not."""
        return self._sender.invalid

    def thumb(self, answer: Answer, up: bool, **more: Unpack[More]) -> str:
        """Up (True) or down (False)."""
        return self._say("thumb", {**more, "response_id": answer, "value": up})

    def rate(self, answer: Answer, value: float, **more: Unpack[More]) -> str:
        """1 to 5."""
        return self._say("rating", {**more, "response_id": answer, "value": value})

    def correct(self, answer: Answer, text: str, **more: Unpack[More]) -> str:
        """The answer as it should have been."""
        return self._say("correction", {**more, "response_id": answer, "text": text})

    def compare(self, winner: Answer, loser: Answer, **more: Unpack[More]) -> str:
        """One answer is better than another."""
        return self._compare({"winner": winner, "loser": loser}, more)

    def tie(self, a: Answer, b: Answer, **more: Unpack[More]) -> str:
        """Two answers are equally good."""
        return self._compare({"tie": [a, b]}, more)

    def both_bad(self, a: Answer, b: Answer, **more: Unpack[More]) -> str:
        """Neither of two answers will do."""
        return self._compare({"both_bad": [a, b]}, more)

    def comment(self, answer: Answer, text: str, **more: Unpack[More]) -> str:
        """What somebody wrote about an answer."""
        return self._say("comment", {**more, "response_id": answer, "text": text})

    def copy(self, answer: Answer, value: float | None = None, **more: Unpack[More]) -> str:
        """The answer was copied; `value`: how much of it, 0 to 1."""
        return self._say("copy", {**more, "response_id": answer, "value": value})

    def outcome(
        self,
        name: str,
        value: float,
        *,
        response_id: Answer | None = None,
        session_id: str | None = None,
        **more: Unpack[More],
    ) -> str:
        """What came of an answer or a session, as `("resolved", 1)`. Needs an API key where the gateway asks for one.

        With neither id it is about the session that `wrap` was given.
        """
        about = {"response_id": response_id, "session_id": session_id}
        return self._say("outcome", {**more, **about, "name": name, "value": value})

    def send(self, kind: str, /, **item: Any) -> str:
        """Any kind and fields of `POST /v1/feedback`."""
        return self._say(kind, item)

    def _compare(self, said: dict[str, Any], more: More) -> str:
        first = next(iter(said.values()))
        about = first[0] if isinstance(first, list) else first
        return self._say("comparison", {**more, "response_id": about, "value": said})

    def _say(self, kind: str, item: dict[str, Any]) -> str:
        event_id = f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"
        try:
            event_id = str(item.get("event_id") or event_id)
            said = self._complete(kind, {**item, "event_id": event_id})
            body = json.dumps(said, ensure_ascii=False, allow_nan=False, default=_plain).encode("utf-8", "replace")
            if len(body) > ITEM_BYTES:
                raise ValueError(f"an item is at most {ITEM_BYTES} bytes")
            about = said.get("response_id") or said.get("trace_id") or said.get("session_id")
            self._sender.put(str(about), "token" in said, body)
        except Exception as error:  # an argument may be anything, with any `__str__`
            self._sender.reject(error)
        return event_id

    def _complete(self, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        """The item as the gateway wants it. Raises TypeError or ValueError if it cannot be."""
        if unknown := item.keys() - FIELDS:
            raise ValueError(f"there is no field {', '.join(sorted(unknown))}")
        said: dict[str, Any] = {"kind": kind, "user": self._user, "at": time.time()}
        said |= {name: value for name, value in item.items() if value is not None}
        if not {"response_id", "trace_id", "session_id"} & said.keys():
            said["session_id"] = self._session or _missing()
        for name in {"user", "session_id"} & said.keys():  # often a number or a UUID
            said[name] = None if said[name] is None else str(said[name])
        if isinstance(said["at"], datetime):
            said["at"] = said["at"].timestamp()
        if kind == "comparison" and isinstance(said.get("value"), dict):
            verdicts = said["value"].items()
            said["value"] = {k: list(map(_id, v)) if isinstance(v, (list, tuple)) else _id(v) for k, v in verdicts}
        if "response_id" in said:
            said["response_id"] = _id(said["response_id"])
            token = None if self._keyed or kind == "outcome" else self._tokens.of(said["response_id"])
            if token is not None:
                said.setdefault("token", token)
        return said


def _id(answer: object) -> str:
    name = answer if isinstance(answer, str) else getattr(answer, "id", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"an answer is named by its id or is one of openai's objects, not {type(answer).__name__}")
    return name


def _missing() -> str:
    raise ValueError("name what it is about: an answer or a session")


def _plain(value: Any) -> Any:
    """A number that JSON knows, of NumPy's or any other; raises TypeError if it is none."""
    return value.item() if hasattr(value, "item") else float(value)


class Feedback(Kinds):
    """Tells a gateway what people did with its answers, from any thread. A context manager that closes at its end."""

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was said so far is settled; False if it is not within `timeout` seconds."""
        return self._sender.flush(self._sender.timeout if timeout is None else timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Flush; what is said later, or is left then, is dropped. False if anything was left."""
        return self._sender.close(self._sender.timeout if timeout is None else timeout)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncFeedback(Kinds):
    """`Feedback` for asyncio: its methods are plain calls, for none of them waits; only flushing is awaited."""

    async def flush(self, timeout: float | None = None) -> bool:
        """As `Feedback.flush`, in a thread."""
        return await asyncio.to_thread(self._sender.flush, self._sender.timeout if timeout is None else timeout)

    async def aclose(self, timeout: float | None = None) -> bool:
        """As `Feedback.close`, in a thread."""
        return await asyncio.to_thread(self._sender.close, self._sender.timeout if timeout is None else timeout)

    async def __aenter__(self: Self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
