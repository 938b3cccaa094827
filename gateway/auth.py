"""Who asks (API keys), on whose behalf (identity), and who may speak for an answer (feedback tokens).

Pure but for the key ring, which a background task refreshes from the store: no request waits for a look-up.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from gateway.openai import ApiError, Ask, Fields, Metadata
from router.store import ApiKey, Store

OPEN_TENANT = "default"
TOKEN_KEYS = "tokens:"
"""What the names of secrets begin with that sign feedback tokens; the id of the key follows."""
SEEN_LIMIT = 10_000
TOKEN_LIMIT = 4096


def new_key(tenant: str, role: str, now: float, text: bool = False) -> tuple[str, ApiKey]:
    """A fresh API key and what is kept of it. The key itself is shown once and never stored."""
    secret = f"us-{secrets.token_urlsafe(32)}"
    return secret, ApiKey(f"key_{secrets.token_hex(4)}", _digest(secret), tenant, role, created=now, text=text)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def key_of(keys: Iterable[ApiKey], secret: str) -> ApiKey | None:
    """The valid key that a secret is of."""
    digest = _digest(secret.strip())
    return next((key for key in keys if key.digest == digest and not key.revoked), None)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom an API key stands for. `id` tells callers without identities apart; it is a hash, never the key."""

    tenant: str
    id: str
    role: str = "app"
    keyed: bool = False
    text: bool = False
    """May read what people wrote."""


class KeyRing:
    """The API keys that are valid now."""

    def __init__(self, require_key: bool) -> None:
        self.require_key = require_key
        self._known: tuple[dict[str, ApiKey], dict[bytes, Caller]] = {}, {}
        """Keys by digest, and who they were found to be; swapped together, for another thread refreshes them."""

    def refresh(self, keys: Iterable[ApiKey]) -> None:
        valid = {key.digest: key for key in keys if not key.revoked}
        if valid != self._known[0]:
            self._known = valid, {}

    def caller(self, authorization: bytes) -> Caller:
        """Who sends this `Authorization` header. Raises `ApiError` 401."""
        by_digest, seen = self._known
        known = seen.get(authorization)
        if known is not None:
            return known
        scheme, _, secret = authorization.decode("latin-1").partition(" ")
        digest = _digest(secret.strip())
        key = by_digest.get(digest) if scheme.lower() == "bearer" else None
        if key is None and self.require_key:
            raise ApiError(
                401,
                "a valid API key is needed: send `Authorization: Bearer us-…` (`understudy keys create` makes one)",
                type="authentication_error",
                code="invalid_api_key",
            )
        caller = Caller(key.tenant, key.id, key.role, True, key.text) if key else Caller(OPEN_TENANT, digest[:16])
        if len(seen) >= SEEN_LIMIT:  # wrong keys are remembered too
            seen.clear()
        seen[authorization] = caller
        return caller


@dataclass(frozen=True, slots=True)
class Identity:
    """On whose behalf a request is made. `session` and `user` are pseudonyms."""

    tenant: str
    session: str
    user: str | None
    task_type: str | None
    metadata: Metadata


_NO_METADATA = Metadata()
_NAME_LIMIT = 200


class Pseudonyms:
    """Keyed hashes: equal names of one tenant stay equal, and nobody without the key can guess them back."""

    def __init__(self, key: bytes) -> None:
        self.key = key[:64]

    def of(self, tenant: str, *parts: str | bytes) -> str:
        h = hashlib.blake2b(tenant.encode(), key=self.key, digest_size=12)
        for part in parts:
            h.update(b"\x1f")
            h.update(part.encode() if isinstance(part, str) else part)
        return h.hexdigest()

    def session(self, tenant: str, name: str) -> str:
        """Of a session by the name that the app gives it, which may be an address or a user's."""
        return self.of(tenant, "session", name)


def tenant_of(caller: Caller, headers: Mapping[bytes, bytes]) -> str:
    """For whom the caller speaks: a key for its own tenant only, an admin's and no key at all for any."""
    if caller.keyed and caller.role != "admin":
        return caller.tenant
    return (_header(headers, b"x-understudy-tenant") or caller.tenant)[:_NAME_LIMIT]


def identify(caller: Caller, headers: Mapping[bytes, bytes], ask: Ask, fields: Fields, hide: Pseudonyms) -> Identity:
    """Identity, strongest source first: headers, `metadata`, OpenAI's own fields, else key + conversation root."""
    said = ask.metadata or _NO_METADATA
    tenant = tenant_of(caller, headers)
    user = _header(headers, b"x-understudy-user") or said.user_id or ask.user or ask.safety_identifier
    session = _header(headers, b"x-understudy-session") or said.session_id
    return Identity(
        tenant=tenant,
        session=hide.session(tenant, session)
        if session is not None
        else hide.of(tenant, caller.id, user or "", ask.prompt_cache_key or "", *_root(ask, fields)),
        user=hide.of(tenant, user) if user else None,
        task_type=(_header(headers, b"x-understudy-task") or said.task_type or "")[:_NAME_LIMIT] or None,
        metadata=said,
    )


def _header(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    value = headers.get(name)
    return value.decode("utf-8", "replace").strip() or None if value else None


def _root(ask: Ask, fields: Fields) -> list[bytes]:
    """What stays the same through a conversation: its system messages up to, and with, the first user message."""
    if ask.messages is None:
        return [bytes(fields.get("input") or fields.get("prompt") or b"")]
    root = []
    for message in ask.messages:
        root += [message.role.encode(), bytes(message.content)]
        if message.role == "user":
            break
    return root


class Token(msgspec.Struct, frozen=True, array_like=True):
    """The right to give feedback on one answer, until `expires` (Unix seconds)."""

    key_id: str
    tenant: str
    request_id: str
    subject: str | None
    kinds: tuple[str, ...]
    """Allowed kinds; empty allows all but `outcome`."""
    expires: int


class TokenSigner:
    """Issues and checks feedback tokens: base64url(JSON) "." base64url(keyed BLAKE2b, 16 bytes; RFC 7693).

    `keys`: id → secret. An id is the Unix second at which the key was made. The newest two are live: both verify, and
    the newest signs as soon as every worker has had the time to hear of it.
    """

    LIFETIME = 7 * 86400
    SETTLES = 30
    """Seconds before a new key signs."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._decoder = msgspec.json.Decoder(Token)
        self.refresh(keys)

    def refresh(self, keys: Mapping[str, bytes]) -> None:
        """The keys that are kept now; raises ValueError if they are none."""
        if not keys:
            raise ValueError("there is no key to sign feedback tokens with")
        self._keys = {name: keys[name] for name in live_keys(keys)}
        self._newest, self._oldest = next(iter(self._keys)), next(reversed(self._keys))
        self._signs_at = int(self._newest) + self.SETTLES

    def issue(self, tenant: str, request_id: str, subject: str | None, now: float) -> str:
        key_id = self._newest if now >= self._signs_at else self._oldest
        payload = msgspec.json.encode(Token(key_id, tenant, request_id, subject, (), int(now) + self.LIFETIME))
        return f"{_b64(payload)}.{_b64(_mac(self._keys[key_id], payload))}"

    def verify(self, token: str, now: float) -> Token:
        """The token's claims. Raises `ApiError` 401 if it is not ours, was changed, or has expired."""
        if len(token) > TOKEN_LIMIT:
            raise _bad_token("it is malformed")
        try:
            payload, mac = (base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split("."))
            claims = self._decoder.decode(payload)
        except (ValueError, binascii.Error, msgspec.MsgspecError, RecursionError):
            raise _bad_token("it is malformed") from None
        key = self._keys.get(claims.key_id)
        if key is None or not hmac.compare_digest(mac, _mac(key, payload)):
            raise _bad_token("its signature does not match")
        if claims.expires < now:
            raise _bad_token("it has expired")
        return claims


def live_keys(names: Iterable[str]) -> list[str]:
    """Of the ids of token keys the two that are live, newest first."""
    return sorted(names, key=int, reverse=True)[:2]


def rotate_tokens(store: Store, now: float) -> list[str]:
    """Keep a new key for tokens and drop all but it and the last; their ids, newest first. Raises ValueError."""
    names = [name.removeprefix(TOKEN_KEYS) for name in store.secrets() if name.startswith(TOKEN_KEYS)]
    age = now - max(map(int, names), default=0)
    if age < TokenSigner.SETTLES:
        raise ValueError(f"the newest key is {age:.0f} s old and does not sign yet; wait {TokenSigner.SETTLES} s")
    new = str(int(now))
    store.secret(TOKEN_KEYS + new, secrets.token_bytes(32))
    live = live_keys([new, *names])
    for name in set(names) - set(live):
        store.drop_secret(TOKEN_KEYS + name)
    return live


def _mac(key: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, key=key[:64], digest_size=16).digest()


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bad_token(why: str) -> ApiError:
    return ApiError(
        401,
        f"the feedback token is refused: {why}",
        type="authentication_error",
        code="invalid_feedback_token",
    )
