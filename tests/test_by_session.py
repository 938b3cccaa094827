"""Each session's facts are found wherever they are by now: in the new table, the young one or the old one."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from telemetry import by_session
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal
from telemetry.sqlite import transaction


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "understudy.db")) as opened:
        yield opened


def request(name: str, session: str, tenant: str = "acme", at: float = 1.0) -> Interaction:
    return Interaction(name, at, name, "assistant", tenant, session, Answerer("a", "m"), status=200)


def vote(name: str, session: str, tenant: str = "acme") -> Signal:
    return Signal(name, 2.0, "outcome", tenant, session=session, name="resolved", value=1.0)


def sizes(db: sqlite3.Connection) -> list[int]:
    return [db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in by_session.TABLES]


def test_nothing_is_lost_or_doubled_on_its_way_and_the_small_tables_stay_small() -> None:
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.execute("CREATE TABLE facts (seq INTEGER PRIMARY KEY, tenant, session, type)")
    db.execute("CREATE INDEX facts_session ON facts (session)")
    by_session.create(db)
    draw, seq, expected = random.Random(7), 0, dict[int, set[int]]()
    writers = [by_session.Writing((64, 512)) for _ in range(2)]
    most = [0, 0]
    while seq < 20_000:
        entries = []
        for _ in range(draw.choice([1, 3, 40, 200])):
            seq += 1
            session, kind = f"s{draw.randrange(5_000)}", draw.choice(["interaction", "signal"])
            entries.append((by_session.key_of("acme", session, kind), seq))
            expected.setdefault(entries[-1][0], set()).add(seq)
        with transaction(db):
            draw.choice(writers).add(db, entries)
        most = [max(pair) for pair in zip(most, sizes(db), strict=False)]
    found: dict[int, set[int]] = {}
    for key, at in db.execute(f"SELECT key, seq FROM {by_session.FACTS}"):
        assert at not in found.setdefault(key, set())
        found[key].add(at)
    assert found == expected
    assert most[0] <= 2 * (64 + 200)
    assert most[1] <= 2 * (512 + 200)
    assert sizes(db)[2] > 19_000


def test_keys_tell_tenants_sessions_and_signals_apart() -> None:
    names = [("a", "bc"), ("ab", "c"), ("", "abc"), ("1:a", "b"), ("1", ":ab")]
    keys = {by_session.key_of(*name, kind) for name in names for kind in ("interaction", "signal")}
    assert len(keys) == 10
    assert all(0 <= key < by_session.KEYS for key in keys)
    one, other = (by_session.key_of("a", "é\N{GRINNING FACE}", kind) for kind in ("interaction", "signal"))
    assert (one % 2, other) == (0, one + 1)


def test_a_session_with_the_key_of_another_gets_none_of_its_facts(journal: Journal) -> None:
    facts: list[Fact] = [request("r1", "mine"), request("r2", "theirs"), vote("v1", "mine"), vote("v2", "theirs")]
    journal.append(facts)
    with contextlib.closing(sqlite3.connect(journal.path, isolation_level=None)) as other:
        for kind, theirs in (("interaction", 2), ("signal", 4)):
            other.execute(
                "INSERT INTO session_facts_old VALUES (?, ?)", (by_session.key_of("acme", "mine", kind), theirs)
            )
    assert [i.request_id for _, i in journal.interactions_of("acme", "mine")] == ["r1"]
    assert [i.request_id for i in journal.latest("acme", "mine", "assistant")] == ["r1"]
    assert {key: [seq for seq, _ in found] for key, found in journal.sessions([("acme", "mine")], {}).items()} == {
        ("acme", "mine"): [1]
    }
    assert [s.event_id for _, s in journal.signals_about([request("r1", "mine")])] == ["v1"]


def test_who_is_alone_is_known_across_the_tables(journal: Journal) -> None:
    for start in range(0, 20_000, 500):
        journal.append([request(f"r{n}", f"s{n}") for n in range(start, start + 500)])
    new, young, old = sizes(journal._db)
    assert new + young + old == 20_000
    assert min(new, young, old) > 0
    journal.append([request("again", "s7"), vote("v", "s8")])
    facts, company = journal.news(0, 30_000)
    assert company & {seq for seq, fact in facts if isinstance(fact, Interaction)} == {8, 9, 20_001}


def test_a_fact_that_could_not_be_written_leaves_no_trace(journal: Journal) -> None:
    journal.append([request("r1", "s")])
    with contextlib.closing(sqlite3.connect(journal.path, isolation_level=None)) as other:
        other.execute(f"DROP TABLE {by_session.TABLES[2]}")
    with pytest.raises(Exception, match="session_facts_old"):
        journal.append([request("r2", "s")] * 3)
    assert journal.last() == 1
