"""Which replica is asked: one that serves the arm's model, as far as is known.

A replica's adapters are a list in its process, gone when it restarts, so the same version may be here and not there.
That a model is missing is learned from the 404 that names it (vLLM 0.32, `entrypoints/openai/serving_engine.py`), and
from a look at GET /v1/models in the background: every few seconds where versions are served, and soon after a 404 or a
connection that was refused. A replica of which nothing is known is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from prometheus_client import Counter

from gateway.arms import Lineup, Lineups, Route
from gateway.upstream import ConnectTimedOut, Reader, Refused, Replica, Reply, Timeouts, UpstreamError
from router.bandit import unit_hash

log = logging.getLogger("understudy.gateway")

LOOK = 2.0
"""Seconds between looks at what replicas serve."""
SOON = 0.25
"""Seconds between two looks at the least, whatever happens."""
_PATIENCE = Timeouts(1.0, 2.0, 2.0)


class Reading(Protocol):
    """An answer that is being read: from a replica (`upstream.Reply`) or from a provider (`providers.Reply`)."""

    status: int
    headers: list[tuple[bytes, bytes]]
    streams: bool
    """Whether its pieces are to be passed on as they come."""

    async def relay(self, put: Callable[[bytes], None], reader: Reader) -> None: ...
    async def read(self) -> bytes: ...
    async def read_all(self) -> bytes: ...
    def abort(self) -> None: ...


class Unserved(UpstreamError):
    """No replica serves the model, nor that of any arm that could stand in."""

    kind = "upstream_error"
    status = 503


class Replicas:
    """Asks the replicas of routes, and knows what they miss. For one worker; belongs to its event loop."""

    def __init__(self, routes: Mapping[str, Route], lineups: Lineups, retries: Counter) -> None:
        self._routes = routes
        self._lineups = lineups
        self._retries = retries
        self._wake = asyncio.Event()

    async def ask(
        self,
        route: Route,
        model: str,
        session: tuple[str, ...],
        path: str,
        head: Callable[[Replica], bytes],
        body: bytes,
    ) -> Reading | None:
        """The answer of a replica that serves `model`; None if there is none. Raises `UpstreamError`.

        The session's own is asked; if it gives no answer at all, one other, and if it does not know
        the model, any other that may. `head` begins an attempt: the header lines, with a request id of its own.
        """
        able = [replica for replica in route.replicas if model not in replica.missing]
        able = in_order(able, unit_hash(*session)) if len(able) > 1 else able
        silent = 0
        for place, replica in enumerate(able):
            last = silent == 1 or place + 1 == len(able)
            if place:
                self._retries.labels(route.name).inc()
            try:
                reply = await replica.post(path, head(replica), body, route.timeouts)
            except (Refused, ConnectTimedOut):
                self._wake.set()
                if last and len(able) < len(route.replicas):
                    return None  # of the others, one may serve another arm
                if last:
                    raise
                silent += 1
                continue
            if reply.status == 404:
                read = await _read(reply)
                if not _is_of_model(read.body):
                    return read
                replica.missing.add(model)
                self._wake.set()
                continue
            if last or reply.status not in (502, 503):
                return reply
            reply.abort()
            silent += 1
        return None

    async def look_on(self) -> None:
        """For ever: see what replicas serve."""
        while True:
            self._wake.clear()
            for failure in await asyncio.gather(*(_look(*one) for one in self._watched()), return_exceptions=True):
                if failure is not None:
                    log.error("a look at what a replica serves failed", exc_info=failure)
            await asyncio.sleep(SOON)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK - SOON):
                    await self._wake.wait()

    def _watched(self) -> list[tuple[Replica, list[Lineup]]]:
        """The replicas of which it matters what they serve, each with the lineups of all its routes."""
        matter: set[int] = set()
        found: dict[int, tuple[Replica, list[Lineup]]] = {}
        for name, route in self._routes.items():
            lineup = self._lineups.of(name)
            if lineup.versions or any(replica.missing for replica in route.replicas):
                matter.update(map(id, route.replicas))
            for replica in route.replicas:
                found.setdefault(id(replica), (replica, []))[1].append(lineup)
        return [found[which] for which in matter]


async def _look(replica: Replica, lineups: list[Lineup]) -> None:
    """Note which models the replica misses: of versions what it does not list, of others what it said itself."""
    try:
        reply = await replica.get("/v1/models", _PATIENCE)
        listed = _listed(await reply.read_all()) if reply.status == 200 else None
        reply.abort()
    except UpstreamError:
        return  # it is away, so nothing is known anew
    if listed is None:  # it has no such list: let it be asked again
        replica.missing.clear()
        return
    wanted = {arm.model for lineup in lineups for arm in lineup.arms.values() if arm.provider is None}
    missing = (replica.missing & wanted).union(*(lineup.versions for lineup in lineups)) - listed
    replica.missing.clear()
    replica.missing.update(missing)


class _Read:
    """An answer that was read to its end, as it came."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.streams = False
        self.body = body
        self._left = body

    async def relay(self, put: Callable[[bytes], None], reader: Reader) -> None:
        put(await self.read())

    async def read(self) -> bytes:
        data, self._left = self._left, b""
        return data

    async def read_all(self) -> bytes:
        return await self.read()

    def abort(self) -> None:
        pass


async def _read(reply: Reply) -> _Read:
    try:
        return _Read(reply.status, reply.headers, await reply.read_all())
    finally:
        reply.abort()


class _Error(msgspec.Struct, frozen=True):
    param: Any = None
    code: Any = None


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error = _Error()


class _Model(msgspec.Struct, frozen=True):
    id: str


class _Models(msgspec.Struct, frozen=True):
    data: list[_Model]


def _is_of_model(body: bytes) -> bool:
    """Whether a 404 says that there is no such model (and not, say, no such earlier response)."""
    try:
        error = msgspec.json.decode(body, type=_Refusal).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return bool(error.param == "model" or error.code == "model_not_found")


def _listed(body: bytes) -> set[str] | None:
    try:
        return {model.id for model in msgspec.json.decode(body, type=_Models).data}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def in_order(replicas: list[Replica], u: float) -> list[Replica]:
    """Whom to ask first, second, …: the session's own (its prefix cache is warm), those that are down last.

    `u` in [0, 1) is the session's hash. A session leaves its replica while that one is much busier than the least.
    """
    start = int(u * len(replicas))
    ring = replicas[start:] + replicas[:start]
    busy = 2 * min(r.in_flight for r in replicas) + 8
    return sorted(ring, key=lambda r: (r.is_down, r.in_flight > busy))
