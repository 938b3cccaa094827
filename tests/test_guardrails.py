"""Guardrails: by chance they trip as seldom as they say, however often one looks; and soon where something is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from router.guardrails import MULTIPLES, SHARE, level_of, needed, odds, quantile_above, rarer, tail
from router.rollout_policy import Guardrail, Rollout, Stage

Floats = NDArray[np.float64]
ALPHA = 0.05
RUNS = 800
SHARES = np.repeat([0.05, 0.2, 0.5, 0.95], [1200, 600, 300, 100])
"""The challenger's propensity, session by session: a ramp."""
ENOUGH = ALPHA + 2.3 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
"""What a rate of ALPHA is found below, all but certainly."""
LIMIT = math.log(1 / ALPHA)


def drawn(random: np.random.Generator, ours: float, theirs: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whose each session is, and which of them show it."""
    who = random.random(SHARES.size) < SHARES
    return who, random.random(SHARES.size) < np.where(who, ours, theirs)


def path(who: NDArray[np.bool_], p: Floats, times: float) -> Floats:
    """log e after each of the events (looked at each time, as it is defined)."""
    null = times * p / (times * p + 1.0 - p)
    odd = MULTIPLES[:, None] * times * p / (MULTIPLES[:, None] * times * p + 1.0 - p)
    logs = np.cumsum(np.where(who, np.log(odd / null), np.log((1 - odd) / (1 - null))), axis=1)
    top = logs.max(0)
    return np.asarray(top + np.log(np.exp(logs - top).mean(0)))


def first(logs: Floats) -> float:
    """Its largest value, with one at the beginning."""
    return float(logs.max(initial=0.0))


@pytest.mark.parametrize(("rate", "times"), [(0.01, 1.0), (0.01, 1.5), (0.3, 1.5), (0.5, 2.0), (1.0, 1.0)])
def test_odds_trip_as_seldom_as_they_say_though_one_looks_at_every_session(rate: float, times: float) -> None:
    random = np.random.default_rng(1)
    tripped = 0
    for _ in range(RUNS):
        who, shows = drawn(random, rate, rate / times)
        tripped += first(path(who[shows], SHARES[shows], times)) >= LIMIT
    assert tripped / RUNS <= ENOUGH


@pytest.mark.parametrize("times", [1.0, 1.5, 2.0])
def test_odds_are_those_of_the_last_look(times: float) -> None:
    random = np.random.default_rng(2)
    who, shows = drawn(random, 0.1, 0.05)
    p = SHARES[shows]
    assert odds(who[shows], p, 1.0 - p, times) == pytest.approx(path(who[shows], p, times)[-1], abs=1e-9)
    assert odds(~who[shows], 1.0 - p, p, times) == pytest.approx(rarer(who[shows], p, 1.0 - p, times))


def test_odds_find_three_times_as_many_errors() -> None:
    random = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        who, shows = drawn(random, 0.18, 0.04)  # three times the limit of 1.5
        found += odds(who[shows], SHARES[shows], 1.0 - SHARES[shows], 1.5) >= LIMIT
    assert found / 200 >= 0.9


def test_rarer_finds_that_few_react() -> None:
    random = np.random.default_rng(4)
    who, shows = drawn(random, 0.1, 0.5)
    p = SHARES[shows]
    assert rarer(who[shows], p, 1.0 - p, 1.5) >= LIMIT
    assert odds(who[shows], p, 1.0 - p, 1.5) <= 0.0


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.95])
def test_a_tail_trips_as_seldom_as_it_says_though_one_looks_at_every_value(rate: float) -> None:
    random = np.random.default_rng(5)
    n = np.arange(1, 1501)
    worse = 1.0 - (1.0 - rate) / (1.0 + (MULTIPLES - 1.0) * rate)
    tripped = 0
    for _ in range(RUNS):
        beyond = np.cumsum(random.random(n.size) < rate)
        logs = beyond * np.log(worse / rate)[:, None] + (n - beyond) * np.log((1 - worse) / (1 - rate))[:, None]
        e = np.exp(logs - logs.max(0)).mean(0)
        path_ = logs.max(0) + np.log(e)
        tripped += first(path_) >= LIMIT
    assert tail(int(beyond[-1]), int(n[-1]), rate) == pytest.approx(path_[-1], abs=1e-6)
    assert tripped / RUNS <= ENOUGH


def test_a_tail_finds_three_times_as_many() -> None:
    random = np.random.default_rng(6)
    found = [tail(int(random.binomial(300, 0.15)), 300, 0.05) >= LIMIT for _ in range(200)]
    assert np.mean(found) >= 0.95


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_a_quantiles_bound_holds_but_for_its_chance(level: float) -> None:
    random = np.random.default_rng(7)
    bounds = [quantile_above(random.random(600), level) for _ in range(2000)]
    assert np.mean([bound is not None and bound < level for bound in bounds]) <= 0.018


@pytest.mark.parametrize(("enough", "level"), [(7, 0.5), (90, 0.95), (459, 0.99)])
def test_of_too_few_values_there_is_no_bound_and_of_just_enough_it_is_the_largest(enough: int, level: float) -> None:
    assert quantile_above(np.zeros(0), level) is None
    assert quantile_above(np.arange(enough - 1.0), level) is None
    assert quantile_above(np.arange(float(enough)), level) == enough - 1


@pytest.mark.parametrize(
    ("ours", "p", "k"),
    [
        ([], [], []),
        ([True], [1e-300], [1.0]),
        ([False], [1.0 - 1e-16], [1e-17]),
        ([True, False], [5e-324, 5e-324], [0.5, 0.5]),
    ],
)
def test_odds_are_numbers_at_the_edges(ours: list[bool], p: list[float], k: list[float]) -> None:
    for found in (odds, rarer):
        assert math.isfinite(found(np.array(ours, bool), np.array(p, float), np.array(k, float), 1.5))


def test_nothing_shown_is_no_evidence() -> None:
    none = np.zeros(0)
    assert odds(none.astype(bool), none, none, 2.0) == 0.0
    assert tail(0, 0, 0.05) == 0.0


@pytest.mark.parametrize(
    ("beyond", "n", "rate", "log_e"),
    [(0, 5, 0.0, 0.0), (1, 5, 0.0, math.inf), (5, 5, 1.0, -math.inf)],
)
def test_a_rate_of_none_or_all_is_decided_by_one_value(beyond: int, n: int, rate: float, log_e: float) -> None:
    assert tail(beyond, n, rate) == log_e


def test_millions_of_sessions_neither_overflow_nor_trip() -> None:
    random = np.random.default_rng(8)
    p = np.full(2_000_000, 0.2)
    who = random.random(p.size) < 0.2
    assert odds(who, p, 1.0 - p) < LIMIT
    assert rarer(who, p, 1.0 - p) < LIMIT
    assert math.isfinite(odds(~who, p, 1.0 - p))
    assert odds(~who, p, 1.0 - p) > 1000
    assert math.isfinite(tail(10**9, 10**9, 1e-9))
    assert tail(50_000, 1_000_000, 0.05) < LIMIT


def test_guardrails_share_what_is_theirs_of_the_chance() -> None:
    two = (
        Guardrail(metric="error_rate", above=0.1, action="rollback"),
        Guardrail(metric="sample_ratio", action="pause"),
    )
    warns = Guardrail(metric="flag_rate", above=0.1, action="warn")
    stages = (Stage(share=0.5),)
    policy = Rollout(stages=stages, guardrails=(*two, warns))
    assert needed(policy) == pytest.approx(math.log(2 / (SHARE * 0.05)))
    shadowed = Rollout(stages=(Stage(shadow=0.1), *stages), guardrails=two)
    assert needed(shadowed) == pytest.approx(math.log(4 / (SHARE * 0.05)))
    assert needed(Rollout(stages=stages, guardrails=(warns,))) == pytest.approx(math.log(1 / (SHARE * 0.05)))


def test_a_level_is_read_off_its_metric() -> None:
    assert [level_of(name) for name in ("latency_p50", "first_byte_p99")] == [0.5, 0.99]
