"""From what a session's users did to one number in [0, 1], or to none. Pure.

Each answer's evidence is the sum of weight x score over the kinds of signal that it got, cut to [-1, 1]; a
session's reward is 0.5 + 0.5 x the mean over the answers that have evidence. An answer nobody reacted to is not
a zero: it is not counted at all. The session's reward belongs to the arm that it was assigned first (as in an
experiment that is analysed by intention to treat), even if an operator pinned another one later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.arms import Cell, Sums
from router.bandit import bucket_of
from telemetry.events import Interaction, Signal


@dataclass(frozen=True, slots=True)
class SessionReward:
    arm: str
    at: float
    """When the session began."""
    reward: float
    answers: int
    """How many answers had evidence."""
    moved_by: Mapping[str, int]
    """How many signals of each kind counted."""
    segment: str = ""

    def contribution(self) -> dict[Cell, Sums]:
        r = self.reward
        return {Cell(self.segment, self.arm, bucket_of(self.at)): Sums(1.0, r, r * r)}


def score(signal: Signal) -> float | None:
    """A signal on the scale from -1 (bad) to 1 (good) before its kind's weight; None if it says neither.

    Votes are two-sided: their value decides. A behaviour either happened (1) or is not reported; whether it is
    good or bad is the sign of the weight that the operator gave it.
    """
    match signal.kind:
        case "thumb":
            return 1.0 if signal.value else -1.0
        case "rating":
            return None if signal.value is None else (signal.value - 3.0) / 2.0
        case "comparison" | "comment" | "survey" | "outcome" | "dwell" | "first_action":
            return None
        case _:
            return 1.0


def counted(signals: Iterable[Signal], answer_of: Mapping[str, str]) -> list[tuple[str, Signal]]:
    """Of signals in order of arrival, those that count, each with the answer (or "session") that it is about.

    The last one of each event id and, of those, of each (answer, kind, name, subject) counts. `answer_of`: an
    answer by any of its names; a signal about one that is not there does not count.
    """
    latest: dict[str, Signal] = {}
    for signal in signals:
        latest.pop(signal.event_id, None)  # in order of the last arrivals
        latest[signal.event_id] = signal
    slots: dict[tuple[object, ...], tuple[str, Signal]] = {}
    for signal in latest.values():
        named = signal.response_id or signal.trace_id
        answer = answer_of.get(named) if named else "session"
        if answer is not None:
            slots[answer, signal.kind, signal.name, signal.subject] = answer, signal
    return list(slots.values())


def session_reward(
    interactions: Sequence[Interaction], signals: Iterable[Signal], weights: Mapping[str, float]
) -> SessionReward | None:
    """The reward of one session on one route; None while there is no evidence.

    `interactions`: oldest first. `signals`: all signals about them, in order of arrival. `weights`: by kind.
    Answers that failed, and those that an operator pinned to an arm, are no evidence about an arm's quality. A
    verdict on the whole session stands beside those on its answers.
    """
    answers = [i for i in interactions if i.error in (None, "client_left") and i.answerer.policy != "pinned"]
    if not answers:
        return None
    known = {name: i.event_id for i in answers for name in (i.request_id, i.response_id, i.trace_id) if name}
    evidence: dict[str, float] = {}
    moved_by: dict[str, int] = {}
    for answer, signal in counted(signals, known):
        weight, sign = weights.get(signal.kind), score(signal)
        if weight is None or sign is None:
            continue
        evidence[answer] = evidence.get(answer, 0.0) + weight * sign
        moved_by[signal.kind] = moved_by.get(signal.kind, 0) + 1
    if not evidence:
        return None
    mean = sum(max(-1.0, min(1.0, e)) for e in evidence.values()) / len(evidence)
    first = answers[0]
    return SessionReward(
        first.answerer.arm, first.at, 0.5 + 0.5 * mean, len(evidence), moved_by, first.answerer.segment
    )
