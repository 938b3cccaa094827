"""Gaussian Thompson sampling on session rewards, as arithmetic: sums in, weights out. No I/O, no clock.

An arm's mean reward has the conjugate posterior N(m, v) with m = (κμ₀ + Σwr) / (κ + Σw) and v = σ² / (κ + Σw),
where μ₀ and κ are the prior's mean and mass (in sessions) and σ² the reward variance, pooled over arms and itself
shrunk towards that of a prior (Murphy 2007, "Conjugate Bayesian analysis of the Gaussian distribution", §2-3).
Instead of drawing from the posteriors on each request, we compute the probability that each arm is the best
one (what Thompson sampling draws with), publish these as weights, and let each session draw from them by its
hash: so the propensity of every decision is known exactly. Sums are additive, so their order does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.arms import Cell, Choice, Snapshot, Sums

BUCKET = 3600
"""Seconds of a time bucket; ages are read at its middle."""

PRIOR_VARIANCE = 0.25
"""Variance of a reward in [0, 1] at its most uncertain (a fair coin)."""
PRIOR_VARIANCE_MASS = 4.0

_STEPS = np.linspace(-6.0, 6.0, 97)
"""Where each arm's distribution is sampled, in standard deviations from its mean."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Posterior:
    """Belief about an arm's mean session reward: normal with `mean` and `sd`; `sessions` is the evidence Σw."""

    mean: float
    sd: float
    sessions: float

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Central credible interval (95 % at the default z)."""
        return self.mean - z * self.sd, self.mean + z * self.sd


def bucket_of(at: float) -> int:
    return int(at // BUCKET) * BUCKET


def discounted(cells: Mapping[Cell, Sums], segment: str, now: float, half_life: float) -> dict[str, Sums]:
    """Each arm's sums in `segment`, a session of age a counted 2^(-a / half_life) times.

    A bucket that lies in the future (a clock was set back) counts as of now.
    """
    totals: dict[str, Sums] = {}
    for cell, sums in cells.items():
        if cell.segment == segment:
            age = max(0.0, now - cell.bucket - BUCKET / 2)
            totals[cell.arm] = totals.get(cell.arm, Sums()).plus(sums, 2.0 ** (-age / half_life))
    return totals


def posteriors(arms: Sequence[str], sums: Mapping[str, Sums], mean: float, mass: float) -> dict[str, Posterior]:
    """The posterior of each of `arms` under a prior N(mean, σ²/mass); arms without sums have just the prior."""
    variance = _pooled_variance([sums[arm] for arm in arms if arm in sums])
    beliefs = {}
    for arm in arms:
        seen = sums.get(arm, Sums())
        total = mass + seen.n
        beliefs[arm] = Posterior((mass * mean + seen.s) / total, float(np.sqrt(variance / total)), seen.n)
    return beliefs


def _pooled_variance(sums: Sequence[Sums]) -> float:
    """Within-arm reward variance over all arms, shrunk to PRIOR_VARIANCE by PRIOR_VARIANCE_MASS sessions."""
    squares = sum(max(0.0, s.ss - s.s * s.s / s.n) for s in sums if s.n > 0)
    n = sum(s.n for s in sums)
    return (PRIOR_VARIANCE * PRIOR_VARIANCE_MASS + squares) / (PRIOR_VARIANCE_MASS + n)


def probability_best(beliefs: Sequence[Posterior]) -> Floats:
    """P(arm i has the highest mean), shape [K], sums to 1; to 1e-3 however different the arms' sds are.

    Sums P(mean i in cell) × Π P(mean j below it) over a grid that is fine wherever any arm's distribution is.
    """
    if len(beliefs) == 1:
        return np.ones(1)
    means = np.array([b.mean for b in beliefs])
    sds = np.array([max(b.sd, 1e-9) for b in beliefs])
    grid = np.sort((means[:, None] + sds[:, None] * _STEPS).ravel())
    below = _normal_cdf((grid - means[:, None]) / sds[:, None])  # [K, points]
    midway = (below[:, 1:] + below[:, :-1]) / 2
    others = np.where(np.eye(len(beliefs), dtype=bool)[:, :, None], 1.0, midway)  # [K, K, cells]
    best: Floats = (np.diff(below, axis=1) * others.prod(axis=1)).sum(axis=1)
    shares: Floats = best / best.sum()
    return shares


def _normal_cdf(x: Floats) -> Floats:
    """Φ(x) to 7.5e-8 (Abramowitz & Stegun 26.2.17); numpy has no erf and scipy is not worth its size here."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(x))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi) * series
    return np.where(x >= 0, 1.0 - upper, upper)


def with_floor(weights: Floats, floor: float) -> Floats:
    """Every arm gets at least `floor`; what lies above is scaled to make room. Needs floor · K ≤ 1."""
    lifted: Floats = floor + (1.0 - floor * len(weights)) * weights
    return lifted


def thompson_weights(
    arms: Sequence[str], sums: Mapping[str, Sums], *, mean: float, mass: float, floor: float
) -> dict[str, float]:
    """The share of sessions that each arm should draw now."""
    beliefs = posteriors(arms, sums, mean, mass)
    best = probability_best([beliefs[arm] for arm in arms])
    return dict(zip(arms, with_floor(best, floor).tolist(), strict=True))


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that is uniform over sessions and the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def draw(snapshot: Snapshot, u: float, segment: str = "") -> Choice:
    """The arm of the session whose hash is `u`, with the exact probability that it would be drawn.

    Sessions with u < holdout draw uniformly: since u is the session's own, it is in the holdout for ever. An
    arm's propensity counts both ways to it.
    """
    weights = snapshot.segments.get(segment) or snapshot.segments[""]
    h, k = snapshot.holdout, len(weights)
    in_holdout = u < h
    rest = u / h if in_holdout else (u - h) / (1.0 - h)
    arm, passed = "", 0.0
    for name, weight in weights.items():
        share = 1.0 / k if in_holdout else weight
        passed += share
        if share > 0.0:
            arm = name  # the last arm that has a share takes what rounding leaves over
        if rest < passed:
            break
    propensity = h / k + (1.0 - h) * weights[arm]
    return Choice(arm, propensity, snapshot.version, segment, in_holdout, snapshot.policy)
