"""What a policy will do with a new arm, day by day, before there is one. Pure.

The arms of today are taken to be known for long and equally good. Their and the new arm's rewards come in as many as
expected, each step at its mean: so this is the middle of what happens, not its spread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from router.arms import Cell, Sums
from router.policy import Arm, Policy, Split
from router.weights import shares

DAYS = (0, 1, 2, 3, 5, 7, 14, 30)
DIFFERENCES = (0.05, 0.0, -0.05)
STEPS = 24
"""A day."""
KNOWN = 0.6
VARIANCE = 0.09
"""Mean and variance of a session's reward on today's arms."""
NEW = "\x00new"


@dataclass(frozen=True, slots=True)
class Forecast:
    difference: float
    """The new arm's mean reward less that of today's."""
    shares: tuple[float, ...]
    """Its share of new sessions after each of `DAYS`."""


def forecast(policy: Policy, arms: Sequence[str], sessions: float) -> list[Forecast]:
    """One for each of `DIFFERENCES`; `sessions`: how many a day get a reward. [] where the shares are written."""
    if isinstance(policy, Split):
        return []
    plain = policy.model_copy(update={"segment_by": None})
    known = {arm: Arm(model=arm) for arm in [*arms, NEW]}
    return [Forecast(difference, _path(plain, known, sessions, difference)) for difference in DIFFERENCES]


def _path(policy: Policy, arms: Mapping[str, Arm], sessions: float, difference: float) -> tuple[float, ...]:
    assert not isinstance(policy, Split)
    means = dict.fromkeys(arms, KNOWN) | {NEW: KNOWN + difference}
    kept = 2.0 ** (-86400.0 / STEPS / policy.half_life)
    long = sessions / STEPS / (1.0 - kept) / (len(arms) - 1)  # what is left of rewards that came for ever
    sums = {arm: _sums(long, KNOWN) for arm in arms} | {NEW: Sums()}
    found = []
    for step in range(DAYS[-1] * STEPS + 1):
        weights = shares(policy, arms, {Cell("", arm, 0): v for arm, v in sums.items()}, 0.0)[""]
        drawn = {arm: (1.0 - policy.holdout) * weights[arm] + policy.holdout / len(arms) for arm in arms}
        if step % STEPS == 0 and step // STEPS in DAYS:
            found.append(drawn[NEW])
        sums = {arm: _sums(sessions / STEPS * drawn[arm], means[arm]).plus(v, kept) for arm, v in sums.items()}
    return tuple(found)


def _sums(n: float, mean: float) -> Sums:
    return Sums(n, n * mean, n * (mean * mean + VARIANCE))
