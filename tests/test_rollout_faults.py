"""Rollouts whose controller is killed, overtaken or robbed of its store at every write: they end as without."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis_server import RedisServer
from rollout_house import LEAD, ROUTE, House, rules

from learner.registry import Registry
from router.controller import LEASE_SECONDS, Controller
from router.rollout import Refused
from router.rollout_controller import ask, load, propose, undo
from router.store import Store
from router.store_redis import RedisStore
from router.store_sqlite import SqliteStore
from telemetry.errors import Fenced, StateError, StateUnavailable

WRITES = frozenset({"apply", "publish", "mark", "keep", "swap", "append"})
RULES = rules({"share": 0.2}, {"share": 1.0})


class Killed(Exception):
    """The process ended here."""


class Fate:
    """What befalls a controller at the nth of its writes to the store and the journal."""

    def __init__(self, nth: int, when: str, befalls: Callable[[], object]) -> None:
        self._nth, self._when, self._befalls = nth, when, befalls
        self.writes = 0
        self.names: list[str] = []

    def over(self, real: Any, only: frozenset[str] = WRITES) -> Any:
        fate = self

        class Watched:
            def __getattr__(self, name: str) -> Any:
                method = getattr(real, name)
                return fate.call(name, method) if name in only else method

        return Watched()

    def call(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*values: Any) -> Any:
            turn = self.writes
            self.writes += 1
            self.names.append(f"{name} {values[0]}" if isinstance(values[0], str) else name)
            if turn == self._nth and self._when == "before":
                self._befalls()
            done = method(*values)
            if turn == self._nth and self._when == "after":
                self._befalls()
            return done

        return write


def kills() -> None:
    raise Killed


def fails() -> None:
    raise StateUnavailable("Redis does not answer")


class Place:
    """A house whose controller may die: then another one goes on at the same moment."""

    def __init__(self, folder: Path, store: Store, fate: Fate) -> None:
        self.house = House(folder, store, rollout=RULES)
        self.fate = fate
        self._one: Controller | None = None

    def step(self, seconds: float = 11.0) -> None:
        self.house.now += seconds
        for _ in range(3):
            if self._one is None:
                self._one = self.house.controller(
                    store=self.fate.over(self.house.store), journal=self.fate.over(self.house.journal)
                )
            try:
                while self._one.step(self.house.now):
                    pass
                return
            except Killed:
                self._one = None
            except StateError:
                pass  # as `run` does: the same one tries again
            self.sound()
        raise AssertionError("it does not go on")

    def sound(self) -> None:
        aliases = self.house.registry.aliases(ROUTE)
        held = [version for version in (aliases.get("champion"), aliases.get("challenger")) if version]
        assert len(set(held)) == len(held), "champion and challenger at once"
        rollout = load(self.house.store, ROUTE)[1]
        if rollout is not None and rollout.phase in ("rolling_back", "rolled_back"):
            assert aliases.get("champion") != rollout.challenger


def is_undone(place: Place) -> None:
    version = place.house.propose()
    for _ in range(2):
        place.step()
    for _ in range(2):
        place.house.judged(version, 25, 1.0, 0.0)
        place.step()
    place.step()
    house = place.house
    assert house.rollout.phase == "promoted"
    undo(house.store, house.registry, ROUTE, "ann", "no", house.now, house.rules)
    place.step()


def rolls_back(place: Place) -> None:
    version = place.house.propose()
    for _ in range(2):
        place.step()
    place.house.judged(version, 25, 0.0, 1.0)
    place.step()
    place.step()


def pauses(place: Place) -> None:
    version = place.house.propose()
    for _ in range(2):
        place.step()
    place.house.judged(version, 10, 1.0, 0.0)
    place.house.ask("pause")
    place.step()
    place.house.ask("resume")
    place.house.registry.tag(version, "erased", "a user's rows")
    place.step()
    place.step()


STORIES = {story.__name__: story for story in (is_undone, rolls_back, pauses)}


def end(house: House) -> dict[str, Any]:
    """What must be the same however often it was killed."""
    rollout, snapshot, record = house.rollout, house.snapshot, house.record
    ids = [one.event_id for one in record]
    assert len(set(ids)) == len(ids), "on record twice"
    assert record == list(rollout.decisions), "all of it is on record"
    return {
        "phase": (rollout.phase, rollout.step, rollout.why, rollout.share, rollout.waits),
        "decisions": [(one.number, one.verb, one.actor, one.phase, one.why) for one in record],
        "evidence": [one.evidence.get("challenger", {}).get("judged") for one in record],
        "aliases": house.registry.aliases(ROUTE),
        "tags": house.registry.tags(rollout.challenger),
        "parts": (snapshot.lead, snapshot.versions, snapshot.kept, snapshot.rollout, snapshot.challenger),
        "weights": {arm: round(weight, 2) for arm, weight in snapshot.segments[""].items()},
    }


class Backend:
    """Gives an empty store each time."""

    def __init__(self, folder: Path, url: str | None) -> None:
        self._folder, self._url, self._opened = folder, url, 0

    @contextlib.contextmanager
    def house(self) -> Iterator[tuple[Path, Store]]:
        self._opened += 1
        folder = self._folder / str(self._opened)
        folder.mkdir()
        if self._url:
            with contextlib.closing(redis.Redis.from_url(self._url)) as client:
                client.flushall()
        store: Store = RedisStore(self._url, timeout=10) if self._url else SqliteStore(folder / "state.db")
        with contextlib.closing(store):
            yield folder, store

    def play(self, story: Callable[[Place], None], fate: Fate) -> dict[str, Any]:
        with self.house() as (folder, store):
            place = Place(folder / "house", store, fate)
            with contextlib.closing(place.house):
                story(place)
                place.sound()
                return end(place.house)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with RedisServer() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "redis"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return Backend(tmp_path, request.getfixturevalue("redis_url") if request.param == "redis" else None)


# Killed.


@pytest.mark.parametrize("story", sorted(STORIES))
def test_killed_before_or_after_any_write_a_rollout_ends_as_without(backend: Backend, story: str) -> None:
    whole = Fate(-1, "", kills)
    expected = backend.play(STORIES[story], whole)
    assert {"publish", "keep", "swap", "append"} <= {name.split()[0] for name in whole.names}
    for nth in range(whole.writes):
        when = "after" if nth % 2 else "before"
        found = backend.play(STORIES[story], Fate(nth, when, kills))
        assert found == expected, f"killed {when} write {nth}, {whole.names[nth]}"


@pytest.mark.parametrize("story", ["is_undone", "rolls_back"])
def test_with_a_redis_that_fails_at_any_write_the_same_controller_goes_on(
    tmp_path: Path, redis_url: str, story: str
) -> None:
    backend = Backend(tmp_path, redis_url)
    whole = Fate(-1, "", kills)
    expected = backend.play(STORIES[story], whole)
    for nth in range(whole.writes):
        if whole.names[nth] != "append":
            when = "before" if nth % 2 else "after"
            found = backend.play(STORIES[story], Fate(nth, when, fails))
            assert found == expected, f"failed {when} write {nth}, {whole.names[nth]}"


# An operator's undo, killed.


def promoted_twice(house: House) -> tuple[str, str]:
    """Two versions, of which the second took the first one's place."""
    names = []
    for n in (1, 2):
        names.append(house.begun(n))
        for _ in range(4):
            house.judged(names[-1], 25, 1.0, 0.0)
            house.step(11.0)
            if house.rollout.phase == "promoted":
                break
        assert house.rollout.phase == "promoted"
    return names[0], names[1]


SWAPS = frozenset({"swap"})
TELLING = frozenset({"swap", "publish", "keep"})


@pytest.mark.parametrize("again", [True, False])
def test_an_undo_that_is_killed_is_finished_by_whoever_comes_and_goes_back_once(tmp_path: Path, again: bool) -> None:
    backend = Backend(tmp_path, None)
    for nth in range(20):
        for when in ("before", "after"):
            with backend.house() as (folder, store):
                house = House(folder / "house", store, rollout=RULES)
                first, second = promoted_twice(house)
                fate = Fate(nth, when, kills)
                dying = fate.over(store, SWAPS)
                killed = False
                try:
                    undo(dying, Registry(dying), ROUTE, "ann", "no", house.now, house.rules)
                except Killed:
                    killed = True
                begun = house.rollout.phase != "promoted"
                if again and house.rollout.phase != "undone":
                    undo(store, house.registry, ROUTE, "ann", "no", house.now, house.rules)
                    begun = True
                house.step()
                expected = (first, "undone", True) if begun else (second, "promoted", False)
                aliases = house.registry.aliases(ROUTE)
                bad = "quarantined" in house.registry.tags(second)
                assert (aliases.get("champion"), house.rollout.phase, bad) == expected, (nth, when)
                assert "quarantined" not in house.registry.tags(first)
                assert house.snapshot.segments[""] == {expected[0]: 1.0}
                house.close()
        if not killed:
            break
    assert nth >= 4, "it writes the decision, the tag, the aliases and the end"


def test_a_proposal_that_is_killed_can_be_made_again(backend: Backend) -> None:
    for nth in range(4, 10):
        for when in ("before", "after"):
            with backend.house() as (folder, store):
                house = House(folder / "house", store, rollout=RULES)
                version = house.propose()
                house.ask("rollback")
                house.step()
                house.registry.tag(version, "quarantined", None)
                fate = Fate(nth - 4, when, kills)
                dying = fate.over(store, SWAPS)
                with contextlib.suppress(Killed):
                    propose(dying, Registry(dying), ROUTE, version, "learner", "", house.now)
                house.step()
                propose(store, house.registry, ROUTE, version, "learner", "", house.now)
                house.step()
                assert house.registry.aliases(ROUTE) == {"challenger": version}
                assert (house.rollout.number, house.rollout.phase) == (2, "running")
                house.close()


def to(phase: str, house: House) -> str:
    """A second challenger, in that phase, beside a champion that was promoted before."""
    second = house.propose(2)
    if phase == "pending":
        return second
    house.step()
    house.step()
    if phase == "paused":
        house.ask("pause")
    if phase in ("promoting", "promoted", "undoing", "undone"):
        house.ask("promote")
    if phase in ("rolling_back", "rolled_back"):
        house.ask("rollback")
    if phase in ("promoted", "rolled_back", "undoing", "undone"):
        house.step()
    if phase == "undoing":
        dying = Fate(1, "before", kills).over(house.store, SWAPS)
        with contextlib.suppress(Killed):
            undo(dying, Registry(dying), ROUTE, "bob", "no", house.now, house.rules)
    if phase == "undone":
        undo(house.store, house.registry, ROUTE, "bob", "no", house.now, house.rules)
    assert house.rollout.phase == phase
    return second


@pytest.mark.parametrize(
    ("phase", "back_to_first"),
    [
        *((phase, False) for phase in ("pending", "running", "paused", "rolling_back", "rolled_back", "undone")),
        *((phase, True) for phase in ("promoting", "promoted", "undoing")),
    ],
)
def test_undo_in_any_phase_brings_back_the_champion_before(tmp_path: Path, phase: str, back_to_first: bool) -> None:
    backend = Backend(tmp_path, None)
    with backend.house() as (folder, store):
        house = House(folder / "house", store, rollout=RULES)
        first = house.begun(1)
        house.ask("promote")
        house.step()
        second = to(phase, house)
        gone, back = undo(store, house.registry, ROUTE, "ann", "no", house.now, house.rules)
        house.step()
        house.step()
        assert (gone, back) == ((second, first) if back_to_first else (first, None))
        assert house.registry.aliases(ROUTE) == ({"champion": first} if back_to_first else {})
        assert house.snapshot.segments[""] == {first if back_to_first else LEAD: 1.0}
        assert "quarantined" in house.registry.tags(gone)
        assert "quarantined" in house.registry.tags(second)
        assert not house.rollout.active
        assert "undo" in house.verbs
        house.close()


# Two at once.


@pytest.mark.parametrize("story", ["promoted", "rolled_back"])
def test_a_controller_that_is_overtaken_at_any_write_changes_nothing(tmp_path: Path, story: str) -> None:
    backend = Backend(tmp_path, None)
    like = 1.0 if story == "promoted" else 0.0
    for nth in range(100):
        with backend.house() as (folder, store):
            house = House(folder / "house", store, rollout=RULES)
            version = house.begun()
            two = house.controller("two")
            overtaken: list[bool] = []

            def overtake(house: House = house, two: Controller = two, overtaken: list[bool] = overtaken) -> None:
                overtaken.append(True)
                later = house.now + LEASE_SECONDS + 1
                for n in range(3):
                    two.step(later + 2 * n)

            fate = Fate(nth, "before", overtake)
            one = house.controller("one", store=fate.over(store, TELLING), journal=fate.over(house.journal))
            for _ in range(3):
                house.judged(version, 25, like, 1.0 - like)
                with contextlib.suppress(Fenced):
                    house.step(12.0, controller=one)
                house.now += LEASE_SECONDS
            for _ in range(3):
                house.step(12.0, controller=one)
                house.step(12.0, controller=two)
            assert house.rollout.phase == story
            decisions = house.journal.decisions(ROUTE)
            assert decisions == list(house.rollout.decisions)
            assert [one.number for one in decisions] == list(range(1, len(decisions) + 1))
            aliases = house.registry.aliases(ROUTE)
            assert aliases == ({"champion": version} if story == "promoted" else {})
            house.close()
        if not overtaken:
            break
    assert nth >= 6, "it writes decisions, aliases and weights, and puts them on record"


def test_who_gets_the_lease_again_knows_what_came_meanwhile(backend: Backend) -> None:
    with backend.house() as (folder, store):
        house = House(folder / "house", store, rollout=rules({"share": 0.2, "min_sessions": 60}, {"share": 1.0}))
        version = house.begun()
        two = house.controller("two")
        house.judged(version, 25, 1.0, 0.0)
        house.step()
        house.judged(version, 25, 1.0, 0.0)
        house.step(LEASE_SECONDS + 1, controller=two)
        house.ask("pause")
        house.step(controller=two)
        house.ask("resume")
        house.judged(version, 25, 1.0, 0.0)
        house.step(LEASE_SECONDS + 1)
        assert house.rollout.step == 1, "the sessions that the other one read count too"
        assert len({one.event_id for one in house.record}) == len(house.record), "none is on record twice"
        house.close()


# An operator against the controller.


def test_of_a_promotion_and_a_rollback_at_once_the_first_one_counts(backend: Backend) -> None:
    for first in ("operator", "controller"):
        with backend.house() as (folder, store):
            house = House(folder / "house", store, rollout=RULES)
            version = house.begun()
            house.judged(version, 60, 0.0, 1.0)
            if first == "operator":

                def promote(house: House = house) -> None:
                    house.ask("promote")

                fate = Fate(0, "before", promote)
                house.step(controller=house.controller(store=fate.over(store, SWAPS)))
                assert (house.rollout.phase, house.registry.aliases(ROUTE)) == ("promoted", {"champion": version})
            else:
                fate = Fate(0, "before", house.step)
                slow = fate.over(store, SWAPS)
                with pytest.raises(Refused, match="rolled back"):
                    ask(slow, ROUTE, "promote", "ann", "I like it", house.now, house.rules)
                assert (house.rollout.phase, house.registry.aliases(ROUTE)) == ("rolled_back", {})
            house.step()
            assert len({one.event_id for one in house.record}) == len(house.record)
            house.close()


# Robbed.


def test_a_redis_that_comes_back_empty_leaves_no_challenger_and_takes_another(tmp_path: Path) -> None:
    with RedisServer() as server, contextlib.closing(RedisStore(server.url, timeout=0.5)) as store:
        house = House(tmp_path / "house", store, rollout=RULES)
        version = house.begun()
        house.judged(version, 25, 1.0, 0.0)
        house.step()
        before, seen = house.rollout.id, len(house.record)
        server.stop()
        with pytest.raises(StateError):
            house.step()
        server.start()
        house.step()
        house.step()
        assert load(store, ROUTE)[1] is None
        assert house.snapshot.segments[""] == {LEAD: 1.0}
        assert len(house.record) == seen
        house.begun()
        assert house.rollout.id != before
        assert house.snapshot.rollout == house.rollout.id
        house.judged(version, 25, 0.0, 1.0)
        house.step()
        assert house.rollout.phase == "rolled_back"
        house.close()
