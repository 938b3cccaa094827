"""An arm's mean reward as a linear function of what a request is like, from sums by kind of request. Pure.

Bayesian linear regression (Bishop 2006, "Pattern Recognition and Machine Learning", §3.3; as a bandit: Agrawal & Goyal
2013, "Thompson Sampling for Contextual Bandits with Linear Payoffs"). Sessions of one kind have the same features x, so
Σ n x xᵀ and Σ s x over kinds are XᵀX and Xᵀy over sessions: the sums that are kept anyway, by kind and arm, are all
that the posterior needs, and they stay additive. All arms are regressed at once, since their coefficients are
siblings: what a feature does to every arm (hard requests are hard for all) is learned from all of them, and what it
does to one arm more than to others is what routing by it can gain.

The kinds' means are taken to lie on the plane: what two features do together beyond their sum stays unseen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from router.bandit import PRIOR_VARIANCE, Family, Floats, reward_variance

SHARED_SLOPE_VARIANCE = 0.01
"""Of what a feature does to all arms' rewards, from its lowest level to its highest."""
SLOPE_VARIANCE, NO_SLOPE_VARIANCE = 0.01, 1e-7
"""Of what a feature that tells arms apart does to one of them beyond that; and one that does not."""


def believe_linear(
    n: Floats, s: Floats, ss: Floats, x: Floats, at: Floats, mean: float | None, mass: float, kin: Family | None = None
) -> tuple[Floats, Floats, Floats]:
    """Means and sds [..., T, K] of K arms at the T points `at` [T, D], from sums [..., S, K] of kinds at `x` [S, D];
    and what their variances have in common [..., T], which does not matter to which of them is best.

    Averaged over hypotheses about which features tell arms apart, each weighed by how well it foretold the rewards
    (Hoeting et al. 1999, "Bayesian Model Averaging: A Tutorial"): none does (half the prior), one alone, or all. So
    a feature that tells nothing soon costs little. `mean`, `mass` and `kin` as in `bandit.believe`, said of x = 0:
    centre x where most requests are. The noise is `reward_variance` within arms, what features explain included.
    """
    sigma2 = reward_variance(*(part.sum(-2) for part in (n, s, ss)))
    found = [regress(n, s, sigma2, x, at, apart, mean, mass, kin) for apart in hypotheses(x.shape[-1])]
    means, joint, evidence = (np.stack(parts) for parts in zip(*found, strict=True))
    prior = np.log(np.where(np.arange(len(found)) == 0, max(1, len(found) - 1), 1.0))
    evidence = evidence + prior.reshape(-1, *[1] * (evidence.ndim - 1))
    weights = np.exp(evidence - evidence.max(0))
    weights = (weights / weights.sum(0))[..., None, None]
    average = (weights * means).sum(0)
    off = means - average
    joint = (weights[..., None] * (joint + off[..., :, None] * off[..., None, :])).sum(0)
    variances = np.diagonal(joint, axis1=-2, axis2=-1)
    return np.asarray(average), np.asarray(np.sqrt(variances)), _common(joint)


def _common(joint: Floats) -> Floats:
    """The variance [..., T] that all arms' means have together, of covariances [..., T, K, K]."""
    k = joint.shape[-1]
    variances = np.diagonal(joint, axis1=-2, axis2=-1)
    between = (joint.sum((-2, -1)) - variances.sum(-1)) / max(1, k * (k - 1))
    return np.asarray(np.clip(between, 0.0, 0.9 * variances.min(-1)))


def hypotheses(d: int) -> list[NDArray[np.bool_]]:
    """Which of d features tell arms apart: none, each one alone, all."""
    alone = list(np.eye(d, dtype=bool)) if d > 1 else []
    return [np.zeros(d, bool), *alone, np.ones(d, bool)]


def regress(
    n: Floats,
    s: Floats,
    sigma2: Floats,
    x: Floats,
    at: Floats,
    apart: NDArray[np.bool_],
    mean: float | None,
    mass: float,
    kin: Family | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Means [..., T, K] and covariances [..., T, K, K] at `at` if the features in `apart` [D] tell arms apart, and the
    log evidence [...] of that, up to what all hypotheses share.

    Arm k's mean at x is bₖ + (m + wₖ)·x. The bₖ have the prior of an arm's mean in `bandit.believe`, m is N(0,
    SHARED_SLOPE_VARIANCE) and wₖ N(0, SLOPE_VARIANCE), like its parent's with `kin`; N(0, NO_SLOPE_VARIANCE) if not
    in `apart`. `sigma2` [...]: variance of a reward about that.
    """
    z, points = (np.insert(rows, 0, 1.0, axis=-1) for rows in (x, at))
    k, d, lead = n.shape[-1], z.shape[-1], n.shape[:-2]
    prior = _prior(k, apart, mean, mass, kin)
    known = np.linalg.inv(prior)
    start = np.zeros((d, k))
    start[0] = (0.5 if mean is None else mean) + (0.0 if kin is None else kin.gains)
    believed = np.einsum("ikl,il->ki", known, start)

    noise = sigma2[..., None, None]
    heard = np.einsum("...sk,si,sj->...kij", n, z, z, optimize=True) / noise[..., None]
    precision = np.einsum("...kij,kl->...kilj", heard, np.eye(k)) + np.einsum("ikl,ij->kilj", known, np.eye(d))
    precision = precision.reshape(*lead, k * d, k * d)
    covariance = np.linalg.inv(precision)
    weighted = (np.einsum("...sk,si->...ki", s, z) / noise + believed).reshape(*lead, k * d, 1)
    slopes = covariance @ weighted
    fit = (weighted * slopes).sum((-2, -1)) - (believed.T * start).sum()
    evidence = (fit - np.linalg.slogdet(precision)[1] - np.linalg.slogdet(prior)[1].sum()) / 2
    means = np.einsum("ti,...ki->...tk", points, slopes.reshape(*lead, k, d))
    joint = np.einsum("ti,...kilj,tj->...tkl", points, covariance.reshape(*lead, k, d, k, d), points, optimize=True)
    return np.asarray(means), np.asarray(joint), np.asarray(evidence)


def _prior(k: int, apart: NDArray[np.bool_], mean: float | None, mass: float, kin: Family | None) -> Floats:
    """Prior covariance over k arms of each coefficient, [D + 1, k, k]; the intercept's comes first."""
    own = np.insert(np.where(apart, SLOPE_VARIANCE, NO_SLOPE_VARIANCE), 0, PRIOR_VARIANCE / mass)
    shared = np.insert(np.full(len(apart), SHARED_SLOPE_VARIANCE), 0, PRIOR_VARIANCE if mean is None else 0.0)
    like = np.eye(k) if kin is None else kin.above @ kin.above.T
    return np.asarray(own[:, None, None] * like + shared[:, None, None])
