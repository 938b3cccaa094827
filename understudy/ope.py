"""`understudy ope`: what another policy would have earned in the sessions that the journal has.

    judged sessions since then → the other policy's probabilities in each → estimates (`router.ope`) → verdict

A `split` has its shares in every session. A policy that learns is replayed: its weights in a session are those that it
would have published at the session's start from the rewards that were known by then, floor and holdout included. So
no session's own reward takes part in its weights; but the rewards are those that the served policy's sessions
brought, not those that this one's would have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from sys import intern
from typing import Any

import msgspec
import numpy as np
from pydantic import Field, ValidationError

from router.arms import Cell, Sums
from router.bandit import Floats, bucket_of
from router.features import is_key_of
from router.ope import MIN_ESS, UNKNOWN, Estimate, Evaluation, evaluate, folds_of, predict
from router.plan import RoutePlan
from router.policy import Arm, Learned, Linear, Policy, Split, Written
from router.reward import TWO_SIDED, Heard, by_session, session_reward
from router.store import session_key
from router.weights import shares
from telemetry.events import Fact, Interaction, Signal
from telemetry.journal import Journal
from understudy.config_text import ConfigError, problems_of, read
from understudy.settings import Route

PAGE = 1000
EVIDENCE_HALF_LIVES = 4.0
"""How far before the window a replayed policy's evidence begins: what is older counts less than 1/16."""
REPLAYS = 1000
"""At most about so many times are a replayed policy's weights computed, evenly over the sessions."""
MOST_UNHEARD = 0.01
"""Largest share that the policy may give to arms that no judged session drew; nothing is known of them."""
EXAMPLE = "write one like\n\npolicy: {kind: split, shares: {champion: 0.5, challenger: 0.5}}\n"


class PolicyFile(Written):
    """The file that `--policy` names."""

    policy: Policy = Field(description="The policy to evaluate, as under a route.")


class Judged(msgspec.Struct, frozen=True, gc=False):
    """A session with a reward, as it was drawn first.

    Not the garbage collector's, which would look through a million of these again and again.
    """

    key: str
    at: float
    known: float
    """When the last signal about it counted."""
    arm: str
    propensity: float
    reward: float
    task_type: str
    tenant: str
    served_in: str
    """The segment that it was counted in, under the policy that was served."""

    def segment(self, policy: Policy) -> str:
        by = policy.segment_by if isinstance(policy, Learned) else None
        known = {"": "", "task_type": self.task_type, "tenant": self.tenant}
        return known.get(by or "", self.served_in)


def load_policy(path: Path, route: Route) -> Policy:
    """The policy written at `path`, or ConfigError with all that is wrong with it or with it on `route`."""
    try:
        document = read(path, {}, frozenset())
    except ConfigError as error:
        problems = [replace(one, hint=EXAMPLE) if "routes:" in one.hint else one for one in error.problems]
        raise ConfigError(path, problems) from None
    problems = list(document.problems)
    try:
        written = PolicyFile.model_validate(document.data)
        Route.model_validate(dict(route) | {"policy": written.policy})
    except ValidationError as error:
        problems += problems_of(error, document, PolicyFile.model_json_schema())
    if problems:
        raise ConfigError(path, problems)
    return written.policy


def examine(plan: RoutePlan, policy: Policy, journal: Journal, since: float, now: float) -> dict[str, Any]:
    """What `policy` would have earned on the route in the sessions that began since then (both Unix seconds).

    `estimates` and `gain` are None where they are refused. Raises ValueError where a logged propensity is none.
    """
    lookback = EVIDENCE_HALF_LIVES * policy.half_life if isinstance(policy, Learned) else 0.0
    evidence = sorted(judged(journal, plan, since - lookback, now), key=lambda one: (one.at, one.key))
    sessions = [one for one in evidence if one.at >= since]
    arms = list(dict.fromkeys([*plan.arms, *(one.arm for one in sessions)]))
    target = probabilities(policy, plan.arms, evidence, sessions, len(arms))
    drawn = np.array([arms.index(one.arm) for one in sessions], np.int64)
    rewards = np.array([one.reward for one in sessions])
    found = _evaluated(drawn, target, sessions) if sessions else None
    refused = _unlike(plan, policy, sessions) or _refusal(found, arms, drawn, target)
    if found is None:
        found = Evaluation(0, 0.0, 0.0, 0.0, 0.0, UNKNOWN, UNKNOWN, UNKNOWN)
    estimates = {"dr": found.dr, "switch_dr": found.switch_dr, "snips": found.snips, "ips": found.ips}
    return {
        "route": plan.name,
        "policy": policy.model_dump(mode="json"),
        "since": since,
        "sessions": found.sessions,
        "ess": found.ess,
        "largest_weight": found.largest_weight,
        "mean_weight": found.mean_weight,
        "logged": _shown(found.logged),
        "estimates": None if refused else {name: _shown(one) for name, one in estimates.items() if one},
        "gain": None if refused or not found.gain else _shown(found.gain),
        "arms": [
            {
                "arm": arm,
                "sessions": int((drawn == k).sum()),
                "mean": float(rewards[drawn == k].mean()) if (drawn == k).any() else None,
                "policy_share": float(target[:, k].mean()) if sessions else None,
            }
            for k, arm in enumerate(arms)
        ],
        "refused": refused,
        "verdict": refused or _verdict(found),
        "notes": [] if refused else _notes(found) + _left_out(plan, policy),
    }


def judged(journal: Journal, plan: RoutePlan, since: float, now: float) -> Iterator[Judged]:
    """Each session of the route that began since then and has a reward now: behaviour counts once it has waited."""
    seen: set[str] = set()
    for page in _pages(journal, since):
        requests = [i for i in page.values() if isinstance(i, Interaction) and i.route == plan.name]
        names = {(i.tenant, i.session): session_key(i.tenant, i.session) for i in requests}
        sessions = journal.sessions([key for key, name in names.items() if name not in seen], page)
        seen.update(names.values())
        signals = journal.heard_about(i for rows in sessions.values() for _, i in rows)
        for key, about in by_session(sessions, signals).items():
            here = [i for _, i in sessions[key] if i.route == plan.name]
            reward = session_reward(here, about, plan.reward, _ripe(about, now - plan.reward.window))
            if reward is not None and reward.at >= since:
                first = next(i for i in here if (i.at, i.answerer.arm) == (reward.at, reward.arm))
                if not 0.0 < first.answerer.propensity <= 1.0 + 1e-9:
                    raise ValueError(f"session {first.session}: a logged propensity of {first.answerer.propensity:g}")
                last = max(_heard(s) for _, s in about)
                waited = any(s.kind not in TWO_SIDED for _, s in about) * plan.reward.window
                yield Judged(
                    names[key], reward.at, max(last + waited, reward.at), intern(reward.arm), first.answerer.propensity,
                    reward.reward, intern(first.task_type or ""), intern(first.tenant),
                    intern(first.answerer.segment),
                )  # fmt: skip


def _ripe(signals: Sequence[Heard], until: float) -> int:
    """The sequence number up to which signals were there by `until`."""
    return max((seq for seq, signal in signals if _heard(signal) <= until), default=0)


def _heard(signal: Signal) -> float:
    return signal.received_at or signal.at


def _pages(journal: Journal, since: float) -> Iterator[dict[int, Fact]]:
    """The facts not older than `since`, newest page first; they come nearly in the order of their times."""
    end = journal.last()
    while end > 0:
        rows = [(seq, fact) for seq, fact in journal.read(max(0, end - PAGE), PAGE) if seq <= end]
        fresh = {seq: fact for seq, fact in rows if fact.at >= since}
        yield fresh
        if len(fresh) < len(rows) / 2:
            return
        end -= PAGE


def probabilities(
    policy: Policy, arms: Mapping[str, Arm], evidence: Sequence[Judged], sessions: Sequence[Judged], k: int
) -> Floats:
    """The policy's probabilities [n, k] in each of `sessions`, oldest first; arms beyond `arms` get none."""
    target = np.zeros((len(sessions), k))
    if isinstance(policy, Split):
        target[:, : len(arms)] = [policy.shares.get(arm, 0.0) for arm in arms]
        return np.asarray(target / target.sum(1, keepdims=True))
    cells: dict[Cell, Sums] = {}
    waiting = sorted(evidence, key=lambda one: one.known, reverse=True)
    step = max(1, len(sessions) // REPLAYS)
    for start in range(0, len(sessions), step):
        now = sessions[start].at
        while waiting and waiting[-1].known < now:
            one = waiting.pop()
            cell = Cell(one.segment(policy), one.arm, bucket_of(one.at))
            cells[cell] = cells.get(cell, Sums()).plus(Sums(1.0, one.reward, one.reward**2))
        weights = shares(policy, arms, cells, now)
        for place, session in enumerate(sessions[start : start + step], start):
            own = weights.get(session.segment(policy), weights[""])
            target[place, : len(arms)] = [own[arm] for arm in arms]
    target[:, : len(arms)] = (1.0 - policy.holdout) * target[:, : len(arms)] + policy.holdout / len(arms)
    return target


def _evaluated(drawn: np.ndarray[Any, np.dtype[np.int64]], target: Floats, sessions: Sequence[Judged]) -> Evaluation:
    rewards = [one.reward for one in sessions]
    segments = [one.task_type for one in sessions]
    model = predict(drawn, rewards, folds_of([one.key for one in sessions]), target.shape[1], segments)
    return evaluate(drawn, [one.propensity for one in sessions], rewards, target, model)


def _refusal(
    found: Evaluation | None, arms: Sequence[str], drawn: np.ndarray[Any, np.dtype[np.int64]], target: Floats
) -> str | None:
    """Why nothing can be said; None where something can."""
    if found is None:
        return "No session of that time has a reward, so there is nothing to say."
    for k, arm in enumerate(arms):
        share = float(target[:, k].mean())
        if share > MOST_UNHEARD and not (drawn == k).any():
            return f"No judged session drew {arm}, to which this policy gives {share:.1%}: what it earns is unknown."
    if not found.enough:
        return (
            f"Too few comparable sessions to say: {found.sessions:,} judged sessions are worth {found.ess:.0f} of this "
            f"policy's own, and {MIN_ESS:.0f} are needed."
        )
    return None


def _unlike(plan: RoutePlan, policy: Policy, sessions: Sequence[Judged]) -> str | None:
    """Why the policy cannot be replayed: what requests are like is known only of sessions that were routed by it."""
    by_prompt = isinstance(policy, Learned) and policy.segment_by == "prompt"
    if by_prompt and not (isinstance(plan.policy, Learned) and plan.policy.segment_by == "prompt"):
        return (
            "the route is not served by clusters of prompts, so it is not journaled in which a session began; "
            "serve with segment_by: prompt first, or evaluate another policy."
        )
    if not isinstance(policy, Linear):
        return None
    known = sum(is_key_of(one.served_in, policy.features) for one in sessions)
    if known == len(sessions):
        return None
    return (
        f"{len(sessions) - known:,} of {len(sessions):,} judged sessions were not routed by these features, so what "
        "kind of request they began with is not journaled; serve `linear` first, or evaluate another policy."
    )


def _left_out(plan: RoutePlan, policy: Policy) -> list[str]:
    """What the route weighs and a replay does not."""
    if not isinstance(policy, Learned):
        return []
    parts = {
        "prices": plan.reward.cost,
        "latency": plan.reward.latency,
        "calibration": plan.reward.mode == "calibrated",
    }
    named = [name for name, there in parts.items() if there]
    return [f"The replay left out the route's {' and '.join(named)}: shares may differ from served ones."] * bool(named)


def _verdict(found: Evaluation) -> str:
    assert found.gain is not None
    low, high = found.gain.interval
    told = f"{found.gain.value:+.3f} a session, 95 % interval [{low:+.3f}, {high:+.3f}]"
    if low > 0.0:
        return f"This policy would have earned more than what was served: {told}."
    if high < 0.0:
        return f"This policy would have earned less than what was served: {told}."
    return f"No difference from what was served can be told: {told}."


def _notes(found: Evaluation) -> list[str]:
    if not (found.sessions > 1 and found.suspect):
        return []
    return [
        f"The weights average {found.mean_weight:.2f} instead of 1: an arm could not be drawn all the time, or "
        "is judged more often than another. Trust DR more than SNIPS, and IPS not at all."
    ]


def _shown(estimate: Estimate) -> dict[str, Any] | None:
    return asdict(estimate) if np.isfinite(estimate.se) else None
