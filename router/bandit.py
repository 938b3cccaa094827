"""Gaussian Thompson sampling on session rewards, as arithmetic: sums in, weights out. No I/O, no clock.

An arm's mean reward has a normal posterior (Murphy 2007, "Conjugate Bayesian analysis of the Gaussian
distribution", §2) whose reward variance σ² is pooled over arms and shrunk towards a coin's; see `believe`.
Instead of drawing from the posteriors on each request, we compute the probability that each arm is the best
one (what Thompson sampling draws with), publish these as weights, and let each session draw from them by its
hash: so the propensity of every decision is known exactly. Sums are additive, so their order does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.arms import Choice, Snapshot, Sums

BUCKET = 3600
"""Seconds of a time bucket; ages are read at its middle."""

PRIOR_VARIANCE = 0.25
"""Variance of a reward in [0, 1] at its most uncertain (a fair coin)."""
PRIOR_VARIANCE_MASS = 1.0

SIBLING_VARIANCE = 0.01
"""Variance of an arm's mean between segments, before anything is known: they differ by about 0.1."""
SIBLING_MASS = 50.0

_STEPS = np.linspace(-6.0, 6.0, 65)
"""Where each arm's distribution is sampled, in standard deviations from its mean."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Family:
    """Which arms were made from which: a new arm is expected to be like its parent."""

    above: Floats
    """[K, K], 1 where the column's arm is the row's or one of its ancestors."""
    gains: Floats
    """[K]: how much better than its oldest ancestor an arm was expected to be."""


def family(arms: Sequence[str], parents: Mapping[str, tuple[str, float]]) -> Family:
    """Of arms and each one's parent, with its expected gain; a parent that is none of `arms` counts as unknown."""
    place = {arm: k for k, arm in enumerate(arms)}
    above, gains = np.eye(len(arms)), np.zeros(len(arms))
    for k, arm in enumerate(arms):
        while arm in parents and parents[arm][0] in place:
            arm, gain = parents[arm]
            gains[k] += gain
            if above[k, place[arm]]:
                raise ValueError(f"arm {arm} is its own ancestor")
            above[k, place[arm]] = 1.0
    return Family(above, gains)


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


def posteriors(arms: Sequence[str], sums: Mapping[str, Sums], mean: float | None, mass: float) -> dict[str, Posterior]:
    """The posterior of each of `arms`; those without sums have just the prior. `mean` and `mass` as in `believe`."""
    n, s, ss = (np.array([getattr(sums.get(arm, Sums()), part) for arm in arms]) for part in ("n", "s", "ss"))
    means, sds = believe(n, s, ss, mean, mass)
    rows = zip(arms, means.tolist(), sds.tolist(), n.tolist(), strict=True)
    return {arm: Posterior(m, sd, seen) for arm, m, sd, seen in rows}


def believe(
    n: Floats, s: Floats, ss: Floats, mean: float | None, mass: ArrayLike, kin: Family | None = None
) -> tuple[Floats, Floats]:
    """Means and sds of the posteriors from sums Σw, Σwr, Σwr², all of shape [..., K].

    The prior of an arm is N(m, v), v that of `mass` tosses of a coin. `mean` is m; None says that it is itself
    unknown, N(1/2, 1/4), and learned from all arms: a new arm is expected to be about as good as its siblings.
    (With a fixed m far from the truth, the first arm that is heard looks better than all others will ever get to
    look.) With `kin`, that of an arm that has a parent is N(its parent's mean + gain, v).
    """
    sigma2 = reward_variance(n, s, ss)[..., None]
    means, variances = _among_siblings(n / sigma2, s / sigma2, mean, PRIOR_VARIANCE / np.asarray(mass, float), kin)
    return means, np.sqrt(variances)


def _among_siblings(
    precision: Floats, weighted: Floats, mean: float | None, v: ArrayLike, kin: Family | None
) -> tuple[Floats, Floats]:
    """Means and variances of the arms' means, [..., K], from each one's own witness: its precision, and that times
    its average. m is integrated out (Gelman et al. 2013, "Bayesian Data Analysis", §5.4)."""
    v = np.asarray(v, float)
    if kin is not None:
        return _among_kin(precision, weighted, mean, float(v), kin)
    within = 1.0 / (precision + 1.0 / v)
    if mean is not None:
        return np.asarray(within * (weighted + mean / v)), np.asarray(within)
    shrunk = within / v  # how much of an arm's own mean is m
    total = 1.0 / PRIOR_VARIANCE + (precision * shrunk).sum(-1, keepdims=True)
    centre = (0.5 / PRIOR_VARIANCE + (weighted * shrunk).sum(-1, keepdims=True)) / total
    return np.asarray(within * weighted + shrunk * centre), np.asarray(within + shrunk**2 / total)


def _among_kin(precision: Floats, weighted: Floats, mean: float | None, v: float, kin: Family) -> tuple[Floats, Floats]:
    """The same where arms descend from arms: the joint normal of all means, conditioned on what was heard.

    A mean is m + the gains + a step N(0, v) at the arm and at each of its ancestors, so two arms' prior covariance is v
    times the ancestors that they share (Felsenstein 1985, "Phylogenies and the comparative method").
    """
    prior = v * (kin.above @ kin.above.T) + (PRIOR_VARIANCE if mean is None else 0.0)
    known = np.linalg.inv(prior)
    centre = known @ ((0.5 if mean is None else mean) + kin.gains)
    covariance = np.linalg.inv(known + precision[..., None] * np.eye(len(prior)))
    means = (covariance @ (centre + weighted)[..., None])[..., 0]
    return np.asarray(means), np.asarray(np.diagonal(covariance, axis1=-2, axis2=-1))


def reward_variance(n: Floats, s: Floats, ss: Floats) -> Floats:
    """Within-arm variance of rewards, pooled over the last axis: shrunk to that of a coin by a few sessions."""
    squares = np.maximum(0.0, ss - s * s / np.maximum(n, 1e-12)).sum(-1)
    return np.asarray((PRIOR_VARIANCE * PRIOR_VARIANCE_MASS + squares) / (PRIOR_VARIANCE_MASS + n.sum(-1)))


def believe_segments(
    n: Floats, s: Floats, ss: Floats, mean: float | None, mass: ArrayLike, kin: Family | None = None
) -> tuple[Floats, Floats]:
    """Posteriors of K arms in S segments that are siblings; sums [S, K] in, means and sds [S + 1, K] out.

    The last row is a segment nobody has seen yet. An arm's mean in a segment is N(μₐ, τ²), and μₐ its mean over
    segments as in `believe`. Given μₐ a segment's posterior is normal, and so it stays when μₐ is drawn from its
    own: weights made from it are those of drawing the arm's mean first, then the segment's. τ² is found by moments
    (DerSimonian & Laird 1986), pooled over arms and shrunk to SIBLING_VARIANCE.
    """
    sigma2 = float(reward_variance(n.ravel(), s.ravel(), ss.ravel()))
    n, s = np.vstack([n, np.zeros(n.shape[1])]), np.vstack([s, np.zeros(n.shape[1])])
    averages = s / np.maximum(n, 1e-12)
    tau2 = _sibling_variance(n, averages, sigma2)
    weight = 1.0 / (tau2 + sigma2 / np.maximum(n, 1e-12))  # precision of a segment's average as a witness of μₐ
    over, variance = _among_siblings(
        weight.sum(0), (weight * averages).sum(0), mean, PRIOR_VARIANCE / np.asarray(mass, float), kin
    )
    within = 1.0 / (n / sigma2 + 1.0 / tau2)
    return within * (s / sigma2 + over / tau2), np.sqrt(within + (within / tau2) ** 2 * variance)


def _sibling_variance(n: Floats, averages: Floats, sigma2: float) -> float:
    """τ², from sums [S, K] and averages [S, K]."""
    totals = n.sum(0)
    grand = (n * averages).sum(0) / np.maximum(totals, 1e-12)
    excess = (n * (averages - grand) ** 2).sum(0) - np.maximum(0.0, (n > 0).sum(0) - 1.0) * sigma2
    scale = totals - (n * n).sum(0) / np.maximum(totals, 1e-12)
    found = (SIBLING_MASS * SIBLING_VARIANCE + excess.sum()) / (SIBLING_MASS + scale.sum())
    return float(max(1e-4, found))


def probability_best(means: Floats, sds: Floats) -> Floats:
    """P(arm has the highest mean), shape [..., K], sums to 1; to 1e-3 however different the arms' sds are.

    Σ over cells of P(own mean in the cell) · Π P(another's below it), on a grid that is fine wherever any arm's
    distribution is. (Gauss-Hermite nodes of a wide arm would step over a narrow one.)
    """
    if means.shape[-1] == 1:
        return np.ones_like(means)
    width = np.maximum(sds, 1e-9)[..., None]
    grid = means[..., None] + width * _STEPS  # [..., K, points]
    grid = np.sort(grid.reshape(*means.shape[:-1], 1, -1), axis=-1)
    below = _normal_cdf((grid - means[..., None]) / width)  # [..., K, all points]
    cells = (below[..., 1:] + below[..., :-1]) / 2
    best = (np.diff(below, axis=-1) * _product_of_others(cells)).sum(-1)
    return np.asarray(best / best.sum(-1, keepdims=True))


def best_of(beliefs: Sequence[Posterior]) -> Floats:
    """`probability_best` of beliefs, shape [K]."""
    return probability_best(np.array([b.mean for b in beliefs]), np.array([b.sd for b in beliefs]))


def _product_of_others(values: Floats) -> Floats:
    """For each row of axis -2 the product of the other rows."""
    before, after = np.ones_like(values), np.ones_like(values)
    np.cumprod(values[..., :-1, :], axis=-2, out=before[..., 1:, :])
    np.cumprod(values[..., :0:-1, :], axis=-2, out=after[..., -2::-1, :])
    return np.asarray(before * after)


def _normal_cdf(x: Floats) -> Floats:
    """Φ(x) to 7.5e-8 (Abramowitz & Stegun 26.2.17); numpy has no erf and scipy is not worth its size here."""
    t = 1.0 / (1.0 + 0.2316419 * np.abs(x))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    upper = np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi) * series
    return np.asarray(np.where(x >= 0, 1.0 - upper, upper))


def top_two(best: Floats, beta: float) -> Floats:
    """Shares of top-two Thompson sampling from P(best) [..., K]: with 1 - β the runner-up of a second draw is taken.

    ψᵢ = αᵢ (β + (1 - β) Σ_{j≠i} αⱼ / (1 - αⱼ)) (Russo 2016, "Simple Bayesian Algorithms for Best Arm Identification").
    """
    if best.shape[-1] == 1:
        return best
    alpha = np.clip(best, 1e-12, 1 - 1e-12)
    odds = alpha / (1.0 - alpha)
    shares = alpha * (beta + (1.0 - beta) * (odds.sum(-1, keepdims=True) - odds))
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def epsilon_greedy(means: Floats, epsilon: float) -> Floats:
    """The arm with the highest mean, [..., K], but any arm with probability `epsilon`; equals share."""
    top = means >= means.max(-1, keepdims=True) - 1e-12
    return np.asarray(epsilon / means.shape[-1] + (1.0 - epsilon) * top / top.sum(-1, keepdims=True))


def with_floor(weights: Floats, floor: float) -> Floats:
    """Every arm of [..., K] gets at least `floor`; what lies above is scaled to make room. Needs floor · K ≤ 1."""
    return np.asarray(floor + (1.0 - floor * weights.shape[-1]) * weights)


def with_caps(weights: Floats, caps: Floats) -> Floats:
    """No arm of [..., K] gets more than its cap [K]; the rest share what that leaves, as they share now.

    What cannot be placed, because all others are at their caps too, goes to the arms in proportion to their caps.
    """
    capped = np.zeros(weights.shape, bool)
    shares = weights
    for _ in range(weights.shape[-1]):
        over = capped | (shares > caps + 1e-12)
        if (over == capped).all():
            break
        capped = over
        free = np.where(capped, 0.0, np.maximum(weights, 1e-12))
        left = np.maximum(0.0, 1.0 - np.where(capped, caps, 0.0).sum(-1, keepdims=True))
        shares = np.where(capped, caps, left * free / np.maximum(free.sum(-1, keepdims=True), 1e-300))
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def thompson_weights(
    arms: Sequence[str], sums: Mapping[str, Sums], *, mean: float | None, mass: float, floor: float
) -> dict[str, float]:
    """The share of sessions that each arm should draw now."""
    beliefs = posteriors(arms, sums, mean, mass)
    best = best_of([beliefs[arm] for arm in arms])
    return dict(zip(arms, with_floor(best, floor).tolist(), strict=True))


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that is uniform over sessions and the same on every machine."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def draw(snapshot: Snapshot, u: float, segment: str = "") -> Choice:
    """The arm of the session whose hash is `u`, with the exact probability that it would be drawn.

    Sessions with u < holdout draw uniformly: since u is the session's own, it is in the holdout for ever. An
    arm's propensity counts both ways to it. The challenger of a rollout is none of the holdout's arms: its stage says
    how many sessions it may have. One that draws the challenger or the control, while it may be either, takes part in
    the rollout and is told the other one's propensity.
    """
    weights = snapshot.segments.get(segment)
    if weights is None:
        weights = snapshot.segments[""]
        segment = "" if snapshot.full else segment
    h, challenger = snapshot.holdout, snapshot.challenger
    even = len(weights) - (challenger in weights)
    barred = challenger if even else ""
    uniform = 1.0 / (even or 1)
    in_holdout = u < h
    rest = u / h if in_holdout else (u - h) / (1.0 - h)
    arm, passed = "", 0.0
    for name, weight in weights.items():
        share = weight if not in_holdout else 0.0 if name == barred else uniform
        passed += share
        if share > 0.0:
            arm = name  # the last arm that has a share takes what rounding leaves over
        if rest < passed:
            break
    propensity = (0.0 if arm == barred else h * uniform) + (1.0 - h) * weights[arm]
    if snapshot.rollout and (arm == challenger or arm == snapshot.control):
        ours, theirs = weights.get(challenger, 0.0), weights.get(snapshot.control, 0.0)
        if ours > 0.0 and theirs > 0.0:
            rival = (1.0 - h) * ours if arm != challenger else h * uniform + (1.0 - h) * theirs
            version, policy = snapshot.version, snapshot.policy
            return Choice(arm, propensity, version, segment, in_holdout, policy, snapshot.rollout, rival)
    return Choice(arm, propensity, snapshot.version, segment, in_holdout, snapshot.policy)
