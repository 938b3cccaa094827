"""Linear Thompson sampling: its arithmetic against textbook regression, what it earns, its way through the house."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROUTE, MakeGateway, eventually
from fake_vllm import FakeVllm
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from router.arms import Cell, Snapshot, Sums
from router.bandit import (
    PRIOR_VARIANCE,
    Floats,
    believe,
    believe_segments,
    draw,
    family,
    probability_best,
    reward_variance,
    unit_hash,
    with_floor,
)
from router.features import DEFAULT, keys_of
from router.linear import (
    NO_SLOPE_VARIANCE,
    SHARED_SLOPE_VARIANCE,
    SLOPE_VARIANCE,
    believe_linear,
    hypotheses,
    regress,
)
from router.policy import Arm, Linear, Policy
from router.weights import beliefs, shares
from understudy.cli import main

NOW = 1_800_000_000.0
ARMS = {arm: Arm(model=arm) for arm in "abc"}
MASS = 20.0


def sums_of(kind: np.ndarray, arm: np.ndarray, reward: Floats, s: int, k: int) -> tuple[Floats, Floats, Floats]:
    """Σ1, Σr and Σr² [s, k] of sessions."""
    found = np.zeros((3, s, k))
    for power in range(3):
        np.add.at(found[power], (kind, arm), reward**power)
    return found[0], found[1], found[2]


# The arithmetic.


@st.composite
def logs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Floats, Floats]:
    """Sessions' kinds, arms and rewards, and the kinds' features [S, D]."""
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sessions, s, d, k = (draw(st.integers(*span)) for span in ((0, 60), (1, 8), (1, 4), (1, 4)))
    x = chance.uniform(-1, 1, (s, d))
    return chance.integers(0, s, sessions), chance.integers(0, k, sessions), chance.uniform(0, 1, sessions), x


@settings(max_examples=60, deadline=None)
@given(log=logs(), mean=st.none() | st.floats(0.1, 0.9), descends=st.booleans(), every=st.booleans())
def test_sums_by_kind_give_the_posterior_of_a_regression_on_every_session(
    log: tuple[np.ndarray, np.ndarray, Floats, Floats], mean: float | None, descends: bool, every: bool
) -> None:
    """Against the joint normal of all coefficients, conditioned on the sessions one by one."""
    kind, arm, reward, x = log
    k, d = 4, x.shape[1]
    n, s, ss = sums_of(kind, arm, reward, len(x), k)
    sigma2 = reward_variance(n.sum(0), s.sum(0), ss.sum(0))
    kin = family("abcd", {"b": ("a", 0.1), "c": ("b", 0.0)}) if descends else family("abcd", {})
    apart = np.full(d, every)

    like = kin.above @ kin.above.T
    blocks = [PRIOR_VARIANCE / MASS * like + (PRIOR_VARIANCE if mean is None else 0.0)]
    blocks += [(SLOPE_VARIANCE if every else NO_SLOPE_VARIANCE) * like + SHARED_SLOPE_VARIANCE] * d
    prior = np.zeros((k * (d + 1), k * (d + 1)))  # coefficient-major: all arms' intercepts first
    for j, block in enumerate(blocks):
        prior[j * k : (j + 1) * k, j * k : (j + 1) * k] = block
    centre = np.zeros(k * (d + 1))
    centre[:k] = (0.5 if mean is None else mean) + kin.gains
    design = np.array([np.kron([1.0, *x[i]], np.eye(k)[a]) for i, a in zip(kind, arm, strict=True)]).reshape(
        -1, len(prior)
    )
    observed = design @ prior @ design.T + sigma2 * np.eye(len(reward))
    gain = np.linalg.solve(observed, design @ prior).T
    theta, left = centre + gain @ (reward - design @ centre), prior - gain @ design @ prior
    rows = np.array([[np.kron([1.0, *point], np.eye(k)[a]) for a in range(k)] for point in x])

    means, joint, _ = regress(n, s, sigma2, x, x, apart, mean, MASS, kin)
    np.testing.assert_allclose(means, rows @ theta, atol=1e-6)
    np.testing.assert_allclose(joint, rows @ left @ rows.transpose(0, 2, 1), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(logs())
def test_hypotheses_are_weighed_by_how_likely_they_made_the_rewards(
    log: tuple[np.ndarray, np.ndarray, Floats, Floats],
) -> None:
    """Differences of log evidence, against the density of all sessions' rewards."""
    kind, arm, reward, x = log
    k, d = 4, x.shape[1]
    n, s, ss = sums_of(kind, arm, reward, len(x), k)
    sigma2 = reward_variance(n.sum(0), s.sum(0), ss.sum(0))
    found, expected = [], []
    for apart in (np.zeros(d, bool), np.ones(d, bool)):
        found.append(float(regress(n, s, sigma2, x, x, apart, 0.5, MASS)[2]))
        own = np.where(apart, SLOPE_VARIANCE, NO_SLOPE_VARIANCE)
        same = np.eye(k)[arm] @ np.eye(k)[arm].T
        covariance = PRIOR_VARIANCE / MASS * same + sigma2 * np.eye(len(reward))
        covariance += (x[kind] * (own * 1.0)) @ x[kind].T * same + SHARED_SLOPE_VARIANCE * x[kind] @ x[kind].T
        off = reward - 0.5
        expected.append(-(np.linalg.slogdet(covariance)[1] + off @ np.linalg.solve(covariance, off)) / 2)
    assert found[1] - found[0] == pytest.approx(expected[1] - expected[0], abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(log=logs(), cut=st.floats(0, 1))
def test_sums_of_two_halves_add_up_to_those_of_the_whole(
    log: tuple[np.ndarray, np.ndarray, Floats, Floats], cut: float
) -> None:
    kind, arm, reward, x = log
    at = int(cut * len(kind))
    whole = sums_of(kind, arm, reward, len(x), 4)
    halves = [sums_of(kind[part], arm[part], reward[part], len(x), 4) for part in (slice(at), slice(at, None))]
    added = [one + other for one, other in zip(*halves, strict=True)]
    for one, other in zip(
        believe_linear(*whole, x, x, None, MASS),
        believe_linear(added[0], added[1], added[2], x, x, None, MASS),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_kinds_that_are_alike_in_all_features_are_one_kind() -> None:
    """Splitting a kind's sums over two rows of the same x changes nothing."""
    n, s = np.array([[30.0, 10.0], [4.0, 8.0]]), np.array([[20.0, 4.0], [1.0, 7.0]])
    x = np.array([[0.5, -0.5], [-0.5, 0.5]])
    split = [np.vstack([part[:1] / 2, part[:1] / 2, part[1:]]) for part in (n, s, s)]
    whole = believe_linear(n, s, s, x, x, None, MASS)
    parted = believe_linear(split[0], split[1], split[2], x[[0, 0, 1]], x, None, MASS)
    for one, other in zip(whole, parted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_where_no_feature_varies_it_believes_what_thompson_does() -> None:
    n, s = np.array([[300.0, 100.0, 5.0]]), np.array([[200.0, 80.0, 1.0]])
    zero = np.zeros((1, 3))
    means, sds, _ = believe_linear(n, s, s, zero, zero, None, MASS)
    np.testing.assert_allclose([means, sds], believe(n, s, s, None, MASS), rtol=1e-6)


def test_what_all_arms_have_in_common_does_not_blur_which_is_best() -> None:
    n = np.full((1, 2), 4000.0)
    s = n * [0.6, 0.65]
    means, sds, common = believe_linear(n, s, s * 0.65, np.zeros((1, 1)), np.array([[3.0]]), None, MASS)
    own = np.sqrt(sds**2 - common[:, None])
    assert (own < 0.8 * sds).all()
    assert probability_best(means, own)[0, 1] > probability_best(means, sds)[0, 1] > 0.5


def test_evidence_says_which_feature_matters() -> None:
    """Arms differ by the first of three features only: elsewhere the kinds' shares hardly differ."""
    x = np.array([[a, b, c] for a in (-0.5, 0.5) for b in (-0.5, 0.5) for c in (-0.5, 0.5)])
    n = np.full((8, 2), 150.0)
    s = n * np.where(x[:, :1] > 0, [0.7, 0.5], [0.5, 0.7])
    means, _, _ = believe_linear(n, s, s, x, x, None, MASS)
    difference = means[:, 0] - means[:, 1]
    np.testing.assert_allclose(np.abs(difference), 0.2, atol=0.03)
    assert hypotheses(3)[1].tolist() == [True, False, False]
    assert hypotheses(1) == [np.zeros(1, bool), np.ones(1, bool)]


# What it earns.

KINDS = np.array([[a, b, c] for a in (0.0, 0.5, 1.0) for b in (0.0, 1.0) for c in (0.0, 1.0)])
OFTEN = np.outer([0.3, 0.5, 0.2], np.outer([0.7, 0.3], [0.8, 0.2]).ravel()).ravel()


def regret(policy: str, coefficients: Floats, sessions: int, runs: int) -> float:
    """Mean over runs of what the best arm of each session's kind would have earned more. `coefficients` [K, 1 + D]."""
    chance = np.random.default_rng(7)
    means = coefficients[:, 0] + KINDS @ coefficients[:, 1:].T
    s, k = means.shape
    sums, lost, rows = np.zeros((3, runs, s, k)), 0.0, np.arange(runs)
    weights = np.full((runs, s, k), 1.0 / k)
    x = KINDS - OFTEN @ KINDS
    for t in range(sessions):
        if t % 20 == 0 and t:
            n, r, rr = sums
            if policy == "thompson":
                found = probability_best(*believe(n.sum(1), r.sum(1), rr.sum(1), None, MASS))[:, None]
            elif policy == "by kind":
                parts = [believe_segments(n[run], r[run], rr[run], None, MASS) for run in range(runs)]
                found = np.stack([probability_best(m[:-1], sd[:-1]) for m, sd in parts])
            else:
                m, sd, common = believe_linear(n, r, rr, x, x, None, MASS)
                found = probability_best(m, np.sqrt(sd**2 - common[..., None]))
            weights = np.broadcast_to(with_floor(found, 0.01), (runs, s, k))
        kind = chance.choice(s, runs, p=OFTEN)
        arm = (chance.random(runs)[:, None] > np.cumsum(weights[rows, kind], 1)[:, :-1]).sum(1)
        reward = np.clip(means[kind, arm] + 0.25 * chance.standard_normal(runs), 0, 1)
        lost += float((means[kind].max(1) - means[kind, arm]).sum()) / runs
        for power in range(3):
            sums[power, rows, kind, arm] += reward**power
    return lost


def test_where_features_tell_nothing_it_loses_little_against_thompson() -> None:
    """Hard requests are hard for all arms; the best arm is the same for all of them."""
    flat = np.array([[0.6, -0.2, 0.1, 0.0], [0.65, -0.2, 0.1, 0.0], [0.7, -0.2, 0.1, 0.0]])
    linear, thompson = (regret(policy, flat, 600, 60) for policy in ("linear", "thompson"))
    assert linear < 1.35 * thompson, (linear, thompson)


def test_where_features_tell_arms_apart_it_beats_one_policy_for_all_and_one_for_each_kind() -> None:
    apart = np.array([[0.65, 0.0, -0.15, 0.0], [0.60, -0.1, 0.15, 0.1], [0.62, 0.1, 0.0, -0.1]])
    linear, thompson, by_kind = (regret(policy, apart, 600, 30) for policy in ("linear", "thompson", "by kind"))
    assert linear < 0.7 * thompson, (linear, thompson)
    assert linear < 0.95 * by_kind, (linear, by_kind)


# The policy.


def cells_of(rows: dict[tuple[str, str], tuple[float, float]]) -> dict[Cell, Sums]:
    """Cells of (segment, arm): (sessions, mean)."""
    return {Cell(seg, arm, int(NOW)): Sums(n, n * m, n * (m * m + 0.05)) for (seg, arm), (n, m) in rows.items()}


def learned() -> dict[Cell, Sums]:
    """a is better at code, b at all else; nobody asked for a schema yet."""
    rows = {}
    for length in range(5):
        for code, good, bad in ((0, "b", "a"), (1, "a", "b")):
            key = f"f1:length{length}.code{code}.tools0.schema0.script0"
            rows |= {(key, good): (60.0, 0.75), (key, bad): (60.0, 0.55)}
    return cells_of(rows)


def test_kinds_that_were_never_seen_have_shares_from_their_features() -> None:
    found = shares(Linear(kind="linear"), ARMS, learned(), NOW)
    assert set(found) == {"", *keys_of(DEFAULT)}
    unseen = {code: found[f"f1:length6.code{code}.tools1.schema0.script0"] for code in (0, 1)}
    for better, worse, row in (("a", "b", unseen[1]), ("b", "a", unseen[0])):
        assert row[better] > 0.6
        assert row[worse] < 0.05 < row["c"], "nobody heard c"


def test_every_kinds_shares_sum_to_one_and_keep_the_floor() -> None:
    policy = Linear(kind="linear")
    for cells in ({}, learned()):
        for row in shares(policy, ARMS, cells, NOW).values():
            assert sum(row.values()) == pytest.approx(1.0)
            assert min(row.values()) >= policy.floor - 1e-12


def test_sessions_are_drawn_as_often_as_their_logged_propensities_say() -> None:
    policy = Linear(kind="linear")
    snapshot = Snapshot(ROUTE, 1, NOW, policy.kind, policy.holdout, shares(policy, ARMS, learned(), NOW))
    for segment in ("f1:length2.code1.tools0.schema0.script0", "f1:length9", ""):
        drawn = [draw(snapshot, unit_hash(segment, str(session)), segment) for session in range(20_000)]
        propensities = {choice.arm: choice.propensity for choice in drawn}
        assert sum(propensities.values()) == pytest.approx(1.0)
        for arm, times in Counter(choice.arm for choice in drawn).items():
            assert times / len(drawn) == pytest.approx(propensities[arm], abs=0.015)


def test_the_average_request_and_those_of_no_kind_count_together() -> None:
    policy = Linear(kind="linear")
    foreign = cells_of({("mail", "c"): (400.0, 0.95), ("", "a"): (200.0, 0.5), ("", "b"): (200.0, 0.5)})
    found = beliefs(policy, ARMS, foreign, NOW)
    assert found.of("", "c").sessions == pytest.approx(400.0)
    assert all(row["c"] > 0.9 for row in shares(policy, ARMS, foreign, NOW).values())


def test_more_kinds_than_max_segments_are_listed_by_evidence() -> None:
    found = shares(Linear(kind="linear", max_segments=3), ARMS, learned(), NOW)
    assert len(found) == 4
    assert all("schema0" in segment for segment in found if segment)


def test_without_segments_it_is_thompson() -> None:
    """As prices and forecasts look at a route as a whole."""
    whole = Linear(kind="linear").model_copy(update={"segment_by": None})
    assert set(shares(whole, ARMS, learned(), NOW)) == {""}


def test_a_new_arm_is_like_its_parent_in_every_kind() -> None:
    arms = ARMS | {"d": Arm(model="d", parent="a")}
    found = beliefs(Linear(kind="linear"), arms, learned(), NOW)
    for code in (0, 1):
        segment = f"f1:length2.code{code}.tools0.schema0.script0"
        assert found.of(segment, "d").mean == pytest.approx(found.of(segment, "a").mean, abs=0.02)
        assert found.of(segment, "d").sd > found.of(segment, "a").sd


# What the operator writes, and what the gateway makes of it.


def test_only_features_that_there_are_can_be_written_each_once() -> None:
    policies: TypeAdapter[Policy] = TypeAdapter(Policy)
    linear = policies.validate_python({"kind": "linear", "features": ["turns", "image"]})
    assert isinstance(linear, Linear)
    assert (linear.features, linear.segment_by) == (("turns", "image"), "features")
    for features, at in ((["lenght"], 0), (["code", "code"], 1), ([], None)):
        with pytest.raises(ValidationError) as caught:
            policies.validate_python({"kind": "linear", "features": features})
        where = caught.value.errors()[0]["loc"]
        assert where[:2] == ("linear", "features"), (features, at, where)
    with pytest.raises(ValidationError, match="segment_by"):
        policies.validate_python({"kind": "linear", "segment_by": "tenant"})


def test_schema_and_explain_show_the_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    shown = json.loads(capsys.readouterr().out)["$defs"]["Linear"]["properties"]
    assert shown["features"]["items"]["enum"][:2] == ["length", "turns"]
    path = tmp_path / "understudy.yaml"
    path.write_text(
        "routes:\n  r:\n    upstreams: [http://127.0.0.1:1]\n    arms: {a: {model: m}}\n    policy: {kind: linear}\n"
    )
    assert main(["config", "explain", "--config", str(path), "--json"]) == 0
    assert "policy.features" in capsys.readouterr().out


def test_a_session_counts_in_the_kind_of_its_first_request(gateway: MakeGateway, fake: FakeVllm) -> None:
    gw = gateway(fake, policy={"kind": "linear", "features": ["code", "tools"]})
    session = {"x-understudy-session": "s"}
    code = gw.chat("Fix\n```\nx\n```", session)
    gw.chat("thanks", session)
    first, second = gw.wait_interactions(2)
    assert first.answerer.segment == second.answerer.segment == "f1:code1.tools0"
    gw.feedback({"response_id": code.json()["id"], "kind": "thumb", "value": True})
    gw.settled()
    with gw.store() as store:
        assert {cell.segment for cell in store.sums(ROUTE)} == {"f1:code1.tools0"}
        snapshot = eventually(lambda: store.snapshot(ROUTE))
        assert set(snapshot.segments) == {"", *(f"f1:code{c}.tools{t}" for c in (0, 1) for t in (0, 1))}
        row = snapshot.segments["f1:code1.tools0"]
    assert first.answerer.arm in row
