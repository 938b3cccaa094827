"""Bounds that hold however often one looks: their coverage by simulation, their arithmetic by hand and by oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router.stats import (
    LEAN,
    Bernstein,
    Evidence,
    RatioCheck,
    asymptotic,
    asymptotic_path,
    baselines,
    bernstein_path,
    overlap,
    sample_ratio,
    scores,
    tuned_rho,
    variance_to_detect,
)

RUNS, LENGTH, ALPHA = 1000, 1000, 0.1
ALLOWED = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
"""A rate of α at most, plus three standard errors of RUNS runs (here 12.8 %): a sound test fails once in 700 seeds."""


def drifting_rollouts(difference: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores and weights [RUNS, LENGTH]: shares that follow the rewards seen, a level that drifts for both arms."""
    random = np.random.default_rng(7)
    seen, good, lead = np.zeros(RUNS), np.zeros(RUNS), np.zeros(RUNS)
    y, h = np.zeros((2, RUNS, LENGTH))
    for t in range(LENGTH):
        share = 0.05 + 0.9 / (1 + np.exp(-lead / 3))
        challenger = random.random(RUNS) < share
        level = 0.6 + 0.2 * math.sin(t / 150)
        reward = (random.random(RUNS) < level + difference * challenger).astype(float)
        h[:, t] = overlap(share, 1 - share)
        served = np.where(challenger, share, 1 - share)
        known = (0.5 + good) / (1 + seen)
        y[:, t] = scores(np.where(challenger, 1, -1), served, reward, known, h[:, t])
        seen, good, lead = seen + 1, good + reward, lead + np.where(challenger, 1, -1) * (reward - 0.5)
    return y, h


@pytest.fixture(scope="module")
def rollouts() -> tuple[np.ndarray, np.ndarray]:
    return drifting_rollouts(difference=-0.1)


# Scores.


def test_a_score_is_the_centred_reward_over_the_propensity() -> None:
    found = scores([1, -1, 0, 1], [0.2, 0.8, 0.5, 0.2], [1.0, 1.0, 1.0, 0.0], 0.6)
    assert found == pytest.approx([2.0, -0.5, 0.0, -3.0])
    assert scores(1, 0.2, 1.0, 0.6, overlap(0.2, 0.8)) == pytest.approx(0.32)


def test_overlap_weighted_scores_never_leave_the_unit_interval() -> None:
    share = np.linspace(0.001, 0.999, 999)
    for side, served in ((1, share), (-1, 1 - share)):
        assert np.abs(scores(side, served, 1.0, 0.0, overlap(share, 1 - share))).max() <= 1.0


def test_a_baseline_knows_only_rewards_before_its_own() -> None:
    assert baselines([1.0, 1.0, 0.0]) == pytest.approx([0.5, 0.75, 2.5 / 3])
    assert baselines([]).shape == (0,)


@pytest.mark.parametrize("propensity", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_a_propensity_outside_zero_to_one_is_refused(propensity: float) -> None:
    with pytest.raises(ValueError, match="propensity"):
        scores(1, propensity, 1.0, 0.5)
    with pytest.raises(ValueError, match="propensity"):
        overlap(propensity, 0.5)


@pytest.mark.parametrize("reward", [-0.01, 1.01, math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_in_zero_to_one_is_refused(reward: float) -> None:
    for call in (
        lambda: scores(1, 0.5, reward, 0.5),
        lambda: baselines([reward]),
        lambda: Bernstein(0.05).plus(reward),
        lambda: bernstein_path([0.5, reward], 0.05),
    ):
        with pytest.raises(ValueError, match="is not a number in"):
            call()


def test_scores_and_sums_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="score"):
        Evidence().plus(math.nan)
    with pytest.raises(ValueError, match="weight"):
        Evidence().plus(0.1, weight=0.0)
    with pytest.raises(ValueError, match="sum"):
        asymptotic(2, 2, math.inf, 2, 0.05, 1.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -1.0, math.nan])
def test_an_error_rate_outside_zero_to_one_is_refused(alpha: float) -> None:
    for call in (
        lambda: Evidence().interval(alpha, 1.0),
        lambda: tuned_rho(10.0, alpha),
        lambda: Bernstein(alpha),
        lambda: bernstein_path([0.5], alpha),
    ):
        with pytest.raises(ValueError, match="error rate"):
            call()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_rho_or_variance_that_is_not_positive_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Evidence().interval(0.05, wrong)
    with pytest.raises(ValueError, match="must be positive"):
        tuned_rho(wrong, 0.05)


# The asymptotic sequence.


def test_both_bounds_cover_the_difference_at_all_looks_while_shares_and_level_move(
    rollouts: tuple[np.ndarray, np.ndarray],
) -> None:
    lower, upper = asymptotic_path(*rollouts, ALPHA, tuned_rho(50.0, ALPHA))
    assert ((lower > -0.1) | (upper < -0.1)).any(axis=1).mean() <= ALLOWED


def test_each_one_sided_bound_covers_the_difference_at_all_looks(rollouts: tuple[np.ndarray, np.ndarray]) -> None:
    lower, upper = asymptotic_path(*rollouts, ALPHA, tuned_rho(50.0, ALPHA, sides=1), sides=1)
    assert (lower > -0.1).any(axis=1).mean() <= ALLOWED
    assert (upper < -0.1).any(axis=1).mean() <= ALLOWED


def test_the_simulation_can_tell_a_bound_that_peeking_breaks(rollouts: tuple[np.ndarray, np.ndarray]) -> None:
    y, h = rollouts
    n, total, s, ss = (np.cumsum(one, axis=1)[:, 49:] for one in (np.ones_like(y), h, y, y * y))
    wide = 1.645 * np.sqrt(ss - s * s / n)  # what would hold at one look
    assert (np.abs(s + 0.1 * total) > wide).any(axis=1).mean() > 3 * ALPHA


def test_sums_kept_one_by_one_give_the_bounds_of_the_whole_path(rollouts: tuple[np.ndarray, np.ndarray]) -> None:
    y, h = rollouts[0][0, :200], rollouts[1][0, :200]
    for sides in (1, 2):
        lower, upper = asymptotic_path(y, h, 0.05, 0.4, sides)
        evidence = Evidence()
        for t in range(200):
            evidence = evidence.plus(y[t], h[t])
            assert evidence.interval(0.05, 0.4, sides) == pytest.approx((lower[t], upper[t]))


def test_with_fewer_than_two_sessions_nothing_is_known() -> None:
    assert Evidence().interval(0.05, 1.0) == (-math.inf, math.inf)
    assert Evidence().plus(0.3).interval(0.05, 1.0) == (-math.inf, math.inf)
    assert np.isfinite(Evidence().plus(0.3).plus(0.3).interval(0.05, 1.0)).all()


def test_rewards_that_are_all_alike_do_not_make_a_bound_sure_at_once() -> None:
    lower, upper = Evidence(n=5, h=5.0, s=-1.0, ss=0.2).interval(0.05, 0.5, sides=1)
    assert lower < -0.2 < 0 < upper


def test_bounds_by_hand() -> None:
    # n = 100, mean 0.1, V = 26 − 100 · 0.1² = 25, ρ = 0.2: Vρ² = 1, so u = √(2(log 2 + 2 log 20)) / 0.2 = 18.2820
    lower, upper = Evidence(100, 100, 10.0, 26.0).interval(0.05, 0.2)
    assert (lower, upper) == pytest.approx((0.1 - 0.182820, 0.1 + 0.182820), abs=1e-6)
    # one side: u = (√(2(4 + log 2 + 2 log 20)) − 2) / 0.2 = 13.1134
    lower, upper = Evidence(100, 100, 10.0, 26.0).interval(0.05, 0.2, sides=1)
    assert (lower, upper) == pytest.approx((0.1 - 0.131134, 0.1 + 0.131134), abs=1e-6)


def test_the_bound_is_where_the_mixture_that_it_is_made_of_reaches_one_over_alpha() -> None:
    rho, v = 0.3, 60.0
    for sides, centre in ((2, 0.0), (1, LEAN * rho)):
        s = Evidence(1e12, 1.0, 0.0, v).interval(0.05, rho, sides)[1]
        bets = np.linspace(centre - 10 * rho, centre + 10 * rho, 100_001)
        prior = np.exp(-(((bets - centre) / rho) ** 2) / 2)
        mixture = (prior * np.exp(bets * s - bets**2 * v / 2)).sum() / prior.sum()
        assert mixture == pytest.approx(20, rel=1e-6)


def test_one_side_is_tighter_than_two_and_wider_than_a_single_look_would_need() -> None:
    sums = Evidence(400, 400, 0.0, 100.0)
    one = sums.interval(0.05, tuned_rho(100.0, 0.05, sides=1), sides=1)[1]
    two = sums.interval(0.05, tuned_rho(100.0, 0.05))[1]
    assert 1.645 * math.sqrt(100.0) / 400 < one < two


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_the_tuned_rho_is_tightest_where_it_was_tuned(alpha: float) -> None:
    x = tuned_rho(1.0, alpha) ** 2
    assert x == pytest.approx(math.log1p(x) - 2 * math.log(alpha), rel=1e-3)  # the root that the docstring names
    for sides in (1, 2):
        best = tuned_rho(40.0, alpha, sides)
        widths = [Evidence(200, 200, 0, 40).interval(alpha, best * by, sides)[1] for by in (0.8, 1.0, 1.25)]
        assert widths[1] == min(widths)


def test_a_difference_is_found_about_where_the_variance_to_detect_says() -> None:
    needed = variance_to_detect(0.1, 0.05)
    rho = tuned_rho(needed, 0.05, sides=1)
    h = needed / 0.25  # Σh at which scores of variance h/4 have gathered that much
    assert Evidence(1e9, h, -0.1 * h, needed).interval(0.05, rho, sides=1)[1] == pytest.approx(0.0, abs=1e-3)


def test_no_difference_cannot_be_detected() -> None:
    with pytest.raises(ValueError, match="difference"):
        variance_to_detect(0.0, 0.05)


def test_the_two_sided_bound_is_that_of_confseq() -> None:
    boundaries = pytest.importorskip("confseq.boundaries")
    v = np.array([5.0, 40.0, 300.0])
    rho = math.sqrt((2 * math.log(20) + math.log(1 + 2 * math.log(20))) / 40.0)  # confseq's closed form of tuned_rho
    _, upper = asymptotic(1e12, 1.0, 0.0, v, 0.05, rho)
    theirs = boundaries.normal_mixture_bound(v, 0.05, 40.0, 0.05, is_one_sided=False)
    assert upper == pytest.approx(np.asarray(theirs), rel=1e-6)


# Empirical Bernstein.


def test_bernstein_bounds_cover_the_mean_at_all_looks_from_the_first() -> None:
    rare = (np.random.default_rng(3).random((RUNS, LENGTH)) < 0.03).astype(float)
    lower, upper = bernstein_path(rare, ALPHA / 2)
    assert (lower > 0.03).any(axis=1).mean() <= ALLOWED / 2
    assert ((lower > 0.03) | (upper < 0.03)).any(axis=1).mean() <= ALLOWED


def test_bernstein_kept_one_by_one_gives_the_bounds_of_the_whole_path() -> None:
    values = np.random.default_rng(4).beta(1, 5, 100)
    lower, upper = bernstein_path(values, 0.025)
    one = Bernstein(0.025)
    for t, value in enumerate(values):
        one = one.plus(float(value))
        assert one.interval() == pytest.approx((lower[t], upper[t]))


def test_bernstein_by_hand() -> None:
    # λ₁ = ½ (cut): centre 1, half-width (¼(log 2 − ½) + log 20) / ½ = 6.088
    assert Bernstein(0.05).interval() == (0.0, 1.0)
    assert Bernstein(0.05).plus(1.0).interval() == (0.0, 1.0)
    lower, _ = bernstein_path(np.ones(20), 0.05)
    assert 0.5 < lower[-1] < 1.0
    # with λ = ½ throughout and costs (1 − μ̂)²(log 2 − ½), μ̂ = (½ + t − 1) / t
    costs = sum((1 - (t - 0.5) / t) ** 2 for t in range(1, 21)) * (math.log(2) - 0.5)
    assert lower[-1] == pytest.approx(1 - (costs + math.log(20)) / 10)


def test_values_without_variance_still_leave_doubt() -> None:
    lower, upper = bernstein_path(np.zeros(1000), 0.05)
    assert lower[-1] == 0.0
    assert 3 / 1000 < upper[-1] < 0.02


def test_bernstein_agrees_with_confseq() -> None:
    predmix = pytest.importorskip("confseq.predmix")
    values = np.random.default_rng(5).beta(2, 3, 2000)
    theirs = predmix.predmix_empbern_twosided_cs(values, alpha=0.1)
    ours = bernstein_path(values, 0.05)
    # versions of confseq differ in how the first values are centred, which 2,000 values leave little of
    assert [bound[-1] for bound in ours] == pytest.approx([bound[-1] for bound in theirs], abs=2e-3)


# Sample ratio.


def test_counts_that_fit_are_evidence_for_the_shares_and_counts_that_do_not_against() -> None:
    assert sample_ratio([950, 50], [0.95, 0.05]) < 0
    assert sample_ratio([0, 0], [0.95, 0.05]) == pytest.approx(0.0)
    assert sample_ratio([900, 100], [0.95, 0.05]) > math.log(1000)


def test_the_bayes_factor_by_hand() -> None:
    # Dirichlet(1, 1) against a fair coin, 3 heads and 1 tail: (3! 1! / 5!) / (1/2)⁴ = 0.8
    assert math.exp(sample_ratio([3, 1], [0.5, 0.5], mass=2.0)) == pytest.approx(0.8)


def test_with_shares_that_stay_the_check_session_by_session_is_the_bayes_factor_of_the_counts() -> None:
    shares = [0.7, 0.2, 0.1]
    check = RatioCheck((0.0,) * 3)
    served = np.random.default_rng(6).choice(3, 60, p=[0.5, 0.3, 0.2])
    for arm in served:
        check = check.plus(int(arm), shares)
    assert check.log_e == pytest.approx(sample_ratio(np.bincount(served, minlength=3).tolist(), shares))


def test_honest_shares_that_move_raise_an_alarm_as_rarely_as_said_and_a_broken_draw_raises_it() -> None:
    random = np.random.default_rng(8)

    def highest(broken: float, sessions: int) -> float:
        check, top = RatioCheck((0.0, 0.0)), 0.0
        for t in range(sessions):
            share = 0.05 + 0.4 * (t / sessions)
            check = check.plus(int(random.random() < share * broken), [1 - share, share])
            top = max(top, check.log_e)
        return top

    # 100 honest runs at α = 0.1: three standard errors above it are 19 alarms
    assert sum(highest(1.0, 300) >= math.log(10) for _ in range(100)) <= 19
    assert highest(0.6, 1500) > math.log(1000)


def test_shares_and_arms_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="propensity 0"):
        RatioCheck((0.0, 0.0)).plus(0, [0.0, 1.0])
    with pytest.raises(ValueError, match="sum to"):
        RatioCheck((0.0, 0.0)).plus(0, [0.5, 0.4])
    with pytest.raises(ValueError, match="does not fit"):
        RatioCheck((0.0, 0.0)).plus(2, [0.5, 0.5])
    with pytest.raises(ValueError, match="share 0 is not"):
        sample_ratio([1, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="counts and"):
        sample_ratio([1, 1, 1], [0.5, 0.5])
    with pytest.raises(ValueError, match="count nan"):
        sample_ratio([math.nan, 1], [0.5, 0.5])
