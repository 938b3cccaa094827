"""How much feedback one person may give: a token bucket for each, in this worker's memory. Pure but for its buckets.

A bucket holds a minute's allowance and fills at an even rate (the token bucket of RFC 2697, in items, not bytes).
"""

from __future__ import annotations

KEPT = 50_000
"""Buckets at once; the one that was not used for longest goes first."""


class Allowance:
    """Who may give how many items a minute; each worker counts for itself."""

    def __init__(self, per_minute: float) -> None:
        self._most = per_minute
        self._rate = per_minute / 60.0
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, name: str, now: float) -> float:
        """Take one item of `name`'s allowance and return 0.0; if it is used up, the seconds until one is there."""
        level, at = self._buckets.pop(name, (self._most, now))
        level = min(self._most, level + max(0.0, now - at) * self._rate)
        if len(self._buckets) >= KEPT:
            del self._buckets[next(iter(self._buckets))]
        self._buckets[name] = (level - 1.0 if level >= 1.0 else level), now
        return 0.0 if level >= 1.0 else (1.0 - level) / self._rate
