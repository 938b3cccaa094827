"""From a route's cells to what is believed of each arm in each segment, and to the shares of new sessions. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from router.arms import Cell, Sums
from router.bandit import (
    BUCKET,
    Family,
    Floats,
    Posterior,
    believe,
    believe_segments,
    epsilon_greedy,
    family,
    probability_best,
    top_two,
    with_caps,
    with_floor,
)
from router.calibrate import RESIDUAL, corrections
from router.features import keys_of, vector_of
from router.linear import believe_linear
from router.policy import Arm, Epsilon, Learned, Linear, Policy, Split, TopTwo

AT_ONCE = 500
"""Segments whose P(best) is computed together: more would not fit the processor's cache."""


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What is believed of each arm in each segment: arrays [S, K].

    The first segment is "": sessions of no segment, and of one that is not listed.
    """

    arms: tuple[str, ...]
    segments: tuple[str, ...]
    sessions: Floats
    """Evidence, discounted by age."""
    means: Floats
    sds: Floats
    values: Floats
    """The means less what the arms' sessions cost, in units of reward."""
    best: Floats
    """P(the arm has the highest value)."""

    def of(self, segment: str, arm: str) -> Posterior:
        s, k = self.segments.index(segment), self.arms.index(arm)
        return Posterior(float(self.means[s, k]), float(self.sds[s, k]), float(self.sessions[s, k]))


def beliefs(
    policy: Learned,
    arms: Mapping[str, Arm],
    cells: Mapping[Cell, Sums],
    now: float,
    burdens: Mapping[str, float] = MappingProxyType({}),
) -> Beliefs:
    """Read `cells` as of `now` (Unix seconds): a session of age a counts 2^(-a / half_life) times.

    A bucket that lies in the future (a clock was set back) counts as of now. Arms that are not in `arms` are left
    out, but for parents of those that are. Of more segments than `policy.max_segments` those with the most evidence are
    listed; all are pooled. `burdens`: by arm, what a session of it costs, in units of reward (`router.price`).
    """
    parents = {name: (arm.parent, arm.gain) for name, arm in arms.items() if arm.parent is not None}
    heard = [*arms, *dict.fromkeys(parent for parent, _ in parents.values() if parent not in arms)]
    kin = family(heard, parents) if parents else None
    segments, sums = _tabulate(policy, heard, cells, now)
    common: Floats | float = 0.0
    if policy.segment_by is None:
        means, sds = believe(*sums, policy.prior.mean, policy.prior.mass, kin)
        listed, sessions = [""], sums[0]
    elif isinstance(policy, Linear):
        listed, sessions, means, sds, common = _by_features(policy, segments, sums, kin)
    else:
        means, sds = believe_segments(*sums, policy.prior.mean, policy.prior.mass, kin)
        named = [place for place, segment in enumerate(segments) if segment]
        named = sorted(sorted(named, key=lambda place: -sums[0][place].sum())[: policy.max_segments])
        first = segments.index("") if sums[0][segments.index("")].any() else len(segments)  # a segment nobody has seen
        sessions = np.vstack([sums[0], np.zeros(len(heard))])[[first, *named]]
        means, sds, listed = means[[first, *named]], sds[[first, *named]], ["", *(segments[place] for place in named)]
    sessions, means, sds = (table[:, : len(arms)] for table in (sessions, means, sds))
    if any(cell.metric == RESIDUAL for cell in cells):
        _, errors = _tabulate(policy.model_copy(update={"segment_by": None}), list(arms), cells, now, RESIDUAL)
        by, variance = (row[0] for row in corrections(*errors))
        means, sds = np.clip(means + by, 0.0, 1.0), np.sqrt(sds**2 + variance)
    values = means - np.array([burdens.get(arm, 0.0) for arm in arms])
    parts = range(0, len(listed), AT_ONCE)
    own = np.sqrt(sds**2 - common)
    best = np.vstack([probability_best(values[at : at + AT_ONCE], own[at : at + AT_ONCE]) for at in parts])
    return Beliefs(tuple(arms), tuple(listed), sessions, means, sds, values, best)


def _by_features(
    policy: Linear, segments: Sequence[str], sums: tuple[Floats, Floats, Floats], kin: Family | None
) -> tuple[list[str], Floats, Floats, Floats, Floats]:
    """The kinds of requests that are listed, and of each its sessions, means, sds and the variance [S, 1] in common.

    All kinds that there can be are, if they are no more than `max_segments`, heard of or not. "" is the average
    request; sessions of a segment that is no kind (another policy's, say) are taken for such.
    """
    x = np.array([vector_of(segment, policy.features) for segment in segments])
    n, told = sums[0].sum(1)[:, None], ~np.isnan(x)
    x, heard = np.where(told, x, 0.0), (n * told).sum(0)
    centre = np.where(heard > 0.0, (n * x).sum(0) / np.maximum(heard, 1e-12), 0.5)
    place = {segment: at for at, segment in enumerate(segments)}
    kinds = list(keys_of(policy.features))
    if len(kinds) > policy.max_segments:
        kinds = sorted(kinds, key=lambda kind: -n[place[kind], 0] if kind in place else 0.0)[: policy.max_segments]
    at = np.vstack([np.zeros(len(centre)), np.array([vector_of(kind, policy.features) for kind in kinds]) - centre])
    means, sds, common = believe_linear(
        *sums, np.where(told, x - centre, 0.0), at, policy.prior.mean, policy.prior.mass, kin
    )
    sessions = np.zeros(means.shape)
    for row, kind in enumerate(kinds, 1):
        if kind in place:
            sessions[row] = sums[0][place[kind]]
    sessions[0] = np.maximum(0.0, sums[0].sum(0) - sessions[1:].sum(0))
    return ["", *kinds], sessions, means, sds, common[:, None]


def mean_of(metric: str, policy: Learned, arms: Mapping[str, Arm], cells: Mapping[Cell, Sums], now: float) -> Floats:
    """The mean [K] of a metric other than the reward over all segments; an arm is like the others until it is heard."""
    whole = policy.model_copy(update={"segment_by": None})
    _, (n, s, _) = _tabulate(whole, list(arms), cells, now, metric)
    everyone = s.sum() / max(n.sum(), 1e-12)
    return np.asarray((s[0] + everyone) / (n[0] + 1.0))


def _tabulate(
    policy: Learned, arms: Sequence[str], cells: Mapping[Cell, Sums], now: float, metric: str = ""
) -> tuple[list[str], tuple[Floats, Floats, Floats]]:
    """The segments, "" first, and Σw, Σwr, Σwr² as arrays [S, K], discounted."""
    column = {arm: place for place, arm in enumerate(arms)}
    row = {"": 0}
    kept = [(c, v) for c, v in cells.items() if c.arm in column and c.metric == metric]
    if policy.segment_by is not None:
        for cell, _ in kept:
            row.setdefault(cell.segment, len(row))
    places = [row.get(cell.segment, 0) * len(arms) + column[cell.arm] for cell, _ in kept]
    ages = np.maximum(0.0, now - BUCKET / 2 - np.array([cell.bucket for cell, _ in kept], float))
    weights = 2.0 ** (-ages / policy.half_life)
    size = len(row) * len(arms)
    parts = (np.array([getattr(v, part) for _, v in kept], float) for part in ("n", "s", "ss"))
    sums = [np.asarray(np.bincount(places, weights * part, size), float).reshape(len(row), -1) for part in parts]
    return list(row), (sums[0], sums[1], sums[2])


def shares(
    policy: Policy,
    arms: Mapping[str, Arm],
    cells: Mapping[Cell, Sums],
    now: float,
    burdens: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, dict[str, float]]:
    """Segment → arm → the share of new sessions that it should get now; segment "" is any that is not listed."""
    if isinstance(policy, Split):
        return {"": {arm: policy.shares.get(arm, 0.0) for arm in arms}}
    found = beliefs(policy, arms, cells, now, burdens)
    rows = with_caps(with_floor(drawn(policy, found), policy.floor), _caps(policy, arms)).tolist()
    return {segment: dict(zip(arms, row, strict=True)) for segment, row in zip(found.segments, rows, strict=True)}


def _caps(policy: Learned, arms: Mapping[str, Arm]) -> Floats:
    """The most that each arm's weight may be for its share, with what the holdout adds, to stay below its largest."""
    most = np.array([arm.max_share for arm in arms.values()])
    return np.asarray(np.maximum(0.0, (most - policy.holdout / len(arms)) / (1.0 - policy.holdout)))


def drawn(policy: Learned, found: Beliefs) -> Floats:
    """The policy's shares [S, K] before the floor."""
    match policy:
        case TopTwo():
            return top_two(found.best, policy.beta)
        case Epsilon():
            return epsilon_greedy(found.values, policy.epsilon)
        case _:
            return found.best
