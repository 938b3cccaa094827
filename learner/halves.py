"""How sure is a number that many users' items gave, where each gave several? By random halves of the users. Pure.

Draw each user with chance ½ and take the number over the drawn ones' items; again and again. These are *typical
values* (Hartigan 1969, "Using subsample values as typical values"): the truth lies below any share of them with that
chance. It is the test that flips the sign of each user's deviation, turned into an interval, and the wild bootstrap by
clusters with the null imposed (Cameron, Gelbach & Miller 2008). It is exact for any number of users and any sizes of
them where a user's deviation is as likely up as down, as it is between two versions that are alike; Student's t over
users' sums accepts up to 17 % of such where users are few or unlike in size, for 5 % (`bench/gate_planted.py --tests`).
Few users cannot show much: no p is below 2⁻ᵘˢᵉʳˢ.

What was never seen is not known to be impossible: two more users with one item each, one as high and one as low as can
be, stand for that (Agresti & Min 2005, "Simple improved confidence intervals for comparing matched proportions").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS = 4999
_AT_ONCE = 500


class Row(NamedTuple):
    """What an item adds to the number Σ top / Σ bottom."""

    user: str
    top: float
    bottom: float = 1.0


@dataclass(frozen=True, slots=True)
class Evidence:
    """A number, and what it is over random halves of the users."""

    value: float | None
    """None where there is nothing to divide by."""
    n: int
    users: int
    typical: Floats
    """Sorted; halves without any item are left out."""

    def p_above(self, limit: float) -> float:
        """One-sided p of the hypothesis that the truth is `limit` or less; small where it is surely more."""
        return self._p(int(np.searchsorted(self.typical, limit, side="right")))

    def p_below(self, limit: float) -> float:
        """One-sided p of the hypothesis that the truth is `limit` or more; small where it is surely less."""
        return self._p(len(self.typical) - int(np.searchsorted(self.typical, limit, side="left")))

    def _p(self, against: int) -> float:
        return (1 + against + DRAWS - len(self.typical)) / (DRAWS + 1)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Each bound misses with chance `alpha`; the lower is above a limit just where `p_above` of it is ≤ alpha."""
        spare = math.floor(alpha * (DRAWS + 1) + 1e-9) - 1 - (DRAWS - len(self.typical))
        if self.value is None or not 0 <= spare < len(self.typical):
            return -math.inf, math.inf
        return float(self.typical[spare]), float(self.typical[len(self.typical) - 1 - spare])


def evidence(rows: Iterable[Row], seed: int, extremes: Sequence[float] = ()) -> Evidence:
    """Of rows with finite numbers, in any order; `extremes` are the tops of the users who stand for the unseen."""
    by_user: dict[str, list[Row]] = {}
    for row in rows:
        by_user.setdefault(row.user, []).append(row)
    sums = [
        (math.fsum(row.top for row in own), math.fsum(row.bottom for row in own)) for _, own in sorted(by_user.items())
    ]
    top, bottom = math.fsum(own[0] for own in sums), math.fsum(own[1] for own in sums)
    if bottom <= 0:
        return Evidence(None, sum(map(len, by_user.values())), len(by_user), np.empty(0))
    drawn = _halves(np.array([*sums, *((extreme, 1.0) for extreme in extremes)]), seed)
    full = drawn[drawn[:, 1] > 0]
    return Evidence(top / bottom, sum(map(len, by_user.values())), len(by_user), np.sort(full[:, 0] / full[:, 1]))


def _halves(sums: Floats, seed: int) -> Floats:
    """Tops and bottoms [DRAWS, 2] over random halves of the users, whose own are `sums` [users, 2]."""
    chance = np.random.default_rng(seed)
    blocks = []
    for start in range(0, DRAWS, _AT_ONCE):
        size = (min(_AT_ONCE, DRAWS - start), len(sums))
        blocks.append(chance.integers(0, 2, size, dtype=np.int8).astype(np.float64) @ sums)
    return np.concatenate(blocks)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p's, in their order: rejecting those ≤ α errs anywhere with chance ≤ α (Holm 1979)."""
    adjusted, highest = [1.0] * len(ps), 0.0
    for place, at in enumerate(sorted(range(len(ps)), key=lambda at: (ps[at], at))):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[at]))
        adjusted[at] = highest
    return adjusted
