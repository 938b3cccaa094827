"""What `status` and `arms` show: read from the store and the journal, as plain data that the CLI prints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from router.bandit import best_of, discounted, posteriors
from router.controller import RoutePlan, initial_snapshot
from router.policy import Thompson
from router.store import Store
from telemetry.events import Interaction, Signal
from telemetry.journal import Journal

HOUR = 3600.0


def arms(plans: list[RoutePlan], store: Store, journal: Journal, now: float) -> list[dict[str, Any]]:
    """A row for each arm: its weight now, what it served in the last hour, and what is believed of it.

    `mean` and `interval` (95 %) are of the session reward in [0, 1]; `sessions` is the discounted evidence.
    """
    served, moved = _last_hour(journal, now)
    rows = []
    for plan in plans:
        snapshot = store.snapshot(plan.name) or initial_snapshot(plan, now)
        names = list(plan.arms)
        policy = plan.policy if isinstance(plan.policy, Thompson) else Thompson(kind="thompson")
        sums = discounted(store.sums(plan.name), "", now, policy.half_life)
        beliefs = posteriors(names, sums, policy.prior.mean, policy.prior.mass)
        best = best_of([beliefs[name] for name in names])
        total = sum(served[plan.name, name] for name in names)
        for name, p_best in zip(names, best.tolist(), strict=True):
            belief = beliefs[name]
            rows.append(
                {
                    "route": plan.name,
                    "arm": name,
                    "model": plan.arms[name].model,
                    "policy": plan.policy.kind,
                    "weight": snapshot.segments.get("", {}).get(name, 0.0),
                    "mean": belief.mean,
                    "interval": list(belief.interval()),
                    "sessions": belief.sessions,
                    "p_best": p_best,
                    "requests_last_hour": served[plan.name, name],
                    "share_last_hour": served[plan.name, name] / total if total else None,
                    "moved_by": dict(moved[plan.name, name].most_common()),
                }
            )
    return rows


def _last_hour(journal: Journal, now: float) -> tuple[Counter[tuple[str, str]], Mapping[tuple[str, str], Counter[str]]]:
    """Requests, and signals by kind, of each (route, arm)."""
    served: Counter[tuple[str, str]] = Counter()
    moved: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    arm_of: dict[str, tuple[str, str]] = {}
    facts = [fact for _, fact in journal.recent(now - HOUR)]
    for fact in facts:
        if isinstance(fact, Interaction):
            place = (fact.route, fact.answerer.arm)
            served[place] += 1
            arm_of |= {name: place for name in (fact.request_id, fact.response_id, fact.trace_id) if name}
    for fact in facts:
        if isinstance(fact, Signal):
            found = arm_of.get(fact.response_id or fact.trace_id or "")
            if found is not None:
                moved[found][fact.kind] += 1
    return served, moved


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
                "arms": len(plan.arms),
                "snapshot": snapshot.version if snapshot else None,
                "snapshot_age": now - snapshot.at if snapshot else None,
                "weights": snapshot.segments.get("", {}) if snapshot else None,
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
