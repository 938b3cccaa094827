"""Guardrails of a rollout: limits that are watched all the time and trip by chance with a known probability only. Pure.

Each is an e-value: a number whose mean is at most 1, at every time one may look, while the limit holds; so it ever
reaches 1/α with probability ≤ α (Ville's inequality; Ramdas, Grünwald, Vovk & Shafer 2023, "Game-theoretic statistics
and safe anytime-valid inference"). Two kinds, both likelihood ratios averaged over how bad it may be (`MULTIPLES`):

`odds`   Among sessions that show something (an error, a flag), each is the challenger's with probability
         p_c μ_c / (p_c μ_c + p_k μ_k), p being the propensities it was drawn with. While μ_c ≤ w μ_k that is at most
         w p_c / (w p_c + p_k). Only the events count, so rare ones are as exact as frequent ones, and nothing must be
         known of the rates. With w = 1 and all sessions it says whether each arm gets the sessions that it is to get.
`tail`   Of n values x lie beyond a limit, where at most a share `rate` may: Bernoulli(p ≤ rate).

Both are products over sessions, so neither the order nor the moment matters in which a session becomes known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from router.rollout_policy import Guardrail, Rollout

MULTIPLES = np.array([1.25, 1.6, 2.5, 4.0, 8.0, 16.0])
"""How many times beyond its limit something may be."""
SHARE = 0.2
"""Of the rollout's α, for all its guardrails together; the rest is the test's of the reward."""
SURE = 0.01
"""Chance that a control's quantile lies above what is taken for its upper bound."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def odds(ours: Bools, p: Floats, k: Floats, times: float = 1.0) -> float:
    """log e that the challenger shows something more than `times` as often as the control.

    Of each session that shows it [n]: is it the challenger's, and with what propensities were challenger (p) and
    control (k) drawn? 0 without any.
    """
    if not ours.size:
        return 0.0
    null = times * p / (times * p + k)
    begins = np.concatenate([[0], np.flatnonzero(null[1:] != null[:-1]) + 1])  # sessions of one snapshot are alike
    sizes = np.diff(begins, append=null.size)
    lost = np.log1p((MULTIPLES[:, None] - 1.0) * null[begins]) @ sizes
    return _mixed(np.count_nonzero(ours) * np.log(MULTIPLES) - lost)


def rarer(ours: Bools, p: Floats, k: Floats, times: float = 1.0) -> float:
    """log e that the control shows something more than `times` as often as the challenger."""
    return odds(~ours, k, p, times)


def tail(beyond: int, n: int, rate: float) -> float:
    """log e that more than a share `rate` of values lies beyond a limit, when `beyond` of n do."""
    if not 0.0 < rate < 1.0:
        return -math.inf if rate >= 1.0 else (math.inf if beyond else 0.0)
    worse = 1.0 - (1.0 - rate) / (1.0 + (MULTIPLES - 1.0) * rate)  # odds times MULTIPLES, so always below 1
    return _mixed(beyond * np.log(worse / rate) + (n - beyond) * np.log((1.0 - worse) / (1.0 - rate)))


def quantile_above(values: Floats, level: float) -> float | None:
    """An upper bound of the `level` quantile that holds but for a chance of `SURE`; None of too few values.

    The order statistic whose number is the binomial's (n, level) quantile (David & Nagaraja 2003, "Order Statistics",
    §7.1), by its normal approximation, and exact at the largest value.
    """
    n = values.size
    if n == 0 or n * math.log(level) > math.log(SURE):
        return None
    place = math.ceil(n * level + 2.326 * math.sqrt(n * level * (1.0 - level)))
    place = min(place, n - 1)
    return float(np.partition(values, place)[place])


def level_of(metric: str) -> float:
    """0.99 of latency_p99."""
    return float(metric.rpartition("_p")[2]) / 100.0


def needed(policy: Rollout) -> float:
    """The log e at which one of the policy's guardrails trips.

    Those of a shadow are told of other answers than those of sessions, so each has two chances where there is one.
    """
    chances = 1 + any(stage.shadow is not None for stage in policy.stages)
    return math.log(max(1, len(stopping(policy.guardrails))) * chances / (SHARE * policy.alpha))


def stopping(guardrails: Sequence[Guardrail]) -> list[Guardrail]:
    """Those that can stop a rollout: they share its α. What only warns has as much as one of them."""
    return [guardrail for guardrail in guardrails if guardrail.action != "warn"]


def _mixed(logs: Floats) -> float:
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))
