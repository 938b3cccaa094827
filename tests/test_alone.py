"""Requests that nobody has reacted to: the controller passes over them, and whatever comes later finds them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_controller import THEN, House, answered, settle, vote

from telemetry.events import Fact, Signal


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    house.journal.close()
    house.store.close()


IDS = {
    "ours": "0a1b2c3d4e5f",
    "the upstream's with ours": "chatcmpl-0a1b2c3d4e5f",
    "the upstream's": "resp_5f4e3d2c1b0a",
    "the end of the upstream's": "5f4e3d2c1b0a",
}


@pytest.mark.parametrize("named", IDS)
@pytest.mark.parametrize("order", ["before", "together", "after"])
def test_a_vote_counts_by_whatever_name_and_whenever_it_comes(house: House, named: str, order: str) -> None:
    given = "chatcmpl-0a1b2c3d4e5f" if "ours" in named else "resp_5f4e3d2c1b0a"
    facts: list[Fact] = [vote(IDS[named], 1.0), answered(IDS["ours"], response_id=given)]
    if order == "after":
        facts.reverse()
    controller = house.controller()
    for fact in facts:
        house.journal.append([fact])
        if order != "together":
            settle(controller)
    settle(controller)
    assert house.sums() == {"a": (1.0, 1.0)}


@pytest.mark.parametrize("about", [{"session": "s-1"}, {"trace_id": "t1"}])
def test_a_vote_on_what_is_yet_to_come_counts_when_it_has_come(house: House, about: dict[str, str]) -> None:
    controller = house.controller()
    house.journal.append([Signal("early", THEN + 1, "thumb", "t", value=1.0, **about)])
    settle(controller)
    assert house.sums() == {}
    house.journal.append([answered("1", trace_id="t1")])
    settle(controller)
    assert house.sums() == {"a": (1.0, 1.0)}


def test_requests_that_nobody_reacts_to_are_heard_of_and_count_for_nothing(house: House) -> None:
    controller = house.controller()
    house.journal.append([answered(f"{n}") for n in range(1500)])
    settle(controller)
    assert house.store.marked("journal") == 1500
    assert house.sums() == {}
    house.journal.append([vote("7", 1.0), answered("again", session="s-8", input_hash="8", at=THEN + 5)])
    settle(controller)
    assert house.sums() == {"a": (2.0, 1.2)}, "what comes later finds them"


def test_a_text_that_nobody_can_read_stops_nobody(house: House) -> None:
    fact = answered("1", messages=[{"role": "user", "content": "NUMBER"}], session="s")
    house.journal.append([fact, answered("2", messages="and then?", session="s", at=THEN + 1), vote("1", 1.0)])
    house.journal._db.execute("UPDATE facts SET body = replace(body, '\"NUMBER\"', '1e999') WHERE request_id = '1'")
    settle(house.controller())
    assert house.sums() == {"a": (1.0, 1.0)}
