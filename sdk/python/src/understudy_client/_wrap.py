"""An `openai` client that remembers the feedback token of each answer, and knows its user and session.

The tokens are read from the headers of responses by an event hook on the client's own HTTP client, so every way to ask
is covered (chat completions, responses, raw, streams) and no stream is touched. An answer's id ends with the header
`x-request-id`, which is why no body need be read.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from understudy_client._feedback import AsyncFeedback, Feedback, Kinds, Tokens

log = logging.getLogger("understudy_client")

USER, SESSION, TENANT = "x-understudy-user", "x-understudy-session", "x-understudy-tenant"
_ENCODED = "utf-8''"
"""What an encoded header value begins with (RFC 8187, 3.2.1); `openai` itself takes ASCII only."""
_listening = threading.Lock()


class _Listener:
    """What is kept for one HTTP client, however often it is wrapped."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.feedback: dict[object, Kinds] = {}

    def ask(self, request: Any) -> None:
        """Put names that are not ASCII into the headers as UTF-8, as the gateway reads them."""
        with contextlib.suppress(Exception):  # they would arrive as they are, still one name for one person
            for name in (USER, SESSION):
                if request.headers.get(name, "").startswith(_ENCODED):
                    plain = unquote_to_bytes(request.headers[name][len(_ENCODED) :])
                    others = [(key, value) for key, value in request.headers.raw if key.lower() != name.encode()]
                    request.headers = type(request.headers)([*others, (name.encode(), plain)])

    def hear(self, response: Any) -> None:
        with contextlib.suppress(Exception):  # it is not worth an answer
            request_id = response.headers.get("x-request-id")
            token = response.headers.get("x-understudy-feedback-token")
            if request_id and token:
                self.tokens.remember(request_id, token)

    async def aask(self, request: Any) -> None:
        self.ask(request)

    async def ahear(self, response: Any) -> None:
        self.hear(response)


def wrap(client: Any, feedback: Kinds | None = None, *, user: str | None = None, session: str | None = None) -> Any:
    """A copy of an `openai.OpenAI` or `openai.AsyncOpenAI` (same class, same connections) with feedback beside it.

    `copy.understudy` is a `Feedback` (`AsyncFeedback` for an async client) that knows the tokens of the last 10,000
    answers of these connections, and sends them where it has no API key. It shares the queue of `feedback`; without
    that, of one made for the client's address and key, the same one each time. `user` and `session` are sent with
    each request, and are who speaks in `copy.understudy`. Cheap enough for each request of yours.

    Raises TypeError if the client is not like one of OpenAI's.
    """
    if not hasattr(client, "copy") or not hasattr(client, "base_url"):
        raise TypeError(f"wrap takes an openai.OpenAI or openai.AsyncOpenAI, not {type(client).__name__}")
    user, session = _clean(user), _clean(session)
    headers = {name: _encoded(value) for name, value in ((USER, user), (SESSION, session)) if value}
    wrapped = client.copy(default_headers=headers)
    listener = _listener(wrapped)
    if feedback is None:
        feedback = _own_feedback(wrapped, listener)
    wrapped.understudy = feedback._on_behalf(user, session, listener.tokens)
    return wrapped


def _listener(client: Any) -> _Listener:
    """The listener on the client's connections; put there if it is not."""
    hooks = getattr(getattr(client, "_client", None), "event_hooks", None)
    if not isinstance(hooks, dict):
        log.warning("%s has no event hooks: feedback tokens are not remembered", type(client).__name__)
        return _Listener()
    with _listening:
        for hook in hooks.setdefault("response", []):
            if isinstance(owner := getattr(hook, "__self__", None), _Listener):
                return owner
        listener = _Listener()
        asynchronous = _is_async(client)
        hooks.setdefault("request", []).append(listener.aask if asynchronous else listener.ask)
        hooks["response"].append(listener.ahear if asynchronous else listener.hear)
        return listener


def _own_feedback(client: Any, listener: _Listener) -> Kinds:
    key = client.api_key if isinstance(client.api_key, str) else None  # it may be a function
    custom = {name.lower(): value for name, value in client.default_headers.items()}
    tenant = custom.get(TENANT) if isinstance(custom.get(TENANT), str) else None
    made = listener.feedback
    with _listening:
        which = (str(client.base_url), key, tenant)
        if which not in made or made[which].closed:
            made[which] = (AsyncFeedback if _is_async(client) else Feedback)(which[0], key, tenant=tenant)
        return made[which]


def _is_async(client: Any) -> bool:
    return inspect.iscoroutinefunction(getattr(client, "close", None))


def _clean(name: Any) -> str | None:
    """A name as a header may hold it, without what would break one; None if nothing is left."""
    return None if name is None else "".join(c for c in str(name) if c >= " " and c != "\x7f").strip() or None


def _encoded(name: str) -> str:
    plain = name.isascii() and not name.startswith(_ENCODED)
    return name if plain else _ENCODED + quote(name, errors="replace")
