"""From what a session's users did to one number in [0, 1], or to none. Pure.

Each answer's evidence is the sum of weight x score x confidence over the signals that it got, cut to [-1, 1]; a
session's reward is 0.5 + 0.5 x the mean over the answers that have evidence. An answer nobody reacted to is not
a zero: it is not counted at all. Once the route's business outcome is known, it alone is the reward.

A vote says good or bad with the same ease, so it counts as it comes. A behaviour has one sign, and good and bad ones
take different times to show (a copy comes before a second try), so what an answer got counts only when its first
signal is as old as the window: then all of them do, and later ones of that window revise the reward.

The session's reward belongs to the arm that it was assigned first (as in an experiment that is analysed by intention
to treat), even if an operator pinned another one later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from router.arms import Cell, Sums
from router.bandit import bucket_of
from router.policy import Outcome, Reward
from telemetry.events import ELSEWHERE, REPLACED, Interaction, Signal, answer_name, names_of

TWO_SIDED = frozenset(["thumb", "rating", "comparison", "survey", "outcome"])
NAMED = frozenset(["survey", "outcome"])
GONE = frozenset([REPLACED, ELSEWHERE])
"""What a session is looked at again for, and that counts for nothing."""
NOT_DRAWN = frozenset(["pinned", "fallback"])
"""Policies of answers by an arm that the session did not draw: an operator named it, or no replica served its own."""
SESSION = "session"
"""In the place of an answer: the session as a whole."""
ALL = 2**63 - 1

Heard = tuple[int, Signal]
"""A signal with its sequence number."""
Session = tuple[str, str]
"""Tenant, session."""
Requests = Mapping[Session, list[tuple[int, Interaction]]]
"""Of each session, its requests with their sequence numbers, oldest first."""


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
    vote: float | None = None
    """What votes and outcomes alone say, in [0, 1]; None without any."""

    @property
    def pattern(self) -> tuple[str, ...]:
        """The kinds of behaviour that counted."""
        return tuple(sorted(set(self.moved_by) - TWO_SIDED))

    def contribution(self) -> dict[Cell, Sums]:
        return {self.cell(): Sums(1.0, self.reward, self.reward**2)}

    def cell(self, metric: str = "") -> Cell:
        """Where the session's reward, or another metric of it, is counted."""
        return Cell(self.segment, self.arm, bucket_of(self.at), metric)


def score(signal: Signal) -> float | None:
    """A signal on the scale from -1 (bad) to 1 (good) before its kind's weight; None if it says neither.

    Votes are two-sided: their value decides. A behaviour either happened (1) or is not reported; whether it is
    good or bad is the sign of the weight that the operator gave it. An edit happened as far as the answer did not
    survive it.
    """
    match signal.kind:
        case "thumb":
            return 1.0 if signal.value else -1.0
        case "rating":
            return None if signal.value is None else (signal.value - 3.0) / 2.0
        case "comparison":
            return None if signal.value is None else 2.0 * signal.value - 1.0
        case "edit" if signal.value is not None and 0.0 <= signal.value <= 1.0:
            return 1.0 - signal.value
        case "comment" | "survey" | "outcome" | "dwell" | "first_action" | "poll" | "session_length":
            return None
        case _:
            return 1.0


def counted(signals: Iterable[Heard], answer_of: Mapping[str, str]) -> list[tuple[str, int, Signal]]:
    """Of signals in order of arrival, those that count, each with the answer (or `SESSION`) that it is about.

    The last one of each event id and, of those, of each (answer, kind, subject) counts, outcomes and surveys by name.
    `answer_of`: an answer by any of its names; a signal about one that is not there does not count.
    """
    latest: dict[str, Heard] = {}
    for seq, signal in signals:
        latest.pop(signal.event_id, None)  # in order of the last arrivals
        latest[signal.event_id] = seq, signal
    slots: dict[tuple[object, ...], tuple[str, int, Signal]] = {}
    for seq, signal in latest.values():
        answer = _answer(signal, answer_of)
        said_by_itself = signal.kind != "comparison" or signal.source == "detected"  # else it speaks of two answers
        if answer is not None and said_by_itself:
            name = signal.name if signal.kind in NAMED else None
            slots[answer, signal.kind, name, signal.subject] = answer, seq, signal
    return list(slots.values())


def session_reward(
    interactions: Sequence[Interaction], signals: Sequence[Heard], terms: Reward, matured: int = ALL
) -> SessionReward | None:
    """The reward of one session on one route; None while there is no evidence.

    `interactions`: oldest first. `signals`: all signals about them, in order of arrival. `matured`: the sequence
    number up to which signals have waited for `terms.window`. Answers that failed, and those by an arm that the session
    did not draw, are no evidence about an arm's quality. A verdict on the session stands beside those on its answers.
    """
    answers = [i for i in interactions if i.error in (None, "client_left") and i.answerer.policy not in NOT_DRAWN]
    if not answers:
        return None
    names = {name: i.event_id for i in answers for name in (*names_of(i), i.trace_id) if name}
    ends = {i.event_id: i.at + i.duration for i in answers}
    ends[SESSION] = max(ends.values())
    ripe = {_answer(signal, names) for seq, signal in signals if seq <= matured and signal.kind not in GONE}
    evidence: dict[str, float] = {}
    outcomes: list[float] = []
    votes: list[float] = []
    moved_by: dict[str, int] = {}
    for answer, _, signal in counted(signals, names):
        if signal.kind not in TWO_SIDED and (answer not in ripe or _happened(signal) > ends[answer] + terms.window):
            continue
        if terms.outcome and (result := _result(signal, terms.outcome)) is not None:
            outcomes.append(result)
        weight, sign = terms.signals.get(signal.kind), score(signal)
        if weight is not None and sign is not None:
            evidence[answer] = evidence.get(answer, 0.0) + weight * sign * signal.confidence
            moved_by[signal.kind] = moved_by.get(signal.kind, 0) + 1
            votes += [0.5 + 0.5 * sign] if signal.kind in TWO_SIDED else []
    first = answers[0]
    vote = sum(outcomes or votes) / len(outcomes or votes) if outcomes or votes else None
    if outcomes and vote is not None:
        reward, heard = vote, len(outcomes)
        moved_by = {kind: n for kind, n in moved_by.items() if kind not in TWO_SIDED} | {"outcome": heard}
    elif evidence:
        heard = len(evidence)
        reward = 0.5 + 0.5 * sum(max(-1.0, min(1.0, e)) for e in evidence.values()) / heard
    else:
        return None
    return SessionReward(first.answerer.arm, first.at, reward, heard, moved_by, first.answerer.segment, vote)


def _answer(signal: Signal, answer_of: Mapping[str, str]) -> str | None:
    named = signal.response_id or signal.trace_id
    return (answer_of.get(named) or answer_of.get(answer_name(named))) if named else SESSION


def _happened(signal: Signal) -> float:
    """When, as the client says, but not later than we heard of it."""
    return min(signal.at, signal.received_at or signal.at)


def _result(signal: Signal, outcome: Outcome) -> float | None:
    """The outcome on the scale from 0 (its worst) to 1 (its best); None if this is another one."""
    if signal.kind != "outcome" or signal.name != outcome.name or signal.value is None:
        return None
    return max(0.0, min(1.0, (signal.value - outcome.worst) / (outcome.best - outcome.worst)))


def by_session(sessions: Requests, signals: Iterable[Heard]) -> dict[Session, list[Heard]]:
    """The signals about each session. One without any is left out: it has nothing to contribute, nor to take back."""
    session_of = {
        (tenant, name): session
        for (tenant, session), requests in sessions.items()
        for _, i in requests
        for name in names_of(i)
    }
    heard: dict[Session, list[Heard]] = {}
    for seq, s in signals:
        name = s.response_id and answer_name(s.response_id)
        session = session_of.get((s.tenant, name)) if name else s.session
        if session is not None:
            heard.setdefault((s.tenant, session), []).append((seq, s))
    return heard
