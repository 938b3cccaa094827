"""Tests that stay valid however often one looks: sums in, bounds out. No I/O, no clock.

A challenger and its control are compared by *scores*, one a session with a reward,

    yₜ = hₜ · (1[A = challenger] / p_c − 1[A = control] / p_k) · (rₜ − bₜ)

with p_c and p_k the propensities known when the session drew, bₜ a baseline and hₜ > 0 a weight, both fixed by
earlier facts alone. Then E[yₜ | past] = hₜ(μ_c − μ_k) however the shares moved and however the level of both arms
drifts, so Σy / Σh estimates the (h-weighted mean) difference: in the total, a challenger whose share rose on a good
day would seem good. The baseline only takes variance out. With hₜ = `overlap` the terms are bounded by 1 and each
session counts by how much it can tell (Li, Morgan & Zaslavsky 2018, "Balancing covariates via propensity score
weighting"). All of the champion's traffic may be the control: the propensities make up for its size.

Rewards that come late may be scored when they come, with the baseline of then, if what delays them (or keeps them
away) is not the arm. A session without a reward is left out, with its weight; see that both arms are heard as often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Sides = Literal[1, 2]
"""1: each bound holds alone with probability 1 − α; 2: both hold together with it."""

LEAN = 2.0
"""How many standard deviations from 0 a one-sided sequence's mixture is centred: more is tighter where ρ was tuned for
and wider far from it. 2 finds a difference about a tenth sooner than the paper's own one-sided bound."""


def overlap(challenger: ArrayLike, control: ArrayLike) -> Floats:
    """h = p_c · p_k / (p_c + p_k): the inverse variance of a score, but for the rewards' own; arrays of one shape."""
    c, k = _within("propensity", challenger, 0, 1, above=True), _within("propensity", control, 0, 1, above=True)
    return np.asarray(c * k / (c + k))


def baseline(n: ArrayLike, s: ArrayLike) -> Floats:
    """The mean of the n rewards seen so far, whose sum is s, shrunk to 1/2 by one session."""
    return np.asarray((0.5 + np.asarray(s, float)) / (1.0 + np.asarray(n, float)))


def baselines(rewards: ArrayLike) -> Floats:
    """For each of rewards [T] the `baseline` of those before it, shape [T]."""
    r = _within("reward", rewards, 0, 1)
    return baseline(np.arange(r.size), np.cumsum(r) - r)


def scores(
    side: ArrayLike, propensity: ArrayLike, reward: ArrayLike, baseline: ArrayLike, weight: ArrayLike = 1.0
) -> Floats:
    """yₜ of each session, arrays of one shape (or scalars).

    `side` is 1 for the challenger, −1 for the control, 0 for any other arm (it scores 0 and still counts its
    weight); `propensity` is that of the arm served, `weight` is hₜ. ValueError for a propensity outside (0, 1],
    a reward or baseline outside [0, 1], a weight that is not positive.
    """
    a = _within("side", side, -1, 1)
    p = _within("propensity", propensity, 0, 1, above=True)
    centred = _within("reward", reward, 0, 1) - _within("baseline", baseline, 0, 1)
    return np.asarray(_within("weight", weight, 0, math.inf, above=True) * a / p * centred)


@dataclass(frozen=True, slots=True)
class Evidence:
    """n, Σh, Σy and Σy² of scores: additive, so that the order of sessions does not matter."""

    n: float = 0.0
    h: float = 0.0
    s: float = 0.0
    ss: float = 0.0

    def plus(self, score: float, weight: float = 1.0) -> Evidence:
        y, h = float(_within("score", score)), float(_within("weight", weight, 0, math.inf, above=True))
        return Evidence(self.n + 1.0, self.h + h, self.s + y, self.ss + y * y)

    def interval(self, alpha: float, rho: float, sides: Sides = 2) -> tuple[float, float]:
        lower, upper = asymptotic(self.n, self.h, self.s, self.ss, alpha, rho, sides)
        return float(lower), float(upper)


def asymptotic(
    n: ArrayLike, h: ArrayLike, s: ArrayLike, ss: ArrayLike, alpha: float, rho: float, sides: Sides = 2
) -> tuple[Floats, Floats]:
    """Asymptotic confidence sequence for the mean difference: lower and upper bounds, the shape of the sums.

    With V = Σy² − (Σy)²/n the bounds are Σy/Σh ± u(V)/Σh,

        u(V) = (√((Vρ² + 1)(k² + log(Vρ² + 1) − 2 log α)) − k) / ρ

    with k = 0 for two sides: the Lyapunov-type sequence, for variances that change, of Waudby-Smith, Arbour, Sinha,
    Kennedy & Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", arXiv 2103.06476. It
    mixes exp(λS − λ²V/2), a martingale of Brownian motion, over λ ~ N(0, ρ²). For one side (each bound alone) we mix
    over N(kρ, ρ²), k = LEAN, which wastes next to nothing on the other side; u(V) is where that mixture is 1/α. As V
    grows, the probability of ever missing goes to α; nothing is claimed of the first dozens of sessions. With fewer
    than two the bounds are infinite.
    """
    _check_alpha(alpha)
    if not 0.0 < rho < math.inf:
        raise ValueError(f"rho is {rho}; it must be positive")
    n_, h_, s_, ss_ = (_within("sum", one) for one in (n, h, s, ss))
    variance = np.maximum(0.0, ss_ - s_ * s_ / np.maximum(n_, 1.0))
    enough = (n_ >= 2) & (h_ > 0)
    total = np.where(enough, h_, 1.0)
    wide = np.where(enough, _boundary(variance * rho**2, alpha, sides) / (rho * total), math.inf)
    return s_ / total - wide, s_ / total + wide


def _boundary(x: Floats, alpha: float, sides: Sides) -> Floats:
    """ρ · u as a function of x = Vρ²."""
    k = LEAN if sides == 1 else 0.0
    return np.asarray(np.sqrt((x + 1.0) * (k * k + np.log1p(x) - 2.0 * math.log(alpha))) - k)


def asymptotic_path(
    scores: ArrayLike, weights: ArrayLike, alpha: float, rho: float, sides: Sides = 2
) -> tuple[Floats, Floats]:
    """`asymptotic` after each of scores [..., T] with weights of that shape (or scalar): bounds [..., T]."""
    y = _within("score", scores)
    h = np.broadcast_to(_within("weight", weights, 0, math.inf, above=True), y.shape)
    n, total, s, ss = (np.cumsum(one, axis=-1) for one in (np.ones_like(y), h, y, y * y))
    return asymptotic(n, total, s, ss, alpha, rho, sides)


def tuned_rho(variance: float, alpha: float, sides: Sides = 2) -> float:
    """The ρ whose sequence is tightest once V = `variance` (n·σ² for n alike scores of variance σ²).

    ρ = √(x / V), where x minimises u/√V: for two sides x = −W₋₁(−α²/e) − 1 (2103.06476, appendix), the root of
    x = log(1 + x) − 2 log α; for one side it is found on a grid. Far from V the sequence is valid, only wider.
    """
    if not 0.0 < variance < math.inf:
        raise ValueError(f"the variance is {variance}; it must be positive")
    return math.sqrt(_tightest(alpha, sides)[0] / variance)


def variance_to_detect(difference: float, alpha: float, sides: Sides = 1, reward_variance: float = 0.25) -> float:
    """The V at which `overlap`-weighted scores find `difference`, whatever the shares: what ρ is best tuned for.

    Such a score has variance hσ² with σ² the rewards', so V = σ²Σh, and the bound leaves zero when Δ·Σh = z√V with
    z = u/√V at its tightest: at V = (zσ²/Δ)².
    """
    if not 0.0 < abs(difference) <= 1.0:
        raise ValueError(f"the difference is {difference}; it must not be 0, nor beyond 1")
    return (_tightest(alpha, sides)[1] * reward_variance / difference) ** 2


def _tightest(alpha: float, sides: Sides) -> tuple[float, float]:
    """x = Vρ² where u/√V is least, and its value there."""
    _check_alpha(alpha)
    x = np.geomspace(1e-3, 1e3, 20_001)
    z = _boundary(x, alpha, sides) / np.sqrt(x)
    return float(x[z.argmin()]), float(z.min())


@dataclass(frozen=True, slots=True)
class Bernstein:
    """Empirical-Bernstein confidence sequence for the mean of values in [0, 1]; valid at every n, not only large.

    Theorem 2 of Waudby-Smith & Ramdas 2023, "Estimating means of bounded random variables by betting" (arXiv
    2010.09686), with its λₜ = min(½, √(2 log(1/miss) / (σ̂²ₜ₋₁ t log(1 + t)))). Each bound misses the mean ever with
    probability ≤ `miss`, so both with ≤ 2 · miss. λₜ depends on what came before: feed a replay in the same order.
    """

    miss: float
    n: float = 0.0
    s: float = 0.0
    squares: float = 0.0
    """Σ(xᵢ − μ̂ᵢ)²"""
    bets: float = 0.0
    """Σλᵢ"""
    gains: float = 0.0
    """Σλᵢxᵢ"""
    costs: float = 0.0
    """Σ(xᵢ − μ̂ᵢ₋₁)² (−log(1 − λᵢ) − λᵢ)"""

    def __post_init__(self) -> None:
        _check_alpha(self.miss)

    def plus(self, value: float) -> Bernstein:
        x = float(_within("value", value, 0, 1))
        before, after = (0.5 + self.s) / (self.n + 1.0), (0.5 + self.s + x) / (self.n + 2.0)
        bet = float(_bet(self.n + 1.0, (0.25 + self.squares) / (self.n + 1.0), self.miss))
        return replace(
            self,
            n=self.n + 1.0,
            s=self.s + x,
            squares=self.squares + (x - after) ** 2,
            bets=self.bets + bet,
            gains=self.gains + bet * x,
            costs=self.costs + (x - before) ** 2 * (-math.log1p(-bet) - bet),
        )

    def interval(self) -> tuple[float, float]:
        """The lower and the upper bound, within [0, 1]."""
        if self.n == 0:
            return 0.0, 1.0
        middle, wide = self.gains / self.bets, (self.costs - math.log(self.miss)) / self.bets
        return max(0.0, middle - wide), min(1.0, middle + wide)


def bernstein_path(values: ArrayLike, miss: float) -> tuple[Floats, Floats]:
    """`Bernstein(miss)` after each of values [..., T]: lower and upper bounds [..., T]."""
    _check_alpha(miss)
    x = _within("value", values, 0, 1)
    t = np.arange(1.0, x.shape[-1] + 1.0)
    sums = np.cumsum(x, axis=-1)
    before, after = (0.5 + sums - x) / t, (0.5 + sums) / (t + 1.0)
    squares = (x - after) ** 2
    bet = _bet(t, (0.25 + np.cumsum(squares, axis=-1) - squares) / t, miss)
    bets = np.cumsum(bet, axis=-1)
    middle = np.cumsum(bet * x, axis=-1) / bets
    wide = (np.cumsum((x - before) ** 2 * (-np.log1p(-bet) - bet), axis=-1) - math.log(miss)) / bets
    return np.maximum(0.0, middle - wide), np.minimum(1.0, middle + wide)


def _bet(t: ArrayLike, variance: ArrayLike, miss: float) -> Floats:
    rate: Floats = np.asarray(np.asarray(variance, float) * t * np.log1p(t))
    return np.asarray(np.minimum(0.5, np.sqrt(-2.0 * math.log(miss) / rate)))


PRIOR_SESSIONS = 100.0
"""How many sessions' worth the alternative of a sample-ratio test clings to the intended shares."""


def sample_ratio(counts: Sequence[float], shares: Sequence[float], mass: float = PRIOR_SESSIONS) -> float:
    """Log Bayes factor that `counts` [K] do not come from `shares` [K]; alarm at log(1/α), look as often as you like.

    log Γ(c)/Γ(c + n) + Σ log Γ(cθₖ + nₖ)/Γ(cθₖ) − Σ nₖ log θₖ with c = `mass`, θ = shares: a Dirichlet(cθ) mixture
    against θ, a martingale with mean 1 under θ (Lindon & Malek 2020, "Anytime-valid inference for multinomial count
    data", arXiv 2011.03567). Shares must be positive and sum to 1.
    """
    n, theta = _within("count", counts, 0), _shares(shares, above=True)
    if n.shape != theta.shape:
        raise ValueError(f"there are {n.size} counts and {theta.size} shares")
    each = (math.lgamma(mass * p + k) - math.lgamma(mass * p) - k * math.log(p) for k, p in zip(n, theta, strict=True))
    return math.lgamma(mass) - math.lgamma(mass + float(n.sum())) + math.fsum(each)


@dataclass(frozen=True, slots=True)
class RatioCheck:
    """`sample_ratio` for shares that change from session to session.

    `log_e` grows by log q(A)/p(A), where A is the arm served, p the shares it was drawn with and
    q(k) ∝ p(k) · (c + Σ 1[A = k]/p(k) over the past): another martingale under p, the same when p never changes.
    """

    inverse: tuple[float, ...]
    """Per arm, Σ 1[A = k]/p(k)."""
    log_e: float = 0.0
    mass: float = PRIOR_SESSIONS

    def plus(self, arm: int, shares: Sequence[float]) -> RatioCheck:
        """After a session that was served the arm of index `arm`, drawn with `shares` [K]."""
        p = _shares(shares)
        if p.shape != (len(self.inverse),) or not 0 <= arm < p.size:
            raise ValueError(f"arm {arm} of {p.size} shares does not fit a check of {len(self.inverse)} arms")
        if p[arm] == 0.0:
            raise ValueError(f"arm {arm} was served with propensity 0")
        lifted = self.mass + np.array(self.inverse)
        gain = math.log(lifted[arm] / float(p @ lifted))
        counts = tuple(one + (k == arm) / float(p[arm]) for k, one in enumerate(self.inverse))
        return replace(self, inverse=counts, log_e=self.log_e + gain)


def _shares(values: ArrayLike, above: bool = False) -> Floats:
    p = _within("share", values, 0, 1, above)
    if abs(float(p.sum()) - 1.0) > 1e-6:
        raise ValueError(f"the shares sum to {float(p.sum()):.7g}; they must sum to 1")
    return p


def _within(
    name: str, values: ArrayLike, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> Floats:
    """`values` as floats, all finite and in [low, high] (in (low, high] if `above`), or ValueError."""
    found = np.asarray(values, dtype=np.float64)
    good = np.isfinite(found) & ((found > low) if above else (found >= low)) & (found <= high)
    if not good.all():
        wrong = float(found[~good].flat[0])
        raise ValueError(f"{name} {wrong:g} is not a number in {'(' if above else '['}{low:g}, {high:g}]")
    return found


def _check_alpha(alpha: float) -> None:
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"the error rate is {alpha}; it must lie between 0 and 1")
