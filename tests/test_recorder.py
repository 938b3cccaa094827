"""Facts are made soon, in turns, and all of them: large ones in a thread, and on the loop where that falls behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from conftest import in_a_loop

from gateway.arms import Lineups, Route
from gateway.auth import Identity, Pseudonyms
from gateway.metrics import Metrics
from gateway.openai import Metadata, parse_request
from gateway.recorder import BEHIND, LARGE, Recorder
from gateway.replicas import Replicas
from gateway.shadow import Shadows
from gateway.upstream import Timeouts
from gateway.visit import Errand, Visit
from router.arms import Choice, Snapshot
from router.policy import Arm
from telemetry.events import Interaction, Shadow
from telemetry.privacy import Capture, Captures

ARMS = {"champion": Arm(model="base")}
SNAPSHOT = Snapshot("assistant", 1, 0.0, "thompson", 0.0, segments={"": {"champion": 1.0}}, lead="champion")


class House:
    """A recorder, and what it left."""

    def __init__(self, capture: Capture) -> None:
        self.facts: list[Interaction | Shadow] = []
        self.more = asyncio.Event()
        route = Route("assistant", ARMS, [], Timeouts())
        routes, captures, metrics = {"assistant": route}, Captures(capture), Metrics()
        self.lineups = Lineups(routes, {"assistant": SNAPSHOT})
        replicas = Replicas(routes, self.lineups, metrics.retries)
        shadows = Shadows(self.lineups, replicas, captures, metrics.shadow_dropped, self._leave)
        self.recorder = Recorder(captures, Pseudonyms(b"k" * 32), metrics, self._leave, shadows)
        self.route = route

    def _leave(self, fact: Interaction | Shadow) -> None:
        self.facts.append(fact)
        self.more.set()

    def ended(self, content: Any) -> None:
        """A request with this prompt has ended."""
        body = json.dumps({"model": "assistant", "messages": [{"role": "user", "content": content}]}).encode()
        ask, fields = parse_request(body)
        visit = Visit("chat/completions", {})
        visit.begin_trace()
        visit.status = 200
        visit.keep(b'{"id": "x"}')
        lineup = self.lineups.of("assistant")
        who = Identity("t", "s", None, None, Metadata())
        self.recorder.ended(visit, Errand(self.route, lineup, Choice("champion", 1.0), ask, fields, who))


def nested(depth: int) -> Any:
    inner: Any = "deep"
    for _ in range(depth):
        inner = [inner]
    return inner


@in_a_loop
async def test_facts_are_made_soon_and_large_ones_too() -> None:
    house = House(Capture("full"))
    for size in (10, LARGE, 10, 2 * LARGE):
        house.ended("x" * size)
    assert len(house.recorder) == 4
    async with asyncio.timeout(10):
        while len(house.facts) < 4:
            house.more.clear()
            await house.more.wait()
    assert len(house.recorder) == 0
    await house.recorder.close()


@in_a_loop
async def test_others_have_their_turn_while_many_facts_are_made() -> None:
    house = House(Capture("redacted"))
    prose = "some words of somebody " * 150  # just small enough for the event loop
    for _ in range(31):
        house.ended(prose)
    seen = set[int]()
    while len(house.facts) < 31:
        await asyncio.sleep(0)
        seen.add(len(house.facts))
    assert len(seen - {0, 31}) >= 2, "a fact takes about a millisecond, a turn two"
    await house.recorder.close()


@in_a_loop
async def test_however_many_end_at_once_only_a_few_wait() -> None:
    house = House(Capture("full"))
    for _ in range(500):
        house.ended("x" * 20_000)
        assert len(house.recorder) <= 32
    await house.recorder.close()
    assert len(house.facts) == 500


@in_a_loop
async def test_where_the_thread_falls_behind_callers_wait_and_nothing_is_lost() -> None:
    house = House(Capture("off"))
    size, count = BEHIND // 4, 12
    for _ in range(count):
        house.ended("x" * size)
        house.recorder._turn()
        assert len(house.recorder) <= 4
    await house.recorder.close()
    assert len(house.facts) == count


@in_a_loop
async def test_a_request_that_ends_after_closing_leaves_its_fact() -> None:
    house = House(Capture("full"))
    await house.recorder.close()
    house.ended("x")
    house.ended("x" * LARGE)
    assert len(house.facts) == 2


@pytest.mark.parametrize("text", ["full", "redacted"])
@pytest.mark.parametrize("depth", [10, 255, 600, 900])
@in_a_loop
async def test_a_prompt_nested_deep_leaves_its_fact(text: Any, depth: int) -> None:
    house = House(Capture(text))
    house.ended(nested(depth))
    await house.recorder.close()
    assert len(house.facts) == 1


@in_a_loop
async def test_closing_waits_for_large_facts() -> None:
    house = House(Capture("redacted"))
    for _ in range(5):
        house.ended("words of somebody " * 5_000)
    await house.recorder.close()
    assert len(house.facts) == 5
