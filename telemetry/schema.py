"""The journal's tables: one row a fact, and the indexes by which facts are sought."""

from __future__ import annotations

from typing import Any

from telemetry import by_session
from telemetry.events import Fact, Interaction, Shadow, Signal, answer_name, encode
from telemetry.sqlite import Migration

MIGRATIONS: list[Migration] = [
    """
    CREATE TABLE facts (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        event_id TEXT NOT NULL,
        type TEXT NOT NULL,
        at REAL NOT NULL,
        tenant TEXT NOT NULL,
        route TEXT,
        session TEXT,
        request_id TEXT,
        response_id TEXT,
        trace_id TEXT,
        body BLOB NOT NULL
    );
    CREATE INDEX facts_session ON facts (tenant, session) WHERE session IS NOT NULL;
    CREATE INDEX facts_request ON facts (request_id) WHERE request_id IS NOT NULL;
    CREATE INDEX facts_response ON facts (response_id) WHERE response_id IS NOT NULL;
    CREATE INDEX facts_trace ON facts (trace_id) WHERE trace_id IS NOT NULL;
    CREATE INDEX facts_event ON facts (event_id);
    CREATE INDEX facts_at ON facts (at)
    """,
    "CREATE TABLE known (name TEXT PRIMARY KEY, value BLOB NOT NULL)",
    # Each index costs each request; these two are needed for signals only, or not at all (times follow seq).
    """
    DROP INDEX facts_event;
    DROP INDEX facts_at;
    CREATE INDEX facts_event ON facts (event_id) WHERE type = 'signal'
    """,
    # With the type in the index, signals are sought without a look at the requests of the same name.
    """
    DROP INDEX facts_session;
    DROP INDEX facts_trace;
    CREATE INDEX facts_session ON facts (tenant, session, type) WHERE session IS NOT NULL;
    CREATE INDEX facts_trace ON facts (trace_id, type) WHERE trace_id IS NOT NULL
    """,
    "CREATE TABLE text_reads (at REAL NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL)",
    "CREATE INDEX facts_decision ON facts (seq) WHERE type = 'decision'",
    # What sessions drew whose first answers were long under way: small, and of one day.
    """
    CREATE TABLE drawn (
        route TEXT, tenant TEXT, session TEXT, at REAL NOT NULL, choice BLOB NOT NULL,
        PRIMARY KEY (route, tenant, session)
    ) WITHOUT ROWID;
    CREATE INDEX drawn_at ON drawn (at)
    """,
    by_session.create,
]

COLUMNS = "event_id, type, at, tenant, route, session, request_id, response_id, trace_id, body"
Row = tuple[Any, ...]
"""A fact, in the order of `COLUMNS`."""


def row(fact: Fact) -> Row:
    """A fact as the table `facts` keeps it."""
    body = encode(fact)
    if isinstance(fact, Interaction):
        return (
            fact.event_id, "interaction", fact.at, fact.tenant, fact.route, fact.session,
            fact.request_id, _foreign(fact), fact.trace_id, body,
        )  # fmt: skip
    if isinstance(fact, Signal):
        return (
            fact.event_id, "signal", fact.at, fact.tenant, None, fact.session,
            None, fact.response_id, fact.trace_id, body,
        )  # fmt: skip
    kind = "shadow" if isinstance(fact, Shadow) else "decision"
    return fact.event_id, kind, fact.at, fact.tenant, fact.route, None, None, None, None, body


def _foreign(fact: Interaction) -> str | None:
    """The answer's id if it cannot be found by our request id."""
    name = answer_name(fact.response_id) if fact.response_id is not None else None
    return name if name != fact.request_id else None
