"""What has been said of an answer so far, where it disagrees, and what it is worth. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from router.policy import Reward
from router.reward import GONE, TWO_SIDED, Heard, counted, score, session_reward
from telemetry.events import ELSEWHERE, REPLACED, Interaction, Signal, answer_name, names_of


def summary(
    answer: Interaction,
    session: Sequence[Interaction],
    signals: Sequence[Heard],
    terms: Reward,
    now: float,
    *,
    text: bool = False,
) -> dict[str, Any]:
    """What is known of `answer`. `session`: its requests on the answer's route; `signals`: all about them, in order.

    The reward is the session's, in [0, 1], of what counts by `now`; None while nothing does. `text`: with what people
    wrote.
    """
    names = dict.fromkeys(names_of(answer), answer.event_id)
    heard = [
        (seq, s)
        for seq, s in signals
        if s.kind != ELSEWHERE and s.response_id and (s.response_id in names or answer_name(s.response_id) in names)
    ]
    standing = [signal for _, _, signal in counted(heard, names) if signal.kind != REPLACED]
    ripe = max(
        (seq for seq, s in signals if s.kind not in GONE and (s.received_at or s.at) <= now - terms.window), default=0
    )
    reward = session_reward(session, signals, terms, ripe)
    behaviour = [s for _, s in signals if s.kind not in TWO_SIDED and s.kind in terms.signals]
    return {
        "response_id": answer.response_id or answer.request_id,
        "at": answer.at,
        "signals": [_of_kind(kind, standing, text) for kind in dict.fromkeys(s.kind for s in standing)],
        "replaced": len(heard) - len(standing),
        "conflicts": conflicts(standing),
        "reward": {
            "so_far": None if reward is None else reward.reward,
            "moved_by": {} if reward is None else dict(reward.moved_by),
            "waiting": sum((s.received_at or s.at) > now - terms.window for s in behaviour),
        },
    }


def _of_kind(kind: str, signals: Iterable[Signal], text: bool) -> dict[str, Any]:
    mine = [s for s in signals if s.kind == kind]
    values = [s.value for s in mine if s.value is not None]
    found: dict[str, Any] = {
        "kind": kind,
        "count": len(mine),
        "mean": sum(values) / len(values) if values else None,
        "sources": dict(Counter(s.source for s in mine)),
        "last_at": max(s.at for s in mine),
    }
    return found | {"texts": [s.text for s in mine if s.text]} if text else found


def conflicts(signals: Iterable[Signal]) -> list[dict[str, Any]]:
    """Kinds of vote that say good as well as bad of one answer, and pairs of kinds that say the opposite."""
    good: Counter[str] = Counter()
    bad: Counter[str] = Counter()
    for signal in signals:
        verdict = score(signal) if signal.kind in TWO_SIDED else None
        good[signal.kind] += verdict is not None and verdict > 0
        bad[signal.kind] += verdict is not None and verdict < 0
    kinds = sorted(kind for kind in good if good[kind] or bad[kind])
    within = [{"kinds": [kind], "good": good[kind], "bad": bad[kind]} for kind in kinds if good[kind] and bad[kind]]
    between = [
        {"kinds": [one, other], "good": good[one] + good[other], "bad": bad[one] + bad[other]}
        for place, one in enumerate(kinds)
        for other in kinds[place + 1 :]
        if (good[one] > bad[one]) != (good[other] > bad[other]) and good[one] != bad[one] and good[other] != bad[other]
    ]
    return within + between
