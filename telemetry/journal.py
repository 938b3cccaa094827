"""The journal: the durable, append-only log of facts, one SQLite file that several processes share.

`Journal` reads and appends, synchronously; `telemetry.writer` stands between it and an event loop.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec.structs import replace

from telemetry import by_session
from telemetry.events import (
    ELSEWHERE,
    REPLACED,
    Decision,
    Fact,
    Interaction,
    Signal,
    Unread,
    answer_name,
    decode,
    encode,
    names_of,
    skim,
)
from telemetry.schema import COLUMNS, MIGRATIONS, Row, row
from telemetry.sqlite import BUSY_SECONDS, connect, insert, transaction, translated

log = logging.getLogger("understudy.journal")

OF_SESSION = (
    f"WHERE seq IN (SELECT seq FROM {by_session.FACTS} WHERE key = ?)"
    " AND tenant = ? AND session = ? AND type = 'interaction'"
)
AT_MOST = 500
"""Parameters of one question; SQLite takes some thousand."""


class Journal:
    """Appends and reads facts. Not thread-safe: one instance a thread. Raises `StateError`s."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = connect(path, "journal", MIGRATIONS, durable=True)
        by_session.prepare(self._db)
        self._by_session = by_session.Writing()

    def close(self) -> None:
        self._db.close()

    def append(self, facts: Sequence[Fact]) -> None:
        """Write all of `facts`, or none; on return they are on disk."""
        self.write([row(fact) for fact in facts])

    def write(self, rows: list[Row]) -> None:
        """`append`, of facts that are rows already."""
        with translated(self.path), transaction(self._db):
            last = insert(self._db, f"INSERT INTO facts ({COLUMNS}) VALUES", len(rows[0]) if rows else 0, rows)
            first = last - len(rows) + 1  # nobody else writes meanwhile
            self._by_session.add(
                self._db,
                [
                    (by_session.key_of(tenant, session, kind), seq)
                    for seq, (_, kind, _, tenant, _, session, *_) in enumerate(rows, first)
                    if session is not None
                ],
            )

    def read(self, after: int = 0, limit: int = 1000, *, unread: bool = False) -> list[tuple[int, Fact]]:
        """Up to `limit` facts in the order of arrival, each with its sequence number (> `after`).

        `unread`: requests are `Unread`, for who seldom looks at what was said.
        """
        return self._select("WHERE seq > ? ORDER BY seq LIMIT ?", (after, limit), skim if unread else decode)

    def news(self, after: int, limit: int) -> tuple[list[tuple[int, Fact]], set[int]]:
        """As `read` with `unread`; and the sequence numbers of those requests that are not alone.

        Of one that is alone nothing else on record tells: no request of its session, no signal about it.
        """
        question = (
            "SELECT seq, body,"
            f" EXISTS (SELECT 1 FROM {by_session.FACTS} AS other"
            " WHERE other.key = session_key(one.tenant, one.session, 'interaction') AND other.seq <> one.seq)"
            f" OR EXISTS (SELECT 1 FROM {by_session.FACTS} WHERE key = session_key(one.tenant, one.session, 'signal'))"
            " OR EXISTS (SELECT 1 FROM facts WHERE trace_id = one.trace_id AND type = 'signal')"
            " OR EXISTS (SELECT 1 FROM facts WHERE response_id = one.request_id AND type = 'signal')"
            " FROM facts AS one WHERE seq > ? ORDER BY seq LIMIT ?"
        )
        with translated(self.path):
            rows = self._db.execute(question, (after, limit)).fetchall()
        facts = self._legible(((seq, body) for seq, body, _ in rows), skim)
        requests = [(seq, fact) for seq, fact in facts if isinstance(fact, Interaction)]
        # The names that upstreams give are sought apart, each once: some give all of their answers the same one.
        given = ((i.tenant, name) for _, i in requests for name in names_of(i)[1:])
        told = {(signal.tenant, signal.response_id) for _, signal in self._about("response_id", given)}
        company = {seq for seq, _, others in rows if others}
        if told:
            company |= {seq for seq, i in requests if any((i.tenant, name) in told for name in names_of(i))}
        return facts, company

    def signals(self, after: int, until: int) -> Iterator[tuple[int, Signal]]:
        """The signals with after < sequence number ≤ until, in the order of arrival, sought as they are asked for."""
        where = "WHERE seq > ? AND seq <= ? AND +type = 'signal' ORDER BY seq"  # "+": by seq, not by the index
        with translated(self.path):
            for row in self._db.execute(f"SELECT seq, body FROM facts {where}", (after, until)):
                for seq, fact in self._legible([row]):
                    if isinstance(fact, Signal):
                        yield seq, fact

    def last(self) -> int:
        """Sequence number of the newest fact, 0 when there is none."""
        with translated(self.path):
            row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'facts'").fetchone()
        return row[0] if row else 0

    def event(self, tenant: str, event_id: str, limit: int = 16) -> list[Signal]:
        """The last signals that came under an event id, oldest first; the last one counts."""
        where = "WHERE event_id = ? AND type = 'signal' AND tenant = ? ORDER BY seq DESC LIMIT ?"
        rows = self._select(where, (event_id, tenant, limit))
        return [fact for _, fact in reversed(rows) if isinstance(fact, Signal)]

    def repeated(self, signals: Iterable[Signal]) -> dict[tuple[str, str], list[Signal]]:
        """By (tenant, event id), of ids that several signals came under: what all these are about, once each.

        Of each only what it is about can be relied on.
        """
        found: dict[tuple[str, str], list[Signal]] = {}
        with translated(self.path):
            for tenant, ids in _by_tenant((signal.tenant, signal.event_id) for signal in signals):
                marks = ", ".join("?" * len(ids))
                where = (
                    "SELECT event_id, response_id, trace_id, session, COUNT(*) FROM facts"
                    f" WHERE event_id IN ({marks}) AND type = 'signal' AND +tenant = ? GROUP BY 1, 2, 3, 4"
                )
                rows = self._db.execute(where, (*ids, tenant)).fetchall()
                times = Counter[str]()
                for event, *_, count in rows:
                    times[event] += count
                for event, response, trace, session, _ in rows:
                    if times[event] > 1:
                        about = Signal(event, 0.0, "", tenant, 0.0, response, trace, session)
                        found.setdefault((tenant, event), []).append(about)
        return found

    def interactions_of(self, tenant: str, session: str) -> list[tuple[int, Interaction]]:
        """A session's requests on all routes, oldest first."""
        rows = self._select(f"{OF_SESSION} ORDER BY at, seq", _session(tenant, session))
        return [(seq, fact) for seq, fact in rows if isinstance(fact, Interaction)]

    def latest(self, tenant: str, session: str, route: str) -> Iterator[Unread]:
        """A session's requests on a route, newest first, each read when it is asked for."""
        question = f"SELECT seq, body FROM facts {OF_SESSION} AND route = ? ORDER BY seq DESC"
        with translated(self.path):
            for row in self._db.execute(question, (*_session(tenant, session), route)):
                for _, fact in self._legible([row], skim):
                    if isinstance(fact, Unread):
                        yield fact

    def draw(self, drawn: Sequence[tuple[object, ...]], since: float) -> None:
        """Keep what sessions drew whose facts are still to come: (route, tenant, session, when, choice).

        What was drawn before `since` is forgotten.
        """
        with translated(self.path), transaction(self._db):
            insert(self._db, "INSERT OR REPLACE INTO drawn VALUES", 5, drawn)
            self._db.execute("DELETE FROM drawn WHERE at < ?", (since,))

    def drawn(self, route: str, tenant: str, session: str, since: float) -> bytes | None:
        where = "WHERE route = ? AND tenant = ? AND session = ? AND at >= ?"
        with translated(self.path):
            row = self._db.execute(f"SELECT choice FROM drawn {where}", (route, tenant, session, since)).fetchone()
        return row[0] if row else None

    def answers(self, signal: Signal) -> list[tuple[int, Interaction]]:
        """The interactions that `signal` is about, of its own tenant only; empty if none is journaled yet."""
        if signal.response_id:
            name = answer_name(signal.response_id)
            clauses = ("request_id = ?", "response_id = ?")
            values = (name, name)
        elif signal.trace_id:
            clauses, values = ("trace_id = ?",), (signal.trace_id,)  # type: ignore[assignment]
        else:
            return self.interactions_of(signal.tenant, signal.session or "")
        found: dict[int, Interaction] = {}
        for clause, value in zip(clauses, values, strict=True):
            where = f"WHERE {clause} AND tenant = ? AND type = 'interaction'"
            rows = self._select(where, (value, signal.tenant))
            found |= {seq: fact for seq, fact in rows if isinstance(fact, Interaction)}
        return sorted(found.items())

    def request(self, tenant: str, request_id: str) -> Interaction | None:
        """The interaction of a request, by the id that we gave it."""
        for _, fact in self._select("WHERE request_id = ? AND tenant = ?", (request_id, tenant)):
            if isinstance(fact, Interaction):
                return fact
        return None

    def sessions(
        self, keys: Iterable[tuple[str, str]], known: Mapping[int, Fact], *, unread: bool = False
    ) -> dict[tuple[str, str], list[tuple[int, Interaction]]]:
        """Of each (tenant, session): its requests on all routes, oldest first. `known` need not be read again.

        `unread`: as `read` has it.
        """
        facts = dict(known)
        wanted = set(keys)
        places = self._places(wanted, "interaction")
        missing = [seq for seq in places if seq not in facts]
        facts |= dict(self._at(missing, skim if unread else decode))
        found: dict[tuple[str, str], list[tuple[int, Interaction]]] = {}
        for seq in places:
            fact = facts.get(seq)
            if isinstance(fact, Interaction) and (key := (fact.tenant, fact.session)) in wanted:
                found.setdefault(key, []).append((seq, fact))
        for requests in found.values():
            requests.sort(key=lambda row: (row[1].at, row[0]))
        return found

    def signals_about(self, interactions: Iterable[Interaction]) -> list[tuple[int, Signal]]:
        """Every signal about one of `interactions`, by answer, by trace or by session, in order of arrival."""
        about: dict[str, dict[tuple[str, str], None]] = {"response_id": {}, "trace_id": {}}
        sessions = set[tuple[str, str]]()
        for i in interactions:
            about["response_id"] |= {(i.tenant, name): None for name in names_of(i)}
            about["trace_id"] |= {(i.tenant, i.trace_id): None} if i.trace_id else {}
            sessions.add((i.tenant, i.session))
        found: dict[int, Signal] = {}
        for column, keys in about.items():
            found |= dict(self._about(column, keys))
        for seq, fact in self._at(self._places(sessions, "signal")):
            if isinstance(fact, Signal) and (fact.tenant, fact.session) in sessions:
                found[seq] = fact
        return sorted(found.items())

    def heard_about(self, interactions: Iterable[Interaction], end: int = 2**62) -> list[tuple[int, Signal]]:
        """`signals_about` as they count, up to sequence number `end`: of each event id the last one, about whatever.

        The others are of the kind `REPLACED`, with the number of that last one. A signal that only names a trace is
        about one answer of it (`meant`), and says so here.
        """
        signals = [(seq, signal) for seq, signal in self.signals_about(interactions) if seq <= end]
        last = self._last_of_each(((signal.tenant, signal.event_id) for _, signal in signals), end)
        traces: dict[tuple[str, str], list[tuple[int, Interaction]]] = {}
        found = []
        for seq, signal in signals:
            newest = last[signal.tenant, signal.event_id]
            if seq < newest:
                signal, seq = replace(signal, kind=REPLACED), newest
            if signal.response_id is None and signal.trace_id is not None:
                key = signal.tenant, signal.trace_id
                if key not in traces:
                    traces[key] = [(at, fact) for at, fact in self.answers(signal) if at <= end]
                if not traces[key]:
                    continue
                # That it is about this answer, and not about those, was known when the newest of them came.
                newest = max(seq, *(at for at, _ in traces[key]))
                found += [(newest, _not_about(signal, answer)) for _, answer in traces[key]]
                signal = replace(signal, response_id=meant([fact for _, fact in traces[key]], signal.at).request_id)
            found.append((seq, signal))
        return sorted(found, key=lambda row: (row[0], row[1].kind != REPLACED))

    def _last_of_each(self, keys: Iterable[tuple[str, str]], end: int) -> dict[tuple[str, str], int]:
        """The newest sequence number, up to `end`, of each (tenant, event id) of signals."""
        found: dict[tuple[str, str], int] = {}
        with translated(self.path):
            for tenant, ids in _by_tenant(keys):
                marks = ", ".join("?" * len(ids))
                where = (
                    f"SELECT event_id, MAX(seq) FROM facts WHERE event_id IN ({marks}) AND type = 'signal'"
                    " AND +tenant = ? AND seq <= ? GROUP BY event_id"
                )
                found |= {(tenant, event): seq for event, seq in self._db.execute(where, (*ids, tenant, end))}
        return found

    def sessions_of(self, signals: Iterable[Signal]) -> set[tuple[str, str]]:
        """The (tenant, session) of every request that one of `signals` is about."""
        signals = list(signals)
        named = {
            "request_id": [(s.tenant, answer_name(s.response_id)) for s in signals if s.response_id],
            "response_id": [(s.tenant, answer_name(s.response_id)) for s in signals if s.response_id],
            "trace_id": [(s.tenant, s.trace_id) for s in signals if s.trace_id and not s.response_id],
        }
        found = {(s.tenant, s.session) for s in signals if s.session and not (s.response_id or s.trace_id)}
        with translated(self.path):
            for column, keys in named.items():
                for tenant, names in _by_tenant(keys):
                    marks = ", ".join("?" * len(names))
                    where = f"SELECT session FROM facts WHERE {column} IN ({marks}) AND +tenant = ?"
                    found |= {(tenant, session) for (session,) in self._db.execute(where, (*names, tenant)) if session}
        return found

    def newest(self) -> float:
        """When the last thing on record happened, Unix seconds; 0 where nothing did. Looks through all facts."""
        with translated(self.path):
            return float(self._db.execute("SELECT MAX(at) FROM facts").fetchone()[0] or 0.0)

    def events(self, tenant: str, event_ids: Sequence[str]) -> list[Fact]:
        """The facts of these ids, in the order of arrival. Looks for interactions through the whole journal."""
        found: dict[int, Fact] = {}
        for start in range(0, len(event_ids), AT_MOST):
            part = tuple(event_ids[start : start + AT_MOST])
            where = f"WHERE event_id IN ({', '.join('?' * len(part))}) AND +tenant = ?"
            found |= dict(self._select(where, (*part, tenant)))
        return [found[seq] for seq in sorted(found)]

    def decisions(self, route: str | None = None, limit: int = 1000) -> list[Decision]:
        """The last steps of rollouts, each once, oldest first."""
        rows = self._select(
            "WHERE type = 'decision' AND (?1 IS NULL OR route = ?1) ORDER BY seq DESC LIMIT ?2", (route, limit)
        )
        found = {fact.event_id: fact for _, fact in reversed(rows) if isinstance(fact, Decision)}
        return list(found.values())

    def in_traces(self, interactions: Iterable[Interaction]) -> list[Signal]:
        """Signals that name only the trace of one of `interactions`."""
        keys = dict.fromkeys((i.tenant, i.trace_id) for i in interactions if i.trace_id)
        return [signal for _, signal in self._about("trace_id", keys) if signal.response_id is None]

    def _about(self, column: str, keys: Iterable[tuple[str, str]]) -> Iterator[tuple[int, Signal]]:
        """The signals whose (tenant, `column`) is one of `keys`."""
        for tenant, names in _by_tenant(keys):
            marks = ", ".join("?" * len(names))
            where = f"WHERE tenant = ? AND {column} IN ({marks}) AND type = 'signal'"
            for seq, fact in self._select(where, (tenant, *names)):
                if isinstance(fact, Signal):
                    yield seq, fact

    def recent(self, since: float, limit: int = 100_000) -> list[tuple[int, Fact]]:
        """The newest facts that came after `since`, at most about `limit`, oldest first."""
        found: list[tuple[int, Fact]] = []
        for rows in self.backwards():
            fresh = [(seq, fact) for seq, fact in rows if came(fact) >= since]
            found += fresh
            if len(fresh) < len(rows) / 2 or len(found) >= limit:  # facts come nearly in the order of their times
                break
        return found[::-1]

    def backwards(self) -> Iterator[list[tuple[int, Fact]]]:
        """All facts, the newest first, a thousand at a time."""
        before = self.last() + 1
        while rows := self._select("WHERE seq < ? ORDER BY seq DESC LIMIT 1000", (before,)):
            yield rows
            before = rows[-1][0]

    def rewrite(self, places: Sequence[int], change: Callable[[Fact], Fact]) -> None:
        """Put what `change` makes of them in the place of facts, by sequence number, and overwrite what stood there.

        For text that must go, and for nothing else. The old text may stay in the write-ahead log until `scrub`.
        """
        with translated(self.path):
            self._db.execute("PRAGMA secure_delete = ON")
            for start in range(0, len(places), AT_MOST):
                part = tuple(places[start : start + AT_MOST])
                with transaction(self._db):  # read in it too: somebody else may be at the same facts
                    facts = self._select(f"WHERE seq IN ({', '.join('?' * len(part))})", part)
                    changed = [(encode(new), seq) for seq, fact in facts if (new := change(fact)) != fact]
                    self._db.executemany("UPDATE facts SET body = ? WHERE seq = ?", changed)

    def scrub(self) -> bool:
        """Empty the write-ahead log, where overwritten text may still stand; False if a reader is in the way now."""
        with translated(self.path):
            self._db.execute("PRAGMA busy_timeout = 0")  # while it waits for a reader, nobody could write
            try:
                busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.OperationalError:
                busy = 1
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
        return not busy

    def naming(self, name: str, after: int, limit: int = 1000) -> list[tuple[int, Fact]]:
        """Up to `limit` facts in which `name` occurs anywhere, sequence number > `after`. Looks through them all."""
        return self._select("WHERE seq > ? AND instr(body, ?) ORDER BY seq LIMIT ?", (after, name.encode(), limit))

    def note_read(self, at: float, who: str, what: str) -> None:
        """Put on record who read what people wrote."""
        with translated(self.path):
            self._db.execute("INSERT INTO text_reads VALUES (?, ?, ?)", (at, who, what))

    def reads(self) -> list[tuple[float, str, str]]:
        """Who read what people wrote, and when: (at, who, what), oldest first."""
        with translated(self.path):
            return self._db.execute("SELECT at, who, what FROM text_reads ORDER BY at").fetchall()

    def know(self, name: str, value: bytes) -> None:
        """Keep beside the facts what this machine last learned from a store that may be away tomorrow."""
        with translated(self.path):
            self._db.execute("INSERT OR REPLACE INTO known VALUES (?, ?)", (name, value))

    def known(self, name: str) -> bytes | None:
        with translated(self.path):
            row = self._db.execute("SELECT value FROM known WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    def counts(self) -> dict[str, int]:
        """How many facts of each type are kept."""
        with translated(self.path):
            return dict(self._db.execute("SELECT type, COUNT(*) FROM facts GROUP BY type").fetchall())

    def _places(self, keys: Iterable[tuple[str, str]], kind: str) -> list[int]:
        """The sequence numbers of a kind's facts of each (tenant, session), and seldom of others."""
        wanted = [by_session.key_of(tenant, session, kind) for tenant, session in keys]
        found: list[int] = []
        with translated(self.path):
            for start in range(0, len(wanted), AT_MOST):
                part = wanted[start : start + AT_MOST]
                where = f"SELECT seq FROM {by_session.FACTS} WHERE key IN ({', '.join('?' * len(part))})"
                found += [seq for (seq,) in self._db.execute(where, part)]
        return found

    def _at(self, places: Sequence[int], decoded: Callable[[bytes], Fact] = decode) -> list[tuple[int, Fact]]:
        found: list[tuple[int, Fact]] = []
        for start in range(0, len(places), AT_MOST):
            part = tuple(places[start : start + AT_MOST])
            found += self._select(f"WHERE seq IN ({', '.join('?' * len(part))})", part, decoded)
        return found

    def _select(
        self, where: str, values: tuple[object, ...], decoded: Callable[[bytes], Fact] = decode
    ) -> list[tuple[int, Fact]]:
        with translated(self.path):
            rows = self._db.execute(f"SELECT seq, body FROM facts {where}", values).fetchall()
        return self._legible(rows, decoded)

    def _legible(
        self, rows: Iterable[tuple[int, bytes]], decoded: Callable[[bytes], Fact] = decode
    ) -> list[tuple[int, Fact]]:
        """Facts without those that no reader can read: they stay where they are and stop nobody."""
        found = []
        for seq, body in rows:
            try:
                found.append((seq, decoded(body)))
            except (msgspec.MsgspecError, RecursionError) as error:
                log.error("%s: fact %d cannot be read and is passed over: %s", self.path, seq, error)
        return found


def came(fact: Fact) -> float:
    """When we heard of it: what happened long ago may be told today."""
    return fact.received_at or fact.at if isinstance(fact, Signal) else fact.at


def _not_about(signal: Signal, answer: Interaction) -> Signal:
    event_id = f"{signal.event_id}\x1f{answer.request_id}"
    return replace(signal, kind=ELSEWHERE, event_id=event_id, response_id=answer.request_id)


def _session(tenant: str, session: str) -> tuple[object, ...]:
    """The values of `OF_SESSION`."""
    return by_session.key_of(tenant, session, "interaction"), tenant, session


def _by_tenant(keys: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """(tenant, name) pairs by tenant, at most `AT_MOST` names at once."""
    by_tenant: dict[str, list[str]] = {}
    for tenant, name in dict.fromkeys(keys):
        by_tenant.setdefault(tenant, []).append(name)
    for tenant, names in by_tenant.items():
        for start in range(0, len(names), AT_MOST):
            yield tenant, names[start : start + AT_MOST]


def meant(answers: Sequence[Interaction], at: float) -> Interaction:
    """Of the answers in a trace (one at least, in any order) the one that was meant at a time: the last one then."""
    then = [answer for answer in answers if answer.at <= at]
    return max(then, key=lambda answer: answer.at) if then else min(answers, key=lambda answer: answer.at)
