"""Cost and latency beside the reward: what is measured, what it weighs, and the price that keeps a budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.arms import Cell, Sums
from router.controller import Controller
from router.plan import RoutePlan
from router.policy import Arm, Cost, Epsilon, Latency, Learned, Price, Reward, Thompson
from router.price import COST, LATENCY, measured, priced
from router.store_sqlite import SqliteStore
from router.weights import shares
from telemetry.events import Answerer, Interaction, Signal
from telemetry.journal import Journal
from understudy.report import Heard, apart, together

NOW = 1_800_000_000.0
ARMS = {
    "small": Arm(model="small", price=Price(input=1.0, output=2.0)),
    "large": Arm(model="large", price=Price(input=10.0, output=20.0)),
}


def answer(arm: str, tokens: tuple[int, int] | None = (1000, 500), duration: float = 1.0, **fields: Any) -> Interaction:
    counts = dict(zip(("tokens_in", "tokens_out"), tokens or (), strict=False))
    known = {"event_id": f"e-{arm}", "at": NOW, "request_id": f"r-{arm}", "session": f"s-{arm}"} | fields
    return Interaction(route="r", tenant="t", answerer=Answerer(arm, arm), duration=duration, **known, **counts)


def evidence(rewards: Mapping[str, float], costs: Mapping[str, float], n: float = 400.0) -> dict[Cell, Sums]:
    rows = [(Cell("", arm, int(NOW)), n, mean, 0.04) for arm, mean in rewards.items()]
    rows += [(Cell("", arm, int(NOW), COST), n, mean, 0.0) for arm, mean in costs.items()]
    return {cell: Sums(n, n * mean, n * (mean * mean + variance)) for cell, n, mean, variance in rows}


def test_a_session_costs_what_its_answers_tokens_cost() -> None:
    terms = Reward(cost=Cost(weight=1.0), latency=Latency(weight=1.0))
    found = measured(terms, ARMS, [answer("small"), answer("large", duration=3.0)])
    assert found == {COST: pytest.approx((1000 + 1000 + 10_000 + 10_000) / 1e6), LATENCY: 2.0}
    assert measured(terms, ARMS, [answer("small"), answer("large", None)]) == {LATENCY: 1.0}, "an unknown count"
    assert measured(terms, ARMS, [answer("gone")]) == {LATENCY: 1.0}, "an unknown price"
    assert measured(Reward(), ARMS, [answer("small")]) == {}


def test_a_weight_makes_the_better_arm_too_dear() -> None:
    cells = evidence({"small": 0.70, "large": 0.72}, {"small": 0.001, "large": 0.01})
    free, dear = Reward(), Reward(cost=Cost(weight=10.0))
    for policy in (Thompson(holdout=0.0, floor=0.0), Epsilon(kind="epsilon", holdout=0.0)):
        before = shares(policy, ARMS, cells, NOW, priced(policy, ARMS, cells, NOW, free).burdens)[""]
        after = shares(policy, ARMS, cells, NOW, priced(policy, ARMS, cells, NOW, dear).burdens)[""]
        assert before["large"] > 0.85 > 0.15 > after["large"]


def test_time_weighs_like_money() -> None:
    cells = evidence({"small": 0.70, "large": 0.72}, {})
    cells |= {
        Cell("", arm, int(NOW), LATENCY): Sums(9, 9 * s, 9 * s * s) for arm, s in (("small", 1.0), ("large", 5.0))
    }
    found = priced(Thompson(), ARMS, cells, NOW, Reward(latency=Latency(weight=0.02)))
    assert found.burdens["large"] - found.burdens["small"] == pytest.approx(0.08, rel=0.15)
    assert found.costs == {}


@given(
    rewards=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    costs=st.tuples(st.floats(0.0001, 0.01), st.floats(0.0001, 0.01)),
    budget=st.floats(0.0001, 0.01),
)
def test_the_price_keeps_the_budget_where_that_can_be_kept(
    rewards: tuple[float, float], costs: tuple[float, float], budget: float
) -> None:
    policy = Thompson(floor=0.0, holdout=0.0)
    cells = evidence(dict(zip(ARMS, rewards, strict=True)), dict(zip(ARMS, costs, strict=True)), 4e6)
    found = priced(policy, ARMS, cells, NOW, Reward(cost=Cost(budget=budget)))
    drawn = shares(policy, ARMS, cells, NOW, found.burdens)[""]
    spent = sum(drawn[arm] * cost for arm, cost in zip(ARMS, costs, strict=True))
    assert spent <= max(budget, min(costs)) * 1.001 + 1e-7
    without = shares(policy, ARMS, cells, NOW)[""]
    if sum(without[arm] * cost for arm, cost in zip(ARMS, costs, strict=True)) < budget * 0.999:
        assert found.price == 0.0, "a budget that is kept anyway costs nothing"


def test_a_budget_shares_between_a_good_dear_arm_and_a_cheap_one() -> None:
    policy = Thompson()
    cells = evidence({"small": 0.5, "large": 0.8}, {"small": 0.001, "large": 0.011})
    found = priced(policy, ARMS, cells, NOW, Reward(cost=Cost(budget=0.006)))
    weight = shares(policy, ARMS, cells, NOW, found.burdens)[""]["large"]
    assert 0.95 * weight + 0.025 == pytest.approx(0.5, abs=0.01)
    assert found.price > 0.0


def test_an_arm_nobody_has_met_is_held_to_cost_what_the_others_do() -> None:
    cells = evidence({"small": 0.5}, {"small": 0.004})
    assert priced(Thompson(), ARMS, cells, NOW, Reward(cost=Cost(weight=1.0))).costs["large"] == pytest.approx(0.004)
    assert priced(Thompson(), ARMS, {}, NOW, Reward(cost=Cost(budget=1.0))).price == 0.0


@pytest.mark.parametrize("policy", [Thompson(), Thompson(segment_by="task_type")])
def test_the_controller_counts_costs_beside_rewards_and_publishes_the_price(tmp_path: Path, policy: Learned) -> None:
    journal, store = Journal(tmp_path / "journal.db"), SqliteStore(tmp_path / "state.db")
    plan = RoutePlan("r", ARMS, policy, Reward(cost=Cost(weight=3.0)))
    journal.append(
        [answer("small"), answer("large"), answer("large", event_id="e2", request_id="unheard", session="s2")]
    )
    journal.append([Signal(f"v-{arm}", NOW, "thumb", "t", response_id=f"r-{arm}", value=1.0) for arm in ARMS])
    controller = Controller([plan], journal, store, "one")
    while controller.step(NOW + 1000.0):
        pass
    counted = {(cell.arm, cell.metric): v.s for cell, v in store.sums("r").items()}
    assert counted == {("small", ""): 1.0, ("large", ""): 1.0, ("small", COST): 0.002, ("large", COST): 0.02}
    snapshot = store.snapshot("r")
    assert snapshot is not None
    assert snapshot.price == 3.0
    journal.close()
    store.close()


def test_arms_that_are_not_heard_alike_are_told() -> None:
    def heard(sessions: range, judged: range) -> Heard:
        return Heard(sessions={("t", str(n)) for n in sessions}, judged={("t", str(n)) for n in judged})

    seldom, often = heard(range(1000), range(50)), heard(range(1000, 2000), range(1000, 1200))
    assert apart(seldom, together([seldom, often]))
    few = heard(range(20), range(1))
    assert not apart(few, together([few, often])), "it may be chance"
    assert not apart(often, together([often])), "there is no other"
