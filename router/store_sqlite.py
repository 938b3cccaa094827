"""The store in a SQLite file that the processes of one machine share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from router.arms import Cell, Snapshot, Sums
from router.store import ApiKey, Change, Lease, dump_cells, load_cells
from telemetry.errors import Fenced
from telemetry.sqlite import connect, transaction, translated

MIGRATIONS = [
    """
    CREATE TABLE lease (one INTEGER PRIMARY KEY CHECK (one = 1), owner TEXT, token INTEGER, expires REAL);
    CREATE TABLE contributions (
        route TEXT, session TEXT, revision INTEGER NOT NULL, cells BLOB NOT NULL, PRIMARY KEY (route, session)
    ) WITHOUT ROWID;
    CREATE TABLE sums (
        route TEXT, segment TEXT, arm TEXT, bucket INTEGER, n REAL NOT NULL, s REAL NOT NULL, ss REAL NOT NULL,
        PRIMARY KEY (route, segment, arm, bucket)
    ) WITHOUT ROWID;
    CREATE TABLE snapshots (route TEXT PRIMARY KEY, body BLOB NOT NULL);
    CREATE TABLE marks (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
    CREATE TABLE assignments (
        route TEXT, session TEXT, body BLOB NOT NULL, expires REAL NOT NULL, PRIMARY KEY (route, session)
    ) WITHOUT ROWID;
    CREATE INDEX assignments_expires ON assignments (expires);
    CREATE TABLE keys (id TEXT PRIMARY KEY, body BLOB NOT NULL);
    CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL)
    """,
    """
    ALTER TABLE sums RENAME TO old_sums;
    CREATE TABLE sums (
        route TEXT, segment TEXT, arm TEXT, bucket INTEGER, metric TEXT,
        n REAL NOT NULL, s REAL NOT NULL, ss REAL NOT NULL,
        PRIMARY KEY (route, segment, arm, bucket, metric)
    ) WITHOUT ROWID;
    INSERT INTO sums SELECT route, segment, arm, bucket, '', n, s, ss FROM old_sums;
    DROP TABLE old_sums;
    CREATE TABLE kept (name TEXT PRIMARY KEY, body BLOB NOT NULL)
    """,
    "CREATE TABLE documents (name TEXT PRIMARY KEY, body BLOB NOT NULL)",
    "DROP TABLE assignments",  # the journal tells them (`router.recall`)
]

_snapshot = msgspec.json.Decoder(Snapshot)
_key = msgspec.json.Decoder(ApiKey)


class SqliteStore:
    """See `router.store.Store`. One connection, one lock: threads take turns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = connect(path, "store", MIGRATIONS)
        self._lock = threading.Lock()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def ping(self) -> None:
        self._one("SELECT 1")

    def lease(self, owner: str, seconds: float, now: float) -> Lease | None:
        with self._writing():
            row = self._db.execute("SELECT owner, token, expires FROM lease").fetchone()
            held_by, token, expires = row or ("", 0, 0.0)
            if held_by not in (owner, "") and now < expires:
                return None
            token += held_by != owner
            self._db.execute("INSERT OR REPLACE INTO lease VALUES (1, ?, ?, ?)", (owner, token, now + seconds))
            return Lease(owner, token, now + seconds)

    def release(self, owner: str) -> None:
        with self._writing():
            self._db.execute("UPDATE lease SET owner = '', expires = 0 WHERE owner = ?", (owner,))

    def holder(self) -> Lease | None:
        row = self._one("SELECT owner, token, expires FROM lease")
        return Lease(*row) if row else None

    def apply(self, route: str, changes: Sequence[Change], token: int) -> int:
        with self._writing(token):
            newer = sum(self._replace(route, change) for change in changes)
            self._changed(route, newer)
            return newer

    def _replace(self, route: str, new: Change) -> bool:
        row = self._db.execute(
            "SELECT revision, cells FROM contributions WHERE route = ? AND session = ?", (route, new.session)
        ).fetchone()
        if row and row[0] >= new.revision:
            return False
        difference = dict(new.cells)
        for cell, sums in load_cells(row[1]).items() if row else ():
            difference[cell] = difference.get(cell, Sums()).plus(sums, -1.0)
        self._db.executemany(
            "INSERT INTO sums VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE"
            " SET n = n + excluded.n, s = s + excluded.s, ss = ss + excluded.ss",
            [(route, c.segment, c.arm, c.bucket, c.metric, d.n, d.s, d.ss) for c, d in difference.items()],
        )
        self._db.execute(
            "INSERT OR REPLACE INTO contributions VALUES (?, ?, ?, ?)",
            (route, new.session, new.revision, dump_cells(new.cells)),
        )
        return True

    def _changed(self, route: str, times: int) -> None:
        if times:
            self._db.execute(
                "INSERT INTO marks VALUES (?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value",
                (f"changes:{route}", times),
            )

    def sums(self, route: str) -> dict[Cell, Sums]:
        with self._lock, translated(self.path):
            rows = self._db.execute("SELECT segment, arm, bucket, metric, n, s, ss FROM sums WHERE route = ?", (route,))
            return {Cell(*where): Sums(n, s, ss) for *where, n, s, ss in rows}

    def changes(self, route: str) -> int:
        return self.marked(f"changes:{route}")

    def clear(self, route: str, token: int) -> None:
        with self._writing(token):
            self._db.execute("DELETE FROM contributions WHERE route = ?", (route,))
            self._db.execute("DELETE FROM sums WHERE route = ?", (route,))
            self._changed(route, 1)

    def publish(self, snapshot: Snapshot, token: int) -> None:
        with self._writing(token):
            self._db.execute(
                "INSERT OR REPLACE INTO snapshots VALUES (?, ?)",
                (snapshot.route, msgspec.json.encode(snapshot)),
            )

    def mark(self, name: str, value: int, token: int) -> None:
        with self._writing(token):
            self._db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, value))

    def marked(self, name: str) -> int:
        row = self._one("SELECT value FROM marks WHERE name = ?", name)
        return int(row[0]) if row else 0

    def keep(self, name: str, body: bytes, token: int) -> None:
        with self._writing(token):
            self._db.execute("INSERT OR REPLACE INTO kept VALUES (?, ?)", (name, body))

    def kept(self, name: str) -> bytes | None:
        row = self._one("SELECT body FROM kept WHERE name = ?", name)
        return bytes(row[0]) if row else None

    def snapshot(self, route: str) -> Snapshot | None:
        row = self._one("SELECT body FROM snapshots WHERE route = ?", route)
        return _snapshot.decode(row[0]) if row else None

    def put_key(self, key: ApiKey) -> None:
        with self._writing():
            self._db.execute("INSERT OR REPLACE INTO keys VALUES (?, ?)", (key.id, msgspec.json.encode(key)))

    def list_keys(self) -> list[ApiKey]:
        with self._lock, translated(self.path):
            return [_key.decode(body) for (body,) in self._db.execute("SELECT body FROM keys ORDER BY id")]

    def secret(self, name: str, fresh: bytes) -> bytes:
        with self._writing():
            self._db.execute("INSERT OR IGNORE INTO secrets VALUES (?, ?)", (name, fresh))
            row = self._db.execute("SELECT value FROM secrets WHERE name = ?", (name,)).fetchone()
            return bytes(row[0])

    def secrets(self) -> dict[str, bytes]:
        with self._lock, translated(self.path):
            return dict(self._db.execute("SELECT name, value FROM secrets").fetchall())

    def drop_secret(self, name: str) -> None:
        with self._writing():
            self._db.execute("DELETE FROM secrets WHERE name = ?", (name,))

    def read(self, name: str) -> bytes | None:
        row = self._one("SELECT body FROM documents WHERE name = ?", name)
        return bytes(row[0]) if row else None

    def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
        with self._lock, translated(self.path):
            self._db.execute("PRAGMA synchronous = FULL")  # no journal has it too
            try:
                with transaction(self._db):
                    row = self._db.execute("SELECT body FROM documents WHERE name = ?", (name,)).fetchone()
                    if (bytes(row[0]) if row else None) != old:
                        return False
                    if new is None:
                        self._db.execute("DELETE FROM documents WHERE name = ?", (name,))
                    else:
                        self._db.execute("INSERT OR REPLACE INTO documents VALUES (?, ?)", (name, new))
                    return True
            finally:
                self._db.execute("PRAGMA synchronous = NORMAL")

    def names(self, prefix: str) -> list[str]:
        with self._lock, translated(self.path):
            statement = "SELECT name FROM documents WHERE substr(name, 1, length(?1)) = ?1 ORDER BY name"
            return [name for (name,) in self._db.execute(statement, (prefix,))]

    def _one(self, statement: str, *values: object) -> tuple[Any, ...] | None:
        with self._lock, translated(self.path):
            row: tuple[Any, ...] | None = self._db.execute(statement, values).fetchone()
            return row

    @contextmanager
    def _writing(self, token: int | None = None) -> Iterator[None]:
        """A transaction; with a token, only while no newer lease was given."""
        with self._lock, translated(self.path), transaction(self._db):
            if token is not None:
                row = self._db.execute("SELECT token FROM lease").fetchone()
                if row and row[0] > token:
                    raise Fenced(f"lease {token} was taken over by {row[0]}")
            yield
