"""What would another policy have earned? Off-policy evaluation of logged decisions. Pure.

Of session i we know the arm aᵢ that it drew, the probability eᵢ with which the logging policy drew it, its reward
rᵢ in [0, 1] and the other policy's probabilities π(· | i); perhaps also a model's guess q(i, a) of the reward that
each arm would have earned. With wᵢ = π(aᵢ | i) / eᵢ and v(i) = Σₐ π(a | i) q(i, a), the other policy's mean reward is

    IPS        mean wᵢ rᵢ                            Horvitz & Thompson 1952; unbiased, as wide as the weights
    SNIPS      Σ wᵢ rᵢ / Σ wᵢ                        Swaminathan & Joachims 2015; biased by O(1/n), narrower
    DR         mean v(i) + wᵢ (rᵢ - q(i, aᵢ))        Dudík, Langford & Li 2011; unbiased whatever q is
    switch-DR  the same with wᵢ cut to 0 above τ     Wang, Agarwal & Dudík 2017, §3; some bias for less variance

DR stays unbiased because q of a session is made without that session (`predict`: Chernozhukov et al. 2018, "cross-
fitting"). π may depend on what was logged before session i, but not on its own reward. eᵢ may too: the terms are then
a martingale's differences, and since no arm's share falls below the floor their mean is still normal in the limit
(Hadad et al. 2021). An arm that the logging policy could not draw shows as weights whose mean is below 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from router.bandit import Floats, unit_hash

MIN_ESS = 100.0
"""Below this effective sample size there are too few comparable sessions to say anything."""
FOLDS = 5
SEGMENT_MASS = 20.0
"""How many sessions the mean of what lies above (a segment's arm: the arm; an arm: all) is worth in the model."""
RIDGE = 10.0
Z = 1.959964

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean reward (or a difference of two), its standard error and the 95 % interval (see `_estimate`)."""

    value: float
    se: float
    interval: tuple[float, float]


UNKNOWN = Estimate(0.0, math.inf, (-math.inf, math.inf))


@dataclass(frozen=True, slots=True)
class Evaluation:
    sessions: int
    ess: float
    """Kish's effective sample size (Σw)² / Σw²: how many sessions of the policy's own these are worth."""
    largest_weight: float
    mean_weight: float
    """Should be 1; see `suspect`."""
    mean_weight_se: float
    logged: Estimate
    """What the logging policy earned in the same sessions."""
    ips: Estimate
    snips: Estimate
    dr: Estimate | None = None
    switch_dr: Estimate | None = None
    gain: Estimate | None = None
    """DR less what was earned, session by session. None, as all three, without a reward model."""
    switched_at: float | None = None
    """τ of switch-DR; None where no weight was cut."""

    @property
    def enough(self) -> bool:
        """Whether the estimates may be believed at all."""
        return self.ess >= MIN_ESS

    @property
    def suspect(self) -> bool:
        """The weights do not average 1: an arm could not be drawn at times, or is judged more often than others."""
        return abs(self.mean_weight - 1.0) > max(3.0 * self.mean_weight_se, 0.02)


def evaluate(
    arms: ArrayLike,
    propensities: ArrayLike,
    rewards: ArrayLike,
    target: ArrayLike,
    predictions: ArrayLike | None = None,
) -> Evaluation:
    """Evaluate the policy with probabilities `target` [n, K] on n logged sessions; `predictions` [n, K] is q.

    Raises ValueError that names the first bad value.
    """
    a, e, r = _logged(arms, propensities, rewards)
    pi = _table("target", target, a)
    if (off := np.flatnonzero(np.abs(pi.sum(1) - 1.0) > 1e-6)).size:
        raise ValueError(f"target[{off[0]}] sums to {pi[off[0]].sum():.6g}; probabilities must sum to 1")
    row = np.arange(len(a))
    w = pi[row, a] / e
    total = float(w.sum())
    ess = total**2 / float((w * w).sum()) if total else 0.0
    mean = float((w * r).sum()) / total if total else 0.0
    around = mean + w * (r - mean) / max(float(w.mean()), 1e-300)  # SNIPS, linearised
    found = Evaluation(
        sessions=len(a),
        ess=ess,
        largest_weight=float(w.max()),
        mean_weight=float(w.mean()),
        mean_weight_se=_plain_error(w),
        logged=_estimate(r, float(len(a))),
        ips=_estimate(w * r, ess),
        snips=_estimate(around, ess),
    )
    if predictions is None:
        return found
    q = _table("predictions", predictions, a)
    model, rest = (pi * q).sum(1), w * (r - q[row, a])
    cut = switch_at(w, model, rest)
    dr = _estimate(model + rest, ess)
    return replace(
        found,
        dr=dr,
        switch_dr=_estimate(model + np.where(w <= cut, rest, 0.0), ess),
        gain=_difference(dr, found.logged, _correlation(model + rest, r)),
        switched_at=None if np.isinf(cut) else cut,
    )


def switch_at(w: Floats, model: Floats, rest: Floats) -> float:
    """τ of switch-DR with the least estimated squared error (Wang et al. 2017, §4): variance + (bias at its worst)².

    The model errs by at most 1, so the bias by the policy's share of the decisions whose weight is cut.
    """
    candidates = np.append(np.unique(np.quantile(w, np.linspace(0.5, 1.0, 21)))[:-1], np.inf)
    errors = []
    for cut in candidates:
        kept = w <= cut
        bias = float((w * ~kept).mean())
        errors.append(_plain_error(model + np.where(kept, rest, 0.0)) ** 2 + min(bias, 1.0) ** 2)
    return float(candidates[::-1][np.argmin(errors[::-1])])


def predict(
    arms: ArrayLike,
    rewards: ArrayLike,
    folds: ArrayLike,
    k: int,
    segments: Sequence[str] | None = None,
    features: ArrayLike | None = None,
) -> Floats:
    """A model's guess [n, K] of what each of `k` arms would have earned, each fold's made from the other folds.

    The mean of (segment, arm), shrunk to the arm's, shrunk to that of all; with numeric `features` [n, d] also each
    arm's ridge regression of what these means leave over. Cut to [0, 1].
    """
    a, _, r = _logged(arms, np.ones(len(np.asarray(arms))), rewards, k)
    fold = np.asarray(folds, np.int64)
    names = segments if segments is not None else [""] * len(a)
    if not len(fold) == len(names) == len(a):
        raise ValueError(f"{len(a)} sessions, {len(fold)} folds, {len(names)} segments: must be as many")
    row = {name: number for number, name in enumerate(dict.fromkeys(names))}
    place = np.array([row[name] for name in names], np.int64)
    sized = (int(fold.max()) + 1, len(row), k)
    cell = np.ravel_multi_index((fold, place, a), sized)
    counts, sums = (np.bincount(cell, x, int(np.prod(sized))).reshape(sized) for x in (np.ones(len(a)), r))
    n, s = counts.sum(0) - counts, sums.sum(0) - sums  # of the other folds
    overall = (s.sum((1, 2)) + 0.5) / (n.sum((1, 2)) + 1.0)
    by_arm = (s.sum(1) + SEGMENT_MASS * overall[:, None]) / (n.sum(1) + SEGMENT_MASS)
    means = (s + SEGMENT_MASS * by_arm[:, None]) / (n + SEGMENT_MASS)
    guess = means[fold, place]
    if features is not None:
        x = np.asarray(features, float).reshape(len(a), -1)
        if not np.isfinite(x).all():
            raise ValueError(f"features[{np.argwhere(~np.isfinite(x))[0][0]}] is not a finite number")
        guess = guess + _ridge(x, r, a, fold, means[:, place])
    return np.asarray(np.clip(guess, 0.0, 1.0))


def folds_of(sessions: Sequence[str], folds: int = FOLDS) -> Ints:
    """Each session's fold by its hash: the same on every machine, and independent of the arm that it drew."""
    return np.array([int(unit_hash("fold", session) * folds) for session in sessions], np.int64)


def _ridge(x: Floats, r: Floats, arm: Ints, fold: Ints, means: Floats) -> Floats:
    """What features [n, d] add to each arm's guess [n, K]; ridge on standardised features (Hoerl & Kennard 1970).

    `means` [folds, n, K]: each session's guesses, made without the sessions of each fold. A fold's slopes come from
    what its own leave over in the others, so that none of its rewards has a way back to it.
    """
    x = np.column_stack([np.ones(len(x)), (x - x.mean(0)) / np.maximum(x.std(0), 1e-12)])
    added = np.zeros((len(x), means.shape[2]))
    for f in np.unique(fold):
        for j in range(means.shape[2]):
            here = (fold != f) & (arm == j)
            xs, left = x[here], r[here] - means[f, here, j]
            slope = np.linalg.solve(xs.T @ xs + RIDGE * np.eye(x.shape[1]), xs.T @ left)
            added[fold == f, j] = x[fold == f] @ slope
    return added


def _estimate(terms: Floats, ess: float) -> Estimate:
    """The mean of `terms` with an interval that heavy tails and few comparable sessions do not flatter.

    The sample variance rests on as many terms as Kish's formula gives for their squared deviations; with m of them
    it is known to a factor of about 1 + 2/m, Student's variance, by which it is raised. The interval is then one of
    scores (Wilson 1927, "Probable inference, the law of succession, and statistical inference"), each end as far off
    as `_reach` says: sessions that were seldom drawn may yet show a 0 or a 1 that they did not show in the log.
    """
    value, squares = float(terms.mean()), (terms - terms.mean()) ** 2
    if len(terms) < 2 or ess <= 0.0:
        return replace(UNKNOWN, value=value)
    tails = 1.0 + 2.0 * float((squares * squares).sum()) / max(float(squares.sum()) ** 2, 1e-300)
    se = _plain_error(terms) * math.sqrt(tails)
    return Estimate(value, se, (value - _reach(se, ess, value), value + _reach(se, ess, 1.0 - value)))


def _reach(se: float, ess: float, room: float) -> float:
    """How far off the truth may lie in a direction in which it cannot be farther off than `room`.

    At a distance d, a share x = d / room of the policy's sessions would bring the utmost and have gone unseen; then
    one session's variance is (1 - x)(se² ESS + d room), and d is in the interval while d² ≤ Z² of that / ESS. With
    rewards of 0 and 1 this is Wilson's interval; if all were alike it still leaves d = Z² room / (ESS + Z²).
    """
    if room <= 1e-12:
        return 0.0
    c = Z * Z / ess
    half = c * (room - se * se * ess / room) / 2.0
    root = math.sqrt(half * half + (1.0 + c) * (Z * se) ** 2)
    return (half + root) / (1.0 + c) if half > 0.0 else (Z * se) ** 2 / (root - half)


def _difference(a: Estimate, b: Estimate, correlation: float) -> Estimate:
    """a - b, its interval made from theirs (Zou & Donner 2008, "Construction of confidence limits about effect
    measures: a general approach")."""

    def apart(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a**2 + of_b**2 - 2.0 * correlation * of_a * of_b))

    value, (low, high), (least, most) = a.value - b.value, a.interval, b.interval
    if not math.isfinite(a.se + b.se):
        return replace(UNKNOWN, value=value)
    ends = value - apart(a.value - low, most - b.value), value + apart(high - a.value, b.value - least)
    return Estimate(value, apart(a.se, b.se), ends)


def _correlation(x: Floats, y: Floats) -> float:
    spread = float(x.std() * y.std())
    return float(((x - x.mean()) * (y - y.mean())).mean()) / spread if spread > 0.0 else 0.0


def _plain_error(terms: Floats) -> float:
    return float(terms.std(ddof=1) / np.sqrt(len(terms))) if len(terms) > 1 else float("inf")


def _logged(
    arms: ArrayLike, propensities: ArrayLike, rewards: ArrayLike, k: int | None = None
) -> tuple[Ints, Floats, Floats]:
    a, e, r = np.asarray(arms), np.asarray(propensities, float), np.asarray(rewards, float)
    if not (a.ndim == 1 and a.shape == e.shape == r.shape and len(a)):
        raise ValueError(
            f"arms {a.shape}, propensities {e.shape}, rewards {r.shape}: need one of each a session, at least one"
        )
    if not np.issubdtype(a.dtype, np.integer):
        raise ValueError("arms must be whole numbers, indices of the target's columns")
    _all("propensities", e, (e > 0.0) & (e <= 1.0 + 1e-9), "must be more than 0 and at most 1")
    _all("rewards", r, (r >= 0.0) & (r <= 1.0), "must lie between 0 and 1")
    if k is not None:
        _all("arms", a, (a >= 0) & (a < k), f"is none of the {k} arms")
    return a.astype(np.int64), e, r


def _table(name: str, values: ArrayLike, arms: Ints) -> Floats:
    table = np.asarray(values, float)
    if table.ndim != 2 or len(table) != len(arms):
        raise ValueError(f"{name} {table.shape}: need a row of every arm for each of {len(arms)} sessions")
    _all("arms", arms, (arms >= 0) & (arms < table.shape[1]), f"is none of the {table.shape[1]} arms of {name}")
    good = (table >= 0.0) & (table <= 1.0 + 1e-9)
    _all(name, table, good, "must lie between 0 and 1")
    return table


def _all(name: str, values: NDArray[np.generic], good: NDArray[np.bool_], must: str) -> None:
    if not good.all():
        at = tuple(np.argwhere(~good)[0].tolist())
        raise ValueError(f"{name}[{', '.join(map(str, at))}] is {values[at]}: {must}")
