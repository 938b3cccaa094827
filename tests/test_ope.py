"""Off-policy evaluation: estimators by hand and by brute force, intervals by simulation, the command as used."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import ope
from router.ope import evaluate, folds_of, predict
from router.plan import RoutePlan
from router.policy import Arm, Reward, Split, Thompson
from telemetry.events import Answerer, Fact, Interaction, Signal
from telemetry.journal import Journal
from understudy.cli import main
from understudy.ope import PAGE, Judged, judged, probabilities

Array = np.ndarray[Any, Any]


# Estimators.

ARMS, PROPENSITIES, REWARDS = [0, 1, 0, 1], [0.5, 0.5, 0.8, 0.2], [1.0, 0.0, 0.5, 1.0]
TARGET = [[0.2, 0.8]] * 4  # weights 0.4, 1.6, 0.25, 4


def test_four_sessions_by_hand() -> None:
    found = evaluate(ARMS, PROPENSITIES, REWARDS, TARGET, np.full((4, 2), 0.5))
    assert found.ips.value == pytest.approx((0.4 + 0.125 + 4.0) / 4)
    assert found.snips.value == pytest.approx((0.4 + 0.125 + 4.0) / 6.25)
    assert found.ess == pytest.approx(6.25**2 / (0.16 + 2.56 + 0.0625 + 16.0))
    assert (found.largest_weight, found.mean_weight) == pytest.approx((4.0, 6.25 / 4))
    assert found.logged.value == pytest.approx(0.625)
    assert found.dr is not None
    assert found.gain is not None
    assert found.dr.value == pytest.approx(0.5 + (0.2 - 0.8 + 0.0 + 2.0) / 4)
    assert found.gain.value == pytest.approx(found.dr.value - 0.625)


def test_without_a_model_there_is_neither_dr_nor_gain() -> None:
    found = evaluate(ARMS, PROPENSITIES, REWARDS, TARGET)
    assert (found.dr, found.switch_dr, found.gain) == (None, None, None)


unit = st.floats(0.0, 1.0)


@st.composite
def logs(draw: st.DrawFn) -> tuple[Array, Array, Array, Array, Array]:
    n, k = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    shares = np.array(draw(st.lists(st.lists(st.floats(0.01, 1.0), min_size=k, max_size=k), min_size=n, max_size=n)))
    arms = draw(st.lists(st.integers(0, k - 1), min_size=n, max_size=n))
    propensities, rewards = (draw(st.lists(one, min_size=n, max_size=n)) for one in (st.floats(0.01, 1.0), unit))
    q = draw(st.lists(st.lists(unit, min_size=k, max_size=k), min_size=n, max_size=n))
    target = shares / shares.sum(1, keepdims=True)
    return np.array(arms), np.array(propensities), np.array(rewards), target, np.array(q)


@given(logs())
def test_the_estimators_are_what_their_formulas_say_session_by_session(log: tuple[Array, ...]) -> None:
    arms, propensities, rewards, target, q = log
    n, k = target.shape
    w = [target[i, arms[i]] / propensities[i] for i in range(n)]
    v = [sum(target[i, a] * q[i, a] for a in range(k)) for i in range(n)]
    found = evaluate(*log)
    assert found.dr is not None
    assert found.switch_dr is not None
    assert found.ips.value == pytest.approx(sum(w[i] * rewards[i] for i in range(n)) / n)
    assert found.snips.value == pytest.approx(sum(w[i] * rewards[i] for i in range(n)) / sum(w))
    assert found.ess == pytest.approx(sum(w) ** 2 / sum(one**2 for one in w))
    assert found.dr.value == pytest.approx(sum(v[i] + w[i] * (rewards[i] - q[i, arms[i]]) for i in range(n)) / n)
    cut = math.inf if found.switched_at is None else found.switched_at
    kept = (v[i] + (w[i] * (rewards[i] - q[i, arms[i]]) if w[i] <= cut else 0.0) for i in range(n))
    assert found.switch_dr.value == pytest.approx(sum(kept) / n)


@given(logs())
def test_intervals_hold_their_estimate_and_neither_end_leaves_what_a_mean_reward_can_be(log: tuple[Array, ...]) -> None:
    found = evaluate(*log)
    for one in (found.logged, found.ips, found.snips, found.dr, found.switch_dr):
        assert one is not None
        low, high = one.interval
        assert low <= one.value <= high
        assert low >= min(0.0, one.value) - 1e-9
        assert high <= max(1.0, one.value) + 1e-9


def expected(rewards: Array, shares: Array, of: Callable[[Array, Array, Array], float]) -> float:
    """The exact expectation of an estimate over all draws of arms, of two arms or more on a few prompts."""
    n, k = rewards.shape
    rows = np.arange(n)
    total = 0.0
    for draw in itertools.product(range(k), repeat=n):
        arms = np.array(draw)
        e = shares[rows, arms]
        total += float(e.prod()) * of(arms, e, rewards[rows, arms])
    return total


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_ips_and_dr_are_unbiased_however_wrong_the_model_is(seed: int) -> None:
    chance = np.random.default_rng(seed)
    rewards, wrong = chance.random((2, 3, 3))
    shares, target = chance.dirichlet(np.ones(3), (2, 3)) * 0.9 + 0.1 / 3

    def dr(arms: Array, e: Array, r: Array) -> float:
        found = evaluate(arms, e, r, target, wrong).dr
        assert found is not None
        return found.value

    truth = float((target * rewards).sum(1).mean())
    assert expected(rewards, shares, dr) == pytest.approx(truth)
    assert expected(rewards, shares, lambda *log: evaluate(*log, target).ips.value) == pytest.approx(truth)


@given(st.integers(0, 10_000))
@settings(max_examples=25)
def test_dr_is_unbiased_with_the_model_that_was_fitted_to_the_same_log(seed: int) -> None:
    chance = np.random.default_rng(seed)
    rewards, folds, x = chance.random((5, 2)), [0, 1, 0, 1, 2], chance.normal(size=(5, 1))
    shares, target = chance.dirichlet(np.ones(2), (2, 5)) * 0.9 + 0.05

    def dr(arms: Array, e: Array, r: Array) -> float:
        found = evaluate(arms, e, r, target, predict(arms, r, folds, 2, ["a", "a", "b", "b", "b"], x)).dr
        assert found is not None
        return found.value

    assert expected(rewards, shares, dr) == pytest.approx(float((target * rewards).sum(1).mean()))


def test_switch_dr_drops_what_one_enormous_weight_adds_and_is_dr_where_weights_are_alike() -> None:
    chance = np.random.default_rng(0)
    n = 500
    arms, rewards = chance.integers(0, 2, n), chance.random(n)
    q, even = np.full((n, 2), 0.5), np.full((n, 2), 0.5)
    calm = evaluate(arms, np.full(n, 0.5), rewards, even, q)
    assert calm.switched_at is None
    assert calm.switch_dr == calm.dr
    propensities = np.full(n, 0.5)
    propensities[7] = 1e-4
    wild = evaluate(arms, propensities, rewards, even, q)
    assert wild.switched_at is not None
    assert wild.switched_at < 5000.0
    assert wild.switch_dr is not None
    assert wild.dr is not None
    assert wild.switch_dr.se < wild.dr.se / 10


def test_an_arm_that_could_not_be_drawn_shows_as_weights_that_do_not_average_one() -> None:
    chance = np.random.default_rng(1)
    honest = chance.integers(0, 2, 4000)
    even = np.full((4000, 2), 0.5)
    assert not evaluate(honest, np.full(4000, 0.5), chance.random(4000), even).suspect
    only = np.zeros(4000, int)
    assert evaluate(only, np.ones(4000), chance.random(4000), even).suspect


def test_below_a_hundred_comparable_sessions_it_is_not_enough() -> None:
    def on(n: int) -> ope.Evaluation:
        return evaluate(np.zeros(n, int), np.ones(n), np.full(n, 0.5), np.ones((n, 1)))

    assert not on(99).enough
    assert on(100).enough
    none = evaluate([0, 0], [0.5, 0.5], [1.0, 1.0], [[0.0, 1.0]] * 2, np.full((2, 2), 0.5))
    assert (none.ess, none.enough) == (0.0, False)
    assert none.dr is not None
    assert none.dr.interval == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("propensities", [0.5, 0.0], r"propensities\[1\] is 0.0: must be more than 0"),
        ("propensities", [1.1, 0.5], r"propensities\[0\] is 1.1: must be more than 0 and at most 1"),
        ("propensities", [math.nan, 0.5], r"propensities\[0\] is nan"),
        ("propensities", [0.5], r"propensities \(1,\).*need one of each a session"),
        ("rewards", [0.5, 1.2], r"rewards\[1\] is 1.2: must lie between 0 and 1"),
        ("rewards", [math.nan, 0.5], r"rewards\[0\] is nan"),
        ("arms", [0, 2], r"arms\[1\] is 2: is none of the 2 arms of target"),
        ("arms", [-1, 0], r"arms\[0\] is -1"),
        ("arms", [0.0, 1.0], "arms must be whole numbers"),
        ("arms", [], "at least one"),
        ("target", [[0.5, 0.5], [0.5, 0.6]], r"target\[1\] sums to 1.1"),
        ("target", [[0.5, 0.5], [1.5, -0.5]], r"target\[1, 0\] is 1.5: must lie between 0 and 1"),
        ("target", [[0.5, 0.5]], r"target \(1, 2\): need a row of every arm for each of 2 sessions"),
        ("predictions", [[0.5, 0.5], [0.5, math.inf]], r"predictions\[1, 1\] is inf"),
        ("predictions", [[0.5], [0.5]], r"arms\[1\] is 1: is none of the 1 arms of predictions"),
    ],
)
def test_a_bad_value_is_named(place: str, value: object, said: str) -> None:
    good: dict[str, Any] = {
        "arms": [0, 1],
        "propensities": [0.5, 0.5],
        "rewards": [0.0, 1.0],
        "target": [[0.5, 0.5], [0.5, 0.5]],
        "predictions": [[0.5, 0.5], [0.5, 0.5]],
    }
    evaluate(**good)
    with pytest.raises(ValueError, match=said):
        evaluate(**good | {place: value})


# Intervals.


@given(st.integers(0, 1000), st.integers(1, 1000))
def test_of_coins_the_interval_is_that_of_wilson(heads: int, more: int) -> None:
    n = heads + more
    p, z = heads / n, ope.Z
    centre, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2),
    )
    se = math.sqrt(p * (1 - p) / n)
    assert p - ope._reach(se, n, p) == pytest.approx(centre - half, abs=1e-9)
    assert p + ope._reach(se, n, 1 - p) == pytest.approx(centre + half, abs=1e-9)


def test_rewards_that_are_all_alike_leave_room_for_what_was_not_seen() -> None:
    found = evaluate(np.zeros(200, int), np.ones(200), np.ones(200), np.ones((200, 1)))
    assert found.ips.interval == pytest.approx((200 / (200 + ope.Z**2), 1.0))


def test_a_difference_of_two_that_move_together_is_narrower_than_of_two_that_do_not() -> None:
    a, b = ope.Estimate(0.6, 0.02, (0.55, 0.64)), ope.Estimate(0.5, 0.02, (0.46, 0.55))
    apart, together = ope._difference(a, b, 0.0), ope._difference(a, b, 0.8)
    assert apart.interval == pytest.approx((0.1 - math.hypot(0.05, 0.05), 0.1 + math.hypot(0.04, 0.04)))
    assert apart.interval[0] < together.interval[0] < 0.1 < together.interval[1] < apart.interval[1]


RUNS = 400
MISSES = 0.05 + 3 * math.sqrt(0.05 * 0.95 / RUNS)
"""A rate of 5 %, plus three standard errors of RUNS runs (8.3 %)."""


@pytest.mark.parametrize(
    ("means", "n"), [((0.5, 0.4, 0.3), 1500), ((0.993, 0.98, 0.97), 400), ((0.03, 0.02, 0.05), 1000)]
)
def test_the_interval_of_dr_misses_no_more_often_than_said_rare_rewards_included(
    means: tuple[float, ...], n: int
) -> None:
    shares, target = np.array([0.8, 0.15, 0.05]), np.eye(3)[0] * 0.9 + 0.1 / 3
    chance, folds = np.random.default_rng(3), folds_of([str(i) for i in range(n)])
    truth, served = target @ means, shares @ means
    missed = plain = 0
    gains = 0
    for _ in range(RUNS):
        arms = chance.choice(3, n, p=shares)
        rewards = (chance.random(n) < np.array(means)[arms]).astype(float)
        found = evaluate(arms, shares[arms], rewards, np.tile(target, (n, 1)), predict(arms, rewards, folds, 3))
        assert found.dr is not None
        assert found.gain is not None
        missed += not found.dr.interval[0] <= truth <= found.dr.interval[1]
        plain += abs(found.dr.value - truth) > ope.Z * found.dr.se
        gains += not found.gain.interval[0] <= truth - served <= found.gain.interval[1]
    assert missed / RUNS <= MISSES
    assert gains / RUNS <= MISSES
    if means[0] > 0.99:
        assert plain / RUNS > MISSES  # what a normal interval would do: the simulation can tell


# The reward model.


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=40)
def test_nothing_that_a_session_brought_takes_part_in_the_guesses_for_its_fold(seed: int, with_features: bool) -> None:
    chance = np.random.default_rng(seed)
    n, k = 60, 3
    arms, rewards, folds = chance.integers(0, k, n), chance.random(n), chance.integers(0, 4, n)
    segments = [str(one) for one in chance.integers(0, 3, n)]
    x = chance.normal(size=(n, 2)) if with_features else None
    before = predict(arms, rewards, folds, k, segments, x)
    own = folds == folds[0]
    arms[own], rewards[own] = chance.integers(0, k, own.sum()), chance.random(own.sum())
    after = predict(arms, rewards, folds, k, segments, x)
    assert np.allclose(before[own], after[own], rtol=0.0, atol=1e-12)  # sums of others are totals less one's own
    assert not np.allclose(before[~own], after[~own], rtol=0.0, atol=1e-6)


def test_guesses_are_the_arms_means_shrunk_to_what_lies_above() -> None:
    arms, rewards = [0, 0, 1, 0], [1.0, 0.5, 0.0, 0.25]
    found = predict(arms, rewards, [0, 0, 0, 1], 2)
    overall = (1.5 + 0.5) / (3 + 1)  # for fold 1, of fold 0
    by_arm = (1.5 + 20 * overall) / (2 + 20)
    assert found[3, 0] == pytest.approx((1.5 + 20 * by_arm) / 22)
    assert found[3, 1] == pytest.approx((0.0 + 20 * (0.0 + 20 * overall) / 21) / 21)


def test_features_are_of_use_where_rewards_follow_them() -> None:
    chance = np.random.default_rng(2)
    x, arms = chance.random(600), chance.integers(0, 2, 600)
    rewards = np.where(arms == 0, x, 1 - x)
    folds = folds_of([str(i) for i in range(600)])
    rows = np.arange(600)
    with_x = np.abs(predict(arms, rewards, folds, 2, features=x)[rows, arms] - rewards).mean()
    without = np.abs(predict(arms, rewards, folds, 2)[rows, arms] - rewards).mean()
    assert with_x < 0.2 * without


def test_a_model_that_cannot_be_made_says_why() -> None:
    with pytest.raises(ValueError, match="2 sessions, 1 folds, 2 segments"):
        predict([0, 1], [0.5, 0.5], [0], 2)
    with pytest.raises(ValueError, match=r"features\[1\] is not a finite number"):
        predict([0, 1], [0.5, 0.5], [0, 1], 2, features=[[0.0], [math.inf]])
    with pytest.raises(ValueError, match="is none of the 1 arms"):
        predict([0, 1], [0.5, 0.5], [0, 1], 1)


def test_folds_are_a_sessions_own_and_about_as_large() -> None:
    names = [f"session-{i}" for i in range(2000)]
    found = folds_of(names)
    assert found.tolist() == folds_of(names[::-1])[::-1].tolist()
    assert np.bincount(found, minlength=ope.FOLDS).min() > 300


# A policy that learns, replayed.


def session(i: int, arm: str, reward: float, known: float) -> Judged:
    return Judged(f"s{i}", float(i), known, arm, 0.5, reward, "", "t", "")


@given(st.integers(0, 10_000), st.integers(0, 39))
@settings(max_examples=25)
def test_a_replayed_policy_knows_at_a_session_only_what_was_known_before_it(seed: int, changed: int) -> None:
    chance = random.Random(seed)
    arms = {"a": Arm(model="a"), "b": Arm(model="b")}
    log = [session(i, chance.choice("ab"), chance.random(), i + chance.random() * 20) for i in range(40)]
    other = list(log)
    other[changed] = session(changed, log[changed].arm, 1.0 - log[changed].reward, log[changed].known)
    policy = Thompson()
    before, after = (probabilities(policy, arms, one, one, 2) for one in (log, other))
    assert before.sum(1) == pytest.approx(1.0)
    assert before.min() >= policy.holdout / 2 + (1 - policy.holdout) * policy.floor - 1e-9
    unaware = [i for i in range(40) if log[changed].known >= i]
    assert np.array_equal(before[unaware], after[unaware])


# The command.

CONFIG = """\
state: sqlite:///{folder}/understudy.db
routes:
  assistant:
    upstreams: ["http://127.0.0.1:9"]
    arms: {{champion: {{model: base}}, challenger: {{model: good}}, newcomer: {{model: new}}}}
"""
CHALLENGER = "policy: {kind: split, shares: {challenger: 1.0}}"
SHARES = {"champion": 0.7, "challenger": 0.3}
MEANS = {"champion": 0.6, "challenger": 0.8}


class Place:
    """A folder with a config, a journal and a policy file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, folder / "understudy.db"
        self.config, self.policy = folder / "understudy.yaml", folder / "policy.yaml"
        self.config.write_text(CONFIG.format(folder=folder))

    def journal(self, *facts: Fact) -> None:
        with closing(Journal(self.database)) as journal:
            journal.append(facts)

    def serve(
        self, sessions: int, seed: int = 0, ago: float = 3600.0, propensity: float | None = None, segment: str = ""
    ) -> None:
        """Journal sessions of the last `ago` seconds, each with a thumb."""
        chance, now, facts = random.Random(seed), time.time(), list[Fact]()
        for i in range(sessions):
            arm = "champion" if chance.random() < SHARES["champion"] else "challenger"
            at = now - ago * (1 - i / sessions)
            served = Answerer(arm, "base", policy="thompson", segment=segment, propensity=propensity or SHARES[arm])
            name = f"{seed:x}{i:04x}"
            facts.append(Interaction(f"e{name}", at, name, "assistant", "t", f"s{name}", served, status=200))
            good = float(chance.random() < MEANS[arm])
            facts.append(Signal(f"v{name}", at, "thumb", "t", received_at=at, response_id=name, value=good))
        self.journal(*facts)

    def ope(self, policy: str, *words: str) -> int:
        self.policy.write_text(policy)
        return main(["ope", "--policy", str(self.policy), "--config", str(self.config), *words])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_better_split_is_told_from_what_was_served(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.serve(PAGE + 500)  # more than one page of facts, of which some sessions lie on two
    assert place.ope(CHALLENGER, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sessions"] == PAGE + 500
    low, high = found["estimates"]["dr"]["interval"]
    assert low < MEANS["challenger"] < high
    assert found["refused"] is None
    assert found["gain"]["interval"][0] > 0
    assert found["verdict"].startswith("This policy would have earned more than what was served: +0.")
    assert found["ess"] == pytest.approx(found["arms"][1]["sessions"])
    assert [arm["policy_share"] for arm in found["arms"]] == [0.0, 1.0, 0.0]
    assert place.ope("policy: {kind: split, shares: {champion: 0.7, challenger: 0.3}}") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No difference from what was served can be told" in said
    assert "doubly robust" in said
    assert place.ope("policy: {kind: split, shares: {champion: 1.0}}") == 0
    assert "would have earned less" in " ".join(capsys.readouterr().out.split())


def test_a_policy_that_learns_is_replayed(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.config.write_text(place.config.read_text().replace(", newcomer: {model: new}", ""))
    place.serve(1500)
    assert place.ope("policy: {kind: thompson, holdout: 0.1, half_life: 1d}", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    champion, challenger = found["arms"]
    assert champion["policy_share"] + challenger["policy_share"] == pytest.approx(1.0)
    assert challenger["policy_share"] > 0.7
    assert champion["policy_share"] >= 0.05
    assert found["gain"]["interval"][0] > 0
    assert found["notes"] == []


def test_a_policy_of_features_is_replayed_where_sessions_were_routed_by_them(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.config.write_text(place.config.read_text().replace(", newcomer: {model: new}", ""))
    linear = "policy: {kind: linear, features: [code, tools]}"
    place.serve(1500, segment="f1:code0.tools1")
    assert place.ope(linear, "--json") == 0
    assert json.loads(capsys.readouterr().out)["arms"][1]["policy_share"] > 0.7
    place.serve(10, seed=1, segment="f1:code0")
    assert place.ope(linear, "--json") == 1
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert refused.startswith("10 of 1,510 judged sessions were not routed by these features")


def test_what_a_replay_leaves_out_is_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.config.write_text(
        place.config.read_text().replace(", newcomer: {model: new}", "")
        + "    reward: {mode: calibrated, latency: {weight: 0.01}}\n"
    )
    place.serve(1500)
    assert place.ope("policy: {kind: thompson}", "--json") == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert [n for n in notes if "latency and calibration" in n], notes
    assert place.ope(CHALLENGER, "--json") == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_only_sessions_of_the_time_asked_for_count(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.serve(400, seed=1, ago=3 * 86400.0)
    place.serve(500, seed=2, ago=3600.0)
    assert place.ope(CHALLENGER, "--since", "2h", "--json") == 0
    assert 500 <= json.loads(capsys.readouterr().out)["sessions"] < 520


def test_it_is_refused_where_nothing_can_be_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(policy: str) -> str:
        assert place.ope(policy, "--json") == 1
        found = json.loads(capsys.readouterr().out)
        assert found["estimates"] is None
        assert found["gain"] is None
        assert found["notes"] == []
        assert place.ope(policy) == 1
        assert found["refused"][:30] in " ".join(capsys.readouterr().out.split())
        return str(found["refused"])

    assert refused(CHALLENGER) == "No session of that time has a reward, so there is nothing to say."
    place.serve(150)
    assert "Too few comparable sessions to say: 150 judged sessions are worth" in refused(CHALLENGER)
    place.serve(1500, seed=3)
    newcomer = refused("policy: {kind: split, shares: {champion: 0.9, newcomer: 0.1}}")
    assert newcomer == "No judged session drew newcomer, to which this policy gives 10.0%: what it earns is unknown."
    assert place.ope("policy: {kind: split, shares: {champion: 0.995, newcomer: 0.005}}") == 0


def test_a_journal_with_a_propensity_that_is_none_is_not_evaluated(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.serve(3, propensity=-0.5)
    assert place.ope(CHALLENGER) == 1
    assert "the journal cannot be evaluated: session s" in (said := capsys.readouterr().err)
    assert "a logged propensity of -0.5" in said


def test_weights_that_do_not_average_one_are_remarked(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.serve(1500, propensity=0.9)
    assert place.ope("policy: {kind: split, shares: {champion: 0.5, challenger: 0.5}}", "--json") == 0
    assert "The weights average 0.56 instead of 1" in json.loads(capsys.readouterr().out)["notes"][0]


def test_a_policy_file_that_cannot_be_used_says_line_and_key(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for policy, said in (
        ("policy:\n  kind: split\n  share: {champion: 1.0}\n", ':3: policy.share: unknown key; did you mean "shares"?'),
        ("policy: {kind: split, shares: {champion: 0.5}}", "the shares sum to 0.5"),
        ("policy: {kind: split, shares: {nobody: 1.0}}", "nobody"),
        ("politics: 1\n", ":1: politics: unknown key"),
        ("", "write one like"),
    ):
        assert place.ope(policy) == 1, policy
        err = capsys.readouterr().err
        assert said in err
        assert f"{place.policy}:" in err
    place.policy.unlink()
    assert main(["ope", "--policy", str(place.policy), "--config", str(place.config)]) == 1
    assert "policy.yaml" in capsys.readouterr().err


def test_wrong_usage_exits_2(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.ope(CHALLENGER, "--route", "nothing") == 2
    assert "--route must be one of assistant" in capsys.readouterr().err
    route = place.config.read_text().partition("  assistant:")[2]
    place.config.write_text(f"{place.config.read_text()}  other:{route}")
    assert place.ope(CHALLENGER) == 2
    assert "--route must be one of assistant, other" in capsys.readouterr().err
    for words in (["ope"], ["ope", "--policy", "p.yaml", "--since", "yesterday"]):
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        assert "--help" in capsys.readouterr().err


# Judged sessions.


def test_behaviour_counts_once_it_has_waited_and_a_vote_at_once(place: Place) -> None:
    plan = RoutePlan("assistant", {"a": Arm(model="a")}, Split(kind="split", shares={"a": 1.0}), Reward(window="1m"))
    copied, voted = (
        Interaction(f"e{n}", 1000.0, f"r{n}", "assistant", "t", f"s{n}", Answerer("a", "a")) for n in range(2)
    )
    copy = Signal("c", 1010.0, "copy", "t", received_at=1010.0, response_id="r0")
    thumb = Signal("v", 1010.0, "thumb", "t", received_at=1010.0, response_id="r1", value=1.0)
    place.journal(copied, voted, copy, thumb)
    with closing(Journal(place.database)) as journal:
        assert [one.key for one in judged(journal, plan, 0.0, 1069.0)] == ["1:t/s1"]
        after = {one.key: one for one in judged(journal, plan, 0.0, 1070.0)}
    assert {key: one.known for key, one in after.items()} == {"1:t/s0": 1070.0, "1:t/s1": 1010.0}
    assert after["1:t/s1"].reward == 1.0


def test_a_session_counts_once_though_its_requests_lie_on_several_pages(place: Place) -> None:
    plan = RoutePlan("assistant", {"a": Arm(model="a")}, Split(kind="split", shares={"a": 1.0}), Reward())
    place.journal(
        *(
            Interaction(f"e{n}", 1000.0 + n, f"r{n}", "assistant", "t", f"s{n % 2}", Answerer("a", "a"))
            for n in range(2 * PAGE + 10)
        ),
        Signal("v0", 9e3, "thumb", "t", received_at=9e3, response_id="r0", value=1.0),
        Signal("v1", 9e3, "thumb", "t", received_at=9e3, session="s1", value=0.0),
    )
    with closing(Journal(place.database)) as journal:
        found = sorted(judged(journal, plan, 0.0, 1e4), key=lambda one: one.key)
        assert [(one.at, one.reward) for one in found] == [(1000.0, 1.0), (1001.0, 0.0)]
        assert not list(judged(journal, plan, 1002.0, 1e4)), "they began before"
