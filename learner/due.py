"""When to learn: enough new pairs, too many bad answers, or time; never while a challenger waits. Pure."""

from __future__ import annotations

from typing import NamedTuple

from learner.plan import Learner

FEWEST_JUDGED = 50
"""Judged answers in a week, below which their share of bad ones says nothing."""


class Facts(NamedTuple):
    """What decides; times in Unix seconds."""

    now: float
    last_began: float
    """The last round's beginning; 0 before the first."""
    new_pairs: int
    """Accepted pairs since what the last round learned from."""
    pairs: int
    """Accepted pairs in the window."""
    judged: int
    """Judged answers in the last 7 days."""
    negative: int
    """Of these, the bad ones."""
    challenger: str | None


class Due(NamedTuple):
    """Whether to begin, and why; or why not yet."""

    reason: str | None
    waiting: str = ""
    new_pairs: int = 0


def due(facts: Facts, plan: Learner, force: bool = False) -> Due:
    """A round is due where one of three reasons holds, the shortest interval is over, and there is no challenger."""
    if facts.challenger is not None:
        return Due(None, f"{facts.challenger} is the challenger: decide about it first (`understudy learn drop`)")
    if force:
        return Due("forced", new_pairs=facts.new_pairs)
    if facts.last_began and facts.now < facts.last_began + plan.min_interval:
        hours = (facts.last_began + plan.min_interval - facts.now) / 3600
        return Due(None, f"the last round began too lately; the next one may in {hours:.1f} h", facts.new_pairs)
    reason = _reason(facts, plan)
    if reason is not None:
        return Due(reason, new_pairs=facts.new_pairs)
    left = plan.min_pairs - facts.new_pairs
    return Due(None, f"{left} more new pairs are needed, or {plan.negative_rate:.0%} bad answers", facts.new_pairs)


def _reason(facts: Facts, plan: Learner) -> str | None:
    if facts.new_pairs >= plan.min_pairs:
        return f"{facts.new_pairs} new pairs"
    if facts.new_pairs and facts.judged >= FEWEST_JUDGED and facts.negative > plan.negative_rate * facts.judged:
        return f"{facts.negative / facts.judged:.0%} of {facts.judged} judged answers were bad in 7 days"
    every = interval(facts.pairs, plan)
    if facts.last_began and facts.new_pairs and facts.now >= facts.last_began + every:
        return f"{every / 86400:g} days since the last round"
    return None


def interval(pairs: int, plan: Learner) -> float:
    """Longest time between rounds in the present phase, seconds: of the last phase whose pairs are there."""
    reached = [phase for phase in plan.phases if pairs >= phase.pairs]
    return max(reached, key=lambda phase: phase.pairs).every if reached else plan.every
