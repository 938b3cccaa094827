"""Which arm a session has: told by the journal where there is one machine, by Redis where there are more."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest
from conftest import eventually, in_a_loop
from redis_server import RedisServer

from gateway.sessions import Sessions
from router.arms import Choice, Snapshot
from router.recall import JournalAssignments
from router.store import REMEMBER_SECONDS, Assignment
from router.store_redis import RedisStore
from router.store_sqlite import SqliteStore
from telemetry.errors import StateError, StateUnavailable
from telemetry.events import Answerer, Interaction, new_id
from telemetry.journal import Journal

HELD = frozenset("abc")
A, B = Choice("a", 0.3, 7, "code", True, "thompson", "r-1", 0.2), Choice("b", 0.7, policy="thompson")


def fact(route: str, tenant: str, session: str, choice: Choice, at: float) -> Interaction:
    c = choice
    by = Answerer(c.arm, "m", None, c.policy, c.snapshot, c.segment, c.propensity, c.holdout, False, c.rollout, c.rival)
    return Interaction(new_id(), at, new_id(), route, tenant, session, by)


class Remembers(Protocol):
    def recall(self, route: str, tenant: str, session: str, held: Container[str], now: float) -> Choice | None: ...
    def note(self, assignments: Sequence[Assignment], now: float) -> None:
        """What a gateway does for sessions that draw."""


class ByJournal(JournalAssignments):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.journal = Journal(path)

    def note(self, assignments: Sequence[Assignment], now: float) -> None:
        self.journal.append([fact(*one, now) for one in assignments])


class ByRedis(RedisStore):
    def note(self, assignments: Sequence[Assignment], now: float) -> None:
        self.assign(assignments, REMEMBER_SECONDS, now)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["journal", "redis"])
def known(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remembers]:
    if request.param == "journal":
        journal = ByJournal(tmp_path / "journal.db")
        yield journal
        journal.journal.close()
    else:
        store = ByRedis(request.getfixturevalue("redis").url)
        store._redis.flushall()
        yield store
        store.close()


def test_a_session_is_recalled_with_all_that_was_known_of_its_draw(known: Remembers) -> None:
    now = time.time()
    known.note([("r", "t", "s", A), ("r", "t", "z", B), ("other", "t", "s", B)], now)
    assert known.recall("r", "t", "s", HELD, now) == A
    assert known.recall("r", "t", "z", HELD, now) == B
    assert known.recall("other", "t", "s", HELD, now) == B
    assert known.recall("r", "u", "s", HELD, now) is None
    assert known.recall("more", "t", "s", HELD, now) is None


def test_names_of_tenants_and_sessions_never_run_together(known: Remembers) -> None:
    now = time.time()
    known.note([("r", "a", "b/c", A)], now)
    assert known.recall("r", "a/b", "c", HELD, now) is None


def test_the_arm_that_was_drawn_last_counts(known: Remembers) -> None:
    now = time.time()
    known.note([("r", "t", "s", A)], now - 60)
    known.note([("r", "t", "s", B)], now)
    assert known.recall("r", "t", "s", HELD, now) == B


def test_many_are_remembered_at_once(known: Remembers) -> None:
    now = time.time()
    known.note([], now)
    known.note([(f"r{n % 3}", "t", f"s{n}", A if n % 2 else B) for n in range(1700)], now)
    assert all(known.recall(f"r{n % 3}", "t", f"s{n}", HELD, now) == (A if n % 2 else B) for n in range(1700))


def test_redis_forgets_a_session_in_time(redis: RedisServer) -> None:
    store = ByRedis(redis.url)
    store.assign([("r", "t", "s", A)], 0.2, time.time())
    store.assign([("r", "t", "z", B)], 60.0, time.time())
    eventually(lambda: store.recall("r", "t", "s", HELD, time.time()) is None)
    assert store.recall("r", "t", "z", HELD, time.time()) == B
    store.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[ByJournal]:
    opened = ByJournal(tmp_path / "journal.db")
    yield opened
    opened.journal.close()


def test_the_journal_forgets_a_session_in_time(journal: ByJournal) -> None:
    now = time.time()
    journal.note([("r", "t", "s", A)], now - REMEMBER_SECONDS - 1)
    assert journal.recall("r", "t", "s", HELD, now) is None


@pytest.mark.parametrize("policy", ["pinned", "fallback"])
def test_who_only_stood_in_or_was_named_is_no_arm_of_the_session(journal: ByJournal, policy: str) -> None:
    now = time.time()
    journal.note([("r", "t", "s", A)], now)
    journal.note([("r", "t", "s", Choice("c", 1.0, policy=policy))], now)
    assert journal.recall("r", "t", "s", HELD, now) == A
    journal.note([("r", "t", "other", Choice("c", 1.0, policy=policy))], now)
    assert journal.recall("r", "t", "other", HELD, now) is None


def test_a_session_whose_first_answer_is_under_way_has_its_arm(journal: ByJournal) -> None:
    now = time.time()
    journal.assign([("r", "t", "s", A), ("r", "t", "old", B)], REMEMBER_SECONDS, now - REMEMBER_SECONDS - 1)
    journal.assign([("r", "t", "s", B)], REMEMBER_SECONDS, now)
    assert journal.recall("r", "t", "s", HELD, now) == B
    assert journal.recall("r", "t", "old", HELD, now) is None
    journal.note([("r", "t", "s", A)], now)
    assert journal.recall("r", "t", "s", HELD, now) == A


def test_an_arm_that_is_no_longer_held_hides_none_that_is(known: Remembers) -> None:
    now = time.time()
    known.note([("r", "t", "s", B)], now)
    assert known.recall("r", "t", "s", frozenset("a"), now) is None
    if isinstance(known, ByJournal):  # Redis keeps one arm a session
        known.note([("r", "t", "s", A)], now)
        known.note([("r", "t", "s", B)], now)  # an old answer that ended late
        assert known.recall("r", "t", "s", frozenset("a"), now) == A


def test_however_many_answers_stood_in_the_draw_is_found(journal: ByJournal) -> None:
    now = time.time()
    journal.note([("r", "t", "s", A)], now)
    journal.note([("r", "t", "s", Choice("c", 1.0, policy="fallback"))] * 100, now)
    assert journal.recall("r", "t", "s", HELD, now) == A


def test_a_journal_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="its folder must exist"):
        JournalAssignments(tmp_path / "nowhere" / "journal.db")


class Away:
    """Assignments whose store is away until it is back."""

    told_by_facts = False

    def __init__(self) -> None:
        self.away = True
        self.told: dict[str, Choice] = {}

    def close(self) -> None: ...

    def assign(self, assignments: Sequence[Assignment], seconds: float, now: float) -> None:
        if self.away:
            raise StateUnavailable("away")
        self.told |= {session: choice for _, _, session, choice in assignments}

    def recall(self, route: str, tenant: str, session: str, held: Container[str], now: float) -> Choice | None:
        return None


@in_a_loop
async def test_what_was_drawn_while_the_store_was_away_is_told_when_it_is_back(tmp_path: Path) -> None:
    away = Away()
    snapshot = Snapshot("r", 1, 0.0, "thompson", 0.0, segments={"": {"a": 0.5, "b": 0.5}}, lead="a")
    with contextlib.closing(SqliteStore(tmp_path / "state.db")) as store:
        sessions = Sessions(store, away, {"r": snapshot})
        drawn: dict[str, Choice] = {}

        async def begin(name: str) -> None:
            drawn[name], _ = await sessions.choose("r", "t", name, str, begun=False, snapshot=snapshot, held="ab")

        for n in range(50):
            await begin(f"s{n}")
            if n % 10 == 9:
                with pytest.raises(StateUnavailable):
                    sessions.exchange()
        away.away = False
        await begin("late")
        sessions.exchange()
        sessions.close()
    assert away.told == drawn
