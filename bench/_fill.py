"""A past for a gateway that is to be measured: a journal of many facts, each a session of its own.

Rows are written to the tables as the journal makes them, in bulk: no other writer is there, and indexes are built once
at the end. The controller's marks say that it has taken all of it in, as if it had been there.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from router.controller import matured
from router.policy import Reward
from router.store_sqlite import SqliteStore
from telemetry import by_session
from telemetry.events import Answerer, Interaction, encode
from telemetry.journal import Journal
from telemetry.schema import COLUMNS

TENANT = "default"
DAY = 86400.0


def fill_journal(path: Path, rows: int) -> None:
    """Interactions of the last day: request ids in the order of time, each in a session of its own, little text."""
    db = _opened(path)
    marks = ", ".join("?" * len(COLUMNS.split(",")))
    _in_bulk(db, "facts", f"INSERT INTO facts ({COLUMNS}) VALUES ({marks})", _facts(rows))
    by_session.fill(db)
    for name in ("journal", matured(Reward().window)):
        db.execute("INSERT OR REPLACE INTO marks VALUES (?, ?)", (name, rows))
    db.close()


def _opened(path: Path) -> sqlite3.Connection:
    """The file with all its tables, for nobody but us."""
    Journal(path).close()
    SqliteStore(path).close()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = OFF")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA cache_size = -262144")
    return db


def _in_bulk(db: sqlite3.Connection, table: str, insert: str, rows: Iterable[tuple[object, ...]]) -> None:
    asked = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL"
    indexes = db.execute(asked, (table,)).fetchall()
    for name, _ in indexes:
        db.execute(f"DROP INDEX {name}")
    db.execute("BEGIN")
    db.executemany(insert, rows)
    db.execute("COMMIT")
    for _, sql in indexes:
        db.execute(sql)


def _facts(rows: int) -> Iterator[tuple[object, ...]]:
    now, answerer = time.time(), Answerer("arm0", "good", policy="thompson", propensity=0.5)
    for n in range(rows):
        at = now - DAY * (1.0 - n / rows)
        drawn = os.urandom(36).hex()
        name, event = (f"{int(at * 1000):012x}{drawn[k : k + 20]}" for k in (0, 20))
        fact = Interaction(
            event, at, name, "assistant", TENANT, drawn[40:64], answerer, status=200,
            messages=[{"role": "user", "content": "What does the fox count?"}], answer="Microseconds.",
        )  # fmt: skip
        yield event, "interaction", at, TENANT, "assistant", fact.session, name, None, None, encode(fact)
