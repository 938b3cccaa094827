"""What `understudy signals` shows: the newest signals, each with the answer that it is about."""

from __future__ import annotations

from typing import Any

from telemetry.events import Signal
from telemetry.journal import Journal


def newest(
    journal: Journal, since: float, limit: int, kind: str | None = None, *, text: bool = False
) -> list[dict[str, Any]]:
    """The last `limit` signals not older than `since`, newest first; `text`: with what people wrote."""
    found: list[Signal] = []
    for _, fact in reversed(journal.recent(since)):
        if isinstance(fact, Signal) and kind in (None, fact.kind):
            found.append(fact)
            if len(found) == limit:
                break
    return [_row(signal, journal, text) for signal in found]


def _row(signal: Signal, journal: Journal, text: bool) -> dict[str, Any]:
    answers = [fact for _, fact in journal.answers(signal)]
    answer = answers[-1] if answers else None
    row = {
        "at": signal.at,
        "kind": signal.kind,
        "value": signal.value,
        "name": signal.name,
        "tenant": signal.tenant,
        "answer": answer.request_id if answer else signal.response_id,
        "route": answer.route if answer else None,
        "arm": answer.answerer.arm if answer else None,
        "source": signal.source,
        "detector": signal.detector,
        "confidence": signal.confidence,
        "reason": signal.reason,
        "verified": signal.verified,
    }
    return row | {"text": signal.text, "target": signal.target} if text else row
