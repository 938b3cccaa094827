"""A judge reads a shadow: which answers it is asked about, that each counts once, and that a clear loss pauses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conversations import asked
from fake_judge import FakeJudge, holding
from rollout_house import ROUTE, House, rules

from learner.shadowing import MOST, judge_shadow
from router.rollout_controller import ask, load
from router.rollouts import standing_of
from router.store_sqlite import SqliteStore
from router.trial import Judged
from telemetry.events import Interaction, Shadow


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    shadowed = rules({"shadow": 0.5, "min_sessions": 1000, "min_time": 10}, {"share": 0.5})
    one = House(tmp_path, SqliteStore(tmp_path / "state.db"), rollout=shadowed)
    yield one
    one.close()


def copies(house: House, count: int, said: str = "a worse answer", start: int = 0) -> None:
    """Requests that were shown an answer, and the challenger's answers to their copies."""
    rollout = house.rollout
    facts: list[Interaction | Shadow] = []
    for n in range(start, start + count):
        shown = asked(f"question {n}?", "a better answer", session=f"c{n}", at=house.now, route=ROUTE)
        facts.append(shown)
        facts.append(
            Shadow(
                event_id=f"shadow-{n}", at=house.now, route=ROUTE, tenant=shown.tenant, rollout=rollout.id,
                model=rollout.challenger, of=shown.request_id, answer=said, characters=len(said),
            )
        )  # fmt: skip
    house.journal.append(facts)


def tally(house: House) -> Judged:
    body = house.store.read(f"shadow/{house.rollout.id}")
    assert body is not None
    return msgspec.json.decode(body, type=Judged)


def test_each_copy_is_judged_once_and_the_rest_another_time(house: House) -> None:
    house.begun()
    copies(house, 30)
    with FakeJudge(holding("better")) as fake:
        for expected in (20, 30, 30):
            found = judge_shadow(house.store, ROUTE, house.journal, fake.asked_by())
            assert found is not None
            assert (found.judged, found.score) == (expected, 0.0)
        assert len(fake.seen) == 60  # both orders


def test_a_challenger_that_clearly_lost_waits_for_an_operator_who_may_go_on(house: House) -> None:
    house.begun()
    copies(house, MOST + 20)
    with FakeJudge(holding("better")) as fake:
        judge = fake.asked_by()
        for _ in range(10):
            judge_shadow(house.store, ROUTE, house.journal, judge)
    assert tally(house).judged == MOST
    house.step()
    assert (house.rollout.phase, house.rollout.waits) == ("paused", "operator")
    assert "0% of the wins" in house.rollout.why
    standing = standing_of(house.store, ROUTE)
    assert standing is not None
    assert standing.shadow["judged"] == MOST
    ask(house.store, ROUTE, "resume", "ann", "they are fine", house.now, house.rules, standing)
    house.step()
    assert house.rollout.phase == "running"


def test_ties_and_a_judge_that_is_down_stop_nobody(house: House) -> None:
    house.begun()
    copies(house, MOST, "a better answer, too")
    with FakeJudge(holding("better")) as fake:
        for _ in range(10):
            judge_shadow(house.store, ROUTE, house.journal, fake.asked_by())
    assert tally(house).score == MOST / 2
    copies(house, 20, start=MOST)
    with FakeJudge(lambda parts: 500) as down:
        judge_shadow(house.store, ROUTE, house.journal, down.asked_by())
    house.step()
    assert house.rollout.phase == "running"


def test_nothing_is_asked_where_no_text_was_kept_or_nothing_is_rolled_out(house: House) -> None:
    with FakeJudge(holding("better")) as fake:
        assert judge_shadow(house.store, ROUTE, house.journal, fake.asked_by()) is None
        house.begun()
        copies(house, 5, said="")
        found = judge_shadow(house.store, ROUTE, house.journal, fake.asked_by())
        assert found is not None
        assert (found.judged, fake.seen) == (0, [])
        assert load(house.store, ROUTE)[1] is not None
