"""The error budget: how much may fail in a window before no new version is tried. Pure.

Site reliability's term (Beyer et al. 2016, "Site Reliability Engineering", ch. 3): of n requests (1 − objective) · n
may fail; what is left of these, as a share, is the budget that is left. Counts are kept by the hour, with the number of
the newest fact in them, so that a fact that is read twice counts once.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from router.rollout_policy import ErrorBudget
from telemetry.events import Interaction

HOUR = 3600.0
NOT_OURS = (None, "client_left")


class Spent(msgspec.Struct, frozen=True):
    """Requests and failures by hour."""

    through: int = 0
    """Sequence number of the newest fact that is counted."""
    hours: dict[int, tuple[int, int]] = {}
    """Hours since 1970 → requests, failed."""

    def plus(self, facts: Iterable[tuple[int, Interaction]], window: float) -> Spent:
        """With more facts of the route; hours beyond the window before the newest are left out."""
        new = [(seq, fact) for seq, fact in facts if seq > self.through]
        if not new:
            return self
        hours = dict(self.hours)
        for _, fact in new:
            hour = int(fact.at // HOUR)
            n, failed = hours.get(hour, (0, 0))
            hours[hour] = n + 1, failed + is_failure(fact)
        first = max(hours) - window / HOUR
        kept = {hour: counts for hour, counts in hours.items() if hour >= first}
        return replace(self, through=max(seq for seq, _ in new), hours=kept)

    def left(self, budget: ErrorBudget, now: float) -> float:
        """The share of the budget that is left, 1 before any request; below 0 it is spent. One failure never spends it:
        of few requests it would be more than any budget allows."""
        inside = [counts for hour, counts in self.hours.items() if hour * HOUR > now - budget.window - HOUR]
        n, failed = (sum(column) for column in zip(*inside, strict=True)) if inside else (0, 0)
        return 1.0 - failed / max(1.0, (1.0 - budget.objective) * n)


def is_failure(fact: Interaction) -> bool:
    """Whether the service failed; a request that it refused with reason (status 400, say) is its client's."""
    return fact.error not in NOT_OURS and not 400 <= fact.status < 500
