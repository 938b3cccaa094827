"""What a judge says of a shadow: a challenger's unseen answers beside those that were shown, as they come.

Only where a judge is written and text of both answers is kept. The tally is a document of the store, which the rollout
controller looks at: it pauses a rollout once `MOST` were judged and the challenger has clearly lost more than half.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from learner.expectations import prompt_text
from learner.judge import Compared, Judge
from router.rollout_controller import load
from router.store import Documents
from router.trial import Judged, judged_name
from telemetry.events import Shadow
from telemetry.journal import Journal

MOST = 100
"""Copies of one rollout that are judged."""
AT_ONCE = 20
BATCH = 1000


def judge_shadow(
    documents: Documents, route: str, journal: Journal, judge: Judge, now: Callable[[], float] = time.time
) -> Judged | None:
    """Judge some more of the route's shadow; the tally so far, None while nothing is shadowed."""
    _, rollout = load(documents, route)
    if rollout is None or not rollout.active or rollout.phase == "pending":
        return None
    name = judged_name(rollout.id)
    body = documents.read(name)
    known = msgspec.json.decode(body, type=Judged) if body else Judged(most=MOST)
    pairs: list[Compared] = []
    through = known.through or _beginning(journal, rollout.began)
    while known.judged + len(pairs) < MOST and len(pairs) < AT_ONCE and (facts := journal.read(through, BATCH)):
        for seq, fact in facts:
            through = seq
            if isinstance(fact, Shadow) and fact.rollout == rollout.id and (pair := _pair(journal, fact)) is not None:
                pairs.append(pair)
                if known.judged + len(pairs) >= MOST or len(pairs) >= AT_ONCE:
                    break
    scores = judge.compare(pairs) if pairs else []
    told = [score for score in scores if score is not None]
    after = msgspec.structs.replace(
        known, through=through, judged=known.judged + len(told), score=known.score + sum(told), at=now()
    )
    if after.through != known.through:
        documents.swap(name, body, msgspec.json.encode(after))
    return after


def _beginning(journal: Journal, began: float) -> int:
    """The number of a fact that came before a rollout began; 0 if none did."""
    for rows in journal.backwards():
        for seq, fact in rows:
            if fact.at < began:
                return seq
    return 0


def _pair(journal: Journal, shadow: Shadow) -> Compared | None:
    """The challenger's answer first; None where some text was not kept, or somebody failed."""
    shown = journal.request(shadow.tenant, shadow.of)
    if shown is None or not (shown.messages and shown.answer and shadow.answer) or shadow.error or shown.error:
        return None
    messages = (
        shown.messages if isinstance(shown.messages, list) else [{"role": "user", "content": str(shown.messages)}]
    )
    return Compared(shadow.event_id, prompt_text(messages), shadow.answer, shown.answer)
