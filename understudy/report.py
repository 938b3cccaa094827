"""What `status` and `arms` show: read from the store and the journal, as plain data that the CLI prints."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.calibrate import calibrated
from router.casting import arms_of
from router.controller import calibration_of, initial_snapshot
from router.plan import RoutePlan
from router.policy import Learned, Thompson
from router.price import priced
from router.refit import segmenter_of
from router.store import Store
from router.weights import beliefs
from telemetry.events import Interaction, Signal, names_of
from telemetry.journal import Journal

HOUR = 3600.0


@dataclass(slots=True)
class Heard:
    """What an arm did in the last hour, in one segment."""

    requests: int = 0
    sessions: set[tuple[str, str]] = field(default_factory=set)
    judged: set[tuple[str, str]] = field(default_factory=set)
    """Sessions with any signal."""
    moved_by: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float | None:
        """The share of sessions in which anything was heard."""
        return len(self.judged) / len(self.sessions) if self.sessions else None


def apart(arm: Heard, everyone: Heard) -> bool:
    """Whether signals come much more or less often on this arm than on the others, and not by chance.

    Then its sessions with a reward may be other kinds of sessions than the others' are, and the means cannot be
    compared. Two proportions, pooled z-test at 4 standard errors, since it is looked at all the time.
    """
    n, heard = len(arm.sessions), len(arm.judged)
    rest, heard_rest = len(everyone.sessions) - n, len(everyone.judged) - heard
    if not (n and rest):
        return False
    pooled = (heard + heard_rest) / (n + rest)
    error = math.sqrt(pooled * (1.0 - pooled) * (1.0 / n + 1.0 / rest))
    one, other = heard / n, heard_rest / rest
    return abs(one - other) > 4.0 * error and max(one, other) > 1.5 * min(one, other)


def together(parts: Iterable[Heard]) -> Heard:
    total = Heard()
    for one in parts:
        total.requests += one.requests
        total.sessions |= one.sessions
        total.judged |= one.judged
        total.moved_by += one.moved_by
    return total


def arms(plans: list[RoutePlan], store: Store, journal: Journal, now: float) -> list[dict[str, Any]]:
    """A row for each segment and arm: its weight now, what it served in the last hour, and what is believed of it.

    `mean` and `interval` (95 %) are of the session reward in [0, 1]; `sessions` is the discounted evidence; `regret`
    is what the segment's best-looking arm would have earned more in these sessions; `signal_rate` is the share of
    the last hour's sessions in which anything was heard. Segment "" is every session that is in no other one.
    """
    heard = _last_hour(journal, now)
    rows = []
    for plan in plans:
        snapshot = store.snapshot(plan.name) or initial_snapshot(plan, now)
        playing = arms_of(snapshot, plan.arms)
        policy = plan.policy if isinstance(plan.policy, Learned) else Thompson(kind="thompson")
        cells, model = store.sums(plan.name), calibration_of(store, plan.name)
        if model is not None and plan.reward.mode == "calibrated":
            cells = calibrated(model, cells)
        cost = priced(policy, playing, cells, now, plan.reward)
        learned = segmenter_of(store, plan.name) if policy.segment_by == "prompt" else None
        labels = dict(zip(learned.names, learned.labels, strict=False)) if learned else {}
        found = beliefs(policy, playing, cells, now, cost.burdens)
        for place_of, segment in enumerate(found.segments):
            if segment and not found.sessions[place_of].any():
                continue  # `linear` lists every kind of request that there can be
            believed = {arm: found.of(segment, arm) for arm in found.arms}
            chances = found.best[place_of].tolist()
            top = max(believed.values(), key=lambda b: b.mean).mean
            weights = snapshot.segments.get(segment, snapshot.segments.get("", {}))
            places = {arm: _place(heard, plan.name, segment, arm, found.segments) for arm in found.arms}
            everyone = together(places.values())
            for arm, p_best in zip(found.arms, chances, strict=True):
                belief, place = believed[arm], places[arm]
                row = {
                    "route": plan.name,
                    "segment": segment,
                    "label": labels.get(segment, ""),
                    "arm": arm,
                    "model": playing[arm].model,
                    "policy": plan.policy.kind,
                    "weight": weights.get(arm, 0.0),
                    "mean": belief.mean,
                    "interval": list(belief.interval()),
                    "sessions": belief.sessions,
                    "p_best": p_best,
                    "regret": belief.sessions * (top - belief.mean),
                    "requests_last_hour": place.requests,
                    "share_last_hour": place.requests / everyone.requests if everyone.requests else None,
                    "signal_rate": place.rate,
                    "heard_apart": apart(place, everyone),
                    "cost": cost.costs.get(arm),
                    "moved_by": dict(place.moved_by.most_common()),
                }
                rows.append(row | {"why": _why(row, policy, len(found.arms))})
    return rows


def _reward(plan: RoutePlan, store: Store) -> str:
    """How the route's reward is made, in words."""
    if plan.reward.mode == "fixed":
        return "by fixed weights"
    model = calibration_of(store, plan.name)
    if model is None:
        return "by fixed weights, until there are votes enough to calibrate behaviour"
    gain = 1.0 - model.brier / model.baseline if model.baseline else 0.0
    return f"calibrated on {model.votes} votes (version {model.version}, explains {gain:.0%} of them)"


def _why(row: Mapping[str, Any], policy: Learned, arms: int) -> str:
    """In a sentence: why the arm has its share."""
    moved = ", ".join(f"{count} {kind}" for kind, count in row["moved_by"].items()) or "nothing in the last hour"
    if row["cost"] is not None:
        moved += f"; a session costs {row['cost']:.2g}"
    if row["heard_apart"]:
        moved += f"; beware: heard in {row['signal_rate']:.0%} of sessions, unlike the others, so means may mislead"
    if row["policy"] == "split":
        return f"its share is written in the config; moved by {moved}"
    if not row["sessions"]:
        return "nobody judged it yet, so it is expected to be like the others"
    if row["weight"] <= policy.floor + 1e-3:
        return f"probably not the best, it keeps the floor of {policy.floor:.0%}; moved by {moved}"
    standing = (
        "probably the best" if row["p_best"] > 0.95 else "may be the best" if row["p_best"] > 1 / arms else "behind"
    )
    return f"{standing} (P = {row['p_best']:.2f} after {row['sessions']:.0f} sessions); moved by {moved}"


def _place(
    heard: Mapping[tuple[str, str, str], Heard], route: str, segment: str, arm: str, listed: Sequence[str]
) -> Heard:
    """What was heard of an arm in `segment`; in "", of all segments that are not listed."""
    if segment:
        return heard.get((route, segment, arm), Heard())
    return together(one for (r, s, a), one in heard.items() if (r, a) == (route, arm) and (s == "" or s not in listed))


def _last_hour(journal: Journal, now: float) -> dict[tuple[str, str, str], Heard]:
    """By (route, segment, arm)."""
    heard: defaultdict[tuple[str, str, str], Heard] = defaultdict(Heard)
    answer: dict[str, tuple[Heard, tuple[str, str]]] = {}
    facts = [fact for _, fact in journal.recent(now - HOUR)]
    for fact in facts:
        if isinstance(fact, Interaction):
            place = heard[fact.route, fact.answerer.segment, fact.answerer.arm]
            session = (fact.tenant, fact.session)
            place.requests += 1
            place.sessions.add(session)
            answer |= {n: (place, session) for n in (*names_of(fact), fact.trace_id) if n}
    for fact in facts:
        if isinstance(fact, Signal):
            found = answer.get(fact.response_id or fact.trace_id or "")
            if found is not None:
                found[0].moved_by[fact.kind] += 1
                found[0].judged.add(found[1])
    return heard


def status(plans: list[RoutePlan], store: Store, journal: Journal, now: float) -> dict[str, Any]:
    """Is the house in order: who controls, how far it has read, how fresh each route's weights are."""
    lease = store.holder()
    last, read = journal.last(), store.marked("journal")
    routes = []
    for plan in plans:
        snapshot = store.snapshot(plan.name)
        routes.append(
            {
                "route": plan.name,
                "policy": plan.policy.kind,
                "arms": len(arms_of(snapshot, plan.arms)) if snapshot else len(plan.arms),
                "snapshot": snapshot.version if snapshot else None,
                "snapshot_age": now - snapshot.at if snapshot else None,
                "weights": snapshot.segments.get("", {}) if snapshot else None,
                "segments": len(snapshot.segments) - 1 if snapshot else 0,
                "segments_full": bool(snapshot and snapshot.full),
                "price": snapshot.price if snapshot else None,
                "reward": _reward(plan, store),
            }
        )
    return {
        "controller": {
            "owner": lease.owner if lease and lease.owner else None,
            "alive": bool(lease and lease.owner and lease.expires > now),
            "facts_waiting": max(0, last - read),
        },
        "journal": {"path": str(journal.path), "facts": last, **journal.counts()},
        "routes": routes,
    }
