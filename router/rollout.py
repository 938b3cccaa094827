"""A rollout as a table: where it stands, what may be asked of it, and where that leads. Pure.

    pending ── start ──▶ running ◀── resume ── paused
                          │ │ ▲ └──── pause ─────▲
                          │ └─┘ advance
                promote ──┤         (also from paused)
                          ▼
                      promoting ── promoted ──▶ promoted ── undo ──▶ undoing ── undone ──▶ undone
    rollback, from pending, running and paused ──▶ rolling_back ── rolled_back ──▶ rolled_back

The vocabulary is Argo Rollouts' (steps; an analysis that is successful goes on, failed rolls back, inconclusive
pauses). What is decided takes effect with the first write (`rolling_back` has no share any more); promoting, undoing
and rolling_back are for what must follow elsewhere, the registry's aliases, and are gone through again by whoever
finds them. One document a route, changed by compare-and-set, so no two writers can both take a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from router.rollout_policy import HALF, Stage
from router.rollout_policy import Rollout as Policy
from telemetry.errors import UnderstudyError
from telemetry.events import Decision

Phase = Literal[
    "pending", "running", "paused", "promoting", "promoted", "rolling_back", "rolled_back", "undoing", "undone"
]
Verb = Literal[
    "start", "advance", "pause", "resume", "promote", "promoted", "rollback", "rolled_back", "undo", "undone"
]
Alias = Literal["champion", "challenger", "previous"]
"""Parts that versions play, in the registry."""
Waits = Literal["", "operator", "begin", "promote", "budget"]

TABLE: dict[tuple[Phase, Verb], Phase] = {
    ("pending", "start"): "running",
    ("running", "advance"): "running",
    ("running", "pause"): "paused",
    ("paused", "pause"): "paused",
    ("paused", "resume"): "running",
    ("running", "promote"): "promoting",
    ("paused", "promote"): "promoting",
    ("promoting", "promoted"): "promoted",
    ("promoted", "undo"): "undoing",
    ("undoing", "undone"): "undone",
    ("pending", "rollback"): "rolling_back",
    ("running", "rollback"): "rolling_back",
    ("paused", "rollback"): "rolling_back",
    ("rolling_back", "rolled_back"): "rolled_back",
}
ENDED: tuple[Phase, ...] = ("promoted", "rolled_back", "undone")
ASKED: tuple[Verb, ...] = ("pause", "resume", "promote", "rollback", "undo")
"""What people may ask; the rest is the controller's."""
KEPT = 50
"""Decisions that the document remembers; all of them are in the journal."""
KEPT_BEFORE = 8
CONTROL = 0.02
"""Share of sessions that the control keeps at least, as long as the challenger is not promoted: without it nothing
could be said of the challenger any more."""
CONTROLLER = "controller"
DOUBTS = ("erased", "shadow")
"""What an operator may excuse beside guardrails."""


class Refused(UnderstudyError):
    """What was asked cannot be done now; the message says why, and what can."""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """Where a route's rollout stands."""

    id: str
    """Never given twice, not even after the store was emptied."""
    route: str
    number: int
    challenger: str
    """The version that may take over."""
    control: str = ""
    """The champion's arm when it started."""
    phase: Phase = "pending"
    step: int = 0
    step_began: float = 0.0
    share: float = 0.0
    """What its steps gave it so far. If the policy's steps are changed it has no more than that before the next one."""
    passed: int = -1
    """The step `pause: true` that an operator ended."""
    began: float = 0.0
    resumed: float = 0.0
    """When somebody last said to go on; patience counts from then."""
    ended: float = 0.0
    baseline: float = 0.5
    """What scores are taken from: the champion's mean reward when it started (`router.stats`)."""
    why: str = ""
    at_fault: bool = True
    """Whether the challenger is why it is rolled back; it may be rolled out again where something else is."""
    waits: Waits = ""
    """What a pending or paused one waits for."""
    approved: tuple[str, ...] = ()
    """What somebody agreed to: `begin`, `promote`."""
    excused: tuple[str, ...] = ()
    """Guardrails that tripped and were looked at: whoever resumed goes on in spite of them."""
    policy: str = ""
    """Digest of the policy that it was last moved by."""
    decisions: tuple[Decision, ...] = ()
    """The last ones, oldest first."""
    before: tuple[Decision, ...] = ()
    """The last ones of the route's rollout before, for a controller that had not put them on record yet."""

    @property
    def active(self) -> bool:
        return self.phase not in ENDED

    @property
    def draws(self) -> bool:
        """Whether the challenger may have sessions."""
        return self.phase in ("running", "paused", "promoting")

    def stage(self, policy: Policy) -> Stage | None:
        """The step it is at; None after the last one (or if the policy has fewer by now)."""
        return policy.stages[self.step] if self.step < len(policy.stages) else None

    def cap(self, policy: Policy) -> float:
        """The most that the challenger may get of sessions: what the last step up to here gave it."""
        return min(self.share, given(policy, self.step), 1.0 - CONTROL) if self.draws else 0.0

    def shadow(self, policy: Policy) -> float:
        """The share of requests that are copied."""
        stage = self.stage(policy)
        return stage.shadow or 0.0 if self.phase == "running" and stage is not None else 0.0


def given(policy: Policy, step: int) -> float:
    """What the steps up to this one give the challenger."""
    shares = [stage.share for stage in policy.stages[: step + 1] if stage.share is not None]
    return shares[-1] if shares else 0.0


def digest(policy: Policy) -> str:
    return hashlib.sha256(policy.model_dump_json().encode()).hexdigest()[:12]


def begin(last: Rollout | None, route: str, challenger: str, actor: str, why: str, now: float) -> Rollout:
    """The route's next rollout. Raises Refused while one is active."""
    if last is not None and last.active:
        raise Refused(
            f"route {route} rolls {last.challenger} out already ({last.phase}); one at a time: wait for its end, or "
            "`understudy rollout abort`"
        )
    number = last.number + 1 if last is not None else 1
    name = f"{route}-r{number}-{int(now):x}"
    fresh = Rollout(
        id=name,
        route=route,
        number=number,
        challenger=challenger,
        began=now,
        step_began=now,
        why=why,
        before=last.decisions[-KEPT_BEFORE:] if last is not None else (),
    )
    return told(fresh, "begin", actor, why, now, {})


def start(rollout: Rollout, control: str, baseline: float, policy: Policy, now: float) -> Rollout:
    """From pending to its first step, against the champion of now."""
    known = replace(rollout, control=control, baseline=baseline, began=now)
    return turn(known, "start", CONTROLLER, f"step 1 of {len(policy.stages)}", now, policy)


def turn(
    rollout: Rollout,
    verb: Verb,
    actor: str,
    why: str,
    now: float,
    policy: Policy,
    evidence: Mapping[str, Any] | None = None,
    waits: Waits = "",
) -> Rollout:
    """The rollout after `verb`. Raises Refused where the table has no such way."""
    phase = TABLE.get((rollout.phase, verb))
    if phase is None:
        raise Refused(
            f"rollout {rollout.id} is {rollout.phase.replace('_', ' ')}: {verb} is not possible, {_can(rollout)}"
        )
    after = replace(rollout, phase=phase, why=why, waits=waits, policy=digest(policy))
    left = rollout.stage(policy)
    if verb == "advance" and left is not None and left.kind == "shadow":
        after = replace(after, excused=tuple(one for one in after.excused if one in DOUBTS))  # users are another matter
    if verb in ("start", "advance"):
        step = rollout.step + (verb == "advance")
        after = replace(after, step=step, step_began=now, share=given(policy, step))
    if phase in ENDED:
        after = replace(after, ended=now)
    return told(after, verb, actor, why, now, evidence or {})


def resume(rollout: Rollout, tripped: tuple[str, ...], actor: str, why: str, now: float, policy: Policy) -> Rollout:
    """An operator says to go on: a step `pause: true` is over, and guardrails that tripped are excused from here on."""
    after = turn(rollout, "resume", actor, why, now, policy)
    excused = tuple(sorted({*after.excused, *tripped}))
    return replace(after, resumed=now, passed=after.step, excused=excused)


def approve(rollout: Rollout, what: Literal["begin", "promote"], actor: str, why: str, now: float) -> Rollout:
    """Somebody agrees to what waits for it."""
    agreed = replace(rollout, approved=tuple(sorted({*rollout.approved, what})), waits="", why=why)
    return told(agreed, "approve", actor, why, now, {"approved": what})


def rearranged(rollout: Rollout, policy: Policy, now: float) -> Rollout | None:
    """At its place among the steps, if they were changed; else None. That is the step that gives what it has had, or
    next less; or the first one."""
    if given(policy, rollout.step) == rollout.share or rollout.policy == digest(policy):
        return None
    gives = [given(policy, step) for step in range(len(policy.stages))]
    step = gives.index(max((share for share in gives if share <= rollout.share), default=gives[0]))
    why = f"the steps were changed: now at step {step + 1} of {len(policy.stages)}"
    after = replace(
        rollout,
        step=step,
        step_began=now,
        share=min(given(policy, step), max(rollout.share, HALF)),
        passed=-1,
        why=why,
        policy=digest(policy),
    )
    return told(after, "advance", CONTROLLER, why, now, {})


def told(rollout: Rollout, verb: str, actor: str, why: str, now: float, evidence: Mapping[str, Any]) -> Rollout:
    """With one more decision, which leaves it in its phase."""
    number = rollout.decisions[-1].number + 1 if rollout.decisions else 1
    decision = Decision(
        event_id=f"{rollout.id}/{number}",
        at=now,
        route=rollout.route,
        rollout=rollout.id,
        number=number,
        verb=verb,
        actor=actor,
        why=why,
        phase=rollout.phase,
        step=rollout.step,
        challenger=rollout.challenger,
        control=rollout.control,
        policy=rollout.policy,
        evidence=dict(evidence),
    )
    return replace(rollout, decisions=(*rollout.decisions, decision)[-KEPT:])


def _can(rollout: Rollout) -> str:
    """What can be asked of it."""
    if verbs := [verb for verb in ASKED if (rollout.phase, verb) in TABLE]:
        return f"but {', '.join(verbs)}"
    return "and in a moment it will have ended" if rollout.active else "it has ended"
