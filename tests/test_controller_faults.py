"""The controller killed, overtaken, or robbed of its store: on both stores each session still counts once."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_server import RedisServer

from router.arms import Snapshot, Sums
from router.controller import BATCH, LEASE_SECONDS, Controller
from router.plan import RoutePlan
from router.policy import Arm, Reward, Thompson
from router.store import Store
from router.store_redis import RedisStore
from router.store_sqlite import SqliteStore
from telemetry.errors import Fenced
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal

NOW = 1_800_000_000.0
THEN = NOW - 1000.0
"""When the facts happened: their window is over."""
LATER = NOW + LEASE_SECONDS + 1
PLAN = RoutePlan(
    "assistant", {"a": Arm(model="m-a"), "b": Arm(model="m-b")}, Thompson(kind="thompson", refresh=0.02), Reward()
)


def answer(name: str, session: str, arm: str = "a", **fields: Any) -> Interaction:
    made = {
        "event_id": f"event-{name}", "at": THEN, "request_id": name, "route": "assistant", "tenant": "acme",
        "session": session, "answerer": Answerer(arm, f"m-{arm}"),
    }  # fmt: skip
    return Interaction(**(made | fields))


def vote(name: str, about: str, kind: str = "thumb", value: float = 1.0) -> Signal:
    return Signal(name, THEN, kind, "acme", value=value, response_id=about)


FACTS: list[Fact] = [
    answer("r1", "liked", "a", at=THEN - 9),
    answer("r2", "liked", "b", at=THEN - 8),  # the session is the arm's that it began with
    vote("v1", "r1"),
    vote("v2", "r2", "copy"),
    answer("r3", "disliked", "b"),
    vote("v3", "r3", value=0.0),
    answer("r4", "silent", "b"),
    answer("r5", "failed", "a", error="upstream_error"),
    vote("v5", "r5", value=0.0),
    answer("r6", "of another", "a", tenant="umbrella"),
    vote("v6", "r6"),  # acme's word about umbrella's answer
    vote("v7", "r-never-seen"),
]
LIKED = 0.5 + 0.5 * (1.0 + 0.3) / 2
EXPECTED = {"a": (1.0, LIKED, LIKED**2), "b": (1.0, 0.0, 0.0)}


def totals(store: Store) -> dict[str, tuple[float, float, float]]:
    """Each arm's sums over all cells; an arm whose rewards were all taken back is not there."""
    found: dict[str, Sums] = {}
    for cell, sums in store.sums("assistant").items():
        found[cell.arm] = found.get(cell.arm, Sums()).plus(sums)
    return {arm: (v.n, v.s, v.ss) for arm, v in found.items() if abs(v.n) > 1e-9}


def counted(store: Store) -> bool:
    """Whether the sums are those of FACTS."""
    found = totals(store)
    return found.keys() == EXPECTED.keys() and all(found[a] == pytest.approx(EXPECTED[a], abs=1e-9) for a in found)


def published(store: Store) -> Snapshot:
    found = store.snapshot("assistant")
    assert found is not None
    return found


class Watched:
    """A store that calls `before` with the name of each of the controller's writes before it is made."""

    WRITES = frozenset({"apply", "publish", "mark"})

    def __init__(self, store: Store, before: Callable[[str], None]) -> None:
        self._store, self._before = store, before

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in self.WRITES:
            return method

        def call(*values: object) -> object:
            self._before(name)
            return method(*values)

        return call


class Killed(Exception):
    """The controller's process ended here."""


def dying_at(store: Store, nth: int) -> Any:
    writes = itertools.count()

    def before(_: str) -> None:
        if next(writes) == nth:
            raise Killed

    return Watched(store, before)


def interrupted(store: Store, write: str, by: Callable[[], object]) -> Any:
    """`by` happens before the first write of that name."""
    happened: list[object] = []

    def before(name: str) -> None:
        if name == write and not happened:
            happened.append(True)
            by()

    return Watched(store, before)


class Backend:
    """Opens the same store again and again, as several processes would; `lose` empties it."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self._folder, self._url = folder, url
        self._lost = 0
        self._opened = contextlib.ExitStack()

    def open(self) -> Store:
        store: Store = RedisStore(self._url) if self._url else SqliteStore(self._folder / f"state-{self._lost}.db")
        self._opened.callback(store.close)
        return store

    def lose(self) -> None:
        self._lost += 1
        if self._url:
            with contextlib.closing(redis.Redis.from_url(self._url)) as client:
                client.flushall()

    def close(self) -> None:
        self._opened.close()


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with RedisServer() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    with contextlib.closing(Backend(tmp_path, url)) as backend:
        backend.lose()
        yield backend


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "journal.db")) as journal:
        yield journal


def test_versions_rise_with_each_move_of_the_weights(backend: Backend, journal: Journal) -> None:
    controller = Controller([PLAN], journal, backend.open(), "one")
    weights = []
    for version in (1, 2, 3):
        for _ in range(2):
            controller.step(NOW)
        assert published(backend.open()).version == version
        weights.append(published(backend.open()).segments[""]["a"])
        journal.append([answer(f"r{version}", f"s{version}"), vote(f"v{version}", f"r{version}")])
    assert weights == sorted(set(weights))


def test_many_facts_are_taken_in_a_batch_at_a_time(backend: Backend, journal: Journal) -> None:
    journal.append(FACTS)
    journal.append([answer(f"many-{n}", f"many-{n}") for n in range(2 * BATCH)])
    controller = Controller([PLAN], journal, backend.open(), "one")
    assert [controller.step(NOW) for _ in range(3)] == [True, True, False]
    assert backend.open().marked("journal") == journal.last()
    assert counted(backend.open())


# Killed.


def test_killed_before_any_of_its_writes_a_controller_begins_again_and_counts_once(
    backend: Backend, journal: Journal
) -> None:
    journal.append(FACTS)
    killed = 0
    for nth in itertools.count():
        try:
            Controller([PLAN], journal, dying_at(backend.open(), nth), "one").step(NOW)
            break
        except Killed:
            killed += 1
    assert killed >= 3, "it writes sums, weights and the mark"
    assert counted(backend.open())
    assert backend.open().marked("journal") == journal.last()


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(FACTS),
    cuts=st.sets(st.integers(1, len(FACTS) - 1), max_size=4),
    deaths=st.lists(st.integers(0, 4), min_size=5, max_size=5),
)
def test_whatever_the_order_the_rounds_and_the_deaths_the_sums_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, order: list[Fact], cuts: set[int], deaths: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    journal, store = Journal(folder / "journal.db"), SqliteStore(folder / "state.db")
    with contextlib.closing(journal), contextlib.closing(store):
        for (start, end), nth in zip(itertools.pairwise([0, *sorted(cuts), len(order)]), deaths, strict=False):
            journal.append(order[start:end])
            with contextlib.suppress(Killed):
                Controller([PLAN], journal, dying_at(store, nth), "one").step(NOW)
        Controller([PLAN], journal, store, "one").step(NOW)
        assert counted(store), totals(store)


# Robbed of its store.


def test_the_sums_of_a_lost_store_are_made_again_from_the_journal(backend: Backend, journal: Journal) -> None:
    journal.append(FACTS)
    Controller([PLAN], journal, backend.open(), "one").step(NOW)
    backend.lose()
    assert totals(backend.open()) == {}
    Controller([PLAN], journal, backend.open(), "one").step(NOW)
    assert counted(backend.open())
    assert published(backend.open()).segments[""]["a"] > 0.5


@pytest.mark.parametrize("write", sorted(Watched.WRITES))
def test_a_redis_that_is_emptied_during_a_round_is_filled_again(
    tmp_path: Path, redis_url: str, journal: Journal, write: str
) -> None:
    with contextlib.closing(Backend(tmp_path, redis_url)) as backend:
        backend.lose()
        for owner in ("zero", "one"):  # so that the lease has been given more than once
            store = backend.open()
            store.lease(owner, LEASE_SECONDS, NOW - 60)
            store.release(owner)
        journal.append(FACTS[:4])
        Controller([PLAN], journal, backend.open(), "one").step(NOW)
        journal.append(FACTS[4:])
        with contextlib.suppress(Fenced):
            Controller([PLAN], journal, interrupted(backend.open(), write, backend.lose), "one").step(NOW + 1)
        Controller([PLAN], journal, backend.open(), "one").step(NOW + 2)
        assert counted(backend.open())
        assert backend.open().marked("journal") == journal.last()


def test_a_controller_outlives_a_redis_that_goes_away_and_comes_back_empty(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append(FACTS)
    with (
        RedisServer() as server,
        running(journal, RedisStore(server.url, timeout=0.5), "one"),
        contextlib.closing(RedisStore(server.url, timeout=0.5)) as store,
    ):
        eventually(lambda: counted(store))
        server.stop()
        eventually(lambda: "does not answer" in caplog.text, 15)
        server.start()
        eventually(lambda: counted(store), 15)


# Overtaken.


@pytest.mark.parametrize("write", sorted(Watched.WRITES))
def test_a_controller_that_is_overtaken_during_a_round_writes_no_more(
    backend: Backend, journal: Journal, write: str
) -> None:
    two = Controller([PLAN], journal, backend.open(), "two")
    journal.append(FACTS[:3])

    def overtake() -> None:
        journal.append(FACTS[3:])
        two.step(LATER)

    one = Controller([PLAN], journal, interrupted(backend.open(), write, overtake), "one")
    with pytest.raises(Fenced):
        one.step(NOW)
    store = backend.open()
    assert counted(store)
    assert (store.marked("journal"), published(store).at) == (journal.last(), LATER)
    assert not one.step(LATER + 1)
    held = store.holder()
    assert held is not None
    assert held.owner == "two"


@contextlib.contextmanager
def running(journal: Journal, store: Store, owner: str) -> Iterator[threading.Event]:
    """A controller that runs in a thread until the event is set, or the end."""
    stopping = threading.Event()
    own = Journal(journal.path)
    thread = threading.Thread(target=Controller([PLAN], own, store, owner).run, args=(stopping,), daemon=True)
    thread.start()
    try:
        yield stopping
    finally:
        stopping.set()
        thread.join(10)
        own.close()
        store.close()
    assert not thread.is_alive()


def test_a_controller_that_stops_hands_over_at_once(backend: Backend, journal: Journal) -> None:
    store = backend.open()

    def holds(owner: str) -> bool:
        held = store.holder()
        return held is not None and held.owner == owner

    with running(journal, backend.open(), "one") as stopping:
        eventually(lambda: holds("one"))
        with running(journal, backend.open(), "two"):
            stopping.set()
            eventually(lambda: holds("two"), LEASE_SECONDS / 2)
            journal.append(FACTS)
            eventually(lambda: counted(store))
