"""A rollout's table: what may be asked in which phase, where it leads, and what is decided at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from router.analysis import Move, decide, impact, to_excuse, waiting_for
from router.rollout import (
    ASKED,
    CONTROL,
    ENDED,
    KEPT,
    TABLE,
    Phase,
    Refused,
    Rollout,
    Verb,
    approve,
    begin,
    digest,
    rearranged,
    resume,
    start,
    told,
    turn,
)
from router.rollout_policy import Rollout as Policy
from router.rollout_policy import Stage
from router.trial import Side, Standing, Watched

NOW = 1_800_000_000.0
V1 = "r-v1-00000000"
STAGES = (Stage(shadow=0.1, min_time=60), Stage(share=0.05), Stage(share=0.2), Stage(share=0.5), Stage(share=1.0))
POLICY = Policy(stages=STAGES)
NONE = Side(sessions=0, judged=0, reward=None, satisfied=None, errors=0, flagged=0, reacted=0)


def policy(*stages: Any, **fields: Any) -> Policy:
    return Policy.model_validate({"stages": list(stages)} | fields)


def at(phase: Phase = "running", step: int = 1, own: Policy = POLICY, **fields: Any) -> Rollout:
    shares = [stage.share for stage in own.stages[: step + 1] if stage.share]
    known: dict[str, Any] = {"share": shares[-1] if shares else 0.0, "step_began": NOW - 7200, "began": NOW - 9000}
    return Rollout(
        id="r-r1-1", route="r", number=1, challenger=V1, control="a", phase=phase, step=step, **(known | fields)
    )


def standing(**fields: Any) -> Standing:
    known: dict[str, Any] = {
        "at": NOW, "verdict": "inconclusive", "difference": 0.01, "lower": -0.1, "upper": 0.12, "better": False,
        "challenger": NONE, "control": NONE, "judged_in_step": 1000, "guardrails": (),
    }  # fmt: skip
    return Standing(**(known | fields))


def tripped(metric: str = "error_rate", action: str = "rollback") -> Watched:
    return Watched(metric=metric, action=action, limit="x", challenger=0.2, control=0.01, evidence=1.0, tripped=True)


SUCCESS = {"verdict": "successful", "lower": -0.01, "upper": 0.1}


# The table.


@pytest.mark.parametrize("verb", get_args(Verb))
@pytest.mark.parametrize("phase", get_args(Phase))
def test_a_verb_leads_where_the_table_says_or_is_refused_with_what_can_be_done(phase: Phase, verb: Verb) -> None:
    before = at(phase)
    if (phase, verb) in TABLE:
        after = turn(before, verb, "ann", "so", NOW, POLICY)
        assert after.phase == TABLE[phase, verb]
        assert [d.verb for d in after.decisions] == [verb]
        assert (after.ended == NOW) == (after.phase in ENDED)
        return
    with pytest.raises(Refused) as refused:
        turn(before, verb, "ann", "so", NOW, POLICY)
    message = str(refused.value)
    assert f"is {phase.replace('_', ' ')}: {verb} is not possible" in message
    offered = [other for other in ASKED if (phase, other) in TABLE]
    assert all(other in message.partition("possible, ")[2] for other in offered)
    assert offered or "ended" in message


def test_what_the_table_offers_people_is_all_that_a_message_offers() -> None:
    with pytest.raises(Refused, match=r"possible, but pause, promote, rollback$"):
        turn(at("running"), "resume", "ann", "", NOW, POLICY)


@pytest.mark.parametrize("phase", get_args(Phase))
def test_every_phase_leads_to_an_end(phase: Phase) -> None:
    reached, edge = {phase}, {phase}
    while edge:
        edge = {to for (start, _), to in TABLE.items() if start in edge} - reached
        reached |= edge
    assert reached & set(ENDED)


def test_a_rollout_begins_starts_and_advances() -> None:
    rollout = begin(None, "r", V1, "learner", "passed", NOW)
    assert (rollout.phase, rollout.number, rollout.cap(POLICY), rollout.shadow(POLICY)) == ("pending", 1, 0.0, 0.0)
    rollout = start(rollout, "a", 0.6, POLICY, NOW + 1)
    assert (rollout.phase, rollout.step, rollout.control, rollout.baseline) == ("running", 0, "a", 0.6)
    assert (rollout.cap(POLICY), rollout.shadow(POLICY)) == (0.0, 0.1)
    for step, cap in enumerate([0.05, 0.2, 0.5, 1.0 - CONTROL], 1):
        rollout = turn(rollout, "advance", "controller", "", NOW + 1 + step, POLICY)
        assert (rollout.step, rollout.cap(POLICY), rollout.shadow(POLICY)) == (step, cap, 0.0)
        assert rollout.step_began == NOW + 1 + step
    assert [d.number for d in rollout.decisions] == [1, 2, 3, 4, 5, 6]
    assert len({d.event_id for d in rollout.decisions}) == 6
    assert {d.policy for d in rollout.decisions[1:]} == {digest(POLICY)}


@pytest.mark.parametrize("phase", ["pending", "promoted", "rolling_back", "rolled_back", "undoing", "undone"])
def test_a_rollout_that_does_not_draw_gives_no_share(phase: Phase) -> None:
    assert at(phase, 3).cap(POLICY) == 0.0


def test_paused_in_canary_it_keeps_its_share_and_copies_nothing() -> None:
    assert at("paused", 2).cap(POLICY) == 0.2
    assert at("paused", 0).shadow(POLICY) == 0.0


def test_one_at_a_time_and_the_next_one_keeps_what_was_not_on_record() -> None:
    first = begin(None, "r", V1, "learner", "", NOW)
    with pytest.raises(Refused, match="one at a time"):
        begin(first, "r", "r-v2-00000000", "learner", "", NOW)
    over = turn(turn(first, "rollback", "ann", "no", NOW, POLICY), "rolled_back", "controller", "no", NOW, POLICY)
    second = begin(over, "r", "r-v2-00000000", "learner", "", NOW)
    assert (second.number, second.before) == (2, over.decisions)
    assert second.decisions[0].number == 1
    assert second.id != first.id


def test_decisions_are_numbered_on_beyond_those_that_are_kept() -> None:
    rollout = at("running")
    for _ in range(KEPT):
        rollout = turn(turn(rollout, "pause", "ann", "", NOW, POLICY), "resume", "ann", "", NOW, POLICY)
    assert len(rollout.decisions) == KEPT
    assert rollout.decisions[-1].number == 2 * KEPT


def test_an_approval_and_a_note_are_decisions_too() -> None:
    rollout = approve(at("pending", 0), "begin", "ann", "go", NOW)
    rollout = told(rollout, "undo", "bob", "bad", NOW, {})
    assert [(d.verb, d.actor) for d in rollout.decisions] == [("approve", "ann"), ("undo", "bob")]
    assert (rollout.approved, rollout.phase) == (("begin",), "pending")


# Steps.


def test_a_step_waits_for_its_sessions_and_for_its_time() -> None:
    few = standing(judged_in_step=199)
    assert decide(at(), few, POLICY, NOW) is None
    assert waiting_for(at(), few, POLICY, NOW) == "199 of 200 sessions"
    soon = at(step_began=NOW - 3599)
    assert decide(soon, standing(judged_in_step=200), POLICY, NOW) is None
    assert "3600 s" in waiting_for(soon, standing(), POLICY, NOW)
    move = decide(at(step_began=NOW - 3600), standing(judged_in_step=200), POLICY, NOW)
    assert move is not None
    assert (move.verb, "share 20%" in move.why) == ("advance", True)


def test_after_the_clock_was_set_back_a_step_waits() -> None:
    assert decide(at(step_began=NOW + 1e6), standing(), POLICY, NOW) is None


def test_more_than_half_of_the_sessions_and_the_promotion_take_proof() -> None:
    assert decide(at(step=3), standing(), POLICY, NOW) is None
    assert decide(at(step=3), standing(**SUCCESS), POLICY, NOW) == Move("advance", "step 5 of 5: share 100%")
    assert decide(at(step=4), standing(), POLICY, NOW) is None
    move = decide(at(step=4), standing(**SUCCESS), POLICY, NOW)
    assert move is not None
    assert move.verb == "promote"


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("phase", ["running", "paused"])
@pytest.mark.parametrize(
    "harm",
    [
        {"verdict": "failed", "lower": -0.2, "upper": -0.01},
        {"unfit": "it was quarantined"},
        {"guardrails": (tripped(),)},
    ],
)
def test_harm_rolls_back_from_every_step_even_while_paused(phase: Phase, step: int, harm: dict[str, Any]) -> None:
    move = decide(at(phase, step), standing(judged_in_step=0, **harm), POLICY, NOW)
    assert move is not None
    assert move.verb == "rollback"


def test_harm_comes_before_everything_else() -> None:
    bad = standing(guardrails=(tripped(), tripped("signal_rate", "pause")), doubt="erased", budget_left=-1.0, **SUCCESS)
    move = decide(at(step=4), bad, POLICY, NOW)
    assert move is not None
    assert (move.verb, "error_rate" in move.why) == ("rollback", True)


def test_a_guardrail_that_pauses_is_excused_by_whoever_resumes() -> None:
    bad = standing(
        judged_in_step=0, guardrails=(tripped("signal_rate", "pause"),), doubt="data was erased", doubt_about="erased"
    )
    move = decide(at(), bad, POLICY, NOW)
    assert move is not None
    assert (move.verb, move.waits) == ("pause", "operator")
    paused = turn(at(), "pause", "controller", move.why, NOW, POLICY, {}, move.waits)
    assert decide(paused, bad, POLICY, NOW + 1e7) is None
    resumed = resume(paused, to_excuse(bad), "ann", "fine", NOW, POLICY)
    assert resumed.excused == ("erased", "signal_rate")
    assert decide(resumed, bad, POLICY, NOW) is None
    another = standing(judged_in_step=0, guardrails=(tripped("sample_ratio", "pause"),))
    assert decide(resumed, another, POLICY, NOW) is not None


def test_what_only_warns_changes_nothing() -> None:
    assert decide(at(), standing(judged_in_step=0, guardrails=(tripped("flag_rate", "warn"),)), POLICY, NOW) is None


def test_a_spent_budget_holds_everything_until_it_allows_it_again() -> None:
    move = decide(at(step=4), standing(budget_left=-0.1, **SUCCESS), POLICY, NOW)
    assert move is not None
    assert (move.verb, move.waits) == ("pause", "budget")
    paused = turn(at(step=4), "pause", "controller", "", NOW, POLICY, {}, "budget")
    assert decide(paused, standing(budget_left=-0.1), POLICY, NOW) is None
    back = decide(paused, standing(budget_left=0.0), POLICY, NOW)
    assert back is not None
    assert back.verb == "resume"
    held = turn(paused, "pause", "ann", "I look", NOW, POLICY, {}, "operator")
    assert decide(held, standing(budget_left=1.0), POLICY, NOW) is None, "an operator's pause is not the budget's"


def test_a_pause_of_some_time_ends_by_itself_and_one_without_ends_when_somebody_says_so() -> None:
    timed = policy({"share": 0.05}, {"pause": "1h"}, {"share": 0.2})
    assert decide(at(own=timed, step_began=NOW - 3599), standing(), timed, NOW) is None
    move = decide(at(own=timed, step_began=NOW - 3600), standing(), timed, NOW)
    assert move is not None
    assert move.verb == "advance"
    endless = policy({"share": 0.05}, {"pause": True}, {"share": 0.2})
    move = decide(at(own=endless), standing(), endless, NOW)
    assert move == Move("pause", "the step says to wait for an operator", "operator")
    paused = turn(at(own=endless), "pause", "controller", "", NOW, endless, {}, "operator")
    assert decide(paused, standing(), endless, NOW + 1e6) is None
    move = decide(resume(paused, (), "ann", "on", NOW, endless), standing(), endless, NOW)
    assert move is not None
    assert move.verb == "advance"


def test_the_budgets_return_ends_no_pause_that_waits_for_an_operator() -> None:
    endless = policy({"share": 0.05}, {"pause": True}, {"share": 0.2})
    paused = turn(at(own=endless), "pause", "controller", "", NOW, endless, {}, "budget")
    again = turn(paused, "resume", "controller", "", NOW, endless)
    move = decide(again, standing(), endless, NOW)
    assert move is not None
    assert (move.verb, move.waits) == ("pause", "operator")


def test_resuming_a_pause_gives_no_more_than_half_without_proof() -> None:
    last = policy({"share": 0.5}, {"pause": True}, {"share": 1.0})
    paused = turn(at(own=last), "pause", "controller", "", NOW, last, {}, "operator")
    resumed = resume(paused, (), "ann", "on", NOW, last)
    assert decide(resumed, standing(), last, NOW) is None
    move = decide(resumed, standing(**SUCCESS), last, NOW)
    assert move is not None
    assert move.verb == "advance"


@pytest.mark.parametrize(
    ("analysis", "found", "goes_on"),
    [
        ("not_worse", {}, False),
        ("not_worse", SUCCESS, True),
        ("better", SUCCESS, False),
        ("better", SUCCESS | {"better": True, "lower": 0.01}, True),
    ],
)
def test_an_analysis_waits_for_its_verdict(analysis: str, found: dict[str, Any], goes_on: bool) -> None:
    own = policy({"share": 0.2}, {"analysis": analysis}, {"share": 0.5})
    assert (decide(at(own=own), standing(**found), own, NOW) is not None) == goes_on


@pytest.mark.parametrize(
    "stuck",
    [
        lambda late: (at(step=1, step_began=late), standing(judged_in_step=3)),
        lambda late: (at(step=3, step_began=late), standing()),
        lambda late: (at(step=4, step_began=late), standing()),
    ],
)
def test_patience_ends_and_an_operator_who_resumes_renews_it(stuck: Callable[[float], Any]) -> None:
    rollout, seen = stuck(NOW - POLICY.patience)
    move = decide(rollout, seen, POLICY, NOW)
    assert move is not None
    assert (move.verb, move.waits, move.why[:12]) == ("pause", "operator", "inconclusive")
    assert decide(stuck(NOW - POLICY.patience + 1)[0], seen, POLICY, NOW) is None
    paused = turn(rollout, "pause", "controller", "", NOW, POLICY, {}, "operator")
    resumed = resume(paused, (), "ann", "wait", NOW, POLICY)
    assert decide(resumed, seen, POLICY, NOW + POLICY.patience - 1) is None
    assert decide(resumed, seen, POLICY, NOW + POLICY.patience) is not None


def test_a_promotion_that_needs_approval_waits_for_it() -> None:
    own = policy({"share": 0.5}, require_approval=["promote"])
    move = decide(at(step=0, own=own), standing(**SUCCESS), own, NOW)
    assert move is not None
    assert (move.verb, move.waits) == ("pause", "promote")
    paused = turn(at(step=0, own=own), "pause", "controller", "", NOW, own, {}, "promote")
    assert decide(paused, standing(**SUCCESS), own, NOW) is None
    assert turn(paused, "promote", "ann", "", NOW, own).phase == "promoting"


def test_an_impact_says_what_it_was_before_and_after() -> None:
    before, after = replace(NONE, judged=10, reward=0.5), replace(NONE, judged=20, reward=0.7)
    told_ = impact(standing(control=before, challenger=after, better=True))
    assert (told_["before"]["reward"], told_["after"]["reward"], told_["significant"]) == (0.5, 0.7, True)


# The operator changes the steps while they are taken.


@pytest.mark.parametrize(
    ("old", "step", "new", "place", "cap"),
    [
        ([0.05, 0.2, 0.5], 1, [0.2, 0.5], 0, 0.2),  # a step before was taken away: not the 0.5 that stands there now
        ([0.2, 0.5], 0, [0.05, 0.1, 0.2, 0.5], 2, 0.2),
        ([0.05, 0.2], 1, [0.05, 0.1], 1, 0.1),  # lowered
        ([0.05, 0.2], 1, [0.05, 0.3, 0.5], 0, 0.05),  # raised: it has its sessions in the step before first
        ([0.05, 0.2, 0.5, 1.0], 3, [0.05], 0, 0.05),
        ([0.05], 0, [0.1, 0.5], 0, 0.1),
    ],
)
def test_a_rollout_keeps_its_place_among_changed_steps(
    old: list[float], step: int, new: list[float], place: int, cap: float
) -> None:
    one, two = policy(*({"share": s} for s in old)), policy(*({"share": s} for s in new))
    rollout = at(step=step, own=one)
    assert rollout.cap(two) <= old[step]
    found = rearranged(rollout, two, NOW)
    assert found is not None
    assert (found.step, found.cap(two), found.step_began, found.policy) == (place, cap, NOW, digest(two))
    assert rearranged(found, two, NOW) is None


def test_other_changes_of_the_policy_leave_it_at_its_step() -> None:
    assert rearranged(at(step=2), Policy(stages=STAGES, alpha=0.01), NOW) is None
    assert rearranged(at(step=0), policy({"shadow": 0.5}, {"share": 0.5}), NOW) is None
