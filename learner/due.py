"""When to learn: enough new pairs, too many bad answers, or time; never while a challenger waits. Pure."""

from __future__ import annotations

from typing import NamedTuple

from learner.plan import Learner

FEWEST_JUDGED = 50
"""Judged answers in a week, below which their share of bad ones says nothing."""


class Look(NamedTuple):
    """What a dataset would be made of now."""

    pairs: int = 0
    """Accepted pairs in the window."""
    new_pairs: int = 0
    """Of these, what is newer than what the last round learned from."""
    judged: int = 0
    """Answers that were judged in the last 7 days."""
    negative: int = 0
    """Of these, the bad ones."""


class Facts(NamedTuple):
    """What decides; times in Unix seconds."""

    now: float
    last_began: float
    """The last round's beginning; 0 before the first."""
    challenger: str | None
    seen: Look = Look()
    wanted: int = 0
    """Pairs in the window that the last round's diagnosis asks for: it was refused because there were too few."""


class Due(NamedTuple):
    """Whether to begin, and why; or why not yet."""

    reason: str | None
    waiting: str = ""
    new_pairs: int = 0


def not_yet(facts: Facts, plan: Learner, force: bool = False) -> Due | None:
    """What keeps a round from beginning whatever there is to learn: a challenger, or a round shortly before."""
    if facts.challenger is not None:
        return Due(None, f"{facts.challenger} is the challenger: decide about it first (`understudy learn drop`)")
    if not force and 0 < facts.last_began <= facts.now < facts.last_began + plan.min_interval:
        hours = (facts.last_began + plan.min_interval - facts.now) / 3600
        return Due(None, f"the last round began too lately; the next one may in {hours:.1f} h")
    return None


def due(facts: Facts, plan: Learner, force: bool = False) -> Due:
    """A round is due where one of three reasons holds, and nothing keeps it from beginning."""
    early = not_yet(facts, plan, force)
    if early is not None:
        return early
    seen = facts.seen
    reason = "forced" if force else _reason(facts, plan)
    if reason is not None:
        return Due(reason, new_pairs=seen.new_pairs)
    left = max(plan.min_pairs - seen.new_pairs, facts.wanted - seen.pairs)
    why = f" ({facts.wanted} in all: the last challenger was refused for want of them)" if facts.wanted else ""
    return Due(None, f"{left} more new pairs are needed{why}, or {plan.negative_rate:.0%} bad answers", seen.new_pairs)


def _reason(facts: Facts, plan: Learner) -> str | None:
    seen = facts.seen
    if seen.new_pairs >= plan.min_pairs and seen.pairs >= facts.wanted:
        return f"{seen.new_pairs} new pairs"
    if seen.new_pairs and seen.judged >= FEWEST_JUDGED and seen.negative > plan.negative_rate * seen.judged:
        return f"{seen.negative / seen.judged:.0%} of {seen.judged} judged answers were bad in 7 days"
    every = interval(seen.pairs, plan)
    if facts.last_began and seen.new_pairs and facts.now >= facts.last_began + every:
        return f"{every / 86400:g} days since the last round"
    return None


def interval(pairs: int, plan: Learner) -> float:
    """Longest time between rounds in the present phase, seconds: of the last phase whose pairs are there."""
    reached = [phase for phase in plan.phases if pairs >= phase.pairs]
    return max(reached, key=lambda phase: phase.pairs).every if reached else plan.every
