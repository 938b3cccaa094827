"""The calibrated reward: what users do tells how likely they were satisfied, learned from those who also voted. Pure.

    sums by pattern of behaviour → model of P(vote is good | pattern) → each arm's mean, corrected by its own votes

A session's *pattern* is which kinds of behaviour were heard in it; the sums count, for each pattern, its sessions,
those with a vote, and those whose vote was good. That is all that the model and the means need, so a new model changes
every mean at once and no session is counted again.

The model f is a logistic regression (scikit-learn) on the kinds. It need not be right: an arm's mean is

    mean of f over its sessions + mean of (vote − f) over those with a vote

(prediction-powered inference: Angelopoulos et al. 2023, Science 382, eq. 2), unbiased whatever f is, if the sessions of
an arm that have a vote are like those that have none. The second term is shrunk towards 0 as if an arm's predictions
were off by RESIDUAL_SD or so, which tells where there are no votes yet. Sessions of an hour are predicted by a model
that was fitted without that hour's fold (cross-fitting), so no vote predicts itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from router.arms import Cell, Sums
from router.bandit import BUCKET, Floats

FOLDS = 5
PREFIX = "did:"
"""Metric of sessions with a pattern, as in `did:copy+edit`: n of them, s of these voted, ss of these said good."""
RESIDUAL = "residual"
RESIDUAL_SD = 0.25
MIN_OF_EACH = 20
"""Good votes, and bad ones, below which there is nothing to learn from."""


class Calibration(msgspec.Struct, frozen=True):
    """A fitted model: one row of coefficients (intercept first) for each fold, fitted on the other folds."""

    kinds: tuple[str, ...]
    coefficients: tuple[tuple[float, ...], ...]
    votes: int
    brier: float
    """Mean squared error of the predictions, each made without its fold."""
    baseline: float
    """The same if every session were predicted the share of good votes."""
    at: float

    @property
    def version(self) -> str:
        """Of what was learned, whenever that was."""
        return hashlib.blake2b(repr((self.kinds, self.coefficients)).encode(), digest_size=4).hexdigest()

    def predict(self, pattern: Sequence[str], fold: int) -> float:
        """P(the vote is good) in (0, 1); a kind that the model does not know says nothing."""
        intercept, *slopes = self.coefficients[fold]
        z = intercept + sum(slope for kind, slope in zip(self.kinds, slopes, strict=True) if kind in pattern)
        return float(1.0 / (1.0 + np.exp(-np.clip(z, -30.0, 30.0))))


def metric_of(pattern: Sequence[str]) -> str:
    return PREFIX + "+".join(sorted(pattern))


def pattern_of(metric: str) -> tuple[str, ...]:
    return tuple(filter(None, metric.removeprefix(PREFIX).split("+")))


def fold_of(bucket: int) -> int:
    return bucket // BUCKET % FOLDS


def fit(cells: Mapping[Cell, Sums], at: float, min_votes: int) -> Calibration | str:
    """A model of the votes in `cells`, or the reason why there is none yet."""
    from sklearn.linear_model import LogisticRegression

    rows = [(c, cells[c]) for c in sorted(cells) if c.metric.startswith(PREFIX) and cells[c].s > 0.5]
    good, bad = sum(v.ss for _, v in rows), sum(v.s - v.ss for _, v in rows)
    if good + bad < min_votes or min(good, bad) < MIN_OF_EACH:
        return f"{good:.0f} good and {bad:.0f} bad votes; {min_votes} are needed, and {MIN_OF_EACH} of each"
    kinds = tuple(sorted({kind for c, _ in rows for kind in pattern_of(c.metric)}))
    if not kinds:
        return "nothing but votes was heard"
    x = np.array([[kind in pattern_of(c.metric) for kind in kinds] for c, _ in rows], float)
    folds = np.array([fold_of(c.bucket) for c, _ in rows])
    votes, goods = np.array([v.s for _, v in rows]), np.array([min(max(v.ss, 0.0), v.s) for _, v in rows])
    coefficients, predicted = [], np.empty(len(rows))
    for fold in range(FOLDS):
        others = folds != fold
        if min(goods[others].sum(), (votes - goods)[others].sum()) < 1.0:
            return "the votes came within too few hours"
        model = LogisticRegression(C=1.0, max_iter=1000).fit(
            np.vstack([x[others], x[others]]),
            np.repeat([1, 0], others.sum()),
            np.concatenate([goods[others], (votes - goods)[others]]),
        )
        coefficients.append((float(model.intercept_[0]), *model.coef_[0].tolist()))
        predicted[~others] = model.predict_proba(x[~others])[:, 1] if (~others).any() else []
    share = goods.sum() / votes.sum()

    def error(guess: Floats | float) -> float:
        return float((goods * (1.0 - guess) ** 2 + (votes - goods) * np.square(guess)).sum() / votes.sum())

    return Calibration(kinds, tuple(coefficients), round(good + bad), error(predicted), error(share), at)


def calibrated(calibration: Calibration, cells: Mapping[Cell, Sums]) -> dict[Cell, Sums]:
    """The cells with predicted rewards instead of those made by weights, and votes less predictions beside them."""
    found = {cell: sums for cell, sums in cells.items() if cell.metric and not cell.metric.startswith(PREFIX)}
    guesses: dict[tuple[str, int], float] = {}
    for cell, v in cells.items():
        if not cell.metric.startswith(PREFIX):
            continue
        key = cell.metric, fold_of(cell.bucket)
        if key not in guesses:
            guesses[key] = calibration.predict(pattern_of(cell.metric), key[1])
        f = guesses[key]
        _add(found, cell, "", Sums(v.n, v.n * f, v.n * f * f))
        _add(found, cell, RESIDUAL, Sums(v.s, v.ss - v.s * f, v.ss * (1.0 - f) ** 2 + (v.s - v.ss) * f * f))
    return found


def corrections(n: Floats, s: Floats, ss: Floats) -> tuple[Floats, Floats]:
    """Mean and variance [K] of what predictions err by on each arm, from the sums of residuals [K]."""
    spread = (0.25 + ss.sum()) / (1.0 + n.sum())
    variance = 1.0 / (n / spread + 1.0 / RESIDUAL_SD**2)
    return np.asarray(variance * s / spread), np.asarray(np.where(n.sum() > 0, variance, 0.0))


def _add(cells: dict[Cell, Sums], at: Cell, metric: str, sums: Sums) -> None:
    cell = Cell(at.segment, at.arm, at.bucket, metric)
    cells[cell] = cells.get(cell, Sums()).plus(sums)
