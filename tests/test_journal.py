"""The journal: what was acknowledged is on disk, what cannot be written waits, and nobody reads another's facts."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import eventually, in_a_loop

from telemetry.errors import StateUnavailable
from telemetry.events import Answerer, Interaction, Signal, encode, new_id
from telemetry.journal import Journal
from telemetry.schema import MIGRATIONS
from telemetry.writer import JournalWriter

ARM = Answerer("champion", "base")


def interaction(session: str = "s", tenant: str = "t", at: float = 1.0, **fields: object) -> Interaction:
    request_id = new_id()
    known = {"event_id": new_id(), "request_id": request_id, "response_id": f"chatcmpl-{request_id}"} | fields
    return Interaction(at=at, route="r", tenant=tenant, session=session, answerer=ARM, **known)  # type: ignore[arg-type]


def about(**fields: object) -> Signal:
    return Signal(event_id=new_id(), at=2.0, kind="thumb", **({"tenant": "t"} | fields))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal(path)
    yield journal
    journal.close()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_facts_are_read_in_the_order_they_came(journal: Journal, count: int) -> None:
    facts = [interaction(at=float(-n)) for n in range(count)]
    journal.append(facts)
    journal.append([])
    assert [fact for _, fact in journal.read(0, 2000)] == facts
    assert [seq for seq, _ in journal.read(count - 1)] == [count]
    assert journal.last() == count


def test_an_answer_is_found_by_each_of_its_names(journal: Journal) -> None:
    own = interaction(trace_id="trace-1")
    foreign = interaction("z", response_id="gen-1748-abc")
    journal.append([own, foreign])

    def found(**fields: object) -> list[str]:
        return [i.event_id for _, i in journal.answers(about(**fields))]

    for name in (own.request_id, f"chatcmpl-{own.request_id}", f"resp_{own.request_id}"):
        assert found(response_id=name) == [own.event_id]
    assert found(response_id="gen-1748-abc") == [foreign.event_id]
    assert found(trace_id="trace-1") == [own.event_id]
    assert found(session="z") == [foreign.event_id]
    assert found(response_id="chatcmpl-none") == []


def test_no_tenant_finds_anothers_facts(journal: Journal) -> None:
    mine, theirs = interaction(trace_id="x"), interaction(tenant="u", trace_id="x", response_id="same")
    journal.append([mine, theirs, about(tenant="u", session="s"), about(tenant="u", response_id=mine.request_id)])
    assert journal.answers(about(response_id=theirs.request_id)) == []
    assert [i for _, i in journal.answers(about(trace_id="x"))] == [mine]
    assert [i for _, i in journal.interactions_of("t", "s")] == [mine]
    assert journal.signals_about([mine]) == []
    assert set(journal.sessions([("t", "s"), ("u", "none")], {})) == {("t", "s")}


def test_signals_are_found_by_answer_trace_and_session_before_or_after_it(journal: Journal) -> None:
    fact = interaction(trace_id="trace-2")
    early = about(response_id=fact.response_id)
    signals = [about(trace_id="trace-2"), about(session="s"), about(response_id=fact.request_id)]
    journal.append([early])
    journal.append([fact])
    journal.append([*signals, about(session="another")])
    assert [s for _, s in journal.signals_about([fact])] == [early, *signals]


def test_sessions_are_read_many_at_once_each_in_order(journal: Journal) -> None:
    facts = [interaction(f"s{n % 700}", at=float(-n)) for n in range(1400)]
    journal.append(facts)
    found = journal.sessions([("t", f"s{n}") for n in range(700)], {})
    assert len(found) == 700
    assert [i.at for _, i in found["t", "s3"]] == [-703.0, -3.0]


def test_recent_facts_are_the_newest_oldest_first(journal: Journal) -> None:
    journal.append([interaction(at=float(n)) for n in range(2500)])
    assert [fact.at for _, fact in journal.recent(2490.0)] == [float(n) for n in range(2490, 2500)]
    assert len(journal.recent(100.0)) == 2400
    assert journal.recent(9999.0) == []


def test_a_detected_signal_is_known_by_its_event_id(journal: Journal) -> None:
    journal.append([msgspec.structs.replace(about(), event_id="regenerate/1:x"), interaction(event_id="y")])
    assert journal.event("t", "regenerate/1:x")
    assert not journal.event("t", "y")


def test_what_the_machine_knew_is_kept_beside_the_facts(journal: Journal, path: Path) -> None:
    assert journal.known("gateway") is None
    journal.know("gateway", b"1")
    journal.know("gateway", b"2")
    again = Journal(path)
    assert again.known("gateway") == b"2"
    again.close()


def test_facts_of_a_newer_version_are_read_without_their_new_fields(journal: Journal) -> None:
    fact = interaction()
    journal.append([fact])
    newer = msgspec.json.decode(encode(fact)) | {"a_field_of_tomorrow": [1]}
    journal._db.execute("UPDATE facts SET body = ?", (msgspec.json.encode(newer),))
    assert [found for _, found in journal.read()] == [fact]


def test_a_journal_of_the_first_version_is_brought_up_to_date(path: Path) -> None:
    db = sqlite3.connect(path)
    with db:
        db.executescript(MIGRATIONS[0])
        db.execute("CREATE TABLE schema_version (owner TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        db.execute("INSERT INTO schema_version VALUES ('journal', 1)")
        old = interaction()
        db.execute(
            "INSERT INTO facts (event_id, type, at, tenant, session, request_id, response_id, body)"
            " VALUES (?, 'interaction', ?, 't', 's', ?, ?, ?)",
            (old.event_id, old.at, old.request_id, old.response_id, encode(old)),
        )
    db.close()
    journal = Journal(path)
    journal.append([interaction()])
    assert [i for _, i in journal.answers(about(response_id=old.response_id))] == [old]
    assert journal.last() == 2
    journal.close()


# The writer.


def test_closing_writes_all_that_was_put(path: Path, journal: Journal) -> None:
    writer = JournalWriter(path)
    for _ in range(500):
        writer.put(interaction())
    writer.close()
    assert journal.last() == 500


@in_a_loop
async def test_a_durable_put_is_on_disk_when_it_returns(path: Path, journal: Journal) -> None:
    writer = JournalWriter(path)
    await writer.put_durably([about(), about()])
    assert journal.counts() == {"signal": 2}
    writer.close()


KILLED = """
import asyncio, sys
from pathlib import Path
from telemetry.events import Signal, new_id
from telemetry.writer import JournalWriter
async def main():
    writer = JournalWriter(Path(sys.argv[1]))
    while True:
        fact = Signal(event_id=new_id(), at=1.0, kind="thumb", tenant="t")
        await writer.put_durably([fact])
        print(fact.event_id, flush=True)
asyncio.run(main())
"""


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(path: Path, journal: Journal) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(30)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read().split()
    process.wait()
    process.stdout.close()
    kept = {fact.event_id for _, fact in journal.read(0, 100_000)}
    assert set(said) <= kept


@in_a_loop
async def test_facts_wait_while_the_file_is_locked_and_are_written_after(path: Path) -> None:
    said: list[str] = []
    writer = JournalWriter(path, report=said.append)
    writer._journal._db.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    writer.put(interaction())
    with pytest.raises(StateUnavailable, match="locked"):
        await writer.put_durably([about()], timeout=0.5)
    assert len(said) == 1, "said once, however often it is tried"
    assert writer.failing is not None
    other.execute("ROLLBACK")
    await asyncio.to_thread(eventually, lambda: other.execute("SELECT count(*) FROM facts").fetchone()[0] == 1)
    assert writer.failing is None
    writer.close()
    kinds = [kind for (kind,) in other.execute("SELECT type FROM facts")]
    assert kinds == ["interaction"], "a put that was refused is sent again by its client, and not kept twice"
    other.close()


@in_a_loop
async def test_the_queue_is_bounded_and_counts_what_it_drops(path: Path) -> None:
    writer = JournalWriter(path, limit=10)
    writer._journal._db.execute("PRAGMA busy_timeout = 20")
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    for _ in range(50):
        writer.put(interaction())
    await asyncio.to_thread(eventually, lambda: writer.failing is not None)
    while len(writer) < 10:  # what was taken for a write that failed is back in the queue
        writer.put(interaction())
    dropped = writer.dropped
    assert dropped >= 30
    writer.put(interaction())
    with pytest.raises(StateUnavailable, match="queue is full"):
        await writer.put_durably([about()])
    other.execute("ROLLBACK")
    writer.close()
    assert other.execute("SELECT count(*) FROM facts").fetchone()[0] >= 10
    other.close()
