"""Where the router's state is kept: one interface, two implementations (`store_sqlite`, `store_redis`).

What the controller writes can be recomputed from the journal; for it the store is a cache. Documents cannot: they are
kept only here (`Documents`). All methods are synchronous, raise `StateError`s, and may be called from several threads.
Writes of the controller carry the token of its lease and raise `Fenced` once a newer one has written, so that two
controllers never both write.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Protocol

import msgspec

from router.arms import Cell, Choice, Snapshot, Sums


class ApiKey(msgspec.Struct, frozen=True):
    """An API key as it is kept: its SHA-256, never itself."""

    id: str
    digest: str
    tenant: str
    role: str = "app"
    """`app` or `admin`."""
    text: bool = False
    """May read what people wrote; each time is put on record."""
    created: float = 0.0
    revoked: bool = False


class Lease(msgspec.Struct, frozen=True):
    """Who is the controller, and until when."""

    owner: str
    token: int
    expires: float


def session_key(tenant: str, session: str) -> str:
    """The name under which a store keeps a tenant's session; no two of them share one."""
    return f"{len(tenant)}:{tenant}/{session}"


class Change(msgspec.Struct, frozen=True):
    """What a session contributes to a route's sums, instead of what it contributed before."""

    session: str
    revision: int
    """Of two changes of a session the higher one counts, whichever comes first and however often."""
    cells: Mapping[Cell, Sums]


Assignment = tuple[str, str, str, Choice]
"""Route, tenant, session, and the arm it drew."""
REMEMBER_SECONDS = 86400.0
"""How long a session keeps its arm."""


class Assignments(Protocol):
    """Which arm each session has. Methods raise `StateError`s, and may be called from several threads."""

    told_by_facts: bool
    """Facts on disk tell it too: only sessions whose answers are still under way need be assigned."""

    def close(self) -> None: ...

    def assign(self, assignments: Sequence[Assignment], seconds: float, now: float) -> None:
        """Remember sessions' arms for `seconds`."""

    def recall(self, route: str, tenant: str, session: str, held: Container[str], now: float) -> Choice | None:
        """The session's arm on `route`, if it has one of `held`."""


class Documents(Protocol):
    """Small documents by name, changed by compare-and-set; no lease fences them.

    The registry of versions and the learner's own state. The journal does not hold them, so an emptied store loses
    them; each version's folder has its card, from which the registry is made anew (`learner.registry`). Redis keeps
    them over its own restart only with `appendonly yes`.
    """

    def read(self, name: str) -> bytes | None: ...

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        """Put `new` where `old` stands, in one step; None is no document. False if something else stands there.

        Done at most once, on disk when it returns (SQLite). After a `StateError` read what stands: it may be either.
        """

    def names(self, prefix: str) -> list[str]:
        """The names of all documents that begin so, sorted."""


class Store(Documents, Protocol):
    """State of all routes."""

    def close(self) -> None: ...

    def ping(self) -> None:
        """Raise `StateError` if the store cannot be used now."""

    # What the controller writes.

    def lease(self, owner: str, seconds: float, now: float) -> Lease | None:
        """Take or renew the one controller's lease; None while another owner holds it."""

    def release(self, owner: str) -> None:
        """Give the lease back, so that another need not wait for its end."""

    def holder(self) -> Lease | None:
        """The lease last given, which may have ended."""

    def apply(self, route: str, changes: Sequence[Change], token: int) -> int:
        """Replace what sessions contribute to the sums, each atomically; how many of the revisions were newer."""

    def sums(self, route: str) -> dict[Cell, Sums]:
        """All cells of a route."""

    def changes(self, route: str) -> int:
        """How many changes there were: while it is the same, so are the sums."""

    def clear(self, route: str, token: int) -> None:
        """Forget all contributions to a route's sums; a journal that is read again from the start makes them anew."""

    def publish(self, snapshot: Snapshot, token: int) -> None: ...

    def mark(self, name: str, value: int, token: int) -> None:
        """Remember how far the controller has read."""

    def marked(self, name: str) -> int: ...

    def keep(self, name: str, body: bytes, token: int) -> None:
        """Keep what the controller learned, such as a model, until it keeps another under the same name."""

    def kept(self, name: str) -> bytes | None: ...

    # What gateways read.

    def snapshot(self, route: str) -> Snapshot | None: ...

    # Keys of apps.

    def put_key(self, key: ApiKey) -> None: ...

    def list_keys(self) -> list[ApiKey]: ...

    def secret(self, name: str, fresh: bytes) -> bytes:
        """The secret kept under `name`; `fresh` becomes it if there is none yet."""

    def secrets(self) -> dict[str, bytes]:
        """All secrets by name."""

    def drop_secret(self, name: str) -> None: ...


def dump_cells(cells: Mapping[Cell, Sums]) -> bytes:
    """Cells as JSON rows [segment, arm, bucket, n, s, ss, metric], sorted, numbers exact."""
    return msgspec.json.encode(
        [[c.segment, c.arm, c.bucket, v.n, v.s, v.ss, c.metric] for c, v in sorted(cells.items())]
    )


def load_cells(body: bytes) -> dict[Cell, Sums]:
    return {
        Cell(row.segment, row.arm, row.bucket, row.metric): Sums(row.n, row.s, row.ss) for row in _rows.decode(body)
    }


class _Row(msgspec.Struct, array_like=True):
    segment: str
    arm: str
    bucket: int
    n: float
    s: float
    ss: float
    metric: str = ""


_rows = msgspec.json.Decoder(list[_Row])
