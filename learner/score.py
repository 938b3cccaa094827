"""What a judge's verdicts are worth: how far they agree with people, and what is left of them at equal length. Pure.

Judges prefer what is longer. AlpacaEval 2 (Dubois et al. 2024, 2404.04475) fits how the verdict depends on the length
and then sets that to 0. So here: of a duel with the lengths a (challenger) and b, in characters,

    logit P(challenger wins) = θ + φ·x        x = tanh((a − b) / the root mean square of all a − b)

and of pairs that people judged, too, logit P(first wins) = φ·x + κ·(1 if people prefer the first, −1 if the second).
Where better answers are longer, too, neither tells quality from length. So the judge is also asked about answers beside
the same ones padded (`padded`, as the "repetitive list" of Zheng et al. 2023, 2306.05685): these tell φ alone. That it
sees through them is a tie, for padding is not only longer but also worse. What could yet be either is laid to length:
by the priors, θ ~ N(0, ½²), φ and κ ~ N(0, 5²), and by taking from a θ that speaks for the challenger 1.64 of the
standard errors that it has only because φ is not known (φ moves with it).

A verdict is then what it would have been at equal length: latent utility θ + φ·x + noise won if above 0, so a duel that
was won with φ·x > 0 is won without that with probability σ(θ)/σ(θ + φ·x), else surely; a lost one likewise. Scores
are drawn with it (a tie as half of either) and not the probabilities themselves, which vary less than verdicts do: an
interval around their mean would be too narrow. Each duel's chance comes from its id, so the same duels score the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

THETA_SD, OTHER_SD = 0.5, 5.0
STEPS = 50
Z = 1.6448536
"""One-sided 95 %."""


class Lengths(NamedTuple):
    """How verdicts depend on length."""

    theta: float
    phi: float
    scale: float
    """Characters; at that difference x is tanh(1)."""


def at_equal_length(
    ids: Sequence[str],
    verdicts: ArrayLike,
    longer: ArrayLike,
    others: ArrayLike = (),
    others_longer: ArrayLike = (),
    preferred: ArrayLike = (),
) -> tuple[Floats, Lengths]:
    """Scores [N] of duels without what length did, from verdicts [N] (1, ½, 0) and by how many characters they differ.

    `others`: verdicts [M] on the first answers of pairs that people judged, or of padded ones, with their differences,
    and `preferred`: 1 where people prefer the first, −1 the second, 0 for padded ones, whose verdict is ½ at least.
    """
    y, d = np.asarray(verdicts, float), np.asarray(longer, float)
    v, e, liked = (np.asarray(values, float) for values in (others, others_longer, preferred))
    both = np.concatenate([d, e])
    scale = max(1.0, float(np.sqrt(np.mean(np.square(both))))) if len(both) else 1.0
    x, z = np.tanh(d / scale), np.tanh(e / scale)
    rows = np.column_stack(
        [
            np.concatenate([np.ones(len(x)), np.zeros(len(z))]),
            np.concatenate([x, z]),
            np.concatenate([np.zeros(len(x)), liked]),
        ]
    )
    found = Lengths(
        *_doubted(*_logistic(rows, np.concatenate([y, v]), np.array([THETA_SD, OTHER_SD, OTHER_SD]))), scale
    )
    chances = np.array([_chance(one) for one in ids])
    return np.array([_drawn(*one, found) for one in zip(y, x, chances, strict=True)]), found


def padded(answer: str) -> str:
    """An answer that says the same twice."""
    return f"{answer}\n\nTo say the same once more, in full: {answer}"


def _drawn(verdict: float, x: float, chance: float, fitted: Lengths) -> float:
    equal, seen = _sigmoid(fitted.theta), _sigmoid(fitted.theta + fitted.phi * x)
    after_won = min(1.0, equal / seen)
    after_lost = max(0.0, (equal - seen) / (1.0 - seen))
    won, lost = float(chance < after_won), float(chance < after_lost)
    return verdict * won + (1.0 - verdict) * lost


def _doubted(fitted: Floats, bend: Floats) -> tuple[float, float]:
    """θ and φ, with θ no more above 0 than it surely is whatever φ is."""
    theta, phi = float(fitted[0]), float(fitted[1])
    spread = np.linalg.inv(bend)
    by_length = max(0.0, float(spread[0, 0] - 1.0 / bend[0, 0]))
    sure = max(0.0, theta - Z * by_length**0.5) if theta > 0 else theta
    return sure, phi + float(spread[1, 0] / spread[0, 0]) * (sure - theta)


def _logistic(rows: Floats, y: Floats, sd: Floats) -> tuple[Floats, Floats]:
    """Most likely coefficients under normal priors, by Newton's steps, and their precision; y in [0, 1]."""
    beta, bend = np.zeros(rows.shape[1]), np.diag(1.0 / sd**2)
    for _ in range(STEPS):
        p = _sigmoids(rows @ beta)
        slope = rows.T @ (y - p) - beta / sd**2
        bend = (rows.T * (p * (1.0 - p))) @ rows + np.diag(1.0 / sd**2)
        step = np.linalg.solve(bend, slope)
        step *= min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))  # a long one may miss
        beta = beta + step
        if np.abs(step).max() < 1e-9:
            break
    return beta, bend


def steepness(logits: ArrayLike, weights: ArrayLike | None = None) -> float:
    """By how much to multiply logits of what people preferred to make probabilities of them (Platt, no offset)."""
    z = np.asarray(logits, float)
    scale = max(float(np.abs(z).max(initial=0.0)), 1e-12)
    w = np.ones(len(z)) if weights is None else np.asarray(weights, float)
    a = 0.0
    for _ in range(STEPS):
        p = _sigmoids(a * z / scale)
        slope = float((w * (1.0 - p) * z / scale).sum()) - a / 100.0
        bend = float((w * p * (1.0 - p) * (z / scale) ** 2).sum()) + 0.01
        step = float(np.clip(slope / bend, -2.0, 2.0))
        a += step
        if abs(step) < 1e-9:
            break
    return a / scale


def pearson(one: ArrayLike, other: ArrayLike) -> float | None:
    """None where either does not vary, or there are fewer than 3."""
    a, b = np.asarray(one, float), np.asarray(other, float)
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def spearman(one: ArrayLike, other: ArrayLike) -> float | None:
    """Pearson of the ranks; equal values share theirs."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: ArrayLike) -> Floats:
    found, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[place]) if len(found) else np.zeros(0)


def lower_bound(hits: ArrayLike, users: Sequence[str]) -> float:
    """Wilson's lower bound (95 %, one-sided) of a share, with as many items as they are worth: users are not even.

    By how much the users' means vary more than single items would (the design effect), the items count for less; where
    all are hits or none is, that cannot be seen, and each user counts once.
    """
    y = np.asarray(hits, float)
    if not len(y):
        return 0.0
    mean, n = float(y.mean()), float(len(y))
    names, place = np.unique(np.array(users), return_inverse=True)
    sums = np.bincount(place, weights=y - mean, minlength=len(names))
    single, clustered = float(np.square(y - mean).sum()), float(np.square(sums).sum())
    worth = n / max(1.0, clustered / single) if single > 0 else float(len(names))
    middle = mean + Z**2 / (2 * worth)
    return (middle - Z * float(np.sqrt(mean * (1 - mean) / worth + Z**2 / (4 * worth**2)))) / (1 + Z**2 / worth)


def _chance(name: str) -> float:
    """In [0, 1), the same for the same name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _sigmoid(value: float) -> float:
    return float(_sigmoids(np.array([value]))[0])


def _sigmoids(values: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(values, -30.0, 30.0))))
