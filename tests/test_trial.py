"""What is known of a rollout's sessions: the same in whatever order it comes, and each of them once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.rollout import Rollout
from router.rollout_policy import Guardrail, Stage
from router.rollout_policy import Rollout as Policy
from router.stats import Evidence, overlap, scores, tuned_rho, variance_to_detect
from router.trial import BASELINE_MASS, DETECT, LEAST_JUDGED, ROW, Heard, Standing, Trial, Watched
from telemetry.events import Answerer, Interaction, Shadow

NOW = 1_800_000_000.0
ROLLOUT = Rollout(
    id="x", route="r", number=1, challenger="new", control="old", phase="running", share=0.2, step=1, baseline=0.6,
    began=NOW - 1000, step_began=NOW - 500,
)  # fmt: skip
STAGES = (Stage(shadow=0.1), Stage(share=0.2))
POLICY = Policy(stages=STAGES)
SHADOWING = Rollout(
    id="x", route="r", number=1, challenger="new", control="old", phase="running", step=0, step_began=NOW - 500
)


def answer(session: str, arm: str = "new", p: float = 0.2, rival: float = 0.7, **fields: Any) -> Interaction:
    drawn = {name: fields.pop(name) for name in ("rollout", "policy", "unopposed") if name in fields}
    known = {"at": NOW - 100, "event_id": f"e-{session}-{fields.get('at', 0)}", "duration": 1.0, "first_byte": 0.2}
    return Interaction(
        request_id=f"q-{session}",
        route="r",
        tenant="t",
        session=session,
        answerer=Answerer(arm, arm, propensity=p, rival=rival, **({"rollout": "x", "policy": "thompson"} | drawn)),
        **(known | fields),
    )


def copy(name: str, **fields: Any) -> Shadow:
    known = {"at": NOW - 100, "duration": 1.0, "shown_duration": 1.0, "characters": 10, "shown_characters": 10}
    return Shadow(event_id=name, route="r", tenant="t", model="new", of=name, **({"rollout": "x"} | known | fields))


def stands(trial: Trial, policy: Policy = POLICY, rollout: Rollout = ROLLOUT, now: float = NOW) -> Standing:
    return trial.standing(rollout, policy, now)


def watched(trial: Trial, rollout: Rollout = ROLLOUT, now: float = NOW, **rail: Any) -> Watched:
    policy = Policy(stages=STAGES, guardrails=(Guardrail(**({"action": "rollback"} | rail)),))
    return trial.standing(rollout, policy, now).guardrails[0]


def bulk(n: int, seed: int = 0, p: float = 0.2, **columns: Any) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    rows = np.zeros(n, ROW)
    rows["at"], rows["p"], rows["k"] = NOW - 5000 + np.arange(n) / 10, p, 1.0 - p
    rows["ours"] = random.random(n) < p
    rows["reward"] = math.nan
    rows["latency"] = np.exp(0.3 * random.standard_normal(n))
    rows["first_byte"] = rows["latency"]
    for name, value in columns.items():
        rows[name] = value(rows, random) if callable(value) else value
    return rows


def of(rows: np.ndarray[Any, Any], window: float = 0.0) -> Trial:
    trial = Trial(ROLLOUT, window)
    trial.add(rows)
    return trial


# What counts.


Told = Callable[[Trial], None]
REQUESTS: list[Interaction] = [
    answer("s1"),
    answer("s2", "old", 0.7, 0.2, error="upstream_error"),
    answer("s3", at=NOW - 300, duration=2.0),
    answer("s4", "old", 0.7, 0.2, at=NOW - 400, error="client_left"),
]
HEARD: dict[str, Heard] = {"s1": Heard(1.0, False, True), "s2": Heard(0.0, True, True), "s4": Heard(None, False, True)}


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(REQUESTS), again=st.lists(st.sampled_from(REQUESTS), max_size=3))
def test_sessions_count_once_in_whatever_order_they_are_told(
    order: list[Interaction], again: list[Interaction]
) -> None:
    trial, plain = Trial(ROLLOUT), Trial(ROLLOUT)
    for told, facts in ((trial, [*order, *again]), (plain, REQUESTS)):
        for fact in facts:
            told.request(fact)
        for session, heard in HEARD.items():
            told.heard(("t", session), heard)
            told.heard(("t", session), heard)
    assert stands(trial) == stands(plain)
    assert (stands(plain).challenger.sessions, stands(plain).control.sessions) == (2, 2)
    assert (stands(plain).control.errors, stands(plain).control.flagged, stands(plain).control.reacted) == (1, 1, 2)


def test_a_later_turn_can_only_add_an_error() -> None:
    trial = Trial(ROLLOUT)
    trial.request(answer("s", at=NOW - 50))
    trial.request(answer("s", at=NOW - 40, duration=9.0))
    assert stands(trial).challenger.latency["p50"] == 1.0
    trial.request(answer("s", at=NOW - 30, error="upstream_cut"))
    trial.request(answer("s", at=NOW - 20))
    assert (stands(trial).challenger.sessions, stands(trial).challenger.errors) == (1, 1)


def test_a_revised_reward_replaces_the_one_before_and_may_go_away() -> None:
    trial = Trial(ROLLOUT)
    trial.request(answer("s"))
    trial.heard(("t", "s"), Heard(1.0, True, True))
    trial.heard(("t", "s"), Heard(0.25, False, True))
    assert (stands(trial).challenger.reward, stands(trial).challenger.flagged) == (0.25, 0)
    trial.heard(("t", "s"), Heard(None, False, False))
    assert (stands(trial).challenger.judged, stands(trial).challenger.reacted) == (0, 0)


@pytest.mark.parametrize(
    "fact",
    [
        answer("s", policy="pinned"),
        answer("s", policy="fallback"),
        answer("s", rollout="w"),
        answer("s", rollout=""),
        answer("s", unopposed=True),
        answer("s", "third"),
        answer("s", rival=0.0),
        answer("s", rival=1.0),
    ],
)
def test_a_session_that_drew_neither_arm_in_this_rollout_takes_no_part(fact: Interaction) -> None:
    trial = Trial(ROLLOUT)
    trial.request(fact)
    trial.heard(("t", "s"), Heard(1.0, True, True))
    assert ("t", "s") not in trial
    assert stands(trial).challenger.sessions == stands(trial).control.sessions == 0


def test_another_tenants_session_of_the_same_name_is_another() -> None:
    trial = Trial(ROLLOUT)
    trial.request(answer("s"))
    trial.heard(("other", "s"), Heard(1.0, True, True))
    assert (stands(trial).challenger.sessions, stands(trial).challenger.judged) == (1, 0)


def test_of_a_step_those_judged_sessions_count_that_began_in_it() -> None:
    trial = Trial(ROLLOUT)
    for session, at in (("before", NOW - 501), ("in", NOW - 500), ("unheard", NOW)):
        trial.request(answer(session, at=at))
        if session != "unheard":
            trial.heard(("t", session), Heard(0.5, False, True))
    trial.request(answer("control", "old", 0.7, 0.2))
    trial.heard(("t", "control"), Heard(0.5, False, True))
    assert stands(trial).judged_in_step == 1


# The test.


def test_scores_are_those_of_the_statistics() -> None:
    trial, evidence = Trial(ROLLOUT), Evidence()
    random = np.random.default_rng(1)
    rewards = random.random(60).tolist()
    baseline = (BASELINE_MASS * 0.6 + sum(rewards)) / (BASELINE_MASS + 60)
    for n, reward in enumerate(rewards):
        ours, p = bool(n % 3 == 0), float(random.choice([0.05, 0.2, 0.5]))
        k = 0.9 - p
        trial.request(answer(f"s{n}", "new" if ours else "old", *((p, k) if ours else (k, p))))
        trial.heard(("t", f"s{n}"), Heard(reward, False, True))
        h = float(overlap(p, k))
        evidence = evidence.plus(float(scores(1 if ours else -1, p if ours else k, reward, baseline, h)), h)
    alpha = 0.04  # guardrails have the fifth of it
    rho = tuned_rho(variance_to_detect(DETECT, alpha), alpha, 1)
    found = stands(trial)
    assert (found.lower, found.upper) == pytest.approx(evidence.interval(alpha, rho, 1))
    assert found.difference == pytest.approx(evidence.s / evidence.h)


def test_without_evidence_nothing_is_said() -> None:
    found = stands(Trial(ROLLOUT))
    assert (found.verdict, found.difference, found.lower, found.better) == ("inconclusive", None, None, False)
    assert not any(one.tripped for one in found.guardrails)


def test_a_few_bad_sessions_are_no_failure_and_many_are() -> None:
    judged = {"reward": lambda rows, _: np.where(rows["ours"], 0.0, 1.0)}
    rows = bulk(4000, p=0.05, **judged)
    last = int(np.flatnonzero(rows["ours"])[LEAST_JUDGED - 1])
    assert stands(of(rows[:last])).verdict == "inconclusive"
    assert stands(of(rows)).verdict == "failed"


@pytest.mark.parametrize(("gain", "verdict", "better"), [(0.2, "successful", True), (-0.2, "failed", False)])
def test_the_verdict_is_by_margin_and_zero(gain: float, verdict: str, better: bool) -> None:
    rows = bulk(6000, reward=lambda rows, random: random.random(6000) < 0.5 + gain * rows["ours"])
    found = stands(of(rows))
    assert (found.verdict, found.better) == (verdict, better)


def test_the_level_of_both_arms_may_drift_while_the_share_rises() -> None:
    parts = [bulk(3000, 1, 0.05, reward=0.2), bulk(3000, 2, 0.5, reward=0.9)]
    found = stands(of(np.concatenate(parts)))
    assert found.challenger.reward is not None
    assert found.control.reward is not None
    assert found.challenger.reward > found.control.reward + 0.2, "in the total it seems better"
    assert found.difference == pytest.approx(0.0, abs=0.05)
    assert not found.better


# Guardrails.


def test_guardrails_of_a_like_challenger_do_not_trip() -> None:
    rows = bulk(
        20_000,
        error=lambda rows, random: random.random(20_000) < 0.02,
        flagged=lambda rows, random: random.random(20_000) < 0.01,
        reacted=lambda rows, random: random.random(20_000) < 0.5,
    )
    assert [one.metric for one in stands(of(rows)).guardrails if one.tripped] == []


@pytest.mark.parametrize(
    ("rail", "columns"),
    [
        ({"metric": "error_rate", "worse_by": 1.5}, {"error": (0.02, 0.1)}),
        ({"metric": "error_rate", "above": 0.05}, {"error": (0.2, 0.2)}),
        ({"metric": "flag_rate", "worse_by": 2.0}, {"flagged": (0.01, 0.1)}),
        ({"metric": "signal_rate", "worse_by": 1.5}, {"reacted": (0.2, 0.6)}),
        ({"metric": "signal_rate", "worse_by": 1.5}, {"reacted": (0.6, 0.2)}),
        ({"metric": "signal_rate", "below": 0.5}, {"reacted": (0.3, 0.3)}),
        ({"metric": "satisfaction", "worse_by": 1.2}, {"reward": (0.9, 0.4)}),
        ({"metric": "satisfaction", "below": 0.6}, {"reward": (0.4, 0.4)}),
    ],
)
def test_a_guardrail_of_sessions_trips(rail: dict[str, Any], columns: dict[str, tuple[float, float]]) -> None:
    made = {
        name: lambda rows, random, rates=rates: random.random(3000) < np.where(rows["ours"], rates[1], rates[0])
        for name, rates in columns.items()
    }
    assert watched(of(bulk(3000, **made)), **rail).tripped


@pytest.mark.parametrize("metric", ["latency_p50", "latency_p95", "latency_p99", "first_byte_p95"])
def test_a_guardrail_of_times_trips_when_they_are_three_times_as_long(metric: str) -> None:
    column = metric.rpartition("_")[0]
    slow = {column: lambda rows, random: np.exp(0.3 * random.standard_normal(6000)) * np.where(rows["ours"], 3.0, 1.0)}
    assert watched(of(bulk(6000, **slow)), metric=metric, worse_by=2.0).tripped
    assert not watched(of(bulk(6000)), metric=metric, worse_by=1.5).tripped
    assert watched(of(bulk(6000)), metric=metric, above=0.1).tripped


def test_an_hour_in_which_all_answers_are_slow_trips_nothing() -> None:
    slow = {"latency": lambda rows, random: random.random(3000) + 5.0}
    quick = {"latency": lambda rows, random: random.random(12_000)}
    rows = np.concatenate([bulk(3000, 1, 0.5, **slow), bulk(12_000, 2, 0.05, **quick)])
    found = watched(of(rows), metric="latency_p95", worse_by=2.0)
    assert not found.tripped


def test_more_or_fewer_sessions_than_were_drawn_trip_the_sample_ratio_and_the_holdout_does_not() -> None:
    random = np.random.default_rng(3)
    rows = bulk(20_000, p=0.2)
    rows["k"] = 0.05 / 2 + 0.95 * 0.8  # propensities count both ways to the control
    rows["p"] = 0.95 * 0.2
    rows["ours"] = random.random(20_000) < rows["p"] / (rows["p"] + rows["k"])
    assert not watched(of(rows), metric="sample_ratio").tripped
    lost = rows[~(rows["ours"] & (random.random(20_000) < 0.2))]
    assert watched(of(lost), metric="sample_ratio").tripped
    gone = rows[rows["ours"] | (random.random(20_000) < 0.8)]
    assert watched(of(gone), metric="sample_ratio").tripped


def test_sessions_whose_users_had_no_time_to_react_are_not_held_against_the_rate_of_signals() -> None:
    rows = bulk(2000, reacted=lambda rows, _: rows["at"] < NOW - 4980)
    fresh, heard = of(rows, window=1e6), of(rows, window=60.0)
    assert not watched(fresh, metric="signal_rate", below=0.3).tripped
    assert watched(heard, metric="signal_rate", below=0.3).tripped


def test_reactions_that_come_late_to_both_arms_trip_nothing_while_the_share_rises() -> None:
    def late(rows: Any, random: Any) -> Any:
        age = NOW - 3500 - rows["at"]
        return random.random(rows.size) < np.clip(age / 1000, 0.0, 0.7)

    rows = np.concatenate([bulk(9000, 1, 0.05, reacted=late), bulk(6000, 2, 0.5, reacted=late)])
    assert not watched(of(rows), metric="signal_rate", worse_by=1.5).tripped


def test_evidence_lies_between_none_and_enough() -> None:
    wild = bulk(3000, error=lambda rows, _: rows["ours"], flagged=lambda rows, _: ~rows["ours"])
    shown = {one.metric: one.evidence for one in stands(of(wild)).guardrails}
    assert (shown["error_rate"], shown["flag_rate"]) == (1.0, 0.0)
    assert all(0.0 <= evidence <= 1.0 for evidence in shown.values())


# The shadow.


def test_a_shadow_is_compared_with_what_was_shown() -> None:
    trial = Trial(SHADOWING)
    trial.shadow(copy("a", duration=2.0, characters=30))
    trial.shadow(copy("a", duration=2.0, characters=30))
    trial.shadow(copy("b", error="upstream_error", at=NOW - 900))
    trial.shadow(copy("c", shown_error="upstream_error"))
    trial.shadow(copy("d", rollout="another"))
    found = stands(trial, rollout=SHADOWING)
    expected = {"compared": 3, "errors": 1, "shown_errors": 1, "length_ratio": 3.0, "latency_ratio": 2.0}
    assert found.shadow == expected
    assert found.judged_in_step == 2


def test_copies_of_which_none_was_answered_have_no_ratios() -> None:
    trial = Trial(SHADOWING)
    trial.shadow(copy("a", error="upstream_error"))
    found = stands(trial, rollout=SHADOWING).shadow
    assert (found["length_ratio"], found["latency_ratio"]) == (None, None)


@pytest.mark.parametrize(
    ("rail", "fields"),
    [
        ({"metric": "error_rate", "worse_by": 1.5}, {"error": "upstream_error"}),
        ({"metric": "error_rate", "above": 0.1}, {"error": "upstream_error"}),
        ({"metric": "latency_p95", "worse_by": 2.0}, {"duration": 3.0}),
        ({"metric": "latency_p50", "above": 2.0}, {"duration": 3.0}),
        ({"metric": "first_byte_p95", "worse_by": 2.0}, {"first_byte": 9.0, "duration": 9.0}),
    ],
)
def test_a_guardrail_trips_in_the_shadow(rail: dict[str, Any], fields: dict[str, Any]) -> None:
    trial, like = Trial(SHADOWING), Trial(SHADOWING)
    for n in range(300):
        trial.shadow(copy(f"c{n}", **fields))
        like.shadow(copy(f"c{n}"))
    assert watched(trial, SHADOWING, **rail).tripped
    assert not watched(like, SHADOWING, **rail).tripped


def test_both_failing_on_the_same_requests_is_no_harm() -> None:
    trial = Trial(SHADOWING)
    for n in range(500):
        trial.shadow(copy(f"c{n}", error="upstream_error", shown_error="upstream_error"))
    assert not watched(trial, SHADOWING, metric="error_rate", worse_by=1.5).tripped


def test_a_million_sessions_are_looked_at_in_less_than_a_second() -> None:
    n = 1_000_000
    trial = of(bulk(n, reward=0.5, error=lambda rows, random: random.random(n) < 0.01))
    began = time.process_time()
    stands(trial)
    assert time.process_time() - began < 1.0  # 0.25 s on an idle core


def test_sessions_that_are_missing_on_one_side_are_no_difference() -> None:
    trial, random = Trial(ROLLOUT), np.random.default_rng(3)
    for n in range(1200):
        ours = bool(random.random() < 0.5)
        if ours and n > 800:
            continue  # its adapter is gone: the champion stands in, which counts for nobody
        trial.request(answer(f"s{n}", "new" if ours else "old", 0.5, 0.5))
        trial.heard(("t", f"s{n}"), Heard(float(random.random() < 0.85), False, True))
    found = stands(trial)
    assert found.verdict != "failed"
    assert found.difference is not None
    assert abs(found.difference) < 0.05


def test_who_leaves_before_the_first_byte_waited_that_long() -> None:
    trial = Trial(ROLLOUT)
    for n in range(600):
        ours = n % 2 == 0
        gone = {"error": "client_left", "duration": 30.0, "first_byte": None} if ours else {}
        trial.request(answer(f"s{n}", "new" if ours else "old", 0.5, 0.5, **gone))
    slow = Guardrail(metric="latency_p99", above=2.0, action="rollback")
    (watched,) = stands(trial, POLICY.model_copy(update={"guardrails": (slow,)})).guardrails
    assert watched.tripped


def test_what_a_client_asked_wrongly_is_no_failure_of_the_version() -> None:
    trial = Trial(ROLLOUT)
    for n in range(400):
        ours = n % 2 == 0
        wrong = {"error": "upstream_error", "status": 400} if ours else {}
        trial.request(answer(f"s{n}", "new" if ours else "old", 0.5, 0.5, **wrong))
    assert stands(trial).challenger.errors == 0
