"""The journal: nothing that was acknowledged is lost, nothing is kept twice, and tenants do not see each other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import eventually

from telemetry.errors import StateError, StateReadOnly, StateUnavailable, StateVersion
from telemetry.events import Answerer, Fact, Interaction, Signal, Thread, encode
from telemetry.journal import Journal
from telemetry.schema import MIGRATIONS
from telemetry.sqlite import connect, transaction
from telemetry.wording import turns
from telemetry.writer import JournalWriter

ROOT = Path(__file__).resolve().parent.parent


def answer(name: str, **fields: Any) -> Interaction:
    made = {
        "event_id": f"event-{name}", "at": 1000.0, "request_id": name, "route": "assistant", "tenant": "acme",
        "session": "s1", "answerer": Answerer("champion", "base"),
    }  # fmt: skip
    return Interaction(**(made | fields))


def vote(name: str, **fields: Any) -> Signal:
    made = {"event_id": name, "at": 2000.0, "kind": "thumb", "tenant": "acme", "value": 1.0}
    return Signal(**(made | fields))


def names(found: list[tuple[int, Interaction]] | list[tuple[int, Signal]] | list[tuple[int, Fact]]) -> list[str]:
    return [fact.request_id if isinstance(fact, Interaction) else fact.event_id for _, fact in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(path)) as journal:
        yield journal


class Written:
    """A writer, and what it reported."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.reports: list[str] = []
        self.writer = JournalWriter(path, report=self.reports.append, **options)


@pytest.fixture
def writing(path: Path) -> Iterator[Callable[..., Written]]:
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Written:
            made = Written(path, **options)
            stack.callback(made.writer.close)
            return made

        yield make


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program holds the file's lock."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.rollback()


@contextlib.contextmanager
def broken(path: Path) -> Iterator[None]:
    """Every write fails at once."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("ALTER TABLE facts RENAME TO elsewhere")
        yield
        other.execute("ALTER TABLE elsewhere RENAME TO facts")


# Appending and reading.


def test_facts_are_read_as_they_were_written_in_order(journal: Journal) -> None:
    facts = [
        answer("one", messages=msgspec.Raw(b'[{"role":"user","content":"hi"}]'), answer="hey", retrieval_ids=("d",)),
        vote("v", response_id="one", text="nice", target={"from": 0}),
        answer("two", at=1.0),
    ]
    journal.append(facts)
    read = journal.read()
    assert [seq for seq, _ in read] == [1, 2, 3]
    assert [encode(fact) for _, fact in read] == [encode(fact) for fact in facts]
    assert journal.read(1, 1) == read[1:2]
    assert journal.read(3) == []
    assert journal.last() == 3
    assert journal.counts() == {"interaction": 2, "signal": 1}


def test_an_empty_journal_has_nothing(journal: Journal) -> None:
    assert (journal.read(), journal.last(), journal.counts(), journal.recent(0.0)) == ([], 0, {}, [])
    assert journal.answers(vote("v", response_id="one")) == []
    assert journal.sessions([], {}) == {}
    journal.append([])
    assert journal.last() == 0


def test_a_thousand_facts_at_once_keep_their_order(journal: Journal) -> None:
    sent = [f"r{n}" for n in range(1000)]
    journal.append([answer(name) for name in sent])
    assert names(journal.read(0, 2000)) == sent


def test_what_cannot_be_written_leaves_nothing_behind(path: Path, journal: Journal) -> None:
    facts = [*(answer(f"r{n}") for n in range(100)), answer("bad", session="\ud800")]
    with pytest.raises(UnicodeEncodeError):
        journal.append(facts)
    assert journal.read() == []
    with broken(path), pytest.raises(StateUnavailable, match="facts"):
        journal.append(facts[:1])
    journal.append(facts[:1])
    assert journal.last() == 1


def test_a_commit_that_fails_leaves_no_transaction_open(path: Path) -> None:
    tables = [
        "CREATE TABLE a (id INTEGER PRIMARY KEY); CREATE TABLE b (a INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)"
    ]
    with contextlib.closing(connect(path, "test", tables)) as db:
        db.execute("PRAGMA foreign_keys = ON")
        for _ in range(2):
            with pytest.raises(sqlite3.IntegrityError), transaction(db):
                db.execute("INSERT INTO b VALUES (1)")
        with transaction(db):
            db.execute("INSERT INTO a VALUES (1)")
        assert db.execute("SELECT COUNT(*) FROM b").fetchone() == (0,)


def test_a_path_that_cannot_be_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateReadOnly, match="nowhere"):
        Journal(tmp_path / "nowhere" / "state.db")
    (tmp_path / "letter.db").write_text("Dear Ann, " * 100)
    with pytest.raises(StateError, match="not a state file"):
        Journal(tmp_path / "letter.db")


# Finding answers.


def test_an_answer_is_found_by_each_of_its_names(journal: Journal) -> None:
    journal.append(
        [
            answer("0190aa", response_id="chatcmpl-0190aa", trace_id="t1"),
            answer("0190bb", response_id="gen-provider-77", trace_id="t1", session="s2"),
            answer("0190cc", response_id="resp_0190cc", session="s2", at=1.0),
        ]
    )
    for name, about in {
        "by request": ("0190aa", ["0190aa"]),
        "by vLLM's id of a chat": ("chatcmpl-0190aa", ["0190aa"]),
        "by vLLM's id of a completion": ("cmpl-0190aa", ["0190aa"]),
        "by vLLM's id of a response": ("resp_0190cc", ["0190cc"]),
        "by a provider's own id": ("gen-provider-77", ["0190bb"]),
        "by request, though a provider named it": ("0190bb", ["0190bb"]),
        "unknown": ("chatcmpl-0190dd", []),
        "the end of a provider's id": ("77", []),
    }.values():
        assert names(journal.answers(vote("v", response_id=name))) == about
    assert names(journal.answers(vote("v", trace_id="t1"))) == ["0190aa", "0190bb"]
    assert names(journal.answers(vote("v", session="s2"))) == ["0190cc", "0190bb"], "oldest first"
    assert journal.answers(vote("v", trace_id="t2")) == []
    assert journal.answers(vote("v")) == []


def test_a_signal_is_not_an_answer(journal: Journal) -> None:
    journal.append([vote("v", response_id="one", trace_id="t1", session="s1")])
    for about in ({"response_id": "one"}, {"trace_id": "t1"}, {"session": "s1"}):
        assert journal.answers(vote("w", **about)) == []
    assert journal.sessions([("acme", "s1")], {}) == {}
    assert journal.interactions_of("acme", "s1") == []


def test_sessions_have_their_requests_oldest_first(journal: Journal) -> None:
    journal.append([answer("b", at=2.0), answer("x", session="s2"), answer("a", at=1.0), answer("c", at=2.0)])
    found = journal.sessions([("acme", "s1"), ("acme", "s2"), ("acme", "s3"), ("acme", "s1")], {})
    assert {key: names(requests) for key, requests in found.items()} == {
        ("acme", "s1"): ["a", "b", "c"],
        ("acme", "s2"): ["x"],
    }
    assert found["acme", "s1"] == journal.interactions_of("acme", "s1")


def test_many_sessions_are_found_at_once(journal: Journal) -> None:
    journal.append([answer(f"r{n}", session=f"s{n}") for n in range(1500)])
    found = journal.sessions([("acme", f"s{n}") for n in range(1500)], {})
    assert {key[1]: names(requests) for key, requests in found.items()} == {f"s{n}": [f"r{n}"] for n in range(1500)}


def test_signals_about_answers_are_found_by_each_name_in_order_of_arrival(journal: Journal) -> None:
    about = answer("one", response_id="chatcmpl-one", trace_id="t1")
    journal.append(
        [
            vote("by-session", session="s1"),
            vote("by-trace", trace_id="t1"),
            vote("of-another", response_id="two", session="s2"),
            vote("by-response", response_id="chatcmpl-one"),
            vote("by-request", response_id="one", trace_id="t1", session="s1"),
            about,
        ]
    )
    assert names(journal.signals_about([about])) == ["by-session", "by-trace", "by-response", "by-request"]
    assert journal.signals_about([]) == []
    assert names(journal.signals_about([about, answer("two", session="s2")])) == [
        "by-session", "by-trace", "of-another", "by-response", "by-request",
    ]  # fmt: skip


def test_news_say_of_which_requests_anything_else_tells(journal: Journal) -> None:
    journal.append(
        [
            answer("alone", session="a", response_id="chatcmpl-1"),
            answer("of-two", session="b"),
            answer("of-the-two", session="b"),
            answer("with-session-vote", session="c"),
            answer("with-trace-vote", session="d", trace_id="t1"),
            answer("in-that-trace", session="e", trace_id="t1"),
            answer("in-another", session="f", trace_id="t2"),
            answer("ours", session="g"),
            answer("0a1b2c3d", session="h", response_id="chatcmpl-0a1b2c3d"),
            answer("theirs", session="i", response_id="resp_99aabbcc"),
            answer("theirs-too", session="j", response_id="resp_99aabbcc"),
            answer("another's", session="c", tenant="umbrella", response_id="resp_99aabbcc"),
        ]
    )
    journal.append([vote("v1", session="c"), vote("v2", trace_id="t1"), vote("v3", response_id="ours")])
    journal.append([vote("v4", response_id="chatcmpl-0a1b2c3d"), vote("v5", response_id="99aabbcc")])
    facts, company = journal.news(0, 100)
    assert names(facts) == names(journal.read(0, 100))
    assert names([(seq, fact) for seq, fact in facts if seq not in company and isinstance(fact, Interaction)]) == [
        "alone", "in-another", "another's",
    ]  # fmt: skip
    facts, company = journal.news(1, 2)
    assert (names(facts), company) == (["of-two", "of-the-two"], {2, 3})
    assert journal.news(17, 10) == ([], set())


def test_signals_are_sought_as_they_are_asked_for(
    path: Path, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append([answer("one"), vote("first"), answer("two"), vote("bad"), vote("last")])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE facts SET body = 'no' WHERE event_id = 'bad'")
    assert names([next(journal.signals(0, 5))]) == ["first"]
    assert caplog.text == ""
    assert names(list(journal.signals(0, 5))) == ["first", "last"]
    assert "fact 4 cannot be read" in caplog.text
    assert names(list(journal.signals(2, 4))) == []


def test_an_unread_request_is_the_same_but_for_what_was_said(journal: Journal) -> None:
    whole = answer("one", messages=[{"role": "user", "content": "Été?"}], answer="Oui.", thread=Thread("a", "b"))
    journal.append([whole, answer("two")])
    (_, unread), (_, without) = journal.read(0, 10, unread=True)
    assert isinstance(unread, Interaction)
    assert isinstance(without, Interaction)
    assert without.messages is None
    assert turns(unread.messages) == turns(whole.messages) == [("user", "Été?")]
    assert encode(unread) == encode(whole)
    assert [encode(fact) for _, fact in journal.sessions([("acme", "s1")], {}, unread=True)["acme", "s1"]] == [
        encode(whole), encode(without)
    ]  # fmt: skip


def test_no_tenant_reads_what_is_anothers(journal: Journal) -> None:
    ours, theirs = (
        answer("same", tenant=tenant, response_id="gen-1", trace_id="t1", user=tenant)
        for tenant in ("acme", "umbrella")
    )
    signals = [
        vote(f"{tenant}-{n}", tenant=tenant, **about)
        for tenant in ("acme", "umbrella")
        for n, about in enumerate([{"response_id": "same"}, {"trace_id": "t1"}, {"session": "s1"}])
    ]
    journal.append([ours, theirs, *signals])
    for about in ({"response_id": "same"}, {"response_id": "gen-1"}, {"trace_id": "t1"}, {"session": "s1"}):
        assert [i.user for _, i in journal.answers(vote("v", **about))] == ["acme"]
        assert [i.user for _, i in journal.answers(vote("v", tenant="umbrella", **about))] == ["umbrella"]
        assert journal.answers(vote("v", tenant="stranger", **about)) == []
    assert [i.user for _, i in journal.sessions([("umbrella", "s1")], {})["umbrella", "s1"]] == ["umbrella"]
    assert journal.sessions([("stranger", "s1")], {}) == {}
    assert names(journal.signals_about([theirs])) == ["umbrella-0", "umbrella-1", "umbrella-2"]
    assert len(journal.signals_about([ours, theirs])) == 6


def test_a_signal_is_known_by_its_event_id_and_an_answer_is_none(journal: Journal) -> None:
    journal.append([vote("v"), answer("one")])
    assert journal.event("acme", "v")
    assert not journal.event("acme", "event-one")
    assert not journal.event("acme", "w")


def test_recent_facts_are_the_newest_oldest_first(journal: Journal) -> None:
    journal.append([answer(f"r{n}", at=float(n)) for n in range(3500)])
    assert names(journal.recent(3497.0)) == ["r3497", "r3498", "r3499"]
    assert names(journal.recent(1500.0)) == [f"r{n}" for n in range(1500, 3500)]
    assert names(journal.recent(0.0)) == [f"r{n}" for n in range(3500)]
    assert names(journal.recent(0.0, limit=1500))[-1] == "r3499"
    assert 1500 <= len(journal.recent(0.0, limit=1500)) <= 2500
    assert journal.recent(4000.0) == []


def test_recent_facts_may_be_a_little_out_of_order(journal: Journal) -> None:
    journal.append([answer("late", at=900.0), answer("a", at=1000.0), answer("old", at=1.0), answer("b", at=999.0)])
    assert names(journal.recent(900.0)) == ["late", "a", "b"]


def test_what_was_learned_is_known_until_it_is_learned_anew(path: Path, journal: Journal) -> None:
    assert journal.known("snapshots") is None
    journal.know("snapshots", b"\x00one")
    journal.know("other", b"")
    journal.know("snapshots", b"two")
    with contextlib.closing(Journal(path)) as later:
        assert (later.known("snapshots"), later.known("other")) == (b"two", b"")


# Journals of other versions.


@pytest.mark.parametrize("version", range(len(MIGRATIONS)))
def test_a_journal_of_an_older_version_is_upgraded_and_loses_nothing(path: Path, version: int) -> None:
    with contextlib.closing(connect(path, "journal", MIGRATIONS[:version])) as db:
        if version:
            body = encode(answer("old", response_id="gen-1"))
            row = ("event-old", "interaction", 1000.0, "acme", "assistant", "s1", "old", "gen-1", None, body)
            db.execute(
                "INSERT INTO facts (event_id, type, at, tenant, route, session, request_id, response_id, trace_id,"
                f" body) VALUES ({', '.join('?' * 10)})",
                row,
            )
    for attempt in range(2):
        with contextlib.closing(Journal(path)) as journal:
            assert names(journal.answers(vote("v", response_id="gen-1"))) == ["old"][:version]
            assert names(journal.interactions_of("acme", "s1")) == ["old"][:version]
            journal.append([vote(f"v{attempt}")])
            assert journal.event("acme", f"v{attempt}")
            journal.know("name", b"value")


def test_a_journal_of_a_newer_version_is_refused(path: Path) -> None:
    connect(path, "journal", [*MIGRATIONS, "CREATE TABLE later (a)"]).close()
    with pytest.raises(StateVersion, match="upgrade understudy"):
        Journal(path)


def test_a_fact_with_fields_of_a_newer_version_is_read(path: Path, journal: Journal) -> None:
    journal.append([answer("one"), vote("v", response_id="one")])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        for seq, body in other.execute("SELECT seq, body FROM facts").fetchall():
            newer = json.loads(body) | {"mood": {"of": ["the", "model"]}, "score": 0.5}
            if "answerer" in newer:
                newer["answerer"]["adapter"] = "v9"
            other.execute("UPDATE facts SET body = ? WHERE seq = ?", (json.dumps(newer).encode(), seq))
    assert [fact for _, fact in journal.read()] == [answer("one"), vote("v", response_id="one")]


# The writer.


def test_what_is_put_durably_is_on_disk_before_it_returns(journal: Journal, writing: Callable[..., Written]) -> None:
    writer = writing().writer

    async def put() -> None:
        for n in range(20):
            writer.put(answer(f"r{n}"))
            await writer.put_durably([vote(f"v{n}"), vote(f"w{n}")])
            assert journal.event("acme", f"v{n}")
            assert journal.event("acme", f"w{n}")
            assert names(journal.read(3 * n)) == [f"r{n}", f"v{n}", f"w{n}"], "what was put before is there, too"

    asyncio.run(put())
    assert len(writer) == writer.dropped == 0


def test_what_is_put_is_written_soon_and_in_order(journal: Journal, writing: Callable[..., Written]) -> None:
    writer = writing().writer
    sent = [f"r{n}" for n in range(1000)]
    for name in sent:
        writer.put(answer(name))
    eventually(lambda: journal.last() == 1000)
    assert names(journal.read()) == sent


def test_closing_writes_all_that_is_queued(path: Path) -> None:
    writer = JournalWriter(path)
    for n in range(5000):
        writer.put(answer(f"r{n}"))
    writer.close()
    with contextlib.closing(Journal(path)) as journal:
        assert names(journal.read(0, 10_000)) == [f"r{n}" for n in range(5000)]
    assert len(writer) == 0


def test_closing_a_journal_that_cannot_be_written_says_what_is_lost(path: Path) -> None:
    written = Written(path)
    with broken(path):
        for n in range(3):
            written.writer.put(answer(f"r{n}"))
        written.writer.close()
    assert written.reports[-1] == "journal: closed with 3 facts unwritten"


KILLED = """
import asyncio, sys
from pathlib import Path
from telemetry.events import Signal
from telemetry.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))

async def put(n):
    await writer.put_durably([Signal(f"{n}-{part}", 1.0, "thumb", "acme", response_id="x") for part in range(3)])
    print(n, flush=True)

async def main():
    for start in range(0, 10**9, 8):
        await asyncio.gather(*(put(n) for n in range(start, start + 8)))

asyncio.run(main())
"""


def test_a_writer_that_is_killed_loses_nothing_it_acknowledged(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(100)]
        process.send_signal(signal.SIGKILL)
        acknowledged += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    whole = [int(line) for line in acknowledged if line.endswith(b"\n")]
    assert len(whole) >= 100
    with contextlib.closing(Journal(path)) as journal:
        kept = set(names(journal.read(0, 1_000_000)))
        journal.append([vote("after")])
    assert {f"{n}-{part}" for n in whole for part in range(3)} <= kept
    assert {name.partition("-")[0] for name in kept if f"{name.partition('-')[0]}-2" not in kept} == set(), (
        "facts that were put together are kept together"
    )


def test_a_locked_database_makes_facts_wait_and_is_reported_once(
    path: Path, journal: Journal, writing: Callable[..., Written]
) -> None:
    written = writing()
    with locked(path):
        for n in range(100):
            written.writer.put(answer(f"r{n}"))
        eventually(lambda: written.writer.failing, 15)
        assert "locked by another program" in (written.writer.failing or "")
        assert journal.last() == 0
        written.writer.put(answer("r100"))
    eventually(lambda: journal.last() == 101, 15)
    assert names(journal.read()) == [f"r{n}" for n in range(101)]
    eventually(lambda: written.writer.failing is None)
    assert len(written.reports) == 1
    assert "100 facts wait" in written.reports[0]
    assert written.writer.dropped == 0


def test_each_time_that_writing_begins_to_fail_is_reported(
    path: Path, journal: Journal, writing: Callable[..., Written]
) -> None:
    written = writing()
    for times in (1, 2):
        with broken(path):
            written.writer.put(answer(f"r{times}"))
            eventually(lambda: written.writer.failing)
        eventually(lambda times=times: journal.last() == times)  # type: ignore[misc]
        eventually(lambda: written.writer.failing is None)
        assert len(written.reports) == times


FULL = """
import resource, signal, sys, time
from pathlib import Path
from telemetry.events import Answerer, Interaction
from telemetry.journal import Journal
from telemetry.writer import JournalWriter

path = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = JournalWriter(path)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
for n in range(200):
    writer.put(Interaction(f"e{n}", 1.0, f"r{n}", "assistant", "acme", "s1", Answerer("a", "m"), answer="x" * 10_000))
while writer.failing is None:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
while len(writer) or writer.failing is not None:
    time.sleep(0.01)
writer.close()
"""


def test_facts_wait_for_room_on_a_full_disk_and_are_written_once(path: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL, str(path)], cwd=ROOT, check=True, timeout=60)
    with contextlib.closing(Journal(path)) as journal:
        assert names(journal.read()) == [f"r{n}" for n in range(200)]


def test_the_queue_is_bounded_and_counts_what_it_drops(
    path: Path, journal: Journal, writing: Callable[..., Written]
) -> None:
    writer = writing(limit=10).writer
    with locked(path):
        writer.put(answer("first"))
        eventually(lambda: len(writer) == 0)  # on its way to the disk
        for n in range(1000):
            writer.put(answer(f"r{n}"))
        assert (len(writer), writer.dropped) == (10, 990)
    eventually(lambda: journal.last() == 11)
    assert names(journal.read()) == ["first", *(f"r{n}" for n in range(10))]


def test_a_durable_put_is_refused_when_the_queue_is_full(
    path: Path, journal: Journal, writing: Callable[..., Written]
) -> None:
    writer = writing(limit=5).writer
    with locked(path):
        writer.put(answer("first"))
        eventually(lambda: len(writer) == 0)
        for n in range(5):
            writer.put(answer(f"r{n}"))
        with pytest.raises(StateUnavailable, match="queue is full"):
            asyncio.run(writer.put_durably([vote("refused")]))
    eventually(lambda: journal.last() == 6)
    asyncio.run(writer.put_durably([vote("taken")]))
    assert names(journal.read(6)) == ["taken"]
    assert writer.dropped == 0, "who is refused knows it"


def test_a_durable_put_that_takes_too_long_is_refused_and_not_written_later(
    path: Path, journal: Journal, writing: Callable[..., Written]
) -> None:
    written = writing()

    async def put() -> None:
        with broken(path):
            written.writer.put(answer("waiting"))
            with pytest.raises(StateUnavailable, match="cannot be written"):
                await written.writer.put_durably([vote("again")], timeout=0.05)
        await written.writer.put_durably([vote("again")])

    asyncio.run(put())
    assert names(journal.read()) == ["waiting", "again"]


def test_a_durable_put_that_waits_out_a_short_failure_succeeds_once(
    path: Path, journal: Journal, writing: Callable[..., Written]
) -> None:
    written = writing()

    async def put() -> None:
        with broken(path):
            waiting = asyncio.create_task(written.writer.put_durably([vote("v")]))
            await asyncio.to_thread(eventually, lambda: written.writer.failing)
        await waiting

    asyncio.run(put())
    assert names(journal.read()) == ["v"]


def test_several_processes_append_to_one_journal(path: Path, journal: Journal, writing: Callable[..., Written]) -> None:
    writers = [writing().writer for _ in range(3)]

    async def put() -> None:
        await asyncio.gather(*(w.put_durably([vote(f"{at}-{n}")]) for at, w in enumerate(writers) for n in range(30)))

    asyncio.run(put())
    assert len(set(names(journal.read()))) == journal.last() == 90


OPENS = """
import sys, time
from pathlib import Path
from telemetry.journal import Journal

folder, begin = Path(sys.argv[1]), float(sys.argv[2])
for n in range(40):
    while time.time() < begin + n * 0.05:
        pass
    Journal(folder / f"{n}.db").close()
"""


def test_processes_that_open_a_new_file_at_once_all_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENS, str(tmp_path), str(time.time() + 1.5)]
    crew = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate(timeout=60)[1] for process in crew] == [""] * 3
