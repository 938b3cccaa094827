"""What to do with a rollout, as it stands: go on, wait, pause, roll back or promote. Pure, and in one order always.

    unfit, a guardrail that rolls back, or the test says worse   → roll back, whatever step it is at
    a guardrail that pauses, the error budget spent              → pause
    the step has had its sessions and its time                   → the next one; after the last one promote

More than half of the sessions, and the promotion, need more than the absence of harm: the test must say that the
challenger is not worse than the margin. That is waited for, up to `patience`; then an operator is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from router.rollout import Rollout, Verb, Waits
from router.rollout_policy import HALF, Stage
from router.rollout_policy import Rollout as Policy
from router.trial import Standing, Watched


class Move(NamedTuple):
    """A step to take, and why."""

    verb: Verb
    why: str
    waits: Waits = ""


def decide(rollout: Rollout, standing: Standing, policy: Policy, now: float) -> Move | None:
    """The next step; None to go on as it is. `now`: Unix seconds."""
    if rollout.phase not in ("running", "paused"):
        return None
    if harm := _harm(standing):
        return Move("rollback", harm)
    spent = standing.budget_left is not None and standing.budget_left < 0.0
    if rollout.phase == "paused":
        if rollout.waits == "budget" and not spent:
            return Move("resume", "the error budget allows it again")
        return None
    if standing.doubt and standing.doubt_about not in rollout.excused:
        return Move("pause", standing.doubt, "operator")
    if tripped := [one for one in tripped_by(standing, "pause") if one.metric not in rollout.excused]:
        return Move("pause", _said(tripped[0]), "operator")
    if spent:
        return Move("pause", "the error budget is spent: nothing goes on before it allows it again", "budget")
    stage = rollout.stage(policy)
    if stage is None:
        return _finish(rollout, standing, policy, now)
    waiting = _waiting(stage, rollout, standing, now)
    if waiting is None:
        return _onward(rollout, standing, policy, now)
    if stage.kind == "pause":
        return Move("pause", waiting, "operator") if stage.pause is True else None
    return _impatient(waiting, rollout, policy, now)


def to_excuse(standing: Standing) -> tuple[str, ...]:
    """What an operator has seen who resumes now."""
    return (*(one.metric for one in tripped_by(standing, "pause")), *([standing.doubt_about] if standing.doubt else []))


def evidence(standing: Standing) -> dict[str, Any]:
    """What a decision was made on, as it goes on record."""
    found: dict[str, Any] = msgspec.to_builtins(standing)
    return {key: value for key, value in found.items() if key != "history"}


def tripped_by(standing: Standing, action: str) -> list[Watched]:
    return [one for one in standing.guardrails if one.tripped and one.action == action]


def _harm(standing: Standing) -> str:
    if standing.unfit:
        return standing.unfit
    if tripped := tripped_by(standing, "rollback"):
        return _said(tripped[0])
    if standing.verdict == "failed":
        return (
            f"users are worse off: the reward's difference is {_signed(standing.difference)} "
            f"[{_signed(standing.lower)}, {_signed(standing.upper)}]"
        )
    return ""


def _said(one: Watched) -> str:
    shown = [("–" if value is None else f"{value:.3g}") for value in (one.challenger, one.control)]
    return f"guardrail {one.metric} ({one.limit}): {shown[0]}, the control {shown[1]}"


def _waiting(stage: Stage, rollout: Rollout, standing: Standing, now: float) -> str | None:
    """What a step still waits for; None once it is over."""
    spent = now - rollout.step_began
    match stage.kind:
        case "pause":
            if stage.pause is True:
                return None if rollout.passed == rollout.step else "the step says to wait for an operator"
            return None if spent >= float(stage.pause or 0.0) else f"pauses for {stage.pause:g} s"
        case "analysis":
            if stage.analysis == "better":
                return None if standing.better else "not shown to be better yet"
            return None if standing.verdict == "successful" else "not shown to be no worse yet"
        case _:
            if standing.judged_in_step < stage.min_sessions:
                return f"{standing.judged_in_step} of {stage.min_sessions} sessions"
            return None if spent >= stage.min_time else f"{spent:.0f} of {stage.min_time:.0f} s"


def waiting_for(rollout: Rollout, standing: Standing | None, policy: Policy, now: float) -> str:
    """In words, for people."""
    stage = rollout.stage(policy)
    if rollout.phase == "pending":
        return {"begin": "approval to begin", "budget": "the error budget"}.get(rollout.waits, "the controller")
    if rollout.phase == "paused":
        return {"promote": "approval to promote", "budget": "the error budget"}.get(rollout.waits, "an operator")
    if rollout.phase != "running" or standing is None:
        return ""
    waiting = _waiting(stage, rollout, standing, now) if stage is not None else None
    if waiting is None:
        return "the test to say that it is not worse" if standing.verdict == "inconclusive" else ""
    return waiting


def _onward(rollout: Rollout, standing: Standing, policy: Policy, now: float) -> Move | None:
    """From a step that is over to the next."""
    if rollout.step + 1 >= len(policy.stages):
        return _finish(rollout, standing, policy, now)
    after = policy.stages[rollout.step + 1]
    if (after.share or 0.0) > HALF and standing.verdict != "successful":
        why = f"more than half of the sessions need proof that it is not worse than {policy.margin:g}"
        return _impatient(why, rollout, policy, now)
    return Move("advance", f"step {rollout.step + 2} of {len(policy.stages)}: {shown(after)}")


def _finish(rollout: Rollout, standing: Standing, policy: Policy, now: float) -> Move | None:
    if standing.verdict != "successful":
        return _impatient("a promotion needs proof that it is not worse", rollout, policy, now)
    if "promote" in policy.require_approval and "promote" not in rollout.approved:
        return Move("pause", "all steps are done; the promotion waits for approval", "promote")
    return Move("promote", f"all steps are done: {_signed(standing.difference)} at least {_signed(standing.lower)}")


def _impatient(waiting: str, rollout: Rollout, policy: Policy, now: float) -> Move | None:
    if now - max(rollout.step_began, rollout.resumed) < policy.patience:
        return None
    return Move("pause", f"inconclusive after {policy.patience / 86400.0:g} days: {waiting}", "operator")


def shown(stage: Stage) -> str:
    """A step as people write it."""
    match stage.kind:
        case "share":
            return f"share {stage.share:.0%}"
        case "shadow":
            return f"shadow {stage.shadow:.0%}"
        case "pause":
            return "pause" if stage.pause is True else f"pause {stage.pause:g} s"
        case _:
            return f"analysis {stage.analysis}"


def impact(standing: Standing) -> dict[str, Any]:
    """Before and after, with significance: what a promotion did for users (the control's sessions are the before)."""
    before, after = standing.control, standing.challenger
    return {
        "before": {"reward": before.reward, "satisfied": before.satisfied, "sessions": before.judged},
        "after": {"reward": after.reward, "satisfied": after.satisfied, "sessions": after.judged},
        "difference": standing.difference,
        "lower": standing.lower,
        "upper": standing.upper,
        "significant": standing.better,
    }


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"
