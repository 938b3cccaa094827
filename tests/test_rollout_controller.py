"""Rollouts in the real controller: shares, minimums, who plays which part, what goes on record."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from rollout_house import ARMS, LEAD, ROUTE, House, registered, rules

from learner.registry import Registry
from router.budget import Spent
from router.casting import Parts, capped, cast, with_challenger
from router.controller import Controller
from router.policy import Arm, Policy, Split, Thompson
from router.rollout import CONTROL, Refused, Rollout
from router.rollout_controller import ask, propose, undo
from router.rollout_policy import ErrorBudget
from router.rollouts import standing_of
from router.store_sqlite import SqliteStore
from telemetry.errors import StateError, StateUnavailable
from telemetry.events import Answerer, Interaction, Shadow, Signal, Thread
from telemetry.journal import Journal


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    store = SqliteStore(tmp_path / "state.db")
    house = House(tmp_path / "house", store)
    yield house
    house.close()
    store.close()


def good(house: House, version: str, n: int = 60) -> None:
    house.judged(version, n, 1.0, 0.0)


def until(house: House, phase: str, version: str, rounds: int = 30) -> None:
    for _ in range(rounds):
        if house.rollout.phase == phase:
            return
        good(house, version)
        house.step(11.0)
    raise AssertionError(f"{house.rollout.phase}: {house.rollout.why}")


# Shares.


def test_a_challenger_goes_through_its_steps_and_takes_the_leads_place(house: House) -> None:
    version = house.propose()
    assert house.rollout.phase == "pending"
    caps = []
    for _ in range(20):
        house.step(6.0)
        if house.rollout.phase == "promoted":
            break
        caps.append(house.rollout.cap(house.rules))
        assert house.share(version) <= caps[-1] + 1e-9
        assert house.snapshot.rollout == house.rollout.id
        good(house, version)
    assert list(dict.fromkeys(caps)) == [0.2, 0.5, 1.0 - CONTROL]
    assert house.registry.aliases(ROUTE) == {"champion": version}
    snapshot = house.snapshot
    assert (snapshot.versions, snapshot.kept, snapshot.lead) == ((version,), (LEAD,), LEAD)
    assert (snapshot.rollout, snapshot.challenger) == ("", "")
    assert snapshot.segments == {"": {version: 1.0}}
    promote = next(one for one in house.record if one.verb == "promote")
    assert promote.evidence["impact"]["significant"]
    assert promote.evidence["impact"]["after"]["reward"] == 1.0
    assert (promote.actor, len(promote.policy)) == ("controller", 12)


def test_a_second_promotion_keeps_the_version_before(house: House) -> None:
    first = house.begun(1)
    until(house, "promoted", first)
    second = house.begun(2)
    assert house.rollout.control == first
    assert house.share(second) <= 0.2
    until(house, "promoted", second)
    assert house.registry.aliases(ROUTE) == {"champion": second, "previous": first}
    assert house.snapshot.kept == (first,)
    assert house.snapshot.versions == (second, first)


def test_a_step_keeps_its_sessions_and_its_time(house: House) -> None:
    version = house.begun()
    began = house.now
    house.judged(version, 19, 1.0, 0.0)
    house.step(60.0)
    assert house.rollout.step == 0
    house.judged(version, 1, 1.0, 0.0)
    house.step(2.0)
    assert house.rollout.step == 1
    good(house, version)
    house.step(9.0)
    assert house.rollout.step == 1, "it has its sessions, and not its time"
    house.step(1.5)
    assert house.rollout.step == 2
    for one in house.record:
        if one.verb == "advance":
            assert one.evidence["judged_in_step"] >= 20
    assert began < house.rollout.step_began


@pytest.mark.parametrize(
    "policy", [Thompson(holdout=0.2), Thompson(holdout=0.0, floor=0.0), Split(kind="split", shares={LEAD: 1.0})]
)
def test_sessions_are_drawn_by_no_more_than_the_share(house: House, policy: Policy) -> None:
    house.plan(rules({"share": 0.2, "min_time": 1e6}), policy)
    version = house.begun()
    good(house, version, 200)  # the bandit would give it all
    house.step()
    n = 4000
    drawn = house.sessions(n, {}, vote=False)
    most = 0.2 if isinstance(policy, Split) else house.share(version)
    assert most == pytest.approx(0.2, abs=0.002)
    assert abs(drawn[version] / n - most) < 4 * (0.16 / n) ** 0.5


def test_each_segment_keeps_to_the_share(house: House) -> None:
    house.plan(rules({"share": 0.1, "min_time": 1e6}), Thompson(segment_by="task_type"))
    version = house.begun()
    for segment in ("sums", "tales"):
        house.judged(version, 30, 1.0, 0.0, segment=segment)
    house.step()
    assert set(house.snapshot.segments) == {"", "sums", "tales"}
    for segment in house.snapshot.segments:
        assert house.share(version, segment) <= 0.1 + 1e-9


def test_other_arms_keep_to_their_largest_shares_beside_a_challenger() -> None:
    arms = {LEAD: Arm(model="base", max_share=0.9), "b": Arm(model="other", max_share=0.1), "c": Arm(model="third")}
    rollout = Rollout(id="x", route=ROUTE, number=1, challenger="new", phase="running", share=0.05)
    parts = with_challenger(cast(arms, {}), arms, rollout, rules({"share": 0.05}))
    found = capped({"": {LEAD: 0.05, "b": 0.1, "c": 0.05, "new": 0.8}}, parts, 0.0)[""]
    assert found["new"] == pytest.approx(0.05)
    assert found["b"] <= 0.1 + 1e-9
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("largest", [0.3, 1.0])
def test_the_challenger_keeps_to_its_share_though_the_others_are_at_their_largest(largest: float) -> None:
    arms = {LEAD: Arm(model="base", max_share=largest)}
    rollout = Rollout(id="x", route=ROUTE, number=1, challenger="new", phase="running", share=0.05)
    parts = with_challenger(cast(arms, {}), arms, rollout, rules({"share": 0.05}))
    assert capped({"": {LEAD: 0.0, "new": 1.0}}, parts, 0.05)[""] == pytest.approx(
        {LEAD: 1 - 0.05 / 0.95, "new": 0.05 / 0.95}
    )


def test_without_a_challenger_weights_are_left_alone() -> None:
    weights = {"": {LEAD: 1.0}}
    assert capped(weights, Parts(cast(ARMS, {}), ARMS), 0.05) == weights


def test_at_its_last_step_the_control_goes_on_being_drawn_by_fixed_shares_too(house: House) -> None:
    house.plan(rules({"share": 0.5}, {"share": 1.0}), Split(kind="split", shares={LEAD: 1.0}))
    version = house.begun()
    house.sessions(400, {version: 1.0, LEAD: 0.0})
    house.step(20.0)
    house.step()
    assert house.share(LEAD) == pytest.approx(CONTROL)
    drawn = house.sessions(2000, {version: 1.0, LEAD: 0.0})
    house.step(20.0)
    house.step()  # more facts than one batch
    assert house.rollout.phase == "promoted", drawn


def test_in_the_shadow_nobody_draws_the_challenger(house: House) -> None:
    house.plan(rules({"shadow": 0.1}, {"share": 0.2}))
    version = house.begun()
    snapshot = house.snapshot
    assert (snapshot.challenger, snapshot.control, snapshot.shadow) == (version, LEAD, 0.1)
    assert version not in snapshot.segments[""]
    assert version in snapshot.versions
    copies = [
        Shadow(f"c{n}", house.now, ROUTE, "t", house.rollout.id, version, f"q{n}", duration=1.0, shown_duration=1.0)
        for n in range(20)
    ]
    house.journal.append(copies)
    house.step(20.0)
    assert house.rollout.step == 1
    assert (house.snapshot.shadow, house.share(version) > 0.0) == (0.0, True)


# Stopped.


@pytest.mark.parametrize(
    "harm",
    [
        {"ours": 0.0, "theirs": 1.0},
        {"ours": 1.0, "theirs": 1.0, "error": "upstream_error"},
        {"ours": 1.0, "theirs": 1.0, "duration": 30.0},
    ],
)
def test_harm_takes_it_out_of_the_next_weights_and_quarantines_it(house: House, harm: dict[str, Any]) -> None:
    version = house.begun()
    assert house.share(version) > 0.0
    house.judged(version, 200, **harm)
    house.step()
    assert house.rollout.phase == "rolled_back"
    assert house.snapshot.segments[""] == {LEAD: 1.0}
    assert (house.snapshot.versions, house.snapshot.challenger) == ((), "")
    assert house.registry.aliases(ROUTE) == {}
    assert house.rollout.why in house.registry.tags(version)["quarantined"]
    assert house.verbs[-2:] == ["rollback", "rolled_back"]
    assert house.record[-2].evidence["challenger"]["sessions"] == 200
    with pytest.raises(Refused, match="quarantined"):
        house.propose()


def test_a_quarantined_challenger_is_rolled_back_at_the_next_look(house: House) -> None:
    version = house.begun()
    house.registry.tag(version, "quarantined", "it learned from poison")
    house.step()
    assert (house.rollout.phase, "poison" in house.rollout.why) == ("rolled_back", True)
    assert house.registry.tags(version)["quarantined"] == "it learned from poison"


def test_one_that_was_dropped_before_it_began_never_draws(house: House) -> None:
    version = house.propose()
    house.registry.tag(version, "dropped", "no")
    house.step()
    assert house.rollout.phase == "rolled_back"
    assert "start" not in house.verbs


def test_data_that_was_erased_pauses_it_until_somebody_says_to_go_on(house: House) -> None:
    version = house.begun()
    house.registry.tag(version, "erased", "a user's rows")
    house.step()
    assert (house.rollout.phase, house.rollout.waits) == ("paused", "operator")
    assert house.share(version) > 0.0
    standing = standing_of(house.store, ROUTE)
    ask(house.store, ROUTE, "resume", "ann", "it is fine", house.now, house.rules, standing)
    house.step()
    assert (house.rollout.phase, house.rollout.excused) == ("running", ("erased",))


def test_a_route_has_one_challenger_at_a_time(house: House) -> None:
    version = house.begun(1)
    with pytest.raises(Refused, match="one at a time"):
        house.propose(2)
    assert propose(house.store, house.registry, ROUTE, version, "learner", "again", house.now) == house.rollout
    house.ask("rollback")
    with pytest.raises(Refused, match="one at a time"):
        house.propose(2)
    house.step()
    second = house.propose(2)
    assert house.rollout.challenger == second


def test_a_challenger_of_the_learner_that_waits_elsewhere_is_refused_too(house: House) -> None:
    other = registered(house.store, house.folder / "versions", 7)
    house.registry.move(ROUTE, "challenger", other, None)
    with pytest.raises(Refused, match=f"another challenger, {other}"):
        house.propose(2)


def test_the_champion_is_not_rolled_out_against_itself(house: House) -> None:
    version = house.begun()
    until(house, "promoted", version)
    with pytest.raises(Refused, match="champion already"):
        house.propose()


def test_a_champion_that_changed_under_it_ends_a_rollout(house: House) -> None:
    version = house.begun(1)
    other = registered(house.store, house.folder / "versions", 9)
    house.registry.move(ROUTE, "champion", other, None)
    house.step()
    assert (house.rollout.phase, other in house.rollout.why) == ("rolled_back", True)
    assert house.snapshot.segments[""] == {other: 1.0}
    assert "quarantined" not in house.registry.tags(version), "it did nothing wrong"
    house.begun(1)
    assert (house.rollout.challenger, house.rollout.control, house.rollout.at_fault) == (version, other, True)


# Waiting.


def test_it_begins_when_somebody_agrees_and_approval_of_the_beginning_promotes_nothing(house: House) -> None:
    house.plan(rules(require_approval=["begin", "promote"]))
    version = house.propose()
    house.step()
    assert (house.rollout.phase, house.rollout.waits) == ("pending", "begin")
    assert house.share(version) == 0.0
    house.ask("approve")
    house.step()
    assert house.rollout.phase == "running"
    assert house.ask("approve").phase == "running"
    for _ in range(8):
        house.step()
        good(house, version)
        house.step(11.0)
    assert (house.rollout.phase, house.rollout.waits) == ("paused", "promote")
    assert house.registry.aliases(ROUTE) == {"challenger": version}
    house.ask("promote")
    house.step()
    assert house.rollout.phase == "promoted"
    assert [(one.verb, one.actor) for one in house.record if one.actor == "ann"] == [
        ("approve", "ann"),
        ("promote", "ann"),
    ]


def test_approval_is_refused_once_it_began_without(house: House) -> None:
    house.begun()
    with pytest.raises(Refused, match="waits for no approval"):
        house.ask("approve")


def test_a_spent_error_budget_holds_what_has_not_begun_and_what_has(house: House) -> None:
    house.plan(rules(error_budget={"objective": 0.9, "window": "1h"}))
    version = house.begun()
    house.judged(version, 10, 1.0, 1.0)
    house.step()
    assert house.rollout.phase == "running"
    facts = {"error": "upstream_refused", "status": 502}
    house.sessions(8, {}, vote=False, **facts)
    house.step()
    assert (house.rollout.phase, house.rollout.waits) == ("paused", "budget")
    house.ask("rollback")
    house.step()
    other = house.propose(2)
    house.step()
    assert (house.rollout.phase, house.rollout.waits, house.share(other)) == ("pending", "budget", 0.0)
    house.step(2 * 3600)
    assert house.rollout.phase == "running"


def test_one_failure_does_not_spend_a_budget(house: House) -> None:
    house.plan(rules(error_budget={"objective": 0.99, "window": "1h"}))
    house.begun()
    house.sessions(1, {}, vote=False, error="upstream_refused", status=502)
    house.step()
    assert house.rollout.phase == "running"


def test_an_operator_pauses_and_goes_on(house: House) -> None:
    version = house.begun()
    house.ask("pause")
    good(house, version)
    house.step(60.0)
    assert (house.rollout.step, house.rollout.phase) == (0, "paused")
    assert house.share(version) > 0.0
    house.ask("resume")
    house.step()
    assert house.rollout.step == 1


# What people see.


def test_every_decision_is_on_record_once_and_told_once(house: House) -> None:
    version = house.begun()
    until(house, "promoted", version)
    for _ in range(3):
        house.step()
    ids = [one.event_id for one in house.record]
    assert len(ids) == len(set(ids))
    assert house.verbs == ["begin", "start", "advance", "advance", "promote", "promoted"]
    assert [one["verb"] for one in house.alerts if one["about"] == "decision"] == house.verbs
    assert house.journal.decisions(ROUTE) == house.record
    assert list(house.rollout.decisions) == house.record


def test_a_guardrail_that_warns_is_told_once(house: House) -> None:
    rail = {"metric": "error_rate", "above": 0.1, "action": "warn"}
    house.plan(rules({"share": 0.2, "min_time": 1e6}, guardrails=[rail]))
    version = house.begun()
    for _ in range(3):
        house.judged(version, 30, 1.0, 1.0, error="upstream_error")
        house.step()
    assert [one["metric"] for one in house.alerts if one["about"] == "guardrail"] == ["error_rate"]
    assert house.rollout.phase == "running"


def test_what_was_answered_while_nobody_served_the_challenger_counts_for_neither(house: House) -> None:
    version, control = house.begun(), house.rollout.control
    side = {"policy": "thompson", "propensity": 0.5, "rival": 0.5, "rollout": house.rollout.id}
    outage = {
        version: Answerer(control, control, policy="fallback"),
        control: Answerer(control, control, unopposed=True, **side),
    }
    for arm in (version, control):
        for n, (by, liked) in enumerate(((outage[arm], 0.0), (Answerer(arm, arm, **side), 1.0))):
            name = f"{arm}-{n}"
            fact = Interaction(name, house.now + n, name, ROUTE, "t", f"s-{arm}", by, status=200, duration=1.0)
            house.journal.append([fact, Signal(f"v-{name}", house.now, "thumb", "t", response_id=name, value=liked)])
    house.step(4.0)
    standing = standing_of(house.store, ROUTE)
    assert standing is not None
    assert (standing.challenger.judged, standing.control.judged) == (1, 1)
    assert (standing.challenger.reward, standing.control.reward) == (1.0, 1.0)


def test_how_it_stands_is_kept_and_forgotten_when_another_begins(house: House) -> None:
    version = house.begun(1)
    good(house, version)
    house.step()
    standing = standing_of(house.store, ROUTE)
    assert standing is not None
    assert (standing.challenger.judged, standing.control.judged) == (60, 60)
    house.ask("rollback")
    house.step()
    assert standing_of(house.store, ROUTE) is not None
    house.plan(rules(require_approval=["begin"]))
    house.propose(2)
    house.step()
    assert standing_of(house.store, ROUTE) is None


def test_a_look_is_taken_no_more_often_than_the_interval(house: House) -> None:
    house.plan(rules(interval=30.0))
    version = house.begun()
    house.judged(version, 200, 0.0, 1.0)
    house.step(1.0)
    assert house.rollout.phase == "running"
    house.step(30.0)
    assert house.rollout.phase == "rolled_back"


def test_a_clock_that_is_set_back_delays_no_rollback(house: House) -> None:
    version = house.begun()
    good(house, version, 5)
    house.step()
    house.judged(version, 200, 0.0, 1.0)
    house.step(-3600.0)
    assert house.rollout.phase == "rolled_back"


def test_steps_that_change_while_it_runs_raise_no_share_at_once(house: House) -> None:
    house.plan(rules({"share": 0.05}, {"share": 0.1}, {"share": 0.5}))
    version = house.begun()
    good(house, version)
    house.step(20.0)
    assert house.rollout.cap(house.rules) == 0.1
    house.plan(rules({"share": 0.1}, {"share": 0.5}))
    house.step()
    assert (house.rollout.step, house.rollout.cap(house.rules)) == (0, 0.1)
    assert house.share(version) <= 0.1 + 1e-9
    assert house.record[-1].why.startswith("the steps were changed")


# Undo.


def undone(house: House) -> tuple[str, str | None]:
    return undo(house.store, house.registry, ROUTE, "ann", "users complain", house.now, house.rules)


def test_undo_brings_back_the_champion_before_with_the_next_weights(house: House) -> None:
    first = house.begun(1)
    until(house, "promoted", first)
    second = house.begun(2)
    until(house, "promoted", second)
    assert undone(house) == (second, first)
    house.step()
    assert house.registry.aliases(ROUTE) == {"champion": first}
    assert house.snapshot.segments[""] == {first: 1.0}
    assert house.rollout.phase == "undone"
    assert "users complain" in house.registry.tags(second)["quarantined"]
    assert [(one.verb, one.actor) for one in house.record[-2:]] == [("undo", "ann"), ("undone", "ann")]
    assert undone(house) == (first, None)
    house.step()
    assert house.snapshot.segments[""] == {LEAD: 1.0}
    assert house.verbs[-1] == "undo"
    with pytest.raises(Refused, match="nothing to undo"):
        undone(house)


def test_undo_ends_a_rollout_that_is_under_way(house: House) -> None:
    first = house.begun(1)
    until(house, "promoted", first)
    second = house.begun(2)
    assert undone(house) == (first, None)
    house.step()
    assert house.registry.aliases(ROUTE) == {}
    assert house.rollout.phase == "rolled_back"
    assert {first, second} == {v for v in (first, second) if "quarantined" in house.registry.tags(v)}
    assert house.snapshot.segments[""] == {LEAD: 1.0}


def test_with_nothing_to_undo_a_rollout_under_way_is_left_alone(house: House) -> None:
    house.begun()
    with pytest.raises(Refused, match="nothing to undo"):
        undone(house)
    assert house.rollout.phase == "running"


# Whatever else fails.


def test_a_registry_that_fails_holds_up_no_rollback(house: House) -> None:
    version = house.begun()
    house.judged(version, 200, 0.0, 1.0)
    house.step(controller=fails_to_tag(house))
    assert (house.rollout.phase, house.share(version)) == ("rolling_back", 0.0)
    house.step(controller=house.controller())
    assert house.rollout.phase == "rolled_back"


def fails_to_tag(house: House) -> Controller:
    store = house.store

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
            if name.startswith("tags/"):
                raise StateUnavailable("the disk is full")
            return store.swap(name, old, new)

    return house.controller(store=Full())


class Full:
    """A journal on a disk that is full, until it is not."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.full = journal, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.journal, name)

    def append(self, facts: Any) -> None:
        if self.full:
            raise StateUnavailable("the disk is full")
        self.journal.append(facts)


def test_a_journal_that_fails_holds_up_no_rollback_and_hears_of_it_later(house: House) -> None:
    version = house.begun()
    house.judged(version, 200, 0.0, 1.0)
    full = Full(house.journal)
    one = house.controller(journal=full)
    house.step(controller=one)
    assert (house.rollout.phase, house.share(version)) == ("rolled_back", 0.0)
    assert "rollback" not in house.verbs
    full.full = False
    house.step(controller=one)
    assert house.verbs == ["begin", "start", "rollback", "rolled_back"]


def test_what_an_old_rollout_had_not_put_on_record_its_successor_does(house: House) -> None:
    house.begun(1)
    first = house.rollout.id
    house.ask("rollback")
    house.step(controller=house.controller(journal=Full(house.journal)))
    assert (house.rollout.phase, house.verbs) == ("rolled_back", ["begin", "start"])
    house.begun(2)
    assert [one.verb for one in house.record if one.rollout == first] == ["begin", "start", "rollback", "rolled_back"]
    assert [one.verb for one in house.record if one.rollout != first] == ["begin", "start"]
    assert len({one.event_id for one in house.record}) == len(house.record) == 6


def test_shares_stay_exact_for_any_weights() -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        n = int(random.integers(1, 5))
        arms = {f"a{i}": Arm(model="m", max_share=float(random.uniform(0.05, 1.0))) for i in range(n)}
        share, holdout = float(random.uniform(0.01, 0.9)), float(random.choice([0.0, 0.05, 0.3]))
        rollout = Rollout(id="x", route=ROUTE, number=1, challenger="new", phase="running", share=share, step=1)
        parts = with_challenger(cast(arms, {}), arms, rollout, rules({"share": share / 2}, {"share": share}))
        row = dict(zip(parts.arms, random.dirichlet(np.ones(n + 1)).tolist(), strict=True))
        found = capped({"": row}, parts, holdout)[""]
        assert list(found) == list(row)
        assert sum(found.values()) == pytest.approx(1.0)
        assert min(found.values()) >= 0.0
        assert (1.0 - holdout) * found["new"] <= share + 1e-9
        assert found["new"] == pytest.approx(min(row["new"], share / (1.0 - holdout)))


def test_budgets_count_each_fact_once_and_forget_what_is_older_than_their_window() -> None:
    def failed(at: float, status: int = 502) -> Interaction:
        who = Answerer(LEAD, "base")
        return Interaction("e", at, "q", ROUTE, "t", "s", who, status=status, error="upstream_error")

    budget = ErrorBudget(objective=0.5, window=3600.0)
    at = 1_800_000_000.0
    facts = [(1, failed(at)), (2, failed(at)), (3, failed(at, 400)), (4, failed(at))]
    spent = Spent().plus(facts, budget.window).plus(facts, budget.window)
    assert spent.left(budget, at) == pytest.approx(1.0 - 3 / 2)
    assert spent.plus([(5, failed(at + 7200.0))], budget.window).left(budget, at + 7200.0) == 0.0, "one failure"
    assert spent.left(budget, at + 3 * 3600.0) == 1.0


def test_the_bench_says_how_far_each_bar_is_met() -> None:
    bench = Path(__file__).parents[1] / "bench" / "rollouts.py"
    done = subprocess.run(
        [sys.executable, str(bench), "--runs", "1", "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    kinds = json.loads(done.stdout)["kinds"]
    assert len(kinds) == 10
    for one in kinds.values():
        assert one["kept"]["minimums"]
        assert one["kept"]["none after"]
        assert one["promoted"] + one["rolled_back"] + one["paused"] + one["running"] == pytest.approx(1.0)


# What must hold though something is wrong.


def test_a_full_disk_keeps_no_challenger_on_stage(house: House) -> None:
    version = house.begun()
    assert house.share(version) > 0
    same = {"messages": [{"role": "user", "content": "again"}], "input_hash": "h"}
    asked = [
        Interaction(
            event_id=f"a{n}", at=house.now + n, request_id=f"{n:032x}", route=ROUTE, tenant="t", session="twice",
            answerer=Answerer(LEAD, "base"), status=200, answer="so", thread=Thread("asked", f"said{n}"), **same,
        )
        for n in range(2)
    ]  # fmt: skip
    house.journal.append(asked)
    house.ask("rollback")
    full = house.controller(journal=Full(house.journal))
    house.one = full
    with contextlib.suppress(StateError):
        house.step()
    assert house.share(version) == 0.0
    assert house.rollout.phase == "rolled_back"


def test_undo_undoes_one_champion_though_the_controller_was_quicker(house: House) -> None:
    first = house.begun(1)
    until(house, "promoted", first)
    second = house.begun(2)
    until(house, "promoted", second)

    class Quick:
        """A store whose controller takes its step right after each write."""

        def __getattr__(self, name: str) -> Any:
            return getattr(house.store, name)

        def swap(self, name: str, old: bytes | None, new: bytes | None) -> bool:
            done = house.store.swap(name, old, new)
            if name.startswith("rollout/"):
                house.step()
            return done

    assert undo(Quick(), Registry(house.store), ROUTE, "ann", "why", house.now, house.rules) == (second, first)  # type: ignore[arg-type]
    assert house.registry.aliases(ROUTE) == {"champion": first}
    assert "quarantined" not in house.registry.tags(first)


def test_what_was_excused_in_the_shadow_counts_again_before_users(house: House) -> None:
    rail = {"metric": "error_rate", "worse_by": 1.5, "action": "pause"}
    house.plan(rules({"shadow": 0.5}, {"share": 0.5}, guardrails=[rail]))
    version = house.begun()
    shadowed = [
        Shadow(
            event_id=f"s{n}", at=house.now, route=ROUTE, tenant="t", rollout=house.rollout.id, model=version, of=f"{n}",
            error="upstream_error", duration=1.0, shown_duration=1.0,
        )
        for n in range(100)
    ]  # fmt: skip
    house.journal.append(shadowed)
    house.step(20.0)
    assert house.rollout.phase == "paused"
    ask(house.store, ROUTE, "resume", "ann", "seen", house.now, house.rules, standing_of(house.store, ROUTE))
    house.step(20.0)
    assert (house.rollout.step, house.rollout.excused) == (1, ())


def test_half_of_the_evidence_is_none_when_it_could_not_be_read_back(house: House) -> None:
    version = house.begun()
    house.sessions(100, {version: 1.0, LEAD: 0.0})
    house.step()

    class Torn:
        def __init__(self) -> None:
            self.times = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(house.journal, name)

        def heard_about(self, *words: Any) -> Any:
            self.times += 1
            if self.times == 1:
                raise StateUnavailable("the disk is away")
            return house.journal.heard_about(*words)

    other = house.controller(owner="one", journal=Torn())
    with contextlib.suppress(StateError):
        house.step(controller=other)
    house.step(controller=other)
    standing = standing_of(house.store, ROUTE)
    assert standing is not None
    assert standing.challenger.judged + standing.control.judged == 100


def test_erased_data_ends_a_rollout_that_has_not_begun(house: House) -> None:
    house.plan(rules({"share": 0.2}, require_approval=["begin"]))
    version = house.propose()
    house.step()
    house.registry.tag(version, "erased", "a user asked")
    ask(house.store, ROUTE, "approve", "ann", "fine", house.now, house.rules)
    house.step()
    assert house.rollout.phase == "rolled_back"


def test_more_than_half_at_once_is_no_rollout() -> None:
    with pytest.raises(ValidationError, match="more than half before anything is proven"):
        rules({"shadow": 0.1}, {"share": 0.6})
