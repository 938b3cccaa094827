"""Both stores keep the same promises: one suite over SQLite and a real Redis."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import RedisServer

from gateway.auth import new_key
from router.arms import Cell, Choice, Snapshot, Sums
from router.store import Change, Store, session_key
from router.store_redis import RedisStore
from router.store_sqlite import MIGRATIONS, SqliteStore
from telemetry.errors import Fenced, StateError, StateLocked, StateReadOnly, StateUnavailable, StateVersion
from telemetry.sqlite import connect

NOW = 1_800_000_000.0
ROOT = Path(__file__).resolve().parent.parent
Open = Callable[[], Store]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store again and again, as several processes would."""
    stores: list[Store] = []

    def open_one() -> Store:
        store: Store
        if request.param == "sqlite":
            store = SqliteStore(tmp_path / "state.db")
        else:
            store = RedisStore(request.getfixturevalue("redis").url)
        stores.append(store)
        return store

    if request.param == "redis":
        first = RedisStore(request.getfixturevalue("redis").url)
        first._redis.flushall()
        first.close()
    yield open_one
    for store in stores:
        store.close()


@pytest.fixture
def store(opened: Open) -> Store:
    return opened()


def token(store: Store, owner: str = "one", now: float = NOW) -> int:
    lease = store.lease(owner, 4.0, now)
    assert lease is not None
    return lease.token


def part(arm: str, reward: float, bucket: int = 0, segment: str = "") -> dict[Cell, Sums]:
    return {Cell(segment, arm, bucket): Sums(1.0, reward, reward * reward)}


def test_one_owner_holds_the_lease_until_it_ends(opened: Open) -> None:
    one, two = opened(), opened()
    first = one.lease("one", 4.0, NOW)
    assert first is not None
    assert two.lease("two", 4.0, NOW + 3.9) is None
    renewed = one.lease("one", 4.0, NOW + 3.9)
    assert renewed is not None
    assert (renewed.token, renewed.expires) == (first.token, pytest.approx(NOW + 7.9))
    second = two.lease("two", 4.0, NOW + 8.0)
    assert second is not None
    assert second.token > first.token
    assert two.holder() == second


def test_a_lease_given_back_is_free_at_once(opened: Open) -> None:
    one, two = opened(), opened()
    token(one)
    two.release("two")
    assert two.lease("two", 4.0, NOW) is None, "only its owner may give it back"
    one.release("one")
    assert two.lease("two", 4.0, NOW) is not None


def test_a_controller_that_lost_its_lease_writes_nothing(opened: Open) -> None:
    old, new = opened(), opened()
    old_token = token(old)
    new_token = token(new, "two", NOW + 5)
    new.apply("r", [Change("s", 1, part("a", 1.0))], new_token)
    new.publish(Snapshot("r", 2, NOW, "thompson", 0.0, {"": {"a": 1.0}}), new_token)
    new.mark("journal", 9, new_token)
    with pytest.raises(Fenced):
        old.apply("r", [Change("s", 2, part("a", 0.0))], old_token)
    with pytest.raises(Fenced):
        old.publish(Snapshot("r", 3, NOW, "thompson", 0.0, {"": {"a": 0.5}}), old_token)
    with pytest.raises(Fenced):
        old.mark("journal", 3, old_token)
    assert new.sums("r")[Cell("", "a", 0)].s == 1.0
    assert (new.marked("journal"), new.snapshot("r").version) == (9, 2)  # type: ignore[union-attr]


def test_a_session_counts_once_and_by_its_newest_revision(store: Store) -> None:
    t = token(store)
    assert store.apply("r", [Change("s", 5, part("a", 0.25))], t)
    assert not store.apply("r", [Change("s", 5, part("a", 0.25))], t), "the same revision again"
    assert not store.apply("r", [Change("s", 4, part("a", 1.0))], t), "an older one"
    assert store.apply("r", [Change("s", 6, part("b", 0.75, 3600))], t)
    sums = {cell: v for cell, v in store.sums("r").items() if v.n}
    assert sums == {Cell("", "b", 3600): Sums(1.0, 0.75, 0.5625)}
    assert store.apply("r", [Change("s", 7, {})], t), "and can be taken back"
    assert all(v.n == pytest.approx(0.0, abs=1e-12) for v in store.sums("r").values())


def test_a_cleared_route_counts_anew_and_the_others_stay(opened: Open) -> None:
    store = opened()
    t = token(store)
    for route in ("r", "r*", "other"):
        store.apply(route, [Change("s", 3, part("a", 1.0))], t)
    store.clear("r*", t)
    store.clear("r", t)
    assert store.sums("r") == {}
    assert store.apply("r", [Change("s", 1, part("a", 0.5))], t), "older than what was forgotten"
    assert store.sums("other")[Cell("", "a", 0)].s == 1.0
    token(opened(), "two", NOW + 9)
    store.apply("r", [Change("s", 2, part("a", 0.5))], t + 1)
    with pytest.raises(Fenced):
        store.clear("r", t)


def test_a_batch_counts_each_session_once_and_says_how_many_were_newer(store: Store) -> None:
    t = token(store)
    batch = [Change(f"s{n}", 1, part("a", 0.5)) for n in range(1200)]
    assert store.apply("r", batch, t) == 1200
    assert store.apply("r", [*batch[:3], Change("s0", 2, part("b", 1.0))], t) == 1
    assert store.apply("r", [Change("new", 1, part("a", 0.0)), Change("new", 1, part("a", 0.0))], t) == 1
    assert store.sums("r") == {Cell("", "a", 0): Sums(1200.0, 599.5, 299.75), Cell("", "b", 0): Sums(1.0, 1.0, 1.0)}


def test_the_count_of_changes_moves_whenever_the_sums_may_have(store: Store) -> None:
    t = token(store)
    assert store.changes("r") == 0
    store.apply("r", [Change("s", 1, part("a", 0.5))], t)
    one = store.changes("r")
    store.apply("r", [Change("s", 1, part("a", 0.5))], t)
    assert store.changes("r") == one > 0
    store.clear("r", t)
    assert store.changes("r") > one
    assert store.changes("other") == 0


def test_metrics_are_counted_beside_the_reward(store: Store) -> None:
    t = token(store)
    cells = {Cell("", "a", 0): Sums(1.0, 0.5, 0.25), Cell("", "a", 0, "cost"): Sums(1.0, 0.002, 0.000004)}
    store.apply("r", [Change("s", 1, cells)], t)
    assert store.sums("r") == cells
    store.apply("r", [Change("s", 2, {Cell("", "a", 0, "cost"): Sums(1.0, 0.5, 0.25)})], t)
    found = store.sums("r")
    assert (found[Cell("", "a", 0)].n, found[Cell("", "a", 0, "cost")].s) == (0.0, pytest.approx(0.5))


def test_what_was_learned_is_kept_by_name_and_only_by_the_controller(opened: Open) -> None:
    store = opened()
    t = token(store)
    assert store.kept("model") is None
    store.keep("model", b'{"a": 1}', t)
    store.keep("model", b"\x00\xff", t)
    assert (store.kept("model"), store.kept("other")) == (b"\x00\xff", None)
    token(opened(), "two", NOW + 9)
    with pytest.raises(Fenced):
        store.keep("model", b"old", t)


def test_a_file_of_an_older_version_keeps_its_sums(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    connect(path, "store", MIGRATIONS[:1]).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("INSERT INTO sums VALUES ('r', '', 'a', 0, 1.0, 0.5, 0.25)")
        db.execute("INSERT INTO contributions VALUES ('r', 's', 1, ?)", (b'[["","a",0,1.0,0.5,0.25]]',))
        db.commit()
    store = SqliteStore(path)
    assert store.sums("r") == part("a", 0.5)
    store.apply("r", [Change("s", 2, part("b", 1.0))], 1)
    assert store.sums("r") == {Cell("", "a", 0): Sums()} | part("b", 1.0)
    store.close()


def test_routes_and_segments_are_kept_apart(store: Store) -> None:
    t = token(store)
    store.apply("r", [Change("s", 1, part("a", 1.0, segment="code"))], t)
    store.apply("r", [Change("s2", 1, part("a", 0.5, segment="mail: x/y"))], t)
    store.apply("other", [Change("s", 1, part("a", 0.0))], t)
    assert {cell.segment: v.s for cell, v in store.sums("r").items()} == {"code": 1.0, "mail: x/y": 0.5}


changes = st.lists(
    st.tuples(st.sampled_from("stuv"), st.integers(1, 6), st.sampled_from("ab"), st.floats(0, 1)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes)
def test_whatever_the_order_and_repetition_the_sums_are_those_of_the_newest_revisions(
    opened: Open, changes: list[tuple[str, int, str, float]]
) -> None:
    store = opened()
    t = token(store)
    route = f"r{id(changes)}-{len(changes)}-{hash(tuple(changes))}"
    newest: dict[str, tuple[int, str, float]] = {}
    for session, revision, arm, reward in [*changes, *changes[::-1]]:
        store.apply(route, [Change(session, revision, part(arm, reward))], t)
        if session not in newest or revision > newest[session][0]:
            newest[session] = (revision, arm, reward)
    found = store.sums(route)
    store.close()
    for arm in "ab":
        rewards = [reward for _, a, reward in newest.values() if a == arm]
        sums = found.get(Cell("", arm, 0), Sums())
        wanted = (len(rewards), sum(rewards), sum(r * r for r in rewards))
        assert (sums.n, sums.s, sums.ss) == pytest.approx(wanted, abs=1e-9)


def test_snapshots_and_marks_are_read_as_they_were_written(opened: Open) -> None:
    store = opened()
    assert store.snapshot("r") is None
    assert store.marked("journal") == 0
    snapshot = Snapshot("r", 3, NOW, "thompson", 0.05, {"": {"a": 0.25, "b": 0.75}, "code": {"a": 1.0, "b": 0.0}}, True)
    t = token(store)
    store.publish(snapshot, t)
    store.mark("journal", 12345, t)
    again = opened()
    assert again.snapshot("r") == snapshot
    assert again.marked("journal") == 12345


def test_of_many_that_ask_for_the_lease_at_once_one_gets_it(opened: Open) -> None:
    stores = [opened() for _ in range(6)]
    with ThreadPoolExecutor(6) as crew:
        given = list(crew.map(lambda n: stores[n].lease(f"owner-{n}", 4.0, NOW), range(6)))
    assert [lease for lease in given if lease is not None] == [stores[0].holder()]


def test_session_keys_never_collide() -> None:
    assert session_key("a", "b/c") != session_key("a/b", "c")
    assert session_key("1:a", "b") != session_key("1", "a/b")


def test_keys_are_listed_and_revoked(store: Store) -> None:
    import msgspec

    _, key = new_key("acme", "app", NOW)
    store.put_key(key)
    store.put_key(msgspec.structs.replace(key, revoked=True))
    assert store.list_keys() == [msgspec.structs.replace(key, revoked=True)]


def test_a_secret_is_made_once_though_many_ask(opened: Open) -> None:
    found: list[bytes] = []
    stores = [opened() for _ in range(8)]
    threads = [
        threading.Thread(target=lambda n=n: found.append(stores[n].secret("signing", bytes([n]) * 8))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    stores[0].secret("other", b"x")
    assert stores[1].secrets() == {"signing": found[0], "other": b"x"}
    stores[2].drop_secret("signing")
    stores[2].drop_secret("signing")
    assert stores[1].secrets() == {"other": b"x"}


def test_a_document_is_swapped_only_where_the_old_one_stands(opened: Open) -> None:
    one, two = opened(), opened()
    assert one.read("a") is None
    assert not one.swap("a", b"x", b"y"), "there is none yet"
    assert one.swap("a", None, b"\x00\xff")
    assert not two.swap("a", None, b"y")
    assert not two.swap("a", b"", b"y")
    assert two.swap("a", b"\x00\xff", b""), "an empty document is one"
    assert one.read("a") == b""
    assert not one.swap("a", None, b"z")
    assert not one.swap("a", b"\x00\xff", None)
    assert one.swap("a", b"", None)
    assert two.read("a") is None
    assert two.swap("a", None, None)
    assert two.names("") == []


def test_documents_are_listed_by_the_beginning_of_their_names(store: Store) -> None:
    for name in ("v/b/1", "v/a%/2", "v/a/10", "v/a/9", "w", "v/aé"):
        assert store.swap(name, None, b"x")
    assert store.names("v/a/") == ["v/a/10", "v/a/9"]
    assert store.names("v/a%") == ["v/a%/2"]
    assert store.names("v/a_") == []
    assert store.names("") == sorted(["v/b/1", "v/a%/2", "v/a/10", "v/a/9", "w", "v/aé"])


def test_of_many_that_swap_at_once_one_does(opened: Open) -> None:
    stores = [opened() for _ in range(6)]
    for round_ in range(10):
        before = stores[0].read("a")
        with ThreadPoolExecutor(6) as crew:
            done = list(crew.map(lambda n: stores[n].swap("a", before, b"%d-%d" % (round_, n)), range(6)))  # noqa: B023
        assert sum(done) == 1
        assert stores[0].read("a") == b"%d-%d" % (round_, done.index(True))


def test_documents_need_no_lease_and_outlive_a_cleared_route(opened: Open) -> None:
    old = opened()
    token(old)
    token(opened(), "two", NOW + 9)
    assert old.swap("a", None, b"x")
    old.clear("r", 10**15)
    assert old.read("a") == b"x"


WRITER = """
import sys
from pathlib import Path
from router.arms import Cell, Sums
from router.store import Change
from router.store_sqlite import SqliteStore

store = SqliteStore(Path(sys.argv[1]))
for n in range(50):
    store.apply("r", [Change(f"{sys.argv[2]}-{n}", 1, {Cell("", "a", 0): Sums(1.0, 0.5, 0.25)})], 1)
store.close()
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    crew = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(who)], cwd=ROOT) for who in range(3)]
    assert [process.wait(60) for process in crew] == [0, 0, 0]
    assert store.sums("r")[Cell("", "a", 0)] == Sums(150.0, 75.0, 37.5)
    store.close()


def test_redis_away_is_said_by_every_call_and_it_works_again_when_back() -> None:
    with RedisServer() as server:
        store = RedisStore(server.url, timeout=0.5)
        t = token(store)
        server.stop()
        calls: list[Callable[[], object]] = [
            store.ping,
            lambda: store.lease("one", 4.0, NOW),
            lambda: store.release("one"),
            store.holder,
            lambda: store.apply("r", [Change("s", 1, part("a", 1.0))], t),
            lambda: store.clear("r", t),
            lambda: store.changes("r"),
            lambda: store.publish(Snapshot("r", 1, NOW, "split", 0.0, {"": {"a": 1.0}}), t),
            lambda: store.mark("journal", 1, t),
            lambda: store.sums("r"),
            lambda: store.snapshot("r"),
            lambda: store.marked("journal"),
            lambda: store.keep("model", b"x", t),
            lambda: store.kept("model"),
            lambda: store.assign([("r", "t", "s", Choice("a", 1.0))], 60.0, NOW),
            lambda: store.recall("r", "t", "s", frozenset("a"), NOW),
            lambda: store.put_key(new_key("acme", "app", NOW)[1]),
            store.list_keys,
            lambda: store.secret("signing", b"x"),
            store.secrets,
            lambda: store.drop_secret("signing"),
            lambda: store.read("a"),
            lambda: store.swap("a", None, b"x"),
            lambda: store.names(""),
        ]
        for call in calls:
            began = time.monotonic()
            with pytest.raises(StateUnavailable, match=f"127.0.0.1:{server.port}.*; check that it runs"):
                call()
            assert time.monotonic() - began < 3.0
        server.start()
        assert store.apply("r", [Change("s", 1, part("a", 1.0))], token(store)), "scripts are loaded anew"
        assert store.swap("a", None, b"x")
        store.close()


def test_a_redis_url_with_a_password_is_not_repeated_in_errors() -> None:
    store = RedisStore("redis://:hush@127.0.0.1:1/0", timeout=0.5)
    with pytest.raises(StateUnavailable) as raised:
        store.ping()
    assert "hush" not in str(raised.value)


def test_a_locked_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    store._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StateLocked, match=r"state\.db: locked by another program"):
        store.put_key(new_key("acme", "app", NOW)[1])
    other.execute("ROLLBACK")
    store.put_key(new_key("acme", "app", NOW)[1])
    assert store.list_keys()
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StateLocked):
        store.swap("a", None, b"x")
    other.execute("ROLLBACK")
    assert store.swap("a", None, b"x")
    other.close()
    store.close()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(StateReadOnly, match="cannot be opened; its folder must exist"):
        SqliteStore(tmp_path / "none" / "state.db")


def test_a_file_that_is_no_database_is_said_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"Dear diary, " * 1000)
    with pytest.raises(StateError, match="not a state file of understudy"):
        SqliteStore(path)
    assert path.read_bytes().startswith(b"Dear diary")


def test_a_file_from_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    SqliteStore(path).close()
    db = sqlite3.connect(path)
    with db:
        db.execute("UPDATE schema_version SET version = 99 WHERE owner = 'store'")
    db.close()
    with pytest.raises(StateVersion, match="upgrade understudy"):
        SqliteStore(path)


def test_a_read_only_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    store._db.execute("PRAGMA query_only = ON")  # as for a user who may not write (root may always)
    with pytest.raises(StateReadOnly, match="check its owner and mode"):
        store.put_key(new_key("acme", "app", NOW)[1])
    store.close()
