"""The demo's whole story, in a hurry, on a real vLLM and a real Redis: what `make demo` shows is what happens."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from redis_server import RedisServer

from learner.gate_report import read
from learner.registry import Registry
from learner.replica import Replica, listing, unload_adapter
from router.store_redis import RedisStore
from telemetry.events import Shadow
from telemetry.journal import Journal
from understudy.demo.story import tell
from understudy.demo.vllm_server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
ROUTE = "assistant"


class Played:
    def __init__(self, folder: Path, store: RedisStore, told: dict[str, Any]) -> None:
        self.folder, self.store, self.told = folder, store, told
        self.registry = Registry(store)


@pytest.fixture(scope="module")
def played(vllm: VllmServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("demo")
    with RedisServer() as redis:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            cache = vllm.models.base.parent.parent
            assert tell(cache, folder, fast=True, as_json=True, state=redis.url, vllm=vllm) == 0
        yield Played(folder, RedisStore(redis.url), json.loads(said.getvalue()))
    for name in set(listing(Replica(vllm.url)).adapters) - {"careful", "hasty"}:
        unload_adapter(Replica(vllm.url), name)


def test_the_challenger_took_over_and_users_are_better_off(played: Played) -> None:
    told = played.told
    assert told["champion"] == told["promoted"]
    assert played.registry.aliases(ROUTE) == {"champion": told["promoted"]}
    assert told["gain"] >= 0.15
    assert told["interval"][0] > 0
    assert told["failures"] == []


def test_the_bad_one_passed_its_gate_and_was_rolled_back_by_what_users_did(played: Played) -> None:
    bad = played.told["rolled_back"]
    assert read(played.folder / "learner" / "gates" / bad).report.verdict == "pass"
    assert "worse off" in played.registry.tags(bad)["quarantined"]
    assert bad not in played.registry.aliases(ROUTE).values()


def test_each_decision_is_on_record_with_its_evidence(played: Played) -> None:
    journal = Journal(played.folder / "understudy.db")
    found = journal.decisions(ROUTE)
    promoted = [one for one in found if one.challenger == played.told["promoted"]]
    bad = [one for one in found if one.challenger == played.told["rolled_back"]]
    assert [one.verb for one in promoted] == ["begin", "start", *["advance"] * 4, "promote", "promoted"]
    assert [one.verb for one in bad][-2:] == ["rollback", "rolled_back"]
    decided = promoted[-2]
    assert decided.actor == "controller"
    assert decided.evidence["lower"] > -0.02
    assert decided.evidence["impact"]["after"]["reward"] > decided.evidence["impact"]["before"]["reward"]
    assert decided.policy
    shadows = [fact for _, fact in journal.read(0, 100_000) if isinstance(fact, Shadow)]
    assert len([one for one in shadows if one.model == played.told["promoted"] and one.answer]) >= 10
    journal.close()


def test_the_picture_can_be_drawn(played: Played) -> None:
    drawn = ElementTree.parse(played.told["picture"]).getroot()
    texts = ["".join(node.itertext()) for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"promoted", "rolled back", "Lineage of the winner"} <= set(texts)
