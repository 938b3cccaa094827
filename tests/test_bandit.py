"""The arithmetic of the bandit against brute force: Monte Carlo, dense linear algebra, and formulas written out."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router.arms import Snapshot, Sums
from router.bandit import (
    BUCKET,
    PRIOR_VARIANCE,
    SIBLING_MASS,
    SIBLING_VARIANCE,
    Posterior,
    believe,
    believe_segments,
    best_of,
    bucket_of,
    draw,
    epsilon_greedy,
    family,
    posteriors,
    probability_best,
    reward_variance,
    thompson_weights,
    top_two,
    unit_hash,
    with_caps,
    with_floor,
)

Floats = NDArray[np.float64]
DRAWS = 100_000
CLOSE = 5 * math.sqrt(0.25 / DRAWS) + 1e-3
"""Five standard errors of a frequency over DRAWS draws (at most 0.0016 each), and what `probability_best` may err."""
NOTHING = np.zeros(3)


def simulated(means: Floats, sds: Floats, seed: int = 0) -> Floats:
    """How often each arm is the best of DRAWS draws from all."""
    drawn = np.random.default_rng(seed).normal(means, sds, (DRAWS, len(means)))
    return np.bincount(drawn.argmax(axis=1), minlength=len(means)) / DRAWS


def sums_of(n: Floats, averages: Floats, variance: float = 0.05) -> tuple[Floats, Floats, Floats]:
    """Σw, Σwr and Σwr² of n rewards with these averages and this variance."""
    n, averages = np.asarray(n, float), np.asarray(averages, float)
    return n, n * averages, n * (averages**2 + variance)


# Which arm is best.


@pytest.mark.parametrize("arms", [2, 3, 5, 10, 20])
def test_the_probability_of_being_best_is_what_monte_carlo_finds(arms: int) -> None:
    rng = np.random.default_rng(arms)
    means, sds = rng.uniform(0.4, 0.6, arms), rng.uniform(0.02, 0.2, arms)
    assert probability_best(means, sds) == pytest.approx(simulated(means, sds), abs=CLOSE)


@pytest.mark.parametrize("arms", [2, 4, 20])
def test_arms_with_very_unlike_certainty_are_compared_rightly(arms: int) -> None:
    means = np.random.default_rng(arms).normal(0.5, 0.02, arms)
    sds = 10.0 ** np.linspace(-6, 0, arms)
    assert probability_best(means, sds) == pytest.approx(simulated(means, sds), abs=CLOSE)


def test_two_arms_are_compared_as_the_normal_distribution_says() -> None:
    for gap, one, other in [(0.0, 0.1, 0.1), (0.1, 0.1, 0.2), (0.3, 1e-6, 0.3), (-0.05, 1e-4, 1e-7)]:
        exact = 0.5 * math.erfc(-gap / math.hypot(one, other) / math.sqrt(2))
        found = probability_best(np.array([0.5 + gap, 0.5]), np.array([one, other]))
        assert found[0] == pytest.approx(exact, abs=1e-3)


def test_a_batch_of_comparisons_equals_one_by_one() -> None:
    rng = np.random.default_rng(7)
    means, sds = rng.normal(0.5, 0.1, (4, 3, 6)), rng.uniform(1e-4, 0.3, (4, 3, 6))
    batch = probability_best(means, sds)
    assert batch.shape == means.shape
    assert batch.sum(-1) == pytest.approx(1.0)
    for at in np.ndindex(4, 3):
        assert batch[at] == pytest.approx(probability_best(means[at], sds[at]), abs=1e-12)


def test_a_single_arm_is_the_best_and_equal_arms_share() -> None:
    assert probability_best(np.array([0.3]), np.array([0.1])).tolist() == [1.0]
    assert probability_best(np.full(5, 0.3), np.full(5, 0.1)) == pytest.approx(0.2)
    assert probability_best(np.array([0.6, 0.5]), np.zeros(2)) == pytest.approx([1.0, 0.0])
    assert best_of([Posterior(0.5, 0.1, 3), Posterior(0.5, 0.1, 3)]) == pytest.approx(0.5)


# What is believed of an arm.


def test_without_data_an_arm_is_believed_to_be_as_its_prior() -> None:
    means, sds = believe(NOTHING, NOTHING, NOTHING, 0.7, 4.0)
    assert means == pytest.approx(0.7)
    assert sds == pytest.approx(math.sqrt(PRIOR_VARIANCE / 4.0))


def test_without_data_a_learned_prior_mean_is_a_half_and_as_uncertain_as_a_coin() -> None:
    means, sds = believe(NOTHING, NOTHING, NOTHING, None, 4.0)
    assert means == pytest.approx(0.5)
    assert sds == pytest.approx(math.sqrt(PRIOR_VARIANCE / 4.0 + 0.25))


def test_with_a_fixed_prior_an_arm_is_believed_as_the_textbook_says() -> None:
    n, s, ss = sums_of(np.array([10.0, 40.0, 0.0]), np.array([0.2, 0.9, 0.0]))
    means, sds = believe(n, s, ss, 0.6, 2.0)
    sigma2 = (0.25 + 50 * 0.05) / (1.0 + 50)
    assert reward_variance(n, s, ss) == pytest.approx(sigma2)
    precision = n / sigma2 + 2.0 / PRIOR_VARIANCE
    assert sds == pytest.approx(1 / np.sqrt(precision))
    assert means == pytest.approx((s / sigma2 + 0.6 * 2.0 / PRIOR_VARIANCE) / precision)


def test_with_a_learned_prior_all_arms_are_believed_as_dense_linear_algebra_says() -> None:
    n, s, ss = sums_of(np.array([10.0, 200.0, 0.0, 3.0]), np.array([0.2, 0.9, 0.0, 0.5]))
    sigma2, v, k = float(reward_variance(n, s, ss)), PRIOR_VARIANCE / 5.0, len(n)
    prior = np.eye(k) * v + 0.25  # arms share the unknown mean, so they covary
    covariance = np.linalg.inv(np.linalg.inv(prior) + np.diag(n / sigma2))
    expected = covariance @ (s / sigma2 + np.linalg.inv(prior) @ np.full(k, 0.5))
    means, sds = believe(n, s, ss, None, 5.0)
    assert means == pytest.approx(expected)
    assert sds == pytest.approx(np.sqrt(np.diag(covariance)))


def test_an_unheard_arm_is_expected_to_be_about_as_good_as_its_siblings() -> None:
    n, s, ss = sums_of(np.array([300.0, 300.0, 0.0]), np.array([0.9, 0.86, 0.0]))
    learned, _ = believe(n, s, ss, None, 4.0)
    fixed, _ = believe(n, s, ss, 0.5, 4.0)
    assert fixed[2] == 0.5
    assert 0.75 < learned[2] < 0.9
    few, _ = believe(n / 100, s / 100, ss / 100, None, 4.0)
    assert 0.5 < few[2] < learned[2], "the more is heard of siblings, the more it counts"


def test_beliefs_of_many_routes_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(3)
    n, s, ss = sums_of(rng.uniform(0, 50, (6, 4)), rng.uniform(0, 1, (6, 4)))
    for mean in (None, 0.4):
        means, sds = believe(n, s, ss, mean, 3.0)
        for row in range(6):
            one = believe(n[row], s[row], ss[row], mean, 3.0)
            assert means[row] == pytest.approx(one[0])
            assert sds[row] == pytest.approx(one[1])


def test_posteriors_name_what_believe_computes() -> None:
    found = posteriors(["a", "b"], {"a": Sums(10, 8, 7)}, 0.5, 2.0)
    means, sds = believe(np.array([10.0, 0]), np.array([8.0, 0]), np.array([7.0, 0]), 0.5, 2.0)
    assert found["a"] == Posterior(means[0], sds[0], 10.0)
    assert found["b"] == Posterior(means[1], sds[1], 0.0)
    low, high = found["a"].interval()
    assert (low + high) / 2 == pytest.approx(means[0])
    assert high - low == pytest.approx(2 * 1.96 * sds[0])


# Segments.


def between_segments(n: Floats, s: Floats, sigma2: float) -> float:
    """The variance of an arm's means between segments, by DerSimonian and Laird's moments, in loops."""
    excess, scale = SIBLING_MASS * SIBLING_VARIANCE, SIBLING_MASS
    for arm in range(n.shape[1]):
        heard = [(w, total / w) for w, total in zip(n[:, arm], s[:, arm], strict=True) if w > 0]
        if not heard:
            continue
        total = sum(w for w, _ in heard)
        grand = sum(w * average for w, average in heard) / total
        excess += sum(w * (average - grand) ** 2 for w, average in heard) - (len(heard) - 1) * sigma2
        scale += total - sum(w * w for w, _ in heard) / total
    return max(1e-4, excess / scale)


def dense(n: Floats, s: Floats, sigma2: float, mean: float | None, mass: float) -> tuple[Floats, Floats]:
    """Means and sds of every arm in every segment and a new one, from the whole prior covariance at once."""
    segments, arms = n.shape[0] + 1, n.shape[1]
    tau2, v = between_segments(n, s, sigma2), PRIOR_VARIANCE / mass
    same_arm = np.kron(np.ones((segments, segments)), np.eye(arms))
    prior = tau2 * np.eye(segments * arms) + v * same_arm + (0.25 if mean is None else 0.0)
    precision = np.append(n, np.zeros((1, arms))) / sigma2
    heard = np.append(s, np.zeros((1, arms))) / sigma2
    covariance = np.linalg.inv(np.linalg.inv(prior) + np.diag(precision))
    centre = np.full(segments * arms, 0.5 if mean is None else mean)
    means = covariance @ (heard + np.linalg.inv(prior) @ centre)
    return means.reshape(segments, arms), np.sqrt(np.diag(covariance)).reshape(segments, arms)


@pytest.mark.parametrize("mean", [None, 0.3])
@pytest.mark.parametrize(("segments", "arms"), [(1, 1), (1, 3), (4, 2), (8, 3)])
def test_segments_are_believed_as_dense_linear_algebra_says(segments: int, arms: int, mean: float | None) -> None:
    rng = np.random.default_rng(segments * 10 + arms)
    n = rng.uniform(0, 60, (segments, arms)) * (rng.uniform(size=(segments, arms)) > 0.2)
    n, s, ss = sums_of(n, rng.uniform(0.2, 0.9, (segments, arms)))
    sigma2 = float(reward_variance(n.ravel(), s.ravel(), ss.ravel()))
    means, sds = believe_segments(n, s, ss, mean, 4.0)
    expected, spread = dense(n, s, sigma2, mean, 4.0)
    assert means == pytest.approx(expected, abs=1e-6)
    assert sds == pytest.approx(spread, abs=1e-6)


def test_a_segment_far_from_its_siblings_is_shrunk_towards_them() -> None:
    averages = np.array([[0.5], [0.5], [0.5], [0.5], [0.9]])
    for heard in (3.0, 30.0):
        n, s, ss = sums_of(np.array([[100.0]] * 4 + [[heard]]), averages)
        means, _ = believe_segments(n, s, ss, 0.5, 4.0)
        assert means[4, 0] < 0.9 - 0.01
        assert means[4, 0] > means[0, 0] + 0.01
        alone, _ = believe(n[4], s[4], ss[4], 0.5, 4.0)
        assert abs(means[0, 0] - 0.5) < abs(means[4, 0] - 0.5)
        if heard == 30.0:
            assert means[4, 0] == pytest.approx(alone[0], abs=0.1), "its own evidence wins in the end"


def test_a_segment_without_data_is_believed_as_one_nobody_has_seen() -> None:
    n, s, ss = sums_of(np.array([[50.0, 10.0], [0.0, 0.0], [20.0, 70.0]]), np.array([[0.4, 0.8], [0, 0], [0.5, 0.7]]))
    means, sds = believe_segments(n, s, ss, None, 4.0)
    assert means.shape == sds.shape == (4, 2)
    assert means[1] == pytest.approx(means[3])
    assert sds[1] == pytest.approx(sds[3])
    assert (sds[3] > sds[0]).all()


def test_without_data_every_segment_is_the_prior_and_a_sibling_apart() -> None:
    empty = np.zeros((2, 3))
    means, sds = believe_segments(empty, empty, empty, 0.4, 4.0)
    assert means == pytest.approx(0.4)
    assert sds == pytest.approx(math.sqrt(PRIOR_VARIANCE / 4.0 + SIBLING_VARIANCE))


def test_a_single_segment_knows_more_than_one_nobody_has_seen() -> None:
    n, s, ss = sums_of(np.array([[80.0, 80.0]]), np.array([[0.3, 0.8]]))
    means, sds = believe_segments(n, s, ss, 0.5, 4.0)
    assert means.shape == (2, 2)
    assert means[0] == pytest.approx([0.3, 0.8], abs=0.02)
    assert means[0, 0] < means[1, 0] < 0.5
    assert (sds[1] > sds[0]).all()


def test_weights_of_a_segment_are_those_of_drawing_each_arms_mean_first() -> None:
    n, s, ss = sums_of(
        np.array([[40.0, 5.0, 0.0], [3.0, 60.0, 9.0], [0.0, 8.0, 30.0]]),
        np.array([[0.5, 0.6, 0.0], [0.7, 0.55, 0.6], [0.0, 0.4, 0.5]]),
    )
    mean, mass = 0.5, 4.0
    sigma2 = float(reward_variance(n.ravel(), s.ravel(), ss.ravel()))
    tau2 = between_segments(n, s, sigma2)
    rng = np.random.default_rng(11)
    drawn = np.empty((4, 3, DRAWS))
    for arm in range(3):
        precision, weighted = mass / PRIOR_VARIANCE, mean * mass / PRIOR_VARIANCE
        for w, total in zip(n[:, arm], s[:, arm], strict=True):
            if w:
                precision += 1 / (tau2 + sigma2 / w)
                weighted += total / w / (tau2 + sigma2 / w)
        over = rng.normal(weighted / precision, precision**-0.5, DRAWS)
        for segment, (w, total) in enumerate([*zip(n[:, arm], s[:, arm], strict=True), (0.0, 0.0)]):
            known = w / sigma2 + 1 / tau2
            drawn[segment, arm] = rng.normal((total / sigma2 + over / tau2) / known, known**-0.5)
    means, sds = believe_segments(n, s, ss, mean, mass)
    assert means == pytest.approx(drawn.mean(-1), abs=5 * sds.max() / math.sqrt(DRAWS))
    assert sds == pytest.approx(drawn.std(-1), rel=5 / math.sqrt(2 * DRAWS))
    best = probability_best(means, sds)
    for segment in range(4):
        frequency = np.bincount(drawn[segment].argmax(axis=0), minlength=3) / DRAWS
        assert best[segment] == pytest.approx(frequency, abs=CLOSE)


# From beliefs to shares.


def test_top_two_takes_the_runner_up_of_a_second_draw_as_often_as_said() -> None:
    alpha, beta = [0.5, 0.3, 0.15, 0.05], 0.6
    expected = [0.0] * 4
    for first, p in enumerate(alpha):
        expected[first] += beta * p
        for second, q in enumerate(alpha):
            if second != first:  # drawn again until it differs
                expected[second] += (1 - beta) * p * q / (1 - p)
    assert top_two(np.array(alpha), beta) == pytest.approx(expected)


def test_top_two_explores_even_when_one_arm_is_certainly_the_best() -> None:
    assert top_two(np.array([1.0, 0.0]), 0.7) == pytest.approx([0.7, 0.3], abs=1e-4)
    assert top_two(np.array([[0.5, 0.5], [0.9, 0.1]]), 1.0) == pytest.approx(np.array([[0.5, 0.5], [0.9, 0.1]]))
    assert top_two(np.array([1.0]), 0.5).tolist() == [1.0]


def test_epsilon_greedy_takes_any_arm_with_probability_epsilon() -> None:
    assert epsilon_greedy(np.array([0.2, 0.9, 0.5, 0.1]), 0.2) == pytest.approx([0.05, 0.85, 0.05, 0.05])
    assert epsilon_greedy(np.array([0.9, 0.9, 0.1]), 0.3) == pytest.approx([0.45, 0.45, 0.1])
    rows = epsilon_greedy(np.array([[0.1, 0.2], [0.4, 0.3]]), 0.0)
    assert rows.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@given(
    raw=st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda raw: sum(raw) > 1e-6),
    part=st.floats(0, 1),
)
def test_no_arm_gets_less_than_the_floor_and_the_order_stays(raw: list[float], part: float) -> None:
    weights = np.array(raw) / sum(raw)
    floor = part / len(raw)
    found = with_floor(weights, floor)
    assert found.sum() == pytest.approx(1.0)
    assert (found >= floor - 1e-12).all()
    assert (np.diff(found[np.argsort(weights)]) >= -1e-12).all()
    if floor == 0:
        assert found.tolist() == weights.tolist()


def test_thompson_weights_are_the_probabilities_of_being_best_above_a_floor() -> None:
    sums = {"a": Sums(50, 30, 20), "b": Sums(20, 14, 11)}
    found = thompson_weights(["a", "b", "new"], sums, mean=None, mass=4.0, floor=0.02)
    beliefs = list(posteriors(["a", "b", "new"], sums, None, 4.0).values())
    expected = 0.02 + 0.94 * simulated(np.array([b.mean for b in beliefs]), np.array([b.sd for b in beliefs]))
    assert list(found.values()) == pytest.approx(expected, abs=CLOSE)


def test_a_bucket_begins_at_or_before_its_times() -> None:
    assert bucket_of(7 * BUCKET) == bucket_of(8 * BUCKET - 0.001) == 7 * BUCKET
    assert bucket_of(-1.0) == -BUCKET


# Sessions draw.


def published(weights: dict[str, float], holdout: float = 0.0, **segments: dict[str, float]) -> Snapshot:
    return Snapshot("route", 3, 0.0, "thompson", holdout, {"": weights, **segments})


shares = st.lists(st.one_of(st.just(0.0), st.floats(1e-4, 1)), min_size=1, max_size=6).filter(any)
GRID = 1500


@settings(max_examples=60, deadline=None)
@given(raw=shares, holdout=st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)))
@example(raw=[0.0, 1.0, 0.0], holdout=0.0)
@example(raw=[0.1] * 10, holdout=0.1)
def test_each_arm_is_drawn_as_often_as_its_propensity_says(raw: list[float], holdout: float) -> None:
    weights = {f"arm-{n}": share / sum(raw) for n, share in enumerate(raw)}
    snapshot = published(weights, holdout)
    choices = [draw(snapshot, (at + 0.5) / GRID) for at in range(GRID)]
    drawn = Counter(choice.arm for choice in choices)
    propensities = {arm: holdout / len(weights) + (1 - holdout) * weight for arm, weight in weights.items()}
    assert {c.arm: c.propensity for c in choices} == pytest.approx({arm: propensities[arm] for arm in drawn})
    for arm, propensity in propensities.items():
        # An arm is drawn on two intervals (one in the holdout); each may hold one grid point more or less.
        assert drawn[arm] / GRID == pytest.approx(propensity, abs=2 / GRID + 1e-9)
    assert all(c.holdout or weights[c.arm] > 0 for c in choices), "an arm without weight was drawn"
    assert sum(c.holdout for c in choices) == pytest.approx(holdout * GRID, abs=1)


@given(raw=shares, u=st.floats(0, 1, exclude_max=True))
@example(raw=[0.0, 0.0, 1.0], u=0.0)
@example(raw=[0.1] * 6 + [0.0], u=math.nextafter(1.0, 0.0))
def test_an_arm_without_weight_is_never_drawn_outside_the_holdout(raw: list[float], u: float) -> None:
    weights = {f"arm-{n}": share / sum(raw) for n, share in enumerate(raw)}
    assert weights[draw(published(weights), u).arm] > 0


def test_a_session_stays_in_the_holdout_whatever_the_weights() -> None:
    for weights in ({"a": 1.0, "b": 0.0}, {"a": 0.2, "b": 0.8}):
        assert draw(published(weights, 0.1), 0.02).arm == "a"
        assert draw(published(weights, 0.1), 0.08).arm == "b"
        assert draw(published(weights, 0.1), 0.08).holdout
        assert not draw(published(weights, 0.1), 0.1).holdout


def test_a_choice_says_what_it_was_drawn_from() -> None:
    snapshot = published({"a": 1.0, "b": 0.0}, code={"a": 0.0, "b": 1.0})
    assert draw(snapshot, 0.5, "code").arm == "b"
    assert draw(snapshot, 0.5, "mail").arm == "a"
    choice = draw(snapshot, 0.5, "mail")
    assert (choice.snapshot, choice.policy, choice.segment) == (3, "thompson", "mail")
    full = Snapshot("route", 3, 0.0, "thompson", 0.0, snapshot.segments, full=True)
    assert draw(full, 0.5, "mail").segment == "", "no more segments get sums of their own"
    assert draw(full, 0.5, "code").segment == "code"


# The hash of a session.


def test_sessions_hash_uniformly() -> None:
    bins, sessions = 100, 50_000
    seen = Counter(int(unit_hash("route", f"session-{n}") * bins) for n in range(sessions))
    expected = sessions / bins
    chi_square = sum((seen[bin_] - expected) ** 2 / expected for bin_ in range(bins))
    # 99 degrees of freedom: mean 99, sd √198 ≈ 14; beyond 170 lies 1e-5 of uniform hashes.
    assert chi_square < 170


def test_a_session_hashes_the_same_on_every_machine_and_for_ever() -> None:
    assert unit_hash("assistant", "session-1") == 0.7447393835702578
    assert unit_hash("assistant", "session-1") != unit_hash("assistants", "ession-1")
    assert unit_hash("other", "session-1") != 0.7447393835702578


# Kin: a new arm starts from its parent's posterior.

SUMS = [np.array(part) for part in ([900.0, 40.0, 0.0], [540.0, 30.0, 0.0], [360.0, 24.0, 0.0])]


@pytest.mark.parametrize("mean", [None, 0.3])
def test_without_parents_kin_changes_nothing(mean: float | None) -> None:
    alone, kin = believe(*SUMS, mean, 20.0), believe(*SUMS, mean, 20.0, family("abc", {}))
    np.testing.assert_allclose(alone, kin, rtol=1e-9)


def test_a_new_arm_starts_from_its_parents_mean_and_gain_widened() -> None:
    means, sds = believe(*SUMS, None, 20.0, family("abc", {"c": ("a", 0.05)}))
    assert means[2] == pytest.approx(means[0] + 0.05)
    assert sds[2] ** 2 == pytest.approx(sds[0] ** 2 + PRIOR_VARIANCE / 20.0)
    assert abs(means[0] - 0.6) < 0.01


def test_kin_is_the_joint_normal_conditioned() -> None:
    """Against textbook conditioning on the observed averages."""
    mean, v = 0.4, 0.25 / 20
    arms, parents = "abcd", {"b": ("a", 0.1), "c": ("b", -0.05), "d": ("a", 0.0)}
    n, average = np.array([50.0, 5.0, 20.0, 1.0]), np.array([0.7, 0.9, 0.4, 0.0])
    ss = n * (average**2 + 0.04)
    sigma2 = float(reward_variance(n, n * average, ss))
    path = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], float)
    prior, centre = v * path @ path.T, mean + np.array([0.0, 0.1, 0.05, 0.0])
    gain = prior @ np.linalg.inv(prior + np.diag(sigma2 / n))
    means, sds = believe(n, n * average, ss, mean, 20.0, family(arms, parents))
    np.testing.assert_allclose(means, centre + gain @ (average - centre))
    np.testing.assert_allclose(sds**2, np.diag(prior - gain @ prior))


def test_kin_in_segments_only_moves_where_arms_begin() -> None:
    n = np.array([[400.0, 0.0], [300.0, 0.0]])
    s, kin = n * np.array([[0.8], [0.2]]), family("ab", {"b": ("a", 0.0)})
    means, _ = believe_segments(n, s, s, None, 20.0, kin)
    assert means[0, 1] == pytest.approx(means[1, 1])
    assert means[2, 1] == pytest.approx(means[2, 0])


def test_an_arm_cannot_descend_from_itself() -> None:
    with pytest.raises(ValueError, match="its own ancestor"):
        family("ab", {"a": ("b", 0.0), "b": ("a", 0.0)})
    assert family("ab", {"a": ("gone", 0.5)}).gains.tolist() == [0.0, 0.0]


# Caps.


@given(
    weights=st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda w: sum(w) > 0.01),
    caps=st.lists(st.floats(0.02, 1), min_size=6, max_size=6),
)
def test_no_arm_exceeds_its_cap_and_the_rest_keep_their_proportions(weights: list[float], caps: list[float]) -> None:
    w, c = np.array(weights) / sum(weights), np.array(caps[: len(weights)])
    found = with_caps(w, c)
    assert found.sum() == pytest.approx(1.0)
    if c.sum() >= 1.0:
        assert (found <= c + 1e-9).all()
        free = (found < c - 1e-9) & (w > 1e-6)
        if free.sum() > 1:
            ratios = found[free] / w[free]
            np.testing.assert_allclose(ratios, ratios[0], rtol=1e-4)
    else:
        np.testing.assert_allclose(found, c / c.sum(), atol=1e-6)


def test_caps_that_bind_nobody_change_nothing() -> None:
    w = np.array([[0.1, 0.9], [0.5, 0.5]])
    np.testing.assert_array_equal(with_caps(w, np.array([1.0, 1.0])), w)
