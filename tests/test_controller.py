"""The controller: whatever comes in between, each fact counts once and one controller writes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.arms import Cell, Sums
from router.controller import Controller
from router.plan import RoutePlan
from router.policy import Arm, Policy, Reward, Split, Thompson
from router.store import Change
from router.store_sqlite import SqliteStore
from telemetry.errors import Fenced, StateUnavailable
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal
from understudy import rebuild

NOW = time.time()
THEN = NOW - 1000
"""When the facts happened: their window is over."""
ARMS = {"a": Arm(model="base"), "b": Arm(model="good")}


class House:
    """A journal and a store, and controllers on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal.db")
        self.store = SqliteStore(folder / "state.db")

    def controller(self, owner: str = "one", policy: Policy | None = None, store: Any = None) -> Controller:
        plan = RoutePlan("r", ARMS, policy or Thompson(), Reward())
        return Controller([plan], self.journal, store or self.store, owner)

    def sums(self, store: SqliteStore | None = None) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for cell, v in (store or self.store).sums("r").items():
            n, s = found.get(cell.arm, (0.0, 0.0))
            found[cell.arm] = (round(n + v.n, 9), round(s + v.s, 9))
        return {arm: v for arm, v in found.items() if v[0]}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.journal.close()
    house.store.close()


def answered(name: str, arm: str = "a", session: str | None = None, **fields: Any) -> Interaction:
    known = {"event_id": f"e-{name}", "at": THEN, "request_id": name, "input_hash": name} | fields
    return Interaction(
        route="r",
        tenant="t",
        session=session or f"s-{name}",
        answerer=Answerer(arm, arm),
        **known,
    )


def vote(name: str, value: float, event: str | None = None) -> Signal:
    return Signal(event or f"v-{name}-{value}", THEN, "thumb", "t", response_id=name, value=value)


def settle(controller: Controller, now: float = NOW) -> None:
    while controller.step(now):
        pass


FACTS: list[Fact] = [
    answered("1", "a"), vote("1", 1.0), answered("2", "b"), vote("2", 0.0), answered("3", "b"), answered("4", "a"),
    vote("4", 0.0), vote("4", 1.0, "changed"), answered("5", "b", "s-2"), vote("5", 1.0), vote("none", 1.0),
    answered("6", "a"), answered("6-again", "a", "s-6", input_hash="6", at=THEN + 5),
]  # fmt: skip
EXPECTED = {"a": (3.0, 1.0 + 1.0 + 0.2), "b": (1.0, 0.5)}


def test_facts_become_sums_and_weights(house: House) -> None:
    house.journal.append(FACTS)
    controller = house.controller()
    settle(controller)
    settle(controller)
    assert house.sums() == EXPECTED
    snapshot = house.store.snapshot("r")
    assert snapshot is not None
    assert snapshot.segments[""]["a"] > snapshot.segments[""]["b"]
    assert sum(snapshot.segments[""].values()) == pytest.approx(1.0)


def test_the_order_in_which_facts_come_does_not_matter(house: House, tmp_path: Path) -> None:
    votes = [fact for fact in FACTS if isinstance(fact, Signal)]
    answers = [fact for fact in FACTS if isinstance(fact, Interaction)]
    for fact in [*votes, *answers]:
        house.journal.append([fact])
        settle(house.controller())
    assert house.sums() == EXPECTED


def test_weights_that_did_not_move_are_not_published_again(house: House) -> None:
    house.journal.append(FACTS)
    settle(house.controller())
    first = house.store.snapshot("r")
    settle(house.controller())
    assert house.store.snapshot("r") == first


def test_a_regeneration_is_heard_once_though_its_facts_are_read_twice(house: House) -> None:
    house.journal.append(FACTS)
    settle(house.controller())
    house.store.mark("journal", 0, 99)
    settle(house.controller())
    heard = [f for _, f in house.journal.read(0, 100) if isinstance(f, Signal) and f.kind == "regenerate"]
    assert [s.response_id for s in heard] == ["6"]


def test_late_feedback_changes_what_a_session_contributes(house: House) -> None:
    house.journal.append([answered("1"), vote("1", 0.0)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 0.0)}
    house.journal.append([vote("1", 1.0, "later")])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 1.0)}


class Dies(Exception):
    pass


class Mortal:
    """A store that dies at its nth write."""

    def __init__(self, store: SqliteStore, at: int) -> None:
        self._store = store
        self._left = at

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        return self._counting(found) if name in ("apply", "publish", "mark") else found

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Dies
            return call(*args)

        return write


@pytest.mark.parametrize("at", range(15))
def test_killed_at_any_write_and_started_again_it_counts_the_same(house: House, at: int) -> None:
    house.journal.append(FACTS)
    try:
        settle(house.controller(store=Mortal(house.store, at)))
    except Dies:
        assert at < 14
    settle(house.controller())
    assert house.sums() == EXPECTED


def test_an_emptied_store_is_filled_again_from_the_journal(house: House, tmp_path: Path) -> None:
    house.journal.append(FACTS)
    settle(house.controller())
    empty = SqliteStore(tmp_path / "empty.db")
    settle(house.controller(store=empty))
    assert house.sums(empty) == house.sums() == EXPECTED
    empty.close()


def test_a_mark_of_another_journal_is_not_trusted(house: House) -> None:
    house.store.mark("journal", 10_000, 0)
    house.journal.append(FACTS)
    settle(house.controller())
    assert house.sums() == EXPECTED


def test_a_second_controller_waits_and_takes_over_within_five_seconds(house: House) -> None:
    house.journal.append(FACTS[:2])
    one, two = house.controller("one"), house.controller("two")
    one.step(NOW)
    house.journal.append(FACTS[2:4])
    assert not two.step(NOW + 1)
    assert house.sums() == {"a": (1.0, 1.0)}, "the second one does not write"
    two.step(NOW + 5)
    assert house.sums() == {"a": (1.0, 1.0), "b": (1.0, 0.0)}
    one.step(NOW + 5.5)
    assert house.store.holder().owner == "two"  # type: ignore[union-attr]


def test_a_controller_that_slept_through_its_lease_is_fenced(house: House) -> None:
    old = house.store.lease("old", 4.0, NOW)
    assert old is not None
    settle(house.controller("new"), NOW + 5)
    with pytest.raises(Fenced):
        house.store.apply("r", [Change("1:t/x", 1, {Cell("", "a", 0): Sums(1, 1, 1)})], old.token)
    assert house.sums() == {}


def test_segments_keep_their_own_sums_and_weights(house: House) -> None:
    for n in range(120):
        segment, arm = ("code", "mail")[n % 2], "ab"[n // 2 % 2]
        good = (segment == "code") == (arm == "a")
        fact = answered(str(n), arm)
        fact = Interaction(
            **{f: getattr(fact, f) for f in fact.__struct_fields__} | {"answerer": Answerer(arm, arm, segment=segment)}
        )
        house.journal.append([fact, vote(str(n), float(good))])
    settle(house.controller(policy=Thompson(segment_by="task_type")))
    snapshot = house.store.snapshot("r")
    assert snapshot is not None
    assert snapshot.segments["code"]["a"] > 0.9
    assert snapshot.segments["mail"]["b"] > 0.9


def test_too_many_segments_are_capped_and_said(house: House, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(8):
        fact = Interaction(
            f"e{n}", NOW, f"r{n}", "r", "t", f"s{n}", Answerer("a", "base", segment=f"task-{n}"), input_hash=str(n)
        )
        house.journal.append([fact, vote(f"r{n}", 1.0)])
    controller = house.controller(policy=Thompson(segment_by="task_type", max_segments=3))
    settle(controller)
    settle(controller)
    snapshot = house.store.snapshot("r")
    assert snapshot is not None
    assert snapshot.full
    assert len(snapshot.segments) == 4
    assert sum("no more get weights of their own" in r.message for r in caplog.records) == 1


def test_a_split_publishes_what_is_written(house: House) -> None:
    settle(house.controller(policy=Split(kind="split", shares={"a": 0.9, "b": 0.1})))
    snapshot = house.store.snapshot("r")
    assert snapshot is not None
    assert snapshot.segments == {"": {"a": 0.9, "b": 0.1}}


def test_running_it_outlives_an_outage_of_the_store(house: House, caplog: pytest.LogCaptureFixture) -> None:
    import threading

    house.journal.append(FACTS)
    stopping = threading.Event()

    class Away:
        """Away for the first three rounds."""

        def __init__(self) -> None:
            self.rounds = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(house.store, name)

        def lease(self, *args: Any) -> Any:
            self.rounds += 1
            if self.rounds <= 3:
                raise StateUnavailable("gone")
            return house.store.lease(*args)

        def mark(self, *args: Any) -> None:
            house.store.mark(*args)
            if house.sums() == EXPECTED or self.rounds > 100:
                stopping.set()

    house.controller(policy=Thompson(refresh=0.01), store=Away()).run(stopping)
    assert house.sums() == EXPECTED
    assert [r.message for r in caplog.records] == ["gone; trying again"]
    assert house.store.holder().owner == ""  # type: ignore[union-attr]


# Maturity: behaviour waits for the window.


def copied(name: str, at: float = THEN + 1.0) -> Signal:
    return Signal(f"c-{name}", at, "copy", "t", response_id=name)


def test_behaviour_counts_a_window_after_it_was_heard(house: House) -> None:
    house.journal.append([answered("1"), copied("1"), answered("2", "b"), vote("2", 1.0)])
    settle(house.controller(), THEN + 600.5)
    assert house.sums() == {"b": (1.0, 1.0)}, "a vote does not wait"
    settle(house.controller(), THEN + 601.0)
    assert house.sums() == {"a": (1.0, 0.65), "b": (1.0, 1.0)}


def test_a_restart_forgets_nothing_that_waits(house: House) -> None:
    house.journal.append([answered("1"), copied("1"), answered("2", "b"), copied("2", THEN + 300.0)])
    one = house.controller()
    settle(one, THEN + 10.0)
    settle(one, THEN + 601.0)
    assert house.sums() == {"a": (1.0, 0.65)}
    settle(house.controller("two"), THEN + 900.0)
    assert house.sums() == {"a": (1.0, 0.65), "b": (1.0, 0.65)}


def test_a_store_that_was_emptied_counts_at_once_what_has_waited(house: House, tmp_path: Path) -> None:
    house.journal.append([answered("1"), copied("1"), answered("2", "b"), copied("2", THEN + 500.0)])
    controller = house.controller()
    settle(controller, THEN + 700.0)
    empty = SqliteStore(tmp_path / "empty.db")
    controller._store = empty
    settle(controller, THEN + 701.0)
    assert house.sums(empty) == house.sums() == {"a": (1.0, 0.65)}
    empty.close()


def test_a_clock_that_is_set_back_destroys_no_reward(house: House) -> None:
    house.journal.append([answered("1"), copied("1")])
    settle(house.controller(), THEN + 601.0)
    settle(house.controller(), THEN - 86400.0)
    house.journal.append([vote("1", 1.0)])
    settle(house.controller(), THEN - 86400.0 + 1)
    assert house.sums() == {"a": (1.0, 1.0)}


def test_routes_wait_each_for_its_own_window(house: House) -> None:
    plans = [RoutePlan(name, ARMS, Thompson(), Reward(window=window)) for name, window in (("r", 600.0), ("s", 60.0))]
    house.journal.append([answered("1"), copied("1"), msgspec.structs.replace(answered("2"), route="s"), copied("2")])
    settle(Controller(plans, house.journal, house.store, "one"), THEN + 100.0)
    assert house.sums() == {}
    assert [v.n for v in house.store.sums("s").values()] == [1.0]


def test_a_comparison_rewards_one_session_and_the_other_one_not(house: House) -> None:
    house.journal.append([answered("1", "a"), answered("2", "b")])
    target = {"winner": "2", "loser": "1"}
    house.journal.append([Signal("c", THEN + 1, "comparison", "t", response_id="2", target=target)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 0.0), "b": (1.0, 1.0)}
    house.journal.append([Signal("c2", THEN + 2, "comparison", "t", response_id="1", target={"tie": ["1", "2"]})])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 0.0), "b": (1.0, 1.0)}


def test_a_comparison_sent_again_the_other_way_round_counts_the_other_way_round(house: House) -> None:
    house.journal.append([answered("1", "a"), answered("2", "b"), answered("3", "b")])
    one, other = {"winner": "2", "loser": "1"}, {"winner": "1", "loser": "2"}
    for n, (target, sums) in enumerate(
        [
            (one, {"a": (1.0, 0.0), "b": (1.0, 1.0)}),
            (one, {"a": (1.0, 0.0), "b": (1.0, 1.0)}),
            (other, {"a": (1.0, 1.0), "b": (1.0, 0.0)}),
            ({"tie": ["1", "2"]}, {}),
            ({"both_bad": ["1", "2"]}, {"a": (1.0, 0.0), "b": (1.0, 0.0)}),
        ]
    ):
        house.journal.append([Signal("c", THEN + n, "comparison", "t", response_id="1", target=target)])
        settle(house.controller())
        assert house.sums() == sums, target


def test_an_event_that_is_told_of_another_session_counts_there_only(house: House) -> None:
    house.journal.append([answered("1", "a"), answered("2", "b")])
    house.journal.append([Signal("e", THEN + 1, "thumb", "t", response_id="1", value=1.0)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 1.0)}
    house.journal.append([Signal("e", THEN + 2, "thumb", "t", response_id="2", value=1.0)])
    settle(house.controller())
    assert house.sums() == {"b": (1.0, 1.0)}
    house.journal.append([Signal("e", THEN + 3, "thumb", "another tenant", response_id="1", value=1.0)])
    settle(house.controller())
    assert house.sums() == {"b": (1.0, 1.0)}


def test_what_names_a_trace_that_two_sessions_share_is_about_one_answer_of_it(house: House) -> None:
    one = answered("1", "a", at=THEN, trace_id="x" * 32)
    two = answered("2", "b", at=THEN + 10, trace_id="x" * 32)
    house.journal.append([one, two, Signal("e", THEN + 20, "thumb", "t", trace_id="x" * 32, value=1.0)])
    settle(house.controller())
    assert house.sums() == {"b": (1.0, 1.0)}, "the last one then"
    house.journal.append([answered("3", "a", one.session, at=THEN + 30, trace_id="x" * 32)])
    settle(house.controller())
    assert house.sums() == {"b": (1.0, 1.0)}, "whatever comes later, and whichever session is looked at"
    house.journal.append([Signal("f", THEN + 5, "thumb", "t", trace_id="x" * 32, value=0.0)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 0.0), "b": (1.0, 1.0)}
    plan = RoutePlan("r", ARMS, Thompson(), Reward())
    assert all(row["same"] for row in rebuild.compare([plan], house.store, house.journal))


def test_a_vote_on_a_trace_moves_to_the_answer_that_was_meant_when_that_is_journaled(house: House) -> None:
    house.journal.append([answered("1", "a", at=THEN, trace_id="x" * 32)])
    house.journal.append([Signal("e", THEN + 20, "thumb", "t", trace_id="x" * 32, value=1.0)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 1.0)}
    house.journal.append([answered("2", "b", at=THEN + 10, trace_id="x" * 32)])
    settle(house.controller())
    assert house.sums() == {"b": (1.0, 1.0)}
    plan = RoutePlan("r", ARMS, Thompson(), Reward())
    assert all(row["same"] for row in rebuild.compare([plan], house.store, house.journal))


def test_in_a_trace_the_last_answer_by_the_clock_is_meant_in_whatever_order_they_were_journaled(house: House) -> None:
    house.journal.append([answered("2", "b", at=THEN + 10, trace_id="x" * 32)])
    house.journal.append([answered("1", "a", at=THEN, trace_id="x" * 32)])
    house.journal.append([Signal("e", THEN + 20, "thumb", "t", trace_id="x" * 32, value=1.0)])
    settle(house.controller())
    assert house.sums() == {"b": (1.0, 1.0)}


def test_a_recount_sees_of_an_event_only_what_the_controller_has_come_to(house: House) -> None:
    house.journal.append([answered("1", "a"), answered("2", "b")])
    votes = [Signal("e", THEN + n, "thumb", "t", response_id=name, value=1.0) for n, name in enumerate("121")]
    house.journal.append(votes[:2])
    settle(house.controller())
    house.journal.append(votes[2:])  # not read yet
    plan = RoutePlan("r", ARMS, Thompson(), Reward())
    assert all(row["same"] for row in rebuild.compare([plan], house.store, house.journal))
    assert house.sums() == {"b": (1.0, 1.0)}


def test_a_trace_that_nothing_is_known_of_stops_nobody(house: House) -> None:
    one = answered("1", "a")
    unknown = Signal("e", THEN + 1, "thumb", "t", trace_id="unknown", session=one.session, value=1.0)
    house.journal.append([one, unknown, Signal("f", THEN + 1, "thumb", "t", response_id="1", value=0.0)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 0.0)}


def test_a_comparison_sent_again_as_a_thumb_is_a_thumb_only(house: House) -> None:
    house.journal.append([answered("1", "a"), answered("2", "b")])
    house.journal.append([Signal("c", THEN, "comparison", "t", response_id="1", target={"winner": "2", "loser": "1"})])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 0.0), "b": (1.0, 1.0)}
    house.journal.append([Signal("c", THEN + 1, "thumb", "t", response_id="1", value=1.0)])
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 1.0)}


def test_a_thousand_signals_of_one_event_are_taken_in_at_once(house: House) -> None:
    house.journal.append([answered("1", "a"), answered("2", "b")])
    again = [Signal("e", THEN + n, "thumb", "t", response_id="12"[n % 2], value=1.0) for n in range(999)]
    house.journal.append(again)
    asked: list[str] = []
    house.journal._db.set_trace_callback(asked.append)
    settle(house.controller())
    house.journal._db.set_trace_callback(None)
    assert house.sums() == {"a": (1.0, 1.0)}
    assert len(asked) < 200


def test_a_fact_that_nobody_can_read_stops_nobody(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.journal.append([answered("1", "a"), Signal("e", THEN, "thumb", "t", response_id="1", value=1.0)])
    house.journal.append([Signal("bad", THEN, "thumb", "t", response_id="1", value=0.0)])
    house.journal._db.execute(
        "UPDATE facts SET body = ? WHERE event_id = 'bad'", (b'{"type":"signal","target":' + b"[" * 9999,)
    )
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 1.0)}
    assert "cannot be read" in caplog.text


names = st.sampled_from("12345")
facts = st.one_of(
    st.builds(
        lambda name, arm, at: answered(name, arm, f"s-{int(name) // 2}", at=THEN + at, event_id=f"e-{name}-{at}"),
        names, st.sampled_from("ab"), st.integers(0, 300),
    ),
    st.builds(
        lambda name, kind, at, value, event: Signal(
            f"{event}-{kind}", THEN + at, kind, "t", response_id=name, value=value, received_at=THEN + at
        ),
        names, st.sampled_from(["copy", "thumb", "regenerate"]), st.integers(0, 300), st.sampled_from([0.0, 1.0]),
        st.sampled_from("xyz"),
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(rounds=st.lists(st.tuples(st.lists(facts, max_size=6), st.integers(-100, 700)), min_size=1, max_size=8))
def test_what_was_counted_as_it_came_is_what_a_recount_makes(rounds: list[tuple[list[Fact], int]]) -> None:
    """Whatever comes in which order, wherever a round ends, and however the clock jumps."""
    with tempfile.TemporaryDirectory() as folder:
        house = House(Path(folder))
        plan = RoutePlan("r", ARMS, Thompson(), Reward(window=60.0))
        for new, clock in rounds:
            house.journal.append(new)
            controller = Controller([plan], house.journal, house.store, "one")
            settle(controller, THEN + clock)
            (row,) = rebuild.compare([plan], house.store, house.journal)
            assert row["same"], row
        settle(controller, THEN + 1000.0)
        live = house.sums()
        house.store.lease("one", 0.0, THEN)
        rebuild.replace([plan], house.store, house.journal)
        assert house.sums() == live
        house.journal.close()
        house.store.close()
