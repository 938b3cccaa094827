"""The store in Redis, for gateways on several machines.

Keys carry the route as a hash tag (`understudy:{assistant}:sums`), so that each script's keys lie in one slot of
a Redis Cluster. Every change that reads first is one Lua script: atomic, and safe to repeat. Numbers travel as
strings because Lua would cut doubles to 14 digits.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import redis

from router.arms import Cell, Choice, Snapshot, Sums
from router.store import ApiKey, Assignment, Change, Lease, session_key
from telemetry.errors import Fenced, StateUnavailable

_LEASE = """
-- KEYS: lease hash. ARGV: owner, seconds, now. Returns {token, expires} or nil while another holds it.
local held = redis.call('HMGET', KEYS[1], 'owner', 'token', 'expires')
local owner, token, expires = held[1] or '', tonumber(held[2] or '0'), tonumber(held[3] or '0')
if owner ~= ARGV[1] and owner ~= '' and tonumber(ARGV[3]) < expires then return nil end
-- Tokens follow the time, so a Redis that came back empty gives none that is older than a fence left in flight.
if owner ~= ARGV[1] then token = math.max(token + 1, math.floor(tonumber(ARGV[3]) * 1000)) end
local ends = string.format('%.6f', tonumber(ARGV[3]) + tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'token', token, 'expires', ends)
return {tostring(token), ends}
"""

_ASSIGN = """
-- KEYS: arms of sessions. ARGV: how long they are remembered, ms; then each one's choice. One script for many costs the
-- gateway a tenth of as many SETs.
for n, key in ipairs(KEYS) do redis.call('SET', key, ARGV[n + 1], 'PX', ARGV[1]) end
"""

_RELEASE = """
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] then redis.call('HSET', KEYS[1], 'owner', '', 'expires', '0') end
"""

_FENCE = """
-- The fence is the newest token that wrote to this slot.
local newest = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) < newest then return -1 end
if tonumber(ARGV[1]) > newest then redis.call('SET', KEYS[1], ARGV[1]) end
"""

_APPLY = (
    _FENCE
    + """
-- KEYS: fence, sums hash, count of changes, a hash for each session.
-- ARGV: token; then for each session its revision, and rows of {field, number as string} as JSON.
local function add(rows, negate)
  for _, row in ipairs(cjson.decode(rows)) do
    local number = row[2]
    if negate then
      if string.sub(number, 1, 1) == '-' then number = string.sub(number, 2) else number = '-' .. number end
    end
    redis.call('HINCRBYFLOAT', KEYS[2], row[1], number)
  end
end
local newer = 0
for i = 4, #KEYS do
  local revision, rows = ARGV[2 * i - 6], ARGV[2 * i - 5]
  local kept = redis.call('HMGET', KEYS[i], 'revision', 'cells')
  if not (kept[1] and tonumber(kept[1]) >= tonumber(revision)) then
    if kept[2] then add(kept[2], true) end
    add(rows, false)
    redis.call('HSET', KEYS[i], 'revision', revision, 'cells', rows)
    newer = newer + 1
  end
end
if newer > 0 then redis.call('INCRBY', KEYS[3], newer) end
return newer
"""
)

_CLEAR = _FENCE + "redis.call('DEL', KEYS[2]) redis.call('INCR', KEYS[3]) return 1"
_MARK = """
-- KEYS: lease hash, mark. ARGV: token, value. What came before a mark is in this store: not if it was emptied since.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -1 end
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""

_SET = _FENCE + "redis.call('SET', KEYS[2], ARGV[2]) return 1"

_SWAP = """
-- KEYS: documents hash. ARGV: name, whether there is an old one, it, whether there is a new one, it.
local found = redis.call('HGET', KEYS[1], ARGV[1])
if (found and '1' or '0') ~= ARGV[2] or (found and found ~= ARGV[3]) then return 0 end
if ARGV[4] == '1' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[5]) else redis.call('HDEL', KEYS[1], ARGV[1]) end
return 1
"""

_choice = msgspec.json.Decoder(Choice)
_snapshot = msgspec.json.Decoder(Snapshot)
_key = msgspec.json.Decoder(ApiKey)


AT_ONCE = 500
"""Sessions of one script; others wait for it."""


class RedisStore:
    """See `router.store.Store`. `url` as redis-py takes it; `timeout` seconds bound every call."""

    told_by_facts = False

    def __init__(self, url: str, timeout: float = 2.0) -> None:
        self._where = url.rsplit("@", 1)[-1]
        self._redis: Any = redis.Redis.from_url(url, socket_timeout=timeout, socket_connect_timeout=timeout)
        self._lease = self._redis.register_script(_LEASE)
        self._release = self._redis.register_script(_RELEASE)
        self._apply = self._redis.register_script(_APPLY)
        self._clear = self._redis.register_script(_CLEAR)
        self._set = self._redis.register_script(_SET)
        self._assign = self._redis.register_script(_ASSIGN)
        self._mark = self._redis.register_script(_MARK)
        self._swap = self._redis.register_script(_SWAP)

    def close(self) -> None:
        self._redis.close()

    def ping(self) -> None:
        with self._translated():
            self._redis.ping()

    def lease(self, owner: str, seconds: float, now: float) -> Lease | None:
        with self._translated():
            given = self._lease(keys=["understudy:{controller}:lease"], args=[owner, repr(seconds), repr(now)])
        return Lease(owner, int(given[0]), float(given[1])) if given else None

    def release(self, owner: str) -> None:
        with self._translated():
            self._release(keys=["understudy:{controller}:lease"], args=[owner])

    def holder(self) -> Lease | None:
        with self._translated():
            owner, token, expires = self._redis.hmget("understudy:{controller}:lease", "owner", "token", "expires")
        return Lease(owner.decode(), int(token), float(expires)) if token else None

    def apply(self, route: str, changes: Sequence[Change], token: int) -> int:
        keys = [_k(route, "fence"), _k(route, "sums"), _k(route, "changes")]
        newer = 0
        for start in range(0, len(changes), AT_ONCE):
            part = changes[start : start + AT_ONCE]
            sessions = [_k(route, f"session:{change.session}") for change in part]
            args = [x for change in part for x in (change.revision, msgspec.json.encode(_rows(change.cells)))]
            with self._translated():
                newer += _unfenced(self._apply(keys=[*keys, *sessions], args=[token, *args]), token)
        return newer

    def changes(self, route: str) -> int:
        with self._translated():
            return int(self._redis.get(_k(route, "changes")) or 0)

    def sums(self, route: str) -> dict[Cell, Sums]:
        with self._translated():
            fields = self._redis.hgetall(_k(route, "sums"))
        parts: dict[Cell, dict[str, float]] = {}
        for field, number in fields.items():
            segment, arm, bucket, part, *metric = field.decode().split("\x1f")
            parts.setdefault(Cell(segment, arm, int(bucket), *metric), {})[part] = float(number)
        return {cell: Sums(**numbers) for cell, numbers in parts.items()}

    def clear(self, route: str, token: int) -> None:
        with self._translated():
            keys = [_k(route, "fence"), _k(route, "sums"), _k(route, "changes")]
            _unfenced(self._clear(keys=keys, args=[token]), token)
            for key in self._redis.scan_iter(_glob(_k(route, "session:")) + "*", count=1000):
                self._redis.unlink(key)

    def publish(self, snapshot: Snapshot, token: int) -> None:
        keys = [_k(snapshot.route, "fence"), _k(snapshot.route, "snapshot")]
        with self._translated():
            _unfenced(self._set(keys=keys, args=[token, msgspec.json.encode(snapshot)]), token)

    def mark(self, name: str, value: int, token: int) -> None:
        keys = ["understudy:{controller}:lease", f"understudy:{{controller}}:mark:{name}"]
        with self._translated():
            _unfenced(self._mark(keys=keys, args=[token, value]), token)

    def marked(self, name: str) -> int:
        with self._translated():
            return int(self._redis.get(f"understudy:{{controller}}:mark:{name}") or 0)

    def keep(self, name: str, body: bytes, token: int) -> None:
        keys = ["understudy:{controller}:lease", f"understudy:{{controller}}:kept:{name}"]
        with self._translated():
            _unfenced(self._mark(keys=keys, args=[token, body]), token)

    def kept(self, name: str) -> bytes | None:
        with self._translated():
            body = self._redis.get(f"understudy:{{controller}}:kept:{name}")
        return bytes(body) if body is not None else None

    def snapshot(self, route: str) -> Snapshot | None:
        with self._translated():
            body = self._redis.get(_k(route, "snapshot"))
        return _snapshot.decode(body) if body else None

    def assign(self, assignments: Sequence[Assignment], seconds: float, now: float) -> None:
        with self._translated():
            for name in dict.fromkeys(route for route, *_ in assignments):
                ours = [(_arm(route, *key), choice) for route, *key, choice in assignments if route == name]
                for start in range(0, len(ours), AT_ONCE):
                    part = dict(ours[start : start + AT_ONCE])
                    bodies = map(msgspec.json.encode, part.values())
                    self._assign(keys=list(part), args=[max(1, int(seconds * 1000)), *bodies])

    def recall(self, route: str, tenant: str, session: str, held: Container[str], now: float) -> Choice | None:
        with self._translated():
            body = self._redis.get(_arm(route, tenant, session))
        choice = _choice.decode(body) if body else None
        return choice if choice is not None and choice.arm in held else None

    def put_key(self, key: ApiKey) -> None:
        with self._translated():
            self._redis.hset("understudy:keys", key.id, msgspec.json.encode(key))

    def list_keys(self) -> list[ApiKey]:
        with self._translated():
            return [_key.decode(body) for _, body in sorted(self._redis.hgetall("understudy:keys").items())]

    def secret(self, name: str, fresh: bytes) -> bytes:
        with self._translated():
            self._redis.hsetnx("understudy:secrets", name, fresh)
            return bytes(self._redis.hget("understudy:secrets", name))

    def secrets(self) -> dict[str, bytes]:
        with self._translated():
            return {name.decode(): value for name, value in self._redis.hgetall("understudy:secrets").items()}

    def drop_secret(self, name: str) -> None:
        with self._translated():
            self._redis.hdel("understudy:secrets", name)

    def read(self, name: str) -> bytes | None:
        with self._translated():
            body = self._redis.hget("understudy:documents", name)
        return bytes(body) if body is not None else None

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        # Redis.from_url tries nothing twice: a swap that came through, but whose answer was lost, would be denied.
        args: list[str | int | bytes] = [name, int(old is not None), old or b"", int(new is not None), new or b""]
        with self._translated():
            return bool(self._swap(keys=["understudy:documents"], args=args))

    def names(self, prefix: str) -> list[str]:
        with self._translated():
            found = [name.decode() for name in self._redis.hkeys("understudy:documents")]
        return sorted(name for name in found if name.startswith(prefix))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StateUnavailable(
                f"Redis at {self._where} does not answer ({error}); check that it runs and that `state` names it"
            ) from error


def _k(route: str, name: str) -> str:
    return f"understudy:{{{route}}}:{name}"


def _arm(route: str, tenant: str, session: str) -> str:
    return _k(route, f"arm:{session_key(tenant, session)}")


def _rows(cells: Mapping[Cell, Sums]) -> list[tuple[str, str]]:
    """The fields of the sums hash, each with the number to add."""
    return [
        ("\x1f".join((c.segment, c.arm, str(c.bucket), part, *([c.metric] if c.metric else []))), repr(number))
        for c, v in sorted(cells.items())
        for part, number in (("n", v.n), ("s", v.s), ("ss", v.ss))
    ]


def _glob(text: str) -> str:
    """`text` as a pattern that matches only itself."""
    return re.sub(r"([*?\[\]\\])", r"\\\1", text)


def _unfenced(answer: int, token: int) -> int:
    if answer == -1:
        raise Fenced(f"lease {token} ended: another controller took over, or Redis was emptied")
    return answer
