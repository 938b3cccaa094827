"""Which facts are of a session: an index that costs a row the same in a journal of ten million rows as in a new one.

Sessions' names are random, so each row of a plain index would change a page of its own, and the more rows there are,
the less likely it is that the page is in memory. Here a row goes to a small table first, whose pages many rows share;
with each write a slice of the small table moves to a middle one, and a slice of that to the large one. Slices are
ranges of keys, so what moves together stays together (the idea of log-structured merge-trees: O'Neil et al., 1996).

A key stands for (tenant, session) and tells signals from requests. Two sessions may have the same: whoever looks facts
up compares the names too.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from hashlib import blake2b

from telemetry.sqlite import insert

TABLES = ("session_facts_new", "session_facts_young", "session_facts_old")
FACTS = "session_facts"
"""The view of all of them: (key, seq)."""
ROWS = (8_192, 262_144)
"""Rows written while the whole of the new table moves to the young one, and the young one to the old one."""
KEYS = 2**62

Entry = tuple[int, int]


def key_of(tenant: str, session: str, kind: str) -> int:
    """At least 0, below `KEYS`. That of a session's signals is one more than that of its requests, which is even."""
    name = blake2b(f"{len(tenant)}:{tenant}{session}".encode(), digest_size=8).digest()
    return int.from_bytes(name) % KEYS & -2 | (kind == "signal")


def prepare(db: sqlite3.Connection) -> None:
    """Make `key_of` known to a connection as the SQL function `session_key`."""

    def session_key(tenant: str, session: str | None, kind: str) -> int | None:
        return None if session is None else key_of(tenant, session, kind)

    db.create_function("session_key", 3, session_key, deterministic=True)


def create(db: sqlite3.Connection) -> None:
    """The migration: the tables in the place of a plain index; what is in the journal is old."""
    for table in TABLES:
        db.execute(f"CREATE TABLE {table} (key INTEGER, seq INTEGER, PRIMARY KEY (key, seq)) WITHOUT ROWID")
    every = " UNION ALL ".join(f"SELECT key, seq FROM {table}" for table in TABLES)
    db.execute(f"CREATE VIEW {FACTS} AS {every}")
    fill(db)
    db.execute("DROP INDEX facts_session")


def fill(db: sqlite3.Connection) -> None:
    """Put all facts on record into the tables, where they are empty."""
    prepare(db)
    db.execute(
        f"INSERT INTO {TABLES[-1]} SELECT session_key(tenant, session, type), seq FROM facts"
        " WHERE session IS NOT NULL ORDER BY 1, 2"
    )


class Writing:
    """The writing side, of one connection. Several may write: each moves slices from where it is."""

    def __init__(self, rows: tuple[int, int] = ROWS) -> None:
        self._rows = rows
        self._next = [random.randrange(KEYS) for _ in rows]

    def add(self, db: sqlite3.Connection, entries: Sequence[Entry]) -> None:
        """(key, sequence number) of facts; in the transaction that writes them."""
        insert(db, f"INSERT INTO {TABLES[0]} VALUES", 2, sorted(entries))
        for level in range(len(self._rows)):
            self._move(db, level, len(entries))

    def _move(self, db: sqlite3.Connection, level: int, rows: int) -> None:
        """A slice to the next table, as wide as `rows` is of all the rows that may come meanwhile."""
        start = self._next[level]
        end = min(KEYS, start + rows * KEYS // self._rows[level])
        slice_ = f"FROM {TABLES[level]} WHERE key >= ? AND key < ?"
        db.execute(f"INSERT INTO {TABLES[level + 1]} SELECT key, seq {slice_}", (start, end))
        db.execute(f"DELETE {slice_}", (start, end))
        self._next[level] = end % KEYS
