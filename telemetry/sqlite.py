"""One way to open a SQLite file: WAL, migrations by number, and foreign errors translated.

`PRAGMA user_version` cannot serve two owners of one file (the journal and the store share it), so each owner
keeps its own number in the table `schema_version`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from telemetry.errors import StateError, StateLocked, StateReadOnly, StateUnavailable, StateVersion

BUSY_SECONDS = 5.0
AT_ONCE = 64
"""Rows of one INSERT."""

Migration = str | Callable[[sqlite3.Connection], None]
"""Statements, or what runs them where SQL alone cannot say it."""


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, naming the file and what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "locked" in text or "busy" in text:
            raise StateLocked(
                f"{path}: locked by another program for {BUSY_SECONDS:g} s; close what holds it (`fuser {path}`)"
            ) from error
        if "readonly" in text or "read-only" in text:
            raise StateReadOnly(f"{path}: cannot be written; check its owner and mode") from error
        if "unable to open" in text:
            raise StateReadOnly(f"{path}: cannot be opened; its folder must exist and be writable") from error
        if "full" in text:
            raise StateUnavailable(f"{path}: the disk is full; free space and nothing queued is lost") from error
        raise StateUnavailable(f"{path}: {text}") from error
    except sqlite3.DatabaseError as error:
        raise StateError(f"{path}: not a state file of understudy ({error}); move it away or name another") from error


def connect(path: Path, owner: str, migrations: Sequence[Migration], *, durable: bool = False) -> sqlite3.Connection:
    """Open `path`, bring `owner`'s tables up to the last of `migrations`, and return an autocommit connection.

    `durable` syncs each commit to disk (journal); otherwise the operating system decides (caches).
    The connection may be used from any one thread at a time.
    """
    with translated(path):
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            _to_wal(db)
            db.execute("PRAGMA wal_autocheckpoint = 4000")  # pages: hot ones are rewritten often, copy them seldom
            db.execute("PRAGMA cache_size = -8192")  # KiB: the ends of all indexes stay in memory
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            _migrate(db, path, owner, migrations)
        except BaseException:
            db.close()
            raise
        return db


def _to_wal(db: sqlite3.Connection) -> None:
    """Switch a file to WAL; once it is, this does nothing.

    Of several that open a new file at once, SQLite refuses some without waiting, for they could wait for each other.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(db: sqlite3.Connection, path: Path, owner: str, migrations: Sequence[Migration]) -> None:
    with transaction(db):
        db.execute("CREATE TABLE IF NOT EXISTS schema_version (owner TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        row = db.execute("SELECT version FROM schema_version WHERE owner = ?", (owner,)).fetchone()
        version = row[0] if row else 0
        if version > len(migrations):
            raise StateVersion(
                f"{path}: its {owner} has version {version}, this understudy knows up to {len(migrations)}; "
                "upgrade understudy, or name another state file"
            )
        for migration in migrations[version:]:
            if callable(migration):
                migration(db)
                continue
            for statement in filter(str.strip, migration.split(";")):
                db.execute(statement)
        db.execute("INSERT OR REPLACE INTO schema_version VALUES (?, ?)", (owner, len(migrations)))


def insert(db: sqlite3.Connection, into: str, columns: int, rows: Sequence[tuple[object, ...]]) -> int:
    """Run `into` ("INSERT INTO … VALUES") for all rows; the last one's rowid, 0 where there is none.

    Many rows a statement, for each lets go of Python's lock and must win it back from the event loop; of few sizes,
    so that SQLite compiles each once.
    """
    mark, last, start = f"({', '.join('?' * columns)})", 0, 0
    while start < len(rows):
        size = AT_ONCE
        while size > len(rows) - start:
            size //= 2
        values = list(chain.from_iterable(rows[start : start + size]))
        last = db.execute(f"{into} {', '.join([mark] * size)}", values).lastrowid or 0
        start += size
    return last


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """`BEGIN IMMEDIATE` … `COMMIT`, rolled back on any error; a reader never turns writer half-way."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.commit()
    except BaseException:
        db.rollback()  # a commit that failed may have left the transaction open
        raise
