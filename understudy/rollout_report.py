"""What operators see of rollouts: one reading of store and journal for the page, the admin API and the command line.

No number is without its doubt. The difference has its confidence sequence, which holds at every look. A share of
sessions, or a mean of rewards, has a 95 % interval of this one look (Wilson 1927, "Probable inference, the law of
succession, and statistical inference"); a mean in [0, 1] varies at most as a share of that size does, so its interval
is wide enough. A quantile of times has the number of times it is of, and its guardrail's evidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from learner.registry import Registry
from router import guardrails
from router.analysis import impact, shown, waiting_for
from router.arms import Snapshot
from router.casting import cast
from router.plan import RoutePlan
from router.rollout import Rollout, digest
from router.rollout_controller import load
from router.rollout_policy import Rollout as Policy
from router.rollouts import standing_of
from router.store import Store
from router.trial import Side, Standing, Watched
from telemetry.events import Decision
from telemetry.journal import Journal

SURE = 1.96
"""Standard errors on either side of a 95 % interval."""
LOG = 50
"""Decisions that are shown."""
LATE = 30.0
"""Seconds after which a rollout under way should have been looked at again."""


def rollout_report(plans: Iterable[RoutePlan], store: Store, journal: Journal, now: float) -> list[dict[str, Any]]:
    """A row for each route, in the config's order. Raises `StateError`s.

    `enabled` says whether the config has a rollout for it, `rollout` is the last one or None, `standing` how it was
    found at the last look or None, `decisions` the log of all of the route's rollouts, newest first. An estimate is
    {value, low, high, of} or None.
    """
    registry = Registry(store)
    return [_route(plan, dict(registry.aliases(plan.name)), store, journal, now) for plan in plans]


def _route(plan: RoutePlan, aliases: dict[Any, str], store: Store, journal: Journal, now: float) -> dict[str, Any]:
    rollout = load(store, plan.name)[1]
    standing = standing_of(store, plan.name)
    if rollout is None or standing is None or standing.at < rollout.began:
        standing = None  # what is kept is of the rollout before
    row = {
        "route": plan.name,
        "at": now,
        "enabled": plan.rollout is not None,
        "champion": cast(plan.arms, aliases).champion,
        "aliases": {alias: aliases.get(alias) for alias in ("champion", "challenger", "previous")},
        "rollout": None,
        "stages": [],
        "standing": None,
        "decisions": _log(journal.decisions(plan.name, LOG), rollout),
    }
    if plan.rollout is None:
        return row
    row |= {"margin": plan.rollout.margin, "alpha": plan.rollout.alpha, "stages": _stages(plan.rollout, rollout)}
    if rollout is not None:
        row["rollout"] = _rollout(rollout, standing, plan.rollout, store.snapshot(plan.name), now)
        row["standing"] = _standing(rollout, standing, plan.rollout, now) if standing is not None else None
    return row


def _rollout(
    rollout: Rollout, standing: Standing | None, policy: Policy, snapshot: Snapshot | None, now: float
) -> dict[str, Any]:
    known = msgspec.to_builtins(rollout)
    names = ("id", "number", "phase", "challenger", "control", "step", "step_began", "began", "ended", "why")
    return {
        **{name: known[name] for name in names},
        "active": rollout.active,
        "waits": rollout.waits,
        "waiting_for": waiting_for(rollout, standing, policy, now),
        "approved": list(rollout.approved),
        "excused": list(rollout.excused),
        "cap": rollout.cap(policy),
        "shadow": rollout.shadow(policy),
        "drawn": _drawn(rollout, snapshot),
        "policy_changed": rollout.active and rollout.policy not in ("", digest(policy)),
    }


def _drawn(rollout: Rollout, snapshot: Snapshot | None) -> dict[str, float] | None:
    """The share of new sessions that draw the challenger by the published weights: of "" and over all segments.

    The holdout never draws it. None where the weights do not know the rollout.
    """
    if snapshot is None or snapshot.rollout != rollout.id:
        return None
    shares = {
        segment: (1.0 - snapshot.holdout) * row.get(rollout.challenger, 0.0)
        for segment, row in snapshot.segments.items()
    }
    least, most = min(shares.values(), default=0.0), max(shares.values(), default=0.0)
    return {"share": shares.get("", most), "least": least, "most": most, "segments": float(len(shares))}


def _stages(policy: Policy, rollout: Rollout | None) -> list[dict[str, Any]]:
    at = rollout.step if rollout is not None and rollout.phase != "pending" else -1
    if rollout is not None and rollout.phase in ("promoting", "promoted", "undoing", "undone"):
        at = len(policy.stages)
    states = ["done" if n < at else "current" if n == at else "ahead" for n in range(len(policy.stages))]
    return [
        {
            "step": n + 1,
            "kind": stage.kind,
            "shown": shown(stage),
            "state": state,
            "min_sessions": stage.min_sessions,
            "min_time": stage.min_time,
        }
        for n, (stage, state) in enumerate(zip(policy.stages, states, strict=True))
    ]


def _standing(rollout: Rollout, standing: Standing, policy: Policy, now: float) -> dict[str, Any]:
    return {
        "at": standing.at,
        "late": rollout.phase in ("running", "paused") and now - standing.at > max(LATE, 3.0 * policy.interval),
        "verdict": standing.verdict,
        "said": said(standing, policy),
        "difference": standing.difference,
        "lower": standing.lower,
        "upper": standing.upper,
        "level": 1.0 - policy.alpha * (1.0 - guardrails.SHARE),
        "better": standing.better,
        "judged_in_step": standing.judged_in_step,
        "challenger": _side(rollout.challenger, standing.challenger),
        "control": _side(rollout.control, standing.control),
        "guardrails": [_watched(one, rollout, standing, policy) for one in standing.guardrails],
        "shadow": standing.shadow,
        "unfit": standing.unfit,
        "doubt": standing.doubt,
        "budget_left": standing.budget_left,
        "history": [list(look) for look in standing.history],
        "impact": impact(standing),
    }


def said(standing: Standing, policy: Policy) -> str:
    """The test's verdict in words."""
    if standing.difference is None:
        return "too few judged sessions to compare yet"
    if standing.verdict == "failed":
        return "users are worse off with the challenger"
    if standing.better:
        return "users are better off with the challenger"
    if standing.verdict == "successful":
        return f"the challenger is no worse than {policy.margin:g}; not shown to be better"
    return f"undecided: neither worse nor within {policy.margin:g} is shown yet"


def _side(arm: str, side: Side) -> dict[str, Any]:
    return {
        "arm": arm,
        "sessions": side.sessions,
        "judged": side.judged,
        "reward": estimate(side.reward, side.judged),
        "satisfied": estimate(side.satisfied, side.judged),
        "error_rate": _share(side.errors, side.sessions),
        "flag_rate": _share(side.flagged, side.sessions),
        "signal_rate": _share(side.reacted, side.sessions),
        "latency": side.latency,
        "first_byte": side.first_byte,
    }


def _watched(one: Watched, rollout: Rollout, standing: Standing, policy: Policy) -> dict[str, Any]:
    """A guardrail with estimates; of a quantile of times low and high are None."""
    ours, theirs = _number_of(one.metric, rollout, standing, policy)
    seen = _timed if one.metric.startswith(("latency", "first_byte")) else estimate
    return {
        **{name: getattr(one, name) for name in ("metric", "action", "limit", "evidence", "tripped")},
        "excused": one.metric in rollout.excused,
        "challenger": seen(one.challenger, ours),
        "control": _known(one.control) if one.metric == "sample_ratio" else seen(one.control, theirs),
    }


def _known(share: float | None) -> dict[str, Any] | None:
    """The share that was to be drawn: no estimate."""
    return {"value": share, "low": share, "high": share, "of": 0} if share is not None else None


def _number_of(metric: str, rollout: Rollout, standing: Standing, policy: Policy) -> tuple[int, int]:
    """Of how many a guardrail's two values are."""
    ours, theirs, stage = standing.challenger, standing.control, rollout.stage(policy)
    if stage is not None and stage.kind == "shadow":
        return standing.shadow.get("compared", 0), standing.shadow.get("compared", 0)
    if metric == "sample_ratio":
        return ours.sessions + theirs.sessions, ours.sessions + theirs.sessions
    if metric == "satisfaction":
        return ours.judged, theirs.judged
    return ours.sessions, theirs.sessions


def _timed(value: float | None, of: int) -> dict[str, Any] | None:
    return {"value": value, "low": None, "high": None, "of": of} if value is not None else None


def _share(events: int, of: int) -> dict[str, Any] | None:
    return estimate(events / of if of else None, of)


def estimate(mean: float | None, of: int) -> dict[str, Any] | None:
    """A mean of `of` values in [0, 1] with Wilson's 95 % interval; None of nothing."""
    if mean is None or of <= 0:
        return None
    z = SURE * SURE / of
    middle = (mean + z / 2.0) / (1.0 + z)
    wide = SURE * math.sqrt(max(0.0, mean * (1.0 - mean)) / of + z / (4.0 * of)) / (1.0 + z)
    return {"value": mean, "low": max(0.0, middle - wide), "high": min(1.0, middle + wide), "of": of}


def _log(journaled: Sequence[Decision], rollout: Rollout | None) -> list[dict[str, Any]]:
    """Decisions of the journal, and those of the document that are not there yet."""
    found = {one.event_id: one for one in (*journaled, *(rollout.decisions if rollout is not None else ()))}
    newest = sorted(found.values(), key=lambda one: (one.at, one.number), reverse=True)[:LOG]
    names = ("at", "rollout", "number", "verb", "actor", "why", "phase", "step", "challenger", "control", "policy")
    return [{name: getattr(one, name) for name in names} | {"found": _found(one.evidence)} for one in newest]


def _found(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Of the evidence what fits in a line; all of it is in the journal."""
    return {name: evidence[name] for name in ("difference", "lower", "upper", "impact") if name in evidence}
